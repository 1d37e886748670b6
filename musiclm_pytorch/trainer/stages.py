"""Training the three stages of AudioLM on cached tokens."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Unpack

from musiclm_pytorch.atomic import read_tensors, write_tensors
from musiclm_pytorch.audiolm.convert import own_stage
from musiclm_pytorch.audiolm.crops import TokenCrops, collate_tokens
from musiclm_pytorch.audiolm.fingerprints import fingerprint
from musiclm_pytorch.audiolm.saving import describe
from musiclm_pytorch.audiolm.stages import (
    NO_TIMES,
    PAD,
    CoarseTransformer,
    FineTransformer,
    SemanticTransformer,
    StageTransformer,
)
from musiclm_pytorch.checks import check_not_negative, check_probability, typechecked
from musiclm_pytorch.codecs.melody import MelodyEmbedding
from musiclm_pytorch.collectives import num_launched
from musiclm_pytorch.mulan import checkpoint
from musiclm_pytorch.mulan.lora import ADAPTERS_FOLDER, adapters_of, save_adapters
from musiclm_pytorch.mulan.pretrained_towers import PretrainedTextTransformer
from musiclm_pytorch.quantizer import MELODY_NAMESPACE, MuLaNEmbedQuantizer
from musiclm_pytorch.trainer.callbacks import Callback
from musiclm_pytorch.trainer.config import TrainingConfig, TrainingKeywords
from musiclm_pytorch.trainer.sharding import Sharing
from musiclm_pytorch.trainer.trainer import Trainer

logger = logging.getLogger(__name__)

CONDITIONING_FILE = 'conditioning.safetensors'
MELODY = 'melody.'  # begins the names of its embeddings there


class Stage(nn.Module):
    """A transformer and the conditioning embeddings of its namespace: what is trained together.

    The embeddings are the quantizer's own parameter, so that training them here trains them there. In training, the
    conditioning of a share of the items is all zeros, which is the null condition of guidance when sampling
    (classifier-free guidance, arXiv 2207.12598), melody included; of a further share, only the melody is left out.
    """

    def __init__(
        self,
        transformer: StageTransformer,
        embeddings: nn.Parameter | None,
        *,
        cond_drop_prob: float,
        mask_prob: float,
        prefix_loss_weight: float,
        melody: MelodyEmbedding | None = None,
        melody_drop_prob: float = 0.0,
        melody_per_token: Fraction | None = None,
    ):
        super().__init__()
        self.transformer = transformer
        self.embeddings = embeddings
        self.melody, self.melody_drop_prob, self.melody_per_token = melody, melody_drop_prob, melody_per_token
        self.cond_drop_prob = cond_drop_prob
        self.mask_prob = mask_prob
        self.prefix_loss_weight = prefix_loss_weight

    def forward(
        self,
        semantic: Tensor | None = None,
        codec: Tensor | None = None,
        conditioning: Tensor | None = None,
        melody: Tensor | None = None,
        words: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch of tokens `(b, n)`, `(b, t, q)`, MuLaN's codes `(b, q)` and those of melodies
        `(b, m, q)`, as `collate_tokens` gives; or with the vectors of words `(b, w, d)`."""
        ids = self.ids_of(semantic, codec)
        conditioning, melody = self.embed(conditioning, melody, words, ids[-1].shape[1])
        return self.transformer.loss(
            *ids,
            conditioning=conditioning,
            melody=melody,
            # forgetful masking whenever training, never in validation
            mask_prob=self.mask_prob if self.training else 0.0,
            prefix_loss_weight=self.prefix_loss_weight,
        )

    def count_labels(self, semantic: Tensor | None = None, codec: Tensor | None = None, **_: Tensor) -> Tensor:
        """The number of labels of a batch, which its loss is the mean over."""
        ids = self.ids_of(semantic, codec)
        return self.transformer.count_labels(*ids, prefix_loss_weight=self.prefix_loss_weight)

    def ids_of(self, semantic: Tensor | None, codec: Tensor | None) -> tuple[Tensor, ...]:
        """What the stage is given and what it predicts, the latter last."""
        if isinstance(self.transformer, SemanticTransformer):
            return (semantic,)
        q = self.transformer.num_coarse_quantizers
        if isinstance(self.transformer, CoarseTransformer):
            return semantic, codec[..., :q]
        return codec[..., :q], codec[..., q : q + self.transformer.num_fine_quantizers]

    def embed(
        self, codes: Tensor | None, melody: Tensor | None, words: Tensor | None, tokens: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """`(b, q)` codes to `(b, q, d)` conditioning, or else the vectors of words; and `(b, m, q)` codes of melodies
        to what so many tokens are told of them, `(b, n, d)`. Some items' are dropped in training."""
        if self.embeddings is not None:
            words = self.embeddings[torch.arange(codes.shape[1], device=codes.device), codes]
        if words is None:
            return None, None
        parts = [words]
        if self.melody is not None:
            told = self.melody(melody, tokens, self.melody_per_token)
            parts += self._some_dropped([told], self.melody_drop_prob)
        conditioning, *melody = self._some_dropped(parts, self.cond_drop_prob)
        return conditioning, melody[0] if melody else None

    def _some_dropped(self, parts: list[Tensor], share: float) -> list[Tensor]:
        """Parts `(b, n, d)`, in training with zeros in the place of all of some items."""
        if not self.training or share == 0:
            return parts
        kept = torch.rand(len(parts[0]), device=parts[0].device) >= share
        return [part * rearrange(kept, 'b -> b 1 1') for part in parts]


class StageTrainer(Sharing, Trainer):
    """What the trainers of the three stages share; use `SemanticTrainer`, `CoarseTrainer` or `FineTrainer`.

    Results, beside those of `Trainer`: the folder `best`, of the least loss on held-out tokens, and `last`, each with
    the transformer's own state dict in `model.safetensors` and the conditioning embeddings of the stage in
    `conditioning.safetensors`; see `load_stage`.

    Args:
        transformer: ours, or audiolm-pytorch's module; it is trained in place. Of one with adapters (`add_adapters`),
            they alone are trained; they are in the folder `adapters` within those of the model, which has them merged.
        tokens: a cache that `compute_tokens` filled, or several of different clips, or `TokenCrops` of them.
        quantizer: the fitted quantizer that the cache was computed with, for a transformer with conditioning. Its
            embeddings of `namespace` are trained with the stage, in place; of one with a melody, those of melodies with
            the semantic stage.
        text_encoder: in place of the quantizer, for a transformer with `has_condition`, such as one of audiolm-pytorch
            that a T5 conditions: the frozen encoder whose ids of the texts the cache has. The stage is saved without.
        namespace: of the stage's embeddings; by default the stage's name.
        cond_drop_prob: share of the items that are trained without conditioning, for guidance when sampling.
        melody_drop_prob: share of the items that are trained without their melody, so that text alone does, too.
        melody_only: train what tells the melody alone, so that music without one stays as it is.
        mask_prob: share of earlier tokens that attention does not see in training.
        prefix_loss_weight: of the loss of the tokens that the stage is given, semantic ones for coarse and coarse ones
            for fine; 0 leaves it out.
        unique_consecutive: leave out repeated semantic tokens, as audiolm-pytorch's wrappers do by default. Without
            it, semantic tokens keep their place in time, which windows of long music rely on.
        seconds: length of the crops, by default 30, 10 and 3 s for the three stages.
        text_share: share of the items that are conditioned by their text instead of their audio.
        begin_share: share of the crops that begin where their clip does, see `TokenCrops`.
        valid_tokens: held-out tokens; by default `valid_frac` of the items are held out.
        fsdp: share the transformer, its gradients and the optimizer out over the processes of `torchrun`, of which each
            else has all (FSDP2); one process has all of it.
        callbacks, config, further keywords: as of `Trainer`.

    Raises:
        ValueError: transformer, quantizer and tokens that do not belong together, naming what differs.
    """

    DEFAULTS = Trainer.DEFAULTS | dict(max_valid_items=256)
    saves_last = True
    kept: Sequence[nn.Parameter] = ()  # what `melody_only` leaves as it is
    stage: ClassVar[str]
    kind: ClassVar[type[StageTransformer]]

    @typechecked
    def __init__(
        self,
        transformer: nn.Module,
        tokens: str | Path | Sequence[str | Path] | TokenCrops,
        *,
        quantizer: MuLaNEmbedQuantizer | None = None,
        text_encoder: PretrainedTextTransformer | None = None,
        namespace: str | None = None,
        cond_drop_prob: float = 0.1,
        melody_drop_prob: float = 0.3,
        melody_only: bool = False,
        mask_prob: float = 0.15,
        prefix_loss_weight: float = 1.0,
        unique_consecutive: bool = False,
        seconds: float | None = None,
        text_share: float = 0.0,
        begin_share: float = 0.0,
        valid_tokens: str | Path | Sequence[str | Path] | TokenCrops | None = None,
        fsdp: bool = False,
        callbacks: Sequence[Callback] = (),
        config: TrainingConfig | None = None,
        **keywords: Unpack[TrainingKeywords],
    ):
        given, transformer = transformer, own_stage(transformer, self.kind)
        config = self.complete(config, keywords)
        check_probability(cond_drop_prob=cond_drop_prob, mask_prob=mask_prob, melody_drop_prob=melody_drop_prob)
        check_not_negative(prefix_loss_weight=prefix_loss_weight)
        if quantizer is not None and (text_encoder is not None or transformer.reads_text):
            raise ValueError('a stage is conditioned by a quantizer or by a text_encoder, not by both')
        if text_encoder is not None and text_encoder.trained:
            raise ValueError('the text_encoder of a stage is not trained with it; build it with trained=False')
        if transformer.has_condition != (quantizer is not None or text_encoder is not None):
            raise ValueError(
                'this transformer was built with conditioning and needs the quantizer that gives it, or a text_encoder'
                if transformer.has_condition
                else 'this transformer was built without conditioning; build it with audio_text_condition=True, or '
                'pass no quantizer'
            )
        self.namespace = namespace or self.stage
        embeddings = melody = None
        if quantizer is not None:
            embeddings = embeddings_of(quantizer, self.namespace)
            melody = melody_of(quantizer, self.namespace)
        if melody is not None and unique_consecutive:
            raise ValueError(
                'semantic tokens without repetitions tell no times, so a stage of them follows no melody; leave out '
                'unique_consecutive, or pass a quantizer without a melody'
            )

        if melody_only:
            if melody is None:
                raise ValueError('melody_only needs a quantizer with a melody for this stage')
            if adapters_of(transformer):
                raise ValueError(
                    'melody_only trains what tells the melody, and this stage has adapters; use one of them'
                )
            self.kept = [it for it in (*transformer.parameters(), embeddings) if it.requires_grad]
            for it in self.kept:
                it.requires_grad_(False)

        if fsdp:
            refused = dict(use_ema=config.use_ema, melody_only=melody_only, adapters=bool(adapters_of(transformer)))
            refused["mixed_precision='fp16'"] = config.mixed_precision == 'fp16'
            if given_too := [name for name, it in refused.items() if it]:
                raise ValueError(
                    f'fsdp shares the weights out, which {given_too[0]} needs whole; leave out one of them'
                )

        crops = partial(
            TokenCrops,
            stage=self.stage,
            conditioning=quantizer is not None,
            text_share=text_share,
            begin_share=begin_share,
            melody=melody is not None,
            words=text_encoder is not None,
        )
        if not isinstance(tokens, TokenCrops):
            tokens = crops(tokens, seconds=seconds)
        elif seconds is not None or text_share or begin_share:
            raise ValueError('seconds, text_share and begin_share belong to TokenCrops, which were given already')
        if valid_tokens is not None and not isinstance(valid_tokens, TokenCrops):
            valid_tokens = crops(valid_tokens, seconds=tokens.seconds, training=False)
        self.unique_consecutive = unique_consecutive
        for crop in (tokens, valid_tokens):
            if crop is not None:
                self._check_tokens(crop, transformer, quantizer, text_encoder)
        if valid_tokens is None and config.valid_frac > 0:
            self.held_out_by = dict(valid_frac=config.valid_frac, random_split_seed=config.random_split_seed)
            if len(tokens) > 1:
                tokens, valid_tokens = tokens.split(config.valid_frac, seed=config.random_split_seed)

        if adapters_of(transformer):  # which are all that is trained
            if melody is not None and melody.is_new:
                raise ValueError(
                    'melodies are new to this stage, and adapters alone would be trained: train it with them first, '
                    'or pass a quantizer without a melody'
                )
            for part in (embeddings, melody):
                if part is not None:
                    part.requires_grad_(False)

        if text_encoder is not None:
            given.reads_text = True
            transformer.read_text()
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.valid_dataset = self.valid_tokens = valid_tokens
        self.seconds = tokens.seconds
        stage = Stage(
            transformer,
            embeddings,
            cond_drop_prob=cond_drop_prob,
            mask_prob=mask_prob,
            prefix_loss_weight=prefix_loss_weight,
            melody=melody,
            melody_drop_prob=melody_drop_prob,
            melody_per_token=None if melody is None else tokens.windows_per_token,
        )
        self.whole_model, self.sharded = stage, fsdp and num_launched() > 1
        if self.sharded:
            stage = copy.deepcopy(stage)
        # what reads conditioning has no gradient without, nor has what predicts the tokens that a stage is given
        self.some_unused = stage.embeddings is None and text_encoder is None
        self.some_unused |= prefix_loss_weight == 0 and self.stage != 'semantic'
        collate = partial(collate_tokens, unique_consecutive=unique_consecutive)
        super().__init__(stage, stage, tokens, collate_fn=collate, callbacks=callbacks, config=config)
        if text_encoder is not None:
            text_encoder.to(self.device)

    def parts_to_shard(self) -> list[nn.Module | list[nn.Module]]:
        parts = []
        for attention, cross, feed_forward in self.model.transformer.transformer.layers:
            attentions = [it.branch for it in (attention, cross) if it is not None]
            parts += [[it.to_kv, it.to_q, it.to_out] for it in attentions] + [feed_forward.branch]
        return parts

    def train(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        for it in self.kept:
            it.requires_grad_(False)
        try:
            return super().train(*arguments, **keywords)
        finally:
            for it in self.kept:
                it.requires_grad_(True)

    def _check_tokens(
        self,
        tokens: TokenCrops,
        transformer: StageTransformer,
        quantizer: MuLaNEmbedQuantizer | None,
        encoder: PretrainedTextTransformer | None,
    ) -> None:
        if tokens.stage != self.stage:
            raise ValueError(f'these are crops for the stage {tokens.stage!r}, not {self.stage!r}')
        melody = None if quantizer is None else melody_of(quantizer, self.namespace)
        for name, part, whose, what in (
            ('conditioning', quantizer, 'a stage', 'a quantizer'),
            ('melody', melody, 'a quantizer', 'a melody for this stage'),
            ('words', encoder, 'a stage', 'a text_encoder'),
        ):
            if getattr(tokens, name) != (part is not None):
                has = 'without' if part is None else 'with'
                raise ValueError(f'TokenCrops with {name}={getattr(tokens, name)} do not fit {whose} {has} {what}')
        for stream, what, own, at_most in self.sizes(transformer):
            found = tokens.facts(stream)[what]
            if own > found or (own < found and not at_most):
                raise ValueError(
                    f'the {stream} tokens in {tokens.shown} have {what} {found}, but the transformer was built for '
                    f'{own}'
                )
        sources = dict.fromkeys(('audio', 'text'), (quantizer, 'quantizer or another MuLaN'))
        sources |= dict(melody=(getattr(quantizer, 'melody', None), 'MelodyQuantizer'), words=(encoder, 'text_encoder'))
        for name, (module, what) in sources.items():
            if name in tokens.streams and tokens.streams[name].about['module'] != fingerprint(module):
                raise ValueError(
                    f'the {name} codes in {tokens.shown} were computed with another {what}; compute them again with '
                    'the one that is given'
                )
        width = transformer.conditioning_dim
        if quantizer is not None and (own := embeddings_of(quantizer, self.namespace).shape[-1]) != width:
            raise ValueError(
                f"the quantizer's embeddings of {self.namespace!r} have width {own}, but the transformer takes "
                f'{width}; conditioning_dims and dim (or cond_dim) must be equal'
            )
        if encoder is not None and encoder.dim != width:
            raise ValueError(
                f'the text_encoder gives vectors of width {encoder.dim}, but the transformer takes {width}; build it '
                f'with cond_dim={encoder.dim}'
            )

    @staticmethod
    def sizes(transformer: nn.Module) -> list[tuple[str, str, int, bool]]:
        """Stream, fact, what the transformer was built for, and whether the stream may have more."""
        raise NotImplementedError

    def compute_gradients(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        def compute(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            loss = self.step_module(**self._with_vectors(batch))
            return loss, dict(loss=loss.detach().float())

        return self.accumulate(batches, compute, lambda batch: self.model.count_labels(**batch))

    def _with_vectors(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the text encoder's vectors in the place of words."""
        if self.text_encoder is None:
            return batch
        ids, is_real = batch['words'], batch['words'] != PAD
        return batch | dict(words=self.text_encoder.vectors(ids.masked_fill(~is_real, 0), mask=is_real))

    def validate(self) -> dict[str, Any] | None:
        """The mean loss over all held-out tokens, the same crops each time."""

        def measure(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            with self.autocast():
                loss = model(**self._with_vectors(batch))
            labels = model.count_labels(**batch)
            return loss.float() * labels, labels

        loss = self.mean_over_held_out(measure)
        return None if loss is None else dict(loss=loss, score=-loss)

    def save_model(self, folder: Path) -> None:
        stage = self.evaluated_model
        # `saving.load_module` rebuilds the transformer from this folder
        config = describe(stage.transformer) | dict(step=self.step, stage=self.model_config())
        if adapters_of(stage.transformer):
            save_adapters(stage.transformer, folder / ADAPTERS_FOLDER)
        written = checkpoint.write_folder(folder, config, checkpoint.plain_state(stage.transformer))
        if stage.embeddings is not None:
            embeddings = {self.namespace: stage.embeddings}
            if stage.melody is not None:
                embeddings |= {f'{MELODY}{name}': it for name, it in stage.melody.named_parameters()}
            embeddings = {name: it.detach().cpu().contiguous() for name, it in embeddings.items()}
            write_tensors(folder / CONDITIONING_FILE, embeddings, part_of=written)

    def model_config(self) -> dict[str, Any]:
        return dict(
            stage=self.stage,
            namespace=self.namespace if self.model.embeddings is not None else None,
            seconds=self.seconds,
            unique_consecutive=self.unique_consecutive,
            sizes={f'{stream} {what}': own for stream, what, own, _ in self.sizes(self.transformer)},
        )


class SemanticTrainer(StageTrainer):
    """Trains a `SemanticTransformer`: semantic tokens from conditioning. Arguments as of `StageTrainer`."""

    stage, kind = 'semantic', SemanticTransformer

    @staticmethod
    def sizes(transformer: SemanticTransformer) -> list[tuple[str, str, int, bool]]:
        return [('semantic', 'codebook_size', transformer.num_semantic_tokens, False)]


class CoarseTrainer(StageTrainer):
    """Trains a `CoarseTransformer`: coarse acoustic tokens from semantic ones. Arguments as of `StageTrainer`."""

    stage, kind = 'coarse', CoarseTransformer

    @staticmethod
    def sizes(transformer: CoarseTransformer) -> list[tuple[str, str, int, bool]]:
        return [
            ('semantic', 'codebook_size', transformer.num_semantic_tokens, False),
            ('codec', 'codebook_size', transformer.codebook_size, False),
            ('codec', 'quantizers', transformer.num_coarse_quantizers, True),
        ]

    def _check_tokens(self, tokens: TokenCrops, transformer: CoarseTransformer, *given: Any) -> None:
        super()._check_tokens(tokens, transformer, *given)
        if (told := transformer.semantic_per_frame) is None:
            return
        if self.unique_consecutive:
            raise ValueError(f'{NO_TIMES} semantic_per_frame; train it with unique_consecutive=False')
        found = Fraction(tokens.facts('semantic')['rate']) / Fraction(tokens.facts('codec')['rate'])
        if abs(found - told) > 1e-4:
            raise ValueError(
                f'the tokens in {tokens.shown} have {float(found):g} semantic tokens a frame, but the transformer was '
                f'built for semantic_per_frame = {told:g}'
            )


class FineTrainer(StageTrainer):
    """Trains a `FineTransformer`: fine acoustic tokens from coarse ones. Arguments as of `StageTrainer`."""

    stage, kind = 'fine', FineTransformer

    @staticmethod
    def sizes(transformer: FineTransformer) -> list[tuple[str, str, int, bool]]:
        return [
            ('codec', 'codebook_size', transformer.codebook_size, False),
            ('codec', 'quantizers', transformer.num_coarse_quantizers + transformer.num_fine_quantizers, False),
        ]


def embeddings_of(quantizer: MuLaNEmbedQuantizer, namespace: str) -> nn.Parameter:
    """The embeddings of a namespace. Raises ValueError for an unknown one."""
    if namespace not in quantizer.namespaces:
        raise ValueError(f'the quantizer has no namespace {namespace!r}, but {", ".join(quantizer.namespaces)}')
    return quantizer.cond_embeddings[namespace]


def melody_of(quantizer: MuLaNEmbedQuantizer, namespace: str) -> MelodyEmbedding | None:
    """The embedding of melodies that belongs to a namespace, if there is one."""
    return quantizer.melody_embedding if namespace == MELODY_NAMESPACE else None


def take_conditioning(folder: Path, stage: str, quantizer: MuLaNEmbedQuantizer) -> None:
    """Take over what conditions a stage of a MusicLM, whose quantizer is in `folder`, into one with the same codes.

    To a stage that was trained without melodies, those of the quantizer are new.

    Raises ValueError for a quantizer with other codes, which mean nothing to the stage.
    """
    saved = MuLaNEmbedQuantizer.from_pretrained(folder)
    melodies = [melody_of(it, stage) for it in (saved, quantizer)]
    modules = [(saved, quantizer)] + ([] if melodies[0] is None else [(saved.melody, quantizer.melody)])
    if any(own is None or fingerprint(own) != fingerprint(theirs) for theirs, own in modules):
        raise ValueError(
            f'the stage was trained with the codes of {folder}, not with those of the quantizer: pass that one'
        )
    pairs = [(embeddings_of(saved, stage), embeddings_of(quantizer, stage))]
    if melodies[0] is not None:
        pairs += zip(melodies[0].parameters(), melodies[1].parameters(), strict=True)
    with torch.no_grad():
        for theirs, own in pairs:
            own.copy_(theirs)


def load_stage(
    folder: str | Path,
    transformer: nn.Module,
    quantizer: MuLaNEmbedQuantizer | None = None,
    *,
    may_add_melody: bool = False,
) -> None:
    """Load what a stage's trainer wrote: the transformer's weights, and its embeddings into the quantizer, if given.

    With `may_add_melody`, the melodies of the quantizer may be new to the stage, which is to be trained with them.

    Raises FileNotFoundError for a missing file, ValueError for weights of another model.
    """
    folder = Path(folder)
    given, transformer = transformer, own_stage(transformer)
    parts = ('model', 'keywords', 'stage')
    config, weights = checkpoint.read_folder(folder, type(transformer).__name__, parts, optional=('step',))
    checkpoint.load_strictly(transformer, weights, source=folder)
    with config.refused("'keywords' must be those of a stage", config['keywords']):
        if reads_text := config['keywords'].get('reads_text'):
            given.reads_text = True
            transformer.read_text()
    if reads_text and quantizer is not None:
        raise ValueError(f'the stage in {folder} was trained with a text_encoder, not with a quantizer')
    if quantizer is None:
        return
    path = folder / CONDITIONING_FILE
    if not path.is_file():
        raise FileNotFoundError(f'no {CONDITIONING_FILE} in {folder}: this stage was trained without conditioning')
    found = read_tensors(path, part_of=config.content.get(checkpoint.WEIGHTS, [None])[-1])
    with config.refused(f"'stage' must have the namespace of the embeddings in {CONDITIONING_FILE}", config['stage']):
        namespace = config['stage']['namespace']
        embeddings = found[namespace]
    own = embeddings_of(quantizer, namespace)
    if own.shape != embeddings.shape:
        raise ValueError(
            f'the embeddings in {folder} have shape {tuple(embeddings.shape)}, but those of the quantizer '
            f'{tuple(own.shape)}'
        )
    melody = melody_of(quantizer, namespace)
    told = {name.removeprefix(MELODY): it for name, it in found.items() if name.startswith(MELODY)}
    wanted = {} if melody is None or (may_add_melody and not told) else dict(melody.named_parameters())
    if {name: it.shape for name, it in told.items()} != {name: it.shape for name, it in wanted.items()}:
        raise ValueError(
            f'the stage in {folder} was trained {"with" if told else "without"} a melody, or with another one than the '
            "quantizer's; pass the quantizer that it was trained with"
        )
    with torch.no_grad():
        own.copy_(embeddings)
        for name, tensor in told.items():
            wanted[name].copy_(tensor)
