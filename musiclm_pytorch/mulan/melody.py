"""Melodies to embeddings: the same tune is the same, whoever plays it (MusicLM, arXiv 2301.11325, section 3.4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from musiclm_pytorch.checks import check_audio, check_positive, check_sample_rate, records_config, typechecked
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.mulan.layers import Transformer, l2norm
from musiclm_pytorch.mulan.spectrogram import Float32Buffers, Spectrogram

LOWEST, HIGHEST = 40, 101  # MIDI numbers of the pitches that are heard: 82 Hz to 2.8 kHz
AT_ONCE = 256  # windows
SHADE = 40.0  # dB below the loudest of a window where a pitch counts as silent


class MelodyEncoder(nn.Module):
    """Waves to one embedding a window of `seconds`, which tells its melody and not who plays it.

        encoder = MelodyEncoder()
        MelodyTrainer(encoder, MelodyPairs(sample_rate=encoder.sample_rate)).train()
        latents = encoder(waves, sample_rate=24000)  # (b, windows, dim_latent)

    A window is a chroma, the spectrum folded to one octave, so that octaves do not matter; a transformer reads it, and
    the mean of its tokens is the embedding.

    Args:
        dim, depth, heads, dim_head: of the transformer.
        dim_latent: width of the embeddings.
        seconds, hop: length of the windows and distance between the beginnings of two.
        bins: of the octave; 12 a semitone each.
        sample_rate: Hz, at which waves are heard; at least 6,000, to hear the highest pitch.

    Raises ValueError for numbers out of range.
    """

    @records_config
    @typechecked
    def __init__(
        self,
        *,
        dim: int = 128,
        depth: int = 3,
        heads: int = 4,
        dim_head: int = 32,
        dim_latent: int = 128,
        seconds: float = 4.0,
        hop: float = 1.0,
        bins: int = 24,
        sample_rate: int = 8000,
    ):
        super().__init__()
        check_positive(dim=dim, dim_latent=dim_latent, seconds=seconds, hop=hop, bins=bins, sample_rate=sample_rate)
        if bins % 12:
            raise ValueError(f'bins must be a multiple of 12, those of the semitones, got {bins}')
        if sample_rate < 6000:
            raise ValueError(f'sample_rate must be at least 6000 Hz, to hear the highest pitch, got {sample_rate}')
        self.dim_latent, self.seconds, self.hop, self.sample_rate = dim_latent, seconds, hop, sample_rate
        self.chroma = Chromagram(bins, sample_rate)
        tokens = max(1, round(seconds * sample_rate / self.chroma.spectrogram.hop_length))
        self.to_tokens = nn.Linear(2 * bins, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(math.ceil(tokens / 2), dim))
        self.transformer = Transformer(dim, depth, dim_head=dim_head, heads=heads)
        self.to_latents = nn.Linear(dim, dim_latent)

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @typechecked
    def forward(self, wavs: Tensor, *, sample_rate: int | None = None) -> Tensor:
        """Embeddings of norm 1, `(b, windows, dim_latent)`, of waves `(b, samples)`.

        Window `i` begins `i · hop` seconds after the wave does; each that begins within it is there, as far as it goes.

        Args:
            sample_rate: of the waves in Hz, by default the encoder's.

        Raises ValueError for another shape or a wave without samples, TypeError for what is no wave.
        """
        wavs = check_audio(wavs, ndim=2, shape='(b, samples)')
        if wavs.shape[1] == 0:
            raise ValueError(f'wavs of shape {tuple(wavs.shape)} have no samples')
        if sample_rate is not None:
            check_sample_rate(sample_rate)
            wavs = resample(wavs, sample_rate, self.sample_rate)
        window, hop = (round(it * self.sample_rate) for it in (self.seconds, self.hop))
        count = -(-wavs.shape[1] // hop)
        wavs = F.pad(wavs.to(self.device), (0, max(0, (count - 1) * hop + window - wavs.shape[1])))
        windows = rearrange(wavs.unfold(1, window, hop)[:, :count], 'b m n -> (b m) n')
        latents = torch.cat([self.embed(some) for some in windows.split(AT_ONCE)])
        return rearrange(latents, '(b m) d -> b m d', b=len(wavs))

    def embed(self, wavs: Tensor) -> Tensor:
        """Embeddings `(b, dim_latent)` of waves `(b, samples)` of a window each, at the encoder's rate."""
        frames = 2 * len(self.positions)
        chroma = self.chroma(wavs)[..., :frames]
        chroma = F.pad(chroma, (0, frames - chroma.shape[-1]))
        x = self.to_tokens(rearrange(chroma, 'b f (n t) -> b n (t f)', t=2).to(self.positions)) + self.positions
        *_, x = self.transformer(x)
        return l2norm(self.to_latents(reduce(x, 'b n d -> b d', 'mean')).float())


class Chromagram(Float32Buffers):
    """Waves `(b, samples)` to how loud each pitch class is, in [0, 1], `(b, bins, frames)`, 20 frames a second."""

    def __init__(self, bins: int, sample_rate: int):
        super().__init__()
        n_fft = 2 ** round(math.log2(0.25 * sample_rate))
        self.spectrogram = Spectrogram(n_fft, n_fft, hop_length=round(0.05 * sample_rate), power=2)
        per_semitone = bins // 12
        pitches = torch.arange(LOWEST * per_semitone, HIGHEST * per_semitone).float() / per_semitone
        hertz = (torch.arange(1, self.spectrogram.bins) * sample_rate).float() / n_fft
        distance = (69 + 12 * torch.log2(hertz / 440))[:, None] - pitches
        # as wide as half a semitone, or as a bin where these lie further apart
        width = (12 * torch.log2(1 + sample_rate / n_fft / hertz)).clamp(min=0.5)[:, None]
        filters = F.pad((1 - (distance / width).abs()).clamp(min=0), (0, 0, 1, 0))
        self.register_buffer('filters', filters / filters.sum(dim=0).clamp(min=1e-6), persistent=False)
        classes = (torch.arange(LOWEST * per_semitone, HIGHEST * per_semitone) % bins).long()
        self.register_buffer('fold', F.one_hot(classes, bins).float(), persistent=False)

    def forward(self, wavs: Tensor) -> Tensor:
        wavs = F.pad(wavs, (0, max(0, self.spectrogram.min_samples(1) - wavs.shape[1])))
        power, _ = self.spectrogram(wavs)
        pitches = power.mT @ self.filters
        decibels = 10 * pitches.clamp(min=1e-10).log10()
        # of silence, which is below -60 dB, nothing is shown
        loudest = decibels.amax(dim=(1, 2), keepdim=True).clamp(min=SHADE - 100.0)
        shaded = ((decibels - loudest) / SHADE + 1).clamp(min=0)
        return ((shaded**2) @ self.fold / 5).mT.tanh()


def semi_hard_triplet_loss(anchors: Tensor, positives: Tensor, margin: float = 0.2) -> Tensor:
    """Triplet loss with semi-hard negatives of the batch (FaceNet, arXiv 1503.03832), a mean over both directions.

    Of each pair, the negative is the nearest one that is further away than the positive; where none is, the furthest.

    Args:
        anchors, positives: `(b, d)` of norm 1; row i of either is of the same thing.
        margin: by which the squared distance to the negative is to exceed that to the positive.

    Raises ValueError for a batch of one, which has no negatives.
    """
    if len(anchors) < 2:
        raise ValueError(f'triplets need a batch of 2 at least, for its negatives, got {len(anchors)}')
    distances = 2 - 2 * anchors @ positives.T
    return (_one_way(distances, margin) + _one_way(distances.T, margin)) / 2


def _one_way(distances: Tensor, margin: float) -> Tensor:
    own = distances.diagonal()[:, None]
    is_own = torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    further = distances.masked_fill(is_own | (distances <= own), torch.inf).amin(dim=1)
    furthest = distances.masked_fill(is_own, -torch.inf).amax(dim=1)
    negative = torch.where(further.isinf(), furthest, further)
    return F.relu(own[:, 0] - negative + margin).mean()
