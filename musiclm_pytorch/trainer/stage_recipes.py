"""Recipes of the three stages and of the codec: model and training, without what follows from the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from musiclm_pytorch.audiolm.convert import SoundStream
from musiclm_pytorch.audiolm.stages import StageTransformer
from musiclm_pytorch.audiolm.tokens import read_stream
from musiclm_pytorch.codecs.neural import NeuralCodec
from musiclm_pytorch.data.opening import open_pairs, open_whole_clips
from musiclm_pytorch.data.shards import ShardedAudioText
from musiclm_pytorch.quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.trainer.codec import CodecTrainer
from musiclm_pytorch.trainer.recipes import IS_CODE, Recipe
from musiclm_pytorch.trainer.config_schema import Section
from musiclm_pytorch.trainer.stages import CoarseTrainer, FineTrainer, SemanticTrainer, StageTrainer, embeddings_of
from musiclm_pytorch.trainer.trainer import Trainer

FROM_TOKENS = 'it follows from the tokens'
FROM_QUANTIZER = 'it follows from --quantizer'

TRAINING = dict(
    batch_size=16,
    lr=3e-4,
    optimizer='adamw',
    weight_decay=0.05,
    lr_scheduler_type='cosine',
    warmup_steps=1000,
    use_ema=True,
    num_train_steps=100_000,
    checkpoint_every=1000,
    validate_every=1000,
    seed=42,
)


def _training(trainer: type[Trainer], middle: type[Trainer], **refused: str) -> Section:
    named = dict(
        step_module=IS_CODE,
        grouping=IS_CODE,
        callbacks=IS_CODE,
        config='its fields are keys of this section',
        collate_fn=IS_CODE,
        model="it is section 'model'",
        dataset='say it on the command line',
        results_folder='say --output on the command line',
        resume='say --resume on the command line',
    )
    return Section(
        (trainer,),
        refused=named | refused,
        groups=(frozenset({'num_epochs', 'num_train_steps'}),),
    )


def _sections(trainer: type[StageTrainer], **refused: str) -> dict[str, Section]:
    conditioning = dict.fromkeys(('has_condition', 'audio_text_condition', 'cond_dim'), FROM_QUANTIZER)
    texts = dict(t5_name='stages are conditioned by MuLaN', cond_drop_prob="it is a key of section 'training'")
    return dict(
        model=Section((trainer.kind, StageTransformer), refused=conditioning | texts | refused),
        training=_training(
            trainer,
            StageTrainer,
            transformer="it is section 'model'",
            tokens='say --tokens on the command line',
            valid_tokens='say --valid-tokens on the command line',
            quantizer='say --quantizer on the command line',
        ),
    )


@dataclass(frozen=True)
class ModelRecipe(Recipe):
    """Sections `model` and `training`."""

    trainer: ClassVar[type[Trainer]]

    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=lambda: dict(TRAINING))

    @property
    def seed(self) -> int:
        return self.training.get('seed', TRAINING['seed'])

    @property
    def train_keywords(self) -> dict[str, int]:
        """How long to train: keywords of `Trainer.train`."""
        return {key: it for key in ('num_epochs', 'num_train_steps') if (it := self.training.get(key)) is not None}

    def build_trainer(self, model: nn.Module, data: Any, **keywords: Any) -> Trainer:
        """A trainer; `keywords` are those that do not stand in a recipe."""
        with self.section('training') as training:
            training.pop('num_epochs', None)
            trainer = self.trainer(model, data, **training, **keywords)
        trainer.recipe = self
        return trainer


@dataclass(frozen=True)
class StageRecipe(ModelRecipe):
    """What the recipes of the three stages do."""

    model: dict[str, Any] = field(default_factory=lambda: dict(dim=512, depth=6))

    def sizes(self, tokens: Path) -> dict[str, int]:
        """Keywords of the transformer that follow from the tokens."""
        raise NotImplementedError

    def build_model(self, tokens: str | Path, quantizer: MuLaNEmbedQuantizer | None) -> nn.Module:
        """A new transformer for a cache of tokens, with weights drawn from torch's and Python's generators."""
        keywords: dict[str, Any] = {}
        if quantizer is not None:
            namespace = self.training.get('namespace') or self.trainer.stage
            keywords = dict(audio_text_condition=True, cond_dim=embeddings_of(quantizer, namespace).shape[-1])
        keywords |= self.sizes(Path(tokens))
        with self.section('model') as model:
            return self.trainer.kind(**{**model, **keywords}).scale_initial_weights()


@dataclass(frozen=True)
class SemanticRecipe(StageRecipe):
    part: ClassVar[str] = 'semantic'
    SECTIONS: ClassVar[Mapping[str, Section]] = _sections(SemanticTrainer, num_semantic_tokens=FROM_TOKENS)
    trainer: ClassVar[type[Trainer]] = SemanticTrainer

    def sizes(self, tokens: Path) -> dict[str, int]:
        return dict(num_semantic_tokens=_facts(tokens, 'semantic')['codebook_size'])


@dataclass(frozen=True)
class CoarseRecipe(StageRecipe):
    part: ClassVar[str] = 'coarse'
    SECTIONS: ClassVar[Mapping[str, Section]] = _sections(
        CoarseTrainer, num_semantic_tokens=FROM_TOKENS, codebook_size=FROM_TOKENS
    )
    trainer: ClassVar[type[Trainer]] = CoarseTrainer

    model: dict[str, Any] = field(default_factory=lambda: dict(dim=512, depth=6, num_coarse_quantizers=3))

    def sizes(self, tokens: Path) -> dict[str, int]:
        return dict(
            num_semantic_tokens=_facts(tokens, 'semantic')['codebook_size'],
            codebook_size=_facts(tokens, 'codec')['codebook_size'],
        )


@dataclass(frozen=True)
class FineRecipe(StageRecipe):
    part: ClassVar[str] = 'fine'
    SECTIONS: ClassVar[Mapping[str, Section]] = _sections(
        FineTrainer, num_fine_quantizers=FROM_TOKENS, codebook_size=FROM_TOKENS
    )
    trainer: ClassVar[type[Trainer]] = FineTrainer

    model: dict[str, Any] = field(default_factory=lambda: dict(dim=512, depth=6, num_coarse_quantizers=3))

    def sizes(self, tokens: Path) -> dict[str, int]:
        facts, coarse = _facts(tokens, 'codec'), self.model.get('num_coarse_quantizers', 3)
        if not 0 < coarse < facts['quantizers']:
            raise ValueError(
                f"{self.source}, section 'model': num_coarse_quantizers must lie between 1 and "
                f'{facts["quantizers"] - 1}, one less than the quantizers of the codec, got {coarse}'
            )
        return dict(codebook_size=facts['codebook_size'], num_fine_quantizers=facts['quantizers'] - coarse)


CODECS = dict(soundstream=SoundStream, neural=NeuralCodec)


@dataclass(frozen=True)
class CodecRecipe(ModelRecipe):
    """The key `kind` of its model says which of `CODECS` it is; the other keys are those of that codec."""

    part: ClassVar[str] = 'codec'
    SECTIONS: ClassVar[Mapping[str, Section]] = dict(
        model=Section(
            (SoundStream, NeuralCodec),
            refused=dict(stft_discriminator=IS_CODE),
            more=dict(kind=Literal['soundstream', 'neural']),
        ),
        training=_training(
            CodecTrainer,
            CodecTrainer,
            codec="it is section 'model'",
            valid_dataset='a share of --data is held out',
            sample_rate='the data tell',
        ),
    )
    trainer: ClassVar[type[Trainer]] = CodecTrainer

    model: dict[str, Any] = field(default_factory=lambda: dict(codebook_size=1024, target_sample_hz=16000))

    def updated(self, **sections: Mapping[str, Any]) -> CodecRecipe:
        """As of every recipe; a codec of another kind begins with the defaults of its own."""
        kind = sections.get('model', {}).get('kind', self.kind)
        return super(CodecRecipe, self if kind == self.kind else replace(self, model={})).updated(**sections)

    @property
    def kind(self) -> str:
        return self.model.get('kind', 'soundstream')

    @property
    def num_quantizers(self) -> int:
        """The codec's levels of codes."""
        name = 'rq_num_quantizers' if self.kind == 'soundstream' else 'num_quantizers'
        return self.model.get(name, inspect.signature(CODECS[self.kind].__init__).parameters[name].default)

    def build_model(self) -> SoundStream:
        """A new codec, with weights drawn from torch's generator."""
        with self.section('model') as keywords:
            keywords.pop('kind', None)
            return CODECS[self.kind](**keywords)

    def open_data(self, data: str, codec: SoundStream, *, audio_folder: str | None = None) -> Any:
        """The waves at `data`, at the codec's rate, with a little more than a crop of each clip; see `open_pairs`."""
        rate = codec.target_sample_hz
        longest = 2 * max(1.0, self.training.get('seconds', 1.0))
        dataset = open_pairs(data, sample_rate=rate, audio_folder=audio_folder, max_seconds=longest)
        if isinstance(dataset, ShardedAudioText):  # by index; their crops are drawn by the trainer
            return open_whole_clips(data, sample_rate=rate)
        return dataset


STAGE_RECIPES = dict(semantic=SemanticRecipe, coarse=CoarseRecipe, fine=FineRecipe)


def _facts(tokens: Path, stream: str) -> dict[str, Any]:
    return read_stream(tokens / stream)['facts']
