"""Pairs of the same melody, played otherwise: what a melody encoder learns from and is measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.ndimage import uniform_filter1d
from torch import Tensor

from musiclm_pytorch.checks import check_probability, typechecked
from musiclm_pytorch.data.attributes import MusicLabels, choose, generator
from musiclm_pytorch.data.composition import Note, block_chords, chords_of, drum_pattern, melody
from musiclm_pytorch.data.generated import GeneratedMusic
from musiclm_pytorch.data.scores import composer
from musiclm_pytorch.data.scores.labels import ScoreLabels
from musiclm_pytorch.data.synthesis import CEILING, LOUDNESS, PLAYED_BY, harmonics, render_notes

HUM = 'hum'
PLAYERS = (*PLAYED_BY, HUM)
# MIDI numbers between which the middle of a melody lies; an octave at least, so that any melody finds a place
PLAYED, HUMMED = (54, 78), (46, 68)
# of the melodies, how many are from the styles of `ScoreMusic`, how many have drums; of the waves, how many have chords
SCORED, DRUMMED, CHORDED = 0.5, 0.2, 0.3
LONGEST_REST = 8.0  # seconds
NOISE_DB = (10.0, 50.0)  # by which noise is softer than the music

# what a generator of random numbers is for; part of its key, so that no two uses share their numbers
_MELODY, _PLAYERS, _ITEM = range(200, 203)


@dataclass(frozen=True)
class Melody:
    """Notes of a melody, of the chords under it and of its drums, in order, with times in beats from the first note
    on; beats a minute, and the pitch class of its tonic."""

    notes: tuple[Note, ...]
    chords: tuple[Note, ...]
    drums: tuple[Note, ...]
    bpm: float
    tonic: int


class MelodyPairs(GeneratedMusic):
    """Pairs of waves of one melody: other instruments or a hum, another tempo and octave, chords and drums, and noise.

    The melodies are those of `SyntheticMusic` and of the styles of `ScoreMusic`; both are played by the instruments of
    `SyntheticMusic`, so that no sound font is needed. An item depends on its index, the seed, the split and the
    settings alone.

        pairs = MelodyPairs(seconds=4.0, sample_rate=8000)
        wave, other = pairs[0]  # (32000,) float32 each, of root mean square 0.1

    Args:
        length: number of items.
        seed: 0 or above; another seed, other melodies.
        seconds: length of each wave, 1 at least. Both begin with the same note; the faster one gets further.
        sample_rate: Hz, 8,000 at least.
        split: 'train' or 'valid', which have other melodies.
        tempo: the faster one is up to so many times as fast as the other; 1 is the same tempo.
        transpose: semitones by which each is moved to another key, at most.
        hummed: share of the waves that are hummed, by someone who glides from note to note and is not quite in tune.

    Raises ValueError for an argument out of its range.
    """

    _ITEM = _ITEM

    @typechecked
    def __init__(
        self,
        length: int = 100_000,
        *,
        seed: int = 0,
        seconds: float = 4.0,
        sample_rate: int = 8000,
        split: str = 'train',
        tempo: float = 1.25,
        transpose: int = 0,
        hummed: float = 0.25,
    ):
        if not 1 <= tempo <= 4:
            raise ValueError(f'tempo must lie in 1 to 4, got {tempo}')
        if not 0 <= transpose <= 11:
            raise ValueError(f'transpose must lie in 0 to 11 semitones, got {transpose}')
        check_probability(hummed=hummed)
        super().__init__(length, seed=seed, seconds=seconds, sample_rate=sample_rate, split=split)
        self.tempo, self.transpose, self.hummed = tempo, transpose, hummed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Two waves of a melody, `(samples,)` float32. Raises IndexError beyond the length."""
        index = self._index(index)
        piece = self.melody(index)
        random = generator(*self._key(_PLAYERS, index))
        # never the same one twice
        players = [HUM if random.random() < self.hummed else choose(random, (*PLAYED_BY,))]
        players.append(HUM if HUM not in players and random.random() < self.hummed else players[0])
        while players[1] == players[0]:
            players[1] = choose(random, (*PLAYED_BY,))
        rate = self.tempo ** (random.random() * choose(random, (-0.5, 0.5)))
        return self.play(piece, players[0], rate, random), self.play(piece, players[1], 1 / rate, random)

    def melody(self, index: int) -> Melody:
        """The notes of item `index`."""
        random = generator(*self._key(_MELODY, self._index(index)))
        longest = self.seconds * self.tempo**0.5
        if random.random() < SCORED:
            labels = ScoreLabels.draw(random)
            # a piece may begin with a rest
            parts = {part.duty: part.notes for part in composer.compose(labels, longest + LONGEST_REST, random)}
            notes = [parts.get(duty, ()) for duty in ('lead', 'chords')]
            first = min(it.start for it in notes[0])
            tune, chords = (
                [
                    Note(it.start - first, it.length, it.pitch, it.velocity / 100)
                    for it in own
                    if first <= it.start < first + longest
                ]
                for own in notes
            )
            bpm = 60.0
        else:
            labels = MusicLabels.draw(random)
            at_beat = chords_of(labels, math.ceil(longest * labels.bpm / 60) + 1, random)
            tune, chords = melody(labels, at_beat, 60, 79, random), block_chords(at_beat, 45, 62, random)
            bpm = labels.bpm
        drums = drum_pattern(labels, math.ceil(longest * labels.bpm / 60), random) if random.random() < DRUMMED else []
        drums = [replace(it, start=it.start * bpm / labels.bpm) for it in drums]
        return Melody(tuple(sorted(tune, key=lambda it: it.start)), tuple(chords), tuple(drums), bpm, labels.tonic)

    def play(self, piece: Melody, player: str, rate: float, random: np.random.Generator) -> Tensor:
        """A melody as `player` plays it, one of `PLAYERS`, so many times as fast as it was written, `(samples,)`."""
        low, high = HUMMED if player == HUM else PLAYED
        middle = sum(it.pitch for it in piece.notes) / len(piece.notes)
        # octaves that bring the middle of the melody into the range, any of those that do
        octaves = range(math.ceil((low - middle) / 12), math.floor((high - middle) / 12) + 1)
        shift = 12 * choose(random, octaves) + int(random.integers(-self.transpose, self.transpose + 1))
        keywords = dict(bpm=piece.bpm * rate, samples=self.samples, rate=self.sample_rate, random=random)
        tune = [replace(it, pitch=it.pitch + shift) for it in piece.notes]
        if player == HUM:
            wave = hum(tune, **keywords)
        else:
            drums = [it for it in piece.drums if it.start * 60 / piece.bpm < self.seconds * rate]
            wave = render_notes(tune, drums, instrument=player, tonic=(piece.tonic + shift) % 12, **keywords)
            if piece.chords and random.random() < CHORDED:
                chords = [
                    replace(it, pitch=it.pitch + shift % 12 - (12 if shift % 12 > 6 else 0)) for it in piece.chords
                ]
                chords = [it for it in chords if it.start * 60 / piece.bpm < self.seconds * rate]
                backed = render_notes(chords, [], instrument=choose(random, (*PLAYED_BY,)), tonic=0, **keywords)
                wave = wave + random.uniform(0.2, 0.5) * backed
        noise = random.standard_normal(len(wave), dtype=np.float32)
        wave = wave + LOUDNESS * 10 ** (-random.uniform(*NOISE_DB) / 20) * noise
        wave *= min(LOUDNESS / np.sqrt(np.mean(wave * wave)), CEILING / np.abs(wave).max())
        return torch.from_numpy(wave.astype(np.float32))


def hum(notes: Sequence[Note], *, bpm: float, samples: int, rate: int, random: np.random.Generator) -> np.ndarray:
    """Notes, with times in beats, as someone hums them, `(samples,)` float32 of root mean square `LOUDNESS`: one voice
    with few harmonics, that glides, trembles, breathes, and meets neither pitch nor beat quite.
    """
    t, beat = np.arange(samples) / rate, 60 / bpm
    starts = np.array([it.start for it in notes]) * beat
    starts = np.sort(np.maximum(0.0, starts + random.normal(0, 0.025, len(notes))))
    ends = np.minimum(np.append(starts[1:], np.inf), starts + beat * np.array([it.length for it in notes]))
    pitches = np.array([it.pitch for it in notes]) + random.normal(0, 0.2, len(notes)) + random.uniform(-0.3, 0.3)
    place = np.clip(np.searchsorted(starts, t, side='right') - 1, 0, None)
    contour = pitches[place]
    # from one pitch to the next within a tenth of a second
    contour = uniform_filter1d(contour, round(random.uniform(0.05, 0.12) * rate), mode='nearest')
    contour += random.uniform(0, 0.3) * np.sin(2 * np.pi * random.uniform(4.5, 6.5) * t + random.uniform(0, 6))
    phase = np.cumsum(2 * np.pi * 440 / rate * 2 ** ((contour - 69) / 12))
    sounding = ((t >= starts[0]) & (t < ends[place])).astype(np.float32)
    loudness = uniform_filter1d(sounding, round(0.03 * rate))
    # each note begins softer, so that notes of one pitch are told apart
    loudness *= 1 - 0.6 * np.exp(-np.maximum(t - starts[place], 0) / 0.05)
    size = np.array([1.0, random.uniform(0.2, 0.6), random.uniform(0.05, 0.3), random.uniform(0.02, 0.1)])
    breath = random.uniform(0.01, 0.1) * random.standard_normal(samples, dtype=np.float32)
    wave = (harmonics(phase, size) + breath) * loudness
    return (wave * (LOUDNESS / (np.sqrt(np.mean(wave * wave)) + 1e-9))).astype(np.float32)
