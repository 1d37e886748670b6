"""Pitch classes and key of a clip."""

from __future__ import annotations

from typing import Any

import numpy as np

from musiclm_pytorch.evaluation.figures import Figure, undefined
from musiclm_pytorch.evaluation.tempo import RATE

TONICS = ('C', 'C#', 'D', 'D#', 'E', 'F', 'F#', 'G', 'G#', 'A', 'A#', 'B')
# how well each semitone above the tonic fits the key, as heard by listeners (Krumhansl and Kessler, 1982)
PROFILES = {
    'major': (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    'minor': (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
# constant-Q transform: from C1 to C8 in thirds of semitones, every 64 ms
LOWEST_HERTZ, OCTAVES, BINS_A_SEMITONE, HOP = 32.703, 7, 3, 1024
BINS = 12 * OCTAVES * BINS_A_SEMITONE
# of the lowest bins; shorter clips are followed by silence
LONGEST_WINDOW = 2**15


def pitch_spectrum(samples: np.ndarray) -> np.ndarray:
    """Magnitudes `(252, t)` of the constant-Q transform of `(samples,)` at 16 kHz; frame t is centred on 64 t ms."""
    import librosa

    transform = librosa.cqt(
        y=np.pad(samples, (0, max(0, LONGEST_WINDOW - len(samples)))),
        sr=RATE,
        hop_length=HOP,
        fmin=LOWEST_HERTZ,
        n_bins=BINS,
        bins_per_octave=12 * BINS_A_SEMITONE,
        tuning=0.0,
    )
    return np.abs(transform)


def find_tuning(spectrum: np.ndarray) -> float:
    """Semitones, -0.5 to 0.5, by which `(252, t)` is sharper than A4 = 440 Hz: the circular mean of its energy."""
    energy = np.square(spectrum).sum(axis=1)
    turns = np.exp(2j * np.pi * np.arange(BINS) / BINS_A_SEMITONE)
    return float(np.angle((energy * turns).sum()) / (2 * np.pi))


def folding(tuning: float) -> np.ndarray:
    """`(12, 252)` matrix that sums a spectrum to pitch classes, C first.

    A semitone reaches 1.5 bins to both sides of its centre, and bins on the border of two are shared between them.
    """
    bins = np.arange(BINS)
    semitones = np.arange(12 * OCTAVES + 1)
    distance = np.abs(bins - BINS_A_SEMITONE * (semitones[:, None] + tuning))
    share = np.clip(BINS_A_SEMITONE / 2 + 0.5 - distance, 0, 1)
    return np.stack([share[semitones % 12 == pitch].sum(axis=0) for pitch in range(12)])


def find_key(chroma: np.ndarray) -> tuple[int, str, float]:
    """Tonic (0 for C to 11 for B), mode and correlation of the profile that correlates most with chroma `(12,)`."""
    found = {
        (tonic, mode): float(np.corrcoef(np.roll(profile, tonic), chroma)[0, 1])
        for mode, profile in PROFILES.items()
        for tonic in range(12)
    }
    tonic, mode = max(found, key=found.get)
    return tonic, mode, found[tonic, mode]


def entropy_bits(weights: np.ndarray) -> float:
    """Shannon entropy in bits of weights of 0 or more, not all 0, taken as shares of their sum."""
    shares = weights[weights > 0] / weights.sum()
    return float(-(shares * np.log2(shares)).sum())


def tonality(spectrum: np.ndarray, to_classes: np.ndarray) -> dict[str, Any]:
    """The fields of `StructureResult` about pitch: tonic, mode, key_strength, pitch_class_entropy.

    Args:
        spectrum: by `pitch_spectrum`.
        to_classes: by `folding`.
    """
    chroma = (to_classes @ spectrum).mean(axis=1)
    energy = (to_classes @ np.square(spectrum)).mean(axis=1)
    if not np.ptp(chroma) > 0:
        reason = 'no sound between C1 and C8'
        return dict(tonic=None, mode=None, key_strength=undefined(reason), pitch_class_entropy=undefined(reason))
    tonic, mode, strength = find_key(chroma)
    return dict(
        tonic=tonic,
        mode=mode,
        key_strength=Figure(strength),
        pitch_class_entropy=Figure(entropy_bits(energy), unit='bits'),
    )
