"""Learning rates as plain functions of the step, so that there is no schedule state to save or to lose."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, lr: float, schedule: str, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.0
) -> float:
    """The learning rate of the step with that index, from 0.

    A linear warm-up reaches `lr` after `warmup_steps`; then it stays, or falls to `lr * min_lr_ratio` at the end, in
    a line or along half a cosine (arXiv 1608.03983). A run shorter than its warm-up warms up over its first tenth.
    """
    if warmup_steps >= total_steps:
        warmup_steps = total_steps // 10
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == 'constant':
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 1 - progress if schedule == 'linear' else (1 + math.cos(math.pi * progress)) / 2
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * remaining)
