"""Short tones for codecs, and how far codecs are from them."""

import torch
from torch.utils.data import Dataset

from musiclm_pytorch.audiolm.convert import CoarseTransformer, CoarseTransformerWrapper
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.audiolm.tokens import compute_tokens

RATE = 4000


def notes(count, seconds=1.0, seed=0):
    """`(count, samples)`: each a row of short tones with overtones."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(round(RATE * seconds)) / RATE
    pitch = 200 * 2 ** (torch.randint(0, 12, (count, 4), generator=generator) / 12)
    hertz = pitch.repeat_interleave(len(time) // 4, dim=1)
    return sum(0.1 / k * torch.sin(2 * torch.pi * k * hertz * time) for k in (1, 2, 3))


def loudness(waves):
    return torch.stft(waves, 256, 64, window=torch.hann_window(256), return_complex=True).abs().sqrt()


def distance(first, second):
    return (loudness(first) - loudness(second)).square().mean() / loudness(second).var()


class Notes(Dataset):
    sample_rate = RATE

    def __init__(self, count):
        self.waves = notes(count, seed=5)

    def __len__(self):
        return len(self.waves)

    def __getitem__(self, index):
        return self.waves[index], 'notes'


def check_saved_and_in_audiolm(codec, folder):
    """What is rebuilt from a folder is the same, and a stage and a cache of tokens take it. Returns it."""
    save_module(codec, folder / 'codec')
    loaded = load_module(folder / 'codec')
    waves = notes(2, seed=4)
    assert type(loaded) is type(codec)
    assert torch.equal(loaded(waves, return_recons_only=True), codec(waves, return_recons_only=True))

    transformer = CoarseTransformer(codebook_size=64, num_semantic_tokens=8, num_coarse_quantizers=2, dim=16, depth=1)
    wrapper = CoarseTransformerWrapper(codec=loaded, transformer=transformer)
    semantic = torch.randint(0, 8, (2, 10))
    loss = wrapper(semantic_token_ids=semantic, raw_wave_for_codec=waves, return_loss=True)
    loss.backward()
    assert loss.isfinite()
    compute_tokens(Notes(2), folder / 'tokens', codec=loaded, progress=False)
    return loaded
