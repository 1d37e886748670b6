"""SyntheticMusic with a sound font: the same compositions, played by sampled instruments within their registers."""

import numpy as np
import pytest
import torch
from helpers.sound_font import write_sound_font

from musiclm_pytorch import SyntheticMusic
from musiclm_pytorch.data.attributes import SAMPLED, SAMPLED_ATTRIBUTES


@pytest.fixture(scope='module')
def font(tmp_path_factory):
    pytest.importorskip('fluidsynth', reason='FluidSynth is not on this machine', exc_type=ImportError)
    return write_sound_font(tmp_path_factory.mktemp('fonts') / 'sine.sf2')


def music(font, **settings) -> SyntheticMusic:
    return SyntheticMusic(**{**dict(length=500, seconds=2.0, sample_rate=16000, sound_font=font), **settings})


def test_an_item_is_a_wave_and_a_caption_that_depend_on_its_index(font):
    data = music(font, seed=3)
    wave, caption = data[7]
    assert wave.shape == (32000,)
    assert wave.abs().max() <= 0.951
    assert wave.square().mean().sqrt() == pytest.approx(0.1, rel=0.01)
    again = music(font, seed=3)
    again[2]
    assert torch.equal(again[7][0], wave)
    assert again[7][1] == caption == data.text(7)
    assert data.labels(7).instrument in SAMPLED
    assert "sound_font='sine.sf2'" in repr(data)


def test_every_instrument_plays_and_keeps_to_its_registers(font):
    data = music(font)
    drawn = [data.labels(i) for i in range(500)]
    assert {it.instrument for it in drawn} == set(SAMPLED) == set(data.ATTRIBUTES['instrument'])
    assert all(it.register in SAMPLED[it.instrument] for it in drawn)
    for name, registers in SAMPLED.items():
        assert {data.draw_labels(i, instrument=name).register for i in range(40)} == set(registers)
        wave = data.render(data.draw_labels(1, instrument=name), 1)
        assert torch.isfinite(wave).all()
        assert wave.abs().max() > 0.1
    assert all(data.draw_labels(i, register='low').instrument != 'violin' for i in range(100))
    # a player may be asked for what it is not known for
    assert data.draw_labels(1, instrument='violin', register='low').register == 'low'


def test_notes_are_played_at_their_time_and_drums_beside_them(font):
    data = music(font)
    labels = data.draw_labels(4, instrument='flute', texture='melody', tempo='slow', drums=False)
    with_drums = data.draw_labels(4, instrument='flute', texture='melody', tempo='slow', drums=True)
    alone, both = data.render(labels, 5), data.render(with_drums, 5)
    assert not torch.equal(alone, both)
    loudness = np.abs(alone.numpy()).reshape(-1, 160).max(axis=1)
    # a beat is a note that begins with silence before it or a change of loudness; the first lies within 60 ms
    assert loudness[:6].max() > 0.05
    assert len(both) == len(alone)


def test_captions_name_what_plays(font):
    data = music(font)
    labels = data.draw_labels(2, instrument='violin')
    words = {data.caption(labels, i, mention=('instrument', 'tempo')).lower() for i in range(30)}
    assert all('violin' in it or 'fiddle' in it for it in words)
    train, valid = ({music(font, split=split).caption(labels, i) for i in range(200)} for split in ('train', 'valid'))
    assert train.isdisjoint(valid)


def test_without_a_sound_font_nothing_changes_and_a_violin_is_refused(font):
    plain = SyntheticMusic(500, seconds=2.0)
    assert {plain.labels(i).instrument for i in range(200)} == set(SyntheticMusic.ATTRIBUTES['instrument'])
    assert plain.ATTRIBUTES['instrument'] != SAMPLED_ATTRIBUTES['instrument']
    with pytest.raises(ValueError, match='the violin is not synthesised.*give SyntheticMusic a sound_font'):
        plain.render(music(font).draw_labels(0, instrument='violin'))


def test_fonts_that_are_not_there_are_named(font, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no sound font is at nowhere\.sf2'):
        SyntheticMusic(sound_font='nowhere.sf2')
    with pytest.raises(ValueError, match='sound_font is an empty list'):
        SyntheticMusic(sound_font=[])
    few = write_sound_font(tmp_path / 'few.sf2', range(2), drums=False)
    data = music(few)
    with pytest.raises(ValueError, match='lacks program'):
        data.render(data.draw_labels(0, instrument='violin', drums=False))
