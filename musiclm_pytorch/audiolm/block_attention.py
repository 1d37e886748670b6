"""Causal self-attention as audiolm-pytorch's transformers have it, on a CPU: the same numbers, about half of the work.

Queries go block by block, each with the keys that it may see, so that what the causal mask would throw away is never
computed, and each block is biased, masked and normalised while it lies in the cache. Keys and values are one head for
all queries (multi-query attention, arXiv 1911.02150).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries at a time


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Sequence[Tensor] | None = None
) -> Tensor:
    """Softmax of q kᵀ / √d + bias over the keys up to each query, times v.

    Args:
        q: `(b, h, n, d)`; under autocast, products are of its precision, and softmaxes in float32.
        k, v: `(b, p + n, d)`; the first p keys have no place in the sequence and are seen by all.
        mask: `(b, p + n)`, which keys are seen at all.
        bias: of the keys after the first p: for each block of `BLOCK` queries, `(h, queries, keys up to the last of
            them)`.
    """
    q = q * q.shape[-1] ** -0.5
    if torch.is_autocast_enabled('cpu'):
        q, k, v = (it.to(torch.get_autocast_dtype('cpu')) for it in (q, k, v))
    with torch.autocast('cpu', enabled=False):
        return _BlockCausal.apply(q, k, v, mask, *(bias or ()))


class _BlockCausal(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type='cpu')
    def forward(ctx, q, k, v, mask, *bias):
        h, i, j = q.shape[1], q.shape[2], k.shape[1]
        precision = torch.promote_types(q.dtype, torch.float32)
        hidden = -torch.finfo(precision).max
        out = torch.empty_like(q)
        weights = []
        for number, (start, stop, seen) in enumerate(blocks(i, j)):
            queries = rearrange(q[:, :, start:stop], 'b h i d -> b (h i) d')
            # biased and normalised in float32 at least, whatever the precision of the products
            scores = torch.bmm(queries, k[:, :seen].mT).to(precision)
            view = rearrange(scores, 'b (h i) j -> b h i j', h=h)
            if bias:
                view[..., j - i :] += bias[number]
            if mask is not None:
                view.masked_fill_(~mask[:, None, None, :seen], hidden)
            # the last keys of a block are the positions of its own queries
            own = view[..., start + j - i :]
            own.masked_fill_(_later(stop - start, q.device), hidden)
            weights.append(torch.softmax(scores, dim=-1).to(q.dtype))
            out[:, :, start:stop] = rearrange(torch.bmm(weights[-1], v[:, :seen]), 'b (h i) d -> b h i d', h=h)
        ctx.save_for_backward(q, k, v, out, *weights)
        ctx.bias_dtype = bias[0].dtype if bias else None
        return out

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type='cpu')
    def backward(ctx, grad_out):
        q, k, v, out, *weights = ctx.saved_tensors
        h, i, j = q.shape[1], q.shape[2], k.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_bias = []
        # the part of the gradient of a softmax that is one number a query
        shared = (grad_out * out).sum(dim=-1)
        for (start, stop, seen), weight in zip(blocks(i, j), weights):
            rows = rearrange(grad_out[:, :, start:stop], 'b h i d -> b (h i) d')
            grad_v[:, :seen] += torch.bmm(weight.mT, rows)
            grad = torch.bmm(rows, v[:, :seen].mT)
            grad -= rearrange(shared[:, :, start:stop], 'b h i -> b (h i) 1')
            grad *= weight
            if ctx.bias_dtype is not None:
                own = rearrange(grad, 'b (h i) j -> b h i j', h=h)[..., j - i :]
                grad_bias.append(own.sum(dim=0).to(ctx.bias_dtype))
            grad_q[:, :, start:stop] = rearrange(torch.bmm(grad, k[:, :seen]), 'b (h i) d -> b h i d', h=h)
            queries = rearrange(q[:, :, start:stop], 'b h i d -> b (h i) d')
            grad_k[:, :seen] += torch.bmm(grad.mT, queries)
        return grad_q, grad_k, grad_v, None, *grad_bias


def blocks(queries: int, keys: int) -> Iterator[tuple[int, int, int]]:
    """Start and stop of each block, and how many keys its last query sees: keys of a prefix are seen by all."""
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        yield start, stop, stop + keys - queries


def _later(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
