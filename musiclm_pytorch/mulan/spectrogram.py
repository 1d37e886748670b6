"""Audio front ends: power spectrogram, log-mel, and SpecAugment on either."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from musiclm_pytorch.checks import check_positive, is_traced

PAD_MODES = ('reflect', 'constant', 'replicate', 'circular')


class Float32Buffers(nn.Module):
    """A module whose buffers stay float32 when the model is cast: rounded, a window leaks and filters blur."""

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class Spectrogram(Float32Buffers):
    """Short-time power spectrogram `(batch, samples)` → `(batch, bins, frames)`, in float32.

    The arguments are those of `torchaudio.transforms.Spectrogram`, and so are the numbers. In addition a batch of
    padded waves may be given with its true lengths: each wave is then padded for the transform at its own end, so
    that its frames are those of the wave alone and what the padding holds is never read.
    """

    def __init__(
        self,
        n_fft: int = 128,
        win_length: int | None = 24,
        hop_length: int | None = None,
        power: float = 2,
        pad: int = 0,
        center: bool = True,
        pad_mode: str = 'reflect',
    ):
        super().__init__()
        check_positive(spec_n_fft=n_fft, spec_win_length=win_length, spec_hop_length=hop_length, spec_power=power)
        if power < 1:
            raise ValueError(f'spec_power must be at least 1, the magnitude, got {power}')
        win_length = n_fft if win_length is None else win_length
        if win_length > n_fft:
            raise ValueError(f'spec_win_length {win_length} exceeds spec_n_fft {n_fft}; raise spec_n_fft')
        if pad < 0:
            raise ValueError(f'spec_pad must be at least 0, got {pad}')
        if pad_mode not in PAD_MODES:
            raise ValueError(f'spec_pad_mode must be one of {PAD_MODES}, got {pad_mode!r}')
        self.n_fft = n_fft
        self.win_length = win_length
        self.hop_length = max(1, win_length // 2) if hop_length is None else hop_length
        self.power = power
        self.pad = pad
        self.center = center
        self.pad_mode = pad_mode
        self.register_buffer('window', torch.hann_window(win_length, dtype=torch.float32))

    @property
    def bins(self) -> int:
        return self.n_fft // 2 + 1

    def num_frames(self, samples):
        """Frames of a wave of that many samples (an int or an integer tensor)."""
        edges = 2 * self.pad + (self.n_fft // 2 * 2 if self.center else 0)
        return (samples + edges - self.n_fft) // self.hop_length + 1

    def min_samples(self, frames: int) -> int:
        """The shortest wave that gives that many frames."""
        needed = (frames - 1) * self.hop_length + self.n_fft - 2 * self.pad
        if not self.center:
            return max(1, needed)
        # reflection needs more samples than it mirrors, wrapping around at least as many
        mirrored = {'reflect': 1, 'circular': 0}.get(self.pad_mode, -self.n_fft) + self.n_fft // 2 - 2 * self.pad
        return max(1, needed - self.n_fft // 2 * 2, mirrored)

    def forward(self, wavs: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Spectrogram of a batch, and the number of frames of each item (None without `lengths`).

        Args:
            wavs: `(b, samples)`.
            lengths: `(b,)` int64, the true number of samples of each wave.
        """
        frames, center = None, self.center
        if lengths is not None:
            wavs, center = self.pad_each_at_its_end(wavs, lengths), False
            frames = self.num_frames(lengths)
        elif self.pad > 0:
            wavs = F.pad(wavs, (self.pad, self.pad))

        # there is no half-precision FFT on every device, and powers of samples overflow fp16
        with torch.autocast(wavs.device.type, enabled=False):
            spec = torch.stft(
                wavs.float(),
                n_fft=self.n_fft,
                hop_length=self.hop_length,
                win_length=self.win_length,
                window=self.window,
                center=center,
                pad_mode=self.pad_mode,
                return_complex=True,
            )
            spec = magnitude(spec, self.power)
        if frames is not None:
            spec = spec.masked_fill(~frame_mask(frames, spec.shape[-1]), 0.0)
        return spec, frames

    def pad_each_at_its_end(self, wavs: Tensor, lengths: Tensor) -> Tensor:
        """Apply `pad` and `pad_mode` around the first `lengths` samples of each wave; zeros follow."""
        reach = self.n_fft // 2 if self.center else 0
        lengths = rearrange(lengths, 'b -> b 1')
        padded_lengths = lengths + 2 * self.pad

        # where each sample of the result lies in the wave with zeros of `pad` around it …
        total = wavs.shape[-1] + 2 * self.pad
        positions = torch.arange(-reach, total + reach, device=wavs.device)[None]
        inside = positions < padded_lengths + reach
        last = padded_lengths - 1
        if self.pad_mode == 'reflect':
            positions = last - (last - positions.abs()).abs()
        elif self.pad_mode == 'circular':
            positions = positions.remainder(padded_lengths)
        elif self.pad_mode == 'replicate':
            positions = torch.minimum(positions.clamp(min=0), last)

        # … and then in the wave itself
        positions = positions - self.pad
        inside = inside & (positions >= 0) & (positions < lengths)
        positions = torch.where(inside, positions, torch.zeros_like(positions))
        return wavs.gather(1, positions).masked_fill(~inside, 0.0)


def magnitude(spectrum: Tensor, power: float) -> Tensor:
    """|z| ** power of a complex tensor."""
    if power == 2:
        # without the root that the square would undo: four times as fast on a CPU
        return torch.addcmul(spectrum.real.square(), spectrum.imag, spectrum.imag)
    return spectrum.abs() if power == 1 else spectrum.abs() ** power


class LogMel(Float32Buffers):
    """Power spectrogram `(b, bins, t)` → normalised log-mel `(b, mels, t)`.

    Natural logarithm of Slaney-scale triangular filters (torchaudio's `mel_scale = 'slaney'`, without area
    normalisation), floored at float32's epsilon as in Kaldi, and normalised by a fixed mean and deviation, never by
    statistics of the clip, so that silence stays silent: `(log_mel - mean) / (2 * std)` (AST, arXiv 2104.01778).
    """

    FLOOR = torch.finfo(torch.float32).eps

    def __init__(
        self,
        n_mels: int,
        *,
        bins: int,
        sample_rate: int,
        f_min: float,
        f_max: float | None,
        mean: float,
        std: float,
    ):
        super().__init__()
        f_max = sample_rate / 2 if f_max is None else f_max
        check_positive(spec_n_mels=n_mels, spec_f_max=f_max, spec_std=std)
        if not 0 <= f_min < f_max <= sample_rate / 2:
            raise ValueError(
                'need 0 <= spec_f_min < spec_f_max <= audio_sample_rate / 2, '
                f'got {f_min}, {f_max} and {sample_rate / 2}'
            )
        self.mean = mean
        self.std = std
        filters = mel_filters(n_mels, bins=bins, sample_rate=sample_rate, f_min=f_min, f_max=f_max)
        if not (filters.amax(dim=0) > 0).all():
            raise ValueError(
                f'{n_mels} mel bands between {f_min} and {f_max} Hz are finer than the bins of the spectrogram, '
                f'{sample_rate / (2 * (bins - 1)):.1f} Hz apart: some are empty; raise spec_n_fft or lower spec_n_mels'
            )
        self.register_buffer('filters', filters, persistent=False)
        self.blocks = _blocks_of_bands(filters)

    def forward(self, power: Tensor) -> Tensor:
        with torch.autocast(power.device.type, enabled=False):
            power = power.float()
            if is_traced():
                mel = (power.mT @ self.filters).mT
            else:
                # most of the filters is zero
                mel = torch.cat([self.filters[bins, bands].T @ power[:, bins] for bins, bands in self.blocks], dim=1)
            return (mel.clamp(min=self.FLOOR).log() - self.mean) / (2 * self.std)


def _blocks_of_bands(filters: Tensor, count: int = 4) -> list[tuple[slice, slice]]:
    """Bins and bands of blocks that hold all of `(bins, n_mels)` filters that is not zero."""
    blocks, n_mels = [], filters.shape[1]
    edges = [n_mels * i // count for i in range(count + 1)]
    for start, stop in pairwise(edges):
        heard = filters[:, start:stop].any(dim=1).nonzero()[:, 0]
        if start < stop:
            blocks.append((slice(int(heard[0]), int(heard[-1]) + 1), slice(start, stop)))
    return blocks


def mel_filters(n_mels: int, *, bins: int, sample_rate: int, f_min: float, f_max: float) -> Tensor:
    """`(bins, n_mels)` triangular filters of height 1 on the Slaney mel scale, a band that falls between bins all zero.

    They are torchaudio's `melscale_fbanks` to the bit.
    """
    low, high = (_hz_to_mel(hz) for hz in (f_min, f_max))
    corners = _mel_to_hz(torch.linspace(low, high, n_mels + 2, dtype=torch.float32))
    frequencies = torch.linspace(0, sample_rate // 2, bins, dtype=torch.float32)
    slopes = corners[None, :] - frequencies[:, None]  # (bins, n_mels + 2)
    widths = corners.diff()
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    return torch.minimum(rising, falling).clamp(min=0)


# Slaney's scale: linear up to 1 kHz, logarithmic from there on
HZ_PER_MEL, LOG_FROM_HZ, LOG_STEP = 200 / 3, 1000.0, math.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    if hz < LOG_FROM_HZ:
        return hz / HZ_PER_MEL
    return LOG_FROM_HZ / HZ_PER_MEL + math.log(hz / LOG_FROM_HZ) / LOG_STEP


def _mel_to_hz(mels: Tensor) -> Tensor:
    bend = LOG_FROM_HZ / HZ_PER_MEL
    return torch.where(mels < bend, HZ_PER_MEL * mels, LOG_FROM_HZ * torch.exp(LOG_STEP * (mels - bend)))


def frame_mask(frames: Tensor, total: int) -> Tensor:
    """`(b, 1, total)` bool, true on the first `frames[i]` frames of item i."""
    return torch.arange(total, device=frames.device) < rearrange(frames, 'b -> b 1 1')


class RandomTimeStretch(nn.Module):
    """Play each item faster or slower at the same pitch, by a random rate between `factor` and its inverse.

    A phase vocoder interpolates the magnitudes of the STFT between frames and only the phases take more work; a
    power spectrogram has no phases, so interpolating magnitudes gives its very numbers at little cost
    (`torchaudio.transforms.TimeStretch` is the reference in the tests). No item grows: what a slower one has too
    much is cut, what a faster one lacks counts as padding.
    """

    def __init__(self, factor: float, power: float, min_frames: int):
        super().__init__()
        check_positive(spec_aug_stretch_factor=factor)
        self.max_log_rate = abs(math.log(factor))
        self.power = power
        self.min_frames = min_frames
        # read by nobody, but part of the state dict of musiclm-pytorch 0.2.8
        self.register_buffer('phase_advance', torch.linspace(0, math.pi * 0.8, 201, dtype=torch.float32)[..., None])

    def forward(self, spec: Tensor, frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.max_log_rate == 0.0:
            return spec, frames
        batch, total = spec.shape[0], spec.shape[-1]
        if frames is None:
            frames = torch.full((batch,), total, device=spec.device)
        rates = torch.exp((2 * torch.rand(batch, dtype=torch.float32, device=spec.device) - 1) * self.max_log_rate)
        # a fast rate must leave enough for one patch
        rates = torch.minimum(rates, (frames.float() / self.min_frames).clamp(min=1.0))
        return self.stretch(spec, frames, rates)

    def stretch(self, spec: Tensor, frames: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        """Stretch item i by `rates[i]` (above 1 is faster); lengths and result are in frames."""
        total = spec.shape[-1]
        positions = torch.arange(total, device=spec.device) * rearrange(rates, 'b -> b 1')
        last = rearrange(frames, 'b -> b 1') - 1
        left = torch.minimum(positions.long(), last)
        right = torch.minimum(left + 1, last)
        weight = rearrange(positions - left, 'b t -> b 1 t').clamp(max=1.0)

        tiny = torch.finfo(spec.dtype).tiny
        magnitude = spec if self.power == 1 else spec.clamp(min=tiny) ** (1 / self.power)
        left, right = (
            magnitude.gather(-1, rearrange(index, 'b t -> b 1 t').expand(-1, spec.shape[1], -1))
            for index in (left, right)
        )
        stretched = torch.lerp(left, right, weight.to(left.dtype))
        if self.power != 1:
            stretched = stretched**self.power

        frames = torch.minimum((frames / rates).ceil().long(), frames)
        return stretched.masked_fill(~frame_mask(frames, total), 0.0), frames


class RandomMask(nn.Module):
    """Blank a random band of each item along one axis (SpecAugment, arXiv 1904.08779).

    Args:
        axis: 'frequency' or 'time'.
        max_width: widest band, in bins or frames.
        max_fraction: widest band as a fraction of the axis (in time, of the item's own length). The default of
            upstream, 80 of 65 bins, could blank a clip entirely; the fraction rules that out.
    """

    def __init__(self, axis: str, max_width: int, max_fraction: float):
        super().__init__()
        if max_width < 0:
            raise ValueError(f'the widest {axis} mask must be at least 0, got {max_width}; 0 turns it off')
        self.axis = axis
        self.max_width = max_width
        self.max_fraction = max_fraction

    def forward(self, spec: Tensor, frames: Tensor | None) -> Tensor:
        if self.max_width == 0:
            return spec
        batch, bins, total = spec.shape
        device = spec.device
        if self.axis == 'frequency':
            sizes = torch.full((batch,), bins, device=device)
        else:
            sizes = torch.full((batch,), total, device=device) if frames is None else frames

        widest = (sizes.float() * self.max_fraction).long().clamp(max=self.max_width)
        widths, starts = torch.rand(2, batch, dtype=torch.float32, device=device)
        widths = (widths * (widest + 1)).long()
        starts = (starts * (sizes - widths + 1)).long()

        positions = torch.arange(bins if self.axis == 'frequency' else total, device=device)
        starts, ends = (rearrange(t, 'b -> b 1') for t in (starts, starts + widths))
        band = (positions >= starts) & (positions < ends)
        band = rearrange(band, 'b f -> b f 1' if self.axis == 'frequency' else 'b t -> b 1 t')
        return spec.masked_fill(band, 0.0)


class SpecAugment(nn.Sequential):
    """Random stretch before the mel filters, random masks after them. Call it in training only.

    Mask sizes are capped at the fractions that AST uses on AudioSet, 48 of 128 bands and 192 of 1,024 frames.
    """

    def __init__(self, *, stretch_factor: float, freq_mask: int, time_mask: int, power: float, min_frames: int):
        super().__init__(
            RandomTimeStretch(stretch_factor, power, min_frames),
            RandomMask('frequency', freq_mask, max_fraction=48 / 128),
            RandomMask('time', time_mask, max_fraction=192 / 1024),
        )

    def stretch(self, spec: Tensor, frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self[0](spec, frames)

    def mask(self, spec: Tensor, frames: Tensor | None) -> Tensor:
        return self[2](self[1](spec, frames), frames)
