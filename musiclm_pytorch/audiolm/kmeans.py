"""Features to tokens: the nearest of a set of centres, learned by k-means from many frames in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from einops import einsum
from torch import Tensor

from musiclm_pytorch.checks import check_positive
from musiclm_pytorch.mulan.spectrogram import Float32Buffers

# frames looked at in one step of the k-means
BATCH = 4096


def nearest(vectors: Tensor, centers: Tensor) -> Tensor:
    """Which of centres `(c, d)` is nearest to each of vectors `(…, d)`: `(…)` int64."""
    # |x - c|² = |x|² - 2 (x · c - |c|² / 2), and |x|² is the same for all centres
    return (einsum(vectors, centers, '... d, c d -> ... c') - centers.square().sum(dim=-1) / 2).argmax(dim=-1)


class KMeansCodebook(Float32Buffers):
    """`codebook_size` centres among features that were normalised to mean 0 and deviation 1 (z-scores).

    Everything is in buffers, so that a state dict holds it: `mean (dim,)`, `std (dim,)`, `centers (codebook_size,
    dim)`, all float32, and `fitted`, a bool.
    """

    def __init__(self, dim: int, codebook_size: int):
        super().__init__()
        check_positive(dim=dim, codebook_size=codebook_size)
        self.dim = dim
        self.codebook_size = codebook_size
        self.register_buffer('mean', torch.zeros(dim, dtype=torch.float32))
        self.register_buffer('std', torch.ones(dim, dtype=torch.float32))
        self.register_buffer('centers', torch.zeros(codebook_size, dim, dtype=torch.float32))
        self.register_buffer('fitted', torch.tensor(False))

    @property
    def is_fitted(self) -> bool:
        return bool(self.fitted)

    def forward(self, features: Tensor) -> Tensor:
        """`(…, dim)` features to the index of the nearest centre, `(…)` int64."""
        return nearest(self.normalise(features), self.centers.float())

    def normalise(self, features: Tensor) -> Tensor:
        return (features.float() - self.mean.float()) / self.std.float()

    @torch.no_grad()
    def set(self, centers: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        """Take centres `(codebook_size, dim)` from elsewhere; without `mean` and `std`, among features as they are."""
        if centers.shape != self.centers.shape:
            raise ValueError(f'centers must have shape {tuple(self.centers.shape)}, got {tuple(centers.shape)}')
        self.centers.copy_(centers)
        self.mean.copy_(torch.zeros(self.dim) if mean is None else mean)
        self.std.copy_(torch.ones(self.dim) if std is None else std)
        self.fitted.fill_(True)

    def fit(self, blocks: Iterable[Tensor], *, max_frames: int, seed: int) -> float:
        """Learn from blocks of frames `(n, dim)`, which are read once.

        Mean and deviation are those of all frames. The centres come from `max_frames` of them, drawn uniformly at
        random from the whole stream (reservoir sampling): neighbouring frames of a piece resemble each other, and a
        k-means that met the pieces one after another would begin from the first ones and drift with the last.

        Returns:
            the share of the variance of the normalised features that is lost, in [0, 1].

        Raises:
            ValueError: fewer different frames than centres, NaN or infinity.
        """
        from sklearn.cluster import MiniBatchKMeans  # takes seconds

        check_positive(max_frames=max_frames)
        if max_frames < self.codebook_size:
            raise ValueError(f'max_frames {max_frames} is less than codebook_size {self.codebook_size}; raise it')
        random = np.random.default_rng(seed)
        sample = np.empty((max_frames, self.dim), dtype=np.float32)
        count, mean, squares = 0, np.zeros(self.dim), np.zeros(self.dim)
        for block in blocks:
            frames = block.detach().float().cpu().numpy()
            if not np.isfinite(frames).all():
                raise ValueError('the features hold NaN or infinity; is the encoder trained and are the waves finite?')

            # mean and deviation so far, joined with those of the block (Chan et al., 1979)
            new = len(frames)
            if new == 0:
                continue
            difference = frames.mean(axis=0, dtype=np.float64) - mean
            squares += np.square(frames - frames.mean(axis=0, dtype=np.float64)).sum(axis=0)
            squares += difference**2 * count * new / (count + new)
            mean += difference * new / (count + new)

            # while there is room, frame i takes place i; later it takes a random place below i + 1, if there is one
            places = np.arange(count, count + new)
            places = np.where(places < max_frames, places, random.integers(0, places + 1))
            kept = places < max_frames
            sample[places[kept]] = frames[kept]
            count += new

        sample = sample[: min(count, max_frames)]
        # two frames are the same if their projections on a random direction are
        different = len(np.unique(sample.astype(np.float64) @ random.standard_normal(self.dim)))
        if different < self.codebook_size:
            raise ValueError(
                f'{self.codebook_size} centres need at least as many different frames, got {different} in '
                f'{len(sample)}; give more audio or a smaller codebook_size'
            )
        std = np.sqrt(squares / count)
        std = np.where(std > 1e-6 * np.maximum(1, np.abs(mean)), std, 1.0)  # a feature that is constant stays at 0
        sample -= mean.astype(np.float32)
        sample /= std.astype(np.float32)

        means = MiniBatchKMeans(
            self.codebook_size,
            batch_size=max(BATCH, 4 * self.codebook_size),
            n_init=3,
            max_no_improvement=20,
            random_state=seed,
        )
        means.fit(sample)
        self.set(*(torch.from_numpy(it) for it in (means.cluster_centers_, mean, std)))
        return float(means.inertia_ / np.square(sample, dtype=np.float64).sum())
