"""The notes of `SyntheticMusic` played with a sound font: which programs an instrument is, and how loud."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from musiclm_pytorch.data.attributes import choose
from musiclm_pytorch.data.composition import Note
from musiclm_pytorch.data.scores.composer import DRUM_CHANNEL, SHORTEST, Part
from musiclm_pytorch.data.scores.composer import Note as Stroke
from musiclm_pytorch.data.scores.instruments import INSTRUMENTS
from musiclm_pytorch.data.scores.rendering import Room, draw_font
from musiclm_pytorch.data.scores.styles import DRUMS
from musiclm_pytorch.data.synthesis import LOUDNESS, finished

# the instruments of General MIDI that one of `SAMPLED` may be, where it matters by register
PROGRAMS: dict[str, dict[str | None, tuple[str, ...]]] = {
    'piano': {None: ('piano',)},
    'guitar': {None: ('nylon guitar', 'steel guitar')},
    'strings': {None: ('string ensemble',)},
    'flute': {None: ('flute', 'recorder'), 'low': ('flute',)},
    'brass': {None: ('brass section',), 'low': ('brass section', 'trombone')},
    'organ': {None: ('church organ',)},
    'bell': {None: ('tubular bells', 'vibraphone'), 'high': ('celesta', 'glockenspiel', 'music box')},
    'synth': {None: ('square lead', 'saw lead', 'polysynth')},
    'electric piano': {None: ('electric piano',)},
    'electric guitar': {None: ('overdriven guitar', 'distorted guitar')},
    'violin': {None: ('violin', 'fiddle')},
    'cello': {None: ('cello',)},
    'harp': {None: ('harp',)},
    'clarinet': {None: ('clarinet',)},
    'saxophone': {None: ('alto sax', 'tenor sax'), 'low': ('baritone sax', 'tenor sax')},
    'trumpet': {None: ('trumpet',)},
    'accordion': {None: ('accordion',)},
    'choir': {None: ('choir', 'voice oohs')},
}
KITS = (0, 0, 8, 16)  # programs of drum kits: standard twice, room, power
DRUM_LEVEL = -6.0  # dB
HELD = 0.95  # of a note's time


def velocity(loudness: float, random: np.random.Generator) -> int:
    """Of a loudness relative to the loudest notes: FluidSynth plays by the square of the velocity."""
    return int(min(127, max(20, 100 * loudness**0.5 + random.uniform(-5, 5))))


def render_sampled(
    notes: list[Note],
    drums: list[Note],
    *,
    fonts: Sequence[Path],
    instrument: str,
    register: str,
    bpm: float,
    samples: int,
    rate: int,
    random: np.random.Generator,
) -> np.ndarray:
    """The wave of a piece by one of the fonts, `(samples,)` float32 of root mean square `LOUDNESS`, peaks at most 0.95.

    Args:
        notes, drums: what to play, with onsets and lengths in beats.
        fonts: paths of sound fonts, each with some of the instruments at least.
        instrument: one of `PROGRAMS`.
        register: that its notes lie in.
        bpm: beats per minute.
        samples, rate: length and sample rate in Hz of the wave.
        random: draws font, program, room, drum kit, touch and where the first beat lies (10 to 60 ms after the start).
    """
    programs = PROGRAMS[instrument]
    players = [INSTRUMENTS[it] for it in programs.get(register, programs[None])]
    font = draw_font(random, fonts, lambda it: any(it.preset(0, player.program) for player in players))
    player = choose(random, [it for it in players if font.preset(0, it.program)] or players)
    beat, first, room = 60 / bpm, random.uniform(0.01, 0.06), Room.draw(random)
    kit, drum_level = choose(random, KITS), DRUM_LEVEL + random.uniform(-2, 2)

    def strokes(line: list[Note], pitch) -> tuple[Stroke, ...]:
        return tuple(
            Stroke(
                first + it.start * beat,
                max(SHORTEST, it.length * beat * HELD),
                pitch(it.pitch),
                velocity(it.loudness, random),
            )
            for it in line
        )

    parts = [Part('lead', 0, player.program, player.level, strokes(notes, int))]
    wave = 0
    if drums:
        parts.append(Part('drums', DRUM_CHANNEL, kit, drum_level, strokes(drums, DRUMS.__getitem__)))
        if not font.preset(DRUM_CHANNEL, kit):  # a font of few instruments: another one has drums
            drummer = draw_font(random, fonts, lambda it: bool(it.preset(DRUM_CHANNEL, kit)))
            wave = drummer.render([parts.pop()], samples, rate, room)
    wave = wave + font.render(parts, samples, rate, room)
    if not np.any(wave):
        raise ValueError(f'{font.path} plays nothing of the {player.name}: its samples are silent there')
    return finished(wave, rate, LOUDNESS)
