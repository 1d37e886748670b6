"""Trackers: a run for each training and what belongs to it, and errors before anything is touched."""

import importlib.util
import io
import struct

import pytest
import torch
import wandb
from helpers.models import tiny_mulan
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from musiclm_pytorch.distributed import DistributedConfig, DistributedMuLaNTrainer
from musiclm_pytorch.trainer.trainer import Trainer


class LineTrainer(Trainer):
    def compute_gradients(self, batches):
        def compute(points):
            loss = self.step_module(points).square().mean()
            return loss, dict(loss=loss.detach())

        return self.accumulate(batches, compute, len)


def make_trainer(folder, **keywords):
    line = torch.nn.Linear(2, 1)
    return LineTrainer(
        line, line, torch.randn(8, 2), collate_fn=torch.stack, batch_size=2, results_folder=folder, log_every=1,
        accelerate_kwargs=dict(cpu=True), progress=False, **keywords,
    )  # fmt: skip


@pytest.fixture
def offline(tmp_path, monkeypatch):
    wandb.teardown()  # it keeps the environment that it found first
    for name, value in dict(MODE='offline', DIR=str(tmp_path), SILENT='true', X_SAVE_REQUIREMENTS='false').items():
        monkeypatch.setenv(f'WANDB_{name}', value)
    yield
    wandb.teardown()


def records(path):
    """What a W&B run wrote: records in the format of LevelDB's logs, none of them so long that it is split."""
    content, start = path.read_bytes(), 7
    assert len(content) < 32768
    while start < len(content):
        length, kind = struct.unpack('<HB', content[start + 4 : start + 7])
        assert kind == 1
        start += 7 + length
        yield Record.FromString(content[start - length : start])


def wandb_runs(folder):
    """Project, learning rate, steps with a loss, and exit code of each run, in the order of their beginnings."""
    runs = []
    for path in (folder / 'wandb').glob('offline-run-*/*.wandb'):
        found = [*records(path)]
        (run,) = (record.run for record in found if record.HasField('run'))
        config = {item.key: item.value_json for item in run.config.update}
        history = [
            {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            for record in found
            if record.HasField('history')
        ]
        steps = [int(line['_step']) for line in history if 'train/loss' in line]
        (code,) = (record.exit.exit_code for record in found if record.HasField('exit'))
        runs.append((run.start_time.ToNanoseconds(), (run.project, config.get('lr'), steps, code)))
    return [run for _, run in sorted(runs)]


class Stop(Exception):
    pass


def train_side_by_side(folder, log_with):
    """A training of 3 steps, within its second step another one that stops with an error; then two steps more."""
    first, second = (
        make_trainer(folder / name, lr=lr, log_with=log_with) for name, lr in (('first', 0.5), ('second', 0.25))
    )

    def stop(metrics):
        if second.step == 2:
            raise Stop

    def within(metrics):
        if first.step == 2:
            with pytest.raises(Stop):
                second.train(num_train_steps=4, log_fn=stop)

    first.train(num_train_steps=3, log_fn=within)
    first.train(num_train_steps=5)


@pytest.mark.slow
def test_each_training_is_a_run_of_wandb_beside_that_of_the_program(tmp_path, offline):
    own = wandb.init(project='own')
    train_side_by_side(tmp_path, 'wandb')
    assert wandb.run is own
    own.log({'train/loss': 1.0}, step=1)
    own.finish()
    wandb.teardown()  # its process has then written everything
    assert wandb_runs(tmp_path) == [
        ('own', None, [1], 0),
        ('training', '0.5', [1, 2, 3], 0),
        ('training', '0.25', [1, 2], 1),
        ('training', '0.5', [4, 5], 0),
    ]


def test_each_training_has_its_events_of_tensorboard(tmp_path):
    train_side_by_side(tmp_path, 'tensorboard')
    for name, steps in (('first', [1, 2, 3, 4, 5]), ('second', [1, 2])):
        events = EventAccumulator(str(tmp_path / name / 'training')).Reload()
        assert [event.step for event in events.Scalars('train/loss')] == steps


def distributed(folder, log_with):
    pairs = [(torch.randn(1200), 'a tone')] * 4
    config = DistributedConfig(backend='gloo', world_size=2)
    DistributedMuLaNTrainer(tiny_mulan(), pairs, config, results_folder=folder, log_with=log_with).train()


@pytest.mark.parametrize('build', [lambda folder, name: make_trainer(folder, log_with=name), distributed])
@pytest.mark.parametrize(
    ('name', 'error', 'message'),
    [
        ('wandb', ValueError, "log_with='wandb' cannot log in: No API key configured.* Or set WANDB_MODE=offline"),
        ('aim', ImportError, "log_with='aim' needs a package that is not installed: pip install aim"),
        ('wandbb', ValueError, 'Unsupported logging capability: wandbb'),
    ],
)
def test_a_tracker_that_cannot_be_used_leaves_earlier_results_in_place(
    tmp_path, offline, monkeypatch, build, name, error, message
):
    monkeypatch.setenv('WANDB_MODE', 'online')
    monkeypatch.setenv('HOME', str(tmp_path))
    for secret in ('WANDB_API_KEY', 'WANDB_IDENTITY_TOKEN_FILE', 'NETRC'):
        monkeypatch.delenv(secret, raising=False)
    monkeypatch.setattr('sys.stdin', io.StringIO())  # nobody to ask
    if name == 'aim' and importlib.util.find_spec(name):
        pytest.skip('aim is installed')
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results' / 'earlier').touch()
    with pytest.raises(error, match=message):
        build(tmp_path / 'results', name)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith('results')] == ['results']
    assert [path.name for path in (tmp_path / 'results').iterdir()] == ['earlier']
