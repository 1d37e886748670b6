"""Which stretches of a long sequence a stage sees at once, so that time and memory grow with its length only."""

from __future__ import annotations

from typing import NamedTuple

from musiclm_pytorch.checks import typechecked


class Window(NamedTuple):
    """Positions [start, stop) of the whole: those before `known` are given, the rest is generated."""

    start: int
    known: int
    stop: int


@typechecked
def continued_windows(
    length: int, window: int | None, overlap: int = 0, prime: int = 0, prime_overlap: int | None = None
) -> list[Window]:
    """Windows that each continue the one before from its last `overlap` positions, as MusicLM's semantic and coarse
    stages do (https://arxiv.org/abs/2301.11325, section 3: 15 of 30 s).

    length: positions in all, of which the first `prime` are given; window: the most a window holds, None for all
    prime_overlap: how many of the given positions the first window sees, at most; None for all of them where they are
        fewer than a window, else for `overlap`

    Raises ValueError unless 0 ≤ overlap < window and 0 ≤ prime_overlap < window.
    """
    if window is not None:
        _check_window(window)
    for name, seen in dict(overlap=overlap, prime_overlap=prime_overlap or 0).items():
        if seen < 0:
            raise ValueError(f'{name} must be 0 or above, got {seen}')
        if window is not None and seen >= window:
            raise ValueError(f'{name} must lie between 0 and window - 1 = {window - 1}, got {seen}')
    if prime_overlap is None:
        prime_overlap = prime if window is None or prime < window else overlap
    first = max(prime - prime_overlap, 0)
    if window is None:
        return [Window(first, prime, length)] if prime < length else []
    windows, known = [], prime
    while known < length:
        start = known - overlap if windows else first
        windows.append(Window(start, known, min(start + window, length)))
        known = windows[-1].stop
    return windows


@typechecked
def separate_windows(length: int, window: int | None, prime: int = 0) -> list[Window]:
    """Windows side by side, made without each other's result, as MusicLM's fine stage does (3 s each).

    The last one is as long as the others, so that its positions are those of training: it begins before the end of
    the one before, and what that one has made of the shared stretch stays.
    """
    if window is None:
        return [Window(0, prime, length)] if prime < length else []
    _check_window(window)
    last = max(length - window, 0)
    windows = [
        Window(min(start, last), max(start, prime), min(start + window, length)) for start in range(0, length, window)
    ]
    return [w for w in windows if w.known < w.stop]


def _check_window(window: int) -> None:
    if window < 1:
        raise ValueError(f'window must be at least 1, got {window}; None generates all at once')
