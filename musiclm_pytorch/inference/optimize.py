"""MuLaN made ready for inference: half precision, 8-bit integers and compiled code, in a copy of the model.

Only the layers of the two transformers change, from outside. Spectrogram, patches, position bias, norms, residual
stream, latents and loss stay float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from musiclm_pytorch.checks import as_tensor, check_lengths, typechecked
from musiclm_pytorch.extras import needing
from musiclm_pytorch.inference.config import InferenceConfig
from musiclm_pytorch.inference.workers import count_workers, workers
from musiclm_pytorch.kernels.attention import GridBias
from musiclm_pytorch.kernels.processor import computes_in_bf16
from musiclm_pytorch.mulan.display import indented
from musiclm_pytorch.mulan.layers import Linear, Transformer
from musiclm_pytorch.mulan.model import MuLaN, PairLatents
from musiclm_pytorch.mulan.pretrained_towers import check_own

# towers narrower than this compute too little for anything here to pay
MIN_WIDTH = 256


class OptimizedMuLaN(nn.Module):
    """A copy of a MuLaN for inference, with its calls; the caller's model is not touched.

    Waves and ids may lie on any device; what is returned lies on the model's, without gradients.

    Args:
        mulan: the model.
        config: what to trade. A choice left to 'auto' is made for this model and machine.

    Attributes:
        mulan: the copy.
        quantized, dtype, compiled: what was chosen.

    Raises:
        ImportError: quantization without torchao. ValueError: a device that this machine does not have.
    """

    @typechecked
    def __init__(self, mulan: MuLaN, config: InferenceConfig | None = None):
        super().__init__()
        self.config = InferenceConfig() if config is None else config
        device = self.config.torch_device()
        self.quantized, self.dtype, self.compiled = choices(mulan, self.config, device)
        self.mulan = copy.deepcopy(mulan).eval().requires_grad_(False).to(device)

        if self.quantized or self.compiled or self.dtype != torch.float32:
            check_own(mulan.audio, mulan.text, what='OptimizedMuLaN, but in float32,')
            for tower in (self.mulan.audio, self.mulan.text):
                tower.transformer = InferenceLayers(tower.transformer, self.dtype, self.quantized, self.compiled)
        if self.dtype != torch.float32:
            # the largest weight of a small model; the positions, in float32, lift what is looked up back to it
            self.mulan.text.token_emb.to(self.dtype)
        # not with compiled code, which crashes in several threads
        half = self.dtype != torch.float32
        self.side_by_side = half and not self.compiled and not self.config.memory_efficient
        super().train(False)

    def __repr__(self) -> str:
        kind = 'int8' if self.quantized else str(self.dtype).removeprefix('torch.')
        compiled = f'compiled: {self.compiled}'
        how = f'{kind}, {compiled}, {self.items_at_a_time} items at a time'
        return f'{type(self).__name__}({how},\n  {indented(self.mulan)})'

    @property
    def device(self) -> torch.device:
        return self.mulan.device

    @property
    def sample_rate(self) -> int | None:
        """Sample rate in Hz of the waves this model expects, None when it was not told."""
        return self.mulan.sample_rate

    @property
    def items_at_a_time(self) -> int:
        return 1 if self.config.memory_efficient else self.config.batch_size

    def train(self, mode: bool = True) -> OptimizedMuLaN:
        """Only `train(False)`, which changes nothing."""
        if mode:
            raise ValueError('an OptimizedMuLaN cannot be trained; train the MuLaN it was made from, and make it anew')
        return self

    @torch.no_grad()
    def get_audio_latents(
        self,
        wavs: Tensor,
        return_all_layers: bool = False,
        audio_lengths: Tensor | Sequence[int] | None = None,
        sample_rate: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `MuLaN.get_audio_latents`; with `return_all_layers` the whole batch is computed at once."""
        wavs = as_tensor(wavs, self.device)
        wavs = wavs.to(self.device) if isinstance(wavs, Tensor) else wavs
        if return_all_layers or not isinstance(wavs, Tensor) or wavs.ndim != 2:
            return self.mulan.get_audio_latents(wavs, return_all_layers, audio_lengths, sample_rate)
        if audio_lengths is not None:
            audio_lengths = check_lengths(
                audio_lengths, batch=len(wavs), limit=wavs.shape[1], unit='samples', device=wavs.device
            )

        def embed(part: slice) -> Tensor:
            lengths = None if audio_lengths is None else audio_lengths[part]
            return self.mulan.get_audio_latents(wavs[part], audio_lengths=lengths, sample_rate=sample_rate)

        return self._in_parts(embed, len(wavs))

    @torch.no_grad()
    def get_text_latents(
        self,
        texts: Tensor | None = None,
        raw_texts: Sequence[str] | None = None,
        return_all_layers: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `MuLaN.get_text_latents`; with `return_all_layers` the whole batch is computed at once."""
        if texts is None and raw_texts is not None:
            texts, raw_texts = self.mulan.text.tokenize(raw_texts), None
        texts = texts.to(self.device) if isinstance(texts, Tensor) else texts
        if return_all_layers or raw_texts is not None or not isinstance(texts, Tensor) or texts.ndim != 2:
            return self.mulan.get_text_latents(texts, raw_texts, return_all_layers)
        return self._in_parts(lambda part: self.mulan.get_text_latents(texts[part]), len(texts))

    def _in_parts(self, embed: Callable[[slice], Tensor], total: int) -> Tensor:
        """The latents of a batch, never more than `items_at_a_time` at once, those in threads side by side."""
        together = max(1, min(total, self.items_at_a_time))
        count = count_workers(self.device, together) if self.side_by_side else 1
        size = -(-together // count)
        parts = [slice(start, min(start + size, total)) for start in range(0, total, size)] or [slice(0, 0)]
        embed = torch.no_grad()(embed)  # each thread has its own mode
        count = min(count, len(parts))
        try:
            with nullcontext(map) if count == 1 else workers(count) as run:
                return torch.cat(list(run(embed, parts)))
        except ValueError:
            # a part numbers its items from 0; the whole batch tells which one is bad
            embed(slice(0, total))
            raise

    @torch.no_grad()
    def forward(
        self,
        wavs: Tensor,
        texts: Tensor | None = None,
        raw_texts: Sequence[str] | None = None,
        return_latents: bool = False,
        return_similarities: bool = False,
        return_pairwise_similarities: bool = False,
        audio_lengths: Tensor | Sequence[int] | None = None,
        sample_rate: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `MuLaN.forward`. The loss of a model with the hierarchical loss is computed on the whole batch at once."""
        asked = return_latents, return_similarities, return_pairwise_similarities
        if not any(asked) and self.mulan.multi_layer_contrastive_learning is not None:
            texts = texts.to(self.device) if isinstance(texts, Tensor) else texts
            wavs = wavs.to(self.device) if isinstance(wavs, Tensor) else wavs
            return self.mulan(wavs, texts, raw_texts, audio_lengths=audio_lengths, sample_rate=sample_rate)
        audio = self.get_audio_latents(wavs, audio_lengths=audio_lengths, sample_rate=sample_rate)
        return self.mulan.compare(PairLatents(audio, self.get_text_latents(texts, raw_texts)), *asked)


class InferenceLayers(nn.Module):
    """The layers of a `Transformer`, which is changed, in the precision that was chosen; same call."""

    def __init__(self, transformer: Transformer, dtype: torch.dtype, quantized: bool, compiled: bool):
        super().__init__()
        self.transformer, self.dtype = transformer, dtype
        if quantized:
            with needing('use_quantization needs torchao', 'inference'):
                from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
            int8 = Int8DynamicActivationInt8WeightConfig()
            quantize_(transformer, int8, filter_fn=lambda module, _: isinstance(module, Linear))
        for module in transformer.modules():
            if isinstance(module, Linear) and not quantized:
                module.to(dtype)
        if compiled:
            for _, feed_forward in transformer.layers:
                feed_forward.compile(dynamic=True)

    def forward(self, x: Tensor, bias: GridBias | None = None, mask: Tensor | None = None) -> list[Tensor]:
        # whatever the caller computes in
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.transformer(x, bias=bias, mask=mask)


def choices(mulan: MuLaN, config: InferenceConfig, device: torch.device) -> tuple[bool, torch.dtype, bool]:
    """Whether to quantise, the dtype of the layers, and whether to compile: what a config says, 'auto' resolved.

    'auto' takes what was measured to pay: half precision, on a CPU where there are instructions for bf16, and neither
    8-bit integers nor compiled code. Narrow models stay as they are, and those with towers of `transformers`.
    """
    on_cpu = device.type == 'cpu'
    ours = all(hasattr(it, 'transformer') for it in (mulan.audio, mulan.text))
    wide = ours and max(mulan.audio.dim, mulan.text.dim) >= MIN_WIDTH
    half = config.use_mixed_precision
    if half == 'auto':
        half = wide and (not on_cpu or (config.torch_dtype(device) == torch.bfloat16 and computes_in_bf16()))
    dtype = config.torch_dtype(device) if half else torch.float32
    return config.use_quantization is True, dtype, config.compile_model is True
