"""Recipes: what they hold is checked against the constructors, with messages that lead to the right key."""

import dataclasses
import json
import re

import pytest
import torch
from helpers.recipes import TINY, written

from musiclm_pytorch import MuLaN, MuLaNTrainer, ShardedAudioText, SyntheticMusic, write_shards
from musiclm_pytorch.data.opening import open_pairs
from musiclm_pytorch.data.sources import list_folder
from musiclm_pytorch.trainer.config import SHIPPED
from musiclm_pytorch.trainer.config_schema import keywords_of
from musiclm_pytorch.trainer.recipes import MuLaNRecipe

EXAMPLES = [path for path in SHIPPED.iterdir() if path.name.startswith('mulan_')]


def test_every_section_takes_the_keywords_of_its_constructors():
    training = MuLaNRecipe.SECTIONS['training'].types
    assert {'lr', 'grad_cache_chunk_size', 'use_ema', 'num_workers', 'num_epochs', 'num_train_steps'} <= set(training)
    assert set(keywords_of(MuLaNTrainer)) - set(training) == {
        *('mulan', 'dataset', 'valid_dataset', 'results_folder', 'collate_fn', 'folder'),
        *('groups', 'resume', 'callbacks', 'config'),
    }
    assert {'use_case', 'audio_sample_rate', 'spec_n_mels', 'depth'} <= set(MuLaNRecipe.SECTIONS['audio'].types)
    assert set(MuLaNRecipe.SECTIONS['mulan'].types) == set(keywords_of(MuLaN)) - {
        'audio_transformer',
        'text_transformer',
    }
    assert {'max_seconds', 'min_seconds', 'seed'} <= set(MuLaNRecipe.SECTIONS['data'].types)


def test_default_recipe_builds(tmp_path):
    recipe = MuLaNRecipe.default()
    mulan = recipe.build_model()
    assert (mulan.sample_rate, mulan.audio.dim, mulan.audio.depth) == (16000, 256, 4)
    assert mulan.audio.log_mel is not None
    assert recipe.train_keywords == dict(num_epochs=20)
    assert MuLaNRecipe.load(recipe.save(tmp_path)) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.audio = {}


def test_what_a_file_leaves_out_is_as_in_the_default(tmp_path):
    for text in ('', 'training:\n', 'training: {lr: 1e-3}'):
        recipe = MuLaNRecipe.load(written(tmp_path, text))
        assert recipe.audio == MuLaNRecipe.default().audio
        assert recipe.training['lr'] == (1e-3 if 'lr' in text else MuLaNRecipe.default().training['lr'])


def test_values_become_what_the_constructors_want(tmp_path):
    text = 'training: {lr: 5e-4, betas: [0.9, 0.98], log_with: [tensorboard], max_grad_norm: null, num_train_steps: 7}'
    recipe = MuLaNRecipe.load(written(tmp_path, text))
    training = recipe.training
    assert (training['lr'], training['betas'], training['log_with']) == (5e-4, (0.9, 0.98), ['tensorboard'])
    assert training['max_grad_norm'] is None
    assert recipe.train_keywords == dict(num_train_steps=7)  # in place of the default's epochs
    assert recipe.updated(training=dict(num_epochs=2)).train_keywords == dict(num_epochs=2)
    lion, no_lion = (MuLaNRecipe.load(written(tmp_path, f'training: {{use_lion: {it}}}')) for it in ('true', 'false'))
    assert 'optimizer' not in lion.training
    assert no_lion.training['optimizer'] == 'adamw'
    as_json = written(tmp_path, json.dumps(dict(training=dict(lr=5e-4, betas=[0.9, 0.98]))), 'recipe.json')
    assert MuLaNRecipe.load(as_json).training['betas'] == (0.9, 0.98)
    assert MuLaNRecipe.load(recipe.save(tmp_path)) == recipe


@pytest.mark.parametrize(
    ('text', 'error', 'says'),
    [
        ('trainings: {lr: 1}', ValueError, "unknown section 'trainings'; did you mean 'training'"),
        ('lr: 1', ValueError, "unknown section 'lr'; it is a key of section 'training'"),
        ('optimiser-zoo: 1', ValueError, 'known are audio, data, mulan, text, training'),
        (
            'training: {warmup_step: 5}',
            ValueError,
            "unknown key 'warmup_step' .*'training'; did you mean 'warmup_steps'",
        ),
        ('mulan: {lr: 0.1}', ValueError, "unknown key 'lr' in section 'mulan'; it belongs to section 'training'"),
        ('audio: {spec_mels: 5}', ValueError, "did you mean 'spec_n_mels'"),
        ('training: {lr: fast}', TypeError, r"training.lr must be float \| None, got 'fast' \(str\)"),
        ('training: {use_ema: 1}', TypeError, r'training.use_ema must be bool, got 1 \(int\)'),
        ('audio: {dim: yes}', TypeError, r'audio.dim must be int, got True \(bool\)'),
        ('training: {betas: [0.9]}', TypeError, r'training.betas must be tuple\[float, float\], got \[0.9\]'),
        ('text: {depth: 2.5}', TypeError, r'text.depth must be int, got 2.5 \(float\)'),
        ('data: {max_seconds: long}', TypeError, r'data.max_seconds must be float \| None'),
        ('training: {collate_fn: x}', ValueError, 'training.collate_fn cannot stand in a recipe: it is an object'),
        ('training: {dataset: x}', ValueError, 'training.dataset cannot stand in a recipe: say --data'),
        ('training: {mulan: x}', ValueError, 'training.mulan cannot stand in a recipe'),
        ('mulan: {audio_transformer: x}', ValueError, "the audio tower is section 'audio'"),
        ('data: {sample_rate: 8000}', ValueError, "it is audio_sample_rate in section 'audio'"),
        ('training: {num_epochs: 1, num_train_steps: 5}', ValueError, 'say the same thing in two ways'),
        ('training: 5', TypeError, r"section 'training' must hold keys and values, got 5 \(int\)"),
        ('- 5', TypeError, 'must hold the sections audio, text'),
        ('training: {lr: 1, lr: 2}', ValueError, "the key 'lr' is given twice"),
        ('training: {lr: [1', ValueError, 'cannot be read: .*line 1'),
        ('training: !!python/object/apply:os.getcwd []', ValueError, 'cannot be read'),
    ],
)
def test_mistakes_are_named(tmp_path, text, error, says):
    path = written(tmp_path, text)
    with pytest.raises(error, match=says) as raised:
        MuLaNRecipe.load(path)
    assert str(path) in str(raised.value)


def test_mistakes_in_json_and_in_files(tmp_path):
    with pytest.raises(ValueError, match="'lr' is given twice"):
        MuLaNRecipe.load(written(tmp_path, '{"training": {"lr": 1, "lr": 2}}', 'recipe.json'))
    with pytest.raises(ValueError, match='cannot be read'):
        MuLaNRecipe.load(written(tmp_path, '{"training": ', 'recipe.json'))
    with pytest.raises(FileNotFoundError, match='no recipe at .*none.yaml'):
        MuLaNRecipe.load(tmp_path / 'none.yaml')
    with pytest.raises(ValueError, match='must end in .yaml, .yml or .json'):
        MuLaNRecipe.load(written(tmp_path, '', 'recipe.toml'))
    (tmp_path / 'latin.yaml').write_bytes(b'a: \xe9')
    with pytest.raises(ValueError, match='not UTF-8'):
        MuLaNRecipe.load(tmp_path / 'latin.yaml')


def test_mistakes_that_a_constructor_finds_name_the_section(tmp_path):
    path = written(tmp_path, 'audio: {dim: 30}')
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, section 'audio': dim must be a multiple of 4"):
        MuLaNRecipe.load(path).build_model()


def test_a_made_recipe_is_checked_too():
    with pytest.raises(ValueError, match="the recipe: unknown key 'sed'"):
        MuLaNRecipe(training=dict(sed=1))
    with pytest.raises(TypeError, match=r'training.lr must be float'):
        MuLaNRecipe.default().updated(training=dict(lr='fast'))


@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.name)
def test_examples_train(path, tmp_path):
    recipe = MuLaNRecipe.load(path).updated(
        data=dict(synthetic_length=8, synthetic_valid_length=4, max_seconds=1.0),
        training=dict(batch_size=4, grad_cache_chunk_size=2, num_train_steps=1, progress=False),
    )
    mulan = recipe.build_model()
    data, held_out = (recipe.open_data('synthetic', mulan, training=training) for training in (True, False))
    trainer = recipe.build_trainer(mulan, data, valid_dataset=held_out, results_folder=tmp_path / 'out')
    assert torch.isfinite(torch.tensor(trainer.train(**recipe.train_keywords)['valid_loss']))


def test_values_that_are_shared_may_be_given_anew(tmp_path):
    text = 'audio: &tower {dim: 32, depth: 1}\ntext: {<<: *tower, depth: 2}'
    recipe = MuLaNRecipe.load(written(tmp_path, text))
    assert recipe.audio['depth'] == 1
    assert recipe.text == dict(dim=32, depth=2)
    with pytest.raises(ValueError, match="'depth' is given twice"):
        MuLaNRecipe.load(written(tmp_path, text.replace('depth: 2', 'depth: 2, depth: 3')))


def test_model_of_another_place_is_described_by_a_recipe(tmp_path):
    mulan = MuLaNRecipe.load(written(tmp_path, TINY)).build_model()
    recipe = MuLaNRecipe.default().with_model_of(mulan)
    again = MuLaNRecipe.load(recipe.save(tmp_path)).build_model()
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in mulan.state_dict().items()
    }
    assert again.audio.config | dict(patch_size=0) == mulan.audio.config | dict(patch_size=0)


# ---- data ----


def test_data_of_every_kind_is_told_apart(music, tmp_path):
    keywords = dict(sample_rate=8000, max_seconds=0.5)
    (tmp_path / 'list.jsonl').write_text('{"audio": "music/0.wav", "caption": "a"}')
    (tmp_path / 'caps.csv').write_text('ytid,start_s,end_s,caption\nabcdefghijk,0,1,a song\n')
    (music / '0.wav').rename(tmp_path / 'abcdefghijk.wav')
    write_shards(list_folder(music), tmp_path / 'shards')
    (tmp_path / 'list.jsonl').write_text('{"audio": "music/1.wav", "caption": "a"}')
    assert len(open_pairs(music, **keywords)) == 2
    assert len(open_pairs(tmp_path / 'list.jsonl', **keywords)) == 1
    assert open_pairs(tmp_path / 'caps.csv', audio_folder=tmp_path, **keywords)[0]['caption'] == 'a song'
    shards = open_pairs(tmp_path / 'shards', training=False, **keywords)
    assert isinstance(shards, ShardedAudioText)
    assert (shards.total, shards.training) == (2, False)
    tars = open_pairs(str(next((tmp_path / 'shards').glob('*.tar'))), **keywords)
    assert isinstance(tars, ShardedAudioText)
    held_out = open_pairs('synthetic', training=False, sample_rate=8000, synthetic_valid_length=3)
    assert isinstance(held_out, SyntheticMusic)
    assert (len(held_out), held_out.split, held_out.seconds) == (3, 'valid', 10.0)
    with pytest.raises(FileNotFoundError, match='no folder, manifest or shards at nowhere'):
        open_pairs('nowhere', **keywords)
    with pytest.raises(ValueError, match='no length of its own'):
        open_pairs('synthetic', sample_rate=8000, max_seconds=None)
