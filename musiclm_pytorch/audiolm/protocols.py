"""What the stages ask of a codec and of a semantic tokenizer. Any module that has it will do."""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Codec(Protocol):
    """Waves to residual codes, and back. An `nn.Module`."""

    @property
    def sample_rate(self) -> int:
        """Of the waves, in Hz."""

    @property
    def frame_rate(self) -> Fraction:
        """Frames a second."""

    @property
    def num_quantizers(self) -> int:
        """Codes a frame, the first one the coarsest."""

    @property
    def codebook_size(self) -> int:
        """Different codes of a quantizer."""

    def encode(self, waves: Tensor) -> Tensor:
        """`(b, samples)` float32 in [-1, 1] to `(b, frames, num_quantizers)` int64."""

    def decode(self, codes: Tensor) -> Tensor:
        """`(b, frames, num_quantizers)` to `(b, samples)` float32, `sample_rate / frame_rate` a frame."""


@runtime_checkable
class Tokenizer(Protocol):
    """Waves to semantic tokens. An `nn.Module`."""

    @property
    def sample_rate(self) -> int:
        """Of the waves, in Hz."""

    @property
    def frame_rate(self) -> Fraction:
        """Tokens a second."""

    @property
    def codebook_size(self) -> int:
        """Different tokens."""

    def encode(self, waves: Tensor) -> Tensor:
        """`(b, samples)` float32 in [-1, 1] to `(b, tokens)` int64."""
