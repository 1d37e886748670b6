"""Tiny models and reference numbers shared by the tests."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from musiclm_pytorch import AudioSpectrogramTransformer, MuLaN, TextTransformer
from musiclm_pytorch.trainer.journal import Journal

GOLDEN = Path(__file__).parent / 'golden'

# tiny models gain nothing from a second thread, and wait long for it where the machine is busy
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'  # of the processes that tests start


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def curves():
    """For tests that look at the picture of the curves, which is not drawn elsewhere."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """To draw the picture at the end of each run takes longer than to train a tiny model does."""
    if 'curves' not in request.fixturenames:
        monkeypatch.setattr(Journal, 'draw', lambda self: None)


@pytest.fixture
def music(tmp_path):
    """Three captioned sound files of a second, and one without a caption."""
    from test_datasets import ramp, write

    for index in range(3):
        write(tmp_path / 'music' / f'{index}.wav', ramp(1), caption=f'clip {index}')
    write(tmp_path / 'music' / 'mute.wav', ramp(1), caption=None)
    return tmp_path / 'music'


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
