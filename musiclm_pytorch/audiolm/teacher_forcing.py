"""Features of all tokens of a sequence at once, as the transformers of audiolm-pytorch compute them, for training.

Their own `forward` gives the same numbers in float32. Here position biases are looked up for the keys that a query may
see, attention runs by blocks and the streams of a token lie together (`block_attention.py`, `residual_streams.py`);
logits are left to the losses. On other devices than CPUs, in compiled code and for what they cannot do, such as dropout
of attention, attention and residual streams are audiolm-pytorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from musiclm_pytorch.audiolm.block_attention import block_causal_attention, blocks
from musiclm_pytorch.audiolm.bridge import (
    CoarseTransformer,
    FineTransformer,
    SemanticTransformer,
    conditioning_dim,
)
from musiclm_pytorch.audiolm.embedding import PAD, embed_levels, start
from musiclm_pytorch.audiolm.position_bias import PositionBias, coarse_bias, fine_bias, semantic_bias
from musiclm_pytorch.audiolm.residual_streams import ResidualStreams
from musiclm_pytorch.mulan.kernels import fast_kernels_allowed


def semantic_features(
    transformer: SemanticTransformer, ids: Tensor, *, seen: Tensor | None = None, conditioning: Tensor | None = None
) -> Tensor:
    """What the token after each of 0 … n tokens is told from.

    Args:
        ids: `(b, n)` int64, padded with `PAD`.
        seen: `(b, 1 + n)` bool, which places attention looks at, the start token's first.
        conditioning: `(b, q, d)`.

    Returns:
        `(b, 1 + n, d)`.
    """
    is_real = ids != PAD
    tokens = transformer.semantic_embedding(ids.masked_fill(~is_real, 0)) * is_real[..., None]
    tokens = torch.cat((start(transformer.start_token, len(ids)), tokens), dim=1)
    bias = semantic_bias(transformer, tokens.shape[1])
    return _run(transformer, tokens, bias, seen, conditioning)


def coarse_features(
    transformer: CoarseTransformer,
    semantic: Tensor,
    coarse: Tensor,
    *,
    seen: Tensor | None = None,
    conditioning: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What each of n semantic tokens, and the token after each of 0 … m coarse ones, is told from.

    Args:
        semantic: `(b, n)` ids. coarse: `(b, m)` ids, quantizer by quantizer.
        seen: `(b, n + m + 2)` bool, which places attention looks at, start tokens included.
        conditioning: `(b, q, d)`; rows of zeros are not attended to.

    Returns:
        `(b, n, d)` and `(b, 1 + m, d)`.
    """
    b, n = semantic.shape
    tokens = torch.cat(
        (
            start(transformer.semantic_start_token, b),
            transformer.semantic_embedding(semantic),
            start(transformer.coarse_start_token, b),
            _embed(
                coarse, transformer.coarse_embedding, transformer.coarse_quantize_embedding, transformer.codebook_size
            ),
        ),
        dim=1,
    )
    bias = coarse_bias(transformer, n, tokens.shape[1])
    context_mask = None if conditioning is None else (conditioning != 0).any(dim=-1)
    features = _run(transformer, tokens, bias, seen, conditioning, context_mask)
    return features[:, :n], features[:, n + 1 :]


def fine_features(
    transformer: FineTransformer,
    coarse: Tensor,
    fine: Tensor,
    *,
    seen: Tensor | None = None,
    conditioning: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What each of n coarse tokens, and the token after each of 0 … m fine ones, is told from.

    Args:
        coarse: `(b, n)` ids of whole frames, padded with `PAD`, which attention does not look at. fine: `(b, m)` ids.
        seen, conditioning, returned: as of `coarse_features`.

    Raises:
        ValueError: parts of frames of coarse tokens, or more frames of fine ones.
    """
    b, n = coarse.shape
    frames, rest = divmod(n, transformer.num_coarse_quantizers)
    if rest or fine.shape[1] > frames * transformer.num_fine_quantizers:
        raise ValueError(
            f'{n} coarse and {fine.shape[1]} fine tokens are not of the same whole frames, of '
            f'{transformer.num_coarse_quantizers} and {transformer.num_fine_quantizers}'
        )
    is_real = F.pad(coarse != PAD, (1, fine.shape[1] + 1), value=True)
    size = transformer.codebook_size
    tokens = torch.cat(
        (
            start(transformer.coarse_start_token, b),
            _embed(coarse.clamp(min=0), transformer.coarse_embedding, transformer.coarse_quantize_embedding, size),
            start(transformer.fine_start_token, b),
            _embed(fine, transformer.fine_embedding, transformer.fine_quantize_embedding, size),
        ),
        dim=1,
    )
    bias = fine_bias(transformer, frames)
    features = _run(transformer, tokens, bias, is_real if seen is None else is_real & seen, conditioning)
    return features[:, :n], features[:, n + 1 :]


def _embed(ids: Tensor, embedding: nn.Embedding, level_embedding: nn.Embedding, codebook_size: int) -> Tensor:
    """`(b, n, d)` of ids whose quantizers take turns."""
    levels = torch.arange(ids.shape[1], device=ids.device) % level_embedding.num_embeddings
    return embed_levels(ids, levels, embedding, level_embedding, codebook_size)


def _run(
    stage: nn.Module,
    x: Tensor,
    bias: PositionBias,
    seen: Tensor | None,
    conditioning: Tensor | None,
    context_mask: Tensor | None = None,
) -> Tensor:
    """`Transformer.forward` of audiolm-pytorch, `(b, n, d)`."""
    network = stage.transformer
    context = _check_conditioning(stage, conditioning)
    prefix = context if network.cond_as_self_attn_prefix else None
    if prefix is not None:
        # even where it hides nothing: fused attention without a mask would hide tokens from themselves behind a prefix
        ahead = x.new_ones(prefix.shape[:2], dtype=torch.bool) if context_mask is None else context_mask
        seen = torch.cat((ahead, x.new_ones(x.shape[:2], dtype=torch.bool) if seen is None else seen), dim=1)
    by_blocks = x.device.type == 'cpu' and fast_kernels_allowed() and not any(map(_needs_its_own, network.layers))
    placed = _lay_out(bias, x.shape[1], 0 if prefix is None else prefix.shape[1], by_blocks)

    residual = ResidualStreams(network, x.device)
    streams = residual.expand(network.grad_shrink(x))
    values = cross_values = None
    for self_attention, cross_attention, feed_forward in network.layers:
        branch_input, mixed, rest = residual.enter(self_attention, streams)
        out, own = _attend(self_attention.branch, branch_input, placed, by_blocks, seen, values, prefix)
        streams = residual.leave(self_attention, out, mixed, **rest)
        if network.add_value_residual and values is None:
            values = own

        if cross_attention is not None:
            branch_input, mixed, rest = residual.enter(cross_attention, streams)
            out, own = cross_attention.branch(
                branch_input, context=context, mask=context_mask, return_values=True, value_residual=cross_values
            )
            streams = residual.leave(cross_attention, out, mixed, **rest)
            if network.add_value_residual and cross_values is None:
                cross_values = own

        branch_input, mixed, rest = residual.enter(feed_forward, streams)
        streams = residual.leave(feed_forward, feed_forward.branch(branch_input), mixed, **rest)
    return network.norm(residual.reduce(streams))


def _check_conditioning(stage: nn.Module, conditioning: Tensor | None) -> Tensor | None:
    """The conditioning as the transformer takes it. Raises ValueError where it does not fit the stage."""
    name = type(stage).__name__
    if stage.has_condition != (conditioning is not None):
        raise ValueError(
            f'this {name} was built with conditioning: pass it'
            if stage.has_condition
            else f'this {name} was built without conditioning: pass none, or build it with audio_text_condition=True'
        )
    if conditioning is None:
        return None
    if conditioning.shape[-1] != conditioning_dim(stage):
        raise ValueError(f'this {name} takes conditioning {conditioning_dim(stage)} wide, got {conditioning.shape[-1]}')
    return stage.proj_text_embed(conditioning)


def _needs_its_own(layer: nn.ModuleList) -> bool:
    """Whether self-attention of a layer is more than blocks can do."""
    attend = layer[0].branch.attend
    return attend.flash or not attend.causal or (attend.attn_dropout.training and attend.attn_dropout.p > 0)


def _lay_out(bias: PositionBias, n: int, ahead: int, by_blocks: bool) -> list[Tensor] | Tensor | None:
    """What `block_causal_attention` takes, or the whole of it, `(h, n, ahead + n)`, as audiolm-pytorch takes it."""
    if bias.table is None:
        return None
    if by_blocks:
        return [bias.block(start, stop, num_keys=stop) for start, stop, _ in blocks(n, n)]
    whole = bias.block(0, n, num_keys=n)
    return F.pad(whole, (ahead, 0)) if ahead else whole


def _attend(
    attention: nn.Module,
    x: Tensor,
    bias: list[Tensor] | Tensor | None,
    by_blocks: bool,
    seen: Tensor | None,
    value_residual: Tensor | None,
    prefix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Self-attention, `(b, n, d)`, and its values before the residual, `(b, p + n, d)` behind a prefix of p."""
    k, own = attention.to_kv(x if prefix is None else torch.cat((prefix, x), dim=1)).chunk(2, dim=-1)
    v = own if value_residual is None else 0.5 * (own + value_residual)
    if attention.num_null_kv > 0:
        null_k, null_v = attention.null_kv[:, None].expand(-1, len(x), -1, -1)
        k, v = torch.cat((null_k, k), dim=1), torch.cat((null_v, v), dim=1)
        seen = None if seen is None else F.pad(seen, (attention.num_null_kv, 0), value=True)

    q = rearrange(attention.to_q(attention.norm(x)), 'b n (h d) -> b h n d', h=attention.heads)
    if by_blocks:
        out = block_causal_attention(q, k, v, seen, bias)
    else:
        out = attention.attend(q, k, v, mask=seen, attn_bias=bias)
    return attention.to_out(rearrange(out, 'b h n d -> b n (h d)')), own
