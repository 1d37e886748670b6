"""Causal multi-query attention on a CPU, block by block: the numbers of `plain_attention`, about half of the work.

Queries go block by block, each with the keys that it may see, so that what the causal mask would throw away is never
computed, and each block is biased, masked and normalised while it lies in the cache. Keys and values are one head for
all queries (multi-query attention, arXiv 1911.02150).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries at a time


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    causal: bool = True,
    dropout: float = 0.0,
    fused: bool = False,
) -> Tensor:
    """The same by PyTorch's own operators, whole, on any device.

    Args:
        q, k, v, mask: as of `block_causal_attention`.
        bias: `(h, n, j)` of the last j keys.
        causal: whether a query sees its own and earlier keys only; queries are those of the last keys.
        dropout: of the weights.
        fused: leave it to `scaled_dot_product_attention`.
    """
    hidden = None if mask is None else ~mask[:, None, None]
    if causal and q.shape[2] > 1:
        later = _later(q.shape[2], q.device, ahead=k.shape[1] - q.shape[2])
        hidden = later if hidden is None else hidden | later
    if fused and bias is None:
        lowest = torch.finfo(q.dtype).min  # finite, for a query may see no key at all
        added = None if hidden is None else torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, lowest)
        k, v = (it[:, None].expand(-1, q.shape[1], -1, -1) for it in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout)
    scores = einsum(q, k, 'b h i d, b j d -> b h i j') * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + F.pad(bias, (scores.shape[-1] - bias.shape[-1], 0))
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return einsum(weights, v.to(weights.dtype), 'b h i j, b j d -> b h i d')


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Sequence[Tensor] | None = None
) -> Tensor:
    """Softmax of q kᵀ / √d + bias over the keys up to each query, times v.

    Args:
        q: `(b, h, n, d)`; under autocast, products are of its precision, and softmaxes in float32.
        k, v: `(b, p + n, d)`; the first p keys are seen by all queries.
        mask: `(b, p + n)`, which keys are seen at all.
        bias: for each block of `BLOCK` queries `(h, queries, j)`, of the last j keys up to the last of them.
    """
    q = q * q.shape[-1] ** -0.5
    if torch.is_autocast_enabled('cpu'):
        q, k, v = (it.to(torch.get_autocast_dtype('cpu')) for it in (q, k, v))
    with torch.autocast('cpu', enabled=False):
        if torch.is_grad_enabled():
            return _BlockCausal.apply(q, k, v, mask, *(bias or ()))
        return _attend(q, k, v, mask, bias or ())


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Sequence[Tensor], kept: list[Tensor] | None = None
) -> Tensor:
    """`kept` gets the weights of each block."""
    h, i, j = q.shape[1], q.shape[2], k.shape[1]
    precision = torch.promote_types(q.dtype, torch.float32)
    hidden = -torch.finfo(precision).max
    out = torch.empty_like(q)
    for number, (start, stop, seen) in enumerate(blocks(i, j)):
        queries = q[:, :, start:stop].flatten(1, 2)
        # biased and normalised in float32 at least, whatever the precision of the products
        scores = torch.bmm(queries, k[:, :seen].mT).to(precision)
        view = scores.unflatten(1, (h, stop - start))
        if bias:
            view[..., seen - bias[number].shape[-1] :] += bias[number]
        if mask is not None:
            view.masked_fill_(~mask[:, None, None, :seen], hidden)
        if stop - start > 1:  # the last keys of a block are the positions of its own queries
            view[..., start + j - i :].masked_fill_(_later(stop - start, q.device), hidden)
        weights = torch.softmax(scores, dim=-1).to(q.dtype)
        out[:, :, start:stop] = torch.bmm(weights, v[:, :seen]).unflatten(1, (h, stop - start))
        if kept is not None:
            kept.append(weights)
    return out


class _BlockCausal(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type='cpu')
    def forward(ctx, q, k, v, mask, *bias):
        weights = []
        out = _attend(q, k, v, mask, bias, weights)
        ctx.save_for_backward(q, k, v, out, *weights)
        ctx.bias_dtype = bias[0].dtype if bias else None
        ctx.widths = [it.shape[-1] for it in bias]
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
        for number, ((start, stop, seen), weight) in enumerate(zip(blocks(i, j), weights)):
            rows = rearrange(grad_out[:, :, start:stop], 'b h i d -> b (h i) d')
            grad_v[:, :seen] += torch.bmm(weight.mT, rows)
            grad = torch.bmm(rows, v[:, :seen].mT)
            grad -= rearrange(shared[:, :, start:stop], 'b h i -> b (h i) 1')
            grad *= weight
            if ctx.bias_dtype is not None:
                own = rearrange(grad, 'b (h i) j -> b h i j', h=h)[..., seen - ctx.widths[number] :]
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


def _later(size: int, device: torch.device, ahead: int = 0) -> Tensor:
    return torch.ones(size, ahead + size, dtype=torch.bool, device=device).triu(1 + ahead)
