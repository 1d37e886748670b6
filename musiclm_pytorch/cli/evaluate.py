"""`musiclm evaluate` and `musiclm compare`: what music is like, how it fits its texts, and how runs differ."""

from __future__ import annotations

import argparse
import csv
import io
import logging
import re
from pathlib import Path
from typing import Any

from musiclm_pytorch.cli.options import ANY_MULAN, add_device, add_model, add_output, command, option

logger = logging.getLogger(__name__)


def evaluate(subcommands) -> None:
    parser = command(
        subcommands,
        'evaluate',
        run_evaluate,
        'measure generated music',
        'Measure quality, text–audio alignment and structure of generated music: report.json, figures.csv, clips.csv, '
        'and report.html with plots and players, which needs no other file. Files that cannot be read are told and '
        'left out.',
    )
    option(parser, '--generated', metavar='FOLDER', required=True, help='sound files, taken by their names')
    option(
        parser,
        '--texts',
        metavar='FILE',
        help='what each was made from: a .txt with a line a file, by name; a .json of file names, each with its text '
        'or with an object that has it under "prompt", as `musiclm generate` writes; or a .csv with the columns file '
        'and text. Without it text–audio alignment is left out',
    )
    option(parser, '--reference', metavar='FOLDER', help='sound files of real music to compare with')
    paired = 'each reference file belongs to the generated file of the same name'
    option(parser, '--paired', action='store_true', help=paired)
    add_output(parser, 'where the report goes', '-o')
    add_model(parser, f'the MuLaN that judges: {ANY_MULAN}')
    option(parser, '--clap', metavar='FOLDER', help='a CLAP on disk, for its score and distances')
    option(parser, '--vggish', metavar='FILE', help="VGGish's weights on disk, for its distances")
    option(parser, '--encodec', metavar='FILE', help="EnCodec's weights on disk, for its distances")
    option(parser, '--passt', metavar='FILE', help="PaSST's weights on disk, for the divergence of its tags")
    option(parser, '--seed', metavar='N', default=0, help='of resampling')
    add_device(parser)
    option(parser, '--players', metavar='N', default=12, help='clips on the page')
    option(parser, '--overwrite', action='store_true', help='write over a report that is in the folder already')


def compare(subcommands) -> None:
    parser = command(
        subcommands,
        'compare',
        run_compare,
        'put evaluations side by side',
        'Put reports of `musiclm evaluate` side by side: comparison.json, comparison.csv, comparison.html.',
    )
    option(parser, 'reports', metavar='FOLDER', nargs='+', help='reports; NAME=FOLDER gives a run a name')
    add_output(parser, 'where the comparison goes', '-o')
    option(parser, '--overwrite', action='store_true', help='write over a comparison that is there already')


def run_evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.evaluation.report import RESULTS, check_free, write_report

    check_free(Path(options.output), RESULTS, options.overwrite)
    generated = sound_files(options.generated)
    texts = None if options.texts is None else read_texts(options.texts, generated)
    reference = None if options.reference is None else sound_files(options.reference)
    if options.paired:
        reference = paired_with(generated, reference or [])
    before = len(generated) + len(reference or [])
    generated, reference, texts = readable(generated, reference, texts, options.paired)
    skipped = before - len(generated) - len(reference or [])
    if options.players < 0:
        raise ValueError(f'--players must be 0 or more, got {options.players}')

    from musiclm_pytorch.evaluation.embedders import CLAPEmbedder, EnCodecEmbedder, VGGishEmbedder
    from musiclm_pytorch.evaluation.evaluator import GROUPS, MusicLMEvaluator, load_mulan
    from musiclm_pytorch.evaluation.tagging import PaSSTTagger

    kinds = dict(clap=CLAPEmbedder, vggish=VGGishEmbedder, encodec=EnCodecEmbedder)
    given = {name: path for name in kinds if (path := getattr(options, name)) is not None}
    evaluator = MusicLMEvaluator(
        mulan=load_mulan(options.model, device=options.device),
        embedders=[kinds[name](path, device=options.device) for name, path in given.items()],
        tagger=None if options.passt is None else PaSSTTagger(options.passt, device=options.device),
        seed=options.seed,
        name=options.model,
        progress=True,
    )
    groups = [group for group in GROUPS if texts is not None or group != 'text_audio_alignment']
    results = evaluator.evaluate(generated, reference, texts=texts, paired=options.paired, groups=groups)
    page = write_report(results, options.output, generated, players=options.players, overwrite=options.overwrite)
    print(f'{len(generated)} clips; {skipped} files skipped; the page is {page}')
    return dict(page=page, files_skipped=skipped, results={group: results[group] for group in groups})


def run_compare(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.evaluation.report import compare_reports

    reports = {}
    for word in options.reports:
        name, _, path = word.rpartition('=')
        name = name or Path(path).name or path
        if name in reports:
            raise ValueError(f'two runs are named {name!r}; give them names: NAME=FOLDER')
        reports[name] = path
    page = compare_reports(reports, options.output, overwrite=options.overwrite)
    print(f'the page is {page}')
    return dict(page=page)


def sound_files(folder: str) -> list[Path]:
    """The sound files of a folder by name, numbers in it by their size. Raises FileNotFoundError if there are none."""
    from musiclm_pytorch.data.sources import AUDIO_SUFFIXES, is_shown, split_name

    if not Path(folder).is_dir():
        raise FileNotFoundError(f'no folder at {folder}')
    files = [
        path for path in Path(folder).iterdir() if is_shown(path.name) and split_name(path.name)[1] in AUDIO_SUFFIXES
    ]
    if not files:
        raise FileNotFoundError(f'no sound files in {folder}; known are {", ".join(sorted(AUDIO_SUFFIXES))}')
    return sorted(files, key=lambda path: [int(it) if it.isdigit() else it for it in re.split(r'(\d+)', path.name)])


def readable(
    generated: list[Path], reference: list[Path] | None, texts: list[str] | None, paired: bool
) -> tuple[list[Path], list[Path] | None, list[str] | None]:
    """The files that decode, with their texts; of pairs those of which both do. The others are named in the log.

    Raises ValueError if there are none.
    """
    faults = {path: reason for path in [*generated, *(reference or [])] if (reason := fault_of(path))}
    for path, reason in faults.items():
        logger.warning('skipped %s: %s', path, reason)
    pairs = zip(generated, reference) if paired else [(path,) for path in generated]
    keep = [not any(path in faults for path in pair) for pair in pairs]
    found = [path for path, kept in zip(generated, keep) if kept]
    if paired:
        others = [path for path, kept in zip(reference, keep) if kept]
    else:
        others = None if reference is None else [path for path in reference if path not in faults]
    for files, left in ((generated, found), (reference, others)):
        if files and not left:
            path = next((it for it in files if it in faults), next(iter(faults)))
            raise ValueError(f'none of the {len(files)} sound files in {files[0].parent} can be used; {faults[path]}')
    return found, others, None if texts is None else [text for text, kept in zip(texts, keep) if kept]


def fault_of(path: Path) -> str | None:
    """Why a sound file cannot be measured."""
    from musiclm_pytorch.evaluation.inputs import read_clip

    try:
        read_clip(path, 0)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def paired_with(generated: list[Path], reference: list[Path]) -> list[Path]:
    """The reference files in the order of the generated ones of the same names, endings aside.

    Raises ValueError unless each has one.
    """
    stems = {path.stem: path for path in reference}
    if len(reference) != len(generated) or stems.keys() != {path.stem for path in generated}:
        alone = sorted(stems.keys() ^ {path.stem for path in generated})
        found = f'{alone[0]} is in one alone' if alone else f'they have {len(generated)} and {len(reference)}'
        raise ValueError(f'--paired needs a file of the same name in both folders for each; {found}')
    return [stems[path.stem] for path in generated]


def read_texts(path: str, files: list[Path]) -> list[str]:
    """The text of each file. Raises FileNotFoundError, ValueError for texts that do not go with the files."""
    from musiclm_pytorch.atomic import parsed_json

    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f'no file of texts at {path}')
    if source.suffix not in ('.txt', '.json', '.csv'):
        raise ValueError(f'{path} must end in .txt, .json or .csv')
    with open(source, encoding='utf-8-sig', newline='') as file:
        content = file.read()
    if source.suffix == '.txt':
        lines = content.replace('\r\n', '\n').removesuffix('\n').split('\n')
        if len(lines) != len(files):
            raise ValueError(f'{path} has {len(lines)} lines for {len(files)} sound files; give a line a file, by name')
        return lines
    if source.suffix == '.json':
        try:
            texts = parsed_json(content)
        except ValueError as error:
            raise ValueError(f'{path} is not JSON: {error}') from error
    else:
        rows = list(csv.DictReader(io.StringIO(content, newline='')))
        if rows and not {'file', 'text'} <= rows[0].keys():
            raise ValueError(f'{path} must have the columns file and text, got {", ".join(map(str, rows[0]))}')
        texts = {row['file']: row['text'] for row in rows}
    from musiclm_pytorch.evaluation.inputs import texts_by_file

    texts = texts_by_file(texts, str(path))
    missing = [file.name for file in files if file.name not in texts]
    if missing:
        raise ValueError(f'{path} has no text for {missing[0]}, and for {len(missing)} of {len(files)} files in all')
    return [texts[file.name] for file in files]
