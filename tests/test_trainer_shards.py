"""Training on shards and streams: every item once an epoch, and a stopped run goes on at the batch it stopped at."""

import json
import logging
import math
from collections import Counter
from functools import partial

import pytest
import torch
from helpers.models import tiny_mulan
from helpers.processes import free_port, join_world, start_processes
from helpers.recipes import SHORT, run
from helpers.sounds import noise, ramp, write
from helpers.training import assert_resuming_changes_nothing
from torch.utils.data import DataLoader, IterableDataset

from musiclm_pytorch import MuLaNTrainer, ShardedAudioText, write_shards
from musiclm_pytorch.data.clips import Clip
from musiclm_pytorch.data.shards import ShardItems
from musiclm_pytorch.data.sources import list_folder
from musiclm_pytorch.trainer.resumable_loader import open_batches

RATE = 8000
ITEMS = 23


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """23 captioned clips in shards of five."""
    root = tmp_path_factory.mktemp('sharded')
    path = write(root / 'a.wav', noise(ITEMS), caption=None)
    clips = [Clip(path, (f'clip {index}', f'take {index}'), index, index + 1.0) for index in range(ITEMS)]
    write_shards(clips, root / 'shards', shard_size=5)
    return root / 'shards'


def shards(folder, **keywords):
    return ShardedAudioText(folder, **{**dict(sample_rate=RATE, max_seconds=0.2, min_seconds=0.1), **keywords})


def build():
    torch.manual_seed(3)
    text = dict(depth=1, num_tokens=49408, ff_dropout=0.1, dim=8)
    return tiny_mulan(dict(depth=1, support_variable_length=True, attn_dropout=0.1), text)


def trainer(results, dataset, mulan=None, **keywords):
    defaults = dict(batch_size=4, lr=1e-3, results_folder=results, accelerate_kwargs=dict(cpu=True), progress=False)
    return MuLaNTrainer(mulan or build(), dataset, **{**defaults, **keywords})


def captions(items):
    return [item['caption'] for item in items]


# ---- shards ----


@pytest.mark.parametrize('drop_last', [True, False])
@pytest.mark.parametrize('workers', [0, 2])
def test_batches_are_entered_anywhere(folder, workers, drop_last):
    def opened(num_workers):
        keywords = dict(batch_size=4, collate_fn=captions, seed=1, drop_last=drop_last, num_workers=num_workers)
        return open_batches(shards(folder), **keywords)

    batches = opened(0)
    assert batches.batches_per_epoch == (5 if drop_last else 6)
    every = [batch for batch, _ in zip(batches.iterate(0), range(2 * batches.batches_per_epoch))]
    for epoch in (every[: len(every) // 2], every[len(every) // 2 :]):
        seen = [it.split()[1] for batch in epoch for it in batch]
        assert len(seen) == len(set(seen)) == (20 if drop_last else 23)
    assert every[: len(every) // 2] != every[len(every) // 2 :]
    for position in (3, 6) if workers else (0, 3, 4, 5, 6, 9):
        found = opened(workers).iterate(position)
        assert [next(found) for _ in every[position:]] == every[position:]


@pytest.mark.parametrize('keywords', [dict(num_workers=2), dict(grad_cache_chunk_size=3, grad_accum_every=2)])
def test_resumed_run_equals_one_that_was_never_stopped(folder, tmp_path, keywords):
    def make(results, resume):
        settings = dict(checkpoint_every=3, use_ema=True, lr_scheduler_type='cosine', resume=resume)
        return trainer(results, shards(folder), **settings, **keywords)

    # past the end of the first epoch
    assert_resuming_changes_nothing(tmp_path, make, steps=7, stop_at=5, saved_at=3)


def test_epochs_validation_and_what_is_said_without(folder, tmp_path, caplog):
    run = trainer(tmp_path / 'a', shards(folder), valid_dataset=shards(folder, training=False))
    assert (run.steps_per_epoch, run.validate_every) == (5, 5)
    results = run.train(num_epochs=2)
    assert run.step == 10
    assert math.isfinite(results['valid_loss'])
    assert [it['step'] for it in run.journal.read('valid')] == [5, 10]
    assert 'no validation' not in caplog.text
    run = trainer(tmp_path / 'b', shards(folder), batch_size=None)
    assert run.batches.batch_size == ITEMS
    assert 'valid_loss' not in run.train(num_epochs=1)
    lines = [it.message for it in caplog.records if 'no validation' in it.message]
    assert lines == ['ShardedAudioText is not split: without a valid_dataset there is no validation']


def test_other_shards_are_noticed_at_resume(folder, tmp_path, caplog):
    trainer(tmp_path / 'run', shards(folder)).train(num_train_steps=1)
    trainer(tmp_path / 'run', shards(folder, seed=5), resume=True)
    assert 'the order of the data changes' in caplog.text


def test_shard_items_are_those_of_the_clips(folder):
    items = ShardItems(shards(folder, training=False))
    assert len(items) == ITEMS
    assert [it.split()[1] for it in captions(items[i] for i in range(ITEMS))] == [str(i) for i in range(ITEMS)]
    in_order = list(shards(folder, training=False))
    assert all(torch.equal(items[i]['wave'], in_order[i]['wave']) for i in (22, 0, 11))
    with pytest.raises(IndexError, match='index 23 lies outside of the 23 samples'):
        items[ITEMS]


def test_bad_input(folder, tmp_path):
    with pytest.raises(ValueError, match='the shards have 23 items, fewer than one batch of 24'):
        trainer(tmp_path, shards(folder), batch_size=24)
    with pytest.raises(ValueError, match='opened for rank 1 of 2, but this process is rank 0 of 1'):
        trainer(tmp_path, shards(folder, rank=1, world_size=2))
    with pytest.raises(TypeError, match='valid_dataset must have a length and items by index, got Stream'):
        trainer(tmp_path, shards(folder), valid_dataset=Stream())


def test_command_trains_on_shards(music, tmp_path, capsys):
    write_shards(list_folder(music), tmp_path / 'shards')
    (tmp_path / 'recipe.yaml').write_text(SHORT)
    common = ['--data', tmp_path / 'shards', '--config', tmp_path / 'recipe.yaml', '--batch-size', 2, '--epochs', 2]
    assert run(*common, '--output', tmp_path / 'a') == 0
    out = capsys.readouterr().out
    assert '2 steps done' in out
    assert 'give --valid-data' in out
    assert run(*common, '--valid-data', tmp_path / 'shards', '--output', tmp_path / 'b') == 0
    assert 'the best model' in capsys.readouterr().out


# ---- two processes ----


def noting(note, compute_gradients, batches):
    """What a step is computed of, not what workers read ahead."""
    with open(note, 'a') as file:
        file.writelines(json.dumps([text.split()[1] for text in batch['raw_texts']]) + '\n' for batch in batches)
    return compute_gradients(batches)


def worker(rank, folder, results, port):
    join_world(rank, port=port)
    for name, (epochs, options) in RUNS.items():
        run = trainer(f'{results}/run-{name}', shards(folder), **options)
        run.compute_gradients = partial(noting, f'{results}/{name}.{rank}', run.compute_gradients)
        run.train(num_epochs=epochs)
    # workers that were spawned know of no other process by themselves
    if rank:
        how = dict(num_workers=1, collate_fn=captions, multiprocessing_context='spawn')
        loader = DataLoader(shards(folder, batch_size=4), 4, **how)
        assert [it for batch in loader for it in batch] == captions(shards(folder, batch_size=4))


RUNS = {'plain': (2, dict(drop_last=False)), 'workers': (1, dict(num_workers=2))}


@pytest.mark.slow
def test_two_processes_see_every_item_once_an_epoch(folder, tmp_path):
    start_processes(worker, str(folder), str(tmp_path), free_port(), count=2)
    # parts of 11 and 12 items: two batches of four each, and one of what is left
    for name, (epochs, _) in RUNS.items():
        seen = [Counter() for _ in range(epochs)]
        for rank in range(2):
            lines = [json.loads(it) for it in (tmp_path / f'{name}.{rank}').read_text().splitlines()]
            assert len(lines) == epochs * (3 if name == 'plain' else 2)
            for number, line in enumerate(lines):
                seen[number * epochs // len(lines)].update(line)
        for epoch in seen:
            assert max(epoch.values()) == 1
            assert len(epoch) == (ITEMS if name == 'plain' else 16)


# ---- streams ----


class Stream(IterableDataset):
    """Tones without an end, or `size` of them."""

    def __init__(self, size=None):
        self.size = size
        self.begun = 0

    def __iter__(self):
        self.begun += 1
        index = 0
        while self.size is None or index < self.size:
            yield torch.sin((index % 9 + 1) * torch.arange(1200) * 0.1), f'tone {index}'
            index += 1


def test_a_stream_trains_for_steps(tmp_path, caplog):
    run = trainer(tmp_path / 'a', Stream(), checkpoint_every=2)
    results = run.train(num_train_steps=3)
    assert run.step == 3
    assert torch.isfinite(torch.tensor(results['loss']))
    run.train(num_train_steps=5)  # goes on in the stream
    assert run.batches.dataset.begun == 1
    assert 'no validation' in caplog.text
    for arguments in (dict(num_epochs=1), dict()):
        with pytest.raises(ValueError, match='does not tell how long an epoch is; pass num_train_steps'):
            run.train(**arguments)
    # resumed, it begins anew, and says so
    assert 'not restored' not in caplog.text
    again = trainer(tmp_path / 'a', Stream(), resume=True)
    again.train(num_train_steps=6)
    assert again.step == 6
    (line,) = [it for it in caplog.records if 'the position in the data is not restored' in it.message]
    assert line.levelno == logging.WARNING


def test_a_stream_that_ends_begins_again(tmp_path):
    stream = Stream(size=9)
    trainer(tmp_path / 'a', stream).train(num_train_steps=5)
    assert stream.begun == 3
    with pytest.raises(ValueError, match='Stream ended before one batch of 4 items was full'):
        trainer(tmp_path / 'b', Stream(size=3)).train(num_train_steps=1)


def test_a_stream_is_validated_on_pairs(tmp_path):
    held_out = [(torch.from_numpy(ramp(0.2)[:, 0]) * i, f'tone {i}') for i in range(1, 5)]
    results = trainer(tmp_path, Stream(), valid_dataset=held_out, checkpoint_every=2).train(num_train_steps=3)
    assert 'valid_loss' in results
    steps = [json.loads(it) for it in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [it['step'] for it in steps if it['part'] == 'valid'] == [2, 3]
