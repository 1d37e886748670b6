"""What a cell of a table or a value of a JSON says: a time, a path, captions."""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from musiclm_pytorch.atomic import parsed_json

# Names of columns and keys, without case, spaces and underscores. Of the first, all count, and for files the first
# that is not empty; one of the others counts where there is none of the first.
AUDIO_KEYS = ('audio', 'path', 'filename')
OTHER_AUDIO_KEYS = {
    *('file', 'filepath', 'fname', 'wav', 'wavpath', 'wavfile'),
    *('audiopath', 'audiofile', 'audiofilename', 'audiofilepath'),
}
CAPTION_KEY = re.compile(r'captions?|texts?|(caption|text)\d+')
OTHER_CAPTION_KEYS = {'description', 'transcription', 'transcript', 'sentence', 'prompt'}
CLOCK = re.compile(r'(?:(\d+):)?(\d+):(\d+(?:[.,]\d+)?)')
MISSING = {'', 'nan', 'NaN', 'NA', 'N/A', '<NA>', 'None', 'null', 'NULL'}  # as pandas and others write an empty cell
HALF = re.compile('[\ud800-\udfff]')  # of a pair of JSON's escapes, as a text has that was cut between them
RENAME = 'rename the one that is meant, or the others'


def simple(name: str) -> str:
    """A name without case, spaces and punctuation."""
    return re.sub(r'[\W_]', '', name.casefold())


def words(name: str) -> list[str]:
    """`startFrame` and `start_frame` to `start`, `frame`."""
    return re.split(r'[\W_\d]+', re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', name).casefold())


def missing(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() in MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def local(path: str, root: Path) -> str:
    """A path of a manifest as this system writes it. Raises ValueError for what does not lie on its disks."""
    if '://' in path or path.startswith('file:'):
        raise ValueError(f'{path!r:.200} is an address; files are read from the disk: write the path of a local copy')
    if path.startswith('~/'):
        return os.path.expanduser(path)
    if '\\' in path and os.sep == '/' and not os.path.exists(root / path):
        if re.match(r'[A-Za-z]:\\|\\\\', path):
            raise ValueError(f'{path!r:.200} is a path of Windows; write it relative to the manifest')
        return path.replace('\\', '/')
    return path


def in_jamendo(root: Path, path: str) -> str:
    """MTG-Jamendo's tables name `1.mp3`, but some of its archives hold `1.low.mp3`, and Song Describer `1.2min.mp3`."""
    if not os.path.exists(root / path):
        stem, suffix = os.path.splitext(path)
        for other in (f'{stem}.2min{suffix}', f'{stem}.low{suffix}'):
            if os.path.exists(root / other):
                return other
    return path


def seconds(value: Any, name: str, factor: float = 1.0) -> float | None:
    """Seconds that a cell holds, as a number or as `mm:ss` or `hh:mm:ss.fff`; None if it is empty."""
    if missing(value):
        return None
    unit = 'seconds' if factor == 1 else 'milliseconds'
    try:
        if factor == 1 and isinstance(value, str) and (clock := CLOCK.fullmatch(value.strip())):
            hours, minutes, rest = int(clock[1] or 0), int(clock[2]), float(clock[3].replace(',', '.'))
            if rest >= 60 or (clock[1] and minutes >= 60):
                raise ValueError
            return hours * 3600 + minutes * 60 + rest
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{name} must be a number of {unit}, got {value!r:.60}') from error
    if not 0 <= number < float('inf'):
        raise ValueError(f'{name} must be a number of {unit} from 0 on, got {value!r:.60}')
    return number * factor


def reads_as_time(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and seconds(value, '') is not None
    except ValueError:
        return False


def caption_places(names: Sequence[str]) -> list[int]:
    """Which names are those of captions. Raises ValueError if several may be, and none is called so."""
    plain = [simple(name) for name in names]
    places = [place for place, name in enumerate(plain) if CAPTION_KEY.fullmatch(name)]
    if not places:
        places = [place for place, name in enumerate(plain) if name in OTHER_CAPTION_KEYS]
        if len(places) > 1:
            raise ValueError(f'{" and ".join(repr(names[it]) for it in places)} may all be the caption; {RENAME}')
    return places


def captions_at(names: Sequence[str], cells: Sequence[Any], places: list[int]) -> list[str]:
    """Captions, each a string or a list of strings; empty ones are left out."""
    captions = []
    for place in places:
        value = cells[place]
        if isinstance(value, str) and value.lstrip().startswith('[') and simple(names[place]) == 'captions':
            value = list_in(value)
        for text in value if isinstance(value, list) else [value]:
            if missing(text):
                continue
            if not isinstance(text, str):
                raise ValueError(f'{names[place]} must be a string or a list of strings, got {text!r:.60}')
            if HALF.search(text):
                raise ValueError(
                    f'{names[place]} holds half of a character, got {text!r:.60}; write it whole or leave it out'
                )
            captions.append(text.strip())
    return captions


def list_in(text: str) -> list[str]:
    """A list of strings that a cell holds, written in JSON or, as pandas does it, in Python."""
    try:
        return parsed_json(text)
    except json.JSONDecodeError as error:
        try:
            # numpy leaves out the commas, and then Python would join the strings
            found = None if re.search(r'[\'"]\s+[\'"]', text) else ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # what it may raise
            found = None
        if not isinstance(found, list):
            raise ValueError(f'captions is not a JSON list: {error}') from error
        return found


def captions_in_file(content: bytes, suffix: str, name: str) -> list[str]:
    """Captions of a file: of a .txt a line each, of a .json its string, list of strings, or object that has them under
    one of the usual keys. Raises ValueError that names the file."""
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(name, error, content)) from error
    if suffix == '.txt':
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        found = parsed_json(text, object_pairs_hook=once) if text.strip() else []
        cells = found if isinstance(found, dict) else dict(captions=found)
        return captions_at([*cells], [*cells.values()], caption_places([*cells]))
    except json.JSONDecodeError as error:
        raise ValueError(f'{name} is not JSON: {error}') from error
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error


def once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dict of pairs. Raises ValueError for a key that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice')
    return found


def not_utf8(name: Path | str, error: UnicodeDecodeError, content: bytes | None = None) -> str:
    """What to say of a file that does not decode."""
    content = Path(name).read_bytes() if content is None else content
    if content.startswith((b'\xff\xfe', b'\xfe\xff')):
        return f'{name} is not UTF-8 but UTF-16; save it as UTF-8 (in Excel: "CSV UTF-8")'
    try:
        content.decode()
    except UnicodeDecodeError as found:
        error = found
    line = content.count(b'\n', 0, error.start) + 1
    return f'{name} is not UTF-8: {error.reason} at byte {error.start}, in line {line}; save it as UTF-8'
