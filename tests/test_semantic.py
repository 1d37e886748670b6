"""Semantic tokenizers: what audiolm-pytorch needs of them, for each kind of encoder, and what goes wrong."""

import json

import numpy as np
import pytest
import torch
from helpers.clap import tiny_clap
from helpers.hubert import make_checkpoint, make_hubert, reference_layers, save_kmeans
from helpers.models import tiny_audio, tiny_mulan
from helpers.pipeline import TINY
from helpers.training import assert_same, weights
from torchaudio.functional import resample
from transformers import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from musiclm_pytorch import (
    MuLaNSemanticTokenizer,
    MusicLMRecipe,
    SemanticTokenizer,
    TransformersSemanticTokenizer,
    train_musiclm,
)
from musiclm_pytorch.atomic import read_checked_json
from musiclm_pytorch.audiolm.convert import (
    CoarseTransformer,
    CoarseTransformerWrapper,
    HubertWithKmeans,
    SemanticTransformer,
    SemanticTransformerWrapper,
    SoundStream,
)
from musiclm_pytorch.audiolm.fingerprints import fingerprint
from musiclm_pytorch.cli import main

CODES = 6
FRONT_END = dict(
    audio_sample_rate=8000, spec_n_fft=256, spec_win_length=256, spec_hop_length=80, spec_n_mels=32, patch_size=(32, 4)
)


def tiny_wav2vec2_bert():
    config = Wav2Vec2BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_depthwise_kernel_size=3
    )
    return Wav2Vec2BertModel(config)


def tiny_wavlm():
    conv = dict(conv_dim=[8, 8], conv_kernel=[10, 4], conv_stride=[8, 4], num_feat_extract_layers=2)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return WavLMModel(WavLMConfig(**conv, **sizes, num_conv_pos_embeddings=6, num_conv_pos_embedding_groups=2))


def tiny_whisper():
    """A model, and what makes spectrograms of a second."""
    config = WhisperConfig(
        **dict(vocab_size=20, num_mel_bins=16, d_model=16, encoder_layers=3, decoder_layers=1, max_source_positions=50),
        **dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24),
        **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    )
    features = WhisperFeatureExtractor(feature_size=16, sampling_rate=4000, hop_length=40, chunk_length=1, n_fft=100)
    return WhisperForConditionalGeneration(config), features


def hubert_folder(folder, layout='base', **extractor):
    make_hubert(layout).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, **extractor).save_pretrained(folder)
    return folder


def audiolm_tokenizer(folder, layer=2):
    """audiolm-pytorch's own, with the stand-in for fairseq."""
    hubert, checkpoint = make_checkpoint('base')
    torch.save(checkpoint, folder / 'hubert.pt')
    save_kmeans(reference_layers(hubert, torch.randn(1, 3000))[0][layer - 1][0], folder / 'kmeans.bin')
    return HubertWithKmeans(folder / 'hubert.pt', folder / 'kmeans.bin', output_layer=layer)


def build(kind, folder, **keywords):
    torch.manual_seed(0)
    if kind == 'audiolm':
        return TransformersSemanticTokenizer.from_audiolm(audiolm_tokenizer(folder))
    keywords = dict(codebook_size=CODES) | keywords
    if kind == 'mulan':
        # with what makes its training random
        mulan = tiny_mulan(FRONT_END | dict(attn_dropout=0.5, ff_dropout=0.5))
        tokenizer = MuLaNSemanticTokenizer(mulan, layer=1, **keywords)
    elif kind in ('mulan spectrum', 'mulan patches'):
        layer = 0 if kind == 'mulan patches' else None
        tokenizer = MuLaNSemanticTokenizer(tiny_audio(**FRONT_END), layer=layer, **keywords)
    elif kind == 'mulan grid':
        tower = tiny_audio(**FRONT_END | dict(patch_size=(8, 5)))
        tokenizer = MuLaNSemanticTokenizer(tower, layer=2, **keywords)
    elif kind == 'hubert':
        tokenizer = TransformersSemanticTokenizer(hubert_folder(folder), layer=2, **keywords)
    elif kind in ('whisper', 'clap'):
        for part in tiny_whisper() if kind == 'whisper' else tiny_clap(fusion=True):
            part.save_pretrained(folder / kind)
        tokenizer = TransformersSemanticTokenizer(folder / kind, layer=2, **keywords)
    elif kind == 'wavlm':
        tokenizer = TransformersSemanticTokenizer(tiny_wavlm(), layer=2, target_sample_hz=4000, **keywords)
    else:
        extractor = SeamlessM4TFeatureExtractor()
        tokenizer = TransformersSemanticTokenizer(
            tiny_wav2vec2_bert(), layer=2, feature_extractor=extractor, **keywords
        )
    rate = tokenizer.target_sample_hz
    tokenizer.fit([*(sounds(rate)), *(0.3 * torch.randn(3, rate // 2))])
    return tokenizer


def sounds(rate, seconds=0.5):
    """Tones, and noise in bursts."""
    time = torch.arange(int(rate * seconds)) / rate
    tones = [torch.sin(2 * torch.pi * pitch * time) for pitch in (110, 440, 1330)]
    return [*tones, torch.randn(len(time)) * (time % 0.1 > 0.05)]


KINDS = (
    *('mulan', 'mulan spectrum', 'mulan grid'),
    *('hubert', 'audiolm', 'wavlm', 'w2v-bert', 'whisper', 'clap'),
)


@pytest.fixture(scope='module', params=KINDS)
def tokenizer(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture
def mulan_tokenizer(tmp_path):
    return build('mulan', tmp_path)


def ids_of(tokenizer, length, batch=2):
    generator = torch.Generator().manual_seed(length)
    return tokenizer(0.3 * torch.randn(batch, length, generator=generator))


# What each kind promises


def test_as_many_tokens_as_stated_for_every_length(tokenizer):
    shortest = tokenizer.min_samples()
    assert tokenizer.num_tokens(shortest) == 1
    assert tokenizer.num_tokens(shortest - 1) == 0
    with pytest.raises(ValueError, match=f'has {shortest - 1} samples .* needs {shortest}'):
        ids_of(tokenizer, shortest - 1)
    step = tokenizer.downsample_factor
    lengths = [shortest, shortest + step - 1, shortest + step, *(5 * step + extra for extra in (-1, 0, 1, step // 2))]
    for length in lengths:
        ids = ids_of(tokenizer, max(length, shortest))
        assert ids.shape == (2, tokenizer.num_tokens(max(length, shortest)))
        assert ids.dtype == torch.int64
    for tokens in (1, 2, 9):
        assert tokenizer.num_tokens(tokenizer.min_samples(tokens)) == tokens
        assert tokenizer.num_tokens(tokenizer.min_samples(tokens) - 1) == tokens - 1


def test_ids_lie_in_the_codebook_and_are_those_of_each_item_alone(tokenizer):
    rate = tokenizer.target_sample_hz
    waves = torch.stack(sounds(rate))
    together = tokenizer(waves)
    assert torch.equal(together, torch.cat([tokenizer(wave[None]) for wave in waves]))
    assert torch.equal(tokenizer(waves, flatten=False), together)
    ids = torch.cat([together, tokenizer(0.3 * torch.randn(4, rate // 2))])
    assert tokenizer.codebook_size == tokenizer.kmeans.centers.shape[0]
    assert 0 <= ids.min() <= ids.max() < tokenizer.codebook_size
    assert len(ids.unique()) > 2


def test_waves_of_another_rate_are_resampled(mulan_tokenizer):
    for rate in (16000, 4000, 8000):
        waves = torch.stack(sounds(rate))
        expected = mulan_tokenizer(resample(waves, rate, 8000))
        found = mulan_tokenizer(waves, input_sample_hz=rate)
        assert found.shape == expected.shape
        assert (found == expected).float().mean() > 0.97  # resampling differs in rounding at the end
    assert torch.equal(found, expected)


def test_the_same_while_something_around_it_trains(tokenizer):
    waves = 0.3 * torch.randn(2, 2000)
    expected = tokenizer(waves)
    holder = torch.nn.ModuleList([tokenizer]).train()
    before = torch.get_rng_state()
    assert not any(module.training for module in tokenizer.modules())
    assert torch.equal(tokenizer(waves), expected)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(tokenizer(waves), expected)
    assert not any(parameter.requires_grad for parameter in holder.parameters())


@pytest.mark.parametrize('kind', ['mulan', 'hubert', 'w2v-bert'])
def test_long_waves_are_encoded_in_windows(kind, tmp_path):
    tokenizer = build(kind, tmp_path, window_seconds=0.25)
    step, rate = tokenizer.downsample_factor, tokenizer.target_sample_hz
    tokens = int(0.25 * rate / step)
    wave = 0.3 * torch.randn(1, tokenizer.min_samples(2 * tokens + 3))
    found = tokenizer(wave)
    assert found.shape[1] == 2 * tokens + 3
    span = tokenizer.min_samples(tokens)
    for window, start in enumerate((0, tokens)):
        expected = tokenizer(wave[:, start * step : start * step + span])
        assert torch.equal(found[:, window * tokens : (window + 1) * tokens], expected)
    # the last window ends with the wave
    last = tokenizer(wave[:, (tokens + 3) * step :])
    assert torch.equal(found[:, -3:], last[:, -3:])


def test_saved_and_rebuilt(tokenizer, tmp_path):
    waves = 0.3 * torch.randn(2, 3000)
    tokenizer.save_pretrained(tmp_path / 'saved')
    files = [path for path in (tmp_path / 'saved').rglob('*') if path.is_file()]
    assert {path.suffix for path in files} == {'.json', '.safetensors'}
    rebuilt = SemanticTokenizer.from_pretrained(tmp_path / 'saved')
    assert type(rebuilt) is type(tokenizer)
    assert torch.equal(rebuilt(waves), tokenizer(waves))
    assert rebuilt.num_tokens(3000) == tokenizer.num_tokens(3000)
    assert fingerprint(rebuilt) == fingerprint(tokenizer)
    rebuilt = type(tokenizer).from_pretrained(tmp_path / 'saved')
    rebuilt.save_pretrained(tmp_path / 'again')
    for path in files:
        twin = tmp_path / 'again' / path.relative_to(tmp_path / 'saved')
        assert twin.read_bytes() == path.read_bytes()


# In audiolm-pytorch


def train_a_step(wrapper, wave):
    wrapper.train()
    before = weights(wrapper.wav2vec)
    optimizer = torch.optim.SGD(wrapper.transformer.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = wrapper(raw_wave=wave, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(np.isfinite(losses))
    assert sum(float(it.grad.abs().sum()) for it in wrapper.transformer.parameters() if it.grad is not None) > 0
    assert_same(weights(wrapper.wav2vec), before)


@pytest.mark.parametrize('kind', ['mulan', 'hubert'])
def test_the_semantic_and_the_coarse_stage_train_with_it(kind, tmp_path):
    tokenizer, sizes = build(kind, tmp_path), dict(num_semantic_tokens=CODES, dim=16, depth=1, heads=2)
    transformer = SemanticTransformer(**sizes, flash_attn=False)
    wrapper = SemanticTransformerWrapper(transformer=transformer, wav2vec=tokenizer)
    train_a_step(wrapper, torch.stack(sounds(tokenizer.target_sample_hz))[2:])
    # and is asked to go on from a wave of another rate
    rate = tokenizer.target_sample_hz * 2
    ids = wrapper.generate(prime_wave=sounds(rate)[3][None], prime_wave_input_sample_hz=rate, max_length=8)
    assert ids.shape[0] == 1
    codec = SoundStream(
        channels=4, strides=(2, 4, 4), channel_mults=(1, 2, 2), codebook_dim=8, codebook_size=8, rq_num_quantizers=3,
        target_sample_hz=tokenizer.target_sample_hz, attn_dim_head=4, attn_heads=1, use_local_attn=False,
    )  # fmt: skip
    transformer = CoarseTransformer(**sizes, codebook_size=8, num_coarse_quantizers=2)
    wrapper = CoarseTransformerWrapper(transformer=transformer, codec=codec, wav2vec=tokenizer)
    train_a_step(wrapper, torch.stack(sounds(tokenizer.target_sample_hz, 0.1))[2:])


# Fitting


def test_fitted_tokens_tell_different_sounds_apart(mulan_tokenizer):
    train, held_out = torch.stack(sounds(8000)), torch.stack(sounds(8000, 0.6))
    histograms = [
        torch.stack([ids.bincount(minlength=CODES) for ids in mulan_tokenizer(it)]) for it in (train, held_out)
    ]
    histograms = [it / it.sum(dim=-1, keepdim=True) for it in histograms]
    distances = torch.cdist(histograms[1], histograms[0], p=1)
    assert distances.argmin(dim=-1).tolist() == [0, 1, 2, 3]
    others = distances + 2 * torch.eye(4)
    assert others.min() > 0.5  # of at most 2


def test_fitting_is_seeded_and_says_what_is_lost(tmp_path):
    waves = 0.3 * torch.randn(6, 4000)
    tokenizers = [build('mulan', tmp_path) for _ in range(3)]
    tokenizers[1].encoder.load_state_dict(tokenizers[0].encoder.state_dict())
    tokenizers[2].encoder.load_state_dict(tokenizers[0].encoder.state_dict())
    lost = [it.fit(waves, seed=seed) for it, seed in zip(tokenizers, (1, 1, 2))]
    assert lost[0] == lost[1]
    assert torch.equal(tokenizers[0].kmeans.centers, tokenizers[1].kmeans.centers)
    assert not torch.equal(tokenizers[0].kmeans.centers, tokenizers[2].kmeans.centers)
    features = tokenizers[0].features(waves)
    normal = tokenizers[0].kmeans.normalise(features)
    nearest = tokenizers[0].kmeans.centers[tokenizers[0](waves)]
    expected = (normal - nearest).square().sum() / normal.square().sum()
    assert lost[0] == pytest.approx(float(expected), rel=0.02)


def test_any_data_of_waves_will_do(mulan_tokenizer, caplog):
    first, second, third = 0.3 * torch.randn(3, 4000)
    items = [
        (first, 'a caption'),
        None,
        dict(wave=second[:3000], caption='…'),
        torch.zeros(100),
        (torch.tensor([3]), third),
    ]
    mulan_tokenizer.fit([first, second[:3000], third])
    mean, centers = mulan_tokenizer.kmeans.mean.clone(), mulan_tokenizer.kmeans.centers.clone()
    for batch_size in (1, 2, 9):
        mulan_tokenizer.fit(items, batch_size=batch_size)
        torch.testing.assert_close(mulan_tokenizer.kmeans.mean, mean)
    assert 'left out 1 waves that are too short' in caplog.text
    # stereo is mixed down
    mulan_tokenizer.fit([torch.stack([first, first]), second[:3000], third])
    assert torch.equal(mulan_tokenizer.kmeans.centers, centers)
    for batch_size in (2, 8):
        mulan_tokenizer.fit([first, second[:3000], third, torch.randn(4000)], max_items=3, batch_size=batch_size)
        torch.testing.assert_close(mulan_tokenizer.kmeans.mean, mean)


# MuLaN's tower


@pytest.mark.parametrize(('layer', 'columns'), [(0, 'concat'), (0, 'mean'), (1, 'concat'), (3, 'mean')])
def test_features_are_the_states_of_the_layer_column_by_column(columns, layer):
    tower = tiny_audio(**FRONT_END | dict(patch_size=(8, 5), depth=3))
    tokenizer = MuLaNSemanticTokenizer(tower, CODES, layer=layer, columns=columns)
    assert len(tokenizer.encoder.transformer.layers) == max(1, layer)
    waves = torch.randn(2, 4000)
    tower.eval()
    if layer == 0:
        embedded = []
        tower.to_patch_tokens.register_forward_hook(lambda *args: embedded.append(args[-1]))
        tower(waves)
        states = embedded[0]
    else:
        states = tower(waves, return_encoding=True).layers[layer - 1].unflatten(1, (4, -1))
    expected = states.mean(dim=1) if columns == 'mean' else torch.cat(states.unbind(dim=1), dim=-1)
    assert expected.shape[1] == 10
    torch.testing.assert_close(tokenizer.features(waves), expected)


@pytest.mark.parametrize('patch_size', [(32, 4), (8, 5)])
def test_by_default_features_are_spectra_without_their_level(patch_size):
    tower = tiny_audio(**FRONT_END | dict(patch_size=patch_size, depth=3)).eval()
    tokenizer = MuLaNSemanticTokenizer(tower, CODES)
    frames = patch_size[1]
    assert tokenizer.downsample_factor == 80 * frames
    waves = torch.randn(2, 4000)
    tokens = 4000 // (80 * frames)
    waves = waves[:, : tokens * 80 * frames]
    mel = tower.log_mel(tower.spec(waves)[0])[..., : tokens * frames]
    columns = mel.unflatten(2, (tokens, frames)).transpose(1, 2).unflatten(2, (-1, patch_size[0]))
    # a patch has its bins in the outer and its frames in the inner place
    columns = columns.reshape(2, tokens, -1)
    expected = (columns - columns.mean(dim=-1, keepdim=True)) / columns.std(dim=-1, keepdim=True, correction=0)
    torch.testing.assert_close(tokenizer.features(waves), expected, atol=1e-3, rtol=1e-3)
    # louder by a factor is the same music
    torch.testing.assert_close(tokenizer.features(waves * 0.1), tokenizer.features(waves), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('kind', ['mulan spectrum', 'mulan patches'])
def test_tokens_do_not_depend_on_where_a_clip_is_cut(kind, tmp_path):
    tokenizer = build(kind, tmp_path)
    wave = torch.randn(1, 30 * 320)
    cut = tokenizer(wave[:, 8 * 320 : 20 * 320])
    assert torch.equal(cut[:, 1:-1], tokenizer(wave)[:, 9:19])  # windows at the cuts reach beyond them


def test_training_mulan_on_does_not_change_the_tokens():
    mulan = tiny_mulan(FRONT_END)
    tokenizer = MuLaNSemanticTokenizer(mulan, CODES, layer=2)
    waves = torch.randn(3, 8000)
    tokenizer.fit(waves)
    expected = tokenizer(waves)
    with torch.no_grad():
        for parameter in mulan.parameters():
            assert parameter.requires_grad
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(tokenizer(waves), expected)
    assert mulan.training


@pytest.mark.parametrize(
    ('center', 'frames', 'layer'), [(True, 1, None), (False, 1, 1), (True, 4, 0), (False, 4, None), (True, 4, 1)]
)
def test_a_token_every_patch_whatever_the_spectrogram(center, frames, layer):
    tower = tiny_audio(**FRONT_END | dict(patch_size=(32, frames), spec_center=center))
    tokenizer = MuLaNSemanticTokenizer(tower, CODES, layer=layer)
    step = 80 * frames
    assert tokenizer.downsample_factor == tokenizer.seq_len_multiple_of == step
    for length in (step, step + 1, 7 * step - 1, 7 * step, 30 * step):
        assert tokenizer.features(torch.randn(1, length)).shape[1] == tokenizer.num_tokens(length) == length // step


def test_windows_keep_to_the_longest_audio_of_the_tower(recwarn):
    tower = tiny_audio(**FRONT_END | dict(max_audio_length=8 * 320 + 17))
    tokenizer = MuLaNSemanticTokenizer(tower, CODES, layer=2)
    wave = torch.randn(1, 20 * 320)
    features = tokenizer.features(wave)
    assert features.shape[1] == 20
    torch.testing.assert_close(features[:, 8:16], tokenizer.features(wave[:, 8 * 320 : 16 * 320]))
    assert not [it for it in recwarn if 'max_audio_length' in str(it.message)]


@pytest.mark.parametrize(
    ('tower', 'keywords', 'says'),
    [
        (dict(accept_spec=True), {}, 'accept_spec'),
        ({}, {}, 'audio_sample_rate'),
        (FRONT_END, dict(layer=3), 'between 0 and the depth of the tower, 2, got 3'),
        (FRONT_END, dict(layer=-1), 'got -1'),
        (FRONT_END, dict(columns='mean'), 'would blur'),
        (FRONT_END, dict(columns='sum', layer=1), "'concat' or 'mean'"),
        (FRONT_END, dict(codebook_size=0), 'codebook_size'),
        (FRONT_END, dict(window_seconds=0.0), 'window_seconds'),
        (FRONT_END | dict(max_audio_length=300), {}, 'shorter than a token, 320 samples'),
    ],
)
def test_towers_and_keywords_that_do_not_fit(tower, keywords, says):
    with pytest.raises(ValueError, match=says):
        MuLaNSemanticTokenizer(tiny_audio(**tower), **keywords)


# Models of transformers and fairseq


@pytest.mark.parametrize('layout', ['base', 'large'])
@pytest.mark.parametrize('layer', [1, 3])
def test_features_are_those_of_the_layer_on_normalised_waves(layout, layer, tmp_path):
    tokenizer = TransformersSemanticTokenizer(hubert_folder(tmp_path, layout), CODES, layer=layer)
    assert (tokenizer.downsample_factor, tokenizer.min_samples()) == (40, 60)
    waves = 3 + torch.randn(2, 1600)
    normal = (waves - waves.mean(dim=-1, keepdim=True)) / waves.std(dim=-1, keepdim=True, correction=0)
    expected = reference_layers(make_hubert(layout), normal)[0][layer - 1]
    torch.testing.assert_close(tokenizer.features(waves), expected, atol=1e-4, rtol=0)
    assert len(tokenizer.encoder.encoder.layers) == layer


def test_audiolm_own_tokenizer_goes_on_with_the_same_tokens(tmp_path):
    theirs = audiolm_tokenizer(tmp_path)
    ours = TransformersSemanticTokenizer.from_audiolm(theirs)
    waves = torch.randn(2, 3210)
    assert torch.equal(ours(waves), theirs(waves))
    assert ours.codebook_size == theirs.codebook_size
    assert ours.target_sample_hz == theirs.target_sample_hz
    fitted = TransformersSemanticTokenizer.from_fairseq(tmp_path / 'hubert.pt', layer=2, codebook_size=CODES)
    torch.testing.assert_close(fitted.features(waves), ours.features(waves))
    fitted.fit(waves)
    assert len(fitted(waves).unique()) == CODES


def test_mert_is_hubert_by_another_name(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoFeatureExtractor, HubertModel

    hubert_folder(tmp_path)
    expected = TransformersSemanticTokenizer(tmp_path, CODES, layer=2).features(torch.ones(1, 900).cumsum(dim=1))
    config = json.loads((tmp_path / 'config.json').read_text())
    mert = config | dict(
        model_type='mert_model',
        architectures=['MERTModel'],
        auto_map=dict(AutoModel='modeling_MERT.MERTModel', AutoConfig='configuration_MERT.MERTConfig'),
        feature_extractor_cqt=False,
        deepnorm=False,
    )
    (tmp_path / 'config.json').write_text(json.dumps(mert))
    tokenizer = TransformersSemanticTokenizer(tmp_path, CODES, layer=2)
    torch.testing.assert_close(tokenizer.features(torch.ones(1, 900).cumsum(dim=1)), expected)
    for option in ('feature_extractor_cqt', 'deepnorm'):
        for kind in ('mert_model', 'hubert'):  # that of one converted by HubertModel
            (tmp_path / 'config.json').write_text(json.dumps(mert | {option: True, 'model_type': kind}))
            with pytest.raises(ValueError, match=f'no plain HuBERT: {option}'):
                TransformersSemanticTokenizer(tmp_path, CODES, layer=2)
    (tmp_path / 'config.json').write_text(json.dumps(mert))
    torch.save(load_file(tmp_path / 'model.safetensors'), tmp_path / 'pytorch_model.bin')
    (tmp_path / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match='its weights as a pickle only'):
        TransformersSemanticTokenizer(tmp_path, CODES, layer=2)
    for kind in HubertModel, AutoFeatureExtractor:  # as docs/parts.md has it
        kind.from_pretrained(tmp_path).save_pretrained(tmp_path / 'converted')
    tokenizer = TransformersSemanticTokenizer(tmp_path / 'converted', CODES, layer=2)
    torch.testing.assert_close(tokenizer.features(torch.ones(1, 900).cumsum(dim=1)), expected)


def test_models_that_cannot_be_used(tmp_path):
    from transformers import BertConfig, BertModel

    with pytest.raises(FileNotFoundError, match='nowhere'):
        TransformersSemanticTokenizer(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='nowhere is neither'):
        TransformersSemanticTokenizer(tmp_path / 'nowhere', target_sample_hz=16000)
    make_hubert('base').save_pretrained(tmp_path / 'bare')
    with pytest.raises(FileNotFoundError, match='pass target_sample_hz'):
        TransformersSemanticTokenizer(tmp_path / 'bare', layer=1)
    bare = TransformersSemanticTokenizer(tmp_path / 'bare', CODES, layer=1, target_sample_hz=8000)
    waves = torch.randn(1, 500)
    expected = reference_layers(make_hubert('base'), waves)[0][0]
    torch.testing.assert_close(bare.features(waves), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match='layer must lie between 1 and the depth of this HubertModel, 3, got 7'):
        TransformersSemanticTokenizer(tmp_path / 'bare', target_sample_hz=16000)
    with pytest.raises(ValueError, match='extractor works at 16000 Hz'):
        TransformersSemanticTokenizer(hubert_folder(tmp_path / 'hubert'), layer=1, target_sample_hz=8000)
    with pytest.raises(ValueError, match='target_sample_hz'):
        TransformersSemanticTokenizer(make_hubert('base'), layer=1)
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    told = 'a BertModel is no audio encoder that is read: .* HuBERT, MERT and w2v-BERT, .* whisper, clap'
    with pytest.raises(ValueError, match=told):
        TransformersSemanticTokenizer(bert, layer=1, target_sample_hz=16000)
    with pytest.raises(ValueError, match='takes no waves'):
        TransformersSemanticTokenizer(tiny_wav2vec2_bert(), layer=1, target_sample_hz=16000)


def test_weights_that_are_not_there_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    hubert_folder(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    del weights['encoder.layers.0.attention.q_proj.weight']
    save_file(weights, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match=r'1 are missing, such as encoder\.layers\.0\.attention\.q_proj'):
        TransformersSemanticTokenizer(tmp_path, layer=1)


def test_the_model_given_is_left_alone(tmp_path):
    hubert = make_hubert('base').train()
    TransformersSemanticTokenizer(hubert, CODES, layer=1, target_sample_hz=16000)
    assert len(hubert.encoder.layers) == hubert.config.num_hidden_layers == 3
    assert hubert.training
    assert all(parameter.requires_grad for parameter in hubert.parameters())


# Bad input


@pytest.mark.parametrize(
    ('waves', 'keywords', 'error', 'says'),
    [
        (torch.ones(1, 4000, dtype=torch.int16), {}, TypeError, 'int16'),
        ([[0.1] * 4000], {}, TypeError, 'got list'),
        (torch.randn(4000), {}, ValueError, r'wavs\[None\]'),
        (torch.randn(1, 2, 4000), {}, ValueError, 'mix down'),
        (torch.randn(0, 4000), {}, ValueError, 'empty batch'),
        (torch.randn(1, 0), {}, ValueError, 'has 0 samples'),
        (torch.randn(1, 0), dict(input_sample_hz=16000), ValueError, 'has 0 samples'),
        (torch.full((1, 4000), torch.nan), {}, ValueError, r'wavs\[0\] holds NaN'),
        (torch.randn(1, 4000), dict(input_sample_hz=0), ValueError, 'sample_rate'),
        (torch.randn(1, 4000), dict(input_sample_hz=16000.5), TypeError, 'sample_rate'),
    ],
)
def test_waves_that_cannot_be_tokenized(mulan_tokenizer, waves, keywords, error, says):
    with pytest.raises(error, match=says):
        mulan_tokenizer(waves, **keywords)


def test_a_tokenizer_that_was_never_fitted_says_so(tmp_path):
    tokenizer = MuLaNSemanticTokenizer(tiny_audio(**FRONT_END), CODES)
    assert not tokenizer.is_fitted
    with pytest.raises(ValueError, match=r'call tokenizer\.fit\(dataset\)'):
        tokenizer(torch.randn(1, 4000))
    with pytest.raises(ValueError, match='call fit before saving'):
        tokenizer.save_pretrained(tmp_path / 'saved')
    assert not (tmp_path / 'saved').exists()


@pytest.mark.parametrize(
    ('data', 'keywords', 'error', 'says'),
    [
        (torch.randn(1, 800), {}, ValueError, '6 centres need at least as many different frames, got 2 in 2'),
        ([], {}, ValueError, 'got 0'),
        (['a text'], {}, TypeError, 'item 0 must be a wave'),
        ([torch.randn(4000), 3], {}, TypeError, 'item 1'),
        (torch.randn(2, 8000), dict(batch_size=0), ValueError, 'batch_size'),
        (torch.randn(2, 8000), dict(max_frames=5), ValueError, 'max_frames 5 is less than codebook_size 6'),
        (torch.randn(2, 8000), dict(sample_rate=-1), ValueError, 'sample_rate'),
    ],
)
def test_data_that_nothing_can_be_learned_from(data, keywords, error, says):
    tokenizer = MuLaNSemanticTokenizer(tiny_audio(**FRONT_END), CODES)
    with pytest.raises(error, match=says):
        tokenizer.fit(data, **keywords)
    assert not tokenizer.is_fitted


def test_folders_that_hold_something_else(mulan_tokenizer, tmp_path):
    mulan_tokenizer.save_pretrained(tmp_path / 'tokenizer')
    with pytest.raises(ValueError, match=r'holds a MuLaNSemanticTokenizer, not a TransformersSemanticTokenizer'):
        TransformersSemanticTokenizer.from_pretrained(tmp_path / 'tokenizer')
    # changed by hand, hence without its checksum
    config = json.dumps(read_checked_json(tmp_path / 'tokenizer' / 'config.json'))
    (tmp_path / 'tokenizer' / 'config.json').write_text(config.replace('"codebook_size": 6', '"codebook_size": 7'))
    with pytest.raises(ValueError, match='do not fit'):
        SemanticTokenizer.from_pretrained(tmp_path / 'tokenizer')
    (tmp_path / 'tokenizer' / 'config.json').write_text(config.replace('MuLaNSemanticTokenizer', 'os'))
    with pytest.raises(ValueError, match='holds a os, not one of'):
        SemanticTokenizer.from_pretrained(tmp_path / 'tokenizer')


# Parts of models that do more


@pytest.mark.parametrize('kind', ['whisper', 'clap'])
def test_features_are_those_of_the_part_that_hears(kind, tmp_path):
    model, prepares = tiny_whisper() if kind == 'whisper' else tiny_clap()
    extractor = prepares if kind == 'whisper' else prepares.feature_extractor
    model.eval()
    rate = extractor.sampling_rate
    tokenizer = TransformersSemanticTokenizer(model, CODES, layer=2, feature_extractor=extractor)
    wave = 0.3 * torch.randn(1, rate * 7 // 10)
    with torch.no_grad():
        if kind == 'whisper':
            given = extractor(wave[0].numpy(), sampling_rate=rate, return_tensors='pt')['input_features']
            expected = model.get_encoder()(given, output_hidden_states=True).hidden_states[2][:, :35]
        else:
            given = extractor(wave[0].numpy(), sampling_rate=rate, return_tensors='pt', padding='pad')['input_features']
            expected = model.audio_model(given, is_longer=torch.zeros(1, 1)).last_hidden_state.mean(dim=2).mT[:, :22]
    torch.testing.assert_close(tokenizer.features(wave), expected)

    # tokens are in the order of time: what comes last changes the last ones most
    other = wave.clone()
    other[:, -rate // 20 :] = 0
    changes = (tokenizer.features(other) - tokenizer.features(wave)).norm(dim=-1)[0]
    assert changes.argmax() >= len(changes) - 4
    if kind == 'clap':
        with pytest.raises(ValueError, match='layer must be 2, got 1'):
            TransformersSemanticTokenizer(model, CODES, layer=1, feature_extractor=extractor)


def test_by_command_line(tmp_path, music, capsys):
    for part in tiny_whisper():
        part.save_pretrained(tmp_path / 'whisper')
    given = ['--data', str(music), '--codebook-size', '4']
    command = ['train', 'tokenizer', '--model', str(tmp_path / 'whisper'), '--layer', '2', *given]
    assert main([*command, '--output', str(tmp_path / 'tokenizer')]) == 0
    assert '4 semantic tokens, 50 a second' in capsys.readouterr().out
    tokenizer = SemanticTokenizer.from_pretrained(tmp_path / 'tokenizer')
    assert (tokenizer.layer, tokenizer.codebook_size) == (2, 4)

    def stop(name, *_):
        if name == 'codec':
            raise InterruptedError

    config = tmp_path / 'all.json'
    section = dict(codebook_size=4, model=str(tmp_path / 'whisper'), layer=2)
    with pytest.raises(InterruptedError):
        train_musiclm(
            music, tmp_path / 'out', MusicLMRecipe().updated(TINY | dict(tokenizer=section), ''), on_begin=stop
        )
    kept = SemanticTokenizer.from_pretrained(tmp_path / 'out' / 'tokenizer')
    assert torch.equal(kept.features(torch.ones(1, 900)), tokenizer.features(torch.ones(1, 900)))
    config.write_text(json.dumps({**TINY, 'tokenizer': section | dict(model=str(tmp_path / 'nowhere'))}))
    assert main(['train', 'all', '--data', str(music), '--output', str(tmp_path / 'x'), '--config', str(config)]) == 2
    assert 'nowhere is neither the folder' in capsys.readouterr().err
    assert not (tmp_path / 'x' / 'mulan').exists()  # before anything is trained
    (tmp_path / 'nothing').mkdir()
    (tmp_path / 'nothing' / 'config.json').write_text('{}')
    for name, told in ('nothing', 'does not say which model it is'), ('nowhere', 'nowhere is neither the folder'):
        command = ['train', 'tokenizer', '--model', str(tmp_path / name), *given, '--output', str(tmp_path / 'x')]
        assert main(command) == 2
        assert told in capsys.readouterr().err
