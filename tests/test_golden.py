"""The numbers of musiclm-pytorch 0.2.8, on its own weights."""

import pytest
import torch
from helpers.models import build_golden

NAMES = ('softmax_decoupled', 'softmax_hierarchical', 'sigmoid_hierarchical')


@pytest.mark.parametrize('name', NAMES)
def test_outputs(name):
    mulan, golden = build_golden(name)
    wavs, texts = golden['in.wavs'], golden['in.texts']
    close = dict(atol=1e-5, rtol=0)
    torch.testing.assert_close(mulan.get_audio_latents(wavs), golden['out.audio_latents'], **close)
    torch.testing.assert_close(mulan.get_text_latents(texts), golden['out.text_latents'], **close)
    torch.testing.assert_close(mulan(wavs, texts, return_similarities=True), golden['out.similarities'], **close)
    torch.testing.assert_close(mulan(wavs, texts, return_pairwise_similarities=True), golden['out.pairwise'], **close)
    audio, text = mulan(wavs, texts, return_latents=True)
    torch.testing.assert_close(audio, golden['out.audio_latents'], **close)
    torch.testing.assert_close(text, golden['out.text_latents'], **close)


@pytest.mark.parametrize('name', NAMES)
def test_loss_and_gradients(name):
    mulan, golden = build_golden(name)
    loss = mulan(golden['in.wavs'], golden['in.texts'])
    torch.testing.assert_close(loss, golden['out.loss'].squeeze(), atol=0, rtol=1e-4)

    loss.backward()
    expected = {key.removeprefix('grad.'): value for key, value in golden.items() if key.startswith('grad.')}
    found = {key: p.grad for key, p in mulan.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        error, size = (found[key] - gradient).norm(), gradient.norm()
        # the second term is for gradients that are zero but for rounding, such as that of a constant in a softmax
        assert error <= 1e-4 * size + 1e-6, f'{key}: {error:.1e} of {size:.1e}'
