"""Prompts in ordinary words, beside what they mean in the words of `SyntheticMusic`: synonyms, moods, styles, scenes.

What a style or a scene stands for is an association (`everyday.yaml`): a lo-fi beat is a slow electric piano with
drums. What is said outright goes before it: a lo-fi guitar is a guitar. Last comes what is usual with a word: a calm
piano is one without drums, a calm piano with a beat is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from musiclm_pytorch.data.attributes import INSTRUMENTS, REGISTERS, SAMPLED, MusicLabels, choose
from musiclm_pytorch.data.captions import article, write_caption
from musiclm_pytorch.data.scores.styles import read_table

# {how} "slow, calm lo-fi", {inst} "piano", {an_inst} "a piano", {noun} "beat", {more} " with drums", {scene} " for a
# party"; behind each, what it cannot do without
PATTERNS = (
    ('{how} {inst} {noun}{more}{scene}', ''),
    ('a {how} {inst} {noun}{more}{scene}', ''),
    ('some {how} {inst} {noun}{more}{scene}', ''),
    ('{inst} {noun}, {how}{more}{scene}', 'how'),
    ('something {how}, {inst} {noun}{more}{scene}', 'how'),
    ('{noun} that is {how}{more}{scene}, {inst}', 'how noun'),
    ('{noun} that sounds {how}, {inst}{more}{scene}', 'how noun'),
    ('{how} {noun} with {an_inst}{more}{scene}', 'inst'),
    ('{how} {noun} for {inst}{more}{scene}', 'inst'),
    ('{how} {noun} on {an_inst}{more}{scene}', 'inst'),
    ('{how} {noun} played on {an_inst}{more}{scene}', 'inst'),
    ('{how} {noun} featuring {an_inst}{more}{scene}', 'inst'),
    ('{an_inst} playing a {how} {noun}{more}{scene}', 'inst'),
    ('{an_inst}{more}, {how} {noun}{scene}', 'inst'),
    ('{an_inst}: {how} {noun}{more}{scene}', 'inst'),
    ('TAGS, ', ''),
    ('TAGS ', ''),
)
BEGINNINGS = (
    'make', 'create', 'generate', 'play', 'i want', 'give me', 'can you make', 'please compose', 'i need', 'write',
    'music like', 'this is', "i'd like", 'compose',
)  # fmt: skip
SCENE = (' for {}', ' to play at {}', ', music for {}')

# instruments that there are, and the registers of each
EIGHT = dict.fromkeys(INSTRUMENTS, tuple(REGISTERS))


@cache
def everyday_words() -> dict[str, Any]:
    """The tables of `everyday.yaml`."""
    return read_table(Path(__file__).with_name('everyday.yaml'))


def draw_prompt(
    random: np.random.Generator,
    instruments: Mapping[str, Sequence[str]] = SAMPLED,
    labels: MusicLabels | None = None,
) -> tuple[str, dict[str, Any]]:
    """A prompt in ordinary words, and the attributes that it tells: some of `MusicLabels`, one at least.

    Args:
        random: what draws it.
        instruments: those that there are with the registers of each; nothing is said that means another.
        labels: of a clip that the prompt is to be true of.
    """
    tables = {
        name: [row for row in table if row.get('instrument') in (None, *instruments) and is_true_of(row, labels)]
        for name, table in everyday_words().items()
        if name != 'instruments'
    }
    names = sorted(instruments) if labels is None else [labels.instrument]
    while True:
        instrument = choose(random, names) if random.random() < 0.6 else ''
        outright = {'instrument': instrument} if instrument else {}
        usual: dict[str, Any] = {}
        adjectives = say(random, tables['adjectives'], 0.62, 3, outright, usual)
        more = say(random, tables['phrases'], 0.4, 2, outright, usual)
        noun = ''.join(say(random, tables['nouns'], 0.9, 1, outright, usual))
        style = ''.join(say(random, tables['styles'], 0.4, 1, of_style := {}, usual))
        scene = ''.join(say(random, tables['scenes'], 0.25, 1, of_scene := {}, usual))
        never = usual.pop('never', '')
        meaning = {**usual, **of_scene, **of_style, **outright}
        if meaning.get('instrument') == never:
            continue
        register = meaning.get('register')
        if register not in (None, *instruments.get(meaning.get('instrument'), REGISTERS)):
            if 'register' in outright:
                continue  # nobody has heard it
            del meaning['register']
        if meaning:
            break
    name = choose(random, everyday_words()['instruments'][instrument]) if instrument else ''
    return sentence(random, name, adjectives, style, noun, more, scene), meaning


def is_true_of(row: Mapping[str, Any], labels: MusicLabels | None) -> bool:
    """Whether what the words of a row mean, and what is usual with them, is true of these labels."""
    if labels is None:
        return True
    told = {**row, **row.get('usually', {})}
    said = {name: it for name, it in told.items() if name not in ('words', 'usually', 'never')}
    return row.get('never') != labels.instrument and all(getattr(labels, name) == it for name, it in said.items())


def say(
    random: np.random.Generator,
    table: Sequence[Mapping[str, Any]],
    share: float,
    most: int,
    told: dict[str, Any],
    usual: dict[str, Any],
) -> list[str]:
    """Some words of a table, each as likely, whatever it means, that do not contradict what was told; their meaning is
    added to that, and to `usual` what is usual with them."""
    texts: list[str] = []
    while table and len(texts) < most and random.random() < share:
        row = choose(random, table, [len(it['words']) for it in table])
        meaning = {name: it for name, it in row.items() if name not in ('words', 'usually', 'never')}
        if all(told.get(name, it) == it for name, it in meaning.items()):
            told.update(meaning)
            usual.update(row.get('usually', {}))
            if 'never' in row:
                usual['never'] = row['never']
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
    inst = name.lstrip('*')
    how = choose(random, (', ', ' ', ' and ')).join(adjectives)
    parts = dict(how=' '.join(filter(None, (how, style))), inst=inst, noun=noun)
    pattern = choose(random, [it for it, needs in PATTERNS if all(parts[part] for part in needs.split())])
    if pattern.startswith('TAGS'):
        tags = [it for it in (inst, style, noun, *adjectives, *more, scene) if it]
        random.shuffle(tags)
        return pattern.removeprefix('TAGS').join(tags)
    parts['an_inst'] = article(name) if name else ''
    parts['more'] = ''.join(f'{choose(random, (" ", ", "))}{it}' for it in more)
    parts['scene'] = choose(random, SCENE).format(scene) if scene else ''
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
