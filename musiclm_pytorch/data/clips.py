"""What a data set is made of: clips, and lists of millions of them."""

from __future__ import annotations

import functools
import json
import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(',', ':')).encode


@dataclass(frozen=True, slots=True)
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


class ClipTable(Sequence):
    """A sequence of `Clip` that takes little more memory than the text it was read from.

    The clips lie in one buffer and are made when asked for; worker processes share it, whether forked or not.

    Args:
        root: the folder that relative paths start from.
    """

    def __init__(self, root: Path):
        self.root = root
        self._buffer = bytearray()
        self._ends = array('Q', [0])

    def append(
        self, path: str, captions: Iterable[str], start: float = 0.0, end: float | None = None, recording: str = ''
    ) -> None:
        """Add a clip. `path` is absolute or relative to `root`; captions that repeat are kept once."""
        fields = [path, *dict.fromkeys(captions)]
        # what is most often so need not be stored: the whole file, and a recording that is named as the file
        beside = None if recording == os.path.splitext(path)[0] else recording
        if start or end is not None:
            fields.append([beside, start, end])
        elif beside is not None:
            fields.append([beside])
        self._buffer += ENCODE(fields).encode('utf-8', 'surrogatepass')
        self._ends.append(len(self._buffer))

    def take(self, indices: Iterable[int]) -> ClipTable:
        """The clips of these indices, as a table of its own."""
        table = ClipTable(self.root)
        for index in indices:
            table._buffer += self._buffer[self._ends[index] : self._ends[index + 1]]
            table._ends.append(len(table._buffer))
        return table

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} lies outside of the {len(self)} clips')
        path, captions, recording, span = self._stored(index % len(self))
        return Clip(self.root / path, tuple(captions), *(span or (0.0, None)), recording)

    def recordings(self) -> Iterator[str]:
        """The recording of each clip, or its path where it has none."""
        for index in range(len(self)):
            path, _, recording, _ = self._stored(index)
            yield recording or str(self.root / path)

    def _stored(self, index: int) -> tuple[str, list[str], str, list]:
        stored = self._buffer[self._ends[index] : self._ends[index + 1]]
        path, *captions = json.loads(stored.decode('utf-8', 'surrogatepass'))
        beside, *span = captions.pop() if isinstance(captions[-1], list) else [None]
        return path, captions, os.path.splitext(path)[0] if beside is None else beside, span


@dataclass
class Listing:
    """Clips that a source names, and the reason of each name that gave none."""

    source: str
    clips: Sequence[Clip]
    skipped: dict[str, str]


class Recordings:
    """One name for a file however it is spelt, the same on every machine; formats of one name are one recording.

    Links count as what they lead to, and hard links as the first of them that is met. Where a folder really lies is
    found out once.

    Args:
        root: the folder that names are relative to.
    """

    def __init__(self, root: Path):
        self._root = os.path.realpath(root)
        self._hard_links: dict[tuple[int, int], str] = {}
        self._folder = functools.lru_cache(maxsize=4096)(self._find_folder)
        self._real = functools.lru_cache(maxsize=4096)(self._find_real)

    def name(self, path: str) -> str:
        """The recording of a file, by its path, absolute or relative to the root."""
        folder, name = os.path.split(path)
        real, from_root = self._folder(folder)
        try:
            status = os.lstat(real + name)
            if stat.S_ISLNK(status.st_mode):
                folder, name = os.path.split(os.path.realpath(real + name))
                real, from_root = self._folder(folder)
                status = os.stat(real + name)
        except OSError:  # that there is no such file is found out when it is opened
            status = None
        recording = from_root + os.path.splitext(name)[0]
        if status is not None and status.st_nlink > 1:
            return self._hard_links.setdefault((status.st_dev, status.st_ino), recording)
        return recording

    def _find_folder(self, folder: str) -> tuple[str, str]:
        """Where a folder really lies, and how it is reached from the root, to be put before the name of a file."""
        real = self._real(os.path.join(self._root, folder).rstrip('/') or '/')
        from_root = Path(os.path.relpath(real, self._root)).as_posix()
        return os.path.join(real, ''), '' if from_root == '.' else f'{from_root}/'

    def _find_real(self, folder: str) -> str:
        above, name = os.path.split(folder)
        if name in ('', '.', '..'):
            return os.path.realpath(folder)
        path = os.path.join(self._real(above), name)
        return os.path.realpath(path) if os.path.islink(path) else path
