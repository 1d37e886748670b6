"""A server that leaves no request without an answer when it is told to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI


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
