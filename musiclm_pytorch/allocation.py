"""A bound on what is allocated while a model is built of what a file says. Imports nothing from the package."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SPARE = 2**23  # elements beside the weights, 32 MB of float32: windows, filters, tables
SPARE_TENSORS = 2000


class AllocationLimit(TorchDispatchMode):
    """Within this context, tensors are made as far as weights of these sizes need: `SPARE` elements more at most.

    What a size would take is computed on the meta device, before anything is allocated. The number of tensors made is
    bounded too, so that a depth of some millions does not run for hours.

    Args:
        sizes: elements of each tensor among the weights.

    Raises:
        ValueError: where a tensor would go beyond.
    """

    def __init__(self, sizes: Iterable[int]):
        super().__init__()
        sizes = [*sizes]
        self.elements = sum(sizes) + SPARE
        self.largest = max(sizes, default=0) + SPARE
        self.tensors = 8 * len(sizes) + SPARE_TENSORS
        self.weights = f'the weights beside it, {len(sizes)} tensors of {sum(sizes)} numbers'

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, to keep it out of here

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable or func.is_view:
            return func(*args, **kwargs)
        given = [it for it in tree_leaves((args, kwargs)) if isinstance(it, Tensor)]
        device = torch.device(kwargs.get('device') or 'cpu') if not given else given[0].device
        if device.type == 'meta' or (given and _gives_little(given, args)):
            return func(*args, **kwargs)
        is_new = not given and any(it.name == 'device' for it in schema.arguments)
        for size in _sizes(func, args, kwargs, is_new):
            if size > self.largest:
                raise ValueError(f'it asks for a tensor of {size} numbers, far more than {self.weights}')
            if is_new:
                self.elements -= size
        if is_new:
            self.tensors -= 1
        if self.elements < 0 or self.tensors < 0:
            raise ValueError(f'it asks for a model far larger than {self.weights}')
        return func(*args, **kwargs)


def _gives_little(tensors: list[Tensor], args: tuple) -> bool:
    """Whether what comes of tensors without further sizes must be small: no call gives more than all their products."""
    return (
        not any(isinstance(it, (int, list)) for it in args) and math.prod(max(1, it.numel()) for it in tensors) < SPARE
    )


def _sizes(func: Any, args: tuple, kwargs: dict[str, Any], is_new: bool) -> list[int]:
    """Elements of each tensor that a call gives.

    The meta device tells, except for calls that it computes in Python, behind torch's compiler: its import would cost
    seconds and 150 MB.
    """
    names = [it.name for it in func._schema.arguments]
    if is_new:
        if func.overloadpacket is torch.ops.aten.arange:
            start, stop, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
            return [max(0, math.ceil((stop - start) / step))] if step else []  # the call itself says what is wrong
        told = [it for it, name in zip(args, names) if name in ('size', 'window_length', 'steps')]
        if told and all(isinstance(it, int) and it >= 0 for it in tree_leaves(told)):
            return [math.prod(tree_leaves(told))]
        kwargs = {**kwargs, 'device': 'meta', 'pin_memory': None}
    elif torch.Tag.dynamic_output_shape in func.tags or 'keepdim' in names:
        return []  # what depends on values, and what reduces them, is no larger than they are
    elif func.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.stack):
        return [sum(it.numel() for it in args[0])]
    elif func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.mv):
        return [len(args[0]) * math.prod(args[1].shape[1:])]
    elif torch.Tag.pointwise in func.tags:
        shapes = [it.shape[::-1] for it in tree_leaves((args, kwargs)) if isinstance(it, Tensor)]
        return [math.prod(map(max, zip_longest(*shapes, fillvalue=1)))]  # broadcast
    else:
        args, kwargs = tree_map_only(Tensor, _like, (args, kwargs))
    try:
        found = func(*args, **kwargs)
    except NotImplementedError:
        return []
    except RuntimeError as error:
        if is_new:
            numbers = [it for it in tree_leaves(args) if isinstance(it, (int, float))]
            raise ValueError(f'it asks for a tensor that cannot be, of sizes {numbers}') from error
        return []  # the call itself says what is wrong
    return [it.numel() for it in tree_leaves(found) if isinstance(it, Tensor)]


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device='meta')
