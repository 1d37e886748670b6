"""EnCodec, DAC and Mimi: codes and waves as of the bare model, at odd lengths, saved, and from tokens to music."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.pipeline import TINY
from helpers.pretrained_parts import CODEC_RATE, CODECS, Sounds, from_waves_to_saved_music, make_codec_model
from helpers.training import assert_same
from safetensors.torch import load_file

from musiclm_pytorch import MusicLM, MusicLMRecipe, PretrainedCodec, compute_tokens, train_musiclm
from musiclm_pytorch.audiolm import convert
from musiclm_pytorch.audiolm.fingerprints import fingerprint
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.cli import main
from musiclm_pytorch.codecs import pretrained as codecs
from musiclm_pytorch.pretrained import hearing

KINDS = list(CODECS)
LOUD = 'encodec of 48 kHz'


@pytest.fixture(scope='module', params=KINDS)
def codec(request):
    return PretrainedCodec(make_codec_model(request.param), num_quantizers=3)


def waves_of(length, batch=2):
    return 0.3 * torch.randn(batch, length, generator=torch.Generator().manual_seed(length))


def test_whole_frames_of_any_length_each_wave_by_itself(codec):
    hop = codec.downsample_factor
    assert codec.frame_rate * hop == codec.sample_rate == CODEC_RATE
    for length in (hop, 2 * hop - 1, 331, 20 * hop, 20 * hop + 3, 3001):
        codes = codec.encode(waves_of(length))
        assert codes.shape == (2, length // hop, 3)
        assert 0 <= codes.min() <= codes.max() < codec.codebook_size
        waves = codec.decode(codes)
        assert waves.shape == (2, length // hop * hop)
        assert waves.isfinite().all()
        assert torch.equal(codec.encode(waves_of(length)[1:]), codes[1:])
        torch.testing.assert_close(codec.decode(codes[1:]), waves[1:], atol=1e-4, rtol=1e-4)
    assert codes.unique(dim=1).shape[1] > 1
    with pytest.raises(ValueError, match=f'a wave of {hop - 1} samples is shorter than a code, {hop}'):
        codec.encode(waves_of(hop - 1))


@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind != LOUD])
def test_codes_and_waves_are_those_of_the_model(kind):
    model = make_codec_model(kind)
    codec = PretrainedCodec(model, num_quantizers=3)
    waves = waves_of(64 * 35)
    keywords = dict(bandwidth=1.0) if 'encodec' in kind else {}
    with torch.no_grad():
        found = model.encode(waves[:, None], **keywords).audio_codes
        found = found[0] if 'encodec' in kind else found
        assert torch.equal(codec.encode(waves), found[:, :3].mT)
        again = [found[None, :, :3], [None]] if 'encodec' in kind else [found[:, :3]]
        whole = model.decode(audio_codes=again[0], **(dict(audio_scales=again[1]) if again[1:] else {})).audio_values
    whole = whole.reshape(2, -1)
    torch.testing.assert_close(codec.decode(codec.encode(waves))[:, : whole.shape[1]], whole)


def test_loudness_is_a_level_of_its_own():
    codec = PretrainedCodec(make_codec_model(LOUD), num_quantizers=3)
    step = 100 / 255  # dB
    loud, soft = waves_of(3200), waves_of(3200) * 10 ** (-30 * step / 20)
    codes, softer = codec.encode(loud), codec.encode(soft)
    assert (codes[..., 0] - softer[..., 0] == 30).all()
    assert (codes[..., 1:] == softer[..., 1:]).float().mean() > 0.99
    torch.testing.assert_close(codec.decode(softer) * 10 ** (30 * step / 20), codec.decode(codes), rtol=0.02, atol=0.02)
    assert codec.decode(codec.encode(torch.zeros(1, 1600))).abs().max() < 1e-4
    # each second by itself: what was loud before does not count
    swell = torch.cat((loud[:, :1280], soft[:, :1280]), dim=1)
    assert torch.equal(codec.encode(swell)[:, :40], codes[:, :40])

    # decoded chunks overlap: a chunk as the model makes it in the middle, and no jump where they meet
    whole = codec.decode(codes)
    first = codec.decode(codes[:, :20])
    torch.testing.assert_close(whole[:, : 18 * 32], first[:, : 18 * 32])
    steps = whole.diff(dim=1).abs()
    assert steps[:, [18 * 32 - 1, 20 * 32 - 1]].max() < 1.5 * steps[:, : 17 * 32].max()
    assert codec.decode(codes[..., :2]).shape == whole.shape
    for read in codec.decode, codec.vectors_of:
        with pytest.raises(ValueError, match='at least 2 of the 3 levels, of which the first is loudness alone; got 1'):
            read(codes[..., :1])
    with pytest.raises(ValueError, match='gives 2 to 4 levels of codes, got num_quantizers=1'):
        PretrainedCodec(make_codec_model(LOUD), num_quantizers=1)


def test_saved_and_cast(codec, tmp_path):
    waves = waves_of(777)
    codes = codec.encode(waves)
    save_module(codec, tmp_path / 'ours')
    loaded = load_module(tmp_path / 'ours')
    assert torch.equal(loaded.encode(waves), codes)
    assert torch.equal(loaded.decode(codes), codec.decode(codes))
    assert fingerprint(loaded) == fingerprint(codec)
    assert repr(loaded) == repr(codec)
    assert torch.equal(loaded.to(torch.bfloat16).train().encode(waves), codes)


@pytest.mark.parametrize('kind', [LOUD, 'mimi'])
def test_from_waves_to_saved_music(kind, tmp_path):
    model = make_codec_model(kind)
    model.save_pretrained(tmp_path / 'theirs')
    codec = PretrainedCodec(tmp_path / 'theirs', num_quantizers=3)
    assert fingerprint(codec) == fingerprint(PretrainedCodec(model, num_quantizers=3))
    loaded = from_waves_to_saved_music(tmp_path, codec=codec)
    assert torch.equal(loaded.codec.encode(waves_of(500)), codec.encode(waves_of(500)))
    story = loaded([(0.6, 'clip 0'), (0.6, 'clip 2')], seed=0)
    assert story.shape == (1, round(1.2 * CODEC_RATE))
    theirs = loaded.audio_lm.fine.codec  # audiolm-pytorch's classes take it
    assert torch.equal(theirs(waves_of(500), return_encoded=True)[1], codec.encode(waves_of(500)))


@pytest.mark.slow
def test_an_encodec_wrapper_to_saved_music(monkeypatch, tmp_path):
    from encodec import EncodecModel

    genuine = EncodecModel.encodec_model_24khz
    monkeypatch.setattr(EncodecModel, 'encodec_model_24khz', lambda: genuine(pretrained=False).eval())
    torch.manual_seed(0)
    wrapper = convert.EncodecWrapper(bandwidth=3.0)
    for layer in wrapper.model.quantizer.vq.layers:
        layer._codebook.embed.normal_()
        layer._codebook.inited.fill_(1.0)
    codec = convert.own_codec(wrapper)
    waves = waves_of(320 * 9)
    codes = codec.encode(waves)
    assert codes.shape == (2, 9, codec.num_quantizers) == (2, 9, 4)
    save_module(codec, tmp_path / 'codec')
    loaded = load_module(tmp_path / 'codec')
    assert isinstance(loaded, PretrainedCodec)
    assert torch.equal(loaded.encode(waves), codes)
    torch.testing.assert_close(loaded.decode(codes), codec.decode(codes))
    assert (loaded.sample_rate, loaded.frame_rate) == (codec.sample_rate, codec.frame_rate)
    from_waves_to_saved_music(tmp_path, codec=codec)


def test_mimi_takes_weights_that_are_loaded_after_a_call():
    one, other = (PretrainedCodec(make_codec_model('mimi'), num_quantizers=3) for _ in range(2))
    with torch.no_grad():
        for name, buffer in other.named_buffers():
            if name.endswith('embed_sum'):
                buffer.mul_(-1)
    one.encode(waves_of(400))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.encode(waves_of(400)), other.encode(waves_of(400)))


@pytest.mark.slow
def test_by_command_line(tmp_path, music, capsys):
    make_codec_model('dac').save_pretrained(tmp_path / 'dac')
    config = tmp_path / 'all.json'
    config.write_text(json.dumps(TINY))
    out, given = tmp_path / 'out', ['--codec', str(tmp_path / 'dac'), '--codec-quantizers', '3']
    command = ['train', 'all', '--data', str(music), '--output', str(out)]
    assert main([*command, '--config', str(config), *given]) == 0
    musiclm = MusicLM.from_pretrained(out / 'musiclm')
    assert isinstance(musiclm.codec, PretrainedCodec)
    assert musiclm('clip 0', seconds=0.6, seed=0).shape == (1, round(0.6 * CODEC_RATE))
    recipe = MusicLMRecipe.load(out / 'recipe.json')
    assert recipe.fitted.pretrained_codec == dict(source=str(tmp_path / 'dac'), num_quantizers=3)
    assert 'spectral_codec' not in recipe.to_dict()
    assert main([*command, '--resume']) == 0  # by the recipe there

    made = [it for part in ('tokenizer', 'quantizer') for it in (f'--{part}', str(out / part))]
    assert main(['tokens', '--data', str(music), '-o', str(tmp_path / 'tokens'), *made, *given]) == 0
    shards = [load_file(it / 'codec' / '00000.safetensors') for it in (tmp_path / 'tokens', out / 'tokens')]
    assert torch.equal(*(it['values'] for it in shards))
    (out / 'codec').rename(tmp_path / 'codec')
    assert main(['assemble', str(out), '-o', str(tmp_path / 'whole'), '--codec', str(tmp_path / 'codec')]) == 0
    again = MusicLM.from_pretrained(tmp_path / 'whole')
    assert_same(again.state_dict(), musiclm.state_dict())
    assert main(['assemble', str(out), '-o', str(tmp_path / 'x'), '--codec', str(tmp_path / 'codec'), *given[2:]]) == 2
    assert 'are settled' in capsys.readouterr().err

    assert main(['train', 'codec', *command[2:], '--config', str(out / 'recipe.json')]) == 2
    assert 'takes a codec that is trained already' in capsys.readouterr().err

    # before anything is trained or moved
    given[-1] = '1'
    assert main(['train', 'all', '--data', str(music), '--output', str(tmp_path / 'new'), *given]) == 2
    assert 'num_coarse_quantizers must lie between 1 and 0' in capsys.readouterr().err
    assert not (tmp_path / 'new' / 'mulan').exists()


def test_what_cannot_be_read(tmp_path):
    model = make_codec_model('dac')
    with pytest.raises(TypeError, match='EncodecModel is no Codec, .*PretrainedCodec makes one of a model of transf'):
        compute_tokens(Sounds(), tmp_path / 'tokens', codec=make_codec_model('encodec of 24 kHz'))
    with pytest.raises(ValueError, match='gives 1 to 4 levels of codes, got num_quantizers=8'):
        PretrainedCodec(model)
    with pytest.raises(ValueError, match='a Linear does not say which model it is; .* model_type encodec, dac, mimi'):
        PretrainedCodec(torch.nn.Linear(1, 1))
    (tmp_path / 'bert').mkdir()
    with pytest.raises(FileNotFoundError, match='bert has no config.json'):
        PretrainedCodec(tmp_path / 'bert')
    (tmp_path / 'bert' / 'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="bert is a 'bert'; the codecs that are read are those of model_type encodec"):
        PretrainedCodec(tmp_path / 'bert')
    with pytest.raises(FileNotFoundError, match='nowhere is neither the folder of a model nor on the Hugging Face Hub'):
        PretrainedCodec(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='pretrained_codec takes one that is trained; keep one'):
        MusicLMRecipe.from_content(dict(pretrained_codec=dict(source='x'), spectral_codec={'bands': 3}), 'it')

    state = {name: it for name, it in model.state_dict().items() if 'decoder.conv2' not in name}
    model.save_pretrained(tmp_path / 'dac', state_dict=state)
    with pytest.raises(ValueError, match='do not fill this DacModel: 2 are missing'):
        PretrainedCodec(tmp_path / 'dac', num_quantizers=3)


def test_a_new_run_opens_its_parts_whatever_an_earlier_one_left(tmp_path, music):
    out = tmp_path / 'out'
    save_module(PretrainedCodec(make_codec_model('dac'), num_quantizers=3), out / 'codec')
    (out / 'tokenizer').mkdir()
    (out / 'tokenizer' / 'config.json').write_text('{}')
    make_codec_model('dac').save_pretrained(tmp_path / 'dac')

    def begin(name, number, parts):
        raise InterruptedError(name)

    def train(**sections):
        content = {key: it for key, it in TINY.items() if key != 'spectral_codec'}
        train_musiclm(music, out, MusicLMRecipe.from_content(content | sections, 'it'), on_begin=begin)

    with pytest.raises(ValueError, match='num_coarse_quantizers must lie between 1 and 0'):
        train(pretrained_codec=dict(source=str(tmp_path / 'dac'), num_quantizers=1))
    with pytest.raises(FileNotFoundError, match='nowhere is neither'):
        train(tokenizer=dict(model=str(tmp_path / 'nowhere')))
    assert (out / 'codec' / 'config.json').is_file()  # nothing was moved
    with pytest.raises(InterruptedError, match='mulan'):
        train(pretrained_codec=dict(source=str(tmp_path / 'dac'), num_quantizers=3))
    assert not (out / 'codec').exists()


def test_the_table_has_every_part():
    table = (Path(__file__).parents[1] / 'docs' / 'parts.md').read_text(encoding='utf-8').lower()
    parts = {*codecs.KINDS, *hearing.KINDS} - {'clap_audio_model'}
    assert [name for name in parts if not re.search(rf'^\| .*{name}.* \| ✓', table, re.M)] == []


@pytest.mark.parametrize(
    ('name', 'levels'),
    [('facebook/encodec_24khz', 8), ('facebook/encodec_48khz', 8), ('descript/dac_44khz', 9), ('kyutai/mimi', 8)],
)
def test_real_weights_bring_a_chord_back(name, levels):
    """What can be shown with real weights alone, where they are in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, 'config.json'), str):
        pytest.skip(f'needs the weights of {name} in the cache of the Hugging Face Hub')
    codec = PretrainedCodec(name, num_quantizers=levels)
    time = torch.arange(3 * codec.sample_rate) / codec.sample_rate
    wave = sum(0.1 * torch.sin(2 * torch.pi * pitch * time) for pitch in (220.0, 277.2, 329.6))[None]
    made = codec.decode(codec.encode(wave))
    spectra = [torch.stft(it, 4096, window=torch.hann_window(4096), return_complex=True).abs() for it in (wave, made)]
    assert torch.nn.functional.cosine_similarity(*(it.flatten() for it in spectra), dim=0) > 0.9
