"""The three stages of AudioLM: what each puts into its transformer, its loss, and its next token.

They have the keywords, parameters and numbers of audiolm-pytorch's modules of the same names (`convert.py` takes
weights both ways). A stage tells its own tokens after those that it is given: semantic ones of nothing, coarse acoustic
ones of semantic ones, fine ones of coarse ones. Ids are int64, padded at the end with `PAD`.

The end token is among the labels always, in audiolm-pytorch in training mode alone, so that losses in training and
validation are of the same thing; each item of a batch has it where it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from musiclm_pytorch.audiolm.decode_step import FusedStep, step_for
from musiclm_pytorch.audiolm.transformer import (
    Cache,
    PositionBias,
    Transformer,
    at_least_float32,
    run_position_mlp,
    without_denormals,
)
from musiclm_pytorch.checks import check_positive, records_config, typechecked

Head = tuple[Tensor, Tensor | None]  # weight and bias

PAD = -1
NO_TIMES = 'semantic tokens without repetitions tell no times, which a coarse stage needs that was built with'
T5_NAME = 'google/t5-v1_1-base'  # what audiolm-pytorch encodes texts with, where it is not MuLaN
T5_WIDTHS = {f'google/t5-v1_1-{size}': width for size, width in
             dict(small=512, base=768, large=1024, xl=2048, xxl=4096).items()}  # fmt: skip
PROMPT_BLOCK = 256  # tokens of a prompt computed at once, which bounds memory
EMBEDDINGS, LOGITS = 0.1, 0.02  # standard deviations, see `scale_initial_weights`


class StageTransformer(nn.Module):
    """What the three stages share; use `SemanticTransformer`, `CoarseTransformer` or `FineTransformer`.

    Args:
        dim, depth, heads, dim_head, attn_dropout, ff_dropout, grad_shrink_alpha, rel_pos_bias, flash_attn, num_null_kv,
            num_residual_streams, add_value_residual: of the `Transformer`.
        audio_text_condition: whether it is conditioned by MuLaN, by embeddings of width `cond_dim`, by default `dim`.
        has_condition, t5_name: conditioned by the T5 of audiolm-pytorch, whose width is the default of `cond_dim`.
        reads_text: conditioned by a vector for each token of a text, and does not see the zeros where there is none; a
            trainer with a `text_encoder` sets it.
        cond_as_self_attn_prefix: see conditioning as keys ahead of all tokens, rather than by cross-attention.
        cond_drop_prob: of audiolm-pytorch's trainers; ours have their own.

    Raises:
        ValueError: sizes that are not positive, a T5 of unknown width.
    """

    end_id: int | None = None  # the end token among its own tokens
    num_levels = 1  # of its own tokens, which take turns
    # whether the conditioning's rows of zeros are masked, as audiolm-pytorch's module of the stage does
    masks_empty_conditioning = False

    @typechecked
    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        t5_name: str = T5_NAME,
        has_condition: bool = False,
        cond_dim: int | None = None,
        audio_text_condition: bool = False,
        reads_text: bool = False,
        cond_as_self_attn_prefix: bool = False,
        cond_drop_prob: float = 0.5,
        grad_shrink_alpha: float = 0.1,
        rel_pos_bias: bool = True,
        flash_attn: bool = False,
        dim_head: int = 64,
        num_null_kv: int = 0,
        num_residual_streams: int = 4,
        add_value_residual: bool = True,
    ):
        super().__init__()
        check_positive(dim=dim, depth=depth, heads=heads, cond_dim=cond_dim, dim_head=dim_head)
        self.has_condition, self.reads_text = has_condition or audio_text_condition, reads_text
        self.cond_drop_prob = cond_drop_prob
        self.has_position_bias = rel_pos_bias and not flash_attn
        if cond_dim is None:
            if not audio_text_condition and t5_name not in T5_WIDTHS:
                raise ValueError(f'the width of {t5_name!r} is not known here; say cond_dim')
            cond_dim = dim if audio_text_condition else T5_WIDTHS[t5_name]
        self.conditioning_dim = cond_dim
        self._sizes = dict(
            dim=dim,
            depth=depth,
            heads=heads,
            dim_head=dim_head,
            cross_attend=self.has_condition and not cond_as_self_attn_prefix,
            cond_as_self_attn_prefix=cond_as_self_attn_prefix,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
            grad_shrink_alpha=grad_shrink_alpha,
            flash_attn=flash_attn,
            num_null_kv=num_null_kv,
            num_residual_streams=num_residual_streams,
            add_value_residual=add_value_residual,
        )

    def _add_transformer(self, rel_pos_bias: bool) -> None:
        dim, width = self._sizes['dim'], self.conditioning_dim
        self.proj_text_embed = nn.Linear(width, dim, bias=False) if width != dim else nn.Identity()
        self.transformer = Transformer(**self._sizes, rel_pos_bias=rel_pos_bias)

    @property
    def device(self) -> torch.device:
        return self.transformer.norm.gamma.device

    def read_text(self) -> None:
        """Be conditioned by the vectors of a text's tokens from here on, see `reads_text`."""
        self.reads_text = self.config['reads_text'] = True

    # what a stage gives

    def embed(self, *ids: Tensor) -> Tensor:
        """`(b, n, d)` of given and own tokens `(b, n)`, levels taking turns, each part behind its start token."""
        raise NotImplementedError

    def embed_own(self, ids: Tensor, first: int = 0) -> Tensor:
        """`(b, n, d)` of own tokens `(b, n)`, of which the first is number `first` of all."""
        raise NotImplementedError

    def aligned(self, *given: Tensor, count: int) -> Tensor | None:
        """What is added to the start token and the next `count` own ones of the given tokens `(b, m)`: `(b, 1 + count,
        d)`, or None for nothing."""
        return None

    def bias(self, given: int, own: int) -> PositionBias:
        """The position bias of so many given and own tokens, start tokens added."""
        raise NotImplementedError

    def mask_given(self, ids: Tensor) -> Tensor | None:
        """Which given tokens `(b, n)` are seen."""
        return None

    def own_heads(self) -> list[Head]:
        """The weights of the logits of each level of the own tokens."""
        raise NotImplementedError

    def given_heads(self) -> list[Head]:
        """The same of the given tokens, none where they are not told."""
        return []

    # training

    def features(
        self,
        *ids: Tensor,
        seen: Tensor | None = None,
        conditioning: Tensor | None = None,
        melody: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What each given token, and the token after each of 0 … n own ones, is told from.

        Args:
            ids: given tokens `(b, m)`, unless the stage is semantic, and own ones `(b, n)`, levels taking turns.
            seen: `(b, k)` bool, which places attention looks at, start tokens included.
            conditioning: `(b, q, d)`.
            melody: `(b, k, d)`, of the first own tokens, see `loss`.

        Returns:
            `(b, m, d)`, unless the stage is semantic, and `(b, 1 + n, d)`.
        """
        *given, own = ids
        x = at_least_float32(self.embed(*ids))
        shown = None if not given else self.mask_given(given[0])
        if shown is not None:
            shown = F.pad(shown, (1, x.shape[1] - shown.shape[1] - 1), value=True)
            seen = shown if seen is None else shown & seen
        bias = self.bias(given[0].shape[1] if given else 0, own.shape[1])
        context, context_mask = self.context(conditioning)
        features = self.transformer(x, bias, seen=seen, context=context, context_mask=context_mask)
        if melody is not None:
            features = features + self.place_melody(melody, own.shape[1] + 1, features.shape[1])
        if not given:
            return (features,)
        return features[:, : given[0].shape[1]], features[:, given[0].shape[1] + 1 :]

    def loss(self, *ids: Tensor, conditioning: Tensor | None = None, melody: Tensor | None = None,
             mask_prob: float = 0.0, prefix_loss_weight: float = 1.0) -> Tensor:  # fmt: skip
        """Cross-entropy of the own tokens and of the given ones, a mean over all, in nats; a scalar.

        Args:
            ids: the semantic stage takes semantic tokens `(b, n)`, the coarse one these and coarse codes `(b, t, q)`,
                the fine one coarse and fine codes.
            conditioning: `(b, q, d)` embeddings, for a stage that is conditioned; zeros are the null condition.
            melody: `(b, k, d)` embeddings of the melody at the time of each of the first own tokens, which are added
                to the features that the token is told from; zeros where there is none.
            mask_prob: share of earlier tokens that attention does not see, see `forgetful_mask`.
            prefix_loss_weight: of the tokens that are given; 0 leaves them out.
        """
        *given, own = (rearrange(it, 'b n ... -> b (n ...)') for it in ids)
        labels = with_end(own, self.end_id)
        inputs = labels[:, :-1]
        given_labels = [with_end(it, self.given_end_id) for it in given]
        length = sum(it.shape[1] + 1 for it in (*given_labels, inputs))
        seen = None
        if mask_prob > 0:
            seen = self._forgetful(len(own), length, mask_prob)
        features = self.features(*given_labels, inputs, seen=seen, conditioning=conditioning, melody=melody)
        loss = summed_loss(features[-1], self.own_heads(), labels)
        if given and self.tells_given(prefix_loss_weight):
            loss = loss + summed_loss(features[0], self.given_heads(), given_labels[0]) * prefix_loss_weight
        return loss / self.count_labels(*ids, prefix_loss_weight=prefix_loss_weight)

    def _forgetful(self, batch: int, length: int, mask_prob: float) -> Tensor:
        return forgetful_mask((batch, length), mask_prob, self.device)

    given_end_id: int | None = None

    def tells_given(self, prefix_loss_weight: float) -> bool:
        """Whether the tokens that the stage is given are among the labels of its loss."""
        return prefix_loss_weight != 0 and len(self.given_heads()) > 0

    def count_labels(self, *ids: Tensor, prefix_loss_weight: float = 1.0) -> Tensor:
        """The number of labels that `loss` is the mean over, an int64 scalar.

        With it, the losses of several batches are joined to that of all of them. A label of the given tokens counts as
        one, whatever its weight, unless that is 0. Args as of `loss`.
        """
        *given, own = ids
        counted = [(own, self.end_id)]
        if given and self.tells_given(prefix_loss_weight):
            counted.append((given[0], self.given_end_id))
        return torch.stack([(it != PAD).sum() + (0 if end is None else len(it)) for it, end in counted]).sum()

    # decoding

    @torch.inference_mode()
    def prefill(
        self,
        *ids: Tensor,
        max_tokens: int,
        conditioning: Tensor | None = None,
        negative: Tensor | None = None,
        melody: Tensor | None = None,
        cond_scale: float = 1.0,
        negative_scale: float = 1.0,
        total_tokens: int | None = None,
        compile: bool = False,
    ) -> GenerationState:
        """Read what is given, and go on from there by `decode_step`.

        Args:
            ids: given tokens `(b, m)`, `PAD` and the end token where there are none, unless the stage is semantic; and
                the own tokens so far, `(b, n)`.
            max_tokens: own tokens that there will be at most, those so far included.
            conditioning: `(b, q, d)`; and `negative`, the same of what to keep away from.
            melody: as of `loss`; the null condition has none, the negative one has it.
            cond_scale, negative_scale: of guidance, see `Sampling`.
            total_tokens: how many of a sample are made in all, if others follow; by it, kernels are loaded or not.
            compile: run steps through torch.compile at fixed shapes, on a GPU as a CUDA graph.
        """
        *given, own = ids
        num_given, network = given[0].shape[1] if given else 0, self.transformer
        context, context_mask = self.context(conditioning)
        branches = [] if context is None else [(context, context_mask)]
        is_guided = conditioning is not None and cond_scale != 1
        if is_guided:
            branches.append(
                (torch.zeros_like(context), None if context_mask is None else torch.zeros_like(context_mask))
            )
        if negative is not None:
            branches.append(self.context(negative))
        x = at_least_float32(self.embed(*ids))
        seen = self.mask_given(given[0]) if given else None
        seen = None if seen is None else F.pad(seen, (1, 0), value=True)
        if len(branches) > 1:  # the rows of the one follow those of the other
            x = x.repeat(len(branches), 1, 1)
            context = torch.cat([it for it, _ in branches])
            context_mask = None if context_mask is None else torch.cat([mask for _, mask in branches])
            seen = None if seen is None else seen.repeat(len(branches), 1)
        if melody is not None:
            null = [torch.zeros_like(melody)] if is_guided else []
            melody = self.place_melody(torch.cat([melody, *null, *[melody] * (negative is not None)]), max_tokens)
        capacity = x.shape[1] + max(max_tokens - own.shape[1] - 1, 0)  # nobody asks what follows the last token
        cache = network.start_cache(len(x), capacity, seen=seen, context=context, context_mask=context_mask)
        bias = self.bias(num_given, max_tokens)
        for block in x.split(PROMPT_BLOCK, dim=1):
            features = network(block, bias, cache=cache)[:, -1]
        cache.step = step_for(network, cache, len(x), total_tokens or max_tokens - own.shape[1], compile)
        scales = cond_scale if is_guided else None, negative_scale if negative is not None else None
        aligned = self.aligned(*given, count=max_tokens)
        return GenerationState(cache, bias, features, own.shape[1], *scales, melody, aligned)

    def next_logits(self, state: GenerationState) -> Tensor:
        """`(b, c)` float32 for the next token."""
        heads, step = self.own_heads(), state.cache.step
        linear = step.linear if isinstance(step, FusedStep) else logits_of
        features = state.features
        if state.melody is not None:
            features = features + state.melody[:, state.index]
        logits = at_least_float32(linear(features, *heads[state.index % len(heads)]))
        conditioned, *others = logits.chunk(state.num_branches)
        logits = conditioned
        if state.cond_scale is not None:
            null = others.pop(0)
            logits = null + (conditioned - null) * state.cond_scale
        if state.negative_scale is not None:
            logits = logits + (conditioned - others.pop()) * state.negative_scale
        return logits

    def decode_step(self, state: GenerationState, tokens: Tensor) -> None:
        """Take the next token of each row, `(b,)` int64."""
        x = at_least_float32(self.embed_own(tokens[:, None], state.index))
        if state.aligned is not None:
            x = x + state.aligned[:, state.index + 1, None]
        x = x.repeat(state.num_branches, 1, 1)
        state.features = self.transformer(x, state.bias, cache=state.cache)[:, -1]
        state.index += 1

    # conditioning

    def context(self, conditioning: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the transformer takes of the conditioning, and which of it is seen.

        Raises ValueError where it does not fit the stage.
        """
        name = type(self).__name__
        if self.has_condition != (conditioning is not None):
            raise ValueError(
                f'this {name} was built with conditioning: pass it, of shape (b, n, {self.conditioning_dim})'
                if self.has_condition
                else f'this {name} was built without conditioning: pass none, or say audio_text_condition=True'
            )
        if conditioning is None:
            return None, None
        if conditioning.ndim != 3 or conditioning.shape[-1] != self.conditioning_dim:
            raise ValueError(
                f'this {name} takes conditioning {self.conditioning_dim} wide, got {conditioning.shape[-1]} in '
                f'{tuple(conditioning.shape)}'
            )
        mask = (conditioning != 0).any(dim=-1) if self.masks_empty_conditioning or self.reads_text else None
        weight = getattr(self.proj_text_embed, 'weight', None)
        return at_least_float32(self.proj_text_embed(conditioning if weight is None else conditioning.to(weight))), mask

    def place_melody(self, melody: Tensor, own: int, places: int | None = None) -> Tensor:
        """Melody `(b, k, conditioning dim)` of own tokens as wide as the transformer and as long as `own` places are,
        the last ones of so many `places`."""
        weight = getattr(self.proj_text_embed, 'weight', None)
        melody = at_least_float32(self.proj_text_embed(melody if weight is None else melody.to(weight)))[:, :own]
        return F.pad(melody, (0, 0, (places or own) - own, own - melody.shape[1]))

    # new weights

    @torch.no_grad()
    def scale_initial_weights(self) -> StageTransformer:
        """Scale the embeddings and the weights of the logits of a new stage, and give it back.

        They are drawn with a deviation of 1, as in audiolm-pytorch: the loss of 512 codes begins at 35 to 45 in place
        of ln 512 = 6.2, and a step of Adam hardly moves an embedding of that size.
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(EMBEDDINGS)
        for name, weight in self.named_parameters():
            if name.endswith('start_token'):
                weight.mul_(EMBEDDINGS)
            elif name.endswith('logit_weights'):
                weight.mul_(LOGITS)
        return self


@dataclass
class GenerationState:
    """One batch on its way through a stage: what it has seen, and the features that the next token is told from.

    Its rows are the samples under their conditioning; then, with a `cond_scale`, the same without any; then, with a
    `negative_scale`, under the negative one.
    """

    cache: Cache
    bias: PositionBias
    features: Tensor
    index: int  # of the next token among the own ones
    cond_scale: float | None
    negative_scale: float | None
    melody: Tensor | None  # at the place of each own token
    aligned: Tensor | None  # see `StageTransformer.aligned`

    @property
    def num_branches(self) -> int:
        return 1 + (self.cond_scale is not None) + (self.negative_scale is not None)


class SemanticTransformer(StageTransformer):
    """Semantic tokens from conditioning. Further keywords as of `StageTransformer`."""

    @records_config
    @typechecked
    def __init__(self, *, num_semantic_tokens: int, **shared: Any):
        super().__init__(**shared)
        dim = shared['dim']
        self.num_semantic_tokens = self.codebook_size = num_semantic_tokens
        self.eos_id = self.end_id = num_semantic_tokens
        self.start_token = nn.Parameter(torch.randn(dim))
        self.semantic_embedding = nn.Embedding(num_semantic_tokens + 1, dim)
        self._add_transformer(self.has_position_bias)
        self.to_logits = nn.Linear(dim, num_semantic_tokens + 1)

    def embed(self, ids: Tensor) -> Tensor:
        return torch.cat((start(self.start_token, len(ids)), self.embed_own(ids)), dim=1)

    def embed_own(self, ids: Tensor, first: int = 0) -> Tensor:
        is_real = ids != PAD
        return self.semantic_embedding(ids.masked_fill(~is_real, 0)) * is_real[..., None]

    def bias(self, given: int, own: int) -> PositionBias:
        """Of [start, token, token, …]."""
        codes = torch.arange(1 + own, device=self.device)
        relative = self.transformer.rel_pos_bias
        return PositionBias(None if relative is None else relative(len(codes)), codes)

    def own_heads(self) -> list[Head]:
        return [(self.to_logits.weight, self.to_logits.bias)]

    def _forgetful(self, batch: int, length: int, mask_prob: float) -> Tensor:
        return F.pad(forgetful_mask((batch, length - 1), mask_prob, self.device), (1, 0), value=True)


class CoarseTransformer(StageTransformer):
    """Coarse acoustic codes, level by level of each frame, from semantic tokens. Further keywords as of
    `StageTransformer`.

    By its position bias alone, which audiolm-pytorch has, a coarse token does not know which semantic token is of its
    time, and must learn it from windows of a few tokens. With `semantic_per_frame`, the rate of the semantic tokens
    over that of the frames, an embedding of the semantic token of the time is added to what each code is told from (as
    in SoundStorm, arXiv 2305.09636), so that windows may last seconds. Such a stage has no counterpart in
    audiolm-pytorch.
    """

    masks_empty_conditioning = True

    @records_config
    @typechecked
    def __init__(
        self,
        *,
        codebook_size: int,
        num_coarse_quantizers: int,
        num_semantic_tokens: int,
        project_semantic_logits: bool = True,
        semantic_per_frame: float | None = None,
        **shared: Any,
    ):
        super().__init__(**shared)
        check_positive(semantic_per_frame=semantic_per_frame)
        dim = shared['dim']
        self.num_semantic_tokens, self.codebook_size = num_semantic_tokens, codebook_size
        self.num_coarse_quantizers = self.num_levels = num_coarse_quantizers
        self.semantic_eos_id = self.given_end_id = num_semantic_tokens
        self.coarse_eos_id = self.end_id = codebook_size
        self.semantic_start_token = nn.Parameter(torch.randn(dim))
        self.coarse_start_token = nn.Parameter(torch.randn(dim))
        self.semantic_embedding = nn.Embedding(num_semantic_tokens + 1, dim)
        self.coarse_embedding = nn.Embedding(num_coarse_quantizers * (codebook_size + 1), dim)
        self.coarse_quantize_embedding = nn.Embedding(num_coarse_quantizers, dim)
        self._add_transformer(self.has_position_bias)
        heads = self._sizes['heads']
        self.cross_attn_bias = nn.Parameter(torch.zeros(heads, 1, 1)) if self.has_position_bias else None
        self.to_semantic_logits = nn.Linear(dim, num_semantic_tokens + 1) if project_semantic_logits else None
        self.coarse_logit_weights = nn.Parameter(torch.randn(num_coarse_quantizers, codebook_size + 1, dim))
        self.semantic_per_frame, self.aligned_embedding = semantic_per_frame, None
        if semantic_per_frame is not None:
            self.aligned_embedding = nn.Embedding(num_semantic_tokens, dim)
            nn.init.zeros_(self.aligned_embedding.weight)

    def embed(self, semantic: Tensor, coarse: Tensor) -> Tensor:
        b, seen = len(semantic), self.mask_given(semantic)
        starts = [start(it, b) for it in (self.semantic_start_token, self.coarse_start_token)]
        own = torch.cat((starts[1], self.embed_own(coarse)), dim=1)
        if (aligned := self.aligned(semantic, count=coarse.shape[1])) is not None:
            own = own + aligned
        return torch.cat((starts[0], self.semantic_embedding(semantic.masked_fill(~seen, 0)), own), dim=1)

    def embed_own(self, ids: Tensor, first: int = 0) -> Tensor:
        # padding comes last, where no label looks back at it
        return embed_levels(ids, first, self.coarse_embedding, self.coarse_quantize_embedding, self.codebook_size)

    def aligned(self, semantic: Tensor, *, count: int) -> Tensor | None:
        if self.aligned_embedding is None:
            return None
        # each place is for the frame of the code that follows it
        frames = torch.arange(1 + count, device=semantic.device) // self.num_levels
        semantic = F.pad(semantic, (0, 1), value=PAD)  # what lies behind the last one
        ids = semantic[:, (frames.float() * self.semantic_per_frame).long().clamp(max=semantic.shape[1] - 1)]
        seen = self.mask_given(ids)
        return self.aligned_embedding(ids.masked_fill(~seen, 0)) * seen[..., None]

    def bias(self, given: int, own: int) -> PositionBias:
        """Of [start, semantic …, start, coarse …]; one learned value between the two parts."""
        codes = torch.arange(2 + given + own, device=self.device)
        relative = self.transformer.rel_pos_bias
        if relative is None:
            return PositionBias(None, codes)
        is_coarse, across = codes > given, at_least_float32(self.cross_attn_bias[:, 0])
        return PositionBias(relative(len(codes)), codes, across=across, query_groups=is_coarse, key_groups=is_coarse)

    def mask_given(self, ids: Tensor) -> Tensor:
        """Neither padding nor the end of the semantic tokens is seen."""
        return (ids != PAD) & (ids != self.semantic_eos_id)

    def own_heads(self) -> list[Head]:
        return [(weight, None) for weight in self.coarse_logit_weights]

    def given_heads(self) -> list[Head]:
        layer = self.to_semantic_logits
        return [] if layer is None else [(layer.weight, layer.bias)]


class FineTransformer(StageTransformer):
    """Fine acoustic codes, level by level of each frame, from coarse ones. Further keywords as of `StageTransformer`.

    There is no end token: fine codes end with the coarse ones.
    """

    @records_config
    @typechecked
    def __init__(
        self,
        *,
        num_coarse_quantizers: int,
        num_fine_quantizers: int,
        codebook_size: int,
        project_coarse_logits: bool = True,
        pad_id: int = PAD,
        **shared: Any,
    ):
        super().__init__(**shared)
        dim = shared['dim']
        self.codebook_size, self.pad_id, self.eos_id = codebook_size, pad_id, codebook_size
        self.num_coarse_quantizers = num_coarse_quantizers
        self.num_fine_quantizers = self.num_levels = num_fine_quantizers
        self.coarse_start_token = nn.Parameter(torch.randn(dim))
        self.fine_start_token = nn.Parameter(torch.randn(dim))
        self.coarse_embedding = nn.Embedding(num_coarse_quantizers * codebook_size, dim)
        self.fine_embedding = nn.Embedding(num_fine_quantizers * codebook_size, dim)
        self.coarse_quantize_embedding = nn.Embedding(num_coarse_quantizers, dim)
        self.fine_quantize_embedding = nn.Embedding(num_fine_quantizers, dim)
        self._add_transformer(rel_pos_bias=False)
        self.null_pos_bias = self.pos_bias_mlp = None
        if self.has_position_bias:
            heads, hidden = self._sizes['heads'], dim // 2
            self.null_pos_bias = nn.Parameter(torch.randn(heads, 1, 1))
            layers = nn.Linear(2, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, heads)
            self.pos_bias_mlp = nn.Sequential(*layers)
        self.coarse_logit_weights = None
        if project_coarse_logits:
            self.coarse_logit_weights = nn.Parameter(torch.randn(num_coarse_quantizers, codebook_size, dim))
        self.fine_logit_weights = nn.Parameter(torch.randn(num_fine_quantizers, codebook_size, dim))

    def embed(self, coarse: Tensor, fine: Tensor) -> Tensor:
        b, n = coarse.shape
        frames, rest = divmod(n, self.num_coarse_quantizers)
        if rest or fine.shape[1] > frames * self.num_fine_quantizers:
            raise ValueError(
                f'{n} coarse and {fine.shape[1]} fine tokens are not of the same whole frames, of '
                f'{self.num_coarse_quantizers} and {self.num_fine_quantizers}'
            )
        starts = [start(it, b) for it in (self.coarse_start_token, self.fine_start_token)]
        tables = self.coarse_embedding, self.coarse_quantize_embedding
        coarse = embed_levels(coarse.masked_fill(~self.mask_given(coarse), 0), 0, *tables, self.codebook_size)
        return torch.cat((starts[0], coarse, starts[1], self.embed_own(fine)), dim=1)

    def embed_own(self, ids: Tensor, first: int = 0) -> Tensor:
        return embed_levels(ids, first, self.fine_embedding, self.fine_quantize_embedding, self.codebook_size)

    def bias(self, given: int, own: int) -> PositionBias:
        """Of [start, coarse …, start, fine …], whole frames of coarse ones, by the differences in frame and quantizer.

        Each start token has one learned value with everything, itself too. The MLP takes the differences shifted so
        that they start at zero, hence what it gives depends on the number of frames.
        """
        coarse_levels, fine_levels = self.num_coarse_quantizers, self.num_fine_quantizers
        num_frames, width = given // coarse_levels, 2 * (coarse_levels + fine_levels) - 1  # differences of quantizers
        frames = torch.arange(num_frames, device=self.device)[:, None] * width
        levels = torch.arange(coarse_levels + fine_levels, device=self.device)
        coarse, fine = frames + levels[:coarse_levels], frames + levels[coarse_levels:]
        none = frames.new_zeros(1)
        codes = torch.cat((none, coarse.flatten(), none, fine.flatten()))
        if self.pos_bias_mlp is None:
            return PositionBias(None, codes)
        heights = torch.arange(2 * num_frames - 1, device=self.device)
        table = run_position_mlp(
            self.pos_bias_mlp, torch.cartesian_prod(heights, torch.arange(width, device=self.device))
        )
        is_start = torch.zeros_like(codes)
        is_start[0] = is_start[1 + given] = 1
        return PositionBias(
            table,
            codes,
            zero=(num_frames - 1) * width + coarse_levels + fine_levels - 1,
            across=at_least_float32(self.null_pos_bias[:, 0]),
            query_groups=is_start,
            key_groups=2 * is_start,
        )

    def mask_given(self, ids: Tensor) -> Tensor:
        """Neither padding nor end tokens are seen."""
        return (ids != PAD) & (ids != self.pad_id) & (ids != self.eos_id)

    def own_heads(self) -> list[Head]:
        return [(weight, None) for weight in self.fine_logit_weights]

    def given_heads(self) -> list[Head]:
        weights = self.coarse_logit_weights
        return [] if weights is None else [(weight, None) for weight in weights]

    def loss(self, *ids: Tensor, conditioning: Tensor | None = None, **keywords: Any) -> Tensor:
        coarse, fine = ids
        losses, frames = [], (coarse != PAD).all(dim=-1).sum(dim=-1)
        # the biases of positions depend on how many frames there are, padding among them: see `bias`
        for length in frames.unique().tolist():
            rows = frames == length
            chosen = coarse[rows, :length], fine[rows, :length]
            own = None if conditioning is None else conditioning[rows]
            count = self.count_labels(*chosen, prefix_loss_weight=keywords.get('prefix_loss_weight', 1.0))
            losses.append(super().loss(*chosen, conditioning=own, **keywords) * count)
        count = self.count_labels(*ids, prefix_loss_weight=keywords.get('prefix_loss_weight', 1.0))
        return torch.stack(losses).sum() / count


STAGES = dict(semantic=SemanticTransformer, coarse=CoarseTransformer, fine=FineTransformer)


def start(token: Tensor, batch: int) -> Tensor:
    """A start token `(d,)` before each of a batch: `(b, 1, d)`."""
    return token.expand(batch, 1, -1)


def embed_levels(
    ids: Tensor, first: int, embedding: nn.Embedding, level_embedding: nn.Embedding, codebook_size: int
) -> Tensor:
    """`(b, n, d)` of ids `(b, n)` whose levels take turns, beginning at number `first` of all."""
    levels = torch.arange(first, first + ids.shape[1], device=ids.device) % level_embedding.num_embeddings
    # audiolm-pytorch steps by codebook_size, though a table with end tokens has a row more a level
    return embedding(ids.clamp(min=0) + levels * codebook_size) + level_embedding(levels)


def logits_of(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits, in float32 where weights are of half precision."""
    if weight.dtype.itemsize > 2:
        return F.linear(features, weight, bias)
    return F.linear(features.to(weight.dtype), weight, bias).float()


def with_end(ids: Tensor, end: int | None) -> Tensor:
    """`(b, n)` padded ids with the end token, if there is one, after the last of each: `(b, n + 1)`."""
    if end is None:
        return ids
    lengths = (ids != PAD).sum(dim=-1, keepdim=True)
    return F.pad(ids, (0, 1), value=PAD).scatter(1, lengths, end)


def forgetful_mask(shape: tuple[int, int], prob: float, device: torch.device) -> Tensor:
    """Which of `(b, n)` tokens attention sees: all but a random `prob` of each row, never the first one left out.

    Training with it keeps attention from leaning on a few tokens (forgetful causal masking, arXiv 2210.13432).
    """
    noise = torch.randn(shape, dtype=torch.float32, device=device)
    noise[:, 0] = -torch.inf
    hidden = min(int(shape[-1] * prob), shape[-1] - 1)
    return torch.ones(shape, dtype=torch.bool, device=device).scatter(1, noise.topk(hidden).indices, False)


def summed_loss(features: Tensor, heads: Sequence[Head], labels: Tensor) -> Tensor:
    """The sum of the cross-entropies of the labels that are not padding, in float32 at least.

    Args:
        features: `(b, n, d)`.
        heads: weights `(c, d)` and biases `(c,)` of the logits; they take turns along the sequence.
        labels: `(b, n)`.
    """
    losses = []
    for level, head in enumerate(heads):
        logits = at_least_float32(logits_of(features[:, level :: len(heads)], *head))
        if logits.requires_grad and logits.device.type == 'cpu':
            # probabilities far from the label's may be next to nothing
            logits.register_hook(without_denormals)
        own = labels[:, level :: len(heads)]
        losses.append(F.cross_entropy(logits.flatten(0, 1), own.flatten(), ignore_index=PAD, reduction='sum'))
    return torch.stack(losses).sum()
