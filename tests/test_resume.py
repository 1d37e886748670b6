"""What a resumed run takes over, what it is told anew, what it refuses; and that nothing good is lost on the way."""

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from helpers.files import largest_file
from helpers.processes import start_processes
from helpers.training import Tones, assert_same, build, scrambled, trainer, weights
from safetensors.torch import load_file

from musiclm_pytorch import MuLaN
from musiclm_pytorch.atomic import write_checked_json
from musiclm_pytorch.locking import FolderInUseError
from musiclm_pytorch.trainer import MuLaNTrainer, best, checkpoints
from musiclm_pytorch.trainer.folders import clear_leftovers
from musiclm_pytorch.trainer.interrupts import loaded
from musiclm_pytorch.trainer.metrics_logger import Journal

QUIET = dict(with_validation=False)


def trained(folder, steps=2, **keywords):
    run = trainer(folder, checkpoint_every=100, **keywords)
    run.train(num_train_steps=steps, **QUIET)
    return run


def resumed(folder, **keywords):
    return trainer(folder, scrambled(build()), resume=True, checkpoint_every=100, **keywords)


# ---- settings ----


@pytest.mark.parametrize('optimizer', ['adamw', 'lion', 'muon'])
def test_settings_of_a_resumed_run_are_its_own(tmp_path, optimizer):
    """Resumed with other settings, it goes on as the run would have gone on if they had changed in the middle."""
    run = trained(tmp_path / 'run', optimizer=optimizer, weight_decay=0.1)
    shutil.copytree(tmp_path / 'run', tmp_path / 'again')
    told = dict(lr=3e-3, weight_decay=0.5, betas=(0.5, 0.6), lr_scheduler_type='linear', max_grad_norm=0.1)
    run.lr, run.max_grad_norm, run.schedule['schedule'] = 3e-3, 0.1, 'linear'
    for group in run.optimizer.param_groups:
        group.update(
            {'betas': told['betas']} if 'betas' in group else {},
            weight_decay=told['weight_decay'] if group['weight_decay'] else 0.0,
        )
    run.train(num_train_steps=4, **QUIET)
    again = resumed(tmp_path / 'again', optimizer=optimizer, **told)
    again.train(num_train_steps=4, **QUIET)
    assert {group['betas'] for group in again.optimizer.param_groups if 'betas' in group} == {(0.5, 0.6)}
    assert_same(weights(again.mulan), weights(run.mulan))


def test_the_record_of_trained_tokens_goes_on(tmp_path):
    whole, half = trained(tmp_path / 'whole', steps=3), trained(tmp_path / 'run', steps=1)
    again = resumed(tmp_path / 'run')
    assert torch.equal(again.mulan.text.trained_tokens, half.mulan.text.trained_tokens)
    again.train(num_train_steps=3, **QUIET)
    assert torch.equal(again.mulan.text.trained_tokens, whole.mulan.text.trained_tokens)
    assert whole.mulan.text.trained_tokens.sum() > half.mulan.text.trained_tokens.sum()

    # a checkpoint of before there was one: what was trained is not known, and does not become known
    state = again.state()
    del state['trained_tokens']
    again.load_state(state)
    again.train(num_train_steps=4, **QUIET)
    assert again.mulan.text.trained_tokens is None
    assert resumed(tmp_path / 'run').mulan.text.trained_tokens is None
    assert MuLaN.from_pretrained(tmp_path / 'run' / 'last').text.trained_tokens is None


def test_adam_goes_on_as_adamw(tmp_path):
    trained(tmp_path, optimizer='adam')
    again = resumed(tmp_path, optimizer='adamw', weight_decay=0.1)
    assert type(again.optimizer) is torch.optim.AdamW
    again.train(num_train_steps=3, **QUIET)


@pytest.mark.parametrize(
    ('before', 'after', 'message'),
    [
        (
            dict(optimizer='lion'),
            dict(),
            "was written with optimizer='lion', and optimizer='adam' keeps other statistic",
        ),
        (dict(), dict(use_lion=True), "was written with optimizer='adam' or 'adamw', and optimizer='lion' keeps other"),
        (dict(), dict(optimizer='muon'), "written with optimizer='adam' or 'adamw', and optimizer='muon' keeps other"),
        (dict(optimizer='muon'), dict(), "was written with optimizer='muon', and optimizer='adam' keeps other"),
        (dict(), dict(frozen=True), 'audio_to_latents.weight and 0 more are not in both; let the same ones require'),
        (
            dict(),
            dict(random_split_seed=7),
            'random_split_seed=42, now it is .*random_split_seed=7: what was trained on',
        ),
        (dict(valid_frac=0.0), dict(), 'in which nothing was held out, now it is valid_frac=0.25'),
        (dict(), dict(dim_latent=8), 'is of another model: mulan.dim_latent was 16 and is 8 now'),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, before, after, message):
    trained(tmp_path, **before)
    left = sorted(tmp_path.rglob('*'))
    after = dict(after)
    mulan = build(dim_latent=after.pop('dim_latent', 16))
    if after.pop('frozen', False):
        mulan.audio_to_latents.weight.requires_grad_(False)
    start = weights(mulan)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, mulan, resume=True, **after)
    assert_same(weights(mulan), start)
    assert sorted(tmp_path.rglob('*')) == left


def test_an_average_that_is_new_starts_from_the_loaded_weights(tmp_path, caplog):
    run = trained(tmp_path)
    again = resumed(tmp_path, use_ema=True, ema_beta=0.5)
    assert_same(weights(again.evaluated_model), weights(run.mulan))
    # at its end already: what is written was trained
    again.train(num_train_steps=2)
    assert_same(load_file(str(tmp_path / 'last' / 'model.safetensors')), weights(run.mulan))
    again.train(num_train_steps=4, **QUIET)
    assert resumed(tmp_path, use_ema=True, ema_beta=0.9).ema.beta == 0.9
    assert 'leaves out' not in caplog.text
    resumed(tmp_path)
    assert 'has an average of the weights, which this run leaves out' in caplog.text


def test_the_scale_of_fp16_goes_on_with_the_settings_of_now(tmp_path):
    run = trained(tmp_path)
    run.scaler = torch.amp.GradScaler('cpu', init_scale=8.0, growth_interval=3)
    state = run.state()
    run.scaler = torch.amp.GradScaler('cpu', growth_interval=5)
    run.load_state(state)
    assert (run.scaler.get_scale(), run.scaler.get_growth_interval()) == (8.0, 5)
    run.scaler = None
    run.load_state(state)
    before = run.state()
    run.scaler = torch.amp.GradScaler('cpu', init_scale=2.0)
    run.load_state(before)
    assert run.scaler.get_scale() == 2.0


@pytest.mark.parametrize(
    ('told', 'next_item', 'says'),
    [
        # 18 items: after 3 batches of 4, the 12th of the first epoch
        (dict(batch_size=6), (0, 12), 'a batch has 6 items now, not 4'),
        (dict(batch_size=5), (0, 10), 'a batch has 5 items now, not 4'),
        (dict(drop_last=False), (0, 12), ''),
        (dict(grad_accum_every=2), (0, 12), ''),
        (dict(seed=5), (1, 0), 'the order of the data changes, and a new pass begins'),
        (dict(groups=[0, 1] * 12, group_size=2), (1, 0), 'the order of the data changes, and a new pass begins'),
    ],
)
def test_the_data_go_on_where_they_were(tmp_path, caplog, told, next_item, says):
    trained(tmp_path, steps=3)
    again = resumed(tmp_path, **told)
    epoch, batch = divmod(again.position, again.batches.batches_per_epoch)
    assert (epoch, batch * again.batches.batch_size) == next_item
    assert says in caplog.text
    again.train(num_train_steps=4, **QUIET)


@pytest.mark.parametrize('told', [dict(batch_size=6), dict(batch_size=2), dict(grad_accum_every=2), dict(seed=5)])
def test_epochs_are_passes_over_the_data_whatever_a_step_is(tmp_path, told):
    told = dict(batch_size=3) | told
    first = trainer(tmp_path, batch_size=3, num_epochs=2)
    first.train(num_epochs=1, **QUIET)
    again = resumed(tmp_path, num_epochs=2, **told)
    total = again.total_steps()
    again.train(num_train_steps=total - 1, **QUIET)
    again = resumed(tmp_path, num_epochs=2, **told)  # stopped once more
    assert again.total_steps() == total
    again.train(**QUIET)
    assert again.position == 2 * again.batches.batches_per_epoch
    assert again.step == total == 6 + 18 // (again.batches.batch_size * again.grad_accum_every)


def test_epochs_that_are_no_whole_number_of_steps(tmp_path):
    run = trainer(tmp_path, batch_size=3, grad_accum_every=4)  # 6 batches
    assert [run.total_steps(num_epochs=epochs) for epochs in (1, 2, 3, 4)] == [2, 3, 5, 6]
    run.train(num_epochs=2, **QUIET)
    run.grad_accum_every = 6  # as may be changed while it trains
    assert run.total_steps(num_epochs=4) == 5


def test_a_model_that_was_built_otherwise_is_told(tmp_path, caplog):
    trained(tmp_path)
    trainer(tmp_path, build(decoupled_contrastive_learning=False), resume=True)
    assert (
        'the model was built otherwise, which holds from here on: mulan.decoupled_contrastive_learning' in caplog.text
    )


# ---- what is there stays ----


def test_a_better_model_outlives_a_run_without_its_checkpoint(tmp_path, caplog):
    folder = tmp_path / 'best'

    def begin_again(**record):
        shutil.rmtree(tmp_path / 'checkpoints')
        if record:
            write_checked_json(folder / best.FILE, best.read(folder) | record)
        before = (folder / 'model.safetensors').read_bytes()
        caplog.clear()
        run = trainer(tmp_path, scrambled(build()), resume=True)
        assert run.step == 0
        assert f'no checkpoint in {tmp_path}: training begins at step 0' in caplog.text
        run.train(num_train_steps=2)
        return (folder / 'model.safetensors').read_bytes() == before

    trainer(tmp_path).train(num_train_steps=5)
    assert best.read(folder).items() >= dict(step=5, held_out=6).items()
    assert begin_again(score=2.0, step=77)
    assert f'{folder} is kept until a model is better' in caplog.text
    assert best.read(folder)['step'] == 77
    assert not begin_again(score=-2.0)
    assert best.read(folder)['step'] == 2
    # what cannot be compared is not lost either
    kept = (folder / 'model.safetensors').read_bytes()
    begin_again(held_out=7)
    assert (tmp_path / 'best.1' / 'model.safetensors').read_bytes() == kept
    (folder / best.FILE).unlink()
    begin_again()
    assert (tmp_path / 'best.2').is_dir()


def test_results_are_moved_when_nothing_can_fail_any_more(tmp_path, caplog, monkeypatch):
    folder = tmp_path / 'results'
    trained(folder)
    left = sorted(folder.rglob('*'))
    for keywords in (dict(batch_size=100), dict(optimizer='sgd'), dict(log_with='none')):
        with pytest.raises(ValueError, match=r'fewer than one batch|unknown optimizer|Unsupported'):
            trainer(folder, **keywords)
    for clear in (False, True):
        run = trainer(folder, force_clear_prev_results=clear)
        with pytest.raises(ValueError, match='got both'):
            run.train(num_epochs=1, num_train_steps=1)

        @contextmanager
        def no_log(total):
            raise ConnectionError('no tracker there')
            yield

        monkeypatch.setattr(run, 'tracking', no_log)
        with pytest.raises(ConnectionError):
            run.train(num_train_steps=1)
        assert sorted(folder.rglob('*')) == left
    assert [path.name for path in tmp_path.iterdir()] == ['results']

    folder.rename(tmp_path / 'results.3')
    (tmp_path / 'results.4').mkdir()
    trainer(folder, resume=True)
    assert f'training begins at step 0; earlier checkpoints are in {tmp_path / "results.3"}' in caplog.text
    assert not folder.exists()


def test_what_dead_processes_were_writing_is_cleared(tmp_path):
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    alive = f'.model.safetensors.{os.getppid()}.tmp'
    for name in ('best', 'checkpoints'):
        (tmp_path / name).mkdir()
        (tmp_path / name / f'.model.safetensors.{dead.pid}.tmp').touch()
    (tmp_path / 'checkpoints' / f'.step-000000004.{dead.pid}.old').mkdir()
    others = ['best/model.safetensors', f'best/{alive}', f'.notes.{dead.pid}', f'{dead.pid}.tmp']
    for name in others:
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*') if path.is_file()]
    assert sorted(found) == sorted(others)
    assert not any((tmp_path / 'checkpoints').iterdir())


def test_the_journal_forgets_what_a_run_went_back_behind(tmp_path):
    journal = Journal(tmp_path)
    for step in (10, 20, 30):
        journal.write('valid', step, dict(score=step))
    journal.path.write_bytes(journal.path.read_bytes()[:-9])  # killed while writing
    journal.write('train', 30, dict(loss=1.0))
    journal.write('valid', 15, dict(score=0))
    assert [line['step'] for line in journal.read('valid')] == [10, 15]
    assert [line['step'] for line in journal.read('train')] == [30]


def test_the_journal_of_a_run_that_was_resumed_often(tmp_path):
    journal = Journal(tmp_path)
    steps = [*range(2000), *range(1500, 2500), *range(2000, 2100), *range(500, 2500)]
    journal.path.write_text(''.join(f'{{"part": "train", "step": {step}}}\n' for step in steps))
    assert [line['step'] for line in journal.read('train')] == [*range(2500)]


def test_a_checkpoint_of_the_folder_itself_that_is_loaded_gives_a_best_model_anew(tmp_path):
    trainer(tmp_path / 'run').train(num_train_steps=2)
    reached = best.read(tmp_path / 'run' / 'best')
    run = trainer(tmp_path / 'run')
    run.load(tmp_path / 'run')
    run.train(num_train_steps=2)  # no step is left
    assert best.read(tmp_path / 'run' / 'best') == best.read(tmp_path / 'run.1' / 'best') == reached


def test_results_that_are_removed_do_not_end_training(tmp_path):
    run = trainer(tmp_path / 'run', log_every=1)
    run.train(num_train_steps=3, log_fn=lambda _: run.step == 1 and shutil.rmtree(run.results_folder))
    assert [line['step'] for line in run.journal.read('train')] == [2, 3]
    assert resumed(tmp_path / 'run').step == 3


def test_results_stay_where_they_were_when_the_program_goes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trainer('run')
    run.train(num_train_steps=1, **QUIET)
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    run.train(num_train_steps=2, **QUIET)
    assert not [*(tmp_path / 'elsewhere').iterdir()]
    assert resumed(tmp_path / 'run').step == 2


def test_a_checkpoint_that_does_not_fit_leaves_what_was_there(tmp_path):
    run = trained(tmp_path)
    with (
        largest_file(20_000),
        pytest.raises(OSError, match=r'step-000000003 could not be written .*too large.* earlier ones are intact'),
    ):
        run.train(num_train_steps=3, **QUIET)
    assert [path.name for path in run.checkpoint_folder.iterdir()] == ['step-000000002']
    assert resumed(tmp_path).step == 2


@pytest.mark.parametrize('resume', [False, True])
def test_a_run_whose_folder_another_one_took_writes_nothing_more(tmp_path, resume):
    first = trained(tmp_path / 'run')
    second = trainer(tmp_path / 'run', build(), resume=resume, checkpoint_every=100)
    first.train(num_train_steps=3, **QUIET)  # nothing has begun there yet
    second.train(num_train_steps=4, **QUIET)
    left = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    state = weights(first.mulan)
    for write in (lambda: first.train(num_train_steps=5, **QUIET), first.train_step, first.save):
        with pytest.raises(FolderInUseError, match=r'run was taken by another run since .* resume=True, or keep this'):
            write()
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == left
    second.train(num_train_steps=5, **QUIET)

    # what the error tells to do
    first.save(tmp_path / 'kept.safetensors')
    again = trainer(tmp_path / 'other', scrambled(build()), checkpoint_every=100)
    again.load(tmp_path / 'kept.safetensors')
    assert_same(weights(again.mulan), state)
    again.train(num_train_steps=4, **QUIET)
    assert resumed(tmp_path / 'run').step == 5
    assert [path.name for path in again.checkpoint_folder.iterdir()] == ['step-000000004']


# ---- when it is stopped ----


def signalling(run, step, *numbers):
    def log(metrics):
        if run.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return log


@pytest.mark.parametrize(
    ('number', 'code'), [(signal.SIGINT, None), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=['INT', 'TERM', 'HUP']
)
def test_a_signal_ends_training_with_a_checkpoint(tmp_path, number, code, caplog):
    handlers = {it: signal.getsignal(it) for it in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    run = trainer(tmp_path / 'parts', validate_every=3)
    with pytest.raises(KeyboardInterrupt if code is None else SystemExit) as stopped:
        run.train(num_train_steps=6, log_fn=signalling(run, 3, number))
    told = str(stopped.value) if code is None else caplog.messages[-1]
    assert told.startswith(f'stopped by {signal.Signals(number).name} at step 3 of 6, with a checkpoint in ')
    assert getattr(stopped.value, 'code', None) == code
    assert {it: signal.getsignal(it) for it in handlers} == handlers
    assert [path.name for path in checkpoints.steps(run.checkpoint_folder)] == ['step-000000003']
    if code is None:
        again = resumed(tmp_path / 'parts', validate_every=3)
        again.train(num_train_steps=6)
        straight = trainer(tmp_path / 'straight', validate_every=3)
        straight.train(num_train_steps=6)
        assert_same(weights(again.mulan), weights(straight.mulan))
        found, expected = (load_file(str(tmp_path / it / 'best/model.safetensors')) for it in ('parts', 'straight'))
        assert_same(found, expected)


def test_a_second_signal_acts_at_once(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run.train(num_train_steps=6, log_fn=signalling(run, 3, signal.SIGTERM, signal.SIGINT))
    assert not str(stopped.value)
    assert checkpoints.steps(run.checkpoint_folder) == []


def test_a_signal_in_the_last_step_ends_the_program_behind_finished_work(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt, match='stopped by SIGINT at the end of training'):
        run.train(num_train_steps=3, log_fn=signalling(run, 3, signal.SIGINT))
    assert (tmp_path / 'last' / 'model.safetensors').is_file()
    assert resumed(tmp_path).validated == 3


def test_ignored_signals_stay_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        run = trainer(tmp_path)
        run.train(num_train_steps=3, log_fn=signalling(run, 2, signal.SIGHUP), **QUIET)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Ignored(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index, signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def read_among_signals(_):
    """Each process that reads gets three signals as soon as it is there."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    os.register_at_fork(after_in_child=lambda: [os.kill(os.getpid(), it) for it in numbers])
    found = [(index.item(), ignored.item()) for index, ignored in loaded(Ignored(), num_workers=2)]
    assert found == [(index, True) for index in range(4)]


def test_processes_that_read_data_outlive_signals_from_birth():
    start_processes(read_among_signals, count=1)


def test_checkpoints_by_the_clock(tmp_path):
    for name, minutes, expected in (('often', 1e-9, [1, 2, 3]), ('never', None, [3]), ('seldom', 10.0, [3])):
        run = trainer(tmp_path / name, checkpoint_minutes=minutes)
        run.train(num_train_steps=3, **QUIET)
        assert [int(path.name[5:]) for path in checkpoints.steps(run.checkpoint_folder)] == expected


def trained_until(folder, stop_at=None, resume=False):
    """The exit code of a process that trains, and ends right before the file that is counted is renamed or opened."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            run = trainer(folder, resume=resume, checkpoint_every=1, validate_every=1, max_checkpoints=1)
            count = 0

            def watch(event, arguments):
                nonlocal count
                # from the validation of the last step on: the journal, the best model, the checkpoint, what follows
                counts = event == 'open' and str(arguments[0]).endswith('metrics.jsonl')
                if event == 'os.rename':
                    counts = '/.step-' not in str(arguments[1])  # of a file in a checkpoint that is not there yet
                if run.step == 2 and counts:
                    count += 1
                    if count == stop_at:
                        os._exit(9)

            sys.addaudithook(watch)
            run.train(num_train_steps=2)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train_and_be_cut_off(_, folder):
    torch.set_num_threads(1)
    Journal.draw = lambda self: None  # takes long, and has no part in it
    assert trained_until(folder / 'straight') == 0
    best_model = (folder / 'straight' / 'best' / 'model.safetensors').read_bytes()
    for point in itertools.count(1):
        cut_off = folder / str(point)
        if (code := trained_until(cut_off, point)) == 0:
            break
        assert code == 9, code
        assert trained_until(cut_off, resume=True) == 0
        assert (cut_off / 'best' / 'model.safetensors').read_bytes() == best_model, point
        assert not [it for it in cut_off.rglob('*') if it.name.endswith(('tmp', 'old'))], point
    assert point > 7


@pytest.mark.slow
def test_a_run_that_was_cut_off_anywhere_ends_with_the_same_best_model(tmp_path):
    start_processes(train_and_be_cut_off, tmp_path, count=1)


# ---- held-out items ----


@pytest.mark.parametrize(
    ('size', 'valid_frac', 'says'),
    [
        (24, 0.25, 'the best model is chosen on 6 held-out items; below 30, much of that is chance'),
        (24, 0.05, 'no validation and no best model: of held-out items there are 1, and it takes at least 2'),
        (24, 0.0, ''),
        (90, 0.4, ''),
    ],
)
def test_few_held_out_items_are_told(tmp_path, caplog, size, valid_frac, says):
    settings = dict(batch_size=4, results_folder=tmp_path, accelerate_kwargs=dict(cpu=True), progress=False)
    run = MuLaNTrainer(build(), Tones(size), valid_frac=valid_frac, **settings)
    with caplog.at_level(logging.WARNING):
        run.train(num_train_steps=1)
    assert says in caplog.text
    assert bool(says) == ('held' in caplog.text)
