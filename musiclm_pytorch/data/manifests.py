"""Clips and captions written down in tables: CSV, TSV and JSONL. No audio is opened here."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.data.cells import (
    AUDIO_KEYS,
    OTHER_AUDIO_KEYS,
    RENAME,
    caption_places,
    captions_at,
    in_jamendo,
    local,
    missing,
    reads_as_time,
    seconds,
    simple,
    words,
)
from musiclm_pytorch.data.clips import Clip, ClipTable, Listing, Recordings
from musiclm_pytorch.data.tables import take_rows

TIME_KEY = re.compile(
    r'(?P<kind>start|begin|onset|offset|end|stop|duration)(?:time)?(?:in)?(?:(?P<ms>ms|msecs?|milliseconds?|millis)'
    r'|s|secs?|seconds?)?'
)
TIME_WORDS = {'start', 'begin', 'onset', 'offset', 'end', 'stop'}
OTHER_TIME_KEYS = {'time', 'times', 'timestamp', 'timestamps', 'from', 'to', 't0', 't1', 't2'}


@typechecked
def list_manifest(path: str | Path, audio_folder: str | Path | None = None) -> Listing:
    """Rows of a CSV, TSV or JSONL file, in UTF-8: a sound file, what is said about it, perhaps from when to when.

    - The file is under `audio`, `path` or `file_name`, or under another usual name of it (`file`, `audio_filepath`, …),
      relative to `audio_folder`, by default the folder of the manifest.
    - Captions are under `caption`, `text`, `captions`, `caption_1`, … (all of them count), or else under one of
      `description`, `transcription`, `transcript`, `sentence` and `prompt`. `captions` may be a list, in a table
      written as JSON. A row without a caption is skipped.
    - `start` (`begin`, `onset`) and `end` (`stop`), also as `start_time`, `start_s` and `start_ms`, are numbers or
      `mm:ss` or `hh:mm:ss.fff`; `duration` counts from `start` or `offset`. Without these, `duration` is the length of
      the file and changes nothing.
    - Case and spaces in names do not matter. A CSV may be separated by semicolons or tabs. In a TSV, a quote is a
      character.
    - Tables of MTG-Jamendo give their tags as a caption; there and in Song Describer's, `1.mp3` is also found as
      `1.low.mp3` or `1.2min.mp3`. All rows of Song Describer count, validated or not.

    Raises FileNotFoundError, and ValueError that names the line for what is not written as it should be, and for
    columns whose meaning is not certain.
    """
    path = Path(path)
    root = path.parent if audio_folder is None else Path(audio_folder)
    if audio_folder is not None and not root.is_dir():
        raise FileNotFoundError(f'no folder of audio at {root}')
    listing = Listing(str(path), ClipTable(root), {})
    add_rows(listing, path, '', Recordings(root))
    return listing


def add_rows(listing: Listing, path: Path, folder: str, recordings: Recordings) -> None:
    """Add the clips of a manifest to a listing with a `ClipTable`, whose root holds the files in `folder`."""
    # objects of a JSONL need not all have the same keys
    layout = functools.lru_cache(maxsize=256)(functools.partial(Columns, is_table=path.suffix.lower() != '.jsonl'))
    root = listing.clips.root
    base = root / folder

    def add(line: int, names: tuple[str, ...], cells: Sequence[Any]) -> None:
        columns = layout(names)
        audio = os.path.join(folder, columns.audio_in(cells, base))
        if columns.is_jamendo:
            audio = in_jamendo(root, audio)
        captions, (start, end) = columns.captions_in(cells), columns.span_in(cells)
        if captions:
            listing.clips.append(audio, captions, start, end, recordings.name(audio))
        else:
            name = Clip(root / audio, (), start, end).name
            listing.skipped[name] = f'no caption in line {line} of {path}; it has {", ".join(names)}'

    take_rows(path, add)


class Columns:
    """Which columns or keys of a manifest hold what. Raises ValueError where that is not certain.

    Args:
        names: as the file has them.
        is_table: each row has every column, so that one for captions must be among them.
    """

    def __init__(self, names: Sequence[str], is_table: bool):
        self.names = tuple(names)
        plain = [simple(name) for name in names]
        listed = f'there are {", ".join(repr(name) for name in names)}' if names else 'there are none'
        self.audio = [place for key in AUDIO_KEYS for place in self._only(plain, {key})]
        self.audio = self.audio or self._only(plain, OTHER_AUDIO_KEYS)
        if not self.audio:
            hint = '; for MusicCaps pass the folder of its audio too' if 'ytid' in plain else ''
            raise ValueError(
                f'no column or key audio, path or file_name: {listed}; name that of the sound files so{hint}'
            )
        self.is_jamendo = {'trackid', 'path', 'duration'} <= set(plain)
        self.tags = self._only(plain, {'tags'}) if self.is_jamendo else []
        self.captions = caption_places(names)
        if is_table and not self.captions and not self.tags:
            raise ValueError(f'no column caption or text: {listed}; name that of the captions so')
        self._find_times(plain)

    def _only(self, plain: Sequence[str], keys: set[str]) -> list[int]:
        """Where one of the keys is, if it is there."""
        return self._single([place for place, name in enumerate(plain) if name in keys])

    def _single(self, places: list[int]) -> list[int]:
        if len(places) > 1:
            raise ValueError(f'{" and ".join(repr(self.names[it]) for it in places)} may mean the same; {RENAME}')
        return places

    def _find_times(self, plain: Sequence[str]) -> None:
        found: dict[str, list[int]] = {}
        factors = {}
        for place, name in enumerate(plain):
            if key := TIME_KEY.fullmatch(name):
                kind = {'begin': 'start', 'stop': 'end'}.get(key['kind'], key['kind'])
                found.setdefault(kind, []).append(place)
                factors[place] = 0.001 if key['ms'] else 1.0
        if 'onset' in found:  # annotations of events: from onset to offset
            found['start'] = found.get('start', []) + found.pop('onset')
            found['end'] = found.get('end', []) + found.pop('offset', [])
        elif 'offset' in found and {'duration', 'end'} & found.keys():
            found['start'] = found.get('start', []) + found.pop('offset')
        self.times = counted = {}
        for kind in ('start', 'end', 'duration'):
            if kind == 'duration' and ('start' not in counted or 'end' in counted):
                break  # the length of the file, or that of the clip once more
            for place in self._single(found.get(kind, [])):
                counted[kind] = (place, factors[place])
        # of the others, what reads as a time might be one, unless both ends are known
        self.doubtful = []
        if not ('start' in counted and len(counted) > 1):
            known = {place for place, _ in counted.values()} | set(found.get('duration', []))
            self.doubtful = [
                place
                for place, name in enumerate(self.names)
                if place not in known and (TIME_WORDS & set(words(name)) or plain[place] in OTHER_TIME_KEYS)
            ]
            if 'start' in counted:
                self.doubtful += [place for place, name in enumerate(plain) if name.startswith(('length', 'duration'))]

    def audio_in(self, cells: Sequence[Any], root: Path) -> str:
        """The file of a row, as the system writes paths."""
        for place in self.audio:
            value = cells[place]
            if isinstance(value, dict):  # as Hugging Face's datasets write it
                value = value.get('path')
            if not missing(value):
                break
        else:
            raise ValueError(f'no file name under {" or ".join(self.names[it] for it in self.audio)}')
        if not isinstance(value, str):
            raise ValueError(f'{self.names[place]} must be the path of a file, got {value!r:.60}')
        return local(value.strip(), root)

    def captions_in(self, cells: Sequence[Any]) -> list[str]:
        if self.captions:
            return captions_at(self.names, cells, self.captions)
        tags = [tag for place in self.tags for tag in cells[place:] if not missing(tag)]
        if not all(isinstance(tag, str) and '---' in tag for tag in tags):
            raise ValueError(
                f'{self.names[self.tags[0]]} must hold tags such as genre---rock, got {tags!r:.60}; rename the column '
                'to caption if it holds captions'
            )
        return [', '.join(tag.split('---', 1)[1] for tag in tags)] if tags else []

    def span_in(self, cells: Sequence[Any]) -> tuple[float, float | None]:
        """Start and end in seconds; None is the end of the file."""
        for place in self.doubtful:
            if reads_as_time(cells[place]):
                raise ValueError(
                    f'{self.names[place]} {cells[place]!r:.60} reads as a time, but it is not certain which; rename '
                    'the columns to start and end if they are those of the clip (in seconds, or start_ms and end_ms), '
                    'and to something else if not'
                )
        if not self.times:
            return 0.0, None
        times = {kind: seconds(cells[place], self.names[place], by) for kind, (place, by) in self.times.items()}
        start, end = times.get('start') or 0.0, times.get('end')
        if times.get('duration') is not None:
            end = start + times['duration']
        if end is not None and end <= start:
            raise ValueError(f'end {end:g} must be greater than start {start:g}')
        return start, end
