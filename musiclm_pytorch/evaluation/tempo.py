"""Onsets, tempo and beats of a clip."""

from __future__ import annotations

from typing import Any

import numpy as np

from musiclm_pytorch.evaluation.figures import Figure, undefined

# every clip is analysed at this rate, so that figures do not depend on the rate of the files they come from
RATE = 16000
# samples of a window and between two: 64 ms, every 8 ms
WINDOW, HOP, BANDS = 1024, 128, 64
# where in the window an onset is when its strength peaks
ONSET_PLACE = 0.9
FRAMES_A_SECOND = RATE / HOP
# an onset is where the loudness of a frame grows by this share of that of the loudest frame, above what surrounds it
ONSET = 0.03
# least length for a tempo in seconds, least onsets, and least autocorrelation at the beat
TEMPO_SECONDS, TEMPO_ONSETS, PULSE = 3.0, 3, 0.2
# BPM: what is looked for, and the log-normal prior (centre, octaves of its standard deviation), librosa's defaults
SLOWEST, FASTEST, LIKELY_BPM, PRIOR_OCTAVES = 30, 300, 120, 1.0


def mel_power(samples: np.ndarray) -> np.ndarray:
    """Mel spectrogram `(64, t)` of `(samples,)` at 16 kHz. Frame t is centred on 32 + 8 t ms; none reaches outside."""
    import librosa

    return librosa.feature.melspectrogram(y=samples, sr=RATE, n_fft=WINDOW, hop_length=HOP, n_mels=BANDS, center=False)


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
    return (frames * HOP + ONSET_PLACE * WINDOW) / RATE


def rhythm(mel: np.ndarray, seconds: float) -> dict[str, Any]:
    """The fields of `StructureResult` about time: tempo, pulse_clarity, beat_variation, onset_density, onsets, beats.

    Args:
        mel: by `mel_power`, of a clip that is not silent.
        seconds: length of the clip.
    """
    import librosa

    strength = onset_strength(mel)
    onsets = librosa.onset.onset_detect(onset_envelope=strength, sr=RATE, hop_length=HOP, normalize=False, delta=ONSET)
    found: dict[str, Any] = dict(
        onset_density=Figure(len(onsets) / seconds, unit='onsets/s'), onsets=as_seconds(time_of(onsets)), beats=()
    )

    def without_tempo(reason: str, clarity: Figure | None = None) -> dict[str, Any]:
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
            Figure(clarity),
        )
    beats = find_beats(strength, bpm, seconds)
    found |= dict(tempo=Figure(bpm, unit='BPM'), pulse_clarity=Figure(clarity), beats=as_seconds(beats))
    if len(beats) < 4:
        return found | dict(beat_variation=undefined(f'{len(beats)} beats are too few to compare their distances'))
    distances = np.diff(beats)
    return found | dict(beat_variation=Figure(distances.std() / distances.mean()))


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


def find_beats(strength: np.ndarray, bpm: float, seconds: float) -> np.ndarray:
    """Times of the beats in seconds, by dynamic programming (Ellis, 2007), from the start to the end of the clip."""
    import librosa

    # the tracker begins and ends at an onset, on the beat or not. With silence around, it goes on beyond the clip
    padding = round(4 * 60 * FRAMES_A_SECOND / bpm)
    _, frames = librosa.beat.beat_track(
        onset_envelope=np.pad(strength, padding), sr=RATE, hop_length=HOP, bpm=bpm, trim=False
    )
    times = time_of(frames - padding)
    return times[(times >= 0) & (times < seconds)]


def as_seconds(times: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(it), 4) for it in times)
