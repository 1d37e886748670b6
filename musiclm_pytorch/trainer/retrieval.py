"""How well pairs find each other: retrieval metrics on a matrix of similarities."""

from __future__ import annotations

import torch
from torch import Tensor


def retrieval_metrics(similarities: Tensor) -> dict[str, float]:
    """Metrics of finding, for each row, the column of its own index, and the other way round.

    Args:
        similarities: `(n, n)`, audio by text; pair i is entry (i, i).

    Returns:
        for `audio_to_text` and `text_to_audio`: recall at 1, 5 and 10, median rank (from 1) and mAP@10. The rank of a
        pair counts ties against it, so that embeddings that are all alike do not look perfect.
    """
    metrics = {}
    for name, scores in (('audio_to_text', similarities), ('text_to_audio', similarities.T)):
        own = scores.diagonal()[:, None]
        ranks = (scores >= own).sum(dim=1)
        for k in (1, 5, 10):
            metrics[f'{name}_recall_at_{k}'] = (ranks <= k).float().mean().item()
        metrics[f'{name}_median_rank'] = ranks.float().median().item()
        metrics[f'{name}_map_at_10'] = torch.where(ranks <= 10, 1 / ranks.float(), 0.0).mean().item()
    return metrics


def similarity_histogram(similarities: Tensor, bins: int = 40) -> dict[str, list[float]]:
    """Shares of cosines in `bins` equal bins of [-1, 1], of pairs and of everything else."""
    off_diagonal = ~torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
    parts = {'pairs': similarities.diagonal(), 'others': similarities[off_diagonal]}
    return {
        name: (torch.histc(values.float().cpu(), bins, -1, 1) / max(1, values.numel())).tolist()
        for name, values in parts.items()
    }


def mean_cosine(latents: Tensor) -> float:
    """Mean cosine between different rows of `(n, d)` latents of length 1; near 1, they have collapsed."""
    n = len(latents)
    return ((latents.sum(dim=0).square().sum() - n) / (n * (n - 1))).item()
