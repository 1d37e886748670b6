"""ScoreMusic: the same everywhere, true in words, musical in its notes, and played as it is written."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.sound_font import write_sound_font

from musiclm_pytorch import ScoreLabels, ScoreMusic
from musiclm_pytorch.data.attributes import generator
from musiclm_pytorch.data.opening import open_pairs, open_whole_clips
from musiclm_pytorch.data.scores import midi, phrases, rendering
from musiclm_pytorch.data.scores.composer import DRUM_CHANNEL, Note, Part, compose
from musiclm_pytorch.data.scores.harmony import Chord, lead_voices, read_chord, read_progression
from musiclm_pytorch.data.scores.instruments import FAMILIES, INSTRUMENTS, REGISTERS
from musiclm_pytorch.data.scores.labels import ATTRIBUTES, MOODS, fits
from musiclm_pytorch.data.scores.rendering import Room, SoundFont, find_sound_font
from musiclm_pytorch.data.scores.styles import DRUMS, METRES, SCALES, STYLES


@pytest.fixture
def synth():
    """Skips where the machine has no FluidSynth, which pip cannot install."""
    try:
        rendering._library()
    except ImportError as error:
        pytest.skip(str(error))


def music(font: Path, **settings) -> ScoreMusic:
    return ScoreMusic(**{**dict(length=500, seconds=2.0, sample_rate=16000, sound_font=font), **settings})


def piece(seconds: float = 12.0, seed: int = 0, **given) -> tuple[ScoreLabels, list[Part]]:
    labels = ScoreLabels.draw(generator(seed), **given)
    return labels, compose(labels, seconds, generator(seed, 1))


# ---- items; more in test_generated.py ----


def test_waves_have_the_loudness_of_their_dynamics(font, synth):
    data = music(font)
    labels = [data.draw_labels(2, style='pop', texture='solo', dynamics=it) for it in ('soft', 'loud')]
    soft, loud = (data.render(it, 1).square().mean().sqrt() for it in labels)
    assert loud > 2 * soft


def test_other_sound_fonts_play_the_same_music(font, synth, tmp_path):
    other = write_sound_font(tmp_path / 'other.sf2', gain=0.3)
    both = music(font, sound_font=[font, other])
    single = [music(it) for it in (font, other)]
    heard = [[torch.equal(both[i][0], data[i][0]) for data in single] for i in range(8)]
    assert all(any(it) for it in heard)
    assert {tuple(it) for it in heard} >= {(True, False), (False, True)}  # some items of each
    assert [both.labels(i) for i in range(8)] == [single[0].labels(i) for i in range(8)]


# ---- labels ----


def test_labels_are_drawn_around_what_is_given(font):
    labels = music(font).draw_labels(4, style='waltz', lead='oboe', bpm=140, mode='minor', drums=True)
    assert (labels.style, labels.lead, labels.family, labels.metre) == ('waltz', 'oboe', 'woodwind', '3/4')
    assert (labels.bpm, labels.tempo, labels.drums) == (140, 'fast', True)
    assert replace(labels, tonic=1, mode='minor').key == 'C sharp minor'


@pytest.mark.parametrize('attribute', ATTRIBUTES)
def test_every_value_of_an_attribute_can_be_had(attribute):
    for value, seed in itertools.product(ATTRIBUTES[attribute], range(3)):
        labels = ScoreLabels.draw(generator(seed), **{attribute: value})
        assert getattr(labels, attribute) == value
        assert fits(labels.mood, labels)


def test_labels_have_much_variety():
    drawn = [ScoreLabels.draw(generator(i)) for i in range(3000)]
    for name, values in ATTRIBUTES.items():
        assert {getattr(labels, name) for labels in drawn} >= set(values), name
    families = [labels.family for labels in drawn]
    assert min(families.count(it) for it in FAMILIES) > 3000 / len(FAMILIES) / 3
    assert min(it.bpm for it in drawn) < 60 < 160 < max(it.bpm for it in drawn)
    assert len({name for labels in drawn for name in labels.instruments}) >= 60


@pytest.mark.parametrize(
    ('error', 'says', 'make'),
    [
        (ValueError, 'must lie in 8000 to 96000 Hz, got 100000', dict(sample_rate=100000)),
        (ValueError, 'captions_per_clip must be 1 at least', dict(captions_per_clip=0)),
        (ValueError, 'source_share must lie in 0 to 1, got 2', dict(source_share=2)),
        (ValueError, 'tells the style or the lead', dict(mentions=dict(style=0, lead=0))),
        (FileNotFoundError, 'no MIDI file or folder is at nowhere', dict(sources=['nowhere'])),
        (TypeError, 'sources must be a list', dict(sources='tunes')),
    ],
)
def test_bad_settings_are_refused(font, error, says, make):
    with pytest.raises(error, match=says):
        music(font, **make)


@pytest.mark.parametrize(
    ('error', 'says', 'given'),
    [
        (ValueError, "lead must be one of .*got 'kazoo'", dict(lead='kazoo')),
        (TypeError, "no attribute 'colour'", dict(colour='red')),
        (ValueError, 'a waltz is in 3/4, not in 4/4', dict(style='waltz', metre='4/4')),
        (ValueError, 'a metal is in minor here, not in major', dict(style='metal', mode='major')),
        (ValueError, 'the piccolo has no low register', dict(lead='piccolo', register='low')),
        (ValueError, "the violin is no instrument of the family 'brass'", dict(lead='violin', family='brass')),
        (ValueError, 'bpm 60 is not fast', dict(style='blues', bpm=60, tempo='fast')),
        (ValueError, "mood 'sad' needs .* contradict", dict(mood='sad', mode='major', style='ballad')),
        (ValueError, 'a solo has no drums', dict(texture='solo', drums=True)),
        (ValueError, 'a tango has no drums', dict(style='tango', drums=True)),
        (ValueError, "no duty is named 'solo'", dict(instruments=('oboe', 'harp'), duties=('lead', 'solo'))),
        (ValueError, 'each of the instruments', dict(instruments=('oboe', 'harp'))),
        (ValueError, 'the first of the duties is the lead', dict(instruments=('oboe',), duties=('bass',))),
        (ValueError, 'drums must be one of False, True, got 1', dict(drums=1)),
        (ValueError, 'no style has all of', dict(metre='2/4', mood='hypnotic')),
    ],
)
def test_contradictory_labels_are_refused(font, error, says, given):
    with pytest.raises(error, match=says):
        music(font).draw_labels(**given)


def test_a_font_or_a_library_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(rendering, 'FOLDERS', (str(tmp_path),))
    monkeypatch.delenv(rendering.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match='apt-get install fluid-soundfont-gm'):
        find_sound_font()
    (tmp_path / 'FluidR3_GM.sf2').write_bytes(b'RIFF\0\0\0\0sfbk')
    assert find_sound_font() == tmp_path / 'FluidR3_GM.sf2'
    (tmp_path / 'tune.wav').write_bytes(b'RIFF\0\0\0\0WAVE')
    monkeypatch.setenv(rendering.VARIABLE, str(tmp_path / 'tune.wav'))
    with pytest.raises(ValueError, match='is no sound font'):
        find_sound_font()
    monkeypatch.setitem(__import__('sys').modules, 'fluidsynth', None)
    rendering._library.cache_clear()
    with pytest.raises(ImportError, match=r"pip install '\.\[scores\]'"):
        SoundFont(tmp_path / 'FluidR3_GM.sf2')
    rendering._library.cache_clear()


def test_a_font_that_lacks_an_instrument_says_so(synth, tmp_path):
    few = SoundFont.open(write_sound_font(tmp_path / 'few.sf2', range(2), drums=False))
    with pytest.raises(ValueError, match='lacks program 40 of General MIDI'):
        few.render([Part('lead', 0, 40, 0.0, ())], 100, 16000)
    with pytest.raises(ValueError, match='lacks a drum kit'):
        few.render([Part('drums', DRUM_CHANNEL, 0, 0.0, ())], 100, 16000)


# ---- captions ----


@pytest.fixture(scope='module')
def told(font):
    """The labels and the captions of some clips of each split."""
    found = {}
    for split, clips in (('train', 700), ('valid', 150)):
        data = music(font, length=clips, split=split)
        found[split] = [(data.labels(i), data.captions(i)) for i in range(clips)]
    return found


def test_captions_of_the_splits_are_disjoint(told):
    texts = {split: {phrases.plain(it) for _, own in clips for it in own} for split, clips in told.items()}
    assert not texts['train'] & texts['valid']
    assert not set(phrases.PATTERNS['train']) & set(phrases.PATTERNS['valid'])
    assert len(texts['valid']) > 0.98 * 150 * 4  # hardly any caption twice
    # no word of 'valid' is new, but for those of its patterns
    words = {split: {word for it in found for word in it.split()} for split, found in texts.items()}
    of_patterns = set(re.findall('[a-z]+', ' '.join(pattern for pattern, _ in phrases.PATTERNS['valid'])))
    new = {word for word in words['valid'] - words['train'] - of_patterns if word.isalpha()}
    assert len(new) < 0.03 * len(words['valid'])


def test_captions_of_a_clip_differ_and_tell_nothing_that_is_absent(told):
    for labels, found in told['train'][:300] + told['valid']:
        assert len(set(found)) == 4
        for text in found:
            assert not re.search(r'\b(no|not|without|lacks?|free of)\b', text, re.IGNORECASE), text
            if not labels.drums and labels.lead != 'steel drums':
                assert not re.search(r'drum ?(kit|beat|groove)|with drums|by drums|over drums', text), text
            if numbers := re.findall(r'(\d+) (?:bpm|beats)', text.lower()):
                assert numbers == [str(round(labels.bpm))]


def test_misspellings_are_rare_and_in_training_only(told):
    known = set(re.findall('[a-z]+', Path(phrases.__file__).with_name('words.yaml').read_text().lower()))
    known |= {*re.findall('[a-z]+', Path(phrases.__file__).read_text().lower()), 'carries', 'plays'}
    known |= {'sharp', 'major', 'minor', 'dorian', 'mixolydian'}  # of keys
    shares = {
        split: np.mean([bool(set(re.findall('[a-z]{5,}', it.lower())) - known) for _, own in clips for it in own])
        for split, clips in told.items()
    }
    assert shares['valid'] == 0
    assert 0.01 < shares['train'] < 0.06


def test_a_caption_names_what_it_is_asked_to(font):
    data = music(font, split='valid')
    labels = data.draw_labels(3, style='tango', lead='violin', tonic=0, mode='minor', bpm=120, mood='tense')
    for seed in range(20):
        text = data.caption(labels, seed, mention=('style', 'lead', 'bpm', 'key')).lower()
        assert 'tango' in text or 'argentine' in text or 'ballroom' in text
        assert 'violin' in text
        assert '120' in text
        assert 'c minor' in text
    with pytest.raises(ValueError, match='these labels have no drums'):
        data.caption(replace(labels, drums=False), mention=('drums',))


@pytest.mark.parametrize('style', STYLES)
def test_a_solo_is_not_called_an_orchestra(font, style):
    data = music(font, split='valid')
    labels = data.draw_labels(1, style=style, texture='solo')
    texts = [data.caption(labels, seed, mention=('style',)).lower() for seed in range(12)]
    assert not [it for it in texts if re.search('orchestra|symphon|four-part|marching.band', it)]


def test_prompts_name_one_attribute(font):
    data = music(font, split='valid')
    assert set(data.prompts('family', 2)) == set(FAMILIES)
    assert set(data.prompts('dynamics', 1)) == {'soft', 'loud'}  # 'moderate' has no words
    assert all('drum' in it or 'percussion' in it for it in map(str.lower, data.prompts('drums', 6)[True]))
    assert len(data.prompts('tonic', 3)) == 12
    assert all(phrases.held_out(it) for found in data.prompts('mood', 3).values() for it in found)
    with pytest.raises(ValueError, match="no attribute is named 'colour'"):
        data.prompts('colour')


# ---- music ----


@pytest.mark.parametrize('style', STYLES)
def test_notes_keep_to_key_register_and_grid(style):
    _, beat = METRES[STYLES[style].metre]
    for seed in range(6):
        labels, parts = piece(8.0, seed, style=style)
        by_duty = {part.duty: part for part in parts}
        low, high = INSTRUMENTS[labels.lead].span(labels.register)
        assert all(low <= note.pitch <= high for note in by_duty['lead'].notes)
        for duty, name in zip(labels.duties, labels.instruments):
            assert all(INSTRUMENTS[name].low <= note.pitch <= INSTRUMENTS[name].high for note in by_duty[duty].notes)
        assert [part.program for part in parts if part.duty == 'lead'] == [INSTRUMENTS[labels.lead].program]
        assert ('drums' in by_duty) == labels.drums
        for part in parts:
            assert (part.channel == DRUM_CHANNEL) == (part.duty == 'drums')
            assert part.notes
            assert all(0 <= note.start < 8 and note.length > 0 and 1 <= note.velocity <= 127 for note in part.notes)
        # with the timing of people taken off, every note lies on the grid of sixteenths, swung or not
        step, swing = 60 / labels.bpm / beat, STYLES[style].swing
        grid = [0.0, 0.5, swing, swing / 2, 1 - (1 - swing) / 2, 0.25, 0.75, 1.0]
        slack = 5 * STYLES[style].loose / 1000 / step / STYLES[style].swung + 0.02
        first = min(note.start for part in parts for note in part.notes)
        for note in by_duty['lead'].notes:
            place = (note.start - first) / step / STYLES[style].swung % 1
            assert min(abs(place - it) for it in grid) < slack
        # the mode's notes, and those of borrowed chords
        weights = np.zeros(12)
        for part in parts:
            if part.channel != DRUM_CHANNEL:
                for note in part.notes:
                    weights[(note.pitch - labels.tonic) % 12] += note.length
        assert weights[list(SCALES[labels.mode])].sum() > 0.8 * weights.sum()


def test_drums_are_general_midis_and_fill_before_a_passage():
    labels, parts = piece(30.0, 3, style='rock', texture='full', bpm=120)
    drums = parts[-1]
    assert {note.pitch for note in drums.notes} <= set(DRUMS.values())
    kicks = sorted(note.start for note in drums.notes if note.pitch == DRUMS['kick'])
    assert np.abs((np.array(kicks) - kicks[0]) / 0.125 - np.round((np.array(kicks) - kicks[0]) / 0.125)).max() < 0.4
    assert labels.drums


def test_a_tune_comes_again():
    """A form has its first passage twice: with loose timing taken off, some rhythm of four bars is heard again."""
    repeated = 0
    for seed in range(12):
        labels, parts = piece(40.0, seed, style='march', texture='solo', lead='trumpet')
        step = 60 / labels.bpm / 4
        first = min(note.start for note in parts[0].notes)
        tune = {(round((note.start - first) / step), note.pitch) for note in parts[0].notes}
        passages = [frozenset((at % 32, pitch) for at, pitch in tune if at // 32 == n) for n in range(5)]
        repeated += len(set(passages)) < len(passages)
    assert repeated >= 9


def test_chords_are_read_and_voices_move_little():
    assert read_chord('I') == (0, 4, 7)
    assert read_chord('bVImaj7') == (8, 0, 3, 7)
    assert read_chord('iio7') == (2, 5, 8, 0)
    with pytest.raises(ValueError, match="'IX' is no chord"):
        read_chord('IX')
    chords = read_progression('I | vi | ii/V7 | I', 0, 16, False)
    assert [(it.start, it.steps) for it in chords] == [(0, 16), (16, 16), (32, 8), (40, 8), (48, 16)]
    assert [it.steps for it in read_progression('I | vi | IV | V', 0, 16, True)] == [8, 8, 8, 8]
    for seed in range(10):
        voices = lead_voices(chords, 52, 72, generator(seed))
        assert all({it % 12 for it in held} == set(chord.tones) for held, chord in zip(voices, chords))
        mean = [np.mean(held) for held in voices]
        assert max(np.abs(np.diff(mean))) <= 4
    # the leading tone of a dominant in minor leaves no seventh beside it
    assert 10 not in Chord(0, 16, read_chord('V7')).scale('minor', 0)


LETTERS = {'chords': 'xX012345bf-.', 'bass': 'rtfowa-.', 'melody': 'x-.', 'drums': 'xXo-.'}


def test_the_table_of_styles_is_sound():
    for style in STYLES.values():
        bar, _ = METRES[style.metre]
        patterns = [(kind, it) for kind in ('chords', 'bass', 'melody') for it in getattr(style, kind)]
        patterns += [('drums', it) for kit in style.drums for it in kit.values()]
        assert [it for kind, it in patterns if len(it) % bar or set(it) - set(LETTERS[kind])] == []
        assert {drum for kit in style.drums for drum in kit} <= set(DRUMS)
        assert style.moods
        assert set(style.moods) <= set(MOODS)
        assert {*style.comping, *style.pads, *style.seconds} <= set(INSTRUMENTS)
        assert all('l' in INSTRUMENTS[it].duties for it in style.leads)
        assert all('b' in INSTRUMENTS[it].duties or 'l' in INSTRUMENTS[it].duties for it in style.basses)
        assert set(style.progressions) <= set(SCALES)
        for progression in itertools.chain(*style.progressions.values()):
            read_progression(progression, 0, bar, False)
    assert len(STYLES) >= 12
    assert len(INSTRUMENTS) >= 40
    assert set(REGISTERS) == {it for instrument in INSTRUMENTS.values() for it in instrument.registers}


@pytest.mark.slow
def test_every_instrument_plays_in_every_style():
    for style, lead in itertools.product(STYLES, ATTRIBUTES['lead']):
        _, parts = piece(3.0, 1, style=style, lead=lead)
        assert parts[0].notes


def test_every_style_and_instrument_sounds(font, synth):
    data = music(font, seconds=1.0, sample_rate=8000)
    for style in STYLES:
        assert data.render(data.draw_labels(1, style=style, texture='full'), 1).abs().max() > 0.05
    for lead in ATTRIBUTES['lead']:
        assert data.render(data.draw_labels(1, lead=lead, texture='solo'), 1).abs().max() > 0.05


# ---- sound ----


def test_a_part_is_played_at_its_time_and_pitch(font, synth):
    sine = SoundFont.open(find_sound_font(font))
    wave = sine.render([Part('lead', 0, 40, 0.0, (Note(0.5, 0.4, 69, 100),))], 24000, 24000)
    assert np.abs(wave[:11900]).max() < 1e-4 * np.abs(wave).max()
    assert abs(np.abs(np.fft.rfft(wave)).argmax() - 440) <= 2
    assert np.abs(wave[23500:]).max() < 0.05 * np.abs(wave).max()
    quiet = sine.render([Part('lead', 0, 40, -12.0, (Note(0.5, 0.4, 69, 100),))], 24000, 24000)
    assert 9 < 20 * np.log10(np.abs(wave).max() / np.abs(quiet).max()) < 15
    drum = sine.render([Part('drums', DRUM_CHANNEL, 16, 0.0, (Note(0.5, 0.1, 38, 100),))], 24000, 24000)
    assert np.abs(drum[12000:14000]).max() > 0.01
    # a room lengthens it, and what was played before leaves no trace
    notes = [Part('lead', 0, 40, 0.0, (Note(0.0, 0.4, 69, 100),))]
    room = Room(0.8, 0.2, 0.9)
    first, again = (sine.render(notes, 24000, 24000, room) for _ in range(2))
    assert np.array_equal(first, again)
    tail = np.abs(first[16000:]).max()
    assert tail > 20 * np.abs(sine.render(notes, 24000, 24000)[16000:]).max()


def test_more_parts_than_channels_of_midi_are_heard(font, synth):
    channels = [it for it in range(20) if it != DRUM_CHANNEL]
    parts = [Part('score', it, it, 0.0, (Note(0.05 * at, 0.04, 60 + at, 100),)) for at, it in enumerate(channels)]
    wave = SoundFont.open(find_sound_font(font)).render(parts, 24000, 24000)
    heard = np.abs(wave).reshape(-1, 1200).max(axis=1)[: len(parts)]
    assert heard.min() > 1e-3


# ---- MIDI files ----


@pytest.fixture
def tunes(tmp_path) -> Path:
    """Nine files: a clarinet over a bass in D minor at 90 BPM in 3/4, with drums, for 12 bars."""
    mido = pytest.importorskip('mido')
    for number in range(9):
        file = mido.MidiFile(ticks_per_beat=480)
        file.tracks.append(track := mido.MidiTrack())
        track.append(mido.MetaMessage('set_tempo', tempo=mido.bpm2tempo(90)))
        track.append(mido.MetaMessage('time_signature', numerator=3, denominator=4))
        track.append(mido.Message('program_change', channel=0, program=71))
        track.append(mido.Message('program_change', channel=1, program=32))
        for _bar in range(12):
            for beat in range(3):
                high, low = 62 + number + (0, 3, 7)[beat], 38 + number
                for channel, pitch in ((0, high), (1, low), (9, 36)):
                    track.append(mido.Message('note_on', channel=channel, note=pitch, velocity=100))
                for place, (channel, pitch) in enumerate(((0, high), (1, low), (9, 36))):
                    time = 0 if place else 480
                    track.append(mido.Message('note_off', channel=channel, note=pitch, time=time))
        file.save(tmp_path / f'tune{number}.mid')
    return tmp_path


def test_scores_are_described_by_what_is_in_them(font, tunes):
    data = music(font, sources=[tunes], source_share=1.0)
    for i in range(10):
        labels = data.labels(i)
        number = int(labels.source.removeprefix('tune').removesuffix('.mid'))
        assert number != 1  # held out
        assert (labels.instruments, labels.duties) == (('clarinet', 'upright bass'), ('lead', 'bass'))
        assert (labels.bpm, labels.tempo, labels.metre, labels.texture) == (90, 'medium', '3/4', 'duo')
        assert (labels.tonic, labels.mode, labels.drums) == ((2 + number) % 12, 'minor', True)
        assert (labels.register, labels.dynamics) == ('middle', 'loud')
        assert labels.style is labels.mood is labels.articulation is None
        assert 'None' not in ' '.join(data.captions(i))
        parts = data.parts(i)
        assert [part.channel for part in parts] == [0, 1, DRUM_CHANNEL]
        assert 0 <= min(note.start for part in parts for note in part.notes) < 0.06
    valid = music(font, sources=[tunes], source_share=1.0, split='valid')
    assert {valid.labels(i).source for i in range(5)} == {'tune1.mid'}
    mixed = music(font, sources=[tunes], source_share=0.5)
    sources = [mixed.labels(i).source for i in range(60)]
    assert 15 < sources.count('composed') < 45


def test_scores_sound_the_same_everywhere(font, tunes, synth):
    data = music(font, sources=[tunes], source_share=1.0)
    assert torch.equal(data[1][0], music(font, sources=[tunes], source_share=1.0)[1][0])
    with pytest.raises(ValueError, match='only labels with a style'):
        data.render(data.labels(0))


def test_pedal_and_like_programs(tmp_path):
    mido = pytest.importorskip('mido')
    file = mido.MidiFile(ticks_per_beat=480)
    file.tracks.append(track := mido.MidiTrack())
    track.append(mido.Message('control_change', control=64, value=127))
    track.append(mido.Message('note_on', note=60, velocity=80))
    track.append(mido.Message('note_off', note=60, time=480))
    track.append(mido.Message('control_change', control=64, value=0, time=960))
    file.save(tmp_path / 'a.mid')
    (event,) = midi.read_score(tmp_path / 'a.mid').events
    assert event.length == pytest.approx(1.5)
    assert midi.instrument_of(1) == 'piano'
    assert midi.instrument_of(122) is None


def test_damaged_scores_are_named(font, tunes):
    (tunes / 'broken.mid').write_bytes(b'MThd\0\0')
    with pytest.raises(ValueError, match=r'broken\.mid is no MIDI file that can be played'):
        midi.read_score(tunes / 'broken.mid')
    with pytest.raises(ValueError, match='1 MIDI files are in .*it takes 2 at least'):
        midi.find_scores([tunes / 'broken.mid'])


# ---- opening ----


def test_scores_are_opened_by_name(font, monkeypatch):
    monkeypatch.setenv(rendering.VARIABLE, str(font))
    settings = dict(sample_rate=16000, max_seconds=2.0, seed=3)
    train = open_pairs('scores', **settings, synthetic_length=7)
    valid = open_pairs('scores', **settings, training=False, synthetic_valid_length=5)
    assert (len(train), train.split, train.seconds, len(valid), valid.split) == (7, 'train', 2.0, 5, 'valid')
    whole = open_whole_clips('scores', sample_rate=16000, synthetic_length=3, synthetic_seconds=4.0)
    assert (len(whole), whole.seconds, whole.split) == (3, 4.0, 'train')
    with pytest.raises(ValueError, match='scores music has no length of its own'):
        open_pairs('scores', sample_rate=16000, max_seconds=None)
