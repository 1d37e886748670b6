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

    index: its place among the sources, from 0
    frames: by the name of an embedder, `(n, dim)` float32 on the CPU
    missing: by the name of an embedder, why there are no frames: the clip is too short for it
    """

    index: int
    frames: dict[str, Tensor]
    missing: dict[str, str]


@typechecked
def embed_clips(
    sources: Iterable[Source], embedders: Sequence[Embedder], *, batch_size: int = 16, prefetch: int = 2
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

    Yields:
        an `EmbeddedClip` a source. A clip that is too short for an embedder has no frames by it, but a reason.

    Raises:
        ValueError: no embedders, two of one name; and, when it gets there, a file that does not decode, NaN or
        infinity, naming the clip. FileNotFoundError. Whatever goes wrong in the thread reaches the caller.
    """
    check_positive(batch_size=batch_size, prefetch=prefetch)
    names = [embedder.name for embedder in embedders]
    if not names or len(set(names)) < len(names):
        raise ValueError(f'embedders must be one or more of different names, got {names}')
    return _embed_clips(sources, embedders, batch_size, prefetch)


def _embed_clips(
    sources: Iterable[Source], embedders: Sequence[Embedder], batch_size: int, prefetch: int
) -> Iterator[EmbeddedClip]:
    batches: queue.Queue = queue.Queue(maxsize=prefetch)
    closed = threading.Event()
    rates = {embedder.sample_rate for embedder in embedders}
    reader = threading.Thread(target=_read, args=(sources, rates, batch_size, batches, closed), daemon=True)
    reader.start()
    done = 0
    try:
        while (batch := batches.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            clips = [EmbeddedClip(done + offset, {}, {}) for offset in range(len(batch))]
            for embedder in embedders:
                waves = [by_rate[embedder.sample_rate] for by_rate in batch]
                fits = [len(wave) >= embedder.min_samples for wave in waves]
                frames = iter(embedder.embed([wave for wave, fit in zip(waves, fits) if fit]))
                for clip, wave, fit in zip(clips, waves, fits):
                    if fit:
                        clip.frames[embedder.name] = next(frames)
                    else:
                        clip.missing[embedder.name] = too_short(embedder, len(wave))
            done += len(batch)
            yield from clips
    finally:
        closed.set()
        reader.join()


def _read(
    sources: Iterable[Source], rates: set[int], batch_size: int, batches: queue.Queue, closed: threading.Event
) -> None:
    """Put batches of waves by rate into a queue, then None, or what went wrong; until it is closed."""

    def put(item: Any) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                batches.put(item, timeout=PATIENCE)
                break

    try:
        numbered = enumerate(sources)
        while not closed.is_set() and (batch := list(islice(numbered, batch_size))):
            put([_waves_by_rate(source, rates, f'clip {index}') for index, source in batch])
        put(None)
    except BaseException as error:  # the caller raises it
        put(error)


def _waves_by_rate(source: Source, rates: set[int], name: str) -> dict[int, Tensor]:
    """A clip as mono waves `(samples,)` float32 by rate in Hz; `name` is how errors call one that is not a file."""
    if isinstance(source, (str, Path)):
        with AudioFile(source) as file:
            wave, rate, name = file.read(0, len(file)), file.sample_rate, file.name
    else:
        if not isinstance(source, tuple) or len(source) != 2:
            raise TypeError(f'{name} must be a path or a pair of a wave and its rate, got {type(source).__name__}')
        wave, rate = source
        check_sample_rate(rate)
        check_audio(wave, ndim=1, shape='(samples,)', name=name)
    wave = wave.detach().float()
    # one sum tells, at a fraction of the time of isfinite().all(); it may overflow where no sample does
    if not math.isfinite(wave.sum().item()) and not wave.isfinite().all():
        raise ValueError(f'{name} holds NaN or infinite samples')
    return {to: resample(wave, rate, to) for to in rates}
