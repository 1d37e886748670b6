"""`musiclm generate` with the model that ships, and that model itself."""

import json

import pytest
import soundfile
import torch

from musiclm_pytorch import MusicLM
from musiclm_pytorch.cli import main
from musiclm_pytorch.pretrained import HOME, find_pretrained, pretrained_names


@pytest.fixture(scope='module')
def tiny():
    return MusicLM.from_pretrained('tiny')


def test_what_ships_is_small_and_whole(tiny):
    assert pretrained_names() == ['tiny']
    folder = HOME / 'tiny'
    assert sum(path.stat().st_size for path in folder.rglob('*.safetensors')) <= 25e6
    assert {path.suffix for path in folder.rglob('*') if path.is_file()} == {'.safetensors', '.json', '.md'}
    assert not tiny.training
    assert all(it.isfinite().all() for it in tiny.state_dict().values() if it.is_floating_point())


def test_a_folder_of_the_same_name_comes_first(tmp_path, monkeypatch):
    assert find_pretrained('tiny') == HOME / 'tiny'
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'tiny').mkdir()
    assert find_pretrained('tiny').resolve() == tmp_path / 'tiny'


def test_generate_writes_waves_and_a_page(tmp_path, capsys):
    out = tmp_path / 'out'
    command = ['generate', 'a slow low organ', 'Fast flute!', '--num-samples', '2', '--seconds', '1.5', '-o', str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert '6 s of music' in printed
    names = [f'{prompt}-{place}' for prompt in ('01-a-slow-low-organ', '02-fast-flute') for place in (1, 2)]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ['index.html', 'prompts.json', *(f'{name}.{kind}' for name in names for kind in ('wav', 'png'))]
    )
    scores = [float(line.split()[1]) for line in printed.splitlines()[:4]]
    assert scores[0] >= scores[1]
    assert scores[2] >= scores[3]
    assert json.loads((out / 'prompts.json').read_text()) == {
        f'{name}.wav': 'a slow low organ' if name.startswith('01') else 'Fast flute!' for name in names
    }
    for name in names:
        wave, rate = soundfile.read(out / f'{name}.wav')
        assert (rate, len(wave)) == (16000, 24000)
        assert 0.01 < wave.std() < 0.5

    assert main(command) == 2
    assert 'is there already; give another folder, or --overwrite' in capsys.readouterr().err
    first = (out / f'{names[0]}.wav').read_bytes()
    assert main([*command, '--overwrite']) == 0
    assert (out / f'{names[0]}.wav').read_bytes() == first  # the same seed
    assert main([*command, '--overwrite', '--seed', '5', '--cond-scale', '2', '1', '1', '--top-k', '20']) == 0
    assert (out / f'{names[0]}.wav').read_bytes() != first


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--model', 'tinny'], 'there is no folder tinny'),
        (['--seconds', '0'], 'seconds must be greater than 0'),
        (['--num-samples', '0'], 'num_samples must be greater than 0'),
        (['--temperature', '1', '2'], 'temperature must be one number or three'),
        (['--prime', 'nowhere.wav'], 'nowhere.wav'),
    ],
)
def test_bad_options_are_told_in_a_line(tmp_path, capsys, arguments, message):
    assert main(['generate', 'a flute', '-o', str(tmp_path / 'out'), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_the_music_obeys_the_register(tiny):
    """Whatever else it does: what is asked to be high sounds higher than what is asked to be low."""
    prompts = [f'a {register} {name}' for register in ('low', 'high') for name in ('flute', 'piano', 'organ', 'guitar')]
    waves = tiny(prompts, num_samples=2, seconds=3.0, seed=1)
    power = torch.stft(waves, 2048, window=torch.hann_window(2048), return_complex=True).abs().square().sum(dim=-1)
    centre = (power * torch.arange(1025)).sum(dim=-1) / power.sum(dim=-1) * 16000 / 2048  # Hz
    low, high = centre.view(2, 4)
    assert (high > 1.5 * low).all()


def test_the_card_tells_what_the_folder_holds():
    settings = json.loads((HOME / 'tiny' / 'config.json').read_text())
    assert settings['model'] == 'MusicLM'
    card = (HOME / 'tiny' / 'README.md').read_text()
    for word in ('command', 'seed', 'cores', 'loss', 'judge'):
        assert word in card.lower()
