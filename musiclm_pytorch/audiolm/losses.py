"""The losses of AudioLM's three stages on tokens, over the weights of audiolm-pytorch's transformers.

Each equals what audiolm-pytorch's wrapper of that stage computes in training mode on the same ids. The end token is
among the labels always, not in training mode alone, so that losses in training and validation are of the same thing.
Items of different lengths are padded with `PAD`, at the end, and each has its end token where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from musiclm_pytorch.audiolm.bridge import CoarseTransformer, FineTransformer, SemanticTransformer
from musiclm_pytorch.audiolm.embedding import PAD
from musiclm_pytorch.audiolm.position_bias import at_least_float32, without_denormals
from musiclm_pytorch.audiolm.teacher_forcing import coarse_features, fine_features, semantic_features


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
    seen = None
    if mask_prob > 0:
        seen = F.pad(forgetful_mask(ids.shape, mask_prob, ids.device), (1, 0), value=True)
    features = semantic_features(transformer, ids, seen=seen, conditioning=conditioning)
    return summed_loss(features, [transformer.to_logits], labels) / count_labels(transformer, semantic)


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

    given, features = coarse_features(
        transformer, semantic_labels.masked_fill(~seen, 0), ids, seen=mask, conditioning=conditioning
    )
    loss = summed_loss(features, of_levels(transformer.coarse_logit_weights), coarse_labels)
    if prefix_counts(transformer, semantic_loss_weight):
        loss = loss + summed_loss(given, [transformer.to_semantic_logits], semantic_labels) * semantic_loss_weight
    return loss / count_labels(transformer, semantic, coarse, prefix_loss_weight=semantic_loss_weight)


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
    losses = []
    frames = (coarse != PAD).all(dim=-1).sum(dim=-1)
    # the biases of positions depend on how many frames there are, padding among them: see `fine_bias`
    for length in frames.unique().tolist():
        chosen = frames == length
        coarse_labels, labels = (rearrange(ids[chosen, :length], 'b t q -> b (t q)') for ids in (coarse, fine))
        ids = labels[:, :-1].clamp(min=0)
        mask = None
        if mask_prob > 0:
            shape = (len(ids), coarse_labels.shape[1] + ids.shape[1] + 2)
            mask = forgetful_mask(shape, mask_prob, ids.device)
        own = None if conditioning is None else conditioning[chosen]
        given, features = fine_features(transformer, coarse_labels, ids, seen=mask, conditioning=own)
        losses.append(summed_loss(features, of_levels(transformer.fine_logit_weights), labels))
        if prefix_counts(transformer, coarse_loss_weight):
            of_given = summed_loss(given, of_levels(transformer.coarse_logit_weights), coarse_labels)
            losses.append(of_given * coarse_loss_weight)
    return torch.stack(losses).sum() / count_labels(transformer, coarse, fine, prefix_loss_weight=coarse_loss_weight)


def prefix_counts(transformer: CoarseTransformer | FineTransformer, prefix_loss_weight: float) -> bool:
    """Whether the tokens that a stage is given are among the labels of its loss."""
    coarse = isinstance(transformer, CoarseTransformer)
    head = transformer.to_semantic_logits if coarse else transformer.coarse_logit_weights
    return prefix_loss_weight != 0 and head is not None


def count_labels(
    transformer: SemanticTransformer | CoarseTransformer | FineTransformer,
    *ids: Tensor,
    prefix_loss_weight: float = 1.0,
) -> Tensor:
    """The number of labels that the loss of a stage is the mean over, an int64 scalar.

    With it, the losses of several batches are joined to that of all of them. A label of the tokens that the stage is
    given counts as one, whatever its weight, unless that is 0.

    Args:
        ids: those of the stage's loss, in its order, padded.
        prefix_loss_weight: of the tokens that the stage is given.
    """
    if len(ids) == 2 and not prefix_counts(transformer, prefix_loss_weight):
        ids = ids[1:]
    ends = 0 if isinstance(transformer, FineTransformer) else len(ids[0])
    return torch.stack([(part != PAD).sum() + ends for part in ids]).sum()


def summed_loss(features: Tensor, heads: Sequence[Callable[[Tensor], Tensor]], labels: Tensor) -> Tensor:
    """The sum of the cross-entropies of the labels that are not padding, in float32 at least.

    Args:
        features: `(b, n, d)`.
        heads: from features to logits `(…, c)`; they take turns along the sequence.
        labels: `(b, n)`.
    """
    losses = []
    for level, head in enumerate(heads):
        logits = at_least_float32(head(features[:, level :: len(heads)]))
        if logits.requires_grad and logits.device.type == 'cpu':
            # probabilities far from the label's may be next to nothing
            logits.register_hook(without_denormals)
        own = labels[:, level :: len(heads)]
        losses.append(F.cross_entropy(logits.flatten(0, 1), own.flatten(), ignore_index=PAD, reduction='sum'))
    return torch.stack(losses).sum()


def of_levels(weights: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """A head for each level of `(levels, c, d)` weights."""
    return [partial(F.linear, weight=weight) for weight in weights]


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
