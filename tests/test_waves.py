"""Music that is given back: a tensor like any other, which saves itself and plays in a notebook."""

import base64
import copy
import io
import pickle
import re

import pytest
import soundfile
import torch

from musiclm_pytorch.waves import Music, Waves, WavStream

RATE = 8000


def waves(*shape):
    return Waves.of(torch.rand(*shape, generator=torch.Generator().manual_seed(0)) - 0.5, RATE)


def test_it_is_a_tensor_and_what_is_computed_of_it_is_a_plain_one(tmp_path):
    music = waves(2, 80)
    plain = music.as_subclass(torch.Tensor)
    assert isinstance(music, torch.Tensor)
    assert music.shape == (2, 80)
    assert music.sample_rate == RATE
    for made in (music[0], music * 2, music.sum(dim=1), music.cpu().numpy(), torch.cat([music, plain])):
        assert type(made) in (torch.Tensor, type(plain.numpy()))
    assert torch.equal(music + 1, plain + 1)
    assert music.data_ptr() == plain.data_ptr()
    assert copy.deepcopy(music).sample_rate == copy.copy(music).sample_rate == RATE
    assert copy.copy(music).data_ptr() == music.data_ptr()
    assert repr(music) == 'Waves of shape (2, 80): 0.01 s at 8000 Hz'
    torch.save(music, tmp_path / 'music.pt')
    loaded = torch.load(tmp_path / 'music.pt', weights_only=True)
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, music)


@pytest.mark.parametrize('suffix', ['.wav', '.flac', '.ogg', '.mp3'])
def test_one_piece_goes_into_one_file(tmp_path, suffix):
    path = tmp_path / f'piece{suffix}'
    music = waves(1, 4000)
    assert music.save(path) == [path]
    samples, rate = soundfile.read(path)
    assert rate == RATE
    if suffix in ('.wav', '.flac'):
        assert abs(torch.from_numpy(samples).float() - music[0]).max() < 1e-4


@pytest.mark.parametrize('suffix', ['.wav', '.flac', '.ogg', '.mp3'])
def test_files_are_written_block_by_block(tmp_path, monkeypatch, suffix):
    lengths, write = [], soundfile.SoundFile.write
    monkeypatch.setattr(soundfile.SoundFile, 'write', lambda self, it: (lengths.append(len(it)), write(self, it)))
    music = Waves.of(0.5 * torch.sin(torch.arange(200_000) * 0.1)[None], 24_000)
    (path,) = music.save(tmp_path / f'piece{suffix}')
    assert max(lengths) <= 2**16
    samples, _ = soundfile.read(path, dtype='float32')
    assert len(samples) == music.shape[1]
    assert abs(torch.from_numpy(samples[-150_000:-2000]) - music[0, -150_000:-2000]).max() < 0.1


def test_mp3_has_few_rates(tmp_path):
    for rate in (8000, 11025, 48000, 12345):
        music = Waves.of(waves(1, 4000).as_subclass(torch.Tensor), rate)
        assert soundfile.info(*music.save(tmp_path / 'piece.ogg')).samplerate == rate
        if rate != 12345:
            assert soundfile.info(*music.save(tmp_path / 'piece.mp3')).samplerate == rate
    with pytest.raises(ValueError, match='MP3 has no rate of 12345 Hz; write music of it as'):
        music.save(tmp_path / 'piece.mp3')


def test_several_pieces_go_into_a_file_each(tmp_path):
    music = waves(2, 2, 80)
    paths = music.save(tmp_path / 'piece.wav')
    assert [path.name for path in paths] == [f'piece-{number}.wav' for number in (1, 2, 3, 4)]
    assert abs(torch.from_numpy(soundfile.read(paths[2])[0]).float() - music[1, 0]).max() < 1e-4
    with pytest.raises(ValueError, match=r"not as '\.m4a'"):
        music.save(tmp_path / 'piece.m4a')


def test_a_piece_that_is_too_loud_is_saved_softer_as_a_whole(tmp_path):
    loud = Waves.of(4 * waves(1, 800), RATE)
    loud.save(tmp_path / 'loud.wav')
    samples = torch.from_numpy(soundfile.read(tmp_path / 'loud.wav')[0]).float()
    torch.testing.assert_close(samples, loud[0] / loud.abs().max(), atol=1e-4, rtol=0)
    assert loud.abs().max() > 1  # what was given stays


def streamed(wave, size):
    encoder = WavStream(24_000, len(wave))
    content = b''.join(map(encoder.push, wave.split(size))) + encoder.close()
    return torch.from_numpy(soundfile.read(io.BytesIO(content), dtype='float32')[0])


def test_a_stream_bends_its_peaks_and_nothing_else():
    wave = 2 * torch.sin(torch.arange(4000) * 0.01)
    found = streamed(wave, 4000)
    for size in (7, 1500):
        assert torch.equal(streamed(wave, size), found)
    soft = wave.abs() <= 0.9
    assert torch.equal(found[soft], (wave[soft] * 32767).round() / 32768)
    # where it clipped, no two samples in a row were told apart
    loud = wave[~soft & (wave > 0)].sort().values
    made = streamed(loud, 100)
    assert (made.diff() >= 0).all()
    assert (made < 1).all()
    assert len(made[loud > 1].unique()) > 100
    assert made[0] - loud[0] == pytest.approx(0, abs=1e-3)  # without a step
    assert torch.equal(streamed(-loud, 100), -made)


def test_a_notebook_gets_a_player_for_each_piece():
    music = waves(2, 80)
    sounds = re.findall(r'<audio controls src="data:audio/wav;base64,([^"]*)">', music._repr_html_())
    assert len(sounds) == 2
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[1])))
    assert rate == RATE
    assert abs(torch.from_numpy(samples).float() - music[1]).max() < 1e-4


def test_music_shows_its_best_samples_first():
    music = Music(waves(1, 2, 80), torch.tensor([[0.25, 0.5]]))
    page = music._repr_html_()
    assert page.index('0.500') < page.index('0.250')
    sounds = re.findall(r'base64,([^"]*)"', page)
    best = soundfile.read(io.BytesIO(base64.b64decode(sounds[0])))[0]
    assert abs(torch.from_numpy(best).float() - music.waves[0, 1]).max() < 1e-4
    chosen = Music(waves(2, 80), torch.tensor([[0.25, 0.5], [0.75, 0.1]]))._repr_html_()
    assert chosen.count('<audio') == 2
    assert '0.500' in chosen
    assert '0.750' in chosen


@pytest.mark.parametrize('again', [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_music_is_kept_with_its_rate_and_seeds(again):
    music = Music(waves(2, 80), torch.rand(2, 1), torch.tensor([[3], [4]]))
    kept = again(music)
    assert (type(kept), kept.waves.sample_rate) == (Music, RATE)
    assert all(map(torch.equal, (*kept, kept.seeds), (*music, music.seeds)))
    assert kept._repr_html_() == music._repr_html_()
    assert again(Music(torch.rand(2, 80), torch.rand(2, 1))).seeds is None
