"""What holds for every test, and files that several read."""

import os

import pytest
import torch
from helpers.sound_font import write_sound_font
from helpers.sounds import ramp, write

from musiclm_pytorch.trainer.metrics_logger import Journal

# tiny models gain nothing from a second thread, and wait long for it where the machine is busy
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'  # of the processes that tests start


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def curves():
    """For tests that look at the picture of the curves, which is not drawn elsewhere."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """To draw the picture at the end of each run takes longer than to train a tiny model does."""
    if 'curves' not in request.fixturenames:
        monkeypatch.setattr(Journal, 'draw', lambda self: None)


@pytest.fixture
def music(tmp_path):
    """Three captioned sound files of a second, and one without a caption."""
    for index in range(3):
        write(tmp_path / 'music' / f'{index}.wav', ramp(1), caption=f'clip {index}')
    write(tmp_path / 'music' / 'mute.wav', ramp(1), caption=None)
    return tmp_path / 'music'


@pytest.fixture(scope='session')
def font(tmp_path_factory):
    """A sound font with every instrument of General MIDI."""
    return write_sound_font(tmp_path_factory.mktemp('fonts') / 'sine.sf2')
