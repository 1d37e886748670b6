"""Codecs that others have trained: EnCodec, DAC and Mimi, as `transformers` has them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from musiclm_pytorch.audiolm.codec import FrameCodec
from musiclm_pytorch.audiolm.convert import is_of
from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.data.audio import windows
from musiclm_pytorch.pretrained.hub import build_transformers, load_transformers, read_settings

SOFTEST = -100.0  # dB of full scale, root mean square: the first code of a level of loudness; the last one is 0 dB


def fresh(mimi: nn.Module) -> nn.Module:
    """Mimi keeps its codebooks from the first call on, which neither follow it to another device nor are loaded."""
    for module in mimi.quantizer.modules():
        if hasattr(module, '_embed'):
            module._embed = None
    return mimi


class Kind(NamedTuple):
    """What differs between the models, by their `model_type`. Codes are `(b, q, t)`."""

    levels: Callable[[Any], int]  # of a config
    hop: Callable[[Any], int]  # samples a frame
    encode: Callable[[nn.Module, Tensor, int], Tensor]  # waves (b, c, n) and the number of levels
    vectors: Callable[[nn.Module, Tensor], Tensor]  # to (b, d, t)
    decode: Callable[[nn.Module, Tensor], Any]  # has audio_values, (b, n) or (b, c, n)


KINDS = dict(
    encodec=Kind(
        levels=lambda config: config.num_quantizers,
        hop=lambda config: config.hop_length,
        # beneath `EncodecModel.encode`, which knows few numbers of levels and chunks of its own
        encode=lambda model, waves, levels: rearrange(
            model.quantizer.encode(model.encoder(waves))[:levels], 'q b t -> b q t'
        ),
        vectors=lambda model, codes: model.quantizer.decode(rearrange(codes, 'b q t -> q b t')),
        decode=lambda model, codes: model.decode(codes[None], [None]),
    ),
    dac=Kind(
        levels=lambda config: config.n_codebooks,
        hop=lambda config: config.hop_length,
        encode=lambda model, waves, levels: model.encode(waves, n_quantizers=levels).audio_codes,
        vectors=lambda model, codes: model.quantizer.from_codes(codes)[0],
        decode=lambda model, codes: model.decode(audio_codes=codes),
    ),
    mimi=Kind(
        levels=lambda config: config.num_quantizers,
        hop=lambda config: config.frame_size,
        encode=lambda model, waves, levels: fresh(model).encode(waves, num_quantizers=levels).audio_codes,
        vectors=lambda model, codes: fresh(model).quantizer.decode(codes),
        decode=lambda model, codes: fresh(model).decode(codes),
    ),
)


class PretrainedCodec(FrameCodec):
    """A neural codec of `transformers`, frozen: EnCodec (arXiv 2210.13438), DAC (2306.06546) or Mimi (2410.00037).

        codec = PretrainedCodec('facebook/encodec_24khz', num_quantizers=8)
        codes = codec.encode(waves)  # (b, samples // 320, 8) int64
        waves = codec.decode(codes)  # (b, samples)

    Waves are mono: a stereo model is given the wave on both channels, and what it makes is mixed down. A wave gives as
    many frames as fit into it whole, and each of them gives `downsample_factor` samples.

    EnCodec of 48 kHz works on chunks of a second, each brought to one loudness, which it keeps beside the codes. Here
    the first level of codes is that loudness, in dB, so that stages learn it with the rest; the others are the model's.
    Chunks are encoded one after another, the last one ends with the wave; decoded ones overlap by an eighth and are
    crossfaded, wherever they begin.

    Args:
        model: folder of a model, its name on the Hugging Face Hub, its config, or a model, which is copied.
        num_quantizers: levels of codes, the first ones of the model; with a level of loudness, that is one of them.

    Raises:
        FileNotFoundError: no such model. ValueError: a model of another kind or with fewer levels, weights that do not
        fit.
    """

    unlike = 'it is trained already'

    @typechecked
    def __init__(self, model: str | Path | dict | nn.Module, num_quantizers: int = 8):
        nn.Module.__init__(self)  # the parent's own would build networks
        check_positive(num_quantizers=num_quantizers)
        if isinstance(model, nn.Module):
            model = copy.deepcopy(model)
            check_kind(getattr(getattr(model, 'config', None), 'model_type', None), f'a {type(model).__name__}')
        elif isinstance(model, dict):
            check_kind(model.get('model_type'), 'the config')
            model = build_transformers(model)
        else:
            check_kind(read_settings(model).get('model_type'), str(model))
            model = load_transformers(model)
        settings = model.config
        self.kind = settings.model_type
        self.has_loudness = getattr(settings, 'normalize', False)
        levels = KINDS[self.kind].levels(settings) + self.has_loudness
        if not self.has_loudness < num_quantizers <= levels:
            raise ValueError(
                f'this {type(model).__name__} gives {1 + self.has_loudness} to {levels} levels of codes, got '
                f'num_quantizers={num_quantizers}'
            )
        self.target_sample_hz, self.strides = settings.sampling_rate, (KINDS[self.kind].hop(settings),)
        self.codebook_size, self.num_quantizers, self.rq_groups = settings.codebook_size, num_quantizers, 1
        chunk = getattr(settings, 'chunk_length', None)
        self.window = None if chunk is None else max(1, chunk // self.downsample_factor)  # in frames
        self.channels = getattr(settings, 'audio_channels', 1)
        if self.kind == 'encodec':  # it would compute the others, too
            model.quantizer.layers = model.quantizer.layers[: num_quantizers - self.has_loudness]
        self.model = model.float().requires_grad_(False)
        self.config = dict(model=json.loads(settings.to_json_string()), num_quantizers=num_quantizers)
        self.eval()

    @classmethod
    def from_audiolm(cls, codec: nn.Module) -> PretrainedCodec:
        """audiolm-pytorch's `EncodecWrapper`: the same codes and waves, and it can be saved without pickle."""
        from transformers import EncodecConfig, EncodecModel

        if not is_of(codec, 'EncodecWrapper'):
            raise TypeError(f'codec must be an EncodecWrapper of audiolm-pytorch, got a {type(codec).__name__}')
        state = {}
        for name, tensor in codec.model.state_dict().items():
            for theirs, ours in ENCODEC_NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = tensor
        model = EncodecModel(EncodecConfig())
        model.load_state_dict(state)
        return cls(model, codec.num_quantizers).to(tensor.device)

    def train(self, mode: bool = True) -> PretrainedCodec:
        """Stays in eval mode, also where a wrapper that trains sets the mode of all that it holds."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, waves: Tensor) -> Tensor:
        frames, codes = self.count_frames(waves), []
        done = 0
        for start, stop in windows(frames, self.window or frames, self.window or frames):
            part = waves[:, start * self.downsample_factor : stop * self.downsample_factor]
            codes.append(self._encode(part.float())[:, done - start :])
            done = stop
        return torch.cat(codes, dim=1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        batch, frames, _ = codes.shape
        if frames == 0:
            return torch.zeros(batch, 0, dtype=torch.float32, device=self.device)
        window = self.window or frames
        made = torch.zeros(batch, 0, dtype=torch.float32, device=self.device)
        for start, stop in windows(frames, window, window - window // 8 if self.window else window):
            part = self._decode(codes[:, start:stop])
            overlap = made.shape[1] - start * self.downsample_factor
            fade = torch.linspace(0, 1, overlap + 2, dtype=torch.float32, device=self.device)[1:-1]
            kept, before = made[:, : len(made[0]) - overlap], made[:, len(made[0]) - overlap :]
            made = torch.cat((kept, before + fade * (part[:, :overlap] - before), part[:, overlap:]), dim=1)
        return made

    @torch.no_grad()
    def vectors_of(self, codes: Tensor) -> Tensor:
        return rearrange(KINDS[self.kind].vectors(self.model, self._own(codes)), 'b d t -> b t d')

    def _encode(self, waves: Tensor) -> Tensor:
        """One window, `(b, samples)` to `(b, t, q)`."""
        loudness = []
        if self.has_loudness:
            power = reduce(waves.double().square(), 'b n -> b 1 1', 'mean')
            steps = (self.codebook_size - 1) * (1 - 10 * power.clamp(min=1e-20).log10() / SOFTEST)
            loudness = [steps.round().long().clamp(0, self.codebook_size - 1)]
            waves = waves / self._gain(loudness[0])[..., 0]
        with torch.autocast(waves.device.type, enabled=False):
            waves = repeat(waves, 'b n -> b c n', c=self.channels)
            codes = KINDS[self.kind].encode(self.model, waves, self.num_quantizers - self.has_loudness)
        codes = rearrange(codes, 'b q t -> b t q')
        return torch.cat([*(repeat(it, 'b 1 1 -> b t 1', t=codes.shape[1]) for it in loudness), codes], dim=-1)

    def _decode(self, codes: Tensor) -> Tensor:
        """One window, `(b, t, q)` to `(b, samples)`."""
        samples = codes.shape[1] * self.downsample_factor
        with torch.autocast(codes.device.type, enabled=False):
            waves = KINDS[self.kind].decode(self.model, self._own(codes)).audio_values
        if waves.ndim == 3:
            waves = reduce(waves, 'b c n -> b n', 'mean')
        # DAC's layers of an odd stride lose some samples at the end
        waves = nn.functional.pad(waves, (0, max(0, samples - waves.shape[1])))[:, :samples]
        if self.has_loudness:
            waves = waves * repeat(self._gain(codes[..., :1]), 'b t 1 -> b (t n)', n=self.downsample_factor)
        return waves

    def _own(self, codes: Tensor) -> Tensor:
        """The levels that are the model's own, `(b, t, q)` to `(b, q, t)`."""
        if codes.shape[-1] <= self.has_loudness:
            first = ', of which the first is loudness alone' if self.has_loudness else ''
            raise ValueError(
                f'codes need at least {1 + self.has_loudness} of the {self.num_quantizers} levels{first}; got '
                f'{codes.shape[-1]}'
            )
        return rearrange(codes[..., self.has_loudness :], 'b t q -> b q t')

    def _gain(self, loudness: Tensor) -> Tensor:
        """Codes of loudness to root mean squares."""
        return 10 ** (SOFTEST / 20 * (1 - loudness / (self.codebook_size - 1)))


# how the package `encodec` names what `transformers` names otherwise
ENCODEC_NAMES = {
    'coder.model.': 'coder.layers.',
    'conv.conv.': 'conv.',
    'convtr.convtr.': 'conv.',
    'quantizer.vq.': 'quantizer.',
    '_codebook.': 'codebook.',
    'weight_g': 'parametrizations.weight.original0',
    'weight_v': 'parametrizations.weight.original1',
}


def check_kind(model_type: Any, source: str) -> None:
    """Raises ValueError for a model that is none of `KINDS`."""
    if model_type not in KINDS:
        what = 'does not say which model it is' if model_type is None else f'is a {model_type!r}'
        raise ValueError(f'{source} {what}; the codecs that are read are those of model_type {", ".join(KINDS)}')
