"""Semantic tokens from the audio tower of MuLaN: no weights from elsewhere are needed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from musiclm_pytorch.audiolm.semantic import SemanticTokenizer
from musiclm_pytorch.checks import check_positive, records_config, typechecked
from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.model import MuLaN

COLUMNS = ('mean', 'concat')


class MuLaNSemanticTokenizer(SemanticTokenizer):
    """k-means over the hidden states of one layer of MuLaN's audio tower, one token a column of patches.

    A patch spans `patch_size[1]` frames of `spec_hop_length` samples, which is the distance of two tokens: 80 ms with
    the front end of `use_case = 'tonal'`, whose patches hold all bands. Where the grid of patches has several rows,
    the states of a column are averaged or joined. Waves are cut to a multiple of `downsample_factor` samples, and a
    wave of `n` samples gives `n // downsample_factor` tokens.

    Only the layers below the chosen one are kept. Training `mulan` on does not change the tokens.

    Args:
        mulan: a trained MuLaN, or its audio tower; it must take waves and know its sample rate.
        codebook_size: number of different tokens (1,024 in MusicLM, arXiv 2301.11325).
        layer: whose output is used, from 1 to the depth of the tower; by default the one in the middle. Low layers
            tell what sounds in the moment, high ones what the piece is.
        columns: 'mean' of the states in a column of patches, or 'concat'.
        window_seconds: longer waves are encoded in windows of this length; None encodes them whole. No longer than
            the tower's `max_audio_length`.

    Raises:
        ValueError: a tower that takes spectrograms or does not know its rate; a layer that there is not.
    """

    @records_config
    @typechecked
    def __init__(
        self,
        mulan: MuLaN | AudioSpectrogramTransformer,
        codebook_size: int = 1024,
        layer: int | None = None,
        columns: str = 'mean',
        window_seconds: float | None = 10.0,
    ):
        tower = mulan.audio if isinstance(mulan, MuLaN) else mulan
        tower = getattr(tower, '_orig_mod', tower)  # torch.compile wraps it
        if tower.accept_spec:
            raise ValueError('semantic tokens come from waves; this tower was built with accept_spec=True')
        if tower.sample_rate is None:
            raise ValueError('the tower does not know its sample rate; build it with audio_sample_rate')
        layer = (tower.depth + 1) // 2 if layer is None else layer
        if not 1 <= layer <= tower.depth:
            raise ValueError(f'layer must lie between 1 and the depth of the tower, {tower.depth}, got {layer}')
        if columns not in COLUMNS:
            raise ValueError(f"columns must be 'mean' or 'concat', got {columns!r}")
        check_positive(window_seconds=window_seconds)

        patch_bins, patch_frames = tower.patch_size
        bins = tower.spec.bins if tower.log_mel is None else tower.log_mel.filters.shape[1]
        rows = bins // patch_bins
        hop = tower.spec.hop_length * patch_frames
        if tower.max_audio_length is not None:
            if tower.max_audio_length < hop:
                raise ValueError(f'max_audio_length {tower.max_audio_length} is shorter than a token, {hop} samples')
            longest = tower.max_audio_length / tower.sample_rate
            window_seconds = longest if window_seconds is None else min(window_seconds, longest)
        super().__init__(
            dim=tower.dim * (rows if columns == 'concat' else 1),
            codebook_size=codebook_size,
            target_sample_hz=tower.sample_rate,
            downsample_factor=hop,
            receptive_field=hop,
            seq_len_multiple_of=hop,
            window_seconds=window_seconds,
        )
        self.layer = layer
        self.columns = columns
        self.rows = rows
        self.encoder = copy.deepcopy(tower)
        self.encoder.transformer.layers = self.encoder.transformer.layers[:layer]
        self.encoder.max_audio_length = None  # the window keeps to it
        self.encoder.requires_grad_(False)
        self.eval()

    def _encode(self, wavs: Tensor) -> Tensor:
        tokens = wavs.shape[1] // self.downsample_factor
        # a short wave, or a spectrogram that is not centred, lacks a few samples for the last patch
        missing = self.encoder.spec.min_samples(tokens * self.encoder.patch_size[1]) - wavs.shape[1]
        wavs = F.pad(wavs, (0, max(0, missing)))
        states = self.encoder(wavs.to(self.encoder.norm.learned_gamma.dtype), return_encoding=True).layers[-1]
        states = rearrange(states, 'b (y x) d -> b y x d', y=self.rows)
        if self.columns == 'mean':
            states = reduce(states, 'b y x d -> b x d', 'mean')
        else:
            states = rearrange(states, 'b y x d -> b x (y d)')
        return states[:, :tokens]

    def _saved_keywords(self) -> dict[str, Any]:
        return {**{name: it for name, it in self.config.items() if name != 'mulan'}, 'layer': self.layer}

    def _save_encoder(self, folder: Path) -> dict[str, Any]:
        return {**self.encoder.config, 'depth': self.layer}

    @classmethod
    def _rebuild(cls, folder: Path, keywords: dict[str, Any], encoder: dict[str, Any]) -> MuLaNSemanticTokenizer:
        return cls(AudioSpectrogramTransformer(**encoder), **keywords)
