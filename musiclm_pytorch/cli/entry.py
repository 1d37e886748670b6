"""The command `musiclm`. A subcommand is a function that declares its options and names the one that does its work."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

from musiclm_pytorch.cli.app import app
from musiclm_pytorch.cli.data import shard, tokens
from musiclm_pytorch.cli.evaluate import compare, evaluate
from musiclm_pytorch.cli.generate import discard_output, generate, infill, stream
from musiclm_pytorch.cli.options import split_fields
from musiclm_pytorch.cli.parser import Parser, complete
from musiclm_pytorch.cli.parts import assemble, recipes
from musiclm_pytorch.cli.search import index, search
from musiclm_pytorch.cli.serve import serve
from musiclm_pytorch.cli.training import train
from musiclm_pytorch.version import __version__


def run() -> NoReturn:
    """Be the process of the command, and end it with its exit code.

    It is left at once when threads have ended and what was registered for its end is done, as processes of
    multiprocessing are: to take down what torch has loaded takes another 0.4 s, and with its build for CUDA, whose
    libraries are read for it, 130 MB.
    """
    code = main()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    0: done. 2: something is wrong with what was given. 1: the file system refuses (a full disk, no permission), memory
    does not suffice, or another process writes into the same folder. 130, 143, 129: SIGINT, SIGTERM or SIGHUP. Each
    error is told in a line on stderr.
    """
    options = read(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    with ended_by_signals() as signals:
        try:
            with alone_in_output(options), contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
                facts = options.run(options)
            if options.json and facts is not None:
                print(as_json(facts))
            flush_output()
        except user_errors() as error:
            print(f'{options.prog}: error: {" ".join(str(error).split())}', file=sys.stderr)
            return code_of(error)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            print(f'{options.prog}: error: {OUT_OF_MEMORY} ({" ".join(str(error).split())})', file=sys.stderr)
            return 1
        except KeyboardInterrupt as error:
            print(f'{options.prog}: {str(error) or "interrupted"}', file=sys.stderr)
            return 128 + (signals[0] if signals else signal.SIGINT)
    return 0


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """What a command line says. Ends the process where it is wrong, or asks for help or completion."""
    parser = Parser(prog='musiclm', description='Music and text: data, training, generation, evaluation, search.')
    parser.add_argument('--version', action='version', version=f'musiclm-pytorch {__version__}')
    subcommands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for declare in SUBCOMMANDS:
        declare(subcommands)
    complete(parser)
    try:
        words, fields = split_fields(arguments)
    except ValueError as error:
        parser.error(str(error))
    options = parser.parse_args(words)
    if fields and 'takes_fields' not in options:
        parser.error(f'{options.prog} takes no recipe, hence no --{next(iter(fields))}.…')
    options.fields = fields
    return options


@contextlib.contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, by KeyboardInterrupt; gives their numbers as they come.

    Whatever a command does when it is interrupted, it does then too. A signal that is ignored, as SIGHUP is under
    nohup, stays so. Only the main thread takes signals.
    """
    numbers, own = [], os.getpid()

    def end(number: int, frame) -> None:
        if os.getpid() != own:  # a process that was forked ends as any other
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        numbers.append(number)
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)  # shell and terminal both send it
            if callable(served := signal.getsignal(signal.SIGTERM)) and served is not end:
                served(signal.SIGTERM, frame)  # a server has its own way to end
                return
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                before[number] = handler
                signal.signal(number, end)
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def alone_in_output(options: argparse.Namespace) -> Iterator[None]:
    """Keep other writers out of the folder of --output; of the processes of one training, the first does."""
    with contextlib.ExitStack() as stack:
        if 'output' in options and 'shares_output' not in options and int(os.environ.get('RANK', 0)) == 0:
            from musiclm_pytorch.locking import only_writer

            stack.enter_context(only_writer(options.output))
        yield


def as_json(facts: dict) -> str:
    """One line, with null for what diverged."""
    try:
        return json.dumps(facts, ensure_ascii=False, default=as_plain, allow_nan=False)
    except ValueError:
        from musiclm_pytorch.atomic import valid_json

        return valid_json(facts, ensure_ascii=False, default=as_plain)


def as_plain(value: object) -> object:
    """What JSON has in place of paths, and of numbers of numpy and torch."""
    return value.item() if hasattr(value, 'item') else str(value)


def flush_output() -> None:
    """Print what waits to be printed, while a failure can still be told."""
    try:
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        raise OSError(error.errno, os.strerror(error.errno), '/dev/stdout') from error


def code_of(error: Exception) -> int:
    """1 for what does not lie in the command, 2 for what does."""
    if not isinstance(error, OSError):
        return 2
    from musiclm_pytorch.atomic import REFUSED
    from musiclm_pytorch.locking import FolderInUseError

    return 1 if error.errno in REFUSED | {errno.EPIPE} or isinstance(error, FolderInUseError) else 2


def out_of_memory(error: Exception) -> bool:
    """Whether it is Python's, that of a GPU, or what torch has no class for: too little of the main memory."""
    kinds = ('MemoryError', 'OutOfMemoryError')
    return type(error).__name__ in kinds or "can't allocate memory" in str(error)


def user_errors() -> tuple[type[Exception], ...]:
    """What is told in a line. TrainingError counts where training is loaded, which is not done for its sake."""
    loop = sys.modules.get('musiclm_pytorch.trainer.trainer')
    return OSError, ValueError, TypeError, ImportError, *([loop.TrainingError] if loop else [])


OUT_OF_MEMORY = 'out of memory; take less at once: a smaller batch, fewer or shorter pieces, or a smaller model'
SUBCOMMANDS = [shard, train, tokens, assemble, recipes, generate, infill, stream, evaluate, compare, index, search]
SUBCOMMANDS += [serve, app]
