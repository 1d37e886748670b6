"""What the measurements of single clips share: checking a clip, hearing silence, and the mean over clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from musiclm_pytorch.checks import check_audio, check_finite, check_sample_rate
from musiclm_pytorch.evaluation.figures import Figure, mean_figure

# a frame is silent if what is left of it without its mean (a constant is not heard) is below this, in dB of full scale
SILENCE, FRAME_SECONDS = -60.0, 0.05
SILENT = 'the clip is silent'


def check_clip(wave: Tensor, sample_rate: int) -> np.ndarray:
    """Give a clip back as `(samples,)` float64.

    Raises TypeError for anything but a floating-point tensor and an int, ValueError for a wrong rank, no samples, NaN,
    infinity, or a rate that is not above 0.
    """
    check_audio(wave, ndim=1, shape='(samples,)', name='wave')
    check_sample_rate(sample_rate)
    if len(wave) == 0:
        raise ValueError('wave has no samples; leave empty clips out')
    check_finite(wave[None], 'wave holds NaN or infinity; leave failed clips out')
    return wave.detach().cpu().double().numpy()


def silence_share(samples: np.ndarray, rate: int) -> float:
    """Share of `(samples,)` in silent frames, of 50 ms one after the other; the last one may be shorter."""
    size = max(1, round(FRAME_SECONDS * rate))
    whole = len(samples) // size * size
    levels = samples[:whole].reshape(-1, size).std(axis=1)
    silent = size * np.count_nonzero(levels < 10 ** (SILENCE / 20))
    rest = samples[whole:]
    if len(rest) and rest.std() < 10 ** (SILENCE / 20):
        silent += len(rest)
    return silent / len(samples)


def mean_of_clips(clips: Sequence[Mapping[str, Figure]], *, seed: int = 0) -> dict[str, Figure]:
    """The mean over clips of each figure of theirs, with its bootstrap interval.

    Clips without a value are left out of that mean, and counted in the detail 'left_out'. If none has a value, the
    reason is that of most clips. Raises ValueError for no clips, or clips with other figures.
    """
    if not clips:
        raise ValueError('no clips to summarise; pass one at least')
    names = list(clips[0])
    for i, clip in enumerate(clips):
        if list(clip) != names:
            raise ValueError(f'clip {i} has the figures {list(clip)}, but clip 0 has {names}')
    found = {}
    for name in names:
        figures = [clip[name] for clip in clips]
        values = [np.nan if it.value is None else it.value for it in figures]
        reasons = Counter(it.reason for it in figures if it.value is None)
        missing = reasons.most_common(1)[0][0] if reasons else ''
        unit = next((it.unit for it in figures if it.value is not None), '')
        found[name] = mean_figure(values, unit=unit, seed=seed, missing=missing)
    return found
