"""Labels to notes: progressions with cadences, melodies over them, accompaniments and drum patterns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from musiclm_pytorch.data.attributes import REGISTERS, MusicLabels, choose

SCALES = {'major': (0, 2, 4, 5, 7, 9, 11), 'minor': (0, 2, 3, 5, 7, 8, 10)}
# A chord is its semitones above the tonic, the root first. Dominants of minor keys have the leading tone.
CHORDS = {
    'major': {
        'tonic': (0, 4, 7),
        'second tonic': (9, 0, 4),
        'fourth': (5, 9, 0),
        'second': (2, 5, 9),
        'fifth': (7, 11, 2),
    },
    'minor': {
        'tonic': (0, 3, 7),
        'second tonic': (8, 0, 3),
        'fourth': (5, 8, 0),
        'second': (2, 5, 8),
        'fifth': (7, 11, 2),
    },
}
# Functional harmony: where a chord may lead, and how often. The tonic returns after every chord or two, so that few
# bars are enough to hear the key.
LEADS = {
    'tonic': {'fourth': 5, 'fifth': 1, 'second tonic': 2, 'second': 1},
    'second tonic': {'tonic': 1, 'fourth': 1},
    'fourth': {'tonic': 3, 'fifth': 1},
    'second': {'fifth': 1},
    'fifth': {'tonic': 1},
}
BEATS_A_CHORD = {'slow': 1, 'medium': 2, 'fast': 2}
# of the root, the third and the fifth of a chord; overtones make the fifth loud enough
VOICES = (1.0, 0.9, 0.5)


@dataclass(frozen=True)
class Note:
    """One sound: onset and length in beats, MIDI number (or name of a drum), and loudness relative to others."""

    start: float
    length: float
    pitch: int | str
    loudness: float


def progression(beats: int, each: int, random: np.random.Generator) -> list[str]:
    """The function at each beat, which changes after `each` beats: from the tonic to a cadence on the tonic."""
    cadence = ['fifth', 'tonic', 'tonic']
    functions = ['tonic'] * max(1, min(each, beats - len(cadence)))
    while len(functions) < beats - len(cadence):
        leads = LEADS[functions[-1]]
        functions += [choose(random, list(leads), list(leads.values()))] * each
    if len(functions) > beats - len(cadence) > 0:
        del functions[beats - len(cadence) :]
    return [*functions, *cadence][: max(beats, 1)]


def chords_of(labels: MusicLabels, beats: int, random: np.random.Generator) -> list[tuple[int, ...]]:
    """The pitch classes of the chord at each beat."""
    functions = progression(beats, BEATS_A_CHORD[labels.tempo], random)
    return [tuple((labels.tonic + step) % 12 for step in CHORDS[labels.mode][name]) for name in functions]


def within(pitch_classes: tuple[int, ...], low: int, high: int) -> list[int]:
    """All MIDI numbers from `low` to `high` of these pitch classes, in rising order."""
    return [pitch for pitch in range(low, high + 1) if pitch % 12 in pitch_classes]


def compose(labels: MusicLabels, beats: float, random: np.random.Generator) -> tuple[list[Note], list[Note]]:
    """Pitched notes and drum notes of a piece of `beats` beats, both in order of their onset."""
    low, high = REGISTERS[labels.register]
    total = max(1, math.ceil(beats))
    chord_at = chords_of(labels, total, random)

    if labels.texture == 'melody':
        notes = melody(labels, chord_at, low + 2, high, random)
    elif labels.texture == 'chords':
        notes = block_chords(chord_at, low, high, random)
    elif labels.texture == 'arpeggio':
        notes = arpeggio(chord_at, low, high, 0.22 if labels.tempo == 'slow' else 0.35, random)
    else:
        notes = melody(labels, chord_at, low + 7, high, random)
        # struck on every beat, an octave or less below the melody
        notes += [
            Note(it.start, it.length, it.pitch, 0.4 * it.loudness)
            for it in block_chords(chord_at, low, low + 11, random)
        ]
    notes = sorted((it for it in notes if it.start < beats), key=lambda it: it.start)
    drums = [it for it in drum_pattern(labels, total, random) if it.start < beats] if labels.drums else []
    return notes, drums


def melody(
    labels: MusicLabels, chord_at: list[tuple[int, ...]], low: int, high: int, random: np.random.Generator
) -> list[Note]:
    """Chord tones on the beats, mostly by small steps, and now and then a note of the scale in between."""
    scale = [(labels.tonic + step) % 12 for step in SCALES[labels.mode]]
    # few and light enough that the beats, not the eighths between them, are the pulse
    split = choose(random, (0.0, 0.15)) if labels.tempo == 'slow' else choose(random, (0.15, 0.25, 0.35))
    pitch = choose(random, within(chord_at[0][:1], low, high))
    notes: list[Note] = []
    beats = len(chord_at)
    for beat in range(beats):
        chord = chord_at[beat]
        tones = within(chord, low, high)
        if beat:
            is_last = beat >= beats - 1 and chord[0] == labels.tonic
            tones = within(chord[:1], low, high) if is_last else tones
            # near the last note, but rather not the same; the root is the most likely of a chord's tones
            weights = [
                (0.4 if tone == pitch else math.exp(-abs(tone - pitch) / 4)) * VOICES[chord.index(tone % 12)] ** 2
                for tone in tones
            ]
            pitch = choose(random, tones, weights)
        if beat < beats - 1 and random.random() < split:
            # the leading tone instead of the seventh over the dominant of a minor key
            steps = {step for step in scale if all((step - tone) % 12 not in (1, 11) for tone in chord)} | set(chord)
            between = [it for it in within(tuple(steps), low, high) if 0 < abs(it - pitch) <= 4]
            notes.append(Note(beat, 0.6, pitch, 1.0))
            notes.append(Note(beat + 0.5, 0.5, choose(random, between or [pitch]), 0.5))
        else:
            notes.append(Note(beat, 1.0, pitch, 1.0))
    return notes


def block_chords(chord_at: list[tuple[int, ...]], low: int, high: int, random: np.random.Generator) -> list[Note]:
    """Three voices that are struck on each beat and move as little as they can."""
    voicing: list[int] = []
    notes = []
    for beat, chord in enumerate(chord_at):
        tones = within(chord, low, high)
        close = [tones[i : i + 3] for i in range(len(tones) - 2)]
        if voicing:
            voicing = min(close, key=lambda it: sum(abs(a - b) for a, b in zip(it, voicing)))
        else:
            rooted = [it for it in close if it[0] % 12 == chord[0]]
            voicing = choose(random, rooted or close)
        notes += [Note(beat, 1.0, pitch, VOICES[chord.index(pitch % 12)]) for pitch in voicing]
    return notes


def arpeggio(
    chord_at: list[tuple[int, ...]], low: int, high: int, light: float, random: np.random.Generator
) -> list[Note]:
    """The tones of each chord one after the other, two a beat: root and third on the beats, the fifth in between."""
    closing = choose(random, (0, 2))  # the fourth note is the root again, or the fifth
    notes = []
    chord, beat_of_chord = None, 0
    for beat, now in enumerate(chord_at):
        chord, beat_of_chord = now, beat_of_chord + 1 if now == chord else 0
        root = within(chord[:1], low, high)[0]
        fifth = within(chord[2:], root, high)[0]
        third = within(chord[1:2], root, high)[-1]
        second = beat_of_chord % 2 == 1 or (beat_of_chord == 0 and beat % 2 == 1)
        on_beat = third if second else root
        between = within((chord[closing],), root, high)[-1] if second else fifth
        # the note on a beat rings through it, the one between is `light`
        notes.append(Note(beat, 1.0, on_beat, 1.0))
        notes.append(Note(beat + 0.5, 0.5, between, light))
    return notes


def drum_pattern(labels: MusicLabels, beats: int, random: np.random.Generator) -> list[Note]:
    """Kick, snare and hi-hat in 4/4."""
    style = choose(random, ('backbeat', 'four on the floor', 'half'))
    hats_between = random.random() < 0.5 and labels.tempo != 'slow'
    notes = []
    for beat in range(beats):
        hit = beat % 4
        if style == 'four on the floor' or (hit in (0, 2)):
            notes.append(Note(beat, 0.5, 'kick', 1.0))
        if hit in (1, 3):
            notes.append(Note(beat, 0.5, 'snare', 0.9))
        notes.append(Note(beat, 0.25, 'hat', 0.8 if style != 'half' else 0.6))
        if hats_between:
            notes.append(Note(beat + 0.5, 0.25, 'hat', 0.35))
    return notes
