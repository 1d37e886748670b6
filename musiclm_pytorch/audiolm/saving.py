"""AudioLM's modules on disk: what they were built with as JSON, their weights in safetensors. Nothing is run."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from musiclm_pytorch.audiolm import convert
from musiclm_pytorch.audiolm.stages import STAGES
from musiclm_pytorch.checks import as_tuples
from musiclm_pytorch.mulan import checkpoint

# where each class comes from
KINDS = {
    'NeuralCodec': 'musiclm_pytorch.codecs.neural',
    'PretrainedCodec': 'musiclm_pytorch.codecs.pretrained',
    'SpectralCodec': 'musiclm_pytorch.audiolm.spectral_codec',
    'SoundStream': convert.__name__,
    'MelodyEncoder': 'musiclm_pytorch.mulan.melody',
    **{it.__name__: it.__module__ for it in STAGES.values()},
}


def save_module(module: nn.Module, folder: str | Path) -> None:
    """Write a stage, ours or audiolm-pytorch's, a codec of ours, a SoundStream, or an EncodecWrapper, which comes back
    as a `PretrainedCodec`.

    Raises TypeError for anything else, and ValueError for a SoundStream that was built before
    `musiclm_pytorch.audiolm.convert` was imported: audiolm-pytorch does not keep what it was built with.
    """
    module = convert.unwrapped(module)
    if convert.is_of(module, *(it.__name__ for it in STAGES.values())):
        module = convert.own_stage(module)
    if convert.is_of(module, 'EncodecWrapper'):
        module = _class('PretrainedCodec').from_audiolm(module)
    config = describe(module)
    if config['keywords'] is None:
        raise ValueError(
            f'this {config["model"]} was built before musiclm_pytorch looked on, so its keywords are not known; import '
            'musiclm_pytorch.audiolm.convert before building it'
        )
    checkpoint.write_folder(folder, config, checkpoint.plain_state(module))


def describe(module: nn.Module) -> dict[str, Any]:
    """A module's kind, and the keywords that it was built with, None where they are not known.

    Raises TypeError for what cannot be saved.
    """
    kind = next((name for name in KINDS if name in {it.__name__ for it in type(module).__mro__}), None)
    if kind is None:
        raise TypeError(f'a {type(module).__name__} cannot be saved, only {", ".join(KINDS)}')
    return dict(model=kind, keywords=getattr(module, 'config', getattr(module, convert.CONFIG, None)))


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
    kind = _class(config['model'])
    # JSON has no tuples, and audiolm-pytorch no lists
    config = replace(config, content={**config.content, 'keywords': as_tuples(config['keywords'])})
    module = config.build(kind, 'keywords')
    checkpoint.load_strictly(module, weights, source=folder)
    return place(module.eval())


def _class(name: str) -> Any:
    return getattr(import_module(KINDS[name]), name)
