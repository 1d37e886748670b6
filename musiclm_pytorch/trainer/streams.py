"""Batches of iterable data sets: shards, which can be entered anywhere, and streams, which only begin and end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import copy
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from musiclm_pytorch.collectives import rank, world_size
from musiclm_pytorch.data.shards import ShardedAudioText
from musiclm_pytorch.trainer.batches import Batches, LoaderBatches
from musiclm_pytorch.trainer.grouping import Grouping

logger = logging.getLogger(__name__)


class ShardBatches(LoaderBatches):
    """Batches of `ShardedAudioText`, epoch after epoch, from any position on.

    The order is the data set's own and follows from its seed. All ranks have as many batches an epoch: of the parts
    of an epoch, which differ by one item at most, what the shortest has.
    """

    def __init__(self, dataset: ShardedAudioText, **keywords: Any):
        if dataset.place != (rank(), world_size()):
            raise ValueError(
                f'the shards were opened for rank {dataset.place[0]} of {dataset.place[1]}, but this process is rank '
                f'{rank()} of {world_size()}; leave rank and world_size out'
            )
        super().__init__(copy(dataset), **keywords)
        self.dataset.batch_size = self.batch_size  # by which items are sharded across workers
        self.size = dataset.total
        self.set_length(self.size // world_size(), self.batch_size, 'the shards have')

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | dict(order_seed=self.dataset.seed, fingerprint=self.dataset.fingerprint)

    def iterate(self, position: int) -> Iterator[Any]:
        while True:
            epoch, offset = divmod(position, self.batches_per_epoch)
            self.dataset.set_epoch(epoch, offset * self.batch_size)
            loader = self.load(self.dataset, epoch, offset, batch_size=self.batch_size, drop_last=self.drop_last)
            for batch in islice(loader, self.batches_per_epoch - offset):
                position += 1
                yield batch


class StreamBatches(LoaderBatches):
    """Batches of any other iterable data set, which has no known length and no known position.

    Where it ends it is begun again, after `set_epoch` if it has that. It has to give each process and each worker its
    own items, as torch asks of every `IterableDataset`. A resumed run begins it anew, which is said in the log.
    """

    def __init__(self, dataset: IterableDataset, **keywords: Any):
        super().__init__(dataset, **keywords)
        self.position = 0
        self.running = self._endless(first=0)
        if world_size() > 1:
            logger.warning(
                '%s is read by each of %d processes: it has to give each other items, by torch.distributed.get_rank',
                type(dataset).__name__,
                world_size(),
            )

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
            count = 0
            sizes = dict(batch_size=self.batch_size, drop_last=self.drop_last)
            for batch in self.load(self.dataset, epoch, first, **sizes):
                count += 1
                yield batch
            if count == 0:
                raise ValueError(
                    f'{type(self.dataset).__name__} ended before one batch of {self.batch_size} items was full'
                )
            epoch += 1


def open_batches(dataset: Any, grouping: Grouping | None = None, **keywords: Any) -> LoaderBatches:
    """Batches of a data set of any kind; keywords as of `LoaderBatches`. A grouping is for one with items by index."""
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
