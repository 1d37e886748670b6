"""Attention kernels: the one place that picks how softmax(q kᵀ + bias) v is computed.

Four kernels give the same numbers; `attend` chooses.

- dense: `scaled_dot_product_attention` over a bias written out as `(b, h, n, n)`. The plain reference, and the
  form that torch.compile and exporters understand.
- chunked: for the CPU. Walks over blocks of queries, looks the bias of a block up as it goes and recomputes it in
  the backward pass, so that no n × n tensor is ever held (the idea of arXiv 2205.14135, without its tiling of keys).
- short: for the CPU in half precision, where the fused kernel runs at float32's speed and matrix products do not: the
  products one by one over all samples, and the weights of short sequences kept for the backward pass.
- flex: for CUDA. FlexAttention looks the bias up inside the fused kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from musiclm_pytorch.mulan.kernels import fast_kernels_allowed

# elements of a (heads, queries, keys) block: 4 MiB of float32, which stays in the cache; for long audio more,
# because the products need a fair number of queries at a time
CHUNK_ELEMENTS = 2**20
MIN_CHUNK_ROWS = 128

# tokens up to which the weights of all heads are kept, about as large as the activations of a layer
SHORT = 256


@dataclass
class PositionBias:
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

    def key_mask(self) -> Tensor | None:
        """`(b, n)` bool, true where a token is real."""
        if self.lengths is None:
            return None
        positions = torch.arange(self.codes.shape[-1], device=self.codes.device)
        return positions < rearrange(self.lengths, 'b -> b 1')

    def block(self, item: int, rows: slice, n: int, heads: slice = slice(None), table: Tensor | None = None) -> Tensor:
        """The bias of some queries of an item, looked up: `(heads, rows, n)`.

        Args:
            item: which of the batch.
            rows: the queries; `n`: how many keys, from the first on.
            heads: which of them.
            table: in place of the own one, such as one in another dtype.
        """
        columns = _columns(self.codes, item, rows, n, self.centre)
        return _look_up((self.table if table is None else table)[heads], columns)

    def dense(self) -> Tensor:
        """The bias written out, `(b, h, n, n)`, minus infinity where a key is padding."""
        columns = rearrange(self.codes, 'b i -> b i 1') - rearrange(self.codes, 'b j -> b 1 j') + self.centre
        bias = rearrange(self.table[:, columns], 'h b i j -> b h i j')
        mask = self.key_mask()
        if mask is None:
            return bias
        return bias.masked_fill(~rearrange(mask, 'b j -> b 1 1 j'), -torch.inf)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: PositionBias | None = None,
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
    if dropout == 0.0 and _is_short(q):
        return _short(q, k, v, bias, mask)

    if bias is None:
        mask = None if mask is None else rearrange(mask, 'b j -> b 1 1 j')
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=1.0)

    # the fused kernels have no dropout of weights
    if dropout == 0.0 and q.is_cuda:
        return _flex(q, k, v, bias)
    if dropout == 0.0 and q.device.type == 'cpu' and fast_kernels_allowed():
        return _chunked(q, k, v, bias)
    return _dense(q, k, v, bias, dropout)


def _dense(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias, dropout: float = 0.0) -> Tensor:
    attn_mask = bias.dense().to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, scale=1.0)


@cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias) -> Tensor:
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


def _is_short(q: Tensor) -> bool:
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type == 'cpu' and half and q.shape[-2] <= SHORT and fast_kernels_allowed()


def _short(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias | None, mask: Tensor | None = None) -> Tensor:
    if bias is not None:
        return _ShortAttention.apply(q, k, v, bias.dense())
    if mask is not None:
        mask = rearrange(torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf), 'b j -> b 1 1 j')
    return _ShortAttention.apply(q, k, v, mask)


class _ShortAttention(torch.autograd.Function):
    """Attention by plain products, with a bias `(b or 1, h or 1, n or 1, n)` or None; softmax in float32 or better."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        batch, heads = q.shape[:2]
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        weights = _weights(q, k, heads, bias).to(v.dtype)
        ctx.save_for_backward(q, k, v, weights)
        ctx.shape = (batch, heads)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return torch.bmm(weights, v).unflatten(0, ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, weights = ctx.saved_tensors
        grad_out = grad_out.flatten(0, 1)
        grad_v = torch.bmm(weights.mT, grad_out)

        # softmax backward: dS = P ∘ (dP - rowsum(P ∘ dP))
        precise = torch.promote_types(q.dtype, torch.float32)
        grad_weights = torch.bmm(grad_out, v.mT).to(precise)
        grad_scores = torch._softmax_backward_data(grad_weights, weights.to(precise), -1, precise)

        grad_bias = None
        if ctx.needs_input_grad[3]:
            shape, dtype = ctx.bias
            grad_bias = grad_scores.unflatten(0, ctx.shape).sum_to_size(shape).to(dtype)
        grad_scores = grad_scores.to(q.dtype)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.mT, q)
        return *(grad.unflatten(0, ctx.shape) for grad in (grad_q, grad_k, grad_v)), grad_bias


def _chunked(q: Tensor, k: Tensor, v: Tensor, bias: PositionBias) -> Tensor:
    return _ChunkedAttention.apply(q, k, v, bias.table, bias.codes, bias.centre, bias.lengths)


class _ChunkedAttention(torch.autograd.Function):
    """Attention with a looked-up bias over blocks of queries."""

    @staticmethod
    def forward(ctx, q, k, v, table, codes, centre, lengths):
        batch, heads, total, _ = q.shape
        ctx.centre = centre
        ctx.lengths = [total] * batch if lengths is None else lengths.tolist()

        # samples on one grid share a bias, and so one call
        ctx.shared = len(codes) == 1 and lengths is None
        in_half = q.dtype in (torch.bfloat16, torch.float16)
        together = _together(ctx.shared, heads, total) if in_half else batch if ctx.shared else 1

        lookup = table.float() if in_half else table.to(q.dtype)
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for group, n in _groups(together, ctx.lengths):
            keys, values = k[group, :, :n], v[group, :, :n]
            for rows in _blocks(n, heads):
                block_bias = _look_up(lookup, _columns(codes, group.start, rows, n, centre))
                if in_half:
                    # product by product, since the fused kernel runs at float32's speed
                    weights = _weights(q[group, :, rows].flatten(0, 1), keys.flatten(0, 1), heads, block_bias)
                    block = torch.bmm(weights.to(q.dtype), values.flatten(0, 1)).unflatten(0, (-1, heads))
                else:
                    block = F.scaled_dot_product_attention(
                        q[group, :, rows], keys, values, attn_mask=block_bias[None], scale=1.0
                    )
                out[group, :, rows] = block
        ctx.save_for_backward(q, k, v, table, codes, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, table, codes, out = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros(t.shape, dtype=torch.float32) for t in (q, k, v))
        grad_table = torch.zeros(table.shape, dtype=torch.float32)
        lookup = table.float()

        heads, total = q.shape[1:3]
        for group, n in _groups(_together(ctx.shared, heads, total), ctx.lengths):

            def flat(t: Tensor, rows: slice) -> Tensor:
                # a view of what is contiguous, such as the gradients, which are written to
                return t[group, :, rows].flatten(0, 1)  # noqa: B023 - called within the iteration

            everything = slice(0, n)
            keys, values = flat(k, everything), flat(v, everything)
            for rows in _blocks(n, heads):
                queries, grad_rows = flat(q, rows), flat(grad_out, rows)
                columns = _columns(codes, group.start, rows, n, ctx.centre)
                weights = _weights(queries, keys, heads, _look_up(lookup, columns))
                flat(grad_v, everything).add_(torch.bmm(weights.to(v.dtype).mT, grad_rows))

                # softmax backward: dS = P ∘ (dP - rowsum(dO ∘ O)), in float32
                mean = (grad_rows.float() * flat(out, rows)).sum(dim=-1, keepdim=True)
                grad_scores = torch.sub(torch.bmm(grad_rows, values.mT), mean).mul_(weights)
                products = grad_scores.to(q.dtype)

                flat(grad_q, rows).copy_(torch.bmm(products, keys))
                flat(grad_k, everything).add_(torch.bmm(products.mT, queries))
                if ctx.needs_input_grad[3]:
                    sums = grad_scores.view(-1, heads, columns.numel()).sum(dim=0)
                    grad_table.scatter_add_(1, columns.flatten().expand(heads, -1), sums)

        grads = (grad.to(t.dtype) for grad, t in zip((grad_q, grad_k, grad_v, grad_table), (q, k, v, table)))
        return *grads, None, None, None


def _weights(queries: Tensor, keys: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ + bias) in float32 or better, of `(b h, i, d)`, `(b h, j, d)` and a bias `(…, h, i, j)` or None."""
    scores = torch.bmm(queries, keys.mT)
    precise = torch.promote_types(scores.dtype, torch.float32)
    if bias is not None:
        scores = (scores.unflatten(0, (-1, heads)) + bias.to(precise)).flatten(0, 1)
    return torch.softmax(scores, dim=-1, dtype=precise)


def _together(shared: bool, heads: int, n: int) -> int:
    """Samples taken at a time: several short ones of one bias, as many as make a block."""
    return max(1, CHUNK_ELEMENTS // (heads * n**2)) if shared else 1


def _groups(size: int, lengths: list[int]) -> list[tuple[slice, int]]:
    """Samples taken together, and how many tokens they have; `size` is 1 unless all have as many."""
    batch = len(lengths)
    return [(slice(b, min(b + size, batch)), lengths[b]) for b in range(0, batch, size)]


def _blocks(n: int, heads: int) -> list[slice]:
    rows = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // (heads * n))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _columns(codes: Tensor, b: int, rows: slice, n: int, centre: int) -> Tensor:
    codes = codes[b if codes.shape[0] > 1 else 0]
    return (codes[rows] + centre)[:, None] - codes[None, :n]


def _look_up(table: Tensor, columns: Tensor) -> Tensor:
    return table.gather(1, columns.flatten().expand(len(table), -1)).view(len(table), *columns.shape)
