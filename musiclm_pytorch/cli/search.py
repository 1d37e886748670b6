"""`musiclm index` and `musiclm search`: a folder of music, found by words or by sound."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musiclm_pytorch.cli.options import ANY_MULAN, add_device, add_model, add_output, command, option
from musiclm_pytorch.cli.parser import models_that_ship, or_a_path

if TYPE_CHECKING:
    from musiclm_pytorch.inference.search import MuLaNIndex

logger = logging.getLogger(__name__)


def index(subcommands) -> None:
    parser = command(
        subcommands,
        'index',
        run_index,
        'make a folder of music searchable',
        'Embed all sound files under a folder with MuLaN, for `musiclm search`. Files that cannot be read are told and '
        'left out.',
    )
    option(parser, 'folder', metavar='FOLDER', help='sound files, in folders within, too')
    add_output(parser, 'the folder that the index goes into', '-o', metavar='INDEX')
    add_model(parser, f'the MuLaN that listens: {ANY_MULAN}')
    option(parser, '--window', metavar='S', help='seconds heard at once (default: 10, or what the model takes)')
    option(parser, '--hop', metavar='S', help='seconds from window to window (default: --window)')
    option(parser, '--batch-size', metavar='N', default=16, help='windows embedded at a time')
    add_device(parser)
    option(parser, '--overwrite', action='store_true', help='write over an index that is there already')


def search(subcommands) -> None:
    parser = command(
        subcommands,
        'search',
        run_search,
        'find music by words or by sound',
        'The clips of an index that fit a text best, or that sound most like a file, with their cosines. Files that '
        'are gone since it was made are left out.',
    )
    option(parser, 'index', metavar='INDEX', help='a folder written by `musiclm index`')
    option(parser, 'text', metavar='TEXT', nargs='?', help='what the music is like')
    option(parser, '--audio', metavar='FILE', help='a sound file to search by, instead of a text')
    option(parser, '-k', metavar='N', default=10, help='clips to show')
    option(parser, '--tags', metavar='N', default=0, help='words to show beside each clip')
    model = 'where the MuLaN lies now (default: where it was when the index was made)'
    option(parser, '--model', metavar='FOLDER', help=model, completer=or_a_path(models_that_ship))
    option(parser, '--backend', choices=('auto', 'faiss', 'torch'), default='auto', help='all give the same')
    add_device(parser)


def run_index(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.inference.search import check_free

    check_free(Path(options.output), options.overwrite)
    folder = Path(options.folder)
    files = sound_files(folder)

    from musiclm_pytorch.evaluation.evaluator import load_mulan
    from musiclm_pytorch.inference.batches import window_and_hop
    from musiclm_pytorch.inference.config import InferenceConfig
    from musiclm_pytorch.inference.engine import BatchInferenceEngine
    from musiclm_pytorch.inference.search import MuLaNIndex

    mulan = load_mulan(options.model)
    config = InferenceConfig(batch_size=options.batch_size, device=options.device, use_mixed_precision=False)
    window, hop = window_and_hop(mulan, options.window, options.hop)
    found = BatchInferenceEngine(mulan, config).embed_audio_files(files, window=window, hop=hop, progress=True)
    if not found.paths:
        path, reason = next(iter(found.skipped.items()))
        raise ValueError(f'none of the {len(files)} sound files in {folder} could be embedded; {path}: {reason}')
    model = os.path.abspath(options.model) if Path(options.model).exists() else options.model
    about = dict(folder=os.path.abspath(folder), model=model, window=window, hop=hop)
    made = MuLaNIndex(mulan, about=about)
    made.add([Path(path).relative_to(folder).as_posix() for path in found.paths], found.latents)
    made.save(options.output, overwrite=options.overwrite)
    print(f'{len(made)} clips in {options.output}; {len(found.skipped)} skipped')
    return dict(clips=len(made), skipped=found.skipped, output=options.output)


def run_search(options: argparse.Namespace) -> dict[str, Any]:
    if (options.text is None) == (options.audio is None):
        raise ValueError('give either a TEXT or --audio FILE to search by')
    if options.k < 1 or options.tags < 0:
        raise ValueError(f'-k must be at least 1 and --tags at least 0, got {options.k} and {options.tags}')
    if options.audio is not None and not Path(options.audio).is_file():
        raise FileNotFoundError(f'no sound file at {options.audio}')

    from musiclm_pytorch.inference.search import MuLaNIndex, read_index

    about = read_index(options.index)['about']
    model = options.model or about.get('model')
    if model is None:
        raise ValueError(f'the index in {options.index} does not say which model it was made with; give --model')

    from musiclm_pytorch.evaluation.evaluator import load_mulan

    mulan = load_mulan(model, device=options.device)
    found = MuLaNIndex.load(options.index, mulan, backend=options.backend)
    leave_out_gone(found, options.index)
    if options.text is not None:
        matches = found.search_text(options.text, options.k)
    else:
        spans = {name: about[name] for name in ('window', 'hop') if name in about}
        matches = found.search_audio(options.audio, options.k, **spans)
    tags = [[]] * len(matches)
    if options.tags:
        tags = found.tags(k=options.tags, names=[match.name for match in matches])
    rows = [
        dict(score=match.score, file=Path(about.get('folder', '')) / match.name, tags=[tag.name for tag in own])
        for match, own in zip(matches, tags)
    ]
    for row in rows:
        words = '  ' + ', '.join(row['tags']) if row['tags'] else ''
        print(f'{row["score"]:.3f}  {row["file"]}{words}')
    return dict(matches=rows)


def leave_out_gone(index: MuLaNIndex, where: str) -> None:
    """Take the clips out whose files are no more where they were when the index was made. Raises FileNotFoundError if
    that is all of them, as in a folder that was moved."""
    folder = index.about.get('folder')
    if folder is None:  # its names need not be those of files
        return
    gone = [name for name in index.names if not Path(folder, name).is_file()]
    again = f'`musiclm index FOLDER -o {where} --overwrite` makes it anew'
    if len(gone) == len(index):
        raise FileNotFoundError(f'none of the {len(index)} clips of the index are in {folder} any more; {again}')
    if gone:
        index.remove(gone)
        told = '%d of the clips of the index are no more in %s, such as %s, and left out; %s'
        logger.warning(told, len(gone), folder, gone[0], again)


def sound_files(folder: Path) -> list[Path]:
    """The sound files under a folder, by their paths. Raises FileNotFoundError if there are none."""
    from musiclm_pytorch.data.sources import AUDIO_SUFFIXES, audio_files

    if not folder.is_dir():
        raise FileNotFoundError(f'no folder at {folder}')
    skipped: dict[str, str] = {}
    files = sorted(path for path in audio_files(folder, skipped) if path.is_file())
    for path, reason in skipped.items():
        logger.warning('skipped %s: %s', path, reason)
    if not files:
        raise FileNotFoundError(f'no sound files under {folder}; known are {", ".join(sorted(AUDIO_SUFFIXES))}')
    return files
