"""HuBERT for features: fairseq's way of calling it, transformers' modules underneath.

HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of Hidden Units
(Hsu et al., 2021, https://arxiv.org/abs/2106.07447)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.settings import config_keywords, settings_of
from fairseq.weights import renamed, require_hubert


class HubertFeatures(nn.Module):
    """A HuBERT that gives features of its layers.

    hubert: a `transformers.HubertModel`.

    It is always in eval mode. Training is not offered, and audiolm-pytorch's wrappers call `train()` on all
    they hold, the tokenizer included: dropout would make its tokens random.
    """

    def __init__(self, hubert: nn.Module):
        super().__init__()
        self.hubert = hubert
        self.eval()

    def train(self, mode: bool = True) -> 'HubertFeatures':
        return super().train(False)

    def forward(
        self,
        source: Tensor,
        target_list: None = None,
        padding_mask: Tensor | None = None,
        mask: bool = True,
        features_only: bool = False,
        output_layer: int | None = None,
    ) -> dict[str, Tensor | None]:
        """Features of a batch of waves. The defaults are fairseq's, whose forward pass is for pretraining, so
        `mask=False, features_only=True` have to be given.

        source: (batch, samples), (batch, 1, samples) or (samples,), floating point, at the rate of the data
            the model was trained on (16 kHz for the published models). The wave is taken as it is, without
            normalising.
        padding_mask: (batch, samples), True where a sample is padding; a frame is padding if all its samples
            are.
        output_layer: the transformer layer whose output is wanted, from 1; None for the model's final output.

        Returns a dict:
        x: (batch, frames, dim). With `output_layer` that layer's own output: in models with the layer norm
            first the final norm comes after the last layer and is left out, for the last layer as well. With
            None it is applied.
        padding_mask: (batch, frames), or None if none was given.
        features: (batch, frames, dim), the input of the transformer before positions are added.

        Raises ValueError for values that are not offered or out of range, TypeError for waves that are not
        floating point.
        """
        if mask or not features_only or target_list is not None:
            raise ValueError(
                f'mask={mask}, features_only={features_only} and target_list={type(target_list).__name__} ask for '
                f'pretraining, which this stand-in for fairseq does not offer; pass mask=False, '
                f'features_only=True and no target_list'
            )
        wave = self._checked_wave(source)
        layers = self.hubert.encoder.layers[: self._checked_layer(output_layer)]

        # convolutions: (batch, samples) -> (batch, frames, dim)
        features = self.hubert.feature_extractor(wave).transpose(1, 2)
        features = self.hubert.feature_projection(features)
        features = features[0] if isinstance(features, tuple) else features
        frame_padding = None if padding_mask is None else _frame_padding(padding_mask, wave, features.shape[1])

        # positions
        x = features if frame_padding is None else features.masked_fill(frame_padding[..., None], 0.0)
        x = x + self.hubert.encoder.pos_conv_embed(x)
        norm_first = self.hubert.config.do_stable_layer_norm
        if not norm_first:
            x = self.hubert.encoder.layer_norm(x)

        # The layers one by one: transformers' encoder would run them all, and its record of the last one is
        # before the final norm in some versions and after it in others.
        attention_mask = None if frame_padding is None else _additive_mask(frame_padding, x.dtype)
        for layer in layers:
            x = layer(x, attention_mask=attention_mask)
            x = x[0] if isinstance(x, tuple) else x

        if norm_first and output_layer is None:
            x = self.hubert.encoder.layer_norm(x)
        return {'x': x, 'padding_mask': frame_padding, 'features': features}

    def _checked_wave(self, source: Tensor) -> Tensor:
        """The wave as (batch, samples), in the precision of the model."""
        if not isinstance(source, Tensor) or not source.is_floating_point():
            kind = source.dtype if isinstance(source, Tensor) else type(source).__name__
            raise TypeError(f'expected the wave as a floating point tensor with values in [-1, 1], not {kind}')
        wave = source[None] if source.ndim == 1 else source
        wave = wave[:, 0] if wave.ndim == 3 and wave.shape[1] == 1 else wave
        if wave.ndim != 2 or wave.shape[0] == 0:
            raise ValueError(
                f'the wave has shape {tuple(source.shape)}; expected (batch, samples), (batch, 1, samples) '
                f'or (samples,): mix its channels down to one'
            )
        shortest = self._samples_of_one_frame()
        if wave.shape[1] < shortest:
            raise ValueError(
                f'the wave has {wave.shape[1]} samples; HuBERT needs at least {shortest}: pad it with zeros'
            )
        return wave.to(next(self.hubert.parameters()).dtype)

    def _samples_of_one_frame(self) -> int:
        samples = 1
        config = self.hubert.config
        for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
            samples = (samples - 1) * stride + kernel
        return samples

    def _checked_layer(self, output_layer: int | None) -> int:
        depth = len(self.hubert.encoder.layers)
        if output_layer is None:
            return depth
        if type(output_layer) is not int or not 1 <= output_layer <= depth:
            raise ValueError(f'output_layer is {output_layer!r}; this HuBERT has layers 1 to {depth}')
        return output_layer


def build_hubert(checkpoint: Mapping[str, Any], origin: str) -> tuple[HubertFeatures, dict[str, Any]]:
    """The model in a loaded checkpoint, and the checkpoint's settings as plain dicts and lists.

    The model shares the memory of the checkpoint's tensors where those are in single precision.
    origin: what to call the checkpoint in messages.
    Raises ValueError if it does not hold a HuBERT, or one whose settings and parameters do not fit.
    """
    # Here, not above: it takes seconds, and `import fairseq` is paid for by those who load no model.
    from transformers import HubertConfig, HubertModel

    weights = require_hubert(checkpoint, origin)
    settings, cfg = settings_of(checkpoint)
    keywords = config_keywords(settings, {name: tuple(value.shape) for name, value in weights.items()})

    # On the meta device nothing is allocated or initialised, for an extra large model a matter of gigabytes.
    with torch.device('meta'):
        hubert = HubertModel(HubertConfig(**keywords))
        if 'post_extract_proj.weight' not in weights and keywords['conv_dim'][-1] == keywords['hidden_size']:
            hubert.feature_projection.projection = nn.Identity()  # fairseq has no projection between equal widths

    hubert.load_state_dict(renamed(weights, hubert.state_dict(), origin), assign=True)
    return HubertFeatures(hubert), cfg


def _frame_padding(padding_mask: Tensor, wave: Tensor, frames: int) -> Tensor:
    """Which frames are padding throughout: (batch, samples) -> (batch, frames), by equal runs of samples."""
    if padding_mask.shape != wave.shape or padding_mask.dtype != torch.bool:
        raise ValueError(
            f'padding_mask has shape {tuple(padding_mask.shape)} and dtype {padding_mask.dtype}; expected '
            f'{tuple(wave.shape)}, as the wave, and torch.bool with True for padding'
        )
    run = wave.shape[1] // frames
    return padding_mask[:, : run * frames].unflatten(1, (frames, run)).all(dim=-1)


def _additive_mask(frame_padding: Tensor, dtype: torch.dtype) -> Tensor:
    """For attention scores (batch, 1, frames, frames): the lowest finite number on padding, so that a row of
    nothing but padding gives no NaN."""
    batch, frames = frame_padding.shape
    mask = torch.zeros(batch, 1, 1, frames, dtype=dtype, device=frame_padding.device)
    mask = mask.masked_fill(frame_padding[:, None, None], torch.finfo(dtype).min)
    return mask.expand(batch, 1, frames, frames)
