"""`musiclm app`: the web page that makes music."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import warnings
from pathlib import Path

from musiclm_pytorch.cli.options import add_model, add_place, command, load_musiclm, option
from musiclm_pytorch.extras import how_to_install


def app(subcommands) -> None:
    parser = command(
        subcommands,
        'app',
        run_app,
        'serve a web page that makes music',
        'Serve a web page: prompts and stories to players, spectrograms, scores and downloads, and music that plays '
        'while it is made, for which FFmpeg must be installed. It needs no network, '
        f'and one request at a time makes music. Needs {how_to_install("app")}.',
        facts=False,
    )
    add_model(parser)
    host = 'where it is served: this machine alone; 0.0.0.0 is every network of it'
    option(parser, '--host', metavar='HOST', default='127.0.0.1', help=host)
    option(parser, '--port', metavar='N', default=7860, help='of the page')
    add_place(parser)
    option(parser, '--max-seconds', metavar='S', default=30.0, help='the longest music')
    option(parser, '--max-samples', metavar='N', default=8, help='the most pieces at once')
    option(
        parser, '--max-stream-seconds', metavar='S', default=600.0, help='the longest music that plays as it is made'
    )
    share = "a public address as well, through Gradio's servers, for anyone to use"
    option(parser, '--share', action='store_true', help=share)


def run_app(options: argparse.Namespace) -> None:
    from musiclm_pytorch.inference.app import close_app, create_app, launch_app
    from musiclm_pytorch.mulan.text_transformer import PromptWarning

    warnings.simplefilter('ignore', PromptWarning)  # the page tells it
    musiclm = load_musiclm(options)
    with tempfile.TemporaryDirectory(prefix='musiclm-app-') as folder:
        os.environ.setdefault('GRADIO_TEMP_DIR', folder)  # so that what was made goes with the page
        name = Path(options.model).resolve().name  # where the folder lies concerns no visitor
        most = {key: getattr(options, key) for key in ('max_seconds', 'max_samples', 'max_stream_seconds')}
        page = create_app(musiclm, name=name, **most)
        with contextlib.suppress(KeyboardInterrupt):
            address = launch_app(page, host=options.host, port=options.port, share=options.share)
            print(f'the page is at {address} until Ctrl-C', flush=True)
            threading.Event().wait()
        close_app(page)
