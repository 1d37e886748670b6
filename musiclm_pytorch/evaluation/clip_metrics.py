"""What a clip is like: its signal, whatever it plays, and its structure as music, beside what is true and other music.

A generator that gives silence, noise, a constant or clipped waves may look good to a distance of embeddings. The
signal's values need no weights and show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from musiclm_pytorch.checks import check_audio, check_finite, check_positive, check_sample_rate, typechecked
from musiclm_pytorch.evaluation.metric import ClipMetric, MetricValue, mean_of_clips, mean_value, undefined
from musiclm_pytorch.evaluation.music_analysis import (
    PROFILES,
    RATE,
    TONICS,
    find_tuning,
    folding,
    form,
    mel_power,
    pitch_spectrum,
    rhythm,
    tonality,
)
from musiclm_pytorch.extras import needing
from musiclm_pytorch.locking import first_use

# a frame is silent if what is left of it without its mean (a constant is not heard) is below this, in dB of full scale
SILENCE, FRAME_SECONDS = -60.0, 0.05
SILENT = 'the clip is silent'
# a sample is clipped within a run of so many of one sign at full scale; values beyond 1 are at full scale, too
FULL_SCALE, CLIPPED_RUN = 0.999, 3
BANDWIDTH_SHARE = 0.99
# samples at four times the rate on either side that scipy's filter for it reaches
FILTER_REACH = 40
WELCH_SAMPLES = 4096
# the filters of BS.1770 are given at this rate; seconds of its gating blocks, and their step
LOUDNESS_RATE, BLOCK, STEP = 48000, 0.4, 0.1


# ---- signal ----


@typechecked
def signal_quality(wave: Tensor, sample_rate: int) -> dict[str, MetricValue]:
    """Measure the signal of one clip.

    Args:
        wave: `(samples,)`, floating point, full scale is ±1.
        sample_rate: Hz.

    Returns:
        loudness: integrated loudness in LUFS (ITU-R BS.1770-4, by pyloudnorm, one channel: a sine of 997 Hz at full
            scale has -3.01). Not defined for less than a block of 400 ms, nor where no block passes -70 LUFS.
        peak: dB of full scale (dBFS) of the largest sample; not defined if all are 0.
        true_peak: dBTP, the same of the wave at four times the rate: what peaks between samples (BS.1770-4, annex 2).
        clipped_share: share of the samples that stand in a run of 3 or more, of one sign, of magnitude 0.999 or more.
        silence_share: share of the clip in frames of 50 ms whose standard deviation is below -60 dBFS.
        dc_offset: magnitude of the mean sample, where 1 is full scale.
        bandwidth: Hz below which 99 % of the spectral energy lies (the mean without it).
        bandwidth_share: the same as a share of half the sample rate.
        crest_factor: dB of the peak over the root mean square, both without the mean: 3.01 for a sine, 0 for a square.
        spectral_flatness: geometric over arithmetic mean of the power spectrum: 0 for a tone, near 1 for white noise.

        Loudness and the last four are not defined for a clip that is silent all through.

    Raises:
        TypeError, ValueError: anything but a wave with finite samples and a sample rate.
    """
    samples = checked_samples(wave, sample_rate)
    peak = np.abs(samples).max()
    found = dict(
        loudness=undefined(SILENT),
        peak=decibels(peak, 'dBFS'),
        true_peak=decibels(max(peak, peak_between(samples)), 'dBTP'),
        clipped_share=MetricValue(clipped_share(samples)),
        silence_share=MetricValue(silence_share(samples, sample_rate)),
        dc_offset=MetricValue(abs(samples.mean())),
        **dict.fromkeys(('bandwidth', 'bandwidth_share', 'crest_factor', 'spectral_flatness'), undefined(SILENT)),
    )
    if found['silence_share'].value < 1:
        centred = samples - samples.mean()
        found['loudness'] = loudness(samples, sample_rate)
        found['crest_factor'] = decibels(np.abs(centred).max() / np.sqrt(np.mean(centred**2)), 'dB')
        found |= spectrum_values(samples, sample_rate)
    return found


class SignalQuality(ClipMetric):
    """Means over clips of what `signal_quality` finds, and how many are silent all through, or clipped anywhere."""

    name = 'signal'

    def measure(self, wave: Tensor, sample_rate: int) -> dict[str, MetricValue]:
        return signal_quality(wave, sample_rate)

    def compute(self) -> dict[str, dict[str, MetricValue]]:
        clips, means = self.found(), super().compute()
        silent = sum(clip['silence_share'].value == 1 for clip in clips)
        clipped = sum(clip['clipped_share'].value > 0 for clip in clips)
        means['signal']['silent_clips'] = MetricValue(silent, count=len(clips))
        means['signal']['clipped_clips'] = MetricValue(clipped, count=len(clips))
        return means


def decibels(amplitude: float, unit: str) -> MetricValue:
    return MetricValue(20 * np.log10(amplitude), unit=unit) if amplitude > 0 else undefined('all samples are 0')


def peak_between(samples: np.ndarray) -> float:
    """Largest magnitude of `(samples,)` at four times the rate, but where the filter reaches beyond the clip: it would
    ring with the step from or to silence that a cut makes. 0 for a clip of no more than that."""
    from scipy.signal import resample_poly

    return np.abs(resample_poly(samples, 4, 1)[FILTER_REACH:-FILTER_REACH]).max(initial=0.0)


def clipped_share(samples: np.ndarray) -> float:
    """As in `signal_quality`, of `(samples,)`."""
    side = np.where(np.abs(samples) >= FULL_SCALE, np.sign(samples), 0)
    starts = np.flatnonzero(np.diff(side, prepend=np.nan) != 0)
    lengths = np.diff(starts, append=len(side))
    return float(lengths[(side[starts] != 0) & (lengths >= CLIPPED_RUN)].sum() / len(samples))


@first_use('loudness')
def loudness(samples: np.ndarray, rate: int) -> MetricValue:
    """Integrated loudness of `(samples,)`, as in `signal_quality`."""
    if len(samples) < BLOCK * rate:
        return undefined(f'a clip of {len(samples) / rate:.2f} s is shorter than one block of {BLOCK:g} s')
    import librosa
    import pyloudnorm

    # pyloudnorm designs the filters anew at other rates, where they differ by some hundredths of a dB, and counts a
    # last block that is not full as if silence followed
    samples = librosa.resample(samples, orig_sr=rate, target_sr=LOUDNESS_RATE)
    block, step = round(BLOCK * LOUDNESS_RATE), round(STEP * LOUDNESS_RATE)
    samples = samples[: block + (len(samples) - block) // step * step]
    # of its filters, 'DeMan' are those whose coefficients at 48 kHz are the standard's
    meter = pyloudnorm.Meter(LOUDNESS_RATE, filter_class='DeMan', block_size=BLOCK)
    value = meter.integrated_loudness(samples)
    return MetricValue(value, unit='LUFS') if np.isfinite(value) else undefined('no block is louder than -70 LUFS')


def spectrum_values(samples: np.ndarray, rate: int) -> dict[str, MetricValue]:
    """Bandwidth and flatness of `(samples,)` that are not constant, as in `signal_quality`."""
    from scipy.signal import welch

    # half a segment of silence on both sides, and as much as completes the last one: no sample is left out
    half = WELCH_SAMPLES // 2
    padded = np.pad(samples - samples.mean(), (half, half + -len(samples) % half))
    hertz, power = (it[1:] for it in welch(padded, rate, nperseg=WELCH_SAMPLES))
    below = np.cumsum(power)
    edge = hertz[np.searchsorted(below, BANDWIDTH_SHARE * below[-1])]
    logs = np.log(np.maximum(power, 1e-12 * power.max()))  # 120 dB down, a band is as good as empty
    return dict(
        bandwidth=MetricValue(edge, unit='Hz'),
        bandwidth_share=MetricValue(2 * edge / rate),
        spectral_flatness=MetricValue(np.exp(logs.mean()) / power.mean()),
    )


def checked_samples(wave: Tensor, sample_rate: int) -> np.ndarray:
    """Give a clip back as `(samples,)` float64.

    Raises TypeError for anything but a floating-point tensor and an int, ValueError for a wrong rank, no samples, NaN,
    infinity, or a rate that is not above 0.
    """
    check_audio(wave, ndim=1, shape='(samples,)', name='wave')
    check_sample_rate(sample_rate)
    if len(wave) == 0:
        raise ValueError('wave has no samples; leave empty clips out')
    check_finite(wave[None], 'wave holds NaN or infinity; leave failed clips out')
    return wave.detach().cpu().double().numpy()


def silence_share(samples: np.ndarray, rate: int) -> float:
    """Share of `(samples,)` in silent frames, of 50 ms one after the other; the last one may be shorter."""
    size = max(1, round(FRAME_SECONDS * rate))
    whole = len(samples) // size * size
    levels = samples[:whole].reshape(-1, size).std(axis=1)
    silent = size * np.count_nonzero(levels < 10 ** (SILENCE / 20))
    rest = samples[whole:]
    if len(rest) and rest.std() < 10 ** (SILENCE / 20):
        silent += len(rest)
    return silent / len(samples)


# ---- structure ----

# below, nothing is measured
LEAST_SECONDS = 1.0
# the fields of `StructureResult` that are numbers
STRUCTURE_VALUES = (
    *('tempo', 'pulse_clarity', 'beat_variation', 'onset_density'),
    *('key_strength', 'pitch_class_entropy', 'segments', 'repetition'),
)


@dataclass(frozen=True)
class StructureResult:
    """The structure of one clip. A value that is not defined has the reason.

    seconds: length of the clip.
    tempo: BPM. Not defined for less than 3 s, less than 3 onsets, or where pulse_clarity is below 0.2.
    pulse_clarity: autocorrelation, at one beat, of how much louder each moment is than the last: 1 repeats exactly.
    beat_variation: standard deviation over mean of the time between beats: 0 for a metronome.
    onset_density: notes and strokes that begin, a second.
    key_strength: correlation of the key's profile with how much there is of each pitch class, -1 to 1. The best of 24
        keys has some 0.5 in noise.
    pitch_class_entropy: bits, of the energy in each pitch class: 0 for one of them, log2(12) = 3.58 for all alike.
    segments: into how many parts the boundaries cut the clip. Not defined for 4 s and less.
    repetition: share of the passages of 2 s that come again in the clip, 0 to 1. Not defined for 4 s and less.
    tonic, mode: of the key, pitch class 0 (C) to 11 (B) and 'major' or 'minor'; None where key_strength is undefined.
    onsets, beats, boundaries: when, in seconds, from first to last.
    """

    seconds: float
    tempo: MetricValue
    pulse_clarity: MetricValue
    beat_variation: MetricValue
    onset_density: MetricValue
    key_strength: MetricValue
    pitch_class_entropy: MetricValue
    segments: MetricValue
    repetition: MetricValue
    tonic: int | None = None
    mode: str | None = None
    onsets: tuple[float, ...] = ()
    beats: tuple[float, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def key(self) -> str | None:
        """Name of the key as mir_eval takes it, such as 'C# minor'."""
        return key_name(self.tonic, self.mode)

    def figures(self) -> dict[str, MetricValue]:
        """The fields that are numbers, by name."""
        return {name: getattr(self, name) for name in STRUCTURE_VALUES}

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        plain = dict(seconds=self.seconds, key=self.key)
        plain |= {name: list(getattr(self, name)) for name in ('onsets', 'beats', 'boundaries')}
        return {name: it.to_dict() for name, it in self.figures().items()} | plain


@typechecked
@first_use('structure_of')
def structure_of(wave: Tensor, sample_rate: int) -> StructureResult:
    """Analyse one clip, at 16 kHz whatever its rate: what lies above 8 kHz has no part in it.

    - Onsets and tempo: spectral flux of a mel spectrogram, its autocorrelation with a log-normal prior around 120 BPM
      of one octave. That prior decides between a tempo and its half or double; beats by dynamic programming
      (Ellis, 2007).
    - Key: the mean of the constant-Q chroma, tuned to the clip, and the profiles of Krumhansl and Kessler (1982).
    - Boundaries: checkerboard novelty (Foote, 2000) on the similarity of chroma and timbre, 2 s on either side.
    - Repetition: passages of 2 s whose centred chroma comes again with a cosine of 0.9.

    Args:
        wave: `(samples,)`, floating point.
        sample_rate: Hz.

    Raises:
        TypeError, ValueError: anything but a wave with finite samples and a sample rate.
    """
    samples = checked_samples(wave, sample_rate)
    seconds = len(samples) / sample_rate
    if seconds < LEAST_SECONDS:
        return nothing_of(seconds, f'a clip of {seconds:.2f} s is shorter than {LEAST_SECONDS:g} s')
    import librosa

    samples = (samples - samples.mean()).astype(np.float32)
    samples = librosa.resample(samples, orig_sr=sample_rate, target_sr=RATE)
    if silence_share(samples, RATE) == 1:
        return nothing_of(seconds, SILENT)
    mel, spectrum = mel_power(samples), pitch_spectrum(samples)
    to_classes = folding(find_tuning(spectrum))
    return StructureResult(
        seconds,
        **rhythm(mel, seconds),
        **tonality(spectrum, to_classes),
        **form(mel, to_classes @ spectrum, seconds),
    )


class MusicStructure(ClipMetric):
    """What `structure_of` finds: means over generated and reference clips, and `compare_structure` of the two."""

    group = 'music_structure'

    def measure(self, wave: Tensor, sample_rate: int) -> Any:
        return structure_of(wave, sample_rate)

    def compute(self) -> dict[str, dict[str, MetricValue]]:
        sides = dict(generated=self.found(), reference=self.found(is_reference=True))
        means = {side: summarise_structure(clips, seed=self.seed) for side, clips in sides.items() if clips}
        return means | (dict(distance=compare_structure(**sides)) if sides['reference'] else {})

    def clip_values(self, is_reference: bool) -> dict[int, dict[str, Any]]:
        clips = self.state['reference_clips' if is_reference else 'clips'].items()
        return {
            index: {name: it.value for name, it in found.figures().items()} | dict(key=found.key)
            for index, found in clips
        }


@typechecked
def summarise_structure(results: Sequence[StructureResult], seed: int = 0) -> dict[str, MetricValue]:
    """The mean over clips of each value, with its bootstrap interval, and major_share, that of clips in major.

    Clips without a value are left out of a mean, and counted. Raises ValueError for no clips.
    """
    found = mean_of_clips([it.figures() for it in results], seed=seed)
    modes = [float(it.mode == 'major') for it in results if it.mode is not None]
    return found | dict(major_share=mean_value(modes, seed=seed, missing='no clip has a key'))


def nothing_of(seconds: float, reason: str) -> StructureResult:
    """Every value undefined."""
    return StructureResult(seconds, **dict.fromkeys(STRUCTURE_VALUES, undefined(reason)))


def key_name(tonic: int | None, mode: str | None) -> str | None:
    return None if tonic is None else f'{TONICS[tonic]} {mode}'


# ---- against what is true, and other music ----


@dataclass(frozen=True)
class StructureTruth:
    """What is known to be true of a clip; what is not known is None.

    Attributes:
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
) -> dict[str, MetricValue]:
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
    with needing('scores need mir_eval', 'eval'):
        import mir_eval  # noqa: F401
    scores = {}
    for name, (about, score) in SCORES.items():
        values = [score(one, true) for one, true in zip(found, truth) if getattr(true, about) is not None]
        scores[name] = mean_value(values, seed=seed, missing=f'{about}: known of no clip')
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
    true, estimated = (
        np.column_stack([[0.0, *at], [*at, found.seconds]]) for at in (sorted(truth.boundaries), found.boundaries)
    )
    return float(detection(true, estimated, window=window, trim=True)[2])


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
def compare_structure(
    generated: Sequence[StructureResult], reference: Sequence[StructureResult]
) -> dict[str, MetricValue]:
    """How far the values of some clips are distributed from those of others, which need not be as many.

    Returns, for each value of `StructureResult`, the 1-Wasserstein distance of its values over clips, in its unit: how
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
    for name in STRUCTURE_VALUES:
        found_there = {side: [getattr(it, name) for it in clips] for side, clips in sides.items()}
        values = {side: [it.value for it in own if it.value is not None] for side, own in found_there.items()}
        empty = next((side for side, kept in values.items() if not kept), None)
        if empty:
            found[name] = undefined(f'no {empty} clip has a value, such as: {found_there[empty][0].reason}')
            continue
        details = {f'{side}_mean': float(np.mean(kept)) for side, kept in values.items()}
        details |= {f'{side}_count': len(kept) for side, kept in values.items()}
        unit = next(it.unit for it in found_there['generated'] if it.value is not None)
        found[name] = MetricValue(
            wasserstein_distance(values['generated'], values['reference']), unit=unit, details=details
        )
    return found
