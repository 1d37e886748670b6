"""What many sound files are embedded by: their windows read in order of length, and batches side by side."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from musiclm_pytorch.checks import check_positive
from musiclm_pytorch.data.audio import AudioFile, windows
from musiclm_pytorch.evaluation.embedders import batches_by_length
from musiclm_pytorch.inference.optimize import OptimizedMuLaN
from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.model import MuLaN, evaluating

WINDOW = 10.0  # seconds that MuLaN hears at once (MusicLM, section 3.2)
LOOK_AHEAD = 4096  # files or texts that are sorted by length at a time


class BatchEmbedder:
    """An `Embedder` of waves, each whole, whose batches may be computed side by side.

    Args:
        embeds: the model.
        batch_size: waves embedded at a time.
        run: `map` of some kind.
    """

    name = 'mulan'

    def __init__(self, embeds: MuLaN | OptimizedMuLaN, batch_size: int, run: Any):
        mulan = plain(embeds)
        self.sample_rate, self.dim = mulan.sample_rate, mulan.dim_latent
        self.mixed = mulan.audio.support_variable_length
        self.min_samples = mulan.audio.spec.min_samples(mulan.audio.patch_size[1])
        self.embeds, self.batch_size, self.run = embeds, batch_size, run

    def embed(self, waves: list[Tensor]) -> list[Tensor]:
        """See `Embedder.embed`."""
        batches = list(batches_by_length(waves, self.batch_size, mixed=self.mixed))
        batches.reverse()  # the longest first, so that the workers end together
        found: dict[int, Tensor] = {}
        with evaluating(self.embeds):
            parts = self.run(self._embed, [[waves[row] for row in rows] for rows in batches])
            for rows, latents in zip(batches, parts):
                found |= zip(rows, latents.split(1))
        return [found[row] for row in range(len(waves))]

    @torch.no_grad()
    def _embed(self, waves: list[Tensor]) -> Tensor:
        lengths = [len(wave) for wave in waves]
        given = dict(audio_lengths=lengths) if min(lengths) < max(lengths) else {}
        batch = pad_sequence(waves, batch_first=True).to(self.embeds.device)
        return self.embeds.get_audio_latents(batch, **given).float().cpu()


class WindowReader:
    """The windows of sound files, those of files of like length behind each other.

    Attributes:
        owners: of each window that `pieces` gave, in its order, the place of its file and whether it is its last.
        skipped: by the place of a file, why it cannot be read.
    """

    def __init__(self, paths: Iterable[str | Path], window: float, hop: float):
        self.paths, self.window, self.hop = list(paths), window, hop
        self.owners: deque[tuple[int, bool]] = deque()
        self.skipped: dict[int, str] = {}

    def pieces(self) -> Iterator[tuple[Tensor, int]]:
        """Waves and their rates in Hz."""
        numbered = enumerate(self.paths)
        while group := list(islice(numbered, LOOK_AHEAD)):
            lengths = {}
            for index, path in group:
                try:
                    with AudioFile(path) as file:
                        lengths[index] = len(file) / file.sample_rate
                except (OSError, ValueError) as error:
                    self.skipped[index] = str(error)
            for index in sorted(lengths, key=lengths.get, reverse=True):
                try:
                    yield from self._windows(index)
                except (OSError, ValueError) as error:
                    self.skipped[index] = str(error)

    def _windows(self, index: int) -> Iterator[tuple[Tensor, int]]:
        with AudioFile(self.paths[index]) as file:
            rate = file.sample_rate
            spans = windows(len(file), max(1, round(self.window * rate)), max(1, round(self.hop * rate)))
            for start, stop in spans:
                wave = file.read(start, stop)
                # one sum tells most often; it may overflow where no sample does
                if not math.isfinite(wave.sum().item()) and not wave.isfinite().all():
                    raise ValueError(f'{file.name} holds NaN or infinite samples')
                self.owners.append((index, stop == len(file)))
                yield wave, rate


def window_and_hop(mulan: MuLaN, window: float | None, hop: float | None) -> tuple[float, float]:
    """Seconds, checked: what a MuLaN takes."""
    check_positive(window=window, hop=hop)
    rate = mulan.sample_rate
    if mulan.audio.accept_spec or rate is None:
        raise ValueError(
            'files cannot be embedded by a MuLaN that takes spectrograms or does not know its sample rate; build the '
            'audio tower with audio_sample_rate and without accept_spec'
        )
    shortest = mulan.audio.spec.min_samples(mulan.audio.patch_size[1])
    longest = mulan.audio.max_audio_length or math.inf
    if window is None:
        window = min(WINDOW, longest / rate)
    if not shortest <= round(window * rate) <= longest:
        raise ValueError(
            f'this MuLaN takes {shortest / rate:g} to {longest / rate:g} s at once, but window is {window:g} s'
        )
    return window, window if hop is None else hop


def plain(model: MuLaN | OptimizedMuLaN) -> MuLaN:
    """The MuLaN within."""
    return model.mulan if isinstance(model, OptimizedMuLaN) else model


def taking_lengths(model: MuLaN | OptimizedMuLaN) -> MuLaN | OptimizedMuLaN:
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
