"""Pairs of audio and caption from folders, manifests and MusicCaps, read crop by crop."""

from __future__ import annotations

import copy
import hashlib
import logging
import operator
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, random_split

from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.data import sources
from musiclm_pytorch.data.audio import AudioFile
from musiclm_pytorch.data.clips import Clip, ClipTable, Listing
from musiclm_pytorch.data.reading import ClipReader, first_of, span_at, tables_in

logger = logging.getLogger(__name__)
CHECKED_TOGETHER = 4096  # files whose headers are looked at before more are listed


class AudioTextDataset(ClipReader, Dataset):
    """Clips with captions, as items `dict(wave=(samples,) float32 in [-1, 1], caption=str)` at `sample_rate`, mono.

    Built by `from_folder`, `from_manifest`, `from_musiccaps`, or `from_path`, which tells them apart. Of a long file
    only the crop is read. WAV, FLAC, OGG, MP3, M4A and whatever else `AudioFile` reads, of any rate and channel count.

    What cannot be used is left out, named in the log (at level WARNING) and kept with its reason in `skipped`. A
    missing caption, and whatever a file's header tells (missing, empty, not audio, too short), is found here; damage
    further inside is found when that piece is read: such an item is None, and `collate_pairs` drops it.

    Randomness depends on (seed, epoch, index) alone. Call `set_epoch` before each epoch; it also reaches
    `persistent_workers`.

    Args:
        clips: what to read.
        sample_rate: of the waves given, in Hz: the model's.
        max_seconds: length of a crop; shorter clips keep their length. None gives every clip whole.
        min_seconds: a clip shorter than this is skipped.
        seed: of what is drawn.
        training: draw crop and caption at random; otherwise the middle of the clip and its first caption.
        check_headers: open every file once. Without it, all faults of files are found when they are read.

    Raises:
        ValueError: nothing is usable; the message says why. FileNotFoundError: there is no such folder or manifest.
    """

    @typechecked
    def __init__(
        self,
        clips: Sequence[Clip] | Listing,
        *,
        sample_rate: int,
        max_seconds: float | None = 10.0,
        min_seconds: float = 0.5,
        seed: int = 0,
        training: bool = True,
        check_headers: bool = True,
    ):
        super().__init__(
            sample_rate=sample_rate, max_seconds=max_seconds, min_seconds=min_seconds, seed=seed, training=training
        )
        listing = clips if isinstance(clips, Listing) else Listing('the list of clips', clips, {})
        self.source = listing.source
        self._skipped = dict(listing.skipped)
        self.clips = listing.clips if isinstance(listing.clips, ClipTable) else list(listing.clips)
        if check_headers:
            self._check_headers()
        for name, reason in self._skipped.items():
            logger.warning('skipped %s: %s', name, reason)
        if not self.clips:
            raise ValueError(f'{self.source} gives no usable clip; {first_of(self._skipped)}{tables_in(self.source)}')
        if self._skipped:
            logger.warning('%s: %d clips, %d skipped', self.source, len(self.clips), len(self._skipped))
        self._share(len(self.clips))

    def __repr__(self) -> str:
        return f'{type(self).__name__}({len(self.clips)} clips of {self.source}, {self.settings})'

    @classmethod
    def from_folder(cls, folder: str | Path, **keywords: Any) -> AudioTextDataset:
        """Audio files under `folder` with a .txt (a caption a line) or .json of the same name; see `list_folder`."""
        return cls(sources.list_folder(folder), **keywords)

    @classmethod
    def from_manifest(
        cls, path: str | Path, audio_folder: str | Path | None = None, **keywords: Any
    ) -> AudioTextDataset:
        """A CSV, TSV or JSONL with paths relative to `audio_folder`, by default to itself; see `list_manifest`."""
        return cls(sources.list_manifest(path, audio_folder), **keywords)

    @classmethod
    def from_musiccaps(
        cls, path: str | Path, audio_folder: str | Path, aspects: bool = True, **keywords: Any
    ) -> AudioTextDataset:
        """MusicCaps' CSV over a folder of clips or whole tracks named by ytid; see `list_musiccaps`."""
        return cls(sources.list_musiccaps(path, audio_folder, aspects), **keywords)

    @classmethod
    def from_path(cls, source: str | Path, audio_folder: str | Path | None = None, **keywords: Any) -> AudioTextDataset:
        """A folder, or a manifest, MusicCaps' too, whose audio may lie in `audio_folder`."""
        return cls(sources.list_clips(source, audio_folder), **keywords)

    def _check_headers(self) -> None:
        usable = []
        # opening a file mostly waits for the disk or the network
        with ThreadPoolExecutor(max_workers=8) as pool:
            for first in range(0, len(self.clips), CHECKED_TOGETHER):
                clips = self.clips[first : first + CHECKED_TOGETHER]
                for index, reason in enumerate(pool.map(self._fault_in_header, clips), first):
                    if reason:
                        self._skipped[self._name(index)] = reason
                    else:
                        usable.append(index)
        if len(usable) < len(self.clips):
            self.clips = _taken(self.clips, usable)

    def _fault_in_header(self, clip: Clip) -> str | None:
        try:
            with AudioFile(clip.path) as file:
                span_at(file, clip.start, clip.end, self.sample_rate, self.min_seconds)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """`dict(wave=(samples,) float32, caption=str)`, or None for a clip that cannot be read."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} lies outside of the {len(self)} clips')
        index %= len(self)
        clip = self.clips[index]
        try:
            with AudioFile(clip.path) as file:
                return self._item(index, file, clip.captions, (clip.start, clip.end))
        except (OSError, ValueError) as error:
            self._found_unreadable(index, str(error))
            return None

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of a clip."""
        return self.clips[index].captions

    def _name(self, index: int) -> str:
        return self.clips[index].name

    @typechecked
    def set_epoch(self, epoch: int) -> None:
        """Draw crops and captions of this epoch from now on, in worker processes too."""
        if epoch < 0:
            raise ValueError(f'epoch must not be negative, got {epoch}')
        self._state[0] = epoch

    def validation(self) -> AudioTextDataset:
        """The same clips with fixed crops and captions, the same at each visit."""
        return self._of(self.clips, training=False)

    @typechecked
    def split(self, valid_fraction: float = 0.05, seed: int = 42) -> tuple[AudioTextDataset, AudioTextDataset]:
        """Two data sets, for training and (with fixed crops) for validation, that share no recording.

        Which recordings are held out depends on their names and `seed`, not on their order or on the machine. At least
        one is on either side. Raises ValueError if there are not two.
        """
        if not 0 < valid_fraction < 1:
            raise ValueError(f'valid_fraction must lie between 0 and 1, got {valid_fraction}')
        recordings = set(_recordings(self.clips))
        if len(recordings) < 2:
            raise ValueError(f'{self.source} has one recording only, {recordings.pop()}; splitting needs at least two')

        def rank(recording: str) -> bytes:  # the names of files need not be UTF-8
            return hashlib.sha256(f'{seed} {recording}'.encode('utf-8', 'surrogatepass')).digest()

        ranked = sorted(recordings, key=rank)
        held_out = set(ranked[: min(max(1, round(valid_fraction * len(ranked))), len(ranked) - 1)])
        sides = {True: [], False: []}
        for index, recording in enumerate(_recordings(self.clips)):
            sides[recording in held_out].append(index)
        train, valid = (_taken(self.clips, sides[side]) for side in (False, True))
        return self._of(train, training=self.training), self._of(valid, training=False)

    def _of(self, clips: Sequence[Clip], training: bool) -> AudioTextDataset:
        view = copy.copy(self)
        view.clips, view.training = clips, training
        view._share(len(clips))
        view.set_epoch(self.epoch)
        return view


def _recordings(clips: Sequence[Clip]) -> Iterable[str]:
    return clips.recordings() if isinstance(clips, ClipTable) else (it.recording or str(it.path) for it in clips)


def _taken(clips: Sequence[Clip], indices: Iterable[int]) -> Sequence[Clip]:
    return clips.take(indices) if isinstance(clips, ClipTable) else [clips[index] for index in indices]


def split_off(
    dataset: Dataset, valid_frac: float, random_split_seed: int, *, least: int = 0
) -> tuple[Dataset, Dataset]:
    """What is left to train on, and a share that is held out, of `least` items at least; of an `AudioTextDataset` by
    recording, and with fixed crops."""
    if isinstance(dataset, AudioTextDataset):
        return dataset.split(valid_frac, seed=random_split_seed)
    held_out = max(least, int(len(dataset) * valid_frac))
    generator = torch.Generator().manual_seed(random_split_seed)
    return tuple(random_split(dataset, [len(dataset) - held_out, held_out], generator=generator))
