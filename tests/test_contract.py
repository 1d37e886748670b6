"""Code that users already write, run as it stands."""

import subprocess
import sys
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


TRAINER = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import tiny_mulan
from test_contract import run

mulan = tiny_mulan(dict(depth=1), dict(depth=1))
before = mulan.audio_to_latents.weight.clone()
dataset = [(torch.randn(1000 + 10 * i), torch.randint(1, 100, (3 + i % 4,))) for i in range(20)]
trainer = run('07_trainer.py', mulan=mulan, dataset=dataset)['trainer']
assert trainer.step == 10
assert not torch.equal(mulan.audio_to_latents.weight, before)
"""


@pytest.mark.slow
def test_trainer(tmp_path):
    # in a process of its own, for its working folder
    script = TRAINER.format(tests=str(CONTRACT.parent))
    subprocess.run([sys.executable, '-c', script], cwd=tmp_path, check=True)
    assert (tmp_path / 'results' / 'checkpoints' / 'step-000000010').is_dir()


def test_variable_length():
    assert run('04_variable_length.py', torch=torch)['embeddings'].shape == (2, 512)


def test_spectrogram_recipes():
    names = run('06_spectrogram_recipes.py')
    assert names['transformer'].sample_rate == 16000
    assert names['transformer'](torch.randn(2, 16000)).shape == (2, 512)
    from musiclm_pytorch import AudioSpectrogramTransformer

    assert AudioSpectrogramTransformer(dim=16, depth=1, **names['params'])(torch.randn(2, 16000)).shape == (2, 16)


DISTRIBUTED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import tiny_mulan
from test_contract import run

mulan = tiny_mulan(dict(depth=1), dict(depth=1))
before = mulan.audio_to_latents.weight.clone()
dataset = [(torch.randn(1000 + 10 * (i % 9)), torch.randint(1, 100, (3 + i % 4,))) for i in range(140)]
names = run('10_distributed.py', mulan=mulan, dataset=dataset)
assert names['results']['loss'] > 0
assert not torch.equal(mulan.audio_to_latents.weight, before)
assert names['trainer'].step == 0
names['trainer'].train(num_train_steps=2)
assert names['trainer'].step == 2
"""


@pytest.mark.slow
def test_distributed(tmp_path):
    script = DISTRIBUTED.format(tests=str(CONTRACT.parent))
    subprocess.run([sys.executable, '-c', script], cwd=tmp_path, check=True)
    assert (tmp_path / 'results.1' / 'checkpoints' / 'step-000000010').is_dir()
    assert (tmp_path / 'results' / 'checkpoints' / 'step-000000002').is_dir()
