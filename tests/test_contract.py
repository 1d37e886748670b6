"""Code that users already write, run as it stands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from helpers import hubert
from helpers import music as parts
from helpers.contract import CONTRACT, run
from helpers.models import tiny_mulan
from helpers.processes import start_processes

from musiclm_pytorch import MuLaNEmbedQuantizer


@pytest.mark.slow
def test_mulan():
    names = run('00_mulan.py')
    assert names['loss'].isfinite()
    assert names['mulan'].audio.to_patch_tokens[2].weight.grad.abs().sum() > 0
    assert names['embeds'].shape == (2, 128)


@pytest.mark.slow
def test_quantizer():
    mulan = tiny_mulan(dict(depth=1), dict(depth=1))
    with pytest.warns(UserWarning, match='call quantizer.fit'):
        names = run('01_quantizer.py', mulan=mulan, torch=torch)
    assert names['conds'].shape == (2, 8, 1024)


@pytest.mark.slow
def test_musiclm():
    quantizer = parts.build_quantizer()
    names = run('03_musiclm.py', audio_lm=parts.build_audio_lm(), quantizer=quantizer)
    assert names['music'].shape == (1, 10 * parts.RATE)


def train_semantic(_, folder):
    os.chdir(folder)
    settings = hubert.make_settings('base', encoder_layers=9)
    model, checkpoint = hubert.make_checkpoint('base', settings, num_hidden_layers=9)
    Path('hubert').mkdir()
    torch.save(checkpoint, 'hubert/hubert_base_ls960.pt')
    frames = hubert.reference_layers(model, torch.randn(2, 4000))[0][-1].flatten(0, 1)
    hubert.save_kmeans(frames, 'hubert/hubert_base_ls960_L9_km500.bin')

    Path('sounds').mkdir()
    for i in range(20):
        soundfile.write(f'sounds/{i}.wav', torch.randn(11000, 2).clamp(-1, 1).numpy(), 16000)

    mulan = tiny_mulan(dict(depth=1), dict(depth=1))
    quantizer = MuLaNEmbedQuantizer(mulan, conditioning_dims=(1024,), namespaces=('semantic',), codebook_size=16)
    quantizer.fit(torch.randn(40, 16))
    asked = []
    quantizer.register_forward_hook(lambda module, inputs, output: asked.append(output.shape))
    if not torch.cuda.is_available():
        torch.nn.Module.cuda = lambda self: self

    names = dict(quantizer=quantizer)
    code = (CONTRACT / '02_semantic_trainer.py').read_text().replace('/path/to/audio/files', 'sounds')
    exec(code, names)
    assert names['trainer'].steps == 1
    assert asked[0] == (1, 8, 1024)


@pytest.mark.slow
def test_semantic_trainer(tmp_path):
    # in a process of its own: audiolm-pytorch allows one trainer a process
    start_processes(train_semantic, tmp_path, count=1)


TRAINER = """
import sys
sys.path.insert(0, {tests!r})
import torch
from helpers.models import tiny_mulan
from helpers.contract import run

# of one length and without augmentation, or each new shape is compiled anew
still = dict(spec_aug_stretch_factor=1, spec_aug_freq_mask=0, spec_aug_time_mask=0, patch_dropout_prob=0.0)
mulan = tiny_mulan(dict(depth=1, **still), dict(depth=1))
before = mulan.audio_to_latents.weight.clone()
dataset = [(torch.randn(1000), torch.randint(1, 100, (5,))) for _ in range(20)]
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


def test_evaluation():
    mulan = tiny_mulan({}, dict(num_tokens=49408))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda', but torch finds no CUDA device"):
            run('08_evaluation.py', mulan=mulan, torch=torch)
        return
    run('08_evaluation.py', mulan=mulan, torch=torch)


EVALUATION = (CONTRACT / '08_evaluation.py').read_text().replace("'cuda'", "'cpu'")


def test_evaluation_on_a_cpu(capsys):
    names = dict(mulan=tiny_mulan({}, dict(num_tokens=49408)), torch=torch)
    exec(compile(EVALUATION, '08_evaluation.py', 'exec'), names)
    assert len(names['results']['text_audio_alignment']) > 5
    printed = capsys.readouterr().out
    assert [line.split(':')[0] for line in printed.splitlines()] == [
        'Audio Quality Metrics',
        'Text-Audio Alignment',
        'Music Structure Analysis',
    ]


@pytest.mark.slow
def test_inference(tmp_path, monkeypatch):
    for name in ('onnx', 'onnxruntime', 'onnxscript', 'torchao'):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    mulan = tiny_mulan({}, dict(num_tokens=49408))
    names = run('09_inference.py', mulan=mulan)
    assert [tuple(output.shape) for output in names['audio_outputs']] == [(80, 1024)] * 3
    assert (tmp_path / 'mulan_model.onnx').is_file()
    assert (tmp_path / 'musiclm_deployment_package' / 'inference.py').is_file()


def test_benchmark(capsys):
    from musiclm_pytorch.inference import InferenceConfig

    run('11_benchmark.py', mulan=tiny_mulan({}, dict(num_tokens=49408)), config=InferenceConfig())
    printed = capsys.readouterr().out
    assert [line.split(':')[0] for line in printed.splitlines()] == ['Average inference time', 'Samples per second']


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
from helpers.models import tiny_mulan
from helpers.contract import run

mulan = tiny_mulan(dict(depth=1), dict(depth=1))
before = mulan.audio_to_latents.weight.clone()

class Own(torch.utils.data.Dataset):
    # of the program itself, which is no file
    def __len__(self):
        return 140

    def __getitem__(self, i):
        return torch.randn(1000 + 10 * (i % 9)), torch.randint(1, 100, (3 + i % 4,))

dataset = Own()
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
