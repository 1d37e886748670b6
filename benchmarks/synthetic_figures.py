"""Listen to SyntheticMusic through figures: does a clip sound like its labels?

    python benchmarks/synthetic_figures.py                  # the table of docs/data.md, some minutes on two cores
    python benchmarks/synthetic_figures.py --clips 200 --trained 400

Tempo and key are read by estimators that know nothing of the data set: librosa's tempo, at its default prior around
120 BPM, and the correlation of librosa's chroma with the key profiles of Krumhansl and Kessler (1982). The other
attributes are read by a logistic regression on spectral statistics, fitted to clips of 'train' and tested on clips of
'valid'. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import librosa
import numpy as np
import torch
from results import add_out, write_results  # beside this file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # a requirement of scikit-learn

from musiclm_pytorch import SyntheticMusic
from musiclm_pytorch.locking import first_use

READ_BY_CLASSIFIER = ('instrument', 'register', 'texture', 'drums')

KRUMHANSL = {
    'major': (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    'minor': (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}


@first_use('estimate_tempo')
def estimate_tempo(wave: np.ndarray, rate: int) -> float:
    """BPM by librosa: the autocorrelation of the onset strength, weighted by its default prior.

    Its default hop of 512 samples would leave steps of 8 % between the lags near 150 BPM.
    """
    hop = rate // 125
    strength = librosa.onset.onset_strength(y=wave, sr=rate, hop_length=hop)
    return float(librosa.feature.tempo(onset_envelope=strength, sr=rate, hop_length=hop)[0])


@first_use('estimate_key')
def estimate_key(wave: np.ndarray, rate: int) -> tuple[int, str]:
    """Tonic and mode whose profile of Krumhansl and Kessler correlates most with the mean chroma."""
    # tuning is at most 8 cents off, so that its estimation would only cost time
    chroma = librosa.feature.chroma_cqt(y=wave, sr=rate, tuning=0.0, n_octaves=6).mean(axis=1)
    found = {
        (tonic, mode): np.corrcoef(np.roll(profile, tonic), chroma)[0, 1]
        for mode, profile in KRUMHANSL.items()
        for tonic in range(12)
    }
    return max(found, key=found.get)


@first_use('features')
def features(wave: np.ndarray, rate: int) -> np.ndarray:
    """Statistics of the log-mel spectrogram in each of 40 bands (level, spread, rise and decay from frame to frame),
    and of the spectrum's centroid and flatness."""
    mel = librosa.feature.melspectrogram(y=wave, sr=rate, n_fft=1024, hop_length=256, n_mels=40, fmin=40)
    log = np.log(mel + 1e-6)
    step = np.diff(log, axis=1)
    centroid = (np.arange(40)[:, None] * mel).sum(axis=0) / mel.sum(axis=0)
    flatness = log.mean(axis=0) - np.log(mel.mean(axis=0) + 1e-6)
    return np.concatenate(
        [
            log.mean(axis=1),
            log.std(axis=1),
            np.maximum(step, 0).mean(axis=1),
            np.quantile(step, [0.25, 0.5, 0.9], axis=1).ravel(),
            np.quantile(log, [0.1, 0.9], axis=1).ravel(),
            np.quantile([centroid, flatness], [0.1, 0.5, 0.9], axis=1).ravel(),
        ]
    )


def classify(attribute: str, trained: list, heard: list) -> float:
    """Accuracy on `heard` of a logistic regression fitted to `trained`, each a list of (features, labels)."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.2, max_iter=300))
    model.fit(np.stack([it for it, _ in trained]), [getattr(labels, attribute) for _, labels in trained])
    return float(model.score(np.stack([it for it, _ in heard]), [getattr(labels, attribute) for _, labels in heard]))


def listen(music: SyntheticMusic, indices: range) -> list:
    """(features, labels) of some items."""
    return [(features(music[i][0].numpy(), music.sample_rate), music.labels(i)) for i in indices]


def within(found: float, true: float, tolerance: float) -> bool:
    return abs(found / true - 1) <= tolerance


@threadpool_limits.wrap(limits=1)  # on a busy machine, threads at such small sizes cost several times the work
def measure(clips: int, trained: int, seconds: float, sample_rate: int) -> tuple[dict[str, float], list[dict]]:
    settings = dict(seconds=seconds, sample_rate=sample_rate)
    train, valid = SyntheticMusic(trained, **settings), SyntheticMusic(clips, split='valid', **settings)
    rows = []
    for i in range(clips):
        labels, wave = valid.labels(i), valid[i][0].numpy()
        bpm, (tonic, mode) = estimate_tempo(wave, sample_rate), estimate_key(wave, sample_rate)
        rows.append(
            dict(
                instrument=labels.instrument,
                register=labels.register,
                texture=labels.texture,
                tempo=labels.tempo,
                mode=labels.mode,
                drums=labels.drums,
                bpm=labels.bpm,
                found_bpm=bpm,
                found_mode=mode,
                tempo_right=within(bpm, labels.bpm, 0.05),
                tempo_right_4=within(bpm, labels.bpm, 0.04),
                octave_right=any(within(bpm, labels.bpm * factor, 0.05) for factor in (0.5, 1, 2)),
                key_right=(tonic, mode) == (labels.tonic, labels.mode),
                mode_right=mode == labels.mode,
                rms=float(np.sqrt(np.mean(wave**2))),
                peak=float(np.abs(wave).max()),
            )
        )
    figures = {
        'tempo within 5 %': np.mean([row['tempo_right'] for row in rows]),
        'tempo within 4 %': np.mean([row['tempo_right_4'] for row in rows]),
        'tempo within 5 %, half or double allowed': np.mean([row['octave_right'] for row in rows]),
        'key, tonic and mode': np.mean([row['key_right'] for row in rows]),
        'mode': np.mean([row['mode_right'] for row in rows]),
    }
    known, heard = listen(train, range(trained)), listen(valid, range(clips))
    figures |= {attribute: classify(attribute, known, heard) for attribute in READ_BY_CLASSIFIER}
    return {name: float(value) for name, value in figures.items()}, rows


def breakdown(rows: list[dict], right: str) -> dict[str, float]:
    """The share of rows that are right, by each value of each attribute."""
    values = sorted(
        {(name, str(row[name])) for row in rows for name in ('instrument', 'register', 'texture', 'tempo', 'drums')}
    )
    return {
        f'{name} {value}': float(np.mean([row[right] for row in rows if str(row[name]) == value]))
        for name, value in values
    }


def milliseconds(seconds: float, sample_rate: int, clips: int = 64) -> float:
    """Median time of an item on one thread."""
    music = SyntheticMusic(seconds=seconds, sample_rate=sample_rate, seed=1)
    times = []
    for i in range(clips):
        start = time.perf_counter()
        music[i]
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--clips', type=int, default=400, help='clips that are judged (default 400)')
    parser.add_argument('--trained', type=int, default=1200, help='clips the classifiers are fitted to (default 1200)')
    parser.add_argument('--seconds', type=float, default=5.0)
    parser.add_argument('--sample-rate', type=int, default=16000)
    add_out(parser, 'synthetic')
    args = parser.parse_args()

    torch.set_num_threads(1)
    figures, rows = measure(args.clips, args.trained, args.seconds, args.sample_rate)
    speed = milliseconds(args.seconds, args.sample_rate)
    print('| attribute | right |\n|---|---|')
    for name, value in figures.items():
        print(f'| {name} | {value:.1%} |')
    print(f'\n{speed:.1f} ms an item of {args.seconds:g} s at {args.sample_rate} Hz')
    for right in ('tempo_right', 'key_right'):
        print(f'\n{right}:', ', '.join(f'{name} {value:.0%}' for name, value in breakdown(rows, right).items()))
    report = dict(
        librosa=librosa.__version__,
        **{name.replace('-', '_'): getattr(args, name) for name in ('clips', 'trained', 'seconds', 'sample_rate')},
        milliseconds=speed,
        figures=figures,
        rows=rows,
    )
    write_results(args.out, report)


if __name__ == '__main__':
    main()
