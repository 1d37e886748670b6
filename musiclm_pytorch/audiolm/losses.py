"""The losses of AudioLM's three stages on tokens, over audiolm-pytorch's transformers as they are.

Each equals what audiolm-pytorch's wrapper of that stage computes in training mode on the same ids. The end token is
among the labels always, not in training mode alone, so that losses in training and validation are of the same thing.
Items of different lengths are padded with `PAD`, at the end, and each has its end token where it ends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from musiclm_pytorch.audiolm.bridge import CoarseTransformer, FineTransformer, SemanticTransformer

PAD = -1


def semantic_loss(
    transformer: SemanticTransformer, semantic: Tensor, *, conditioning: Tensor | None = None, mask_prob: float = 0.0
) -> Tensor:
    """Cross-entropy of the semantic tokens.

    Args:
        semantic: `(b, n)` int64 ids, padded.
        conditioning: `(b, q, d)` embeddings, for a transformer that is conditioned; zeros are the null condition.
        mask_prob: share of earlier tokens that attention does not see, see `forgetful_mask`.

    Returns:
        a scalar, in nats a token.
    """
    labels = with_end(semantic, transformer.eos_id)
    ids = labels[:, :-1]
    mask = forgetful_mask(ids.shape, mask_prob, ids.device) if mask_prob > 0 else None
    logits = transformer(ids=ids, text_embeds=conditioning, self_attn_mask=mask, cond_drop_prob=0.0)
    return cross_entropy(logits, labels)


def coarse_loss(
    transformer: CoarseTransformer,
    semantic: Tensor,
    coarse: Tensor,
    *,
    conditioning: Tensor | None = None,
    mask_prob: float = 0.0,
    semantic_loss_weight: float = 1.0,
) -> Tensor:
    """Cross-entropy of the coarse acoustic tokens after the semantic ones, and of these, averaged over tokens.

    Args:
        semantic: `(b, n)` ids, padded.
        coarse: `(b, t, q)` ids of the first quantizers, padded.
        conditioning, mask_prob: as in `semantic_loss`.
        semantic_loss_weight: of the semantic tokens; 0 leaves them out.
    """
    semantic_labels = with_end(semantic, transformer.semantic_eos_id)
    coarse_labels = with_end(rearrange(coarse, 'b t q -> b (t q)'), transformer.coarse_eos_id)

    # neither padding nor the end of the semantic tokens is attended to
    seen = (semantic_labels != PAD) & (semantic_labels != transformer.semantic_eos_id)
    # padding of the coarse tokens comes last, where no label looks back at it
    ids = coarse_labels[:, :-1].clamp(min=0)
    mask = F.pad(seen, (1, ids.shape[1] + 1), value=True)
    if mask_prob > 0:
        mask &= forgetful_mask(mask.shape, mask_prob, mask.device)

    semantic_logits, coarse_logits = transformer(
        semantic_token_ids=semantic_labels.masked_fill(~seen, 0),
        coarse_token_ids=ids,
        self_attn_mask=mask,
        text_embeds=conditioning,
        cond_drop_prob=0.0,
    )
    return joined_loss(semantic_logits, semantic_labels, semantic_loss_weight, coarse_logits, coarse_labels)


def fine_loss(
    transformer: FineTransformer,
    coarse: Tensor,
    fine: Tensor,
    *,
    conditioning: Tensor | None = None,
    mask_prob: float = 0.0,
    coarse_loss_weight: float = 1.0,
) -> Tensor:
    """Cross-entropy of the fine acoustic tokens after the coarse ones, and of these, averaged over tokens.

    There is no end token: fine tokens end with the coarse ones.

    Args:
        coarse: `(b, t, q)` ids of the first quantizers, padded.
        fine: `(b, t, q)` ids of the other quantizers, padded.
        conditioning, mask_prob: as in `semantic_loss`.
        coarse_loss_weight: of the coarse tokens; 0 leaves them out.
    """
    coarse_labels, fine_labels = (rearrange(ids, 'b t q -> b (t q)') for ids in (coarse, fine))
    ids = fine_labels[:, :-1].clamp(min=0)
    mask = None
    if mask_prob > 0:
        shape = (len(ids), coarse_labels.shape[1] + ids.shape[1] + 2)
        mask = forgetful_mask(shape, mask_prob, ids.device)
    coarse_logits, fine_logits = transformer(
        # the transformer masks this padding by itself
        coarse_token_ids=coarse_labels.masked_fill(coarse_labels == PAD, transformer.pad_id),
        fine_token_ids=ids,
        self_attn_mask=mask,
        text_embeds=conditioning,
        cond_drop_prob=0.0,
    )
    return joined_loss(coarse_logits, coarse_labels, coarse_loss_weight, fine_logits, fine_labels)


def joined_loss(
    prefix_logits: Tensor | None, prefix_labels: Tensor, prefix_weight: float, logits: Tensor, labels: Tensor
) -> Tensor:
    """Losses of the tokens that a stage is given and of those that it is for, by their numbers.

    A transformer built without the projection for the former gives None for their logits.
    """
    loss = cross_entropy(logits, labels)
    if prefix_weight == 0 or prefix_logits is None:
        return loss
    tokens, prefix_tokens = (labels != PAD).sum(), (prefix_labels != PAD).sum()
    prefix_loss = cross_entropy(prefix_logits, prefix_labels)
    return (prefix_loss * prefix_tokens * prefix_weight + loss * tokens) / (prefix_tokens + tokens)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over labels that are not padding, of `(b, n, c)` logits, in float32."""
    return F.cross_entropy(rearrange(logits.float(), 'b n c -> b c n'), labels, ignore_index=PAD)


def with_end(ids: Tensor, end: int) -> Tensor:
    """`(b, n)` padded ids with the end token after the last of each: `(b, n + 1)`."""
    lengths = (ids != PAD).sum(dim=-1, keepdim=True)
    return F.pad(ids, (0, 1), value=PAD).scatter(1, lengths, end)


def forgetful_mask(shape: tuple[int, int], prob: float, device: torch.device) -> Tensor:
    """Which of `(b, n)` tokens attention sees: all but a random `prob` of each row, never the first one left out.

    Training with it keeps attention from leaning on a few tokens (forgetful causal masking, arXiv 2210.13432).
    """
    noise = torch.randn(shape, device=device)
    noise[:, 0] = -torch.inf
    hidden = min(int(shape[-1] * prob), shape[-1] - 1)
    return torch.ones(shape, dtype=torch.bool, device=device).scatter(1, noise.topk(hidden).indices, False)


def without_repetitions(ids: Tensor) -> Tensor:
    """`(n,)` ids, each run of equal ones as one."""
    return torch.unique_consecutive(ids)
