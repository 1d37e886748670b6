"""What open_clip's training loop, `open_clip_train.train`, needs beside a model: batches, a loss, arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.data.collate import collate_pairs
from musiclm_pytorch.data.rates import agreed_rate, rate_of
from musiclm_pytorch.extras import needing
from musiclm_pytorch.open_clip.model import AudioBatch, MuLaNOpenCLIP


@dataclass
class OpenCLIPData:
    """One of the data sets that open_clip's loop is given, `data['train']` or `data['val']`.

    Attributes:
        dataloader: of batches of audio and token ids; it knows `num_samples` and `num_batches`.
        sampler: that shares the items out to the processes, if there are several.
    """

    dataloader: DataLoader
    sampler: DistributedSampler | None = None

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop before each epoch, for another order."""
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)


@typechecked
def create_open_clip_data(
    dataset: Any,
    model: MuLaNOpenCLIP,
    batch_size: int,
    *,
    training: bool = True,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    sample_rate: int | None = None,
    num_workers: int = 0,
) -> OpenCLIPData:
    """A data set of clips and captions for open_clip's loop: `data = {'train': create_open_clip_data(…)}`.

    Args:
        dataset: with a length, whose items are what `collate_pairs` takes, such as a `SyntheticMusic`, an
            `AudioTextDataset` or a list of `(wave, caption)`.
        model: that will be given the batches.
        batch_size: pairs at a time, in each process.
        training: shuffle, leave out an incomplete last batch and, under torch.distributed, give each process a share.
            False is for `data['val']`, which open_clip evaluates in one process.
        tokenizer: captions to token ids `(b, n)`; by default open_clip's, for as many tokens as the model reads.
        sample_rate: of the clips in Hz, by default `dataset.sample_rate`, else the model's own.
        num_workers: processes that load the data.

    Raises:
        ImportError: no tokenizer, and open_clip_torch is not installed. ValueError: fewer items than a batch.
    """
    check_positive(batch_size=batch_size)
    if not (hasattr(dataset, '__len__') and hasattr(dataset, '__getitem__')):
        raise TypeError(
            f'dataset must have a length and items by index, got {type(dataset).__name__}: open_clip counts the '
            'batches of an epoch beforehand'
        )
    sample_rate = rate_of(dataset) if sample_rate is None else agreed_rate(dataset, sample_rate)
    if tokenizer is None:
        simple = require_open_clip('the default tokenizer of create_open_clip_data').SimpleTokenizer
        # start and end token come on top, unless the tower reads them
        tokenizer = simple(context_length=model.context_length + (0 if model.framed_texts else 2))

    shared = training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    sampler = DistributedSampler(dataset, drop_last=True) if shared else None
    items = len(dataset) if sampler is None else len(sampler)
    if items < batch_size and training:
        raise ValueError(f'{items} items do not fill a single batch of {batch_size}; lower batch_size or add data')
    collate = partial(
        _collate,
        tokenizer=tokenizer,
        sample_rate=sample_rate,
        with_lengths=model.audio.support_variable_length,
        may_drop=not shared,
    )
    dataloader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=training and sampler is None,
        sampler=sampler,
        drop_last=training,
        num_workers=num_workers,
        collate_fn=collate,
    )
    # where open_clip's loop looks for them
    dataloader.num_samples = len(dataset)
    dataloader.num_batches = len(dataloader)
    return OpenCLIPData(dataloader, sampler)


def _collate(
    items: list[Any],
    *,
    tokenizer: Callable[[list[str]], Tensor],
    sample_rate: int | None,
    with_lengths: bool,
    may_drop: bool,
) -> tuple[AudioBatch, Tensor]:
    batch = collate_pairs(items)
    if batch is None or not (may_drop or all(it is not None for it in items)):
        raise ValueError(
            f'{sum(it is None for it in items)} of {len(items)} clips of a batch could not be read; take them out of '
            'the data set: open_clip needs batches of one size in all processes, and none that are empty'
        )
    if 'wavs' not in batch or not ('texts' in batch or 'raw_texts' in batch):
        raise TypeError('the items of the data set must be pairs of a clip and a caption')
    waves, lengths = batch['wavs'], batch['audio_lengths']
    if not with_lengths or lengths.min() == lengths.max():
        # a tower without lengths can only be given what all clips have
        waves, lengths = waves[:, : int(lengths.min())], None
    texts = batch['texts'] if 'texts' in batch else tokenizer(batch['raw_texts'])
    return AudioBatch(waves, lengths, sample_rate), texts


@typechecked
def create_open_clip_loss(model: MuLaNOpenCLIP, rank: int = 0, world_size: int = 1) -> nn.Module:
    """The loss of open_clip that is MuLaN's own: `SigLipLoss` for a sigmoid loss, else `ClipLoss`.

    Across processes it is that of the joined batch, and with DDP its gradients are, too; each process must bring as
    many pairs.

    Args:
        model: to be trained.
        rank, world_size: this process, and how many there are.

    Raises:
        ImportError: open_clip_torch is not installed.
    """
    open_clip_loss = require_open_clip('create_open_clip_loss').loss
    if model.logit_bias is not None:
        return open_clip_loss.SigLipLoss(rank=rank, world_size=world_size)
    several = world_size > 1
    return open_clip_loss.ClipLoss(
        local_loss=several, gather_with_grad=several, cache_labels=True, rank=rank, world_size=world_size
    )


@typechecked
def create_open_clip_arguments(flags: Sequence[str] = ()) -> argparse.Namespace:
    """The `args` of `train_one_epoch` and `evaluate`, from the flags of open_clip's command line.

    Made by open_clip's own parser, with what its main program adds; the model is named by no flag. Under torchrun it
    starts the process group, as there. Results are not written: for `results.jsonl`, set `save_logs` and
    `checkpoint_path`.

        args = create_open_clip_arguments(['--batch-size', '64', '--precision', 'amp_bf16', '--device', 'cuda'])

    Raises:
        ImportError: open_clip_torch is not installed.
    """
    require_open_clip('create_open_clip_arguments')
    from open_clip_train.distributed import init_distributed_device
    from open_clip_train.params import parse_args

    args = parse_args(['--model', 'MuLaN', *flags])
    init_distributed_device(args)
    args.distill = False
    args.wandb = False
    args.save_logs = False
    args.checkpoint_path = None
    return args


def require_open_clip(what: str) -> ModuleType:
    """The package open_clip. Raises ImportError, with the extra to install, saying that `what` needs it."""
    with needing(f'{what} needs the package open_clip_torch', 'openclip'):
        import open_clip
        import open_clip.loss
    return open_clip
