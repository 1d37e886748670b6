"""What a synthesised clip is described by: the values of each attribute, and the labels of one clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

INSTRUMENTS = ('piano', 'guitar', 'strings', 'flute', 'brass', 'organ', 'bell', 'synth')
# those that a sound font plays, and the registers that are theirs
SAMPLED: dict[str, tuple[str, ...]] = {
    'piano': ('low', 'middle', 'high'),
    'guitar': ('low', 'middle'),
    'strings': ('low', 'middle', 'high'),
    'flute': ('middle', 'high'),
    'brass': ('low', 'middle'),
    'organ': ('low', 'middle', 'high'),
    'bell': ('middle', 'high'),
    'synth': ('low', 'middle', 'high'),
    'electric piano': ('low', 'middle', 'high'),
    'electric guitar': ('low', 'middle'),
    'violin': ('middle', 'high'),
    'cello': ('low', 'middle'),
    'harp': ('middle', 'high'),
    'clarinet': ('middle', 'high'),
    'saxophone': ('low', 'middle'),
    'trumpet': ('middle', 'high'),
    'accordion': ('middle', 'high'),
    'choir': ('low', 'middle'),
}
MODES = ('major', 'minor')
TEXTURES = ('melody', 'chords', 'accompanied', 'arpeggio')
# BPM. Half and double of each range lie outside the other two, so that the class survives an octave error.
TEMPI = {'slow': (64.0, 72.0), 'medium': (94.0, 112.0), 'fast': (146.0, 166.0)}
# MIDI numbers of the lowest and the highest note, accompaniment included: 58 to 165, 208 to 587, 698 to 1,976 Hz
REGISTERS = {'low': (34, 52), 'middle': (56, 74), 'high': (77, 95)}
# as they are spelt in most scores, which differs between the modes
TONICS = {
    'major': ('C', 'D flat', 'D', 'E flat', 'E', 'F', 'F sharp', 'G', 'A flat', 'A', 'B flat', 'B'),
    'minor': ('C', 'C sharp', 'D', 'E flat', 'E', 'F', 'F sharp', 'G', 'G sharp', 'A', 'B flat', 'B'),
}

ATTRIBUTES: dict[str, tuple] = {
    'instrument': INSTRUMENTS,
    'tempo': tuple(TEMPI),
    'mode': MODES,
    'register': tuple(REGISTERS),
    'texture': TEXTURES,
    'drums': (False, True),
    'tonic': tuple(range(12)),
}
SAMPLED_ATTRIBUTES = ATTRIBUTES | {'instrument': tuple(SAMPLED)}

SPLITS = ('train', 'valid')


def generator(*key: int) -> np.random.Generator:
    """The random numbers that belong to a tuple of non-negative integers, alike on every machine and process."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def check_seed(seed: Any, name: str = 'seed') -> int:
    """Give `seed` back as an int. Raises TypeError for anything but an integer, ValueError below 0."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f'{name} must be an integer, got {seed!r}')
    if seed < 0:
        raise ValueError(f'{name} must be 0 or above, got {seed}')
    return int(seed)


def check_split(split: str) -> int:
    """The place of `split` among `SPLITS`; ValueError if it is none of them."""
    if split not in SPLITS:
        raise ValueError(f'split must be one of {", ".join(map(repr, SPLITS))}, got {split!r}')
    return SPLITS.index(split)


def check_value(attribute: str, value: Any, attributes: Mapping[str, Sequence]) -> None:
    """Raise ValueError unless `attribute` is one of `attributes` and may have `value`."""
    if attribute not in attributes:
        raise ValueError(f'no attribute is named {attribute!r}; they are {", ".join(attributes)}')
    allowed = attributes[attribute]
    # 0 == False, but neither stands for the other here
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
        raise ValueError(f'{attribute} must be one of {", ".join(map(repr, allowed))}, got {value!r}')


def tempo_of(bpm: float) -> str:
    """The tempo class of a number of beats per minute; ValueError between and outside the classes."""
    for name, (slowest, fastest) in TEMPI.items():
        if slowest <= bpm <= fastest:
            return name
    ranges = ', '.join(f'{name} {low:g} to {high:g}' for name, (low, high) in TEMPI.items())
    raise ValueError(f'bpm {bpm:g} belongs to no tempo class; they are {ranges}')


@dataclass(frozen=True)
class MusicLabels:
    """All that is to be known of a synthesised clip.

    Fields:
        instrument: one of `INSTRUMENTS`, or of `SAMPLED` with a sound font; every pitched note is played by it.
        tempo: 'slow', 'medium' or 'fast'.
        mode: 'major' or 'minor' (harmonic minor: the seventh is raised over the dominant).
        register: 'low', 'middle' or 'high'; every pitched note lies within `REGISTERS[register]`.
        texture: 'melody' (one note at a time), 'chords', 'accompanied' (a melody over chords) or 'arpeggio'.
        drums: whether kick, snare and hi-hat play along.
        tonic: pitch class of the key, 0 for C to 11 for B.
        bpm: beats per minute, within `TEMPI[tempo]`.
        mentioned: the attributes that the caption of a data set's item tells, 'bpm' among them; not compared.

    Raises ValueError for a value outside its vocabulary.
    """

    instrument: str
    tempo: str
    mode: str
    register: str
    texture: str
    drums: bool
    tonic: int
    bpm: float
    mentioned: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self):
        for name in ATTRIBUTES:
            check_value(name, getattr(self, name), SAMPLED_ATTRIBUTES)
        if tempo_of(self.bpm) != self.tempo:
            low, high = TEMPI[self.tempo]
            raise ValueError(f'bpm of tempo {self.tempo!r} must lie in {low:g} to {high:g}, got {self.bpm:g}')

    @property
    def key(self) -> str:
        """Name of the key, such as 'E flat major'."""
        return f'{TONICS[self.mode][self.tonic]} {self.mode}'

    @classmethod
    def draw(
        cls, random: np.random.Generator, attributes: Mapping[str, Sequence] = ATTRIBUTES, **given: Any
    ) -> MusicLabels:
        """Labels with the given fields, and the others at random: each value in `attributes` is as likely, but that
        sampled instruments keep to their registers.

        Raises TypeError for a field that does not exist, ValueError for a value outside its vocabulary.
        """
        unknown = given.keys() - {it.name for it in fields(cls)}
        if unknown:
            raise TypeError(f'labels have no field {sorted(unknown)[0]!r}; they are {", ".join(ATTRIBUTES)}, bpm')
        if 'bpm' in given:
            given = {'tempo': tempo_of(given['bpm']), **given}
        # drawn whether given or not, so that fixing one field leaves the others as they were
        drawn = {name: choose(random, allowed) for name, allowed in attributes.items()}
        if attributes is SAMPLED_ATTRIBUTES:
            drawn |= drawn_in_register(random, drawn | given, given)
        values = drawn | given
        place = random.random()
        if values['tempo'] in TEMPI:
            low, high = TEMPI[values['tempo']]
            values.setdefault('bpm', round(low + (high - low) * place, 2))
        return cls(**{'bpm': 0.0, **values})


def drawn_in_register(
    random: np.random.Generator, values: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, str]:
    """A register of the sampled instrument, or an instrument of the register, where that is what was given."""
    if 'register' in given:
        suit = [name for name, registers in SAMPLED.items() if given['register'] in registers]
        return {'instrument': choose(random, suit)} if suit else {}
    suit = SAMPLED.get(values['instrument'], ())
    return {'register': choose(random, suit)} if suit else {}


def choose(random: np.random.Generator, values: Sequence, weights: Sequence[float] | None = None) -> Any:
    """One of `values`, each as likely or by `weights`. `Generator.choice` takes ten times as long."""
    if weights is None:
        return values[int(random.random() * len(values))]
    place = random.random() * sum(weights)
    for value, weight in zip(values, weights):
        place -= weight
        if place < 0:
            return value
    return values[-1]
