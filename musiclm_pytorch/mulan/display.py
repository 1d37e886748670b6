"""What a model is, in a few lines: for the `repr` of what holds one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def indented(value: Any) -> str:
    """The `repr` of a part, inside that of a whole."""
    return repr(value).replace('\n', '\n  ')


def size_of(module: nn.Module) -> str:
    """How many weights a module has, of what type and where: '1.6M float32 weights on cpu'."""
    weights = _weights_of(module)
    kinds = {str(it.dtype).removeprefix('torch.') for it in weights if it.is_floating_point()}
    places = {str(it.device) for it in weights}
    return f'{count_of(module)} {"/".join(sorted(kinds))} weights on {"/".join(sorted(places))}'


def count_of(module: nn.Module) -> str:
    """The number of its weights: '1.6M'."""
    count = sum(it.numel() for it in _weights_of(module))
    scale, unit = next((it for it in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')) if count >= it[0]), (1, ''))
    return f'{count / scale:.3g}{unit}'


def _weights_of(module: nn.Module) -> list[Tensor]:
    """Parameters, or what was fitted where nothing is trained. `parameters()` of a quantizer are not all of them."""
    return [it for _, it in module.named_parameters()] or [it for _, it in module.named_buffers()]
