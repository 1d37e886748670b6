"""`musiclm train`: real, tiny trainings through the command."""

import json
import re

import pytest
from helpers.files import largest_file
from helpers.recipes import SHORT, run, written

from musiclm_pytorch import MuLaN
from musiclm_pytorch.cli.options import OVERRIDES
from musiclm_pytorch.trainer import recipes
from musiclm_pytorch.trainer.recipes import MuLaNRecipe


@pytest.fixture
def config(tmp_path):
    return written(tmp_path, SHORT)


def test_synthetic(config, tmp_path, capsys, curves):
    output = tmp_path / 'out'
    assert (
        run('--data', 'synthetic', '--config', config, '--output', output, '--lr', '1e-3', '--validate-every', 2) == 0
    )
    out = capsys.readouterr().out
    assert f'4 steps done; checkpoints and metrics.jsonl are in {output}' in out
    assert re.search(rf'the best model, of step [24], chosen on 6 held-out items, is in {output}/best', out)
    assert re.search(r'audio to text: R@1 .*R@5 .*R@10 .*median rank .*mAP@10', out)
    assert 'text to audio: R@1' in out
    assert (output / 'curves.png').is_file()
    assert MuLaN.from_pretrained(output / 'best').sample_rate == 8000
    recipe = json.loads((output / 'recipe.json').read_text())
    assert recipe['training']['lr'] == 1e-3
    assert recipe['audio']['dim'] == 32


def test_folder_and_fine_tuning(config, music, tmp_path, capsys):
    assert run('--data', music, '--output', tmp_path / 'a', '--config', config, '--batch-size', 2, '--epochs', 1) == 0
    assert 'steps done' in capsys.readouterr().out

    # steps too small to move the weights; the default recipe but for the model
    arguments = ['--data', music, '--valid-data', music, '--init-from', tmp_path / 'b', '--output', tmp_path / 'c']
    start = MuLaNRecipe.load(config).build_model()
    start.save_pretrained(tmp_path / 'b')
    assert run(*arguments, '--steps', 1, '--batch-size', 2, '--lr', '1e-12') == 0
    tuned = MuLaN.from_pretrained(tmp_path / 'c' / 'best').state_dict()
    assert all((tuned[name] - tensor).abs().max() < 1e-6 for name, tensor in start.state_dict().items())
    recipe = json.loads((tmp_path / 'c' / 'recipe.json').read_text())
    assert (recipe['audio']['dim'], recipe['training']['num_train_steps']) == (32, 1)
    assert 'num_epochs' not in recipe['training']


def test_overrides(config, tmp_path, monkeypatch):
    taken = {}

    class Taken(Exception):
        pass

    def build_trainer(self, *arguments, **keywords):
        taken.update(self.training)
        raise Taken

    monkeypatch.setattr(recipes.MuLaNRecipe, 'build_trainer', build_trainer)
    options = dict(
        steps=9, batch_size=6, lr=0.5, seed=8, precision='bf16', workers=1, grad_cache_chunk_size=3, validate_every=7
    )
    options |= dict(checkpoint_every=5, checkpoint_minutes=2.5, log_with='tensorboard')
    given = [word for name, value in options.items() for word in (f'--{name.replace("_", "-")}', value)]
    fields = ['--training.warmup_steps', '7', '--training.betas=[0.5, 0.75]', '--training.max_grad_norm', 'null']
    with pytest.raises(Taken):
        run('--data', 'synthetic', '--config', config, '--output', tmp_path / 'out', *given, *fields)
    assert (taken['warmup_steps'], taken['betas'], taken['max_grad_norm']) == (7, (0.5, 0.75), None)
    assert set(options) | {'epochs'} == set(OVERRIDES)
    assert {name: taken[OVERRIDES[name]] for name in options} == options


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (['--data', '{here}/none'], 'no folder, manifest or shards at .*none'),
        (['--config', '{here}/none.yaml'], 'no recipe at .*none.yaml'),
        (['--training.warmup', '5'], "command line: unknown key 'warmup' in .*'training'; did you mean 'warmup_steps'"),
        (['--audio.dim', 'wide'], r"the command line: audio.dim must be int, got 'wide' \(str\)"),
        (['--init-from', '{here}'], 'no config.json in'),
        (['--init-matching-from', '{here}'], 'no config.json in'),
        (['--init-from', '{here}', '--init-matching-from', '{here}'], 'give one of them'),
        (['--batch-size', '100'], 'the data set has 12 items, fewer than one batch of 100'),
        (['--lr', '-1'], "section 'training': lr must be greater than 0, got -1"),
        (['--lr', '1e30', '--steps', '4'], 'the loss is (nan|inf)'),
    ],
)
def test_errors_are_one_line_and_exit_code_2(config, tmp_path, capsys, arguments, says):
    given = ['--data', 'synthetic', '--config', config, '--output', tmp_path / 'out']
    assert run(*given, *(argument.format(here=tmp_path) for argument in arguments)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith('musiclm train mulan: error: ')
    assert re.search(says, errors[0])


def test_a_run_that_diverged_says_so_and_its_json_is_valid(config, tmp_path, capsys, caplog):
    given = ['--data', 'synthetic', '--config', config, '--output', tmp_path / 'out', '--training.warmup_steps', '0']
    assert run(*given, '--lr', '1e30', '--steps', '1', '--json') == 0
    printed = capsys.readouterr()
    assert f'never a number. That of the last step is in {tmp_path / "out" / "last"}' in printed.err
    texts = [printed.out, *(tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()]
    facts, *lines = [json.loads(text, parse_constant=pytest.fail) for text in texts]
    assert (facts['results']['valid_loss'], facts['best']) == (None, None)
    assert [it['loss'] for it in lines if it['part'] == 'valid'] == [None]
    assert 'the held-out loss is nan at step 1: training has diverged; lower the learning rate' in caplog.text


def test_a_command_that_fails_leaves_everything_where_it_was(config, tmp_path, capsys, caplog):
    """An argument, and a disk that is full at the first better model; then resuming goes on from the checkpoint."""
    output = tmp_path / 'out'
    common = ['--data', 'synthetic', '--config', config, '--output', output]
    assert run(*common, '--steps', 2) == 0
    capsys.readouterr()
    left = {path: path.read_bytes() for path in output.rglob('*') if path.is_file()}
    assert run(*common, '--batch-size', 100) == 2
    assert {path: path.read_bytes() for path in output.rglob('*') if path.is_file()} == left
    (output / 'best' / 'validation.json').write_text('{"step": 2, "held_out": 6, "score": -1.0}')
    capsys.readouterr()
    with largest_file(20_000):
        assert run(*common, '--resume', '--steps', 4, '--validate-every', 4) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert re.match('musiclm train mulan: error: .*[Ff]ile too large', error)
    for name in ('best/model.safetensors', 'last/model.safetensors', 'checkpoints/step-000000002/state.safetensors'):
        assert (output / name).read_bytes() == left[output / name]
    assert not list(output.rglob('*.tmp'))
    # the recipe is the one that lies in the results
    assert run('--data', 'synthetic', '--output', output, '--resume', '--steps', 4) == 0
    assert 'going on from step 2\n' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ['out']
