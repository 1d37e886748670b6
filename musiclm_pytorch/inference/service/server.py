"""A server that leaves no request without an answer when it is told to end."""

from __future__ import annotations

import asyncio
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI


class Server(uvicorn.Server):
    """Serves an application of `create_service`.

    The first signal ends it when the job that runs is done; those that wait are answered 503. The second one ends that
    job too, at its next step, and a third one, by Ctrl-C, does not wait for anything.
    """

    def __init__(self, app: FastAPI, **config: Any):
        super().__init__(uvicorn.Config(app, **config))
        self.worker, self.signals = app.state.worker, 0

    async def serve(self, *arguments: Any, **keywords: Any) -> None:
        self.loop = asyncio.get_running_loop()
        await super().serve(*arguments, **keywords)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals += 1
        self.loop.call_soon_threadsafe(self.worker.stop, self.signals > 1)
        if self.signals != 2:
            super().handle_exit(sig, frame)
