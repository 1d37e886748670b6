"""What a clip is like as a whole, which patches of some 100 ms hardly tell: its harmony and its rhythm."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from musiclm_pytorch.mulan.spectrogram import Float32Buffers, frame_mask

PITCH_CLASSES = 12


class Chroma(Float32Buffers):
    """Power spectrogram `(b, bins, t)` → how strong each pitch class is, `(b, 12)` in [0, 1], C first.

    The five octaves from 100 Hz on are folded together by Gaussian filters around each semitone (equal temperament,
    A4 = 440 Hz). Each frame is seen beside its own loudest class, so that loudness does not matter, and the frames are
    averaged; silence is 0.
    """

    F_MIN, F_MAX = 100.0, 3200.0  # Hz: windows of some 100 ms blur the semitones below, and few notes lie above
    WIDTH = 0.35  # standard deviation in semitones
    FLOOR = 1e-4  # power of a frame whose loudest class comes out at a half: far below any music

    def __init__(self, *, bins: int, sample_rate: int):
        super().__init__()
        hertz = torch.arange(bins).float() * (sample_rate / (2 * (bins - 1)))
        inside = (hertz >= self.F_MIN) & (hertz <= self.F_MAX)
        pitch = 69 + 12 * torch.log2(hertz.clamp(min=self.F_MIN) / 440)
        distance = (rearrange(pitch, 'f -> f 1') - torch.arange(PITCH_CLASSES) + 6).remainder(12) - 6
        filters = torch.exp(-0.5 * (distance / self.WIDTH) ** 2)
        # an octave has twice the bins of the one below
        weights = torch.where(inside, self.F_MIN / hertz.clamp(min=self.F_MIN), 0.0)
        filters = filters * rearrange(weights, 'f -> f 1')
        if not (filters.amax(dim=0) > 0.05).all():
            raise ValueError(
                f'bins of {hertz[1]:.1f} Hz are too wide to tell twelve pitch classes apart; raise spec_n_fft or set '
                'clip_summary=False'
            )
        self.register_buffer('filters', filters / filters.sum(dim=0), persistent=False)

    def forward(self, power: Tensor, frames: Tensor | None = None) -> Tensor:
        """The mean over the first `frames` `(b,)` of each item, by default over all."""
        classes = torch.einsum('b f t, f c -> b c t', power.float(), self.filters)
        classes = classes / (classes.amax(dim=1, keepdim=True) + self.FLOOR)
        if frames is None:
            return classes.mean(dim=-1)
        classes = classes.masked_fill(~frame_mask(frames, classes.shape[-1]), 0.0)
        return classes.sum(dim=-1) / rearrange(frames, 'b -> b 1')


def tempogram(mel: Tensor, lags: int, frames: Tensor | None = None) -> Tensor:
    """Log-mel spectrogram `(b, mels, t)` → how much the onsets repeat after each lag, `(b, lags)` in [-1, 1].

    Onset strength is how much the bands rise from frame to frame, on average; what repeats in it is its
    autocorrelation (Ellis 2007, "Beat tracking by dynamic programming", has both). A beat of 120 BPM shows at 0.5 s
    and at all multiples, whatever plays it. Silence is 0.

    `lags` are counted from 1 frame on; `frames` `(b,)` of each item are heard, by default all.
    """
    onsets = F.pad(mel.float(), (1, 0), mode='replicate').diff(dim=-1).relu().mean(dim=1)
    if frames is None:
        onsets = onsets - onsets.mean(dim=-1, keepdim=True)
    else:
        real, count = frame_mask(frames, onsets.shape[-1])[:, 0], rearrange(frames, 'b -> b 1')
        mean = onsets.masked_fill(~real, 0.0).sum(dim=-1, keepdim=True) / count
        onsets = (onsets - mean).masked_fill(~real, 0.0)
    later = torch.arange(onsets.shape[-1], device=mel.device)[:, None]
    later = later + torch.arange(lags + 1, device=mel.device)
    products = torch.einsum('b t, b t l -> b l', onsets, F.pad(onsets, (0, lags))[:, later])
    return products[:, 1:] / (products[:, :1] + 1e-6)


class ClipSummary(nn.Module):
    """Harmony and rhythm of a whole clip, as features to add to an embedding of its patches.

    Harmony: one network reads the pitch classes from each of the twelve tonics on, and of what it finds the maximum
    over the tonics counts, so that it is the same in every key. A mode is then one pattern; over mel bands it is
    another one for each key, octave and instrument. Rhythm: a network reads the tempogram.

    Args:
        dim: number of features.
        bins: of the power spectrogram.
        sample_rate: in Hz.
        hop_length: distance of two frames in samples.

    Raises ValueError for bins too wide for pitch classes, or frames closer than 4 ms.
    """

    HIDDEN = 64
    LONGEST_LAG = 2.0  # seconds: a bar of four beats at 120 BPM
    MOST_LAGS = 500  # their products take memory in proportion, for each frame

    def __init__(self, dim: int, *, bins: int, sample_rate: int, hop_length: int):
        super().__init__()
        self.chroma = Chroma(bins=bins, sample_rate=sample_rate)
        lags = max(1, round(self.LONGEST_LAG * sample_rate / hop_length))
        if lags > self.MOST_LAGS:
            raise ValueError(
                f'frames {hop_length} samples apart are too many for a summary of the rhythm; raise spec_hop_length to '
                f'{math.ceil(self.LONGEST_LAG * sample_rate / self.MOST_LAGS)}, or set clip_summary=False'
            )
        self.lags = lags
        self.from_each_tonic = nn.Sequential(
            nn.Linear(PITCH_CLASSES, self.HIDDEN), nn.SiLU(), nn.Linear(self.HIDDEN, self.HIDDEN)
        )
        self.from_tempogram = nn.Sequential(nn.Linear(lags, self.HIDDEN), nn.SiLU())
        # each of the scale of the embedding, or what is loud in the patches would drown them
        self.harmony_to_features = nn.Sequential(nn.LayerNorm(self.HIDDEN), nn.Linear(self.HIDDEN, dim))
        self.rhythm_to_features = nn.Sequential(nn.LayerNorm(self.HIDDEN), nn.Linear(self.HIDDEN, dim))
        steps = torch.arange(PITCH_CLASSES)
        self.register_buffer('rotations', (steps[:, None] + steps) % PITCH_CLASSES, persistent=False)

    def measure(self, power: Tensor, mel: Tensor, frames: Tensor | None) -> Tensor:
        """Pitch classes and tempogram `(b, 12 + lags)` float32, of the first `frames` `(b,)` of each item."""
        with torch.autocast(power.device.type, enabled=False):
            return torch.cat([self.chroma(power, frames), tempogram(mel, self.lags, frames)], dim=-1)

    def forward(self, measured: Tensor) -> Tensor:
        """`(b, 12 + lags)` → `(b, dim)`."""
        dtype = self.from_tempogram[0].weight.dtype
        parts = measured.split([PITCH_CLASSES, self.lags], dim=-1)
        classes, repeats = (F.layer_norm(part, part.shape[-1:]).to(dtype) for part in parts)
        harmony = self.from_each_tonic(classes[:, self.rotations]).amax(dim=1)
        return self.harmony_to_features(harmony) + self.rhythm_to_features(self.from_tempogram(repeats))
