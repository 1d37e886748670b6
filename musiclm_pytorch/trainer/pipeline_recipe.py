"""The recipe of the whole of MusicLM: those of its parts in one file, under a heading each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from musiclm_pytorch.audiolm.crops import STAGE_SECONDS
from musiclm_pytorch.audiolm.semantic_mulan import MuLaNSemanticTokenizer
from musiclm_pytorch.audiolm.semantic_transformers import TransformersSemanticTokenizer
from musiclm_pytorch.audiolm.spectral_codec import SpectralCodec
from musiclm_pytorch.audiolm.stages import STAGES
from musiclm_pytorch.audiolm.tokens import compute_tokens
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.trainer.config import nearest
from musiclm_pytorch.trainer.config_schema import Section, check_sections, read_content, shown
from musiclm_pytorch.trainer.recipes import FITTED_PARTS, IS_CODE, TRAINED_PARTS, MuLaNRecipe, Recipe, write_recipe
from musiclm_pytorch.trainer.stage_recipes import CoarseRecipe, CodecRecipe, FineRecipe, MelodyRecipe, SemanticRecipe
from musiclm_pytorch.trainer.words import teach_everyday_words, teach_words

IS_DATA = 'say --data on the command line'
FROM_MULAN = 'it follows from the part mulan'
FROM_STAGES = 'it follows from the parts semantic, coarse and fine'
IS_OWN = 'the pipeline sees to it'
# of generated music: how many clips are used whole, how they are made, and the rate, in Hz, at which they are kept
SYNTHETIC = dict(
    synthetic_length=int,
    synthetic_seconds=float,
    synthetic_seed=int,
    synthetic_mentions=dict[str, float],
    synthetic_sound_font=str | Sequence[str] | None,
    synthetic_rendered=int,
)
CODEC_PARTS = ('codec', 'spectral_codec', 'pretrained_codec')
TOKENS_PARTS = ('folder', 'tokenizer', 'codec', 'quantizer', 'sample_rate', 'on_change', 'share', 'texts')
MUSICLM_PARTS = ('audio_lm', 'mulan_embed_quantizer', *STAGES, 'codec', 'tokenizer', 'unique_consecutive')


class FittedRecipe(Recipe):
    """What is fitted rather than trained, and how it is put together: keywords of constructors and of `fit`.

    Of generated music, `tokens.synthetic_rendered` is a rate in Hz: its clips are rendered once, into shards, for all
    parts but MuLaN. `musiclm.usual_score_prompts` is how many held-out captions `usual_score` is measured on.

    With the section `words`, a MuLaN of `SyntheticMusic` learns ordinary words for what that tells before it goes into
    the quantizer: `teach_everyday_words`.

    The section `tokenizer` is of a `TransformersSemanticTokenizer` if it has the key `model`, else of MuLaN's.

    The section `text_encoder` has the key `model`, a text encoder of `transformers` such as a T5, whose vectors of the
    words condition the stages in the place of MuLaN's codes; the sections `quantizer` and `musiclm` are not used then.
    """

    SECTIONS: ClassVar[Mapping[str, Section]] = {
        'quantizer': Section(
            (MuLaNEmbedQuantizer, MuLaNEmbedQuantizer.fit),
            refused=dict(data=IS_DATA)
            | dict.fromkeys(('mulan', 'sample_rate'), FROM_MULAN)
            | dict.fromkeys(('conditioning_dims', 'namespaces'), FROM_STAGES),
            more=dict(trained_words_only=bool),
        ),
        'words': Section(
            (teach_words, teach_everyday_words),
            refused=dict(mulan=FROM_MULAN, sampled=IS_DATA, pairs=IS_OWN, keep=IS_OWN, report=IS_CODE),
        ),
        'text_encoder': Section((), more=dict(model=str)),
        'tokenizer': Section(
            (MuLaNSemanticTokenizer, MuLaNSemanticTokenizer.fit, TransformersSemanticTokenizer),
            refused=dict(mulan=FROM_MULAN, data=IS_DATA, sample_rate=FROM_MULAN, feature_extractor=IS_CODE),
            more=dict(model=str),
        ),
        'spectral_codec': Section((SpectralCodec, SpectralCodec.fit), refused=dict(data=IS_DATA)),
        'pretrained_codec': Section((), more=dict(source=str, num_quantizers=int)),
        'tokens': Section(
            (compute_tokens,),
            refused=dict(dataset=IS_DATA, text_encoder='it is a section of its own')
            | dict.fromkeys(TOKENS_PARTS, IS_OWN),
            more=SYNTHETIC,
        ),
        'musiclm': Section(
            (MusicLM,),
            refused=dict.fromkeys(MUSICLM_PARTS, IS_OWN),
            more=dict(dtype=Literal['float32', 'float16', 'bfloat16', 'int8'], usual_score_prompts=int),
        ),
    }

    DEFAULT: ClassVar[Mapping[str, Mapping[str, Any]]] = dict(
        tokens=dict(synthetic_length=20_000, synthetic_seconds=10.0)
    )


RECIPES = {it.part: it for it in (MuLaNRecipe, MelodyRecipe, CodecRecipe, SemanticRecipe, CoarseRecipe, FineRecipe)}


@dataclass(frozen=True)
class MusicLMRecipe:
    """Parts `mulan`, `melody`, `codec`, `semantic`, `coarse` and `fine`, which are trained by recipes of their own, and
    the sections of `FittedRecipe`.

    Without the part `fine` (`fine: no`), the coarse stage makes all levels of the codec's codes.

    With the part `melody`, the semantic stage learns to follow melodies; without it, there are none.

    With the section `text_encoder`, the stages are all that is made: a `MusicLM` takes none that read words.

    Without the part `codec` a `SpectralCodec` is fitted; with it a SoundStream or a NeuralCodec is trained instead, and
    by the section `pretrained_codec` one is used that is trained already: what `assembly.load_codec` takes.
    """

    mulan: MuLaNRecipe = field(default_factory=MuLaNRecipe.default)
    melody: MelodyRecipe | None = None
    codec: CodecRecipe | None = None
    semantic: SemanticRecipe = field(default_factory=SemanticRecipe.default)
    coarse: CoarseRecipe = field(default_factory=CoarseRecipe.default)
    fine: FineRecipe | None = field(default_factory=FineRecipe.default)
    fitted: FittedRecipe = field(default_factory=FittedRecipe.default)

    def __post_init__(self):
        coarse, fine = (recipe and recipe.model.get('num_coarse_quantizers', 3) for recipe in (self.coarse, self.fine))
        if fine not in (None, coarse):
            raise ValueError(
                f'the coarse stage makes {coarse} levels of codes, but the fine stage begins after {fine}; give both '
                'the same num_coarse_quantizers'
            )
        if self.codec_levels is not None:
            self.check_levels(self.codec_levels)
        uniques = {name: self.unique_consecutive(name) for name in ('semantic', 'coarse')}
        if len(set(uniques.values())) > 1:
            raise ValueError(
                f'the semantic and the coarse stage read the same tokens; got unique_consecutive {uniques}'
            )
        if self.melody is not None and uniques['semantic']:
            raise ValueError('melodies need tokens that tell times; leave out unique_consecutive, or the part melody')
        if self.melody is not None and self.text_encoder is not None:
            raise ValueError('a stage is told melodies by the quantizer; leave out text_encoder, or the part melody')

    @classmethod
    def load(cls, path: str | Path) -> MusicLMRecipe:
        """Read a YAML or JSON file; what it leaves out is as by default.

        Raises FileNotFoundError; ValueError and TypeError naming the file, the part and the key.
        """
        return cls.from_content(read_content(path), str(path))

    @classmethod
    def from_content(cls, content: Any, source: str) -> MusicLMRecipe:
        return cls().updated(content, source)

    def updated(self, content: Any, source: str) -> MusicLMRecipe:
        """The recipe with what `content`, such as a file, says of some keys of some parts; errors begin with `source`.

        A codec of another kind takes the place of the one that there was.
        """
        content = {} if content is None else content
        known = (*TRAINED_PARTS, *FITTED_PARTS)
        if not isinstance(content, Mapping):
            raise TypeError(f'{source} must hold the parts {", ".join(known)}, got {shown(content)}')
        for name in content:
            if name not in known:
                raise ValueError(f'{source}: unknown part {name!r}; {nearest(name, known)}')
        has_fine = content.get('fine') is not False
        content = {name: it for name, it in content.items() if it is not None and (name != 'fine' or has_fine)}
        codecs = [name for name in CODEC_PARTS if name in content]
        if len(codecs) > 1:
            raise ValueError(
                f'{source}: codec trains a SoundStream or a NeuralCodec, spectral_codec fits a SpectralCodec, '
                'pretrained_codec takes one that is trained; keep one'
            )
        parts: dict[str, Any] = {} if has_fine else dict(fine=None)
        for name, kind in RECIPES.items():
            if name in content:
                where = f'{source}, part {name}'
                own = getattr(self, name) or kind.default()
                checked = check_sections(content[name], kind.SECTIONS, where)
                parts[name] = kind(**own.updated(**checked).to_dict(), source=where)
        fitted = {name: it for name, it in content.items() if name in FITTED_PARTS}
        checked = check_sections(fitted, FittedRecipe.SECTIONS, source)
        before = self.fitted.to_dict()
        if codecs:  # of the others, nothing is left
            before |= {name: {} for name in CODEC_PARTS if name in before and name not in codecs}
            parts.setdefault('codec', None)
        parts['fitted'] = FittedRecipe(**before, source=source).updated(**checked)
        try:
            return replace(self, **parts)
        except (TypeError, ValueError) as error:
            raise type(error)(f'{source}: {error}') from error

    def to_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).to_dict() for name in RECIPES if getattr(self, name) is not None}
        fitted = self.fitted.to_dict()
        if self.codec is not None or self.fitted.pretrained_codec:
            del fitted['spectral_codec']
        for name in ('pretrained_codec', 'text_encoder', 'words'):
            if not fitted[name]:
                del fitted[name]
        return parts | fitted | ({} if self.fine is not None else dict(fine=False))

    def save(self, folder: str | Path) -> Path:
        """Write `recipe.json` into a folder; `load` reads it."""
        return write_recipe(self.to_dict(), folder)

    def with_seed(self, seed: int) -> MusicLMRecipe:
        """The same, every part of it by this seed."""
        trained = {name: dict(training=dict(seed=seed)) for name in RECIPES if getattr(self, name) is not None}
        seeded = {name: dict(seed=seed) for name in ('quantizer', 'tokenizer', 'spectral_codec')}
        seeded |= dict(words=dict(seed=seed)) if self.fitted.words else {}
        parts = {name: getattr(self, name).updated(**it) for name, it in trained.items()}
        return replace(self, **parts, fitted=self.fitted.updated(**seeded))

    def with_pretrained_codec(self, source: str, num_quantizers: int | None = None) -> MusicLMRecipe:
        """The same with a codec that is trained already."""
        section = dict(source=source) | ({} if num_quantizers is None else dict(num_quantizers=num_quantizers))
        return replace(self, codec=None, fitted=FittedRecipe(**self.fitted.to_dict() | dict(pretrained_codec=section)))

    def check_levels(self, levels: int) -> None:
        """Raise ValueError unless a codec of so many levels has some for the coarse stage and some for the fine one, if
        there is one."""
        coarse = self.coarse.model.get('num_coarse_quantizers', 3)
        if self.fine is None:
            if coarse != levels:
                raise ValueError(
                    f'without a fine stage the coarse one makes all {levels} levels of the codec, but '
                    f'num_coarse_quantizers is {coarse}'
                )
        elif not 0 < coarse < levels:
            raise ValueError(
                f'num_coarse_quantizers must lie between 1 and {levels - 1}, one less than the quantizers of the '
                f'codec, got {coarse}'
            )

    def unique_consecutive(self, stage: str) -> bool:
        """Whether a stage reads its semantic tokens without repetitions."""
        return getattr(self, stage).training.get('unique_consecutive', False)

    @property
    def text_encoder(self) -> str | None:
        """What reads the words that condition the stages, its folder or name; None where MuLaN's codes do."""
        return self.fitted.text_encoder.get('model')

    @property
    def needs_mulan(self) -> bool:
        return self.text_encoder is None or 'model' not in self.fitted.tokenizer

    @property
    def codec_levels(self) -> int | None:
        """The codec's levels of codes; None of one trained elsewhere, where the recipe does not say."""
        if self.codec is not None:
            return self.codec.num_quantizers
        if self.fitted.pretrained_codec:
            return self.fitted.pretrained_codec.get('num_quantizers')
        default = inspect.signature(SpectralCodec.__init__).parameters['num_quantizers'].default
        return self.fitted.spectral_codec.get('num_quantizers', default)

    @property
    def conditioning_dims(self) -> list[int]:
        """The widths that the quantizer gives to three stages: without a fine one, the third is as the second."""
        return [(getattr(self, name) or self.coarse).model['dim'] for name in STAGES]

    @property
    def synthetic(self) -> dict[str, Any]:
        """How clips of "synthetic" and "scores" are made that are used whole: keywords of `open_whole_clips`."""
        names = SYNTHETIC.keys() - {'synthetic_rendered'}
        return {name: it for name, it in self.fitted.tokens.items() if name in names}

    @property
    def windows(self) -> tuple[float, float, float]:
        """Seconds that each stage sees when music is made: those of its crops, unless the part musiclm says others."""
        stages = {name: getattr(self, name) or self.coarse for name in STAGES}
        crops = (it.training.get('seconds') or STAGE_SECONDS[name] for name, it in stages.items())
        return self.fitted.musiclm.get('windows') or tuple(float(seconds) for seconds in crops)


def list_keys(part: str | None = None) -> list[str]:
    """A line for each key that the recipe of a whole may have, or that of one part, with its type and default.

    Raises ValueError for an unknown part.
    """
    kinds: dict[str, type[Recipe]] = {**RECIPES, '': FittedRecipe}
    if part is not None:
        if part not in RECIPES and part not in FITTED_PARTS:
            raise ValueError(f'unknown part {part!r}; {nearest(part, (*TRAINED_PARTS, *FITTED_PARTS))}')
        kinds = {'': RECIPES.get(part, FittedRecipe)}
    lines = []
    for name, kind in kinds.items():
        for section, schema in kind.SECTIONS.items():
            if part in FITTED_PARTS and section != part:
                continue
            for key, (hint, default) in schema.described().items():
                default = kind.DEFAULT.get(section, {}).get(key, default)
                told = '' if default is inspect.Parameter.empty else f' = {default!r}'
                lines.append(f'{f"{name}.{section}.{key}".lstrip(".")}: {hint}{told}')
    return lines
