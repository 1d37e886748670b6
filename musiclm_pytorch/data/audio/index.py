"""Where the packets of a file lie and what they give: in few bytes, and kept from one opening to the next."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from musiclm_pytorch.data.audio.ogg import OggPages

CACHE_BYTES = 2**27  # of indices that are kept


@dataclass
class Index:
    """Where packets lie and what they give; with `sizes = None` they are decoded from the start on.

    Sequences are kept as runs or in narrow integers, see `packed`: 1 to 4 bytes a packet.

    begin, stop: bytes of the file that hold the stream
    length: samples a channel, after what the encoder added at either end is cut off
    gaps: bytes before each packet, or `pages`
    samples: that each packet decodes to; `trims`: of these, how many are cut off at its start and end
    is_noisy: found when it is read: a piece depends on all that is before it
    """

    begin: int
    stop: int
    rate: int
    channels: int
    subtype: str
    length: int
    sizes: tuple | None = None
    samples: tuple = ()
    gaps: tuple = ()
    pages: OggPages | None = None
    trims: tuple[tuple[int, int, int], ...] = ()
    is_noisy: bool = False

    @property
    def nbytes(self) -> int:
        arrays = [it for pair in (self.sizes, self.samples, self.gaps) for it in pair or () if it is not None]
        return 500 + sum(it.nbytes for it in arrays) + 100 * len(self.trims) + (self.pages.nbytes if self.pages else 0)


def packed(values: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Integers as runs (values and lengths), or where these are many, as they are, in the narrowest type."""
    values = np.asarray(values)
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    narrow = np.promote_types(np.min_scalar_type(values.min()), np.min_scalar_type(values.max()))
    if 4 * len(starts) > len(values):
        return values.astype(narrow), None
    return values[starts].astype(narrow), np.diff(starts, append=len(values)).astype(np.uint32)


def unpacked(pair: tuple[np.ndarray, np.ndarray | None]) -> np.ndarray:
    values, lengths = pair
    return values.astype(np.int64) if lengths is None else np.repeat(values.astype(np.int64), lengths)


def resolved(trims: dict[int, tuple[int, int]], samples: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Packets and the samples cut off at their start and end, where what a packet has too few of falls to the next."""
    cuts: dict[int, list[int]] = {}
    carried = 0
    for packet in sorted(trims):
        lead, tail = trims[packet]
        carried, at = carried + lead, packet
        while carried and at < len(samples):
            cut = min(carried, int(samples[at]))
            cuts.setdefault(at, [0, 0])[0] += cut
            carried, at = carried - cut, at + 1
        if 0 < tail <= samples[packet]:  # FFmpeg does not believe more
            cuts.setdefault(packet, [0, 0])[1] += tail
    return tuple((packet, lead, tail) for packet, (lead, tail) in sorted(cuts.items()))


class IndexCache:
    """Indices by key, the latest used of them up to `CACHE_BYTES`; shared by threads."""

    def __init__(self):
        self._entries: OrderedDict[Hashable, tuple[Index, ...]] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, key: Hashable) -> tuple[Index, ...] | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Hashable, indices: tuple[Index, ...]) -> None:
        if key is None:
            return
        with self._lock:
            old = self._entries.pop(key, ())
            self._entries[key] = indices
            self._bytes += sum(it.nbytes for it in indices) - sum(it.nbytes for it in old)
            while self._bytes > CACHE_BYTES and len(self._entries) > 1:
                self._bytes -= sum(it.nbytes for it in self._entries.popitem(last=False)[1])

    def renew_lock(self) -> None:
        self._lock = threading.Lock()


kept_indices = IndexCache()
# another thread may hold the lock where a process of a DataLoader is forked
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=kept_indices.renew_lock)
