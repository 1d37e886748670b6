"""Contrastive batches that do not fit into memory (GradCache, arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from musiclm_pytorch.mulan.model import PairLatents
from musiclm_pytorch.trainer.checkpoints import random_states, restore_random_states


def grad_cache_backward(
    chunks: Sequence[Any],
    *,
    encode: Callable[[Any], PairLatents],
    loss_of: Callable[[PairLatents], Tensor],
    backward: Callable[[Tensor], None],
    encode_last: Callable[[Any], PairLatents] | None = None,
) -> Tensor:
    """Accumulate the gradients of one loss over all chunks, holding the graph of one chunk at a time.

    Each chunk is embedded without a graph, the loss and its gradient with respect to all latents are computed, and
    each chunk is embedded again, under the random state of the first time, to carry its gradient on. The gradients
    are those of the whole batch at once.

    Args:
        chunks: the parts of the batch.
        encode: embeds a part.
        loss_of: the loss of the joined latents.
        backward: backpropagates a scalar, with the loss scaling of mixed precision if there is any.
        encode_last: embeds the last part the second time: through the wrapper that averages gradients over ranks, which
            then averages what all parts have accumulated.

    Returns:
        the loss, detached.
    """
    states, cached = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(random_states())
            cached.append(encode(chunk))

    leaves = join_latents(cached)
    leaves = PairLatents(*(None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in leaves))
    loss = loss_of(leaves)
    backward(loss)
    gradients = [None if leaf is None else leaf.grad for leaf in leaves]

    # the second pass replays random states; what comes after it continues from where the first pass ended
    after = random_states()
    start = 0
    for i, (chunk, state) in enumerate(zip(chunks, states)):
        restore_random_states(state)
        is_last = i == len(chunks) - 1
        latents = (encode_last if is_last and encode_last else encode)(chunk)
        _carry(latents, gradients, start)
        start += len(latents.audio)
    restore_random_states(after)
    return loss.detach()


def join_latents(parts: Sequence[PairLatents]) -> PairLatents:
    """Join along the batch: axis 0 of `(b, d)`, axis 1 of `(l, b, d)`."""
    return PairLatents(*(None if part[0] is None else torch.cat(part, dim=part[0].ndim - 2) for part in zip(*parts)))


def _carry(latents: PairLatents, gradients: list[Tensor | None], start: int) -> None:
    """Backpropagate ⟨latents, their share of the gradients⟩; already scaled, as the loss was."""
    products = [
        (latent * gradient.narrow(gradient.ndim - 2, start, len(latents.audio))).sum()
        for latent, gradient in zip(latents, gradients)
        if gradient is not None
    ]
    torch.stack(products).sum().backward()


def split_batch(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """Split the tensors and lists of a batch into parts of at most `size` items."""
    total = len(next(iter(batch.values())))
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, total, size)]
