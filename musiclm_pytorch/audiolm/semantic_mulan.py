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

COLUMNS = ('concat', 'mean')


class MuLaNSemanticTokenizer(SemanticTokenizer):
    """k-means over the states of MuLaN's audio tower, one token a column of patches.

    A patch spans `patch_size[1]` frames of `spec_hop_length` samples, which is the distance of two tokens: 80 ms with
    the front end of `use_case = 'tonal'`, whose patches hold all bands. Where the grid of patches has several rows,
    the states of a column are joined or averaged. Waves are cut to a multiple of `downsample_factor` samples, and a
    wave of `n` samples gives `n // downsample_factor` tokens.

    By default the states are the embedded patches that enter the transformer, before positions are added. Attention,
    trained to tell pieces apart, soon spreads what the piece is over all its patches, and the notes get lost in it: in
    a tower of 4 layers trained on SyntheticMusic, 1,024 tokens tell the pitch class of the highest note in 40 % of the
    frames, 21 % after the first layer, 14 % after the last (chance: 9 %), and 95, 59 and 42 % of them stay the same
    when the clip is cut elsewhere. What the piece is, MuLaN's conditioning tells the stages anyway.

    Only the layers below the chosen one are kept. Training `mulan` on does not change the tokens.

    Args:
        mulan: a trained MuLaN, or its audio tower; it must take waves and know its sample rate.
        codebook_size: number of different tokens (1,024 in MusicLM, arXiv 2301.11325).
        layer: whose output is used, from 1 to the depth of the tower, or 0 for the embedded patches.
        columns: 'concat' or 'mean' of the states in a column of patches.
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
        layer: int = 0,
        columns: str = 'concat',
        window_seconds: float | None = 10.0,
    ):
        tower = mulan.audio if isinstance(mulan, MuLaN) else mulan
        tower = getattr(tower, '_orig_mod', tower)  # torch.compile wraps it
        if tower.accept_spec:
            raise ValueError('semantic tokens come from waves; this tower was built with accept_spec=True')
        if tower.sample_rate is None:
            raise ValueError('the tower does not know its sample rate; build it with audio_sample_rate')
        if not 0 <= layer <= tower.depth:
            raise ValueError(f'layer must lie between 0 and the depth of the tower, {tower.depth}, got {layer}')
        if columns not in COLUMNS:
            raise ValueError(f"columns must be 'concat' or 'mean', got {columns!r}")
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
        self.encoder.transformer.layers = self.encoder.transformer.layers[: max(1, layer)]  # a tower has one
        self.encoder.max_audio_length = None  # the window keeps to it
        self.encoder.requires_grad_(False)
        self.eval()

    def _encode(self, wavs: Tensor) -> Tensor:
        tokens = wavs.shape[1] // self.downsample_factor
        # a short wave, or a spectrogram that is not centred, lacks a few samples for the last patch
        missing = self.encoder.spec.min_samples(tokens * self.encoder.patch_size[1]) - wavs.shape[1]
        wavs = F.pad(wavs, (0, max(0, missing)))
        wavs = wavs.to(self.encoder.norm.learned_gamma.dtype)
        if self.layer == 0:
            states = self._patches(wavs)
        else:
            states = self.encoder(wavs, return_encoding=True).layers[-1]
            states = rearrange(states, 'b (y x) d -> b y x d', y=self.rows)
        if self.columns == 'mean':
            states = reduce(states, 'b y x d -> b x d', 'mean')
        else:
            states = rearrange(states, 'b y x d -> b x (y d)')
        return states[:, :tokens]

    def _patches(self, wavs: Tensor) -> Tensor:
        spec, _ = self.encoder.to_spectrogram(wavs, None)
        patch_bins, patch_frames = self.encoder.patch_size
        height, width = spec.shape[-2] // patch_bins, spec.shape[-1] // patch_frames
        return self.encoder.to_patch_tokens(spec[..., : height * patch_bins, : width * patch_frames])

    def _saved_keywords(self) -> dict[str, Any]:
        return self.config

    def _save_encoder(self, folder: Path) -> dict[str, Any]:
        return {**self.encoder.config, 'depth': max(1, self.layer)}

    @classmethod
    def _rebuild(cls, folder: Path, keywords: dict[str, Any], encoder: dict[str, Any]) -> MuLaNSemanticTokenizer:
        return cls(AudioSpectrogramTransformer(**encoder), **keywords)
