"""Styles of music: the tables of `styles.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from musiclm_pytorch.checks import as_tuples
from musiclm_pytorch.data import composition

# sixteenths in a bar, sixteenths in a beat
METRES = {'4/4': (16, 4), '3/4': (12, 4), '2/4': (8, 4), '6/8': (12, 6)}
# semitones of each mode's scale
SCALES = {
    **composition.SCALES,
    'dorian': (0, 2, 3, 5, 7, 9, 10),
    'mixolydian': (0, 2, 4, 5, 7, 9, 10),
}
# General MIDI's notes on the channel of the drums
DRUMS = {
    'kick': 36,
    'stick': 37,
    'snare': 38,
    'clap': 39,
    'hat': 42,
    'pedal': 44,
    'low tom': 45,
    'open': 46,
    'mid tom': 47,
    'crash': 49,
    'high tom': 50,
    'ride': 51,
    'tambourine': 54,
    'tumba': 64,
    'shaker': 70,
}


@dataclass(frozen=True)
class Style:
    """What makes a style. Instruments are names of `instruments.INSTRUMENTS`; `styles.yaml` explains the patterns.

    Fields:
        metre: one of `METRES`.
        bpm: slowest and fastest tempo in beats per minute.
        progressions: for each mode that occurs, some progressions; a piece draws one for each of its two themes.
        chords, bass, drums, melody: patterns; of drums, one for each piece of the kit.
        leads, comping, basses, pads, seconds: who plays the melody, the chords, the bass, held chords, a second voice.
        moods: those that fit.
        drums_share: how often an ensemble has drums; a full arrangement has them where this is above 0.
        swing: share of a pair of notes that its first takes; 0.5 is straight.
        swung: sixteenths in the pair of notes that swing.
        loose: standard deviation of a player's timing in ms.
        kit: program of the drum kit, 0 where a font lacks it.
        leap: how often the melody leaps.
    """

    metre: str
    bpm: tuple[int, int]
    progressions: dict[str, tuple[str, ...]]
    chords: tuple[str, ...]
    bass: tuple[str, ...]
    melody: tuple[str, ...]
    leads: tuple[str, ...]
    comping: tuple[str, ...]
    basses: tuple[str, ...]
    moods: tuple[str, ...]
    pads: tuple[str, ...] = ('string ensemble',)
    seconds: tuple[str, ...] = ('violin', 'flute', 'clarinet')
    drums: tuple[dict[str, str], ...] = ()
    drums_share: float = 0.8
    swing: float = 0.5
    swung: int = 4
    loose: float = 6.0
    kit: int = 0
    leap: float = 0.15


def read_table(name: str | Path) -> dict[str, Any]:
    """A YAML file, or one that lies beside this one."""
    # the loader in C takes a tenth of the time, where PyYAML was built with it
    loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    return yaml.load((Path(__file__).parent / name).read_text(encoding='utf-8'), Loader=loader)


STYLES = {name: Style(**as_tuples(table)) for name, table in read_table('styles.yaml').items()}
