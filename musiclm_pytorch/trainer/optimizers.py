"""Optimizers by name, with weight decay where it belongs, and learning rates as plain functions of the step, so that
there is no schedule state to save or to lose."""

from __future__ import annotations

import math

import torch
from lion_pytorch import Lion
from torch import nn
from torch.nn.utils import parametrize


def build_optimizer(
    name: str, model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """An optimizer of what a model trains; matrices of linear layers alone are decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError('the model has no parameter that requires a gradient: there is nothing to train')
    decayed = {id(p) for module in model.modules() if isinstance(module, nn.Linear) for p in matrices_of(module)}
    groups = [
        dict(params=[p for p in parameters if id(p) in decayed], weight_decay=weight_decay),
        dict(params=[p for p in parameters if id(p) not in decayed], weight_decay=0.0),
    ]
    groups = [group for group in groups if group['params']]
    if name == 'lion':
        return Lion(groups, lr=lr, betas=betas)
    # Adam with a decay adds it to the gradient, where the second moment divides it away: AdamW is meant
    kind = torch.optim.AdamW if name == 'adamw' or weight_decay > 0 else torch.optim.Adam
    # one pass over each weight and its moments instead of ten
    return kind(groups, lr=lr, betas=betas, fused=True)


def matrices_of(layer: nn.Linear) -> list[nn.Parameter]:
    """The parameters that a layer's weight is made of: itself, or those of adapters and what these adapt."""
    if parametrize.is_parametrized(layer, 'weight'):
        return list(layer.parametrizations.weight.parameters())
    return [layer.weight]


def trained_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the weights that an optimizer trains, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group['params']]


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
