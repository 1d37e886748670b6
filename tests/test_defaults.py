"""Torch's defaults, which a program may change, change neither models that are loaded nor their music."""

import pytest
import torch

from musiclm_pytorch import MusicLM
from musiclm_pytorch.inference.engine import BatchInferenceEngine


@pytest.fixture(params=['tiny', 'small'])
def name(request):
    return request.param


@pytest.fixture
def defaults():
    """What sets torch's defaults, for the time of a test."""
    yield lambda dtype, device: (torch.set_default_dtype(dtype), torch.set_default_device(device))
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def made_by(musiclm):
    rate, mulan = musiclm.sample_rate, musiclm.mulan_embed_quantizer.mulan
    wave = torch.sin(torch.arange(rate, dtype=torch.float32) * 0.1)
    melody = dict(melody=(wave, rate)) if musiclm.mulan_embed_quantizer.melody is not None else {}
    music = musiclm('a piano', 2, seconds=0.4, seed=1, negative='drums', **melody, return_all=True, return_scores=True)
    return [
        *music,
        torch.cat(list(musiclm.stream('an organ', seconds=0.4, seed=2, top_p=0.9))),
        musiclm('a flute', seconds=0.6, seed=3, prime_wave=wave[: rate // 4], prime_wave_input_sample_hz=rate),
        musiclm.infill((wave, rate), 0.4, 0.6, 'a flute', num_samples=1, seed=4),
        musiclm([(0.3, 'a flute'), (0.3, 'an organ')], seed=5),
        mulan.embed_audio(wave.repeat(3), 1.0, 1.0, rate),
        BatchInferenceEngine(mulan).embed_texts(['a piano', 'drums']),
    ]


def test_music_takes_its_precision_from_the_weights(name, defaults):
    wanted = made_by(MusicLM.from_pretrained(name))
    for dtype in (torch.float64, torch.bfloat16):
        defaults(dtype, None)
        for found, expected in zip(made_by(MusicLM.from_pretrained(name)), wanted, strict=True):
            assert found.dtype == expected.dtype == torch.float32
            assert torch.equal(found, expected)


def test_loading_takes_precision_and_place_from_what_it_is_told(name, defaults):
    wanted = MusicLM.from_pretrained(name).state_dict()
    for dtype, device in ((torch.float64, 'meta'), (torch.bfloat16, 'cpu')):
        defaults(dtype, device)
        found = MusicLM.from_pretrained(name).state_dict()
        assert torch.get_default_dtype() == dtype
        assert torch.get_default_device() == torch.device(device)
        defaults(torch.float32, None)
        assert {key: it.dtype for key, it in found.items()} == {key: it.dtype for key, it in wanted.items()}
        assert all(torch.equal(it, wanted[key]) for key, it in found.items())
