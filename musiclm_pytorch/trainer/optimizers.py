"""Optimizers by name, with weight decay where it belongs."""

from __future__ import annotations

import torch
from lion_pytorch import Lion
from torch import nn


def build_optimizer(
    name: str, model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """An optimizer of what a model trains; matrices of linear layers alone are decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError('the model has no parameter that requires a gradient: there is nothing to train')
    decayed = {id(p) for module in model.modules() if isinstance(module, nn.Linear) for p in [module.weight]}
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
