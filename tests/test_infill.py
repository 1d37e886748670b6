"""A gap in a sound is filled from its left side, chosen by its right side, and both stay as they are."""

import pytest
import torch
from helpers.music import RATE, build_audio_lm, build_quantizer
from helpers.stage_parts import make_transformer

from musiclm_pytorch import MusicLM, Waves
from musiclm_pytorch.audiolm.pieces import log_likelihood

FADE = round(0.04 * RATE)
WINDOWS = (2.0, 1.0, 0.4)


@pytest.fixture(scope='module')
def musiclm():
    torch.manual_seed(0)
    return MusicLM(build_audio_lm(), build_quantizer(), windows=WINDOWS)


def sound(seconds=3.0, rate=RATE, seed=0):
    return 0.1 * torch.randn(round(seconds * rate), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(('start', 'end'), [(1.0, 1.5), (0.0, 0.7), (2.5, 3.0), (0.01, 2.99)])
def test_both_sides_stay_and_the_gap_does_not(musiclm, start, end):
    wave = sound()
    made = musiclm.infill((wave, RATE), start, end, 'a slow flute', num_samples=2, seed=1)
    assert isinstance(made, Waves)
    assert made.sample_rate == RATE
    assert made.shape == wave.shape
    assert made.isfinite().all()
    first, last = round(start * RATE), round(end * RATE)
    assert torch.equal(made[: max(0, first - FADE)], wave[: max(0, first - FADE)])
    assert torch.equal(made[last + FADE :], wave[last + FADE :])
    assert (made[first:last] != wave[first:last]).float().mean() > 0.99


def test_a_candidate_is_chosen_and_made_again_by_its_seed(musiclm):
    def fill(**keywords):
        return musiclm.infill((sound(), RATE), 1.0, 2.0, 'a slow flute', **keywords)

    chosen = fill(num_samples=4, seed=5)
    assert torch.equal(fill(num_samples=4, seed=5), chosen)
    candidates = [fill(num_samples=1, seed=5 + i) for i in range(4)]
    assert len({it.sum().item() for it in candidates}) == 4
    assert sum(torch.allclose(it, chosen, atol=1e-5) for it in candidates) == 1


def test_files_channels_and_other_rates(musiclm, tmp_path):
    wave = sound(rate=2 * RATE)
    Waves.of(wave, 2 * RATE).save(tmp_path / 'in.wav')
    stereo = torch.stack((wave, wave))
    keywords = dict(num_samples=1, seed=1)
    made = musiclm.infill((stereo, 2 * RATE), 1.0, 1.5, 'a', **keywords)
    assert len(made) == 3 * RATE
    # of a file, to its 16 bits
    saved = musiclm.infill(tmp_path / 'in.wav', 1.0, 1.5, 'a', **keywords)
    torch.testing.assert_close(saved[: RATE - FADE], made[: RATE - FADE], atol=1e-4, rtol=0)
    assert torch.equal(musiclm.infill(Waves.of(wave, 2 * RATE), 1.0, 1.5, 'a', **keywords), made)


@pytest.mark.parametrize('stage', ['semantic', 'coarse'])
@torch.inference_mode()
def test_likelihood_is_that_of_decoding_step_by_step(stage):
    transformer = make_transformer(stage, conditioned=True).eval()
    torch.manual_seed(0)
    condition, semantic = torch.randn(2, 3, 16), torch.randint(20, (2, 7))
    ids = (semantic,) if stage == 'semantic' else (semantic, torch.randint(12, (2, 5, 2)))
    *given, own = (it.flatten(1) for it in ids)
    known = 3
    first = known * transformer.num_levels
    state = transformer.prefill(*given, own[:, :first], max_tokens=own.shape[1], conditioning=condition)
    told = []
    for step in range(first, own.shape[1]):
        told.append(transformer.next_logits(state).log_softmax(dim=-1).gather(1, own[:, step, None]))
        if step + 1 < own.shape[1]:
            transformer.decode_step(state, own[:, step])
    found = log_likelihood(transformer, *ids, known=known, conditioning=condition)
    torch.testing.assert_close(found, torch.cat(told, dim=1).mean(dim=1), atol=1e-4, rtol=0)


def test_what_goes_wrong(musiclm):
    for start, end, message in (
        (2.0, 1.0, 'the gap from 2 to 1 s must lie within the sound of 3 s'),
        (1.0, 1.01, 'the gap from 1 to 1.01 s must .* last 0.1 s at least'),
        (-1.0, 1.0, 'the gap from -1 to 1 s'),
        (2.0, 4.0, 'the gap from 2 to 4 s must lie within the sound of 3 s'),
        (float('nan'), 2.0, 'the gap from nan to 2 s'),
    ):
        with pytest.raises(ValueError, match=message):
            musiclm.infill((sound(), RATE), start, end, 'a')
    with pytest.raises(TypeError, match='wave must tell its rate'):
        musiclm.infill(sound(), 1.0, 2.0, 'a')
    with pytest.raises(ValueError, match='num_samples must be greater than 0, got 0'):
        musiclm.infill((sound(), RATE), 1.0, 2.0, 'a', num_samples=0)
    with pytest.raises(ValueError, match="a prompt must say something, got ' '"):
        musiclm.infill((sound(), RATE), 1.0, 2.0, ' ')
    unique = MusicLM(build_audio_lm(unique_consecutive=True), build_quantizer(), windows=WINDOWS)
    with pytest.raises(ValueError, match='tell no times, so they fill no gap'):
        unique.infill((sound(), RATE), 1.0, 2.0, 'a')
