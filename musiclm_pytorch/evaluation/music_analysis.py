"""Music analysis of a clip in numpy: onsets, tempo and beats; pitch classes and key; form."""

from __future__ import annotations

from typing import Any

import numpy as np

from musiclm_pytorch.evaluation.metric import MetricValue, undefined
from musiclm_pytorch.locking import first_use

# librosa compiles functions on import and on use: functions that call it are marked `first_use`

# ---- tempo ----

# every clip is analysed at this rate, so that values do not depend on the rate of the files they come from
RATE = 16000
# samples of a window and between two: 64 ms, every 8 ms
MEL_WINDOW, MEL_HOP, MEL_BANDS = 1024, 128, 64
# where in the window an onset is when its strength peaks
ONSET_PLACE = 0.9
FRAMES_A_SECOND = RATE / MEL_HOP
# an onset is where the loudness of a frame grows by this share of that of the loudest frame, above what surrounds it
ONSET = 0.03
# least length for a tempo in seconds, least onsets, and least autocorrelation at the beat
TEMPO_SECONDS, TEMPO_ONSETS, PULSE = 3.0, 3, 0.2
# BPM: what is looked for, and the log-normal prior (centre, octaves of its standard deviation), librosa's defaults
SLOWEST, FASTEST, LIKELY_BPM, PRIOR_OCTAVES = 30, 300, 120, 1.0


@first_use('mel_power')
def mel_power(samples: np.ndarray) -> np.ndarray:
    """Mel spectrogram `(64, t)` of `(samples,)` at 16 kHz. Frame t is centred on 32 + 8 t ms; none reaches outside."""
    import librosa

    return librosa.feature.melspectrogram(
        y=samples, sr=RATE, n_fft=MEL_WINDOW, hop_length=MEL_HOP, n_mels=MEL_BANDS, center=False
    )


def onset_strength(mel: np.ndarray) -> np.ndarray:
    """How much louder each frame of `(bands, t)` is than the last, `(t,)`, as a share of the loudest frame.

    Spectral flux with loudness by Stevens' law, the cube root of power. Decibels, the usual choice, make nearly as much
    of light notes between the beats as of the beats, and find the double tempo more often.
    """
    loudness = np.cbrt(mel)
    rises = np.maximum(np.diff(loudness, axis=1, prepend=loudness[:, :1]), 0)
    return rises.mean(axis=0) / loudness.mean(axis=0).max()


def time_of(frames: np.ndarray) -> np.ndarray:
    """Seconds at which a sound begins whose onset strength peaks at these frames.

    It peaks when the sound has come some way into the end of the window: so little, because the cube root makes much of
    the first weak trace in every band. Measured on clicks, strokes and tones, to which it fits within 8 ms; sounds that
    swell are heard some 10 to 40 ms later than they begin.
    """
    return (frames * MEL_HOP + ONSET_PLACE * MEL_WINDOW) / RATE


@first_use('rhythm')
def rhythm(mel: np.ndarray, seconds: float) -> dict[str, Any]:
    """The fields of `StructureResult` about time: tempo, pulse_clarity, beat_variation, onset_density, onsets, beats.

    Args:
        mel: by `mel_power`, of a clip that is not silent.
        seconds: length of the clip.
    """
    import librosa

    strength = onset_strength(mel)
    onsets = librosa.onset.onset_detect(
        onset_envelope=strength, sr=RATE, hop_length=MEL_HOP, normalize=False, delta=ONSET
    )
    found: dict[str, Any] = dict(
        onset_density=MetricValue(len(onsets) / seconds, unit='onsets/s'), onsets=as_seconds(time_of(onsets)), beats=()
    )

    def without_tempo(reason: str, clarity: MetricValue | None = None) -> dict[str, Any]:
        return found | dict(
            tempo=undefined(reason), pulse_clarity=clarity or undefined(reason), beat_variation=undefined(reason)
        )

    if seconds < TEMPO_SECONDS:
        return without_tempo(f'a clip of {seconds:.2f} s is too short for a tempo, which takes {TEMPO_SECONDS:g} s')
    if len(onsets) < TEMPO_ONSETS:
        return without_tempo(f'{len(onsets)} onsets are too few for a tempo, which takes {TEMPO_ONSETS}')
    bpm, clarity = find_tempo(strength)
    if clarity < PULSE:
        return without_tempo(
            f'no regular pulse: onset strength has an autocorrelation of {clarity:.2f}, below {PULSE:g}',
            MetricValue(clarity),
        )
    beats = find_beats(strength, bpm, seconds)
    found |= dict(tempo=MetricValue(bpm, unit='BPM'), pulse_clarity=MetricValue(clarity), beats=as_seconds(beats))
    if len(beats) < 4:
        return found | dict(beat_variation=undefined(f'{len(beats)} beats are too few to compare their distances'))
    distances = np.diff(beats)
    return found | dict(beat_variation=MetricValue(distances.std() / distances.mean()))


@first_use('find_tempo')
def find_tempo(strength: np.ndarray) -> tuple[float, float]:
    """BPM and the autocorrelation of onset strength `(t,)` at one beat, at most 1.

    The beat is the peak of the autocorrelation with the largest product with the prior; the place of the peak is
    refined by a parabola. Without a peak, both are 0.
    """
    import librosa

    correlation = librosa.autocorrelate(strength - strength.mean())
    if not correlation[0] > 0:
        return 0.0, 0.0
    correlation = correlation / correlation[0]
    # at least two beats must fit
    longest = min(60 * FRAMES_A_SECOND / SLOWEST, len(strength) / 2)
    lags = np.arange(int(60 * FRAMES_A_SECOND / FASTEST), int(longest) + 1)
    before, here, after = correlation[lags - 1], correlation[lags], correlation[lags + 1]
    peaks = (here > 0) & (here > before) & (here >= after)
    if not peaks.any():
        return 0.0, 0.0
    octaves = np.log2(60 * FRAMES_A_SECOND / lags / LIKELY_BPM)
    prior = np.exp(-0.5 * (octaves / PRIOR_OCTAVES) ** 2)
    best = int(np.argmax(np.where(peaks, here * prior, 0)))
    shift = 0.5 * (before[best] - after[best]) / (before[best] - 2 * here[best] + after[best])
    return float(60 * FRAMES_A_SECOND / (lags[best] + shift)), min(1.0, float(here[best]))


@first_use('find_beats')
def find_beats(strength: np.ndarray, bpm: float, seconds: float) -> np.ndarray:
    """Times of the beats in seconds, by dynamic programming (Ellis, 2007), from the start to the end of the clip."""
    import librosa

    # the tracker begins and ends at an onset, on the beat or not. With silence around, it goes on beyond the clip
    padding = round(4 * 60 * FRAMES_A_SECOND / bpm)
    _, frames = librosa.beat.beat_track(
        onset_envelope=np.pad(strength, padding), sr=RATE, hop_length=MEL_HOP, bpm=bpm, trim=False
    )
    times = time_of(frames - padding)
    return times[(times >= 0) & (times < seconds)]


def as_seconds(times: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(it), 4) for it in times)


# ---- tonality ----

TONICS = ('C', 'C#', 'D', 'D#', 'E', 'F', 'F#', 'G', 'G#', 'A', 'A#', 'B')
# how well each semitone above the tonic fits the key, as heard by listeners (Krumhansl and Kessler, 1982)
PROFILES = {
    'major': (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    'minor': (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
# constant-Q transform: from C1 to C8 in thirds of semitones, every 64 ms
LOWEST_HERTZ, OCTAVES, BINS_A_SEMITONE, CHROMA_HOP = 32.703, 7, 3, 1024
BINS = 12 * OCTAVES * BINS_A_SEMITONE
# of the lowest bins; shorter clips are followed by silence
LONGEST_WINDOW = 2**15


@first_use('pitch_spectrum')
def pitch_spectrum(samples: np.ndarray) -> np.ndarray:
    """Magnitudes `(252, t)` of the constant-Q transform of `(samples,)` at 16 kHz; frame t is centred on 64 t ms."""
    import librosa

    transform = librosa.cqt(
        y=np.pad(samples, (0, max(0, LONGEST_WINDOW - len(samples)))),
        sr=RATE,
        hop_length=CHROMA_HOP,
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


def tonality(spectrum: np.ndarray, to_classes: np.ndarray) -> dict[str, Any]:
    """The fields of `StructureResult` about pitch: tonic, mode, key_strength, pitch_class_entropy.

    Args:
        spectrum: by `pitch_spectrum`.
        to_classes: by `folding`.
    """
    from scipy.stats import entropy

    chroma = (to_classes @ spectrum).mean(axis=1)
    energy = (to_classes @ np.square(spectrum)).mean(axis=1)
    if not np.ptp(chroma) > 0:
        reason = 'no sound between C1 and C8'
        return dict(tonic=None, mode=None, key_strength=undefined(reason), pitch_class_entropy=undefined(reason))
    tonic, mode, strength = find_key(chroma)
    return dict(
        tonic=tonic,
        mode=mode,
        key_strength=MetricValue(strength),
        pitch_class_entropy=MetricValue(entropy(energy, base=2), unit='bits'),
    )


# ---- form: where a clip changes, and repetition ----

FRAME_SECONDS = CHROMA_HOP / RATE
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
        mel: by `mel_power`.
        chroma: `(12, t)`, magnitudes of the pitch classes, 64 ms a frame.
        seconds: length of the clip.
    """
    if seconds < 2 * max(SIDE, PASSAGE) + FRAME_SECONDS:
        reason = f'a clip of {seconds:.2f} s is too short for a form, which takes more than {2 * PASSAGE:g} s'
        return dict(segments=undefined(reason), boundaries=(), repetition=undefined(reason))
    each = CHROMA_HOP // MEL_HOP
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
        segments=MetricValue(len(boundaries) + 1),
        boundaries=as_seconds(boundaries * step),
        repetition=MetricValue(repetition(chroma, round(PASSAGE / step))),
    )


@first_use('similarity')
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
    from sklearn.preprocessing import normalize

    size = max(1, round(SMOOTHING / step))
    chroma, timbre = (uniform_filter1d(it, size, axis=1, mode='nearest') for it in (chroma, timbre))
    chroma = normalize(chroma, axis=0)
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
    """
    from sklearn.preprocessing import normalize

    units = normalize(chroma, axis=0)
    centred = normalize(units - units.mean(axis=1, keepdims=True), axis=0)
    count = chroma.shape[1] - passage + 1
    best = np.full(count, -1.0)
    # one diagonal of the self-similarity matrix at a time
    for lag in range(passage, count):
        sums = np.cumsum(np.concatenate([[0.0], (centred[:, :-lag] * centred[:, lag:]).sum(axis=0)]))
        alike = (sums[passage:] - sums[:-passage]) / passage
        best[: count - lag] = np.maximum(best[: count - lag], alike)
        best[lag:] = np.maximum(best[lag:], alike)
    return float((best >= RECURS).mean())
