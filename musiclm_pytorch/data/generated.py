"""What the data sets of generated music share: an item depends on its index, the seed and the split alone."""

from __future__ import annotations

import operator
from typing import ClassVar

from torch.utils.data import Dataset

from musiclm_pytorch.data.attributes import check_seed, check_split


class GeneratedMusic(Dataset):
    """Items by index, made when they are asked for.

    Raises ValueError for a length, duration, rate, seed or split that is out of its range.
    """

    #: begins the keys of an item's generators, so that no two uses share their numbers
    _ITEM: ClassVar[int]

    def __init__(self, length: int, *, seed: int, seconds: float, sample_rate: int, split: str):
        if length < 1:
            raise ValueError(f'length must be 1 at least, got {length}')
        if not 1 <= seconds <= 600:
            raise ValueError(f'seconds must lie in 1 to 600, got {seconds}')
        if sample_rate < 8000:
            raise ValueError(f'sample_rate must be at least 8000 Hz, got {sample_rate}; resample the waves instead')
        self.length = length
        self.seed = check_seed(seed)
        self.seconds = float(seconds)
        self.sample_rate = sample_rate
        self.split = split
        self._split = check_split(split)

    @property
    def samples(self) -> int:
        """Samples of each wave."""
        return round(self.seconds * self.sample_rate)

    def __len__(self) -> int:
        return self.length

    def _key(self, use: int, index: int) -> tuple[int, ...]:
        return (self._ITEM, use, self.seed, self._split, index)

    def _index(self, index: int) -> int:
        index = operator.index(index)
        place = index + self.length if index < 0 else index
        if not 0 <= place < self.length:
            raise IndexError(f'item {index} of a data set of {self.length}; give a larger length to have more')
        return place

    def _shown(self) -> str:
        return (
            f'{self.length}, seed={self.seed}, seconds={self.seconds:g}, sample_rate={self.sample_rate}, '
            f'split={self.split!r}'
        )
