"""Parameters, gradients and optimizer states shared out over processes (FSDP2: torch's `fully_shard`).

Accelerate's own FSDP plugin is passed over: Accelerate 1.15 ignores it for processes on CPUs, and what it prepares can
be called by its forward pass alone, whereas a contrast in parts (GradCache) needs latents and loss apart.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from musiclm_pytorch.collectives import world_size


class Sharing:
    """The part of a trainer whose model may be shared out.

    Attributes:
        sharded: whether it is; then what is trained is a copy.
        whole_model: the one that is not, which is given the weights for each validation and checkpoint, and at the end.
    """

    sharded = False
    whole_model: nn.Module

    def parts_to_shard(self) -> list[nn.Module | list[nn.Module]]:
        """What is gathered when it runs: modules, or several that are gathered together; the rest is at each step."""
        raise NotImplementedError

    def distribute(self, step_module: nn.Module) -> nn.Module:
        if not self.sharded:
            return super().distribute(step_module)
        return shard(step_module, self.parts_to_shard(), self.device.type)

    def clip_gradients(self) -> float:
        if not self.sharded:
            return super().clip_gradients()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        return float(gathered(norm))

    @property
    def evaluated_model(self) -> nn.Module:
        return self.whole_model if self.sharded else super().evaluated_model

    def refresh_whole_model(self) -> None:
        """Give the model that is not sharded the weights of the one that is. Every process has to call it."""
        if self.sharded:
            whole = self.whole_model.to(self.device)
            whole.load_state_dict(whole_shapes(gathered(self.model.state_dict()), whole.state_dict()))

    def run_validation(self) -> dict[str, Any]:
        self.refresh_whole_model()
        return super().run_validation()

    def train(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        results = super().train(*arguments, **keywords)
        self.refresh_whole_model()
        if world_size() > 1:
            # gloo's threads let go of the last tensors under Python's lock; a program that ends right here would take
            # its process group apart under that lock, and wait for these threads for ever (seen with torch 2.11)
            time.sleep(0.1)
        return results

    # a sharded run writes and reads the same files as any other

    def state(self) -> dict[str, Any]:
        state = super().state()
        if not self.sharded:
            return state
        self.refresh_whole_model()
        state = gathered(state | dict(model=self.whole_model.state_dict()))
        whole = dict(self.whole_model.named_parameters())
        for index, name in enumerate(state['trained']):
            if (moments := state['optimizer']['state'].get(index)) is not None:
                moments |= whole_shapes(moments, dict.fromkeys(moments.keys() - {'step'}, whole[name]))
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        if self.sharded:
            shards = dict(
                model=shard_model_state(state['model'], self.model),
                optimizer=shard_optimizer_state(state['optimizer'], self.optimizer),
            )
            state = state | shards
        super().load_state(state)
        self.refresh_whole_model()


def shard(step_module: nn.Module, parts: list[nn.Module | list[nn.Module]], device_type: str) -> nn.Module:
    """Shard a module in place over the default process group; each of `parts` is gathered when it runs."""
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for module in step_module.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if parameter.ndim == 0:  # which `fully_shard` does not take
                setattr(module, name, nn.Parameter(parameter.detach()[None], parameter.requires_grad))
    for layer in parts:
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


def whole_shapes(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the shape of those of the same name: numbers were made lists of one to be sharded."""
    return {name: it.view(like[name].shape) if name in like else it for name, it in state.items()}


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a tensor that belongs to a sharded parameter; anything else as it is."""
    if whole.ndim == 0 and parameter.ndim == 1:
        whole = whole[None]
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
            name: shard_like(value, parameters[number]) if isinstance(value, Tensor) and name != 'step' else value
            for name, value in values.items()
        }
        for number, values in state['state'].items()
    }
    return state | dict(state=shards)
