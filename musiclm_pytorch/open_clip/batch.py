"""A batch of clips that passes through open_clip's training loop as a tensor of images does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AudioBatch:
    """Waves with their lengths and rate, where open_clip's loop expects one tensor of images.

    Attributes:
        waves: `(b, samples)` float.
        lengths: `(b,)` int64 true lengths in samples; None when all waves are as long as the tensor.
        sample_rate: in Hz; None is the rate of the model.
    """

    waves: Tensor
    lengths: Tensor | None = None
    sample_rate: int | None = None

    def to(self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> AudioBatch:
        """As `Tensor.to`; the dtype is that of the waves."""
        lengths = self.lengths
        return replace(
            self,
            waves=self.waves.to(device=device, dtype=dtype, non_blocking=non_blocking),
            lengths=None if lengths is None else lengths.to(device=device, non_blocking=non_blocking),
        )

    @property
    def shape(self) -> torch.Size:
        return self.waves.shape

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.waves.size() if dim is None else self.waves.size(dim)

    def __len__(self) -> int:
        return len(self.waves)
