"""What the signal of a clip is like, whatever it plays: loudness, peaks, clipping, silence, offset and spectrum.

A generator that gives silence, noise, a constant or clipped waves may look good to a distance of embeddings. These
figures need no weights and show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.evaluation.clips import SILENT, check_clip, mean_of_clips, silence_share
from musiclm_pytorch.evaluation.figures import Figure, undefined

# a sample is clipped within a run of so many of one sign at full scale; values beyond 1 are at full scale, too
FULL_SCALE, CLIPPED_RUN = 0.999, 3
BANDWIDTH_SHARE = 0.99
# samples at four times the rate on either side that scipy's filter for it reaches
FILTER_REACH = 40
WELCH_SAMPLES = 4096
# the filters of BS.1770 are given at this rate; seconds of its gating blocks, and their step
LOUDNESS_RATE, BLOCK, STEP = 48000, 0.4, 0.1


@typechecked
def signal_quality(wave: Tensor, sample_rate: int) -> dict[str, Figure]:
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
    samples = check_clip(wave, sample_rate)
    peak = np.abs(samples).max()
    found = dict(
        loudness=undefined(SILENT),
        peak=decibels(peak, 'dBFS'),
        true_peak=decibels(max(peak, peak_between(samples)), 'dBTP'),
        clipped_share=Figure(clipped_share(samples)),
        silence_share=Figure(silence_share(samples, sample_rate)),
        dc_offset=Figure(abs(samples.mean())),
        **dict.fromkeys(('bandwidth', 'bandwidth_share', 'crest_factor', 'spectral_flatness'), undefined(SILENT)),
    )
    if found['silence_share'].value < 1:
        centred = samples - samples.mean()
        found['loudness'] = loudness(samples, sample_rate)
        found['crest_factor'] = decibels(np.abs(centred).max() / np.sqrt(np.mean(centred**2)), 'dB')
        found |= spectrum_figures(samples, sample_rate)
    return found


@typechecked
def summarise_quality(clips: Sequence[Mapping[str, Figure]], seed: int = 0) -> dict[str, Any]:
    """What `signal_quality` found of each clip, over all of them.

    Returns:
        each figure's mean with its bootstrap interval (clips without a value are left out and counted), and
        silent_clips, clipped_clips: how many clips are silent all through, and how many have a clipped sample.
        clips: what was given, a list.

    Raises ValueError for no clips.
    """
    found: dict[str, Any] = mean_of_clips(clips, seed=seed)
    found['silent_clips'] = Figure(sum(clip['silence_share'].value == 1 for clip in clips), count=len(clips))
    found['clipped_clips'] = Figure(sum(clip['clipped_share'].value > 0 for clip in clips), count=len(clips))
    found['clips'] = list(clips)
    return found


def decibels(amplitude: float, unit: str) -> Figure:
    return Figure(20 * np.log10(amplitude), unit=unit) if amplitude > 0 else undefined('all samples are 0')


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


def loudness(samples: np.ndarray, rate: int) -> Figure:
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
    return Figure(value, unit='LUFS') if np.isfinite(value) else undefined('no block is louder than -70 LUFS')


def spectrum_figures(samples: np.ndarray, rate: int) -> dict[str, Figure]:
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
        bandwidth=Figure(edge, unit='Hz'),
        bandwidth_share=Figure(2 * edge / rate),
        spectral_flatness=Figure(np.exp(logs.mean()) / power.mean()),
    )
