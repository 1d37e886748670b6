"""Prompts that are sounds, latents and mixtures, and prompts to keep away from."""

import numpy as np
import pytest
import soundfile
import torch
from helpers.music import RATE, build_audio_lm, build_quantizer

from musiclm_pytorch import Mix, MusicLM
from musiclm_pytorch.audiolm.generation_args import read_prompts
from musiclm_pytorch.mulan.layers import l2norm
from musiclm_pytorch.waves import Waves

SOUND_RATE = 1000
KEYWORDS = dict(seconds=0.5, seed=1)


@pytest.fixture(scope='module')
def musiclm():
    torch.manual_seed(0)
    return MusicLM(build_audio_lm(), build_quantizer())


@pytest.fixture(scope='module')
def mulan(musiclm):
    return musiclm.mulan_embed_quantizer.mulan


def sound(seed=0):
    return torch.rand(2 * SOUND_RATE, generator=torch.Generator().manual_seed(seed)) - 0.5


def test_a_sound_is_a_prompt_in_every_form(musiclm, mulan, tmp_path):
    wave = sound()
    soundfile.write(tmp_path / 'sound.wav', wave.numpy(), SOUND_RATE, subtype='FLOAT')
    latent = mulan.get_audio_latents(wave[None], sample_rate=SOUND_RATE)[0].detach()
    whole = musiclm(latent, **KEYWORDS)
    assert not torch.equal(whole, musiclm('a slow flute', **KEYWORDS))
    for prompt in (
        tmp_path / 'sound.wav',
        (wave, SOUND_RATE),
        (wave.numpy(), SOUND_RATE),
        (torch.stack((wave, wave)), SOUND_RATE),
        Waves.of(wave[None], SOUND_RATE),
        3 * latent.numpy(),
    ):
        assert torch.equal(musiclm(prompt, **KEYWORDS), whole)
    assert musiclm(musiclm('a slow flute', seconds=2.0), **KEYWORDS).shape == whole.shape  # its own music


def test_kinds_of_prompts_go_together(musiclm):
    prompts = ['a slow flute', (sound(), SOUND_RATE), Mix([(1.0, 'fast drums')])]
    together = musiclm(prompts, **KEYWORDS)
    for row, prompt in enumerate(prompts):
        alone = musiclm(prompt, seconds=0.5, seed=1 + row)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)
    story = musiclm([(0.5, 'a slow flute'), (0.5, (sound(), SOUND_RATE))], seed=1)
    assert story.shape == (1, RATE)
    assert not torch.equal(story, musiclm([(0.5, 'a slow flute'), (0.5, 'fast drums')], seed=1))


def test_a_mix_is_the_direction_of_the_sum(musiclm, mulan):
    words = mulan.get_text_latents(raw_texts=['a slow flute', 'fast drums'])
    heard = mulan.get_audio_latents(sound()[None], sample_rate=SOUND_RATE)
    mix = Mix([(1.4, 'a slow flute'), (0.4, Mix([(2, 'fast drums')])), (0.2, (sound(), SOUND_RATE))])
    latent = l2norm(0.7 * words[0] + 0.2 * words[1] + 0.1 * heard[0])
    music = musiclm(mix, num_samples=2, return_all=True, return_scores=True, **KEYWORDS)
    assert torch.equal(music.waves, musiclm(latent, num_samples=2, return_all=True, **KEYWORDS))
    # it is what the pieces are ranked by
    expected = mulan.get_audio_latents(music.waves[0], sample_rate=RATE) @ latent
    torch.testing.assert_close(music.scores[0], expected, atol=1e-5, rtol=0)
    assert repr(mix).startswith("1.4 'a slow flute' + 0.4 2 'fast drums' + 0.2 ")


def test_a_negative_prompt_leads_away(musiclm):
    plain = musiclm('a slow flute', **KEYWORDS)
    away = musiclm('a slow flute', negative='fast drums', **KEYWORDS)
    assert not torch.equal(away, plain)
    assert torch.equal(musiclm('a slow flute', negative='fast drums', negative_scale=0.0, **KEYWORDS), plain)
    # each stage is led
    longer = dict(seconds=1.0, seed=1, temperature=3.0)
    expected = musiclm('a slow flute', **longer)
    for scale in ((5.0, 0.0, 0.0), (0.0, 5.0, 0.0), (0.0, 0.0, 5.0)):
        made = musiclm('a slow flute', negative='fast drums', negative_scale=scale, **longer)
        assert not torch.equal(made, expected), scale
    several = musiclm(['a slow flute', 'an organ'], negative='fast drums', **KEYWORDS)
    torch.testing.assert_close(several[:1], away, atol=1e-5, rtol=0)
    stream = musiclm.stream('a slow flute', seed=1, seconds=0.5, negative='fast drums')
    torch.testing.assert_close(next(stream)[:100], away[0, :100], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ('prompt', 'error', 'says'),
    [
        (sound(), ValueError, r'the 16 numbers of this MuLaN, got 2000'),
        (sound()[None], ValueError, r'got \(1, 2000\) .*pass the pair of its wave and its rate in Hz'),
        (torch.zeros(16), ValueError, 'points nowhere'),
        (np.full(16, np.nan), ValueError, 'a latent holds NaN'),
        (np.arange(16), ValueError, 'a latent of MuLaN, .* of floats'),
        ((sound(), 0), ValueError, 'sample_rate'),
        ((sound()[:0], SOUND_RATE), ValueError, r'the wave of a prompt of shape \(0,\) has no samples'),
        ((sound().reshape(-1, 2), SOUND_RATE), ValueError, 'the wave of a prompt must have shape'),
        ((sound()[:8], SOUND_RATE), ValueError, 'too short|at least'),
        (Waves.of(sound().view(2, -1), SOUND_RATE), ValueError, r'is 2 pieces of music; pass one, \(music.pieces'),
    ],
)
def test_what_is_no_prompt(musiclm, tmp_path, prompt, error, says):
    for call in (musiclm, musiclm.stream):
        with pytest.raises(error, match=says):
            call(prompt, seconds=0.5)
    with pytest.raises(error, match=says):
        musiclm('a slow flute', negative=prompt, seconds=0.5)


def test_lists_are_of_one_kind_and_lengths_are_heard(musiclm):
    for given in (['a flute', (2.0, 'an organ')], [(1.0, 'an organ'), 'ab'], [(2.0, 'an organ'), tuple('ab'), 'cd']):
        with pytest.raises(TypeError, match='text is a prompt, a list of prompts, or a story|parameter text='):
            musiclm(given)  # beartype looks at one item, drawn at random
        with pytest.raises(TypeError, match=r'a story of pairs \(seconds, prompt\) alone, got a list with'):
            read_prompts(given)
    for keywords in (dict(num_samples=2), dict(return_scores=True)):
        with pytest.raises(ValueError, match='music that is scored must last .* s at least, .*, got 0.001 s'):
            musiclm('a slow flute', seconds=0.001, **keywords)
    with pytest.raises(ValueError, match='seconds=1e-05 is less than a sample'):
        musiclm('a slow flute', seconds=1e-5)


def test_what_is_no_mix(musiclm, tmp_path):
    with pytest.raises(ValueError, match='a Mix of nothing'):
        Mix([])
    with pytest.raises(ValueError, match="the weight of 'a' must be greater than 0, got -1"):
        Mix([(-1, 'a')])
    with pytest.raises(TypeError, match='pairs of weight and prompt'):
        Mix([(1, ['a', 'b'])])
    with pytest.raises(ValueError, match='cancel out'):
        musiclm(Mix([(1, torch.ones(16)), (1, -torch.ones(16))]))
    with pytest.raises(ValueError, match='a prompt must say something'):
        musiclm(Mix([(1, ' ')]))
    with pytest.raises(FileNotFoundError, match='none.wav'):
        musiclm(tmp_path / 'none.wav')
