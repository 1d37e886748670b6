"""How the HTTP service is made. What needs FastAPI is imported when it is."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from musiclm_pytorch.extras import needing
from musiclm_pytorch.inference.optimize import OptimizedMuLaN
from musiclm_pytorch.inference.service.config import ServiceConfig
from musiclm_pytorch.mulan.model import JointEmbedding
from musiclm_pytorch.musiclm import MusicLM

if TYPE_CHECKING:
    from fastapi import FastAPI


def create_service(model: JointEmbedding | OptimizedMuLaN | MusicLM, config: ServiceConfig | None = None) -> FastAPI:
    """An application for uvicorn or another ASGI server, which embeds, ranks and, given a MusicLM, makes music.

        uvicorn.run(create_service(MusicLM.from_pretrained('tiny')))

    Nothing that is sent is written to disk. One thread runs the model.

    Raises:
        ImportError: FastAPI or python-multipart is missing. ValueError: a MuLaN that takes no sound files or no words,
            a MusicLM whose quantizer is not fitted.
    """
    require('fastapi', 'python_multipart')
    from musiclm_pytorch.inference.service.app import build

    return build(model, ServiceConfig() if config is None else config)


def require(*packages: str) -> None:
    """Raises ImportError, naming the extra, unless these are installed."""
    for package in packages:
        with needing(f'the HTTP service needs {package}', 'serve'):
            import_module(package)
