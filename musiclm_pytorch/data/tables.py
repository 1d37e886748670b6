"""Rows of CSV, TSV and JSONL files as they are written, without a word on what they mean."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from musiclm_pytorch.atomic import parsed_json
from musiclm_pytorch.data.cells import AUDIO_KEYS, OTHER_AUDIO_KEYS, not_utf8, once, simple


def rows(path: Path) -> Iterator[tuple[int, tuple[str, ...], Sequence[Any]]]:
    """The number of the line, the names and the cells of each row of a manifest, which are at least as many."""
    readers = {'.csv': table_rows, '.tsv': table_rows, '.jsonl': json_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f'{path} is neither a folder nor a manifest; a manifest ends in {", ".join(readers)}')
    if not path.is_file():
        raise FileNotFoundError(f'no manifest at {path}')
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(path, error)) from error


def take_rows(path: Path, take: Callable[[int, tuple[str, ...], Sequence[Any]], None]) -> None:
    """Call `take` with each of the `rows`. What it finds wrong is told with the file and the line."""
    for line, names, cells in rows(path):
        try:
            take(line, names, cells)
        except ValueError as error:
            raise ValueError(f'{path}, line {line}: {error}') from error


def names_in(path: Path) -> tuple[str, ...]:
    """The names of the first row."""
    return next((names for _, names, _ in rows(path)), ())


def table_rows(path: Path) -> Iterator[tuple[int, tuple[str, ...], Sequence[str]]]:
    # newline='' leaves line ends inside of quoted cells as they are
    with open(path, encoding='utf-8-sig', newline='') as file:
        before, header, delimiter = 0, '', None
        for header in file:
            declared = re.fullmatch(r'sep=(.)\s*', header)  # a line of Excel's
            delimiter = declared[1] if declared else delimiter
            if header.strip() and not declared:
                break
            before += 1
        delimiter = delimiter or separator(header, ',;\t|' if path.suffix.lower() == '.csv' else '\t,;|')
        if '\0' in header:
            raise ValueError(f'{path} holds zero bytes; save it as UTF-8, not UTF-16')
        split = tab_separated if delimiter == '\t' else comma_separated
        names: tuple[str, ...] = ()
        for line, cells in split(path, itertools.chain([header], file), before, delimiter):
            if not names:
                names = tuple(name.strip().lstrip('\ufeff') for name in cells)
                continue
            if len(cells) < len(names):
                if not any(cells):
                    continue
                cells += [''] * (len(names) - len(cells))
            elif len(cells) > len(names) and any(cells[len(names) :]) and simple(names[-1]) != 'tags':
                ends = 'tab' if delimiter == '\t' else repr(delimiter)
                remedy = f'a cell must not hold a {ends}' if delimiter == '\t' else f'quote cells that hold {ends}'
                raise ValueError(f'{path}, line {line}: more cells than columns; {remedy}')
            elif not any(cells):
                continue
            yield line, names, cells


def separator(header: str, candidates: str) -> str:
    """What stands between the names of a header, by the names that are known; else the first candidate."""
    for candidate in candidates:
        names = [simple(name.strip(' "')) for name in header.split(candidate)]
        if len(names) > 1 and any(it in {*AUDIO_KEYS, *OTHER_AUDIO_KEYS, 'ytid'} for it in names):
            return candidate
    return candidates[0]


def comma_separated(path: Path, lines: Iterator[str], before: int, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        line = before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            last = before + reader.line_num
            if 'expected after' in str(error):
                reason = 'text follows the closing quote of a cell, or the quote was never closed'
            else:
                line = opening_quote(path, line, last)
                reason = f'the quote that opens here is never closed ({error})'
            raise ValueError(f'{path}, line {line}: {reason}; a quote within a cell is written twice') from error
        if cells:
            yield line, cells


def opening_quote(path: Path, first: int, last: int) -> int:
    """The line of the last quote that opens a cell, from the beginning of a row on."""
    opened, quoted = first, False
    with open(path, encoding='utf-8-sig', newline='') as file:
        for number, line in enumerate(itertools.islice(file, first - 1, last), first):
            for _ in range(line.count('"')):
                quoted = not quoted
                opened = number if quoted else opened
    return opened


def tab_separated(path: Path, lines: Iterator[str], before: int, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    opened = None  # the line whose last cell begins with a quote that does not end there, and maybe in a line below
    for number, line in enumerate(lines, before + 1):
        cells = line.rstrip('\r\n').split(delimiter)
        if opened is not None and closes(cells[0]):
            raise ValueError(
                f'{path}, line {opened}: the quote that opens here is closed in line {number}, but a row is one line '
                'where tabs part the cells; take the line breaks out of the texts, or save the table with commas'
            )
        if '"' in cells[-1] and opens(cells[-1]):
            opened = number
        elif len(cells) > 1:
            opened = None
        if '"' in line:
            cells = [unquoted(cell) for cell in cells]
        if line.strip():
            yield number, cells


def opens(cell: str) -> bool:
    return cell.startswith('"') and cell.count('"') % 2 == 1


def closes(cell: str) -> bool:
    return cell.endswith('"') and not cell.startswith('"') and cell.count('"') % 2 == 1


def unquoted(cell: str) -> str:
    """A cell that a writer of CSV put in quotes, as it was: then every quote inside is doubled."""
    inside = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside.replace('""', ''):
        return inside.replace('""', '"')
    return cell


def json_rows(path: Path) -> Iterator[tuple[int, tuple[str, ...], Sequence[Any]]]:
    with open(path, encoding='utf-8-sig', newline='\n') as file:
        for line, text in enumerate(file, 1):
            text = text.strip().strip('\ufeff')
            if text:
                try:
                    row = parsed_json(text, object_pairs_hook=once)
                except json.JSONDecodeError as error:
                    raise ValueError(f'{path}, line {line} is not JSON: {error}') from error
                except ValueError as error:
                    raise ValueError(f'{path}, line {line}: {error}') from error
                if not isinstance(row, dict):
                    raise ValueError(f'{path}, line {line} must be an object, got {text!r:.60}')
                yield line, tuple(row), list(row.values())
