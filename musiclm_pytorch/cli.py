"""The command `musiclm`. A subcommand is a function that declares its options and names the one that does its work."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from musiclm_pytorch.cli_app import app
from musiclm_pytorch.cli_evaluate import compare, evaluate
from musiclm_pytorch.cli_generate import discard_output, generate, stream
from musiclm_pytorch.cli_parts import assemble, recipes, train_quantizer, train_tokenizer
from musiclm_pytorch.cli_play import infill, train_melody
from musiclm_pytorch.cli_search import index, search
from musiclm_pytorch.cli_serve import serve
from musiclm_pytorch.cli_training import (
    add_training_options,
    overrides_of,
    tell_best,
    tokens,
    train_all,
    train_codec,
    train_stage,
)
from musiclm_pytorch.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    0: done. 2: something is wrong with what was given. 1: the file system refuses (a full disk, no permission), or
    another process writes into the same folder. 130, 143, 129: SIGINT, SIGTERM or SIGHUP. Each error is told in a line
    on stderr.
    """
    parser = argparse.ArgumentParser(
        prog='musiclm', description='Music and text: data, training, generation, evaluation, search.'
    )
    parser.add_argument('--version', action='version', version=f'musiclm-pytorch {__version__}')
    subcommands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for declare in SUBCOMMANDS:
        declare(subcommands)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    with ended_by_signals() as signals:
        try:
            with alone_in_output(options):
                options.run(options)
            flush_output()
        except user_errors() as error:
            print(f'{options.prog}: error: {" ".join(str(error).split())}', file=sys.stderr)
            return code_of(error)
        except KeyboardInterrupt as error:
            print(f'{options.prog}: {str(error) or "interrupted"}', file=sys.stderr)
            return 128 + (signals[0] if signals else signal.SIGINT)
    return 0


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


def user_errors() -> tuple[type[Exception], ...]:
    """What is told in a line. TrainingError counts where training is loaded, which is not done for its sake."""
    loop = sys.modules.get('musiclm_pytorch.trainer.loop')
    return OSError, ValueError, TypeError, ImportError, *([loop.TrainingError] if loop else [])


def shard(subcommands) -> None:
    """`musiclm shard`: a folder, a manifest or MusicCaps to tar files."""
    parser = subcommands.add_parser(
        'shard',
        help='pack audio and captions into tar shards',
        description='Pack audio and captions into tar shards of the WebDataset format. Interrupted, the same command '
        'goes on where it was.',
    )
    parser.add_argument('source', metavar='SOURCE', help='a folder, a .csv or .jsonl manifest, or the CSV of MusicCaps')
    parser.add_argument('-o', '--output', metavar='FOLDER', required=True, help='where the shards go')
    parser.add_argument(
        '--audio-folder',
        metavar='FOLDER',
        help='where the audio of a manifest lies, if not beside it; MusicCaps needs it',
    )
    parser.add_argument(
        '--shard-size', metavar='N', type=int, default=1000, help='clips a shard (default: %(default)s)'
    )
    parser.set_defaults(run=run_shard, prog=parser.prog)


def run_shard(options: argparse.Namespace) -> None:
    from musiclm_pytorch.data.shard_writer import write_shards
    from musiclm_pytorch.data.sources import list_clips

    listing = list_clips(options.source, options.audio_folder)
    for name, reason in listing.skipped.items():
        logging.getLogger(__name__).warning('skipped %s: %s', name, reason)
    index = write_shards(
        listing,
        options.output,
        shard_size=options.shard_size,
        on_shard=lambda number, count: print(f'shard {number} of {count}', flush=True),
    )
    clips, shards = (sum(it) for it in zip(*((shard['samples'], shard['samples'] > 0) for shard in index['shards'])))
    print(f'{clips} clips in {shards} shards under {options.output}; {len(index["skipped"])} skipped')


def train(subcommands) -> None:
    """`musiclm train`: a subcommand of its own for each kind of model."""
    parser = subcommands.add_parser('train', help='train a model', description='Train a model on audio and captions.')
    models = parser.add_subparsers(dest='model', required=True, metavar='MODEL')
    for declare in TRAININGS:
        declare(models)


def train_mulan(models) -> None:
    """`musiclm train mulan`: from data and a recipe to a trained MuLaN."""
    parser = models.add_parser(
        'mulan',
        help='MuLaN, the joint embedding of music and text',
        description='Train MuLaN. Works as it is under `torchrun` and `accelerate launch` too.',
    )
    data = 'a folder, a .csv or .jsonl manifest, a folder of tar shards, the CSV of MusicCaps, "synthetic" or "scores"'
    parser.add_argument('--data', metavar='SOURCE', required=True, help=f'pairs of audio and text: {data}')
    parser.add_argument(
        '--audio-folder',
        metavar='FOLDER',
        help='where the audio of a manifest lies, if not beside it; MusicCaps needs it',
    )
    parser.add_argument(
        '--valid-data',
        metavar='SOURCE',
        help='held-out pairs, as --data (default: a share of --data; none for shards)',
    )
    parser.add_argument(
        '--valid-audio-folder', metavar='FOLDER', help='the same for --valid-data as --audio-folder for --data'
    )
    add_training_options(parser)
    parser.add_argument(
        '--init-from',
        metavar='FOLDER',
        help='start from the model in this folder, written by save_pretrained; then the sections audio, text and mulan '
        'of a recipe are not used',
    )
    parser.add_argument(
        '--init-matching-from',
        metavar='FOLDER',
        help='build the model of the recipe, and take over from the model in this folder what fits, such as one of '
        'another vocabulary; what does not is named',
    )
    parser.add_argument('--batch-size', type=int, metavar='N', help='pairs a micro-batch and process')
    parser.add_argument(
        '--grad-cache-chunk-size', type=int, metavar='N', help='pairs embedded at a time: less memory, the same step'
    )
    parser.set_defaults(run=run_train_mulan, prog=parser.prog)


def run_train_mulan(options: argparse.Namespace) -> None:
    from musiclm_pytorch.data.opening import GENERATED
    from musiclm_pytorch.mulan.model import MuLaN
    from musiclm_pytorch.trainer.batches import seed_everything
    from musiclm_pytorch.trainer.recipes import FILE, MuLaNRecipe

    output = Path(options.output)
    if options.config is None and options.resume and (output / FILE).is_file():
        options.config = output / FILE
    recipe = MuLaNRecipe.default() if options.config is None else MuLaNRecipe.load(options.config)
    recipe = recipe.updated(training=overrides_of(options))

    seed_everything(recipe.seed)
    if None not in (options.init_from, options.init_matching_from):
        raise ValueError('--init-from takes a model as it is, --init-matching-from what fits of it; give one of them')
    if options.init_from is None:
        mulan = recipe.build_model()
        if options.init_matching_from is not None:
            mulan.load_matching(options.init_matching_from)
    else:
        mulan = MuLaN.from_pretrained(options.init_from)
        recipe = recipe.with_model_of(mulan)
    dataset = recipe.open_data(options.data, mulan, audio_folder=options.audio_folder)
    valid_dataset = None
    if options.valid_data is not None or options.data in GENERATED:
        valid_dataset = recipe.open_data(
            options.valid_data or options.data, mulan, audio_folder=options.valid_audio_folder, training=False
        )
    trainer = recipe.build_trainer(
        mulan, dataset, valid_dataset=valid_dataset, results_folder=output, resume=options.resume
    )
    if trainer.is_main and trainer.step > 0:
        print(f'going on from step {trainer.step}', flush=True)
    trainer.train(**recipe.train_keywords)
    if trainer.is_main:
        report(trainer)


def report(trainer) -> None:
    """What came out of a training of MuLaN, in a few lines."""
    print(f'{trainer.step} steps done; checkpoints and metrics.jsonl are in {trainer.results_folder}')
    best = tell_best(trainer)
    if best is None:
        print('no held-out pairs, hence no best model; give --valid-data')
        return
    for way in ('audio_to_text', 'text_to_audio'):
        numbers = ', '.join(f'{label} {best[f"{way}_{name}"]:.3g}' for name, label in METRICS.items())
        print(f'{way.replace("_", " ")}: {numbers}')


METRICS = dict(recall_at_1='R@1', recall_at_5='R@5', recall_at_10='R@10', median_rank='median rank', map_at_10='mAP@10')

TRAININGS = [
    train_mulan,
    train_melody,
    train_quantizer,
    train_tokenizer,
    train_codec,
    train_stage('semantic', 'semantic tokens from conditioning'),
    train_stage('coarse', 'coarse acoustic tokens from semantic ones'),
    train_stage('fine', 'fine acoustic tokens from coarse ones'),
    train_all,
]
SUBCOMMANDS = [shard, train, tokens, assemble, recipes, generate, infill, stream, evaluate, compare, index, search]
SUBCOMMANDS += [serve, app]

if __name__ == '__main__':
    sys.exit(main())
