"""Residual vector quantization whose codebooks follow a moving average of what comes to them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.audiolm.kmeans import nearest
from musiclm_pytorch.collectives import mean_over_ranks

BATCH = 4096  # vectors looked at in one step of the k-means
DEAD = 0.02  # of the mean count of a codebook's codes: codes that less comes to are given another place


class ResidualQuantizer(nn.Module):
    """Vectors `(b, t, d)` to `levels` codes each: a level quantizes what those before it leave (arXiv 2107.03312,
    section III-C).

    In training the codes follow the vectors that come to them, by moving averages with the factor `decay` (arXiv
    1711.00937, appendix A.1), and a code that hardly any come to takes the place of a vector of the batch. The
    gradient passes as if nothing were quantized. State: `codebooks (levels, size, d)`, `counts (levels, size)`.
    """

    def __init__(self, dim: int, size: int, levels: int, decay: float = 0.98):
        super().__init__()
        self.decay = decay
        self.register_buffer('codebooks', torch.zeros(levels, size, dim, dtype=torch.float32))
        self.register_buffer('counts', torch.zeros(levels, size, dtype=torch.float32))
        # a number, for averages of weights copy no bools
        self.register_buffer('initted', torch.tensor(0.0, dtype=torch.float32))

    def forward(self, vectors: Tensor, levels: int | None = None) -> tuple[Tensor, Tensor]:
        """The quantized vectors `(b, t, d)`, and codes `(b, t, q)` int64; of all levels, or of the first ones."""
        found, codes = torch.zeros_like(vectors), []
        for level, codebook in enumerate(self.codebooks[:levels]):
            residual = (vectors - found).detach()
            codes.append(nearest(residual, codebook))
            found = found + codebook[codes[-1]]
            if self.training:
                self._follow(level, residual.flatten(0, 1), codes[-1].flatten())
        return vectors + (found - vectors).detach(), torch.stack(codes, dim=-1)

    def vectors_of(self, codes: Tensor) -> Tensor:
        """Codes `(b, t, q)` of all levels or of the first ones to the sum of their vectors, `(b, t, d)`."""
        return sum(codebook[own] for codebook, own in zip(self.codebooks, codes.unbind(dim=-1)))

    @torch.no_grad()
    def _follow(self, level: int, vectors: Tensor, codes: Tensor) -> None:
        codebook, before = self.codebooks[level], self.counts[level]
        came = mean_over_ranks(torch.bincount(codes, minlength=len(codebook)).float())
        sums = mean_over_ranks(torch.zeros_like(codebook).index_add_(0, codes, vectors))
        kept, new = self.decay * before, (1 - self.decay) * came
        counts = kept + new
        moved = (kept[:, None] * codebook + (1 - self.decay) * sums) / counts.clamp(min=1e-8)[:, None]
        mean = counts.mean()
        dead = counts < DEAD * mean
        drawn = vectors[torch.randint(len(vectors), (len(codebook),), device=vectors.device)]
        self.codebooks[level] = torch.where(dead[:, None], drawn, moved)
        self.counts[level] = torch.where(dead, mean, counts)

    @torch.no_grad()
    def fit(self, vectors: Tensor, *, seed: int) -> list[float]:
        """Codebooks by k-means over `(n, d)`, level by level. Returns the share of their energy that each level
        leaves. Raises ValueError for fewer vectors than codes."""
        from sklearn.cluster import MiniBatchKMeans  # takes seconds

        levels, size, _ = self.codebooks.shape
        if len(vectors) < size:
            raise ValueError(
                f'{size} codes a level need at least {size} code frames, got {len(vectors)}; give more audio'
            )
        energy, left = float(vectors.double().square().sum()), []
        residual = vectors.cpu().numpy().copy()
        for level in range(levels):
            means = MiniBatchKMeans(size, batch_size=BATCH, init='random', n_init=1, max_iter=6, random_state=seed).fit(
                residual
            )
            residual -= means.cluster_centers_[means.labels_]
            self.codebooks[level] = torch.from_numpy(means.cluster_centers_)
            self.counts[level] = torch.from_numpy(np.bincount(means.labels_, minlength=size))
            left.append(float(np.square(residual, dtype=np.float64).sum()) / energy)
        self.counts /= self.counts.mean()
        self.initted.fill_(1.0)
        return left


def commitment_loss(vectors: Tensor, quantized: Tensor) -> Tensor:
    """What keeps an encoder's vectors near their codes."""
    return F.mse_loss(vectors, quantized.detach())
