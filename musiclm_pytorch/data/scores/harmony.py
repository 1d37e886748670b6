"""Chords: Roman numerals to notes, voices that move little, and lines for the bass."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from musiclm_pytorch.data.attributes import choose
from musiclm_pytorch.data.composition import within
from musiclm_pytorch.data.scores.styles import SCALES

NUMERALS = {'i': 0, 'ii': 2, 'iii': 4, 'iv': 5, 'v': 7, 'vi': 9, 'vii': 11}
QUALITIES = {
    (True, ''): (0, 4, 7),
    (False, ''): (0, 3, 7),
    (True, '7'): (0, 4, 7, 10),
    (False, '7'): (0, 3, 7, 10),
    (True, 'maj7'): (0, 4, 7, 11),
    (True, '6'): (0, 4, 7, 9),
    (False, '6'): (0, 3, 7, 9),
    (False, 'o'): (0, 3, 6),
    (False, 'o7'): (0, 3, 6, 10),
    (True, '5'): (0, 7),
    (False, '5'): (0, 7),
}


@dataclass(frozen=True)
class Chord:
    """A chord over some steps of the music; `tones` are pitch classes, the root first."""

    start: int
    steps: int
    tones: tuple[int, ...]

    @property
    def root(self) -> int:
        return self.tones[0]

    def scale(self, mode: str, tonic: int) -> tuple[int, ...]:
        """The pitch classes that a melody may use here: the mode's, but none a semitone beside a tone of the chord
        that is not in the mode (such as the seventh under the leading tone of a dominant in minor)."""
        usual = {(tonic + step) % 12 for step in SCALES[mode]}
        foreign = set(self.tones) - usual
        kept = {it for it in usual if all((it - tone) % 12 not in (1, 11) for tone in foreign)}
        return tuple(sorted(kept | set(self.tones)))


@cache
def read_chord(numeral: str) -> tuple[int, ...]:
    """Semitones above the tonic of a chord such as 'bVImaj7', the root first. Raises ValueError for any other text."""
    found = re.fullmatch('(b?)([ivIV]+)(.*)', numeral)
    key = (found[2].isupper(), found[3]) if found else None
    if key not in QUALITIES or found[2].lower() not in NUMERALS:
        raise ValueError(f'{numeral!r} is no chord')
    root = NUMERALS[found[2].lower()] - len(found[1])
    return tuple((root + step) % 12 for step in QUALITIES[key])


def read_progression(progression: str, tonic: int, bar: int, halved: bool) -> list[Chord]:
    """The chords of one passage. `halved`: two bars of the table in one of the music, where bars are long."""
    bars = [part.strip().split('/') for part in progression.split('|')]
    if halved and len(bars) % 2 == 0 and all(len(it) == 1 for it in bars):
        bars = [first + second for first, second in zip(bars[::2], bars[1::2])]
    chords, start = [], 0
    for names in bars:
        for name in names:
            tones = tuple((tonic + step) % 12 for step in read_chord(name.strip()))
            chords.append(Chord(start, bar // len(names), tones))
            start += bar // len(names)
    return chords


def nearest(pitch: float, tones: tuple[int, ...], low: int, high: int) -> int:
    """The note of these pitch classes from `low` to `high` that lies next to `pitch`, or next to the range if it is too
    narrow to hold one."""
    found = within(tones, low, high) or within(tones, low - 11, high + 11)
    return min(found, key=lambda it: abs(it - pitch))


@cache
def voicings(tones: tuple[int, ...], low: int, high: int) -> tuple[tuple[int, ...], ...]:
    """Close positions of a chord within a range, each with every tone once (a power chord with the octave)."""
    size = 3 if len(tones) == 2 else len(tones)
    found = within(tones, low, high)
    groups = [tuple(found[i : i + size]) for i in range(len(found) - size + 1)]
    if len(tones) == 2:
        groups = [it for it in groups if it[0] % 12 == tones[0]]
    return tuple(groups or [tuple(found)])


def lead_voices(chords: list[Chord], low: int, high: int, random: np.random.Generator) -> list[tuple[int, ...]]:
    """A voicing of each chord: the first somewhere in the middle, then the one whose voices move least, and not all
    the same way by the same interval."""
    placed: list[tuple[int, ...]] = []
    centre = (low + high) / 2 + random.uniform(-2, 2)
    for chord in chords:

        def cost(voices: tuple[int, ...]) -> float:
            away = 0.15 * abs(sum(voices) / len(voices) - centre)
            if not placed:
                return away
            moves = [b - a for a, b in zip(placed[-1], voices)]
            parallel = len(set(moves)) == 1 and moves[0] != 0
            return away + sum(map(abs, moves)) / len(moves) + 1.5 * parallel

        placed.append(min(voicings(chord.tones, low, high), key=cost))
    return placed


def bass_line(
    pattern: str, chords: list[Chord], mode: str, tonic: int, low: int, high: int, random: np.random.Generator
) -> list[tuple[int, int, int]]:
    """(step, steps, pitch) of a bass that plays `pattern` over the chords; it sets in anew at every change."""
    line: list[tuple[int, int, int]] = []
    top = min(high, low + 19)
    root = nearest(low + 7, (chords[0].root,), low, top)
    for chord, following in itertools.zip_longest(chords, chords[1:], fillvalue=chords[0]):
        roots = within((chord.root,), low, top)
        root = min(roots, key=lambda it: abs(it - root) + 0.2 * abs(it - low - 5))
        goal = nearest(root, (following.root,), low, top)
        fifth_class = chord.tones[2] if len(chord.tones) > 2 else chord.tones[1]
        fifth = choose(random, within((fifth_class,), max(low, root - 7), min(high, root + 8)) or [root])
        third = nearest(root + 4, chord.tones[1:2], max(low, root - 8), high)
        walking = root
        for at in range(chord.start, chord.start + chord.steps):
            letter = pattern[at % len(pattern)]
            first = at == chord.start
            if letter == '-' and line and not first:
                line[-1] = (line[-1][0], at + 1 - line[-1][0], line[-1][2])
                continue
            if letter == '.' or (letter == '-' and first and not line):
                continue
            if letter == 'w' and not first:
                left = chord.start + chord.steps - at
                scale = chord.scale(mode, tonic)
                if left <= 4:  # the last before the change comes from a step away
                    beside = [it for it in (goal - 1, goal + 1, goal - 2, goal + 2) if it % 12 in scale]
                    walking = choose(random, [it for it in beside if low <= it <= high] or [goal])
                else:
                    tones = within(chord.tones, max(low, walking - 5), min(high, walking + 5))
                    walking = choose(random, [it for it in tones if it != walking] or tones)
            pitch = {
                'r': root,
                'o': root + 12 if root + 12 <= high else root,
                't': third,
                'f': fifth,
                'a': goal - 1 if goal > low else goal + 1,
                'w': root if first else walking,
                '-': root,
            }[letter]
            line.append((at, 1, pitch))
    return line
