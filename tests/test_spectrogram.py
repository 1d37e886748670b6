import pytest
import torch
from torchaudio import transforms

from musiclm_pytorch.mulan.spectrogram import (
    LogMel,
    RandomMask,
    RandomTimeStretch,
    Spectrogram,
    mel_filters,
)

FRONT_ENDS = {
    'default': dict(),
    'odd': dict(n_fft=255, win_length=41, hop_length=17),
    'not centred': dict(n_fft=64, win_length=64, center=False),
    'padded': dict(n_fft=100, win_length=30, pad=9),
    'constant': dict(pad_mode='constant', pad=3),
    'replicate': dict(pad_mode='replicate', pad=3),
    'circular': dict(pad_mode='circular', pad=4),
    'magnitude': dict(power=1),
    'window as long as the transform': dict(n_fft=64, win_length=None, hop_length=20),
}


@pytest.mark.parametrize('name', FRONT_ENDS)
def test_equals_torchaudio(name):
    keywords = FRONT_ENDS[name]
    wavs = torch.randn(3, 777)
    spec, frames = Spectrogram(**keywords)(wavs)
    reference = transforms.Spectrogram(**{**dict(n_fft=128, win_length=24), **keywords})(wavs)
    torch.testing.assert_close(spec, reference)
    assert frames is None
    assert Spectrogram(**keywords).num_frames(777) == reference.shape[-1]


@pytest.mark.parametrize('name', FRONT_ENDS)
def test_padded_wave_has_the_frames_of_the_wave_alone(name):
    front_end = Spectrogram(**FRONT_ENDS[name])
    lengths = torch.tensor([700, 333, 513])
    wavs = torch.randn(3, 700)
    for wave, length in zip(wavs, lengths):
        wave[length:] = torch.nan
    spec, frames = front_end(wavs, lengths)
    for item, wave, length, count in zip(spec, wavs, lengths, frames):
        alone, _ = front_end(wave[None, :length])
        assert alone.shape[-1] == count
        torch.testing.assert_close(item[:, :count], alone[0], atol=1e-4, rtol=1e-4)
        assert (item[:, count:] == 0).all()


@pytest.mark.parametrize('name', FRONT_ENDS)
def test_min_samples_is_the_shortest_wave_that_works(name):
    front_end = Spectrogram(**FRONT_ENDS[name])
    for frames in (1, 2, 16):
        shortest = front_end.min_samples(frames)
        assert front_end(torch.randn(1, shortest))[0].shape[-1] >= frames
        if shortest == 1:
            continue
        try:
            fewer = front_end(torch.randn(1, shortest - 1))[0].shape[-1]
        except RuntimeError:  # shorter than the reflection needs
            continue
        assert fewer < frames


@pytest.mark.parametrize('rate', [0.8, 1.0, 1.1, 1.25])
@pytest.mark.parametrize('power', [1, 2])
def test_stretch_has_the_magnitudes_of_the_phase_vocoder(rate, power):
    complex_spec = transforms.Spectrogram(n_fft=128, power=None)(torch.randn(1, 4000))
    reference = transforms.TimeStretch(hop_length=64, n_freq=65)(complex_spec, rate).abs() ** power
    stretch = RandomTimeStretch(0.8, power=power, min_frames=4)
    total = complex_spec.shape[-1]
    spec, frames = stretch.stretch(
        complex_spec.abs() ** power, frames=torch.tensor([total]), rates=torch.tensor([rate])
    )
    assert int(frames) == min(total, reference.shape[-1])
    # torchaudio fades into two frames of silence at the very end
    inner = min(total, int(frames) - 2)
    torch.testing.assert_close(spec[..., :inner], reference[..., :inner], atol=1e-3, rtol=1e-3)
    assert (spec[..., int(frames) :] == 0).all()


def test_stretch_draws_a_rate_for_each_item_on_both_sides_of_one():
    stretch = RandomTimeStretch(0.8, power=2, min_frames=4)
    ramp = torch.arange(1.0, 101.0).expand(500, 3, 100)
    spec, frames = stretch(ramp**2, None)
    rates = (spec[:, 0, 40].sqrt() - 1) / 40
    assert rates.min() >= 0.8 - 1e-5
    assert rates.max() <= 1.25 + 1e-5
    assert 0.45 < (rates < 1).float().mean() < 0.55
    assert len(rates.unique()) > 400
    torch.testing.assert_close(frames, (100 / rates).ceil().long().clamp(max=100), atol=1, rtol=0)


def test_stretch_leaves_enough_for_a_patch():
    stretch = RandomTimeStretch(0.5, power=2, min_frames=16)
    _, frames = stretch(torch.rand(200, 3, 40), torch.randint(16, 41, (200,)))
    assert frames.min() >= 16


@pytest.mark.parametrize(('axis', 'size', 'shape'), [('frequency', 65, (65, 4)), ('time', 200, (4, 200))])
def test_masks_differ_and_never_blank_a_sample(axis, size, shape):
    mask = RandomMask(axis, max_width=80, max_fraction=0.375)
    masked = mask(torch.ones(4000, *shape), None)
    lost = (masked == 0).float().mean(dim=(1, 2)) * size
    assert lost.max() <= int(0.375 * size)
    assert lost.max() > 0.3 * size
    assert lost.min() == 0
    assert len(lost.unique()) > 10
    lines = masked[:, :, 0] if axis == 'frequency' else masked[:, 0, :]
    # one band each, and every position gets its turn
    assert (lines.diff(dim=1).abs().sum(dim=1) <= 2).all()
    assert ((lines == 0).any(dim=0)).all()


def test_time_mask_stays_within_the_real_frames():
    frames = torch.randint(1, 50, (300,))
    masked = RandomMask('time', max_width=80, max_fraction=0.2)(torch.ones(300, 4, 50), frames)
    for item, count in zip(masked, frames):
        assert (item[:, count:] == 1).all()
        assert item[:, :count].sum() > 0


def log_mel(**keywords):
    return LogMel(
        **{**dict(n_mels=32, bins=257, sample_rate=16000, f_min=0.0, f_max=None, mean=-4.0, std=4.0), **keywords}
    )


@pytest.mark.parametrize('n_mels', [1, 3, 32, 61])
def test_log_mel_equals_torchaudio(n_mels):
    """By blocks of bands, however many there are."""
    power = torch.rand(2, 513, 7) * 10
    mel = transforms.MelScale(n_mels=n_mels, sample_rate=16000, n_stft=513, norm=None, mel_scale='slaney')(power)
    expected = (mel.clamp(min=2**-23).log() + 4.0) / 8.0
    torch.testing.assert_close(log_mel(n_mels=n_mels, bins=513)(power), expected, atol=1e-5, rtol=1e-5)


def test_mel_filters_are_those_of_torchaudio():
    filters = mel_filters(24, bins=257, sample_rate=16000, f_min=50.0, f_max=7000.0)  # torchaudio 2.11's numbers
    torch.testing.assert_close(filters.sum(), torch.tensor(208.2200927734375))
    sums = torch.tensor([3.63165283203125, 3.657449722290039, 6.4670209884643555, 23.36793327331543])
    torch.testing.assert_close(filters[:, [0, 1, 12, 23]].sum(dim=0), sums)
    torch.testing.assert_close(filters[100, 17:19], torch.tensor([0.8970611691474915, 0.10293880850076675]))
    torch.testing.assert_close(filters[[3, 5], 0], torch.tensor([0.38554486632347107, 0.9363232254981995]))


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        (dict(n_mels=200), '200 mel bands .* raise spec_n_fft or lower spec_n_mels'),
        (dict(f_min=9000.0), 'spec_f_min < spec_f_max'),
        (dict(f_max=9000.0), 'spec_f_max <= audio_sample_rate / 2, got 0.0, 9000.0 and 8000.0'),
        (dict(std=0.0), 'spec_std must be greater than 0'),
    ],
)
def test_bad_mel_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        log_mel(**keywords)


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        (dict(win_length=200), 'spec_win_length 200 exceeds spec_n_fft 128'),
        (dict(pad=-1), 'spec_pad must be at least 0, got -1'),
        (dict(pad_mode='mirror'), "spec_pad_mode must be one of .*, got 'mirror'"),
        (dict(power=0), 'spec_power must be greater than 0'),
        (dict(power=0.5), 'spec_power must be at least 1, the magnitude, got 0.5'),
    ],
)
def test_bad_spectrogram_settings(keywords, message):
    with pytest.raises(ValueError, match=message):
        Spectrogram(**keywords)
