"""What many sound files are embedded by: their windows in order of length, read and embedded in batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from musiclm_pytorch.checks import check_finite, check_positive
from musiclm_pytorch.data.audio import AudioFile, resample, windows
from musiclm_pytorch.evaluation.embedders import embed_together
from musiclm_pytorch.inference.optimize import OptimizedMuLaN
from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.model import JointEmbedding
from musiclm_pytorch.mulan.text_transformer import VOCAB_SIZE

WINDOW = 10.0  # seconds that MuLaN hears at once (MusicLM, section 3.2)
LOOK_AHEAD = 4096  # files or texts that are sorted by length at a time


class Window(NamedTuple):
    """A piece of a sound file: the place of the file among all, and from which sample to which."""

    place: int
    start: int
    stop: int


class WindowPlan:
    """The windows of sound files, in batches of neighbours in length.

    Attributes:
        paths: the files.
        left: by the place of a file, how many of its windows are not embedded yet.
        skipped: by the place of a file, why it cannot be read.
    """

    def __init__(self, paths: Iterable[str | Path], window: float, hop: float, batch_size: int):
        self.paths, self.window, self.hop, self.batch_size = list(paths), window, hop, batch_size
        self.left: dict[int, int] = {}
        self.skipped: dict[int, str] = {}

    def batches(self) -> Iterator[list[Window]]:
        """Longer files first, then those of one window from the longest on, so that workers end together.

        Windows of longer files are listed as they are asked for: their number grows with the length of a file.
        """
        for start in range(0, len(self.paths), LOOK_AHEAD):
            spans = self._spans(range(start, min(start + LOOK_AHEAD, len(self.paths))))
            while batch := list(islice(spans, self.batch_size)):
                yield batch

    def _spans(self, places: range) -> Iterator[Window]:
        long: list[tuple[int, int, int]] = []
        short: list[tuple[float, Window]] = []
        for place in places:
            try:
                with AudioFile(self.paths[place]) as file:
                    total, rate = len(file), file.sample_rate
            except (OSError, ValueError) as error:
                self.skipped[place] = str(error)
                continue
            self.left[place] = sum(1 for _ in self._windows(total, rate))
            if self.left[place] == 1:
                short.append((total / rate, Window(place, 0, total)))
            else:
                long.append((place, total, rate))
        for place, total, rate in long:
            for start, stop in self._windows(total, rate):
                yield Window(place, start, stop)
        for _, window in sorted(short, key=lambda it: it[0], reverse=True):
            yield window

    def _windows(self, total: int, rate: int) -> Iterator[tuple[int, int]]:
        return windows(total, max(1, round(self.window * rate)), max(1, round(self.hop * rate)))

    def read(self, batch: list[Window], rate: int, min_samples: int) -> list[Tensor | str]:
        """Of each window its wave `(samples,)` at `rate` Hz, or why there is none."""
        found: list[Tensor | str] = []
        for place, group in groupby(batch, key=lambda it: it.place):
            some = list(group)
            if place in self.skipped:
                found += [self.skipped[place]] * len(some)
                continue
            begun = len(found)
            try:
                with AudioFile(self.paths[place]) as file:
                    for _, start, stop in some:
                        found.append(read_window(file, start, stop, rate, min_samples))
            except (OSError, ValueError) as error:
                # one window is enough to leave the file out
                found[begun:] = [str(error)] * len(some)
        return found


def read_window(file: AudioFile, start: int, stop: int, rate: int, min_samples: int) -> Tensor:
    wave = file.read(start, stop)
    check_finite(wave[None], 'the file holds NaN or infinite samples')
    wave = resample(wave, file.sample_rate, rate)
    if len(wave) < min_samples:
        raise ValueError(f'{file.name}: the model needs at least {min_samples} samples at {rate} Hz, got {len(wave)}')
    return wave


@torch.no_grad()
def embed_waves(embeds: JointEmbedding | OptimizedMuLaN, waves: list[Tensor | str]) -> list[Tensor | str]:
    """Of each wave its latent `(d,)` on the CPU, or why there is none. What is no wave stays as it is."""
    found = list(waves)
    rows = [row for row, wave in enumerate(waves) if isinstance(wave, Tensor)]
    mixed = plain(embeds).audio.support_variable_length
    for _, group in groupby(rows, key=lambda row: None if mixed else len(waves[row])):
        some = list(group)
        try:
            latents = embed_together(embeds, [waves[row] for row in some])
        except ValueError as error:
            # each alone tells which one it was
            reason = str(error).replace('wavs[0]', 'the audio')
            for row in some:
                found[row] = reason if len(some) == 1 else embed_waves(embeds, [waves[row]])[0]
            continue
        for row, latent in zip(some, latents):
            found[row] = latent if latent.isfinite().all() else 'the model gives NaN or infinity for it'
    return found


def window_and_hop(mulan: JointEmbedding, window: float | None, hop: float | None) -> tuple[float, float]:
    """Seconds, checked: what a MuLaN takes."""
    check_positive(window=window, hop=hop)
    rate = mulan.sample_rate
    if mulan.audio.accept_spec or rate is None:
        raise ValueError(
            'files cannot be embedded by a MuLaN that takes spectrograms or does not know its sample rate; build the '
            'audio tower with audio_sample_rate and without accept_spec'
        )
    shortest = mulan.audio.min_samples
    longest = mulan.audio.max_audio_length or math.inf
    window = mulan.window(WINDOW) if window is None else window
    if not shortest <= round(window * rate) <= longest:
        raise ValueError(
            f'this MuLaN takes {shortest / rate:g} to {longest / rate:g} s at once, but window is {window:g} s'
        )
    return window, window if hop is None else hop


def check_words(mulan: JointEmbedding, remedy: str = '') -> None:
    """Raise ValueError, with another remedy if there is one, unless a MuLaN reads words."""
    if not mulan.text.reads_words:
        raise ValueError(
            f'this MuLaN takes no words, only its own {mulan.text.num_tokens} token ids; words need a text tower with '
            f'num_tokens={VOCAB_SIZE}{remedy}'
        )


def plain(model: JointEmbedding | OptimizedMuLaN) -> JointEmbedding:
    """The MuLaN within."""
    return model.mulan if isinstance(model, OptimizedMuLaN) else model


def taking_lengths(model: JointEmbedding | OptimizedMuLaN) -> JointEmbedding | OptimizedMuLaN:
    """The same model, with the same weights, whose audio tower lets waves of different lengths share a batch.

    A tower of another class, such as a compiled one, stays as it is.
    """
    if isinstance(model, OptimizedMuLaN):
        return with_child(model, mulan=taking_lengths(model.mulan))
    if type(model.audio) is not AudioSpectrogramTransformer or model.audio.support_variable_length:
        return model
    audio = copy.copy(model.audio)
    audio.support_variable_length = True
    return with_child(model, audio=audio)


def with_child(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A shallow copy of a module with other children."""
    view = copy.copy(module)
    view._modules = {**module._modules, **children}  # a dict of its own, which a shallow copy has not
    return view
