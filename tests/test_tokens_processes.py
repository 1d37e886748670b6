"""Several processes compute the tokens of one data set; one of them is killed on the way, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.stage_parts import Clips, compute

from musiclm_pytorch.cli import main
from musiclm_pytorch.pretrained import find_pretrained

SECONDS = [0.5] * 24

# a process writes its number into a file, and takes its time for each clip
SHARE = f"""
import os, sys, time
from pathlib import Path
import torch
from helpers.stage_parts import Clips, compute

quick = Clips.__getitem__

def slow(self, index):
    time.sleep(0.1)
    return quick(self, index)

Clips.__getitem__ = slow
torch.set_num_threads(1)
folder = Path(sys.argv[1])

def compute_share(share):
    (folder / f'pid {{share[0]}}').write_text(str(os.getpid()))
    compute(folder / 'tokens', Clips({SECONDS}), share=share)
"""
LAUNCHERS = dict(
    torchrun=['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--max-restarts=1'], ray=[]
)
ENDS = dict(
    torchrun="compute_share((int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])))",
    ray='from musiclm_pytorch.distributed.on_ray import run_on_ray\nrun_on_ray(compute_share, 2)',
)
needs_ray = pytest.mark.skipif(find_spec('ray') is None, reason='ray is not installed: pip install ray')


def shards(folder):
    return sorted(folder.glob('*/*.safetensors'))


@pytest.mark.slow
@pytest.mark.parametrize('launcher', ['torchrun', pytest.param('ray', marks=needs_ray)])
def test_a_killed_process_loses_nothing(tmp_path, launcher):
    whole = tmp_path / 'whole'
    compute(whole, Clips(SECONDS))
    tokens = tmp_path / 'tokens'
    with program(tmp_path, SHARE + ENDS[launcher], *LAUNCHERS[launcher]) as running:
        while len(shards(tokens)) < 4:
            if running.poll() is not None:
                skip_if_late((tmp_path / 'log').read_text())
                raise AssertionError((tmp_path / 'log').read_text())
            time.sleep(0.01)
        killed = (tmp_path / 'pid 1').read_text()
        os.kill(int(killed), signal.SIGKILL)
        before = {it: it.stat().st_mtime_ns for it in shards(tokens)}
        assert running.wait(120) == 0
    assert (tmp_path / 'pid 1').read_text() != killed  # it was started again, by torchrun both
    assert len(before) < len(shards(whole))
    assert all(it.stat().st_mtime_ns == when for it, when in before.items())  # and went on where it was
    assert [it.read_bytes() for it in shards(tokens)] == [it.read_bytes() for it in shards(whole)]
    # one process knows the cache as its own
    compute(tokens, Clips(SECONDS))
    assert all(it.stat().st_mtime_ns == when for it, when in before.items())


@contextmanager
def program(folder, code, *launcher):
    """A program of this code, running, with the folder for its argument."""
    path = folder / 'program.py'
    path.write_text(code)
    places = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, *launcher, str(path), str(folder)]
    with (folder / 'log').open('w') as log:
        running = subprocess.Popen(command, env={**os.environ, 'PYTHONPATH': places}, stderr=log)
    try:
        yield running
    finally:
        running.terminate()
        running.wait()


def skip_if_late(told):
    """Ray gives up where its own processes are not up within some seconds, as on a machine that is busy otherwise."""
    if 'timed out during startup' in told:
        pytest.skip('Ray did not start in time')


FAULTS = """
import os, signal, sys
from pathlib import Path
from musiclm_pytorch.distributed.on_ray import run_on_ray

FOLDER = Path(sys.argv[1])  # which goes to the processes with the functions: their arguments are Ray's

def fail(share):
    if share[0] == 1:
        raise FileNotFoundError('no such clip')
    signal.pause()

def die(share):
    (FOLDER / f'tried by {os.getpid()}').touch()
    os.kill(os.getpid(), signal.SIGKILL)

for job, processes in ((fail, 2), (die, 1), (fail, 10_000)):
    try:
        run_on_ray(job, processes)
    except Exception as error:
        print(type(error).__name__, error, file=open(FOLDER / 'told', 'a'))
"""


@pytest.mark.slow
@needs_ray
def test_what_no_process_of_ray_can_do_is_told(tmp_path):
    """An error comes up at once though others go on; a share that kills its process is not tried for ever."""
    with program(tmp_path, FAULTS) as running:
        assert running.wait(300) == 0
    skip_if_late((tmp_path / 'told').read_text())
    error, death, too_many = (tmp_path / 'told').read_text().splitlines()
    assert error == 'FileNotFoundError no such clip'
    assert death.startswith('RuntimeError the process of a share died 4 times')
    assert len(list(tmp_path.glob('tried by *'))) == 4
    assert 'ValueError Ray has ' in too_many
    assert too_many.endswith('too few for 10000 processes that need one each')


@pytest.mark.slow
@needs_ray
def test_the_command_starts_ray_by_itself(tmp_path):
    """With paths from here; what came out as of the command without."""
    folder = find_pretrained('tiny') / 'codec'
    arguments = ['--data', 'synthetic', '--synthetic', '3', '1', '--codec', str(folder), '-o']
    assert main(['tokens', *arguments, str(tmp_path / 'whole')]) == 0
    command = [sys.executable, '-m', 'musiclm_pytorch.cli', 'tokens', *arguments, 'tokens', '--ray', '1', '--json']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    skip_if_late(done.stderr)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict(clips=3, output='tokens')
    assert [it.read_bytes() for it in shards(tmp_path / 'tokens')] == [
        it.read_bytes() for it in shards(tmp_path / 'whole')
    ]


def test_ray_is_asked_for_where_it_can_be_had(tmp_path, monkeypatch, capsys):
    command = ['tokens', '--data', 'synthetic', '--output', str(tmp_path), '--ray', '2']
    monkeypatch.setitem(sys.modules, 'ray', None)
    assert main(command) == 2
    assert 'tasks of Ray need ray' in (told := capsys.readouterr().err)
    assert "pip install '.[ray]'" in told
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.setenv(name, '1')
    assert main(command) == 2
    assert '--ray starts processes itself: give it without torchrun' in capsys.readouterr().err
