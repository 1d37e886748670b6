"""The path of upstream's single module: every public name of 0.2.8 again, for code that imports from it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer, sincos_2d
from musiclm_pytorch.mulan.contrastive import (
    MultiLayerContrastiveLoss,
    SigmoidContrastiveLearning,
    SoftmaxContrastiveLearning,
)
from musiclm_pytorch.mulan.layers import GEGLU, Attention, FeedForward, LayerNorm, Transformer, l2norm
from musiclm_pytorch.mulan.model import MuLaN, interspersed_indices
from musiclm_pytorch.mulan.text_transformer import TextTransformer
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.quantizer import MuLaNEmbedQuantizer

__all__ = [
    'GEGLU',
    'Attention',
    'AudioSpectrogramTransformer',
    'FeedForward',
    'LayerNorm',
    'MuLaN',
    'MuLaNEmbedQuantizer',
    'MultiLayerContrastiveLoss',
    'MusicLM',
    'Sequential',
    'SigmoidContrastiveLearning',
    'SoftmaxContrastiveLearning',
    'TextTransformer',
    'Transformer',
    'default',
    'exists',
    'first',
    'interspersed_indices',
    'l2norm',
    'log',
    'matrix_diag',
    'once',
    'pair',
    'posemb_sincos_2d',
    'print_once',
    'round_down_nearest_multiple',
]


def exists(val: Any) -> bool:
    return val is not None


def first(it: Sequence[Any]) -> Any:
    return it[0]


def default(val: Any, d: Any) -> Any:
    return d if val is None else val


def pair(t: Any) -> tuple[Any, Any]:
    return t if isinstance(t, tuple) else (t, t)


def round_down_nearest_multiple(n: int, divisor: int) -> int:
    return n - n % divisor


def once(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of one argument that only its first call runs."""
    calls = iter([fn])

    @wraps(fn)
    def inner(x: Any) -> Any:
        return next(calls, lambda _: None)(x)

    return inner


@once
def print_once(x: Any) -> None:
    sys.stdout.write(f'{x}\n')


def Sequential(*modules: nn.Module | None) -> nn.Sequential:
    """`nn.Sequential` of the modules that are not None."""
    return nn.Sequential(*(module for module in modules if module is not None))


def log(t: Tensor, eps: float = 1e-20) -> Tensor:
    return t.clamp(min=eps).log()


def matrix_diag(t: Tensor) -> Tensor:
    """The diagonals of `(b, i, j)`, `(b, min(i, j))`."""
    return t.diagonal(dim1=-2, dim2=-1)


def posemb_sincos_2d(patches: Tensor, temperature: float = 10000, dtype: torch.dtype = torch.float32) -> Tensor:
    """Position embedding `(h, w, d)` of patches `(b, h, w, d)`, in their dtype whatever `dtype` says, as in 0.2.8."""
    _, height, width, dim = patches.shape
    embedding = sincos_2d(height, width, dim, device=patches.device, temperature=temperature)
    return embedding.to(patches.dtype).view(height, width, dim)
