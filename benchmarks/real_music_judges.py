"""The judges of `real_music.py`: what they hear of waves, what probes read from it, and how fast music goes.

Two hear: musicnn, by its 50 tags and its penultimate layer (`musicnn_judge.py`), and `obedience.hear`, by statistics of
the mel spectrogram and the autocorrelation of the onset strength. What is asked for is read from them by logistic
regressions, which were fitted to real clips of ScoreMusic in the sound font that the models never met.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from musicnn_judge import RATE as HEARD_RATE
from musicnn_judge import MusicnnJudge
from obedience import hear
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from synthetic_figures import estimate_tempo
from threadpoolctl import threadpool_limits
from torch import Tensor

from musiclm_pytorch import ScoreMusic, SyntheticMusic
from musiclm_pytorch.atomic import atomic_write
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.data.scores.labels import ScoreLabels
from musiclm_pytorch.evaluation.metric import MetricValue, mean_value, percentile_interval
from musiclm_pytorch.evaluation.music_analysis import find_tempo, mel_power, onset_strength

SECONDS, RATE = 5.0, 24000
ASKED = ('family', 'tempo', 'drums')
# ScoreMusic's 12 families as 8, on the lines of General MIDI's groups
GROUPS = {'free reed': 'organ', 'plucked': 'guitar', 'bass': 'guitar', 'voice': 'strings'}
AGREE = 0.04  # of two estimates of a tempo that are the same

# ---- clips ----


@dataclass
class Clips:
    """Rendered items: waves `(n, samples)` int16 at `RATE`, with their labels and captions."""

    music: ScoreMusic | SyntheticMusic
    waves: np.ndarray
    indices: list[int]
    name: str  # tells these clips from others

    def __len__(self) -> int:
        return len(self.indices)

    def labels(self) -> list[ScoreLabels]:
        return [self.music.labels(i) for i in self.indices]

    def wave(self, place: int) -> Tensor:
        """`(samples,)` float32."""
        return torch.from_numpy(self.waves[place].astype(np.float32) / 32767)


def render(music: ScoreMusic | SyntheticMusic, folder: Path) -> Clips:
    """All items of a data set, rendered once and kept in `folder`; those that the font cannot play are left out."""
    told = repr([music, [music.labels(i) for i in range(len(music))]])
    name = hashlib.sha256(told.encode()).hexdigest()[:12]
    path = folder / f'clips-{name}.npz'
    if not path.exists():
        waves, indices = [], []
        for i in range(len(music)):
            try:
                wave = music[i][0]
            except ValueError as error:
                if 'silent' not in str(error):
                    raise
                print(f'left out: {error}'[:120])
                continue
            waves.append((wave.numpy() * 32767).round().astype(np.int16))
            indices.append(i)
        save(path, waves=np.stack(waves), indices=np.array(indices))
    with np.load(path) as found:
        return Clips(music, found['waves'], found['indices'].tolist(), name)


def save(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as aside, open(aside, 'wb') as file:
        np.savez(file, **arrays)


# ---- what is heard ----


@dataclass
class Heard:
    """Of n waves of one length: tags `(n, 50)`, musicnn's features `(n, patches, 200)`, rhythm `(n, d)`."""

    tags: np.ndarray
    features: np.ndarray
    rhythm: np.ndarray

    def __len__(self) -> int:
        return len(self.tags)

    def part(self, rows: Sequence[int] | np.ndarray) -> Heard:
        return Heard(self.tags[rows], self.features[rows], self.rhythm[rows])


def listen(judge: MusicnnJudge, waves: Iterable[Tensor], rate: int, path: Path | None = None) -> Heard:
    """What is heard of waves `(samples,)`; kept at `path`, if there is one."""
    if path is None or not path.exists():
        tags, features, rhythm = [], [], []
        for wave in waves:
            wave = resample(wave, rate, HEARD_RATE)
            likely, own = judge.hear([wave])[0]
            tags.append(likely.mean(dim=0).numpy())
            features.append(own.numpy())
            rhythm.append(hear(wave.numpy()))
        heard = Heard(np.stack(tags), np.stack(features), np.stack(rhythm))
        if path is None:
            return heard
        save(path, **vars(heard))
    with np.load(path) as found:
        return Heard(**found)


# ---- what is read ----


def grouped(family: str) -> str:
    """The one of 8 groups that one of the 12 families belongs to."""
    return GROUPS.get(family, family)


class Probes:
    """A logistic regression for each attribute that is asked for: tempo from the rhythm, the others from musicnn."""

    def __init__(self, heard: Heard, labels: Sequence[Any], asked: Sequence[str] = ASKED):
        self.models = {name: self.fit(name, heard, [getattr(it, name) for it in labels]) for name in asked}

    @staticmethod
    def inputs(name: str, heard: Heard) -> np.ndarray:
        return heard.rhythm if name == 'tempo' else heard.features.mean(axis=1)

    @threadpool_limits.wrap(limits=1)
    def fit(self, name: str, heard: Heard, values: list) -> Pipeline:
        regression = LogisticRegression(C=0.005 if name == 'tempo' else 0.05, max_iter=1000)
        return make_pipeline(StandardScaler(), regression).fit(self.inputs(name, heard), values)

    def read(self, heard: Heard) -> dict[str, list]:
        """The value of each attribute for each wave."""
        return {name: model.predict(self.inputs(name, heard)).tolist() for name, model in self.models.items()}

    def right(self, heard: Heard, labels: Sequence[ScoreLabels]) -> dict[str, np.ndarray]:
        """For which waves each attribute is that of their labels, `(n,)` bool."""
        return compare(self.read(heard), labels)


def compare(found: dict[str, Sequence], labels: Sequence[ScoreLabels]) -> dict[str, np.ndarray]:
    """For which clips what was found of an attribute is what the labels say; of the family as one of 8, too."""
    right = {name: np.array([a == getattr(b, name) for a, b in zip(its, labels)]) for name, its in found.items()}
    if 'family' in found:
        pairs = zip(found['family'], labels)
        right['family of 8'] = np.array([grouped(a) == grouped(b.family) for a, b in pairs])
    return right


def tempo_estimators() -> dict[str, Callable[[Tensor], float]]:
    """What tells the BPM of `(samples,)` at 16 kHz: librosa, the library, and essentia where it is installed."""

    def ours(wave: Tensor) -> float:
        return find_tempo(onset_strength(mel_power(wave.numpy())))[0]

    found: dict[str, Callable[[Tensor], float]] = {
        'librosa': lambda wave: estimate_tempo(wave.numpy(), HEARD_RATE),
        'evaluation.tempo': ours,
    }
    if importlib.util.find_spec('essentia') is not None:
        import essentia
        from essentia.standard import RhythmExtractor2013

        essentia.log.infoActive = essentia.log.warningActive = False
        extract = RhythmExtractor2013(method='multifeature')
        found['essentia'] = lambda wave: float(extract(resample(wave, HEARD_RATE, 44100).numpy())[0])
    return found


# ---- figures ----


def share(right: Sequence[bool] | np.ndarray, **details: object) -> MetricValue:
    """The share that is right, with its bootstrap interval."""
    return mean_value(np.asarray(right, dtype=float), missing='nothing was judged', **details)


def ratio(right: np.ndarray, real: np.ndarray, seed: int = 0) -> MetricValue:
    """The share that is right as a share of that of real clips of the same labels, with its bootstrap interval."""
    drawn = np.random.default_rng(seed).integers(len(right), size=(2000, len(right)))
    low, high = percentile_interval(right[drawn].mean(axis=1) / np.maximum(real[drawn].mean(axis=1), 1 / len(real)))
    return MetricValue(right.mean() / real.mean(), low, high, len(right))


def share_by_file(right: np.ndarray, files: list[str], seed: int = 0, **details: object) -> MetricValue:
    """The share that is right, with the interval of a bootstrap over files: the crops of one resemble each other."""
    if len(right) == 0:
        return mean_value([], missing='no crop whose reference is certain', **details)
    names = sorted(set(files))
    sums = np.array([[right[np.array(files) == it].sum(), files.count(it)] for it in names])
    drawn = sums[np.random.default_rng(seed).integers(len(names), size=(2000, len(names)))].sum(axis=1)
    low, high = percentile_interval(drawn[:, 0] / drawn[:, 1])
    return MetricValue(right.mean(), low, high, len(right), details=dict(files=len(names), **details))
