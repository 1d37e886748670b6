"""Differentiable collectives over torch.distributed. Imports nothing from the package.

The world is looked up at each call, so a module built before `init_process_group` works as well, and without a
process group everything here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

_single = False


@contextmanager
def single_process() -> Iterator[None]:
    """Act as if this were the only process: for what one process does while others do not, such as evaluation."""
    global _single
    before, _single = _single, True
    try:
        yield
    finally:
        _single = before


def _has_company() -> bool:
    return not _single and dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes of the default group, 1 without one."""
    return dist.get_world_size() if _has_company() else 1


def rank() -> int:
    """Index of this process in the default group, 0 without one."""
    return dist.get_rank() if _has_company() else 0


def num_launched() -> int:
    """Processes that a launcher such as torchrun has started, 1 without one; known before there is a group."""
    return int(os.environ.get('WORLD_SIZE', '1'))


def gather_sizes(size: int, device: torch.device) -> list[int]:
    """The `size` of every rank, in rank order."""
    if world_size() == 1:
        return [size]
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=device)
    sizes[rank()] = size
    dist.all_reduce(sizes)
    return sizes.tolist()


def gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Concatenate `(n_r, …)` over all ranks to `(sum n_r, …)`, differentiably and for uneven `n_r`.

    The gradient that reaches a row is the sum of what every rank's loss sends it (open_clip calls this
    `gather_with_grad`); each rank must therefore take part in the backward pass too.

    Args:
        rows: this rank's rows.
        sizes: the number of rows of every rank, from `gather_sizes`.
    """
    return rows if len(sizes) == 1 else _GatherRows.apply(rows, sizes, True)


def gather_batch(latents: Tensor, sizes: list[int]) -> Tensor:
    """`gather_rows` along the batch axis of `(…, b, d)`, the last but one."""
    return gather_rows(latents.transpose(0, -2), sizes).transpose(0, -2)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a scalar over ranks as the value, with the gradient of this rank's own part.

    That is what data-parallel training wants of a loss: every rank reports the same number, and the averaging of
    gradients over ranks gives the gradient of that number.
    """
    if world_size() == 1:
        return value
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return value + (mean / world_size() - value.detach())


def any_over_ranks(flags: Tensor, device: torch.device) -> Tensor:
    """Where a bool tensor is true on any rank, which send it by way of `device`."""
    if world_size() == 1:
        return flags
    found = flags.to(device, torch.uint8, copy=True)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.to(flags.device, torch.bool)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sizes, sum_gradients):
        ctx.sizes, ctx.sum_gradients = sizes, sum_gradients
        # collectives want equal shapes: pad to the largest, and cut the padding off again
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes)])

    @staticmethod
    def backward(ctx, grad):
        if ctx.sum_gradients:
            grad = grad.contiguous().clone()
            dist.all_reduce(grad)
        return grad.split(ctx.sizes)[rank()], None, None


class AllGather(nn.Module):
    """Upstream's module of this name: concatenate a tensor over all ranks along `dim`.

    Args:
        dim: the axis, whose length may differ between ranks.
        all_reduce_grads: the gradient is the sum of what every rank's loss sends, in place of this rank's alone.
    """

    def __init__(self, dim: int, *, all_reduce_grads: bool = False):
        super().__init__()
        self.dim = dim
        self.all_reduce_grads = all_reduce_grads

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The joined tensor and the length of each rank's part, `(ranks,)` int64, which may be given; `(x, None)`
        without a process group."""
        if world_size() == 1:
            return x, None
        counts = gather_sizes(x.shape[self.dim], x.device) if sizes is None else sizes.tolist()
        rows = _GatherRows.apply(x.movedim(self.dim, 0), counts, self.all_reduce_grads)
        return rows.movedim(0, self.dim), torch.tensor(counts, device=x.device)
