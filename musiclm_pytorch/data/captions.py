"""Labels to English: a grammar of sentence patterns and synonyms, with some of both held out for validation.

Held out are sentence patterns, and combinations of synonyms: a combination belongs to 'valid' if the places of its
phrases in their lists add up to a multiple of four, else to 'train'. No caption of one split can come up in the
other, yet every word of the validation captions is met in training, where it stands beside other words.

Nothing untrue is said. Mood words stand for a mode and a tempo together: 'sad' is said of slow music in minor only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from musiclm_pytorch.data.attributes import TONICS, MusicLabels, choose

# ---- vocabulary: four ways to say each value, in each place of a sentence ----


class Name(NamedTuple):
    """An instrument's name: by itself, and in front of what it plays."""

    text: str
    before: str
    plural: bool

    @classmethod
    def read(cls, told: str) -> Name:
        """'*horns/horn' is a plural, and 'horn' stands in front."""
        text, _, before = told.lstrip('*').partition('/')
        return cls(text, before or text, told.startswith('*'))


NAMES = {
    'piano': ('piano', 'grand piano', 'upright piano', 'concert piano'),
    'guitar': ('guitar', 'acoustic guitar', 'plucked guitar', 'classical guitar'),
    'strings': ('*strings/string', '*bowed strings/bowed-string', 'string ensemble', 'string orchestra'),
    'flute': ('flute', 'wooden flute', 'breathy flute', 'silver flute'),
    'brass': ('brass section/brass', '*horns/horn', '*trumpets/trumpet', 'brass ensemble/brass-ensemble'),
    'organ': ('organ', 'pipe organ', 'church organ', 'cathedral organ'),
    'bell': ('*bells/bell', '*chimes/chime', '*tubular bells/tubular-bell', '*ringing bells/ringing-bell'),
    'synth': ('synthesizer', 'synth', 'analog synth', 'electronic synthesizer'),
    # what a sound font plays besides
    'electric piano': ('electric piano', 'rhodes', 'rhodes piano', 'electric keyboard'),
    'electric guitar': ('electric guitar', 'distorted guitar', 'overdriven guitar', 'rock guitar'),
    'violin': ('violin', 'fiddle', 'solo violin', 'bowed violin'),
    'cello': ('cello', 'solo cello', 'violoncello', 'bowed cello'),
    'harp': ('harp', 'concert harp', 'orchestral harp', 'plucked harp'),
    'clarinet': ('clarinet', 'solo clarinet', 'woody clarinet', 'mellow clarinet'),
    'saxophone': ('saxophone', 'sax', 'tenor sax', 'jazz saxophone'),
    'trumpet': ('trumpet', 'solo trumpet', 'bright trumpet', 'jazz trumpet'),
    'accordion': ('accordion', 'squeezebox', 'button accordion', 'piano accordion'),
    'choir': ('choir', '*voices/voice', 'chorus', 'vocal choir'),
}
NAMES = {instrument: tuple(map(Name.read, names)) for instrument, names in NAMES.items()}

ADJECTIVES = {
    'tempo': {
        'slow': ('slow', 'unhurried', 'leisurely', 'slow-moving'),
        'medium': ('moderate', 'mid-tempo', 'medium-paced', 'medium-speed'),
        'fast': ('fast', 'quick', 'rapid', 'brisk'),
    },
    'mode': {
        'major': ('major', 'major-key', 'major-mode', 'major-scale'),
        'minor': ('minor', 'minor-key', 'minor-mode', 'minor-scale'),
    },
    'register': {
        'low': ('low', 'low-pitched', 'deep', 'low-register'),
        'middle': ('mid-range', 'middle-register', 'mid-register', 'mid-pitched'),
        'high': ('high', 'high-pitched', 'treble', 'high-register'),
    },
    'mood': {
        ('major', 'slow'): ('peaceful', 'serene', 'tranquil', 'tender'),
        ('major', 'medium'): ('sunny', 'friendly', 'good-natured', 'contented'),
        ('major', 'fast'): ('happy', 'cheerful', 'joyful', 'jubilant'),
        ('minor', 'slow'): ('sad', 'mournful', 'sorrowful', 'melancholy'),
        ('minor', 'medium'): ('pensive', 'wistful', 'brooding', 'uneasy'),
        ('minor', 'fast'): ('agitated', 'urgent', 'stormy', 'frantic'),
    },
}

PHRASES = {
    'tempo': {
        'slow': ('at a slow tempo', 'at an unhurried pace', 'at a leisurely speed', 'at a slow speed'),
        'medium': ('at a moderate tempo', 'at a medium pace', 'at a walking pace', 'at a medium speed'),
        'fast': ('at a fast tempo', 'at a rapid pace', 'at a brisk speed', 'at a quick pace'),
    },
    'mode': {
        'major': ('in a major key', 'in major', 'in the major mode', 'on a major scale'),
        'minor': ('in a minor key', 'in minor', 'in the minor mode', 'on a minor scale'),
    },
    'register': {
        'low': ('in a low register', 'in the low range', 'down in the bass range', 'with deep notes'),
        'middle': ('in the middle register', 'in the middle range', 'in the mid range', 'with mid-pitched notes'),
        'high': ('in a high register', 'in the high range', 'up in the treble range', 'with high notes'),
    },
    'drums': {
        True: ('with drums', 'over a drum beat', 'with a drum kit', 'with percussion'),
        False: ('without drums', 'with no drums', 'without percussion', 'free of drums'),
    },
}
BPM = ('at {bpm} BPM', 'at {bpm} beats per minute', 'with a tempo of {bpm} BPM', 'at about {bpm} BPM')
KEY = ('in {key}', 'in the key of {key}', 'set in {key}', 'written in {key}')

NOUNS = {
    'melody': ('single-note melody', 'monophonic melody', 'single-line tune', 'monophonic tune'),
    'chords': ('chord progression', 'chord sequence', 'chordal passage', 'block-chord passage'),
    'accompanied': ('accompanied melody', 'melody with accompaniment', 'tune with backing harmony', 'accompanied tune'),
    'arpeggio': ('arpeggio', 'arpeggiated pattern', 'arpeggio figure', 'rippling arpeggio'),
    None: ('piece', 'passage', 'composition', 'excerpt'),  # texture not mentioned
}

# ---- sentence patterns ----
# {np} "a slow melody", {full} "a slow flute melody", {inst} "a flute", {bare} "flute", {s} third person's s,
# {tail} "in a minor key with drums" with what must stand before it, {lead} the same in front of a sentence

PATTERNS = {
    ('train', True): (
        '{full}{tail}',
        '{np} played on {inst}{tail}',
        '{inst} play{s} {np}{tail}',
        '{np}{tail}, performed by {inst}',
        'this is {full}{tail}',
        'music for {bare}: {np}{tail}',
        '{inst}: {np}{tail}',
        'TAGS, ',
    ),
    ('valid', True): (
        'the {bare} can be heard in {np}{tail}',
        'you are listening to {full}{tail}',
        'a clip of {inst} playing {np}{tail}',
        '{lead}{inst} perform{s} {np}',
        'TAGS; ',
    ),
    ('train', False): ('{np}{tail}', 'this is {np}{tail}', 'the music is {np}{tail}', 'TAGS, '),
    ('valid', False): ('you are listening to {np}{tail}', 'a clip of {np}{tail}', '{lead}there is {np}', 'TAGS; '),
}

# what a caption may tell, and how often it does
MENTIONS = {'instrument': 0.9, 'tempo': 0.75, 'mode': 0.7, 'register': 0.75, 'texture': 0.65, 'drums': 0.75}
MORE = {'bpm': 0.15, 'key': 0.15}  # how often a tempo and a mode that are told are told exactly


def article(text: str) -> str:
    """'a tune', 'an organ', '*strings' → 'strings'; "an 8-bit", "a one", "a European" by their sound."""
    if text.startswith('*'):
        return text[1:]
    return f'an {text}' if re.match(r'(?!one|uni|eu)[aeiou8]|e-|hono', text.lower()) else f'a {text}'


class Draft:
    """One attempt at a caption: the phrases chosen for the parts of a sentence, and the sum of their places."""

    def __init__(self, random: np.random.Generator):
        self.random = random
        self.places = 0

    def pick(self, phrases: tuple):
        place = int(self.random.random() * len(phrases))
        self.places += place
        return phrases[place]

    def write(self, labels: MusicLabels, mentions: Collection[str], pattern: str) -> str:
        random = self.random
        values = {'tempo': labels.tempo, 'mode': labels.mode, 'register': labels.register, 'drums': labels.drums}
        adjectives, phrases = [], []
        told = [name for name in values if name in mentions]
        if {'tempo', 'mode'} <= set(told) and not set(MORE) & set(mentions) and random.random() < 0.35:
            adjectives.append(self.pick(ADJECTIVES['mood'][labels.mode, labels.tempo]))
            told = [name for name in told if name not in ('tempo', 'mode')]
        for name in told:
            if name == 'tempo' and 'bpm' in mentions:
                phrases.append(self.pick(BPM).format(bpm=round(labels.bpm)))
            elif name == 'mode' and 'key' in mentions:
                phrases.append(self.pick(KEY).format(key=f'{TONICS[labels.mode][labels.tonic]} {labels.mode}'))
            elif name in ADJECTIVES and random.random() < 0.5 and len(adjectives) < 2:
                adjectives.append(self.pick(ADJECTIVES[name][values[name]]))
            else:
                phrases.append(self.pick(PHRASES[name][values[name]]))
        random.shuffle(adjectives)
        random.shuffle(phrases)
        name = self.pick(NAMES[labels.instrument]) if 'instrument' in mentions else None
        if pattern.startswith('TAGS'):
            noun = [self.pick(NOUNS[labels.texture])] if 'texture' in mentions else []
            tags = [*([name.text] if name else []), *adjectives, *noun, *phrases]
            random.shuffle(tags)
            return pattern.removeprefix('TAGS').join(tags)

        noun = self.pick(NOUNS[labels.texture if 'texture' in mentions else None])
        before = [', '.join(adjectives)] if adjectives else []
        tail = choose(random, (' ', ', ')).join(phrases)
        parts = dict(np=article(' '.join([*before, noun])), tail='', lead='')
        if phrases:
            parts |= dict(tail=choose(random, (' ', ', ')) + tail, lead=f'{tail}, ')
        if name:
            parts |= dict(
                full=article(' '.join([*before, name.before, noun])),
                inst=name.text if name.plural else article(name.text),
                bare=name.text,
                s='' if name.plural else 's',
            )
        return pattern.format(**parts)


def check_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """How often captions tell each attribute, those not given as usual.

    Raises ValueError for unknown attributes, shares outside of 0 to 1, and where two attributes can never be told.
    """
    usual = with_usual(shares, {**MENTIONS, **MORE})
    if sum(usual[name] > 0 for name in MENTIONS) < 2:
        raise ValueError(f'a caption tells two attributes at least; raise some of mentions, which is {dict(shares)}')
    return usual


def with_usual(shares: Mapping[str, float], usual: Mapping[str, float]) -> dict[str, float]:
    """The shares given, and the usual ones of the rest. Raises ValueError for unknown names and impossible shares."""
    if unknown := shares.keys() - usual.keys():
        raise ValueError(f'captions can tell {", ".join(usual)}, but mentions names {sorted(unknown)[0]!r}')
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f'mentions[{name!r}] must lie in 0 to 1, got {share}')
    return {**usual, **shares}


def draw_mentions(random: np.random.Generator, shares: Mapping[str, float]) -> tuple[str, ...]:
    """Which attributes a caption tells, two at least: 'bpm' and 'key' tell the tempo and the mode exactly."""
    told: list[str] = []
    while len(told) < 2:
        told = [name for name in MENTIONS if random.random() < shares[name]]
    if 'tempo' in told and random.random() < shares['bpm']:
        told.append('bpm')
    if 'mode' in told and random.random() < shares['key']:
        told.append('key')
    return tuple(told)


def check_mentions(mentions: Collection[str]) -> tuple[str, ...]:
    """`mentions` in order, with the tempo for 'bpm' and the mode for 'key'; ValueError for none or unknown ones."""
    return with_implied(mentions, (*MENTIONS, *MORE), {'bpm': 'tempo', 'key': 'mode'})


def with_implied(mentions: Collection[str], known: Sequence[str], implied: Mapping[str, str]) -> tuple[str, ...]:
    """`mentions`, and what they imply, in the order of `known`; ValueError for none or unknown ones."""
    if isinstance(mentions, str):
        raise TypeError(f'mention must be a collection of attributes, such as ({mentions!r},), got {mentions!r}')
    wrong = [name for name in mentions if name not in known]
    if wrong or not mentions:
        raise ValueError(f'mention must name some of {", ".join(known)}, got {wrong[0] if wrong else mentions!r}')
    told = {*mentions, *(implied[name] for name in mentions if name in implied)}
    return tuple(name for name in known if name in told)


def write_caption(labels: MusicLabels, mentions: Collection[str], split: str, random: np.random.Generator) -> str:
    """A caption that tells `mentions` of `labels`, and nothing else, in a phrasing of `split`."""
    pattern = choose(random, PATTERNS[split, 'instrument' in mentions])
    while True:
        draft = Draft(random)
        text = draft.write(labels, mentions, pattern)
        # each list holds four phrases, so that whatever is mentioned, some choice of them fits
        if (draft.places % 4 == 0) == (split == 'valid'):
            break
    text = text[0].upper() + text[1:] if random.random() < 0.5 else text
    return f'{text}.' if random.random() < 0.4 else text
