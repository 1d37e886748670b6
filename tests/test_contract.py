"""Code that users already write, run as it stands."""

from pathlib import Path

import pytest
import torch

CONTRACT = Path(__file__).parent / 'contract'


def run(piece, **names):
    exec(compile((CONTRACT / piece).read_text(), piece, 'exec'), names)
    return names


@pytest.mark.slow
def test_mulan():
    names = run('00_mulan.py')
    assert names['loss'].isfinite()
    assert names['mulan'].audio.to_patch_tokens[2].weight.grad.abs().sum() > 0
    assert names['embeds'].shape == (2, 128)


def test_variable_length():
    assert run('04_variable_length.py', torch=torch)['embeddings'].shape == (2, 512)


def test_spectrogram_recipes():
    names = run('06_spectrogram_recipes.py')
    assert names['transformer'].sample_rate == 16000
    assert names['transformer'](torch.randn(2, 16000)).shape == (2, 512)
    from musiclm_pytorch import AudioSpectrogramTransformer

    assert AudioSpectrogramTransformer(dim=16, depth=1, **names['params'])(torch.randn(2, 16000)).shape == (2, 16)
