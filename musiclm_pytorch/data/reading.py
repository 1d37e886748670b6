"""What every data set of clips shares: which piece is read, what is drawn at random, and what becomes of faults."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musiclm_pytorch.checks import check_positive, is_finite
from musiclm_pytorch.data.audio import AudioFile

logger = logging.getLogger(__name__)


class ClipReader:
    """Reads a crop of a clip at the model's rate, with randomness that depends on (seed, epoch, index) alone.

    So a run that is resumed draws what it would have drawn, with any number of workers. A clip that turns out to be
    unreadable is logged once, by name, and gives None; it is tried again at each visit, since leaving it out from then
    on would make what follows depend on what was read before. Arguments are those of `AudioTextDataset`.
    """

    def __init__(self, *, sample_rate: int, max_seconds: float | None, min_seconds: float, seed: int, training: bool):
        check_positive(sample_rate=sample_rate, max_seconds=max_seconds, min_seconds=min_seconds)
        if max_seconds is not None and max_seconds < min_seconds:
            raise ValueError(f'max_seconds {max_seconds} must not be less than min_seconds {min_seconds}')
        self.sample_rate = sample_rate
        self.max_seconds = max_seconds
        self.min_seconds = min_seconds
        self.seed = seed
        self.training = training
        self._skipped: dict[str, str] = {}
        self._names: dict[int, str] = {}

    def _share(self, clips: int) -> None:
        """Make the state that worker processes share with this one: set_epoch reaches workers that live on, and what
        they find unreadable is known here."""
        self._state = torch.zeros(2, dtype=torch.int64).share_memory_()  # epoch and position
        self._unreadable = torch.zeros(clips, dtype=torch.bool).share_memory_()
        self._faults: dict[int, tuple[str, str]] = {}

    @property
    def settings(self) -> str:
        """What is read of each clip, for `repr`."""
        seconds = 'whole' if self.max_seconds is None else f'{self.max_seconds:g} s of each'
        return f'{seconds} at {self.sample_rate} Hz, {"at random" if self.training else "from the middle"}'

    @property
    def epoch(self) -> int:
        """What `set_epoch` was last told, 0 at first."""
        return int(self._state[0])

    @property
    def skipped(self) -> dict[str, str]:
        """The reason of each clip that is not given, by name: found when the set was made, or read since."""
        faults = dict(self._skipped)
        for index in self._unreadable.nonzero().flatten().tolist():
            name, reason = self._faults.get(index) or (self._name(index), 'unreadable, see the log of the worker')
            faults[name] = reason
        return faults

    def _name(self, index: int) -> str:
        raise NotImplementedError

    def _found_unreadable(self, index: int, reason: str) -> None:
        name = self._name(index)
        self._faults.setdefault(index, (name, reason))
        if not self._unreadable[index]:
            self._unreadable[index] = True
            logger.warning('skipped %s: %s', name, reason)

    def _randomness(self, index: int) -> random.Random:
        # a string is hashed by SHA-512, so that neighbouring seeds and epochs have nothing in common
        return random.Random(f'{self.seed} {self.epoch} {index}')

    def _item(self, index: int, file: AudioFile, captions: tuple[str, ...], span=(0.0, None)) -> dict[str, Any]:
        """The item of a clip that lies at `span`, in seconds, of an open file."""
        draw = self._randomness(index) if self.training else None
        caption = draw.choice(captions) if draw else captions[0]
        start, stop = span_at(file, *span, self.sample_rate, self.min_seconds)
        if self.max_seconds is not None:
            free = max(0, stop - start - round(self.max_seconds * self.sample_rate))
            offset = draw.randrange(free + 1) if draw else free // 2
            start, stop = start + offset, stop - free + offset
        return dict(wave=finite(file.read_at(start, stop, self.sample_rate), file.name), caption=caption)


def span_at(file: AudioFile, start: float, end: float | None, rate: int, min_seconds: float) -> tuple[int, int]:
    """Seconds in a file to samples at `rate`; an end beyond that of the file is the file's.

    Raises ValueError for what is shorter than `min_seconds`.
    """
    total = file.length_at(rate)
    first = round(start * rate)
    last = total if end is None else min(total, round(end * rate))
    if last - first < max(1, round(min_seconds * rate)):
        if total == 0:
            raise ValueError(f'{file.name} is empty')
        holds = f'the file holds {total / rate:.3g} s'
        raise ValueError(f'too short: {max(0, last - first) / rate:.3g} s, but min_seconds is {min_seconds:g}; {holds}')
    return first, last


def first_of(skipped: dict[str, str]) -> str:
    """What an error says where nothing is left: how much is skipped, and why the first is."""
    return f'{len(skipped)} skipped' + next((f', the first, {name}: {reason}' for name, reason in skipped.items()), '')


def tables_in(source: str) -> str:
    """What an error adds for a folder that gave nothing but holds a table, which may be the captions."""
    kinds = ('.csv', '.tsv', '.jsonl', '.parquet')
    tables = sorted(it for it in Path(source).glob('*') if it.suffix.lower() in kinds)
    if not tables:
        return ''
    return (
        f'; there is {tables[0]}: if it tells the captions, pass it as the data. In a folder only metadata.csv or '
        '.jsonl with a column file_name is read'
    )


def finite(wave: Tensor, name: str) -> Tensor:
    """Raise ValueError for NaN and infinity, which floating-point files may hold."""
    if not is_finite(wave):
        raise ValueError(f'{name} holds NaN or infinite samples')
    return wave
