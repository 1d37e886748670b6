"""Semantic tokens from the audio tower of MuLaN: no weights from elsewhere are needed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from musiclm_pytorch.audiolm.semantic import SemanticTokenizer
from musiclm_pytorch.checks import records_config, typechecked
from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.checkpoint import SavedConfig
from musiclm_pytorch.mulan.model import MuLaN
from musiclm_pytorch.mulan.pretrained_towers import check_own

COLUMNS = ('concat', 'mean')


class MuLaNSemanticTokenizer(SemanticTokenizer):
    """k-means over what MuLaN's audio tower hears, one token a column of patches.

    A patch spans `patch_size[1]` frames of `spec_hop_length` samples, which is the distance of two tokens: 80 ms with
    the front end of `use_case = 'tonal'`. Waves are cut to a multiple of `downsample_factor` samples, and a wave of
    `n` samples gives `n // downsample_factor` tokens.

    By default the features of a column are its spectrogram as the tower's front end gives it, normalised over the
    column so that loudness does not count; with `layer`, they are states of the tower. Attention, trained to tell
    pieces apart, spreads what the piece is over all its patches, and the notes get lost in it. 1,024 tokens of a tower
    of 4 layers with 'tonal' patches, on SyntheticMusic:

    | `layer` | None | 0 | 1 | 2 | 4 |
    |---|---|---|---|---|---|
    | pitch class of the highest note, from the token (chance 9 %) | 58 % | 40 % | 21 % | 17 % | 14 % |
    | instrument, from a clip's histogram of tokens (chance 12.5 %) | 86 % | 93 % | 97 % | 97 % | 97 % |
    | tokens that stay the same when the clip is cut elsewhere | 97 % | 95 % | 59 % | 53 % | 42 % |

    What the piece is, MuLaN's conditioning tells the stages anyway.

    The tokenizer keeps a copy of what it needs of the tower: training `mulan` on does not change the tokens.

    Args:
        mulan: a MuLaN, trained if `layer` is given, or its audio tower; it must take waves and know its sample rate.
        codebook_size: number of different tokens (1,024 in MusicLM, arXiv 2301.11325).
        layer: whose output is used, from 1 to the depth of the tower; 0 for the embedded patches that enter the
            transformer, before positions are added; None for the spectrogram.
        columns: 'concat' or 'mean' of the states in a column, where it has several patches; with a layer only.
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
        columns: str = 'concat',
        window_seconds: float | None = 10.0,
    ):
        tower = mulan.audio if isinstance(mulan, MuLaN) else mulan
        tower = getattr(tower, '_orig_mod', tower)  # torch.compile wraps it
        check_own(tower, what='MuLaNSemanticTokenizer (TransformersSemanticTokenizer takes the others)')
        if tower.accept_spec:
            raise ValueError('semantic tokens come from waves; this tower was built with accept_spec=True')
        if tower.sample_rate is None:
            raise ValueError('the tower does not know its sample rate; build it with audio_sample_rate')
        if layer is not None and not 0 <= layer <= tower.depth:
            raise ValueError(f'layer must lie between 0 and the depth of the tower, {tower.depth}, got {layer}')
        if columns not in COLUMNS:
            raise ValueError(f"columns must be 'concat' or 'mean', got {columns!r}")
        if layer is None and columns == 'mean':
            raise ValueError("columns='mean' would blur the spectrogram; choose a layer with it")

        patch_bins, patch_frames = tower.patch_size
        rows = tower.bands // patch_bins
        hop = tower.spec.hop_length * patch_frames
        if tower.max_audio_length is not None:
            if tower.max_audio_length < hop:
                raise ValueError(f'max_audio_length {tower.max_audio_length} is shorter than a token, {hop} samples')
            longest = tower.max_audio_length / tower.sample_rate
            window_seconds = longest if window_seconds is None else min(window_seconds, longest)
        dim_patch = patch_bins * patch_frames if layer is None else tower.dim
        super().__init__(
            dim=dim_patch * (rows if columns == 'concat' else 1),
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
        self.encoder.depth = layer or 1  # no tower has none
        self.encoder.transformer.layers = self.encoder.transformer.layers[: self.encoder.depth]
        self.encoder.max_audio_length = None  # the window keeps to it
        self.encoder.summary = None  # of the whole clip; nothing here reads it
        self.encoder.requires_grad_(False)
        self.eval()

    def _encode(self, wavs: Tensor) -> Tensor:
        tokens = wavs.shape[1] // self.downsample_factor
        # a short wave, or a spectrogram that is not centred, lacks a few samples for the last patch
        missing = self.encoder.spec.min_samples(tokens * self.encoder.patch_size[1]) - wavs.shape[1]
        wavs = F.pad(wavs, (0, max(0, missing)))
        wavs = wavs.to(self.encoder.norm.learned_gamma.dtype)
        if self.layer:
            states = self.encoder(wavs, return_encoding=True).layers[-1]
            states = rearrange(states, 'b (y x) d -> b y x d', y=self.rows)
        else:
            # the first step makes patches of the spectrogram, cropped to whole ones, the others embed them
            to_patches, *embed = self.encoder.to_patch_tokens
            spec, _ = self.encoder.to_spectrogram(wavs, None)
            bins, frames = (size // patch * patch for size, patch in zip(spec.shape[-2:], self.encoder.patch_size))
            states = to_patches(spec[..., :bins, :frames])
            for step in embed if self.layer == 0 else ():
                states = step(states)
        if self.columns == 'mean':
            states = reduce(states, 'b y x d -> b x d', 'mean')
        else:
            states = rearrange(states, 'b y x d -> b x (y d)')
        if self.layer is None:
            states = F.layer_norm(states.float(), states.shape[-1:])
        return states[:, :tokens]

    def _saved_keywords(self) -> dict[str, Any]:
        return self.config

    def _save_encoder(self, folder: Path) -> dict[str, Any]:
        return {**self.encoder.config, 'depth': self.encoder.depth}

    @classmethod
    def _rebuild(cls, config: SavedConfig, verify: bool) -> MuLaNSemanticTokenizer:
        return config.build(cls, 'tokenizer', config.build(AudioSpectrogramTransformer, 'encoder'))
