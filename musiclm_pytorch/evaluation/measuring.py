"""All that is measured of a set of clips, each read once for its signal and once for its embeddings, over all ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from musiclm_pytorch.collectives import rank, world_size
from musiclm_pytorch.evaluation.embedders import Embedder
from musiclm_pytorch.evaluation.embedding import EmbeddedClip, embed_clips
from musiclm_pytorch.evaluation.figures import Figure
from musiclm_pytorch.evaluation.frechet import ThinnedStatistics
from musiclm_pytorch.evaluation.inputs import read_clip
from musiclm_pytorch.evaluation.kernel import FrameReservoir
from musiclm_pytorch.evaluation.quality import signal_quality
from musiclm_pytorch.evaluation.structure import StructureResult, structure_of
from musiclm_pytorch.evaluation.tagging import Tagger
from musiclm_pytorch.mulan.layers import l2norm

RAISED_AGAIN = (FileNotFoundError, OSError, ValueError, TypeError)


@dataclass
class Measured:
    """A set of clips.

    quality, structure: by index of the clip
    means: by embedder and index, the mean of a clip's frames, `(dim,)` of length 1
    missing: by embedder and index, why a clip has none
    statistics, samples: of the frames of all clips, by embedder; not of a tagger, whose outputs have no distance
    """

    quality: dict[int, dict[str, Figure]] = field(default_factory=dict)
    structure: dict[int, StructureResult] = field(default_factory=dict)
    means: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    missing: dict[str, dict[int, str]] = field(default_factory=dict)
    statistics: dict[str, ThinnedStatistics] = field(default_factory=dict)
    samples: dict[str, FrameReservoir] = field(default_factory=dict)

    def merge(self, other: Measured) -> None:
        """Add what was found of other clips of the set."""
        self.quality |= other.quality
        self.structure |= other.structure
        for name in other.means:
            self.means[name] |= other.means[name]
            self.missing[name] |= other.missing[name]
        for name in other.statistics:
            self.statistics[name].merge(other.statistics[name])
            self.samples[name].merge(other.samples[name])

    def add_embedder(self, embedder: Embedder, seed: int) -> None:
        """Make room for what an embedder gives; the statistics of tags are of no use."""
        self.means[embedder.name], self.missing[embedder.name] = {}, {}
        if not isinstance(embedder, TaggerEmbedder):
            self.statistics[embedder.name] = ThinnedStatistics(embedder.dim, seed)
            self.samples[embedder.name] = FrameReservoir(embedder.dim, seed=seed)

    def add_clip(self, clip: EmbeddedClip) -> None:
        """Add the frames of a clip by each embedder, or why there are none."""
        for name, frames in clip.frames.items():
            self.means[name][clip.index] = l2norm(frames.mean(dim=0))
            if name in self.statistics:
                self.statistics[name].update(frames, clip.index)
                self.samples[name].update(frames, clip.index)
        for name, reason in clip.missing.items():
            self.missing[name][clip.index] = reason

    def rows(self, name: str, clips: Collection[int]) -> tuple[list[int], Tensor]:
        """Some clips that an embedder has frames of: their indices, in order, and their means `(n, dim)`."""
        kept = sorted(clips)
        return kept, torch.stack([self.means[name][index] for index in kept]) if kept else torch.zeros(0, 1)


class TaggerEmbedder:
    """A tagger as an embedder: one frame a clip, its distribution over the tags."""

    name = 'tags'

    def __init__(self, tagger: Tagger):
        if tagger.sample_rate is None:
            raise ValueError(
                'the tagger does not know the rate of the waves that it takes; give one that does, such as a '
                'ZeroShotTagger of a MuLaN that was built with audio_sample_rate'
            )
        self.tagger = tagger
        self.sample_rate, self.dim, self.min_samples = tagger.sample_rate, len(tagger.tags), tagger.min_samples

    def embed(self, waves: list[Tensor]) -> list[Tensor]:
        return list(self.tagger.probabilities(waves)[:, None]) if waves else []


def measure(
    clips: Sequence[Tensor | Path],
    sample_rate: int,
    *,
    quality: bool,
    structure: bool,
    embedders: Collection[Embedder],
    batch_size: int,
    seed: int,
    progress: bool,
    label: str,
) -> Measured:
    """Measure a set of clips, each rank its share; every rank has all that was found.

    Args:
        clips: as `inputs.list_clips` gives them, the same on every rank.
        sample_rate: of the waves in Hz; files tell their own.
        quality, structure: whether to measure signal and structure.
        embedders: of different names.
        batch_size: clips embedded at a time.
        seed: of what is drawn from the frames.
        progress: show progress bars, on the first rank.
        label: of the bars.

    Raises:
        on every rank what goes wrong on one, with the same message (see `over_ranks`).
    """
    own = range(rank(), len(clips), world_size())
    found, fault = Measured(), None
    bar = partial(tqdm, unit='clip', total=len(own), disable=not progress or rank() > 0, leave=False)
    try:
        if quality or structure:
            for index in bar(own, desc=f'{label}: signal'):
                wave, rate = read_clip(clips[index], sample_rate)
                if quality:
                    found.quality[index] = signal_quality(wave, rate)
                if structure:
                    found.structure[index] = structure_of(wave, rate)
        for embedder in embedders:
            found.add_embedder(embedder, seed)
        if embedders:
            sources = (clip if isinstance(clip, Path) else (clip, sample_rate) for clip in (clips[i] for i in own))
            embedded = embed_clips(sources, list(embedders), batch_size=batch_size, indices=own)
            for clip in bar(embedded, desc=f'{label}: embeddings'):
                found.add_clip(clip)
    except Exception as error:  # the other ranks, too, must know, or they would wait for what was found
        fault = error
    return over_ranks(found if fault is None else fault)


def over_ranks(found: Measured | Exception) -> Measured:
    """What all ranks found, joined in their order, on every rank.

    Raises the first error that a rank comes with, on every rank, naming that rank: as one of `RAISED_AGAIN` if it is
    one, else as a RuntimeError that names its type.
    """
    if world_size() == 1:
        if isinstance(found, Exception):
            raise found
        return found
    own = found if isinstance(found, Measured) else (type_again(found), told(found))
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, own)
    for place, part in enumerate(parts):
        if not isinstance(part, Measured):
            kind, message = part
            raise kind(f'rank {place}: {message}') from (found if isinstance(found, Exception) else None)
    first, *others = parts
    for other in others:
        first.merge(other)
    return first


def type_again(error: Exception) -> type[Exception]:
    """As what it is raised on the other ranks: types that take a message alone, and that may be sent."""
    return next((kind for kind in RAISED_AGAIN if isinstance(error, kind)), RuntimeError)


def told(error: Exception) -> str:
    return str(error) if isinstance(error, RAISED_AGAIN) else f'{type(error).__name__}: {error}'
