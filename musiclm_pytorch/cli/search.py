"""`musiclm index` and `musiclm search`: a folder of music, found by words or by sound."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


def index(subcommands) -> None:
    """`musiclm index`: sound files to an index of their latents."""
    parser = subcommands.add_parser(
        'index',
        help='make a folder of music searchable',
        description='Embed all sound files under a folder with MuLaN, for `musiclm search`. Files that cannot be read '
        'are told and left out.',
    )
    parser.add_argument('folder', metavar='FOLDER', help='sound files, in folders within, too')
    parser.add_argument('-o', '--output', metavar='INDEX', required=True, help='the folder that the index goes into')
    parser.add_argument(
        '--model',
        metavar='FOLDER',
        default='tiny',
        help='the MuLaN that listens: a folder of a MuLaN or of a MusicLM, or the name of one that ships (default: '
        '%(default)s)',
    )
    parser.add_argument(
        '--window', metavar='S', type=float, help='seconds heard at once (default: 10, or what the model takes)'
    )
    parser.add_argument('--hop', metavar='S', type=float, help='seconds from window to window (default: --window)')
    parser.add_argument(
        '--batch-size', metavar='N', type=int, default=16, help='windows embedded at a time (default: %(default)s)'
    )
    parser.add_argument('--device', help='such as cuda (default: cpu)', default='cpu')
    parser.add_argument('--overwrite', action='store_true', help='write over an index that is there already')
    parser.set_defaults(run=run_index, prog=parser.prog)


def search(subcommands) -> None:
    """`musiclm search`: words or a sound file to the nearest clips of an index."""
    parser = subcommands.add_parser(
        'search',
        help='find music by words or by sound',
        description='The clips of an index that fit a text best, or that sound most like a file, with their cosines.',
    )
    parser.add_argument('index', metavar='INDEX', help='a folder written by `musiclm index`')
    parser.add_argument('text', metavar='TEXT', nargs='?', help='what the music is like')
    parser.add_argument('--audio', metavar='FILE', help='a sound file to search by, instead of a text')
    parser.add_argument('-k', metavar='N', type=int, default=10, help='clips to show (default: %(default)s)')
    parser.add_argument(
        '--tags', metavar='N', type=int, default=0, help='words to show beside each clip (default: %(default)s)'
    )
    parser.add_argument(
        '--model', metavar='FOLDER', help='where the MuLaN lies now (default: where it was when the index was made)'
    )
    parser.add_argument(
        '--backend', choices=('auto', 'faiss', 'torch'), default='auto', help='all give the same (default: %(default)s)'
    )
    parser.add_argument('--device', help='such as cuda (default: cpu)', default='cpu')
    parser.set_defaults(run=run_search, prog=parser.prog)


def run_index(options: argparse.Namespace) -> None:
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


def run_search(options: argparse.Namespace) -> None:
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

    from musiclm_pytorch.checks import check_device
    from musiclm_pytorch.evaluation.evaluator import load_mulan

    mulan = load_mulan(model).to(check_device(options.device))
    found = MuLaNIndex.load(options.index, mulan, backend=options.backend)
    if options.text is not None:
        matches = found.search_text(options.text, options.k)
    else:
        spans = {name: about[name] for name in ('window', 'hop') if name in about}
        matches = found.search_audio(options.audio, options.k, **spans)
    tags = [[]] * len(matches)
    if options.tags:
        tags = found.tags(k=options.tags, names=[match.name for match in matches])
    for match, own in zip(matches, tags):
        path = Path(about.get('folder', '')) / match.name
        words = '  ' + ', '.join(tag.name for tag in own) if own else ''
        print(f'{match.score:.3f}  {path}{words}')


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
