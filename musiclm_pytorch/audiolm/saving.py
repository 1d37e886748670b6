"""AudioLM's modules on disk: what they were built with as JSON, their weights in safetensors. Nothing is run."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from musiclm_pytorch.audiolm import bridge
from musiclm_pytorch.mulan import checkpoint

# where each class comes from; a class stands before its parent
KINDS = {
    'NeuralCodec': 'musiclm_pytorch.codecs.neural',
    'SpectralCodec': 'musiclm_pytorch.audiolm.spectral_codec',
    **dict.fromkeys(('SemanticTransformer', 'CoarseTransformer', 'FineTransformer', 'SoundStream'), bridge.__name__),
}


def save_module(module: nn.Module, folder: str | Path) -> None:
    """Write a transformer or SoundStream of audiolm-pytorch.

    Raises ValueError for a module that was built before `musiclm_pytorch.audiolm.bridge` was imported: audiolm-pytorch
    does not keep what a module was built with.
    """
    kind = kind_of(module)
    if not hasattr(module, bridge.CONFIG):
        raise ValueError(
            f'this {kind} was built before musiclm_pytorch looked on, so its keywords are not known; import '
            'musiclm_pytorch.audiolm.bridge before building it'
        )
    checkpoint.write_folder(folder, dict(model=kind, keywords=getattr(module, bridge.CONFIG)), module.state_dict())


def load_module(
    folder: str | Path,
    *,
    device: str | torch.device = 'cpu',
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> nn.Module:
    """Rebuild a module from its folder, or from that of its trainer, in eval mode.

    `device`, `dtype`, `verify` and errors are as in `MuLaN.from_pretrained`.
    """
    place = checkpoint.placing(device, dtype)
    # trainers add what they know
    parts, optional = ('model', 'keywords'), ('step', 'stage')
    config, weights = checkpoint.read_folder(folder, 'save_module', parts, optional, verify)
    if config['model'] not in [*KINDS]:
        raise ValueError(f'{folder} holds a {config["model"]!r}, not one of {", ".join(KINDS)}')
    kind = _class_of(config['model'])
    config = replace(config, content={**config.content, 'keywords': _tuples(config['keywords'])})
    module = config.build(kind, 'keywords')
    checkpoint.load_strictly(module, weights, source=folder)
    return place(module.eval())


def kind_of(module: nn.Module) -> str:
    """The class of audiolm-pytorch that a module is of; TypeError for any other."""
    for kind in KINDS:
        if isinstance(module, _class_of(kind)):
            return kind
    raise TypeError(f'a {type(module).__name__} cannot be saved, only {", ".join(KINDS)}')


def _class_of(kind: str) -> type[nn.Module]:
    return getattr(import_module(KINDS[kind]), kind)


def _tuples(value: Any) -> Any:
    """JSON has no tuples, and audiolm-pytorch no lists."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
