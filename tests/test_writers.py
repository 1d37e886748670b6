"""Commands that write: two of them in one folder, full disks, folders without permission, and signals."""

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.files import largest_file
from helpers.recipes import SHORT, written
from helpers.stage_parts import compute
from helpers.training import trainer

import musiclm_pytorch
from musiclm_pytorch import MusicLM, atomic
from musiclm_pytorch.cli import main
from musiclm_pytorch.locking import FolderInUseError, first_use, only_writer
from musiclm_pytorch.trainer.folders import holds_something

TINY = Path(musiclm_pytorch.__file__).parent / 'pretrained' / 'tiny'
WAITS = 60  # seconds after which a test gives up on what hangs
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

# a writer that has a process of its own, as one that reads data, and says when it is in
WRITER = """
import os, signal, sys, time
from musiclm_pytorch.locking import only_writer
with only_writer(sys.argv[1]):
    if os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""

# a process that has something compiled, twice, and tells when it began and ended the first time
COMPILER = """
import sys, time
from musiclm_pytorch.locking import first_use
@first_use('something')
def compiled(seconds):
    began = time.monotonic()
    with first_use('within'):
        time.sleep(seconds)
    print(began, time.monotonic(), flush=True)
compiled(float(sys.argv[1]))
compiled(0)
"""


def left_in(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@contextmanager
def writer(folder):
    """The number of a process that writes into a folder, and what kills it, but not its children."""
    with subprocess.Popen([sys.executable, '-c', WRITER, folder], stdout=subprocess.PIPE, start_new_session=True) as it:
        try:
            assert int(it.stdout.readline()) == it.pid
            yield it
        finally:
            os.killpg(it.pid, signal.SIGKILL)


@contextmanager
def no_permission(folder):
    """Nobody may write into a folder: of root, that takes a capability away."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, before) == 0
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE of what is in effect
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
        folder.chmod(mode)


# ---- two in one folder ----


def test_a_second_writer_is_refused_until_the_first_one_ends_however(tmp_path):
    folder = tmp_path / 'not' / 'there' / 'out'
    with writer(folder) as first:
        (tmp_path / 'link').symlink_to(folder)
        for path in (folder, tmp_path / 'link', folder / '..' / 'out'):
            with pytest.raises(FolderInUseError) as refused, only_writer(path):
                pass
            told = f'{folder} is being written by process {first.pid} on {os.uname().nodename} since 20'
            assert str(refused.value).startswith(told)
            assert '(-c ' in str(refused.value)
        with only_writer(folder.with_name('other')):
            pass
        first.kill()  # its child lives on
        first.wait()
        with only_writer(folder):
            assert [path.name for path in folder.parent.iterdir()] == ['.out.lock']
        assert not list(folder.parent.iterdir())
    with only_writer(tmp_path / 'new' / 'out'):
        pass
    assert not (tmp_path / 'new').exists()


def test_a_writer_may_go_on_within_itself_and_rename_the_folder(tmp_path):
    refused = []

    def other():
        try:
            with only_writer(tmp_path / 'out'):
                pass
        except FolderInUseError as error:
            refused.append(str(error))

    with only_writer(tmp_path / 'out'), only_writer(tmp_path / 'out'):
        (tmp_path / 'out').mkdir()
        (tmp_path / 'out').rename(tmp_path / 'out.1')
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f'process {os.getpid()} ' in refused[0]
    assert [path.name for path in tmp_path.iterdir()] == ['out.1']


def test_the_lock_lies_within_where_nothing_may_be_written_beside(tmp_path):
    folder = tmp_path / 'home' / 'out'
    folder.mkdir(parents=True)
    with no_permission(folder.parent), only_writer(folder):
        assert not holds_something(folder)
        assert [path.name for path in folder.iterdir()] == ['.lock']
    assert not list(folder.iterdir())
    refused = pytest.raises(PermissionError, match='denied: .*new')
    with no_permission(folder.parent), refused, only_writer(folder.parent / 'new'):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, 'flock', none)
    with only_writer(tmp_path / 'out'):
        assert 'has no locks' in caplog.text


def test_trainers_and_tokens_let_one_writer_in(tmp_path):
    """Called from a script, as from the command line. Another process may compute other tokens at the same time."""
    run = trainer(tmp_path / 'results')
    with writer(tmp_path / 'results'), pytest.raises(FolderInUseError, match='results is being written by process'):
        run.train(num_train_steps=1, with_validation=False)
    assert not (tmp_path / 'results').exists()
    with writer(tmp_path / 'tokens' / 'semantic'):
        with pytest.raises(FolderInUseError, match='semantic is being written by process'):
            compute(tmp_path / 'tokens')
        compute(tmp_path / 'tokens', tokenizer=None)
    assert not list((tmp_path / 'tokens' / 'codec').glob('.*'))


COMMANDS = {
    'shard': 'shard {music} --shard-size 2',
    'index': 'index {music} --window 1 --overwrite',
    'evaluate': 'evaluate --generated {music} --overwrite --players 1',
    'compare': 'compare a={report} b={report} --overwrite',
    'generate': 'generate organ --seconds 0.5 --overwrite',
    'assemble': 'assemble {tiny}',
    'quantizer': 'train quantizer --mulan {tiny}/quantizer/mulan --data {music} --codebook-size 2 --quantizers 1',
    'tokenizer': 'train tokenizer --mulan {tiny}/quantizer/mulan --data {music} --codebook-size 2',
    'tokens': 'tokens --data {music} --codec {tiny}/codec',
}
MOVES_ASIDE = ('assemble', 'quantizer', 'tokenizer')
TRAININGS = {name: f'train {name} --data nothing' for name in ('mulan', 'codec', 'all')}
TRAININGS |= {name: f'train {name} --tokens nothing' for name in ('semantic', 'coarse', 'fine')}
TRAININGS['melody'] = 'train melody'


def words(name, output, **places):
    command = (COMMANDS | TRAININGS)[name].format(tiny=TINY, **places).split()
    return [*command, '--output', str(output)]


def test_every_command_refuses_to_be_the_second_one(tmp_path, capsys, monkeypatch):
    with writer(tmp_path / 'out') as first:
        for name in COMMANDS | TRAININGS:
            if name == 'tokens':  # each kind of which has its writer
                continue
            assert main(words(name, tmp_path / 'out', music=tmp_path, report=tmp_path)) == 1
            (told,) = capsys.readouterr().err.splitlines()
            assert f': error: {tmp_path / "out"} is being written by process {first.pid} on' in told
        # of a training of several processes, the first one locks; the others come to what else is wrong
        monkeypatch.setenv('RANK', '1')
        assert main(words('mulan', tmp_path / 'out')) == 2
    assert [path.name for path in tmp_path.iterdir()] == ['.out.lock']  # of the process that was killed


# ---- what the file system refuses, and what a signal ends ----


SLOW = ('evaluate', 'generate')


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in COMMANDS]
)
def test_what_was_there_stays_whole(name, music, tmp_path, capsys, monkeypatch):
    """On a full disk, in a folder without permission, and when a signal comes while a file is being written."""
    output, report = tmp_path / 'results' / 'out', tmp_path / 'report'
    report.mkdir()
    (report / 'report.json').write_text(json.dumps(dict(about=dict(mulan='m', seed=0, sample_rate=1, clips=1))))
    given = words(name, output, music=music, report=report)
    if name == 'assemble':  # its parts are those of a training, which takes long
        musiclm = MusicLM.from_pretrained('tiny')
        monkeypatch.setattr('musiclm_pytorch.trainer.assembly.assemble_musiclm', lambda *_, **__: musiclm)
    assert main(given) == 0
    if name in ('shard', 'tokens'):  # what is there is not written again
        shutil.rmtree(output)
        output.mkdir()
        (output / 'other').write_text('other')
    before = left_in(tmp_path)
    capsys.readouterr()
    handlers = [signal.getsignal(number) for number in CODES]

    def told_in_a_line():
        assert left_in(tmp_path) == before
        return capsys.readouterr().err.splitlines()[-1]

    with largest_file(40):
        assert main(given) == 1
    assert re.match(rf'musiclm [a-z ]+: error: .*File too large.*{tmp_path}/results', told_in_a_line())
    with no_permission(output.parent if name in MOVES_ASIDE else output / 'codec' if name == 'tokens' else output):
        assert main(given) == 1
    assert re.match(rf'musiclm [a-z ]+: error: .*Permission denied.*{tmp_path}/results', told_in_a_line())
    for number, code in CODES.items():
        # the content is there, under a name aside
        monkeypatch.setattr(atomic, 'sync', lambda path, number=number: os.kill(os.getpid(), number))
        assert main(given) == code
        assert re.fullmatch('musiclm [a-z ]+: interrupted', told_in_a_line())
    assert [signal.getsignal(number) for number in CODES] == handlers


def test_nohup_keeps_a_command_from_ending(music, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, 'sync', lambda path: synced.append(os.kill(os.getpid(), signal.SIGHUP)))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(words('shard', tmp_path / 'out', music=music)) == 0
        assert synced
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_full_output_is_told(capsys, monkeypatch):
    """/dev/full takes nothing."""
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr(sys, 'stdout', full)
        assert main(['recipes']) == 1
    assert capsys.readouterr().err == "musiclm recipes: error: [Errno 28] No space left on device: '/dev/stdout'\n"


@pytest.mark.slow
def test_signals_end_real_processes(music, tmp_path):
    """In the middle of work, sent to all of the group, as a terminal does: nothing is left that is not whole."""
    many = tmp_path / 'many'
    many.mkdir()
    for index in range(500):
        for suffix in ('wav', 'txt'):
            (many / f'{index}.{suffix}').symlink_to(music / f'0.{suffix}')
    endless = ['--steps', 100000, '--validate-every', 100000, '--checkpoint-every', 100000, '--workers', 1]
    training = ['--data', 'synthetic', '--config', written(tmp_path, SHORT), *endless]
    given = {
        signal.SIGTERM: ['shard', many, '--shard-size', 2, '-o', tmp_path / 'shards'],
        signal.SIGINT: ['train', 'mulan', *training, '--output', tmp_path / 'run'],
        signal.SIGHUP: ['generate', *['a flute'] * 50, '--seconds', 0.5, '-o', tmp_path / 'pieces'],
    }
    running = {
        number: subprocess.Popen(
            [sys.executable, '-u', '-m', 'musiclm_pytorch.cli', *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        for number, words in given.items()
    }
    told = {}
    for number, process in running.items():
        if number == signal.SIGINT:  # training prints nothing before its end
            while not (tmp_path / 'run' / 'metrics.jsonl').exists():
                assert process.poll() is None
                time.sleep(0.05)
        else:
            assert process.stdout.readline()  # of the first shard, the first piece
        os.killpg(process.pid, number)
        told[number] = process.communicate(timeout=WAITS)[1]
        assert process.returncode == CODES[number], told[number]
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert told[signal.SIGTERM] == 'musiclm shard: interrupted\n'
    (stopped,) = re.findall(r'stopped by SIGINT at step (\d+) of 100000, with a checkpoint', told[signal.SIGINT])
    assert 'Traceback' not in told[signal.SIGINT]
    assert [path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()] == [f'step-{int(stopped):09d}']
    done = re.fullmatch(
        r'musiclm generate: interrupted; (\d+) of 50 pieces are done, on the page in .*\n', told[signal.SIGHUP]
    )
    assert 1 <= int(done[1]) < 50
    assert not [*tmp_path.rglob('.*')]
    left = json.loads((tmp_path / 'shards' / 'index.json').read_text())
    assert 0 < len(left['shards']) < 250
    assert not left['complete']


def compilers(seconds, cache):
    environment = os.environ | dict(XDG_CACHE_HOME=str(cache))
    commands = [[sys.executable, '-c', COMPILER, str(it)] for it in seconds]
    return [subprocess.Popen(it, env=environment, stdout=subprocess.PIPE, text=True) for it in commands]


def test_one_process_compiles_at_a_time(tmp_path):
    """Or else the files that numba keeps may not fit each other, and crash every later process."""
    processes = compilers([0.4] * 3, tmp_path)
    told = [it.communicate(timeout=WAITS)[0].splitlines() for it in processes]
    times = [[tuple(map(float, line.split())) for line in lines] for lines in told]
    assert [it.returncode for it in processes] == [0] * 3
    first = sorted(it[0] for it in times)
    assert all(end <= began for (_, end), (began, _) in pairwise(first))
    assert {len(it) for it in times} == {2}


def test_who_dies_while_it_compiles_holds_nobody_up(tmp_path):
    (dying,) = compilers([WAITS], tmp_path)
    lock = tmp_path / 'musiclm-pytorch' / 'compiling.lock'
    while not lock.exists():
        assert dying.poll() is None
    dying.kill()
    (other,) = compilers([0], tmp_path)
    assert len(other.communicate(timeout=WAITS)[0].splitlines()) == 2
    dying.communicate()


def test_without_a_place_for_a_lock_it_compiles_all_the_same(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    for name in ('XDG_CACHE_HOME', 'TMPDIR'):
        monkeypatch.setenv(name, str(tmp_path / 'file'))
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'file'))
    with first_use('something else'):
        pass
    with pytest.raises(KeyError), first_use('a third'):
        raise KeyError('what goes wrong is told')
