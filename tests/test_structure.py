"""Structure of clips: right on clips made to be known, undefined where there is nothing to hear."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from musiclm_pytorch import SyntheticMusic
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.evaluation.clip_metrics import (
    STRUCTURE_VALUES,
    StructureResult,
    StructureTruth,
    compare_structure,
    score_structure,
    structure_of,
    summarise_structure,
)
from musiclm_pytorch.evaluation.metric import MetricValue, to_json, undefined
from musiclm_pytorch.evaluation.music_analysis import (
    PROFILES,
    folding,
    novelty,
    repetition,
    tonality,
)

RATE = 16000


def tones(pitches, seconds: float, rate: int = RATE, cents: float = 0.0) -> np.ndarray:
    """Some MIDI notes at once, of three harmonics each."""
    t = np.arange(round(seconds * rate)) / rate
    hertz = [440 * 2 ** ((pitch - 69 + cents / 100) / 12) for pitch in pitches]
    wave = sum(np.sin(2 * np.pi * k * f * t) / k for f in hertz for k in (1, 2, 3))
    return wave * np.minimum(1, np.minimum(t, seconds - t) / 0.01) / (3 * len(hertz))


def strokes(times, seconds: float, rate: int = RATE) -> torch.Tensor:
    """A short sound at each time."""
    wave, t = np.zeros(round(seconds * rate)), np.arange(rate // 10) / rate
    stroke = 0.5 * np.sin(2 * np.pi * 880 * t) * np.exp(-t / 0.02)
    for time in times:
        start = round(time * rate)
        wave[start : start + len(stroke)] += stroke[: len(wave) - start]
    return torch.from_numpy(wave)


def result(**given) -> StructureResult:
    """A result with these values."""
    figures = {name: undefined('not measured') for name in STRUCTURE_VALUES}
    figures |= {name: MetricValue(it, unit='u') for name, it in given.items() if name in STRUCTURE_VALUES}
    return StructureResult(10.0, **figures, **{name: it for name, it in given.items() if name not in STRUCTURE_VALUES})


def joined(seed: int = 0) -> torch.Tensor:
    """Five seconds of one music, and five of another."""
    music = SyntheticMusic(4)
    first = music.draw_labels(seed, instrument='flute', register='high', drums=False, tonic=0, mode='major')
    second = music.draw_labels(seed, instrument='brass', register='low', drums=True, tonic=6, mode='minor')
    return torch.cat([music.render(first), music.render(second)])


# ---- tempo, beats and onsets ----


@pytest.mark.parametrize(('bpm', 'rate'), [(73.3, 16000), (100, 22050), (128.7, 8000), (161, 44100)])
def test_metronome_is_heard_on_the_beat(bpm, rate):
    times = np.arange(0.25, 7.8, 60 / bpm)
    found = structure_of(strokes(times, 8, rate), rate)
    assert found.tempo.value == pytest.approx(bpm, rel=0.003)
    assert found.tempo.unit == 'BPM'
    assert found.pulse_clarity.value > 0.8
    assert found.beat_variation.value < 0.015
    np.testing.assert_allclose(found.onsets, times, atol=0.012)
    assert found.onset_density.value == pytest.approx(len(times) / 8)
    # a beat may be heard before the first stroke, where it would have been
    nearest = [np.abs(np.array(found.beats) - time).min() for time in times]
    assert max(nearest) < 0.02
    assert len(found.beats) - len(times) in (0, 1)


def test_beat_variation_is_that_of_the_beats():
    random = np.random.default_rng(0)
    found, true = [], []
    for _ in range(3):
        distances = 0.5 * (1 + 0.06 * random.standard_normal(18))
        times = 0.3 + np.cumsum(distances)
        times = times[times < 9.8]
        found.append(structure_of(strokes(times, 10), RATE).beat_variation.value)
        true.append(np.diff(times).std() / np.diff(times).mean())
    assert np.mean(found) == pytest.approx(np.mean(true), rel=0.25)


def test_tempo_is_undefined_where_there_is_no_pulse():
    random = np.random.default_rng(1)
    short = structure_of(strokes(np.arange(0.1, 2.8, 0.5), 2.9), RATE)
    assert short.tempo.reason == 'a clip of 2.90 s is too short for a tempo, which takes 3 s'
    assert short.onset_density.value == pytest.approx(6 / 2.9)
    steady = structure_of(torch.from_numpy(tones((60,), 5)), RATE)
    assert 'onsets are too few' in steady.tempo.reason
    irregular = structure_of(strokes(np.sort(random.uniform(0, 19, 60)), 20), RATE)
    assert 'no regular pulse' in irregular.tempo.reason
    assert irregular.pulse_clarity.value < 0.2
    assert irregular.beats == ()
    hiss = structure_of(torch.from_numpy(0.1 * random.standard_normal(10 * RATE)), RATE)
    assert hiss.tempo.value is None
    assert hiss.onset_density.value < 0.3


# ---- key and pitch classes ----


@pytest.mark.parametrize('mode', PROFILES)
def test_cadences_are_heard_in_their_key_and_its_tuning(mode):
    third, sixth = (4, 9) if mode == 'major' else (3, 8)
    chords = [(0, third, 7), (5, sixth, 12), (7, 11, 14), (0, third, 7)]
    for tonic in (0, 4, 7, 11):
        cents = (-40, 0, 35)[tonic % 3]
        wave = np.concatenate([tones([48 + tonic + it for it in chord], 0.6, cents=cents) for chord in chords])
        found = structure_of(torch.from_numpy(wave), RATE)
        assert (found.tonic, found.mode) == (tonic, mode)
        assert 0.6 < found.key_strength.value <= 1
    assert found.key == f'B {mode}'


def test_entropy_of_pitch_classes():
    alone = np.sin(2 * np.pi * 440 * np.arange(3 * RATE) / RATE)
    assert structure_of(torch.from_numpy(alone), RATE).pitch_class_entropy.value < 0.2
    cluster = structure_of(torch.from_numpy(tones(range(60, 72), 3)), RATE)
    assert math.log2(12) - 0.2 < cluster.pitch_class_entropy.value <= math.log2(12)
    energy = np.array([2.0, 1.0, 1.0, *[0.0] * 9])
    assert tonality(np.sqrt(energy)[:, None], np.eye(12))['pitch_class_entropy'].value == pytest.approx(1.5)


def test_no_pitch_has_no_key():
    found = tonality(np.zeros((252, 5)), folding(0.0))
    assert found['tonic'] is None
    assert found['key_strength'].reason == found['pitch_class_entropy'].reason == 'no sound between C1 and C8'


# ---- form ----


@pytest.mark.parametrize('side', [1, 2, 5])
def test_novelty_is_the_plain_difference_of_means(side):
    random = np.random.default_rng(side)
    similarities = random.random((13, 13))
    found = novelty(similarities, side)
    taper = [math.exp(-0.5 * ((i + 0.5 - side) / (0.5 * side)) ** 2) for i in range(2 * side)]
    for t in range(13):
        if not side <= t <= 13 - side:
            assert found[t : t + 1].sum() == 0
            continue
        sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
        for i in range(2 * side):
            for j in range(2 * side):
                within = (i < side) == (j < side)
                sums[within][0] += taper[i] * taper[j] * similarities[t - side + i, t - side + j]
                sums[within][1] += taper[i] * taper[j]
        assert found[t] == pytest.approx(sums[True][0] / sums[True][1] - sums[False][0] / sums[False][1])


@pytest.mark.parametrize(('frames', 'passage'), [(9, 1), (10, 5), (23, 4)])
def test_repetition_is_that_of_all_pairs_of_passages(frames, passage):
    random = np.random.default_rng(frames)
    chroma = np.eye(12)[random.integers(0, 3, frames)].T + 0.1 * random.random((12, frames))
    units = chroma / np.linalg.norm(chroma, axis=0)
    centred = units - units.mean(axis=1, keepdims=True)
    centred /= np.linalg.norm(centred, axis=0)
    count = frames - passage + 1
    again = 0
    for i in range(count):
        others = [j for j in range(count) if abs(i - j) >= passage]
        alike = [np.mean([centred[:, i + k] @ centred[:, j + k] for k in range(passage)]) for j in others]
        again += max(alike, default=-1) >= 0.9
    assert repetition(chroma, passage) == pytest.approx(again / count)


def test_parts_are_told_apart_and_loops_are_heard():
    parts = structure_of(joined(), RATE)
    assert parts.segments.value == 2
    assert parts.boundaries[0] == pytest.approx(5, abs=0.3)
    assert parts.repetition.value < 0.3
    melody = np.concatenate([tones((pitch,), 0.3) for pitch in (60, 64, 67, 65, 62, 71, 69, 66)])
    looped = structure_of(torch.from_numpy(np.tile(melody, 4)), RATE)
    assert looped.segments.value == 1
    assert looped.repetition.value > 0.95
    random = np.random.default_rng(0)
    walk = np.concatenate([tones((pitch,), 0.3) for pitch in random.permutation(np.arange(48, 80))])
    assert structure_of(torch.from_numpy(walk), RATE).repetition.value == 0
    hiss = structure_of(torch.from_numpy(0.1 * random.standard_normal(10 * RATE)), RATE)
    assert (hiss.segments.value, hiss.repetition.value) == (1, 0)


def test_form_is_undefined_in_four_seconds():
    found = structure_of(torch.from_numpy(tones((60, 64, 67), 4.0)), RATE)
    assert found.segments.reason == found.repetition.reason
    assert 'too short for a form' in found.segments.reason
    assert structure_of(torch.from_numpy(tones((60, 64, 67), 4.1)), RATE).segments.value == 1


def test_frames_of_long_clips_are_merged(monkeypatch):
    wave = torch.cat([joined()[:-11], torch.zeros(RATE)])
    whole = structure_of(wave, RATE)
    monkeypatch.setattr('musiclm_pytorch.evaluation.music_analysis.MOST_FRAMES', 100)
    merged = structure_of(wave, RATE)
    assert whole.boundaries != merged.boundaries
    assert merged.boundaries[0] == pytest.approx(whole.boundaries[0], abs=0.2)


# ---- whole clips ----


def test_every_figure_of_silence_is_undefined():
    for wave in (torch.zeros(5 * RATE), torch.full((5 * RATE,), 0.3), 1e-5 * torch.ones(5 * RATE)):
        found = structure_of(wave, RATE)
        assert {it.reason for it in found.figures().values()} == {'the clip is silent'}
        assert (found.key, found.beats, found.boundaries) == (None, (), ())
    # nothing below 8 kHz
    beyond = torch.sin(2 * math.pi * 15000 * torch.arange(3 * 48000).double() / 48000) * torch.hann_window(3 * 48000)
    assert structure_of(beyond, 48000).tempo.reason == 'the clip is silent'
    short = structure_of(torch.ones(10), RATE)
    assert {it.reason for it in short.figures().values()} == {'a clip of 0.00 s is shorter than 1 s'}
    json.dumps([found.to_dict(), to_json(summarise_structure([found, short]))], allow_nan=False)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('seconds', [1.0, 1.53, 3.01, 5.0])
def test_odd_lengths_are_heard_without_a_warning(seconds):
    random = np.random.default_rng(0)
    wave = torch.from_numpy(0.1 * random.standard_normal(round(seconds * 22050)))
    found = structure_of(wave, 22050)
    assert found.key_strength.value is not None
    assert found.seconds == pytest.approx(seconds, abs=1e-4)


def test_rate_and_loudness_and_offset_change_little():
    wave = SyntheticMusic(4, seconds=5.0, sample_rate=44100)[1][0]
    found = structure_of(wave, 44100)
    other = resample(wave, 44100, 16000)
    for again in (structure_of(other, 16000), structure_of(0.1 * wave + 0.2, 44100)):
        assert again.key == found.key
        for name in STRUCTURE_VALUES:
            assert getattr(again, name).value == pytest.approx(getattr(found, name).value, rel=0.02, abs=0.02), name


def test_synthetic_music_is_heard_as_it_is():
    music = SyntheticMusic(20, split='valid')
    found = [structure_of(music[i][0], music.sample_rate) for i in range(20)]
    labels = [music.labels(i) for i in range(20)]
    truth = [StructureTruth(tempo=it.bpm, tonic=it.tonic, mode=it.mode) for it in labels]
    scores = score_structure(found, truth)
    assert scores['tempo_4'].value >= 0.9
    assert scores['key_exact'].value >= 0.8
    assert scores['key_weighted'].value >= scores['key_exact'].value
    summary = summarise_structure(found)
    assert summary['major_share'].value == np.mean([it.mode == 'major' for it in found])
    assert summary['tempo'].value == pytest.approx(np.mean([it.tempo.value for it in found]))


# ---- scores and distances ----


def test_scores_are_those_of_each_pair():
    found = [
        result(tempo=103.9, tonic=7, mode='major', beats=(0.5, 1.0, 1.5, 2.0), segments=2.0, boundaries=(4.6,)),
        result(tempo=51.0, tonic=9, mode='minor', beats=(0.5, 1.2), segments=1.0),
        result(),
    ]
    truth = [
        StructureTruth(tempo=100, tonic=0, mode='major', beats=(0.55, 1.0, 1.5, 2.0), boundaries=(4.0,)),
        StructureTruth(tempo=100, tonic=0, mode='major', beats=(0.5, 1.0), boundaries=()),
        StructureTruth(tempo=100, tonic=0, mode='major', boundaries=(4.0,)),
    ]
    scores = {name: it.value for name, it in score_structure(found, truth).items()}
    assert scores == pytest.approx(
        dict(
            tempo_4=1 / 3,
            tempo_8=1 / 3,
            tempo_4_octave=2 / 3,
            key_exact=0,
            key_weighted=(0.5 + 0.3) / 3,
            beats=(1 + 0.5) / 2,
            boundaries_05=1 / 3,
            boundaries_3=2 / 3,
        )
    )
    half = [replace(found[0], tempo=MetricValue(105.0)), result(tonic=0, mode='major')]
    scores = score_structure(half, [StructureTruth(tempo=100), StructureTruth(tonic=0, mode='major')])
    assert (scores['tempo_4'].value, scores['tempo_8'].value, scores['tempo_8'].count) == (0, 1, 1)
    assert scores['key_exact'].value == 1
    assert scores['beats'].reason == 'beats: known of no clip'


def test_truth_is_checked():
    with pytest.raises(ValueError, match='one truth a clip'):
        score_structure([result()], [])
    with pytest.raises(ValueError, match='tempo must be greater than 0'):
        StructureTruth(tempo=0.0)
    with pytest.raises(ValueError, match='a tonic and a mode'):
        StructureTruth(tonic=3)
    with pytest.raises(ValueError, match="'dorian'"):
        StructureTruth(tonic=3, mode='dorian')
    with pytest.raises(TypeError):
        score_structure([result()], [dict(tempo=3)])


def test_distance_of_distributions():
    reference = [result(tempo=tempo, repetition=0.5) for tempo in (100.0, 110.0, 130.0)]
    generated = [result(tempo=tempo, segments=2.0) for tempo in (137.0, 107.0, 117.0)] + [result()]
    found = compare_structure(generated, reference)
    assert list(found) == list(STRUCTURE_VALUES)
    assert found['tempo'].value == pytest.approx(7)
    assert found['tempo'].unit == 'u'
    expected = dict(
        generated_mean=pytest.approx(361 / 3),
        reference_mean=pytest.approx(340 / 3),
        generated_count=3,
        reference_count=3,
    )
    assert found['tempo'].details == expected
    assert found['repetition'].reason == 'no generated clip has a value, such as: not measured'
    assert found['segments'].reason == 'no reference clip has a value, such as: not measured'
    assert compare_structure(reference, reference[::-1])['tempo'].value == 0
    # not as many on both sides
    assert compare_structure(reference[:1], reference)['tempo'].value == pytest.approx((0 + 10 + 30) / 3)
    with pytest.raises(ValueError, match='generated holds no clips'):
        compare_structure([], reference)


def test_values_are_the_fields_that_are():
    assert tuple(it.name for it in fields(StructureResult) if it.type == 'MetricValue') == STRUCTURE_VALUES
    with pytest.raises(ValueError, match='no clips'):
        summarise_structure([])
    with pytest.raises(TypeError, match='32768'):
        structure_of(torch.zeros(RATE, dtype=torch.int16), RATE)
    with pytest.raises(ValueError, match='shape'):
        structure_of(torch.zeros(1, RATE), RATE)
