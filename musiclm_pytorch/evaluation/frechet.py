"""The Fréchet audio distance (arXiv 1812.08466) from statistics that take clips one by one, and its limit, FAD∞."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.evaluation.figures import Figure, undefined

# frames that wait until they are worth a matrix product
BLOCK = 256
# FAD∞: groups that clips are dealt into, and how few of them may hold clips
GROUPS, FEWEST_GROUPS = 32, 16
# FAD∞: the smallest subset as a share of everything, sizes of subsets, and how often the groups are dealt out anew for
# each size. Smaller subsets would see FAD bend; more rounds hardly change the intercept.
SMALLEST_SUBSET, SIZES, ROUNDS = 1 / 4, 8, 3


class GaussianStatistics:
    """Count, mean and scatter of frames, gathered as they come, in float64 on the CPU and in O(dim²) memory.

    The scatter is taken about the mean of each block, and blocks are merged (Chan, Golub and LeVeque, 1983), so that
    nothing is lost where the mean is far from zero.

    Args:
        dim: width of a frame.
    """

    @typechecked
    def __init__(self, dim: int):
        check_positive(dim=dim)
        self.dim = dim
        self._count = 0
        # in numpy, whose calls cost less and whose A.T @ A takes half the products
        self._mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))
        self._waiting: np.ndarray | None = None  # (BLOCK, dim), made with the first frames
        self._num_waiting = 0

    def __len__(self) -> int:
        """Frames seen."""
        return self._count + self._num_waiting

    @typechecked
    def update(self, frames: Tensor) -> None:
        """Add frames `(n, dim)` of floats; n may be 0.

        Raises ValueError for another shape and for NaN or infinity, TypeError for integers.
        """
        check_frames(frames, self.dim)
        # numpy has no bfloat16
        frames = frames.detach().to('cpu', torch.float64 if frames.dtype == torch.bfloat16 else frames.dtype).numpy()
        if self._waiting is None:
            self._waiting = np.empty((BLOCK, self.dim))
        taken = 0
        while taken < len(frames):
            begin = self._num_waiting
            end = min(BLOCK, begin + len(frames) - taken)
            self._waiting[begin:end] = frames[taken : taken + end - begin]
            taken += end - begin
            self._num_waiting = end
            if end == BLOCK:
                self._flush()

    @typechecked
    def merge(self, other: GaussianStatistics) -> None:
        """Add what another has seen; the other stays as it is. Raises ValueError for another width."""
        if other.dim != self.dim:
            raise ValueError(f'cannot merge statistics of {other.dim}-d frames into those of {self.dim}-d frames')
        self._flush()
        other._flush()
        self._merge(other._count, other._mean, other._scatter)

    @property
    def mean(self) -> Tensor:
        """`(dim,)` float64. Raises ValueError without a frame."""
        self._flush()
        if self._count == 0:
            raise ValueError('no frame has been seen, so there is no mean')
        return torch.from_numpy(self._mean.copy())

    @property
    def covariance(self) -> Tensor:
        """`(dim, dim)` float64, unbiased as `numpy.cov`. Raises ValueError with fewer than 2 frames."""
        self._flush()
        if self._count < 2:
            raise ValueError(f'a covariance needs at least 2 frames, got {self._count}')
        return torch.from_numpy(self._scatter / (self._count - 1))

    def __getstate__(self) -> dict[str, Any]:
        """Without the room for frames that wait: this is what ranks send each other."""
        self._flush()
        return self.__dict__ | dict(_waiting=None)

    def _flush(self) -> None:
        if self._num_waiting:
            block = self._waiting[: self._num_waiting]
            mean = block.mean(axis=0)
            centred = block - mean
            self._merge(len(block), mean, centred.T @ centred)
            self._num_waiting = 0

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if count == 0:
            return
        total = self._count + count
        delta = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(delta, delta) * (self._count * count / total)
        self._mean += delta * (count / total)
        self._count = total


class ThinnedStatistics:
    """Statistics of random subsets of clips, for FAD∞, without keeping a frame: memory of O(GROUPS · dim²).

    Each clip falls into one of `GROUPS` groups by a number drawn from (seed, index of the clip), and each group has
    its `GaussianStatistics`. A subset is a union of groups: what is resampled are whole clips, never single frames,
    because the frames of a clip resemble each other. Up to rounding, nothing depends on the order of the clips or on
    how they are dealt to processes.

    Args:
        dim: width of a frame.
        seed: of the groups and of the subsets.
    """

    @typechecked
    def __init__(self, dim: int, seed: int = 0):
        check_seed(seed)
        self.dim, self.seed = dim, seed
        self._groups = [GaussianStatistics(dim) for _ in range(GROUPS)]

    def __len__(self) -> int:
        """Frames seen."""
        return sum(map(len, self._groups))

    @typechecked
    def update(self, frames: Tensor, clip: int) -> None:
        """Add the frames `(n, dim)` of a clip; `clip` is its index in the whole set, the same whichever rank has it.

        Raises ValueError for another shape, NaN, infinity or a negative index, TypeError for integers.
        """
        drawn = clip_seed(self.seed, clip).generate_state(1)[0]
        self._groups[int(drawn) % GROUPS].update(frames)

    @typechecked
    def merge(self, other: ThinnedStatistics) -> None:
        """Add what another has seen; the other stays as it is. Raises ValueError for another width or seed."""
        if other.seed != self.seed:
            raise ValueError(f'cannot merge clips thinned by seed {other.seed} into those thinned by seed {self.seed}')
        for group, theirs in zip(self._groups, other._groups):
            group.merge(theirs)

    def total(self) -> GaussianStatistics:
        """The statistics of all clips."""
        return self._union(range(GROUPS))

    def subsets(self) -> Iterator[list[GaussianStatistics]]:
        """Subsets by size, the smallest first; the last is everything. Those of a size are drawn without replacement.

        A size is a number of groups: up to `SIZES` of them, evenly spread in 1/size, from a quarter of everything, but
        not below about `dim` frames. There is none with clips in fewer than `FEWEST_GROUPS` groups or with fewer than
        2 · `dim` frames.
        """
        filled = [number for number, group in enumerate(self._groups) if len(group)]
        whole, frames = len(filled), len(self)
        if whole < FEWEST_GROUPS or frames < 2 * self.dim:
            return
        smallest = math.ceil(whole * max(SMALLEST_SUBSET, self.dim / frames))
        sizes = (1 / np.linspace(1 / smallest, 1 / whole, SIZES)).round().astype(int)
        random = np.random.default_rng(self.seed)
        for size in np.unique(sizes).tolist():
            subsets = []
            # all that fit beside each other, since disjoint subsets tell the most
            for _ in range(ROUNDS if size < whole else 1):
                dealt = random.permutation(filled).tolist()
                subsets += [self._union(dealt[i : i + size]) for i in range(0, whole - size + 1, size)]
            yield subsets

    def _union(self, groups: Iterable[int]) -> GaussianStatistics:
        statistics = GaussianStatistics(self.dim)
        for group in groups:
            statistics.merge(self._groups[group])
        return statistics


@typechecked
def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """The Fréchet distance of two Gaussians (Dowson and Landau, 1982), in squared units of the frames, at least 0.

    |μa - μb|² + Tr(Σa + Σb - 2 (Σa Σb)^½). With Σ = F Fᵀ, the trace of the root is the sum of the singular values of
    Faᵀ Fb, which is real and stable whatever the rank: there may be fewer frames than dimensions.

    Raises:
        ValueError: different widths, or fewer than 2 frames on a side.
    """
    _check_widths(a, b)
    return _distance(_gaussian(a), _gaussian(b))


@typechecked
def frechet_audio_distance(
    reference: GaussianStatistics, generated: GaussianStatistics, *, embedding: str = ''
) -> Figure:
    """FAD. Details: the name of the embedding, and the frames of reference and generated clips.

    It is too high by about c/n with n frames, so compare only values of equally many clips, or see `frechet_infinity`.
    Undefined with fewer than 2 frames on a side. Raises ValueError for different widths.
    """
    _check_widths(reference, generated)
    details = dict(embedding=embedding, frames=(len(reference), len(generated)))
    if reason := too_few_frames(*details['frames']):
        return undefined(reason, **details)
    return Figure(frechet_distance(reference, generated), details=details)


@typechecked
def frechet_infinity(reference: GaussianStatistics, generated: ThinnedStatistics, *, embedding: str = '') -> Figure:
    """FAD∞: what FAD comes to with ever more generated clips (arXiv 1911.07023; for audio arXiv 2311.01616).

    FAD is taken of random subsets of the generated clips, whole clips without replacement, and averaged over subsets of
    a size; its regression on 1/n, with n frames, has the value as intercept, which may come out slightly negative. The
    reference is always whole, as in the papers: what its own finite size adds stays in, so let it be large.

    Details: embedding, frames (of reference and generated clips), seed, r_squared and slope of the regression, and
    smallest_subset, in frames. R² is near 1 where FAD depends on n at all, and means nothing where it hardly does.

    Undefined with fewer than 2 frames of reference, fewer than 2 · dim generated frames, or fewer than some 20
    generated clips. Raises ValueError for different widths.
    """
    _check_widths(reference, generated)
    details = dict(embedding=embedding, frames=(len(reference), len(generated)), seed=generated.seed)
    if reason := too_few_frames(*details['frames']):
        return undefined(reason, **details)
    gaussian, points = _gaussian(reference), []
    for subsets in generated.subsets():
        points.append(np.mean([(1 / len(it), _distance(gaussian, _gaussian(it))) for it in subsets], axis=0))
    if not points:
        return undefined(
            f'too few generated clips to tell how FAD falls with their number: it takes some 20 clips and '
            f'{2 * generated.dim} frames, twice their width, got {len(generated)} frames',
            **details,
        )
    inverse, distances = np.stack(points, axis=1)
    slope, intercept = np.polyfit(inverse, distances, 1)
    missed = np.square(distances - intercept - slope * inverse).sum()
    spread = np.square(distances - distances.mean()).sum()
    details['r_squared'] = float(1 - missed / spread) if spread > 0 else 1.0
    details |= dict(slope=float(slope), smallest_subset=round(1 / inverse[0]))
    return Figure(float(intercept), details=details)


class _Gaussian(NamedTuple):
    """Mean, trace of the covariance, and a factor `(dim, dim)` of it, F Fᵀ."""

    mean: Tensor
    trace: Tensor
    factor: Tensor


def _gaussian(statistics: GaussianStatistics) -> _Gaussian:
    covariance = statistics.covariance
    values, vectors = torch.linalg.eigh(covariance)
    # rounding may leave eigenvalues a little below zero
    return _Gaussian(statistics.mean, covariance.trace(), vectors * values.clamp(min=0).sqrt())


def _distance(a: _Gaussian, b: _Gaussian) -> float:
    root = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    return max(0.0, ((a.mean - b.mean).square().sum() + a.trace + b.trace - 2 * root).item())


def _check_widths(a: GaussianStatistics, b: GaussianStatistics | ThinnedStatistics) -> None:
    if a.dim != b.dim:
        raise ValueError(f'the frames of both sides must come from one embedding, got widths {a.dim} and {b.dim}')


def too_few_frames(reference: int, generated: int) -> str:
    """Why a distance is not defined, or ''."""
    if min(reference, generated) >= 2:
        return ''
    return f'a distance needs at least 2 frames on each side, got {reference} of reference and {generated} generated'


def check_frames(frames: Tensor, dim: int) -> None:
    """Raise ValueError unless frames have shape `(n, dim)` and are finite, TypeError unless they are floats."""
    if not frames.is_floating_point():
        raise TypeError(f'frames must be floats, got {frames.dtype}')
    if frames.ndim != 2 or frames.shape[1] != dim:
        raise ValueError(f'frames must have shape (n, {dim}), got {tuple(frames.shape)}')
    # one sum tells, at a fraction of the time of isfinite().all(); it may overflow where no frame does
    if not math.isfinite(frames.sum().item()) and not frames.isfinite().all():
        raise ValueError('frames hold NaN or infinity')


def check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f'seed must be 0 or more, got {seed}')


def clip_seed(seed: int, clip: int) -> np.random.SeedSequence:
    """What the random numbers of a clip come from. Raises ValueError for a negative index."""
    if clip < 0:
        raise ValueError(f'clip must be an index of 0 or more, got {clip}')
    return np.random.SeedSequence((seed, clip))
