"""Waves in and out: reading, resampling, mixing. Imports nothing from the package."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_pytorch.data.audio.decoding import PacketFile
from musiclm_pytorch.data.audio.resampling import ResamplingPlan, resample

__all__ = ['AudioFile', 'batches_by_length', 'resample', 'windows']

# What libsndfile opens by what a file begins with, and how it calls what it knows the length of and seeks in exactly.
# All else is FFmpeg's.
SNDFILE_HEADS = (b'RIFF', b'RIFX', b'RF64', b'riff', b'fLaC', b'FORM', b'.snd', b'caff')
SNDFILE_SUBTYPES = ('PCM_', 'FLOAT', 'DOUBLE', 'ULAW', 'ALAW')
UNKNOWN_LENGTH = 2**62  # samples, from which on a length stands for none


class AudioFile:
    """A sound file that is read piece by piece, mixed down to mono.

    What it reads is what FFmpeg plays, without what the encoder added at either end, and a piece is that of the whole
    file, wherever it begins: WAV, FLAC, AIFF, MP3, AAC, Ogg Vorbis and Opus, chained too, WebM, WMA and what else
    FFmpeg and libsndfile decode. Its length is counted from the file, where a header may be wrong or tell none: this
    reads through the file once. Lists of packets are kept by path, size and time of change.

    Raises FileNotFoundError for a missing file and ValueError for one that is not audio. Bytes that are no sound (tags,
    pictures, other bytes in front) are passed over; what is damaged raises ValueError when it is read.

    Args:
        source: a path, or an open binary file that can seek; the latter is not closed here.
        name: how errors call it, by default its path.
        key: of an open file, what tells its content from all others, so that its list of packets can be kept.
    """

    def __init__(self, source: str | Path | BinaryIO, name: str | None = None, key: Hashable = None):
        is_path = isinstance(source, (str, Path))
        self.name = name or str(source)
        if is_path and not Path(source).is_file():
            raise FileNotFoundError(f'no audio file at {self.name}')
        try:
            self._file = open_sound(str(source) if is_path else source, key)
        except (OSError, ValueError) as error:
            raise ValueError(f'{self.name} cannot be read as audio: {reason_of(error)}') from error

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self._file.rate

    @property
    def channels(self) -> int:
        """Number of channels in the file."""
        return self._file.channels

    @property
    def subtype(self) -> str:
        """How samples are stored, such as `PCM_16`, `VORBIS` or `AAC`; names are libsndfile's where it has one."""
        return self._file.subtype

    def __len__(self) -> int:
        """Samples a channel."""
        return self._file.length

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
        try:
            samples = self._file.read(start, stop, dtype)
        except (OSError, ValueError, soundfile.LibsndfileError) as error:
            raise ValueError(
                f'{self.name} is damaged between samples {start} and {stop}: {reason_of(error)}'
            ) from error
        if samples.shape[1] != stop - start:
            raise ValueError(f'{self.name} ends at sample {start + samples.shape[1]}, but should hold {len(self)}')
        return torch.from_numpy(samples)

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
        plan = ResamplingPlan(self.sample_rate, rate)
        first, last = plan.span(start, stop)
        piece = self.read(max(0, first), max(0, min(len(self), last)))
        return plan.apply(F.pad(piece, (max(0, -first), max(0, last - max(0, first) - len(piece)))), start, stop)


class SoundfileReader:
    """A sound file by libsndfile, for formats whose length and seeks are exact there."""

    def __init__(self, file):
        self._file = file
        self.rate, self.channels, self.length = file.samplerate, file.channels, file.frames
        self.subtype = file.subtype
        self.close = file.close

    def read(self, start: int, stop: int, dtype: str) -> np.ndarray:
        self._file.seek(start)
        return self._file.read(stop - start, dtype=dtype, always_2d=True).T


def open_sound(source: str | BinaryIO, key: Hashable = None) -> SoundfileReader | PacketFile:
    """Raises ValueError or OSError, with the reason alone."""
    if isinstance(source, str):
        with open(source, 'rb') as file:
            head = file.read(4)
    else:
        source.seek(0)
        head = source.read(4)
        source.seek(0)
    if head in SNDFILE_HEADS:
        try:
            # as bytes, for a name may be none of UTF-8, which soundfile would refuse; Windows has no such names
            file = soundfile.SoundFile(os.fsencode(source) if isinstance(source, str) and os.name != 'nt' else source)
        except soundfile.LibsndfileError:
            pass  # FFmpeg tells why, if it cannot read it either
        else:
            if file.subtype.startswith(SNDFILE_SUBTYPES) and 0 < file.frames < UNKNOWN_LENGTH:
                cut = cut_flac(file, source, key) if head == b'fLaC' else None
                return cut or SoundfileReader(file)
            file.close()
    return PacketFile(source, key)


def cut_flac(file: soundfile.SoundFile, source: str | BinaryIO, key: Hashable) -> PacketFile | None:
    """A FLAC that was cut without decoding, as by `ffmpeg -c copy`, and still tells the length that it had; else None.

    One that is broken off or damaged is none: that is told when it is read.
    """
    try:
        file.seek(file.frames - 1)
    except soundfile.LibsndfileError:
        packets = PacketFile(source, key)
        if packets.is_whole:
            file.close()
            return packets
        packets.close()
    return None


def reason_of(error: Exception) -> str:
    """What went wrong, without the path that soundfile puts in front of it."""
    return str(getattr(error, 'error_string', error)).strip().rstrip('.')


def windows(total: int, window: int, hop: int) -> Iterator[tuple[int, int]]:
    """Start and stop of the windows over `total` samples; the last one ends with the audio.

    Audio shorter than a window is one window. With a hop beyond the window, what lies between two is left out.
    """
    start = 0
    while start + window < total:
        yield start, start + window
        start += hop
    yield max(0, total - window), total


def batches_by_length(waves: Sequence[Tensor], batch_size: int, *, mixed: bool) -> Iterator[list[int]]:
    """Indices of the waves of each batch: neighbours in length, and of one length unless `mixed`."""
    batch: list[int] = []
    for row in sorted(range(len(waves)), key=lambda row: len(waves[row])):
        if batch and (len(batch) == batch_size or (not mixed and len(waves[row]) != len(waves[batch[0]]))):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
