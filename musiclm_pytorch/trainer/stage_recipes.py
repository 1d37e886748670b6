"""Recipes of the three stages, without what follows from the tokens, of the codec, and of what hears melodies."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from musiclm_pytorch.audiolm.convert import SoundStream
from musiclm_pytorch.audiolm.stages import StageTransformer
from musiclm_pytorch.audiolm.tokens import read_stream
from musiclm_pytorch.codecs.melody import MelodyQuantizer
from musiclm_pytorch.codecs.neural import NeuralCodec
from musiclm_pytorch.data.melodies import MelodyPairs
from musiclm_pytorch.data.opening import open_pairs, open_whole_clips
from musiclm_pytorch.data.shards import ShardedAudioText
from musiclm_pytorch.mulan.melody import MelodyEncoder
from musiclm_pytorch.mulan.pretrained_towers import PretrainedTextTransformer
from musiclm_pytorch.quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.trainer.codec import CodecTrainer
from musiclm_pytorch.trainer.config_schema import Section
from musiclm_pytorch.trainer.melody import MelodyTrainer
from musiclm_pytorch.trainer.recipes import IS_CODE, TrainedRecipe, training_section
from musiclm_pytorch.trainer.stages import CoarseTrainer, FineTrainer, SemanticTrainer, StageTrainer, embeddings_of

FROM_TOKENS = 'it follows from the tokens'
FROM_CONDITION = 'it follows from --quantizer or --text-encoder'

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


class StageRecipe(TrainedRecipe):
    """What the recipes of the three stages do: sections `model` and `training`.

    `SIZES` names keywords of the transformer that follow from the tokens, with the stream and its fact.
    """

    trainer: ClassVar[type[StageTrainer]]
    SIZES: ClassVar[Mapping[str, tuple[str, str]]]

    def __init_subclass__(cls):
        super().__init_subclass__()
        told = dict.fromkeys(('has_condition', 'audio_text_condition', 'reads_text', 'cond_dim'), FROM_CONDITION)
        told |= dict(t5_name='say --text-encoder', cond_drop_prob="it is a key of section 'training'")
        cls.part = cls.trainer.stage
        cls.SECTIONS = dict(
            model=Section((cls.trainer.kind, StageTransformer), refused=told | dict.fromkeys(cls.SIZES, FROM_TOKENS)),
            training=training_section(
                cls.trainer,
                "it is section 'model'",
                transformer="it is section 'model'",
                tokens='say --tokens on the command line',
                valid_tokens='say --valid-tokens on the command line',
                quantizer='say --quantizer on the command line',
                text_encoder='say --text-encoder on the command line',
            ),
        )
        coarse = {} if cls.part == 'semantic' else dict(num_coarse_quantizers=3)
        cls.DEFAULT = dict(model=dict(dim=512, depth=6) | coarse, training=TRAINING)

    def build_model(
        self,
        tokens: str | Path | Sequence[str | Path],
        quantizer: MuLaNEmbedQuantizer | None = None,
        text_encoder: PretrainedTextTransformer | None = None,
    ) -> nn.Module:
        """A new transformer for caches of tokens, with weights drawn from the generators of torch and Python."""
        first = tokens if isinstance(tokens, str | Path) else tokens[0]
        found = {name: self.fact(Path(first), name) for name in self.SIZES}
        if quantizer is not None:
            namespace = self.training.get('namespace') or self.part
            found |= dict(audio_text_condition=True, cond_dim=embeddings_of(quantizer, namespace).shape[-1])
        if text_encoder is not None:
            found |= dict(has_condition=True, cond_dim=text_encoder.dim)
        with self.section('model') as model:
            return self.trainer.kind(**{**model, **found}).scale_initial_weights()

    def fact(self, tokens: Path, name: str) -> int:
        stream, what = self.SIZES[name]
        found = read_stream(tokens / stream)['facts'][what]
        if name != 'num_fine_quantizers':
            return found
        coarse = self.model.get('num_coarse_quantizers', 3)
        if not 0 < coarse < found:
            raise ValueError(
                f"{self.source}, section 'model': num_coarse_quantizers must lie between 1 and {found - 1}, one less "
                f'than the quantizers of the codec, got {coarse}'
            )
        return found - coarse


class SemanticRecipe(StageRecipe):
    trainer = SemanticTrainer
    SIZES: ClassVar = dict(num_semantic_tokens=('semantic', 'codebook_size'))


class CoarseRecipe(StageRecipe):
    trainer = CoarseTrainer
    SIZES: ClassVar = SemanticRecipe.SIZES | dict(codebook_size=('codec', 'codebook_size'))


class FineRecipe(StageRecipe):
    trainer = FineTrainer
    SIZES: ClassVar = dict(codebook_size=('codec', 'codebook_size'), num_fine_quantizers=('codec', 'quantizers'))


CODECS = dict(soundstream=SoundStream, neural=NeuralCodec)


class CodecRecipe(TrainedRecipe):
    """The key `kind` of its model says which of `CODECS` it is; the other keys are those of that codec."""

    part = 'codec'
    trainer = CodecTrainer
    SECTIONS: ClassVar[Mapping[str, Section]] = dict(
        model=Section(
            (SoundStream, NeuralCodec),
            refused=dict(stft_discriminator=IS_CODE),
            more=dict(kind=Literal['soundstream', 'neural']),
        ),
        training=training_section(
            CodecTrainer,
            "it is section 'model'",
            codec="it is section 'model'",
            valid_dataset='a share of --data is held out',
            sample_rate='the data tell',
        ),
    )
    DEFAULT: ClassVar[Mapping[str, Mapping[str, Any]]] = dict(
        model=dict(codebook_size=1024, target_sample_hz=16000), training=TRAINING
    )

    def updated(self, **sections: Mapping[str, Any]) -> CodecRecipe:
        """As of every recipe; a codec of another kind begins with the defaults of its own."""
        kind = sections.get('model', {}).get('kind', self.kind)
        base = self if kind == self.kind else CodecRecipe(**self.to_dict() | dict(model={}), source=self.source)
        return super(CodecRecipe, base).updated(**sections)

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


class MelodyRecipe(TrainedRecipe):
    """Sections `model` (of a `MelodyEncoder` and its `MelodyQuantizer`), `data` (of `MelodyPairs`) and `training`.

    The encoder hears windows of a second, of pairs that keep time: so short ones tell which note is when.
    """

    part = 'melody'
    trainer = MelodyTrainer
    SECTIONS: ClassVar[Mapping[str, Section]] = dict(
        model=Section((MelodyEncoder, MelodyQuantizer), refused=dict(encoder=IS_CODE)),
        data=Section((MelodyPairs,), refused=dict(sample_rate="it is a key of section 'model'", split=IS_CODE)),
        training=training_section(
            MelodyTrainer,
            "it is section 'model'",
            encoder="it is section 'model'",
            pairs="it is section 'data'",
            valid_pairs="it is section 'data'",
            sample_rate="it is a key of section 'model'",
        ),
    )
    DEFAULT: ClassVar[Mapping[str, Mapping[str, Any]]] = dict(
        model=dict(seconds=1.0, hop=0.24),
        data=dict(seconds=4.0, tempo=1.0),
        training=dict(
            batch_size=20, num_train_steps=150, lr_scheduler_type='cosine', warmup_steps=20, validate_every=50, seed=42
        ),
    )


STAGE_RECIPES = dict(semantic=SemanticRecipe, coarse=CoarseRecipe, fine=FineRecipe)
