"""Distances between the frames of two sets of clips: Fréchet (FAD), its limit with more clips (FAD∞), kernel (KAD).

What they are computed from takes clips one by one, in any order, in memory that does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musiclm_pytorch.checks import check_not_negative, check_positive, is_finite, typechecked
from musiclm_pytorch.evaluation.embedders import Embedder
from musiclm_pytorch.evaluation.metric import EvaluationClip, Metric, MetricValue, undefined

# FAD∞: groups that clips are dealt into, and how few of them may hold clips
NUM_GROUPS, FEWEST_GROUPS = 32, 16
# FAD∞: the smallest subset as a share of everything, sizes of subsets, and how often the groups are dealt out anew for
# each size. Smaller subsets would see FAD bend; more rounds hardly change the intercept.
SMALLEST_SUBSET, SIZES, ROUNDS = 1 / 4, 8, 3
# KAD: the factor of the authors' toolkit; rows of a matrix of pairs held at a time; frames for the bandwidth at most
SCALE, ROWS, MEDIAN_FRAMES = 100.0, 512, 2000


# ---- the Fréchet distance ----


class GaussianStatistics:
    """Count, mean and scatter of frames, gathered as they come, in float64 on the CPU and in O(dim²) memory.

    The scatter is taken about the mean of each batch, and batches are merged (Chan, Golub and LeVeque, 1983), so that
    nothing is lost where the mean is far from zero. `dim` is the width of a frame.
    """

    @typechecked
    def __init__(self, dim: int):
        check_positive(dim=dim)
        self.dim = dim
        self._count = 0
        # in numpy, whose calls cost less and whose A.T @ A takes half the products
        self._mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))

    def __len__(self) -> int:
        """Frames seen."""
        return self._count

    @typechecked
    def update(self, frames: Tensor) -> None:
        """Add frames `(n, dim)` of floats; n may be 0.

        Raises ValueError for another shape and for NaN or infinity, TypeError for integers.
        """
        check_frames(frames, self.dim)
        if len(frames):
            batch = frames.detach().cpu().double().numpy()
            mean = batch.mean(axis=0)
            centred = batch - mean
            self._merge(len(batch), mean, centred.T @ centred)

    @typechecked
    def merge(self, other: GaussianStatistics) -> None:
        """Add what another has seen; the other stays as it is. Raises ValueError for another width."""
        if other.dim != self.dim:
            raise ValueError(f'cannot merge statistics of {other.dim}-d frames into those of {self.dim}-d frames')
        if len(other):
            self._merge(other._count, other._mean, other._scatter)

    @property
    def mean(self) -> Tensor:
        """`(dim,)` float64. Raises ValueError without a frame."""
        if self._count == 0:
            raise ValueError('no frame has been seen, so there is no mean')
        return torch.from_numpy(self._mean.copy())

    @property
    def covariance(self) -> Tensor:
        """`(dim, dim)` float64, unbiased as `numpy.cov`. Raises ValueError with fewer than 2 frames."""
        if self._count < 2:
            raise ValueError(f'a covariance needs at least 2 frames, got {self._count}')
        return torch.from_numpy(self._scatter / (self._count - 1))

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self._count + count
        delta = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(delta, delta) * (self._count * count / total)
        self._mean += delta * (count / total)
        self._count = total


class ThinnedStatistics:
    """Statistics of random subsets of clips, for FAD∞, without keeping a frame: memory of O(NUM_GROUPS · dim²).

    Each clip falls into one of `NUM_GROUPS` groups by a number drawn from (seed, index of the clip), and each group has
    its `GaussianStatistics`. A subset is a union of groups: what is resampled are whole clips, never single frames,
    because the frames of a clip resemble each other. Up to rounding, nothing depends on the order of the clips or on
    how they are sharded across processes.

    `dim` is the width of a frame, and `seed` that of the groups and of the subsets.
    """

    @typechecked
    def __init__(self, dim: int, seed: int = 0):
        check_not_negative(seed=seed)
        self.dim, self.seed = dim, seed
        self._groups = [GaussianStatistics(dim) for _ in range(NUM_GROUPS)]

    def __len__(self) -> int:
        """Frames seen."""
        return sum(map(len, self._groups))

    @typechecked
    def update(self, frames: Tensor, clip: int) -> None:
        """Add the frames `(n, dim)` of a clip; `clip` is its index in the whole set, the same whichever rank has it.

        Raises ValueError for another shape, NaN, infinity or a negative index, TypeError for integers.
        """
        drawn = clip_seed(self.seed, clip).generate_state(1)[0]
        self._groups[int(drawn) % NUM_GROUPS].update(frames)

    @typechecked
    def merge(self, other: ThinnedStatistics) -> None:
        """Add what another has seen; the other stays as it is. Raises ValueError for another width or seed."""
        if other.seed != self.seed:
            raise ValueError(f'cannot merge clips thinned by seed {other.seed} into those thinned by seed {self.seed}')
        for group, theirs in zip(self._groups, other._groups):
            group.merge(theirs)

    def total(self) -> GaussianStatistics:
        """The statistics of all clips."""
        return self._union(range(NUM_GROUPS))

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
    Faᵀ Fb, which is real and stable whatever the rank: there may be fewer frames than dimensions. Raises ValueError for
    different widths, or fewer than 2 frames on a side.
    """
    check_widths(a, b)
    return _distance(_gaussian(a), _gaussian(b))


@typechecked
def frechet_audio_distance(
    reference: GaussianStatistics, generated: GaussianStatistics, *, embedding: str = ''
) -> MetricValue:
    """FAD (arXiv 1812.08466). Details: the name of the embedding, and the frames of reference and generated clips.

    It is too high by about c/n with n frames, so compare only values of equally many clips, or see `frechet_infinity`.
    Undefined with fewer than 2 frames on a side. Raises ValueError for different widths.
    """
    check_widths(reference, generated)
    details = dict(embedding=embedding, frames=(len(reference), len(generated)))
    if reason := too_few_frames(*details['frames']):
        return undefined(reason, **details)
    return MetricValue(frechet_distance(reference, generated), details=details)


@typechecked
def frechet_infinity(
    reference: GaussianStatistics, generated: ThinnedStatistics, *, embedding: str = ''
) -> MetricValue:
    """FAD∞: what FAD comes to with ever more generated clips (arXiv 1911.07023; for audio arXiv 2311.01616).

    FAD is taken of random subsets of the generated clips, whole clips without replacement, and averaged over subsets of
    a size; its regression on 1/n, with n frames, has the value as intercept, which may come out slightly negative. The
    reference is always whole, as in the papers: what its own finite size adds stays in, so let it be large.

    Details: embedding, frames (of reference and generated clips), seed, r_squared and slope of the regression, and
    smallest_subset, in frames. R² is near 1 where FAD depends on n at all, and means nothing where it hardly does.

    Undefined with fewer than 2 frames of reference, fewer than 2 · dim generated frames, or fewer than some 20
    generated clips. Raises ValueError for different widths.
    """
    from scipy.stats import linregress

    check_widths(reference, generated)
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
    line = linregress(inverse, distances)
    details['r_squared'] = float(line.rvalue**2) if np.ptp(distances) > 0 else 1.0
    details |= dict(slope=float(line.slope), smallest_subset=round(1 / inverse[0]))
    return MetricValue(float(line.intercept), details=details)


def _gaussian(statistics: GaussianStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, trace of the covariance, and a factor `(dim, dim)` of it, F Fᵀ."""
    covariance = statistics.covariance
    values, vectors = torch.linalg.eigh(covariance)
    # rounding may leave eigenvalues a little below zero
    return statistics.mean, covariance.trace(), vectors * values.clamp(min=0).sqrt()


def _distance(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> float:
    (a_mean, a_trace, a_factor), (b_mean, b_trace, b_factor) = a, b
    root = torch.linalg.svdvals(a_factor.T @ b_factor).sum()
    return max(0.0, ((a_mean - b_mean).square().sum() + a_trace + b_trace - 2 * root).item())


# ---- the kernel distance ----


class FrameReservoir:
    """A random sample of the frames of a stream, without replacement, in O(max_frames · dim) memory.

    Every frame is as likely as any other to be in the sample: it draws a number from (seed, index of the clip), and
    the frames with the smallest numbers stay. So the sample depends neither on the order of the clips nor on how they
    are sharded across processes.

    `dim` is the width of a frame, `max_frames` the size of the sample, and `seed` that of the draw.
    """

    @typechecked
    def __init__(self, dim: int, max_frames: int = 5000, seed: int = 0):
        check_positive(dim=dim, max_frames=max_frames)
        check_not_negative(seed=seed)
        self.dim, self.max_frames, self.seed = dim, max_frames, seed
        self._seen = self._held = 0
        # of each piece that was kept: the numbers drawn, the index of the clip, and the frames
        self._pieces = [(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dim))]
        self._bar = np.inf  # frames that draw more than this cannot stay

    def __len__(self) -> int:
        """Frames seen."""
        return self._seen

    @property
    def frames(self) -> Tensor:
        """The sample, `(min(frames seen, max_frames), dim)` float32."""
        return self._pruned()[2]

    @property
    def clips(self) -> Tensor:
        """The index of the clip that each of `frames` is of, `(min(frames seen, max_frames),)` int64."""
        return self._pruned()[1]

    @typechecked
    def update(self, frames: Tensor, clip: int) -> None:
        """As `ThinnedStatistics.update`."""
        check_frames(frames, self.dim)
        keys = torch.from_numpy(np.random.default_rng(clip_seed(self.seed, clip)).random(len(frames)))
        self._seen += len(frames)
        self._add(keys, torch.full((len(frames),), clip), frames.detach().to('cpu', torch.float32))

    @typechecked
    def merge(self, other: FrameReservoir) -> None:
        """Add what another has seen; the other stays as it is. Raises ValueError for another width, size or seed."""
        mine, theirs = ((it.dim, it.max_frames, it.seed) for it in (self, other))
        if mine != theirs:
            raise ValueError(f'reservoirs of one (dim, max_frames, seed) can be merged, got {mine} and {theirs}')
        self._seen += other._seen
        self._add(*other._pruned())

    def __getstate__(self) -> dict[str, Any]:
        """Without frames that cannot stay: this is what ranks send each other."""
        self._pruned()
        return self.__dict__

    def _add(self, keys: Tensor, clips: Tensor, frames: Tensor) -> None:
        low = keys < self._bar
        # late in a stream nearly all clips bring nothing, and would leave an empty tensor each
        if not low.any():
            return
        self._pieces.append((keys[low], clips[low], frames[low]))  # copies: no storage of a batch is kept alive
        self._held += int(low.sum())
        if self._held >= 2 * self.max_frames:
            self._pruned()

    def _pruned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those with the smallest numbers, in their order, so that the sample is the same whatever order it came in."""
        if len(self._pieces) > 1:
            keys, clips, frames = (torch.cat(it) for it in zip(*self._pieces))
            kept = keys.argsort()[: self.max_frames]
            self._pieces, self._held = [(keys[kept], clips[kept], frames[kept])], len(kept)
            if len(kept) == self.max_frames:
                self._bar = float(keys[kept[-1]])
        return self._pieces[0]


def median_distance(frames: Tensor, clips: Tensor) -> float:
    """The median of the Euclidean distances between frames `(n, d)` of different clips; of an even number the lower.

    `clips` `(n,)` int64 tells which clip each is of; there are 2 at least. Beyond `MEDIAN_FRAMES` frames, as many of
    them, evenly spread over the clips, stand for all, which bounds the memory.
    """
    if len(frames) > MEDIAN_FRAMES:
        # by clips, so that the first and the last are of different ones
        places = torch.linspace(0, len(frames) - 1, MEDIAN_FRAMES, dtype=torch.float64).round().long()
        places = clips.argsort(stable=True)[places]
        frames, clips = frames[places], clips[places]
    first, second = torch.triu_indices(len(frames), len(frames), offset=1)
    return torch.pdist(frames.double())[clips[first] != clips[second]].median().item()


def kernel_distance(
    reference: Tensor, generated: Tensor, bandwidth: float, *, reference_clips: Tensor, generated_clips: Tensor
) -> float:
    """The squared maximum mean discrepancy of two sets of frames, `(m, d)` and `(n, d)`, times 100; no unit.

    The kernel is exp(-|x - y|² / (2 bandwidth²)), and the factor of 100 is that of kadtk, the toolkit of the paper's
    authors. The estimate is unbiased (Gretton et al., 2012), so between sets of one kind it often lies below zero. It
    takes draws that know nothing of each other, and frames of one clip resemble each other: within a set, only frames
    of different clips are compared. Memory of O(ROWS · (m + n)).

    `reference_clips` `(m,)` and `generated_clips` `(n,)` int64 tell which clip of its set each frame is of, 2 at least.
    """
    # distances stay, but digits are saved where the frames lie far from zero
    centre = reference.double().mean(dim=0)
    x, y = reference.double() - centre, generated.double() - centre
    within = _mean_kernel(x, x, bandwidth, reference_clips) + _mean_kernel(y, y, bandwidth, generated_clips)
    return SCALE * (within - 2 * _mean_kernel(x, y, bandwidth))


def _mean_kernel(x: Tensor, y: Tensor, bandwidth: float, clips: Tensor | None = None) -> float:
    """Over all pairs, or those of different clips if `clips` tells them of the rows of both."""
    total, pairs, squares = 0.0, 0, y.square().sum(dim=1)
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS]
        distances = (rows @ y.T).mul_(-2).add_(rows.square().sum(dim=1, keepdim=True)).add_(squares)
        values = distances.div_(-2 * bandwidth**2).exp_()
        pairs += values.numel()
        if clips is not None:
            same = clips[start : start + ROWS, None] == clips
            values.masked_fill_(same, 0)
            pairs -= int(same.sum())
        total += values.sum().item()
    return total / pairs


@typechecked
def kernel_audio_distance(reference: FrameReservoir, generated: FrameReservoir, *, embedding: str = '') -> MetricValue:
    """KAD (arXiv 2502.15602) of the frames that two reservoirs hold; no assumption of Gaussians.

    It is unbiased, whatever the number of clips, and so may come out slightly negative.

    Details: embedding, frames (of reference and generated clips), sampled (how many of them were compared), clips (how
    many these are of), bandwidth, seed. Undefined with fewer than 2 clips on a side, and where at least half of the
    distances between frames of different reference clips are 0. Raises ValueError for different widths.
    """
    check_widths(reference, generated)
    details = dict(
        embedding=embedding,
        frames=(len(reference), len(generated)),
        sampled=(len(reference.frames), len(generated.frames)),
        clips=(len(reference.clips.unique()), len(generated.clips.unique())),
        seed=generated.seed,
    )
    if min(details['clips']) < 2:
        return undefined(
            'a kernel distance compares frames of different clips, so it needs at least 2 clips on each side, got '
            f'{details["clips"][0]} of reference and {details["clips"][1]} generated',
            **details,
        )
    bandwidth = median_distance(reference.frames, reference.clips)
    if bandwidth == 0:
        return undefined('most reference frames are alike, so their median distance gives no bandwidth', **details)
    clips = dict(reference_clips=reference.clips, generated_clips=generated.clips)
    value = kernel_distance(reference.frames, generated.frames, bandwidth, **clips)
    return MetricValue(value, details=details | dict(bandwidth=bandwidth))


# ---- as metrics ----


class EmbeddingDistance(Metric):
    """A distance of generated to reference clips, by the frames of an embedder."""

    needs_reference = True
    gathered_as: type  # what the frames of a side are gathered as

    @typechecked
    def __init__(self, embedder: Embedder, seed: int = 0):
        self.embedder, self.embedders, self.seed = embedder, (embedder,), seed
        super().__init__()

    def initial_state(self) -> dict[str, Any]:
        return {side: self.gathered_as(self.embedder.dim, seed=self.seed) for side in ('generated', 'reference')}

    def update(self, clip: EvaluationClip) -> None:
        if self.embedder.name in clip.frames:
            side = 'reference' if clip.is_reference else 'generated'
            self.state[side].update(clip.frames[self.embedder.name], clip.index)


class FrechetAudioDistance(EmbeddingDistance):
    """`frechet_audio_distance` and `frechet_infinity`, each by the name of the embedder."""

    gathered_as = ThinnedStatistics

    def compute(self) -> dict[str, dict[str, MetricValue]]:
        name, reference, generated = self.embedder.name, self.state['reference'].total(), self.state['generated']
        return dict(
            frechet_audio_distance={name: frechet_audio_distance(reference, generated.total(), embedding=name)},
            frechet_infinity={name: frechet_infinity(reference, generated, embedding=name)},
        )


class KernelAudioDistance(EmbeddingDistance):
    """`kernel_audio_distance`, by the name of the embedder."""

    gathered_as = FrameReservoir

    def compute(self) -> dict[str, dict[str, MetricValue]]:
        name = self.embedder.name
        distance = kernel_audio_distance(self.state['reference'], self.state['generated'], embedding=name)
        return dict(kernel_audio_distance={name: distance})


# ---- what they share ----


def check_widths(a: Any, b: Any) -> None:
    if a.dim != b.dim:
        raise ValueError(f'the frames of both sides must come from one embedding, got widths {a.dim} and {b.dim}')


def too_few_frames(reference: int, generated: int) -> str:
    """Why a distance is not defined, or ''."""
    reason = f'a distance needs at least 2 frames on each side, got {reference} of reference and {generated} generated'
    return reason if min(reference, generated) < 2 else ''


def check_frames(frames: Tensor, dim: int) -> None:
    """Raise ValueError unless frames have shape `(n, dim)` and are finite, TypeError unless they are floats."""
    if not frames.is_floating_point():
        raise TypeError(f'frames must be floats, got {frames.dtype}')
    if frames.ndim != 2 or frames.shape[1] != dim:
        raise ValueError(f'frames must have shape (n, {dim}), got {tuple(frames.shape)}')
    if not is_finite(frames):
        raise ValueError('frames hold NaN or infinity')


def clip_seed(seed: int, clip: int) -> np.random.SeedSequence:
    """What the random numbers of a clip come from. Raises ValueError for a negative index."""
    check_not_negative(clip=clip)
    return np.random.SeedSequence((seed, clip))
