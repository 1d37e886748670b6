"""Music in many styles by sampled instruments, with captions in free English and labels."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.data.attributes import check_seed, choose, generator
from musiclm_pytorch.data.generated import GeneratedMusic
from musiclm_pytorch.data.scores import labels as vocabulary
from musiclm_pytorch.data.scores.composer import Part, compose
from musiclm_pytorch.data.scores.labels import ScoreLabels
from musiclm_pytorch.data.scores.midi import cut, files_of_split, find_scores, read_score
from musiclm_pytorch.data.scores.phrases import (
    MORE,
    check_mentions,
    check_shares,
    draw_mentions,
    known_of,
    write_caption,
)
from musiclm_pytorch.data.scores.rendering import Room, draw_font, find_sound_fonts
from musiclm_pytorch.data.synthesis import CEILING, envelope

# what a generator of random numbers is for; part of its key, so that no two uses share their numbers
_LABELS, _CAPTION, _WAVE, _ITEM, _SOUND = range(100, 105)
# root mean square of a clip
LOUDNESS = {'soft': 0.06, 'moderate': 0.1, 'loud': 0.14, None: 0.1}
SAME_CAPTION = 20  # drawings after which a caption may be one that the clip has already


class ScoreMusic(GeneratedMusic):
    """Pairs of a wave and a caption: compositions in 22 styles, or excerpts of MIDI files, played with a sound font.

    An item depends on its index, the seed, the split, the settings and the sound font alone: it is the same in any
    order and any process. Nothing is stored, so that `length` may be as large as the training is long. Needs the
    extra `scores`, FluidSynth and a sound font (Debian: `apt-get install libfluidsynth3 fluid-soundfont-gm`).

        music = ScoreMusic(seconds=5.0, sample_rate=24000)
        wave, caption = music[0]  # (120000,) float32 in [-1, 1], 'a wistful bossa nova led by a flute, over piano'
        music.labels(0)  # ScoreLabels(instruments=('flute', 'piano'), style='bossa nova', …), without its sound
        music.captions(0)  # several captions of the same clip

    Waves are mono, of root mean square 0.06 (soft) to 0.14 (loud), less where peaks would pass 0.95. The split 'valid'
    has other music, and phrasings (sentence patterns, and one text in eight) that 'train' never uses; give it another
    `sound_font` to measure on sounds that training never met.

    Args:
        length: number of items.
        seed: 0 or above; another seed, other items.
        seconds: length of each wave, 1 to 600.
        sample_rate: Hz, 8,000 to 96,000, as FluidSynth allows.
        split: 'train' or 'valid'.
        sound_font: path of a .sf2 or .sf3, or several, of which each item takes one that has all of its instruments; by
            default that of the environment's MUSICLM_SOUND_FONT, or the first one found where systems put them.
        sources: MIDI files and folders of them, for excerpts beside the compositions; every eighth file is held out.
        source_share: share of the items that are such excerpts.
        captions_per_clip: how many captions `captions(index)` gives.
        mentions: share of the captions that tell an attribute, such as `{'key': 0.5}`; 'bpm', 'key' and 'family' are
            shares of those that tell the tempo, the mode and the lead.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, a file that is no sound font, no MIDI file in `sources`.
        FileNotFoundError: no sound font, or nothing at a path.
        ImportError: pyfluidsynth or FluidSynth is missing (when the first wave is rendered).
    """

    _ITEM = _ITEM

    #: the values of each attribute
    ATTRIBUTES = vocabulary.ATTRIBUTES

    @typechecked
    def __init__(
        self,
        length: int = 100_000,
        *,
        seed: int = 0,
        seconds: float = 5.0,
        sample_rate: int = 24000,
        split: str = 'train',
        sound_font: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
        sources: Sequence[str | os.PathLike] = (),
        source_share: float = 0.5,
        captions_per_clip: int = 4,
        mentions: Mapping[str, float] | None = None,
    ):
        if not 8000 <= sample_rate <= 96000:
            raise ValueError(f'sample_rate must lie in 8000 to 96000 Hz, got {sample_rate}; resample the waves instead')
        if captions_per_clip < 1:
            raise ValueError(f'captions_per_clip must be 1 at least, got {captions_per_clip}')
        if not 0 <= source_share <= 1:
            raise ValueError(f'source_share must lie in 0 to 1, got {source_share}')
        super().__init__(length, seed=seed, seconds=seconds, sample_rate=sample_rate, split=split)
        self.sound_fonts = find_sound_fonts(sound_font)
        if isinstance(sources, str):
            raise TypeError(f'sources must be a list of MIDI files and folders, such as [{sources!r}]')
        self._scores = files_of_split(find_scores(sources), split) if sources else []
        self.source_share = source_share if sources else 0.0
        self.captions_per_clip = captions_per_clip
        self.mentions = check_shares(mentions or {})

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """The wave, `(samples,)` float32, and the first caption of an item. Raises IndexError beyond the length."""
        index = self._index(index)
        labels, parts = self._piece(index, with_parts=True)
        return self._wave(labels, parts, self._key(_SOUND, index)), self._captions(labels, index)[0]

    def labels(self, index: int) -> ScoreLabels:
        """What is true of item `index`, in a fraction of a millisecond: nothing is rendered."""
        index = self._index(index)
        labels, _ = self._piece(index)
        told = draw_mentions(labels, self.mentions, generator(*self._key(_CAPTION, index), 0))
        return replace(labels, mentioned=told)

    def parts(self, index: int) -> list[Part]:
        """The notes of item `index`, in seconds from its start."""
        return self._piece(self._index(index), with_parts=True)[1]

    def text(self, index: int) -> str:
        """The first caption of item `index`, without its wave."""
        return self.captions(index)[0]

    def captions(self, index: int) -> list[str]:
        """Several captions of item `index`; they tell different attributes in different words."""
        index = self._index(index)
        return self._captions(self._piece(index)[0], index)

    def draw_labels(self, seed: int = 0, **given: Any) -> ScoreLabels:
        """Labels with the attributes given, such as `style='waltz', lead='violin'`, and the others at random.

        Raises TypeError for an unknown attribute, ValueError for a value outside its vocabulary or for values that
        contradict one another.
        """
        return ScoreLabels.draw(generator(_LABELS, check_seed(seed)), **given)

    def render(self, labels: ScoreLabels, seed: int = 0) -> Tensor:
        """A composition with these labels, `(samples,)` float32 in [-1, 1]; another seed, another piece.

        Raises ValueError for labels of a MIDI file, whose notes they do not hold.
        """
        if labels.style is None or labels.register is None:
            raise ValueError(f'only labels with a style and a register can be composed for, got {labels}')
        key = (check_seed(seed),)
        parts = compose(labels, self.seconds, generator(_WAVE, *key))
        return self._wave(labels, parts, (_SOUND, *key))

    def caption(self, labels: ScoreLabels, seed: int = 0, *, mention: Collection[str] | None = None) -> str:
        """A caption that is true of these labels, in a phrasing of this data set's split.

        Args:
            labels: what to tell.
            seed: another seed, another caption.
            mention: the attributes to tell: some of 'style', 'lead', 'family', 'backing', 'drums', 'mood', 'tempo',
                'bpm', 'mode', 'key', 'metre', 'register', 'dynamics', 'articulation', 'texture'. By default some at
                random.

        Raises ValueError if `mention` is empty, names anything else, or something that the labels do not know.
        """
        random = generator(_CAPTION, check_seed(seed))
        told = draw_mentions(labels, self.mentions, random) if mention is None else check_mentions(labels, mention)
        return write_caption(labels, told, self.split, random)

    def prompts(self, attribute: str, count: int = 8) -> dict[Any, list[str]]:
        """Captions that tell one attribute and nothing else, for each of its values that has words: to classify waves
        by the nearest text, or to ask a model for it.

        'tonic' tells the key, in all modes. Of 'drums', False is music whose captions name its lead alone, and True
        the same with drums.
        """
        if attribute not in self.ATTRIBUTES:
            raise ValueError(f'no attribute is named {attribute!r}; they are {", ".join(self.ATTRIBUTES)}')
        if count < 1:
            raise ValueError(f'count must be 1 at least, got {count}')
        found: dict[Any, list[str]] = {}
        for value in self.ATTRIBUTES[attribute]:
            drawn = [self.draw_labels(seed, **{attribute: value}) for seed in range(count)]
            told = {'tonic': ('key',), 'drums': ('lead', 'drums') if value else ('lead',)}.get(attribute, (attribute,))
            if all(name in MORE or name in known_of(drawn[0]) for name in told):
                found[value] = [self.caption(labels, seed, mention=told) for seed, labels in enumerate(drawn)]
        return found

    def _piece(self, index: int, *, with_parts: bool = False) -> tuple[ScoreLabels, list[Part]]:
        """Labels of an item and, if asked for, its notes; those of a score are known with its labels."""
        random = generator(*self._key(_LABELS, index))
        if self._scores and random.random() < self.source_share:
            return cut(read_score(choose(random, self._scores)), self.seconds, random)
        labels = ScoreLabels.draw(random)
        return labels, compose(labels, self.seconds, generator(*self._key(_WAVE, index))) if with_parts else []

    def _captions(self, labels: ScoreLabels, index: int) -> list[str]:
        texts: list[str] = []
        for number in range(self.captions_per_clip):
            random = generator(*self._key(_CAPTION, index), number)
            for _ in range(SAME_CAPTION):
                text = write_caption(labels, draw_mentions(labels, self.mentions, random), self.split, random)
                if text not in texts:
                    break
            texts.append(text)
        return texts

    def _wave(self, labels: ScoreLabels, parts: list[Part], key: tuple[int, ...]) -> Tensor:
        random = generator(*key)
        font = draw_font(
            random, self.sound_fonts, lambda it: all(it.preset(part.channel, part.program) for part in parts)
        )
        wave = font.render(parts, self.samples, self.sample_rate, Room.draw(random))
        wave = (wave - wave.mean()) * envelope(self.samples, self.sample_rate, 0.002, 0.02)
        power = float(np.sqrt(np.mean(wave * wave)))
        if power < 1e-7:
            raise ValueError(f'{font.path} plays nothing of {labels}: its samples are silent there')
        gain = min(LOUDNESS[labels.dynamics] / power, CEILING / float(np.abs(wave).max()))
        return torch.from_numpy((wave * np.float32(gain)).astype(np.float32))

    def __repr__(self) -> str:
        fonts = ', '.join(it.name for it in self.sound_fonts)
        return f'ScoreMusic({self._shown()}, sound_font={fonts!r})'
