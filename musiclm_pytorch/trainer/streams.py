"""Batches of iterable data sets: shards, which can be entered anywhere, and streams, which only begin and end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from copy import copy
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from musiclm_pytorch.collectives import rank, world_size
from musiclm_pytorch.data.shards import ShardedAudioText
from musiclm_pytorch.trainer.batches import Batches, mixed_seed
from musiclm_pytorch.trainer.grouping import Grouping
from musiclm_pytorch.trainer.interrupts import loaded

logger = logging.getLogger(__name__)


class ShardBatches:
    """Batches of `ShardedAudioText`, epoch after epoch, from any position on.

    The order is the data set's own and follows from its seed. All ranks have as many batches an epoch: of the parts
    of an epoch, which differ by one item at most, what the shortest has.

    Args: as of `Batches`; `seed` is of nothing here but the loader's processes.
    """

    def __init__(
        self,
        dataset: ShardedAudioText,
        *,
        batch_size: int,
        collate_fn: Callable,
        seed: int,
        drop_last: bool = True,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool = False,
    ):
        if dataset.place != (rank(), world_size()):
            raise ValueError(
                f'the shards were opened for rank {dataset.place[0]} of {dataset.place[1]}, but this process is rank '
                f'{rank()} of {world_size()}; leave rank and world_size out'
            )
        # the workers have to deal items out in the batches of this loader
        self.dataset = copy(dataset)
        self.dataset.batch_size = batch_size
        self.size = dataset.total
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.loader_keywords = dict(
            collate_fn=collate_fn,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            pin_memory=pin_memory,
        )
        share = self.size // world_size()
        self.batches_an_epoch = share // batch_size if drop_last else -(-share // batch_size)
        if self.batches_an_epoch == 0:
            raise ValueError(
                f'the shards have {self.size} items, fewer than one batch of {batch_size} on each of {world_size()} '
                'processes; lower batch_size'
            )

    def own_items(self, position: int) -> int:
        """The items of this rank in a batch, an upper bound: every rank has some in each."""
        return self.batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """What a position in the data belongs to."""
        order = dict(order_seed=self.dataset.seed, fingerprint=self.dataset.fingerprint)
        return dict(size=self.size, batch_size=self.batch_size, seed=self.seed, **order)

    def iterate(self, position: int) -> Iterator[Any]:
        """Batches without end, from the `position`-th of the run on."""
        while True:
            epoch, offset = divmod(position, self.batches_an_epoch)
            self.dataset.set_epoch(epoch, offset * self.batch_size)
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, offset))
            loader = loaded(
                self.dataset,
                batch_size=self.batch_size,
                drop_last=self.drop_last,
                generator=generator,
                **self.loader_keywords,
            )
            for batch in islice(loader, self.batches_an_epoch - offset):
                position += 1
                yield batch


class StreamBatches:
    """Batches of any other iterable data set, which has no known length and no known position.

    Where it ends it is begun again, after `set_epoch` if it has that. It has to give each process and each worker its
    own items, as torch asks of every `IterableDataset`. A resumed run begins it anew, which is said in the log.

    Args: as of `Batches`; `seed` is of nothing here but the loader's processes.
    """

    size = None
    batches_an_epoch = None

    def __init__(
        self,
        dataset: IterableDataset,
        *,
        batch_size: int,
        collate_fn: Callable,
        seed: int,
        drop_last: bool = True,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool = False,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.loader_keywords = dict(
            batch_size=batch_size,
            drop_last=drop_last,
            collate_fn=collate_fn,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            pin_memory=pin_memory,
        )
        self.position = 0
        self.running = self._endless(first=0)
        if world_size() > 1:
            logger.warning(
                '%s is read by each of %d processes: it has to give each other items, by torch.distributed.get_rank',
                type(dataset).__name__,
                world_size(),
            )

    def own_items(self, position: int) -> int:
        """The items of this rank in a batch, an upper bound: a stream gives every rank some."""
        return self.batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """What a position in the data belongs to."""
        return dict(size=None, batch_size=self.batch_size, seed=self.seed)

    def iterate(self, position: int) -> Iterator[Any]:
        """Batches without end: on where the last ones ended if that is `position`, else from the beginning."""
        if position != self.position:
            logger.warning(
                'the position in the data is not restored: %s cannot be entered in the middle and begins anew, so some '
                'of its items are seen again before others; shards (ShardedAudioText) can be entered anywhere',
                type(self.dataset).__name__,
            )
            self.position = position
            self.running = self._endless(first=position)
        while True:
            batch = next(self.running)
            self.position += 1
            yield batch

    def _endless(self, first: int) -> Iterator[Any]:
        epoch = 0
        while True:
            if hasattr(self.dataset, 'set_epoch'):
                self.dataset.set_epoch(epoch)
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, first))
            count = 0
            for batch in loaded(self.dataset, generator=generator, **self.loader_keywords):
                count += 1
                yield batch
            if count == 0:
                raise ValueError(
                    f'{type(self.dataset).__name__} ended before one batch of {self.batch_size} items was full'
                )
            epoch += 1


def open_batches(
    dataset: Any, grouping: Grouping | None = None, **keywords: Any
) -> Batches | ShardBatches | StreamBatches:
    """Batches of a data set of any kind; keywords as of `Batches`. A grouping is for one with items by index."""
    if grouping is not None:
        return Batches(dataset, grouping=grouping, **keywords)
    if isinstance(dataset, ShardedAudioText):
        return ShardBatches(dataset, **keywords)
    return (StreamBatches if isinstance(dataset, IterableDataset) else Batches)(dataset, **keywords)


def default_batch_size(dataset: Any) -> int:
    """32 items a process, or what a smaller data set has for each, 2 at least."""
    if isinstance(dataset, ShardedAudioText):
        items = dataset.total
    elif isinstance(dataset, IterableDataset):
        return 32
    else:
        items = len(dataset)
    return min(32, max(2, items // world_size()))
