"""`musiclm serve`: a model over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from dataclasses import fields
from functools import partial
from typing import Any

from musiclm_pytorch.cli.options import SHIPPED, add_model, add_place, command, help_of, option, place_of
from musiclm_pytorch.inference.service.config import ServiceConfig
from musiclm_pytorch.trainer.config import field_docs


def serve(subcommands) -> None:
    parser = command(
        subcommands,
        'serve',
        run_serve,
        'embed, rank and make music over HTTP',
        'Serve a model over HTTP: POST /embed, /rank and /generate, GET /stream, / and /health. A MuLaN alone makes no '
        'music. There are no users and no encryption: beyond this machine, put a proxy in front.',
        facts=False,
    )
    add_model(parser, f'a folder of a MusicLM, of a MuLaN or of a CLAP, or {SHIPPED}')
    option(parser, '--host', metavar='HOST', default='127.0.0.1', help='address to listen at')
    option(parser, '--port', metavar='N', default=8000, help='0 takes a free one')
    what = 'processes that serve, each with a model, a share of the cores and limits of its own'
    option(parser, '--workers', metavar='N', default=1, help=what)
    add_place(parser)
    limits = parser.add_argument_group('limits')
    docs = field_docs(ServiceConfig)
    for field in fields(ServiceConfig):
        name, metavar = f'--{field.name.replace("_", "-")}', 'S' if isinstance(field.default, float) else 'N'
        option(limits, name, metavar=metavar, default=field.default, help=help_of(docs[field.name]))


def run_serve(options: argparse.Namespace) -> None:
    if not 0 <= options.port < 2**16:
        raise ValueError(f'--port must lie between 0 and 65535, got {options.port}')
    if options.workers < 1:
        raise ValueError(f'--workers must be at least 1, got {options.workers}')

    from musiclm_pytorch.inference.service.creation import create_service, require

    require('fastapi', 'python_multipart', 'uvicorn')
    config = ServiceConfig(**{it.name: getattr(options, it.name) for it in fields(ServiceConfig)})
    load = partial(load_model, options.model, **place_of(options))
    if options.workers > 1:
        from musiclm_pytorch.inference.service.workers import serve_together

        serve_together(load, config, options.workers, host=options.host, port=options.port)
        return
    app = create_service(load(), config)

    from musiclm_pytorch.inference.service.workers import Server

    with contextlib.suppress(KeyboardInterrupt):  # the signals that it has ended by, once more
        Server(app, host=options.host, port=options.port).run()


def load_model(folder: str, dtype: Any, **place: Any):
    """The MusicLM or the joint embedding in a folder, or of that name; 'auto' says nothing to the latter."""
    from musiclm_pytorch.mulan.checkpoint import saved_kind
    from musiclm_pytorch.mulan.pretrained import load_joint
    from musiclm_pytorch.mulan.text_transformer import PromptWarning
    from musiclm_pytorch.musiclm import MusicLM
    from musiclm_pytorch.pretrained import find_pretrained

    warnings.simplefilter('ignore', PromptWarning)  # who asked is told in the answer
    folder = find_pretrained(folder)
    if saved_kind(folder) == 'MusicLM':
        return MusicLM.from_pretrained(folder, dtype=dtype, **place)
    return load_joint(folder, dtype=None if dtype == 'auto' else dtype, **place)
