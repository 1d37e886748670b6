"""Several processes compute the tokens of one data set; one of them is killed on the way, and nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.stage_parts import Clips, compute

SECONDS = [0.5] * 24

# under torchrun: a process writes its number into a file, and takes its time for each clip
PROGRAM = f"""
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
folder, rank = Path(sys.argv[1]), int(os.environ['RANK'])
(folder / f'pid {{rank}}').write_text(str(os.getpid()))
compute(folder / 'tokens', Clips({SECONDS}), share=(rank, int(os.environ['WORLD_SIZE'])))
"""


def shards(folder):
    return sorted(folder.glob('*/*.safetensors'))


@pytest.mark.slow
def test_a_killed_process_loses_nothing(tmp_path):
    whole = tmp_path / 'whole'
    compute(whole, Clips(SECONDS))
    tokens, path = tmp_path / 'tokens', os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '--max-restarts=1']
    program = tmp_path / 'program.py'
    program.write_text(PROGRAM)
    launcher = subprocess.Popen([*command, str(program), str(tmp_path)], env={**os.environ, 'PYTHONPATH': path})
    try:
        while len(shards(tokens)) < 4:
            assert launcher.poll() is None
            time.sleep(0.01)
        killed = (tmp_path / 'pid 1').read_text()
        os.kill(int(killed), signal.SIGKILL)
        before = {it: it.stat().st_mtime_ns for it in shards(tokens)}
        assert launcher.wait(120) == 0
    finally:
        launcher.terminate()
        launcher.wait()
    assert (tmp_path / 'pid 1').read_text() != killed  # both were started again
    assert len(before) < len(shards(whole))
    assert all(it.stat().st_mtime_ns == when for it, when in before.items())  # and went on where they were
    assert [it.read_bytes() for it in shards(tokens)] == [it.read_bytes() for it in shards(whole)]
    # one process knows the cache as its own
    compute(tokens, Clips(SECONDS))
    assert all(it.stat().st_mtime_ns == when for it, when in before.items())
