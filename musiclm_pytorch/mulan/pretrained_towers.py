"""Towers of a MuLaN that others have trained: text and audio encoders of `transformers`, frozen or trained on."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_pytorch.checks import check_finite, check_positive, typechecked
from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.layers import Encoding, masked_mean
from musiclm_pytorch.mulan.text_transformer import TextTransformer
from musiclm_pytorch.pretrained.hearing import (
    KINDS,
    WHISPER,
    extract,
    framing_of,
    hearing_part,
    load_hearing,
    padded_to,
)
from musiclm_pytorch.pretrained.hub import build_transformers, load_processor, load_transformers, read_settings

# the part of a model that reads or hears, by its `model_type`; of all others the model itself
T5 = dict(t5='T5EncoderModel', mt5='MT5EncoderModel', umt5='UMT5EncoderModel')
AST, W2V_BERT = 'audio-spectrogram-transformer', 'wav2vec2-bert'
# weights that nothing here reads: of a second embedding, and of what is masked in training
UNNEEDED = ('pooler.dense.weight', 'pooler.dense.bias', 'masked_spec_embed')


class PretrainedTower(nn.Module):
    """What both towers share: `model`, and whether it is `trained`."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> PretrainedTower:
        super().train(mode)
        if not self.trained:
            self.model.eval()
        return self


class PretrainedTextTransformer(PretrainedTower, TextTransformer):
    """A text encoder of `transformers` as the text tower of a `MuLaN`: T5 and its like, BERT, RoBERTa and theirs.

        text = PretrainedTextTransformer('google-t5/t5-base')
        mulan = MuLaN(audio_transformer, text)

    The embedding of a text is the mean of the last layer over its tokens. Which words the model knows, it does not
    tell, so there are no warnings of unknown ones.

    Args:
        model: folder of a model, its name on the Hugging Face Hub, its config, or a model, which is copied.
        tokenizer: needed with a config or model; otherwise the one beside it.
        max_seq_len: longest text in tokens; by default 256, or what the model can take. A longer one is cut, with one
            warning.
        trained: whether its weights are trained; otherwise they are frozen, and it stays in eval mode.

    Raises:
        FileNotFoundError: no such model. ValueError: one that is no text encoder, a length that it cannot take.
    """

    @typechecked
    def __init__(
        self,
        model: str | Path | dict[str, Any] | nn.Module,
        tokenizer: Any = None,
        max_seq_len: int | None = None,
        trained: bool = False,
    ):
        nn.Module.__init__(self)  # the parent's own would build networks
        check_positive(max_seq_len=max_seq_len)
        if isinstance(model, nn.Module):
            model, source = copy.deepcopy(model), f'a {type(model).__name__}'
        elif isinstance(model, dict):
            source, model = 'a config', build_transformers(model, T5.get(model.get('model_type'), 'AutoModel'))
        else:
            source, kind = str(model), read_settings(model).get('model_type')
            tokenizer = load_processor(source, 'AutoTokenizer') if tokenizer is None else tokenizer
            model = load_transformers(source, T5.get(kind, 'AutoModel'), unneeded=UNNEEDED)
        settings = getattr(model, 'config', None)
        kind = getattr(settings, 'model_type', None)
        if kind in T5 and hasattr(model, 'decoder'):
            model = _encoder_of_t5(model)
        if getattr(model, 'main_input_name', None) != 'input_ids' or (settings.is_encoder_decoder and kind not in T5):
            raise ValueError(f'{source} is no text encoder of transformers, such as T5EncoderModel or BertModel')
        if tokenizer is None:
            raise ValueError(f'{source} needs its tokenizer: PretrainedTextTransformer(model, tokenizer)')
        longest = _longest_text(model)
        if max_seq_len is not None and longest is not None and max_seq_len > longest:
            raise ValueError(f'{source} takes texts of {longest} tokens at most, got max_seq_len={max_seq_len}')
        self.model, self.processor, self.trained = _prepared(model, trained), tokenizer, trained
        self.dim, self.depth, self.num_tokens = settings.hidden_size, settings.num_hidden_layers, settings.vocab_size
        self.max_seq_len = min(256, longest or 256) if max_seq_len is None else max_seq_len
        self.pad_id = tokenizer.pad_token_id
        self.trained_tokens = None  # nobody knows
        self._warned_of_cut = False
        self.config = dict(model=_content(model), max_seq_len=self.max_seq_len, trained=trained)

    @classmethod
    def from_config(
        cls, tokenizer: Any, model: dict[str, Any], max_seq_len: int, trained: bool
    ) -> PretrainedTextTransformer:
        """One like that whose `config` this is, with weights still to come."""
        return cls(model, tokenizer, max_seq_len, trained)

    reads_words = True

    def forward(
        self,
        x: Tensor | None = None,
        raw_texts: Sequence[str] | None = None,
        mask: Tensor | None = None,
        return_all_layers: bool = False,
        return_encoding: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | Encoding:
        """As of `TextTransformer`. Of each layer one vector is given, its mean: `(depth - 1, b, 1, dim)`."""
        x, mask = self.ids_and_mask(x, raw_texts, mask)
        output = self.model(input_ids=x, attention_mask=mask.long(), output_hidden_states=True)
        layers = [masked_mean(it, mask)[:, None] for it in output.hidden_states[1:]]
        return Encoding(masked_mean(output.last_hidden_state, mask), layers).asked(return_all_layers, return_encoding)

    @torch.no_grad()
    def vectors(
        self, x: Tensor | None = None, raw_texts: Sequence[str] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The last layer of each token of ids `(b, n)` or of strings, `(b, n, dim)`, zeros where there is none: what
        stages are conditioned by whose trainer had this as its `text_encoder`."""
        x, mask = self.ids_and_mask(x, raw_texts, mask)
        found = self.model(input_ids=x, attention_mask=mask.long()).last_hidden_state
        return found.masked_fill(~mask[..., None], 0)

    def tokenize(self, raw_texts: Sequence[str]) -> Tensor:
        """Strings to token ids `(b, n)`, cut at `max_seq_len` and padded to the longest."""
        self.check_texts(raw_texts)
        texts = list(raw_texts)
        longest = max(map(len, self.processor(texts, verbose=False)['input_ids']))
        if longest > self.max_seq_len:
            self.warn_of_cut(longest)
        tokens = self.processor(texts, padding=True, truncation=True, max_length=self.max_seq_len, return_tensors='pt')
        return tokens['input_ids'].to(self.device)

    def known_ids(self) -> None:
        return None

    def with_known_tokens(self, known_tokens: Sequence[int]) -> TextTransformer:
        raise TypeError(f'the vocabulary of a {type(self.model).__name__} stays as it is')


class PretrainedAudioTransformer(PretrainedTower, AudioSpectrogramTransformer):
    """An audio encoder of `transformers` as the audio tower of a `MuLaN`: AST; MERT, HuBERT, wav2vec 2.0, WavLM and
    w2v-BERT 2.0; or what hears in Whisper.

        audio = PretrainedAudioTransformer('MIT/ast-finetuned-audioset-10-10-0.4593')
        mulan = MuLaN(audio, text_transformer)

    The embedding of a wave is what AST calls its pooled output; of the others, the mean of the last layer over time.
    AST was made for windows of 10.24 s, Whisper for 30 s: longer waves are cut, with one warning; the silence that pads
    Whisper's is left out of the mean. SpecAugment and layer dropout are off: they leave weights without a gradient.

    Args:
        model: folder of a model, its name on the Hugging Face Hub, its config, or a model, which is copied.
        feature_extractor: what prepares its waves, needed with a config or model; otherwise the one beside it.
        trained: whether its weights are trained; otherwise they are frozen, and it stays in eval mode.

    Raises:
        FileNotFoundError: no such model. ValueError: one that is no audio encoder of waves.
    """

    @typechecked
    def __init__(
        self, model: str | Path | dict[str, Any] | nn.Module, feature_extractor: Any = None, trained: bool = False
    ):
        nn.Module.__init__(self)  # the parent's own would build networks
        if isinstance(model, nn.Module):
            model, source = hearing_part(copy.deepcopy(model)), f'a {type(model).__name__}'
        elif isinstance(model, dict):
            kind = KINDS.get(model.get('model_type'))
            source, model = 'a config', build_transformers(model, 'AutoModel' if kind is None else kind.model)
            model = hearing_part(model)
        else:
            source = str(model)
            if feature_extractor is None:
                feature_extractor = load_processor(source, 'AutoFeatureExtractor')
            model = load_hearing(source, UNNEEDED)
        settings = getattr(model, 'config', None)
        kind = getattr(settings, 'model_type', None)
        self.is_ast, self._is_whisper = kind == AST, KINDS.get(kind) is WHISPER
        hears_waves = getattr(model, 'main_input_name', None) == 'input_values' and hasattr(settings, 'conv_kernel')
        hears_waves = hears_waves and not settings.is_encoder_decoder
        if not (self.is_ast or self._is_whisper or hears_waves or kind == W2V_BERT):
            raise ValueError(
                f'{source} is no audio encoder that is read: those are AST, MERT, HuBERT and their like, w2v-BERT and '
                'Whisper (a CLAP takes the place of the whole MuLaN: PretrainedMuLaN)'
            )
        if feature_extractor is None:
            told = 'PretrainedAudioTransformer(model, feature_extractor)'
            raise ValueError(f'{source} needs its feature extractor: {told}')
        if self._is_whisper:
            model.encoder.layerdrop = settings.encoder_layerdrop = 0.0
        elif not self.is_ast:
            settings.apply_spec_augment, settings.layerdrop = False, 0.0
        self.model, self.processor, self.trained = _prepared(model, trained), feature_extractor, trained
        self.dim, self.depth = settings.hidden_size, settings.num_hidden_layers
        self.sample_rate, self.max_audio_length = feature_extractor.sampling_rate, None
        if self.is_ast:  # frames of 25 ms every 10 ms
            self._samples_a_frame, self._least = self.sample_rate // 100, self.sample_rate // 40
            self.max_audio_length = (settings.max_length - 1) * self._samples_a_frame + self._least
        else:
            self._samples_a_frame, self._least = framing_of(model, feature_extractor, self.sample_rate)
            self.max_audio_length = padded_to(feature_extractor)
        self.accept_spec, self.support_variable_length = False, True
        self._warned_of_cut = False
        self.config = dict(model=_content(model), trained=trained)

    @classmethod
    def from_config(cls, feature_extractor: Any, model: dict[str, Any], trained: bool) -> PretrainedAudioTransformer:
        """One like that whose `config` this is, with weights still to come."""
        return cls(model, feature_extractor, trained)

    @property
    def min_samples(self) -> int:
        """The shortest wave that it takes: one frame."""
        return self._least

    def forward(
        self,
        x: Tensor,
        force_no_patch_dropout: bool = False,
        return_all_layers: bool = False,
        audio_lengths: Tensor | Sequence[int] | None = None,
        return_encoding: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | Encoding:
        """As of `AudioSpectrogramTransformer`, of waves; there are no patches to drop. Of each layer one vector is
        given, its mean: `(depth - 1, b, 1, dim)`."""
        x, lengths = self.check_input(x, audio_lengths)
        lengths = [x.shape[1]] * len(x) if lengths is None else lengths.tolist()
        waves = [wave[:length] for wave, length in zip(x.float(), lengths)]
        for row, wave in enumerate(waves):
            check_finite(wave[None], f'wavs[{row}] holds NaN or infinite samples; clean the data first')
        # AST's extractor pads each wave to one length; for others, those of one length go together, so that nothing is
        # padded and an embedding is that of its own wave
        kinds = [0 if self.is_ast else length for length in lengths]
        rows, parts = [], []
        for kind in sorted(set(kinds)):
            own = [row for row, it in enumerate(kinds) if it == kind]
            rows += own
            parts.append(self._encode([waves[row] for row in own]))
        back = torch.tensor(rows, device=x.device).argsort()
        embeds, *layers = (torch.cat(it)[back] for it in zip(*parts))
        return Encoding(embeds, layers).asked(return_all_layers, return_encoding)

    def _encode(self, waves: list[Tensor]) -> list[Tensor]:
        """The embedding `(b, d)`, and the mean of each layer `(b, 1, d)`."""
        arrays = [it.detach().cpu().numpy() for it in waves]
        if self.is_ast:
            inputs = self.processor(arrays, sampling_rate=self.sample_rate, return_tensors='pt')['input_values']
        else:
            inputs = extract(self.processor, arrays)
        inputs = inputs.to(self.device, next(self.model.parameters()).dtype)
        output = (self.model.encoder if self._is_whisper else self.model)(inputs, output_hidden_states=True)
        frames = len(waves[0]) // self._samples_a_frame if self._is_whisper else None  # the rest is padding
        layers = [masked_mean(it[:, :frames]) for it in (output.last_hidden_state, *output.hidden_states[1:])]
        embeds = output.pooler_output if self.is_ast else layers[0]
        return [embeds, *(it[:, None] for it in layers[1:])]


def check_own(*towers: nn.Module, what: str) -> None:
    """Raise TypeError for a tower that others have trained, where `what` knows the inside of ours alone."""
    for tower in towers:
        if isinstance(tower, PretrainedTower):
            raise TypeError(f'{what} takes towers of our own, not a {type(tower).__name__}')


def _encoder_of_t5(model: nn.Module) -> nn.Module:
    import transformers

    with torch.device('meta'):
        part = getattr(transformers, T5[model.config.model_type])(model.config)
    part.shared, part.encoder = model.shared, model.encoder
    return part


def _longest_text(model: nn.Module) -> int | None:
    """Tokens that a model has positions for; None where these are relative."""
    for name, module in model.named_modules():
        if name.endswith('position_embeddings') and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from behind its padding
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _prepared(model: nn.Module, trained: bool) -> nn.Module:
    """Without what nothing here reads, and frozen unless it is trained."""
    if getattr(model, 'pooler', None) is not None:  # of BERT, on top of its first token alone
        model.pooler = None
    model.requires_grad_(trained)
    if hasattr(model, 'masked_spec_embed'):
        model.masked_spec_embed.requires_grad_(False)
    return model.train(trained)


def _content(model: nn.Module) -> dict[str, Any]:
    return json.loads(model.config.to_json_string())
