"""A server that leaves no request without an answer when it is told to end; and several processes that serve one model
at one port, each with a copy of it and limits of its own."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from musiclm_pytorch.checks import check_positive
from musiclm_pytorch.inference.service.config import ServiceConfig
from musiclm_pytorch.inference.service.creation import create_service

logger = logging.getLogger('uvicorn.error')

TICK = 0.2  # seconds between two looks at signals
ENDING = (signal.SIGTERM, signal.SIGINT)
spawn = multiprocessing.get_context('spawn')  # torch's threads do not survive a fork


class Server(uvicorn.Server):
    """Serves an application of `create_service`.

    The first signal ends it when the job that runs is done; those that wait are answered 503. The second one ends that
    job too, at its next step, and a third one, by Ctrl-C, does not wait for anything. `on_ready` is called when it
    takes connections.
    """

    def __init__(self, app: FastAPI, on_ready: Callable[[], None] | None = None, **config: Any):
        super().__init__(uvicorn.Config(app, **config))
        self.worker, self.signals, self.on_ready = app.state.worker, 0, on_ready

    async def serve(self, *arguments: Any, **keywords: Any) -> None:
        self.loop = asyncio.get_running_loop()
        await super().serve(*arguments, **keywords)

    async def startup(self, *arguments: Any, **keywords: Any) -> None:
        await super().startup(*arguments, **keywords)
        if self.on_ready is not None:
            self.on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1
        self.loop.call_soon_threadsafe(self.worker.stop, self.signals > 1)
        if self.signals != 2:
            super().handle_exit(sig, frame)


@dataclass(frozen=True)
class Siblings:
    """Where the other processes are: a stream is known to the one alone that plays it, and its name tells which."""

    number: int
    ports: tuple[int, ...]  # of this machine, one a process

    def port_of(self, name: str) -> int | None:
        """The port of the process that plays a stream; None if that is this one, or there is no such stream."""
        number = name.partition('.')[0]
        if not number.isdecimal() or not int(number) < len(self.ports) or int(number) == self.number:
            return None
        return self.ports[int(number)]

    @staticmethod
    def ask(port: int, path: str, body: bytes, timeout: float) -> tuple[int, bytes]:
        """The status and the content that another process answers with; ConnectionError if it has died."""
        connection = HTTPConnection('127.0.0.1', port, timeout=timeout)
        try:
            connection.request('POST', path, body, {'Content-Type': 'application/json'})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def serve_together(load: Callable[[], Any], config: ServiceConfig, count: int, *, host: str, port: int) -> None:
    """Serve until a signal ends it, as `Server` does; the system shares connections out evenly.

    A process that dies is started again, and what was not answered by then is lost.

    Args:
        load: gives the model, in each process; it can be pickled.
        config: what each process allows.
        count: of processes.
        host, port: as of uvicorn; port 0 takes a free one.

    Raises:
        OSError: the port is taken. Whatever `load` and `create_service` raise.
    """
    check_positive(workers=count)
    uvicorn.Config('')  # sets uvicorn's log up
    _bind(host, port).close()  # taken by another service, it would be shared with it
    # Sockets that do not listen keep the ports. Those that do are the processes' own: with a process its own is gone,
    # and the others get all connections.
    kept = [_bind(host, port, shared=True), *(_bind('127.0.0.1', 0, shared=True) for _ in range(count))]
    port, *ports = (it.getsockname()[1] for it in kept)
    workers = [
        _Worker(partial(_serve, load, config, host, port, Siblings(number, tuple(ports)))) for number in range(count)
    ]
    with _forwarding_signals(workers) as signals:
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.wait_until_ready(signals)
            if not signals:
                told = f'[{host}]' if ':' in host else host
                logger.info(f'{count} workers running on http://{told}:{port} (Press CTRL+C to quit)')
            _watch(workers, signals)
        finally:
            for worker in workers:
                worker.end()
            for it in kept:
                it.close()


def _watch(workers: list[_Worker], signals: list[int]) -> None:
    """Start again what dies, until all have ended because they were told to."""
    while any(worker.is_alive for worker in workers) or not signals:
        for worker in workers:
            if not (worker.is_alive or signals):
                logger.error(f'worker [{worker.process.pid}] died ({worker.process.exitcode}); another one is started')
                worker.start()
                if signals:  # just now
                    worker.send(signal.SIGTERM)
                worker.wait_until_ready(signals)
        wait([worker.process.sentinel for worker in workers if worker.is_alive], timeout=TICK)


class _Worker:
    """A process, and the one that takes its place when it has died."""

    process: BaseProcess | None = None

    def __init__(self, serve: Callable[[Connection], None]):
        self.serve = serve

    def start(self) -> None:
        self.told, tell = spawn.Pipe(duplex=False)
        self.process = spawn.Process(target=self.serve, args=(tell,))
        resource_tracker.ensure_running()  # which would unblock signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until it can take them
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        tell.close()  # so that its end is told, too

    def wait_until_ready(self, signals: list[int]) -> None:
        """Raises what kept it from serving, unless that were signals."""
        try:
            error = self.told.recv()
        except EOFError:
            self.process.join()
            died = f'worker [{self.process.pid}] died ({self.process.exitcode}) before it served'
            error = None if signals else RuntimeError(died)
        if error is not None:
            raise error

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def send(self, number: int) -> None:
        if self.is_alive:
            os.kill(self.process.pid, number)

    def end(self) -> None:
        self.send(signal.SIGTERM)
        if self.process is not None:
            self.process.join()


def _serve(
    load: Callable[[], Any], config: ServiceConfig, host: str, port: int, siblings: Siblings, tell: Connection
) -> None:
    """What one of the processes does."""
    os.setpgid(0, 0)  # Ctrl-C is for the first process, which sends it on
    for number in ENDING:
        # before it serves and, from uvicorn, when all is answered: what a thread still makes for a stream is not wanted
        signal.signal(number, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(siblings.ports)))
    try:
        app = create_service(load(), config)
        app.state.siblings = siblings
    except Exception as error:
        tell.send(error if isinstance(error, (OSError, ValueError, TypeError)) else RuntimeError(repr(error)))
        return
    places = (host, port), ('127.0.0.1', siblings.ports[siblings.number])
    Server(app, on_ready=lambda: tell.send(None)).run(sockets=[_bind(*place, shared=True) for place in places])


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _forwarding_signals(workers: list[_Worker]) -> Iterator[list[int]]:
    """Send each signal that asks for an end on to all processes; gives those that came."""
    signals = []

    def send_on(number: int, _: Any) -> None:
        signals.append(number)
        for worker in workers:
            worker.send(number)

    before = {number: signal.signal(number, send_on) for number in ENDING}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bind(host: str, port: int, shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:  # of all sockets at a port, the system chooses one for each connection
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(error.errno, os.strerror(error.errno), f'{host}:{port}') from error
    return bound
