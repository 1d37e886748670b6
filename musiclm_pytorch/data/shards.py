"""Clips in tar shards of the WebDataset format, for data sets that are too many files for a disk to seek through.

Shards are read by position, not as a stream: each process and worker seeks to the samples that are its own. So every
sample is read once an epoch, however many shards, processes and workers there are, and a run resumes where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from musiclm_pytorch import collectives
from musiclm_pytorch.atomic import read_checked_json
from musiclm_pytorch.checks import check_positive, fitted, typechecked
from musiclm_pytorch.data.reading import ClipReader, logger
from musiclm_pytorch.data.shard_reader import Shard
from musiclm_pytorch.extras import needing

INDEX = 'index.json'


def webdataset() -> ModuleType:
    """The package of that name, or an ImportError that says how to install it."""
    with needing('shards need webdataset', 'shards'):
        import webdataset
    return webdataset


class ShardedAudioText(ClipReader, IterableDataset):
    """Clips from tar shards, as items `dict(wave=(samples,) float32 in [-1, 1], caption=str)` at `sample_rate`, mono.

    Each rank gives its own part of an epoch, each worker of a `DataLoader` its own part of that, without repeats or
    gaps; the parts of two ranks differ by one item at most. Pass the loader's `batch_size` here too: then the batches
    of a rank come in one order, whatever the number of workers, and a position in it is a plain count of items.

    The order and what is drawn depend on (seed, epoch, world size) alone. Call `set_epoch` before each epoch. To
    resume, keep `state_dict(position)`, with `position` the number of items that this rank has taken from its epoch
    (batches × batch size, no matter whether items were dropped), and iterate after `load_state_dict`.

    A sample that cannot be read (damaged tar, damaged audio, no caption) is named in the log, counted in `skipped`
    and given as None, which `collate_pairs` drops.

    Args:
        shards: a folder that `write_shards` or another WebDataset writer filled, one of several that `write_shards`
            filled, or the tar files themselves, as paths or as `'name-{000000..000015}.tar'`. Samples are an audio file
            and a .json or .txt with captions.
        sample_rate, max_seconds, min_seconds, seed, training: as in `AudioTextDataset`. Outside of training the order
            is that of the shards.
        batch_size: that of the `DataLoader`.
        mixed_shards: so many shards at a time are shuffled together; they are open at the same time.
        rank, world_size: which part to give, by default as torch.distributed says when iteration begins.

    Raises:
        ImportError: webdataset is not installed. FileNotFoundError, ValueError: no such shards, or none with samples.
    """

    @typechecked
    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        sample_rate: int,
        max_seconds: float | None = 10.0,
        min_seconds: float = 0.5,
        seed: int = 0,
        training: bool = True,
        batch_size: int = 1,
        mixed_shards: int = 16,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        super().__init__(
            sample_rate=sample_rate, max_seconds=max_seconds, min_seconds=min_seconds, seed=seed, training=training
        )
        check_positive(batch_size=batch_size, mixed_shards=mixed_shards)
        if (rank is None) != (world_size is None):
            raise ValueError(f'rank and world_size go together, got rank={rank} and world_size={world_size}')
        if rank is not None and not 0 <= rank < world_size:
            raise ValueError(f'rank must lie in [0, world_size), got {rank} of {world_size}')
        self.batch_size = batch_size
        self.mixed_shards = mixed_shards
        self._given_place = None if rank is None else (rank, world_size)
        self._base_plus_ext = webdataset().tariterators.base_plus_ext
        self._first: dict[Path, str | None] = {}  # of each shard, what the note of its first sample should be
        self._shards = self._find(shards)
        if not self._shards:
            raise ValueError(f'{shards} holds no samples; a sample is an audio file and a .json or .txt with captions')
        # where each shard begins in the whole
        self._starts = [0]
        for _, keys in self._shards:
            self._starts.append(self._starts[-1] + len(keys))
        for name, reason in self._skipped.items():
            logger.warning('skipped %s: %s', name, reason)
        self._share(self.total)

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.total} samples in {len(self._shards)} shards, {self.settings})'

    # what there is

    def _find(self, shards: str | Path | Sequence[str | Path]) -> list[tuple[Path, Sequence[str]]]:
        """Path and keys of the samples of each shard."""
        if isinstance(shards, (str, Path)):
            folder = Path(shards)
            if (folder / INDEX).is_file():
                return self._indexed(folder)
            if folder.is_dir():
                paths = sorted(folder.glob('*.tar'))
                if not paths:
                    return [shard for part in parts_of(folder) for shard in self._indexed(part)]
            else:
                paths = [Path(path) for path in webdataset().shardlists.expand_urls(str(shards))]
        else:
            paths = [Path(path) for path in shards]
        found = []
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f'no shard at {path}')
            with closing(Shard(path, self._base_plus_ext)) as shard:
                if shard.fault:
                    self._skipped[str(path)] = f'damaged, what follows is lost: {shard.fault}'
                keys = [key for key in shard.samples if not shard.lacks(key)]
                self._skipped |= {f'{path}: {key}': shard.lacks(key) for key in shard.samples if shard.lacks(key)}
            if keys:
                found.append((path, keys))
        return found

    def _indexed(self, folder: Path) -> list[tuple[Path, Sequence[str]]]:
        index = read_index(folder)
        if not index['complete']:
            raise ValueError(f'{folder} is not complete: writing was interrupted; run the same write again to go on')
        found = []
        for shard in index['shards']:
            path = folder / shard['name']
            if shard['samples'] and not path.is_file():
                raise FileNotFoundError(f'no shard at {path}, though {folder / INDEX} names it')
            if shard['samples']:
                self._first[path] = shard.get('first')
                found.append((path, NumberedKeys(path, shard['samples'])))
        return found

    @property
    def total(self) -> int:
        """Samples in all shards."""
        return self._starts[-1]

    @property
    def fingerprint(self) -> str:
        """Changes with the shards and their numbers of samples."""
        content = [(path.name, len(keys)) for path, keys in self._shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    # whose part

    @property
    def place(self) -> tuple[int, int]:
        """Rank and world size."""
        return self._given_place or (collectives.rank(), collectives.world_size())

    def __getstate__(self) -> dict[str, Any]:
        # a spawned worker has no process group to ask
        return {**self.__dict__, '_given_place': self.place}

    @property
    def part(self) -> tuple[int, int]:
        """The stretch of the epoch's order that is this rank's."""
        rank, world = self.place
        return self.total * rank // world, self.total * (rank + 1) // world

    def __len__(self) -> int:
        """Items that this rank gives in this epoch, from its position on."""
        first, last = self.part
        return last - first - self.position

    # position

    @property
    def position(self) -> int:
        """Items of this rank's part that are passed over."""
        return int(self._state[1])

    @typechecked
    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Begin with this item of this epoch at the next iteration, in worker processes too."""
        first, last = self.part
        if epoch < 0 or not 0 <= position <= last - first:
            raise ValueError(
                f'epoch must not be negative and position lie between 0 and the {last - first} items of this rank, '
                f'got epoch {epoch} and position {position}'
            )
        self._state[0], self._state[1] = epoch, position

    @typechecked
    def state_dict(self, position: int) -> dict[str, Any]:
        """Where this epoch is once this rank has taken `position` items of it: plain numbers and strings."""
        world_size = self.place[1]
        state = dict(seed=self.seed, world_size=world_size, fingerprint=self.fingerprint, training=self.training)
        # the last batch may be smaller than the others
        return dict(epoch=self.epoch, position=min(position, self.part[1] - self.part[0]), **state)

    @typechecked
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ValueError if it belongs to other shards, or to another order of them."""
        own = self.state_dict(0)
        for key in ('fingerprint', 'seed', 'world_size', 'training'):
            if state.get(key) != own[key]:
                raise ValueError(
                    f'the state was taken with {key} {state.get(key)!r}, but here it is {own[key]!r}: its position '
                    'means nothing; resume with what it was taken with, or begin the next epoch by set_epoch'
                )
        self.set_epoch(state['epoch'], state['position'])

    # items

    def order(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Shard and place in the shard of the samples `first` to `last` of this epoch's order."""
        shards = list(range(len(self._shards)))
        if self.training:
            self._randomness(-1).shuffle(shards)
        begin = 0
        for group in range(0, len(shards), self.mixed_shards):
            mixed = shards[group : group + self.mixed_shards]
            end = begin + sum(len(self._shards[shard][1]) for shard in mixed)
            if begin < last and end > first:
                samples = [(shard, place) for shard in mixed for place in range(len(self._shards[shard][1]))]
                if self.training:
                    self._randomness(-2 - group).shuffle(samples)
                yield from samples[max(0, first - begin) : last - begin]
            begin = end

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first, last = self.part
        opened: OrderedDict[int, Shard] = OrderedDict()
        try:
            for count, (shard, place) in enumerate(self.order(first + self.position, last)):
                # a DataLoader takes a batch of each worker in turn
                if count // self.batch_size % workers == worker:
                    yield self._sample(opened, shard, place)
        finally:
            for shard in opened.values():
                shard.close()

    def _sample(self, opened: OrderedDict[int, Shard], number: int, place: int) -> dict[str, Any] | None:
        path, keys = self._shards[number]
        index = self._starts[number] + place
        try:
            if number not in opened:
                if len(opened) >= self.mixed_shards:
                    opened.popitem(last=False)[1].close()
                opened[number] = self._open(path)
            opened.move_to_end(number)
            audio, captions = opened[number].read(keys[place])
            with audio:
                return self._item(index, audio, captions)
        except (OSError, ValueError, tarfile.TarError) as error:
            self._found_unreadable(index, str(error))
            return None

    def _open(self, path: Path) -> Shard:
        shard = Shard(path, self._base_plus_ext)
        told = self._first.get(path)
        if told is not None and shard.first_note() not in (None, told):
            shard.close()
            raise ValueError(f'it is whole, but not the shard of that name that {INDEX} tells of')
        return shard

    def _name(self, index: int) -> str:
        number, place = self._locate(index)
        path, keys = self._shards[number]
        return f'{path}: {keys[place]}'

    def _locate(self, index: int) -> tuple[int, int]:
        """Shard and place in the shard of a sample of the whole."""
        number = bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]


class ShardItems(Dataset):
    """The samples of shards by index, in the order of the shards: for validation, which looks at the same few."""

    def __init__(self, shards: ShardedAudioText):
        self.shards = shards
        self._opened: OrderedDict[int, Shard] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_opened': OrderedDict()}

    @property
    def sample_rate(self) -> int:
        return self.shards.sample_rate

    def __len__(self) -> int:
        return self.shards.total

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        if not 0 <= index < len(self):
            raise IndexError(f'index {index} lies outside of the {len(self)} samples')
        if self._process != os.getpid():  # a forked worker shares the position in its parent's files
            self._opened, self._process = OrderedDict(), os.getpid()
        return self.shards._sample(self._opened, *self.shards._locate(index))


@dataclass(frozen=True)
class NumberedKeys(Sequence):
    """Keys of the samples of a shard that `write_shards` wrote: made when asked for, as there may be millions."""

    path: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> str:
        return key_of(self.path, place)


def parts_of(folder: Path) -> list[Path]:
    """The folders in a folder that `write_shards` filled, such as the parts of a mixture."""
    return sorted(path.parent for path in folder.glob(f'*/{INDEX}') if any(path.parent.glob('*.tar')))


def key_of(path: Path, place: int) -> str:
    """The key of a sample that `write_shards` wrote."""
    return f'{path.stem}-{place:06d}'


def read_index(folder: Path) -> dict[str, Any]:
    """What `write_shards` notes about a folder. Raises ValueError for a file that is not such a note."""
    path = folder / INDEX
    try:
        index = read_checked_json(path)
        kinds = dict(fingerprint=str, shard_size=int, complete=bool, skipped=dict, shards=list)
        index |= {key: fitted(index[key], kind, key) for key, kind in kinds.items()}
        for shard in index['shards']:
            fitted(shard['name'], str, 'name')
            if not 0 <= fitted(shard['samples'], int, 'samples') <= index['shard_size']:
                raise ValueError(f'{shard["name"]} has {shard["samples"]} samples')
            if Path(shard['name']).name != shard['name']:
                raise ValueError(f'{shard["name"]!r} does not lie beside it')
            # a sample takes a block of the tar at least, and its header another
            if (size := folder / shard['name']).is_file() and shard['samples'] * 1024 > size.stat().st_size:
                raise ValueError(f'{shard["name"]} is too small for {shard["samples"]} samples')
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is damaged or was not written by write_shards: {error}; remove it or the folder'
        ) from error
    return index
