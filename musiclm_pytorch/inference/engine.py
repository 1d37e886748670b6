"""Many files and texts through a model: to latents, and from texts to sound."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_pytorch.audiolm.generation_args import Progress, counted_steps
from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.inference.batches import (
    LOOK_AHEAD,
    Window,
    WindowPlan,
    embed_waves,
    plain,
    taking_lengths,
    window_and_hop,
)
from musiclm_pytorch.inference.config import InferenceConfig
from musiclm_pytorch.inference.optimize import OptimizedMuLaN
from musiclm_pytorch.inference.synthesis import synthesise
from musiclm_pytorch.inference.workers import count_workers, workers
from musiclm_pytorch.mulan.display import indented
from musiclm_pytorch.mulan.layers import l2norm
from musiclm_pytorch.mulan.model import JointEmbedding, MuLaN, evaluating
from musiclm_pytorch.mulan.pretrained import PretrainedMuLaN
from musiclm_pytorch.musiclm import MusicLM

logger = logging.getLogger(__name__)

BATCH_SIZE = 16  # without a config


class EmbeddedFiles(NamedTuple):
    """What `BatchInferenceEngine.embed_audio_files` gives.

    Attributes:
        latents: `(n, dim_latent)` float32 on the CPU, of length 1, in the order of the paths given
        paths: `n`, those that were embedded
        skipped: of each of the others, why it could not be
    """

    latents: Tensor
    paths: list[str | Path]
    skipped: dict[str, str]


class BatchInferenceEngine:
    """Batches of texts and files through a MuLaN or a MusicLM.

        engine = BatchInferenceEngine(mulan, InferenceConfig(batch_size = 16))
        latents, paths, skipped = engine.embed_audio_files(Path('music').glob('*.wav'))

    Args:
        model: a `MuLaN`, an `OptimizedMuLaN`, a `PretrainedMuLaN`, or a `MusicLM`, whose MuLaN then embeds. It is left
            as it is.
        config: what to optimize a `MuLaN` for and how many items a batch takes; by default plain, 16 items. Of a
            `PretrainedMuLaN` it tells the device, where that is moved, and the number of items.
    """

    @typechecked
    def __init__(self, model: JointEmbedding | OptimizedMuLaN | MusicLM, config: InferenceConfig | None = None):
        self.musiclm = model if isinstance(model, MusicLM) else None
        self.mulan = mulan_of(model)
        if config is None and isinstance(model, OptimizedMuLaN):
            config = model.config
        self.config, self.batch_size = config, BATCH_SIZE if config is None else config.batch_size
        self._told = False

    def __repr__(self) -> str:
        model = self.mulan if self.musiclm is None else self.musiclm
        return f'{type(self).__name__}({self.batch_size} items a batch,\n  {indented(model)})'

    @cached_property
    def embeds(self) -> JointEmbedding | OptimizedMuLaN:
        """What embeds: the model optimized as the config says, which is done when it is first needed."""
        mulan = taking_lengths(self.mulan)
        if self.config is None or isinstance(mulan, OptimizedMuLaN):
            return mulan
        return OptimizedMuLaN(mulan, self.config) if isinstance(mulan, MuLaN) else mulan.to(self.config.torch_device())

    # embedding

    @typechecked
    def embed_audio_files(
        self,
        paths: Iterable[str | Path],
        *,
        window: float | None = None,
        hop: float | None = None,
        progress: Progress = False,
    ) -> EmbeddedFiles:
        """Embed sound files of any length: each the mean over windows, as `MuLaN.embed_audio` of it alone gives.

        Neighbours in length share batches, whether or not the audio tower has `support_variable_length`. Files are
        read window by window, beside the model, so that memory does not grow with their length. A file that cannot be
        read or that the model cannot take is skipped, with a warning in the log.

        Args:
            paths: of sound files.
            window: seconds embedded at once, by default 10, or `max_audio_length` where that is less. The last window
                ends with the file, and a shorter file is embedded whole.
            hop: seconds from window to window, by default `window`.
            progress: a bar, or a function of (files, files in all).

        Raises:
            ValueError: a MuLaN of spectrograms or without a sample rate; a window that it does not take.
        """
        if isinstance(paths, (str, Path)):
            raise TypeError(f'paths must be a list of paths, got {paths!r}; put one path in a list')
        mulan, model = plain(self.mulan), self.embeds
        plan = WindowPlan(paths, *window_and_hop(mulan, window, hop), self.batch_size)
        total, done = len(plan.paths), 0
        sums = torch.zeros(total, mulan.dim_latent, dtype=torch.float32)
        counts = torch.zeros(total, 1, dtype=torch.float32)
        needs = mulan.sample_rate, mulan.audio.min_samples
        # compiled code takes all threads by itself, and torch.compile's must not be called from several; and where
        # memory counts, one batch is enough
        alone = isinstance(model, OptimizedMuLaN) and (model.compiled or model.config.memory_efficient)
        count = 1 if alone else count_workers(model.device)

        def work(batch: list[Window]) -> tuple[list[Window], list[Tensor | str]]:
            found = plan.read(batch, *needs)
            return batch, found if count == 1 else embed_waves(model, found)

        # batches side by side; or else they are read in a thread while the model computes in this one
        threads = 1 if count == 1 and model.device.type == 'cpu' else None
        with counted_steps(progress, 'latents', total) as advance, evaluating(model), workers(count, threads) as run:
            for batch, found in run(work, plan.batches()):
                for (place, *_), latent in zip(batch, embed_waves(model, found) if count == 1 else found):
                    if isinstance(latent, Tensor):
                        sums[place] += latent
                        counts[place] += 1
                    else:
                        plan.skipped.setdefault(place, latent)
                    plan.left[place] -= 1
                    if plan.left[place] == 0:
                        done += 1
                        advance(1)
            advance(total - done)
        for index, reason in sorted(plan.skipped.items()):
            logger.warning('skipped %s: %s', plan.paths[index], reason)
        kept = [index for index in range(total) if index not in plan.skipped]
        return EmbeddedFiles(
            latents=l2norm(sums[kept] / counts[kept]),
            paths=[plan.paths[index] for index in kept],
            skipped={str(plan.paths[index]): reason for index, reason in sorted(plan.skipped.items())},
        )

    @typechecked
    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], *, progress: Progress = False) -> Tensor:
        """Embed texts as `(n, dim_latent)` float32 on the CPU, of length 1, in their order.

        Neighbours in length share batches, so that little is padded. Raises TypeError for a text that is no string.
        """
        if isinstance(texts, str):
            raise TypeError(f'texts must be a list of strings, got the string {texts!r:.80}')
        latents = torch.empty(len(texts), plain(self.mulan).dim_latent, dtype=torch.float32)
        text_tower = plain(self.embeds).text
        with counted_steps(progress, 'latents', len(texts)) as advance, evaluating(self.embeds):
            if isinstance(self.embeds, PretrainedMuLaN):  # it tokenizes by itself
                for start in range(0, len(texts), self.batch_size):
                    part = texts[start : start + self.batch_size]
                    latents[start : start + len(part)] = self.embeds.get_text_latents(raw_texts=part).cpu()
                    advance(len(part))
                return latents
            for start in range(0, len(texts), LOOK_AHEAD):
                ids = F.pad(text_tower.tokenize(texts[start : start + LOOK_AHEAD]), (0, 1), value=text_tower.pad_id)
                # up to the last token that counts
                places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
                lengths = ((ids != text_tower.pad_id) * places).amax(dim=1).clamp(min=1)
                for batch in lengths.argsort(stable=True).split(self.batch_size):
                    part = ids[batch, : lengths[batch].max()]
                    latents[start + batch.cpu()] = self.embeds.get_text_latents(part).float().cpu()
                    advance(len(batch))
        return latents

    # text to sound

    @typechecked
    def process_text_to_audio_batch(
        self,
        texts: Sequence[str],
        audio_shapes: Sequence[Sequence[int]],
        *,
        seed: int = 0,
        num_samples: int = 1,
        steps: int = 100,
        progress: Progress = False,
    ) -> list[Tensor]:
        """Sound for each text, of the shape asked for, `(…, samples)`; the same in each leading place.

        A MusicLM makes music at its `sample_rate`. Texts of like length are made together, as long as the longest of
        them, and cut. A MuLaN alone has no decoder: there it is gradient ascent on its similarity with the text, which
        the log says once (`inference.synthesis`).

        Args:
            texts: what it is to be like.
            audio_shapes: one a text, such as `(160000,)` or `(1, 160000)`.
            seed: the same sounds for the same call. With a MusicLM, text number i has the seeds that
                `MusicLM(texts, seed=seed)` gives it, from `seed + i * num_samples` on.
            num_samples: pieces made for each text, of which MuLaN chooses; with a MusicLM only.
            steps: of the gradient ascent; with a MuLaN only.
            progress: a bar, or a function of (steps, steps in all), for each batch anew with a MusicLM.

        Returns:
            a float32 tensor a text, on the CPU.

        Raises:
            ValueError: no texts, an empty one, not one shape a text, a shape without a positive number.
        """
        shapes = read_shapes(texts, audio_shapes)
        if self.musiclm is not None:
            return self._generate(texts, shapes, seed, num_samples, progress)
        if isinstance(self.mulan, OptimizedMuLaN) and (self.mulan.quantized or self.mulan.dtype != torch.float32):
            raise ValueError(
                'a MuLaN in 8-bit integers or half precision has no gradients to make sound by; give the engine the '
                'MuLaN it was made from, and the config beside it'
            )
        if not self._told:
            self._told = True
            logger.warning(
                'a MuLaN has no decoder: the sound is made by gradient ascent on its similarity with the text, and '
                'may be like the text to MuLaN alone; give the engine a MusicLM for music'
            )
        return synthesise(
            plain(self.mulan), texts, shapes, steps=steps, seed=seed, batch_size=self.batch_size, progress=progress
        )

    def _generate(
        self,
        texts: Sequence[str],
        shapes: list[tuple[int, ...]],
        seed: int,
        num_samples: int,
        progress: Progress,
    ) -> list[Tensor]:
        rate = self.musiclm.sample_rate
        groups: list[list[int]] = []
        for row in sorted(range(len(texts)), key=lambda row: shapes[row][-1]):
            # what is made and cut off again is less than what is kept
            if groups and shapes[row][-1] < 2 * shapes[groups[-1][0]][-1]:
                groups[-1].append(row)
            else:
                groups.append([row])
        found: dict[int, Tensor] = {}
        for group in groups:
            waves = self.musiclm(
                [texts[row] for row in group],
                num_samples=num_samples,
                seconds=shapes[group[-1]][-1] / rate,
                seed=[seed + row * num_samples + sample for row in group for sample in range(num_samples)],
                max_batch=self.batch_size,
                progress=progress,
            )
            for row, wave in zip(group, waves.float().cpu()):
                found[row] = wave[: shapes[row][-1]].expand(shapes[row]).clone()
        return [found[row] for row in range(len(texts))]


def mulan_of(model: JointEmbedding | OptimizedMuLaN | MusicLM) -> JointEmbedding | OptimizedMuLaN:
    """The model itself, or that within a MusicLM."""
    return model.mulan_embed_quantizer.mulan if isinstance(model, MusicLM) else model


def read_shapes(texts: Sequence[str], audio_shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Shapes as tuples. Raises TypeError and ValueError unless texts and shapes go together and make sense."""
    if isinstance(texts, str):
        raise TypeError(f'texts must be a list of strings, got the string {texts!r:.80}')
    if not texts or len(texts) != len(audio_shapes):
        raise ValueError(
            f'got {len(texts)} texts and {len(audio_shapes)} audio_shapes; pass one text or more, and a shape for each'
        )
    for index, (text, shape) in enumerate(zip(texts, audio_shapes)):
        if not text.strip():
            raise ValueError(f'texts[{index}] is empty; say what the music is like')
        if len(shape) == 0 or any(size < 1 for size in shape):
            raise ValueError(f'audio_shapes[{index}] must be one or more positive numbers, got {tuple(shape)}')
    return [tuple(shape) for shape in audio_shapes]
