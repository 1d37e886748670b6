"""Parameters, gradients and optimizer states shared out over processes (FSDP2: torch's `fully_shard`).

Accelerate's own FSDP plugin is passed over: Accelerate 1.15 ignores it for processes on CPUs, and what it prepares can
be called by its forward pass alone, whereas a contrast in parts (GradCache) needs latents and loss apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(step_module: nn.Module, layers: list[nn.Module], device_type: str) -> nn.Module:
    """Shard a module in place over the default process group; each of `layers` is gathered when it runs."""
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(step_module, mesh=mesh)


def gathered(tree: Any) -> Any:
    """A state dict with whole tensors in place of shards. Every process has to call it."""
    if isinstance(tree, DTensor):
        return tree.detach().full_tensor()
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value) for value in tree)
    return tree


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a tensor that belongs to a sharded parameter; anything else as it is."""
    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    whole = whole.to(parameter.device)
    # every process has read the same file, so nothing has to be sent
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard_model_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Whole weights as shards for `model.load_state_dict`."""
    own = model.state_dict()
    return {name: shard_like(tensor, own[name]) if name in own else tensor for name, tensor in state.items()}


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole optimizer state as shards for `optimizer.load_state_dict`."""
    # a state dict numbers them in this order
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    shards = {
        number: {
            name: shard_like(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state['state'].items()
    }
    return state | dict(state=shards)
