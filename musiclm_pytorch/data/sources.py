"""Where clips and captions are written down: folders, manifests, MusicCaps. No audio is decoded here."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.data.audio import AudioFile
from musiclm_pytorch.data.cells import captions_at, captions_in_file, missing, seconds, simple
from musiclm_pytorch.data.clips import ClipTable, Listing, Recordings
from musiclm_pytorch.data.manifests import Columns, add_rows, list_manifest
from musiclm_pytorch.data.tables import names_in, take_rows

# what `AudioFile` reads; files that end otherwise are left out without a word
AUDIO_SUFFIXES = {
    *(
        '.wav',
        '.wave',
        '.flac',
        '.ogg',
        '.oga',
        '.opus',
        '.mp3',
        '.mp2',
        '.aif',
        '.aiff',
        '.aifc',
        '.au',
        '.caf',
        '.w64',
    ),
    *('.m4a', '.m4b', '.aac', '.mp4', '.mov', '.wma', '.webm', '.mka', '.mkv', '.ape', '.wv', '.tta', '.ac3'),
}

METADATA = {'metadata.csv', 'metadata.jsonl'}  # of Hugging Face's audio folders

# a file of MusicCaps is named by its 11 characters of YouTube, in brackets or not, and perhaps by the seconds it holds
YTID_AND_SECONDS = re.compile(
    r'\[?(?P<ytid>[A-Za-z0-9_-]{11})\]?(?:[ _-]*\[?(?P<start>\d+(?:\.\d+)?)\]?[ _-]+\[?(?P<end>\d+(?:\.\d+)?)\]?)?'
)
TITLE_AND_YTID = re.compile(r'.*\[(?P<ytid>[A-Za-z0-9_-]{11})\]')  # yt-dlp's default
CUT_TOLERANCE = 1.0  # seconds by which a file may be longer than its clip and still count as cut already
END_TOLERANCE = 0.1  # seconds by which a whole track may seem to end before the clip does


@typechecked
def list_clips(source: str | Path, audio_folder: str | Path | None = None) -> Listing:
    """Clips of whatever `source` is: a folder, or a manifest, MusicCaps' too, whose audio may lie in `audio_folder`.

    Raises FileNotFoundError, and ValueError for a file of another kind.
    """
    source = Path(source)
    if source.is_dir():
        if audio_folder is not None:
            raise ValueError(f'{source} is a folder, which has its audio; audio_folder belongs to a manifest')
        return list_folder(source)
    if audio_folder is not None and 'ytid' in map(simple, names_in(source)):
        return list_musiccaps(source, audio_folder)
    return list_manifest(source, audio_folder)


@typechecked
def list_folder(folder: str | Path) -> Listing:
    """Audio files under `folder` with a .txt (a caption a line) or .json of the same name beside them.

    The JSON is a caption, a list of captions, or an object with `caption`, `text` or `captions`, or another key as in
    `list_manifest`. With both files, the captions of both count. What `metadata.csv` or `metadata.jsonl` names under
    `file_name`, as in Hugging Face's audio folders, is a clip as well. A sound file without a caption is skipped.

    Links to folders are followed, and a folder that is reached twice counts once. A file that is there under two names
    (a link, hard or symbolic) counts under each that has a caption, as one recording. Hidden files and `__MACOSX` are
    passed over.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'no folder at {folder}')
    listing = Listing(str(folder), ClipTable(folder), {})
    recordings = Recordings(folder)
    described: set[str] = set()
    for root, names in folders(folder, listing.skipped):
        beside = os.path.relpath(root, folder)
        beside = '' if beside == '.' else beside
        for name in sorted(METADATA.intersection(names)):  # in one order in all processes
            path = Path(root, name)
            keys = names_in(path)
            if 'file_name' in keys:
                try:
                    Columns(keys, is_table=name.endswith('.csv'))
                except ValueError as error:  # of labels, say
                    listing.skipped[str(path)] = str(error)
                    continue
                known = len(listing.clips)
                add_rows(listing, path, beside, recordings)
                described |= {os.path.normpath(clip.path) for clip in listing.clips[known:]}
        texts = {split_name(name): name for name in names}
        for name in names:
            stem, suffix = split_name(name)
            if suffix not in AUDIO_SUFFIXES:
                continue
            path = os.path.join(root, name)
            found = [Path(root, texts[stem, it]) for it in ('.json', '.txt') if (stem, it) in texts]
            try:
                captions = [
                    caption
                    for file in found
                    for caption in captions_in_file(file.read_bytes(), file.suffix.lower(), str(file))
                ]
            except (OSError, ValueError) as error:
                listing.skipped[path] = str(error)
                continue
            if captions:
                path = os.path.join(beside, name)
                listing.clips.append(path, captions, recording=recordings.name(path))
            elif found:
                empty = ' and '.join(map(str, found))
                listing.skipped[path] = f'no caption: {empty} is empty, or has none under caption, text or captions'
            elif os.path.normpath(path) not in described:
                stem = os.path.join(root, stem)
                listing.skipped[path] = f'no caption: neither {stem}.txt nor {os.path.basename(stem)}.json exists'
    if not listing.clips and not listing.skipped:
        raise ValueError(f'no audio files under {folder}; looked for {", ".join(sorted(AUDIO_SUFFIXES))}')
    return listing


@typechecked
def list_musiccaps(path: str | Path, audio_folder: str | Path, aspects: bool = True) -> Listing:
    """MusicCaps (arXiv 2301.11325) by its own CSV, over a folder of clips or of whole tracks named by `ytid`.

    Found are `ytid.*`, `[ytid]-[start-end].*`, `ytid_start_end.*` and alike (also in milliseconds), `Yytid…` as in
    AudioSet, and yt-dlp's `title [ytid].*`. A file with seconds in its name, one not longer than the clip, or one that
    ends before `end_s` (cut at key frames) is taken to be cut already; of any other, `start_s` to `end_s` is used. A
    row without a file is skipped.

    Args:
        aspects: take the aspect list, joined by commas, as a second caption.
    """
    path, audio_folder = Path(path), Path(audio_folder)
    if not path.is_file():
        raise FileNotFoundError(f'no CSV of MusicCaps at {path}')
    if not audio_folder.is_dir():
        raise FileNotFoundError(f'no folder of audio at {audio_folder}')
    listing = Listing(str(path), ClipTable(audio_folder), {})
    files = musiccaps_files(audio_folder, listing.skipped)

    def add(line: int, names: tuple[str, ...], cells: Sequence[Any]) -> None:
        row = dict(zip(map(str.casefold, names), cells))
        absent = [key for key in ('ytid', 'start_s', 'end_s', 'caption') if missing(row.get(key))]
        if absent:
            raise ValueError(f'no {" and no ".join(absent)}, which MusicCaps has')
        ytid, start, end = row['ytid'], seconds(row['start_s'], 'start_s'), seconds(row['end_s'], 'end_s')
        texts = [row['caption']]
        if aspects and not missing(row.get('aspect_list')):
            texts.append(aspects_of(row['aspect_list']))
        captions = captions_at(['caption'], [texts], [0])
        name = f'{ytid} [{start:g}-{end:g}]'
        found = files.get((ytid, start)) or files.get((ytid, None))
        if not captions:
            listing.skipped[name] = f'no caption in line {line} of {path}'
        elif found is None:
            listing.skipped[name] = f'no file named by it under {audio_folder}'
        else:
            span = (0.0, None) if (ytid, start) in files or is_cut(found, start, end) else (start, end)
            listing.clips.append(str(found.relative_to(audio_folder)), captions, *span, recording=ytid)

    take_rows(path, add)
    return listing


# ---- reading ----


def folders(folder: Path, skipped: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Each folder under `folder` and the names of its files, in an order that is the same everywhere.

    Links are followed, and no folder is given twice. One that cannot be read is noted in `skipped`.
    """
    seen = set()

    def note(error: OSError) -> None:
        skipped[str(error.filename)] = str(error)

    for root, inside, names in os.walk(folder, onerror=note, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            inside.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inside[:] = sorted(filter(is_shown, inside))
        yield root, sorted(filter(is_shown, names))


def audio_files(folder: Path, skipped: dict[str, str]) -> Iterator[Path]:
    """Sound files under `folder`, in an order that is the same everywhere; `skipped` as in `folders`."""
    for root, names in folders(folder, skipped):
        yield from (Path(root, name) for name in names if split_name(name)[1] in AUDIO_SUFFIXES)


def is_shown(name: str) -> bool:
    """False for hidden files, as macOS leaves them beside others, and for those it packs into archives."""
    return not name.startswith('.') and name != '__MACOSX'


def split_name(name: str) -> tuple[str, str]:
    """Stem and suffix, the latter in small letters."""
    stem, suffix = os.path.splitext(name)
    return stem, suffix.lower()


def musiccaps_files(folder: Path, skipped: dict[str, str]) -> dict[tuple[str, float | None], Path]:
    """Files by their ytid and, if their name says so, by the second that they start at."""
    files = {}
    for path in audio_files(folder, skipped):
        for stem in (path.stem, path.stem.removeprefix('Y')):
            named = YTID_AND_SECONDS.fullmatch(stem) or TITLE_AND_YTID.fullmatch(stem)
            if named:
                start = named.groupdict().get('start')
                files.setdefault((named['ytid'], None if start is None else float(start)), path)
                if start is not None and float(start) >= 1000:
                    files.setdefault((named['ytid'], float(start) / 1000), path)
    return files


def is_cut(path: Path, start: float, end: float) -> bool:
    """Whether a file is the clip of these seconds, not the whole track: by its length."""
    try:
        with AudioFile(path) as file:
            length = len(file) / file.sample_rate
    except (OSError, ValueError):  # found out when it is checked
        return False
    # a cut at key frames begins early, so that it may be longer than the clip; a track that lasts to the end may seem
    # a bit shorter than that by how lengths are rounded
    return length <= end - start + CUT_TOLERANCE or length < end - END_TOLERANCE


def aspects_of(text: str) -> str:
    """`"['slow', 'piano']"`, as MusicCaps writes it, to `slow, piano`."""
    try:
        return ', '.join(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f'aspect_list must be a list of strings, got {text!r:.60}') from error
