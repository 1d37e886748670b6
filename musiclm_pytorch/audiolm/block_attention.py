"""Causal self-attention of audiolm-pytorch's transformers on a CPU: the same numbers, about half of the work.

Queries go block by block, each with the keys that it may see, so that what the causal mask would throw away is never
computed, and each block is scaled, biased, masked and normalised while it lies in the cache. Keys and values are one
head for all queries (multi-query attention, arXiv 1911.02150), as these transformers have them.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

BLOCK = 128  # queries at a time


class BlockCausalAttend(nn.Module):
    """Takes the place of an `Attend` of audiolm-pytorch; what it cannot do faster, it leaves to that one.

    It has no parameters, so a state dict stays as it is.
    """

    def __init__(self, attend: nn.Module):
        super().__init__()
        self.attend = attend

    def __getattr__(self, name: str):
        # whoever looks for the settings of attention finds them
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('attend'), name)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attn_bias: Tensor | None = None):
        """`q (b, h, i, d)`, `k` and `v (b, j, d)`, `mask (b, j)` of the keys seen, `attn_bias (h, i, j)`."""
        drops = self.training and self.attend.dropout > 0
        if drops or self.attend.flash or not self.attend.causal or q.device.type != 'cpu' or len(k) != len(q):
            return self.attend(q, k, v, mask=mask, attn_bias=attn_bias)
        q = q * q.shape[-1] ** -0.5
        if torch.is_autocast_enabled('cpu'):
            q, k, v = (it.to(torch.get_autocast_dtype('cpu')) for it in (q, k, v))
        with torch.autocast('cpu', enabled=False):
            return _BlockCausal.apply(q, k, v, mask, attn_bias)


class _BlockCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, bias):
        h, i, j = q.shape[1], q.shape[2], k.shape[1]
        precision = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(q)
        weights = []
        for start, stop, seen in _blocks(i, j):
            queries = rearrange(q[:, :, start:stop], 'b h i d -> b (h i) d')
            # biased and normalised in float32 at least, whatever the precision of the products
            scores = torch.bmm(queries, k[:, :seen].mT).to(precision)
            view = rearrange(scores, 'b (h i) j -> b h i j', h=h)
            if bias is not None:
                view += bias[:, start:stop, :seen]
            if mask is not None:
                view.masked_fill_(~mask[:, None, None, :seen], -torch.finfo(scores.dtype).max)
            # the last keys of a block are the positions of its own queries
            own = view[..., start + j - i :]
            own.masked_fill_(_later(stop - start, q.device), -torch.finfo(scores.dtype).max)
            weights.append(torch.softmax(scores, dim=-1).to(q.dtype))
            out[:, :, start:stop] = rearrange(torch.bmm(weights[-1], v[:, :seen]), 'b (h i) d -> b h i d', h=h)
        ctx.save_for_backward(q, k, v, out, *weights)
        ctx.has_bias = bias is not None
        ctx.bias_dtype = bias.dtype if ctx.has_bias else None
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, *weights = ctx.saved_tensors
        h, i, j = q.shape[1], q.shape[2], k.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_bias = torch.zeros(h, i, j, dtype=ctx.bias_dtype, device=q.device) if ctx.has_bias else None
        # the part of the gradient of a softmax that is one number a query
        shared = (grad_out * out).sum(dim=-1)
        for (start, stop, seen), weight in zip(_blocks(i, j), weights):
            rows = rearrange(grad_out[:, :, start:stop], 'b h i d -> b (h i) d')
            grad_v[:, :seen] += torch.bmm(weight.mT, rows)
            grad = torch.bmm(rows, v[:, :seen].mT)
            grad -= rearrange(shared[:, :, start:stop], 'b h i -> b (h i) 1')
            grad *= weight
            if grad_bias is not None:
                grad_bias[:, start:stop, :seen] = rearrange(grad, 'b (h i) j -> b h i j', h=h).sum(dim=0)
            grad_q[:, :, start:stop] = rearrange(torch.bmm(grad, k[:, :seen]), 'b (h i) d -> b h i d', h=h)
            queries = rearrange(q[:, :, start:stop], 'b h i d -> b (h i) d')
            grad_k[:, :seen] += torch.bmm(grad.mT, queries)
        return grad_q, grad_k, grad_v, None, grad_bias


def _blocks(queries: int, keys: int):
    """Start and stop of each block, and how many keys its last query sees: keys of a prefix are seen by all."""
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        yield start, stop, stop + keys - queries


def _later(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def use_block_attention(transformer: nn.Module) -> None:
    """Let the self-attention of a `SemanticTransformer`, `CoarseTransformer` or `FineTransformer` run by blocks."""
    for attention in [it for it in transformer.modules() if hasattr(it, 'attend') and hasattr(it, 'to_kv')]:
        if (
            attention.attend.causal
            and attention.num_null_kv == 0
            and not isinstance(attention.attend, BlockCausalAttend)
        ):
            attention.attend = BlockCausalAttend(attention.attend)
