"""Labels to a piece: themes in a form, an arrangement of parts and drums, played by people who are not machines."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from musiclm_pytorch.data.attributes import choose
from musiclm_pytorch.data.scores.harmony import Chord, bass_line, lead_voices, nearest, read_progression
from musiclm_pytorch.data.scores.instruments import INSTRUMENTS, Instrument
from musiclm_pytorch.data.scores.labels import ScoreLabels
from musiclm_pytorch.data.scores.melody import compose_melody, second_voice
from musiclm_pytorch.data.scores.styles import DRUMS, METRES, STYLES, Style

FORMS = ('AABA', 'AAB', 'ABAB', 'ABA', 'AABB')
LONGEST_CHORD = 1.9  # seconds a bar may last before it gets two chords
VELOCITY = {'soft': 50, 'moderate': 78, 'loud': 108}
# of a note's time, how much of it sounds
LENGTHS = {'legato': 1.03, 'normal': 0.86, 'staccato': 0.45}
SHORTEST = 0.07  # seconds
# duty: (share of the velocity, dB)
BALANCE = {
    'lead': (1.0, 0.0),
    'chords': (0.82, -7.0),
    'bass': (0.92, -4.0),
    'pad': (0.66, -10.0),
    'second': (0.8, -8.0),
}
# where what goes with a melody in a register lies
WINDOWS = {
    'chords': {'low': (55, 76), 'middle': (46, 66), 'high': (50, 72)},
    'pad': {'low': (57, 77), 'middle': (48, 68), 'high': (54, 75)},
    'second': {'low': (52, 76), 'middle': (46, 67), 'high': (58, 84)},
}
DRUM_CHANNEL = 9
DRUM_LEVEL = -5.0


@dataclass(frozen=True)
class Note:
    """One sound: onset and length in seconds, MIDI number, velocity 1 to 127."""

    start: float
    length: float
    pitch: int
    velocity: int


@dataclass(frozen=True)
class Part:
    """What one player plays on a channel: a program of General MIDI (a drum kit on channel 9), at a level in dB."""

    duty: str
    channel: int
    program: int
    level: float
    notes: tuple[Note, ...]


def compose(labels: ScoreLabels, seconds: float, random: np.random.Generator) -> list[Part]:
    """The parts of an excerpt of `seconds` seconds that begins with a passage of a piece.

    Args:
        labels: what is to be true of it; `style` and `register` must be known.
        seconds: notes that begin later are left out.
        random: another state, another piece.
    """
    return _Composer(labels, seconds, random).parts()


@dataclass(frozen=True)
class _Theme:
    """One passage, to be heard several times: its chords and what each duty plays, in sixteenths."""

    chords: list[Chord]
    steps: int
    lines: dict[str, list[tuple[int, int, int, float]]]  # duty → (step, steps, pitch, accent)
    drums: dict[str, str]


class _Composer:
    def __init__(self, labels: ScoreLabels, seconds: float, random: np.random.Generator):
        self.labels, self.seconds, self.random = labels, seconds, random
        self.style: Style = STYLES[labels.style]
        self.bar, self.beat = METRES[self.style.metre]
        self.step = 60 / labels.bpm / self.beat  # seconds
        # where the excerpt's first beat lies
        self.first = random.uniform(0.01, 0.06)
        style = self.style
        # chosen once, so that all passages belong to one piece
        self.chord_pattern, self.bass_pattern = self.pattern(style.chords), self.pattern(style.bass)
        self.second_kind = choose(random, ('below', 'held'))
        self.fills = random.random() < 0.8

    def pattern(self, patterns: tuple[str, ...]) -> str:
        """One of them; slow music takes those that leave the beats to be heard."""
        if self.labels.tempo == 'slow':
            patterns = tuple(sorted(patterns, key=self.between)[: -(-len(patterns) // 2)])
        return choose(self.random, patterns)

    def between(self, pattern: str) -> float:
        """The share of a pattern's strokes that fall between the beats."""
        strokes = [at % self.beat != 0 for at, letter in enumerate(pattern) if letter not in '-.']
        return sum(strokes) / len(strokes)

    def parts(self) -> list[Part]:
        themes = {name: self.theme(name) for name in 'AB'}
        form = choose(self.random, FORMS)
        at = int(self.random.random() * len(form))
        lines: dict[str, list[tuple[float, float, int, float]]] = {}
        drums: list[tuple[float, str, float]] = []
        start, number = 0, 0
        while start * self.step + self.first < self.seconds:
            theme = themes[form[(at + number) % len(form)]]
            for duty, line in theme.lines.items():
                lines.setdefault(duty, []).extend((start + it[0], *it[1:]) for it in line)
            if self.labels.drums:
                drums += [(start + it[0], *it[1:]) for it in self.drum_part(theme, opening=number > 0)]
            start, number = start + theme.steps, number + 1
        played = [self.perform(channel, duty, lines[duty]) for channel, duty in enumerate(self.duties(lines))]
        return played + ([self.perform_drums(drums)] if drums else [])

    def duties(self, lines: dict) -> list[str]:
        return [duty for duty in (*self.labels.duties, 'left hand') if duty in lines]

    # ---- writing ----

    def theme(self, name: str) -> _Theme:
        labels, style, random = self.labels, self.style, self.random
        lead = INSTRUMENTS[labels.lead]
        halved = self.bar * self.step > LONGEST_CHORD
        progression = choose(random, style.progressions[labels.mode])
        chords = read_progression(progression, labels.tonic, self.bar, halved)
        while chords[-1].start + chords[-1].steps < 4 * self.bar:  # a passage has four bars at least
            length = chords[-1].start + chords[-1].steps
            chords += [replace(it, start=it.start + length) for it in chords]
        steps = chords[-1].start + chords[-1].steps
        span = lead.span(labels.register)
        # B lies a little higher where there is room
        low, high = span
        span = (low + 2, high) if name == 'B' and high - low > 12 else (low, min(high, low + 17))
        alone = labels.texture == 'solo' and 'c' not in lead.duties
        tune = compose_melody(style, chords, labels.mode, labels.tonic, span, alone, random)
        lines = {'lead': [(*it, 1.0) for it in tune]}
        if 'chords' in labels.duties:
            player = self.player('chords')
            window = self.window('chords', player)
            lines['chords'] = self.comp(self.chord_pattern, chords, window, player, roots='bass' not in labels.duties)
        elif labels.texture == 'solo' and 'c' in lead.duties and labels.register != 'low':
            top = min(it[2] for it in tune) - 1
            window = (max(lead.low, top - 17), top)
            if window[1] - window[0] >= 14:
                lines['left hand'] = self.comp(self.chord_pattern, chords, window, lead, roots=True)
        if 'bass' in labels.duties:
            player = self.player('bass')
            low, high = max(player.low, 28), min(player.high, max(player.low, 28) + 22)
            line = bass_line(self.bass_pattern, chords, labels.mode, labels.tonic, low, high, random)
            lines['bass'] = [(*it, 1.0) for it in line]
        if 'pad' in labels.duties:
            window = self.window('pad', self.player('pad'))
            voices = lead_voices([replace(it, tones=it.tones[:3]) for it in chords], *window, random)
            lines['pad'] = [(it.start, it.steps, pitch, 1.0) for it, held in zip(chords, voices) for pitch in held]
        if 'second' in labels.duties:
            window = self.window('second', self.player('second'))
            line = second_voice(tune, chords, window, self.second_kind, self.beat)
            lines['second'] = [(*it, 1.0) for it in line]
        drums = choose(random, style.drums) if style.drums else {}
        return _Theme(chords, steps, lines, drums)

    def player(self, duty: str) -> Instrument:
        return INSTRUMENTS[self.labels.instruments[self.labels.duties.index(duty)]]

    def window(self, duty: str, player: Instrument) -> tuple[int, int]:
        """Where the notes of a duty lie: under the melody, or above one that is low, as far as the player can."""
        low, high = WINDOWS[duty][self.labels.register]
        up = max(0, player.low - low) // 12 * 12 + (12 if max(0, player.low - low) % 12 > (high - low - 12) else 0)
        return max(low + up, player.low), min(high + up, player.high)

    def comp(
        self, pattern: str, chords: list[Chord], window: tuple[int, int], player: Instrument, *, roots: bool
    ) -> list[tuple[int, int, int, float]]:
        """Chords in the rhythm of `pattern`, which may break them; with their roots below if `roots`."""
        low, high = window
        lowest = max(low - 14, player.low)
        voiced = lead_voices(chords, low, high, self.random)
        notes = []
        for chord, voices in zip(chords, voiced):
            end = chord.start + chord.steps
            steps = [pattern[at % len(pattern)] for at in range(chord.start, end)]
            if steps[0] == '-':  # a chord sounds anew where it changes
                steps[0] = 'x' if 'x' in pattern or 'X' in pattern else '0'
            fifth = chord.tones[2] if len(chord.tones) > 2 else chord.tones[1]
            bass = {'b': chord.root, 'f': fifth}
            for place, letter in enumerate(steps):
                if letter in '-.':
                    continue
                length = 1 + len(list(takewhile('-'.__eq__, steps[place + 1 :])))
                if letter in bass:
                    pitches = [nearest(voices[0] - 9, (bass[letter],), lowest, max(low + 6, lowest + 11))]
                elif letter.isdigit():
                    octave, tone = divmod(int(letter), len(voices))
                    pitches = [voices[tone] + 12 * octave]
                else:
                    pitches = list(voices)
                accent = {'X': 1.15, 'b': 1.05}.get(letter, 0.95 if letter.isdigit() else 1.0)
                notes += [(chord.start + place, length, pitch, accent) for pitch in pitches]
            if roots and 'b' not in steps:
                root = nearest(low - 5, (chord.root,), lowest, max(low + 6, lowest + 11))
                notes.append((chord.start, chord.steps, root, 1.0))
        return notes

    def drum_part(self, theme: _Theme, *, opening: bool) -> list[tuple[int, str, float]]:
        """(step, drum, accent) of a passage: its pattern, a fill before its end, a crash where the next one begins."""
        random = self.random
        accents = {'x': 0.9, 'X': 1.1, 'o': 0.45}
        hits = []
        fill = self.beat * choose(random, (1, 1, 2)) if self.fills else 0
        for drum, pattern in theme.drums.items():
            for at in range(theme.steps):
                letter = pattern[at % len(pattern)]
                filled = at >= theme.steps - fill and drum not in ('kick', 'hat', 'ride', 'shaker')
                if letter in accents and not filled:
                    hits.append((at, drum, accents[letter] * (1.0 if at % self.beat == 0 else 0.8)))
        has_toms = 'snare' in theme.drums and self.style.loose > 0
        toms = choose(
            random, (('snare', 'high tom', 'mid tom', 'low tom'), ('high tom', 'mid tom', 'low tom', 'low tom'))
        )
        rolled = toms if has_toms else (next((it for it in ('snare', 'clap', 'stick') if it in theme.drums), None),) * 4
        for at in range(fill):
            if rolled[0] and (at % 2 == 0 or random.random() < 0.55):
                hits.append((theme.steps - fill + at, rolled[4 * at // fill], 0.7 + 0.35 * at / fill))
        if opening and has_toms:
            hits.append((0, 'crash', 0.9))
        return hits

    # ---- playing ----

    def seconds_at(self, step: float) -> float:
        """When a sixteenth is played: of a pair of notes that swings, the first takes more of the time."""
        pair, place = divmod(step, self.style.swung)
        place /= self.style.swung
        swing = self.style.swing
        place = place * 2 * swing if place < 0.5 else swing + (place - 0.5) * 2 * (1 - swing)
        return self.first + (pair + place) * self.style.swung * self.step

    def perform(self, channel: int, duty: str, line: list[tuple[float, float, int, float]]) -> Part:
        labels, random = self.labels, self.random
        solo = duty == 'left hand'
        instrument = INSTRUMENTS[labels.lead] if solo else self.player(duty)
        share, level = BALANCE['chords' if solo else duty]
        held = LENGTHS[labels.articulation] if duty in ('lead', 'second', 'chords') else 0.97
        loose = self.style.loose / 1000
        lag = random.normal(0, loose / 2)
        late = random.normal(0, loose, len(line))
        loud = random.normal(0, 3.5 if loose else 1.0, len(line))
        notes = []
        for (step, steps, pitch, accent), delay, more in zip(line, late, loud):
            start = self.seconds_at(step)
            if start >= self.seconds - 0.03:
                continue
            length = max(SHORTEST, (self.seconds_at(step + steps) - start) * held)
            metric = 8 if step % self.bar == 0 else 5 if step % self.beat == 0 else -6
            arch = 4 * math.sin(math.pi * (step % (4 * self.bar)) / (4 * self.bar)) if duty == 'lead' else 0
            velocity = VELOCITY[labels.dynamics] * share * accent + metric + arch + more
            start = min(max(0.0, start + lag + min(max(delay, -2 * loose), 2 * loose)), self.seconds - 0.01)
            notes.append(Note(start, length, pitch, int(min(max(velocity, 12), 127))))
        channel += channel >= DRUM_CHANNEL
        return Part(duty, channel, instrument.program, instrument.level + level, tuple(notes))

    def perform_drums(self, hits: list[tuple[float, str, float]]) -> Part:
        random, loose = self.random, self.style.loose / 2000
        base = 0.92 * VELOCITY[self.labels.dynamics]
        late = random.normal(0, loose, len(hits))
        loud = random.normal(0, 3.5 if loose else 1.0, len(hits))
        notes = []
        for (step, drum, accent), delay, more in zip(hits, late, loud):
            start = self.seconds_at(step)
            if start < self.seconds - 0.03:
                velocity = int(min(max(base * accent + more, 12), 127))
                notes.append(Note(max(0.0, start + delay), 0.1, DRUMS[drum], velocity))
        return Part('drums', DRUM_CHANNEL, self.style.kit, DRUM_LEVEL, tuple(notes))
