"""Tunes: motifs of rhythm and contour that come again over other chords, and phrases that come to rest."""

from __future__ import annotations

import numpy as np

from musiclm_pytorch.data.attributes import choose
from musiclm_pytorch.data.composition import within
from musiclm_pytorch.data.scores.harmony import Chord, nearest
from musiclm_pytorch.data.scores.styles import METRES, SCALES, Style

# which motif each bar of a phrase has; the last bar of a passage has a rest in any case
PHRASES = ('aaba', 'abac', 'aabc', 'abab', 'aaab', 'abcb')


def onsets_of(pattern: str) -> list[tuple[int, int]]:
    """(step, steps) of each note of a pattern."""
    found: list[tuple[int, int]] = []
    for at, letter in enumerate(pattern):
        if letter in 'xX':
            found.append((at, 1))
        elif letter == '-' and found:
            found[-1] = (found[-1][0], at + 1 - found[-1][0])
    return found


def contour(length: int, leap: float, random: np.random.Generator) -> list[int]:
    """Steps of a scale from note to note: mostly one, and a leap is followed by steps the other way."""
    moves: list[int] = []
    direction = choose(random, (-1, 1))
    while len(moves) < length:
        if random.random() < leap:
            moves += [direction * choose(random, (2, 3, 4)), -direction]
            direction = -direction
        else:
            moves.append(direction * choose(random, (0, 1, 1, 1, 2)))
            direction = direction if random.random() < 0.65 else -direction
    return moves[:length]


def compose_melody(
    style: Style,
    chords: list[Chord],
    mode: str,
    tonic: int,
    span: tuple[int, int],
    alone: bool,
    random: np.random.Generator,
) -> list[tuple[int, int, int]]:
    """(step, steps, pitch) of a tune over `chords`, all within `span`.

    Notes on a beat and long ones belong to the chord; those between are steps of its scale. A tune that is `alone`
    must tell its key by itself, so it begins on the tonic and comes back to it more often.
    """
    low, high = span
    bar, beat = METRES[style.metre]
    bars = -(-(chords[-1].start + chords[-1].steps) // bar)
    at_step = [chord for chord in chords for _ in range(chord.steps)]
    phrase = choose(random, PHRASES)
    rhythms = {letter: choose(random, style.melody) for letter in 'abc'}
    calmest = min(style.melody, key=lambda it: len(onsets_of(it)))
    contours = {letter: contour(24, style.leap, random) for letter in 'abc'}
    third = (tonic + SCALES[mode][2]) % 12
    middle = (low + high) / 2
    width = min(high - low, 14)
    starts = {letter: middle + width * random.uniform(-0.3, 0.3) for letter in 'abc'}
    notes: list[tuple[int, int, int]] = []
    for number in range(bars):
        letter = phrase[number % 4]
        resting = number == bars - 1
        rhythm = calmest if resting else rhythms[letter]
        # the third of four bars lies highest
        pitch = starts[letter] + (2.5 if number % 4 == 2 else 0)
        for place, (at, steps) in enumerate(onsets_of(rhythm)):
            step = number * bar + at
            if step >= len(at_step):
                break
            chord = at_step[step]
            if place:
                pitch = _moved(pitch, contours[letter][place], chord.scale(mode, tonic), low, high)
            last = resting and place == len(onsets_of(rhythm)) - 1
            if last:
                goals = (tonic,) if tonic in chord.tones and within((tonic,), low, high) else chord.tones
                pitch, steps = nearest(pitch, goals, low, high), max(steps, bar - at)
            elif at % beat == 0 or steps >= beat or place == 0:
                pull = 2.6 if alone or number + place == 0 else 1.6
                pitch = _strong(pitch, chord, {tonic: pull, third: 0.7 * pull, (tonic + 7) % 12: pull / 2}, low, high)
            notes.append((step, steps, int(pitch)))
    return notes


def _strong(pitch: float, chord: Chord, pull: dict[int, float], low: int, high: int) -> int:
    """The tone of the chord near `pitch`; some pitch classes pull by so many semitones."""
    tones = within(chord.tones, low, high)
    return min(tones, key=lambda it: abs(it - pitch) - pull.get(it % 12, 0.0))


def _moved(pitch: float, move: int, scale: tuple[int, ...], low: int, high: int) -> int:
    """The note `move` steps of the scale away from `pitch`, turned back at the ends of the span."""
    ladder = within(scale, low, high)
    place = min(range(len(ladder)), key=lambda i: abs(ladder[i] - pitch)) + move
    if not 0 <= place < len(ladder):
        place -= 2 * move
    return ladder[min(max(place, 0), len(ladder) - 1)]


def second_voice(
    tune: list[tuple[int, int, int]],
    chords: list[Chord],
    span: tuple[int, int],
    kind: str,
    beat: int,
) -> list[tuple[int, int, int]]:
    """A voice beside a tune: 'below' (the tone of the chord under it, note by note) or 'held' (thirds and sevenths of
    the chords that move by small steps, two beats or more each)."""
    low, high = span
    if kind == 'below':
        at_step = [chord for chord in chords for _ in range(chord.steps)]
        voice = []
        for step, steps, pitch in tune:
            shift = 0
            while pitch - 3 + shift > high:
                shift -= 12
            while pitch - 9 + shift < low:
                shift += 12
            tones = at_step[min(step, len(at_step) - 1)].tones
            below = [it for it in within(tones, low, high) if 3 <= pitch + shift - it <= 9]
            voice.append((step, steps, max(below) if below else nearest(pitch + shift - 4, tones, low, high)))
        return voice
    voice, pitch = [], (low + high) / 2
    for chord in chords:
        guides = chord.tones[1:2] + chord.tones[3:4] if len(chord.tones) > 2 else chord.tones[:1]
        pitch = nearest(pitch, guides, low, high)
        first = max(2 * beat, chord.steps // 2) if chord.steps > 2 * beat else chord.steps
        voice.append((chord.start, first, pitch))
        if chord.steps > first:
            other = [it for it in within(chord.tones, low, high) if it != pitch]
            pitch = min(other, key=lambda it: abs(it - pitch), default=pitch)
            voice.append((chord.start + first, chord.steps - first, pitch))
    return voice
