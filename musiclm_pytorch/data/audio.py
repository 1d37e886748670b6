"""Waves in and out: reading, resampling, mixing. Imports nothing from the package."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.nn import functional as F
from torchaudio import functional

# the low-pass filter of `resample`: zero crossings on each side, and its edge as a fraction of the lower Nyquist rate
FILTER_WIDTH = 6
ROLLOFF = 0.99
# libsndfile 1.2 lands elsewhere when it seeks in an OGG file that it has read from, or into its last page (its issue
# 885). So such a file is opened anew, and decoding begins before the last page, and before by Vorbis' longest block.
OGG_RUN_UP = 2**13
OGG_LONGEST_PAGE = 65307  # bytes


def resample(wavs: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Band-limited resampling of `(…, samples)` to `(…, ceil(samples * to_rate / from_rate))`; rates in Hz."""
    if from_rate <= 0 or to_rate <= 0:
        raise ValueError(f'sample rates must be greater than 0 Hz, got {from_rate} and {to_rate}')
    if from_rate == to_rate:
        return wavs
    # in float32: the filters lose too much in half precision
    with torch.autocast(wavs.device.type, enabled=False):
        return functional.resample(wavs.float(), from_rate, to_rate, FILTER_WIDTH, ROLLOFF)


class AudioFile:
    """A sound file that is read piece by piece, mixed down to mono.

    WAV, FLAC, OGG, MP3 and whatever else libsndfile reads. Raises FileNotFoundError for a missing file and ValueError
    for one that is not audio.

    Args:
        source: a path, or an open binary file that can seek; the latter is not closed here.
        name: how errors call it, by default its path.
    """

    def __init__(self, source: str | Path | BinaryIO, name: str | None = None):
        is_path = isinstance(source, (str, Path))
        self.name = name or str(source)
        if is_path and not Path(source).is_file():
            raise FileNotFoundError(f'no audio file at {self.name}')
        self._source = str(source) if is_path else source
        self._file = self._open()

    def _open(self):
        import soundfile

        try:
            if not isinstance(self._source, str):
                self._source.seek(0)
            return soundfile.SoundFile(self._source)
        except (soundfile.LibsndfileError, OSError) as error:
            raise ValueError(f'{self.name} cannot be read as audio: {reason_of(error)}') from error

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self._file.samplerate

    @property
    def channels(self) -> int:
        """Number of channels in the file."""
        return self._file.channels

    @property
    def subtype(self) -> str:
        """libsndfile's name of how samples are stored, such as `PCM_16` or `VORBIS`."""
        return self._file.subtype

    def __len__(self) -> int:
        """Samples a channel."""
        return self._file.frames

    def length_at(self, rate: int) -> int:
        """Samples a channel after resampling to `rate` Hz."""
        return -(-len(self) * rate // self.sample_rate)

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def read(self, start: int, stop: int) -> Tensor:
        """Samples from `start` to `stop`, `(stop - start,)` float32 in [-1, 1].

        Raises ValueError when the file ends before or does not decode: it is damaged or still being written.
        """
        return self.read_channels(start, stop).mean(dim=0)

    def read_channels(self, start: int, stop: int, dtype: str = 'float32') -> Tensor:
        """As `read`, but all channels: `(channels, stop - start)`. `dtype` may also be `int16` or `int32`, which keep
        what a file of up to 16 or 32 bits holds."""
        import soundfile

        run_up = 0
        if self._file.format == 'OGG' and self._file.tell() != start:
            self._file.close()
            run_up = start - max(0, min(start, self._last_ogg_page()) - OGG_RUN_UP)
            self._file = self._open()
        try:
            self._file.seek(start - run_up)
            samples = self._file.read(stop - start + run_up, dtype=dtype, always_2d=True)[run_up:]
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f'{self.name} is damaged between samples {start} and {stop}: {reason_of(error)}'
            ) from error
        if len(samples) != stop - start:
            raise ValueError(f'{self.name} ends at sample {start + len(samples)}, but its header says {len(self)}')
        return torch.from_numpy(samples).T

    def _last_ogg_page(self) -> int:
        """The sample that the last page of an OGG file begins at, or one before: where the last but one ends."""
        opened = open(self._source, 'rb') if isinstance(self._source, str) else nullcontext(self._source)  # noqa: SIM115
        with opened as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 * OGG_LONGEST_PAGE))
            tail = file.read()
        # a page begins with its name, version 0 and flags; then comes where it ends, -1 if nothing ends on it
        ends = [int.from_bytes(it[1], 'little', signed=True) for it in re.finditer(rb'OggS\0.(.{8})', tail, re.DOTALL)]
        return max([0, *(end for end in ends[:-1] if end < len(self))])

    def read_at(self, start: int, stop: int, rate: int) -> Tensor:
        """Samples from `start` to `stop` of the file as it is after resampling to `rate` Hz, `(stop - start,)` float32.

        The result is that piece of the whole file resampled, up to rounding, but only what it depends on is read: the
        piece itself and the reach of the filter. So where a piece begins and how long it is does not depend on the
        rate of the file. Raises ValueError as `read`, and for a piece that lies outside of the file.
        """
        if not 0 <= start <= stop <= self.length_at(rate):
            raise ValueError(f'samples {start} to {stop} at {rate} Hz lie outside of the {len(self)} of {self.name}')
        if rate == self.sample_rate:
            return self.read(start, stop)
        common = math.gcd(self.sample_rate, rate)
        old, new = self.sample_rate // common, rate // common
        # the filters repeat after `old` samples of the file, which give `new` of the result: in steps of these, a
        # piece meets the same filters as in the whole file
        reach = math.ceil(FILTER_WIDTH * old / (min(old, new) * ROLLOFF))
        margin = -(-reach // old)
        first, last = start // new - margin, -(-stop // new) + margin
        piece = self.read(max(0, first * old), min(len(self), last * old))
        piece = F.pad(piece, (max(0, -first * old), max(0, last * old - len(self))))
        offset = start - first * new
        return resample(piece, self.sample_rate, rate)[offset : offset + stop - start]


def reason_of(error: Exception) -> str:
    """What went wrong, without the path that soundfile puts in front of it."""
    return str(getattr(error, 'error_string', error)).strip().rstrip('.')


def windows(total: int, window: int, hop: int) -> Iterator[tuple[int, int]]:
    """Start and stop of the windows over `total` samples; the last one ends with the audio, so nothing is left out.

    Audio shorter than a window is one window.
    """
    start = 0
    while start + window < total:
        yield start, start + window
        start += hop
    yield max(0, total - window), total
