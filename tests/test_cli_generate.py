"""`musiclm generate` with the model that ships, and that model itself."""

import copy
import io
import json
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from musiclm_pytorch import Mix, MusicLM, PromptWarning, SyntheticMusic
from musiclm_pytorch.audiolm.generation_args import read_seconds
from musiclm_pytorch.cli import main
from musiclm_pytorch.cli.evaluate import read_texts
from musiclm_pytorch.evaluation.inputs import texts_by_file
from musiclm_pytorch.inference.written import prompt_of, read_line
from musiclm_pytorch.pretrained import HOME, find_pretrained, pretrained_names
from musiclm_pytorch.waves import Music


@pytest.fixture(scope='module')
def tiny():
    return MusicLM.from_pretrained('tiny')


@pytest.mark.parametrize(('name', 'most', 'rate'), [('tiny', 26e6, 16000), ('small', 30e6, 24000)])
def test_what_ships_is_small_and_whole(name, most, rate):
    assert pretrained_names() == ['small', 'tiny']
    folder, musiclm = HOME / name, MusicLM.from_pretrained(name)
    assert sum(path.stat().st_size for path in folder.rglob('*.safetensors')) <= most
    assert {path.suffix for path in folder.rglob('*') if path.is_file()} == {'.safetensors', '.json', '.md'}
    assert not musiclm.training
    assert musiclm.sample_rate == rate
    assert all(it.isfinite().all() for it in musiclm.state_dict().values() if it.is_floating_point())


def test_small_makes_music_of_sampled_instruments_and_knows_their_names():
    small = MusicLM.from_pretrained('small')
    music = small('a fast violin melody with drums', 2, seconds=1.0, seed=1, return_scores=True)
    assert music.waves.shape == (1, 24000)
    assert music.waves.square().mean().sqrt() > 0.01
    quiet, told = small.prompt_warnings(['a slow cello and no drums', 'a didgeridoo solo'])
    assert not quiet
    assert 'didgeridoo' in told


def test_a_folder_of_the_same_name_comes_first(tmp_path, monkeypatch):
    assert find_pretrained('tiny') == HOME / 'tiny'
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'tiny').mkdir()
    assert find_pretrained('tiny').resolve() == tmp_path / 'tiny'


def test_generate_writes_waves_and_a_page(tmp_path, capsys):
    out = tmp_path / 'out'
    command = ['generate', 'a slow low organ', 'Fast flute!', '--num-samples', '2', '--seconds', '0.5', '-o', str(out)]
    command += ['--dtype', 'auto']  # float32 for a model as small as this one
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert '2 s of music' in printed
    names = [f'{prompt}-{place}' for prompt in ('01-a-slow-low-organ', '02-fast-flute') for place in (1, 2)]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ['index.html', 'prompts.json', *(f'{name}.{kind}' for name in names for kind in ('wav', 'png'))]
    )
    scores = [float(line.split()[1]) for line in printed.splitlines()[:4]]
    assert scores[0] >= scores[1]
    assert scores[2] >= scores[3]
    pieces = json.loads((out / 'prompts.json').read_text())
    assert list(pieces) == [f'{name}.wav' for name in names]
    assert read_texts(str(out / 'prompts.json'), [out / f'{name}.wav' for name in names]) == [
        'a slow low organ' if name.startswith('01') else 'Fast flute!' for name in names
    ]
    for name in names:
        wave, rate = soundfile.read(out / f'{name}.wav')
        assert (rate, len(wave)) == (24000, 12000)
        assert 0.01 < wave.std() < 0.5

    # what stands in prompts.json makes a piece again, alone
    piece = pieces['02-fast-flute-1.wav']
    given = {name: piece[name] for name in ('seed', 'seconds', 'temperature', 'top_k', 'top_p', 'cond_scale')}
    again = MusicLM.from_pretrained(piece['model'])(piece['prompt'], **given)
    heard = torch.from_numpy(soundfile.read(out / '02-fast-flute-1.wav', dtype='float32')[0])
    torch.testing.assert_close(heard, again[0], atol=1e-3, rtol=0)
    assert f'seed {piece["seed"]}' in (out / 'index.html').read_text()

    assert main(command) == 2
    assert 'is there already; give another folder, or --overwrite' in capsys.readouterr().err
    first = (out / f'{names[0]}.wav').read_bytes()
    assert main([*command, '--overwrite', '--seed', '5', '--cond-scale', '2', '1', '1', '--top-k', '20']) == 0
    assert (out / f'{names[0]}.wav').read_bytes() != first


def test_pieces_of_another_format_are_overwritten_and_nothing_else(tmp_path, capsys):
    command = ['generate', 'an organ', '--seconds', '0.3', '-o', str(tmp_path), '--overwrite', '--model', 'tiny']
    assert main([*command, '--num-samples', '2']) == 0
    lists = tmp_path / 'prompts.json'
    outside = tmp_path.with_name('01-an-organ-1.ogg')
    for file in (outside, tmp_path / '01-an-organ-1.mp3', tmp_path / 'mine.wav'):
        file.write_bytes(b'mine')
    pieces = json.loads(lists.read_text())
    lists.write_text(json.dumps(pieces | {f'../{outside.name}': {}, 'mine.wav': {}}))  # changed by someone
    capsys.readouterr()

    assert main([*command, '--format', 'flac']) == 0
    names = ['01-an-organ-1.flac', '01-an-organ-1.mp3', '01-an-organ-2.wav', 'mine.wav']
    assert sorted(it.name for it in tmp_path.iterdir() if it.suffix[1:] in ('wav', 'flac', 'ogg', 'mp3')) == names
    assert outside.exists()
    assert list(json.loads(lists.read_text())) == names[:1]
    assert f'{tmp_path} still holds 2 files of the earlier page, such as 01-an-organ-2.wav' in capsys.readouterr().err
    lists.write_text('[')
    assert main(command) == 0
    assert list(json.loads(lists.read_text())) == ['01-an-organ-1.wav']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--model', 'tinny'], 'there is no folder tinny'),
        (['--seconds', '0'], 'seconds must be greater than 0'),
        (['--mix', 'much', 'an organ'], '--mix takes a weight, a number, and a prompt'),
        (['--mix', '0', 'an organ'], "the weight of 'an organ' must be greater than 0, got 0"),
        (['--negative', '@nowhere.wav'], 'nowhere.wav'),
        (['--story', '1', 'an organ'], 'a story is one piece: give --story, or other prompts, not both'),
        (['--mix', '1', '@nowhere.wav'], 'no audio file at nowhere.wav'),
        (['--negative', __file__], f'{__file__} is a file here: for music that is like it, write @{__file__}'),
        (['--num-samples', '0'], 'num_samples must be greater than 0'),
        (['--temperature', '1', '2'], 'temperature must be one number or three'),
        (['--prime', 'nowhere.wav'], 'nowhere.wav'),
        (['--model', str(HOME)], f'the model in it is {HOME / "small"}, so pass that'),
        (['--model', str(HOME / 'best')], f'the model beside it is {HOME / "small"}'),
    ],
)
def test_bad_options_are_told_in_a_line(tmp_path, capsys, arguments, message):
    assert main(['generate', 'a flute', '-o', str(tmp_path / 'out'), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_sounds_and_mixtures_are_prompts_and_files_have_a_format(tiny, tmp_path, capsys):
    soundfile.write(tmp_path / 'in.wav', 0.2 * torch.randn(32000).numpy(), 16000)
    options = ['--mix', '0.7', 'a slow organ', '--mix', '0.3', f'@{tmp_path}/in.wav', '--negative', 'drums']
    options += [
        '--model',
        'tiny',
        '--negative-scale',
        '0.5',
        '--format',
        'flac',
        '--seconds',
        '0.5',
        '-o',
        str(tmp_path / 'out'),
    ]
    assert main(['generate', f'@{tmp_path}/in.wav', *options]) == 0
    pieces = json.loads((tmp_path / 'out' / 'prompts.json').read_text())
    mix, sound = Mix([(0.7, 'a slow organ'), (0.3, tmp_path / 'in.wav')]), dict(sound=f'{tmp_path}/in.wav')
    with pytest.raises(ValueError, match='how well music fits sounds, latents, mixtures and stories is not measured'):
        texts_by_file(pieces, 'prompts.json')
    for seed, (prompt, told) in enumerate(
        ((tmp_path / 'in.wav', sound), (mix, dict(mix=[[0.7, 'a slow organ'], [0.3, sound]])))
    ):
        (name,) = (name for name, it in pieces.items() if it['seed'] == seed)
        assert pieces[name]['prompt'] == told
        assert (pieces[name]['negative'], pieces[name]['negative_scale']) == ('drums', 0.5)
        assert soundfile.info(tmp_path / 'out' / name).format == 'FLAC'
        assert f'src="{name}"' in (tmp_path / 'out' / 'index.html').read_text()
        heard = torch.from_numpy(soundfile.read(tmp_path / 'out' / name, dtype='float32')[0])
        own = tiny(prompt, seconds=0.5, seed=seed, negative='drums', negative_scale=0.5)
        torch.testing.assert_close(heard, own[0], atol=1e-3, rtol=0)


def test_a_story_has_parts_of_words_sounds_latents_and_mixtures(tiny, tmp_path, capsys):
    soundfile.write(tmp_path / 'in.wav', 0.2 * torch.randn(32000).numpy(), 16000)
    latent = tiny.mulan_embed_quantizer.mulan.get_text_latents(raw_texts=['drums'])[0].detach().numpy()
    np.save(tmp_path / 'drums.npy', latent)
    story = ['--story', '0.4', 'a slow organ', '--story', '0.3', f'@{tmp_path}/in.wav']
    story += ['--story', '0.5', f'70% a fast flute + 30% @{tmp_path}/drums.npy']
    assert main(['generate', *story, '--model', 'tiny', '--seed', '3', '-o', str(tmp_path / 'out')]) == 0
    ((name, piece),) = json.loads((tmp_path / 'out' / 'prompts.json').read_text()).items()
    sound, mix = dict(sound=f'{tmp_path}/in.wav'), [[0.7, 'a fast flute'], [0.3, dict(latent=f'{tmp_path}/drums.npy')]]
    assert piece['prompt'] == dict(story=[[0.4, 'a slow organ'], [0.3, sound], [0.5, dict(mix=mix)]])
    assert (piece['seconds'], piece['seed']) == (pytest.approx(1.2), 3)
    own = [(0.4, 'a slow organ'), (0.3, tmp_path / 'in.wav'), (0.5, Mix([(0.7, 'a fast flute'), (0.3, latent)]))]
    heard = torch.from_numpy(soundfile.read(tmp_path / 'out' / name, dtype='float32')[0])
    torch.testing.assert_close(heard, tiny(own, seed=3)[0], atol=1e-4, rtol=0)


def test_a_line_says_words_a_file_or_a_mixture(tmp_path):
    assert read_line('3 + 4 drums') == '3 + 4 drums'
    assert read_line('100% techno') == '100% techno'
    assert read_line('@a + b.wav') == dict(sound='a + b.wav')
    assert read_line('70 % a + 12.5% @b.NPY') == dict(mix=[(0.7, 'a'), (0.125, dict(latent='b.NPY'))])
    with pytest.raises(ValueError, match="each part of a mixture has its share, .* got 'drums'"):
        read_line('70% a calm piano + drums')
    (tmp_path / 'text.npy').write_text('no array')
    (tmp_path / 'empty.npy').write_bytes(b'')
    np.savez(tmp_path / 'several', np.zeros(3))
    (tmp_path / 'several.npz').rename(tmp_path / 'several.npy')
    np.save(tmp_path / 'words.npy', np.array(['a', 'b']))
    np.save(tmp_path / 'matrix.npy', np.zeros((2, 3)))
    for name, wanted in (
        ('text', 'holds no array of NumPy'),
        ('empty', 'holds no array of NumPy'),
        ('several', 'holds NpzFile, but a latent of MuLaN is'),
        ('words', r'holds \(2,\) of <U1, but a latent of MuLaN is \(d,\) of floats'),
        ('matrix', r'holds \(2, 3\) of float64'),
    ):
        with pytest.raises(ValueError, match=f'{name}.npy {wanted}'):
            prompt_of(read_line(f'@{tmp_path}/{name}.npy'))
    with pytest.raises(FileNotFoundError):
        prompt_of(read_line(f'@{tmp_path}/none.npy'))


def test_a_story_tells_its_own_length(tmp_path, capsys):
    story = ['--story', '0.3', 'a slow organ', '--story', '0.6', 'a flute']
    assert main(['generate', *story, '--seconds', '2', '-o', str(tmp_path)]) == 2
    assert 'a story tells its length itself; leave out seconds' in capsys.readouterr().err
    assert read_seconds(None, None, [(0.3, 'a'), (0.6, 'b')], semantic_rate=None) == 0.9


def test_stream_writes_a_file_for_a_player(tiny, tmp_path, capfdbinary):
    assert main(['stream', 'a slow organ', '--seconds', '1.5', '--seed', '3', '--negative', 'drums']) == 0
    heard, rate = soundfile.read(io.BytesIO(capfdbinary.readouterr().out), dtype='float32')
    own = torch.cat(list(tiny.stream('a slow organ', seconds=1.5, seed=3, negative='drums')))
    assert rate == 16000
    torch.testing.assert_close(torch.from_numpy(heard), own, atol=1e-3, rtol=0)
    prime = tmp_path / 'prime.flac'
    soundfile.write(prime, own[:8000].numpy(), 16000)
    assert main(['stream', 'a slow organ', '--seconds', '1', '--prime', str(prime), '--format', 'opus']) == 0
    heard, rate = soundfile.read(io.BytesIO(capfdbinary.readouterr().out), dtype='float32')
    assert (rate, len(heard)) == (16000, 16000)
    given = own[1000:7000]  # all but what is crossfaded
    assert torch.corrcoef(torch.stack((torch.from_numpy(heard)[1000:7000], given)))[0, 1] > 0.9
    mix = ['--mix', '0.7', 'a slow organ', '--mix', '0.3', f'@{prime}']
    assert main(['stream', *mix, '--seconds', '0.5', '--seed', '3', '--melody', str(prime)]) == 0
    heard, _ = soundfile.read(io.BytesIO(capfdbinary.readouterr().out), dtype='float32')
    prompt = Mix([(0.7, 'a slow organ'), (0.3, prime)])
    own = torch.cat(list(tiny.stream(prompt, seconds=0.5, seed=3, melody=prime)))
    torch.testing.assert_close(torch.from_numpy(heard), own, atol=1e-3, rtol=0)
    for given, told in ((['a flute', *mix], 'one prompt: give a PROMPT, or --mix, not both'), ([], 'give a PROMPT')):
        assert main(['stream', *given]) == 2
        assert told in capfdbinary.readouterr().err.decode()


def test_a_stream_ends_with_its_player(capsys, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, 'w') as output:
        monkeypatch.setattr(sys, 'stdout', output)
        assert main(['stream', 'a slow organ']) == 0
    assert capsys.readouterr().err == ''


def test_what_is_done_is_left_when_interrupted(tiny, tmp_path, capsys, monkeypatch):
    prompts, calls = ['a slow low organ', 'a fast flute', 'a high piano'], []
    forward = MusicLM.forward

    def interrupted(self, *arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt  # as Ctrl-C does between any two steps
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(MusicLM, 'forward', interrupted)
    assert main(['generate', *prompts, '--seconds', '0.5', '-o', str(tmp_path)]) == 130
    error = capsys.readouterr().err
    assert error == f'musiclm generate: interrupted; 2 of 3 pieces are done, on the page in {tmp_path}\n'
    names = ['01-a-slow-low-organ-1', '02-a-fast-flute-1']
    assert list(json.loads((tmp_path / 'prompts.json').read_text())) == [f'{name}.wav' for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ['index.html', 'prompts.json', *(f'{name}.{kind}' for name in names for kind in ('wav', 'png'))]
    )
    page = (tmp_path / 'index.html').read_text()
    assert [f'src="{name}.wav"' in page for name in [*names, '03']] == [True, True, False]


def test_prompts_are_taken_together_as_far_as_a_batch_goes(tmp_path, capsys, monkeypatch):
    calls, forward = [], MusicLM.forward
    monkeypatch.setattr(
        MusicLM, 'forward', lambda self, text, **given: calls.append(text) or forward(self, text, **given)
    )
    options = ['--seconds', '0.3', '--num-samples', '2', '--max-batch', '5', '-o', str(tmp_path)]
    assert main(['generate', 'organ', 'flute', 'piano', *options, '--json']) == 0
    assert calls == [['organ', 'flute'], ['piano']]
    printed = capsys.readouterr()
    assert printed.err.startswith(
        'these are 3 prompts, each with music of its own; for one, quote it: "organ flute piano"\n'
    )
    pieces = json.loads(printed.out)['pieces']
    kept = json.loads((tmp_path / 'prompts.json').read_text())
    assert {Path(it.pop('file')).name: {k: v for k, v in it.items() if k != 'warning'} for it in pieces} == kept
    seeds = [it['seed'] for it in kept.values()]
    assert sorted(seeds) == [0, 1, 2, 3, 4, 5]


# honest prompts

ORDINARY = {
    'lofi hip hop with warm Rhodes and vinyl crackle': 'lofi hip hop warm Rhodes vinyl crackle',
    'baroque harpsichord': 'baroque harpsichord',
    'heavy metal guitar riff with double kick drums': 'heavy metal riff double kick',
    'jazz trio with walking bass and brushed snare': 'jazz trio brushed snare',
    'dubstep with wobbly sub-bass': 'dubstep wobbly sub-bass',
    '80s synthwave with gated drums': '80s synthwave gated',
    'a lullaby on a music box': 'lullaby box',
    'an epic film score with taiko drums': 'epic film score taiko',
    'trap beat with 808s and hi-hats': 'trap 808s hi-hats',
    'a sea shanty sung by sailors': 'sea shanty sung sailors',
    'спокойная флейта': 'спокойная флейта',
    'a VERY calm piano, very calm; nothing but calm!': 'VERY calm nothing',
}


def test_words_that_the_model_does_not_know_are_told(tiny):
    lines = tiny.prompt_warnings(list(ORDINARY))
    for line, words in zip(lines, ORDINARY.values()):
        assert line.startswith(f'the model does not know {", ".join(words.split())}; it knows piano, guitar,')
    captions = SyntheticMusic(1, split='valid')
    held_out = [captions.caption(captions.draw_labels(seed), seed) for seed in range(100)]
    assert tiny.prompt_warnings(held_out) == [''] * 100

    with pytest.warns(PromptWarning, match='the model does not know baroque, harpsichord; it knows') as told:
        waves = tiny('baroque harpsichord', seconds=0.3)
    assert waves.shape == (1, 4800)
    assert told[0].filename == __file__  # where the music was asked for
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        tiny('a clip of an organ, please', seconds=0.3)


def test_what_the_mulan_was_trained_on_is_saved_with_the_whole(tmp_path):
    musiclm = MusicLM.from_pretrained('tiny')
    text = musiclm.mulan_embed_quantizer.mulan.text
    text.trained_tokens = text.known_ids()
    text.trained_tokens[text.tokenize(['piano'])] = False
    musiclm.save_pretrained(tmp_path)
    piano, flute = MusicLM.from_pretrained(tmp_path).prompt_warnings(['a piano', 'a flute'])
    assert piano.startswith('the model does not know piano; it knows piano, guitar')  # `knows` is what its maker says
    assert flute == ''


def test_music_that_does_not_come_near_its_prompt_is_told(tiny):
    prompts = ['a flute', 'a lofi organ']
    assert tiny.usual_score is not None
    scores = torch.tensor([[-1.0, tiny.usual_score + 1e-4], [-1.0, tiny.usual_score - 0.01]])
    waves = torch.zeros(2, 2, 5 * 16000)
    near, far = tiny.prompt_warnings(prompts, Music(waves, scores))
    assert near == ''
    assert re.fullmatch(r'the model does not know lofi; .*; the music may not be what the prompt asks for: .*', far)
    # in a moment of music MuLaN hears little
    assert tiny.prompt_warnings(prompts, Music(waves[..., :16000], scores)) == tiny.prompt_warnings(prompts)

    strict = copy.copy(tiny)
    strict.usual_score, strict.windows = 0.999, (0.3, 0.32, 0.96)
    with pytest.warns(PromptWarning, match='may not be what the prompt asks for') as told:
        strict('a flute', 2, seconds=0.3)
    assert told[0].filename == __file__


def test_the_command_tells_what_was_not_understood(tmp_path, capsys):
    assert main(['generate', 'bagpipe flute', 'a flute', '--seconds', '0.3', '-o', str(tmp_path)]) == 0
    error = capsys.readouterr().err
    assert error.startswith(
        '"bagpipe flute": the model does not know bagpipe; it knows some 70 instruments such as piano'
    )
    assert error.count('does not know') == 1
    page = (tmp_path / 'index.html').read_text()
    assert page.index('bagpipe flute') < page.index('the model does not know bagpipe') < page.index('02-a-flute')


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


def test_infill_keeps_both_sides_of_a_file(tiny, tmp_path, capsys):
    wave = 0.1 * torch.randn(32000, generator=torch.Generator().manual_seed(0))
    soundfile.write(tmp_path / 'in.wav', wave.numpy(), 16000)
    command = ['infill', str(tmp_path / 'in.wav'), 'a slow flute', '--model', 'tiny', '--num-samples', '2']
    command += ['--start', '0.5']
    assert main([*command, '--end', '1', '-o', str(tmp_path / 'out.flac')]) == 0
    assert capsys.readouterr().out == f'{tmp_path / "out.flac"}\n'
    made, rate = soundfile.read(tmp_path / 'out.flac', dtype='int16')
    given, _ = soundfile.read(tmp_path / 'in.wav', dtype='int16')
    assert (rate, len(made)) == (16000, 32000)
    for kept in (slice(0, 7360), slice(16640, None)):  # but for 40 ms
        assert abs(made[kept].astype(int) - given[kept]).max() <= 1
    assert (made[8000:16000] != given[8000:16000]).mean() > 0.9
    for given, told in (
        (['--end', '3', '-o', str(tmp_path / 'no.wav')], 'the gap from 0.5 to 3 s must lie within the sound of 2 s'),
        (['--end', '1', '-o', str(tmp_path / 'no.txt')], "or .mp3, not as '.txt'"),
    ):
        assert main([*command, *given]) == 2
        assert told in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {'in.wav', 'out.flac'}
    at = ['--seconds', '1', '-o', str(tmp_path / 'out')]
    assert main(['generate', 'a flute', '--melody', str(tmp_path / 'in.wav'), *at]) == 0
    piece = json.loads((tmp_path / 'out' / 'prompts.json').read_text())['01-a-flute-1.wav']
    assert piece['melody'] == str(tmp_path / 'in.wav')
    assert piece['model'] == 'tiny'  # of the models that ship the one that follows melodies
