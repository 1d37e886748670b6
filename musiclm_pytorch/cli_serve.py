"""`musiclm serve`: a model over HTTP."""

from __future__ import annotations

import argparse
import json

# the options that are fields of ServiceConfig: their kind and what they mean
LIMITS = {
    'max-requests': ('N', int, 'requests in progress at once; one more is answered 503'),
    'timeout': ('S', float, 'seconds that a body may take to arrive, and its answer from then on'),
    'max-body-bytes': ('N', int, 'size of a request'),
    'max-texts': ('N', int, 'texts in a request'),
    'max-text-chars': ('N', int, 'characters of a text'),
    'max-files': ('N', int, 'sound files in a request'),
    'max-audio-seconds': ('S', float, 'length of the sound files of a request together'),
    'max-pieces': ('N', int, 'pieces of music in a request'),
    'max-seconds': ('S', float, 'length of a piece of music'),
}


def serve(subcommands) -> None:
    """`musiclm serve`: embed, rank, generate over HTTP."""
    parser = subcommands.add_parser(
        'serve',
        help='embed, rank and make music over HTTP',
        description='Serve a model over HTTP: POST /embed, /rank and /generate, GET /health. A MuLaN alone makes no '
        'music. There are no users and no encryption: beyond this machine, put a proxy in front.',
    )
    parser.add_argument(
        '--model',
        metavar='FOLDER',
        default='tiny',
        help='a folder of a MusicLM or of a MuLaN, or the name of a model that ships (default: %(default)s)',
    )
    parser.add_argument('--host', default='127.0.0.1', help='address to listen at (default: %(default)s)')
    parser.add_argument('--port', metavar='N', type=int, default=8000, help='0 takes a free one (default: %(default)s)')
    parser.add_argument('--device', default='cpu', help='such as cuda (default: %(default)s)')
    limits = parser.add_argument_group('limits')
    for name, (metavar, kind, what) in LIMITS.items():
        limits.add_argument(f'--{name}', metavar=metavar, type=kind, help=what)
    parser.set_defaults(run=run_serve, prog=parser.prog)


def run_serve(options: argparse.Namespace) -> None:
    if not 0 <= options.port < 2**16:
        raise ValueError(f'--port must lie between 0 and 65535, got {options.port}')

    from musiclm_pytorch.inference.service import ServiceConfig, create_service

    names = [name.replace('-', '_') for name in LIMITS]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    config = ServiceConfig(**given)
    app = create_service(load_model(options.model).to(options.device), config)

    import uvicorn

    uvicorn.run(app, host=options.host, port=options.port)


def load_model(folder: str):
    """The MusicLM or the MuLaN in a folder, or the model of that name that ships."""
    from musiclm_pytorch.mulan.checkpoint import CONFIG_FILE
    from musiclm_pytorch.mulan.model import MuLaN
    from musiclm_pytorch.musiclm import MusicLM
    from musiclm_pytorch.pretrained import find_pretrained

    config = find_pretrained(folder) / CONFIG_FILE
    is_musiclm = config.is_file() and json.loads(config.read_text(encoding='utf-8')).get('model') == 'MusicLM'
    return (MusicLM if is_musiclm else MuLaN).from_pretrained(config.parent)
