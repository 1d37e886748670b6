"""`musiclm tokens` and `musiclm train quantizer|codec|semantic|coarse|fine`, from nothing to trained stages."""

import json
import shutil

import pytest
import torch
from helpers.recipes import CODEC
from helpers.stage_parts import make_quantizer

from musiclm_pytorch import MuLaNEmbedQuantizer
from musiclm_pytorch.audiolm.crops import TokenCrops
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.cli import main
from musiclm_pytorch.codecs import NeuralCodec
from musiclm_pytorch.trainer.stage_recipes import STAGE_RECIPES, CodecRecipe

SHORT = ['--steps', '2', '--batch-size', '2']


def run(*arguments):
    assert main([str(it) for it in arguments]) == 0


def write_config(path, **sections):
    path.write_text(json.dumps(sections))
    return path


def test_a_codec_goes_on_from_another(tmp_path, music, capsys):
    torch.manual_seed(0)
    first = NeuralCodec(
        sample_rate=16000,
        resolved_hz=1000.0,
        codebook_size=8,
        num_quantizers=3,
        dim=8,
        encoder_depth=1,
        decoder_depth=1,
        codebook_dim=8,
    )
    wave = 0.1 * torch.randn(1, 16000)
    first.fit([wave])
    save_module(first.eval(), tmp_path / 'first')
    config = write_config(
        tmp_path / 'codec.json', model=dict(kind='neural'), training=dict(seconds=0.2, valid_frac=0.4)
    )
    command = ('train', 'codec', '--data', music, '--config', config, *SHORT)
    begin = ('--begin-with', tmp_path / 'first')
    run(*command, '--output', tmp_path / 'second', *begin, '--levels', 2, '--decoder-only')
    second = load_module(tmp_path / 'second' / 'last')
    assert torch.equal(second.encode(wave), first.encode(wave)[..., :2])
    assert not torch.equal(second.decode(second.encode(wave)), first.decode(second.encode(wave)))
    run(*command, '--output', tmp_path / 'third', *begin)
    assert load_module(tmp_path / 'third' / 'last').num_quantizers == 3
    for given in (('--levels', 2), ('--decoder-only',)):
        capsys.readouterr()
        assert main([str(it) for it in (*command, '--output', tmp_path / 'none', *given)]) != 0
        assert f'{given[0]} is for a NeuralCodec that is trained: give it with --begin-with' in capsys.readouterr().err
    assert main([str(it) for it in (*command, '--output', tmp_path / 'none', '--begin-with', 'tiny')]) == 2
    assert 'a SpectralCodec is not trained step by step' in capsys.readouterr().err


def test_from_nothing_to_trained_stages(tmp_path, music, capsys):
    make_quantizer().mulan.save_pretrained(tmp_path / 'mulan')
    run(
        *('train', 'quantizer', '--mulan', tmp_path / 'mulan', '--data', music, '--output', tmp_path / 'quantizer'),
        *('--dims', 16, 16, 16, '--quantizers', 2, '--codebook-size', 2),
    )
    quantizer = MuLaNEmbedQuantizer.from_pretrained(tmp_path / 'quantizer')
    assert quantizer.is_fitted
    assert quantizer.num_codebooks == 2

    config = write_config(tmp_path / 'codec.json', model=CODEC, training=dict(seconds=0.2, valid_frac=0.4))
    run('train', 'codec', '--data', music, '--output', tmp_path / 'codec', '--config', config, *SHORT)
    assert load_module(tmp_path / 'codec' / 'last').codebook_size == 8

    command = ('train', 'tokenizer', '--mulan', tmp_path / 'mulan', '--data', music, '--output', tmp_path / 'tokenizer')
    for codes in (3, 4):  # the earlier one is kept
        run(*command, '--codebook-size', codes)
    assert 'semantic tokens, ' in capsys.readouterr().out
    assert (tmp_path / 'tokenizer.1' / 'config.json').is_file()
    tokens = tmp_path / 'tokens'
    folders = [f'--{name}' for name in ('tokenizer', 'quantizer')]
    command = ['tokens', '--data', music, '--output', tokens, '--codec', tmp_path / 'codec' / 'last']
    run(*command, *(it for name in folders for it in (name, tmp_path / name[2:])))
    assert len(TokenCrops(tokens, 'coarse', seconds=0.2)) == 3

    more = shutil.copytree(tokens, tmp_path / 'more')
    for stage in STAGE_RECIPES:
        model = dict(dim=16, depth=1, heads=2, **({} if stage == 'semantic' else dict(num_coarse_quantizers=2)))
        config = write_config(tmp_path / f'{stage}.json', model=model, training=dict(seconds=0.2, valid_frac=0.4))
        arguments = [
            '--tokens',
            tokens,
            more,
            '--quantizer',
            tmp_path / 'quantizer',
            '--output',
            tmp_path / stage,
            *SHORT,
        ]
        run('train', stage, '--config', config, *arguments)
        assert load_module(tmp_path / stage / 'last').has_condition
        out = capsys.readouterr().out
        assert '2 steps done' in out
        assert 'valid loss' in out
    run('train', 'fine', *arguments, '--resume', '--steps', '3')
    assert 'going on from step 2' in capsys.readouterr().out
    assert json.loads((tmp_path / 'fine' / 'recipe.json').read_text())['model']['dim'] == 16


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['train', 'fine', '--tokens', 'none', '--output', 'out'], 'no codec tokens in none'),
        (['tokens', '--data', 'synthetic', '--output', 'out'], 'give at least one of --tokenizer'),
        (['train', 'quantizer', '--mulan', 'none', '--data', 'synthetic', '--output', 'out'], 'no config.json in none'),
    ],
)
def test_errors_in_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('sections', 'message'),
    [
        (dict(model=dict(num_semantic_tokens=5)), 'it follows from the tokens'),
        (dict(model=dict(cond_dim=5)), 'it follows from --quantizer'),
        (dict(training=dict(tokens='x')), 'say --tokens'),
    ],
)
def test_recipes_say_what_is_wrong(sections, message):
    with pytest.raises(ValueError, match=message):
        STAGE_RECIPES['semantic'](**sections)


@pytest.mark.parametrize('kind', [*STAGE_RECIPES.values(), CodecRecipe])
def test_a_recipe_that_was_saved_is_the_same(kind, tmp_path):
    recipe = kind.default().updated(training=dict(lr=1e-3, num_epochs=2))
    assert 'num_train_steps' not in recipe.training
    assert kind.load(recipe.save(tmp_path)) == recipe
