"""What the semantic, coarse and fine stage of AudioLM put into their transformer, and what they read from it.

A `Decoder` holds the weights of a stage ready for decoding. Its `begin` reads the prompt and gives a `Session`, which
gives the logits of the next token and takes the token that was chosen. All of it belongs under torch.inference_mode().
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.audiolm.bridge import (
    CoarseTransformer,
    FineTransformer,
    SemanticTransformer,
    conditioning_dim,
)
from musiclm_pytorch.audiolm.cached_transformer import Cache, CachedTransformer, FixedStep, Layout, Product, layout_for
from musiclm_pytorch.audiolm.embedding import PAD, embed_levels, start
from musiclm_pytorch.audiolm.fused_step import MOST_ROWS, FusedStep
from musiclm_pytorch.audiolm.position_bias import PositionBias, coarse_bias, fine_bias, semantic_bias
from musiclm_pytorch.checks import typechecked

# queries of a prompt computed at once, which bounds the memory of their scores
PROMPT_BLOCK = 256
# rows of the position bias computed at once, for the tokens to come
BIAS_BLOCK = 64


class Session:
    """One batch on its way through a stage. With guidance, the rows without conditioning follow those with it."""

    def __init__(
        self,
        decoder: Decoder,
        prompt: Tensor,
        *,
        bias: PositionBias,
        num_known: int,
        max_tokens: int,
        text_embeds: Tensor | None,
        cond_scale: float,
        key_mask: Tensor | None = None,
    ):
        """prompt: (b, n, d) embeddings, which end with the `num_known` of at most `max_tokens` tokens that are given.
        key_mask: (b, k) bool, which of the first k positions may be seen."""
        self.decoder, self.bias = decoder, bias
        self.cond_scale, self.is_guided = cond_scale, text_embeds is not None and cond_scale != 1
        self.index = num_known
        context, context_mask = decoder.condition(text_embeds, self.is_guided)
        if self.is_guided and key_mask is not None:
            key_mask = key_mask.repeat(2, 1)
        network = decoder.network
        self.capacity = prompt.shape[1] + max(max_tokens - num_known - 1, 0)  # nobody asks what follows the last token
        self.cache = network.start(
            prompt.shape[0] * (2 if self.is_guided else 1),
            self.capacity,
            device=prompt.device,
            key_mask=key_mask,
            context=context,
            context_mask=context_mask,
        )
        self._rows, self._rows_from = None, 0
        for block in self._both(prompt).split(PROMPT_BLOCK, dim=1):
            start = self.cache.length
            stop = start + block.shape[1]
            features = network.extend(block, self._bias_rows(start, stop, num_keys=stop), self.cache)
            self.features = features[:, -1]
        self._step = decoder.step(self.cache, len(self.features))

    def logits(self) -> Tensor:
        """(b, c) float32 for the next token."""
        logits = self.decoder.head(self.features, self.index)
        if self.is_guided:
            with_condition, without = logits.chunk(2)
            logits = without + (with_condition - without) * self.cond_scale
        return logits

    def push(self, tokens: Tensor) -> None:
        """Take the next token of each row, (b,) int64."""
        decoder, position = self.decoder, self.cache.length
        if self._rows is None or position >= self._rows_from + len(self._rows):
            self._rows_from = position
            stop = min(position + BIAS_BLOCK, self.capacity)
            self._rows = self._bias_rows(position, stop, num_keys=self.capacity if decoder.compile else stop)
        row = self._rows[position - self._rows_from][None]
        embeds = self._both(decoder.embed(tokens, self.index)[:, None])
        if self._step is not None:
            features = self._step(embeds, row)
        else:
            features = decoder.network.extend(embeds, row[..., : self.cache.prefix + position + 1], self.cache)
        self.features = features[:, -1]
        self.index += 1

    def _bias_rows(self, start: int, stop: int, num_keys: int) -> Tensor:
        heads = self.decoder.network.heads
        return self.bias.rows(start, stop, num_keys=num_keys, heads=heads, prefix=self.cache.prefix)

    def _both(self, embeds: Tensor) -> Tensor:
        return embeds.repeat(2, 1, 1) if self.is_guided else embeds


class Decoder:
    """Weights of a stage, copied and laid out for decoding: after training on, build a new one.

    On a CPU, float32 and up to 16 rows, a token is one compiled call (`step_kernel.py`); the first on a machine waits
    some seconds for numba. The threads of PyTorch share it.

    compile: run a token's step through torch.compile at fixed shapes, and replay it as a CUDA graph on a GPU, which it
        is meant for: each session is recorded anew, each token looks at all the places there will be, and on a CPU
        the weights are not laid out for few rows
    dtype: of the weight matrices; float32 decodes exactly what the stage computes, bfloat16 faster, None as they are

    Raises ValueError for `num_null_kv` in self-attention together with `flash_attn`, where the stage's own forward
    hides each token from itself.
    """

    # whether the conditioning's rows of zeros are masked, as this stage's own forward does
    masks_empty_conditioning = False

    def __init__(self, transformer: nn.Module, dtype: torch.dtype | None, compile: bool):
        self.transformer, self.compile = transformer, compile
        self.dtype = dtype or next(transformer.parameters()).dtype
        with torch.inference_mode():
            self.layout = layout_for(transformer.device, self.dtype, compile)
            self.network = CachedTransformer(transformer.transformer, dtype=self.dtype, layout=self.layout)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def weight_bytes_a_token(self) -> int:
        """Bytes of the weight matrices that a token has to read."""
        return sum(product.num_bytes for product in self.network.products()) + self.heads[0].num_bytes

    heads: list[Product]

    def step(self, cache: Cache, batch: int) -> FixedStep | FusedStep | None:
        """What extends a generation by one token of each row; None if that is `network.extend`."""
        if self.compile:
            return FixedStep(self.network, cache, batch)
        has_keys = not self.network.crosses or cache.cross_v[0].shape[1] > 0
        if self.layout is Layout.ROWS and batch <= MOST_ROWS and has_keys:
            return FusedStep(self.network, cache, batch)
        return None

    def head(self, features: Tensor, index: int) -> Tensor:
        return self.heads[index % len(self.heads)](features)

    def embed(self, tokens: Tensor, index: int) -> Tensor:
        """(b, d) for the tokens (b,) at place `index` of those this stage makes."""
        raise NotImplementedError

    def condition(self, text_embeds: Tensor | None, is_guided: bool) -> tuple[Tensor | None, Tensor | None]:
        """The context (b, n, d) of the transformer and its mask; zeros for the rows without conditioning."""
        if text_embeds is None:
            return None, None
        context = self.transformer.proj_text_embed(text_embeds).float()
        mask = (text_embeds != 0).any(dim=-1) if self.masks_empty_conditioning else None
        if is_guided:
            context = torch.cat((context, torch.zeros_like(context)))
            mask = None if mask is None else torch.cat((mask, torch.zeros_like(mask)))
        return context, mask

    def check_condition(self, text_embeds: Tensor | None, batch: int, cond_scale: float) -> Tensor | None:
        """`text_embeds` for `batch` rows, on the device of the stage."""
        name = type(self.transformer).__name__
        if text_embeds is None:
            if self.transformer.has_condition:
                raise ValueError(f'this {name} is conditioned: pass text_embeds of shape (batch, n, dim)')
            if cond_scale != 1:
                raise ValueError(f'this {name} has no condition to guide by: cond_scale must be 1, got {cond_scale}')
            return None
        if not self.transformer.has_condition:
            raise ValueError(f'this {name} was built without has_condition, so it takes no text_embeds')
        width = conditioning_dim(self.transformer)
        if text_embeds.ndim != 3 or text_embeds.shape[0] not in (1, batch) or text_embeds.shape[2] != width:
            raise ValueError(
                f'text_embeds must have shape ({batch}, n, {width}), or (1, n, {width}) for all samples, '
                f'got {tuple(text_embeds.shape)}'
            )
        text_embeds = text_embeds.to(self.device, next(self.transformer.parameters()).dtype)
        return text_embeds.expand(batch, -1, -1)


class SemanticDecoder(Decoder):
    """`SemanticTransformer` of audiolm-pytorch, ready for decoding (see `Decoder`)."""

    @typechecked
    @torch.inference_mode()
    def __init__(self, transformer: SemanticTransformer, *, dtype: torch.dtype | None = None, compile: bool = False):
        super().__init__(transformer, dtype, compile)
        self.heads = [
            Product(transformer.to_logits.weight, transformer.to_logits.bias, dtype=self.dtype, layout=self.layout)
        ]
        self.end_id = transformer.eos_id
        self.codebook_size = transformer.num_semantic_tokens

    def embed(self, tokens: Tensor, index: int) -> Tensor:
        return self.transformer.semantic_embedding(tokens).float()

    @torch.inference_mode()
    def begin(
        self, prime: Tensor, *, max_tokens: int, text_embeds: Tensor | None = None, cond_scale: float = 1.0
    ) -> Session:
        """prime: (b, n) tokens given, PAD in front of shorter ones."""
        is_real = prime != PAD
        embeds = self.transformer.semantic_embedding(prime.masked_fill(~is_real, 0))
        # the start token stands right before the first token, so it takes the place of the last padding
        embeds = torch.cat((start(self.transformer.start_token, len(prime)), embeds), dim=1)
        first = (~is_real).sum(dim=1)
        embeds[torch.arange(len(prime), device=prime.device), first] = self.transformer.start_token
        key_mask = torch.arange(embeds.shape[1], device=prime.device) >= first[:, None]
        return Session(
            self,
            embeds.float(),
            bias=semantic_bias(self.transformer, 1 + max_tokens),
            num_known=prime.shape[1],
            max_tokens=max_tokens,
            text_embeds=text_embeds,
            cond_scale=cond_scale,
            key_mask=key_mask,
        )


class CoarseDecoder(Decoder):
    """`CoarseTransformer` of audiolm-pytorch, ready for decoding (see `Decoder`)."""

    masks_empty_conditioning = True

    @typechecked
    @torch.inference_mode()
    def __init__(self, transformer: CoarseTransformer, *, dtype: torch.dtype | None = None, compile: bool = False):
        super().__init__(transformer, dtype, compile)
        self.heads = [
            Product(weight, dtype=self.dtype, layout=self.layout) for weight in transformer.coarse_logit_weights
        ]
        self.end_id = transformer.coarse_eos_id
        self.codebook_size = transformer.codebook_size
        self.num_quantizers = transformer.num_coarse_quantizers

    def embed(self, tokens: Tensor, index: int) -> Tensor:
        return self._embed(tokens, index % self.num_quantizers).float()

    def _embed(self, tokens: Tensor, quantizer: int | Tensor) -> Tensor:
        tables = self.transformer.coarse_embedding, self.transformer.coarse_quantize_embedding
        return embed_levels(tokens, quantizer, *tables, self.codebook_size)

    @torch.inference_mode()
    def begin(
        self,
        semantic_ids: Tensor,
        prime: Tensor,
        *,
        max_frames: int,
        text_embeds: Tensor | None = None,
        cond_scale: float = 1.0,
    ) -> Session:
        """semantic_ids: (b, n), PAD and the end token where there are none. prime: (b, frames, q) codes given."""
        transformer, batch = self.transformer, len(prime)
        is_real = (semantic_ids != PAD) & (semantic_ids != transformer.semantic_eos_id)
        semantic = transformer.semantic_embedding(semantic_ids.masked_fill(~is_real, 0))
        coarse = self._embed(prime, torch.arange(self.num_quantizers, device=prime.device)).flatten(1, 2)
        starts = [start(token, batch) for token in (transformer.semantic_start_token, transformer.coarse_start_token)]
        prompt = torch.cat((starts[0], semantic, starts[1], coarse), dim=1)
        max_tokens = max_frames * self.num_quantizers
        num_semantic = semantic_ids.shape[1]
        return Session(
            self,
            prompt.float(),
            bias=coarse_bias(transformer, num_semantic, 2 + num_semantic + max_tokens),
            num_known=prime.shape[1] * self.num_quantizers,
            max_tokens=max_tokens,
            text_embeds=text_embeds,
            cond_scale=cond_scale,
            key_mask=F.pad(is_real, (1, 0), value=True),
        )


class FineDecoder(Decoder):
    """`FineTransformer` of audiolm-pytorch, ready for decoding (see `Decoder`)."""

    @typechecked
    @torch.inference_mode()
    def __init__(self, transformer: FineTransformer, *, dtype: torch.dtype | None = None, compile: bool = False):
        super().__init__(transformer, dtype, compile)
        self.heads = [
            Product(weight, dtype=self.dtype, layout=self.layout) for weight in transformer.fine_logit_weights
        ]
        self.codebook_size = transformer.codebook_size
        self.num_quantizers = transformer.num_fine_quantizers

    def embed(self, tokens: Tensor, index: int) -> Tensor:
        return self._embed(tokens, index % self.num_quantizers).float()

    def _embed(self, tokens: Tensor, quantizer: int | Tensor) -> Tensor:
        tables = self.transformer.fine_embedding, self.transformer.fine_quantize_embedding
        return embed_levels(tokens, quantizer, *tables, self.codebook_size)

    @torch.inference_mode()
    def begin(
        self,
        coarse_codes: Tensor,
        prime: Tensor,
        *,
        max_frames: int | None = None,
        text_embeds: Tensor | None = None,
        cond_scale: float = 1.0,
    ) -> Session:
        """coarse_codes: (b, t, q), PAD where there are none. prime: (b, frames, q') fine codes given.

        The position bias is that of t frames; at most `max_frames` of them, all by default, can be generated.
        """
        transformer, (batch, num_frames, num_coarse) = self.transformer, coarse_codes.shape
        is_real = (coarse_codes != transformer.pad_id) & (coarse_codes != PAD) & (coarse_codes != transformer.eos_id)
        quantizers = torch.arange(num_coarse, device=prime.device)
        tables = transformer.coarse_embedding, transformer.coarse_quantize_embedding
        coarse = embed_levels(coarse_codes.masked_fill(~is_real, 0), quantizers, *tables, self.codebook_size)
        fine = self._embed(prime, torch.arange(self.num_quantizers, device=prime.device)).flatten(1, 2)
        starts = [start(token, batch) for token in (transformer.coarse_start_token, transformer.fine_start_token)]
        prompt = torch.cat((starts[0], coarse.flatten(1, 2), starts[1], fine), dim=1)
        return Session(
            self,
            prompt.float(),
            bias=fine_bias(transformer, num_frames),
            num_known=prime.shape[1] * self.num_quantizers,
            max_tokens=(num_frames if max_frames is None else max_frames) * self.num_quantizers,
            text_embeds=text_embeds,
            cond_scale=cond_scale,
            key_mask=F.pad(is_real.flatten(1), (1, 0), value=True),
        )
