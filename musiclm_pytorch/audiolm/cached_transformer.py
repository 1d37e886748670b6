"""The transformer of audiolm-pytorch's stages, computed a block of new tokens at a time, with keys and values kept.

Legend of the einops-like comments: b batch, m new tokens, n keys, h heads, s residual streams, d features.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.audiolm import fused_step
from musiclm_pytorch.mulan.kernels import has_gnu_openmp
from musiclm_pytorch.mulan.linear import has_fast_float32

# What is added to the score of a key that may not be seen. Finite, so that a padded position, which sees no key at
# all, still gets finite features: not-a-number times a weight of zero would reach everybody else.
MASKED = -1e30

# oneDNN lays out a weight for an expected number of rows. At 8 it stays near the memory's speed from 1 to 16 rows.
EXPECTED_ROWS = 8


class Layout(Enum):
    """How a weight lies in the memory."""

    AS_IT_IS = 'as it is'  # for torch.compile, and where there is nothing faster
    PACKED = 'packed'  # by oneDNN, for few rows
    ROWS = 'rows'  # for the kernel, which computes a whole token


def layout_for(device: torch.device, dtype: torch.dtype, compile: bool) -> Layout:
    """What is fastest at a few rows."""
    if compile or device.type != 'cpu':
        return Layout.AS_IT_IS
    if dtype == torch.float32 and has_gnu_openmp():
        return Layout.ROWS
    if (
        dtype in (torch.float32, torch.bfloat16)
        and has_onednn()
        and hasattr(torch.ops.mkldnn, '_reorder_linear_weight')
    ):
        return Layout.PACKED
    return Layout.AS_IT_IS


def has_onednn() -> bool:
    return torch.backends.mkldnn.enabled and has_fast_float32()


class Product:
    """x ↦ x Wᵀ + b for a weight that stays as it is, laid out once for few rows.

    Takes and gives float32, whatever the weight's own dtype: reading weights is what decoding spends its time with.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype, layout: Layout):
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype, self.layout = dtype, layout
        self.num_bytes = self.weight.nbytes
        if layout is Layout.PACKED:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, EXPECTED_ROWS)
        elif layout is Layout.ROWS:
            self.weight = fused_step.in_rows(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.layout is Layout.ROWS:
            x = F.pad(x, (0, self.weight.shape[1] - x.shape[-1]))  # oneDNN is slow where rows of weights lie apart
            if x.numel() <= fused_step.MOST_ROWS * x.shape[-1]:
                out = fused_step.few_rows(x, self.weight)
                return out if self.bias is None else out.add_(self.bias)
        if self.layout is Layout.PACKED or (self.layout is Layout.ROWS and has_onednn()):
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '').float()
        return F.linear(x, self.weight, self.bias).float()


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

    def __init__(self, connection: nn.Module):
        gain = connection.norm.scale * (connection.norm.gamma + 1)
        dynamic = torch.cat((connection.dynamic_alpha_fn, connection.dynamic_beta_fn[:, None]), dim=1)
        self.dynamic = (gain[:, None] * dynamic).detach().float().t().contiguous()
        static = torch.cat((connection.static_alpha, connection.static_beta[:, None]), dim=1)
        self.static = static.detach().float()
        num_streams = static.shape[0]
        scale = torch.stack((connection.dynamic_alpha_scale, connection.dynamic_beta_scale))
        self.scale = scale.repeat_interleave(torch.tensor([num_streams + 1, 1], device=scale.device)).detach().float()

    def width(self, streams: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        norm = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).clamp_min_(1e-12)
        weights = F.linear(streams, self.dynamic).div_(norm).tanh_()
        weights = torch.addcmul(self.static, weights, self.scale)
        mixed = torch.bmm(weights[..., :-1].transpose(1, 2), streams)
        return mixed[:, 0], (mixed[:, 1:], weights[..., -1:])

    def depth(self, output: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
        streams, beta = kept
        return torch.addcmul(streams, beta, output[:, None])


def connection_of(block: nn.Module) -> Residual | HyperConnection:
    return HyperConnection(block) if hasattr(block, 'static_alpha') else Residual()


class Norm:
    def __init__(self, norm: nn.Module):
        self.shape = tuple(norm.gamma.shape)
        self.gamma, self.beta = norm.gamma.detach().float(), norm.beta.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.gamma, self.beta)


class FeedForward:
    def __init__(self, block: nn.Module, *, dtype: torch.dtype, layout: Layout):
        self.connection = connection_of(block)
        norm, to_hidden, _, hidden_norm, _, to_out = block.branch
        self.norm, self.hidden_norm = Norm(norm), Norm(hidden_norm)
        self.to_hidden, self.to_out = (
            Product(to_hidden.weight, dtype=dtype, layout=layout),
            Product(to_out.weight, dtype=dtype, layout=layout),
        )

    def __call__(self, streams: Tensor) -> Tensor:
        x, kept = self.connection.width(streams)
        x, gate = self.to_hidden(self.norm(x)).chunk(2, dim=-1)
        return self.connection.depth(self.to_out(self.hidden_norm(F.gelu(gate).mul_(x))), kept)


class Attention:
    """Multi-query attention: h query heads, one head of keys and values. Keys and values come from the raw input."""

    def __init__(self, block: nn.Module, *, dtype: torch.dtype, layout: Layout):
        self.connection = connection_of(block)
        branch = block.branch
        self.heads = branch.heads
        self.dim_head = branch.to_kv.out_features // 2
        self.norm = Norm(branch.norm)
        has_context_norm = hasattr(branch.context_norm, 'gamma')
        self.context_norm = Norm(branch.context_norm) if has_context_norm else None
        self.to_q = Product(branch.to_q.weight * self.dim_head**-0.5, dtype=dtype, layout=layout)
        self.to_kv = Product(branch.to_kv.weight, dtype=dtype, layout=layout)
        self.to_out = Product(branch.to_out[0].weight, dtype=dtype, layout=layout)
        self.null_kv = None
        if branch.num_null_kv > 0:
            self.null_kv = branch.null_kv.detach().float()  # (2, n, d)

    def keys_and_values(self, x: Tensor, first_values: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and the values before those of the first layer are mixed in, each (b, n, d), of (b, n, d)."""
        k, v = self.to_kv(x).chunk(2, dim=-1)
        return k, v if first_values is None else torch.lerp(v, first_values, 0.5), v

    def attend(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """x (b·m, d), k and v (b, n, d), bias (1 or b, 1 or m·h, n) → (b·m, d)."""
        batch, num_keys, _ = v.shape
        q = self.to_q(self.norm(x)).view(batch, -1, self.dim_head)  # (b, m·h, d)
        scores = torch.baddbmm(bias.expand(batch, q.shape[1], num_keys), q, k.transpose(1, 2))
        return self.to_out(torch.bmm(scores.softmax(dim=-1), v).view(x.shape[0], -1))


def additive(visible: Tensor) -> Tensor:
    """(b, n) bool → (b, 1, n), 0 for the keys that may be seen and MASKED for the others."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, MASKED)[:, None]


@dataclass
class Cache:
    """Keys and values of one generation, for all the tokens it can ever have, float32.

    k, v: (b, prefix + capacity, d), a layer; `prefix` keys of the conditioning first
    mask: (b, 1, prefix + capacity), 0 or MASKED, or None if every row sees every key
    cross_k, cross_v: the same of the conditioning, a layer; empty without cross-attention
    cross_bias: (b, 1, n) or (1, 1, 1)
    """

    k: list[Tensor]
    v: list[Tensor]
    mask: Tensor | None
    cross_k: list[Tensor]
    cross_v: list[Tensor]
    cross_bias: Tensor
    prefix: int
    length: int = 0


class CachedTransformer:
    """`Transformer` of audiolm-pytorch, any options, computed exactly as its uncached forward in evaluation mode.

    Holds its own copy of the weights, the matrices cast to `dtype` and laid out for decoding; everything else is
    float32.
    """

    def __init__(self, transformer: nn.Module, *, dtype: torch.dtype, layout: Layout):
        self.layout = layout
        self.is_prefix = transformer.cond_as_self_attn_prefix
        self.mixes_values = transformer.add_value_residual
        self.attentions = [Attention(layer[0], dtype=dtype, layout=layout) for layer in transformer.layers]
        self.crosses = [
            Attention(layer[1], dtype=dtype, layout=layout) for layer in transformer.layers if layer[1] is not None
        ]
        self.feedforwards = [FeedForward(layer[2], dtype=dtype, layout=layout) for layer in transformer.layers]
        self.norm = Norm(transformer.norm)
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
        prefix_k, prefix_v = self._given(self.attentions, batch, context if self.is_prefix else None)
        prefix = prefix_v[0].shape[1]
        k, v = [], []
        for given_k, given_v in zip(prefix_k, prefix_v):
            k.append(F.pad(given_k, (0, 0, 0, capacity)))
            v.append(F.pad(given_v, (0, 0, 0, capacity)))

        visible = torch.ones(batch, prefix + capacity, dtype=torch.bool, device=device)
        if key_mask is not None:
            visible[:, prefix : prefix + key_mask.shape[1]] = key_mask
        if self.is_prefix and context_mask is not None:
            visible[:, prefix - context_mask.shape[1] : prefix] = context_mask
        mask = None if visible.all() else additive(visible)

        cross_k, cross_v = self._given(self.crosses, batch, context)
        cross_bias = torch.zeros(1, 1, 1, device=device)
        if self.crosses and context_mask is not None and not context_mask.all():
            num_null = cross_v[0].shape[1] - context_mask.shape[1]
            cross_bias = additive(F.pad(context_mask, (num_null, 0), value=True))
        return Cache(k, v, mask, cross_k, cross_v, cross_bias, prefix)

    def _given(
        self, attentions: list[Attention], batch: int, context: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values (b, n, d) that are there before any token, a layer: null ones, conditioning."""
        keys, values, first_values = [], [], None
        for attention in attentions:
            k = v = self.norm.gamma.new_zeros(batch, 0, self.dim_head)
            if attention.null_kv is not None:
                k, v = (null.expand(batch, -1, -1) for null in attention.null_kv)
            if context is not None:
                # a prefix is read as it is, like tokens are
                normed = context if self.is_prefix else attention.context_norm(context)
                given_k, given_v, own_values = attention.keys_and_values(normed, first_values)
                if self.mixes_values and first_values is None:
                    first_values = own_values
                k, v = torch.cat((k, given_k), dim=1), torch.cat((v, given_v), dim=1)
            keys.append(k.contiguous())
            values.append(v.contiguous())
        return keys, values

    def extend(self, x: Tensor, bias: Tensor, cache: Cache) -> Tensor:
        """The features (b, m, d) of new tokens, whose keys and values go into the cache.

        x: (b, m, d) embeddings
        bias: (m, h, prefix + length + m), what each new token adds to the scores of the keys, −inf for later ones
        """
        start = cache.prefix + cache.length
        stop = start + x.shape[1]
        cache.length += x.shape[1]
        return self.forward(x, bias, cache, slice(start, stop), stop)

    def forward(self, x: Tensor, bias: Tensor, cache: Cache, at: slice | Tensor, stop: int) -> Tensor:
        """`extend`, told where in the cache the new tokens go and how many of its keys are looked at."""
        batch, num_new, dim = x.shape
        bias = bias.reshape(1, num_new * self.heads, stop)
        if cache.mask is not None:
            bias = bias + cache.mask[..., :stop]
        streams = x.reshape(batch * num_new, dim)
        if self.num_streams > 1:
            streams = streams[:, None].expand(-1, self.num_streams, -1)

        first_values = None
        for layer, (attention, feedforward) in enumerate(zip(self.attentions, self.feedforwards)):
            x, kept = attention.connection.width(streams)
            k, v, own_values = attention.keys_and_values(x.view(batch, num_new, dim), first_values)
            if self.mixes_values and first_values is None:
                first_values = own_values
            cache.k[layer][:, at] = k
            cache.v[layer][:, at] = v
            seen_k, seen_v = cache.k[layer][:, :stop], cache.v[layer][:, :stop]
            streams = attention.connection.depth(attention.attend(x, seen_k, seen_v, bias), kept)

            if self.crosses:
                cross = self.crosses[layer]
                x, kept = cross.connection.width(streams)
                x = cross.attend(x, cache.cross_k[layer], cache.cross_v[layer], cache.cross_bias)
                streams = cross.connection.depth(x, kept)

            streams = feedforward(streams)

        x = streams.sum(dim=1) if self.num_streams > 1 else streams
        return self.norm(x).view(batch, num_new, dim)


class FixedStep:
    """`extend` by one token at shapes that stay the same, so that it can be compiled, and recorded on a GPU.

    Each token looks at the whole cache: the bias has to be −inf for what is not there yet.
    """

    def __init__(self, network: CachedTransformer, cache: Cache, batch: int):
        self.cache = cache
        width, device = cache.v[0].shape[1], cache.v[0].device
        self.x = torch.zeros(batch, 1, network.norm.shape[0], device=device)
        self.bias = torch.zeros(1, network.heads, width, device=device)
        self.at = torch.tensor([cache.prefix + cache.length], device=device)
        self.run = partial(torch.compile(network.forward), self.x, self.bias, cache, self.at, width)
        self.graph = None
        if device.type == 'cuda':
            # What this writes into the cache at `at` is written over by the first token.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.run()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.features = self.run()

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (b, 1, d), bias (1, h, prefix + capacity) → (b, 1, d), valid until the next call."""
        self.x.copy_(x)
        self.bias.copy_(bias)
        self.at.fill_(self.cache.prefix + self.cache.length)
        self.cache.length += 1
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.features
