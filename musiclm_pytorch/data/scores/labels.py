"""What a clip of `ScoreMusic` is described by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from musiclm_pytorch.data.attributes import TONICS, check_value, choose
from musiclm_pytorch.data.scores.instruments import FAMILIES, INSTRUMENTS, LEADS, REGISTERS
from musiclm_pytorch.data.scores.styles import METRES, SCALES, STYLES

DUTIES = ('lead', 'chords', 'bass', 'pad', 'second')
TEXTURES = ('solo', 'duo', 'ensemble', 'full')
DYNAMICS = ('soft', 'moderate', 'loud')
ARTICULATIONS = ('legato', 'normal', 'staccato')
# BPM at which one class ends and the next begins. Composed pieces keep off the borders, scores may lie anywhere.
TEMPO_BORDERS = {'slow': (0, 80), 'medium': (80, 120), 'fast': (120, 1000)}
COMPOSED_TEMPI = {'slow': (50, 76), 'medium': (84, 116), 'fast': (126, 180)}
BRIGHT, DARK = ('major', 'mixolydian'), ('minor', 'dorian')
# What is true of music in a mood: the modes, tempo classes, dynamics and articulations it may have; none says any.
MOODS: dict[str, dict[str, tuple[str, ...]]] = {
    'happy': dict(mode=BRIGHT, tempo=('medium', 'fast')),
    'sunny': dict(mode=BRIGHT, dynamics=('soft', 'moderate')),
    'playful': dict(tempo=('medium', 'fast'), articulation=('staccato',), dynamics=('soft', 'moderate')),
    'triumphant': dict(mode=BRIGHT, dynamics=('loud',), tempo=('medium', 'fast')),
    'majestic': dict(mode=('major',), dynamics=('loud', 'moderate'), articulation=('legato', 'normal')),
    'romantic': dict(tempo=('slow', 'medium', 'fast'), articulation=('legato',), dynamics=('soft', 'moderate')),
    'elegant': dict(dynamics=('soft', 'moderate'), articulation=('legato', 'normal')),
    'calm': dict(tempo=('slow', 'medium'), dynamics=('soft',), articulation=('legato', 'normal')),
    'dreamy': dict(tempo=('slow', 'medium'), dynamics=('soft',), articulation=('legato',)),
    'laid-back': dict(tempo=('slow', 'medium', 'fast'), dynamics=('soft', 'moderate')),
    'wistful': dict(mode=DARK, tempo=('slow', 'medium', 'fast'), dynamics=('soft', 'moderate')),
    'sad': dict(mode=('minor',), tempo=('slow',)),
    'solemn': dict(mode=DARK, tempo=('slow', 'medium'), articulation=('legato', 'normal')),
    'mysterious': dict(mode=DARK, dynamics=('soft',)),
    'hypnotic': dict(mode=DARK),
    'dark': dict(mode=('minor',), dynamics=('moderate', 'loud')),
    'tense': dict(mode=('minor',), tempo=('medium', 'fast'), articulation=('normal', 'staccato')),
    'passionate': dict(mode=('minor',), dynamics=('loud',)),
    'epic': dict(mode=DARK, dynamics=('loud',)),
    'gritty': dict(dynamics=('loud', 'moderate')),
    'energetic': dict(tempo=('medium', 'fast'), dynamics=('loud',)),
    'groovy': dict(dynamics=('moderate', 'loud')),
}

#: the values of each attribute that a caption may tell and a model may be asked for
ATTRIBUTES: dict[str, tuple] = {
    'style': tuple(STYLES),
    'lead': tuple(it.name for it in INSTRUMENTS.values() if 'l' in it.duties),
    'family': FAMILIES,
    'texture': TEXTURES,
    'tempo': tuple(TEMPO_BORDERS),
    'metre': tuple(METRES),
    'mode': tuple(SCALES),
    'tonic': tuple(range(12)),
    'register': tuple(REGISTERS),
    'dynamics': DYNAMICS,
    'articulation': ARTICULATIONS,
    'mood': tuple(MOODS),
    'drums': (False, True),
}
COMPOSED = 'composed'


def tempo_class(bpm: float) -> str:
    """'slow' below 80 BPM, 'medium' to 120, 'fast' above."""
    return next(name for name, (_, above) in TEMPO_BORDERS.items() if bpm < above or name == 'fast')


@dataclass(frozen=True)
class ScoreLabels:
    """All that is known of a clip of `ScoreMusic`. What is None is not known, and no caption tells it.

    Fields:
        instruments: those that play, the lead first, as `INSTRUMENTS` names them; drums are not among them.
        duties: what each of them does: 'lead', 'chords', 'bass', 'pad' or 'second'.
        texture: 'solo', 'duo', 'ensemble' (3 or 4 play) or 'full' (all that the style has).
        bpm: beats per minute; of dotted quarters in 6/8.
        metre: '4/4', '3/4', '2/4', '6/8', or another one in a score.
        mode: 'major', 'minor', 'dorian' or 'mixolydian'.
        tonic: pitch class of the key, 0 for C to 11 for B.
        drums: whether a drum kit plays along.
        style: one of `STYLES`.
        register: 'low', 'middle' or 'high'; the melody lies within `REGISTERS[register]`.
        dynamics: 'soft', 'moderate' or 'loud'.
        articulation: of the melody: 'legato', 'normal' or 'staccato'.
        mood: one of `MOODS`, whose conditions hold.
        source: 'composed', or the file a score was read from.
        mentioned: the attributes that an item's first caption tells; not compared.

    Raises ValueError for a value outside its vocabulary, and for a mood that contradicts the rest.
    """

    instruments: tuple[str, ...]
    duties: tuple[str, ...]
    texture: str
    bpm: float
    metre: str | None
    mode: str | None
    tonic: int | None
    drums: bool
    style: str | None = None
    register: str | None = None
    dynamics: str | None = None
    articulation: str | None = None
    mood: str | None = None
    source: str = COMPOSED
    mentioned: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self):
        if not self.instruments or len(self.instruments) != len(self.duties):
            raise ValueError(f'each of the instruments {self.instruments} has one duty, got {self.duties}')
        if self.duties[0] != 'lead' or (len(set(self.duties)) < len(self.duties) and self.source == COMPOSED):
            raise ValueError(f'the first of the duties is the lead, and none comes twice, got {self.duties}')
        if unknown := [it for it in self.duties if it not in DUTIES]:
            raise ValueError(f'no duty is named {unknown[0]!r}; they are {", ".join(DUTIES)}')
        if unknown := [it for it in self.instruments if it not in INSTRUMENTS]:
            raise ValueError(f'no instrument is named {unknown[0]!r}; they are {", ".join(INSTRUMENTS)}')
        for name in ('style', 'texture', 'mode', 'tonic', 'register', 'dynamics', 'articulation', 'mood', 'drums'):
            if (value := getattr(self, name)) is not None:
                check_value(name, value, ATTRIBUTES)
        if self.source == COMPOSED and not fits(self.mood, self):
            raise ValueError(f'mood {self.mood!r} needs {MOODS[self.mood]}, which these labels contradict')

    @property
    def lead(self) -> str:
        """The instrument that has the melody."""
        return self.instruments[0]

    @property
    def family(self) -> str:
        """The family of the lead instrument."""
        return INSTRUMENTS[self.lead].family

    @property
    def tempo(self) -> str:
        """'slow' below 80 BPM, 'medium' to 120, 'fast' above."""
        return tempo_class(self.bpm)

    @property
    def key(self) -> str:
        """Name of the key, such as 'E flat major'."""
        spelt = 'major' if self.mode in BRIGHT else 'minor'
        return f'{TONICS[spelt][self.tonic]} {self.mode}'

    @classmethod
    def draw(cls, random: np.random.Generator, **given: Any) -> ScoreLabels:
        """Labels with the attributes given (and `bpm`, `instruments` with `duties`), and the others at random.

        Raises TypeError for an attribute that does not exist, ValueError for values that are out of their range or
        contradict one another.
        """
        allowed = ATTRIBUTES.keys() | {'bpm', 'instruments', 'duties', 'mentioned'}
        if unknown := given.keys() - allowed:
            raise TypeError(f'labels have no attribute {sorted(unknown)[0]!r}; they are {", ".join(sorted(allowed))}')
        for name, value in given.items():
            if name in ATTRIBUTES:
                check_value(name, value, ATTRIBUTES)
        return _Draw(random, given).labels()


def fits(mood: str | None, labels: Any) -> bool:
    """Whether what is true of music in `mood` is true of `labels`."""
    return mood is None or all(getattr(labels, name) in values for name, values in MOODS[mood].items())


class _Draw:
    """One drawing of labels. Each number is drawn whether it is needed or not, in a fixed order."""

    def __init__(self, random: np.random.Generator, given: dict[str, Any]):
        self.random = random
        self.given = given
        # what the mood that is asked for wants of the others
        self.wanted = MOODS.get(given.get('mood'), {})

    def pick(self, name: str, values: tuple, weights: tuple[float, ...] | None = None) -> Any:
        """The value given for `name`, or one of `values`, of those that suit the mood given if there are any."""
        suit = [value in self.wanted.get(name, values) for value in values]
        if any(suit):
            weights = tuple(weight * fine for weight, fine in zip(weights or (1.0,) * len(values), suit))
        drawn = choose(self.random, values, weights) if values else None
        return self.given.get(name, drawn)

    def labels(self) -> ScoreLabels:
        given = self.given
        style = self.pick('style', self.styles())
        table = STYLES[style]
        if given.get('metre', table.metre) != table.metre:
            raise ValueError(f'a {style} is in {table.metre}, not in {given["metre"]}')
        bpm = self.tempo(style)
        mode = self.pick('mode', tuple(table.progressions))
        if mode not in table.progressions:
            raise ValueError(f'a {style} is in {" or ".join(table.progressions)} here, not in {mode}')
        tonic = self.pick('tonic', tuple(range(12)))
        # a drum kit makes more than a duo
        textures = TEXTURES[2:] if given.get('drums') else TEXTURES
        texture = self.pick('texture', textures, (0.22, 0.2, 0.28, 0.3)[-len(textures) :])
        if 'instruments' in given:
            instruments, duties = tuple(given['instruments']), tuple(given.get('duties', ()))
        else:
            instruments, duties = self.players(style, texture)
        lead = INSTRUMENTS[instruments[0]]
        register = self.pick('register', lead.registers, tuple(2.0 if it == 'middle' else 1.0 for it in lead.registers))
        if register not in lead.registers:
            raise ValueError(f'the {lead.name} has no {register} register')
        share = {'solo': 0.0, 'duo': 0.0, 'ensemble': table.drums_share, 'full': float(table.drums_share > 0)}
        drums = bool(self.random.random() < share[texture])
        if given.get('drums') and not table.drums:
            raise ValueError(f'a {style} has no drums here')
        if given.get('drums') and texture in ('solo', 'duo'):
            raise ValueError(f'a {texture} has no drums here; ask for an ensemble or a full arrangement')
        labels = ScoreLabels(
            style=style,
            instruments=instruments,
            duties=duties,
            texture=texture,
            bpm=bpm,
            metre=table.metre,
            mode=mode,
            tonic=tonic,
            drums=given.get('drums', drums),
            register=register,
            dynamics=self.pick('dynamics', DYNAMICS, (0.3, 0.4, 0.3)),
            articulation=self.pick('articulation', ARTICULATIONS, (0.35, 0.4, 0.25)),
            mentioned=tuple(given.get('mentioned', ())),
        )
        moods = tuple(mood for mood in table.moods if fits(mood, labels))
        return replace(labels, mood=self.pick('mood', moods))

    def styles(self) -> tuple[str, ...]:
        """Those in which the tempo, the mode and the mood given may occur."""
        given = self.given
        found = []
        for name, style in STYLES.items():
            slowest, fastest = style.bpm
            tempi = {it for it in COMPOSED_TEMPI if self.range_in(it, style.bpm)}
            fine = given.get('metre', style.metre) == style.metre
            fine &= given.get('mode') is None or given['mode'] in style.progressions
            fine &= given.get('tempo') is None or given['tempo'] in tempi
            fine &= not tempi.isdisjoint(self.wanted.get('tempo', tempi))
            fine &= not style.progressions.keys().isdisjoint(self.wanted.get('mode', style.progressions))
            fine &= given.get('bpm') is None or slowest <= given['bpm'] <= fastest
            fine &= not given.get('drums') or style.drums_share > 0
            fine &= given.get('mood') is None or given['mood'] in style.moods
            if fine:
                found.append(name)
        if not found and 'style' not in given:
            raise ValueError(f'no style has all of {given}')
        return tuple(found)

    @staticmethod
    def range_in(tempo: str, bpm: tuple[int, int]) -> tuple[float, float] | None:
        """The part of a style's tempi that lies in a class, None if there is none to speak of."""
        low, high = max(COMPOSED_TEMPI[tempo][0], bpm[0]), min(COMPOSED_TEMPI[tempo][1], bpm[1])
        return (low, high) if high - low >= 2 else None

    def tempo(self, style: str) -> float:
        given, place = self.given, self.random.random()
        ranges = {it: found for it in COMPOSED_TEMPI if (found := self.range_in(it, STYLES[style].bpm))}
        suit = {it: found for it, found in ranges.items() if it in self.wanted.get('tempo', ranges)} or ranges
        drawn = choose(self.random, tuple(suit), tuple(high - low + 12 for low, high in suit.values()))
        if 'bpm' in given:
            if given.get('tempo', tempo_class(given['bpm'])) != tempo_class(given['bpm']):
                raise ValueError(f'bpm {given["bpm"]:g} is not {given["tempo"]}')
            if not 30 <= given['bpm'] <= 240:
                raise ValueError(f'bpm must lie in 30 to 240, got {given["bpm"]:g}')
            return float(given['bpm'])
        low, high = ranges.get(given.get('tempo', drawn)) or COMPOSED_TEMPI[given['tempo']]
        return round(low + (high - low) * place, 1)

    def players(self, style: str, texture: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Who plays, and what: the lead, then as many others as the texture has."""
        table, given, random = STYLES[style], self.given, self.random
        usual, elsewhere = choose(random, table.leads), choose(random, LEADS[choose(random, FAMILIES)])
        lead = usual if random.random() < 0.55 else elsewhere

        def suits(name: str) -> bool:
            instrument = INSTRUMENTS[name]
            family, register = given.get('family', instrument.family), given.get('register', instrument.registers[0])
            return instrument.family == family and register in instrument.registers

        if not suits(lead):
            families = (given['family'],) if 'family' in given else FAMILIES
            lead = choose(random, [it for family in families for it in LEADS[family] if suits(it)] or [lead])
        lead = given.get('lead', lead)
        if INSTRUMENTS[lead].family != given.get('family', INSTRUMENTS[lead].family):
            raise ValueError(f'the {lead} is no instrument of the family {given["family"]!r}')
        places = {'lead': (lead,), 'chords': table.comping, 'bass': table.basses, 'pad': table.pads}
        places['second'] = table.seconds
        duties = {
            'solo': ('lead',),
            'duo': ('lead', 'bass' if random.random() < 0.15 else 'chords'),
            'ensemble': ('lead', 'chords', 'bass', *(('second',) if random.random() < 0.3 else ())),
            'full': ('lead', 'chords', 'bass', 'pad', 'second'),
        }[texture]
        chosen: list[str] = []
        for duty in duties:
            free = tuple(name for name in places[duty] if name not in chosen)
            # a second player of the same instrument where the style has no other for this duty
            chosen.append(choose(random, free or places[duty]))
        return tuple(chosen), duties
