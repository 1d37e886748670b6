import dataclasses
import inspect
import json
import logging
import math
import os
import random
import signal
import time
import typing

import numpy as np
import pytest
import torch
from helpers.models import tiny_mulan
from helpers.processes import start_processes
from helpers.training import (
    Tones,
    assert_resuming_changes_nothing,
    assert_same,
    build,
    scrambled,
    trainer,
    weights,
)
from torch import nn

from musiclm_pytorch import MuLaN
from musiclm_pytorch.trainer import (
    Callback,
    CodecTrainer,
    MuLaNTrainer,
    SemanticTrainer,
    TrainingConfig,
    TrainingError,
    checkpoints,
)
from musiclm_pytorch.trainer import trainer as loop
from musiclm_pytorch.trainer.config import TrainingKeywords, field_docs
from musiclm_pytorch.trainer.grad_cache import grad_cache_backward, join_latents, split_batch
from musiclm_pytorch.trainer.optimizers import build_optimizer, learning_rate
from musiclm_pytorch.trainer.resumable_loader import Batches
from musiclm_pytorch.trainer.retrieval import mean_cosine, retrieval_metrics, similarity_histogram

# ---- learning ----


def test_it_learns(tmp_path, curves):
    mulan = build(decoupled_contrastive_learning=False)
    run = trainer(tmp_path, mulan, batch_size=18, lr=3e-3, validate_every=40, log_every=20)
    losses = []
    results = run.train(num_train_steps=80, log_fn=lambda metrics: losses.append(metrics['loss']))
    assert len(losses) == 80
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert math.isfinite(results['valid_loss'])
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if line['part'] == 'train'] == [20, 40, 60, 80]
    assert [line['step'] for line in lines if line['part'] == 'valid'] == [40, 80]
    assert (tmp_path / 'curves.png').stat().st_size > 1000
    assert isinstance(MuLaN.from_pretrained(tmp_path / 'best'), MuLaN)
    assert [path.name for path in checkpoints.steps(tmp_path / 'checkpoints')] == ['step-000000080']


@pytest.mark.parametrize(
    'keywords', [dict(), dict(grad_accum_every=2, use_ema=True), dict(grad_cache_chunk_size=3), dict(frozen=True)]
)
def test_the_tokens_that_were_trained_are_recorded(tmp_path, keywords):
    mulan, keywords = build(), dict(keywords)
    frozen = keywords.pop('frozen', False)
    mulan.text.requires_grad_(not frozen)
    before = mulan.text.token_emb.weight.clone()
    run = trainer(tmp_path, mulan, **keywords)
    run.train(num_train_steps=2)
    moved = (mulan.text.token_emb.weight != before).any(dim=1)
    if frozen:  # the audio tower learned what these words sound like all the same
        assert 2 <= mulan.text.trained_tokens.sum() <= 9
    else:
        assert torch.equal(mulan.text.trained_tokens, moved)
    assert 2 <= moved.sum() < 19 or frozen  # there is more to read than two steps do
    for folder in ('best', 'last'):
        assert torch.equal(MuLaN.from_pretrained(tmp_path / folder).text.trained_tokens, mulan.text.trained_tokens)


@pytest.mark.parametrize('optimizer', ['adam', 'adamw', 'lion', 'muon'])
def test_optimizers_decay_matrices_only(tmp_path, optimizer):
    mulan = build()
    run = trainer(tmp_path, mulan, optimizer=optimizer, weight_decay=0.1)
    decayed = {id(p) for group in run.optimizer.param_groups if group['weight_decay'] > 0 for p in group['params']}
    every = {id(p) for group in run.optimizer.param_groups for p in group['params']}
    assert every == {id(p) for p in mulan.parameters()}
    names = {name for name, p in mulan.named_parameters() if id(p) in decayed}
    assert 'audio.transformer.layers.0.0.to_q.weight' in names
    assert not {'contrast.temperatures', 'text.token_emb.weight', 'text.cls_token'} & names
    assert not any(name.endswith(('bias', 'gamma', 'q_scale')) for name in names)
    run.train(num_train_steps=1, with_validation=False)


def test_muon_moves_a_matrix_in_all_of_its_directions():
    """One step as Muon's authors and Moonlight's define it: singular values of about 1, times 0.2 √(longer side)."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 12)
            self.hidden = nn.Linear(12, 20)
            self.to_logits = nn.Linear(20, 11)

        def forward(self, ids):
            return self.to_logits(self.hidden(self.embedding(ids)).tanh())

    torch.manual_seed(0)
    model = Small()
    before, plain = weights(model), Small()
    plain.load_state_dict(before)
    steps = {}
    for name, it in (('muon', model), ('adamw', plain)):
        optimizer = build_optimizer(name, it, 0.01, (0.9, 0.98), 0.0)
        ids = torch.arange(11)
        nn.functional.cross_entropy(it(ids), ids.flip(0)).backward()
        optimizer.step()
        steps[name] = {key: value - before[key] for key, value in weights(it).items()}
    values = torch.linalg.svdvals(steps['muon'].pop('hidden.weight')) / (0.01 * 0.2 * 20**0.5)
    assert values.median() > 0.6
    assert values.max() < 1.3
    for key, step in steps['muon'].items():  # heads, embeddings and biases by AdamW
        torch.testing.assert_close(step, steps['adamw'][key])

    with pytest.raises(ValueError, match="'muon' is for the matrices of linear layers, and none is trained"):
        build_optimizer('muon', model.embedding, 0.01, (0.9, 0.98), 0.0)


def test_schedules():
    def rates(schedule):
        return [
            learning_rate(step, lr=2.0, schedule=schedule, warmup_steps=4, total_steps=12, min_lr_ratio=0.1)
            for step in range(13)
        ]

    for schedule in ('constant', 'linear', 'cosine'):
        assert rates(schedule)[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates('constant')[4:] == [2.0] * 9
    assert rates('linear')[8] == pytest.approx(1.1)
    assert rates('linear')[12] == rates('cosine')[12] == pytest.approx(0.2)
    assert rates('cosine')[6] > rates('linear')[6]
    assert learning_rate(0, lr=1.0, schedule='constant', warmup_steps=1000, total_steps=50) == pytest.approx(0.2)


def test_a_config_and_keywords_are_the_same(tmp_path):
    given = dict(num_train_steps=3, batch_size=4, lr=2e-3, warmup_steps=2, use_ema=True, valid_frac=0.25, seed=5)
    given |= dict(accelerate_kwargs=dict(cpu=True), progress=False)
    results = []
    for folder, how in (('a', given), ('b', dict(config=TrainingConfig(**given)))):
        run = MuLaNTrainer(build(), Tones(), results_folder=tmp_path / folder, **how)
        run.train()
        results.append(weights(run.mulan))
        assert (run.step, run.config.lr, run.config.max_valid_items) == (3, 2e-3, 1024)
    assert_same(*results)
    swept = TrainingConfig(lr=np.float32(0.5), seed=np.int64(3), warmup_steps=1e3, checkpoint_every=np.int32(7))
    assert (swept.lr, swept.seed, swept.warmup_steps, swept.checkpoint_every) == (0.5, 3, 1000, 7)
    assert {type(swept.seed), type(swept.warmup_steps)} == {int}
    config = TrainingConfig(lr=1.0, num_train_steps=3, batch_size=4)
    run = MuLaNTrainer(build(), Tones(), config=config, lr=2.0, num_epochs=2, results_folder=tmp_path)
    assert (run.lr, run.batches.batch_size, run.total_steps()) == (2.0, 4, 2 * run.steps_per_epoch)


def test_fields_are_keywords_and_documented():
    fields = {it.name for it in dataclasses.fields(TrainingConfig)}
    assert field_docs().keys() == fields
    assert typing.get_type_hints(TrainingKeywords) == typing.get_type_hints(TrainingConfig)
    for kind in (MuLaNTrainer, SemanticTrainer, CodecTrainer):
        assert fields <= inspect.signature(kind).parameters.keys()
    assert [inspect.signature(it).parameters['lr'].default for it in (MuLaNTrainer, CodecTrainer)] == [3e-4, 2e-4]


class Seen(Callback):
    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def on_train_begin(self, trainer, total_steps):
        self.calls.append(('begin', total_steps))

    def on_step(self, trainer, metrics):
        self.calls.append(('step', trainer.step))
        if trainer.step == self.stop_at:
            trainer.stop()

    def on_validation(self, trainer, metrics):
        self.calls.append(('validation', trainer.step))
        assert math.isfinite(metrics['score'])

    def on_checkpoint(self, trainer, folder):
        self.calls.append(('checkpoint', int(folder.name[5:])))
        assert (folder / 'state.json').is_file()

    def on_train_end(self, trainer, metrics):
        self.calls.append(('end', trainer.step))


def test_callbacks_are_called_in_order_and_may_end_training(tmp_path):
    seen = Seen(stop_at=3)
    run = trainer(tmp_path, callbacks=[seen], validate_every=2, checkpoint_every=2)
    results = run.train(num_train_steps=8)
    whole = [('begin', 8), ('step', 1), ('step', 2), ('validation', 2), ('checkpoint', 2), ('step', 3)]
    assert seen.calls == [*whole, ('validation', 3), ('checkpoint', 3), ('end', 3)]
    assert 'valid_loss' in results
    assert (tmp_path / 'last' / 'config.json').is_file()


# ---- GradCache ----


def gradients(mulan, compute):
    mulan.zero_grad()
    torch.manual_seed(7)
    loss = compute()
    return loss, {name: p.grad.clone() for name, p in mulan.named_parameters()}, torch.get_rng_state()


@pytest.mark.parametrize('sizes', [2, 5, 7])
@pytest.mark.parametrize(
    'keywords',
    [
        dict(),
        dict(sigmoid_contrastive_loss=True, hierarchical_contrastive_loss=True),
        dict(hierarchical_contrastive_loss=True, word_prediction_weight=0.5),
    ],
)
def test_grad_cache_equals_the_whole_batch(sizes, keywords):
    mulan = build(**keywords).train()
    if mulan.words is not None:
        torch.nn.init.normal_(mulan.words.token_emb.weight)
    wavs, texts = torch.randn(7, 1200), torch.randint(1, 100, (7, 3))
    chunks = split_batch(dict(wavs=wavs, texts=texts), sizes)

    def whole():
        # dropout draws in the order of the chunks
        loss = mulan.loss(join_latents([mulan.pair_latents(**chunk) for chunk in chunks]))
        loss.backward()
        return loss.detach()

    def cached():
        return grad_cache_backward(
            chunks,
            encode=lambda chunk: mulan.pair_latents(**chunk),
            loss_of=mulan.loss,
            backward=torch.Tensor.backward,
        )

    (expected_loss, expected, state), (loss, found, own_state) = gradients(mulan, whole), gradients(mulan, cached)
    torch.testing.assert_close(loss, expected_loss)
    assert torch.equal(own_state, state)
    for name, gradient in expected.items():
        atol = 1e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, atol=atol, rtol=1e-5, msg=name)


def test_accumulation_and_chunks_are_one_contrast(tmp_path):
    """A step of 2 micro-batches of 6, in chunks of 2 or not, equals one of a batch of 12 (without dropout)."""
    results = []
    for name, keywords in {
        'whole': dict(batch_size=12),
        'accumulated': dict(batch_size=6, grad_accum_every=2),
        'chunked': dict(batch_size=12, grad_cache_chunk_size=5),
    }.items():
        torch.manual_seed(3)
        still = dict(
            patch_dropout_prob=0.0, spec_aug_stretch_factor=1, spec_aug_freq_mask=0, spec_aug_time_mask=0, depth=1
        )
        mulan = tiny_mulan(dict(support_variable_length=True, **still), dict(depth=1))
        trainer(tmp_path / name, mulan, valid_frac=0.0, **keywords).train(num_train_steps=3, with_validation=False)
        results.append(weights(mulan))
    # a constant in a softmax has no gradient but rounding, which Adam blows up to full steps
    results = [{name: t for name, t in result.items() if 'pos_bias_mlp.4.bias' not in name} for result in results]
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


# ---- resuming ----

AUTO = (dict(mixed_precision='auto'), dict(use_mixed_precision=True))
RUNS = {
    'plain': dict(),
    'average': dict(use_ema=True, lr_scheduler_type='cosine', warmup_steps=3, optimizer='adamw', weight_decay=0.1),
    'chunks': dict(grad_cache_chunk_size=3, grad_accum_every=2),
    'workers': dict(num_workers=1),
    'groups': dict(groups=[index % 2 for index in range(24)], group_size=2, groups_after=1),
}


@pytest.mark.parametrize('name', RUNS)
def test_resuming_equals_never_having_stopped(tmp_path, name):
    def make(folder, resume):
        mulan = scrambled(build()) if resume else build()
        return trainer(folder, mulan, resume=resume, checkpoint_every=3, **RUNS[name])

    assert_resuming_changes_nothing(tmp_path, make, steps=10, stop_at=8, saved_at=6)


def test_validation_does_not_change_training(tmp_path):
    results = []
    for i, with_validation in enumerate((True, False)):
        run = trainer(tmp_path / str(i), validate_every=2)
        run.train(num_train_steps=5, with_validation=with_validation)
        results.append(weights(run.mulan))
    assert_same(*results)


@pytest.mark.parametrize(
    ('asked', 'has_instructions', 'chosen', 'warns'),
    [
        (dict(mixed_precision='bf16'), False, 'bf16', 1),
        (dict(mixed_precision='bf16'), True, 'bf16', 0),
        (dict(mixed_precision='no'), False, 'no', 0),
        *((it, has, 'bf16' if has else 'no', 0) for it in AUTO for has in (True, False)),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason='about a CPU')
def test_auto_takes_bf16_where_there_are_instructions_and_emulation_is_warned_of(
    asked, has_instructions, chosen, warns, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(loop, 'computes_in_bf16', lambda: has_instructions)
    with caplog.at_level(logging.WARNING):
        assert trainer(tmp_path, **asked).mixed_precision == chosen
    assert caplog.text.count("mixed_precision='auto' takes what is fast") == warns


def test_damaged_checkpoints_are_passed_over_and_moved_aside(tmp_path, caplog):
    trainer(tmp_path, checkpoint_every=2).train(num_train_steps=6)
    newest = tmp_path / 'checkpoints' / 'step-000000006' / 'state.safetensors'
    newest.write_bytes(newest.read_bytes()[:1000])
    (tmp_path / 'checkpoints' / 'step-000000004' / 'state.json').write_text('{')
    run = trainer(tmp_path, resume=True, max_checkpoints=1)
    assert run.step == 2
    assert 'step-000000006 is damaged' in caplog.text
    assert 'step-000000004 is damaged' in caplog.text
    run.train(num_train_steps=3, with_validation=False)
    # of its own, one is kept
    kept, aside = (
        sorted(path.name[-1] for path in (tmp_path / it).iterdir()) for it in ('checkpoints', 'checkpoints.1')
    )
    assert (kept, aside) == (['3'], ['4', '6'])
    assert 'the checkpoints of later steps than 2 are now in' in caplog.text


def test_pruning_that_is_cut_off_leaves_whole_checkpoints(tmp_path, monkeypatch):
    for step in range(3):
        checkpoints.write(tmp_path, step, dict(step=step))

    def cut_off(path, **_):
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.shutil, 'rmtree', cut_off)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.prune(tmp_path, 1)
    found = checkpoints.steps(tmp_path)
    assert [checkpoints.read(path)['step'] for path in found] == [2]
    checkpoints.prune(tmp_path, 1)
    assert list(tmp_path.iterdir()) == found


def test_what_a_killed_writer_leaves(tmp_path):
    """Of the same number, as in a container: nothing piles up, and what lost its place is not thrown away."""
    aside, before = (tmp_path / f'.together.{os.getpid()}.{kind}' for kind in ('tmp', 'before'))
    for folder in (aside, before):
        folder.mkdir()
    for step in (1, 2):
        checkpoints.write(tmp_path, step, dict(step=step))
    assert sorted(it.name for it in tmp_path.iterdir()) == ['step-000000001', 'step-000000002']
    left = tmp_path / '.together.1.before'
    (left / 'step-000000003').mkdir(parents=True)
    (tmp_path / '.together.1.tmp').mkdir()
    checkpoints.prune(tmp_path, 1)
    assert sorted(it.name for it in tmp_path.iterdir()) == [left.name, 'step-000000002']
    assert (left / 'step-000000003').is_dir()


def test_states_come_back_as_they_were(tmp_path):
    state = dict(a=[1, 2.5, None, True, 'x'], b=(torch.arange(3), {0: torch.ones(2).half(), 'k': ()}), c={})
    path = checkpoints.write(tmp_path, 7, state)
    again = checkpoints.read(path)
    assert again['a'] == state['a']
    assert again['c'] == {}
    assert isinstance(again['b'], tuple)
    assert torch.equal(again['b'][0], torch.arange(3))
    assert again['b'][1][0].dtype == torch.float16
    assert again['b'][1]['k'] == ()
    with pytest.raises(TypeError, match='/oops holds a object'):
        checkpoints.write(tmp_path, 8, dict(oops=object()))
    assert [path.name for path in tmp_path.iterdir()] == ['step-000000007']


def train_and_be_killed(_, folder):
    """Four processes, each of which goes on where the one before it was killed."""
    torch.set_num_threads(1)
    saved, draw, reached = folder / 'checkpoints', random.Random(0), 0
    for _ in range(4):
        if (child := os.fork()) == 0:
            try:
                run = trainer(folder, checkpoint_every=1, max_checkpoints=2, resume=True)
                run.train(num_train_steps=100000, with_validation=False)
            finally:
                os._exit(1)
        try:
            while not (found := checkpoints.steps(saved)) or int(found[-1].name[5:]) < reached + 3:
                assert not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                time.sleep(0.02)
            time.sleep(draw.random() * 0.3)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        path, state = checkpoints.read_newest(saved)
        assert path == checkpoints.steps(saved)[-1]
        assert state['step'] >= reached + 3
        reached = state['step']


@pytest.mark.slow
def test_sigkill_at_random_moments_loses_no_state(tmp_path):
    """Killed again and again, each run goes on from a checkpoint that loads."""
    start_processes(train_and_be_killed, tmp_path, count=1)


# ---- folders ----


def test_earlier_results_are_moved_aside_or_deleted_when_asked(tmp_path, caplog):
    folder = tmp_path / 'results'
    for _ in range(3):
        trainer(folder).train(num_train_steps=1, with_validation=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['results', 'results.1', 'results.2']
    assert 'held earlier results' in caplog.text
    trainer(folder, force_clear_prev_results=True).train(num_train_steps=2, with_validation=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['results', 'results.1', 'results.2']
    assert [path.name for path in checkpoints.steps(folder / 'checkpoints')] == ['step-000000002']


# ---- faults ----


def test_a_loss_that_is_not_a_number_stops_training_with_the_step(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.train(num_train_steps=2, with_validation=False)
    monkeypatch.setattr(run.mulan.contrast, 'temperature', lambda: torch.tensor([[[math.nan]]], requires_grad=True))
    with pytest.raises(TrainingError, match='the loss is nan at step 2; lower the learning rate'):
        run.train(num_train_steps=4, with_validation=False)


def test_a_step_that_failed_leaves_nothing_for_the_next(tmp_path):
    """A checkpoint that is loaded in the same session after an error goes on as in a session of its own."""
    steps = dict(num_train_steps=3, with_validation=False)
    straight = trainer(tmp_path / 'straight')
    straight.train(**steps)
    run = trainer(tmp_path / 'run', checkpoint_every=2)
    forward = run.step_module.forward
    run.step_module.forward = lambda batch: forward(batch) * (math.nan if run.step == 2 else 1.0)
    with pytest.raises(TrainingError, match='the loss is nan at step 2'):
        run.train(**steps)
    run.step_module.forward = forward
    run.load(run.checkpoint_folder)
    run.train(**steps)
    assert_same(weights(run.mulan), weights(straight.mulan))


def test_collapse_stops_training_with_the_step(tmp_path):
    run = trainer(tmp_path, collapse_after=3, validate_every=1)
    with torch.no_grad():
        run.mulan.audio_to_latents.weight.zero_()
        run.mulan.audio_to_latents.weight.requires_grad_(False)
    with pytest.raises(TrainingError, match='collapsed at step 3: .* 1.000 for audio'):
        run.train(num_train_steps=5)


@pytest.mark.parametrize(
    ('keywords', 'error', 'message'),
    [
        (dict(batch_size=1), ValueError, 'batch_size must be at least 2'),
        (dict(batch_size=100), ValueError, 'has 18 items, fewer than one batch of 100'),
        (dict(lr=-1.0), ValueError, 'lr must be greater than 0'),
        (dict(lr_scheduler_type='step'), ValueError, "unknown lr_scheduler_type 'step'"),
        (dict(optimizer='sgd'), ValueError, "unknown optimizer 'sgd'"),
        (dict(valid_frac=1.0), ValueError, 'valid_frac'),
        (dict(min_lr_ratio=-1.0), ValueError, r'min_lr_ratio must lie in \[0, 1\], got -1.0'),
        (dict(ema_beta=1.5), ValueError, r'ema_beta must lie in \[0, 1\), got 1.5'),
        (dict(betas=(0.9, float('nan'))), ValueError, r'betas\[1\] must lie in \[0, 1\), got nan'),
        (dict(prefetch_factor=2), ValueError, 'prefetch_factor=2 needs num_workers'),
        (dict(save_model_every=5, checkpoint_every=6), ValueError, 'two names of one number'),
        (dict(num_epochs=1, num_train_steps=1), ValueError, 'pass num_epochs or num_train_steps, got both'),
        (dict(learning_rat=1.0), TypeError, "MuLaNTrainer: unexpected keyword argument 'learning_rat'"),
        (dict(warmup_step=1), TypeError, "did you mean 'warmup_steps'"),
        (dict(lr='fast'), TypeError, r"lr must be float \| None, got 'fast' \(str\)"),
        (dict(use_ema=1), TypeError, r'use_ema must be bool, got 1 \(int\)'),
        pytest.param(
            *(dict(mixed_precision='fp16'), ValueError, "needs a CUDA device; use 'bf16' on a CPU"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='fp16 works on CUDA'),
        ),
    ],
)
def test_bad_settings(tmp_path, keywords, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, **keywords)


def test_loading_what_is_not_there(tmp_path):
    run = trainer(tmp_path / 'results')
    with pytest.raises(FileNotFoundError, match='no checkpoint'):
        run.load(tmp_path / 'nothing')


# ---- data order ----


def test_every_item_once_an_epoch_in_another_order():
    batches = Batches(Tones(10), batch_size=3, collate_fn=list, seed=1, drop_last=False)
    first, second = ([index for keys in batches.keys(epoch) for _, index in keys] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert batches.batches_per_epoch == 4


def test_items_draw_the_same_wherever_they_are_read():
    def waves(position, workers):
        batches = Batches(Tones(10), batch_size=3, collate_fn=list, seed=1, num_workers=workers)
        data = batches.iterate(position)
        return [wave for _ in range(4) for wave, _ in next(data)]

    before = torch.get_rng_state()
    here = waves(2, 0)
    assert torch.equal(before, torch.get_rng_state())
    for first, second in zip(here, waves(2, 2)):
        assert torch.equal(first, second)
    assert torch.equal(here[3], waves(3, 0)[0])


# ---- metrics ----


def test_retrieval_metrics_of_known_ranks():
    similarities = torch.eye(20) * 2 + torch.rand(20, 20)
    perfect = retrieval_metrics(similarities)
    assert perfect['audio_to_text_recall_at_1'] == perfect['text_to_audio_map_at_10'] == 1.0
    similarities[0, :3] = torch.tensor([0.0, 5.0, 5.0])  # two columns beat pair 0, and every other
    similarities[0, 3:] = -1.0
    metrics = retrieval_metrics(similarities)
    assert metrics['audio_to_text_recall_at_1'] == pytest.approx(19 / 20)
    assert metrics['audio_to_text_recall_at_5'] == 1.0
    assert metrics['audio_to_text_map_at_10'] == pytest.approx((19 + 1 / 3) / 20)
    assert metrics['text_to_audio_recall_at_1'] == pytest.approx(17 / 20)


def test_embeddings_that_are_all_alike_do_not_look_perfect():
    metrics = retrieval_metrics(torch.ones(20, 20))
    assert metrics['audio_to_text_recall_at_10'] == 0.0
    assert metrics['audio_to_text_median_rank'] == 20
    alike = torch.ones(5, 4) / 2
    assert mean_cosine(alike) == pytest.approx(1.0)
    assert mean_cosine(torch.eye(4)) == pytest.approx(0.0)


def test_histogram_has_all_shares():
    histogram = similarity_histogram(torch.eye(10))
    assert sum(histogram['pairs']) == pytest.approx(1.0)
    assert sum(histogram['others']) == pytest.approx(1.0)
    assert histogram['pairs'][-1] == 1.0
    assert histogram['others'][20] == 1.0
