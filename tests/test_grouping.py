"""Batches of like items: every item once, groups beside each other, and the same order again."""

import pytest
import torch
from helpers.training import Tones, build, trainer

from musiclm_pytorch import MuLaNTrainer
from musiclm_pytorch.trainer.grouping import Grouping
from musiclm_pytorch.trainer.resumable_loader import Batches


def arranged(keys, size, after=0, batch=8, position=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(keys), generator=generator).tolist()
    return order, Grouping(keys, size, after).arrange(order, batch=batch, position=position, generator=generator)


@pytest.mark.parametrize(
    ('items', 'kinds', 'size', 'batch'), [(96, 3, 4, 8), (97, 5, 3, 7), (40, 2, 8, 16), (9, 2, 2, 4)]
)
def test_every_item_comes_once(items, kinds, size, batch):
    keys = [index % kinds for index in range(items)]
    for after in (0, 2, 100):
        order, found = arranged(keys, size, after, batch)
        assert sorted(found) == list(range(items))
        start = min(items, after * batch)
        assert found[:start] == order[:start]


def test_every_other_batch_is_made_of_groups():
    keys = [('piano', 'flute', 'organ')[index % 3] for index in range(240)]
    _, found = arranged(keys, size=4, after=2)
    batches = [found[i : i + 8] for i in range(0, 240, 8)]
    groups = [[{keys[item] for item in batch[i : i + 4]} for i in (0, 4)] for batch in batches]
    alike = [all(len(group) == 1 for group in pair) for pair in groups]
    # at random, two groups of four of three kinds are alike once in 729
    assert alike[3:29:2] == [True] * 13
    assert not any(alike[:2])
    assert sum(alike[2:28:2]) <= 1
    assert len({tuple(map(tuple, pair)) for pair in groups}) > 3  # different kinds stand beside each other


def test_the_run_decides_where_groups_begin_and_the_seed_their_order():
    keys = [index % 2 for index in range(64)]
    order, found = arranged(keys, size=8, after=8, position=8)
    assert arranged(keys, size=8, after=0)[1] == found != order
    assert arranged(keys, size=8, after=16, position=8)[1] == order
    assert arranged(keys, size=8, seed=1) == arranged(keys, size=8, seed=1) != arranged(keys, size=8, seed=2)


def test_batches_are_arranged_and_know_it():
    dataset, keys = Tones(48), [index % 3 for index in range(48)]
    plain, grouped, others = (
        Batches(dataset, batch_size=8, collate_fn=list, seed=5, grouping=grouping)
        for grouping in (None, Grouping(keys, 4), Grouping(keys, 2))
    )
    batches = [[index for _, index in batch] for batch in grouped.keys(epoch=1)]
    assert sorted(index for batch in batches for index in batch) == list(range(48))
    for batch in batches[1:5:2]:
        assert [len({keys[index] for index in batch[i : i + 4]}) for i in (0, 4)] == [1, 1]
    assert len({str(it.identity) for it in (plain, grouped, others)}) == 3


def test_a_split_takes_its_groups_along(tmp_path):
    groups = list(range(12)) * 2
    found = trainer(tmp_path / 'a', groups=groups, group_size=1, valid_frac=0.25)
    kept = found.batches.items.dataset.indices
    numbers = found.batches.grouping.numbers
    assert len(numbers) == 18
    for a, one in zip(kept, numbers):
        for b, other in zip(kept, numbers):
            assert (groups[a] == groups[b]) == (one == other)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        (dict(groups=[1, 2, 3]), 'got 3 groups for 24 items'),
        (dict(groups=range(24)), 'no group has 16 items, the largest has 1'),
        (dict(groups=[0] * 24, group_size=0), 'group_size must be greater than 0'),
        (dict(groups=[0] * 24, group_size=2, groups_after=-1), 'groups_after must be at least 0'),
        (dict(groups=[0], dataset=Stream()), 'groups need items by index, which a Stream has not'),
    ],
)
def test_mistakes_are_named(tmp_path, keywords, message):
    with pytest.raises(ValueError, match=message):
        MuLaNTrainer(build(), **dict(dataset=Tones(), valid_frac=0.0, results_folder=tmp_path) | keywords)
