"""The grid of patches: where each one lies, and which of them take part."""

from __future__ import annotations

import torch
from einops import pack, rearrange, repeat
from torch import Tensor

from musiclm_pytorch.checks import values_can_be_checked


def sincos_2d(height: int, width: int, dim: int, *, device: torch.device, temperature: float = 10000) -> Tensor:
    """`(height, width, dim)` sinusoidal positions of a grid (Better plain ViT baselines, arXiv 2205.01580)."""
    omega = torch.arange(dim // 4, device=device) / (dim // 4 - 1)
    omega = 1.0 / temperature**omega
    y, x = (rearrange(torch.arange(size, device=device), 'p -> p 1') * omega for size in (height, width))
    y, x = repeat(y, 'y d -> y x d', x=width), repeat(x, 'x d -> y x d', y=height)
    return pack((x.sin(), x.cos(), y.sin(), y.cos()), 'y x *')[0]


def choose_patches(
    height: int, width: int, columns: Tensor | None, batch: int, dropout: float, *, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which patches of each item take part: real ones, minus a random fraction.

    Args:
        columns: `(b,)` the columns of patches that each item fills, or None for all.
        dropout: fraction of an item's own patches to leave out; at least one stays.

    Returns:
        kept `(b, n)` int64, indices into the flattened grid, the real ones first and in order, and lengths `(b,)`,
        how many are real, or None when all are.
    """
    total = height * width
    score = torch.zeros(batch, total, device=device)
    if dropout > 0.0:
        # drawn column by column, so that padding at the end does not change what the first columns get
        score = rearrange(torch.rand(batch, width, height, device=device), 'b x y -> b (y x)')
    counts = torch.full((batch,), total, device=device)
    if columns is not None:
        x = torch.arange(total, device=device) % width
        score = score.masked_fill(x >= rearrange(columns, 'b -> b 1'), torch.inf)
        counts = columns * height

    # in float64, so that an item has as many with a length as without, and as many as Python's floats say
    counts = (counts.double() * (1 - dropout)).long().clamp(min=1)
    if columns is None:
        most, same = max(1, int(total * (1 - dropout))), True
    elif not values_can_be_checked():
        most, same = total, False
    else:
        most = int(counts.max())
        same = bool((counts == most).all())

    # the lowest scores stay; in order of position, so that looking up their biases walks through memory
    kept = score.argsort(dim=-1)[:, :most]
    spare = torch.arange(kept.shape[-1], device=device) >= rearrange(counts, 'b -> b 1')
    kept = kept.masked_fill(spare, total).sort(dim=-1).values
    return kept.clamp(max=total - 1), None if same else counts
