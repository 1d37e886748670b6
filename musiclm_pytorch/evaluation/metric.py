"""A metric (update, merge, compute), and what it gives: numbers with their uncertainty, or why there is none."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from musiclm_pytorch.mulan.layers import l2norm

if TYPE_CHECKING:
    from musiclm_pytorch.evaluation.embedders import Embedder

# the parts of an evaluation of music, and their headings
GROUPS = dict(
    audio_quality='Audio quality',
    text_audio_alignment='Text–audio alignment',
    music_structure='Music structure',
)
CONFIDENCE, RESAMPLES = 0.95, 2000
# numbers drawn at a time: bounds the memory of a bootstrap over many values
DRAWN_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class MetricValue:
    """One measured number; `float(…)` of it is the number.

    Attributes:
        value: the number; None where it is not defined, and then `reason` says why
        low, high: its confidence interval, where there is one
        count: how many items it was measured on
        unit: such as 'LUFS', 'BPM', 'dB'; '' for shares, cosines and the like
        details: JSON-able facts to read it by, such as a seed, R², or the name of an embedding
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int | None = None
    unit: str = ''
    reason: str = ''
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ('value', 'low', 'high'):
            number = getattr(self, name)
            if number is not None:
                if not math.isfinite(number):
                    raise ValueError(f'{name} of a metric must be finite, got {number}; say undefined(reason) instead')
                object.__setattr__(self, name, float(number))
        if self.value is None and not self.reason:
            raise ValueError('a metric without a value needs a reason')

    def __float__(self) -> float:
        if self.value is None:
            raise ValueError(f'there is no value: {self.reason}')
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: 'value' always, the rest where it says something."""
        found: dict[str, Any] = dict(value=self.value)
        for name in ('low', 'high', 'count', 'unit', 'reason'):
            if (it := getattr(self, name)) not in (None, ''):
                found[name] = it
        return found | {name: to_json(it) for name, it in self.details.items()}


Figure = MetricValue  # its earlier name


def undefined(reason: str, **details: Any) -> MetricValue:
    """A number that cannot be had, and why."""
    return MetricValue(None, reason=reason, details=details)


def mean_value(
    values: Sequence[float] | np.ndarray, *, unit: str = '', seed: int = 0, missing: str = '', **details: Any
) -> MetricValue:
    """The mean of one value an item, with the 95 % percentile bootstrap interval over items (Efron, 1979).

    Values that are not finite are left out and counted in the detail 'left_out'. With one value there is no interval.

    `seed` is that of the resampling, `missing` what to say if no value is left, and `details` are further facts.
    """
    values = np.asarray(values, dtype=np.float64)
    kept = values[np.isfinite(values)]
    if len(kept) < len(values):
        details['left_out'] = len(values) - len(kept)
    if len(kept) == 0:
        return undefined(missing or 'no item has a value', **details)
    if len(kept) == 1:
        return MetricValue(kept[0], count=1, unit=unit, details=details)
    random, rows, means = np.random.default_rng(seed), max(1, DRAWN_AT_ONCE // len(kept)), []
    for start in range(0, RESAMPLES, rows):
        drawn = random.integers(len(kept), size=(min(rows, RESAMPLES - start), len(kept)))
        means.append(kept[drawn].mean(axis=1))
    return MetricValue(kept.mean(), *percentile_interval(np.concatenate(means)), len(kept), unit, details=details)


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """The interval that holds `CONFIDENCE` of the samples."""
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean_of_clips(clips: Sequence[Mapping[str, MetricValue]], *, seed: int = 0) -> dict[str, MetricValue]:
    """The mean over clips of each value of theirs, with its bootstrap interval.

    Clips without a value are left out of that mean, and counted in the detail 'left_out'. If none has a value, the
    reason is that of most clips. Raises ValueError for no clips, or clips with other values.
    """
    if not clips:
        raise ValueError('no clips to summarise; pass one at least')
    for i, clip in enumerate(clips):
        if list(clip) != list(clips[0]):
            raise ValueError(f'clip {i} has the values {list(clip)}, but clip 0 has {list(clips[0])}')
    found = {}
    for name in clips[0]:
        own = [clip[name] for clip in clips]
        values = [np.nan if it.value is None else it.value for it in own]
        reasons = Counter(it.reason for it in own if it.value is None)
        missing = reasons.most_common(1)[0][0] if reasons else ''
        unit = next((it.unit for it in own if it.value is not None), '')
        found[name] = mean_value(values, unit=unit, seed=seed, missing=missing)
    return found


def to_json(results: Any) -> Any:
    """Nested mappings and sequences of values as plain dictionaries and lists."""
    if isinstance(results, MetricValue):
        return results.to_dict()
    if isinstance(results, Mapping):
        return {str(name): to_json(it) for name, it in results.items()}
    if isinstance(results, list | tuple):
        return [to_json(it) for it in results]
    return results


# ---- metrics ----


@dataclass(frozen=True)
class EvaluationClip:
    """What an `Evaluator` updates metrics with: one clip.

    Attributes:
        index: its place in its set, from 0, the same whichever process has it
        name: what errors call it
        wave: `(samples,)` float32, mono, at `sample_rate` Hz
        text: what it was made from, if that is known
        is_reference: whether it is of the reference, real music as a rule, or of what is evaluated
        frames: by the name of an embedder, `(n, dim)` float32
        missing: by the name of an embedder, why there are no frames: the clip is too short for it
    """

    index: int
    name: str
    wave: Tensor
    sample_rate: int
    text: str | None = None
    is_reference: bool = False
    frames: Mapping[str, Tensor] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def embedding(self, embedder: str) -> Tensor:
        """The mean of the frames of an embedder, `(dim,)` of length 1."""
        return l2norm(self.frames[embedder].mean(dim=0))


class Metric(ABC):
    """Gathers what it needs clip by clip (or batch by batch), and computes numbers of it.

    A metric of your own says where it starts, what a clip adds and what comes of it:

        class Brightness(Metric):
            def initial_state(self):
                return dict(means={})

            def update(self, clip):
                self.state['means'][clip.index] = clip.wave.diff().abs().mean().item()

            def compute(self):
                return dict(brightness=mean_value([*self.state['means'].values()]))

        MusicLMEvaluator(mulan=mulan, metrics=[Brightness()])

    For one value a clip, `ClipMetric` does all of this around a `measure` function.

    Attributes:
        group: the part of an evaluation's results where its numbers stand.
        embedders: those whose frames its `update` asks of a clip.
        uses_reference, needs_reference: whether reference clips change its numbers, and whether there are none without.
        state: what it has gathered, by name: dictionaries by clip, lists, numbers, tensors, or objects with `merge`.
    """

    group: str = 'audio_quality'
    embedders: Sequence[Embedder] = ()
    uses_reference: bool = True
    needs_reference: bool = False

    def __init__(self):
        self.reset()

    @abstractmethod
    def initial_state(self) -> dict[str, Any]:
        """A new state, of nothing."""

    @abstractmethod
    def update(self, *batch: Any) -> None:
        """Add to the state; metrics that an `Evaluator` runs take an `EvaluationClip`."""

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """The numbers by name, floats or `MetricValue`, or dictionaries of them; the state stays."""

    def reset(self) -> None:
        """Forget everything."""
        self.state: dict[str, Any] = self.initial_state()

    def merge(self, other: Metric) -> None:
        """Add what another of this kind has gathered of other clips; the other stays as it is."""
        self.merge_state(other.state)

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """The same of a state alone, which is what processes send each other.

        Dictionaries are joined, lists appended, numbers and arrays added up, and other objects merge by their method.

        Raises ValueError for a clip that both have: shards of a set number their clips apart.
        """
        for name, theirs in state.items():
            mine = self.state[name]
            if isinstance(mine, dict):
                if both := mine.keys() & theirs.keys():
                    raise ValueError(f'{name} of clip {min(both)} are in both; give clips of shards their own indices')
                self.state[name] = mine | theirs
            elif isinstance(mine, list | int | float | np.ndarray | Tensor):
                self.state[name] = mine + theirs
            else:
                mine.merge(theirs)

    def clip_values(self, is_reference: bool) -> dict[int, dict[str, Any]]:
        """What a table of clips says of each, by index and name: numbers, words, or None."""
        return {}


class ClipMetric(Metric):
    """Means over clips of what `measure` finds of each, with their intervals; reference clips in the table alone."""

    name: str = ''  # under which the means stand together

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed

    @abstractmethod
    def measure(self, wave: Tensor, sample_rate: int) -> Mapping[str, MetricValue | float]:
        """The values of one wave `(samples,)`, of the same names for each clip."""

    def initial_state(self) -> dict[str, Any]:
        return dict(clips={}, reference_clips={})

    def update(self, clip: EvaluationClip) -> None:
        try:
            self._side(clip.is_reference)[clip.index] = self.measure(clip.wave, clip.sample_rate)
        except ValueError as error:
            raise ValueError(f'{clip.name}: {error}') from error

    def found(self, is_reference: bool = False) -> list[Any]:
        """What was measured of each clip, in the order of the set."""
        side = self._side(is_reference)
        return [side[index] for index in sorted(side)]

    def compute(self) -> dict[str, Any]:
        clips = [{name: as_value(it) for name, it in found.items()} for found in self.found()]
        means = mean_of_clips(clips, seed=self.seed)
        return {self.name: means} if self.name else means

    def clip_values(self, is_reference: bool) -> dict[int, dict[str, Any]]:
        clips = self._side(is_reference).items()
        return {index: {name: as_value(it).value for name, it in found.items()} for index, found in clips}

    def _side(self, is_reference: bool) -> dict[int, Any]:
        return self.state['reference_clips' if is_reference else 'clips']


def as_value(number: MetricValue | float) -> MetricValue:
    return number if isinstance(number, MetricValue) else MetricValue(number)


def embedding_rows(embeddings: Mapping[int, Tensor], clips: Sequence[int] | None = None) -> tuple[list[int], Tensor]:
    """Embeddings `(n, dim)` of all clips, or of some, in the order of the set, and the indices of these."""
    kept = sorted(embeddings if clips is None else clips)
    return kept, torch.stack([embeddings[index] for index in kept]) if kept else torch.zeros(0, 1)
