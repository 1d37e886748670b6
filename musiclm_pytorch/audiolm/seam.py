"""Where music that was given goes over into music that was made."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

FADE = 0.04  # seconds in which the one goes and the other comes
LEVEL = 1.0  # seconds on either side whose loudness is compared
MOST_GAIN = 6.0  # dB above or below that of all the given samples, so that what follows a fade-out is heard
# seconds of the part before that the first windows of a story's next part see: more carries the old prompt on,
# without any the music breaks off
CHANGE = 0.2
CHANGE_GUIDANCE = 2.0  # times as much guidance of the semantic stage there
# seconds in which what came in as loud as what was before finds its own loudness, where it does
SETTLE = 3.0
SILENT = 1e-4  # root mean square, -80 dB of full scale: too soft to tell a level


def join(given: Tensor, made: Tensor, sample_rate: int, *, fade: float = FADE, settle: float | None = None) -> Tensor:
    """The given samples, and from their end on those that were made.

    given: (n,) samples; made: (..., m) samples, of which the first n stand for the given ones, n ≤ m as a rule.
    The last `fade` seconds of the given samples are crossfaded, at equal power, for the phases of a codec are not those
    of its input; all before is as it was given. What was made comes as loud as the last second of the given samples,
    within 6 dB of what would make it as loud as all of them, and not above full scale. It stays so, or finds its own
    loudness within `settle` seconds.

    Returns (..., m).
    """
    given = given[: made.shape[-1]]
    known, rest = len(given), made.shape[-1] - len(given)
    if rest == 0:
        return given.expand_as(made).clone()
    whole = gain_to(given, made[..., known:])
    span = min(round(LEVEL * sample_rate), known, rest)
    most = 10 ** (MOST_GAIN / 20)
    gain = gain_to(given[known - span :], made[..., known : known + span]).clamp(whole / most, whole * most)
    room = 1 / made[..., known:].abs().amax(dim=-1).clamp(min=SILENT, max=1)  # up to full scale
    gain = torch.minimum(gain, room)[..., None]
    if settle is not None:
        after = torch.arange(made.shape[-1], device=made.device) - known
        gain = gain ** (1 - after / (settle * sample_rate)).clamp(0, 1)
    made = made * gain

    fade = min(round(fade * sample_rate), known)
    angle = torch.linspace(0, math.pi / 2, fade, device=made.device)
    crossed = given[known - fade :] * angle.cos() + made[..., known - fade : known] * angle.sin()
    before = given[: known - fade].expand(*made.shape[:-1], -1)
    return torch.cat((before, crossed, made[..., known:]), dim=-1)


def gain_to(given: Tensor, made: Tensor) -> Tensor:
    """What makes (..., m) as loud as (n,), (...,); 1 where either is silent."""
    ours, theirs = (it.square().mean(dim=-1).sqrt() for it in (given, made))
    return torch.where((ours > SILENT) & (theirs > SILENT), ours / theirs.clamp(min=SILENT), 1.0)


def steps_in(seconds: float, rate: Fraction) -> int:
    """Tokens or frames in so short a time, one at least."""
    return max(1, round(seconds * rate))
