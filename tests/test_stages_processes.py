"""Two processes train a stage, or its adapters, as one does on the same crops of several lengths, and stay equal."""

import json
import os
from functools import partial

import pytest
import torch
from helpers.processes import free_port, join_world, start_processes
from helpers.stage_parts import (
    Clips,
    compute,
    draw_items,
    gradients_of_step,
    make_quantizer,
    make_trainer,
    transformer_for,
)

from musiclm_pytorch import add_adapters
from musiclm_pytorch.audiolm.crops import TokenCrops, collate_tokens
from musiclm_pytorch.audiolm.saving import load_module
from musiclm_pytorch.cli import main

# alone: without conditioning, and the loss of what the stage makes alone, so that some weights have no gradient
STAGES = ('semantic', 'coarse', 'fine', 'coarse adapted', 'fine alone')
SHARDED = ('coarse sharded', 'coarse sharded muon')


def gradients(trainer, rank, processes):
    """Of a step over 5 items of one length or several, repeated tokens left out or not: 1, 2 and 2, or all at once."""
    torch.manual_seed(7)
    found = {}
    for equal in (True, False):
        items = draw_items(5, equal)[rank::processes]
        for unique in (False, True):
            parts = [items] if processes == 1 else [items[:1], items[1:]]
            batches = map(partial(collate_tokens, unique_consecutive=unique), parts)
            loss, found[f'{equal} {unique}'] = gradients_of_step(trainer, list(batches))
            found[f'{equal} {unique}']['loss'] = torch.tensor(loss)
    return found


def optimizer_of(stage):
    return 'muon' if 'muon' in stage else 'adam'


def train(folder, tokens, stage, rank, processes):
    kind, adapted, sharded = stage.split()[0], 'adapted' in stage, 'sharded' in stage
    alone = dict(conditioned=False, prefix_loss_weight=0.0) if 'alone' in stage else {}
    transformer = add_adapters(transformer_for(kind), rank=2) if adapted else None
    # 9 items, so that one process has none of the last batch of an epoch
    crops = TokenCrops(tokens, kind, seconds=0.8, training=False, conditioning=not alone)
    trainer = make_trainer(
        f'{folder}/{stage}', crops, kind, transformer, seconds=None, batch_size=4 // processes, grad_accum_every=2,
        mask_prob=0.0, cond_drop_prob=0.0, use_ema=not sharded, drop_last=False, fsdp=sharded,
        optimizer=optimizer_of(stage), **alone,
    )  # fmt: skip
    assert len(trainer.batches.items.dataset) == 9
    first = {} if sharded else gradients(trainer, rank, processes)
    trainer.optimizer.zero_grad()
    results = trainer.train(num_train_steps=4)
    if sharded and processes > 1:
        held = sum(it.to_local().numel() for it in trainer.model.parameters())
        assert held < 0.6 * sum(it.numel() for it in trainer.whole_model.parameters())
    model = trainer.evaluated_model if sharded else trainer.model
    return model.state_dict(), {name: results[name] for name in ('loss', 'valid_loss')}, first


@pytest.mark.slow
def test_the_command_line_trains_on_several_processes(tmp_path):
    """In the environment of a launcher, such as torchrun."""
    quantizer = make_quantizer()
    compute(tmp_path / 'tokens', Clips([1.0, 0.5] * 6), quantizer=quantizer)
    quantizer.save_pretrained(tmp_path / 'quantizer')
    keys = dict(seconds=0.8, batch_size=2, num_train_steps=2, prefix_loss_weight=0.0, use_ema='no')
    command = ['train', 'coarse', '--tokens', 'tokens', '--quantizer', 'quantizer', '--output', 'out']
    command += ['--model.dim', '16', '--model.depth', '1', '--model.num_coarse_quantizers', '2']
    command += [word for name, value in keys.items() for word in (f'--training.{name}', str(value))]
    start_processes(run_command, str(tmp_path), command, free_port(), count=2)
    # one process writes, and each has half of a step's items
    losses = [json.loads(line) for line in (tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()]
    assert [it['step'] for it in losses if it['part'] == 'valid'] == [2]
    assert load_module(tmp_path / 'out' / 'last').num_coarse_quantizers == 2


def run_command(rank, folder, command, port):
    join_world(rank, port=port)
    os.chdir(folder)
    assert main(command) == 0


def worker(rank, folder, stages, port):
    join_world(rank, port=port)
    for stage in stages:
        torch.save(train(f'{folder}/two', f'{folder}/tokens', stage, rank, 2), f'{folder}/{stage}.{rank}.pt')


@pytest.mark.slow
@pytest.mark.parametrize('stages', [STAGES, SHARDED])
def test_two_processes_equal_one_and_each_other(tmp_path, stages):
    compute(tmp_path / 'tokens', Clips([1.0, 0.5] * 6), quantizer=make_quantizer())
    start_processes(worker, str(tmp_path), stages, free_port(), count=2)
    for stage in stages:
        weights, results, expected = train(tmp_path / 'one', tmp_path / 'tokens', stage, 0, 1)
        found = [torch.load(tmp_path / f'{stage}.{rank}.pt', weights_only=True) for rank in range(2)]
        for name, tensor in weights.items():
            assert torch.equal(found[0][0][name], found[1][0][name]), name
            # Adam makes much of rounding where gradients are small; four steps move a weight by some 1e-3
            torch.testing.assert_close(found[0][0][name], tensor, atol=2e-4, rtol=1e-3, msg=name)
        for _, own, first in found:
            torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
            assert own == pytest.approx(results, abs=1e-4)
        if stage in SHARDED:  # one process reads what two have written, and goes on
            crops = TokenCrops(tmp_path / 'tokens', 'coarse', seconds=0.8, training=False)
            keywords = dict(seconds=None, batch_size=4, drop_last=False, resume=True, optimizer=optimizer_of(stage))
            resumed = make_trainer(tmp_path / 'two' / stage, crops, 'coarse', **keywords)
            assert resumed.step == 4
            written = load_module(tmp_path / 'two' / stage / 'last').state_dict()
            for name, tensor in resumed.transformer.state_dict().items():
                assert torch.equal(tensor, found[0][0][f'transformer.{name}']), name
                assert torch.equal(tensor, written[name]), name
            assert resumed.train(num_train_steps=5)['loss'] > 0


def test_what_needs_whole_weights_is_named(tmp_path):
    compute(tmp_path / 'tokens')
    for wrong, name in ((dict(use_ema=True), 'use_ema'), (dict(mixed_precision='fp16'), "mixed_precision='fp16'")):
        with pytest.raises(ValueError, match=f'fsdp shares the weights out, which {name} needs whole'):
            make_trainer(tmp_path / 'run', tmp_path / 'tokens', conditioned=False, fsdp=True, **wrong)
