"""Features of all tokens of a sequence at once, as the transformers of audiolm-pytorch compute them, for training.

Their own `forward` gives the same numbers. Here position biases are looked up for the keys that a query may see,
attention runs by blocks and the streams of a token lie together (`block_attention.py`, `residual_streams.py`); logits
are left to the losses. On other devices than CPUs, attention and residual streams are audiolm-pytorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from musiclm_pytorch.audiolm.block_attention import BLOCK, block_causal_attention
from musiclm_pytorch.audiolm.bridge import CoarseTransformer, FineTransformer, SemanticTransformer
from musiclm_pytorch.audiolm.position_bias import PositionBias, coarse_bias, fine_bias, semantic_bias
from musiclm_pytorch.audiolm.residual_streams import ResidualStreams

PAD = -1


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
    tokens = torch.cat((_start(transformer.start_token, len(ids)), tokens), dim=1)
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
            _start(transformer.semantic_start_token, b),
            transformer.semantic_embedding(semantic),
            _start(transformer.coarse_start_token, b),
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
    """
    b, n = coarse.shape
    is_real = F.pad(coarse != PAD, (1, fine.shape[1] + 1), value=True)
    size = transformer.codebook_size
    tokens = torch.cat(
        (
            _start(transformer.coarse_start_token, b),
            _embed(coarse.clamp(min=0), transformer.coarse_embedding, transformer.coarse_quantize_embedding, size),
            _start(transformer.fine_start_token, b),
            _embed(fine, transformer.fine_embedding, transformer.fine_quantize_embedding, size),
        ),
        dim=1,
    )
    bias = fine_bias(transformer, n // transformer.num_coarse_quantizers)
    features = _run(transformer, tokens, bias, is_real if seen is None else is_real & seen, conditioning)
    return features[:, :n], features[:, n + 1 :]


def _start(token: Tensor, batch: int) -> Tensor:
    return token.expand(batch, 1, -1)


def _embed(ids: Tensor, embedding: nn.Embedding, level_embedding: nn.Embedding, codebook_size: int) -> Tensor:
    """`(b, n, d)` of ids whose quantizers take turns."""
    levels = torch.arange(ids.shape[1], device=ids.device) % level_embedding.num_embeddings
    # the stages step by codebook_size, though a table with end tokens has a row more a quantizer
    return embedding(ids + levels * codebook_size) + level_embedding(levels)


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
    context = None if conditioning is None else stage.proj_text_embed(conditioning)
    prefix = dict(prefix=context, prefix_mask=context_mask) if network.cond_as_self_attn_prefix else {}
    # all attention of a network runs in one way
    by_blocks = _runs_by_blocks(network.layers[0][0].branch, x.device)
    blocks = _blocks_of(bias, x.shape[1], BLOCK if by_blocks else x.shape[1])

    residual = ResidualStreams(network, x.device)
    streams = residual.expand(network.grad_shrink(x))
    values = cross_values = None
    for self_attention, cross_attention, feed_forward in network.layers:
        branch_input, mixed, rest = residual.enter(self_attention, streams)
        out, own = _attend(self_attention.branch, branch_input, blocks, by_blocks, seen, values, **prefix)
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


def _runs_by_blocks(attention: nn.Module, device: torch.device) -> bool:
    attend = attention.attend
    drops = attention.training and attend.dropout > 0
    return attend.causal and not (attend.flash or drops or device.type != 'cpu' or torch.compiler.is_compiling())


def _blocks_of(bias: PositionBias, n: int, size: int) -> list[Tensor] | None:
    """For each `size` queries, `(h, queries, keys up to the last of them)`."""
    if bias.table is None:
        return None
    stops = [min(start + size, n) for start in range(0, n, size)]
    return [bias.block(start, stop, num_keys=stop) for start, stop in zip(range(0, n, size), stops)]


def _attend(
    attention: nn.Module,
    x: Tensor,
    bias: list[Tensor] | None,
    by_blocks: bool,
    seen: Tensor | None,
    value_residual: Tensor | None,
    prefix: Tensor | None = None,
    prefix_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Self-attention, `(b, n, d)`, and its values, `(b, k, d)`."""
    k, v = attention.to_kv(x if prefix is None else torch.cat((prefix, x), dim=1)).chunk(2, dim=-1)
    own = v
    if value_residual is not None:
        v = 0.5 * (v + value_residual)
    ahead = k.shape[1] - x.shape[1]
    if ahead > 0 and (seen is not None or prefix_mask is not None):
        everything = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        prefix_mask = everything.new_ones(len(x), ahead) if prefix_mask is None else prefix_mask
        seen = torch.cat((prefix_mask, everything if seen is None else seen), dim=1)
    if attention.num_null_kv > 0:
        null_k, null_v = attention.null_kv[:, None].expand(-1, len(x), -1, -1)
        k, v = torch.cat((null_k, k), dim=1), torch.cat((null_v, v), dim=1)
        seen = None if seen is None else F.pad(seen, (attention.num_null_kv, 0), value=True)
        ahead += attention.num_null_kv

    q = rearrange(attention.to_q(attention.norm(x)), 'b n (h d) -> b h n d', h=attention.heads)
    if by_blocks:
        out = block_causal_attention(q, k, v, seen, bias)
    else:
        whole = None if bias is None else F.pad(bias[0], (ahead, 0))
        out = attention.attend(q, k, v, mask=seen, attn_bias=whole)
    return attention.to_out(rearrange(out, 'b h n d -> b n (h d)')), own
