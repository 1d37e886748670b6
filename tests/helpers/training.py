"""A tiny MuLaN with dropout, tones to train it on, and the trainer."""

import random

import numpy
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
