"""Batches of items that are alike: hard negatives for a contrast, from what is known of the items."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from itertools import chain

import torch

from musiclm_pytorch.checks import check_not_negative, check_positive


class Grouping:
    """Arranges an epoch so that every other batch is made of groups of like items.

    A contrast learns to tell apart what stands in one batch. Where the items of random batches differ in much, that is
    what is easiest to hear; what is hard to hear comes to matter where they are alike in all else.

    Args:
        keys: of each item of the data set; items of one key are alike.
        size: items of one key beside each other in a batch.
        after: batches of the run before the first that is made so: at random, the easy things are learned sooner.

    Raises:
        ValueError: numbers out of range, or no key that `size` items have.
    """

    def __init__(self, keys: Sequence[Hashable], size: int = 16, after: int = 0):
        check_positive(group_size=size)
        check_not_negative(groups_after=after)
        numbers: dict[Hashable, int] = {}
        self.numbers = [numbers.setdefault(key, len(numbers)) for key in keys]
        self.size, self.after = size, after
        counts = torch.bincount(torch.tensor(self.numbers), minlength=1)
        if counts.max() < size:
            raise ValueError(
                f'no group has {size} items, the largest has {int(counts.max())}; lower group_size, or give coarser '
                'keys'
            )

    @property
    def fingerprint(self) -> str:
        """Tells groupings apart: the order of the data depends on it."""
        content = repr((self.numbers, self.size, self.after)).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def arrange(self, order: list[int], *, batch: int, position: int, generator: torch.Generator) -> list[int]:
        """The same items in another order.

        Args:
            order: a permutation of the items.
            batch: items a batch, over all ranks.
            position: of the first batch of the epoch, in the run.
            generator: for the order of the groups.
        """
        start = min(len(order), max(0, self.after - position) * batch)
        rest = order[start:]
        at_random, alike = rest[: len(rest) // 2], self.by_groups(rest[len(rest) // 2 :], generator)
        full = min(len(at_random), len(alike)) // batch * batch
        turns = ((at_random[i : i + batch], alike[i : i + batch]) for i in range(0, full, batch))
        return [*order[:start], *chain.from_iterable(chain.from_iterable(turns)), *at_random[full:], *alike[full:]]

    def by_groups(self, items: list[int], generator: torch.Generator) -> list[int]:
        """Items with those of one group beside each other, in pieces of `size`; what is left over comes last."""
        members: dict[int, list[int]] = {}
        for item in items:
            members.setdefault(self.numbers[item], []).append(item)
        pieces = [own[i : i + self.size] for own in members.values() for i in range(0, len(own), self.size)]
        whole = [piece for piece in pieces if len(piece) == self.size]
        left = [piece for piece in pieces if len(piece) < self.size]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        return [*chain.from_iterable(shuffled), *chain.from_iterable(left)]
