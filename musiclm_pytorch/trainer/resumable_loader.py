"""Batches of data sets of every kind, in an order that is a function of seed, epoch and position, so that a run can be
resumed anywhere in it; of streams, which only begin and end, as far as that goes.

torchdata's StatefulDataLoader (0.11.0, on torch 2.11 and 2.14) is no substitute: with workers, items that draw at
random come back with other draws after its `load_state_dict`. And its state fits the same number of workers only,
AssertionError otherwise, where a run here resumes with any number.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from copy import copy
from itertools import islice
from typing import Any, NamedTuple

import numpy
import torch
from torch.utils.data import Dataset, IterableDataset

from musiclm_pytorch.collectives import rank, world_size
from musiclm_pytorch.data.shards import ShardedAudioText
from musiclm_pytorch.trainer.checkpoints import random_states, restore_random_states
from musiclm_pytorch.trainer.grouping import Grouping
from musiclm_pytorch.trainer.interrupts import loaded

logger = logging.getLogger(__name__)


class DummyBatch(NamedTuple):
    """A batch of a process that has no items of its own: computed as the others are, since these wait, for nothing."""

    batch: Any


class SeededItems(Dataset):
    """A data set whose random draws depend on (seed, epoch, index) alone, in whatever process it is read."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.epoch: int | None = None

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        if epoch != self.epoch:
            self.epoch = epoch
            if hasattr(self.dataset, 'set_epoch'):
                self.dataset.set_epoch(epoch)
        states = random_states(cuda=False)  # workers may not touch it
        try:
            seed_everything(mixed_seed(self.seed, epoch, index))
            return self.dataset[index]
        finally:
            restore_random_states(states)


class LoaderBatches:
    """What batches of data sets of every kind share.

    Args:
        dataset: what is read.
        batch_size: items a batch and rank.
        seed: of the order and of the random draws of items, as far as they are not the data set's own.
        drop_last: leave out the last, smaller batch of an epoch.
        loader: further keywords of `DataLoader`.
    """

    size: int | None = None  # items
    batches_per_epoch: int | None = None

    def __init__(self, dataset: Dataset, *, batch_size: int, seed: int, drop_last: bool = True, **loader: Any):
        self.dataset, self.batch_size, self.seed, self.drop_last = dataset, batch_size, seed, drop_last
        self.loader_keywords = loader

    def load(self, dataset: Dataset, *place: int, **keywords: Any) -> Iterator[Any]:
        """The batches of a loader that begins at a place in the data."""
        # an own generator: the loader would draw a seed from the global one whenever it starts
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, *place))
        return loaded(dataset, generator=generator, **self.loader_keywords, **keywords)

    def set_length(self, items: int, together: int, told: str) -> None:
        """Tell how many batches an epoch has. Raises ValueError if there is none."""
        self.batches_per_epoch = items // together if self.drop_last else -(-items // together)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f'{told} {self.size} items, fewer than one batch of {self.batch_size} on each of {world_size()} '
                'processes; lower batch_size'
            )

    def own_items(self, position: int) -> int:
        """The items of this rank in the `position`-th batch of the run, or an upper bound; 0 where it has none."""
        return self.batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """What a position in the data belongs to."""
        return dict(size=self.size, batch_size=self.batch_size, seed=self.seed)

    def iterate(self, position: int) -> Iterator[Any]:
        """Batches without end, from the `position`-th of the run on."""
        raise NotImplementedError


class Batches(LoaderBatches):
    """Batches of a map-style data set, epoch after epoch.

    A batch over all ranks is `batch_size * world` consecutive items of the epoch's permutation; each rank reads its
    own `batch_size` of them. Without `drop_last`, the last, smaller batch is split evenly over ranks.

    Args: as of `LoaderBatches`, and
        grouping: arranges the items of an epoch; by default they come at random.
    """

    def __init__(self, dataset: Dataset, *, grouping: Grouping | None = None, **keywords: Any):
        super().__init__(dataset, **keywords)
        self.items, self.size, self.grouping = SeededItems(dataset, self.seed), len(dataset), grouping
        self.set_length(self.size, self.batch_size * world_size(), 'the data set has')

    @property
    def identity(self) -> dict[str, Any]:
        # over how many ranks a batch is shared out is not part of it: the items are the same
        found = dict(size=self.size, batch_size=self.batch_size * world_size(), seed=self.seed)
        return found if self.grouping is None else found | dict(grouping=self.grouping.fingerprint)

    def keys(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The (epoch, index) pairs of each batch that this rank reads in an epoch."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        together = self.batch_size * world_size()
        if self.grouping is not None:
            position = epoch * self.batches_per_epoch
            order = self.grouping.arrange(order, batch=together, position=position, generator=generator)
        batches = []
        for i in range(self.batches_per_epoch):
            share = order[i * together : (i + 1) * together]
            # equal shares of a full batch, shares that differ by one of the last one
            start, stop = (len(share) * r // world_size() for r in (rank(), rank() + 1))
            # a rank whose share is empty still reads one item, as a dummy (see `own_items`)
            batches.append([(epoch, index) for index in share[start:stop] or share[:1]])
        return batches

    def own_items(self, position: int) -> int:
        together = self.batch_size * world_size()
        left = min(together, self.size - position % self.batches_per_epoch * together)
        return left * (rank() + 1) // world_size() - left * rank() // world_size()

    def iterate(self, position: int) -> Iterator[Any]:
        while True:
            epoch, offset = divmod(position, self.batches_per_epoch)
            keys = self.keys(epoch)[offset:]
            yield from self.load(self.items, epoch, offset, batch_sampler=keys)
            position += len(keys)


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


def mixed_seed(*parts: int) -> int:
    """One 32-bit seed from several non-negative integers."""
    return int(numpy.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed torch (CPU), numpy and random."""
    torch.random.default_generator.manual_seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - what data sets draw from
    random.seed(seed)
