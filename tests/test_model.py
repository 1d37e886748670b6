import json
import math

import pytest
import soundfile
import torch
from helpers.models import build_golden, state_of, tiny_audio, tiny_mulan, tiny_text

from musiclm_pytorch import MuLaN, TextTransformer
from musiclm_pytorch.atomic import read_checked_json
from musiclm_pytorch.data.audio import AudioFile, resample

KNOWS_RATE = dict(audio_sample_rate=8000, support_variable_length=True)


def ids(batch=3, tokens=7):
    return torch.randint(1, 100, (batch, tokens))


# ---- forward ----


def test_waves_and_texts_come_in_pairs():
    mulan, wavs = tiny_mulan().eval(), torch.randn(3, 2000)
    assert mulan(wavs, ids(5), return_pairwise_similarities=True).shape == (3, 5)
    for keywords in dict(), dict(return_similarities=True):
        with pytest.raises(ValueError, match='got 3 waves but 2 texts'):
            mulan(wavs, ids(2), **keywords)


@pytest.mark.parametrize(('audio_depth', 'text_depth'), [(3, 1), (1, 2)])
def test_all_layers_but_the_last_are_returned(audio_depth, text_depth):
    mulan = tiny_mulan(dict(depth=audio_depth), dict(depth=text_depth)).eval()
    wavs, texts = torch.randn(2, 2000), ids(2)
    audio, audio_layers = mulan.get_audio_latents(wavs, return_all_layers=True)
    text, text_layers = mulan.get_text_latents(texts, return_all_layers=True)
    assert torch.equal(audio, mulan.get_audio_latents(wavs))
    assert torch.equal(text, mulan.get_text_latents(texts))
    assert audio_layers.shape == (audio_depth - 1, 2, 40, 32)
    assert text_layers.shape == (text_depth - 1, 2, 8, 24)
    embeds, layers = mulan.audio(wavs, return_all_layers=True)  # of a tower alone
    assert embeds.shape == (2, 32)
    assert torch.equal(layers, audio_layers)


HIERARCHIES = {
    'depth 1': (dict(depth=1), dict(depth=1), dict()),
    'layers = depth': (dict(depth=3), dict(depth=3), dict(hierarchical_contrastive_loss_layers=3)),
    'uneven towers': (dict(depth=4), dict(depth=2), dict(hierarchical_contrastive_loss_layers=2)),
    'sigmoid': (dict(depth=3), dict(depth=2), dict(sigmoid_contrastive_loss=True)),
}


@pytest.mark.parametrize('case', HIERARCHIES)
def test_hierarchical_loss_trains_every_parameter(case):
    audio, text, keywords = HIERARCHIES[case]
    mulan = tiny_mulan(audio, text, hierarchical_contrastive_loss=True, **keywords)
    mulan(torch.randn(3, 2000), ids()).backward()
    for name, parameter in mulan.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize('layers', [0, 4])
def test_hierarchical_layers_out_of_range(layers):
    with pytest.raises(ValueError, match=f'between 1 and the depth of the shallower tower, 3, got {layers}'):
        tiny_mulan(
            dict(depth=5),
            dict(depth=3),
            hierarchical_contrastive_loss=True,
            hierarchical_contrastive_loss_layers=layers,
        )


@pytest.mark.parametrize('sigmoid', [False, True])
def test_padded_pairs_have_the_loss_of_unpadded_ones(sigmoid):
    mulan = tiny_mulan(
        dict(depth=3, support_variable_length=True),
        hierarchical_contrastive_loss=True,
        sigmoid_contrastive_loss=sigmoid,
    ).eval()
    wavs, texts = torch.randn(3, 2000), ids()
    padding = torch.full((3, 777), math.nan)
    torch.testing.assert_close(
        mulan(torch.cat([wavs, padding], dim=1), texts, audio_lengths=[2000] * 3), mulan(wavs, texts)
    )


def test_wrong_towers():
    with pytest.raises(TypeError, match='audio_transformer'):
        MuLaN(tiny_text(), tiny_text())
    with pytest.raises(ValueError, match='dim_latent must be greater than 0'):
        tiny_mulan(dim_latent=0)


# ---- sample rates ----


def test_waves_of_another_rate_are_resampled():
    mulan = tiny_mulan(audio=KNOWS_RATE).eval()
    wavs = torch.randn(2, 6000)
    torch.testing.assert_close(
        mulan.get_audio_latents(wavs, sample_rate=24000), mulan.get_audio_latents(resample(wavs, 24000, 8000))
    )
    texts = ids(2)
    torch.testing.assert_close(mulan(wavs, texts, sample_rate=24000), mulan(resample(wavs, 24000, 8000), texts))


def test_resampled_padded_item_is_that_of_the_item_alone():
    mulan = tiny_mulan(audio=KNOWS_RATE).eval()
    waves = [torch.randn(n) for n in (9001, 5555)]
    batch = torch.full((2, 9500), math.nan)
    for row, wave in zip(batch, waves):
        row[: len(wave)] = wave
    together = mulan.get_audio_latents(batch, audio_lengths=[9001, 5555], sample_rate=22050)
    for latents, wave in zip(together, waves):
        torch.testing.assert_close(
            latents, mulan.get_audio_latents(wave[None], sample_rate=22050)[0], atol=1e-5, rtol=0
        )


def test_resampling_needs_a_rate():
    with pytest.raises(ValueError, match='cannot resample from 24000 Hz.*audio_sample_rate'):
        tiny_mulan().get_audio_latents(torch.randn(1, 2000), sample_rate=24000)
    knows = tiny_mulan(audio=KNOWS_RATE)
    with pytest.raises(ValueError, match='sample_rate must be greater than 0, got 0'):
        knows.get_audio_latents(torch.randn(1, 2000), sample_rate=0)
    with pytest.raises(TypeError, match='sample_rate must be an integer in Hz, got 22050.5'):
        knows.get_audio_latents(torch.randn(1, 2000), sample_rate=22050.5)
    with pytest.raises(ValueError, match='have no samples'):
        knows.get_audio_latents(torch.zeros(2, 0), sample_rate=16000)


# ---- long audio ----


def test_long_audio_is_the_mean_over_windows():
    mulan = tiny_mulan(audio=KNOWS_RATE)
    mulan.audio.train()
    mulan.text.eval()
    wave = torch.randn(8000 * 5 + 1234)
    latents = mulan.embed_audio(wave, window=2.0, hop=0.5, batch_size=3)
    # modes are left as they were
    assert mulan.audio.training
    assert not mulan.text.training

    mulan.eval()
    starts = [*range(0, len(wave) - 16000, 4000), len(wave) - 16000]
    each = torch.cat([mulan.get_audio_latents(wave[None, i : i + 16000]) for i in starts])
    expected = torch.nn.functional.normalize(each.mean(dim=0), dim=-1)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)
    assert not latents.requires_grad

    both = mulan.embed_audio(torch.stack([wave, wave.flip(0)]), window=2.0, hop=0.5)
    torch.testing.assert_close(both[0], latents, atol=1e-5, rtol=0)
    assert both.shape == (2, 16)


@pytest.mark.parametrize(('suffix', 'rate', 'tolerance'), [('.wav', 8000, 1e-4), ('.flac', 22050, 1e-3)])
def test_files_are_embedded_like_their_waves(tmp_path, suffix, rate, tolerance):
    mulan = tiny_mulan(audio=KNOWS_RATE).eval()
    time = torch.arange(rate * 4) / rate
    stereo = 0.3 * torch.stack([torch.sin(time * 2000), torch.sin(time * 3000) * torch.cos(time * 9)])
    path = tmp_path / f'song{suffix}'
    soundfile.write(path, stereo.T.numpy(), rate)
    expected = mulan.embed_audio(stereo.mean(dim=0), window=1.5, sample_rate=rate)
    torch.testing.assert_close(mulan.embed_audio(path, window=1.5), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(mulan.embed_audio(str(path), window=1.5), expected, atol=tolerance, rtol=0)
    with AudioFile(path) as file:
        torch.testing.assert_close(mulan.embed_audio(file, window=1.5), expected, atol=tolerance, rtol=0)
        assert len(file.read(0, 100)) == 100  # it is still open


def test_bad_long_audio(tmp_path):
    mulan = tiny_mulan(audio=KNOWS_RATE)
    short = tiny_mulan(audio=dict(audio_sample_rate=8000, max_audio_length=4000))
    (tmp_path / 'not.wav').write_bytes(b'no audio at all')
    soundfile.write(tmp_path / 'ok.wav', torch.zeros(9000).numpy(), 8000)
    cases = [
        (lambda: mulan.embed_audio(tmp_path / 'none.wav'), FileNotFoundError, 'no audio file at .*none.wav'),
        (lambda: mulan.embed_audio(tmp_path / 'not.wav'), ValueError, 'not.wav cannot be read as audio'),
        (lambda: mulan.embed_audio(tmp_path / 'ok.wav', sample_rate=1), ValueError, 'leave out sample_rate=1'),
        (lambda: mulan.embed_audio(torch.zeros(9000), window=0), ValueError, 'window must be greater than 0'),
        (lambda: mulan.embed_audio(torch.zeros(9000), hop=-1.0), ValueError, 'hop must be greater than 0'),
        (lambda: mulan.embed_audio(torch.zeros(1, 2, 9000)), ValueError, r'\(samples,\) or \(batch, samples\)'),
        (lambda: mulan.embed_audio(torch.zeros(9000).short()), TypeError, 'integer PCM'),
        (lambda: mulan.embed_audio(torch.zeros(0)), ValueError, 'has 0 samples'),
        (lambda: mulan.embed_audio(torch.zeros(0, 9000)), ValueError, 'empty batch'),
        (lambda: short.embed_audio(torch.zeros(9000)), ValueError, 'longer than max_audio_length.*pass window=0.5'),
        (lambda: tiny_mulan().embed_audio(torch.zeros(9000)), ValueError, 'build the audio tower with audio_sample'),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


# ---- saving ----


def test_a_model_is_rebuilt_from_its_folder(tmp_path):
    mulan = tiny_mulan(
        dict(patch_size=(8, 16), audio_sample_rate=8000, spec_n_mels=16, spec_n_fft=256, spec_win_length=100),
        dict(depth=3, pad_id=1),
        sigmoid_contrastive_loss=True,
        hierarchical_contrastive_loss=True,
        hierarchical_contrastive_loss_layers=2,
    ).eval()
    mulan.save_pretrained(tmp_path / 'new' / 'folder')
    again = MuLaN.from_pretrained(tmp_path / 'new' / 'folder')
    assert not again.training
    wavs, texts = torch.randn(2, 3000), ids(2)
    assert torch.equal(again(wavs, texts), mulan(wavs, texts))
    assert sorted(path.name for path in (tmp_path / 'new' / 'folder').iterdir()) == ['config.json', 'model.safetensors']
    assert again.audio.config == json.loads(json.dumps(mulan.audio.config)) | dict(patch_size=[8, 16])


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    mulan = tiny_mulan()
    mulan.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    mulan.config['surprise'] = object()  # cannot be written as JSON
    with pytest.raises(TypeError):
        mulan.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_compiled_towers_are_saved_as_what_they_are(tmp_path):
    mulan = tiny_mulan()
    mulan.audio = torch.compile(mulan.audio)
    mulan.text.compile()
    mulan.save_pretrained(tmp_path)
    again = MuLaN.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(tiny_mulan().state_dict())


def test_a_tower_that_could_not_be_rebuilt_is_not_saved(tmp_path):
    class Wider(TextTransformer):
        pass

    mulan = MuLaN(tiny_audio(), Wider(dim=24, depth=1, heads=2, dim_head=8, num_tokens=100))
    with pytest.raises(TypeError, match='a Wider could not be rebuilt .* plain TextTransformer'):
        mulan.save_pretrained(tmp_path / 'folder')
    assert not (tmp_path / 'folder').exists()


def test_weights_of_another_size(tmp_path):
    tiny_mulan().save_pretrained(tmp_path)
    config = read_checked_json(tmp_path / 'config.json')
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'audio': {**config['audio'], 'dim': 64}}))
    with pytest.raises(ValueError, match='do not fit this model'):
        MuLaN.from_pretrained(tmp_path)


# ---- upstream's files ----


@pytest.mark.parametrize('name', ['softmax_decoupled', 'softmax_hierarchical', 'sigmoid_hierarchical'])
def test_upstreams_checkpoints_load(tmp_path, name):
    golden, tensors = build_golden(name)
    prefix = 'module.' if name == 'softmax_hierarchical' else ''  # of DDP
    state = {prefix + key: value for key, value in state_of(tensors).items()}
    optimizer = torch.optim.Adam(golden.parameters())
    torch.save(dict(model=state, optim=optimizer.state_dict()), tmp_path / 'mulan.1000.pt')

    # what the weights do not show has to be said
    hidden = dict(spec_n_fft=256, spec_hop_length=64) if name == 'sigmoid_hierarchical' else dict()
    keywords = dict(decoupled_contrastive_learning=golden.config['decoupled_contrastive_learning'])
    mulan = MuLaN.load_upstream(tmp_path / 'mulan.1000.pt', audio=hidden, **keywords)
    loss = mulan(tensors['in.wavs'], tensors['in.texts'])
    torch.testing.assert_close(loss, tensors['out.loss'].squeeze(), atol=0, rtol=1e-4)

    # into a model that is there already
    other, _ = build_golden(name)
    torch.nn.init.zeros_(other.audio_to_latents.weight)
    assert other.load_upstream(str(tmp_path / 'mulan.1000.pt')) is other
    torch.testing.assert_close(other(tensors['in.wavs'], tensors['in.texts']), loss)


def test_unusual_sizes_of_upstreams_checkpoints(tmp_path):
    mulan = tiny_mulan(dict(patch_size=(8, 4), ff_mult=3), dict(ff_mult=2, heads=3))
    torch.save(dict(model=mulan.state_dict()), tmp_path / 'm.pt')
    with pytest.raises(ValueError, match='patches of 32 values, not a square'):
        MuLaN.load_upstream(tmp_path / 'm.pt')
    again = MuLaN.load_upstream(tmp_path / 'm.pt', audio=dict(patch_size=(8, 4)))
    wavs, texts = torch.randn(2, 2000), ids(2)
    assert torch.equal(again(wavs, texts), mulan.eval()(wavs, texts))

    state = mulan.state_dict()
    state['audio.spec.window'] = torch.hann_window(400)
    torch.save(dict(model=state), tmp_path / 'm.pt')
    with pytest.raises(ValueError, match=r'window of 400 samples, .* say audio=dict\(spec_n_fft'):
        MuLaN.load_upstream(tmp_path / 'm.pt', audio=dict(patch_size=(8, 4)))


class Marker:
    def __reduce__(self):
        return (open, ('pwned', 'w'))


def test_upstreams_checkpoints_execute_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model=Marker()), 'bad.pt')
    with pytest.raises(ValueError, match='bad.pt is damaged, or holds more than tensors'):
        MuLaN.load_upstream('bad.pt')
    assert not (tmp_path / 'pwned').exists()


def test_bad_upstream_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='no checkpoint at'):
        MuLaN.load_upstream(tmp_path / 'none.pt')
    torch.save(dict(model=dict(a=torch.ones(1))), tmp_path / 'other.pt')
    with pytest.raises(ValueError, match='is not a MuLaN: it has no audio_to_latents.weight'):
        MuLaN.load_upstream(tmp_path / 'other.pt')
    (tmp_path / 'garbage.pt').write_bytes(b'garbage')
    with pytest.raises(ValueError, match='garbage.pt is damaged'):
        MuLaN.load_upstream(tmp_path / 'garbage.pt')
    torch.save([1, 2], tmp_path / 'list.pt')
    with pytest.raises(ValueError, match='holds no state dict'):
        MuLaN.load_upstream(tmp_path / 'list.pt')
    torch.save(dict(model=tiny_mulan().state_dict()), tmp_path / 'small.pt')
    with pytest.raises(ValueError, match='do not fit this model'):
        build_golden('softmax_decoupled')[0].load_upstream(tmp_path / 'small.pt')


def test_a_log_mel_front_end_adds_nothing_to_the_state_dict():
    towers = tiny_audio(audio_sample_rate=8000, spec_n_mels=16, spec_n_fft=256), tiny_audio()
    assert list(towers[0].state_dict()) == list(towers[1].state_dict())
