"""Semantic tokens from pretrained audio models: HuBERT, MERT, w2v-BERT, WavLM, Whisper, CLAP and their like."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

from musiclm_pytorch.audiolm.convert import is_of
from musiclm_pytorch.audiolm.semantic import SemanticTokenizer
from musiclm_pytorch.checks import check_sample_rate, typechecked
from musiclm_pytorch.mulan.checkpoint import SavedConfig
from musiclm_pytorch.pretrained.hearing import CLAP, KINDS, extract, framing_of, hearing_part, load_hearing, padded_to
from musiclm_pytorch.pretrained.hub import find_encoder, load_processor, save_encoder


class TransformersSemanticTokenizer(SemanticTokenizer):
    """k-means over the hidden states of one layer of an audio encoder of `transformers`.

        tokenizer = TransformersSemanticTokenizer('facebook/hubert-base-ls960', layer=9)
        tokenizer.fit(dataset)

    Any encoder that keeps its layers in `encoder.layers` will do: HuBERT, wav2vec 2.0, WavLM, w2v-BERT 2.0 and more,
    and MERT where it differs from HuBERT in name only; no code of a repository is run. A wave of `n` samples gives
    `(n - receptive field) // downsample_factor + 1` tokens, for HuBERT at 16 kHz `(n - 400) // 320 + 1`: one less than
    `n // 320` where `n` is a multiple of 320.

    Whisper's encoder and the audio tower of CLAP will do as well. They were made for windows of one length, 30 and
    10 s: shorter waves are padded with silence, longer ones encoded window by window, and `n` samples give
    `n // downsample_factor` tokens, 50 a second for Whisper, 3.2 for CLAP, of whose layers only the last can be used.

    Only the layers below the chosen one are kept.

    Args:
        model: folder of a model, its name on the Hugging Face Hub, or a model.
        codebook_size: number of different tokens.
        layer: whose output is used, counted from 1, before any final norm: fairseq's `output_layer`. MusicLM takes the
            7th of w2v-BERT, open-musiclm the 7th of MERT, audiolm-pytorch the 9th of HuBERT.
        feature_extractor: what prepares the waves, one of `transformers`; by default the one saved beside the model.
            Where there is none, waves go to the model as they are, and `target_sample_hz` has to be given.
        target_sample_hz: rate in Hz that the model was trained at; by default the feature extractor's.
        seq_len_multiple_of: cut waves to a multiple of so many samples.
        window_seconds: longer waves are encoded in windows of this length; None encodes them whole.

    Raises:
        FileNotFoundError: no such model. ValueError: a model of another kind, a layer that there is not, weights that
        do not fit.
    """

    @typechecked
    def __init__(
        self,
        model: str | Path | nn.Module,
        codebook_size: int = 1024,
        layer: int = 7,
        feature_extractor: Any = None,
        target_sample_hz: int | None = None,
        seq_len_multiple_of: int | None = None,
        window_seconds: float | None = 30.0,
    ):
        if isinstance(model, nn.Module):
            model = hearing_part(copy.deepcopy(model))
        else:
            source, model = model, load_hearing(model)
            if feature_extractor is None:
                feature_extractor = _load_feature_extractor(source, required=target_sample_hz is None)
        name, stack = type(model).__name__, _stack(model)
        layers = getattr(stack, 'layers', None)
        kind = getattr(getattr(model, 'config', None), 'model_type', None)
        if not isinstance(layers, nn.ModuleList) or (model.config.is_encoder_decoder and kind != 'whisper'):
            raise ValueError(
                f'a {name} is no audio encoder that is read: those are models of transformers with layers in '
                f'encoder.layers, such as HuBERT, MERT and w2v-BERT, and those of model_type {", ".join(KINDS)}'
            )
        lowest = len(layers) if KINDS.get(kind) is CLAP else 1
        if not lowest <= layer <= len(layers):
            depth = f'1 and the depth of this {name}, {len(layers)}'
            raise ValueError(
                f'layer must lie between {depth}, got {layer}'
                if lowest == 1
                else f'layer must be {lowest}, got {layer}'
            )

        rate = getattr(feature_extractor, 'sampling_rate', None)
        if target_sample_hz is None:
            target_sample_hz = rate
        if target_sample_hz is None:
            raise ValueError('without a feature_extractor, say which rate the model was trained at: target_sample_hz')
        if rate is not None and target_sample_hz != rate:
            raise ValueError(f'target_sample_hz is {target_sample_hz}, but the feature extractor works at {rate} Hz')
        check_sample_rate(target_sample_hz)
        longest = padded_to(feature_extractor)
        if longest is not None:
            window_seconds = min(window_seconds or math.inf, longest / target_sample_hz)
        downsample_factor, receptive_field = framing_of(model, feature_extractor, target_sample_hz)

        super().__init__(
            dim=model.config.hidden_size,
            codebook_size=codebook_size,
            target_sample_hz=target_sample_hz,
            downsample_factor=downsample_factor,
            receptive_field=receptive_field,
            seq_len_multiple_of=seq_len_multiple_of,
            window_seconds=window_seconds,
        )
        self.layer = layer
        self.window_seconds = window_seconds
        self.feature_extractor = feature_extractor
        self.padded_to = longest  # samples of the window that every wave is padded to, or None
        stack.layers = layers[:layer]
        model.config.num_hidden_layers = layer
        self.encoder = model.requires_grad_(False)
        self.eval()

    @classmethod
    def from_fairseq(
        cls, checkpoint_path: str | Path, *, layer: int = 9, target_sample_hz: int = 16000, **keywords: Any
    ) -> TransformersSemanticTokenizer:
        """A HuBERT in a checkpoint of fairseq, such as `hubert_base_ls960.pt`, with centres still to fit.

        The waves go to the model as they are, as in audiolm-pytorch. Further keywords as in the constructor.
        """
        from fairseq.checkpoint_utils import load_model_ensemble_and_task

        (model, *_), *_ = load_model_ensemble_and_task([str(checkpoint_path)])
        return cls(_hubert_of(model), layer=layer, target_sample_hz=target_sample_hz, **keywords)

    @classmethod
    def from_audiolm(cls, tokenizer: nn.Module) -> TransformersSemanticTokenizer:
        """audiolm-pytorch's own tokenizer, centres included: the same tokens, and it can be saved without pickle.

        `HubertWithKmeans` unpickles the file of its k-means: build it from files that you trust.
        """
        if not is_of(tokenizer, 'HubertWithKmeans') or isinstance(tokenizer, SemanticTokenizer):
            raise TypeError(
                f'tokenizer must be a HubertWithKmeans of audiolm-pytorch, got a {type(tokenizer).__name__}'
            )
        if tokenizer.output_layer is None:
            raise ValueError('output_layer=None is the output after the final norm; name the layer')
        adapted = cls(
            _hubert_of(tokenizer.model),
            codebook_size=tokenizer.codebook_size,
            layer=tokenizer.output_layer,
            target_sample_hz=tokenizer.target_sample_hz,
            seq_len_multiple_of=tokenizer.seq_len_multiple_of,
            window_seconds=None,
        )
        adapted.kmeans.set(tokenizer.cluster_centers)
        return adapted.to(tokenizer.cluster_centers.device)

    def _encode(self, wavs: Tensor) -> Tensor:
        inputs, tokens = wavs, self.num_tokens(wavs.shape[1])
        if self.feature_extractor is not None:
            wavs = wavs[:, : self.padded_to]
            inputs = extract(self.feature_extractor, wavs.cpu().numpy()).to(wavs.device)
        inputs = inputs.to(self.encoder.dtype)
        if hasattr(self.encoder, 'audio_model'):  # CLAP
            longer = torch.zeros(len(inputs), 1, dtype=torch.bool, device=inputs.device)
            heard = self.encoder.audio_model(inputs, is_longer=longer).last_hidden_state
            return reduce(heard, 'b d f t -> b t d', 'mean')[:, :tokens]
        states = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        # of the layer itself: what models report as hidden states differs by a final norm between them
        hook = _stack(self.encoder).layers[-1].register_forward_hook(keep)
        try:
            self.encoder(inputs)
        finally:
            hook.remove()
        return states[0] if self.padded_to is None else states[0][:, :tokens]

    def _saved_keywords(self) -> dict[str, Any]:
        return dict(
            codebook_size=self.codebook_size,
            layer=self.layer,
            target_sample_hz=self.target_sample_hz,
            seq_len_multiple_of=self.seq_len_multiple_of,
            window_seconds=self.window_seconds,
        )

    def _save_encoder(self, folder: Path) -> dict[str, Any]:
        has_extractor = self.feature_extractor is not None
        parts = (self.encoder, self.feature_extractor) if has_extractor else (self.encoder,)
        return dict(feature_extractor=has_extractor, **save_encoder(folder, *parts))

    def _saved_weights(self) -> dict[str, Tensor]:
        return {name: it for name, it in self.state_dict().items() if not name.startswith('encoder.')}

    @classmethod
    def _rebuild(cls, config: SavedConfig, verify: bool) -> TransformersSemanticTokenizer:
        return config.build(cls, 'tokenizer', find_encoder(config, verify))


def _hubert_of(model: nn.Module) -> nn.Module:
    hubert = getattr(model, 'hubert', None)
    if hubert is None:
        raise TypeError(
            f'expected the HuBERT of the stand-in for fairseq in compat/fairseq, got a {type(model).__module__}.'
            f'{type(model).__name__}; install the stand-in'
        )
    return hubert


def _stack(model: nn.Module) -> nn.Module | None:
    """What has the layers."""
    return model.audio_model.audio_encoder if hasattr(model, 'audio_model') else getattr(model, 'encoder', None)


def _load_feature_extractor(source: str | Path, *, required: bool) -> Any:
    try:
        return load_processor(source, 'AutoFeatureExtractor')
    except FileNotFoundError as error:
        if not required:
            return None
        raise FileNotFoundError(
            f'{source} has no feature extractor (preprocessor_config.json), or there is no such model; if its waves '
            'need no preparation, pass target_sample_hz, the rate in Hz that it was trained at'
        ) from error
