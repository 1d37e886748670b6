"""Training MuLaN on pairs of audio and text."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from typing_extensions import Unpack

from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.collectives import any_over_ranks, gather_batch, gather_sizes, rank, single_process, world_size
from musiclm_pytorch.data.collate import collate_for
from musiclm_pytorch.data.datasets import AudioTextDataset, split_off
from musiclm_pytorch.data.rates import check_rate
from musiclm_pytorch.data.shards import ShardedAudioText, ShardItems
from musiclm_pytorch.mulan import checkpoint
from musiclm_pytorch.mulan.lora import ADAPTERS_FOLDER, adapters_of, save_adapters
from musiclm_pytorch.mulan.model import MuLaN, PairLatents, evaluating
from musiclm_pytorch.trainer.callbacks import Callback
from musiclm_pytorch.trainer.config import TrainingConfig, TrainingKeywords
from musiclm_pytorch.trainer.grad_cache import grad_cache_backward, join_latents, split_batch
from musiclm_pytorch.trainer.grouping import Grouping
from musiclm_pytorch.trainer.optimizers import optimizers_of
from musiclm_pytorch.trainer.retrieval import mean_cosine, retrieval_metrics, similarity_histogram
from musiclm_pytorch.trainer.trainer import Trainer, TrainingError, detached
from musiclm_pytorch.trainer.upstream import UpstreamNames, moments_by_name, set_moments

logger = logging.getLogger(__name__)

COLLAPSED = 0.99  # mean cosine between different items; a healthy model is far below


class _PairStep(nn.Module):
    """What runs under data-parallel training: the loss of a batch, its latents alone, or the loss of latents."""

    def __init__(self, mulan: MuLaN):
        super().__init__()
        self.mulan = mulan

    def forward(
        self, batch: dict[str, Any] | None, latents_only: bool = False, latents: PairLatents | None = None
    ) -> Tensor | PairLatents:
        if latents is not None:
            return self.mulan.loss(latents)
        latents = embed_pairs(self.mulan, batch)
        if not latents_only:
            return self.mulan.loss(latents)
        # the parameters of the loss have got their gradients already; data-parallel training waits for them here
        unused = sum(parameter.sum() for parameter in self.loss_parameters()) * 0.0
        return PairLatents(latents.audio + unused, *latents[1:])

    def loss_parameters(self) -> list[nn.Parameter]:
        losses = [self.mulan.contrast] if self.mulan.words is None else [self.mulan.contrast, self.mulan.words]
        if self.mulan.multi_layer_contrastive_learning is not None:
            losses.append(self.mulan.multi_layer_contrastive_learning.contrast)
        return [parameter for loss in losses for parameter in loss.parameters()]


class MuLaNTrainer(UpstreamNames, Trainer):
    """Trains a MuLaN on a data set of pairs.

    The data set gives pairs of a wave and a text (string or token ids), in either order; see
    `musiclm_pytorch.data.collate_pairs`. Waves of different lengths are padded where the audio tower was built with
    `support_variable_length = True`, and cut to the shortest of their batch otherwise.

    With `grad_accum_every` or `grad_cache_chunk_size` a step is one contrast over all pairs of its micro-batches, with
    the memory of one of them (GradCache, arXiv 2101.06983).

    Args:
        mulan: the model; it is trained in place.
        dataset: pairs: a map-style data set, a list, `ShardedAudioText`, or another `IterableDataset`. If it has a
            `sample_rate`, in Hz, that is the model's.
        data_max_length: longest wave in samples; longer ones are cut.
        valid_dataset: held-out pairs, by index, or `ShardedAudioText`; by default `valid_frac` of the data set. What is
            iterable is not split.
        save_model_every: another name of `checkpoint_every`, as upstream had it.
        use_lion: the optimizer Lion.
        use_mixed_precision: fp16 on CUDA, bf16 on a CPU that has instructions for it; `mixed_precision` names one.
        grad_cache_chunk_size: pairs embedded at a time.
        collapse_after: step from which embeddings that are all alike are an error; at the start they often are.
        compile_model: run both towers through torch.compile.
        groups: a key for each item of `dataset`, such as its artist or genre; items of one key are alike. Every other
            batch is then made of groups of like items: hard negatives, from which the model learns what tells those
            apart (see `trainer.grouping`).
        group_size: items of one key beside each other in such a batch.
        groups_after: steps before the first such batch: what is easy is learned sooner from random ones.
        collate_fn: makes a batch of a list of items, in place of `collate_pairs`.
        folder: not used; upstream had it and ignored it.
        callbacks, config, further keywords: as of `Trainer`.
    """

    DEFAULTS = Trainer.DEFAULTS | dict(max_valid_items=1024)

    @typechecked
    def __init__(
        self,
        mulan: MuLaN,
        dataset: Any,
        *,
        data_max_length: int | None = None,
        folder: str | Path | None = None,
        valid_dataset: Any = None,
        save_model_every: int | None = None,
        use_lion: bool = False,
        use_mixed_precision: bool = False,
        grad_cache_chunk_size: int | None = None,
        compile_model: bool = False,
        collapse_after: int = 500,
        groups: Sequence[Hashable] | None = None,
        group_size: int = 16,
        groups_after: int = 0,
        collate_fn: Callable | None = None,
        callbacks: Sequence[Callback] = (),
        config: TrainingConfig | None = None,
        **keywords: Unpack[TrainingKeywords],
    ):
        check_positive(data_max_length=data_max_length, grad_cache_chunk_size=grad_cache_chunk_size)
        if save_model_every is not None:
            if keywords.get('checkpoint_every') is not None:
                raise ValueError('save_model_every and checkpoint_every are two names of one number; pass one')
            keywords['checkpoint_every'] = save_model_every
        if keywords.get('checkpoint_every', 0) is None:  # as upstream's save_model_every may be
            del keywords['checkpoint_every']
        config = self.complete(config, keywords)
        if use_mixed_precision and config.mixed_precision is None:
            config = config.updated(mixed_precision='fp16' if torch.cuda.is_available() else 'auto')
        if use_lion:
            config = config.updated(optimizer='lion')
        if isinstance(valid_dataset, ShardedAudioText):
            valid_dataset = ShardItems(valid_dataset)
        streamed = isinstance(dataset, IterableDataset)
        for name, data in (('dataset', None if streamed else dataset), ('valid_dataset', valid_dataset)):
            by_index = hasattr(data, '__len__') and hasattr(data, '__getitem__')
            if data is not None and (not by_index or isinstance(data, IterableDataset)):
                raise TypeError(f'{name} must have a length and items by index, got {type(data).__name__}')
        check_rate(dataset, mulan.sample_rate, 'dataset')
        check_rate(valid_dataset, mulan.sample_rate, 'valid_dataset')
        items = None if streamed else len(dataset)
        if isinstance(dataset, ShardedAudioText):
            items = dataset.total
        if items is not None and items < 2:
            raise ValueError(f'the data set has {items} items; a contrast needs at least 2 pairs')
        if config.batch_size is not None and config.batch_size < 2:
            raise ValueError(f'batch_size must be at least 2 for a contrast, got {config.batch_size}')

        split = dict(valid_frac=config.valid_frac, random_split_seed=config.random_split_seed)
        splits = valid_dataset is None and config.valid_frac > 0 and not streamed
        if groups is not None:
            groups = check_groups(groups, dataset, splits=splits)

        if valid_dataset is None and streamed:
            logger.warning('%s is not split: without a valid_dataset there is no validation', type(dataset).__name__)
        elif splits:
            dataset, valid_dataset = split_off(dataset, **split)
            groups = None if groups is None else [groups[index] for index in dataset.indices]

        self.mulan = mulan
        self.dataset = dataset
        if splits:
            self.held_out_by = split
        self.valid_dataset = valid_dataset
        self.collapse_after = collapse_after
        self.grad_cache_chunk_size = grad_cache_chunk_size
        pairs = partial(
            collate_for,
            max_length=data_max_length,
            pad_id=mulan.text.pad_id,
            with_lengths=mulan.audio.support_variable_length,
        )
        super().__init__(
            mulan,
            _PairStep(mulan),
            dataset,
            collate_fn=collate_fn or pairs,
            grouping=None if groups is None else Grouping(groups, group_size, groups_after * config.grad_accum_every),
            callbacks=callbacks,
            config=config,
        )
        if compile_model:
            # after the average has copied the model: a compiled forward pass cannot be copied
            mulan.audio.compile()
            mulan.text.compile()

    smallest_batch = least_held_out = 2
    saves_last = True

    def count_items(self, batch: dict[str, Any] | None) -> int | None:
        if batch is None:
            return None
        return 0 if 'dummy' in batch else len(batch['wavs'])

    def as_dummy(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch | dict(dummy=[True] * len(batch['wavs']))

    def optimize(self, data: Iterator[Any], total: int) -> dict[str, float]:
        metrics, text = super().optimize(data, total), self.mulan.text
        if text.trained_tokens is not None:
            text.trained_tokens = any_over_ranks(text.trained_tokens, self.device)
        return metrics

    def compute_gradients(self, batches: list[dict[str, Any]]) -> dict[str, float]:
        chunks = self.split(batches)
        # all processes in the same way, since each waits for the others in the same order
        if max(gather_sizes(len(chunks), self.device)) == 1:
            with self.autocast():
                loss = self.step_module(chunks[0])
            self.backward(loss)
            return dict(loss=detached(loss))

        loss = grad_cache_backward(
            chunks,
            encode=self.encode,
            encode_last=self.encode_last,
            loss_of=self.loss_of,
            backward=self.backward,
        )
        return dict(loss=detached(loss))

    def split(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The parts of a step that are embedded one at a time."""
        if self.grad_cache_chunk_size is None:
            return batches
        return [chunk for batch in batches for chunk in split_batch(batch, self.grad_cache_chunk_size)]

    def encode(self, chunk: dict[str, Any]) -> PairLatents:
        with self.autocast():
            return embed_pairs(self.mulan, chunk)

    def encode_last(self, chunk: dict[str, Any]) -> PairLatents:
        with self.autocast():
            return self.step_module(chunk, latents_only=True)

    def loss_of(self, latents: PairLatents) -> Tensor:
        return self.mulan.loss(latents)

    @torch.no_grad()
    def validate(self) -> dict[str, Any] | None:
        if self.held_out is None or self.held_out < self.least_held_out:
            return None
        latents = self.embed_held_out()
        if len(latents.audio) < 2:
            logger.warning('no validation at step %d: fewer than 2 held-out pairs could be read', self.step)
            return None
        similarities = latents.audio @ latents.text.T
        # of batches as large as those of training, so that the contrasts can be compared; words are not predicted here
        size = min(self.batches.batch_size * world_size(), len(similarities))
        with single_process():
            losses = [
                self.evaluated_model.loss(select(latents, slice(i, i + size)))
                for i in range(0, len(similarities) - size + 1, size)
            ]
        metrics: dict[str, Any] = dict(loss=float(torch.stack(losses).mean()), **retrieval_metrics(similarities))
        metrics['score'] = (metrics['audio_to_text_map_at_10'] + metrics['text_to_audio_map_at_10']) / 2
        metrics['audio_mean_cosine'] = mean_cosine(latents.audio)
        metrics['text_mean_cosine'] = mean_cosine(latents.text)
        metrics['similarities'] = similarity_histogram(similarities)
        self.check_collapse(metrics)
        return metrics

    def embed_held_out(self) -> PairLatents:
        """Latents of the held-out pairs, embedded by all processes, each its share."""
        start, stop = (self.held_out * r // world_size() for r in (rank(), rank() + 1))
        model = self.evaluated_model
        with evaluating(model):
            batches = self.held_out_batches(range(start, stop))
            parts = [no_latents(model), *(model.pair_latents(**batch) for batch in batches)]
        own = join_latents(parts)
        sizes = gather_sizes(len(own.audio), self.device)
        return PairLatents(*(None if t is None else gather_batch(t, sizes) for t in own))

    def check_collapse(self, metrics: dict[str, Any]) -> None:
        """Raise once all embeddings of a tower are alike although warm-up is over: from there no loss leads back."""
        alike = max(metrics['audio_mean_cosine'], metrics['text_mean_cosine'])
        if alike > COLLAPSED and self.step >= self.collapse_after:
            raise TrainingError(
                f'the embeddings have collapsed at step {self.step}: the mean cosine between different items is '
                f'{metrics["audio_mean_cosine"]:.3f} for audio and {metrics["text_mean_cosine"]:.3f} for text; lower '
                f'the learning rate ({self.lr:.1e}), lengthen the warm-up, or raise the batch size'
            )

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint: a file or folder of one, or a folder of several, of which the newest is taken.

        A file that musiclm-pytorch 0.2.8 saved gives weights and optimizer; it tells no step.
        """
        if not zipfile.is_zipfile(path):
            super().load(path)
            return
        weights, optimizer = checkpoint.read_upstream(path)
        own = dict(self.mulan.named_parameters())
        moments = None
        if optimizer is not None:
            moments = moments_by_name(optimizer, [name for name in weights if name in own], source=path)
        if moments and self.optimizer_name not in optimizers_of(moments.values()):
            raise ValueError(
                f'{path} was saved with another optimizer than {self.optimizer_name!r}, which keeps other statistics; '
                'use_lion=True or False as then, or MuLaN.load_upstream for the weights alone'
            )
        checkpoint.load_strictly(self.mulan, weights, source=path)
        if self.ema is not None:
            self.ema.copy_params_from_model_to_ema()
        if moments:
            set_moments(self.optimizer, self.mulan, moments)

    def save_model(self, folder: Path) -> None:
        # an average of the weights is not what was given the texts
        self.evaluated_model.text.trained_tokens = self.mulan.text.trained_tokens
        if adapters_of(self.evaluated_model):
            save_adapters(self.evaluated_model, folder / ADAPTERS_FOLDER)
        self.evaluated_model.save_pretrained(folder)

    def state(self) -> dict[str, Any]:
        return super().state() | dict(trained_tokens=self.mulan.text.trained_tokens)

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        # a checkpoint without it has been trained on nobody knows what
        self.mulan.text.trained_tokens = state.get('trained_tokens')

    def model_config(self) -> dict[str, Any]:
        return checkpoint.config_of(self.mulan)


def check_groups(groups: Sequence[Hashable], dataset: Any, *, splits: bool) -> Sequence[Hashable]:
    """Raise ValueError unless there is a key for each item of a data set that has items by index."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(f'groups need items by index, which a {type(dataset).__name__} has not')
    if len(groups) != len(dataset):
        raise ValueError(f'got {len(groups)} groups for {len(dataset)} items; pass a key for each item')
    if splits and isinstance(dataset, AudioTextDataset):
        raise ValueError('an AudioTextDataset is split by recordings: split it first, dataset.split(…), and pass both')
    return groups


def embed_pairs(mulan: MuLaN, batch: dict[str, Any]) -> PairLatents:
    """The latents of a batch; of a dummy none, though they hang on the parameters: their gradients are zero."""
    latents = mulan.pair_latents(**{name: value for name, value in batch.items() if name != 'dummy'})
    return select(latents, slice(0)) if 'dummy' in batch else latents


def no_latents(mulan: MuLaN) -> PairLatents:
    """The latents of no pairs at all: of a process that has none."""
    empty = torch.zeros(0, mulan.dim_latent, device=mulan.device)
    if mulan.multi_layer_contrastive_learning is None:
        return PairLatents(empty, empty)
    layers = empty.expand(mulan.multi_layer_contrastive_learning.layers, *empty.shape)
    return PairLatents(empty, empty, layers, layers)


def select(latents: PairLatents, items: slice) -> PairLatents:
    """Some items of a batch of latents."""
    return PairLatents(*(None if t is None else t[..., items, :] for t in latents))
