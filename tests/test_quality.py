"""Signal measurements: exact on signals whose figures are known, and not to be deceived by silence or a constant."""

import math

import numpy as np
import pytest
import torch
from scipy import signal

from musiclm_pytorch.evaluation.clip_metrics import SignalQuality, signal_quality
from musiclm_pytorch.evaluation.metric import EvaluationClip, MetricValue, mean_of_clips, to_json

RATE = 16000


def tone(hertz: float, *, seconds: float = 2.0, rate: int = RATE, phase: float = 0.0, level: float = 1.0):
    return level * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate)).double() / rate + phase)


def noise(seconds: float = 2.0, level: float = 0.1, rate: int = RATE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return level * torch.randn(round(seconds * rate), generator=generator)


def value(wave: torch.Tensor, name: str, rate: int = RATE) -> float:
    return signal_quality(wave, rate)[name].value


# ---- loudness ----


@pytest.mark.parametrize('rate', [8000, 16000, 22050, 48000])
def test_standard_sine_has_its_loudness_at_any_rate(rate):
    assert value(tone(997, rate=rate), 'loudness', rate) == pytest.approx(-3.01, abs=0.01)
    assert value(tone(997, rate=rate, level=0.1), 'loudness', rate) == pytest.approx(-23.01, abs=0.01)


def plain_loudness(samples: np.ndarray) -> float:
    """BS.1770-4 for one channel at 48 kHz, with the coefficients as printed in the standard."""
    shelf = [1.53512485958697, -2.69169618940638, 1.19839281085285], [1.0, -1.69065929318241, 0.73248077421585]
    high_pass = [1.0, -2.0, 1.0], [1.0, -1.99004745483398, 0.99007225036621]
    for coefficients in (shelf, high_pass):
        samples = signal.lfilter(*coefficients, samples)
    powers = [np.mean(samples[i : i + 19200] ** 2) for i in range(0, len(samples) - 19200 + 1, 4800)]
    powers = [it for it in powers if -0.691 + 10 * math.log10(it) > -70]
    gate = -0.691 + 10 * math.log10(np.mean(powers)) - 10
    powers = [it for it in powers if -0.691 + 10 * math.log10(it) > gate]
    return -0.691 + 10 * math.log10(np.mean(powers))


# the last leaves half of a block that is not counted
@pytest.mark.parametrize('seconds', [0.4, 0.75, 3.3, 2.05])
def test_loudness_is_gated_as_the_standard_says(seconds):
    wave = noise(seconds, 0.2, 48000).double()
    wave[len(wave) // 2 :] *= torch.linspace(1, 0.001, len(wave) - len(wave) // 2)
    assert value(wave, 'loudness', 48000) == pytest.approx(plain_loudness(wave.numpy()), abs=0.01)


def test_loudness_is_undefined_rather_than_infinite():
    short = signal_quality(tone(440, seconds=0.39), RATE)['loudness']
    assert short.value is None
    assert short.reason == 'a clip of 0.39 s is shorter than one block of 0.4 s'
    # 24 Hz of -59 dBFS: above the limit of silence, but barely heard
    faint = signal_quality(tone(24, level=10 ** (-56 / 20)), RATE)['loudness']
    assert faint.reason == 'no block is louder than -70 LUFS'
    assert signal_quality(torch.zeros(RATE), RATE)['loudness'].reason == 'the clip is silent'


# ---- peaks and clipping ----


def test_peak_between_samples_is_found():
    wave = tone(RATE / 4, phase=math.pi / 4, level=0.5).half().requires_grad_()
    assert value(wave, 'peak') == pytest.approx(-6.02 - 3.01, abs=0.01)
    assert value(wave, 'true_peak') == pytest.approx(-6.02, abs=0.05)
    quality = signal_quality(torch.zeros(100), RATE)
    assert quality['peak'].reason == quality['true_peak'].reason == 'all samples are 0'


@pytest.mark.parametrize(
    ('samples', 'clipped'),
    [
        ([0, 1, 1, 1, 0], 3),
        ([1, 1, 1, 0, -1, -1, -1, -1], 7),
        ([0, 1, 1, 0, 1, 0], 0),
        ([1, 1, -1, -1, 1, 1], 0),
        ([0.9995, 0.9991, 1.3, 0.998], 3),
        ([0.998] * 5, 0),
        ([1], 0),
    ],
)
def test_clipped_samples_are_those_of_runs_at_full_scale(samples, clipped):
    wave = torch.tensor(samples, dtype=torch.float64)
    assert value(wave, 'clipped_share') == pytest.approx(clipped / len(samples))


def test_clipping_by_a_gain_is_measured():
    wave = tone(100, seconds=1.0, level=2.0).clamp(-1, 1)
    # a sine of amplitude 2 is above 1 for two thirds of the time
    assert value(wave, 'clipped_share') == pytest.approx(2 / 3, abs=0.01)
    # a sine that just reaches full scale is not clipped
    assert value(tone(997, seconds=1.0), 'clipped_share') == 0


def test_crest_factor_of_a_sine_and_of_a_square():
    assert value(tone(50) + 0.2, 'crest_factor') == pytest.approx(10 * math.log10(2), abs=1e-3)
    assert value(torch.tensor([0.3, -0.3]).repeat(4000), 'crest_factor') == pytest.approx(0, abs=1e-6)


# ---- silence and offset ----


def test_share_of_silence_counts_the_last_frame_by_its_length():
    wave = torch.cat([tone(440, seconds=1.0), torch.zeros(RATE), torch.zeros(123)])
    assert value(wave, 'silence_share') == pytest.approx((RATE + 123) / len(wave))
    # at -60 dBFS, by the standard deviation
    for level, share in ((1.01e-3, 0.0), (0.99e-3, 1.0)):
        assert value(tone(400, level=level * math.sqrt(2)), 'silence_share') == share
    # each half is constant, whatever its offset
    assert value(torch.cat([torch.zeros(RATE), torch.full((RATE,), 0.1)]), 'silence_share') == 1


def test_constant_does_not_sound():
    quality = signal_quality(torch.full((RATE,), -0.5), RATE)
    assert quality['silence_share'].value == 1
    assert quality['dc_offset'].value == pytest.approx(0.5)
    for name in ('loudness', 'bandwidth', 'bandwidth_share', 'crest_factor', 'spectral_flatness'):
        assert quality[name].reason == 'the clip is silent'
    assert value(tone(400) * 0.1 + 0.25, 'dc_offset') == pytest.approx(0.25, abs=1e-6)


# ---- spectrum ----


@pytest.mark.parametrize(('rate', 'hertz'), [(16000, 1000), (22050, 5432.1), (48000, 300)])
def test_bandwidth_of_a_tone_is_its_frequency(rate, hertz):
    wave = tone(hertz, rate=rate) + 0.5  # the offset is no part of it
    assert value(wave, 'bandwidth', rate) == pytest.approx(hertz, abs=2 * rate / 4096)
    assert value(wave, 'bandwidth_share', rate) == pytest.approx(2 * hertz / rate, abs=4 / 4096)


def test_bandwidth_of_noise_is_that_of_its_filter():
    wave = noise(5.0)
    assert value(wave, 'bandwidth_share') == pytest.approx(0.99, abs=0.005)
    spectrum = torch.fft.rfft(wave)
    spectrum[torch.fft.rfftfreq(len(wave), 1 / RATE) > 2000] = 0
    dull = torch.fft.irfft(spectrum, len(wave))
    assert value(dull, 'bandwidth') == pytest.approx(0.99 * 2000, abs=15)


def test_spectral_flatness_tells_tones_from_noise():
    assert value(noise(5.0), 'spectral_flatness') > 0.9
    assert value(tone(1000), 'spectral_flatness') < 1e-3


@pytest.mark.parametrize('samples', [100, 4096, 4097, 6001])
def test_no_sample_is_left_out_of_the_spectrum(samples):
    wave = torch.zeros(samples)
    wave[-1] = 1.0
    # an impulse is as strong at all frequencies
    assert value(wave, 'spectral_flatness') > 0.8


# ---- summary and bad input ----


def summary(waves, **keywords):
    metric = SignalQuality(**keywords)
    for index, wave in enumerate(waves):
        metric.update(EvaluationClip(index, f'clip {index}', wave, RATE))
    return metric.compute()['signal']


def test_summary_counts_silent_and_clipped_clips():
    waves = [torch.zeros(RATE), tone(997, seconds=1.0), tone(997, seconds=1.0, level=0.1), 4 * noise(1.0)]
    waves.append(noise(1.0, 4.0).clamp(-1, 1))
    found = summary(waves, seed=3)
    assert (found['silent_clips'].value, found['silent_clips'].count) == (1, 5)
    assert found['clipped_clips'].value == 1
    values = [signal_quality(wave, RATE)['loudness'].value for wave in waves[1:]]
    assert found['loudness'].value == pytest.approx(np.mean(values))
    assert found['loudness'].low < found['loudness'].value < found['loudness'].high
    assert (found['loudness'].count, found['loudness'].unit) == (4, 'LUFS')
    assert found['loudness'].details == {'left_out': 1}


def test_summary_of_silence_has_no_loudness():
    found = summary([torch.zeros(RATE)] * 3)
    assert to_json(found)['loudness'] == {'value': None, 'reason': 'the clip is silent', 'left_out': 3}
    assert float(found['silent_clips']) == 3
    with pytest.raises(ValueError, match='no value: the clip is silent'):
        float(found['loudness'])
    with pytest.raises(ValueError, match='no clips'):
        summary([])
    with pytest.raises(ValueError, match=r"clip 1 has the values \['peak'\]"):
        mean_of_clips([signal_quality(torch.zeros(9), RATE), {'peak': MetricValue(1.0)}])
    with pytest.raises(ValueError, match='clip 0: wave has no samples'):
        summary([torch.zeros(0)])


@pytest.mark.parametrize(
    ('wave', 'rate', 'error', 'words'),
    [
        (torch.zeros(2, 100), RATE, ValueError, 'shape'),
        (torch.zeros(0), RATE, ValueError, 'no samples'),
        (torch.tensor([0.0, math.nan]), RATE, ValueError, 'NaN'),
        (torch.zeros(100, dtype=torch.int16), RATE, TypeError, '32768'),
        (torch.zeros(100), 0, ValueError, 'sample_rate'),
        (torch.zeros(100), 16000.0, TypeError, 'sample_rate'),
        (np.zeros(100), RATE, TypeError, 'wave'),
    ],
)
def test_bad_input_is_named(wave, rate, error, words):
    with pytest.raises(error, match=words):
        signal_quality(wave, rate)
