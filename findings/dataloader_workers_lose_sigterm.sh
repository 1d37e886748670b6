#!/usr/bin/env bash
# torch 2.11.0: does a handler of SIGTERM that is set before a DataLoader starts hold in its workers?
#
# Expected: on Linux a worker is forked, and handlers are inherited, as signal.getsignal in the worker confirms. So a
# program that notes SIGTERM and ends after the step, as clusters want it, reads on until then.
# Seen: getsignal gives the handler in the worker, SIGUSR1 is handled there, yet SIGTERM ends the worker, and the loader
# raises "DataLoader worker (pid(s) …) exited unexpectedly" in the main process: each worker begins by setting a handler
# of its own in C, of which Python's table knows nothing. Setting the same handler again in worker_init_fn helps, but for
# the time between the fork and that call: a SIGTERM to the whole process group, as a scheduler sends it, that meets a
# worker there is lost too. Only signals that are blocked from before the fork until worker_init_fn wait.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.11.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PYTHON'
import os
import signal

import torch
from torch.utils.data import DataLoader, Dataset

print('torch', torch.__version__)
NUMBERS = [signal.SIGUSR1, signal.SIGTERM]


def note(number, frame):
    print('  handled', signal.Signals(number).name, flush=True)


class Signalled(Dataset):
    """Sends its worker a signal for each item."""

    def __len__(self):
        return len(NUMBERS)

    def __getitem__(self, index):
        number = NUMBERS[index]
        print('  signal.getsignal gives the handler of', number.name, signal.getsignal(number) is note, flush=True)
        os.kill(os.getpid(), number)
        return index


def again(worker):
    for number in NUMBERS:
        signal.signal(number, note)


def outlived(**keywords):
    """Whether the worker gives all items."""
    loader = DataLoader(Signalled(), batch_size=None, num_workers=1, multiprocessing_context='fork', **keywords)
    try:
        return len(list(loader)) == len(NUMBERS)
    except RuntimeError as error:
        print('  raised', error)
        return False


again(None)
print('set before the loader starts:')
before = outlived()
print('set again in worker_init_fn:')
after = outlived(worker_init_fn=again)
assert not before, 'SIGTERM does not end the worker any more'
assert after, 'worker_init_fn does not help any more'
PYTHON
