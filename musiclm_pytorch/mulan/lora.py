"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a model: trained, saved and loaded alone, merged.

They are parametrizations of torch, so that whatever reads a layer's weight reads the adapted one. `peft` (0.21) puts
modules of its own around the layers, past which the kernels that decode read the weights as they were.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from musiclm_pytorch.atomic import checksum_of
from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.mulan import checkpoint

KIND = 'Adapters'
ADAPTERS_FOLDER = 'adapters'  # where trainers leave them
SIDES = ('down', 'up')


class LowRank(nn.Module):
    """A weight `(m, n)` to its sum with a matrix of rank `rank`, which begins at zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=dtype, device=weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.alpha / self.rank * self.up @ self.down).to(weight.dtype)


@typechecked
def add_adapters(module: nn.Module, rank: int = 16, alpha: float | None = None) -> nn.Module:
    """Put an adapter on each linear layer, and freeze all else; the model computes what it did until they are trained.

        musiclm = MusicLM.from_pretrained('folder')
        add_adapters(musiclm.semantic, rank=16)
        SemanticTrainer(musiclm.semantic, tokens, quantizer=musiclm.mulan_embed_quantizer, …).train()
        save_adapters(musiclm.semantic, 'adapters')

    Models are saved with their adapters merged.

    Args:
        module: a stage, a MuLaN or one of its towers, changed in place.
        rank: of the adapters.
        alpha: `alpha / rank` is the factor of what they add; `2 * rank` by default.

    Returns:
        the module.

    Raises:
        ValueError: a module without linear layers, or with adapters.
    """
    check_positive(rank=rank, alpha=alpha)
    layers = [it for it in module.modules() if isinstance(it, nn.Linear)]
    if not layers:
        raise ValueError(f'a {type(module).__name__} has no linear layers for adapters')
    if adapters_of(module):
        raise ValueError(f'this {type(module).__name__} has adapters already; merge_adapters makes them part of it')
    module.requires_grad_(False)
    for layer in layers:
        parametrize.register_parametrization(layer, 'weight', LowRank(layer.weight, rank, alpha or 2.0 * rank))
    return module


def adapters_of(module: nn.Module) -> dict[str, LowRank]:
    """The adapter of each layer that has one, by the layer's name."""
    return {
        name: layer.parametrizations.weight[0]
        for name, layer in module.named_modules()
        if parametrize.is_parametrized(layer, 'weight') and isinstance(layer.parametrizations.weight[0], LowRank)
    }


def merge_adapters(module: nn.Module) -> nn.Module:
    """Make the adapters part of the weights, which compute the same; gives the module.

    All stays frozen, as `add_adapters` left it: `requires_grad_()` lets a stage be trained as a whole. The embeddings
    that a stage's trainer froze with it are `quantizer.cond_embeddings`.
    """
    for name in adapters_of(module):
        parametrize.remove_parametrizations(module.get_submodule(name), 'weight')
    return module


def save_adapters(module: nn.Module, folder: str | Path) -> None:
    """Write the adapters alone, for `load_adapters`; JSON and safetensors. Raises ValueError if there are none."""
    adapters = adapters_of(module)
    if not adapters:
        raise ValueError(f'this {type(module).__name__} has no adapters; add_adapters puts them on it')
    first = next(iter(adapters.values()))
    settings = dict(rank=first.rank, alpha=first.alpha)
    weights = {f'{name}.{key}': it for name, own in adapters.items() for key, it in own.named_parameters()}
    config = dict(model=KIND, adapters=settings, base=_base_of(module))
    checkpoint.write_folder(folder, config, weights)


def load_adapters(module: nn.Module, folder: str | Path, verify: bool = True) -> nn.Module:
    """Put adapters that `save_adapters` wrote on a module like the one that they were trained on; gives the module.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one, and for adapters of another module, or
    with `verify` of one with other weights.
    """
    config, weights = checkpoint.read_folder(folder, KIND, ('model', 'adapters', 'base'), verify=verify)
    if config['model'] != KIND:
        raise ValueError(f'{folder} holds a {config["model"]!r}, not adapters')
    if verify and config['base'] != _base_of(module):
        raise ValueError(
            f'the adapters in {folder} were trained on a model with other weights than this {type(module).__name__}; '
            'load them onto that one (verify=False takes them all the same)'
        )
    needed = {f'{name}.{key}' for name, it in module.named_modules() if isinstance(it, nn.Linear) for key in SIDES}
    if differ := sorted(needed ^ weights.keys()):
        raise ValueError(
            f'the adapters in {folder} are of another model than this {type(module).__name__}: {differ[0]} is in one '
            'alone'
        )
    config.build(add_adapters, 'adapters', module)
    for name, adapter in adapters_of(module).items():
        own = {key: weights[f'{name}.{key}'] for key in SIDES}
        checkpoint.load_strictly(adapter, own, source=folder)
    return module


def _base_of(module: nn.Module) -> str:
    """A checksum of the weights under the adapters."""
    return checksum_of(checkpoint.plain_state(module, merged=False))
