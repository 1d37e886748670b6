"""`musiclm serve`: a model over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from functools import partial
from typing import Any

from musiclm_pytorch.cli.options import SHIPPED, add_model, add_place, command, option, place_of

# the fields of ServiceConfig, which is not loaded for `--help`; a test compares the defaults
LIMITS = {
    'max-requests': (64, 'requests in progress at once; one more is answered 503'),
    'timeout': (120.0, 'seconds that a body may take to arrive, and its answer from then on'),
    'max-body-bytes': (32 * 2**20, 'size of a request'),
    'max-texts': (256, 'texts in a request'),
    'max-text-chars': (2000, 'characters of a text'),
    'max-files': (16, 'sound files in a request'),
    'max-audio-seconds': (600.0, 'length of the sound files of a request together'),
    'max-pieces': (8, 'pieces of music in a request'),
    'max-seconds': (30.0, 'length of a piece of music'),
    'max-streams': (2, 'streams of music that play at once'),
}


def serve(subcommands) -> None:
    """`musiclm serve`: embed, rank, generate over HTTP."""
    parser = command(
        subcommands,
        'serve',
        run_serve,
        'embed, rank and make music over HTTP',
        'Serve a model over HTTP: POST /embed, /rank and /generate, GET /stream, / and /health. A MuLaN alone makes no '
        'music. There are no users and no encryption: beyond this machine, put a proxy in front.',
        facts=False,
    )
    add_model(parser, f'a folder of a MusicLM or of a MuLaN, or {SHIPPED}')
    option(parser, '--host', metavar='HOST', default='127.0.0.1', help='address to listen at')
    option(parser, '--port', metavar='N', default=8000, help='0 takes a free one')
    what = 'processes that serve, each with a model, a share of the cores and limits of its own'
    option(parser, '--workers', metavar='N', default=1, help=what)
    add_place(parser)
    limits = parser.add_argument_group('limits')
    for name, (default, what) in LIMITS.items():
        option(limits, f'--{name}', metavar='S' if isinstance(default, float) else 'N', default=default, help=what)


def run_serve(options: argparse.Namespace) -> None:
    if not 0 <= options.port < 2**16:
        raise ValueError(f'--port must lie between 0 and 65535, got {options.port}')
    if options.workers < 1:
        raise ValueError(f'--workers must be at least 1, got {options.workers}')

    from musiclm_pytorch.checks import check_device
    from musiclm_pytorch.inference.service.config import ServiceConfig
    from musiclm_pytorch.inference.service.creation import create_service, require

    require('fastapi', 'python_multipart', 'uvicorn')
    names = [name.replace('-', '_') for name in LIMITS]
    config = ServiceConfig(**{name: getattr(options, name) for name in names})
    check_device(options.device)
    load = partial(load_model, options.model, **place_of(options))
    if options.workers > 1:
        from musiclm_pytorch.inference.service.workers import serve_together

        serve_together(load, config, options.workers, host=options.host, port=options.port)
        return
    app = create_service(load(), config)

    from musiclm_pytorch.inference.service.server import Server

    with contextlib.suppress(KeyboardInterrupt):  # the signals that it has ended by, once more
        Server(app, host=options.host, port=options.port).run()


def load_model(folder: str, dtype: Any, **place: Any):
    """The MusicLM or the MuLaN in a folder, or the model of that name that ships; 'auto' says nothing to a MuLaN."""
    from musiclm_pytorch.mulan.checkpoint import saved_kind
    from musiclm_pytorch.mulan.model import MuLaN
    from musiclm_pytorch.mulan.vocabulary import PromptWarning
    from musiclm_pytorch.musiclm import MusicLM
    from musiclm_pytorch.pretrained import find_pretrained

    warnings.simplefilter('ignore', PromptWarning)  # who asked is told in the answer
    folder = find_pretrained(folder)
    if saved_kind(folder) == 'MusicLM':
        return MusicLM.from_pretrained(folder, dtype=dtype, **place)
    return MuLaN.from_pretrained(folder, dtype=None if dtype == 'auto' else dtype, **place)
