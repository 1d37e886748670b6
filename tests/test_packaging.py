"""Packages to deploy: what is in them, that they run from elsewhere, and that nothing is left behind."""

import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from helpers.models import tiny_mulan
from packaging.requirements import Requirement
from safetensors import safe_open

from musiclm_pytorch.inference import packaging
from musiclm_pytorch.inference.config import InferenceConfig
from musiclm_pytorch.inference.optimize import OptimizedMuLaN
from musiclm_pytorch.inference.packaging import DeploymentPackager
from musiclm_pytorch.mulan.model import MuLaN
from musiclm_pytorch.musiclm import MusicLM

RATE = 16000
CONFIG = InferenceConfig(batch_size=4, use_mixed_precision=False, device='cpu')


def small_mulan(rate=RATE, **audio) -> MuLaN:
    torch.manual_seed(0)
    sizes = dict(depth=1, spec_n_fft=256, spec_win_length=256, spec_hop_length=128, audio_sample_rate=rate)
    return tiny_mulan(sizes | audio, dict(depth=1, num_tokens=49408, max_seq_len=32)).eval()


@pytest.fixture(scope='module')
def mulan():
    return small_mulan()


@pytest.fixture(scope='module')
def packed(tmp_path_factory, mulan):
    path = tmp_path_factory.mktemp('packed') / 'new' / 'package'
    assert DeploymentPackager(CONFIG).create_deployment_package({'mulan': mulan}, path) == path.resolve()
    return path


@pytest.fixture(scope='module')
def tiny():
    return MusicLM.from_pretrained('tiny')


@pytest.fixture(scope='module')
def packed_musiclm(tmp_path_factory, tiny):
    """A MuLaN beside the MusicLM that ships."""
    path = tmp_path_factory.mktemp('packed') / 'package'
    models = dict(music=tiny, mulan=small_mulan(rate=None))
    return DeploymentPackager(CONFIG).create_deployment_package(models, str(path), include_examples=True)


def script(package, *arguments):
    """The command line of a package, run in this process."""
    return runpy.run_path(str(package / 'inference.py'))['main'](list(map(str, arguments)))


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


# What is in a package


def test_package_holds_what_its_readme_says(packed, mulan):
    assert set(everything(packed)) == {
        *('README.md', 'inference.py', 'inference_config.json', 'package.json', 'requirements.txt'),
        *('models/mulan/config.json', 'models/mulan/model.safetensors', 'examples/rank_mulan.py'),
        *(f'examples/music/{name}' for name in ('captions.json', 'clip_1.wav', 'clip_2.wav', 'clip_3.wav')),
    }
    again = MuLaN.from_pretrained(packed / 'models' / 'mulan')
    assert all(torch.equal(it, other) for it, other in zip(mulan.parameters(), again.parameters(), strict=True))
    assert InferenceConfig.from_json(packed / 'inference_config.json') == CONFIG
    text = (packed / 'README.md').read_text()
    table = text.partition('## What is in the package')[2]
    assert set(re.findall(r'^\| `(.+?)` \|', table, re.M)) == {path.name for path in packed.iterdir()} - {'README.md'}
    assert '$' not in text
    assert '\n\n\n' not in text
    assert 'generate' not in text
    assert 'MusicLM' not in text
    assert packed.stat().st_mode & 0o777 == packed.parent.stat().st_mode & 0o777  # others may read it
    assert [path.name for path in packed.parent.parent.iterdir()] == ['new']  # nothing is left beside it
    assert [path.name for path in packed.parent.iterdir()] == ['package']


def test_requirements_are_the_installed_versions(packed):
    lines = (packed / 'requirements.txt').read_text().splitlines()
    pins = {need.name: need for need in map(Requirement, (it for it in lines if not it.startswith('#')))}
    names = 'musiclm-pytorch torch torchaudio torchvision audiolm-pytorch safetensors soundfile numpy transformers'
    assert set(names.split()) <= set(pins)
    for name, need in pins.items():
        (specifier,) = need.specifier
        assert specifier.operator == '=='
        assert specifier.contains(importlib.metadata.version(name), prereleases=True)
        assert need.url is None
    # what musiclm-pytorch brings by address is no release that an index has
    assert not {'fairseq', 'pytest'} & set(pins)
    assert any('fairseq comes with musiclm-pytorch==' in line for line in lines)


def test_requirements_of_another_installation(monkeypatch, tmp_path, mulan):
    installed = {
        'musiclm-pytorch': ('1.2', ['torch>=2', 'a.B[more]>=1', 'c; extra == "all"', 'fairseq @ file:///x.zip']),
        'torch': ('2.0+cpu', ['cuda; platform_system == "Linux"', 'typing_extensions; python_version > "3"']),
        'a-b': ('0.1rc1', ['plain', 'deep; extra == "more"', 'deeper; extra == "most"']),
        'fairseq': ('3', ['torch']),
        'plain': ('4', ['a.b']),
        'deep': ('5', None),
    }

    class Distribution:
        def __init__(self, name):
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            self.version, self.requires = installed[name]

    monkeypatch.setattr(importlib.metadata, 'distribution', Distribution)
    monkeypatch.setattr(packaging.importlib.util, 'find_spec', lambda name: 'spec' if name in installed else None)

    def lines(**settings):
        return packaging.pinned_requirements(InferenceConfig(**settings)).splitlines()[2:]

    wanted = ['musiclm-pytorch==1.2', 'a-b==0.1rc1', 'deep==5', 'plain==4', 'torch==2.0']
    notes = [
        '# fairseq comes with musiclm-pytorch==1.2',
        '# not installed there: typing-extensions, which torch asks for',
    ]
    assert lines() == lines(use_quantization='auto') == [*notes, *wanted]

    # quantization needs torchao, which is no requirement of musiclm-pytorch
    with pytest.raises(ImportError, match='use_quantization needs torchao, which is not installed'):
        DeploymentPackager(InferenceConfig(use_quantization=True)).create_deployment_package(
            {'mulan': mulan}, tmp_path / 'package'
        )
    assert list(tmp_path.iterdir()) == []
    installed['torchao'] = ('0.9', None)
    assert lines() == [*notes, *wanted]
    assert lines(use_quantization=True) == lines(use_quantization='auto') == [*notes, *wanted, 'torchao==0.9']


# A package runs


def test_rank_orders_files_by_their_cosines(packed, tmp_path, mulan, capsys):
    music = packed / 'examples' / 'music'
    clips = sorted(music.glob('*.wav'))
    (tmp_path / 'text.wav').write_text('no sound')
    assert script(packed, 'rank', 'slow piano', tmp_path / 'text.wav', *clips) == 0
    found = [re.fullmatch(r'(-?\d\.\d{3})  (.+)', line).groups() for line in capsys.readouterr().out.splitlines()]
    text = mulan.get_text_latents(raw_texts=['slow piano'])[0]
    cosines = {str(clip): (mulan.embed_audio(clip) @ text).item() for clip in clips}
    assert [name for _, name in found] == sorted(cosines, key=cosines.get, reverse=True)
    for score, name in found:
        assert float(score) == pytest.approx(cosines[name], abs=1e-3)


def test_embed_writes_latents_and_what_they_are_of(packed, tmp_path, mulan, capsys):
    clips = [str(packed / 'examples' / 'music' / f'clip_{number}.wav') for number in (2, 1)]
    out = tmp_path / 'latents.safetensors'
    command = ('embed', *clips, '--texts', 'slow piano', 'drums', '-o', out)
    assert script(packed, *command) == 0
    assert 'audio (2, 16), texts (2, 16)' in capsys.readouterr().out
    with safe_open(str(out), 'pt') as file:
        assert json.loads(file.metadata()['files']) == clips
        assert json.loads(file.metadata()['texts']) == ['slow piano', 'drums']
        with torch.no_grad():
            assert torch.allclose(file.get_tensor('texts'), mulan.get_text_latents(raw_texts=['slow piano', 'drums']))
            assert torch.allclose(file.get_tensor('audio')[0], mulan.embed_audio(clips[0]), atol=1e-5)
    assert script(packed, *command) == 2
    assert 'is there already' in capsys.readouterr().err
    assert script(packed, *command[:-1], out, '--overwrite') == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['rank', ' ', 'a.wav'], 'a text is empty'),
        (['rank', 'x', 'a.wav', '-k', '0'], '-k must be at least 1, got 0'),
        (['rank', 'x', 'nowhere.wav'], 'none of the files could be embedded'),
        (['rank', 'x', 'a.wav', '--sample-rate', '8000'], 'takes waves at 16000 Hz, not 8000'),
        (['rank', 'x', 'a.wav', '--device', 'tpu'], 'device must be'),
        (['embed', '-o', 'x.safetensors'], 'give sound files, or --texts, or both'),
        (['embed', '--texts', 'x', '-o', 'x.txt'], 'OUT must end in .safetensors, got x.txt'),
        (['embed', '--texts', 'x', '-o', 'nowhere/x.safetensors'], 'there is no folder nowhere'),
    ],
)
def test_what_the_user_gets_wrong_is_told_in_a_line(packed, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert script(packed, *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f'inference.py {arguments[0]}: error: ')
    assert message in last
    assert list(tmp_path.iterdir()) == []


def test_generate_runs_from_anywhere(packed_musiclm, tmp_path, tiny):
    command = [sys.executable, packed_musiclm / 'inference.py', 'generate', 'slow piano music', '--seconds', '1']
    command += ['--seed', '3', '-o', 'piano.wav']  # with as many threads as here: other sums choose other tokens
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'piano.wav: 1 s at 16000 Hz\n'), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['piano.wav']
    wave, rate = soundfile.read(tmp_path / 'piano.wav', dtype='float32')
    wanted = tiny('slow piano music', seconds=1.0, seed=3)[0]
    assert (rate, wave.shape) == (RATE, wanted.shape)
    assert wanted.abs().max() > 0.01
    assert torch.allclose(torch.from_numpy(wave), wanted.clamp(-1, 1), atol=2e-3)


def test_examples_run(packed, packed_musiclm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(packed / 'examples' / 'rank_mulan.py'))
    lines = capsys.readouterr().out.splitlines()
    captions = json.loads((packed / 'examples' / 'music' / 'captions.json').read_text())
    assert [re.fullmatch(r'-?\d\.\d{3}  clip_\d\.wav  (.+)', line)[1] for line in lines] == list(captions.values())

    runpy.run_path(str(packed_musiclm / 'examples' / 'rank_mulan.py'))  # of a model without a sample rate
    assert len(capsys.readouterr().out.splitlines()) == 3
    monkeypatch.setattr(sys, 'argv', ['generate_music.py', 'out'])
    monkeypatch.setattr(MusicLM, 'forward', shortened(MusicLM.forward))
    runpy.run_path(str(packed_musiclm / 'examples' / 'generate_music.py'))
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == sorted(captions)
    assert soundfile.info(tmp_path / 'out' / 'clip_1.wav').frames == RATE // 2


def shortened(forward):
    """Half a second is enough to see that it runs."""
    return lambda self, text, **keywords: forward(self, text, **keywords | dict(seconds=0.5))


def test_several_models_are_chosen_by_name(packed_musiclm, capsys, tmp_path):
    clip = packed_musiclm / 'examples' / 'music' / 'clip_1.wav'
    assert script(packed_musiclm, 'rank', 'piano', clip) == 2
    assert 'the package has music and mulan; choose one with --model' in capsys.readouterr().err
    for options in (['music'], ['mulan', '--sample-rate', '16000']):
        assert script(packed_musiclm, 'rank', 'piano', clip, '--model', *options) == 0
        assert 'clip_1.wav' in capsys.readouterr().out
    assert script(packed_musiclm, 'rank', 'piano', clip, '--model', 'mulan') == 2
    assert 'give it in Hz with --sample-rate' in capsys.readouterr().err
    text = (packed_musiclm / 'README.md').read_text()
    assert 'generate "slow piano music" --model music' in text
    assert '--model mulan --sample-rate 16000' in text
    assert 'A MuLaN whose sample rate is not known' in text
    about = json.loads((packed_musiclm / 'package.json').read_text())['models']
    assert about['music'] | dict(parameters=0) == dict(
        kind='MusicLM', parameters=0, sample_rate=RATE, mulan_sample_rate=8000
    )


# What goes wrong


@pytest.mark.parametrize(
    ('models', 'error', 'message'),
    [
        (dict, ValueError, 'models is empty'),
        (lambda: {'it': torch.nn.Linear(1, 1)}, TypeError, r"\['it'\] must be a MuLaN or a MusicLM, got a Linear"),
        (lambda: {'it': OptimizedMuLaN(small_mulan(), CONFIG)}, TypeError, 'got a OptimizedMuLaN; of an optimized'),
        (lambda: {1: small_mulan()}, TypeError, 'must be strings, got 1'),
        (lambda: {'../it': small_mulan()}, ValueError, "'../it' cannot be the name of a folder"),
        (lambda: dict.fromkeys(('a', 'A'), small_mulan()), ValueError, 'more than upper and lower case'),
        (lambda: {'it': tiny_mulan()}, ValueError, 'own 100 token ids; .* num_tokens=49408; or pass include_exa'),
        (lambda: {'it': small_mulan(accept_spec=True)}, ValueError, r"models\['it'\]: .* takes spectrograms"),
        (lambda: {'it': broken()}, ValueError, 'its weight audio_to_latents.weight holds NaN or infinity'),
    ],
)
def test_models_that_cannot_be_packed(tmp_path, models, error, message):
    with pytest.raises(error, match=message):
        DeploymentPackager(CONFIG).create_deployment_package(models(), tmp_path / 'new' / 'package')
    assert list(tmp_path.iterdir()) == []


def broken() -> MuLaN:
    mulan = small_mulan()
    with torch.no_grad():
        mulan.audio_to_latents.weight[0, 0] = float('inf')
    return mulan


def test_nothing_half_written_stays(tmp_path, mulan, monkeypatch):
    def pack(name, **keywords):
        return DeploymentPackager(CONFIG).create_deployment_package({name: mulan}, tmp_path / 'package', **keywords)

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(packaging, 'write_examples', fail)
    with pytest.raises(OSError, match='disk full'):
        DeploymentPackager(CONFIG).create_deployment_package({'mulan': mulan}, tmp_path / 'new' / 'package')
    assert list(tmp_path.iterdir()) == []
    pack('mulan', include_examples=False)  # they are not written
    before = everything(tmp_path / 'package')
    assert not [name for name in before if 'example' in name]
    assert 'example' not in (tmp_path / 'package' / 'README.md').read_text().lower()

    with pytest.raises(FileExistsError, match='is there already; give another path, or overwrite=True'):
        pack('mulan')
    with pytest.raises(OSError, match='disk full'):
        pack('mulan', overwrite=True)
    assert everything(tmp_path / 'package') == before
    pack('other', overwrite=True, include_examples=False)
    assert [path.name for path in (tmp_path / 'package' / 'models').iterdir()] == ['other']
    assert [path.name for path in tmp_path.iterdir()] == ['package']


@pytest.mark.parametrize('content', [None, '{"format": "other"}', '[]', '{'])
def test_only_packages_are_replaced(tmp_path, mulan, content):
    folder = tmp_path / 'mine'
    folder.mkdir()
    if content is not None:
        (folder / 'package.json').write_text(content)
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match='is not a deployment package, so it is not replaced'):
        DeploymentPackager(CONFIG).create_deployment_package({'mulan': mulan}, folder, overwrite=True)
    assert everything(tmp_path) == before
