"""Where clips and captions are written down: folders, CSV and JSONL manifests, MusicCaps. No audio is decoded here."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.data.audio import AudioFile

# what libsndfile reads, and what people have beside it: the latter is listed, so that it can be skipped by name
AUDIO_SUFFIXES = {'.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aif', '.aiff', '.aifc', '.au', '.caf', '.w64'}
FOREIGN_SUFFIXES = {'.m4a', '.aac', '.mp4', '.wma', '.webm', '.ape', '.wv'}

AUDIO_KEYS = ('audio', 'path')
CAPTION_KEYS = ('caption', 'text', 'captions')

# a file of MusicCaps is named by its 11 characters of YouTube, in brackets or not, and perhaps by the seconds it holds
YTID_AND_SECONDS = re.compile(
    r'\[?(?P<ytid>[A-Za-z0-9_-]{11})\]?(?:[ _-]*\[?(?P<start>\d+(?:\.\d+)?)\]?[ _-]+\[?(?P<end>\d+(?:\.\d+)?)\]?)?'
)
TITLE_AND_YTID = re.compile(r'.*\[(?P<ytid>[A-Za-z0-9_-]{11})\]')  # yt-dlp's default
CUT_TOLERANCE = 1.0  # seconds by which a file may be longer than its clip and still count as cut already


@dataclass(frozen=True)
class Clip:
    """A stretch of a sound file and what is said about it.

    Attributes:
        path: the sound file.
        captions: at least one, none of them empty.
        start, end: seconds in the file; `end = None` is the end of the file.
        recording: what it was taken from. Clips of one recording never come apart in a split.
    """

    path: Path
    captions: tuple[str, ...]
    start: float = 0.0
    end: float | None = None
    recording: str = ''

    @property
    def name(self) -> str:
        """The path, with the seconds where it is not the whole file."""
        if self.start == 0 and self.end is None:
            return str(self.path)
        return f'{self.path} [{self.start:g}-{"" if self.end is None else f"{self.end:g}"}]'


@dataclass
class Listing:
    """Clips that a source names, and the reason of each name that gave none."""

    source: str
    clips: list[Clip]
    skipped: dict[str, str]


@typechecked
def list_clips(source: str | Path, audio_folder: str | Path | None = None) -> Listing:
    """Clips of whatever `source` is: a folder, a manifest, or, with `audio_folder`, MusicCaps' CSV.

    Raises FileNotFoundError, and ValueError for a file of another kind.
    """
    source = Path(source)
    if audio_folder is not None:
        return list_musiccaps(source, audio_folder)
    return list_folder(source) if source.is_dir() else list_manifest(source)


@typechecked
def list_folder(folder: str | Path) -> Listing:
    """Audio files under `folder` with a .txt (a caption a line) or .json of the same name beside them.

    The JSON is a caption, a list of captions, or an object with `caption`, `text` or `captions`. With both files, the
    captions of both count. A sound file without a caption is skipped.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'no folder at {folder}')
    listing = Listing(str(folder), [], {})
    for path in audio_files(folder):
        try:
            captions = [caption for suffix in ('.json', '.txt') for caption in read_captions(path.with_suffix(suffix))]
        except ValueError as error:
            listing.skipped[str(path)] = str(error)
            continue
        if captions:
            listing.clips.append(Clip(path, unique(captions), recording=recording_of(path, folder)))
        else:
            beside = [path.with_suffix(suffix) for suffix in ('.txt', '.json')]
            found = [str(it) for it in beside if it.is_file()]
            reason = f'{" and ".join(found)} is empty' if found else f'neither {beside[0]} nor {beside[1].name} exists'
            listing.skipped[str(path)] = f'no caption: {reason}'
    if not listing.clips and not listing.skipped:
        raise ValueError(f'no audio files under {folder}; looked for {", ".join(sorted(AUDIO_SUFFIXES))}')
    return listing


@typechecked
def list_manifest(path: str | Path) -> Listing:
    """Rows of a CSV, TSV or JSONL file: `audio` or `path`, `caption`, `text` or `captions`, perhaps `start` and `end`.

    Paths are relative to the manifest, times in seconds. `captions` may be a list, in a CSV written as JSON. A row
    without a caption is skipped. Raises ValueError that names the line for what is not written as it should be.
    """
    path = Path(path)
    readers: dict[str, Callable] = {'.csv': csv_rows, '.tsv': csv_rows, '.jsonl': json_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f'{path} is neither a folder nor a manifest; a manifest ends in {", ".join(readers)}')
    if not path.is_file():
        raise FileNotFoundError(f'no manifest at {path}')
    listing = Listing(str(path), [], {})
    for line, row in readers[path.suffix.lower()](path):
        where = f'{path}, line {line}'
        audio = next((row[key] for key in AUDIO_KEYS if row.get(key)), None)
        if not isinstance(audio, str):
            hint = '; for MusicCaps pass the folder of its audio too' if 'ytid' in row else ''
            raise ValueError(f'{where}: no file name under audio or path; there are {", ".join(map(str, row))}{hint}')
        file = path.parent / audio
        start, end = seconds(row, 'start', where) or 0.0, seconds(row, 'end', where)
        if end is not None and end <= start:
            raise ValueError(f'{where}: end {end:g} must be greater than start {start:g}')
        captions = captions_of(row, where)
        clip = Clip(file, unique(captions), start, end, recording_of(file, path.parent))
        if captions:
            listing.clips.append(clip)
        else:
            listing.skipped[clip.name] = f'no caption in line {line} of {path}'
    return listing


@typechecked
def list_musiccaps(path: str | Path, audio_folder: str | Path, aspects: bool = True) -> Listing:
    """MusicCaps (arXiv 2301.11325) by its own CSV, over a folder of clips or of whole tracks named by `ytid`.

    Found are `ytid.*`, `[ytid]-[start-end].*`, `ytid_start_end.*` and alike (also in milliseconds), `Yytid…` as in
    AudioSet, and yt-dlp's `title [ytid].*`. A file with seconds in its name, or one not longer than the clip, is taken
    to be cut already; of any other, `start_s` to `end_s` is used. A row without a file is skipped.

    Args:
        aspects: take the aspect list, joined by commas, as a second caption.
    """
    path, audio_folder = Path(path), Path(audio_folder)
    if not path.is_file():
        raise FileNotFoundError(f'no CSV of MusicCaps at {path}')
    if not audio_folder.is_dir():
        raise FileNotFoundError(f'no folder of audio at {audio_folder}')
    files = musiccaps_files(audio_folder)
    listing = Listing(str(path), [], {})
    for line, row in csv_rows(path):
        where = f'{path}, line {line}'
        missing = [key for key in ('ytid', 'start_s', 'end_s', 'caption') if not row.get(key)]
        if missing:
            raise ValueError(f'{where}: no {" and no ".join(missing)}, which MusicCaps has')
        ytid, start, end = row['ytid'], seconds(row, 'start_s', where), seconds(row, 'end_s', where)
        captions = captions_of({'caption': row['caption']}, where)
        if aspects and row.get('aspect_list'):
            captions += captions_of({'caption': aspects_of(row['aspect_list'], where)}, where)
        name = f'{ytid} [{start:g}-{end:g}]'
        found = files.get((ytid, start)) or files.get((ytid, None))
        if not captions:
            listing.skipped[name] = f'no caption in line {line} of {path}'
        elif found is None:
            listing.skipped[name] = f'no file named by it under {audio_folder}'
        else:
            is_cut = (ytid, start) in files or duration(found) <= end - start + CUT_TOLERANCE
            span = (0.0, None) if is_cut else (start, end)
            listing.clips.append(Clip(found, unique(captions), *span, recording=ytid))
    return listing


# ---- reading ----


def audio_files(folder: Path) -> Iterator[Path]:
    """Sound files under `folder`, links to folders included, in an order that is the same everywhere."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(names):
            if Path(name).suffix.lower() in AUDIO_SUFFIXES | FOREIGN_SUFFIXES and not name.startswith('.'):
                yield Path(root, name)


def musiccaps_files(folder: Path) -> dict[tuple[str, float | None], Path]:
    """Files by their ytid and, if their name says so, by the second that they start at."""
    files = {}
    for path in audio_files(folder):
        for stem in (path.stem, path.stem.removeprefix('Y')):
            named = YTID_AND_SECONDS.fullmatch(stem) or TITLE_AND_YTID.fullmatch(stem)
            if named:
                start = named.groupdict().get('start')
                files.setdefault((named['ytid'], None if start is None else float(start)), path)
                if start is not None and float(start) >= 1000:
                    files.setdefault((named['ytid'], float(start) / 1000), path)
    return files


def duration(path: Path) -> float:
    """Seconds; without end for a file that does not open, which is found out when it is checked."""
    try:
        with AudioFile(path) as file:
            return len(file) / file.sample_rate
    except (OSError, ValueError):
        return float('inf')


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8: {error.reason} at byte {error.start}') from error


def read_captions(path: Path) -> list[str]:
    """Captions of a .txt or .json file, none where there is no file."""
    if not path.is_file():
        return []
    text = read_text(path)
    if path.suffix == '.txt':
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    return captions_of(content if isinstance(content, dict) else {'captions': content}, str(path))


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows below the header."""
    # newline='' leaves line ends inside of quoted cells as they are
    text = io.StringIO(read_text(path), newline='')
    reader = csv.DictReader(text, delimiter='\t' if path.suffix.lower() == '.tsv' else ',')
    for row in reader:
        if None in row:
            raise ValueError(f'{path}, line {reader.line_num}: more cells than columns; quote cells that hold commas')
        captions = row.get('captions')
        if captions and captions.lstrip().startswith('['):
            try:
                row['captions'] = json.loads(captions)
            except json.JSONDecodeError as error:
                raise ValueError(f'{path}, line {reader.line_num}: captions is not a JSON list: {error}') from error
        yield reader.line_num, row


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(read_text(path).split('\n'), 1):
        if text.strip():
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f'{path}, line {line} is not JSON: {error}') from error
            if not isinstance(row, dict):
                raise ValueError(f'{path}, line {line} must be an object, got {text.strip()!r:.60}')
            yield line, row


def captions_of(row: dict[str, Any], where: str) -> list[str]:
    """Captions under any of the usual keys, each a string or a list of strings; empty ones are left out."""
    captions = []
    for key in CAPTION_KEYS:
        value = row.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for text in values:
            if not isinstance(text, str):
                raise ValueError(f'{where}: {key} must be a string or a list of strings, got {text!r:.60}')
            captions += [text.strip()] if text.strip() else []
    return captions


def aspects_of(text: str, where: str) -> str:
    """`"['slow', 'piano']"`, as MusicCaps writes it, to `slow, piano`."""
    try:
        aspects = ast.literal_eval(text)
        return ', '.join(aspects)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f'{where}: aspect_list must be a list of strings, got {text!r:.60}') from error


def seconds(row: dict[str, Any], key: str, where: str) -> float | None:
    value = row.get(key)
    if value is None or value == '':
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{where}: {key} must be a number of seconds, got {value!r:.60}') from error
    if not 0 <= number < float('inf'):
        raise ValueError(f'{where}: {key} must be a number of seconds from 0 on, got {value!r:.60}')
    return number


def recording_of(path: Path, root: Path) -> str:
    """One name for a file however it is spelt, the same on every machine; formats of one name are one recording."""
    real = os.path.realpath(path)
    return Path(os.path.relpath(real, os.path.realpath(root))).with_suffix('').as_posix()


def unique(captions: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(captions))
