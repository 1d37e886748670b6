"""What codecs share: the names by which audiolm-pytorch calls one."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from musiclm_pytorch.audiolm.convert import passes_as
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.checks import as_tensor, check_audio
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.pretrained.hub import HubModel, find_folder

C = TypeVar('C', bound='FrameCodec')


@passes_as('SoundStream')
class FrameCodec(HubModel, nn.Module):
    """Base of codecs; a subclass gives `encode`, `decode` and `vectors_of`, and the attributes below.

    It is a `Codec`, and is called like a `SoundStream` of audiolm-pytorch too, whose classes take it. It stays float32
    when the model around it is cast: codes are decided by small differences.

    Attributes:
        target_sample_hz: Hz, also `sample_rate`.
        strides: samples a code frame, in a tuple; also `downsample_factor`.
        codebook_size, num_quantizers: codes of a level, and levels; `rq_groups` is 1.
    """

    unlike: ClassVar[str]  # what to do where audiolm-pytorch would ask for a loss

    def encode(self, waves: Tensor) -> Tensor:
        """`(b, samples)` float32 at `sample_rate` to codes `(b, samples // downsample_factor, q)` int64."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `(b, t, q)` to waves `(b, samples)`; of fewer than all levels, what the first ones tell."""
        raise NotImplementedError

    def vectors_of(self, codes: Tensor) -> Tensor:
        """The sum of the codes' vectors, `(b, t, d)`."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    @property
    def device(self) -> torch.device:
        return next(itertools.chain(self.buffers(), self.parameters())).device

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.target_sample_hz

    @property
    def frame_rate(self) -> Fraction:
        """Code frames a second."""
        return Fraction(self.target_sample_hz, self.downsample_factor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights, for `from_pretrained`; JSON and safetensors, nothing is pickled."""
        save_module(self, folder)

    @classmethod
    def from_pretrained(
        cls: type[C],
        folder: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        device: str | torch.device = 'cpu',
        verify: bool = True,
    ) -> C:
        """Rebuild a codec of this class from its folder, in eval mode and float32.

        Arguments and errors are as in `MuLaN.from_pretrained`.
        """
        codec = load_module(find_folder(folder, revision, subfolder), device=device, verify=verify)
        if not isinstance(codec, cls):
            name = type(codec).__name__
            raise ValueError(f'{folder} holds a {name}, not a {cls.__name__}')
        return codec

    # what audiolm-pytorch calls

    @property
    def downsample_factor(self) -> int:
        """Samples a code frame."""
        return self.strides[0]

    @property
    def seq_len_multiple_of(self) -> int:
        return self.strides[0]

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.told()})'

    def told(self) -> str:
        """What `repr` says."""
        return (
            f'{self.num_quantizers} levels of {self.codebook_size} codes, {float(self.frame_rate):g} frames a second '
            f'at {self.target_sample_hz} Hz'
        )

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        return_encoded: bool = False,
        return_codes_only: bool = False,
        return_recons_only: bool = False,
        input_sample_hz: int | None = None,
        **_: Any,
    ) -> Any:
        """`(b, samples)` waves to vectors `(b, t, d)`, codes `(b, t, q)` and a loss of 0, or to one of these.

        With `return_recons_only`, what is left of the waves, `(b, 1, samples)`. Samples beyond whole codes are cut off.
        """
        if not (return_encoded or return_codes_only or return_recons_only):
            raise ValueError(f'a {type(self).__name__} gives no loss here; {self.unlike}')
        x = as_tensor(x, self.device)
        if isinstance(x, Tensor):
            x = rearrange(x, '... n -> (...) n')
        x = check_audio(x, ndim=2, shape='(batch, samples)').float()
        if input_sample_hz is not None:
            x = resample(x, input_sample_hz, self.target_sample_hz)
        codes = self.encode(x)
        if return_codes_only:
            return codes
        if return_recons_only:
            return self.decode_from_codebook_indices(codes)
        return self.vectors_of(codes), codes, x.new_zeros(())

    def decode_from_codebook_indices(self, quantized_indices: Tensor) -> Tensor:
        """`decode`, with a channel: `(b, 1, samples)`."""
        return rearrange(self.decode(quantized_indices), 'b n -> b 1 n')

    def count_frames(self, waves: Tensor) -> int:
        """Whole code frames of waves `(b, samples)`. Raises ValueError if there are none."""
        count = waves.shape[-1] // self.downsample_factor
        if count == 0:
            raise ValueError(f'a wave of {waves.shape[-1]} samples is shorter than a code, {self.downsample_factor}')
        return count
