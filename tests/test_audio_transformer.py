import copy
import warnings

import pytest
import torch
from helpers.models import tiny_audio
from torch import nn

from musiclm_pytorch import create_optimized_audiospectrogram_transformer
from musiclm_pytorch.kernels import plain_kernels
from musiclm_pytorch.mulan import audio_transformer
from musiclm_pytorch.mulan.audio_transformer import choose_patches

NAN = float('nan')


def padded(waves, total):
    batch = torch.full((len(waves), total), NAN)
    for row, wave in zip(batch, waves):
        row[: len(wave)] = wave
    return batch, torch.tensor([len(wave) for wave in waves])


# ---- position bias ----


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (2, 5), (4, 3)])
def test_position_table_equals_the_mlp_on_every_pair(height, width):
    tower = tiny_audio()
    table, codes, centre = tower.position_table(height, width)
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2)
    pairs = tower.dynamic_pos_bias_mlp((grid[:, None] - grid[None, :]).float())
    torch.testing.assert_close(table[:, codes[:, None] - codes[None, :] + centre], pairs.permute(2, 0, 1))


@pytest.mark.parametrize('lengths', [None, [2000, 700, 1333]])
def test_spectrograms_a_few_at_a_time_equal_those_at_once(lengths, monkeypatch):
    front_end = dict(audio_sample_rate=8000, spec_n_fft=512, spec_win_length=500, spec_n_mels=20, clip_summary=True)
    tower = tiny_audio(**front_end, support_variable_length=True).eval()
    waves, lengths = 0.1 * torch.randn(3, 2000), None if lengths is None else torch.tensor(lengths)
    spec, frames, measured = tower.front_end(waves, lengths)
    for bins in (1, 4500):  # one and two waves
        monkeypatch.setattr(audio_transformer, 'BINS_AT_A_TIME', bins)
        found = tower.front_end(waves, lengths)
        torch.testing.assert_close(found[0], spec, atol=1e-4, rtol=1e-4)
        assert (found[1] is None and lengths is None) or torch.equal(found[1], frames)
        torch.testing.assert_close(found[2], measured, atol=1e-5, rtol=1e-4)


# ---- lengths ----

VARIANTS = {
    'power': dict(),
    'log-mel': dict(audio_sample_rate=16000, spec_n_fft=512, spec_win_length=200, spec_n_mels=32, patch_size=8),
    'not centred': dict(spec_center=False),
    'zeros around': dict(spec_pad=20, spec_pad_mode='replicate'),
    'tall patches': dict(patch_size=(32, 4)),
    'summary': dict(
        audio_sample_rate=8000, spec_n_fft=512, spec_win_length=500, spec_n_mels=20, patch_size=4, clip_summary=True
    ),
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_padded_item_is_embedded_like_the_item_alone(variant):
    tower = tiny_audio(support_variable_length=True, **VARIANTS[variant]).eval()
    waves = [torch.randn(n) for n in (2500, 1200, 1997, 2300)]
    batch, lengths = padded(waves, total=3100)
    together = tower(batch, audio_lengths=lengths)
    for embed, wave in zip(together, waves):
        torch.testing.assert_close(embed, tower(wave[None])[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(embed, tower(wave[None], audio_lengths=[len(wave)])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize('time_first', [True, False])
def test_padded_spectrogram_is_embedded_like_the_item_alone(time_first):
    tower = tiny_audio(accept_spec=True, accept_spec_time_first=time_first, support_variable_length=True).eval()
    specs = [torch.rand(t, 40) for t in (70, 33, 16)]
    batch = torch.full((3, 90, 40), NAN)
    for row, spec in zip(batch, specs):
        row[: len(spec)] = spec
    order = (lambda t: t) if time_first else (lambda t: t.transpose(-1, -2))
    together = tower(order(batch), audio_lengths=[70, 33, 16])
    for embed, spec in zip(together, specs):
        torch.testing.assert_close(embed, tower(order(spec[None]))[0], atol=1e-5, rtol=0)


def test_augmented_padded_item_is_that_of_the_item_alone():
    """Patch dropout, stretch and masks."""
    tower = tiny_audio(support_variable_length=True).train()
    wave = torch.randn(1, 2000)
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        found.append(tower(wave))
        torch.manual_seed(seed)
        together = tower(nn.functional.pad(wave, (0, 999), value=NAN), audio_lengths=[2000])
        torch.testing.assert_close(together, found[-1], atol=1e-5, rtol=0)
    assert torch.pdist(torch.cat(found)).min() > 1e-3


def test_nothing_is_drawn_in_eval_mode_or_where_it_is_turned_off():
    tower = tiny_audio(spec_aug_stretch_factor=1, spec_aug_freq_mask=0, spec_aug_time_mask=0)
    wave = torch.randn(1, 2000)
    kept_all = tower(wave, force_no_patch_dropout=True)
    assert (tower(wave) - kept_all).abs().max() > 1e-3
    torch.testing.assert_close(tower.eval()(wave), kept_all)


def test_gradients_of_padded_items_are_those_of_the_items_alone():
    tower = tiny_audio(support_variable_length=True).eval()
    waves = [torch.randn(n) for n in (2500, 1200, 1997)]
    batch, lengths = padded(waves, total=2600)

    gradients = []
    for embeds in (tower(batch, audio_lengths=lengths), torch.cat([tower(wave[None]) for wave in waves])):
        tower.zero_grad()
        (embeds * torch.arange(32.0)).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in tower.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ('lengths', 'error', 'message'),
    [
        ([2000, 0], ValueError, r'audio_lengths\[1\] is 0'),
        ([2000, 2001], ValueError, r'audio_lengths\[1\] is 2001, but must lie between 1 and the 2000 samples'),
        ([2000], ValueError, r'audio_lengths must have shape \(2,\)'),
        ([2000.0, 10.0], TypeError, 'audio_lengths must be integers'),
        ([2000, 100], ValueError, 'holds 100 samples, but one patch needs at least 180'),
    ],
)
def test_bad_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        tiny_audio(support_variable_length=True)(torch.randn(2, 2000), audio_lengths=lengths)
    with pytest.raises(ValueError, match='support_variable_length=True'):
        tiny_audio()(torch.randn(2, 2000), audio_lengths=lengths)


def test_long_audio_is_cut_with_one_warning():
    tower = tiny_audio(max_audio_length=1500, support_variable_length=True).eval()
    wave = torch.randn(2, 2000)
    with pytest.warns(UserWarning, match='audio of 2000 samples is cut to max_audio_length, 1500') as caught:
        embeds = tower(wave)
        with_lengths = tower(wave, audio_lengths=[2000, 1300])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    torch.testing.assert_close(embeds, tower(wave[:, :1500]))
    torch.testing.assert_close(with_lengths[1], tower(wave[1:, :1300])[0], atol=1e-5, rtol=0)


# ---- patches ----


@pytest.mark.parametrize('dropout', [0.0, 0.25, 0.9, 0.999])
def test_chosen_patches_are_real_distinct_and_as_many_as_asked(dropout):
    columns = torch.tensor([7, 1, 4])
    kept, lengths = choose_patches(3, 7, columns, 3, dropout, device='cpu')
    expected = [max(1, int(3 * c * (1 - dropout))) for c in columns]
    assert expected == ([kept.shape[1]] * 3 if lengths is None else lengths.tolist())
    for row, count, filled in zip(kept, expected, columns):
        real = row[:count]
        assert len(real.unique()) == count
        assert (real % 7 < filled).all()
        assert (real.diff() > 0).all()


@pytest.mark.parametrize('dropout', [0.1, 0.3, 0.8, 0.95])
def test_as_many_patches_stay_with_a_length_as_without(dropout):
    for width in range(1, 80):
        kept, lengths = choose_patches(2, width, None, 1, dropout, device='cpu')
        with_length, _ = choose_patches(2, width + 3, torch.tensor([width]), 1, dropout, device='cpu')
        assert lengths is None
        assert kept.shape[1] == with_length.shape[1] == max(1, int(2 * width * (1 - dropout)))
        assert len(kept.unique()) == kept.shape[1]
    # and every one has its turn
    seen = torch.cat([choose_patches(2, 3, None, 4, 0.5, device='cpu')[0].flatten() for _ in range(30)])
    assert seen.bincount(minlength=6).min() > 0.3 * len(seen) / 6


def test_choosing_without_dropout_draws_no_random_numbers():
    before = torch.get_rng_state()
    choose_patches(3, 7, torch.tensor([7, 2]), 2, 0.0, device='cpu')
    assert torch.equal(before, torch.get_rng_state())


# ---- layers, depth, printing ----


def test_nothing_is_printed_or_warned_of(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        tiny_audio()(torch.randn(2, 1999)).sum().backward()
    out = capfd.readouterr()
    assert out.out == out.err == ''


def test_every_parameter_learns():
    tower = tiny_audio(support_variable_length=True)
    (tower(torch.randn(2, 2000), audio_lengths=[2000, 1500]) * torch.arange(32.0)).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_stays_close(dtype):
    tower, wave = tiny_audio().eval(), torch.randn(2, 2000)
    expected = tower(wave)
    torch.testing.assert_close(tower(wave.double()), expected)
    with torch.autocast('cpu', dtype=dtype):
        torch.testing.assert_close(tower(wave).float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_casting_a_model_leaves_its_spectrogram_alone(dtype):
    """A pure tone: its leakage would show in the quiet bands if window or filters were rounded."""
    tower = create_optimized_audiospectrogram_transformer(dim=32, depth=2, heads=2, dim_head=8).eval()
    tone = 0.5 * torch.sin(torch.arange(16000) * 0.17)[None]
    spec, expected = tower.to_spectrogram(tone, None)[0], tower(tone)
    cast = copy.deepcopy(tower).to(dtype)
    torch.testing.assert_close(cast.to_spectrogram(tone, None)[0], spec)
    assert torch.cosine_similarity(cast(tone).float(), expected) > 0.999
    assert torch.equal(cast.float().spec.window, tower.spec.window)


def test_a_half_precision_model_takes_full_scale_waves():
    tower = tiny_audio(spec_n_fft=1024, spec_win_length=1024).half().eval()
    square = torch.sign(torch.sin(torch.arange(16000) * 0.01))[None]
    assert tower.to_spectrogram(square, None)[0].max() > torch.finfo(torch.float16).max
    assert tower(square).isfinite().all()


def test_gradients_can_be_differentiated_with_plain_kernels():
    tower, wave = tiny_audio().eval(), torch.randn(1, 2000, requires_grad=True)
    with plain_kernels():
        (gradient,) = torch.autograd.grad(tower(wave).square().sum(), wave, create_graph=True)
    gradient.square().sum().backward()
    assert tower.transformer.layers[0][0].to_q.weight.grad.isfinite().all()
    torch.testing.assert_close(gradient, torch.autograd.grad(tower(wave).square().sum(), wave)[0], atol=1e-4, rtol=1e-3)


def test_a_trace_fits_other_lengths():
    class WithLengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = tiny_audio(support_variable_length=True, depth=1)

        def forward(self, wavs, lengths):
            return self.tower(wavs, audio_lengths=lengths)

    module, wavs = WithLengths().eval(), torch.randn(2, 2000)
    with torch.no_grad():
        traced = torch.jit.trace(module, (wavs, torch.tensor([2000, 2000])), check_trace=False)
        shorter = torch.tensor([1100, 1900])
        torch.testing.assert_close(traced(wavs, shorter), module(wavs, shorter), atol=1e-5, rtol=1e-4)


# ---- bad input ----


@pytest.mark.parametrize(
    ('x', 'error', 'message'),
    [
        (torch.zeros(0, 2000), ValueError, r'empty batch of shape \(0, 2000\)'),
        (torch.zeros(2, 100), ValueError, 'has 100 samples, but one patch needs at least 180'),
        (torch.zeros(2000), ValueError, r'for one wave pass wavs\[None\]'),
        (torch.zeros(2, 1, 2000), ValueError, r'wavs.mean\(dim=1\)'),
        (torch.zeros(2, 2000, dtype=torch.int16), TypeError, 'torch.int16, integer PCM; .* wavs / 32768'),
        (torch.zeros(2, 2000, dtype=torch.complex64), TypeError, 'torch.complex64'),
        ([[0.0] * 2000], TypeError, 'torch.Tensor of shape .*, got list'),
        (torch.tensor([[0.0] * 2000, [0.0] * 1999 + [NAN]]), ValueError, r'wavs\[1\] holds NaN or infinite'),
        (torch.full((1, 2000), float('inf')), ValueError, r'wavs\[0\] holds NaN or infinite'),
        (torch.full((1, 2000), 1e30), ValueError, r'wavs\[0\] is so loud that its spectrogram overflows'),
    ],
)
def test_bad_waves(x, error, message):
    with pytest.raises(error, match=message):
        tiny_audio()(x)


@pytest.mark.parametrize(
    ('keywords', 'error', 'message'),
    [
        (dict(dim=30), ValueError, 'dim must be a multiple of 4 .* got 30; try 32'),
        (dict(dim=4), ValueError, 'got 4; try 8'),
        (dict(dim='512'), TypeError, '512'),
        (dict(patch_size=0), ValueError, 'patch_size'),
        (dict(patch_size=(4, 4, 4)), TypeError, 'patch_size'),
        (dict(patch_size=128), ValueError, 'has 65 bins, fewer than a patch is high'),
        (dict(patch_dropout_prob=1.0), ValueError, 'patch_dropout_prob'),
        (dict(spec_aug_freq_mask=-1), ValueError, 'widest frequency mask'),
        (dict(spec_aug_stretch_factor=0.0), ValueError, 'spec_aug_stretch_factor'),
        (dict(max_audio_length=10), ValueError, 'max_audio_length 10 is shorter than one patch'),
        (dict(accept_spec=True, max_audio_length=9999), ValueError, 'cannot go with accept_spec'),
        (dict(spec_n_mels=32), ValueError, 'spec_n_mels needs audio_sample_rate'),
        (dict(spec_n_mels=32, accept_spec=True), ValueError, 'spec_n_mels needs waves'),
        (dict(clip_summary=True), ValueError, 'adds to a log-mel front end; give spec_n_mels'),
        (dict(depht=3), TypeError, 'depht'),
    ],
)
def test_bad_settings(keywords, error, message):
    with pytest.raises(error, match=message):
        tiny_audio(**keywords)


def test_bad_spectrograms():
    tower = tiny_audio(accept_spec=True)
    with pytest.raises(ValueError, match=r'shape \(batch, frames, bins\)'):
        tower(torch.zeros(2, 2000))
    with pytest.raises(ValueError, match='have 8 bins, fewer than a patch'):
        tower(torch.zeros(2, 40, 8))
    with pytest.raises(ValueError, match='has 8 frames, but one patch needs at least 16'):
        tower(torch.zeros(2, 8, 40))
