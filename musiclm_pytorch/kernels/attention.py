"""Attention of the towers and of the stages, softmax(q kᵀ + bias) v, each beside its plain form.

Towers have a bias that depends on the offset of two patches, and `attend` picks how:

- dense: the bias written out as `(b, h, n, n)`. The plain form, which torch.compile and exporters understand, and the
  fastest for short sequences.
- blockwise: for long ones on a CPU. Walks over blocks of queries, looks the bias of a block up as it goes and
  recomputes the weights in the backward pass (the idea of arXiv 2205.14135, without tiles of keys), so that no layer
  keeps an n × n tensor.
- flex: for CUDA. FlexAttention looks the bias up inside the fused kernel.

Stages have causal attention whose keys and values are one head for all queries (multi-query attention, arXiv
1911.02150): `plain_attention` on any device, `block_causal_attention` on a CPU, about half of the work. There queries
go block by block, each with the keys that it may see, so that what the causal mask would throw away is never computed,
and each block is biased, masked and normalised while it lies in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from musiclm_pytorch.kernels import fast_kernels_allowed

# tokens up to which n × n tensors cost less than looking the bias up twice
SHORT = 128
# elements of a (heads, queries, keys) block: 4 MiB of float32, which stays in the cache; for long audio more,
# because the products need a fair number of queries at a time
BLOCK_ELEMENTS = 2**20
MIN_BLOCK_ROWS = 128
# elements of a bias that is kept for the layers that follow and for the backward pass; a larger one is looked up anew
KEPT_ELEMENTS = 2**25
BLOCK = 128  # queries of causal attention at a time


# ---------------------------------------------------------------------------------------------------------------
# Towers


@dataclass
class GridBias:
    """A bias that depends only on the offset between two positions of a 2-d grid.

    The offset (dy, dx) of a pair of tokens is `codes[i] - codes[j] + centre`, a column of the table, because a code
    is `y * (2 * width - 1) + x`.

    Attributes:
        table: `(h, offsets)` float, the bias a head for each of the (2 * height - 1) * (2 * width - 1) offsets.
        codes: `(b, n)` or `(1, n)` int64, the position of each token.
        centre: the column of offset (0, 0).
        lengths: `(b,)` int64, how many leading tokens of each sample are real, or None when all are.
    """

    table: Tensor
    codes: Tensor
    centre: int
    lengths: Tensor | None = None
    _kept: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False)

    def key_mask(self) -> Tensor | None:
        """`(b, n)` bool, true where a token is real."""
        if self.lengths is None:
            return None
        positions = torch.arange(self.codes.shape[-1], device=self.codes.device)
        return positions < rearrange(self.lengths, 'b -> b 1')

    def dense(self) -> Tensor:
        """The bias written out, `(b or 1, h, n, n)`, minus infinity where a key is padding."""
        columns = rearrange(self.codes, 'b i -> b i 1') - rearrange(self.codes, 'b j -> b 1 j') + self.centre
        bias = rearrange(self.table[:, columns], 'h b i j -> b h i j')
        mask = self.key_mask()
        if mask is None:
            return bias
        return bias.masked_fill(~rearrange(mask, 'b j -> b 1 1 j'), -torch.inf)

    def columns(self, item: int, rows: slice, n: int) -> Tensor:
        """The columns of the table for some queries of an item and its first `n` keys, `(rows, n)`."""
        codes = self.codes[item if len(self.codes) > 1 else 0]
        return (codes[rows] + self.centre)[:, None] - codes[None, :n]

    @torch.no_grad()
    def block(self, item: int, rows: slice, n: int, dtype: torch.dtype) -> Tensor:
        """The bias of some queries of an item and its first `n` keys, `(h, rows, n)`."""
        place = item, rows.start, dtype
        if place in self._kept:
            return self._kept[place]
        columns = self.columns(item, rows, n)
        # gathering takes half the time of indexing
        found = self.table.to(dtype).gather(1, columns.flatten().expand(len(self.table), -1))
        found = found.view(-1, *columns.shape)
        if len(self.table) * self.codes.numel() * self.codes.shape[1] <= KEPT_ELEMENTS:
            self._kept[place] = found
        return found


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: GridBias | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q kᵀ + bias) v; the scale is expected inside `q`.

    Args:
        q, k, v: `(b, h, n, d)`.
        bias: position bias of the tokens (it also says which of them are padding).
        mask: `(b, n)` bool, the keys that may be attended to; only without `bias`.
        dropout: probability of dropping an attention weight.

    Returns:
        `(b, h, n, d)`; rows of padding tokens hold finite values without meaning.
    """
    # the fused kernels have no dropout of weights
    if bias is not None and dropout == 0.0:
        if q.is_cuda:
            return _flex(q, k, v, bias)
        if q.device.type == 'cpu' and q.shape[-2] > SHORT and fast_kernels_allowed():
            return _blockwise(q, k, v, bias)
    return _dense(q, k, v, bias, mask, dropout)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, bias: GridBias | None, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    if bias is not None:
        added = bias.dense()
    elif mask is not None:
        added = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
        added = rearrange(added, 'b j -> b 1 1 j')
    else:
        added = None
    # in half precision on a CPU the fused kernel runs at float32's speed, and products do not
    if q.device.type == 'cpu' and _is_half(q) and dropout == 0.0 and fast_kernels_allowed():
        return _weights(q, k, added) @ v
    added = None if added is None else added.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout, scale=1.0)


@cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: GridBias) -> Tensor:
    """FlexAttention with the bias looked up inside the kernel (arXiv 2412.05496)."""
    from torch.nn.attention.flex_attention import flex_attention

    key_codes = bias.codes.expand(q.shape[0], -1)
    # tensors only: a plain number in the closure would compile the kernel anew whenever it changes
    query_codes = key_codes + bias.centre
    table, lengths = bias.table, bias.lengths

    def score_mod(score, b, h, i, j):
        score = score + table[h, query_codes[b, i] - key_codes[b, j]]
        return score if lengths is None else torch.where(j < lengths[b], score, -torch.inf)

    # uncompiled, FlexAttention writes the whole n × n scores out: good for checking its numbers on a CPU only
    compile_here = q.is_cuda and not torch.compiler.is_compiling()
    kernel = _compiled_flex_attention() if compile_here else flex_attention
    return kernel(q, k, v, score_mod=score_mod, scale=1.0)


def _blockwise(q: Tensor, k: Tensor, v: Tensor, bias: GridBias) -> Tensor:
    return _BlockwiseAttention.apply(q, k, v, bias.table, bias)


class _BlockwiseAttention(torch.autograd.Function):
    """Attention with a looked-up bias over blocks of queries, one item at a time."""

    @staticmethod
    def forward(ctx, q, k, v, table, bias):
        batch, heads, total, _ = q.shape
        # or else each block's product makes a copy of all keys
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.bias = bias
        ctx.lengths = [total] * batch if bias.lengths is None else bias.lengths.tolist()

        out = torch.zeros_like(q)
        for items, rows, n in _grid_blocks(bias, ctx.lengths, heads):
            block = bias.block(items[0], rows, n, q.dtype)
            for i in items:
                queries, keys, values = q[i, None, :, rows], k[i, None, :, :n], v[i, None, :, :n]
                if _is_half(q):
                    out[i, :, rows] = (_weights(queries, keys, block) @ values)[0]
                else:
                    out[i, :, rows] = F.scaled_dot_product_attention(
                        queries, keys, values, attn_mask=block[None], scale=1.0
                    )[0]
        ctx.save_for_backward(q, k, v, table, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, table, out = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros(t.shape, dtype=torch.float32) for t in (q, k, v))
        grad_table = torch.zeros(table.shape, dtype=torch.float32)
        grad_out = grad_out.contiguous()

        for items, rows, n in _grid_blocks(ctx.bias, ctx.lengths, q.shape[1]):
            block, grad_block = ctx.bias.block(items[0], rows, n, q.dtype), None
            for i in items:
                queries, keys, values, grad_rows = q[i, :, rows], k[i, :, :n], v[i, :, :n], grad_out[i, :, rows]
                weights = _weights(queries, keys, block)
                grad_v[i, :, :n] += weights.mT @ grad_rows

                # softmax backward: dS = P ∘ (dP - rowsum(dO ∘ O)), in float32
                mean = (grad_rows.float() * out[i, :, rows]).sum(dim=-1, keepdim=True)
                grad_scores = torch.sub(grad_rows @ values.mT, mean).mul_(weights)
                products = grad_scores.to(q.dtype)
                grad_q[i, :, rows] = products @ keys
                grad_k[i, :, :n] += products.mT @ queries
                grad_block = grad_scores if grad_block is None else grad_block.add_(grad_scores)
            if ctx.needs_input_grad[3]:
                columns = ctx.bias.columns(items[0], rows, n).flatten()
                grad_table.scatter_add_(1, columns.expand(len(table), -1), grad_block.flatten(1))

        grads = (grad.to(t.dtype) for grad, t in zip((grad_q, grad_k, grad_v, grad_table), (q, k, v, table)))
        return *grads, None


def _grid_blocks(bias: GridBias, lengths: list[int], heads: int) -> Iterator[tuple[Sequence[int], slice, int]]:
    """The items that share a bias, a block of their queries, and how many keys they have."""
    shared = len(bias.codes) == 1 and len(set(lengths)) == 1
    for items in [range(len(lengths))] if shared else [[i] for i in range(len(lengths))]:
        n = lengths[items[0]]
        size = max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // (heads * n))
        for start in range(0, n, size):
            yield items, slice(start, min(start + size, n)), n


def _weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ + bias), which rounds to the dtype of `q` but between sums."""
    scores = q @ k.mT
    return torch.softmax(scores if bias is None else scores + bias.to(scores.dtype), dim=-1)


def _is_half(t: Tensor) -> bool:
    return t.dtype in (torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------------------------------------------
# Stages


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
    """`block_causal_attention` by PyTorch's own operators, whole, on any device.

    Args:
        q, k, v, mask: as of `block_causal_attention`.
        bias: `(h, n, j)` of the last j keys.
        causal: whether a query sees its own and earlier keys only; queries are those of the last keys.
        dropout: of the weights.
        fused: leave it to `scaled_dot_product_attention`.
    """
    hidden = None if mask is None else ~mask[:, None, None]
    if causal and q.shape[2] > 1:
        later = _later_keys(q.shape[2], q.device, ahead=k.shape[1] - q.shape[2])
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
        return _causal_attention(q, k, v, mask, bias or ())


def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Sequence[Tensor], kept: list[Tensor] | None = None
) -> Tensor:
    """`kept` gets the weights of each block."""
    h, i, j = q.shape[1], q.shape[2], k.shape[1]
    precision = torch.promote_types(q.dtype, torch.float32)
    hidden = -torch.finfo(precision).max
    out = torch.empty_like(q)
    for number, (start, stop, seen) in enumerate(causal_blocks(i, j)):
        queries = q[:, :, start:stop].flatten(1, 2)
        # biased and normalised in float32 at least, whatever the precision of the products
        scores = torch.bmm(queries, k[:, :seen].mT).to(precision)
        view = scores.unflatten(1, (h, stop - start))
        if bias:
            view[..., seen - bias[number].shape[-1] :] += bias[number]
        if mask is not None:
            view.masked_fill_(~mask[:, None, None, :seen], hidden)
        if stop - start > 1:  # the last keys of a block are the positions of its own queries
            view[..., start + j - i :].masked_fill_(_later_keys(stop - start, q.device), hidden)
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
        out = _causal_attention(q, k, v, mask, bias, weights)
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
        for number, ((start, stop, seen), weight) in enumerate(zip(causal_blocks(i, j), weights)):
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


def causal_blocks(queries: int, keys: int) -> Iterator[tuple[int, int, int]]:
    """Start and stop of each block, and how many keys its last query sees: keys of a prefix are seen by all."""
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        yield start, stop, stop + keys - queries


def _later_keys(size: int, device: torch.device, ahead: int = 0) -> Tensor:
    return torch.ones(size, ahead + size, dtype=torch.bool, device=device).triu(1 + ahead)
