"""Waves as numpy arrays give what tensors give, wherever waves are taken, and no error tells their numbers."""

import numpy as np
import pytest
import torch
from helpers.models import tiny_mulan
from helpers.music import RATE, build_audio_lm, build_quantizer

from musiclm_pytorch import MuLaNEmbedQuantizer, MuLaNSemanticTokenizer, MusicLM
from musiclm_pytorch.audiolm.spectral_codec import SpectralCodec
from musiclm_pytorch.checks import described
from musiclm_pytorch.evaluation.inputs import list_clips
from musiclm_pytorch.inference import InferenceConfig, OptimizedMuLaN

WAVES = 0.1 * torch.randn(6, 4000, generator=torch.Generator().manual_seed(0))
TEXTS = [[1, 2], [3, 0], [4, 5], [6, 7], [8, 9], [1, 5]]


@pytest.fixture(scope='module')
def mulan():
    torch.manual_seed(0)
    return tiny_mulan(dict(depth=1, audio_sample_rate=RATE), dict(depth=1)).eval()


@pytest.fixture(scope='module')
def takers(mulan):
    """What takes a batch of waves, by name."""
    quantizer = MuLaNEmbedQuantizer(mulan, conditioning_dims=(8,), namespaces=('semantic',), codebook_size=4)
    quantizer.fit(mulan.get_audio_latents(WAVES))
    tokenizer = MuLaNSemanticTokenizer(mulan, codebook_size=4)
    tokenizer.fit(WAVES)
    codec = SpectralCodec(RATE, codebook_size=8, window=0.064, hop=0.016, bands=8, resolved_hz=400, components=8)
    codec.fit(WAVES)
    musiclm = MusicLM(build_audio_lm(), build_quantizer())
    rate = dict(prime_wave_input_sample_hz=RATE)
    return {
        'tower': mulan.audio,
        'latents': lambda waves: mulan.get_audio_latents(waves, sample_rate=2 * RATE),
        'pairs': lambda waves: mulan(waves, torch.tensor(TEXTS), return_similarities=True),
        'windows': lambda waves: mulan.embed_audio(waves, window=1.0),
        'optimized': OptimizedMuLaN(mulan, InferenceConfig(device='cpu')).get_audio_latents,
        'quantizer': lambda waves: quantizer(wavs=waves),
        'tokenizer': tokenizer,
        'codec': lambda waves: codec(waves, return_recons_only=True),
        'prime': lambda waves: musiclm('a', seconds=3.0, seed=1, prime_wave=waves, **rate),
        'evaluator': lambda waves: torch.stack(list_clips(waves)),
    }


NAMES = ['tower', 'latents', 'pairs', 'windows', 'optimized', 'quantizer', 'tokenizer', 'codec', 'prime', 'evaluator']


@pytest.mark.parametrize('name', NAMES)
def test_arrays_are_taken_as_tensors_are(takers, name):
    take, waves = takers[name], WAVES.numpy()
    expected = take(WAVES)
    stereo = np.repeat(waves[:, :, None], 2, axis=2)[..., 0]  # a view with strides of its own
    for array in (waves, stereo, waves.astype('>f4'), waves[::-1][::-1]):
        torch.testing.assert_close(take(array), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(take(waves.astype(np.float64)).float(), expected.float(), atol=1e-4, rtol=1e-3)
    with pytest.raises(TypeError, match='floating-point tensor, got torch.int16, integer PCM'):
        take((waves * 32767).astype(np.int16))


def test_arrays_of_latents_fit_a_quantizer(mulan):
    found = []
    for kind in (torch.Tensor, np.asarray):
        quantizer = MuLaNEmbedQuantizer(mulan, conditioning_dims=(8,), namespaces=('semantic',), codebook_size=4)
        quantizer.fit(kind(mulan.get_audio_latents(WAVES).detach()))
        found.append(quantizer.indices(latents=kind(mulan.get_audio_latents(WAVES).detach())))
    assert torch.equal(*found)


def test_no_error_tells_numbers(takers, mulan):
    loud = torch.full((3, 7), 0.123)
    for call in (
        lambda: MusicLM(loud, loud),
        lambda: mulan.get_text_latents(raw_texts=loud),
        lambda: mulan.get_audio_latents(loud.tolist()),
        lambda: mulan.get_audio_latents(loud, sample_rate=loud),
        lambda: list_clips(loud, loud.numpy()),
        lambda: takers['prime'](loud[None]),
        lambda: takers['prime']([loud.numpy()]),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert '0.12' not in str(caught.value)
    assert described(loud) == 'Tensor of torch.float32 and shape (3, 7)'
    assert described(loud.numpy()) == 'ndarray of float32 and shape (3, 7)'
    assert described([loud]) == '[<tensor>]'


def test_the_layout_of_soundfile_is_named(takers, mulan):
    frames = np.zeros((4000, 2))
    with pytest.raises(ValueError, match=r'pass prime_wave.T'):
        takers['prime'](frames)
    with pytest.raises(
        ValueError, match=r'shape \(4000, 2\) looks like \(samples, channels\): pass wavs.mean\(1\)\[None\]'
    ):
        mulan.get_audio_latents(frames)
    with pytest.raises(ValueError, match=r'pass generated_audio\[0\].T'):
        list_clips([frames])
