"""What someone asks music for, read and checked: prompts, lengths, how to sample, and a prime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import reduce
from torch import Tensor

from musiclm_pytorch.audiolm.sampling import Sampling
from musiclm_pytorch.audiolm.stages import STAGES
from musiclm_pytorch.checks import (
    as_tensor,
    check_audio,
    check_channels,
    check_finite,
    check_positive,
    check_sample_rate,
)
from musiclm_pytorch.data.audio import AudioFile

Story = Sequence[tuple[float, str]]
PerStage = float | Sequence[float]
CountPerStage = int | Sequence[int | None] | None


def read_prompts(text: str | Sequence[str] | Story) -> tuple[list[str], Story | None]:
    """The prompts, and the story if it is one.

    Raises ValueError for none, an empty one, or a part of a story without length.
    """
    items = [text] if isinstance(text, str) else list(text)
    if not items:
        raise ValueError('text is an empty list; pass at least one prompt')
    is_story = not isinstance(items[0], str)
    prompts = [prompt for _, prompt in items] if is_story else items
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f'a prompt must say something, got {prompt!r}')
    if not is_story:
        return prompts, None
    for length, prompt in items:
        check_positive(**{f'the length of {prompt!r} in seconds': length})
    return prompts, items


def read_seconds(seconds: float | None, max_length: int | None, story: Story | None, *, semantic_rate: Any) -> float:
    """The length of the music in seconds, 10 by default; `max_length` counts semantic tokens."""
    given = [name for name, it in dict(seconds=seconds, max_length=max_length).items() if it is not None]
    if story:
        if given:
            raise ValueError(f'a story tells its length itself; leave out {given[0]}')
        return float(sum(length for length, _ in story))
    if len(given) == 2:
        raise ValueError(f'pass seconds or max_length, got both: {seconds} and {max_length}')
    if max_length is not None:
        return float(max_length / semantic_rate)
    return 10.0 if seconds is None else float(seconds)


def read_sampling(*, conditioned: Sequence[bool], **given: Any) -> list[Sampling]:
    """How each stage samples, from one value for all of them or three; a stage without conditioning has no guidance."""
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, Sequence) else (value,) * len(STAGES)
        if len(given[name]) != len(STAGES):
            raise ValueError(f'{name} must be one number or three, for {", ".join(STAGES)}, got {value}')
    samplings = []
    for i, has_condition in enumerate(conditioned):
        own = {key: values[i] for key, values in given.items()}
        samplings.append(Sampling(**own if has_condition else {**own, 'cond_scale': 1.0}))
    return samplings


def read_prime(
    wave: Tensor | np.ndarray | None, rate: int | None, path: str | Path | None, *, seconds: float
) -> tuple[Tensor, int] | None:
    """The prime as `(1, samples)` and its rate in Hz.

    Raises ValueError for a prime without a rate, of another shape, or no shorter than the music, TypeError for
    integers, FileNotFoundError for a missing file.
    """
    if wave is None and path is None:
        return None
    if wave is not None and path is not None:
        raise ValueError('pass prime_wave or prime_wave_path, not both')
    if path is not None:
        with AudioFile(path) as file:
            check_shorter(len(file) / file.sample_rate, seconds)  # before hours of it are read
            wave, rate = file.read(0, len(file)), file.sample_rate
    if rate is None:
        raise ValueError('prime_wave needs its rate in Hz: pass prime_wave_input_sample_hz')
    check_sample_rate(rate)
    wave = as_tensor(wave)
    check_channels(wave, 'prime_wave')
    wave = check_audio(wave, ndim=wave.ndim, shape='(samples,) or (channels, samples)', name='prime_wave')
    if wave.shape[-1] == 0:
        raise ValueError(f'prime_wave of shape {tuple(wave.shape)} has no samples')
    wave = wave.float()
    wave = wave[None] if wave.ndim == 1 else reduce(wave, 'c n -> 1 n', 'mean')
    check_finite(wave, 'prime_wave holds NaN or infinity')
    check_shorter(wave.shape[-1] / rate, seconds)
    return wave, rate


def check_shorter(prime: float, seconds: float) -> None:
    """Raise ValueError unless a prime of so many seconds leaves some of the music to make."""
    if prime >= seconds:
        raise ValueError(
            f'the prime lasts {prime:.2f} s and the music {seconds:g} s, the prime included; ask for more seconds'
        )
