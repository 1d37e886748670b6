"""The layers of a transformer for inference: half precision, 8-bit integers, and compiled code between them.

A layer is taken apart into matrix products, attention, and what lies between them. Products run in the libraries that
are fast at them. What lies between is elementwise, and is what torch.compile fuses, which also keeps compiling short;
on a CPU with AVX-512 it is C++, and attention with it (`native_layers`). The residual stream stays float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from musiclm_pytorch.checks import is_traced
from musiclm_pytorch.extras import how_to_install
from musiclm_pytorch.inference.half_attention import KeptBias, attend_in_half
from musiclm_pytorch.inference.native_layers import NativeParts
from musiclm_pytorch.mulan.attention import PositionBias, attend
from musiclm_pytorch.mulan.layers import Transformer, l2norm
from musiclm_pytorch.mulan.linear import Linear

# ---- what lies between the products: elementwise, and so for torch.compile to fuse ----


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as unsigned bytes around 128, and the scale of each row, `(…, 1)` float32."""
    scale = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).float().clamp(min=1e-12) / 127
    # adding a half and cutting off rounds, since what is cut is positive
    return (x.float() / scale + 128.5).to(torch.uint8), scale


def prepared(x: Tensor, dtype: torch.dtype, int8: bool) -> tuple[Tensor, Tensor | None]:
    return to_int8(x) if int8 else (x.to(dtype), None)


def scaled(product: Tensor, scale: Tensor | None) -> Tensor:
    return product if scale is None else product * scale


def normed(x: Tensor, gamma: Tensor, dtype: torch.dtype, int8: bool) -> tuple[Tensor, Tensor | None]:
    return prepared(F.layer_norm(x, gamma.shape, gamma), dtype, int8)


def split_heads(
    q: Tensor, kv: Tensor, scale: Tensor | None, gain: Tensor, heads: int, dtype: torch.dtype
) -> list[Tensor]:
    q, kv = scaled(q, scale), scaled(kv, scale)
    q, k, v = (rearrange(t, 'b n (h d) -> b h n d', h=heads) for t in (q, *kv.chunk(2, dim=-1)))
    # laid out head by head, as the products of attention take them
    return [t.to(dtype).contiguous() for t in (l2norm(q.float()) * gain, l2norm(k.float()), v)]


def attention_weights(scores: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(scores + bias, dim=-1)


def joined_heads(out: Tensor, dtype: torch.dtype, int8: bool) -> tuple[Tensor, Tensor | None]:
    return prepared(rearrange(out, 'b h n d -> b n (h d)'), dtype, int8)


def added_and_normed(
    x: Tensor, product: Tensor, scale: Tensor | None, gamma: Tensor, dtype: torch.dtype, int8: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = x + scaled(product, scale)
    return x, *normed(x, gamma, dtype, int8)


def gated(product: Tensor, scale: Tensor | None, dtype: torch.dtype, int8: bool) -> tuple[Tensor, Tensor | None]:
    x, gate = scaled(product, scale).chunk(2, dim=-1)
    return prepared(F.gelu(gate) * x, dtype, int8)


def added(x: Tensor, product: Tensor, scale: Tensor | None) -> Tensor:
    return x + scaled(product, scale)


BETWEEN = (normed, split_heads, attention_weights, joined_heads, added_and_normed, gated, added)


class TorchParts:
    """What lies between the products, by PyTorch's operators.

    Args:
        dtype: of the layers.
        int8: whether products take bytes.
        keep_bias: hold a position bias for the layers and calls that follow.
        compiled: through torch.compile.
    """

    def __init__(self, dtype: torch.dtype, int8: bool, keep_bias: bool, compiled: bool):
        self.dtype, self.how, self.keep_bias = dtype, (dtype, int8), keep_bias
        self._kept_bias: KeptBias | None = None
        self.between: dict[str, Callable] = {
            part.__name__: torch.compile(part, dynamic=True) if compiled else part for part in BETWEEN
        }

    def keys(self, x: Tensor, bias: PositionBias | None, mask: Tensor | None) -> KeptBias | dict[str, Any]:
        """Which keys there are and the bias of each pair, for all layers."""
        if bias is None or x.device.type != 'cpu' or self.dtype == torch.float32:
            return dict(bias=bias, mask=mask)
        # that of the last call where it is the same, as it is for waves of one length
        kept = self._kept_bias  # another thread may put its own there
        if kept is None or not kept.serves(bias):
            self._kept_bias = kept = KeptBias(bias, self.dtype, keep=self.keep_bias)
        return kept

    def normed(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.between['normed'](x, gamma, *self.how)

    def attended(
        self, q: Tensor, kv: Tensor, scale: Tensor | None, gain: Tensor, heads: int, keys: KeptBias | dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.between['split_heads'](q, kv, scale, gain, heads, self.dtype)
        if isinstance(keys, KeptBias):
            out = attend_in_half(q, k, v, keys, self.between['attention_weights'])
        else:
            out = attend(q, k, v, **keys)
        return self.between['joined_heads'](out, *self.how)

    def added_and_normed(
        self, x: Tensor, product: Tensor, scale: Tensor | None, gamma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.between['added_and_normed'](x, product, scale, gamma, *self.how)

    def gated(self, product: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.between['gated'](product, scale, *self.how)

    def added(self, x: Tensor, product: Tensor, scale: Tensor | None) -> Tensor:
        return self.between['added'](x, product, scale)


# ---- products, and the layers ----


class Int8Product(nn.Module):
    """x Wᵀ of bytes, through oneDNN: `(…, in)` of `to_int8` to `(…, out)`, yet to be multiplied by the rows' scale.

    Args:
        weight: `(out, in)` int8 and
        scale: `(out,)` float32, as torchao quantised them.
        dtype: of the result.
    """

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype):
        super().__init__()
        # an opaque layout of oneDNN, which is neither saved nor moved
        self.packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        self.scale, self.zero = scale.float().flatten(), torch.zeros(len(weight), dtype=torch.int64)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        product = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 128, self.packed, self.scale, self.zero, None, 1.0, 0, self.dtype, 'none', [], ''
        )
        return product.view(*x.shape[:-1], -1)


class FastLayers(nn.Module):
    """The layers of a `Transformer`, without dropout and gradients; same call, same results up to precision."""

    def __init__(self, transformer: Transformer, dtype: torch.dtype, quantized: bool, keep_bias: bool, compiled: bool):
        super().__init__()
        self.dtype = dtype
        on_cpu = transformer.layers[0][0].q_scale.device.type == 'cpu'
        self.int8 = quantized and on_cpu and torch.cpu._is_vnni_supported()
        # oneDNN gives no fp16 for bytes
        self.product_dtype = torch.float32 if self.int8 and dtype == torch.float16 else dtype
        native = compiled and on_cpu and self.int8 == quantized and NativeParts.serves(self.product_dtype, self.int8)
        self.parts = (
            NativeParts(self.product_dtype, self.int8) if native else TorchParts(dtype, self.int8, keep_bias, compiled)
        )
        # where operators are recorded, or gradients are wanted
        self.plain_parts = TorchParts(dtype, self.int8, keep_bias=False, compiled=False) if native else self.parts
        self.layers = nn.ModuleList()
        for attention, feed_forward in transformer.layers:
            norm, wide, _, _, narrow = feed_forward
            products = [attention.to_q, attention.to_kv, attention.to_out[0], wide, narrow]
            layer = nn.Module()
            layer.products = nn.ModuleList([self.product(it.weight, quantized, compiled) for it in products])
            layer.register_buffer('gain', (attention.q_scale * attention.k_scale * attention.scale).detach().float())
            layer.register_buffer('attention_gamma', attention.norm.learned_gamma.detach().float())
            layer.register_buffer('feed_forward_gamma', norm.learned_gamma.detach().float())
            layer.heads = attention.heads
            self.layers.append(layer)

    def product(self, weight: Tensor, quantized: bool, compiled: bool) -> nn.Module:
        # the subclass of the package, which has a fast path for float32, but knows no quantised weights
        sizes = weight.shape[1], weight.shape[0]
        with torch.device('meta'):
            linear = nn.Linear(*sizes, bias=False) if quantized else Linear(*sizes)
        linear.weight = nn.Parameter(weight.detach().to(self.dtype), requires_grad=False)
        if not quantized:
            return linear
        quantize_, config = _torchao()
        held = nn.Sequential(linear)
        quantize_(held, config)
        if self.int8:
            return Int8Product(held[0].weight.qdata, held[0].weight.scale, self.product_dtype)
        return torch.compile(held[0], dynamic=True) if compiled else held[0]

    def forward(self, x: Tensor, bias: PositionBias | None = None, mask: Tensor | None = None) -> list[Tensor]:
        recorded = is_traced() or (torch.is_grad_enabled() and x.requires_grad)
        # in the precision that was chosen, whatever the caller computes in
        with torch.autocast(x.device.type, enabled=False):
            layers = self._layers(self.plain_parts if recorded else self.parts, x.float().contiguous(), bias, mask)
        return [layer.to(x.dtype) for layer in layers]

    def _layers(
        self, parts: NativeParts | TorchParts, x: Tensor, bias: PositionBias | None, mask: Tensor | None
    ) -> list[Tensor]:
        keys = parts.keys(x, bias, mask)
        y, scale = parts.normed(x, self.layers[0].attention_gamma)

        layers = []
        for layer, following in zip(self.layers, [*self.layers[1:], None]):
            to_q, to_kv, to_out, wide, narrow = layer.products

            y, scale = parts.attended(to_q(y), to_kv(y), scale, layer.gain, layer.heads, keys)
            x, y, scale = parts.added_and_normed(x, to_out(y), scale, layer.feed_forward_gamma)

            y, scale = parts.gated(wide(y), scale)
            if following is None:
                x = parts.added(x, narrow(y), scale)
            else:
                x, y, scale = parts.added_and_normed(x, narrow(y), scale, following.attention_gamma)
            layers.append(x)
        return layers


def _torchao() -> tuple[Callable, Any]:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise ImportError(f'use_quantization needs torchao ({error}): {how_to_install("inference")}') from error
    return quantize_, Int8DynamicActivationInt8WeightConfig()
