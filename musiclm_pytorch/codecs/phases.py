"""Phases for magnitudes: of spectral peaks by their frequencies, then as neighbouring frames agree."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MOMENTUM = 0.99  # of fast Griffin-Lim (Perraudin et al., 2013)


def integrate_phases(magnitudes: Tensor, hop: int, turns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Phases that go on from frame to frame as fast as the nearest spectral peak does (single pass spectrogram
    inversion, Beauregard, Harish and Wyse, 2015).

    magnitudes: `(b, f, t)`. hop: in samples. turns: what the call before gave, to go on from.

    Returns complex phases of length 1, `(b, f, t)`, and the turns at the last frame, `(b, f)` float64.
    """
    count = magnitudes.shape[1]
    n_fft = 2 * (count - 1)
    height = magnitudes.clamp(min=1e-8).log()
    around = F.pad(height, (0, 0, 1, 1), mode='replicate')
    below, above = around[:, :-2], around[:, 2:]
    is_peak = (height > below) & (height >= above)
    # the top of a parabola through three bins
    curve = below - 2 * height + above
    offset = torch.where(curve < -1e-6, (below - above) / (2 * curve), 0.0).clamp(-0.5, 0.5)
    bins = torch.arange(count, device=magnitudes.device)[None, :, None]
    last = torch.where(is_peak, bins, -count).cummax(dim=1).values
    following = torch.where(is_peak, bins, 2 * count).flip(1).cummin(dim=1).values.flip(1)
    nearest = torch.where(bins - last <= following - bins, last, following).clamp(0, count - 1)
    cycles = (nearest + offset.gather(1, nearest)) / n_fft  # a sample
    found = (cycles.double() * hop).cumsum(dim=-1)
    if turns is not None:
        found = found + turns[..., None]
    found = found % 1.0
    # the lobe of a window around a peak alternates in sign
    phases = 2 * math.pi * found.gather(1, nearest).float() + math.pi * (bins - nearest)
    return torch.polar(torch.ones_like(phases), phases), found[..., -1]


def griffin_lim(magnitudes: Tensor, phases: Tensor, iterations: int, hop: int, window: Tensor) -> Tensor:
    """Magnitudes `(b, f, t)` and phases to begin with to waves `(b, (t - 1) * hop)`, by the fast method of Griffin and
    Lim. Each iteration lets a frame depend on those that its window overlaps."""
    shape = dict(n_fft=len(window), hop_length=hop, window=window)
    length = (magnitudes.shape[-1] - 1) * hop
    magnitudes = magnitudes * (window.sum() / 2)
    last = torch.zeros((), device=magnitudes.device)
    for _ in range(iterations):
        waves = torch.istft(magnitudes * phases, length=length, **shape)
        rebuilt = torch.stft(waves, pad_mode='constant', return_complex=True, **shape)
        phases = rebuilt - MOMENTUM / (1 + MOMENTUM) * last
        phases = phases / (phases.abs() + 1e-16)
        last = rebuilt
    return torch.istft(magnitudes * phases, length=length, **shape)
