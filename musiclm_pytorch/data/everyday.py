"""Prompts in ordinary words, beside what they mean in the words of `SyntheticMusic`: synonyms, moods, styles, scenes.

What a style or a scene stands for is an association (`everyday.yaml`): a lo-fi beat is a slow electric piano with
drums. What is said outright goes before it: a lo-fi guitar is a guitar.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from musiclm_pytorch.data.attributes import SAMPLED_ATTRIBUTES, MusicLabels, choose
from musiclm_pytorch.data.captions import article, write_caption
from musiclm_pytorch.data.scores.phrases import misspell

# {adj} "slow, calm", {style} "lo-fi", {inst} "piano", {with} "with a piano", {noun} "beat", {more} " with drums",
# {scene} " for a party"; what is empty leaves its spaces
PATTERNS = (
    '{adj} {style} {inst} {noun}{more}{scene}',
    'a {adj} {style} {inst} {noun}{more}{scene}',
    '{adj} {inst} {style} {noun}{more}{scene}',
    '{inst} {noun}, {adj} {style}{more}{scene}',
    '{style} {noun} {with}, {adj}{more}{scene}',
    '{adj} {style} {noun} {with}{more}{scene}',
    '{with}: {adj} {style} {noun}{more}{scene}',
    'some {adj} {style} {noun} {with}{more}{scene}',
    'something {adj} and {style}, {noun} {with}{more}{scene}',
    '{noun} that is {adj} {style} {with}{more}{scene}',
    '{noun} that sounds {adj} {style}, {inst}{more}{scene}',
    '{adj} {style} {noun} played on {inst}{more}{scene}',
    '{inst} playing a {adj} {style} {noun}{more}{scene}',
    '{inst}{more}, {adj} {style} {noun}{scene}',
    '{adj} {style} {noun} featuring {inst}{more}{scene}',
    '{more} {adj} {style} {noun} {inst}{scene}',
    'TAGS, ',
    'TAGS ',
)
BEGINNINGS = (
    'make', 'create', 'generate', 'play', 'i want', 'give me', 'can you make', 'please compose', 'i need', 'write',
    'music like', 'this is', "i'd like", 'compose',
)  # fmt: skip
WITH = ('with {}', 'for {}', 'on {}', '{}')
FOR = (' for {}', ' to play at {}', ', music for {}')
MISSPELT = 0.04


@cache
def vocabulary() -> dict[str, Any]:
    """The tables of `everyday.yaml`."""
    return yaml.safe_load((Path(__file__).parent / 'everyday.yaml').read_text(encoding='utf-8'))


def draw_prompt(
    random: np.random.Generator,
    instruments: Collection[str] = SAMPLED_ATTRIBUTES['instrument'],
    *,
    misspelt: float = MISSPELT,
) -> tuple[str, dict[str, Any]]:
    """A prompt in ordinary words, and the attributes that it tells: some of `MusicLabels`, one at least.

    Args:
        random: what draws it.
        instruments: those that there are; nothing is said that means another.
        misspelt: share of the prompts with a word misspelt.
    """
    tables = {name: suiting(table, instruments) for name, table in vocabulary().items() if name != 'instruments'}
    meaning: dict[str, Any] = {}
    while not meaning:
        instrument = choose(random, sorted(instruments)) if random.random() < 0.6 else ''
        told = {'instrument': instrument} if instrument else {}
        adjectives = say(random, tables['adjectives'], told, 0.62, 3)
        more = say(random, tables['phrases'], told, 0.4, 2)
        noun = ''.join(say(random, tables['nouns'], told, 0.9, 1))
        # by these, only what is not said outright
        styles = say(random, tables['styles'], of_style := {}, 0.4, 1)
        scenes = say(random, tables['scenes'], of_scene := {}, 0.25, 1)
        meaning = {**of_scene, **of_style, **told}
    name = choose(random, vocabulary()['instruments'][instrument]) if instrument else ''
    text = sentence(random, name, adjectives, ''.join(styles), noun, more, ''.join(scenes))
    return (misspell(text, random) if random.random() < misspelt else text), meaning


def suiting(table: Sequence[Mapping[str, Any]], instruments: Collection[str]) -> list[Mapping[str, Any]]:
    """Of what is said, that which needs no other instrument."""
    return [row for row in table if row.get('instrument') in (None, *instruments)]


def say(
    random: np.random.Generator, table: Sequence[Mapping[str, Any]], told: dict[str, Any], share: float, most: int
) -> list[str]:
    """Some words of a table, each as likely, whatever it means, that do not contradict what was told; their meaning is
    added to that."""
    texts: list[str] = []
    while len(texts) < most and random.random() < share:
        row = choose(random, table, [len(it['words']) for it in table])
        meaning = {name: it for name, it in row.items() if name != 'words'}
        if all(told.get(name, it) == it for name, it in meaning.items()):
            told.update(meaning)
            texts.append(choose(random, row['words']))
    return texts


def sentence(
    random: np.random.Generator,
    name: str,
    adjectives: list[str],
    style: str,
    noun: str,
    more: list[str],
    scene: str,
) -> str:
    """A sentence, more or less, or a list of tags; parts may be empty."""
    bare = name.lstrip('*')
    pattern = choose(random, PATTERNS)
    if pattern.startswith('TAGS'):
        tags = [it for it in (bare, style, noun, *adjectives, *more, scene) if it]
        random.shuffle(tags)
        return pattern.removeprefix('TAGS').join(tags)
    parts = dict(style=style, noun=noun, adj=choose(random, (', ', ' ', ' and ')).join(adjectives))
    parts['inst'] = article(name) if name and random.random() < 0.3 else bare
    parts['with'] = choose(random, WITH).format(article(name)) if name else ''
    parts['more'] = ''.join(f'{choose(random, (" ", ", "))}{it}' for it in more)
    parts['scene'] = choose(random, FOR).format(scene) if scene else ''
    text = pattern.format(**parts)
    if random.random() < 0.2:
        text = f'{choose(random, BEGINNINGS)} {text}'
    # what was empty leaves spaces and commas behind
    return re.sub(r'[ ,]*([,:])', r'\1', ' '.join(text.split())).strip(' ,:')


def plain_captions(
    random: np.random.Generator, meaning: Mapping[str, Any], count: int, attributes: Mapping[str, tuple]
) -> list[str]:
    """Captions of `SyntheticMusic` that tell a meaning and nothing else, of its training's phrasings.

    attributes: what clips may have, `SyntheticMusic.ATTRIBUTES` of the data set that a model learned from.
    """
    labels = [MusicLabels.draw(random, attributes, **meaning) for _ in range(count)]
    return [write_caption(it, tuple(meaning), 'train', random) for it in labels]
