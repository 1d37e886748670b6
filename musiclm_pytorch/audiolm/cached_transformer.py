"""The transformer of audiolm-pytorch's stages, computed a block of new tokens at a time, with keys and values kept.

Legend of the einops-like comments: b batch, m new tokens, n keys, h heads, s residual streams, d features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.mulan.linear import has_fast_float32

# What is added to the score of a key that may not be seen. Finite, so that a padded position, which sees no key at
# all, still gets finite features: not-a-number times a weight of zero would reach everybody else.
MASKED = -1e30

# oneDNN lays out a weight for an expected number of rows. At 8 it stays near the memory's speed from 1 to 16 rows.
EXPECTED_ROWS = 8


class Product:
    """x ↦ x Wᵀ + b for a weight that stays as it is, laid out once for the library that is fastest at few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype):
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.packed = (
            self.weight.device.type == 'cpu'
            and dtype in (torch.float32, torch.bfloat16)
            and torch.backends.mkldnn.enabled
            and has_fast_float32()
            and hasattr(torch.ops.mkldnn, '_reorder_linear_weight')
        )
        self.num_bytes = self.weight.nbytes
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, EXPECTED_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')
        return F.linear(x, self.weight, self.bias)


class Residual:
    """What stands around an attention or feedforward block where there is one residual stream: x + block(x)."""

    def width(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        return streams, streams

    def depth(self, output: Tensor, kept: Tensor) -> Tensor:
        return output + kept


class HyperConnection:
    """The same for several residual streams: hyper-connections (https://arxiv.org/abs/2409.19606).

    Streams are (b·m, s, d). The gain of the norm goes into the dynamic weights, and the weights of the way in (s + 1
    a stream) and of the way out (1 a stream) are computed together.
    """

    def __init__(self, connection: nn.Module, *, dtype: torch.dtype):
        gain = connection.norm.scale * (connection.norm.gamma + 1)
        dynamic = torch.cat((connection.dynamic_alpha_fn, connection.dynamic_beta_fn[:, None]), dim=1)
        self.dynamic = (gain[:, None] * dynamic).detach().to(dtype).t().contiguous()
        static = torch.cat((connection.static_alpha, connection.static_beta[:, None]), dim=1)
        self.static = static.detach().to(dtype)
        num_streams = static.shape[0]
        scale = torch.stack((connection.dynamic_alpha_scale, connection.dynamic_beta_scale))
        self.scale = scale.repeat_interleave(torch.tensor([num_streams + 1, 1], device=scale.device)).detach().to(dtype)

    def width(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        norm = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).clamp_min_(1e-12)
        weights = F.linear(streams, self.dynamic).div_(norm).tanh_()
        weights = torch.addcmul(self.static, weights, self.scale)
        mixed = torch.bmm(weights[..., :-1].transpose(1, 2), streams)
        return mixed[:, 0], (mixed[:, 1:], weights[..., -1:])

    def depth(self, output: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
        streams, beta = kept
        return torch.addcmul(streams, beta, output[:, None])


def connection_of(block: nn.Module, *, dtype: torch.dtype) -> Residual | HyperConnection:
    return HyperConnection(block, dtype=dtype) if hasattr(block, 'static_alpha') else Residual()


class Norm:
    def __init__(self, norm: nn.Module, *, dtype: torch.dtype):
        self.shape = tuple(norm.gamma.shape)
        self.gamma, self.beta = norm.gamma.detach().to(dtype), norm.beta.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.gamma, self.beta)


class FeedForward:
    def __init__(self, block: nn.Module, *, dtype: torch.dtype):
        self.connection = connection_of(block, dtype=dtype)
        norm, to_hidden, _, hidden_norm, _, to_out = block.branch
        self.norm, self.hidden_norm = Norm(norm, dtype=dtype), Norm(hidden_norm, dtype=dtype)
        self.to_hidden, self.to_out = Product(to_hidden.weight, dtype=dtype), Product(to_out.weight, dtype=dtype)

    def __call__(self, streams: Tensor) -> Tensor:
        x, kept = self.connection.width(streams)
        x, gate = self.to_hidden(self.norm(x)).chunk(2, dim=-1)
        return self.connection.depth(self.to_out(self.hidden_norm(F.gelu(gate).mul_(x))), kept)


class Attention:
    """Multi-query attention: h query heads, one head of keys and values. Keys and values come from the raw input."""

    def __init__(self, block: nn.Module, *, dtype: torch.dtype):
        self.connection = connection_of(block, dtype=dtype)
        branch = block.branch
        self.heads = branch.heads
        self.dim_head = branch.to_kv.out_features // 2
        self.norm = Norm(branch.norm, dtype=dtype)
        has_context_norm = hasattr(branch.context_norm, 'gamma')
        self.context_norm = Norm(branch.context_norm, dtype=dtype) if has_context_norm else None
        self.to_q = Product(branch.to_q.weight * self.dim_head**-0.5, dtype=dtype)
        self.to_kv = Product(branch.to_kv.weight, dtype=dtype)
        self.to_out = Product(branch.to_out[0].weight, dtype=dtype)
        self.null_kv = None
        if branch.num_null_kv > 0:
            self.null_kv = torch.cat(tuple(branch.null_kv.detach()), dim=-1).to(dtype)  # (n, 2 d)

    def keys_and_values(self, context: Tensor, first_values: Tensor | None, *, norm: bool) -> tuple[Tensor, Tensor]:
        """Of a conditioning (b, n, d) → (b, n, 2 d), and its values before those of the first layer are mixed in."""
        kv = self.to_kv(self.context_norm(context) if norm else context)
        values = kv[..., self.dim_head :].clone()
        if first_values is not None:
            kv[..., self.dim_head :].lerp_(first_values, 0.5)
        return kv, values

    def attend(self, x: Tensor, kv: Tensor, bias: Tensor) -> Tensor:
        """x (b·m, d), kv (b, n, 2 d), bias (1 or b, 1 or m·h, n) → (b·m, d)."""
        batch, num_keys, _ = kv.shape
        q = self.to_q(self.norm(x)).view(batch, -1, self.dim_head)  # (b, m·h, d)
        k, v = kv[..., : self.dim_head], kv[..., self.dim_head :]
        scores = torch.baddbmm(bias.expand(batch, q.shape[1], num_keys), q, k.transpose(1, 2))
        return self.to_out(torch.bmm(scores.softmax(dim=-1), v).view(x.shape[0], -1))


@dataclass
class Cache:
    """Keys and values of one generation, for all the tokens it can ever have.

    kv: (b, prefix + capacity, 2 d) a layer, the conditioning's keys (`prefix` of them) first
    mask: (b, 1, prefix + capacity), 0 or MASKED, or None if every row sees every key
    cross_kv: (b, n + 1, 2 d) a layer; cross_bias: (b, 1, n + 1) or (1, 1, 1). Empty without cross-attention.
    """

    kv: list[Tensor]
    mask: Tensor | None
    cross_kv: list[Tensor]
    cross_bias: Tensor
    prefix: int
    length: int = 0


class CachedTransformer:
    """`Transformer` of audiolm-pytorch, any options, computed exactly as its uncached forward in evaluation mode.

    Holds its own copy of the weights, cast to `dtype` and laid out for decoding: build a new one after training on.
    """

    def __init__(self, transformer: nn.Module, *, dtype: torch.dtype):
        self.dtype = dtype
        self.is_prefix = transformer.cond_as_self_attn_prefix
        self.mixes_values = transformer.add_value_residual
        self.attentions = [Attention(layer[0], dtype=dtype) for layer in transformer.layers]
        self.crosses = [Attention(layer[1], dtype=dtype) for layer in transformer.layers if layer[1] is not None]
        self.feedforwards = [FeedForward(layer[2], dtype=dtype) for layer in transformer.layers]
        self.norm = Norm(transformer.norm, dtype=dtype)
        self.heads, self.dim_head = self.attentions[0].heads, self.attentions[0].dim_head
        connection = self.attentions[0].connection
        self.num_streams = connection.static.shape[0] if isinstance(connection, HyperConnection) else 1
        if transformer.layers[0][0].branch.attend.flash and self.attentions[0].null_kv is not None:
            raise ValueError('num_null_kv in self-attention with flash_attn=True hides each token from itself')

    def products(self) -> list[Product]:
        """Every weight matrix read for a token."""
        attentions = [part for a in self.attentions for part in (a.to_q, a.to_kv, a.to_out)]
        crosses = [part for a in self.crosses for part in (a.to_q, a.to_out)]
        return attentions + crosses + [part for f in self.feedforwards for part in (f.to_hidden, f.to_out)]

    def start(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device,
        key_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Cache:
        """An empty cache for `capacity` tokens, with the conditioning's keys and values computed.

        key_mask: (b, k) bool, True where one of the first k tokens may be seen; those after them always may
        context: (b, n, d), already projected to the transformer's width; context_mask: (b, n) bool
        """
        prefix_kv = self._prefix(batch, context)
        prefix = prefix_kv[0].shape[1] if prefix_kv else 0
        shape = (batch, prefix + capacity, 2 * self.dim_head)
        kv = [torch.zeros(shape, dtype=self.dtype, device=device) for _ in self.attentions]
        for own, given in zip(kv, prefix_kv):
            own[:, :prefix] = given

        visible = torch.ones(batch, prefix + capacity, dtype=torch.bool, device=device)
        if key_mask is not None:
            visible[:, prefix : prefix + key_mask.shape[1]] = key_mask
        if self.is_prefix and context_mask is not None:
            visible[:, prefix - context_mask.shape[1] : prefix] = context_mask
        mask = None if visible.all() else self._additive(visible)

        cross_kv, cross_bias = [], torch.zeros(1, 1, 1, dtype=self.dtype, device=device)
        if self.crosses:
            cross_kv = self._cross(batch, context)
            if context_mask is not None and not context_mask.all():
                cross_bias = self._additive(F.pad(context_mask, (self.crosses[0].null_kv.shape[0], 0), value=True))
        return Cache(kv, mask, cross_kv, cross_bias, prefix)

    def _additive(self, visible: Tensor) -> Tensor:
        return torch.zeros(visible.shape, dtype=self.dtype, device=visible.device).masked_fill(~visible, MASKED)[
            :, None
        ]

    def _prefix(self, batch: int, context: Tensor | None) -> list[Tensor]:
        """Keys and values in front of the tokens' own, a layer: null ones and the conditioning, if there are any."""
        parts, first_values = [], None
        for attention in self.attentions:
            kv = [] if attention.null_kv is None else [attention.null_kv.expand(batch, -1, -1)]
            if self.is_prefix:
                given, values = attention.keys_and_values(context, first_values, norm=False)
                kv.append(given)
                first_values = self._first(first_values, values)
            if kv:
                parts.append(torch.cat(kv, dim=1))
        return parts

    def _cross(self, batch: int, context: Tensor) -> list[Tensor]:
        parts, first_values = [], None
        for cross in self.crosses:
            kv, values = cross.keys_and_values(context, first_values, norm=True)
            parts.append(torch.cat((cross.null_kv.expand(batch, -1, -1), kv), dim=1))
            first_values = self._first(first_values, values)
        return parts

    def _first(self, first: Tensor | None, values: Tensor) -> Tensor | None:
        return (values if first is None else first) if self.mixes_values else None

    def extend(self, x: Tensor, bias: Tensor, cache: Cache) -> Tensor:
        """The features of new tokens, whose keys and values go into the cache.

        x: (b, m, d) embeddings
        bias: (m, h, prefix + length + m), what each new token adds to the scores of the keys, −inf for later ones
        """
        batch, num_new, dim = x.shape
        start = cache.prefix + cache.length
        stop = start + num_new
        bias = bias.reshape(1, num_new * self.heads, stop)
        if cache.mask is not None:
            bias = bias + cache.mask[..., :stop]
        streams = x.reshape(batch * num_new, dim)
        if self.num_streams > 1:
            streams = streams[:, None].expand(-1, self.num_streams, -1)

        first_values = None
        for layer, (attention, feedforward) in enumerate(zip(self.attentions, self.feedforwards)):
            x, kept = attention.connection.width(streams)
            new = attention.to_kv(x).view(batch, num_new, -1)
            seen = cache.kv[layer][:, :stop]
            seen[:, start:] = new
            if first_values is not None:
                seen[:, start:, self.dim_head :].lerp_(first_values, 0.5)
            elif self.mixes_values:
                first_values = new[..., self.dim_head :]
            streams = attention.connection.depth(attention.attend(x, seen, bias), kept)

            if self.crosses:
                cross = self.crosses[layer]
                x, kept = cross.connection.width(streams)
                streams = cross.connection.depth(cross.attend(x, cache.cross_kv[layer], cache.cross_bias), kept)

            streams = feedforward(streams)

        cache.length += num_new
        x = streams.sum(dim=1) if self.num_streams > 1 else streams
        return self.norm(x).view(batch, num_new, dim)
