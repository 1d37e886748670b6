"""Form of a clip: where it changes, and how much of it comes back."""

from __future__ import annotations

from typing import Any

import numpy as np

from musiclm_pytorch.evaluation.figures import Figure, undefined
from musiclm_pytorch.evaluation.tempo import HOP as MEL_HOP
from musiclm_pytorch.evaluation.tempo import RATE, as_seconds
from musiclm_pytorch.evaluation.tonality import HOP

FRAME_SECONDS = HOP / RATE
# seconds on either side of a boundary that are compared, and over which frames are averaged before
SIDE, SMOOTHING = 2.0, 0.5
# how much more each side of a boundary must be like itself than like the other, as a difference of similarities
NOVELTY = 0.25
# spectral envelopes: cepstral coefficients beside the first, which is loudness, and the distance of timbres in dB
COEFFICIENTS, TIMBRE_DECIBELS = 13, 8.0
# seconds of a passage, and the similarity from which on one is the other again
PASSAGE, RECURS = 2.0, 0.9
# frames that are compared with each other: bounds the memory; beyond (over four minutes), frames are merged
MOST_FRAMES = 4000


def form(mel: np.ndarray, chroma: np.ndarray, seconds: float) -> dict[str, Any]:
    """The fields of `StructureResult` about form: segments, boundaries, repetition.

    Args:
        mel: by `tempo.mel_power`.
        chroma: `(12, t)`, magnitudes of the pitch classes, 64 ms a frame.
        seconds: length of the clip.
    """
    if seconds < 2 * max(SIDE, PASSAGE) + FRAME_SECONDS:
        reason = f'a clip of {seconds:.2f} s is too short for a form, which takes more than {2 * PASSAGE:g} s'
        return dict(segments=undefined(reason), boundaries=(), repetition=undefined(reason))
    each = HOP // MEL_HOP
    frames = min(chroma.shape[1], mel.shape[1] // each)
    timbre = mel[:, : frames * each].reshape(len(mel), frames, each).mean(axis=2)
    chroma = chroma[:, :frames]
    merged = -(-frames // MOST_FRAMES)
    if merged > 1:
        frames = frames // merged
        chroma, timbre = (
            it[:, : frames * merged].reshape(len(it), frames, merged).mean(axis=2) for it in (chroma, timbre)
        )
    step = merged * FRAME_SECONDS
    boundaries = find_boundaries(novelty(similarity(chroma, timbre, step), round(SIDE / step)), round(SIDE / step))
    return dict(
        segments=Figure(len(boundaries) + 1),
        boundaries=as_seconds(boundaries * step),
        repetition=Figure(repetition(chroma, round(PASSAGE / step))),
    )


def similarity(chroma: np.ndarray, timbre: np.ndarray, step: float) -> np.ndarray:
    """How alike any two frames are, 0 to 1, `(t, t)`: the mean of how alike their pitch classes and their timbres are.

    Pitch classes by their cosine; timbres by exp(-(d / 8 dB)²), where d is the root mean square distance in dB, over
    the bands, of their spectral envelopes (13 cepstral coefficients), their loudness aside.

    Args:
        chroma: `(12, t)`.
        timbre: mel power `(bands, t)`.
        step: seconds a frame.
    """
    import librosa
    from scipy.ndimage import uniform_filter1d
    from scipy.spatial.distance import cdist

    size = max(1, round(SMOOTHING / step))
    chroma, timbre = (uniform_filter1d(it, size, axis=1, mode='nearest') for it in (chroma, timbre))
    chroma = unit_columns(chroma)
    decibels = librosa.power_to_db(timbre / timbre.max(), top_db=60)
    # the transform keeps lengths, so that a distance of coefficients is one of envelopes
    cepstrum = librosa.feature.mfcc(S=decibels, n_mfcc=COEFFICIENTS + 1, norm='ortho')[1:] / np.sqrt(len(timbre))
    distances = cdist(cepstrum.T, cepstrum.T)
    return 0.5 * (chroma.T @ chroma + np.exp(-np.square(distances / TIMBRE_DECIBELS)))


def novelty(similarities: np.ndarray, side: int) -> np.ndarray:
    """How much changes before frame t of `(t, t)` similarities, `(t,)` (Foote, 2000).

    The `side` frames before and the `side` from t on: their mean similarity within each, less that between the two,
    frames far from t counting less (a Gaussian of half of `side`). 0 where a side would not fit.
    """
    places = np.arange(-side, side) + 0.5
    weights = np.exp(-0.5 * (places / (0.5 * side)) ** 2) * np.sign(places)
    kernel = np.outer(weights, weights)
    kernel /= np.abs(kernel).sum() / 2
    found = np.zeros(len(similarities))
    for t in range(side, len(similarities) - side + 1):
        around = slice(t - side, t + side)
        found[t : t + 1] = (similarities[around, around] * kernel).sum()
    return found


def find_boundaries(changes: np.ndarray, side: int) -> np.ndarray:
    """The frames of `(t,)` novelty that are the largest within `side` frames before and after, and large enough."""
    from scipy.ndimage import maximum_filter1d

    largest = maximum_filter1d(changes, 2 * side + 1, mode='constant', cval=0.0)
    return np.flatnonzero((changes == largest) & (changes >= NOVELTY))


def repetition(chroma: np.ndarray, passage: int) -> float:
    """Share of the passages of `passage` frames, one beginning at each frame of `(12, t)`, that come again.

    A passage comes again if another that does not overlap it is alike: frame by frame in order, the cosine of their
    chroma is 0.9 or more in the mean. Of each frame of chroma, scaled to length 1, the mean over the clip is subtracted
    first, or else noise, which holds every pitch class all the time, would seem to repeat itself.

    Raises ValueError for fewer than two passages' frames.
    """
    frames = chroma.shape[1]
    if frames < 2 * passage:
        raise ValueError(f'{frames} frames hold no two passages of {passage}')
    units = unit_columns(chroma)
    centred = unit_columns(units - units.mean(axis=1, keepdims=True))
    count = frames - passage + 1
    best = np.full(count, -1.0)
    # one diagonal of the self-similarity matrix at a time
    for lag in range(passage, count):
        sums = np.cumsum(np.concatenate([[0.0], (centred[:, :-lag] * centred[:, lag:]).sum(axis=0)]))
        alike = (sums[passage:] - sums[:-passage]) / passage
        best[: count - lag] = np.maximum(best[: count - lag], alike)
        best[lag:] = np.maximum(best[lag:], alike)
    return float((best >= RECURS).mean())


def unit_columns(values: np.ndarray) -> np.ndarray:
    """Each column of `(d, t)` scaled to length 1; columns of 0 stay."""
    lengths = np.linalg.norm(values, axis=0)
    return values / np.where(lengths > 0, lengths, 1.0)
