"""Labels to free English: a grammar of sentences, lists and requests over the vocabulary of `words.yaml`.

Held out for 'valid' are sentence patterns, and of all captions those whose text, without case and punctuation, has a
checksum of one class in eight: no caption of one split can come up in the other, yet validation has no word that
training never meets. Now and then a caption of 'train' has a word misspelt. Nothing untrue is said, and nothing about
what is absent.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import numpy as np

from musiclm_pytorch.data.attributes import choose
from musiclm_pytorch.data.captions import article, with_implied, with_usual
from musiclm_pytorch.data.scores.labels import ScoreLabels
from musiclm_pytorch.data.scores.styles import read_table

# what a caption may tell, and how often it does where the labels know it; 'bpm' and 'key' are shares of those captions
# that tell the tempo and the mode, 'family' of those that name the lead: then they tell its family instead
MENTIONS = {
    'style': 0.65,
    'lead': 0.8,
    'backing': 0.4,
    'drums': 0.6,
    'mood': 0.5,
    'tempo': 0.5,
    'mode': 0.3,
    'metre': 0.12,
    'register': 0.25,
    'dynamics': 0.3,
    'articulation': 0.3,
    'texture': 0.3,
}
MORE = {'bpm': 0.3, 'key': 0.3, 'family': 0.1}
IMPLIED = {'bpm': 'tempo', 'key': 'mode', 'family': 'lead'}
HELD_OUT = 8  # one caption of so many
MISSPELT = 0.03
TRIES = 2000

# {np} "a slow sad waltz", {played} " led by a violin", {lead} "a violin", {s} third person's s, {tail} phrases with
# what stands before them, {backing} " over piano and bass", {scene} "a ballroom", {head} "slow sad waltz"
PATTERNS = {
    'train': (
        ('{np}{played}{backing}{tail}', ''),
        ('{np}{backing}{played}{tail}', ''),
        ('this is {np}{played}{backing}{tail}', ''),
        ('{np}{tail}{played}{backing}', ''),
        ('{lead} play{s} {np}{backing}{tail}', 'lead'),
        ('{np} in which {lead} carr{ies} the melody{backing}{tail}', 'lead'),
        ('{lead}: {np}{backing}{tail}', 'lead'),
        ('{np}{played}{backing}{tail}, made for {scene}', 'style'),
        ('music for {scene}: {np}{played}{backing}{tail}', 'style'),
        ('i would like {np}{played}{backing}{tail}', ''),
        ('make {np}{played}{backing}{tail}', ''),
        ('please write {np}{played}{backing}{tail}', ''),
        ('the recording features {np}{played}{backing}{tail}', ''),
        ('{head}{played}{backing}{tail}', ''),
        ('TAGS, ', ''),
        ('TAGS, ', ''),
        ('TAGS ', ''),
    ),
    'valid': (
        ('you can hear {np}{played}{backing}{tail}', ''),
        ('play me {np}{played}{backing}{tail}', ''),
        ('a clip of {np}{tail}{played}{backing}', ''),
        ('there is {np}{played}{backing}{tail}', ''),
        ('{lead} can be heard in {np}{backing}{tail}', 'lead'),
        ('{np}{played}{backing}{tail}, fit for {scene}', 'style'),
        ('generate {head}{played}{backing}{tail}', ''),
        ('TAGS; ', ''),
        ('TAGS / ', ''),
    ),
}
PLAYED = (
    ' led by {}',
    ' played on {}',
    ' featuring {}',
    ' with {} on top',
    ' with {} playing the tune',
    ' with {} as the lead',
    ' with a melody on {}',
    ' for {}',
    ' starring {}',
    ' with {} in front',
)
BACKING = (' over {}', ' backed by {}', ' accompanied by {}', ' supported by {}', ', with {} behind', ' on top of {}')


@cache
def vocabulary() -> dict[str, Any]:
    """The tables of `words.yaml`."""
    return read_table('words.yaml')


def plain(text: str) -> str:
    """Text without case and punctuation: what two captions that say the same in the same words have in common."""
    return ' '.join(re.sub(r'[^a-z0-9 ]+', ' ', text.lower()).split())


def held_out(text: str) -> bool:
    """Whether a caption with this text is one of 'valid'."""
    return zlib.crc32(plain(text).encode()) % HELD_OUT == 0


def listed(names: list[str]) -> str:
    """'a, b and c'."""
    return names[0] if len(names) == 1 else f'{", ".join(names[:-1])} and {names[-1]}'


class Draft:
    """One attempt at a caption of some attributes of some labels."""

    def __init__(self, labels: ScoreLabels, told: Collection[str], random: np.random.Generator):
        self.labels, self.told, self.random = labels, told, random
        self.words = vocabulary()
        self.lead = self.name_lead()
        self.adjectives, self.phrases = self.describe()

    def pick(self, phrases: Any) -> str:
        return choose(self.random, phrases)

    def name_lead(self) -> str | None:
        if 'lead' not in self.told:
            return None
        if 'family' in self.told:
            return self.pick(self.words['families'][self.labels.family])
        return self.pick(self.words['instruments'][self.labels.lead])

    def name_style(self, table: str) -> str:
        names = self.words[table][self.labels.style]
        if self.labels.texture in ('solo', 'duo'):
            names = [it for it in names if not any(word in it for word in self.words['of_many'])]
        return self.pick(names)

    def describe(self) -> tuple[list[str], list[str]]:
        """Adjectives and phrases for what is told beside the style and the players."""
        words, labels, random = self.words, self.labels, self.random
        adjectives, phrases = [], []
        for name in ('mood', 'tempo', 'mode', 'metre', 'register', 'dynamics', 'articulation', 'texture', 'drums'):
            if name not in self.told:
                continue
            value = getattr(labels, name)
            before = words['adjectives'].get(name, words['textures'] if name == 'texture' else {}).get(value)
            after = words['phrases'].get(name, {})
            after = after if name == 'drums' else after.get(value)
            if name == 'tempo' and 'bpm' in self.told:
                phrases.append(self.pick(words['bpm']).format(round(labels.bpm)))
            elif name == 'mode' and 'key' in self.told:
                phrases.append(self.pick(words['key']).format(labels.key))
            elif before and (not after or (random.random() < 0.55 and len(adjectives) < 3)):
                adjectives.append(self.pick(before))
            else:
                phrases.append(self.pick(after))
        # a mood reads best in front, the rest in any order
        if 'mood' not in self.told or random.random() < 0.5:
            random.shuffle(adjectives)
        random.shuffle(phrases)
        return adjectives, phrases

    def backing(self) -> list[str]:
        if 'backing' not in self.told:
            return []
        names = [article(self.pick(self.words['instruments'][it])) for it in self.labels.instruments[1:]]
        return list(dict.fromkeys(names))[: 3 if self.random.random() < 0.8 else 4]

    def write(self, pattern: str) -> str:
        words, labels, random = self.words, self.labels, self.random
        if pattern.startswith('TAGS'):
            style = [self.name_style('style_tags')] if 'style' in self.told else []
            lead = [self.lead.lstrip('*')] if self.lead else []
            others = [re.sub('^an? ', '', it) for it in self.backing()]
            tags = [*style, *lead, *self.adjectives, *others, *self.phrases]
            random.shuffle(tags)
            return pattern.removeprefix('TAGS').join(dict.fromkeys(tags))
        noun = self.name_style('styles') if 'style' in self.told else self.pick(words['nouns'])
        before = self.pick((', ', ' ', ' and ' if len(self.adjectives) == 2 else ', ')).join(self.adjectives)
        head = ' '.join([before, noun]) if before else noun
        between = self.pick((' ', ', '))
        lead = article(self.lead) if self.lead else ''
        plural = bool(self.lead) and self.lead.startswith('*')
        backing = self.backing()
        return pattern.format(
            np=article(head),
            head=head,
            played=self.pick(PLAYED).format(lead) if lead and '{played}' in pattern else '',
            backing=self.pick(BACKING).format(listed(backing)) if backing else '',
            tail=''.join(between + it for it in self.phrases),
            lead=lead,
            s='' if plural else 's',
            ies='y' if plural else 'ies',
            scene=self.pick(words['scenes'][labels.style]) if labels.style else '',
        )


def misspell(text: str, random: np.random.Generator) -> str:
    """Two letters of a word the other way round, one left out or one doubled; a number or a short word stays."""
    places = list(re.finditer('[a-z]{5,}', text))
    if not places:
        return text
    word = choose(random, places)
    at = word.start() + 1 + int(random.random() * (len(word[0]) - 3))
    kind = random.random()
    if kind < 0.4:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at + 1 :] if kind < 0.75 else text[:at] + text[at] + text[at:]


def known_of(labels: ScoreLabels) -> tuple[str, ...]:
    """The attributes of these labels that a caption can tell, in order."""
    words = vocabulary()
    known = []
    for name in MENTIONS:
        if name == 'backing':
            fine = len(labels.instruments) > 1
        elif name in ('lead', 'style'):
            fine = getattr(labels, name) is not None
        elif name == 'drums':
            fine = labels.drums
        else:
            value = getattr(labels, name)
            fine = any(value in words[part].get(name, {}) for part in ('adjectives', 'phrases'))
        if fine:
            known.append(name)
    return tuple(known)


def check_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """How often captions tell each attribute, those not given as usual.

    Raises ValueError for unknown attributes and shares outside of 0 to 1.
    """
    usual = with_usual(shares, {**MENTIONS, **MORE})
    if not any(usual[name] > 0 for name in ('style', 'lead')):
        raise ValueError(f'every caption tells the style or the lead; raise one of them in mentions, {dict(shares)}')
    return usual


def draw_mentions(labels: ScoreLabels, shares: Mapping[str, float], random: np.random.Generator) -> tuple[str, ...]:
    """Which attributes a caption tells: two at least where so many are known, the style or the lead among them."""
    known = known_of(labels)
    told: list[str] = []
    for _ in range(100):
        told = [name for name in known if random.random() < shares[name]]
        if len(told) >= min(2, len(known)) and ('style' in told or 'lead' in told):
            break
    else:  # of a score without a style, say, whose lead is hardly ever to be told
        told = [name for name in known if shares[name] > 0 or name == 'lead']
    # few captions in the world tell more than six things
    while len(told) > 6:
        told.remove(choose(random, [name for name in told if name not in ('style', 'lead')]))
    told += [name for name, share in MORE.items() if IMPLIED[name] in told and random.random() < shares[name]]
    return tuple(told)


def check_mentions(labels: ScoreLabels, mentions: Collection[str]) -> tuple[str, ...]:
    """`mentions` in order, with what they imply; ValueError for none, for unknown ones and for what cannot be told."""
    told = with_implied(mentions, (*MENTIONS, *MORE), IMPLIED)
    if silent := [name for name in told if name in MENTIONS and name not in known_of(labels)]:
        raise ValueError(f'these labels have no {sorted(silent)[0]} that a caption could tell')
    return told


def write_caption(labels: ScoreLabels, told: Collection[str], split: str, random: np.random.Generator) -> str:
    """A caption that tells `told` of `labels`, and nothing else, in a phrasing of `split`."""
    patterns = [pattern for pattern, needs in PATTERNS[split] if not needs or needs in told]
    for _ in range(TRIES):
        text = Draft(labels, told, random).write(choose(random, patterns))
        if held_out(text) == (split == 'valid'):
            break
    else:
        raise RuntimeError(f'no caption of {split!r} tells {told} of {labels}')
    if split == 'train' and random.random() < MISSPELT:
        text = misspell(text, random)
    style = random.random()
    text = text[0].upper() + text[1:] if style < 0.5 else text.lower() if style > 0.8 else text
    return f'{text}.' if random.random() < 0.4 else text
