"""Weights on disk as integers of 8 bits with a scale a row, a quarter of the bytes of float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = '.scale'  # behind the name of a weight
LEAST_ROW = 32  # numbers that a scale is worth
# what tells positions apart: an MLP of numbers up to some thousands, of which rounding would grow
EXACT = ('pos_bias',)


def quantized(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices `(…, n)` as int8 beside their scales `(…,)` float32, under names of their own; all else in float16.

    A row's largest number becomes ±127 times its scale, so that none is off by more than half a 127th of it.
    """
    found = {}
    for name, weight in weights.items():
        is_matrix = weight.is_floating_point() and weight.ndim > 1 and weight.shape[-1] >= LEAST_ROW
        if is_matrix and not any(it in name for it in EXACT):
            scale = weight.float().abs().amax(dim=-1) / 127
            steps = weight.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
            found[name], found[name + SCALE] = steps.round().to(torch.int8), scale
        else:
            found[name] = weight.to(torch.float16) if weight.is_floating_point() else weight
    return found


def dequantized(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `quantized` made, in float32; other weights as they are."""
    scales = {name.removesuffix(SCALE) for name in weights if name.endswith(SCALE)}
    scales = {name for name in scales if name in weights and weights[name].dtype == torch.int8}
    return {
        name: weight.float() * weights[name + SCALE][..., None] if name in scales else weight
        for name, weight in weights.items()
        if name.removesuffix(SCALE) not in scales or name in scales
    }
