"""Recipes: a model, its data and its training in one file, checked when it is read and kept beside the results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from musiclm_pytorch.atomic import write_json
from musiclm_pytorch.checks import keywords_of
from musiclm_pytorch.data.generated import GeneratedMusic
from musiclm_pytorch.data.opening import GENERATED, open_pairs
from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.model import MuLaN
from musiclm_pytorch.mulan.pretrained_towers import PretrainedAudioTransformer, PretrainedTextTransformer
from musiclm_pytorch.mulan.recipes import create_optimized_audiospectrogram_transformer
from musiclm_pytorch.mulan.text_transformer import TextTransformer
from musiclm_pytorch.trainer.config import TrainingConfig
from musiclm_pytorch.trainer.config_schema import Section, check_sections, read_content, says_something
from musiclm_pytorch.trainer.mulan import MuLaNTrainer
from musiclm_pytorch.trainer.trainer import Trainer

FILE = 'recipe.json'
# what the recipe of a whole MusicLM may hold: parts with recipes of their own, and sections of what is fitted
TRAINED_PARTS = ('mulan', 'melody', 'codec', 'semantic', 'coarse', 'fine')
FITTED_PARTS = (
    'quantizer',
    'words',
    'text_encoder',
    'tokenizer',
    'spectral_codec',
    'pretrained_codec',
    'tokens',
    'musiclm',
)
IS_CODE = 'it is an object of Python; build the trainer in Python to pass one'


def write_recipe(content: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `recipe.json` into a folder."""
    path = Path(folder) / FILE
    write_json(path, content)
    return path


class Recipe:
    """Sections of keywords, checked when it is made and frozen from then on; each is an attribute, a dict.

    Args:
        sections: of those in `SECTIONS`; the others are as by default.
        source: what errors begin with.
    """

    part: ClassVar[str]  # its name in the recipe of a whole MusicLM
    SECTIONS: ClassVar[Mapping[str, Section]] = {}
    DEFAULT: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, *, source: str = 'the recipe', **sections: Any):
        content = copy.deepcopy({name: self.DEFAULT.get(name, {}) for name in self.SECTIONS} | sections)
        vars(self).update(check_sections(content, self.SECTIONS, source), source=source)

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenInstanceError(f'cannot assign to field {name!r}; use updated')

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None

    def __repr__(self) -> str:
        return f'{type(self).__name__}({", ".join(f"{name}={it!r}" for name, it in self.to_dict().items())})'

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML or JSON file, or the recipe of that name in the package. Of the recipe of a whole MusicLM, the
        part that this is for is taken. What it leaves out is as in the default recipe.

        Raises FileNotFoundError; ValueError for an unknown section or key and TypeError for a wrong value, which name
        the file and the key.
        """
        content, source = read_content(path), str(path)
        if is_whole(content, cls.SECTIONS):
            content, source = content.get(cls.part), f'{source}, part {cls.part}'
        return cls.from_content(content, source)

    @classmethod
    def from_content(cls, content: Any, source: str) -> Recipe:
        """The same, from what was read; errors begin with `source`."""
        return cls(source=source).updated(**check_sections({} if content is None else content, cls.SECTIONS, source))

    @classmethod
    def default(cls) -> Recipe:
        return cls(source='the default recipe')

    def updated(self, **sections: Mapping[str, Any]) -> Recipe:
        """The recipe with other values for some keys; a key takes the place of others that say the same thing."""
        content = self.to_dict()
        for name, changes in sections.items():
            section = self.SECTIONS[name]
            replaced = {
                other for key, it in changes.items() if says_something(it) for other in section.alternatives(key)
            }
            kept = {key: value for key, value in content[name].items() if key not in replaced}
            content[name] = {**kept, **changes}
        return type(self)(**content, source=self.source)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {name: getattr(self, name) for name in self.SECTIONS}

    def save(self, folder: str | Path) -> Path:
        """Write `recipe.json` into a folder; `load` reads it."""
        return write_recipe(self.to_dict(), folder)

    @contextmanager
    def section(self, name: str) -> Iterator[dict[str, Any]]:
        """The keywords of a section; what they are refused for tells where they stand."""
        try:
            yield dict(getattr(self, name))
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f'{self.source}, section {name!r}: {error}') from error


def is_whole(content: Any, sections: Mapping[str, Section]) -> bool:
    """Whether a recipe is one of a whole MusicLM, and not of the one part that has these sections."""
    if not content or not isinstance(content, Mapping) or not content.keys() <= {*TRAINED_PARTS, *FITTED_PARTS}:
        return False
    # 'mulan' is a part, and a section of that part
    same = [content[name] for name in content if name in sections]
    return len(same) < len(content) or all(isinstance(it, Mapping) and it.keys() <= sections.keys() for it in same)


def training_section(trainer: type[Trainer], model: str, **refused: str) -> Section:
    """The section `training`: keywords of a trainer, but for what the command line and the other sections say."""
    names = ('step_module', 'collate_fn', 'grouping', 'callbacks')
    elsewhere = dict(
        dataset='say --data on the command line',
        valid_dataset='say --valid-data on the command line',
        results_folder='say --output on the command line',
        resume='say --resume on the command line',
        config='its fields are keys of this section',
        folder='it does nothing',
    )
    ways = (
        {'num_epochs', 'num_train_steps'},
        {'checkpoint_every', 'save_model_every'},
        {'mixed_precision', 'use_mixed_precision'},
        {'optimizer', 'use_lion'},
    )
    return Section(
        (trainer,),
        refused=dict.fromkeys(names, IS_CODE) | dict(model=model) | elsewhere | refused,
        groups=tuple(map(frozenset, ways)),
    )


class TrainedRecipe(Recipe):
    """A recipe with the section `training`, of which a trainer is built."""

    trainer: ClassVar[Callable[..., Trainer]]

    @property
    def seed(self) -> int:
        return self.training.get('seed', TrainingConfig.seed)

    @property
    def train_keywords(self) -> dict[str, int]:
        """How long to train: keywords of `Trainer.train`, which the trainer was built with, too."""
        return {key: it for key in ('num_epochs', 'num_train_steps') if (it := self.training.get(key)) is not None}

    def build_trainer(self, model: nn.Module, data: Any, **keywords: Any) -> Trainer:
        """A trainer; `keywords` are those that do not stand in a recipe."""
        with self.section('training') as training:
            for name, other in (('num_epochs', 'num_train_steps'), ('num_train_steps', 'num_epochs')):
                if keywords.get(name) is not None:  # a length that is given takes the place of the recipe's
                    training.pop(other, None)
            trainer = self.trainer(model, data, **{**training, **keywords})
        trainer.recipe = self
        return trainer


def tower_section(pretrained: Callable, *own: Callable) -> Section:
    """The section of a tower: one of ours, or one that others trained, which the key `model` names."""
    theirs = keywords_of(pretrained).keys()
    ours = {name for it in own for name in keywords_of(it)}
    files = dict.fromkeys(('tokenizer', 'feature_extractor'), 'it lies beside the model')
    return Section(
        (*own, pretrained),
        refused={name: why for name, why in files.items() if name in theirs},
        groups=tuple(frozenset(('model', name)) for name in sorted(ours - theirs - {'keywords'})),
    )


class MuLaNRecipe(TrainedRecipe):
    """Sections `audio`, `text` and `mulan` (the model), `data` and `training`.

    The key `group_by` of `data` names labels of generated music, such as [instrument, register]: clips that are alike
    in them become the `groups` of `MuLaNTrainer`.

    The key `model` of `audio` and `text` names an encoder of `transformers`, which takes the place of our tower.
    """

    part = 'mulan'
    trainer = MuLaNTrainer
    SECTIONS: ClassVar[Mapping[str, Section]] = {
        'audio': tower_section(
            PretrainedAudioTransformer, create_optimized_audiospectrogram_transformer, AudioSpectrogramTransformer
        ),
        'text': tower_section(PretrainedTextTransformer, TextTransformer),
        'mulan': Section(
            (MuLaN,),
            refused=dict(
                audio_transformer="the audio tower is section 'audio'",
                text_transformer="the text tower is section 'text'",
            ),
        ),
        'data': Section(
            (open_pairs,),
            refused=dict(
                source='say --data on the command line',
                audio_folder='say --audio-folder on the command line',
                sample_rate="it is audio_sample_rate in section 'audio'",
                training='it follows from what the data is for: --data or --valid-data',
            ),
            more=dict(group_by=list[str]),
        ),
        'training': training_section(
            MuLaNTrainer,
            "the model is sections 'audio', 'text' and 'mulan'",
            mulan="the model is sections 'audio', 'text' and 'mulan'",
            groups="name labels by group_by in section 'data', or build the trainer in Python",
        ),
    }
    DEFAULT: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        'audio': dict(dim=256, depth=4, use_case='music', audio_sample_rate=16000, support_variable_length=True),
        'text': dict(dim=256, depth=4),
        'mulan': dict(dim_latent=128),
        'data': dict(max_seconds=10.0),
        'training': dict(
            num_epochs=20,
            lr=5e-4,
            optimizer='adamw',
            weight_decay=0.05,
            lr_scheduler_type='cosine',
            warmup_steps=500,
            use_ema=True,
            checkpoint_every=500,
            seed=42,
        ),
    }

    def build_model(self) -> MuLaN:
        """A new model, with weights drawn from torch's generator."""
        for name in ('audio', 'text'):
            if isinstance(getattr(self, name).get('model'), dict):
                raise ValueError(
                    f"{self.source}: 'model' of the section {name} is a config without weights, of a model that was "
                    'given with --init-from: give it again'
                )
        with self.section('audio') as keywords:
            own = create_optimized_audiospectrogram_transformer
            audio = (PretrainedAudioTransformer if 'model' in keywords else own)(**keywords)
        with self.section('text') as keywords:
            text = (PretrainedTextTransformer if 'model' in keywords else TextTransformer)(**keywords)
        with self.section('mulan') as keywords:
            return MuLaN(audio, text, **keywords)

    def with_model_of(self, mulan: MuLaN) -> MuLaNRecipe:
        """The recipe of a model that was built elsewhere."""
        model = dict(audio=mulan.audio.config, text=mulan.text.config, mulan=mulan.config)
        return MuLaNRecipe(**self.to_dict() | model, source=self.source)

    def open_data(self, data: str, mulan: MuLaN, *, audio_folder: str | None = None, training: bool = True) -> Any:
        """The data set at `data`, as the model wants it; see `open_pairs`."""
        if mulan.sample_rate is None:
            raise ValueError('the model does not know its sample rate; build it with audio_sample_rate')
        with self.section('data') as keywords:
            keywords.pop('group_by', None)
            return open_pairs(
                data, sample_rate=mulan.sample_rate, audio_folder=audio_folder, training=training, **keywords
            )

    def open_held_out(
        self, data: str, mulan: MuLaN, valid_data: str | None, *, audio_folder: str | None = None
    ) -> Any | None:
        """The pairs at `valid_data`, or the split 'valid' of generated music; None where a share of the data is all."""
        if valid_data is None and data not in GENERATED:
            return None
        return self.open_data(valid_data or data, mulan, audio_folder=audio_folder, training=False)

    def build_trainer(self, model: MuLaN, data: Any, **keywords: Any) -> MuLaNTrainer:
        if names := self.data.get('group_by'):
            with self.section('data'):
                keywords['groups'] = groups_of(data, names)
        return super().build_trainer(model, data, **keywords)


def groups_of(dataset: Any, names: list[str]) -> list[tuple]:
    """What the items of generated music have in common by these labels. Raises ValueError for data without them."""
    if not isinstance(dataset, GeneratedMusic):
        raise ValueError(
            f'group_by needs the labels of "synthetic" or "scores", which a {type(dataset).__name__} has not'
        )
    known = dataset.labels(0)
    if unknown := [name for name in names if not hasattr(known, name)]:
        raise ValueError(f'group_by: {dataset!r} has no label {unknown[0]!r}')
    return [tuple(getattr(labels, name) for name in names) for labels in map(dataset.labels, range(len(dataset)))]
