"""The structure of clips against what is true of them, and against that of other music."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.evaluation.figures import Figure, mean_figure, undefined
from musiclm_pytorch.evaluation.structure import FIGURES, StructureResult, key_name
from musiclm_pytorch.evaluation.tonality import PROFILES
from musiclm_pytorch.extras import how_to_install


@dataclass(frozen=True)
class StructureTruth:
    """What is known to be true of a clip; what is not known is None.

    tempo: BPM
    tonic, mode: pitch class of the key, 0 (C) to 11 (B), and 'major' or 'minor'
    beats: seconds
    boundaries: seconds at which a part ends and the next begins, without start and end of the clip; () for one part

    Raises ValueError for a tempo that is not above 0, or a key that is none.
    """

    tempo: float | None = None
    tonic: int | None = None
    mode: str | None = None
    beats: Sequence[float] | None = None
    boundaries: Sequence[float] | None = None

    def __post_init__(self):
        check_positive(tempo=self.tempo)
        if (self.tonic is None) != (self.mode is None):
            raise ValueError(f'a key is a tonic and a mode, got {self.tonic!r} and {self.mode!r}')
        if self.tonic is not None and not (self.tonic in range(12) and self.mode in PROFILES):
            raise ValueError(f"a key is a tonic of 0 to 11, 'major' or 'minor', got {self.tonic!r} and {self.mode!r}")

    @property
    def key(self) -> str | None:
        """Name of the key as mir_eval takes it."""
        return key_name(self.tonic, self.mode)


@typechecked
def score_structure(
    found: Sequence[StructureResult], truth: Sequence[StructureTruth], seed: int = 0
) -> dict[str, Figure]:
    """How much of the truth is found, pair by pair, by the metrics of mir_eval.

    What is not known is left out; what is known but was not found (a tempo that is not defined) counts as wrong.

    Returns means over pairs with bootstrap intervals, each 0 to 1:
        tempo_4, tempo_8: the tempo is right within 4 and 8 %; half and double are wrong.
        tempo_4_octave: the same within 4 %, where half and double count as right.
        key_exact: tonic and mode are right.
        key_weighted: as MIREX weights keys: 1 right, 0.5 a fifth above, 0.3 relative, 0.2 parallel.
        beats: F-measure of beats within 70 ms; 1 where there are none and none found.
        boundaries_05, boundaries_3: F-measure of boundaries within 0.5 and 3 s; 1 where there are none and none found.

    Raises:
        ValueError: no pairs, or not as many of one as of the other.
        ImportError: mir_eval is not installed.
    """
    if not found or len(found) != len(truth):
        raise ValueError(f'one truth a clip is needed, got {len(found)} clips and {len(truth)} truths')
    try:
        import mir_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(f'scores need mir_eval: {how_to_install("eval")}') from error
    scores = {}
    for name, (about, score) in SCORES.items():
        values = [score(one, true) for one, true in zip(found, truth) if getattr(true, about) is not None]
        scores[name] = mean_figure(values, seed=seed, missing=f'{about}: known of no clip')
    return scores


def tempo_score(found: StructureResult, truth: StructureTruth, tolerance: float, factor: float = 1.0) -> float:
    """1 if the tempo is `factor` times the true one, within a share of `tolerance`."""
    from mir_eval.tempo import detection

    if found.tempo.value is None:
        return 0.0
    # the metric takes two tempi each, from slow to fast: here the second has all of the weight
    true = np.array([0.0, truth.tempo * factor])
    return float(detection(true, 0.0, np.array([0.0, found.tempo.value]), tolerance)[0])


def key_score(found: StructureResult, truth: StructureTruth) -> float:
    from mir_eval.key import weighted_score

    return float(weighted_score(truth.key, found.key)) if found.key else 0.0


def beat_score(found: StructureResult, truth: StructureTruth) -> float:
    from mir_eval.beat import f_measure

    if not truth.beats or not found.beats:
        return float(not truth.beats and not found.beats)
    return float(f_measure(np.array(truth.beats, dtype=float), np.array(found.beats)))


def boundary_score(found: StructureResult, truth: StructureTruth, window: float) -> float:
    from mir_eval.segment import detection

    if found.segments.value is None:
        return 0.0
    if not truth.boundaries or not found.boundaries:
        return float(not truth.boundaries and not found.boundaries)
    true, heard = (
        np.column_stack([[0.0, *at], [*at, found.seconds]]) for at in (sorted(truth.boundaries), found.boundaries)
    )
    return float(detection(true, heard, window=window, trim=True)[2])


# what truth each takes, and the score of one pair
SCORES = {
    'tempo_4': ('tempo', lambda found, truth: tempo_score(found, truth, 0.04)),
    'tempo_8': ('tempo', lambda found, truth: tempo_score(found, truth, 0.08)),
    'tempo_4_octave': ('tempo', lambda found, truth: max(tempo_score(found, truth, 0.04, it) for it in (0.5, 1, 2))),
    'key_exact': ('key', lambda found, truth: float(found.key == truth.key)),
    'key_weighted': ('key', key_score),
    'beats': ('beats', beat_score),
    'boundaries_05': ('boundaries', lambda found, truth: boundary_score(found, truth, 0.5)),
    'boundaries_3': ('boundaries', lambda found, truth: boundary_score(found, truth, 3.0)),
}


@typechecked
def compare_structure(generated: Sequence[StructureResult], reference: Sequence[StructureResult]) -> dict[str, Figure]:
    """How far the figures of some clips are distributed from those of others, which need not be as many.

    Returns, for each figure of `StructureResult`, the 1-Wasserstein distance of its values over clips, in its unit: how
    much the values of one side must move in the mean to be those of the other. It is 0 for equal values, and above 0,
    the more the fewer the clips, for two draws of the same music. Details: mean and count of the values of both sides.
    Not defined where a side has no value.

    Raises ValueError for a side without clips.
    """
    from scipy.stats import wasserstein_distance

    sides = dict(generated=generated, reference=reference)
    for side, clips in sides.items():
        if not clips:
            raise ValueError(f'{side} holds no clips; pass one at least')
    found = {}
    for name in FIGURES:
        figures = {side: [getattr(it, name) for it in clips] for side, clips in sides.items()}
        values = {side: [it.value for it in kept if it.value is not None] for side, kept in figures.items()}
        empty = next((side for side, kept in values.items() if not kept), None)
        if empty:
            found[name] = undefined(f'no {empty} clip has a value, such as: {figures[empty][0].reason}')
            continue
        details = {f'{side}_mean': float(np.mean(kept)) for side, kept in values.items()}
        details |= {f'{side}_count': len(kept) for side, kept in values.items()}
        unit = next(it.unit for it in figures['generated'] if it.value is not None)
        found[name] = Figure(wasserstein_distance(values['generated'], values['reference']), unit=unit, details=details)
    return found
