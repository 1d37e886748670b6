"""SyntheticMusic: true in words, and what is heard is what the labels say; the rest is in test_generated.py."""

import itertools
import re
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.sound_font import write_sound_font

from musiclm_pytorch import MusicLabels, SyntheticMusic
from musiclm_pytorch.data import captions
from musiclm_pytorch.data.attributes import ATTRIBUTES, REGISTERS, SAMPLED, TEMPI, generator
from musiclm_pytorch.data.composition import CHORDS, SCALES, compose
from musiclm_pytorch.data.synthesis import PLAYED_BY, Player, damped_partials, harmonics

FIGURES = Path(__file__).parents[1] / 'benchmarks' / 'synthetic_figures.py'


def music(**settings) -> SyntheticMusic:
    return SyntheticMusic(**{**dict(length=1000, seconds=2.0), **settings})


LABELS = MusicLabels(
    instrument='flute', tempo='fast', mode='minor', register='high', texture='melody', drums=False, tonic=1, bpm=150.4
)


def test_values_of_attributes_are_equally_likely(told):
    drawn = [labels for labels, _ in told['train'][:2400]]
    for name, values in ATTRIBUTES.items():
        counts = Counter(getattr(labels, name) for labels in drawn)
        assert set(counts) == set(values)
        expected = 2400 / len(values)
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values()), (name, counts)


def test_tempo_classes_survive_octave_errors():
    for (name, (low, high)), factor in itertools.product(TEMPI.items(), (0.5, 2)):
        for other, (slowest, fastest) in TEMPI.items():
            assert other == name or high * factor < slowest or low * factor > fastest


# ---- asking for attributes ----


def test_labels_are_drawn_around_what_is_given():
    labels = music().draw_labels(4, instrument='organ', drums=True, bpm=100)
    assert (labels.instrument, labels.drums, labels.bpm, labels.tempo) == ('organ', True, 100, 'medium')
    assert replace(labels, instrument='piano') == music().draw_labels(4, instrument='piano', drums=True, bpm=100)
    assert LABELS.key == 'C sharp minor'


def test_render_follows_its_seed():
    data = music()
    assert torch.equal(data.render(LABELS, 1), music(seed=9, split='valid').render(LABELS, 1))
    assert not torch.equal(data.render(LABELS, 1), data.render(LABELS, 2))


@pytest.mark.parametrize(
    ('error', 'says', 'make'),
    [
        (ValueError, 'seed must be 0 or above, got -1', lambda: music().render(LABELS, -1)),
        (ValueError, "instrument must be one of 'piano'.*got 'kazoo'", lambda: music().draw_labels(instrument='kazoo')),
        (ValueError, 'drums must be one of False, True, got 1', lambda: music().draw_labels(drums=1)),
        (TypeError, "no field 'mood'", lambda: music().draw_labels(mood='sad')),
        (ValueError, 'bpm 130 belongs to no tempo class', lambda: music().draw_labels(bpm=130)),
        (ValueError, "bpm of tempo 'fast' must lie in 146 to 166, got 70", lambda: replace(LABELS, bpm=70)),
    ],
)
def test_bad_input_is_named(error, says, make):
    with pytest.raises(error, match=says):
        make()


# ---- captions ----

# what a caption can be caught saying: pattern by value, told apart from how the grammar is written down
SAYS = {
    'instrument': {
        'piano': r'piano',
        'guitar': r'guitar',
        'strings': r'string',
        'flute': r'flute',
        'brass': r'brass|horn|trumpet',
        'organ': r'organ',
        'bell': r'\bbells?\b|chime|tubular',
        'synth': r'synth|electronic',
    },
    'tempo': {
        'slow': r'\bslow|unhurried|leisurely|peaceful|serene|tranquil|tender|\bsad\b|mournful|sorrowful|melancholy',
        'medium': r'moderate|mid-tempo|medium|walking|sunny|friendly|good-nat|content|pensive|wistful|brood|uneasy',
        'fast': r'\bfast|quick|rapid|brisk|happy|cheerful|joyful|jubilant|agitated|urgent|stormy|frantic',
    },
    'mode': {
        'major': r'major|peaceful|serene|tranquil|tender|sunny|friendly|good-natured|content|happy|cheerful|joy|jubil',
        'minor': r'minor|\bsad\b|mournful|sorrow|melanch|pensive|wistful|brood|uneasy|agitated|urgent|stormy|frantic',
    },
    'register': {
        'low': r'\blow|deep|bass\b',
        'middle': r'mid[- ](?!tempo)|middle',
        'high': r'\bhigh|treble',
    },
    'texture': {
        'melody': r'single|monophonic',
        'chords': r'chord',
        'accompanied': r'accompan|backing',
        'arpeggio': r'arpegg',
    },
    'drums': {
        False: r'(without|no) (drums|percussion)|free of drums',
        True: r'(?<!without )(?<!no )(?<!of )(drum|percussion)',
    },
}  # fmt: skip


@pytest.fixture(scope='module')
def told():
    """The labels and the caption of clips of each split."""
    found = {}
    for split, clips in (('train', 6000), ('valid', 2000)):
        data = music(length=clips, split=split)
        found[split] = [(data.labels(i), data.text(i)) for i in range(clips)]
    return found


@pytest.mark.parametrize('split', ['train', 'valid'])
def test_captions_say_what_is_mentioned_and_nothing_untrue(split, told):
    for labels, text in told[split][:1000]:
        for name, patterns in SAYS.items():
            said = {value for value, pattern in patterns.items() if re.search(pattern, text, re.I)}
            if name == 'tempo' and 'bpm' in labels.mentioned:
                assert not said  # the number says it
                continue
            assert said == ({getattr(labels, name)} if name in labels.mentioned else set()), (name, text)
        numbers = [int(number) for number in re.findall(r'\d+', text)]
        assert numbers == ([round(labels.bpm)] if 'bpm' in labels.mentioned else []), text
        keys = re.findall(r'\b(?:[Ii]n|of) ([A-G](?: sharp| flat)? (?:major|minor))', text)
        assert keys == ([labels.key] if 'key' in labels.mentioned else []), text


def test_each_value_has_four_phrases_of_its_own():
    for where in (captions.ADJECTIVES, captions.PHRASES):
        for name, values in where.items():
            phrases = [phrase for value in values.values() for phrase in value]
            assert len(set(phrases)) == len(phrases) == 4 * len(values), name
    assert all(len(set(names)) == 4 for names in (*captions.NAMES.values(), *captions.NOUNS.values()))


def test_captions_are_many_and_grammatical_at_the_joints(told):
    texts = [text for _, text in told['train'][:2000]]
    assert len(set(texts)) > 1940
    for text in texts:
        assert not re.search(r'  | ,|,,|\ba [aeiou]|\ban [^aeiou]|[{}]', text), text


def test_splits_share_words_but_no_caption(told):
    train, valid = ([text for _, text in told[split]] for split in ('train', 'valid'))

    def plain(texts):
        return {text.lower().rstrip('.') for text in texts}

    def words(texts):
        return {word for text in plain(texts) for word in re.findall(r'[a-z][a-z-]+', text)}

    assert not plain(train) & plain(valid)
    # of the words, only those of the held-out sentence patterns are new
    patterns = {word for (split, _), them in captions.PATTERNS.items() if split == 'valid' for word in words(them)}
    assert words(valid) - words(train) <= patterns | {'performs'}


def test_splits_share_neither_patterns_nor_combinations():
    for told in (True, False):
        assert not set(captions.PATTERNS['train', told]) & set(captions.PATTERNS['valid', told])
    # whatever is mentioned, both splits find a phrasing
    for name in (*captions.MENTIONS, 'bpm', 'key'):
        texts = [
            {music(split=split).caption(LABELS, seed, mention=(name,)).lower().rstrip('.') for seed in range(60)}
            for split in ('train', 'valid')
        ]
        assert min(map(len, texts)) > 1
        assert not texts[0] & texts[1]


def test_captions_tell_as_much_as_they_are_asked_to():
    usual, told = SyntheticMusic(length=400), SyntheticMusic(length=400, mentions=dict(tempo=1, key=1.0, drums=0))
    mentioned = [told.labels(i).mentioned for i in range(400)]
    assert all('tempo' in it and 'drums' not in it for it in mentioned)
    assert all(('key' in it) == ('mode' in it) for it in mentioned)
    assert all('drum' not in told.text(i) for i in range(400))
    # it changes what is told of an item, not the item
    assert all(told.labels(i) == usual.labels(i) for i in range(400))
    assert 0.65 < sum('tempo' in usual.labels(i).mentioned for i in range(400)) / 400 < 0.85


def test_a_caption_has_to_tell_two_attributes():
    with pytest.raises(ValueError, match='tells two attributes at least'):
        SyntheticMusic(mentions=dict.fromkeys(('instrument', 'tempo', 'mode', 'register', 'texture'), 0.0))


def test_mentions_are_kept_to():
    for seed in range(30):
        text = music().caption(LABELS, seed, mention=('instrument', 'key', 'bpm'))
        assert 'flute' in text.lower()
        assert 'C sharp minor' in text
        assert '150' in text


# ---- music ----


@pytest.mark.parametrize('texture', ATTRIBUTES['texture'])
def test_notes_keep_to_key_register_and_grid(texture):
    for seed in range(40):
        labels = music().draw_labels(seed, texture=texture)
        notes, drums = compose(labels, 12.5, generator(seed))
        low, high = REGISTERS[labels.register]
        # the leading tone belongs to the dominant of a minor key
        key = {(labels.tonic + step) % 12 for step in (*SCALES[labels.mode], 11)}
        assert {note.pitch % 12 for note in notes} <= key
        assert all(low <= note.pitch <= high for note in notes)
        assert all(note.start % 0.5 == 0 and note.start < 12.5 for note in (*notes, *drums))
        assert {note.start for note in notes} >= set(range(13))  # something sounds on every beat
        final = {note.pitch % 12 for note in notes if note.start == 12}
        assert final <= {(labels.tonic + step) % 12 for step in CHORDS[labels.mode]['tonic']}
        assert bool(drums) == labels.drums


def test_melody_is_one_note_at_a_time():
    for seed in range(20):
        notes, _ = compose(music().draw_labels(seed, texture='melody'), 16, generator(seed))
        assert len({note.start for note in notes}) == len(notes)


@pytest.mark.parametrize('instrument', PLAYED_BY)
def test_notes_have_neither_clicks_nor_aliases(instrument):
    rate = 16000
    player = Player.draw(rate, 4 * rate, generator(1))
    player.noise[:] = 0
    for pitch in (34, 52, 74, 95):
        hertz = 440 * 2 ** ((pitch - 69) / 12)
        wave = PLAYED_BY[instrument](hertz, 0.5, player)
        assert wave.dtype == np.float32
        assert max(abs(wave[0]), abs(wave[-1])) < 0.02 * abs(wave).max()
        # nothing below the fundamental, where the mirror images of too high partials would show first
        power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
        frequency = np.fft.rfftfreq(len(wave), 1 / rate)
        assert power[frequency < hertz * 0.7].sum() < 1e-3 * power.sum()
        assert power[frequency > 0.48 * rate].sum() < 1e-4 * power.sum()


def test_fast_sums_equal_their_definitions():
    t = np.arange(1001) / 16000
    hertz, size, decay = np.array([220.0, 663.3, 7900.0]), np.array([1.0, 0.5, 2.0]), np.array([3.0, 20.0, 1.0])
    phases = np.array([0.3, 1.0, 0.0])
    found = damped_partials(hertz, size, decay, phases, 1001, 16000)
    waves = size * np.exp(-decay * t[:, None]) * np.sin(2 * np.pi * hertz * t[:, None] + phases)
    np.testing.assert_allclose(found, waves[:, :2].sum(axis=1), atol=2e-5)  # the third lies too high

    phase, shine = 2 * np.pi * 300 * t, np.linspace(0.3, 0.9, 1001)
    k = np.arange(1, 6)
    expected = (np.array([1, 0.5, 0.2, 0.1, 0.7]) * shine[:, None] ** (k - 1) * np.sin(k * phase[:, None])).sum(axis=1)
    np.testing.assert_allclose(harmonics(phase, np.array([1, 0.5, 0.2, 0.1, 0.7]), shine), expected, atol=2e-5)


# ---- with a sound font ----


def sampled(font, **settings) -> SyntheticMusic:
    pytest.importorskip('fluidsynth', reason='FluidSynth is not on this machine', exc_type=ImportError)
    return music(sound_font=font, seconds=1.0, sample_rate=8000, **settings)


def test_every_instrument_plays_and_keeps_to_its_registers(font):
    data = sampled(font)
    assert "sound_font='sine.sf2'" in repr(data)
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
    labels = data.draw_labels(4, instrument='flute', texture='melody', tempo='slow', drums=False)
    alone = data.render(labels, 5)
    assert alone[:480].abs().max() > 0.05  # the first note begins within 60 ms
    assert not torch.equal(alone, data.render(replace(labels, drums=True), 5))
    texts = {data.caption(replace(labels, instrument='violin'), i, mention=('instrument', 'tempo')) for i in range(30)}
    assert all('violin' in it or 'fiddle' in it for it in map(str.lower, texts))


def test_a_violin_needs_a_sound_font_that_has_one(font, tmp_path):
    with_font = sampled(font)
    violin = with_font.draw_labels(0, instrument='violin', drums=False)
    assert {music().labels(i).instrument for i in range(200)} == set(SyntheticMusic.ATTRIBUTES['instrument'])
    with pytest.raises(ValueError, match='the violin is not synthesised.*give SyntheticMusic a sound_font'):
        music().render(violin)
    with pytest.raises(ValueError, match='lacks program'):
        sampled(write_sound_font(tmp_path / 'few.sf2', range(2), drums=False)).render(violin)


def test_fonts_of_few_instruments_play_what_they_have_beside_others(font, tmp_path):
    few = write_sound_font(tmp_path / 'few.sf2', range(2), drums=False, gain=0.3)
    whole, both, alone = sampled(font), sampled([few, font]), sampled(few)
    violin = whole.draw_labels(0, instrument='violin', drums=True)
    assert torch.equal(both.render(violin, 1), whole.render(violin, 1))
    piano = whole.draw_labels(0, instrument='piano', drums=False)
    drawn = [both.render(piano, seed) for seed in range(8)]
    for name in (alone, whole):  # now this font, now that
        same = [torch.equal(wave, name.render(piano, seed)) for seed, wave in enumerate(drawn)]
        assert any(same)
        assert not all(same)
    drummed = replace(piano, drums=True)
    with pytest.raises(ValueError, match='few.sf2 lacks a drum kit'):
        alone.render(drummed)
    assert not any(torch.equal(both.render(drummed, seed), drawn[seed]) for seed in range(8))


# ---- listening by figures; benchmarks/synthetic_figures.py measures more clips ----


@pytest.mark.slow
def test_it_sounds_like_its_labels(monkeypatch):
    """Tempo and key by librosa; the rest by logistic regressions fitted to 'train' and tested on 'valid'."""
    monkeypatch.syspath_prepend(FIGURES.parent)  # for what is beside it
    figures, _ = runpy.run_path(str(FIGURES))['measure'](clips=60, trained=400, seconds=5.0, sample_rate=16000)
    assert figures['tempo within 5 %'] >= 0.9
    assert figures['key, tonic and mode'] >= 0.8
    assert figures['instrument'] >= 0.95
    assert figures['register'] >= 0.95
    assert figures['drums'] >= 0.95
