"""Optimizers by name, with weight decay where it belongs, and learning rates as plain functions of the step, so that
there is no schedule state to save or to lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lion_pytorch import Lion
from torch import nn
from torch.nn.utils import parametrize

# what no other optimizer keeps of a weight, by the names of those that do; looked for in this order
STATISTICS = {'momentum_buffer': ('muon',), 'exp_avg_sq': ('adam', 'adamw'), 'exp_avg': ('lion',)}


def build_optimizer(
    name: str, model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """An optimizer of what a model trains; matrices of linear layers alone are decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError('the model has no parameter that requires a gradient: there is nothing to train')
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    decayed = {id(p) for module in linear.values() for p in matrices_of(module)}
    if name == 'muon':
        # what tells tokens apart has a row for each of them, as embeddings have
        hidden = {id(p) for name, it in linear.items() if 'logits' not in name for p in matrices_of(it)}
        if not any(id(p) in hidden for p in parameters):
            raise ValueError("optimizer='muon' is for the matrices of linear layers, and none is trained; use 'adamw'")
        groups = [
            dict(params=[p for p in parameters if id(p) in hidden], weight_decay=weight_decay),
            dict(params=[p for p in parameters if id(p) in decayed - hidden], weight_decay=weight_decay),
            dict(params=[p for p in parameters if id(p) not in decayed], weight_decay=0.0),
        ]
        return MuonAndAdamW(groups[0], [it for it in groups[1:] if it['params']], lr=lr, betas=betas)
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


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) for matrices, AdamW for the rest, as one optimizer.

    Muon makes the singular values of a matrix's momentum alike, so that a step moves it in all of its directions. Steps
    are as large as AdamW's (arXiv 2502.16982, section 2.2), and one learning rate is for both.
    """

    def __init__(self, matrices: dict[str, Any], rest: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]):
        self.parts = [torch.optim.Muon([matrices], lr=lr, adjust_lr_fn='match_rms_adamw')]
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=lr, betas=betas, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Have the parts work on the groups and statistics of the whole."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def optimizers_of(statistics: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    """The names of the optimizers that keep such statistics of weights; none of none."""
    kept = set().union(*statistics)
    return next((names for key, names in STATISTICS.items() if key in kept), ())


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
