"""Many clips to embeddings: read and resampled in a background thread while the models compute."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from musiclm_pytorch.checks import check_audio, check_positive, check_sample_rate, typechecked
from musiclm_pytorch.data.audio import AudioFile, resample
from musiclm_pytorch.evaluation.embedders import Embedder, too_short

# a sound file, which is mixed down to mono, or a wave `(samples,)` and its rate in Hz
Source: TypeAlias = str | Path | tuple[Tensor, int]
PATIENCE = 0.1  # seconds after which the reader of clips looks whether anyone still waits for them


class EmbeddedClip(NamedTuple):
    """One clip.

    index: its place among the sources, from 0, or the one of `indices`
    frames: by the name of an embedder, `(n, dim)` float32 on the CPU
    missing: by the name of an embedder, why there are no frames: the clip is too short for it
    """

    index: int
    frames: dict[str, Tensor]
    missing: dict[str, str]


@typechecked
def embed_clips(
    sources: Iterable[Source],
    embedders: Sequence[Embedder],
    *,
    batch_size: int = 16,
    prefetch: int = 2,
    indices: Iterable[int] | None = None,
) -> Iterator[EmbeddedClip]:
    """Embed clips, one after another in their order, by one or more embedders.

    A clip is read once and resampled to the rate of each embedder in a background thread, which is at most `prefetch`
    batches ahead; no more than `prefetch` + 2 batches of waves are in memory. `sources` may be a generator; it runs in
    that thread, too. Neighbours of one length share a batch best: sort the sources if their lengths differ a lot.

    Args:
        sources: paths of sound files, or pairs of a mono wave and its rate.
        embedders: with different names.
        batch_size: clips embedded at a time.
        prefetch: batches read ahead.
        indices: one a source, where these are a part of a set: what the clips and errors call them.

    Yields:
        an `EmbeddedClip` a source. A clip that is too short for an embedder has no frames by it, but a reason.

    Raises:
        ValueError: no embedders, two of one name; and, when it gets there, more or fewer indices than sources, a file
        that does not decode, NaN or infinity in samples or frames, and what an embedder cannot take, naming the clip
        (its file or index) and the embedder. FileNotFoundError. Whatever goes wrong in the thread reaches the caller.
    """
    check_positive(batch_size=batch_size, prefetch=prefetch)
    names = [embedder.name for embedder in embedders]
    if not names or len(set(names)) < len(names):
        raise ValueError(f'embedders must be one or more of different names, got {names}')
    numbered = enumerate(sources) if indices is None else zip(indices, sources, strict=True)
    return _embed_clips(numbered, embedders, batch_size, prefetch)


def _embed_clips(
    numbered: Iterable[tuple[int, Source]], embedders: Sequence[Embedder], batch_size: int, prefetch: int
) -> Iterator[EmbeddedClip]:
    batches: queue.Queue = queue.Queue(maxsize=prefetch)
    closed = threading.Event()
    rates = {embedder.sample_rate for embedder in embedders}
    reader = threading.Thread(target=_read, args=(numbered, rates, batch_size, batches, closed), daemon=True)
    reader.start()
    try:
        while (batch := batches.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            clips = [EmbeddedClip(read.index, {}, {}) for read in batch]
            for embedder in embedders:
                lengths = [len(read.waves[embedder.sample_rate]) for read in batch]
                fits = [length >= embedder.min_samples for length in lengths]
                frames = iter(_frames(embedder, [read for read, fit in zip(batch, fits) if fit]))
                for clip, length, fit in zip(clips, lengths, fits):
                    if fit:
                        clip.frames[embedder.name] = next(frames)
                    else:
                        clip.missing[embedder.name] = too_short(embedder, length)
            yield from clips
    finally:
        closed.set()
        reader.join()


class _ReadClip(NamedTuple):
    """Its index, what errors call it, and mono waves `(samples,)` float32 by rate in Hz."""

    index: int
    name: str
    waves: dict[int, Tensor]


def _frames(embedder: Embedder, clips: list[_ReadClip]) -> list[Tensor]:
    """Frames of clips; what goes wrong names the clip and the embedder."""
    try:
        found = embedder.embed([clip.waves[embedder.sample_rate] for clip in clips])
    except ValueError as error:
        # in a batch, the error tells at best the place: each alone tells which clip it was
        for clip in clips if len(clips) > 1 else ():
            _frames(embedder, [clip])
        names = ', '.join(clip.name for clip in clips)
        raise ValueError(f'{names}: {embedder.name} cannot embed it: {error}') from error
    for clip, frames in zip(clips, found):
        if not _is_finite(frames):
            raise ValueError(
                f'{clip.name}: {embedder.name} gives NaN or infinity for it; are its samples within [-1, 1]?'
            )
    return found


def _is_finite(values: Tensor) -> bool:
    # one sum tells, at a fraction of the time of isfinite().all(); it may overflow where no value does
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def _read(
    numbered: Iterable[tuple[int, Source]],
    rates: set[int],
    batch_size: int,
    batches: queue.Queue,
    closed: threading.Event,
) -> None:
    """Put batches of clips into a queue, then None, or what went wrong; until it is closed."""

    def put(item: Any) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                batches.put(item, timeout=PATIENCE)
                break

    try:
        numbered = iter(numbered)
        while not closed.is_set() and (batch := list(islice(numbered, batch_size))):
            put([_read_clip(index, source, rates) for index, source in batch])
        put(None)
    except BaseException as error:  # the caller raises it
        put(error)


def _read_clip(index: int, source: Source, rates: set[int]) -> _ReadClip:
    if isinstance(source, (str, Path)):
        with AudioFile(source) as file:
            wave, rate, name = file.read(0, len(file)), file.sample_rate, file.name
    else:
        name = f'clip {index}'
        if not isinstance(source, tuple) or len(source) != 2:
            raise TypeError(f'{name} must be a path or a pair of a wave and its rate, got {type(source).__name__}')
        wave, rate = source
        check_sample_rate(rate)
        check_audio(wave, ndim=1, shape='(samples,)', name=name)
    wave = wave.detach().float()
    if not _is_finite(wave):
        raise ValueError(f'{name} holds NaN or infinite samples')
    return _ReadClip(index, name, {to: resample(wave, rate, to) for to in rates})
