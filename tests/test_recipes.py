import pytest
import torch

from musiclm_pytorch import (
    AudioSpectrogramTransformer,
    create_optimized_audiospectrogram_transformer,
    get_optimal_spectrogram_params,
)

RATES = (1000, 11025, 24000, 192000)


@pytest.mark.parametrize('use_case', ['music', 'tonal', 'speech', 'general'])
@pytest.mark.parametrize('rate', RATES)
def test_params_are_keywords_that_work_at_any_rate(use_case, rate):
    params = get_optimal_spectrogram_params(audio_sample_rate=rate, use_case=use_case)
    tower = AudioSpectrogramTransformer(dim=16, depth=1, heads=1, dim_head=8, **params).eval()
    assert tower.sample_rate == rate
    assert tower.log_mel.filters.amax(dim=0).min() > 0
    assert params['spec_n_mels'] % 16 == 0
    assert params['spec_hop_length'] == round(rate / (50 if use_case == 'tonal' else 100))
    assert tower(torch.randn(1, rate // 2)).isfinite().all()


@pytest.mark.parametrize(
    ('use_case', 'bands', 'window'), [('music', 128, 400), ('speech', 80, 400), ('general', 64, 512)]
)
def test_usual_settings(use_case, bands, window):
    params = get_optimal_spectrogram_params(16000, use_case)
    assert (params['spec_n_mels'], params['spec_win_length'], params['spec_hop_length']) == (bands, window, 160)


def test_bands_rise_and_tell_pitches_apart():
    tower = create_optimized_audiospectrogram_transformer(dim=16, depth=1, use_case='music').eval()
    time = torch.arange(16000) / 16000
    pitches = [110 * 2 ** (octave / 2) for octave in range(12)]
    waves = torch.stack([torch.sin(2 * torch.pi * pitch * time) for pitch in pitches])
    spec, _ = tower.to_spectrogram(waves, None)
    loudest = spec.mean(dim=-1).argmax(dim=-1)
    assert (loudest.diff() > 0).all()


def test_tonal_patches_hold_the_whole_spectrum():
    tower = create_optimized_audiospectrogram_transformer(dim=16, depth=1, use_case='tonal', patch_dropout_prob=0.0)
    spec, _ = tower.to_spectrogram(torch.randn(1, 16000), None)
    assert spec.shape[1:] == (160, 51)
    assert tower.bands == 160
    assert tower.patch_size == (160, 4)
    assert tower.summary is not None


@pytest.mark.parametrize('pitch', [880.0, 1760.0])
def test_tonal_tells_semitones_apart(pitch):
    time = torch.arange(16000) / 16000
    waves = torch.stack([torch.sin(2 * torch.pi * hertz * time) for hertz in (pitch, pitch * 2 ** (1 / 12))])

    def likeness(use_case):
        tower = create_optimized_audiospectrogram_transformer(dim=16, depth=1, use_case=use_case).eval()
        bands = tower.to_spectrogram(waves, None)[0].mean(dim=-1)
        return torch.corrcoef(bands)[0, 1]

    assert likeness('tonal') < likeness('music') - 0.05


def test_spectrogram_values_are_of_order_one():
    tower = create_optimized_audiospectrogram_transformer(dim=16, depth=1).eval()
    spec, _ = tower.to_spectrogram(0.1 * torch.randn(2, 16000), None)
    assert -2 < spec.mean() < 2
    silent, _ = tower.to_spectrogram(torch.zeros(2, 16000), None)
    assert silent.isfinite().all()
    assert silent.max() < spec.min()


def test_keywords_override_the_recipe():
    tower = create_optimized_audiospectrogram_transformer(
        dim=16, depth=1, use_case='speech', audio_sample_rate=24000, spec_n_mels=32, heads=1
    )
    assert tower.log_mel.filters.shape[1] == 32
    assert tower.config['heads'] == 1
    assert tower.sample_rate == 24000


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (
            dict(use_case='opera'),
            ValueError,
            "unknown use_case 'opera'; choose one of 'music', 'tonal', 'speech', 'general'",
        ),
        (dict(audio_sample_rate=44), ValueError, 'in Hz and must be at least 1000, got 44'),
        (dict(audio_sample_rate=0), ValueError, 'audio_sample_rate must be greater than 0'),
        (dict(audio_sample_rate='16k'), TypeError, '16k'),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        get_optimal_spectrogram_params(**arguments)
