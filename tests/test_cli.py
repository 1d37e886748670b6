"""The command `musiclm`."""

import argparse
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.sounds import ramp, write

from musiclm_pytorch import ShardedAudioText, SyntheticMusic, cli, write_shards

ROOT = Path(__file__).parents[1]


def test_shard(music, tmp_path, capsys, caplog):
    assert cli.main(['shard', str(music), '-o', str(tmp_path / 'out'), '--shard-size', '2']) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:2] == ['shard 1 of 2', 'shard 2 of 2']
    assert out.endswith(f'3 clips in 2 shards under {tmp_path / "out"}; 1 skipped\n')
    assert 'mute.wav: no caption' in caplog.text
    dataset = ShardedAudioText(tmp_path / 'out', sample_rate=8000)
    assert sorted(item['caption'] for item in dataset) == ['clip 0', 'clip 1', 'clip 2']
    # again: nothing is left to do; for a program
    assert cli.main(['shard', str(music), '-o', str(tmp_path / 'out'), '--shard-size', '2', '--json']) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert printed.err.startswith('3 clips in 2 shards')
    assert dict(clips=3, shards=2, output=str(tmp_path / 'out')).items() <= facts.items()
    assert 'mute.wav' in json.dumps(facts['skipped'])


def test_shard_of_musiccaps(tmp_path):
    write(tmp_path / 'audio' / 'abcdefghijk.wav', ramp(1), caption=None)
    (tmp_path / 'm.csv').write_text('ytid,start_s,end_s,caption\nabcdefghijk,30,40,a song\n')
    command = f'shard {tmp_path}/m.csv --audio-folder {tmp_path}/audio -o {tmp_path}/out'
    assert cli.main(command.split()) == 0
    assert json.loads((tmp_path / 'out' / 'index.json').read_text())['shards'][0]['samples'] == 1


def test_generated_music_is_packed_as_it_is_made(tmp_path, capsys):
    folder = str(tmp_path / 'out')
    command = ['shard', 'synthetic', '-o', folder, '--clips', '3', '--seconds', '1', '--sample-rate', '8000']
    assert cli.main([*command, '--seed', '5', '--split', 'valid']) == 0
    made = SyntheticMusic(3, seed=5, seconds=1.0, sample_rate=8000, split='valid')
    items = {it['caption']: it['wave'] for it in ShardedAudioText(folder, sample_rate=8000, training=False)}
    assert items.keys() == {made.text(index) for index in range(3)}
    for wave, text in made:
        torch.testing.assert_close(items[text], wave, atol=2**-15, rtol=0)  # 16 bits
    assert cli.main([*command, '--seed', '6', '--split', 'valid']) == 2
    assert 'holds shards of other clips' in capsys.readouterr().err


def test_a_clip_that_a_sound_font_is_silent_in_is_left_out(tmp_path, caplog):
    class Silent(SyntheticMusic):
        def captions(self, index):
            return [f'{index}', f'{index} again']

        def __getitem__(self, index):
            if index == 1:
                raise ValueError('few.sf2 plays nothing of it')
            return super().__getitem__(index)

    index = write_shards(Silent(3, seconds=1.0, sample_rate=8000), tmp_path)
    assert index['skipped'] == {'item 1': 'few.sf2 plays nothing of it'}
    found = {it['caption'] for epoch in range(12) for it in epochs_of(tmp_path, epoch)}
    assert found == {'0', '0 again', '2', '2 again'}


def epochs_of(folder, epoch):
    shards = ShardedAudioText(folder, sample_rate=8000)
    shards.set_epoch(epoch)
    return shards


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (
            ['{here}/music', '-o', '{here}/out', '--clips', '3', '--sound-font', 'a'],
            'error: --clips, --sound-font: files have',
        ),
        (
            ['scores', '-o', '{here}/out', '--everyday', '0.3'],
            'error: "scores" has captions of its own; --everyday is of',
        ),
        (['synthetic', '-o', '{here}/out', '--sound-font', 'a.sf2'], 'error: no sound font is at a.sf2'),
        (['{here}/none.csv', '-o', '{here}/out'], 'musiclm shard: error: no manifest at .*none.csv'),
        (['{here}/music', '-o', '{here}/out', '--shard-size', '0'], 'error: shard_size must be greater than 0, got 0'),
        (['{here}/music', '-o', '{here}/music/0.wav'], 'error: .*0.wav'),
    ],
)
def test_errors_are_one_line_and_exit_code_2(music, tmp_path, capsys, arguments, says):
    assert cli.main(['shard', *(argument.format(here=tmp_path) for argument in arguments)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if 'skipped' not in line]
    assert len(errors) == 1
    assert re.search(says, errors[0])


def test_missing_extra_is_one_line(music, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'webdataset', None)
    assert cli.main(['shard', str(music), '-o', str(tmp_path / 'out')]) == 2
    assert "pip install '.[shards]'" in capsys.readouterr().err


@pytest.mark.parametrize('device', ['tpu', 'cuda:99', 'xpu'])
def test_a_device_that_is_not_there_is_one_line(device, tmp_path, capsys):
    assert cli.main(['generate', 'a slow melody', '--device', device, '-o', str(tmp_path / 'out')]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.match(f"musiclm generate: error: .*'{device}'.*pass (one|another)", error)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('line', 'says'),
    [
        ('', 'musiclm: error: the following arguments are required: COMMAND; musiclm --help'),
        ('generat', "musiclm: error: .* COMMAND: invalid choice: 'generat' .*; generat: did you mean generate\\?"),
        ('train mulann', 'musiclm train: error: .*; mulann: did you mean mulan\\?; musiclm train --help tells'),
        ('shard', 'musiclm shard: error: the following arguments are required: SOURCE, -o/--output; musiclm shard --h'),
        ('shard x -o y --shard-size many', "musiclm shard: error: argument --shard-size: invalid int value: 'many'"),
        ('shard x -o y --shard-sise=2', 'unrecognized arguments: --shard-sise=2; .* did you mean --shard-size'),
        # the option that is missing is the one that was misspelt
        ('generate a --ouput out', 'required: -o/--output; --ouput: did you mean --output\\?'),
        ('generate a -o out --dtype float16', "invalid choice: 'float16' .*; float16: did you mean bfloat16\\?"),
        ('generate a -o out --xyzzy 3 --num 2', 'unrecognized arguments: --xyzzy 3|--xyzzy; musiclm generate --help'),
        ('search --training.lr 3 index', 'musiclm: error: musiclm search takes no recipe, hence no --training'),
        ('train mulan --data x --output y --steps 1 --epochs 1', 'argument --epochs: not allowed with argument --step'),
        ('train mulan --data x --output y --training.use_ema --lr 1', '--training.use_ema needs a value'),
        ('train mulan --data x --output y --training.betas [1', "--training.betas '\\[1' cannot be read"),
        ('train all --a.b 1 --a.b.c.d 2', "--a.b.c.d '2' cannot be read"),
    ],
)
def test_wrong_usage_is_one_line_with_what_was_meant(line, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(says, error), error


@pytest.mark.parametrize(
    ('line', 'next_words'),
    [
        ('musiclm gen', {'generate'}),
        ('musiclm infill a.wav --st', {'--start'}),
        ('musiclm train mulan --pre', {'--precision'}),
        ('musiclm train mulan --config mulan_', {'mulan_small'}),
        ('musiclm stream --model ti', {'tiny'}),
        ('musiclm train all --semantic.training.warm', {'--semantic.training.warmup_steps'}),
    ],
)
def test_shells_complete_it(line, next_words, tmp_path):
    asks = dict(_ARGCOMPLETE='1', _ARGCOMPLETE_IFS=' ', _ARGCOMPLETE_STDOUT_FILENAME=str(tmp_path / 'words'))
    asks |= dict(COMP_LINE=line, COMP_POINT=str(len(line)))
    if (child := os.fork()) == 0:  # the command ends the process that the shell asks in
        os.environ.update(asks)
        cli.main([])
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert set((tmp_path / 'words').read_text().split()) == next_words


def test_every_option_has_help(monkeypatch):
    parsers = []
    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(
        argparse.ArgumentParser,
        'parse_args',
        lambda self, *a: parsers.append(self) or original(self, ['--version']),
    )
    with pytest.raises(SystemExit):
        cli.main([])
    commands = dict(parsers_below(parsers[0]))
    words = 'shard tokens assemble recipes train generate infill evaluate compare index search serve stream app'
    trainings = 'mulan melody quantizer tokenizer codec semantic coarse fine all'
    assert set(commands) == {*words.split(), *(f'train {name}' for name in trainings.split())}
    for parser in commands.values():
        assert parser.description
        for action in parser._actions:
            assert action.help or action.dest == 'model', action  # the line of subcommands has none of its own
        if '--json' in parser._option_string_actions:
            assert 'dict' in str(inspect.signature(parser.get_default('run')).return_annotation)
    without = {name for name, it in commands.items() if '--json' not in it._option_string_actions}
    assert without == {'train', 'serve', 'stream', 'app'}


def parsers_below(parser, name=''):
    """Every subcommand's parser, by its words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert action._choices_actions
            assert all(it.help for it in action._choices_actions)
            for word, below in action.choices.items():
                yield f'{name} {word}'.strip(), below
                yield from parsers_below(below, f'{name} {word}'.strip())


def test_interruption_is_no_traceback(music, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr('musiclm_pytorch.data.shard_writer.write_shards', interrupt)
    assert cli.main(['shard', str(music), '-o', str(tmp_path / 'out')]) == 130
    assert 'musiclm shard: interrupted' in capsys.readouterr().err


def test_too_little_memory_is_one_line(music, tmp_path, capsys, monkeypatch):
    command = ['shard', str(music), '-o', str(tmp_path / 'out')]
    for take in (lambda *_, **__: torch.empty(10**15), lambda *_, **__: bytes(10**15)):
        monkeypatch.setattr('musiclm_pytorch.data.shard_writer.write_shards', take)
        assert cli.main(command) == 1
        (error,) = (line for line in capsys.readouterr().err.splitlines() if 'skipped' not in line)
        assert re.match('musiclm shard: error: out of memory; take less at once: a smaller batch', error)
    monkeypatch.setattr(
        'musiclm_pytorch.data.shard_writer.write_shards', lambda *_, **__: torch.ones(2) @ torch.ones(3)
    )
    with pytest.raises(RuntimeError, match='inconsistent tensor size'):  # a fault of ours is no user's
        cli.main(command)


def test_entry_point(monkeypatch):
    given = {}
    monkeypatch.setattr('setuptools.setup', lambda **keywords: given.update(keywords))
    runpy.run_path(str(ROOT / 'setup.py'))
    assert given['entry_points'] == {'console_scripts': ['musiclm = musiclm_pytorch.cli:run']}
    done = subprocess.run(
        [sys.executable, '-m', 'musiclm_pytorch.cli', '--version'], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f'musiclm-pytorch {given["version"]}\n')


@pytest.mark.parametrize(('arguments', 'code'), [(['recipes'], 0), (['search', 'a piano', '--index', 'nothere'], 2)])
def test_the_process_ends_after_all_that_is_to_be_done_at_its_end(arguments, code, tmp_path):
    """Its own end skips what takes torch down, and neither what threads do nor what waits to be printed."""
    script = """
import atexit, sys, threading, time
from musiclm_pytorch.cli import run
atexit.register(print, 'ended')
threading.Thread(target=lambda: (time.sleep(0.2), print('slept'))).start()
run()
"""
    done = subprocess.run([sys.executable, '-c', script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-2:] == ['slept', 'ended']
    assert bool(done.stderr) == (code == 2)
