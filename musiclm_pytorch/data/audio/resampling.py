"""Band-limited resampling between any two rates, in bounded time and memory."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# the low-pass filter: zero crossings on each side, and its edge as a fraction of the lower Nyquist rate
FILTER_WIDTH = 6
ROLLOFF = 0.99
MOST_TAPS = 2**20  # of all filters together, up to which one convolution is quickest
MOST_KEPT = 2**22  # beyond, weights that are kept for the next call
TAPS_AT_ONCE = 2**20  # and products that are held at a time


def resample(wavs: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Band-limited resampling of `(…, samples)` to `(…, ceil(samples * to_rate / from_rate))`, float32; rates in Hz.

    A windowed sinc (Hann, 6 zero crossings), as `torchaudio.functional.resample` has, but with bounded filters between
    any two rates. Differentiable.
    """
    if from_rate <= 0 or to_rate <= 0:
        raise ValueError(f'sample rates must be greater than 0 Hz, got {from_rate} and {to_rate}')
    if from_rate == to_rate:
        return wavs
    plan = ResamplingPlan(from_rate, to_rate)
    samples = wavs.shape[-1]
    length = -(-samples * to_rate // from_rate)
    first, last = plan.span(0, length)
    return plan.apply(F.pad(wavs.float(), (-first, last - samples)), 0, length)


class ResamplingPlan:
    """Which samples a piece of the result depends on, and the piece of these: the same as of the whole.

    The result at `i` is a sum over samples around `i * old / new`, whose weights repeat after `new` results, that is
    `old` samples.
    """

    def __init__(self, from_rate: int, to_rate: int):
        common = math.gcd(from_rate, to_rate)
        self.old, self.new = from_rate // common, to_rate // common
        self.width = math.ceil(FILTER_WIDTH * self.old / (min(self.old, self.new) * ROLLOFF))
        self.by_convolution = self.new * (self.old + 2 * self.width) <= MOST_TAPS

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The samples that results `start` to `stop` depend on; they may lie before 0 and beyond the end."""
        if self.by_convolution:
            return start // self.new * self.old - self.width, -(-stop // self.new) * self.old + self.width
        return start * self.old // self.new - self.width, (stop - 1) * self.old // self.new + self.width + 2

    def apply(self, wavs: Tensor, start: int, stop: int) -> Tensor:
        """Results `start` to `stop` of `(…, samples)` float32, which are those of `span(start, stop)`."""
        if stop <= start:
            return wavs[..., :0]
        rows = wavs.reshape(-1, 1, wavs.shape[-1])
        # in float32: half precision loses too much
        with torch.autocast(wavs.device.type, enabled=False):
            found = self._convolve(rows, start, stop) if self.by_convolution else self._weigh(rows, start, stop)
        return found.reshape(*wavs.shape[:-1], stop - start)

    def _convolve(self, rows: Tensor, start: int, stop: int) -> Tensor:
        # a kernel for each of `new` results, all of which see the same stretch of samples
        kernels = _kernels(self.old, self.new, self.width).to(rows.device)
        found = F.conv1d(rows, kernels, stride=self.old).transpose(1, 2).flatten(1)
        offset = start % self.new
        return found[:, offset : offset + stop - start]

    def _weigh(self, rows: Tensor, start: int, stop: int) -> Tensor:
        # rates without a large common divisor: of its own few samples, each result on its own
        taps = 2 * self.width + 2
        windows = rows[:, 0].unfold(-1, taps, 1)
        weights = _weights(self.old, self.new, self.width) if self.new * taps <= MOST_KEPT else None
        first, pieces = self.span(start, stop)[0] + self.width, []
        step = max(1, TAPS_AT_ONCE // (taps * len(rows)))
        for begin in range(start, stop, step):
            results = torch.arange(begin, min(begin + step, stop))
            phases = results % self.new
            own = weights[phases] if weights is not None else _tap_weights(phases, self.old, self.new, self.width)
            places = results * self.old // self.new - first
            pieces.append((windows[:, places.to(rows.device)] * own.to(rows.device)).sum(dim=-1))
        return torch.cat(pieces, dim=-1)


@functools.lru_cache(maxsize=16)
def _kernels(old: int, new: int, width: int) -> Tensor:
    """`(new, 1, old + 2 * width)`"""
    return _sinc(torch.arange(-width, width + old), torch.arange(new), old, new)[:, None]


@functools.lru_cache(maxsize=4)
def _weights(old: int, new: int, width: int) -> Tensor:
    """`(new, 2 * width + 2)`"""
    return _tap_weights(torch.arange(new), old, new, width)


def _tap_weights(phases: Tensor, old: int, new: int, width: int) -> Tensor:
    return _sinc(phases[:, None] * old // new + torch.arange(-width, width + 2), phases, old, new)


def _sinc(places: Tensor, phases: Tensor, old: int, new: int) -> Tensor:
    """The windowed sinc at samples `places`, around the results `phases`, `(phases, places)` float32 on the CPU."""
    # in float32, step by step as torchaudio computes it: that is the filter that models were trained with
    edge = min(old, new) * ROLLOFF
    crossings = ((places.float() / old - (phases.float() / new)[:, None]) * edge).clamp(-FILTER_WIDTH, FILTER_WIDTH)
    window = torch.cos(crossings * math.pi / FILTER_WIDTH / 2) ** 2
    angles = crossings * math.pi
    return torch.where(angles == 0, 1.0, angles.sin() / angles) * (window * (edge / old))
