"""Waves in and out: reading, resampling, mixing. Imports nothing from the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio import functional


def resample(wavs: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Band-limited resampling of `(…, samples)` to `(…, ceil(samples * to_rate / from_rate))`; rates in Hz.

    The filters take memory in proportion to the rates over their greatest common divisor: rates without one, such as
    11,127 and 16,000 Hz, cost gigabytes.
    """
    if from_rate <= 0 or to_rate <= 0:
        raise ValueError(f'sample rates must be greater than 0 Hz, got {from_rate} and {to_rate}')
    if from_rate == to_rate:
        return wavs
    # in float32: the filters lose too much in half precision
    with torch.autocast(wavs.device.type, enabled=False):
        # torchaudio rounds the length in float32: give it a few samples more, and cut at the exact length
        spare = -(-from_rate // to_rate) + 1
        length = -(-wavs.shape[-1] * to_rate // from_rate)
        return functional.resample(F.pad(wavs.float(), (0, spare)), from_rate, to_rate)[..., :length]


class AudioFile:
    """A sound file that is read piece by piece, mixed down to mono.

    WAV, FLAC, OGG, MP3 and whatever else libsndfile reads. Raises FileNotFoundError for a missing file and ValueError
    for one that is not audio.
    """

    def __init__(self, path: str | Path):
        import soundfile

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f'no audio file at {self.path}')
        try:
            self._file = soundfile.SoundFile(str(self.path))
        except soundfile.LibsndfileError as error:
            raise ValueError(f'{self.path} cannot be read as audio: {error}') from error

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self._file.samplerate

    def __len__(self) -> int:
        """Samples a channel."""
        return self._file.frames

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def read(self, start: int, stop: int) -> Tensor:
        """Samples from `start` to `stop`, `(stop - start,)` float32 in [-1, 1].

        Raises ValueError when the file ends before: it is damaged or still being written.
        """
        self._file.seek(start)
        samples = self._file.read(stop - start, dtype='float32', always_2d=True)
        if len(samples) != stop - start:
            raise ValueError(f'{self.path} ends at sample {start + len(samples)}, but its header says {len(self)}')
        return torch.from_numpy(samples).mean(dim=-1)


def windows(total: int, window: int, hop: int) -> Iterator[tuple[int, int]]:
    """Start and stop of the windows over `total` samples; the last one ends with the audio.

    Audio shorter than a window is one window. With a hop beyond the window, what lies between two is left out.
    """
    start = 0
    while start + window < total:
        yield start, start + window
        start += hop
    yield max(0, total - window), total
