"""How far what a codec makes of a wave is from it."""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_pytorch.mulan.spectrogram import mel_filters

WINDOW, HOP = 0.085, 0.021  # seconds
BANDS = 80
DEPTH = 80.0  # dB below a wave's loudest band, under which nothing counts


def mel_distance(waves: Tensor, made: Tensor, sample_rate: int, max_hz: float | None = None) -> Tensor:
    """Mean absolute difference of log-mel power spectra in dB, `(b,)`, of waves `(b, samples)` and their copies.

    80 bands up to `max_hz`, by default half of the sample rate; windows of 85 ms, each 21 ms. Bands more than 80 dB
    below the loudest one of the original count as if they were 80 dB below. It does not hear phases.
    """
    n_fft, hop = 2 * round(WINDOW * sample_rate / 2), round(HOP * sample_rate)
    max_hz = sample_rate / 2 if max_hz is None else max_hz
    filters = mel_filters(BANDS, bins=n_fft // 2 + 1, sample_rate=sample_rate, f_min=0.0, f_max=max_hz).to(waves.device)
    filters = filters[:, filters.sum(dim=0) > 0]  # bands narrower than a bin
    window = torch.hann_window(n_fft, dtype=torch.float32, device=waves.device)

    def levels(x: Tensor) -> Tensor:
        spectrum = torch.stft(x.float(), n_fft, hop, window=window, pad_mode='constant', return_complex=True)
        return 10 * (filters.T @ spectrum.abs().square()).clamp(min=1e-10).log10()

    ours, theirs = levels(waves), levels(made)
    floor = ours.amax(dim=(1, 2), keepdim=True) - DEPTH
    return (ours.maximum(floor) - theirs.maximum(floor)).abs().mean(dim=(1, 2))
