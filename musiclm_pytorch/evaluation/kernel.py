"""The kernel audio distance, KAD (arXiv 2502.15602): no assumption of Gaussians, and no bias by the number of clips."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.evaluation.figures import Figure, undefined
from musiclm_pytorch.evaluation.frechet import check_frames, check_seed, clip_seed

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
        self._clips = [torch.zeros(0, dtype=torch.int64)]
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

    @property
    def clips(self) -> Tensor:
        """The index of the clip that each of `frames` is of, `(min(frames seen, max_frames),)` int64."""
        self._prune()
        return self._clips[0]

    @typechecked
    def update(self, frames: Tensor, clip: int) -> None:
        """Add the frames `(n, dim)` of a clip; `clip` is its index in the whole set, the same whichever rank has it.

        Raises ValueError for another shape, NaN, infinity or a negative index, TypeError for integers.
        """
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
        other._prune()
        self._seen += other._seen
        self._add(other._keys[0], other._clips[0], other._frames[0])

    def __getstate__(self) -> dict[str, Any]:
        """Without frames that cannot stay: this is what ranks send each other."""
        self._prune()
        return self.__dict__

    def _add(self, keys: Tensor, clips: Tensor, frames: Tensor) -> None:
        low = keys < self._bar
        # late in a stream nearly all clips bring nothing, and would leave an empty tensor each
        if not low.any():
            return
        self._keys.append(keys[low])
        self._clips.append(clips[low])
        self._frames.append(frames[low])  # a copy, so that no storage of a batch is kept alive
        self._held += int(low.sum())
        if self._held >= 2 * self.max_frames:
            self._prune()

    def _prune(self) -> None:
        """Keep the smallest numbers, in their order, so that the sample is the same whatever order it came in."""
        if len(self._keys) == 1:
            return
        keys, clips, frames = (torch.cat(it) for it in (self._keys, self._clips, self._frames))
        kept = keys.argsort()[: self.max_frames]
        self._keys, self._clips, self._frames, self._held = [keys[kept]], [clips[kept]], [frames[kept]], len(kept)
        if len(kept) == self.max_frames:
            self._bar = float(self._keys[0][-1])


@typechecked
def median_distance(frames: Tensor, clips: Tensor | None = None) -> float:
    """The median of the Euclidean distances between frames `(n, d)` of different clips; of an even number the lower.

    Beyond `MEDIAN_FRAMES` frames, as many of them, evenly spread over the clips, stand for all, which bounds the
    memory.

    Args:
        frames: `(n, d)`.
        clips: `(n,)` int64, which clip each is of; without, each is one of its own.

    Raises ValueError with fewer than 2 clips.
    """
    clips = check_clips(frames, clips, 'clips')
    if (number := len(clips.unique())) < 2:
        raise ValueError(f'a distance needs frames of at least 2 clips, got {number}')
    if len(frames) > MEDIAN_FRAMES:
        # by clips, so that the first and the last are of different ones
        places = torch.linspace(0, len(frames) - 1, MEDIAN_FRAMES, dtype=torch.float64).round().long()
        places = clips.argsort(stable=True)[places]
        frames, clips = frames[places], clips[places]
    first, second = torch.triu_indices(len(frames), len(frames), offset=1)
    return torch.pdist(frames.double())[clips[first] != clips[second]].median().item()


@typechecked
def kernel_distance(
    reference: Tensor,
    generated: Tensor,
    bandwidth: float | None = None,
    *,
    reference_clips: Tensor | None = None,
    generated_clips: Tensor | None = None,
) -> float:
    """The squared maximum mean discrepancy of two sets of frames, `(m, d)` and `(n, d)`, times 100; no unit.

    The kernel is exp(-|x - y|² / (2 bandwidth²)), with the median distance between reference frames of different clips
    as the default bandwidth, and the factor of 100 is that of kadtk, the toolkit of the paper's authors. The estimate
    is unbiased (Gretton et al., 2012), so between sets of one kind it often lies below zero. It takes draws that know
    nothing of each other, and frames of one clip resemble each other: within a set, only frames of different clips are
    compared. Memory of O(ROWS · (m + n)).

    Args:
        reference, generated: frames.
        bandwidth: in units of the frames.
        reference_clips, generated_clips: `(m,)` and `(n,)` int64, which clip of its set each frame is of; without, each
            is one of its own.

    Raises:
        ValueError: fewer than 2 clips on a side, different widths, NaN or infinity, a bandwidth of 0.
    """
    for frames in (reference, generated):
        check_frames(frames, reference.shape[-1])
    reference_clips = check_clips(reference, reference_clips, 'reference_clips')
    generated_clips = check_clips(generated, generated_clips, 'generated_clips')
    if reason := too_few_clips(reference_clips, generated_clips):
        raise ValueError(reason)
    bandwidth = median_distance(reference, reference_clips) if bandwidth is None else bandwidth
    check_positive(bandwidth=bandwidth)
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
def kernel_audio_distance(reference: FrameReservoir, generated: FrameReservoir, *, embedding: str = '') -> Figure:
    """KAD of the frames that two reservoirs hold. It is unbiased, and so may come out slightly negative.

    Details: embedding, frames (of reference and generated clips), sampled (how many of them were compared), clips (how
    many these are of), bandwidth, seed. Undefined with fewer than 2 clips on a side, and where at least half of the
    distances between frames of different reference clips are 0. Raises ValueError for different widths.
    """
    if reference.dim != generated.dim:
        raise ValueError(
            f'the frames of both sides must come from one embedding, got widths {reference.dim} and {generated.dim}'
        )
    details = dict(
        embedding=embedding,
        frames=(len(reference), len(generated)),
        sampled=(len(reference.frames), len(generated.frames)),
        clips=(len(reference.clips.unique()), len(generated.clips.unique())),
        seed=generated.seed,
    )
    if reason := too_few_clips(reference.clips, generated.clips):
        return undefined(reason, **details)
    bandwidth = median_distance(reference.frames, reference.clips)
    if bandwidth == 0:
        return undefined('most reference frames are alike, so their median distance gives no bandwidth', **details)
    value = kernel_distance(
        reference.frames,
        generated.frames,
        bandwidth,
        reference_clips=reference.clips,
        generated_clips=generated.clips,
    )
    return Figure(value, details=details | dict(bandwidth=bandwidth))


def too_few_clips(reference: Tensor, generated: Tensor) -> str:
    """Why a distance between frames of these clips is not defined, or ''."""
    counts = len(reference.unique()), len(generated.unique())
    if min(counts) >= 2:
        return ''
    return (
        'a kernel distance compares frames of different clips, so it needs at least 2 clips on each side, got '
        f'{counts[0]} of reference and {counts[1]} generated'
    )


def check_clips(frames: Tensor, clips: Tensor | None, name: str) -> Tensor:
    """Which clip each frame is of, `(n,)`; raises ValueError for another shape."""
    if clips is None:
        return torch.arange(len(frames))
    if clips.shape != (len(frames),):
        raise ValueError(f'{name} must have shape ({len(frames)},), a clip a frame, got {tuple(clips.shape)}')
    return clips
