"""Music by synthesis, with captions and labels: data to learn from and to be measured on, without a download."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.data import attributes
from musiclm_pytorch.data.attributes import SAMPLED, MusicLabels, check_seed, generator
from musiclm_pytorch.data.captions import check_mentions, check_shares, draw_mentions, write_caption
from musiclm_pytorch.data.composition import compose
from musiclm_pytorch.data.everyday import EIGHT, draw_prompt
from musiclm_pytorch.data.generated import GeneratedMusic
from musiclm_pytorch.data.synthesis import render_notes

# what a generator of random numbers is for; part of its key, so that no two uses share their numbers
_LABELS, _CAPTION, _WAVE, _ITEM, _EVERYDAY = range(5)


class SyntheticMusic(GeneratedMusic):
    """Pairs of a wave and a caption, composed and synthesised when asked for.

    An item depends on its index, the seed, the split and the settings alone: it is the same in any order and any
    process. Nothing is stored, so that `length` may be as large as the training is long.

        waves = SyntheticMusic(seconds=5.0, sample_rate=16000)
        wave, caption = waves[0]  # (80000,) float32 in [-1, 1], 'a slow flute melody in minor, without drums'
        waves.labels(0)  # MusicLabels(instrument='flute', tempo='slow', …), without synthesis

    Waves are mono, of root mean square 0.1 (-20 dB of full scale; a little less where peaks would pass 0.95).
    Captions leave attributes out now and then; `labels(i).mentioned` has those told. The split 'valid' has other
    music, and phrasings (sentence patterns, combinations of synonyms) that 'train' never uses.

    With a sound font, 18 sampled instruments and a sampled drum kit play the same compositions, each instrument in
    registers of its own: `SyntheticMusic(sound_font='FluidR3_GM.sf2')`. That needs the extra `scores` and FluidSynth.

    Args:
        length: number of items.
        seed: 0 or above; another seed, other items.
        seconds: length of each wave, 1 at least.
        sample_rate: Hz, 8,000 at least, so that the highest notes fit below half of it.
        split: 'train' or 'valid'.
        mentions: share of the captions that tell an attribute, such as `{'key': 0.5}`; 'bpm' and 'key' are shares of
            those that tell the tempo and the mode.
        sound_font: path of a .sf2 or .sf3, or several, of which each item takes one that has what it plays; by
            default, eight instruments are synthesised.
        everyday: share of the captions that are prompts in ordinary words, 'a relaxing lo-fi beat', instead; styles and
            scenes in them are associations (`data/everyday.yaml`). In the split 'valid' they are no other ones.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, a file that is no sound font.
        FileNotFoundError: no sound font at a path.
        ImportError: pyfluidsynth or FluidSynth is missing (when the first wave is rendered).
    """

    _ITEM = _ITEM

    #: the values of each attribute
    ATTRIBUTES = attributes.ATTRIBUTES
    # not of the object where it is 0, so that tokens made before there was one are still of the same data
    everyday = 0.0

    @typechecked
    def __init__(
        self,
        length: int = 100_000,
        *,
        seed: int = 0,
        seconds: float = 5.0,
        sample_rate: int = 16000,
        split: str = 'train',
        mentions: Mapping[str, float] | None = None,
        sound_font: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
        everyday: float = 0.0,
    ):
        super().__init__(length, seed=seed, seconds=seconds, sample_rate=sample_rate, split=split)
        if not 0 <= everyday <= 1:
            raise ValueError(f'everyday must lie in [0, 1], got {everyday}; it is a share of the captions')
        self.mentions = check_shares(mentions or {})
        if everyday:
            self.everyday = everyday
        self.sound_fonts = []
        if sound_font is not None:
            # what plays them takes a while to import
            from musiclm_pytorch.data.scores.rendering import find_sound_fonts

            self.sound_fonts = find_sound_fonts(sound_font)
            self.ATTRIBUTES = attributes.SAMPLED_ATTRIBUTES

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """The wave, `(samples,)` float32, and the caption of an item. Raises IndexError beyond the length."""
        index = self._index(index)
        labels, text = self._told(index)
        return self._wave(labels, self._key(_WAVE, index)), text()

    def labels(self, index: int) -> MusicLabels:
        """What is true of item `index`, in some 50 µs: nothing is synthesised."""
        return self._told(self._index(index))[0]

    def _told(self, index: int) -> tuple[MusicLabels, Callable[[], str]]:
        """Labels of an item, and what gives its caption."""
        random = generator(*self._key(_CAPTION, index))
        mentioned = draw_mentions(random, self.mentions)
        labels = MusicLabels.draw(generator(*self._key(_LABELS, index)), self.ATTRIBUTES, mentioned=mentioned)
        if self.everyday and (words := generator(*self._key(_EVERYDAY, index))).random() < self.everyday:
            prompt, meaning = draw_prompt(words, SAMPLED if self.sound_fonts else EIGHT, labels)
            return replace(labels, mentioned=tuple(meaning)), lambda: prompt
        return labels, partial(write_caption, labels, mentioned, self.split, random)

    def text(self, index: int) -> str:
        """The caption of item `index`, without its wave."""
        return self._told(self._index(index))[1]()

    def captions(self, index: int) -> list[str]:
        """What may be said of item `index`: the caption that it has."""
        return [self.text(index)]

    def draw_labels(self, seed: int = 0, **given: Any) -> MusicLabels:
        """Labels with the values given, such as `instrument='flute', drums=False`, and the others at random.

        Raises TypeError for an unknown attribute, ValueError for a value outside its vocabulary.
        """
        return MusicLabels.draw(generator(_LABELS, check_seed(seed)), self.ATTRIBUTES, **given)

    def render(self, labels: MusicLabels, seed: int = 0) -> Tensor:
        """Music with these labels, `(samples,)` float32 in [-1, 1]; another seed, another piece.

        The same in every data set of these `seconds`, `sample_rate` and `sound_font`. Raises ValueError for an
        instrument that only a sound font has.
        """
        return self._wave(labels, (_WAVE, check_seed(seed)))

    def caption(self, labels: MusicLabels, seed: int = 0, *, mention: Collection[str] | None = None) -> str:
        """A sentence that is true of these labels, in a phrasing of this data set's split.

        Args:
            labels: what to tell.
            seed: another seed, another sentence.
            mention: the attributes to tell: some of 'instrument', 'tempo', 'mode', 'register', 'texture', 'drums',
                'bpm', 'key'. By default two or more of them at random.

        Raises ValueError if `mention` is empty or names anything else.
        """
        random = generator(_CAPTION, check_seed(seed))
        mentions = draw_mentions(random, self.mentions) if mention is None else check_mentions(mention)
        return write_caption(labels, mentions, self.split, random)

    def _wave(self, labels: MusicLabels, key: tuple[int, ...]) -> Tensor:
        random = generator(*key)
        notes, drums = compose(labels, self.seconds * labels.bpm / 60, random)
        how = dict(
            instrument=labels.instrument, bpm=labels.bpm, samples=self.samples, rate=self.sample_rate, random=random
        )
        if self.sound_fonts:
            from musiclm_pytorch.data.sampled import render_sampled

            sampled = dict(fonts=self.sound_fonts, register=labels.register)
            return torch.from_numpy(render_sampled(notes, drums, **sampled, **how))
        return torch.from_numpy(render_notes(notes, drums, tonic=labels.tonic, **how))

    def __repr__(self) -> str:
        fonts = ', '.join(it.name for it in self.sound_fonts)
        return f'SyntheticMusic({self._shown()}{fonts and f", sound_font={fonts!r}"})'
