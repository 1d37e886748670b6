"""Building blocks of both towers. Parameter names are those of musiclm-pytorch 0.2.8."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from musiclm_pytorch.checks import check_positive, check_probability
from musiclm_pytorch.kernels import linear
from musiclm_pytorch.kernels.attention import GridBias, attend


class Encoding(NamedTuple):
    """All that a tower knows of a batch.

    Attributes:
        embeds: `(b, d)`, the embedding.
        layers: the output of each of the `depth` layers, `(b, n, d)`.
        mask: `(b, n)` bool, true where a token is real, or None when all are.
    """

    embeds: Tensor
    layers: list[Tensor]
    mask: Tensor | None = None

    def all_but_last(self) -> Tensor:
        """`(depth - 1, b, n, d)`, which is what upstream returns as all layers."""
        # an empty stack still has to tell the shape of a layer
        first = self.layers[0]
        return torch.stack(self.layers[:-1]) if len(self.layers) > 1 else first.new_empty(0, *first.shape)

    def asked(self, all_layers: bool, encoding: bool) -> Tensor | tuple[Tensor, Tensor] | Encoding:
        """What a tower returns: the embedding alone, with `all_but_last`, or everything."""
        if encoding:
            return self
        return (self.embeds, self.all_but_last()) if all_layers else self.embeds


def l2norm(t: Tensor) -> Tensor:
    return F.normalize(t, p=2, dim=-1)


def masked_mean(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """`(…, b, n, d)` to `(…, b, d)`: the mean over the tokens where `mask` `(b, n)` is true."""
    if mask is None:
        return reduce(tokens, '... n d -> ... d', 'mean')
    mask = rearrange(mask, 'b n -> b n 1')
    total = reduce(tokens.masked_fill(~mask, 0.0), '... n d -> ... d', 'sum')
    return total / reduce(mask, 'b n 1 -> b 1', 'sum')


class Linear(nn.Linear):
    """`nn.Linear` without a bias, through the faster library where float32 runs on a CPU.

    A subclass, so that tools which go by the exact type of a layer have to be told of it, such as
    `torch.ao.quantization.quantize_dynamic(mulan, {Linear})`.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class LayerNorm(nn.Module):
    """Layer norm without a bias, with or without a learned gain."""

    def __init__(self, dim: int, scale: bool = True):
        super().__init__()
        self.dim = dim
        self.learned_gamma = nn.Parameter(torch.ones(dim)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), self.learned_gamma)


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 whatever the model is cast to: powers of samples exceed what fp16 can hold."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class GEGLU(nn.Module):
    """Gated GELU: half of the features gate the other half (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * x


def FeedForward(dim: int, mult: float = 4, dropout: float = 0.0) -> nn.Sequential:
    # two thirds, so that the gated layer costs what an ungated one of width dim * mult would
    dim_hidden = int(dim * mult * 2 / 3)
    return nn.Sequential(
        LayerNorm(dim),
        Linear(dim, dim_hidden * 2),
        GEGLU(),
        nn.Dropout(dropout),
        Linear(dim_hidden, dim),
    )


class Attention(nn.Module):
    """Pre-norm multi-head self-attention with normalised queries and keys (arXiv 2302.05442)."""

    def __init__(self, dim: int, dim_head: int = 64, heads: int = 8, dropout: float = 0.0, scale: float = 8):
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.dropout = dropout
        dim_inner = dim_head * heads

        self.norm = LayerNorm(dim)
        self.to_q = Linear(dim, dim_inner)
        self.to_kv = Linear(dim, dim_inner * 2)
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.to_out = nn.Sequential(Linear(dim_inner, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, bias: GridBias | None = None, mask: Tensor | None = None) -> Tensor:
        """`(b, n, d)` to `(b, n, d)`; `mask` `(b, n)` is true where a key may be attended to."""
        x = self.norm(x)
        q, k, v = self.to_q(x), *self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (rearrange(t, 'b n (h d) -> b h n d', h=self.heads) for t in (q, k, v))

        # both learned gains and the scale act on the same dot product, so one multiplication carries all three
        gain = self.q_scale * self.k_scale * self.scale
        # in float32 or better; attention wants one dtype
        q, k = (l2norm(t.to(torch.promote_types(t.dtype, torch.float32))) for t in (q, k))
        q, k = (q * gain).to(v.dtype), k.to(v.dtype)

        out = attend(q, k, v, bias=bias, mask=mask, dropout=self.dropout if self.training else 0.0)
        return self.to_out(rearrange(out, 'b h n d -> b n (h d)'))


class Transformer(nn.Module):
    """A stack of residual attention and feed-forward layers."""

    def __init__(
        self,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_mult: float = 4,
        ff_dropout: float = 0.0,
    ):
        super().__init__()
        check_positive(dim=dim, depth=depth, dim_head=dim_head, heads=heads, ff_mult=ff_mult)
        check_probability(attn_dropout=attn_dropout, ff_dropout=ff_dropout)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Attention(dim=dim, dim_head=dim_head, heads=heads, dropout=attn_dropout),
                    FeedForward(dim=dim, mult=ff_mult, dropout=ff_dropout),
                ]
            )
            for _ in range(depth)
        )
        # recompute what is inside a layer in the backward pass instead of keeping it (arXiv 1604.06174)
        self.checkpoint_activations = False

    def forward(self, x: Tensor, bias: GridBias | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """`(b, n, d)` to the output of every layer, a list of `depth` tensors `(b, n, d)`."""
        layers = []
        for attention, feed_forward in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                # dropout draws in the recomputation what it drew the first time
                keywords = dict(use_reentrant=False, preserve_rng_state=True)
                x = checkpoint(attention, x, bias=bias, mask=mask, **keywords) + x
                x = checkpoint(feed_forward, x, **keywords) + x
            else:
                x = attention(x, bias=bias, mask=mask) + x
                x = feed_forward(x) + x
            layers.append(x)
        return layers
