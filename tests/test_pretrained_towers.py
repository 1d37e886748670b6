"""Encoders of `transformers` as the towers of a MuLaN: embeddings, training, saved folders, recipes, music."""

import copy

import pytest
import torch
import yaml
from helpers.clap import tiny_clap
from helpers.pretrained_parts import Sounds, from_waves_to_saved_music
from helpers.pretrained_towers import AUDIO, RATE, TEXT, save_tower
from helpers.training import assert_same
from torch import nn

from musiclm_pytorch import (
    InferenceConfig,
    MuLaN,
    MuLaNEmbedQuantizer,
    MuLaNSemanticTokenizer,
    MuLaNTrainer,
    ONNXExporter,
    OptimizedMuLaN,
    PretrainedAudioTransformer,
    PretrainedTextTransformer,
    TextTransformer,
    TransformersSemanticTokenizer,
)
from musiclm_pytorch.audiolm.fingerprints import fingerprint
from musiclm_pytorch.cli import main

TEXTS = ['a calm flute', 'fast drums with a cello', 'clip 3']
PAIRS = [('t5', 'ast'), ('bert', 'hubert'), ('t5', 'whisper'), ('bert', 'w2v-bert')]


def towers(text, audio, folder, **keywords):
    return (
        PretrainedAudioTransformer(save_tower(audio, folder / audio), **keywords),
        PretrainedTextTransformer(save_tower(text, folder / text), **keywords),
    )


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', TEXT)
def test_a_text_is_embedded_as_its_model_does_it(name, tmp_path):
    tower = PretrainedTextTransformer(save_tower(name, tmp_path)).eval()
    found = tower(raw_texts=TEXTS)
    for text, own in zip(TEXTS, found):  # whatever it is batched with
        tokens = tower.processor(text, return_tensors='pt')
        hidden = tower.model(**tokens).last_hidden_state[0]
        close(own, hidden.mean(dim=0))
        close(own, tower(raw_texts=[text])[0])
    assert (found[0] - found[1]).norm() > 1e-3
    encoding = tower(raw_texts=TEXTS, return_encoding=True)
    assert [tuple(it.shape) for it in encoding.layers] == [(3, 1, 16)] * 2
    close(encoding.layers[-1][:, 0], found)
    assert tower.unknown_words('a theremin') == []

    model = {'t5': lambda it: it, 'bert': lambda it: it.bert}[name](TEXT[name][0]())
    given = PretrainedTextTransformer(model, tower.processor)
    assert all(it.requires_grad for it in model.parameters())
    assert not any(it.requires_grad for it in given.parameters())
    with pytest.raises(ValueError, match='needs its tokenizer'):
        PretrainedTextTransformer(model)


def test_texts_that_are_too_long(tmp_path):
    folder = save_tower('bert', tmp_path)
    tower = PretrainedTextTransformer(folder, max_seq_len=4)
    with pytest.warns(UserWarning, match='a text of 7 tokens is cut to the context of 4'):
        cut = tower(raw_texts=['fast drums with a cello'])
    close(cut, tower(raw_texts=['fast drums']))  # with the end of a text still
    assert PretrainedTextTransformer(folder).max_seq_len == 12
    with pytest.raises(ValueError, match='takes texts of 12 tokens at most, got max_seq_len=13'):
        PretrainedTextTransformer(folder, max_seq_len=13)
    with pytest.raises(TypeError, match='must be a list of strings'):
        tower(raw_texts='a flute')


@pytest.mark.parametrize('name', AUDIO)
def test_a_wave_is_embedded_as_its_model_does_it(name, tmp_path):
    tower = PretrainedAudioTransformer(save_tower(name, tmp_path)).eval()
    waves, lengths = 0.3 * torch.randn(4, 730), [730, 600, 730, 601]
    found = tower(waves, audio_lengths=lengths)
    for wave, length, own in zip(waves, lengths, found):
        close(own, tower(wave[None, :length])[0])
        inputs = tower.processor(wave[:length].numpy(), sampling_rate=tower.sample_rate, return_tensors='pt')
        if name == 'whisper':  # what pads it is not heard
            hidden = tower.model.encoder(**inputs).last_hidden_state[:, : length // 20]
        elif name == 'w2v-bert':
            hidden = tower.model(inputs['input_features'][:, : (length - 560) // 320 + 1]).last_hidden_state
        else:
            hidden = (output := tower.model(**inputs)).last_hidden_state
        close(own, output.pooler_output[0] if name == 'ast' else hidden[0].mean(dim=0))
    assert tower(waves[:, : tower.min_samples]).isfinite().all()
    with pytest.raises(ValueError, match='one patch needs at least'):
        tower(waves[:, : tower.min_samples - 1])
    with pytest.raises(ValueError, match=r'wavs\[2\] holds NaN'):
        tower(waves.clone().index_fill_(0, torch.tensor([2]), torch.nan))
    if name in ('ast', 'whisper'):
        longest = tower.max_audio_length
        with pytest.warns(UserWarning, match=f'audio of {longest + 9} samples is cut'):
            close(tower(torch.ones(1, longest + 9).cumsum(1).sin()), tower(torch.ones(1, longest).cumsum(1).sin()))
    with pytest.raises(ValueError, match='needs its feature extractor'):
        PretrainedAudioTransformer(copy.deepcopy(tower.model))


@pytest.mark.parametrize(('text', 'audio', 'trained'), [*((*it, True) for it in PAIRS), ('t5', 'hubert', False)])
def test_training_to_the_saved_folder_and_back(text, audio, trained, tmp_path):
    mulan = MuLaN(*towers(text, audio, tmp_path, trained=trained), dim_latent=8, hierarchical_contrastive_loss=True)
    before, sounds = copy.deepcopy(mulan.state_dict()), Sounds()
    sounds.sample_rate = mulan.audio.sample_rate
    MuLaNTrainer(
        mulan, sounds, batch_size=3, num_train_steps=2, valid_frac=0, results_folder=tmp_path / 'run', use_ema=True
    ).train()
    moved = {name for name, it in mulan.state_dict().items() if not torch.equal(it, before[name])}
    every = mulan.named_parameters(remove_duplicate=False)
    inside = {name for name, it in every if '.model.' in name and it.requires_grad}
    assert {name for name in moved if '.model.' in name} <= inside
    assert bool(inside) == trained
    # keys' biases have no influence, and the first convolution's bias none before a norm
    assert len(inside - moved) <= 8
    assert 'audio_to_latents.weight' in moved
    assert mulan.audio.model.training == mulan.text.model.training == trained

    mulan.eval().save_pretrained(tmp_path / 'saved')
    assert {it.suffix for it in (tmp_path / 'saved').rglob('*') if it.is_file()} <= {'.json', '.safetensors', '.txt'}
    for name in text, audio:
        (tmp_path / name).rename(tmp_path / f'{name}_gone')
    loaded = MuLaN.from_pretrained(tmp_path / 'saved')
    assert_same(loaded.state_dict(), mulan.state_dict())
    assert {it.requires_grad for it in loaded.audio.parameters()} == {
        it.requires_grad for it in mulan.audio.parameters()
    }
    waves = torch.randn(2, 600)
    close(loaded.get_audio_latents(waves, sample_rate=RATE), mulan.get_audio_latents(waves, sample_rate=RATE))
    assert torch.equal(loaded.get_text_latents(raw_texts=TEXTS), mulan.get_text_latents(raw_texts=TEXTS))
    half = MuLaN.from_pretrained(tmp_path / 'saved', dtype=torch.bfloat16)
    assert (half.get_audio_latents(waves) * mulan.get_audio_latents(waves)).sum(dim=1).min() > 0.99
    (tokenizer,) = (tmp_path / 'saved').glob('*/tokenizer.json')
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b'calm', b'clam'))
    with pytest.raises(ValueError, match='tokenizer.json is damaged: it is not what was written'):
        MuLaN.from_pretrained(tmp_path / 'saved')
    assert MuLaN.from_pretrained(tmp_path / 'saved', verify=False).text.trained == trained


@pytest.mark.slow
def test_to_saved_music(tmp_path):
    mulan = MuLaN(*towers('t5', 'hubert', tmp_path), dim_latent=8).eval()
    quantizer = MuLaNEmbedQuantizer(mulan, conditioning_dims=(16,) * 3, rq_num_quantizers=2, codebook_size=4)
    quantizer.fit(Sounds())
    tokenizer = TransformersSemanticTokenizer(save_tower('whisper', tmp_path / 'whisper'), codebook_size=8, layer=2)
    tokenizer.fit(Sounds())
    loaded = from_waves_to_saved_music(tmp_path, quantizer=quantizer.eval(), tokenizer=tokenizer)
    assert isinstance(loaded.mulan_embed_quantizer.mulan.text, PretrainedTextTransformer)
    assert fingerprint(loaded.tokenizer) == fingerprint(tokenizer)


def test_a_recipe_and_the_command_line(tmp_path):
    import soundfile

    lines = ['audio_path,caption']
    for i in range(6):
        soundfile.write(tmp_path / f'{i}.wav', 0.3 * torch.randn(800 + 40 * i).numpy(), RATE)
        lines.append(f'{i}.wav,clip {i}')
    (tmp_path / 'data.csv').write_text('\n'.join(lines))
    recipe = dict(
        audio=dict(model=str(save_tower('hubert', tmp_path / 'hubert'))),
        text=dict(model=str(save_tower('bert', tmp_path / 'bert')), trained=True, max_seq_len=8),
        mulan=dict(dim_latent=8),
        training=dict(batch_size=3, num_train_steps=2, lr_scheduler_type='constant', warmup_steps=0),
    )
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    out = tmp_path / 'run'
    at = ['train', 'mulan', '--data', str(tmp_path / 'data.csv'), '--config', str(tmp_path / 'recipe.yaml')]
    assert main([*at, '--output', str(out)]) == 0
    (folder,) = [it.parent for it in out.rglob('config.json') if (it.parent / 'text_processor').exists()][:1]
    mulan = MuLaN.from_pretrained(folder)
    assert (mulan.text.trained, mulan.audio.trained, mulan.text.max_seq_len) == (True, False, 8)
    assert main([*at, '--output', str(tmp_path / 'next'), '--init-from', str(folder)]) == 0
    assert main([*at, '--output', str(tmp_path / 'bad'), '--text.dim', '8']) != 0


def test_what_takes_our_own_towers_alone_says_so(tmp_path, monkeypatch):
    audio, text = towers('bert', 'hubert', tmp_path)
    mulan = MuLaN(audio, text, dim_latent=8)
    with pytest.raises(TypeError, match='the export to ONNX takes towers of our own, not a PretrainedAudio'):
        ONNXExporter().export_mulan_to_onnx(mulan, tmp_path / 'mulan.onnx')
    monkeypatch.setattr('musiclm_pytorch.inference.optimize.MIN_WIDTH', 1)
    monkeypatch.setattr('musiclm_pytorch.inference.optimize.computes_in_bf16', lambda: True)
    assert torch.equal(
        OptimizedMuLaN(mulan).get_text_latents(raw_texts=TEXTS), mulan.eval().get_text_latents(raw_texts=TEXTS)
    )
    with pytest.raises(TypeError, match='OptimizedMuLaN, but in float32, takes towers of our own'):
        OptimizedMuLaN(mulan, InferenceConfig(use_mixed_precision=True))
    with pytest.raises(TypeError, match='TransformersSemanticTokenizer takes the others'):
        MuLaNSemanticTokenizer(mulan)
    for wrong in (nn.Linear(2, 2), audio.model):
        with pytest.raises(ValueError, match='is no text encoder'):
            PretrainedTextTransformer(wrong, text.processor)
    for wrong in (nn.Linear(2, 2), text.model, tiny_clap()[0]):
        with pytest.raises(ValueError, match='is no audio encoder that is read'):
            PretrainedAudioTransformer(wrong, audio.processor)
    mixed = MuLaN(audio, TextTransformer(dim=8, depth=1), dim_latent=8)
    mixed.save_pretrained(tmp_path / 'mixed')
    assert type(MuLaN.from_pretrained(tmp_path / 'mixed').text) is TextTransformer
