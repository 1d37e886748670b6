"""Signals that end training: the first one asks for an end after the step, a second one acts at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

OUTLIVED = 60  # seconds


@dataclass
class StopRequest:
    """The number of the signal that has come; 0 if none has."""

    number: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the first of SIGINT, SIGTERM and SIGHUP in place of acting on it; the next one acts as ever.

    A signal that is ignored, as SIGHUP is under nohup, stays so. Python lets none but the main thread take signals:
    in another one, nothing is noted.
    """
    request, before = StopRequest(), {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame) -> None:
        request.number = number
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield request
    finally:
        restore()


def end_by(number: int, message: str, *, tell: bool) -> None:
    """Raise what a signal ends a program with: KeyboardInterrupt, or SystemExit with the shell's code (143, 129)."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message)
    if tell:  # nobody prints what a SystemExit says
        logger.warning('%s', message)
    raise SystemExit(128 + number)


def loaded(dataset: Dataset, **keywords: Any) -> Iterator[Any]:
    """The batches of a `DataLoader`, whose processes outlive the signals that ask for an end after the step.

    A terminal or a scheduler sends them to all processes of the run, while the step still needs those that read data.

    Args:
        dataset, **keywords: as of `torch.utils.data.DataLoader`, but for `worker_init_fn`.
    """
    loader = DataLoader(dataset, worker_init_fn=_outlive_signals, **keywords)
    # a process is at the mercy of a signal until it has handlers of its own: until then, signals wait
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(worker: int) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            # should nobody end them the usual way, they do not stay
            signal.signal(number, lambda *_: signal.alarm(OUTLIVED))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
