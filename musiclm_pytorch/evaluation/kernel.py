"""The kernel audio distance, KAD (arXiv 2502.15602): no assumption of Gaussians, and no bias by the number of clips."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.evaluation.figures import Figure, undefined
from musiclm_pytorch.evaluation.frechet import check_frames, check_seed, clip_seed, too_few_frames

SCALE = 100.0
ROWS = 512  # of a matrix of pairs, held at a time
MEDIAN_FRAMES = 2000  # that the bandwidth is found from at most


class FrameReservoir:
    """A random sample of the frames of a stream, without replacement, in O(max_frames · dim) memory.

    Every frame is as likely as any other to be in the sample: it draws a number from (seed, index of the clip), and
    the frames with the smallest numbers stay. So the sample depends neither on the order of the clips nor on how they
    are dealt to processes.

    Args:
        dim: width of a frame.
        max_frames: size of the sample; fewer frames are kept whole.
        seed: of the draw.
    """

    @typechecked
    def __init__(self, dim: int, max_frames: int = 5000, seed: int = 0):
        check_positive(dim=dim, max_frames=max_frames)
        check_seed(seed)
        self.dim, self.max_frames, self.seed = dim, max_frames, seed
        self._seen = 0
        self._keys = [torch.zeros(0, dtype=torch.float64)]
        self._frames = [torch.zeros(0, dim)]
        self._held = 0
        self._bar = np.inf  # frames that draw more than this cannot stay

    def __len__(self) -> int:
        """Frames seen."""
        return self._seen

    @property
    def frames(self) -> Tensor:
        """The sample, `(min(frames seen, max_frames), dim)` float32."""
        self._prune()
        return self._frames[0]

    @typechecked
    def update(self, frames: Tensor, clip: int) -> None:
        """Add the frames `(n, dim)` of a clip; `clip` is its index in the whole set, the same whichever rank has it.

        Raises ValueError for another shape, NaN, infinity or a negative index, TypeError for integers.
        """
        check_frames(frames, self.dim)
        keys = torch.from_numpy(np.random.default_rng(clip_seed(self.seed, clip)).random(len(frames)))
        self._add(len(frames), keys, frames.detach().to('cpu', torch.float32))

    @typechecked
    def merge(self, other: FrameReservoir) -> None:
        """Add what another has seen; the other stays as it is. Raises ValueError for another width, size or seed."""
        mine, theirs = ((it.dim, it.max_frames, it.seed) for it in (self, other))
        if mine != theirs:
            raise ValueError(f'reservoirs of one (dim, max_frames, seed) can be merged, got {mine} and {theirs}')
        self._add(*other.to_tensors())

    def to_tensors(self) -> tuple[int, Tensor, Tensor]:
        """Frames seen, drawn numbers `(k,)` float64 and sample `(k, dim)` float32, for ranks to gather as objects."""
        self._prune()
        return self._seen, self._keys[0], self._frames[0]

    @classmethod
    @typechecked
    def from_tensors(
        cls, seen: int, keys: Tensor, frames: Tensor, max_frames: int = 5000, seed: int = 0
    ) -> FrameReservoir:
        """A reservoir as `to_tensors` gave it; `max_frames` and `seed` must be its own."""
        if frames.ndim != 2 or keys.shape != (len(frames),) or seen < len(frames):
            raise ValueError(
                f'expected keys (k,) and frames (k, dim) of at least k frames seen, got {tuple(keys.shape)}, '
                f'{tuple(frames.shape)} and {seen}'
            )
        reservoir = cls(frames.shape[1], max_frames, seed)
        reservoir._add(seen, keys, frames)
        return reservoir

    def _add(self, seen: int, keys: Tensor, frames: Tensor) -> None:
        self._seen += seen
        low = keys < self._bar
        # late in a stream nearly all clips bring nothing, and would leave an empty tensor each
        if not low.any():
            return
        self._keys.append(keys[low])
        self._frames.append(frames[low])  # a copy, so that no storage of a batch is kept alive
        self._held += int(low.sum())
        if self._held >= 2 * self.max_frames:
            self._prune()

    def _prune(self) -> None:
        """Keep the smallest numbers, in their order, so that the sample is the same whatever order it came in."""
        if len(self._keys) == 1:
            return
        keys, frames = torch.cat(self._keys), torch.cat(self._frames)
        kept = keys.argsort()[: self.max_frames]
        self._keys, self._frames, self._held = [keys[kept]], [frames[kept]], len(kept)
        if len(kept) == self.max_frames:
            self._bar = float(self._keys[0][-1])


@typechecked
def median_distance(frames: Tensor) -> float:
    """The median of the Euclidean distances between different frames of `(n, d)`; of an even number the lower one.

    Beyond `MEDIAN_FRAMES` frames, as many of them, evenly spread, stand for all, which bounds the memory. Raises
    ValueError with fewer than 2 frames.
    """
    if len(frames) < 2:
        raise ValueError(f'a distance needs at least 2 frames, got {len(frames)}')
    if len(frames) > MEDIAN_FRAMES:
        frames = frames[torch.linspace(0, len(frames) - 1, MEDIAN_FRAMES, dtype=torch.float64).round().long()]
    return torch.pdist(frames.double()).median().item()


@typechecked
def kernel_distance(reference: Tensor, generated: Tensor, bandwidth: float | None = None) -> float:
    """The squared maximum mean discrepancy of two sets of frames, `(m, d)` and `(n, d)`, times 100; no unit.

    The kernel is exp(-|x - y|² / (2 bandwidth²)), with the median distance between different reference frames as the
    default bandwidth, and the factor of 100 is that of kadtk, the toolkit of the paper's authors. The estimate is
    unbiased (Gretton et al., 2012), so between sets of one kind it often lies below zero. Memory of O(ROWS · (m + n)).

    Raises:
        ValueError: fewer than 2 frames on a side, different widths, NaN or infinity, a bandwidth of 0.
    """
    if reason := too_few_frames(len(reference), len(generated)):
        raise ValueError(reason)
    for frames in (reference, generated):
        check_frames(frames, reference.shape[-1])
    bandwidth = median_distance(reference) if bandwidth is None else bandwidth
    check_positive(bandwidth=bandwidth)
    # distances stay, but digits are saved where the frames lie far from zero
    centre = reference.double().mean(dim=0)
    x, y = reference.double() - centre, generated.double() - centre
    m, n = len(x), len(y)
    # the kernel of a frame with itself is 1 and left out
    within_x = (_kernel_sum(x, x, bandwidth) - m) / (m * (m - 1))
    within_y = (_kernel_sum(y, y, bandwidth) - n) / (n * (n - 1))
    across = _kernel_sum(x, y, bandwidth) / (m * n)
    return SCALE * (within_x + within_y - 2 * across)


def _kernel_sum(x: Tensor, y: Tensor, bandwidth: float) -> float:
    total, squares = 0.0, y.square().sum(dim=1)
    for rows in x.split(ROWS):
        distances = (rows @ y.T).mul_(-2).add_(rows.square().sum(dim=1, keepdim=True)).add_(squares)
        total += distances.div_(-2 * bandwidth**2).exp_().sum().item()
    return total


@typechecked
def kernel_audio_distance(reference: FrameReservoir, generated: FrameReservoir, *, embedding: str = '') -> Figure:
    """KAD of the frames that two reservoirs hold. It is unbiased, and so may come out slightly negative.

    Details: embedding, frames (of reference and generated clips), sampled (how many of them were compared), bandwidth,
    seed. Undefined with fewer than 2 frames on a side, and where at least half of the reference frames' distances
    are 0. Raises ValueError for different widths.
    """
    if reference.dim != generated.dim:
        raise ValueError(
            f'the frames of both sides must come from one embedding, got widths {reference.dim} and {generated.dim}'
        )
    x, y = reference.frames, generated.frames
    details = dict(
        embedding=embedding,
        frames=(len(reference), len(generated)),
        sampled=(len(x), len(y)),
        seed=generated.seed,
    )
    if reason := too_few_frames(len(x), len(y)):
        return undefined(reason, **details)
    bandwidth = median_distance(x)
    if bandwidth == 0:
        return undefined('most reference frames are alike, so their median distance gives no bandwidth', **details)
    return Figure(kernel_distance(x, y, bandwidth), details=details | dict(bandwidth=bandwidth))
