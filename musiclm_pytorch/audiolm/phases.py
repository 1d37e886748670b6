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


def griffin_lim(
    magnitudes: Tensor, phases: Tensor, iterations: int, hop: int, window: Tensor, *, fixed: int = 0
) -> tuple[Tensor, Tensor]:
    """Amplitudes `(b, f, t)` and phases to begin with to waves `(b, (t - 1) * hop)` and their phases, by the fast
    method of Griffin and Lim. Each iteration lets a frame depend on those that its window overlaps.

    fixed: frames at the beginning whose phases stay.
    """
    shape = dict(n_fft=len(window), hop_length=hop, window=window)
    length = (magnitudes.shape[-1] - 1) * hop
    magnitudes = magnitudes * (window.sum() / 2)
    kept = phases[..., :fixed]
    last = torch.zeros((), device=magnitudes.device)
    for _ in range(iterations):
        waves = torch.istft(magnitudes * phases, length=length, **shape)
        rebuilt = torch.stft(waves, pad_mode='constant', return_complex=True, **shape)
        phases = rebuilt - MOMENTUM / (1 + MOMENTUM) * last
        phases = torch.cat((kept, (phases / (phases.abs() + 1e-16))[..., fixed:]), dim=-1)
        last = rebuilt
    return torch.istft(magnitudes * phases, length=length, **shape), phases


class BlockPhases:
    """Amplitudes as they come to waves, block by block: the method of Griffin and Lim with look-ahead (Zhu, Beauregard
    and Wyse, 2007), which begins with phases that go on from those of the block before.

    The last `ahead` frames of what has come are phased with it, and again with what follows. The phases of frames
    before them stay, so that no sample that was given out changes.
    """

    def __init__(self, iterations: int, hop: int, window: Tensor, ahead: int):
        self.iterations, self.hop, self.window, self.ahead = iterations, hop, window, ahead
        self.overlap = -(-len(window) // hop)  # frames before one that its window reaches
        self.magnitudes: Tensor | None = None  # (b, f, t): those that stay and are overlapped, and those ahead
        self.phases: Tensor | None = None
        self.fixed = 0

    def push(self, magnitudes: Tensor, last: bool = False) -> Tensor:
        """The next frames `(b, f, t)`, more than `ahead` at first, to the samples that are settled now, `(b, n)`."""
        turns = None
        if self.phases is not None:
            turns = self.phases[..., -1].angle().double() / (2 * math.pi)
        if last:  # the frame at whose middle the wave ends
            known = magnitudes if magnitudes.shape[-1] else self.magnitudes
            magnitudes = torch.cat((magnitudes, known[..., -1:]), dim=-1)
        phases, _ = integrate_phases(magnitudes, self.hop, turns)
        if self.phases is not None:
            magnitudes = torch.cat((self.magnitudes, magnitudes), dim=-1)
            phases = torch.cat((self.phases, phases), dim=-1)
        waves, phases = griffin_lim(magnitudes, phases, self.iterations, self.hop, self.window, fixed=self.fixed)
        reach = len(self.window) // 2
        settled = magnitudes.shape[-1] - self.ahead
        start = max(0, self.fixed * self.hop - reach)
        waves = waves[:, start:] if last else waves[:, start : settled * self.hop - reach]
        dropped = max(0, settled - self.overlap)
        self.magnitudes, self.phases = magnitudes[..., dropped:], phases[..., dropped:]
        self.fixed = settled - dropped
        return waves
