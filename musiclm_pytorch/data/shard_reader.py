"""One tar shard as a table of samples."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from musiclm_pytorch.atomic import checksum_of_bytes, checksum_of_json, parsed_json
from musiclm_pytorch.data.audio import AudioFile
from musiclm_pytorch.data.cells import captions_in_file
from musiclm_pytorch.data.sources import AUDIO_SUFFIXES, is_shown, split_name

# what `write_shards` adds to a note; what others wrote has neither
NOTE_CHECKSUM, AUDIO_CHECKSUM = 'xxh3', 'audio_xxh3'
SMALL = 2**22  # bytes of audio that are read whole to see that they are what was written; of more, only the crop is


class Shard:
    """A tar file as a table of samples, read by key. Attribute `fault` tells why its end could not be read, if so."""

    def __init__(self, path: Path, base_plus_ext):
        self.path = path
        self.fault: str | None = None
        self.samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        self._file = open(path, 'rb')  # noqa: SIM115
        size = os.fstat(self._file.fileno()).st_size
        try:
            # past a damaged header, look for the next one
            self._tar = tarfile.open(fileobj=self._file, mode='r:', ignore_zeros=True)  # noqa: SIM115
            for member in self._tar:
                name = posixpath.normpath(member.name)
                key, suffix = base_plus_ext(name)
                if member.offset_data + member.size > size:
                    self.fault = f'it ends within {member.name}'
                elif member.isfile() and key is not None and all(is_shown(it) for it in name.split('/') if it != '..'):
                    self.samples.setdefault(key, {})[f'.{suffix}'] = member
        except (tarfile.TarError, OSError) as error:
            self.fault = self.fault or str(error)
        self.samples = dict(sample for key in self.samples for sample in self._told_apart(key))

    def _told_apart(self, key: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
        """WebDataset ends a key at the first dot of a name. But titles may hold dots, too: what is a sample by all of
        its name but the suffix is one of its own."""
        groups: dict[str, dict[str, tarfile.TarInfo]] = {}
        for suffix, member in self.samples[key].items():
            stem, last = split_name(suffix) if '.' in suffix[1:] else ('', suffix.lower())
            groups.setdefault(stem, {})[last] = member
        titles = {stem: members for stem, members in groups.items() if stem and not lacks(members)}
        rest = {stem + last: it for stem in groups if stem not in titles for last, it in groups[stem].items()}
        if rest:
            yield key, rest
        yield from ((key + stem, members) for stem, members in titles.items())

    def first_note(self) -> str | None:
        """The checksum of the note of the first sample, if it is whole: which shard this is."""
        members = next(iter(self.samples.values()), {})
        if '.json' not in members:
            return None
        try:
            note = note_in(self._tar.extractfile(members['.json']).read())
        except (OSError, ValueError, tarfile.TarError):
            return None
        told = note.get(NOTE_CHECKSUM)
        return told if told == checksum_of_note(note) else None

    def close(self) -> None:
        self._file.close()

    def lacks(self, key: str) -> str | None:
        """Why a sample cannot be read, as far as names tell."""
        if key not in self.samples:
            return 'not in the shard, which is damaged' + (f': {self.fault}' if self.fault else '')
        return lacks(self.samples[key])

    def read(self, key: str) -> tuple[AudioFile, tuple[str, ...]]:
        """The audio, opened inside of the tar, and the captions. Raises ValueError for what is missing or damaged."""
        if fault := self.lacks(key):
            raise ValueError(fault)
        members = self.samples[key]
        (suffix,), texts = parts(members)
        captions = []
        for text in texts:
            name, content = members[text].name, self._tar.extractfile(members[text]).read()
            captions += captions_in_file(content, text, name)
            note = note_in(content) if text == '.json' else {}
            if NOTE_CHECKSUM in note and note[NOTE_CHECKSUM] != checksum_of_note(note):
                raise ValueError(f'{name} is damaged: it is not what was written, by its checksum')
            told, member = note.get(AUDIO_CHECKSUM), members[suffix]
            if told is None or member.size > SMALL:
                continue
            if told != checksum_of_bytes(self._tar.extractfile(member).read()):
                raise ValueError(f'{member.name} is damaged: it is not what was written, by its checksum')
        if not captions:
            names = ' and '.join(members[text].name for text in texts)
            raise ValueError(f'no caption: {names} is empty, or has none under caption, text or captions')
        member = members[suffix]
        status = os.fstat(self._file.fileno())
        content = (os.path.abspath(self.path), status.st_size, status.st_mtime_ns, member.offset_data)
        audio = AudioFile(self._tar.extractfile(member), f'{self.path}: {member.name}', content)
        return audio, tuple(dict.fromkeys(captions))


def note_in(content: bytes) -> dict[str, Any]:
    """What a .json beside a clip holds, if it is an object."""
    note = parsed_json(content.decode('utf-8-sig')) if content.strip() else None
    return note if isinstance(note, dict) else {}


def checksum_of_note(note: dict[str, Any]) -> str:
    """The checksum of a note, but for the one that stands in it."""
    return checksum_of_json({key: it for key, it in note.items() if key != NOTE_CHECKSUM})


def parts(members: Iterable[str]) -> tuple[list[str], list[str]]:
    """Suffixes of the audio and of the caption files of a sample."""
    return [it for it in members if it in AUDIO_SUFFIXES], [it for it in members if it in ('.json', '.txt')]


def lacks(members: Iterable[str]) -> str | None:
    """Why files of these suffixes are no sample."""
    audio, captions = parts(members)
    if len(audio) == 1 and captions:
        return None
    return f'a sample needs one audio file and a .json or .txt, but has {", ".join(members)}'
