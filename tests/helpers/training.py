"""A tiny MuLaN with dropout, tones to train it on, and the trainer; and what holds of resumed runs of every trainer."""

import random

import numpy
import pytest
import torch
from torch.utils.data import Dataset

from helpers.models import tiny_mulan
from musiclm_pytorch.trainer import MuLaNTrainer


class Tones(Dataset):
    """Tones of as many pitches as there are items, with ids that name the pitch; phases are random."""

    def __init__(self, size=24):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        phase = random.random() + numpy.random.rand() + torch.rand(())  # noqa: NPY002 - users' data sets do
        wave = torch.sin((index + 1) * torch.arange(1200) * 0.1 + phase)
        return wave, torch.tensor([index + 1, 50, index + 1])


def build(**keywords):
    torch.manual_seed(3)
    audio = dict(depth=1, support_variable_length=True, attn_dropout=0.1, ff_dropout=0.1)
    return tiny_mulan(audio, dict(depth=1, ff_dropout=0.1), **keywords)


def trainer(folder, mulan=None, **keywords):
    defaults = dict(
        batch_size=4, lr=1e-3, results_folder=folder, accelerate_kwargs=dict(cpu=True), progress=False, valid_frac=0.25
    )
    return MuLaNTrainer(mulan or build(), Tones(), **{**defaults, **keywords})


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def scrambled(mulan):
    for parameter in mulan.parameters():
        torch.nn.init.normal_(parameter)
    return mulan


class Stop(Exception):
    pass


def assert_resuming_changes_nothing(folder, make, *, steps, stop_at, saved_at):
    """A run that an error stops, and that goes on from its newest checkpoint, equals one that was never stopped, to
    the bit; gives the trainers of both. `make(folder, resume=…)` builds one, to be resumed with other weights."""
    straight = make(folder / 'straight', resume=False)
    straight.train(num_train_steps=steps)
    stopped = make(folder / 'stopped', resume=False)

    def stop(_):
        if stopped.step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        stopped.train(num_train_steps=steps, log_fn=stop)
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(999)
    resumed = make(folder / 'stopped', resume=True)
    assert resumed.step == saved_at
    resumed.train(num_train_steps=steps)
    assert resumed.position == straight.position
    assert_same(weights(resumed.model), weights(straight.model))
    if straight.ema is not None:
        assert_same(weights(resumed.ema.ema_model), weights(straight.ema.ema_model))
    assert resumed.journal.read('valid')[-1:] == straight.journal.read('valid')[-1:]
    return resumed, straight
