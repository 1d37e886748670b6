"""torch.compile takes both towers in eval mode as one graph each, and training too.

Where graphs are what is asked, they run as they are: turning each into C++ takes minutes, and it is done for one tower
here, and where the trainer compiles (`test_contract.py`).
"""

import pytest
import torch
from helpers.models import tiny_audio, tiny_mulan, tiny_text

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


GRAPHS = 'aot_eager'


@pytest.mark.parametrize(
    ('keywords', 'backend'),
    [
        (dict(), 'inductor'),
        (dict(audio_sample_rate=8000, spec_n_mels=16, spec_n_fft=256), GRAPHS),
        (dict(support_variable_length=True), GRAPHS),
    ],
    ids=['power', 'log-mel', 'lengths'],
)
def test_audio_tower_is_one_graph(keywords, backend):
    tower = tiny_audio(depth=1, **keywords).eval()
    wavs = torch.randn(2, 2000)
    arguments = dict(audio_lengths=torch.tensor([2000, 1300])) if 'support_variable_length' in keywords else {}
    with torch.no_grad():
        expected = tower(wavs, **arguments)
        found = torch.compile(tower, fullgraph=True, backend=backend)(wavs, **arguments)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_text_tower_is_one_graph():
    tower, texts = tiny_text().eval(), torch.randint(0, 100, (3, 7))
    with torch.no_grad():
        expected = tower(texts)
        found = torch.compile(tower, fullgraph=True, backend=GRAPHS)(texts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_compiled_training_gives_the_same_gradients():
    still = dict(patch_dropout_prob=0.0, spec_aug_stretch_factor=1, spec_aug_freq_mask=0, spec_aug_time_mask=0)
    mulan = tiny_mulan(dict(depth=1, **still), dict(depth=1)).train()
    wavs, texts = torch.randn(3, 1500), torch.randint(1, 100, (3, 7))
    gradients = []
    for call in (mulan, torch.compile(mulan, backend=GRAPHS)):
        mulan.zero_grad()
        call(wavs, texts).backward()
        gradients.append({name: p.grad.clone() for name, p in mulan.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_compiled_training_with_augmentation_runs():
    mulan = tiny_mulan(dict(depth=1), dict(depth=1)).train()
    compiled = torch.compile(mulan, backend=GRAPHS)
    for samples in (1500, 1900):
        mulan.zero_grad()
        compiled(torch.randn(3, samples), torch.randint(1, 100, (3, 7))).backward()
        assert all(p.grad.isfinite().all() for p in mulan.parameters())
