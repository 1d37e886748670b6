"""The parts of MusicLM that are fitted rather than trained, and the whole put together from its parts' folders."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from musiclm_pytorch.audiolm.convert import own_codec
from musiclm_pytorch.audiolm.saving import load_module
from musiclm_pytorch.audiolm.semantic import SemanticTokenizer
from musiclm_pytorch.audiolm.semantic_mulan import MuLaNSemanticTokenizer
from musiclm_pytorch.audiolm.semantic_transformers import TransformersSemanticTokenizer
from musiclm_pytorch.audiolm.spectral_codec import SpectralCodec
from musiclm_pytorch.audiolm.stages import STAGES
from musiclm_pytorch.checks import fitted, typechecked
from musiclm_pytorch.codecs.melody import MelodyQuantizer
from musiclm_pytorch.codecs.neural import NeuralCodec
from musiclm_pytorch.codecs.pretrained import PretrainedCodec
from musiclm_pytorch.data.collate import split_item
from musiclm_pytorch.data.generated import GeneratedMusic
from musiclm_pytorch.data.melodies import MelodyPairs
from musiclm_pytorch.data.shards import ShardedAudioText, ShardItems
from musiclm_pytorch.mulan.checkpoint import CONFIG_FILE, read_config, saved_kind
from musiclm_pytorch.mulan.melody import MelodyEncoder
from musiclm_pytorch.mulan.model import MuLaN
from musiclm_pytorch.mulan.text_transformer import PromptWarning
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pretrained.hub import find_folder
from musiclm_pytorch.quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.trainer.pipeline_recipe import FittedRecipe
from musiclm_pytorch.trainer.resumable_loader import seed_everything
from musiclm_pytorch.trainer.stage_recipes import MelodyRecipe
from musiclm_pytorch.trainer.stages import load_stage
from musiclm_pytorch.trainer.words import teach_everyday_words

PROMPTS_AT_ONCE = 25  # where scores are measured


def fit_quantizer(
    recipe: FittedRecipe, mulan: MuLaN, clips: Dataset, conditioning_dims: list[int]
) -> tuple[MuLaNEmbedQuantizer, list[float]]:
    """A quantizer by the section `quantizer`, of a MuLaN that is taught words by the section `words` before, and what
    `MuLaNEmbedQuantizer.fit` tells of it."""
    with recipe.section('quantizer') as keywords:
        if keywords.pop('trained_words_only', False):
            mulan = with_trained_words(mulan)
        built, fitted = split_keywords(keywords, MuLaNEmbedQuantizer)
    with recipe.section('words') as words:
        if words:
            mulan = teach_everyday_words(mulan, sampled=bool(recipe.tokens.get('synthetic_sound_font')), **words)
    with recipe.section('quantizer'):
        seed_everything(fitted.get('seed', 0))
        quantizer = MuLaNEmbedQuantizer(mulan, conditioning_dims=conditioning_dims, **built)
        return quantizer, fit_counted(quantizer, clips, 'quantizer', fitted)


def fit_melody(
    recipe: MelodyRecipe, folder: str | Path, *, resume: bool = False
) -> tuple[MelodyQuantizer, dict[str, Any], list[float]]:
    """A melody encoder trained in a folder and quantized; with the results of the training, and what
    `MelodyQuantizer.fit` tells."""
    seed_everything(recipe.seed)
    with recipe.section('model') as keywords:
        built, encoder = split_keywords(keywords, MelodyQuantizer)
        melody = MelodyQuantizer(MelodyEncoder(**encoder), **built)
    with recipe.section('data') as keywords:
        keywords = dict(sample_rate=melody.encoder.sample_rate, seed=recipe.seed) | keywords
        pairs = MelodyPairs(**keywords)
        # as many as hold 256 windows
        count = max(2, round(256 * melody.encoder.seconds / pairs.seconds))
        held_out = MelodyPairs(**keywords | dict(length=min(count, len(pairs))), split='valid')
    trainer = recipe.build_trainer(
        melody.encoder, pairs, valid_pairs=held_out, results_folder=Path(folder), resume=resume
    )
    found = trainer.train()
    melody.encoder.load_state_dict(load_module(model_in(Path(folder))).state_dict())
    return melody.eval(), found, melody.fit(pairs, max_items=max(256, melody.codebook_size), seed=recipe.seed)


def with_trained_words(mulan: MuLaN) -> MuLaN:
    """The same MuLaN without the embeddings of words that it was never trained on, and without what predicts words.

    Raises ValueError for one that has no record of them.
    """
    if not isinstance(mulan, MuLaN) or (known := mulan.text.known_ids()) is None:
        raise ValueError(
            f'this {type(mulan).__name__} has no record of the words that it knows; leave out trained_words_only'
        )
    text = mulan.text
    if text.config['known_tokens'] is None:
        text = text.with_known_tokens(known.nonzero().flatten().tolist())
    smaller = MuLaN(mulan.audio, text, **mulan.config | dict(word_prediction_weight=0.0))
    weights = mulan.state_dict() | {f'text.{name}': it for name, it in text.state_dict().items()}
    smaller.load_state_dict({name: it for name, it in weights.items() if not name.startswith('words.')})
    return smaller.eval()


def build_tokenizer(recipe: FittedRecipe, mulan: MuLaN | None) -> SemanticTokenizer:
    """A semantic tokenizer by the section `tokenizer`, not fitted yet: of the model that it names, or else of MuLaN."""
    with recipe.section('tokenizer') as keywords:
        if 'model' in keywords:
            return TransformersSemanticTokenizer(**split_keywords(keywords, TransformersSemanticTokenizer)[0])
        return MuLaNSemanticTokenizer(mulan, **split_keywords(keywords, MuLaNSemanticTokenizer)[0])


def build_spectral_codec(recipe: FittedRecipe) -> SpectralCodec:
    """A codec by the section `spectral_codec`, not fitted yet."""
    with recipe.section('spectral_codec') as keywords:
        return SpectralCodec(**split_keywords(keywords, SpectralCodec)[0])


def fit_by_recipe(recipe: FittedRecipe, section: str, module: SemanticTokenizer | SpectralCodec, clips: Dataset) -> Any:
    """Fit a tokenizer or a codec by its section; gives what its method `fit` tells."""
    with recipe.section(section) as keywords:
        fitted = split_keywords(keywords, type(module))[1]
        return fit_counted(module, clips, section.removeprefix('spectral_'), fitted)


class CountedClips(Dataset):
    """Clips by index that move a bar when they are read."""

    def __init__(self, clips: Dataset, bar: tqdm):
        self.clips, self.bar = clips, bar

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Any:
        item = self.clips[index]
        self.bar.update()
        return item

    def __getattr__(self, name: str) -> Any:
        if name == 'clips':  # not there yet
            raise AttributeError(name)
        return getattr(self.clips, name)


def fit_counted(module: nn.Module, clips: Dataset, name: str, keywords: dict[str, Any]) -> Any:
    """What `fit` of a module gives, with a bar of the clips that it has read, in a terminal."""
    total = min(len(clips), keywords.get('max_items') or len(clips))
    with tqdm(total=total, desc=name, unit='clip', disable=None) as bar:
        return module.fit(CountedClips(clips, bar), **keywords)


def split_keywords(keywords: dict[str, Any], kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of a constructor, and the others, which are those of `fit`."""
    of_constructor = inspect.signature(kind.__init__).parameters
    built = {name: it for name, it in keywords.items() if name in of_constructor}
    return built, {name: it for name, it in keywords.items() if name not in of_constructor}


@typechecked
def assemble_musiclm(
    parts: str | Path,
    *,
    codec: nn.Module | None = None,
    windows: tuple[float, float, float] | None = None,
    sampling: dict[str, Any] | None = None,
    knows: str | None = None,
    usual_score: float | None = None,
) -> MusicLM:
    """A MusicLM of the parts in the folders `quantizer`, `tokenizer`, `codec`, `semantic`, `coarse` and `fine`.

    Of what a trainer wrote, the best model is taken, or the last one if nothing was held out. Where the coarse stage
    makes all levels of the codec, there is no fine one.

    Args:
        parts: the folder that they are in.
        codec: the one to use, in place of the folder `codec`.
        windows, sampling, knows, usual_score: as of `MusicLM`; the windows by default those of the crops that the
            stages were trained on.

    Returns:
        the model, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: a part that is not there. ValueError: parts that do not belong together.
    """
    parts = Path(parts)
    quantizer = MuLaNEmbedQuantizer.from_pretrained(parts / 'quantizer')
    codec = own_codec(load_codec(parts / 'codec') if codec is None else codec)
    stages, told = {}, {}
    for name in STAGES:
        if name == 'fine' and stages['coarse'].num_levels == codec.num_quantizers:
            continue
        folder = model_in(parts / name)
        config = read_config(folder, f'{name.capitalize()}Trainer', ('model', 'keywords', 'stage'), optional=('step',))
        with config.refused("'stage' must hold seconds and unique_consecutive", config['stage']):
            seconds = fitted(config['stage']['seconds'], float, 'seconds')
            told[name] = dict(seconds=seconds, unique_consecutive=config['stage'].get('unique_consecutive'))
        stages[name] = load_module(folder)
        load_stage(folder, stages[name], quantizer if stages[name].has_condition else None)
    unique = {name: told[name]['unique_consecutive'] for name in ('semantic', 'coarse')}
    if len({*unique.values()}) > 1:
        raise ValueError(f'the semantic and the coarse stage in {parts} were trained with unique_consecutive {unique}')
    return MusicLM(
        mulan_embed_quantizer=quantizer,
        windows=windows or tuple(float(told[name if name in told else 'coarse']['seconds']) for name in STAGES),
        sampling=sampling,
        knows=knows,
        usual_score=usual_score,
        tokenizer=SemanticTokenizer.from_pretrained(parts / 'tokenizer'),
        codec=codec,
        unique_consecutive=unique['semantic'],
        **stages,
    ).eval()


def assemble_by_recipe(
    recipe: FittedRecipe, parts: Path, open_held_out: Callable[[MuLaN], Dataset], **keywords: Any
) -> tuple[MusicLM, torch.dtype]:
    """A MusicLM by the section `musiclm`, and what its weights are to be saved in.

    open_held_out: gives the pairs that `usual_score_prompts` of the section are from, if it has any.
    keywords: of `assemble_musiclm`, before those of the section.
    """
    with recipe.section('musiclm') as settings:
        dtype, prompts = getattr(torch, settings.pop('dtype', 'float32')), settings.pop('usual_score_prompts', None)
        musiclm = assemble_musiclm(parts, **settings | keywords)
        if prompts is not None:
            pairs = open_held_out(musiclm.mulan_embed_quantizer.mulan)
            musiclm.usual_score = measure_usual_score(musiclm, pairs, prompts)
    return musiclm, dtype


def measure_usual_score(musiclm: MusicLM, pairs: Dataset, count: int) -> float:
    """The score that 95 % of single samples reach, for the first captions of held-out pairs, of the length that the
    semantic stage sees."""
    if isinstance(pairs, ShardedAudioText):
        pairs = ShardItems(pairs)
    indices = range(min(count, len(pairs)))
    if isinstance(pairs, GeneratedMusic):  # its captions need no music
        prompts = [pairs.text(index) for index in indices]
    else:
        prompts = [split_item(item, 'a held-out pair')[1] for item in map(pairs.__getitem__, indices) if item]
    scores = []
    with warnings.catch_warnings(), tqdm(total=len(prompts), desc='usual score', unit='prompt', disable=None) as bar:
        warnings.simplefilter('ignore', PromptWarning)
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = prompts[start : start + PROMPTS_AT_ONCE]
            scores.append(musiclm(some, 1, seconds=musiclm.windows[0], seed=start, return_scores=True).scores[:, 0])
            bar.update(len(some))
    return round(torch.cat(scores).quantile(0.05).item(), 3)


def load_codec(source: str | Path, num_quantizers: int | None = None) -> nn.Module:
    """The codec in a folder, the best one if it was trained there; or one of `transformers`, by its folder or its name
    on the Hugging Face Hub. Of these, and of a `NeuralCodec`, the first `num_quantizers` levels are used, if given.

    Raises FileNotFoundError if there is none, ValueError for a folder that holds something else.
    """
    folder = model_in(find_folder(source))
    if saved_kind(folder) is None:
        return PretrainedCodec(str(source), **({} if num_quantizers is None else dict(num_quantizers=num_quantizers)))
    codec = load_module(folder)
    if num_quantizers is None:
        return codec
    if isinstance(codec, NeuralCodec):
        return codec.with_first_levels(num_quantizers)
    raise ValueError(
        f'the levels of the codec in {folder} are settled; num_quantizers is for a NeuralCodec and those of '
        'transformers'
    )


def model_in(folder: Path) -> Path:
    """Where the model to use lies: in the folder itself, or in `best` or `last`, where a trainer left it."""
    return next((it for it in (folder, folder / 'best', folder / 'last') if is_whole(it)), folder)


def is_whole(folder: Path) -> bool:
    """Whether a module was written there: its config is the last of its files."""
    return (folder / CONFIG_FILE).is_file()
