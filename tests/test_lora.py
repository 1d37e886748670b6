"""Low-rank adapters on stages, MuLaN and towers of others: what trains, what is saved, and what merging gives."""

import copy

import pytest
import torch
from helpers.models import tiny_mulan
from helpers.music import build_audio_lm, build_quantizer
from helpers.pretrained_parts import Sounds
from helpers.pretrained_towers import save_tower
from helpers.stage_parts import STAGES, compute, make_quantizer, make_trainer, make_transformer, transformer_for
from helpers.training import assert_same

from musiclm_pytorch import (
    MuLaN,
    MuLaNEmbedQuantizer,
    MuLaNTrainer,
    MusicLM,
    PretrainedAudioTransformer,
    PretrainedTextTransformer,
    add_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from musiclm_pytorch.audiolm import decode_step
from musiclm_pytorch.audiolm.convert import audiolm_stage, own_stage
from musiclm_pytorch.audiolm.generate import generate_semantic
from musiclm_pytorch.audiolm.generation_args import Sampling
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.cli import main
from musiclm_pytorch.distributed import DistributedConfig, DistributedMuLaNTrainer
from musiclm_pytorch.mulan.lora import adapters_of
from musiclm_pytorch.trainer.optimizers import build_optimizer
from musiclm_pytorch.trainer.stages import take_conditioning


def moved(module, seed=0):
    """The module, with adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters_of(module).values():
        adapter.up.data.normal_(std=0.1, generator=generator)
    return module


def trained_names(module):
    return {name for name, it in module.named_parameters() if it.requires_grad}


def size_on_disk(folder):
    return sum(it.stat().st_size for it in folder.rglob('*.safetensors'))


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    return compute(tmp_path_factory.mktemp('tokens'), quantizer=make_quantizer())


def features(stage):
    ids = torch.arange(6)[None], torch.arange(3)[None]
    with torch.no_grad():
        return stage.features(*(ids[:1] if stage.own_heads() and not stage.given_heads() else ids))[-1]


@pytest.mark.parametrize('stage', STAGES)
def test_a_stage_with_adapters(stage, tmp_path):
    own = make_transformer(stage, dim=64, depth=2).eval()
    before, plain = features(own), copy.deepcopy(own.state_dict())
    add_adapters(own, rank=2)
    assert torch.equal(features(own), before)
    assert trained_names(own) == {
        f'{name}.parametrizations.weight.0.{key}' for name in adapters_of(own) for key in ('down', 'up')
    }
    after = features(moved(own))
    assert (after - before).norm() > 1e-2

    save_adapters(own, tmp_path / 'adapters')
    save_module(own, tmp_path / 'whole')
    assert size_on_disk(tmp_path / 'adapters') < 0.3 * size_on_disk(tmp_path / 'whole')
    other = make_transformer(stage, dim=64, depth=2).eval()
    assert torch.equal(features(load_adapters(other, tmp_path / 'adapters')), after)
    torch.testing.assert_close(features(load_module(tmp_path / 'whole')), after)
    torch.testing.assert_close(features(merge_adapters(own)), after)
    assert own.state_dict().keys() == plain.keys()
    assert trained_names(own) == set()


def test_what_does_not_go_together(tmp_path):
    stage = add_adapters(make_transformer('semantic'))
    with pytest.raises(ValueError, match='has adapters already; merge_adapters'):
        add_adapters(stage)
    save_adapters(stage, tmp_path)
    with pytest.raises(ValueError, match='were trained on a model with other weights'):
        load_adapters(make_transformer('semantic', seed=4), tmp_path)
    load_adapters(make_transformer('semantic', seed=4), tmp_path, verify=False)
    with pytest.raises(ValueError, match=r'are of another model than this SemanticTransformer: transformer\.layers\.1'):
        load_adapters(make_transformer('semantic', depth=2), tmp_path, verify=False)
    with pytest.raises(ValueError, match='has no adapters; add_adapters'):
        save_adapters(make_transformer('semantic'), tmp_path)
    with pytest.raises(ValueError, match='a LayerNorm has no linear layers'):
        add_adapters(torch.nn.LayerNorm(2))
    with pytest.raises(ValueError, match='rank must be greater than 0'):
        add_adapters(make_transformer('semantic'), rank=0)
    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'x')
    with pytest.raises(ValueError, match='damaged'):
        load_adapters(make_transformer('semantic'), tmp_path)


def test_decoding_sees_the_adapters(monkeypatch):
    """The kernel reads weights where they lie, which adapted ones do not."""
    stage = moved(add_adapters(make_transformer('semantic', dim=32), rank=4)).eval()
    keywords = dict(max_length=16, min_length=16, sampling=Sampling(temperature=1.0))

    def tokens(stage):
        return generate_semantic(stage, generator=[torch.Generator().manual_seed(0)], **keywords).tokens

    plain = tokens(stage)
    monkeypatch.setattr(decode_step, 'WORTH_LOADING', 0)
    assert torch.equal(tokens(stage), plain)
    assert torch.equal(tokens(merge_adapters(stage)), plain)


def test_training_a_stage_moves_its_adapters_alone(tokens, tmp_path):
    stage, quantizer = transformer_for('semantic'), make_quantizer()
    before, embeddings = copy.deepcopy(stage.state_dict()), quantizer.cond_embeddings['semantic'].clone()
    add_adapters(stage, rank=2)
    trainer = make_trainer(tmp_path, tokens, transformer=stage, quantizer=quantizer, num_train_steps=3, use_ema=True)
    trainer.train()
    assert torch.equal(quantizer.cond_embeddings['semantic'], embeddings)
    assert any(it.up.abs().sum() > 0 for it in adapters_of(stage).values())
    loaded = load_adapters(transformer_for('semantic'), tmp_path / 'last' / 'adapters')
    merge_adapters(loaded)
    assert_same(loaded.state_dict(), load_module(tmp_path / 'last').state_dict())
    for name, tensor in before.items():
        if f'{name.removesuffix(".weight")}' not in adapters_of(stage):
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_towers_of_others(tmp_path):
    def build():
        audio = PretrainedAudioTransformer(save_tower('hubert', tmp_path / 'hubert'))
        text = PretrainedTextTransformer(save_tower('t5', tmp_path / 't5'))
        torch.manual_seed(0)
        return MuLaN(audio, text, dim_latent=8)

    mulan = add_adapters(build(), rank=2)
    before = copy.deepcopy({name: it for name, it in mulan.named_parameters() if not it.requires_grad})
    MuLaNTrainer(
        mulan, Sounds(), batch_size=3, num_train_steps=2, valid_frac=0, results_folder=tmp_path / 'run'
    ).train()
    for name, it in mulan.named_parameters():
        assert it.requires_grad or torch.equal(it, before[name])
    assert any(it.up.abs().sum() > 0 for it in adapters_of(mulan.text).values())
    latents = mulan.eval().get_audio_latents(torch.ones(1, 400).cumsum(1).sin())
    whole = MuLaN.from_pretrained(tmp_path / 'run' / 'last')
    adapted = load_adapters(build().eval(), tmp_path / 'run' / 'last' / 'adapters')
    for again in whole, adapted, merge_adapters(adapted):
        torch.testing.assert_close(again.get_audio_latents(torch.ones(1, 400).cumsum(1).sin()), latents)


def test_the_command_line(tokens, tmp_path, capsys):
    quantizer = make_quantizer()
    quantizer.save_pretrained(tmp_path / 'quantizer')
    save_module(transformer_for('semantic'), tmp_path / 'stage')
    at = ['train', 'semantic', '--tokens', str(tokens), '--quantizer', str(tmp_path / 'quantizer'), '--steps', '2']
    at += ['--training.seconds', '0.2', '--batch-size', '2', '--output', str(tmp_path / 'run')]
    assert main([*at, '--lora', '2']) != 0
    assert '--lora 2 adapts a model that is trained: give it with --begin-with' in capsys.readouterr().err
    assert main([*at, '--lora', '2', '--begin-with', str(tmp_path / 'stage')]) == 0
    adapted = load_adapters(load_module(tmp_path / 'stage'), tmp_path / 'run' / 'last' / 'adapters')
    assert_same(merge_adapters(adapted).state_dict(), load_module(tmp_path / 'run' / 'last').state_dict())


def test_a_stage_of_a_musiclm_keeps_what_conditions_it(tmp_path):
    saved = make_quantizer()
    saved.save_pretrained(tmp_path / 'quantizer')
    own = MuLaNEmbedQuantizer.from_pretrained(tmp_path / 'quantizer')
    for embeddings in own.cond_embeddings.parameters():
        torch.nn.init.zeros_(embeddings)
    take_conditioning(tmp_path / 'quantizer', 'coarse', own)
    assert torch.equal(own.cond_embeddings['coarse'], saved.cond_embeddings['coarse'])
    assert not own.cond_embeddings['fine'].any()
    for codes in own.rq.buffers():
        if codes.is_floating_point():
            codes.add_(1)
    with pytest.raises(ValueError, match='trained with the codes of'):
        take_conditioning(tmp_path / 'quantizer', 'coarse', own)


def test_stages_of_audiolm_pytorch():
    given, quantizer = MusicLM(build_audio_lm(), build_quantizer()), build_quantizer()
    parts = dict(given.stages, codec=given.codec, tokenizer=given.tokenizer)
    moved(add_adapters(given.coarse, rank=2))
    with pytest.raises(ValueError, match=r'the coarse stage has adapters, .* merge_adapters\(musiclm.coarse\)'):
        _ = given.audio_lm
    copied = MusicLM(mulan_embed_quantizer=quantizer, **parts).audio_lm.coarse.transformer
    merge_adapters(given.coarse)
    assert_same(copied.state_dict(), given.audio_lm.coarse.transformer.state_dict())
    assert_same(copied.state_dict(), given.coarse.state_dict())
    theirs = add_adapters(audiolm_stage(transformer_for('semantic')), rank=2)
    with pytest.raises(ValueError, match='on the module of audiolm-pytorch, .* put them on own_stage'):
        own_stage(theirs)


def test_adapters_are_decayed():
    stage = add_adapters(transformer_for('semantic'), rank=2)
    decayed, *others = build_optimizer('adam', stage, 1e-3, (0.9, 0.99), 0.1).param_groups
    assert decayed['weight_decay'] == 0.1
    assert {id(it) for it in decayed['params']} == {id(it) for it in stage.parameters() if it.requires_grad}
    assert others == []


def test_adapters_train_where_no_model_is_sent(tmp_path):
    mulan = add_adapters(tiny_mulan(), rank=2)
    trainer = DistributedMuLaNTrainer(
        mulan, Sounds(), DistributedConfig(world_size=2, backend='gloo'), batch_size=2, results_folder=tmp_path
    )
    with pytest.raises(ValueError, match='torchrun'):
        trainer.train(num_train_steps=1)
