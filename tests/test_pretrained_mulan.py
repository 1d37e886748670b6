"""CLAP, MuQ-MuLan and other joint embeddings in the place of a MuLaN: latents, quantizer, music, evaluation, index."""

import json
import re

import numpy as np
import pytest
import soundfile
import torch
from helpers.clap import RATE, tiny_clap
from helpers.pretrained_parts import Sounds, from_waves_to_saved_music, make_codec_model
from helpers.serving import served
from torch import nn

from musiclm_pytorch import MuLaNEmbedQuantizer, MuLaNIndex, MusicLM, MusicLMEvaluator, PretrainedMuLaN
from musiclm_pytorch.cli import main
from musiclm_pytorch.cli.serve import load_model
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.evaluation import ZeroShotTagger, load_mulan


class Hashes(nn.Module):
    """A joint embedding of another author: loudness of four bands, and letters."""

    sample_rate = 2000

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def get_audio_latents(self, wavs):
        bands = torch.stack([it.abs().mean(dim=1) for it in torch.fft.rfft(wavs).tensor_split(4, dim=1)], dim=1)
        return bands @ self.weight

    def get_text_latents(self, raw_texts):
        letters = ('ae', 'io', 'lrt', 'c123')
        counts = [[0.1 + sum(text.count(it) for it in some) for some in letters] for text in raw_texts]
        return torch.tensor(counts) @ self.weight


class Mulan(nn.Module):
    """As the package muq calls it."""

    def __init__(self):
        super().__init__()
        self.sr, self.inner = 2000, Hashes()

    def extract_audio_latents(self, wavs):
        return self.inner.get_audio_latents(wavs)

    def extract_text_latents(self, texts):
        return self.inner.get_text_latents(texts)


MODELS = {
    'clap': lambda: PretrainedMuLaN(*tiny_clap()),
    'clap with fusion': lambda: PretrainedMuLaN(*tiny_clap(fusion=True)),
    'another': lambda: PretrainedMuLaN(Hashes()),
    'muq': lambda: PretrainedMuLaN(Mulan()),
}


@pytest.fixture(params=MODELS)
def mulan(request):
    return MODELS[request.param]()


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_latent_of_an_item_is_its_own(mulan):
    waves = 0.3 * torch.randn(3, 4321)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    latents = mulan.get_audio_latents(waves, audio_lengths=[4321, 900, 2500])
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert latents.shape == (3, mulan.dim_latent)
    same(latents.norm(dim=1), torch.ones(3))
    same(latents[1:2], mulan.get_audio_latents(waves[1:2, :900]))
    same(latents[2:], mulan.get_audio_latents(waves[2:, :2500]))
    own = resample(waves, 1500, mulan.sample_rate)
    same(mulan.get_audio_latents(waves, sample_rate=1500), mulan.get_audio_latents(own))
    texts = mulan.get_text_latents(raw_texts=['a calm flute', 'cello'])
    same(texts[1:], mulan.get_text_latents(raw_texts=['cello']))
    pairs = mulan.pair_latents(waves[:2], raw_texts=['a calm flute', 'cello'])
    same(pairs.text, texts)
    with pytest.raises(ValueError, match='reads strings, not token ids'):
        mulan.pair_latents(waves, torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match='texts must be one or more strings in a list, got'):
        mulan.get_text_latents(raw_texts='a flute')


def quantizer_of(model):
    quantizer = MuLaNEmbedQuantizer(
        PretrainedMuLaN(model), conditioning_dims=(8,) * 3, rq_num_quantizers=2, codebook_size=4
    )
    quantizer.fit(torch.randn(9, 4))
    return quantizer


def test_the_module_given_is_left_alone(tmp_path):
    class Dropping(Hashes):
        def get_text_latents(self, raw_texts):
            return nn.functional.dropout(super().get_text_latents(raw_texts), training=self.training)

    model = Dropping().train()
    mulan = PretrainedMuLaN(model)
    mulan.get_audio_latents(torch.randn(1, 400))
    expected = Hashes().get_text_latents(['a cello'])
    quantizer = quantizer_of(model)
    for wrapper in mulan, mulan.eval(), quantizer.train(), quantizer.eval():
        assert model.training
        same(getattr(wrapper, 'mulan', wrapper).get_text_latents(raw_texts=['a cello']), expected / expected.norm())
    quantizer.save_pretrained(tmp_path)
    loaded = MuLaNEmbedQuantizer.from_pretrained(tmp_path, model, dtype=torch.bfloat16)
    assert loaded(raw_texts=['a cello'], namespace='fine').dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32
    assert model.training
    assert model.weight.requires_grad


class Letters:
    """A joint embedding without weights."""

    sample_rate = 2000

    def __init__(self, exponent=1):
        self.exponent, self.inner = exponent, Hashes()

    def get_audio_latents(self, wavs):
        return self.inner.get_audio_latents(wavs) ** self.exponent

    def get_text_latents(self, raw_texts):
        return self.inner.get_text_latents(raw_texts) ** self.exponent


def test_a_quantizer_knows_the_model_that_it_was_fitted_with(tmp_path):
    class Others(Hashes):
        pass

    for kind, model in dict(Hashes=Hashes(), Letters=Letters()).items():
        quantizer_of(model).save_pretrained(tmp_path / kind)
        assert MuLaNEmbedQuantizer.from_pretrained(tmp_path / kind, PretrainedMuLaN(type(model)())).is_fitted
        with pytest.raises(ValueError, match=f'{kind} was fitted with a {kind}, got a Others'):
            MuLaNEmbedQuantizer.from_pretrained(tmp_path / kind, Others())
    with pytest.raises(ValueError, match='was fitted with another Letters'):
        MuLaNEmbedQuantizer.from_pretrained(tmp_path / 'Letters', PretrainedMuLaN(Letters(exponent=2)))


def test_long_audio_is_heard_whole():
    mulan = MODELS['clap']()
    waves = 0.3 * torch.randn(1, 3 * RATE)
    pieces = [mulan.get_audio_latents(it) for it in waves.split(RATE, dim=1)]
    mean = torch.cat(pieces).mean(dim=0, keepdim=True)
    same(mulan.get_audio_latents(waves), mean / mean.norm())
    same(mulan.embed_audio(waves, window=1.0, hop=1.0), mean / mean.norm())


@pytest.mark.parametrize('name', ['clap', 'muq'])
def test_from_waves_to_saved_music(name, tmp_path):
    mulan = MODELS[name]()
    given = None if name == 'clap' else mulan.model
    quantizer = MuLaNEmbedQuantizer(
        mulan if given is None else given, conditioning_dims=(16,) * 3, rq_num_quantizers=2, codebook_size=4
    )
    assert quantizer.fit(Sounds())[-1] < 1
    loaded = from_waves_to_saved_music(tmp_path, quantizer=quantizer.eval(), mulan=given)
    music = loaded('cello', num_samples=3, seconds=0.4, seed=0, return_all=True, return_scores=True)
    heard = mulan.get_audio_latents(music.waves[0], sample_rate=loaded.sample_rate)
    same(music.scores[0], heard @ mulan.get_text_latents(raw_texts=['cello'])[0])
    if given is None:
        with served(loaded) as service:
            answer = service.client.post('/embed', json={'texts': ['cello']}).json()
        same(torch.tensor(answer['text_latents']), mulan.get_text_latents(raw_texts=['cello']))
        path = tmp_path / 'music' / 'quantizer' / 'mulan' / 'encoder' / 'model.safetensors'
        path.write_bytes(path.read_bytes()[:-1] + b'x')
        with pytest.raises(ValueError, match='is damaged'):
            MusicLM.from_pretrained(tmp_path / 'music')
        return
    half = MusicLM.from_pretrained(tmp_path / 'music', mulan=given, dtype=torch.bfloat16)
    assert half.semantic.to_logits.weight.dtype == half.mulan_embed_quantizer.rq.layers[0]._codebook.embed.dtype
    assert half.semantic.to_logits.weight.dtype == torch.bfloat16
    assert given.inner.weight.dtype == torch.float32
    assert half('cello', seconds=0.4, seed=0).std() > 0
    with pytest.raises(ValueError, match='was saved without its Mulan, which cannot be rebuilt; pass it as mulan'):
        MusicLM.from_pretrained(tmp_path / 'music')
    with pytest.raises(
        ValueError, match=r'saved without its Mulan, .* pass that object itself, as in MusicLMEvaluator'
    ):
        load_mulan(tmp_path / 'music')
    other = Mulan()
    other.inner.weight.data *= 2
    with pytest.raises(ValueError, match='was fitted with another Mulan'):
        MusicLM.from_pretrained(tmp_path / 'music', mulan=other)


@pytest.mark.parametrize('mulan', ['clap', 'another'], indirect=True)
def test_evaluation_index_and_tags(mulan):
    waves = [0.3 * torch.randn(4000) * (pitch * torch.arange(4000)).sin() for pitch in (0.1, 0.5, 1.0, 2.0)]
    texts = ['a cello', 'a flute', 'drums', 'a choir']
    evaluator = MusicLMEvaluator(mulan, batch_size=3)
    groups = ['audio_quality', 'text_audio_alignment']
    results = evaluator.evaluate(waves, waves[::-1], texts=texts, groups=groups, sample_rate=mulan.sample_rate)
    assert {*groups} <= results.keys()

    index = MuLaNIndex(mulan)
    latents = torch.cat([mulan.get_audio_latents(it[None]) for it in waves])
    index.add(texts, latents)
    cosines = mulan.get_text_latents(raw_texts=['a flute']) @ latents.T
    nearest = [texts[place] for place in cosines[0].argsort(descending=True)]
    assert [it.name for it in index.search_text('a flute', k=4)] == nearest
    tagger = ZeroShotTagger(mulan, ['calm', 'loud'], ['{}'])
    same(tagger.scores(waves), latents @ mulan.get_text_latents(raw_texts=['calm', 'loud']).T)
    same(tagger.probabilities(waves).sum(dim=1), torch.ones(4))
    assert index.tags(['calm', 'loud'], k=1)[0][0].name in ('calm', 'loud')


def test_by_command_line(tmp_path, capsys):
    model, processor = tiny_clap()
    for part in model, processor:
        part.save_pretrained(tmp_path / 'clap')
    (tmp_path / 'music').mkdir()
    for index in range(len(Sounds())):
        soundfile.write(tmp_path / 'music' / f'{index}.wav', Sounds()[index]['wave'].numpy(), Sounds.sample_rate)
        (tmp_path / 'music' / f'{index}.txt').write_text(f'a {"calm" if index % 2 else "loud"} clip')
    given = ['--data', str(tmp_path / 'music'), '--output', str(tmp_path / 'quantizer'), '--dims', '8', '8', '8']
    assert main(['train', 'quantizer', '--mulan', str(tmp_path / 'clap'), *given, '--codebook-size', '2']) == 0
    quantizer = MuLaNEmbedQuantizer.from_pretrained(tmp_path / 'quantizer')
    wave = Sounds()[0]['wave'][None]
    same(quantizer.mulan.get_audio_latents(wave), PretrainedMuLaN(tmp_path / 'clap').get_audio_latents(wave))
    for model in tmp_path / 'clap', tmp_path / 'quantizer' / 'mulan':
        target = ['-o', str(tmp_path / 'index'), '--overwrite']
        assert main(['index', str(tmp_path / 'music'), '--model', str(model), *target]) == 0
        capsys.readouterr()
        assert main(['search', str(tmp_path / 'index'), 'a calm clip']) == 0
        assert '.wav' in capsys.readouterr().out


def test_options_that_do_not_go_together(tmp_path, music, capsys):
    for part in tiny_clap():
        part.save_pretrained(tmp_path / 'clap')
    make_codec_model('dac').save_pretrained(tmp_path / 'dac')
    tokenizer, codec = tmp_path / 'tokenizer.json', tmp_path / 'codec.json'
    tokenizer.write_text('{"tokenizer": {"model": "their/model"}}')
    codec.write_text(json.dumps(dict(pretrained_codec=dict(source=str(tmp_path / 'dac'), num_quantizers=4))))
    to = ['--output', str(tmp_path / 'out')]
    fitting = ['train', 'tokenizer', '--data', str(music), '--mulan', str(tmp_path / 'clap'), *to]
    everything = ['train', 'all', '--data', str(music), *to, '--codec-quantizers']
    for command, told in (
        ([*fitting, '--config', str(tokenizer)], f'tokenizer.json has their/model .* --mulan names {tmp_path}/clap'),
        (fitting, f'{tmp_path}/clap is a ClapModel, no MuLaN of this package: .* as --model'),
        (['assemble', str(tmp_path), *to, '--codec-quantizers', '3'], '--codec-quantizers needs --codec$'),
        (['tokens', '--data', str(music), *to, '--codec-quantizers', '3'], '--codec-quantizers needs --codec$'),
        ([*everything, '3'], 'needs --codec, or a recipe with the section pretrained_codec'),
        ([*everything, '1', '--config', str(codec)], 'num_coarse_quantizers must lie between 1 and 0'),  # 4 would do
    ):
        assert main(command) == 2
        assert re.search(told, capsys.readouterr().err.strip())
    assert not (tmp_path / 'out' / 'mulan').exists()


def test_what_is_none(tmp_path):
    with pytest.raises(TypeError, match='a Linear is no joint embedding: it has no get_audio_latents and no get_text'):
        MuLaNEmbedQuantizer(nn.Linear(1, 1), conditioning_dims=(8,) * 3)
    with pytest.raises(ValueError, match='a ClapModel in memory needs its processor'):
        MuLaNIndex(tiny_clap()[0])
    (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a 'bert'; joint embeddings that are read are those of model_type clap"):
        PretrainedMuLaN(tmp_path)
    MODELS['clap']().save_pretrained(tmp_path / 'ours')
    with pytest.raises(ValueError, match='ours was written by .*; PretrainedMuLaN.from_pretrained reads it'):
        PretrainedMuLaN(tmp_path / 'ours')
    with pytest.raises(TypeError, match='a Hashes cannot be rebuilt from a folder; pass it again when loading'):
        PretrainedMuLaN(Hashes()).save_pretrained(tmp_path / 'x')


def test_a_clap_is_served_by_its_folder(tmp_path):
    clap = MODELS['clap']()
    clap.save_pretrained(tmp_path)
    with served(load_model(str(tmp_path), dtype='auto', device='cpu')) as service:
        answer = service.client.post('/embed', json={'texts': ['cello']}).json()
    same(torch.tensor(answer['text_latents']), clap.get_text_latents(raw_texts=['cello']))
