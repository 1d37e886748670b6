"""Data sets that make their music: an item is the same everywhere, clean, and its settings are checked, whichever."""

import pytest
import torch
from helpers.processes import found_elsewhere

from musiclm_pytorch import MelodyPairs, ScoreMusic, SyntheticMusic
from musiclm_pytorch.data.scores import rendering

KINDS = ('synthetic', 'sampled', 'scores', 'pairs')
CAPTIONED = KINDS[:3]


def music(kind, font, **settings):
    settings = dict(length=500, seconds=1.3, sample_rate=16000) | settings
    if kind in ('sampled', 'scores'):
        settings = dict(sound_font=font) | settings
    return dict(scores=ScoreMusic, pairs=MelodyPairs).get(kind, SyntheticMusic)(**settings)


def described(kinds, font, indices):
    """All that items are."""
    found = []
    for data in (music(kind, font, seed=5) for kind in kinds):
        for index in indices:
            wave, other = data[index]
            if isinstance(other, str):
                found.append((wave.numpy().tobytes(), other, data.captions(index), data.labels(index)))
            else:
                found.append((wave.numpy().tobytes(), other.numpy().tobytes(), data.melody(index)))
    return found


@pytest.fixture(scope='module')
def playable(font):
    """The kinds that this machine can play: FluidSynth cannot be installed by pip."""
    try:
        rendering._library()
    except ImportError:
        return ('synthetic', 'pairs')
    return KINDS


def test_items_depend_on_nothing_but_their_index(font, playable):
    here = {kind: described([kind], font, [0, 3, 499]) for kind in playable}
    for kind, found in here.items():
        assert described([kind], font, [499, 3, 0]) == found[::-1]
    assert found_elsewhere(described, playable, font, [0, 3, 499]) == [it for found in here.values() for it in found]


@pytest.mark.parametrize('kind', KINDS)
def test_seed_and_split_make_other_items_and_length_costs_nothing(kind, font):
    def told(length=500, start=0, **settings):
        data = music(kind, font, length=length, **settings)
        return [data.melody(i) if kind == 'pairs' else data.labels(i) for i in range(start, start + 8)]

    assert told() == told(length=600)
    assert told() != told(seed=1)
    assert told() != told(split='valid')
    assert told(length=2**62, start=2**61) == told(length=2**62, start=2**61)
    data = music(kind, font, length=3)
    assert len(data) == 3
    for index in (3, -4):
        with pytest.raises(IndexError, match='data set of 3'):
            data[index]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('rate', [8000, 22050])
def test_waves_are_clean_at_any_rate(kind, rate, font, playable):
    if kind not in playable:
        pytest.skip('FluidSynth is not on this machine')
    data = music(kind, font, sample_rate=rate)
    for index in range(-2, 3):
        item = data[index]
        for wave in item if kind == 'pairs' else item[:1]:
            assert wave.shape == (round(1.3 * rate),)
            assert wave.dtype == torch.float32
            assert torch.isfinite(wave).all()
            assert 0.03 < wave.square().mean().sqrt() < 0.15
            assert wave.abs().max() <= 0.9501
            if kind == 'synthetic':  # sounds throughout, from no level to none
                assert wave.mean().abs() < 1e-4
                assert wave[: rate * 6 // 5].view(6, -1).square().mean(dim=1).min() > 1e-6
            if kind != 'pairs':
                assert max(wave[0].abs(), wave[-1].abs()) < 0.01
        if kind != 'pairs':
            assert item[1] == data.text(index) == data.captions(index)[0]
    if kind == 'sampled':
        assert wave.square().mean().sqrt() == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    ('error', 'says', 'settings'),
    [
        (ValueError, 'length must be 1 at least, got 0', dict(length=0)),
        (ValueError, 'seconds must lie in 1 to 600, got 0.5', dict(seconds=0.5)),
        (ValueError, 'sample_rate must .*8000.* Hz, got 4000', dict(sample_rate=4000)),
        (ValueError, "split must be one of 'train', 'valid', got 'test'", dict(split='test')),
        (ValueError, 'seed must be 0 or above, got -1', dict(seed=-1)),
        (TypeError, 'seconds', dict(seconds='5')),
        (ValueError, "but mentions names 'speed'", dict(mentions=dict(speed=1.0))),
        (ValueError, r"mentions\['tempo'\] must lie in 0 to 1, got 1.5", dict(mentions=dict(tempo=1.5))),
        (FileNotFoundError, r'no sound font is at nowhere\.sf2', dict(sound_font='nowhere.sf2')),
        (ValueError, 'sound_font is an empty list', dict(sound_font=[])),
    ],
)
def test_bad_settings_are_refused(font, error, says, settings):
    for kind in CAPTIONED if settings.keys() & {'mentions', 'sound_font'} else KINDS:
        with pytest.raises(error, match=says):
            music(kind, font, **settings)


@pytest.mark.parametrize('kind', CAPTIONED)
def test_a_caption_tells_what_it_is_asked_to(kind, font):
    data = music(kind, font)
    labels = data.draw_labels(1, tempo='fast')
    with pytest.raises(ValueError, match="some of .*tempo.*, got 'colour'"):
        data.caption(labels, mention=['colour'])
    with pytest.raises(ValueError, match='mention must name some'):
        data.caption(labels, mention=[])
    with pytest.raises(TypeError, match="such as \\('tempo',\\)"):
        data.caption(labels, mention='tempo')
    with pytest.raises(TypeError, match='seed must be an integer, got 1.5'):
        data.caption(labels, 1.5)
    assert data.caption(labels, 1) == data.caption(labels, 1)
    assert len({data.caption(labels, seed) for seed in range(50)}) > 40
