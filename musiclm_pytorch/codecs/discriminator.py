"""A discriminator of mel spectra, against which a codec of few bits learns to sound sharp."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class AdversarialLosses(NamedTuple):
    """Two that train the codec, and the discriminator's own."""

    adversarial: Tensor
    feature: Tensor
    discriminator_loss: Tensor


class SpectrogramDiscriminator(nn.Module):
    """How real each patch of a spectrogram looks, of half a second and a fifth of the bands (arXiv 1611.07004).

    A loss on levels alone is least where the decoder gives the mean of what the codes leave open, a blur. What a
    discriminator cannot tell from real spectra has no blur, though it is not always what was there.

    Args:
        channels: of the first layer; the last ones have four times as many.
    """

    def __init__(self, channels: int = 32):
        super().__init__()
        widths = (1, channels, 2 * channels, 4 * channels)
        # a band is a step, and a frame of 20 ms the finest time
        shapes = [dict(kernel_size=(5, 3), stride=(2, along), padding=(2, 1)) for along in (1, 2, 2)]
        layers = [nn.Conv2d(*pair, **shape) for *pair, shape in zip(widths, widths[1:], shapes)]
        layers.append(nn.Conv2d(widths[-1], widths[-1], 3, padding=1))
        self.layers = nn.ModuleList(map(weight_norm, layers))
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, levels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Levels `(b, bands, t)`, natural logarithms of amplitudes, to a score a patch, `(b, 1, h, w)`, positive for
        real ones, and what each layer found."""
        maps = [(0.3 * levels + 1.2)[:, None]]  # which brings the levels of ordinary music to about -1 and 1
        for layer in self.layers:
            maps.append(F.leaky_relu(layer(maps[-1]), 0.1))
        return self.last(maps[-1]), maps[1:]

    def losses(self, real: Tensor, made: Tensor) -> AdversarialLosses:
        """Hinge losses, and how far what the layers find lies apart (arXiv 1910.06711), each of which trains its own
        side alone: the first two give gradients to `made`, the last one to the weights."""
        real_scores, real_maps = self(real)
        own = F.relu(1 - real_scores).mean() + F.relu(1 + self(made.detach())[0]).mean()
        self.requires_grad_(False)
        scores, maps = self(made)
        self.requires_grad_(True)
        apart = [(a - b.detach()).abs().mean() / b.detach().abs().mean() for a, b in zip(maps, real_maps)]
        return AdversarialLosses(F.relu(1 - scores).mean(), sum(apart) / len(apart), own)
