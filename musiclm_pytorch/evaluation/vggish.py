"""VGGish (arXiv 1609.09430), the network of the first Fréchet audio distance, under the weight names of torchvggish.

torchvggish on PyPI (0.2) downloads its weights when it is built and needs resampy, so the network stands here.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

SAMPLE_RATE = 16000
WINDOW, HOP, FFT = 400, 160, 512  # samples: 25 ms, 10 ms, and the next power of two
BANDS, LOWEST, HIGHEST = 64, 125.0, 7500.0  # mel bands over that range in Hz
OFFSET = 0.01  # keeps the logarithm of silence finite
PATCH = 96  # frames: 0.96 s
MIN_SAMPLES = WINDOW + (PATCH - 1) * HOP
DIM = 128


def log_mel_patches(wave: Tensor) -> Tensor:
    """The patches `(n, 96, 64)` of a wave `(samples,)` at 16 kHz: log of mel bands of magnitudes, every 10 ms.

    Patches of 0.96 s follow each other without overlap, frames are not padded, and what is left over is dropped.
    """
    window = torch.hann_window(WINDOW, periodic=True, device=wave.device)
    magnitudes = torch.fft.rfft(wave.float().unfold(-1, WINDOW, HOP) * window, n=FFT).abs()
    mel = torch.log(magnitudes @ mel_filters().to(magnitudes) + OFFSET)
    whole = len(mel) // PATCH * PATCH
    return rearrange(mel[:whole], '(n t) f -> n t f', t=PATCH)


def mel_filters() -> Tensor:
    """`(257, 64)` float64: triangles whose sides are straight over mel, not over Hz as usual elsewhere."""

    def to_mel(frequencies: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(frequencies / 700.0)

    bins = to_mel(torch.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1, dtype=torch.float64))[:, None]
    low, high = to_mel(torch.tensor([LOWEST, HIGHEST], dtype=torch.float64))
    edges = torch.linspace(float(low), float(high), BANDS + 2, dtype=torch.float64)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)


class VGGish(nn.Module):
    """Patches `(n, 96, 64)` to embeddings `(n, 128)`, before their last activation and without the PCA of YouTube-8M.

    So do the toolkits that report FAD by VGGish; torchvggish itself goes on to a ReLU.
    """

    def __init__(self):
        super().__init__()
        layers, width = [], 1
        for block in ((64,), (128,), (256, 256), (512, 512)):
            for channels in block:
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
                width = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 6 * 4, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, DIM)
        )

    def forward(self, patches: Tensor) -> Tensor:
        features = self.features(rearrange(patches, 'n t f -> n 1 t f'))
        # TensorFlow's order, which the weights were trained in
        return self.embeddings(rearrange(features, 'n c t f -> n (t f c)'))
