"""Tiny MuLaNs, and reference numbers."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from musiclm_pytorch import AudioSpectrogramTransformer, MuLaN, TextTransformer

GOLDEN = Path(__file__).parents[1] / 'golden'


def tiny_audio(**keywords) -> AudioSpectrogramTransformer:
    return AudioSpectrogramTransformer(**{**dict(dim=32, depth=2, heads=2, dim_head=8), **keywords})


def tiny_text(**keywords) -> TextTransformer:
    return TextTransformer(**{**dict(dim=24, depth=2, heads=2, dim_head=8, num_tokens=100, max_seq_len=12), **keywords})


def tiny_mulan(audio=None, text=None, **keywords) -> MuLaN:
    return MuLaN(tiny_audio(**(audio or {})), tiny_text(**(text or {})), **{**dict(dim_latent=16), **keywords})


def load_golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of a file of numbers computed by musiclm-pytorch 0.2.8."""
    with safe_open(str(GOLDEN / f'{name}.safetensors'), 'pt') as file:
        return json.loads(file.metadata()['config']), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def build_golden(name: str) -> tuple[MuLaN, dict[str, torch.Tensor]]:
    """The model of such a file, with its weights loaded strictly, in eval mode."""
    config, tensors = load_golden(name)
    mulan = MuLaN(AudioSpectrogramTransformer(**config['audio']), TextTransformer(**config['text']), **config['mulan'])
    mulan.load_state_dict(state_of(tensors), strict=True)
    return mulan.eval(), tensors


def state_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix('state.'): value for key, value in tensors.items() if key.startswith('state.')}
