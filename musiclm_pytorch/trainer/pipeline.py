"""The whole of MusicLM from one data set: every part trained or fitted in turn, and put together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from musiclm_pytorch.atomic import read_checked_json, write_json
from musiclm_pytorch.audiolm.convert import own_codec
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.audiolm.semantic import SemanticTokenizer
from musiclm_pytorch.audiolm.stages import STAGES
from musiclm_pytorch.audiolm.tokens import compute_tokens
from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.codecs.melody import MelodyQuantizer
from musiclm_pytorch.collectives import num_launched
from musiclm_pytorch.data.opening import GENERATED, open_whole_clips
from musiclm_pytorch.data.shard_writer import write_shards
from musiclm_pytorch.data.shards import webdataset
from musiclm_pytorch.locking import only_writer
from musiclm_pytorch.mulan.checkpoint import load_strictly, read_config
from musiclm_pytorch.mulan.model import MuLaN
from musiclm_pytorch.mulan.pretrained_towers import PretrainedTextTransformer
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pretrained import find_pretrained
from musiclm_pytorch.quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.trainer.assembly import (
    assemble_by_recipe,
    build_spectral_codec,
    build_tokenizer,
    fit_by_recipe,
    fit_melody,
    fit_quantizer,
    is_whole,
    load_codec,
    model_in,
)
from musiclm_pytorch.trainer.config import TrainingConfig
from musiclm_pytorch.trainer.folders import holds_something, moved_aside, new_results
from musiclm_pytorch.trainer.pipeline_recipe import CODEC_PARTS, MusicLMRecipe
from musiclm_pytorch.trainer.recipes import FILE
from musiclm_pytorch.trainer.resumable_loader import seed_everything

logger = logging.getLogger(__name__)

SOURCE_FILE = 'data.json'
# the folders of what is made of each part of a recipe that may change until there is one
MADE_OF = dict(
    quantizer=('quantizer',),
    words=('quantizer',),
    tokenizer=('tokenizer',),
    **dict.fromkeys(CODEC_PARTS, ('codec',)),
    tokens=('clips', 'quantizer', 'tokenizer', 'codec', 'tokens'),
    **{name: (name,) for name in STAGES},
    musiclm=(),  # which is put together anew
)
NONE_BY_DEFAULT = ('semantic_per_frame',)  # sizes of a stage that are something else where they are not said


@typechecked
def train_musiclm(
    data: str | Path,
    output: str | Path,
    recipe: MusicLMRecipe | None = None,
    *,
    audio_folder: str | Path | None = None,
    valid_data: str | Path | None = None,
    valid_audio_folder: str | Path | None = None,
    begin_with: str | Path | None = None,
    resume: bool = False,
    on_part: Callable[[str, float], None] | None = None,
    on_begin: Callable[[str, int, int], None] | None = None,
) -> MusicLM | None:
    """Train a MusicLM from nothing: MuLaN, what hears melodies if the recipe has that part, quantizer, semantic
    tokenizer, codec, tokens, and the three stages. With a `text_encoder` in the recipe there is no quantizer, no MuLaN
    unless the tokenizer is of one, and no MusicLM.

    Each part lies in a folder of its own under `output`, the whole in `output/musiclm`, which
    `MusicLM.from_pretrained` reads. Interrupted, the same call with `resume` passes over the parts that are finished
    and goes on in the one that is not.

    Args:
        data: pairs of audio and text: whatever `musiclm_pytorch.data.opening.open_pairs` opens.
        output: where everything goes.
        recipe: of every part; the default one, or with `resume` the one in `output`, if it is left out.
        audio_folder: where the audio of a manifest lies, if not beside it; MusicCaps needs it.
        valid_data: held-out pairs for MuLaN, as `data`; by default a share of `data`, and none of shards.
        valid_audio_folder: the same for `valid_data`.
        begin_with: a MusicLM of the same sizes, its folder or the name of one that ships: its codec and its semantic
            tokenizer are taken as they are, the stages go on from its weights, and MuLaN from what fits of them.
        resume: go on from what is in `output`; otherwise that is moved aside.
        on_part: called with each part's name and the seconds that it took.
        on_begin: called before each part with its name, its number from 1 on, and how many there are.

    Returns:
        the model, in eval mode; None of a recipe with a `text_encoder`, whose stages are in their folders.

    Raises:
        ValueError: several processes, a recipe or data that are not those of the run to resume, data without enough
            clips. FolderInUseError: another run writes into `output`.
    """
    if num_launched() > 1:
        raise ValueError(
            'all parts in one run is for one process; with several, run musiclm train mulan, quantizer, codec, then '
            'musiclm tokens, then musiclm train semantic, coarse, fine'
        )
    with only_writer(output):
        source = dict(
            data=str(data),
            audio_folder=audio_folder,
            valid_data=valid_data,
            valid_audio_folder=valid_audio_folder,
            begin_with=None if begin_with is None else find_pretrained(begin_with).resolve(),
        )
        source = {name: None if it is None else str(it) for name, it in source.items()}
        return _train(source, Path(output), recipe, resume, on_part, on_begin)


def _train(
    source: dict[str, str | None],
    output: Path,
    recipe: MusicLMRecipe | None,
    resume: bool,
    on_part: Callable[[str, float], None] | None,
    on_begin: Callable[[str, int, int], None] | None,
) -> MusicLM | None:
    recipe = agreed_recipe(recipe, output, resume)
    if resume:
        source = agreed_source(output / SOURCE_FILE, source)
        if not holds_something(output):
            known = moved_aside(output, FILE)
            hint = '' if known is None else f'; an earlier run is in {known}'
            logger.warning('nothing to resume in %s: every part is trained from its beginning%s', output, hint)
    else:
        check_outside(output, source)
    parts = _Parts(output, recipe, resume, **source)
    left_out = {'melody': recipe.melody is None, 'mulan': not recipe.needs_mulan, 'fine': recipe.fine is None}
    left_out |= dict.fromkeys(('quantizer', 'musiclm'), recipe.text_encoder is not None)
    names = ('mulan', 'melody', 'quantizer', 'tokenizer', 'codec', 'tokens', *STAGES, 'musiclm')
    names = [it for it in names if not left_out.get(it)]
    with said_once('musiclm_pytorch.data.datasets', 'musiclm_pytorch.data.reading'):  # of files that are left out
        # what is wrong with the data or the recipe shows here, while everything is where it was
        parts.check()
        parts.open_pretrained()
        parts.open_mulan()
        with new_results(output, resume=resume, clear=False):
            recipe.save(output)
            write_json(output / SOURCE_FILE, source)
        for number, name in enumerate(names, 1):
            if on_begin is not None:
                on_begin(name, number, len(names))
            start = time.perf_counter()
            made = None if parts.is_made(name) else parts.make(name)
            if on_part is not None:
                on_part(name, time.perf_counter() - start)
    return made


@contextmanager
def said_once(*loggers: str) -> Iterator[None]:
    """Let loggers say each thing once: every part opens the same data."""
    said = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message in said or said.add(message))

    for name in loggers:
        logging.getLogger(name).addFilter(is_new)
    try:
        yield
    finally:
        for name in loggers:
            logging.getLogger(name).removeFilter(is_new)


def agreed_recipe(recipe: MusicLMRecipe | None, output: Path, resume: bool) -> MusicLMRecipe:
    """The recipe given, the one of the run to resume, or the default one. Raises ValueError if the first two differ in
    what is made already."""
    if not (resume and (output / FILE).is_file()):
        return recipe or MusicLMRecipe()
    earlier = MusicLMRecipe.load(output / FILE)
    if recipe is None or recipe.to_dict() == earlier.to_dict():
        return earlier
    given, kept = recipe.to_dict(), earlier.to_dict()
    differ = [name for name in {**given, **kept} if given.get(name) != kept.get(name)]
    made_of = dict(MADE_OF)
    if recipe.conditioning_dims != earlier.conditioning_dims:  # the quantizer's embeddings are as wide as the stages
        made_of |= {name: (name, 'quantizer') for name in STAGES}
    fixed = [it for it in differ if it not in made_of or any(holds_something(output / made) for made in made_of[it])]
    if not fixed:
        return recipe
    raise ValueError(
        f'the run in {output} has another recipe: {", ".join(fixed)} differ; leave the recipe out to go on with it, or '
        'give another folder. Only what nothing was made of yet may change'
    )


def agreed_source(path: Path, source: dict[str, str | None]) -> dict[str, str | None]:
    """What the run to resume was begun with, if that is what is given now. Raises ValueError if it is not."""
    earlier = read_checked_json(path) if path.is_file() else source
    if not isinstance(earlier, dict) or 'data' not in earlier:
        raise ValueError(f'{path} does not tell what data the run was begun with; give another folder')
    if any(earlier.get(name) != source[name] for name in ('data', 'audio_folder')):
        raise ValueError(
            f'the run in {path.parent} was begun with {earlier["data"]!r}, now the data are {source["data"]!r}: its '
            'parts would not belong together; give another folder'
        )
    known, given = earlier.get('begin_with'), source['begin_with']
    if given is not None and given != known:
        raise ValueError(
            f'the run in {path.parent} was begun with {known or "no other model"}, now begin_with is {given}: its '
            'parts would not belong together; leave it out to go on, or give another folder'
        )
    return {name: earlier.get(name) if it is None else it for name, it in source.items()}


def check_outside(output: Path, source: dict[str, str | None]) -> None:
    """Raise ValueError for a source in the folder of results, which is moved aside when training begins anew."""
    for name, place in source.items():
        if place is None or place in GENERATED or not output.is_dir():
            continue
        if Path(place).resolve().is_relative_to(output.resolve()):
            raise ValueError(f'{name} {place} lies in {output}, which a new run moves aside; give another output')


@dataclass
class _Parts:
    """The parts in order, each in its folder."""

    output: Path
    recipe: MusicLMRecipe
    resume: bool
    data: str
    audio_folder: str | None
    valid_data: str | None
    valid_audio_folder: str | None
    begin_with: str | Path | None

    def __post_init__(self):
        self.begin_with = None if self.begin_with is None else Path(self.begin_with)

    def is_made(self, name: str) -> bool:
        """Whether a part of the run to resume is finished. The whole is put together anew, to be given back."""
        folder = self.output / name
        return self.resume and name != 'musiclm' and (is_whole(folder) or is_whole(folder / 'last'))

    def make(self, name: str) -> MusicLM | None:
        return self.stage(name) if name in STAGES else getattr(self, name)()

    def check(self) -> None:
        """Raise ValueError or ImportError for what would else show after hours."""
        lacks_held_out = self.valid_data is None and self.data not in GENERATED
        if 'usual_score_prompts' in self.recipe.fitted.musiclm and lacks_held_out:
            raise ValueError('usual_score_prompts needs held-out captions: give valid_data (--valid-data)')
        with self.recipe.fitted.section('words') as words:
            if words and (self.data != 'synthetic' or self.recipe.text_encoder is not None):
                raise ValueError(
                    'ordinary words are taught in the words of SyntheticMusic to a MuLaN that goes into a quantizer; '
                    'leave the section out for other data than "synthetic", and beside a text_encoder'
                )
            check_positive(**{name: it for name, it in words.items() if name != 'seed'})
        if self.recipe.fitted.tokens.get('synthetic_rendered') is not None and self.data in GENERATED:
            webdataset()
        self.check_batches()
        fits_codec = self.recipe.codec is None and not self.recipe.fitted.pretrained_codec
        if fits_codec and self.begin_with is None and not self.is_made('codec'):
            build_spectral_codec(self.recipe.fitted)
        if self.begin_with is None:
            return
        if self.recipe.text_encoder is not None:
            raise ValueError(
                f"begin_with is a MusicLM, whose stages read MuLaN's codes, and {self.recipe.text_encoder} is to "
                'condition these; leave one of them out'
            )
        for name in STAGES:
            if getattr(self.recipe, name) is None or self.is_made(name):
                continue  # needs it no more
            config = read_config(self.begin_with / name, 'save_module', ('model', 'keywords'), ('step', 'stage'))
            kept, wanted = config['keywords'], getattr(self.recipe, name).model
            wanted = dict.fromkeys(NONE_BY_DEFAULT) | wanted
            kept = dict.fromkeys(NONE_BY_DEFAULT) | kept
            differ = {key: (kept[key], it) for key, it in wanted.items() if kept.get(key, it) != it}
            if differ:
                key, (old, new) = next(iter(differ.items()))
                raise ValueError(
                    f'the {name} stage in {self.begin_with} has {key} {old}, the recipe says {new}: '
                    'begin_with is for stages of the same sizes'
                )
        if not (self.recipe.fitted.pretrained_codec or self.is_made('codec')):
            self.recipe.check_levels(own_codec(load_module(self.begin_with / 'codec')).num_quantizers)

    def check_batches(self) -> None:
        """Raise ValueError for a part whose batch is larger than the data."""
        how = dict(sample_rate=16000, audio_folder=self.audio_folder, **self.recipe.synthetic)
        clips = len(open_whole_clips(self.data, **how))
        for name in ('codec', *STAGES):
            recipe = getattr(self.recipe, name)
            if recipe is None or self.is_made(name) or not recipe.training.get('drop_last', TrainingConfig.drop_last):
                continue
            held_out = max(1, round(recipe.training.get('valid_frac', TrainingConfig.valid_frac) * clips))
            batch = recipe.training.get('batch_size') or 1
            if (left := clips - held_out) < batch:
                raise ValueError(
                    f'the part {name} has batches of {batch}, but of {clips} clips {left} are left beside those held '
                    f'out; lower it: --{name}.training.batch_size {max(1, left)}, or batch_size in the recipe'
                )

    def open_mulan(self) -> None:
        """Build the trainer of the first part, unless that is finished."""
        recipe, folder = self.recipe.mulan, self.output / 'mulan'
        if not self.recipe.needs_mulan or self.is_made('mulan'):
            return
        seed_everything(recipe.seed)
        mulan = recipe.build_model()
        if self.begin_with is not None:
            mulan.load_matching(self.begin_with / 'quantizer' / 'mulan')
        held_out = self.held_out(mulan)
        dataset = recipe.open_data(self.data, mulan, audio_folder=self.audio_folder)
        resume = self.resume and holds_something(folder)
        self.mulan_trainer = recipe.build_trainer(
            mulan, dataset, valid_dataset=held_out, results_folder=folder, resume=resume
        )

    def open_pretrained(self) -> None:
        """Find the models that are trained already, unless they are among the parts of the run to resume."""
        self.text_encoder = None
        if (source := self.recipe.text_encoder) is not None:
            with self.recipe.fitted.section('text_encoder'):
                self.text_encoder = PretrainedTextTransformer(source)
        if 'model' in self.recipe.fitted.tokenizer and not self.is_made('tokenizer'):
            build_tokenizer(self.recipe.fitted, None)
        with self.recipe.fitted.section('pretrained_codec') as keywords:
            if keywords and not self.is_made('codec'):
                if 'source' not in keywords:
                    raise ValueError('source is missing: the folder of the codec, or its name on the Hugging Face Hub')
                self.pretrained_codec = load_codec(**keywords)
                self.recipe.check_levels(own_codec(self.pretrained_codec).num_quantizers)

    def mulan(self) -> None:
        self.mulan_trainer.train()

    def melody(self) -> None:
        training = self.output / 'melody_training'
        melody, *_ = fit_melody(self.recipe.melody, training, resume=holds_something(training))
        melody.save_pretrained(self.output / 'melody')

    def quantizer(self) -> None:
        mulan = MuLaN.from_pretrained(model_in(self.output / 'mulan'))
        clips = self.clips(mulan.sample_rate)
        quantizer, _ = fit_quantizer(self.recipe.fitted, mulan, clips, self.recipe.conditioning_dims)
        if self.recipe.melody is not None:
            quantizer.add_melody(MelodyQuantizer.from_pretrained(self.output / 'melody'))
        quantizer.save_pretrained(self.output / 'quantizer')

    def tokenizer(self) -> None:
        folder = self.output / 'tokenizer'
        if self.begin_with is not None:
            SemanticTokenizer.from_pretrained(self.begin_with / 'tokenizer').save_pretrained(folder)
            return
        mulan = MuLaN.from_pretrained(model_in(self.output / 'mulan')) if self.recipe.needs_mulan else None
        tokenizer = build_tokenizer(self.recipe.fitted, mulan)
        fit_by_recipe(self.recipe.fitted, 'tokenizer', tokenizer, self.clips(tokenizer.target_sample_hz))
        tokenizer.save_pretrained(folder)

    def codec(self) -> None:
        folder, recipe = self.output / 'codec', self.recipe.codec
        if self.recipe.fitted.pretrained_codec:
            save_module(self.pretrained_codec, folder)
        elif self.begin_with is not None:
            save_module(load_module(self.begin_with / 'codec'), folder)
        elif recipe is None:
            codec = build_spectral_codec(self.recipe.fitted)
            fit_by_recipe(self.recipe.fitted, 'spectral_codec', codec, self.clips(codec.target_sample_hz))
            save_module(codec, folder)
        else:
            seed_everything(recipe.seed)
            codec = recipe.build_model()
            dataset = recipe.open_data(self.data, codec, audio_folder=self.audio_folder)
            rate = codec.target_sample_hz
            resume = holds_something(folder)
            trainer = recipe.build_trainer(codec, dataset, sample_rate=rate, results_folder=folder, resume=resume)
            trainer.train()

    def tokens(self) -> None:
        tokenizer = SemanticTokenizer.from_pretrained(self.output / 'tokenizer')
        modules = dict(tokenizer=tokenizer, codec=load_codec(self.output / 'codec'))
        rate = max(it.target_sample_hz for it in modules.values())
        modules |= self.conditioned_by()
        if (quantizer := modules.get('quantizer')) is not None:
            rate = max(rate, quantizer.mulan.sample_rate)
        with self.recipe.fitted.section('tokens') as keywords:
            keywords = {name: it for name, it in keywords.items() if not name.startswith('synthetic_')}
            compute_tokens(self.clips(rate), self.output / 'tokens', sample_rate=rate, **modules, **keywords)

    def stage(self, name: str) -> None:
        recipe, folder = getattr(self.recipe, name), self.output / name
        condition, tokens = self.conditioned_by(), self.output / 'tokens'
        seed_everything(recipe.seed)
        transformer = recipe.build_model(tokens, **condition)
        if self.begin_with is not None:
            weights = load_module(self.begin_with / name).state_dict()
            load_strictly(transformer, weights, source=self.begin_with / name)
        trainer = recipe.build_trainer(
            transformer, tokens, **condition, results_folder=folder, resume=holds_something(folder)
        )
        trainer.train()

    def musiclm(self) -> MusicLM:
        musiclm, dtype = assemble_by_recipe(self.recipe.fitted, self.output, self.held_out, windows=self.recipe.windows)
        musiclm.save_pretrained(self.output / 'musiclm', dtype=dtype)
        return musiclm

    def clips(self, sample_rate: int) -> Dataset:
        """Whole clips, for what is fitted and for the tokens."""
        data, synthetic = self.data, self.recipe.synthetic
        rate = self.recipe.fitted.tokens.get('synthetic_rendered')
        if rate is not None and data in GENERATED:
            data = str(self.output / 'clips')
            write_shards(open_whole_clips(self.data, sample_rate=rate, **synthetic), data)
        return open_whole_clips(data, sample_rate=sample_rate, audio_folder=self.audio_folder, **synthetic)

    def held_out(self, mulan: MuLaN) -> Dataset | None:
        """Pairs that MuLaN is validated on; None where it is by a share of the data."""
        return self.recipe.mulan.open_held_out(self.data, mulan, self.valid_data, audio_folder=self.valid_audio_folder)

    def conditioned_by(self) -> dict[str, nn.Module]:
        """What conditions the stages, as a keyword of tokens and trainers."""
        if self.text_encoder is not None:
            return dict(text_encoder=self.text_encoder)
        return dict(quantizer=MuLaNEmbedQuantizer.from_pretrained(self.output / 'quantizer'))
