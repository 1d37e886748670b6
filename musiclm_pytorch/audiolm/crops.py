"""Crops of cached tokens, those of all streams at the same time of the same clip."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from musiclm_pytorch.atomic import read_tensors
from musiclm_pytorch.audiolm.fingerprints import differences
from musiclm_pytorch.audiolm.stages import PAD
from musiclm_pytorch.audiolm.tokens import SHARD, STREAM_FILE, read_stream, shard_identity
from musiclm_pytorch.checks import check_choice, check_positive, typechecked

# length of the crops that each stage is trained on (MusicLM, arXiv 2301.11325, section 4.1), in seconds
STAGE_SECONDS = dict(semantic=30.0, coarse=10.0, fine=3.0)
STAGE_STREAMS = dict(semantic=('semantic',), coarse=('semantic', 'codec'), fine=('codec',))


class TokenCrops(Dataset):
    """What a stage is trained on, from a cache that `compute_tokens` filled.

    Items are dicts of int64 tensors: `semantic (n,)` and `codec (t, q)`, as the stage needs them, of one crop, and
    with `conditioning` the `(q,)` codes of MuLaN, with `melody` the `(m, q)` codes of its windows, with `words` the
    `(w,)` ids of the text's tokens. Crops begin where frames of all streams begin, and clips shorter than a crop are
    whole. What the data set could not read is left out.

    Args:
        folder: the cache, or several, whose tokens are of the same modules and follow one another.
        stage: 'semantic', 'coarse' or 'fine'.
        seconds: length of the crops; by default 30, 10 and 3 s for the three stages.
        conditioning: give MuLaN's codes too, those of the window nearest to the middle of the crop.
        text_share: share of the items that have the codes of their text instead.
        melody: give the codes of melodies too, of the windows that begin within the crop; it begins with one.
        words: give the ids of the text's tokens too.
        begin_share: share of the crops in training that begin where their clip does. Music is made from its beginning,
            which random crops hardly see: a stage may then take the quiet before the first note for silence, and go on.
        training: draw crops at random; otherwise the middle of each clip.
        items: indices of the data set that are used, all by default.

    Raises:
        FileNotFoundError: a stream is missing; ValueError: it is not complete, or streams are of different data.
    """

    @typechecked
    def __init__(
        self,
        folder: str | Path | Sequence[str | Path],
        stage: str,
        *,
        seconds: float | None = None,
        conditioning: bool = True,
        text_share: float = 0.0,
        melody: bool = False,
        words: bool = False,
        begin_share: float = 0.0,
        training: bool = True,
        items: Sequence[int] | None = None,
    ):
        check_choice(STAGE_STREAMS, stage=stage)
        check_positive(seconds=seconds)
        if not 0 <= text_share <= 1:
            raise ValueError(f'text_share must lie in [0, 1], got {text_share}')
        if not 0 <= begin_share <= 1:
            raise ValueError(f'begin_share must lie in [0, 1], got {begin_share}')
        if text_share > 0 and not conditioning:
            raise ValueError('text_share needs conditioning=True')
        folders = [folder] if isinstance(folder, str | Path) else folder
        self.folders = [Path(it) for it in folders]
        if len({it.resolve() for it in self.folders}) < max(1, len(self.folders)):
            raise ValueError(f'pass one folder of tokens or several that differ, got {[*map(str, self.folders)]}')
        self.stage = stage
        self.seconds = STAGE_SECONDS[stage] if seconds is None else seconds
        self.conditioning = conditioning
        self.text_share = text_share
        self.melody = melody
        self.words = words
        self.begin_share = begin_share
        self.training = training
        self.timed = STAGE_STREAMS[stage]
        names = [*self.timed]
        if conditioning and text_share < 1:
            names.append('audio')
        if conditioning and text_share > 0:
            names.append('text')
        if melody:
            names.append('melody')
        if words:
            names.append('words')
        self.streams = {name: _Joined([it / name for it in self.folders]) for name in names}
        first, *others = self.streams.values()
        for other in others:
            for one, same in zip(first.parts, other.parts):
                if any(one.about[key] != same.about[key] for key in ('data', 'items')):
                    raise ValueError(f'{one.folder} and {same.folder} were computed from different data sets')

        present = np.logical_and.reduce([stream.lengths > 0 for stream in self.streams.values()])
        if items is not None:
            present &= np.isin(np.arange(len(present)), items)
        self.items = np.flatnonzero(present)
        if len(self.items) == 0:
            raise ValueError(f'{self.shown} has no item with tokens for the stage {stage!r}')
        # the least time after which frames of all streams begin together
        rates = [self.streams[name].rate for name in (*self.timed, *(('melody',) if melody else ()))]
        common = Fraction(math.gcd(*(r.numerator for r in rates)), math.lcm(*(r.denominator for r in rates)))
        self.grid = 1 / common
        for name, rate in zip(self.timed, rates):
            if self.frames(name) < 1:
                raise ValueError(
                    f'{self.seconds} s hold not even one frame of the {name} tokens, {float(rate):g} a second'
                )

    @property
    def shown(self) -> str:
        """The folders, for messages."""
        return ' and '.join(map(str, self.folders))

    def facts(self, name: str) -> dict[str, Any]:
        """What is known of a stream: `codebook_size`, `quantizers` and others."""
        return self.streams[name].about['facts']

    @property
    def windows_per_token(self) -> Fraction:
        """Windows of melodies that begin in the time of a semantic token."""
        return self.streams['melody'].rate / (self.streams['semantic'].rate * self.facts('semantic')['quantizers'])

    def frames(self, name: str, rounded: Callable[[Fraction], int] = math.floor) -> int:
        """Frames of a stream that a crop holds."""
        return rounded(Fraction(str(self.seconds)) * self.streams[name].rate)

    def __repr__(self) -> str:
        streams = ', '.join(self.streams)
        return (
            f'{type(self).__name__}({len(self)} items of {self.shown}, {self.stage}: {self.seconds:g} s of {streams})'
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = int(self.items[index])
        streams = [self.streams[name] for name in self.timed]
        lengths = [self.frames(name) for name in self.timed]
        free = min(Fraction(int(s.lengths[item]) - n) / s.rate for s, n in zip(streams, lengths))
        places = max(0, math.floor(free / self.grid)) + 1
        if not self.training:
            place = places // 2
        elif self.begin_share and random.random() < self.begin_share:
            place = 0
        else:
            place = random.randrange(places)
        start = place * self.grid
        crop = {}
        for name, stream, length in zip(self.timed, streams, lengths):
            first = int(start * stream.rate)
            crop[name] = stream.read(item, first, first + length)
        if 'semantic' in crop:
            crop['semantic'] = rearrange(crop['semantic'], 'n g -> (n g)')  # groups stand one after another
        if self.conditioning:
            crop['conditioning'] = self._codes(item, float(start) + self.seconds / 2)
        if self.melody:
            stream = self.streams['melody']
            first = int(start * stream.rate)
            crop['melody'] = stream.read(item, first, first + self.frames('melody', math.ceil))
        if self.words:
            stream = self.streams['words']
            crop['words'] = stream.read(item, 0, int(stream.lengths[item]))[:, 0]
        return crop

    def _codes(self, item: int, middle: float) -> Tensor:
        if self.text_share == 1 or (self.training and random.random() < self.text_share):
            return self.streams['text'].read(item, 0, 1)[0]
        stream = self.streams['audio']
        about = self.facts('audio')
        window = round((middle - about['seconds'] / 2) / about['hop'])
        window = min(max(window, 0), int(stream.lengths[item]) - 1)
        return stream.read(item, window, window + 1)[0]

    def split(self, valid_fraction: float, seed: int = 42) -> tuple[TokenCrops, TokenCrops]:
        """Two parts, for training and, with fixed crops, for validation; at least one item is on either side."""
        if not 0 < valid_fraction < 1:
            raise ValueError(f'valid_fraction must lie between 0 and 1, got {valid_fraction}')
        if len(self) < 2:
            raise ValueError(f'{self.shown} has one item only; splitting needs at least two')
        held_out = min(max(1, round(valid_fraction * len(self))), len(self) - 1)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).numpy()
        parts = (order[held_out:], self.training), (order[:held_out], False)
        return tuple(self._of(np.sort(self.items[chosen]), training) for chosen, training in parts)

    def _of(self, items: np.ndarray, training: bool) -> TokenCrops:
        names = 'seconds', 'conditioning', 'text_share', 'melody', 'words', 'begin_share'
        keywords = {name: getattr(self, name) for name in names}
        return TokenCrops(self.folders, self.stage, training=training, items=items.tolist(), **keywords)


class _Joined:
    """The same stream of one or more caches, one after another."""

    def __init__(self, folders: Sequence[Path]):
        self.parts = [_Stream(it) for it in folders]
        first, *others = self.parts
        for other in others:
            if changes := [
                it for key in ('module', 'facts') for it in differences(first.about[key], other.about[key], key)
            ]:
                raise ValueError(
                    f'{other.folder} was not computed as {first.folder} was: {changes[0]}; compute one of them again'
                )
        self.about, self.rate = first.about, first.rate
        self.lengths = np.concatenate([it.lengths for it in self.parts])
        self.firsts = np.cumsum([0, *(len(it.lengths) for it in self.parts)])

    def read(self, item: int, start: int, stop: int) -> Tensor:
        """`(frames, q)` int64, of the frames that there are."""
        part = int(np.searchsorted(self.firsts, item, side='right')) - 1
        return self.parts[part].read(item - int(self.firsts[part]), start, stop)


class _Stream:
    """One stream of a cache; files are opened where they are read, in each process its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.about = read_stream(folder)
        # 50 or 625/8, exactly; MuLaN's codes have no rate
        self.rate = Fraction(self.about['facts'].get('rate', 0))
        shards = -(-self.about['items'] // self.about['shard_size'])
        there = {path.name for path in folder.glob('*.safetensors')}
        first = next((number for number in range(shards) if SHARD.format(number) not in there), None)
        if first is not None:
            raise ValueError(
                f'{folder} lacks {max(1, shards - len(there))} of {shards} shards, the first {SHARD.format(first)}; '
                'call compute_tokens again, which goes on where it was'
            )
        ends = [self._ends(number) for number in range(shards)]
        self.lengths = np.concatenate([np.diff(own, prepend=0) for own in ends])
        self.starts = np.concatenate([own - np.diff(own, prepend=0) for own in ends])
        self._open: dict[int, Any] = {}

    def _path(self, number: int) -> Path:
        return self.folder / SHARD.format(number)

    def _ends(self, number: int) -> np.ndarray:
        """Where each item of a shard ends, as far as can be told without reading the tokens."""
        path, size, items = self._path(number), self.about['shard_size'], self.about['items']
        try:
            with safe_open(str(path), 'np') as file:
                ends, shape = file.get_tensor('ends'), file.get_slice('values').get_shape()
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise ValueError(f'{path} is damaged: {error}; remove it, and go on with compute_tokens') from error
        whole = ends.shape == (min(size, items - number * size),) and ends.dtype.kind == 'i' and len(shape) == 2
        whole = whole and shape == [int(ends[-1]), self.about['facts']['quantizers']]
        if not whole or (np.diff(ends, prepend=0) < 0).any():
            raise ValueError(
                f'{path} is damaged: it holds tokens of shape {shape} for {ends.shape} items, which is not what '
                f'{STREAM_FILE} says; remove it, and go on with compute_tokens'
            )
        return ends

    def _check(self, number: int) -> None:
        """Raise ValueError for a shard that is not what was written."""
        try:
            values = read_tensors(self._path(number), part_of=shard_identity(self.about, number))['values']
            size = self.about['facts']['codebook_size']
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < size:
                raise ValueError(f'{self._path(number)} is damaged: it holds other tokens than the {size} there are')
        except ValueError as error:
            raise ValueError(f'{error}; remove it, and go on with compute_tokens') from error

    def read(self, item: int, start: int, stop: int) -> Tensor:
        """`(frames, q)` int64, of the frames that there are."""
        number = item // self.about['shard_size']
        if number not in self._open:
            self._check(number)
            self._open[number] = safe_open(str(self._path(number)), 'pt').get_slice('values')
        first, length = int(self.starts[item]), int(self.lengths[item])
        return self._open[number][first + min(start, length) : first + min(stop, length)].long()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_open': {}}


def collate_tokens(items: list[dict[str, Tensor]], unique_consecutive: bool = False) -> dict[str, Tensor]:
    """A batch, padded with `PAD`: `semantic (b, n)`, `codec (b, t, q)`, `conditioning (b, q)`, `melody (b, m, q)`,
    `words (b, w)`, as items have them.

    With `unique_consecutive` repeated semantic tokens are left out.
    """
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if name == 'semantic' and unique_consecutive:
            values = [torch.unique_consecutive(ids) for ids in values]
        batch[name] = pad_sequence(values, batch_first=True, padding_value=PAD)
    return batch
