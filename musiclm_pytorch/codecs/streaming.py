"""Codes to waves piece by piece, the same as all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from musiclm_pytorch.audiolm.phases import griffin_lim, integrate_phases

if TYPE_CHECKING:
    from musiclm_pytorch.codecs.neural import NeuralCodec


class DecodingState:
    """What a `NeuralCodec` remembers between pieces of codes: those that later levels, phases and samples depend on."""

    def __init__(self, codec: NeuralCodec):
        self.codec = codec
        self.codes: Tensor | None = None  # (b, t, q)
        self.levels: Tensor | None = None  # amplitudes (b, bins, frames), with as many phases
        self.phases: Tensor | None = None
        self.turns: Tensor | None = None
        self.ready = 0  # code frames in `codes` whose levels are known
        self.given = 0  # spectral frames in `levels` whose samples were given out

    @torch.no_grad()
    def push(self, codes: Tensor, last: bool) -> Tensor:
        """The next codes `(b, t, q)`, none at the very end, to the samples that are settled now, `(b, samples)`."""
        codec = self.codec
        self.codes = _joined(self.codes, codes, dim=1)
        known = self.codes.shape[1] - (0 if last else codec.future)
        if known > self.ready or (last and self.codes.shape[1] > 0):
            new = codec.amplitudes(codec.vectors_of(self.codes))
            new = new[..., self.ready * codec.frames : known * codec.frames]
            if last:  # the frame at whose middle the wave ends
                end = new if new.shape[-1] else self.levels
                new = torch.cat((new, end[..., -1:]), dim=-1)
            phases, self.turns = integrate_phases(new, codec.hop, self.turns)
            self.levels, self.phases = _joined(self.levels, new, dim=2), _joined(self.phases, phases, dim=2)
            dropped = max(0, known - codec.past)
            self.codes, self.ready = self.codes[:, dropped:], known - dropped
        count = 0 if self.levels is None else self.levels.shape[-1]
        until = count - 1 - (0 if last else codec.edge)
        if until <= self.given:
            return torch.zeros(len(codes), 0, device=codes.device)
        waves, _ = griffin_lim(self.levels, self.phases, codec.iterations, codec.hop, codec.fft_window)
        waves = waves[:, self.given * codec.hop : until * codec.hop]
        dropped = max(0, until - codec.edge)
        self.levels, self.phases = self.levels[..., dropped:], self.phases[..., dropped:]
        self.given = until - dropped
        return waves


def _joined(before: Tensor | None, new: Tensor, dim: int) -> Tensor:
    return new if before is None else torch.cat((before, new), dim=dim)
