"""The transformer of AudioLM's stages: one `forward` for training, teacher forcing and decoding.

Parameters have the names and shapes that they have in audiolm-pytorch, so that weights go both ways (`convert.py`), and
are drawn in its order.

Legend: `b` batch, `n` tokens, `j` keys, `h` heads, `d` features, `s` residual streams, `g` keys given ahead of all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from musiclm_pytorch.kernels import fast_kernels_allowed
from musiclm_pytorch.kernels.attention import block_causal_attention, causal_blocks, plain_attention
from musiclm_pytorch.kernels.residual_streams import add, mix
from musiclm_pytorch.mulan import layers

# (projection, static, scale) of a width connection
Mixing = tuple[Tensor, Tensor, Tensor]
# the features of a token `(b, 1, d)` and the position bias to those above all layers; `decode_step.py` has them
Step = Callable[[Tensor, 'PositionBias'], Tensor]


class Transformer(nn.Module):
    """Causal, with hyper-connections, values of the first layer mixed into the later ones (arXiv 2410.17897), and
    conditioning by cross-attention or as a prefix of keys.

    Args:
        dim, depth, heads, dim_head: sizes.
        cross_attend, cond_as_self_attn_prefix: how it is seen; neither is without.
        attn_dropout, ff_dropout: shares.
        grad_shrink_alpha: share of the gradient that reaches the embeddings (CogView, arXiv 2105.13290).
        rel_pos_bias: whether it has the MLP that gives a position bias (arXiv 2111.09883).
        flash_attn: without position biases, fused attention on a GPU.
        num_null_kv: learned keys that every token sees.
        add_value_residual, num_residual_streams: of the above; one stream is a plain residual.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int = 64,
        cross_attend: bool = False,
        cond_as_self_attn_prefix: bool = False,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        grad_shrink_alpha: float = 0.1,
        rel_pos_bias: bool = True,
        flash_attn: bool = False,
        num_null_kv: int = 0,
        add_value_residual: bool = True,
        num_residual_streams: int = 4,
    ):
        super().__init__()
        if flash_attn and num_null_kv:
            raise ValueError('num_null_kv in self-attention with flash_attn=True hides each token from itself')
        self.dim, self.heads, self.dim_head = dim, heads, dim_head
        self.cond_as_self_attn_prefix = cond_as_self_attn_prefix
        self.grad_shrink_alpha, self.flash_attn = grad_shrink_alpha, flash_attn
        self.add_value_residual, self.num_residual_streams = add_value_residual, num_residual_streams
        self.layers = nn.ModuleList()
        self.rel_pos_bias = RelativePositionBias(dim // 2, heads) if rel_pos_bias and not flash_attn else None

        def around(branch: nn.Module) -> nn.Module:
            return HyperConnection(dim, branch, num_residual_streams) if num_residual_streams > 1 else Residual(branch)

        sizes = dict(heads=heads, dim_head=dim_head, dropout=attn_dropout)
        for _ in range(depth):
            attention = around(Attention(dim, num_null_kv=num_null_kv, **sizes))
            cross = None
            if cross_attend:
                cross = around(Attention(dim, dim_context=dim, num_null_kv=1, **sizes))
            self.layers.append(nn.ModuleList([attention, cross, around(feed_forward(dim, ff_dropout))]))
        self.norm = LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        bias: PositionBias,
        *,
        seen: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The features of tokens, each of which sees itself, those before it and the conditioning.

        Args:
            x: `(b, n, d)`. With a cache, what follows the tokens whose keys and values it has; theirs are added.
            bias: of the positions of all tokens.
            seen: `(b, n)` bool, which tokens are seen at all; with a cache it has been told.
            context: `(b, c, d)` conditioning, and `context_mask (b, c)` which of it is seen; the cache knows both.

        Returns:
            `(b, n, d)`.
        """
        if cache is None:
            keywords = dict(seen=seen, context=context, context_mask=context_mask)
            cache = self.start_cache(len(x), x.shape[1], keep=False, **keywords)
        if cache.step is not None and x.shape[1] == 1:
            return cache.step(x, bias)
        if torch.is_grad_enabled():
            x = x * self.grad_shrink_alpha + x.detach() * (1 - self.grad_shrink_alpha)
        placed = self._place(bias, cache.length, cache.length + x.shape[1], x.device)
        cache.length += x.shape[1]
        return self.run(x, placed, cache)

    def run(self, x: Tensor, placed: list[Tensor] | Tensor | None, cache: Cache) -> Tensor:
        """All layers, with a position bias as attention takes it."""
        streams = x if self.num_residual_streams == 1 else repeat(x, 'b n d -> b n s d', s=self.num_residual_streams)
        values = None
        for index, ((attention, cross, feed_forward), mixing) in enumerate(zip(self.layers, cache.mixing)):
            # causal self-attention; keys and values are of what norms have not seen
            x, kept = attention.width(streams, mixing[0])
            k, v, own = attention.branch.keys_values(x, values)
            values = own if values is None and self.add_value_residual else values
            k, v, mask = cache.extend(index, k, v)
            if isinstance(placed, list):
                out = attention.branch.merged(block_causal_attention(attention.branch.queries(x), k, v, mask, placed))
            else:
                out = attention.branch(x, k, v, mask, bias=placed, causal=True, fused=self.flash_attn)
            streams = attention.depth(out, *kept)

            if cross is not None:
                x, kept = cross.width(streams, mixing[1])
                out = cross.branch(x, *cache.cross[index], cache.cross_mask)
                streams = cross.depth(out, *kept)

            x, kept = feed_forward.width(streams, mixing[2])
            streams = feed_forward.depth(feed_forward.branch(x), *kept)
        return self.norm(streams if self.num_residual_streams == 1 else streams.sum(dim=2))

    def _place(self, bias: PositionBias, start: int, stop: int, device: torch.device) -> list[Tensor] | Tensor | None:
        """The position bias of tokens [start, stop): by blocks for the CPU, whole otherwise, None for none."""
        dropping = self.training and any(layer[0].branch.dropout > 0 for layer in self.layers)
        by_blocks = device.type == 'cpu' and fast_kernels_allowed() and not dropping
        if bias.table is None:
            return [] if by_blocks else None
        if stop - start == 1:
            row = bias.row(start)[:, None, :stop]
            return [row] if by_blocks else row
        if by_blocks:
            return [
                bias.block(start + a, start + b, num_keys=start + b) for a, b, _ in causal_blocks(stop - start, stop)
            ]
        return bias.block(start, stop, num_keys=stop)

    # what is there before any token

    def start_cache(
        self,
        batch: int,
        capacity: int,
        *,
        seen: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        keep: bool = True,
    ) -> Cache:
        """Keys and values of the conditioning, with places for those of `capacity` tokens if it is to `keep` them.

        Further args as of `forward`, where `seen` may be of the first tokens only: the others are seen.
        """
        prefix = context if self.cond_as_self_attn_prefix else None
        given = self._given(0, batch, prefix)
        ahead = given[0][0].shape[1]
        mask = None
        if seen is not None or (prefix is not None and context_mask is not None):
            mask = torch.ones(batch, ahead + capacity, dtype=torch.bool, device=self.norm.gamma.device)
            if seen is not None:
                mask[:, ahead : ahead + seen.shape[1]] = seen
            if prefix is not None and context_mask is not None:
                mask[:, ahead - context_mask.shape[1] : ahead] = context_mask
        cross, cross_mask = [], None
        if self.layers[0][1] is not None:
            cross = self._given(1, batch, context)
            cross_mask = None if context_mask is None else F.pad(context_mask, (1, 0), value=True)
        mixing = [[None if it is None else it.mixing() for it in layer] for layer in self.layers]
        cache = Cache(given, mask, cross, cross_mask, mixing)
        if keep:
            cache.reserve(capacity)
        return cache

    def _given(self, which: int, batch: int, context: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `(b, g, d)` a layer of learned keys and of the conditioning."""
        pairs, values = [], None
        for layer in self.layers:
            attention = layer[which].branch
            if attention.null_kv is None:
                k = v = at_least_float32(self.norm.gamma.new_zeros(batch, 0, self.dim_head))
            else:
                k, v = repeat(at_least_float32(attention.null_kv), 'two g d -> two b g d', b=batch)
            if context is not None:
                own_k, own_v, own = attention.keys_values(attention.context_norm(context), values)
                values = own if values is None and self.add_value_residual else values
                k, v = torch.cat((k, own_k), dim=1), torch.cat((v, own_v), dim=1)
            pairs.append((k, v))
        return pairs


@dataclass
class Cache:
    """Keys and values of one sequence a row.

    given: `(b, g, d)` keys and values a layer, ahead of all tokens
    mask: `(b, g + n)` bool, or None if every key is seen
    cross, cross_mask: those of the conditioning, for cross-attention
    mixing: of each branch of each layer, prepared once
    keys, values: `(b, g + capacity, d)` a layer, if it keeps those of tokens; `length` of them are there
    step: computes a single token in place of the transformer's `forward`, if there is such a thing
    at: the place of a single token, `(1,)` int64, where shapes have to be fixed: all places are looked at
    """

    given: list[tuple[Tensor, Tensor]]
    mask: Tensor | None
    cross: list[tuple[Tensor, Tensor]]
    cross_mask: Tensor | None
    mixing: list[list[Mixing | None]]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    length: int = 0
    step: Step | None = None
    at: Tensor | None = None

    def reserve(self, capacity: int) -> None:
        if self.mask is not None and self.mask.all():
            self.mask = None
        for k, v in self.given:
            self.keys.append(F.pad(k, (0, 0, 0, capacity)).contiguous())
            self.values.append(F.pad(v, (0, 0, 0, capacity)).contiguous())

    @property
    def ahead(self) -> int:
        return self.given[0][0].shape[1]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take keys and values `(b, n, d)` of new tokens; gives those that they see, and which of these are masked."""
        if not self.keys:
            if self.ahead:
                k, v = (torch.cat(pair, dim=1) for pair in zip(self.given[layer], (k, v)))
            return k, v, self.mask
        keys, values, stop = self.keys[layer], self.values[layer], self.ahead + self.length
        if self.at is not None:
            keys[:, self.at], values[:, self.at] = k, v
            seen = (torch.arange(keys.shape[1], device=keys.device) <= self.at)[None]
            return keys, values, seen if self.mask is None else seen & self.mask
        keys[:, stop - k.shape[1] : stop], values[:, stop - v.shape[1] : stop] = k, v
        return keys[:, :stop], values[:, :stop], None if self.mask is None else self.mask[:, :stop]


# ---------------------------------------------------------------------------------------------------------------
# Layers


class LayerNorm(nn.Module):
    """Without a learned shift, and in float32 at least."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer('beta', torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = at_least_float32(self.gamma), at_least_float32(self.beta)
        return F.layer_norm(at_least_float32(x), gamma.shape, gamma, beta)


class Linear(layers.Linear):
    """Takes and gives float32 also where its weight is of half precision: what is read is what decoding waits for."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype.itemsize > 2:
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).float()


class Attention(nn.Module):
    """Multi-query attention (arXiv 1911.02150): several heads of queries, one of keys and values."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        dim_context: int | None = None,
        num_null_kv: int = 0,
    ):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = LayerNorm(dim)
        self.context_norm = nn.Identity() if dim_context is None else LayerNorm(dim_context)
        self.null_kv = nn.Parameter(torch.randn(2, num_null_kv, dim_head)) if num_null_kv > 0 else None
        self.to_q = Linear(dim, heads * dim_head)
        self.to_kv = Linear(dim_context or dim, 2 * dim_head)
        self.to_out = nn.Sequential(Linear(heads * dim_head, dim), nn.Dropout(dropout))

    def keys_values(self, x: Tensor, first_values: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values, and the values before those of the first layer are mixed in."""
        k, own = self.to_kv(x).chunk(2, dim=-1)
        return k, own if first_values is None else 0.5 * (own + first_values), own

    def queries(self, x: Tensor) -> Tensor:
        return rearrange(self.to_q(self.norm(x)), 'b n (h d) -> b h n d', h=self.heads)

    def merged(self, out: Tensor) -> Tensor:
        return self.to_out(rearrange(out, 'b h n d -> b n (h d)'))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, bias=None, causal=False, fused=False):
        """`(b, n, d)` of `x (b, n, d)` and keys and values `(b, j, d)`; see `plain_attention`."""
        dropout = self.dropout if self.training else 0.0
        q = self.queries(x)
        return self.merged(plain_attention(q, k, v, mask, bias, causal=causal, fused=fused, dropout=dropout))


def feed_forward(dim: int, dropout: float) -> nn.Sequential:
    hidden = int(dim * 8 / 3)
    return nn.Sequential(
        LayerNorm(dim),
        Linear(dim, 2 * hidden),
        layers.GEGLU(),
        LayerNorm(hidden),
        nn.Dropout(dropout),
        Linear(hidden, dim),
    )


class Residual(nn.Module):
    """What stands around a branch where there is one residual stream: x + branch(x)."""

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def mixing(self) -> None:
        return None

    def width(self, x: Tensor, _) -> tuple[Tensor, tuple[Tensor]]:
        return x, (x,)

    def depth(self, out: Tensor, x: Tensor) -> Tensor:
        return out + x


class HyperConnection(nn.Module):
    """The same for several residual streams (arXiv 2409.19606, algorithm 2)."""

    def __init__(self, dim: int, branch: nn.Module, num_streams: int):
        super().__init__()
        first = F.one_hot(torch.tensor([random.randrange(num_streams)]), num_streams).float().T
        self.static_alpha = nn.Parameter(torch.cat((first, torch.eye(num_streams)), dim=1))
        self.dynamic_alpha_fn = nn.Parameter(torch.zeros(dim, num_streams + 1))
        self.dynamic_alpha_scale = nn.Parameter(torch.tensor(1e-2))
        self.static_beta = nn.Parameter(torch.ones(num_streams))
        self.dynamic_beta_fn = nn.Parameter(torch.zeros(dim))
        self.dynamic_beta_scale = nn.Parameter(torch.tensor(1e-2))
        self.branch = branch
        self.norm = RMSNormGain(dim)

    def mixing(self) -> Mixing:
        """What `mix` takes: the weights of the width connection, and beside them those of the depth connection."""
        dynamic = at_least_float32(torch.cat((self.dynamic_alpha_fn, self.dynamic_beta_fn[:, None]), dim=1))
        static = torch.cat((self.static_alpha, self.static_beta[:, None]), dim=1)
        scales = [self.dynamic_alpha_scale] * (static.shape[1] - 1)
        # flat already, unless `trainer.sharding` has made lists of numbers
        return self.norm.gain[:, None] * dynamic, static, torch.stack((*scales, self.dynamic_beta_scale)).flatten()

    def width(self, streams: Tensor, mixing: Mixing) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, mixed, beta = mix(streams, *mixing)
        return x, (mixed, beta)

    def depth(self, out: Tensor, mixed: Tensor, beta: Tensor) -> Tensor:
        return add(out, mixed, beta)


class RMSNormGain(nn.Module):
    """The gain of a norm to length 1."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))

    @property
    def gain(self) -> Tensor:
        return (at_least_float32(self.gamma) + 1) * len(self.gamma) ** 0.5


# ---------------------------------------------------------------------------------------------------------------
# Position biases


class PositionBias:
    """What is added to attention scores for the positions of query and key. With `table=None` there is nothing.

    Its entries depend on the difference of two positions only, so a table with one column a difference holds them all.
    Gradients reach what the table was computed from.

    table: `(h, k)`, the bias by `codes[query] - codes[key] + zero`
    codes: `(n,)` int64, one a position of the sequence
    across: `(h, 1)`, the bias where `query_groups` and `key_groups` `(n,)` differ, whatever the table says
    """

    ROWS = 64  # computed at once, for single queries

    def __init__(
        self,
        table: Tensor | None,
        codes: Tensor,
        *,
        zero: int = 0,
        across: Tensor | None = None,
        query_groups: Tensor | None = None,
        key_groups: Tensor | None = None,
    ):
        self.table, self.codes, self.zero = table, codes, zero
        self.query_groups, self.key_groups = query_groups, key_groups
        self._rows, self._first = None, 0
        if across is not None:
            # a column more, after those of the differences
            self.table = torch.cat((table, across), dim=1)

    def block(self, start: int, stop: int, *, num_keys: int) -> Tensor:
        """`(h, stop - start, num_keys)` for the tokens [start, stop) over [0, num_keys); anything for later keys."""
        queries = torch.arange(start, stop, device=self.codes.device)[:, None]
        # a later key's column may lie outside of the table, and its value does not matter
        differences = self.table.shape[1] - (self.query_groups is not None)
        columns = (self.codes[queries] - self.codes[:num_keys] + self.zero).clamp_(0, differences - 1)
        if self.query_groups is not None:
            columns.masked_fill_(self.query_groups[queries] != self.key_groups[:num_keys], differences)
        if self.table.device.type != 'cpu':
            return self.table[:, columns]
        # whose gradient a CPU sums up five times as fast
        return self.table.index_select(1, columns.flatten()).view(len(self.table), *columns.shape)

    def row(self, query: int) -> Tensor:
        """`(h, k)` for one token, over the keys up to it and some more."""
        if self._rows is None or not self._first <= query < self._first + self._rows.shape[1]:
            stop = min(query + self.ROWS, len(self.codes))
            self._rows, self._first = self.block(query, stop, num_keys=stop), query
        return self._rows[:, query - self._first]


class RelativePositionBias(nn.Module):
    """A continuous position bias by an MLP of the distance (arXiv 2111.09883)."""

    def __init__(self, dim: int, heads: int, layers: int = 3):
        super().__init__()
        sizes = [1] + [dim] * layers
        hidden = [nn.Sequential(nn.Linear(*pair), nn.SiLU()) for pair in pairwise(sizes)]
        self.net = nn.ModuleList([*hidden, nn.Linear(dim, heads)])

    def forward(self, length: int) -> Tensor:
        """`(h, length)`, by how many positions the query comes after the key."""
        return run_position_mlp(self.net, torch.arange(length, device=self.net[-1].weight.device)[:, None])


def run_position_mlp(layers: nn.Module, x: Tensor) -> Tensor:
    """`(h, n)` of positions `(n, …)`."""
    # half precision tells no positions apart beyond 256
    dtype = torch.promote_types(next(layers.parameters()).dtype, torch.float32)
    x = x.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        for layer in layers.modules():
            if isinstance(layer, nn.Linear):
                x = F.linear(x, layer.weight.to(dtype), layer.bias.to(dtype))
            elif isinstance(layer, nn.SiLU):
                # positions are numbers up to some thousands, many of which it takes almost to zero
                x = without_denormals(layer(x))
    return x.t().contiguous()


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_denormals(x: Tensor) -> Tensor:
    """x with zeros for what is so small that processors multiply it a hundred times slower.

    What is zero keeps its gradient, and what becomes zero has none.
    """
    return x.masked_fill((x.abs() < 1e-20) & (x != 0), 0)
