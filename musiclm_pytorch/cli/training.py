"""The subcommands of what is trained step by step, and of all parts in turn."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from musiclm_pytorch.cli.options import (
    COMMAND_LINE,
    PAIRS,
    add_codec,
    add_config,
    add_data,
    add_output,
    add_text_encoder,
    add_training,
    add_valid_data,
    command,
    open_clips,
    open_text_encoder,
    option,
    overrides_of,
    read_recipe,
    read_whole,
    tell_model,
    write_results,
)
from musiclm_pytorch.cli.parser import models_that_ship, or_a_path
from musiclm_pytorch.cli.parts import train_melody, train_quantizer, train_tokenizer

STAGES = dict(
    semantic='semantic tokens from conditioning',
    coarse='coarse acoustic tokens from semantic ones',
    fine='fine acoustic tokens from coarse ones',
)
METRICS = dict(recall_at_1='R@1', recall_at_5='R@5', recall_at_10='R@10', median_rank='median rank', map_at_10='mAP@10')


def train(subcommands) -> None:
    parser = subcommands.add_parser('train', help='train a model', description='Train a model on audio and captions.')
    models = parser.add_subparsers(dest='model', required=True, metavar='MODEL')
    train_mulan(models)
    train_melody(models)
    train_quantizer(models)
    train_tokenizer(models)
    train_codec(models)
    for stage, what in STAGES.items():
        train_stage(models, stage, what)
    train_all(models)


def train_mulan(models) -> None:
    parser = command(
        models,
        'mulan',
        run_train_mulan,
        'MuLaN, the joint embedding of music and text',
        'Train MuLaN. Works as it is under `torchrun` and `accelerate launch` too.',
    )
    add_data(parser, PAIRS)
    add_valid_data(parser, 'held-out pairs, as --data (default: a share of --data; none for shards)')
    add_training(parser, 'grad_cache_chunk_size')
    option(
        parser,
        '--init-from',
        metavar='FOLDER',
        completer=or_a_path(models_that_ship),
        help='start from the model in this folder, written by save_pretrained; then the sections audio, text and mulan '
        'of a recipe are not used',
    )
    option(
        parser,
        '--init-matching-from',
        metavar='FOLDER',
        completer=or_a_path(models_that_ship),
        help='build the model of the recipe, and take over from the model in this folder what fits, such as one of '
        'another vocabulary; what does not is named',
    )
    add_lora(parser, '--init-from')


def train_codec(models) -> None:
    parser = command(
        models,
        'codec',
        run_train_codec,
        'the codec, waves to tokens and back',
        'Train a SoundStream, or a NeuralCodec by the recipe codec_neural; or, by a recipe of every part that has no '
        'part codec, such as musiclm_small, fit a SpectralCodec, which takes a CPU half a minute.',
    )
    add_data(parser, audio_folder=False)
    option(
        parser,
        '--begin-with',
        metavar='FOLDER',
        help="start from the codec in this folder, a trainer's or that of a MusicLM, or of one that ships by its name; "
        'then the section model of a recipe is not used',
    )
    option(parser, '--levels', metavar='N', help='keep only this many levels of codes of a NeuralCodec of --begin-with')
    option(
        parser,
        '--decoder-only',
        action='store_true',
        help='train the decoder of a NeuralCodec of --begin-with alone: codes, and what was made of them, stay valid',
    )
    add_training(parser)


def train_stage(models, stage: str, what: str) -> None:
    parser = command(models, stage, run_train_stage, what, f'Train the {stage} stage: {what}.', stage=stage)
    what = 'tokens, made by `musiclm tokens`; several folders, of different clips, are used together'
    option(parser, '--tokens', metavar='FOLDER', nargs='+', required=True, help=what)
    what = 'held-out tokens (default: a share of --tokens)'
    option(parser, '--valid-tokens', metavar='FOLDER', nargs='+', help=what)
    condition = parser.add_mutually_exclusive_group()
    what = 'the fitted quantizer that conditions the stage; without it, the stage has no conditioning'
    option(condition, '--quantizer', metavar='FOLDER', help=what)
    what = 'what conditions the stage in place of a quantizer, by the words of the captions; not for a MusicLM'
    add_text_encoder(condition, what)
    option(
        parser,
        '--begin-with',
        metavar='FOLDER',
        help="start from the stage in this folder, a trainer's or that of a MusicLM, or of one that ships by its name; "
        'then the section model of a recipe is not used. What it was trained without, such as a melody, is added',
    )
    add_lora(parser, '--begin-with')
    add_training(parser)


def add_lora(parser, start: str) -> None:
    option(
        parser,
        '--lora',
        metavar='RANK',
        type=int,
        help=f'train adapters of this rank alone, on the model of {start}; they are in the folder adapters within '
        'those of the model, which has them merged',
    )


def train_all(models) -> None:
    parser = command(
        models,
        'all',
        run_train_all,
        'every part of MusicLM in turn, and the whole put together',
        'Train MuLaN, quantizer, semantic tokenizer, codec and the three stages, each in a folder of its own under '
        '--output; the model is in the folder musiclm there. With --text_encoder.model SOURCE, such as '
        'google/t5-v1_1-base, words condition the stages, which are all that is made. Interrupted, the same command '
        'with --resume goes on where it was.',
    )
    add_data(parser)
    add_valid_data(parser, 'held-out pairs for MuLaN, as --data (default: a share of --data; none for shards)')
    add_config(
        parser,
        'a recipe of every part: a YAML or JSON file, or a name that `musiclm recipes` lists, such as musiclm_small; '
        'what it leaves out is as in the default recipe',
    )
    add_output(parser, 'where everything goes')
    resume = 'go on with the run under --output, by the recipe there; otherwise what is there is moved aside'
    option(parser, '--resume', action='store_true', help=resume)
    option(parser, '--seed', metavar='N', help='of every part, instead of those of the recipe')
    add_codec(parser, 'instead of the one of the recipe')
    option(
        parser,
        '--begin-with',
        metavar='FOLDER',
        completer=or_a_path(models_that_ship),
        help='a MusicLM of the same sizes, or the name of one that ships: its codec and semantic tokenizer are taken '
        'as they are, the stages go on from its weights, and MuLaN from what fits of them',
    )


# ---- what they do ----


def run_train_mulan(options: argparse.Namespace) -> dict[str, Any] | None:
    from musiclm_pytorch.mulan.model import MuLaN
    from musiclm_pytorch.trainer.recipes import MuLaNRecipe
    from musiclm_pytorch.trainer.resumable_loader import seed_everything

    recipe = read_recipe(MuLaNRecipe, options)
    seed_everything(recipe.seed)
    if None not in (options.init_from, options.init_matching_from):
        raise ValueError('--init-from takes a model as it is, --init-matching-from what fits of it; give one of them')
    if options.init_from is None:
        mulan = recipe.build_model()
        if options.init_matching_from is not None:
            mulan.load_matching(options.init_matching_from)
    else:
        mulan = MuLaN.from_pretrained(options.init_from)
        recipe = recipe.with_model_of(mulan)
    adapt(mulan, options, options.init_from, '--init-from')
    dataset = recipe.open_data(options.data, mulan, audio_folder=options.audio_folder)
    held_out = recipe.open_held_out(options.data, mulan, options.valid_data, audio_folder=options.valid_audio_folder)
    trainer = run_trainer(recipe, options, mulan, dataset, valid_dataset=held_out)
    if not trainer.is_main:
        return None
    print(f'{trainer.step} steps done; checkpoints and metrics.jsonl are in {trainer.results_folder}')
    if (best := tell_best(trainer)) is None:
        diverged = 'valid_loss' in (trainer.last_results or {})
        why = 'the held-out loss was never a number' if diverged else 'too few pairs are held out; give --valid-data'
        print(f'no best model: {why}. That of the last step is in {trainer.results_folder / "last"}')
        return facts_of(trainer, best)
    for way in ('audio_to_text', 'text_to_audio'):
        numbers = ', '.join(f'{label} {best[f"{way}_{name}"]:.3g}' for name, label in METRICS.items())
        print(f'{way.replace("_", " ")}: {numbers}')
    return facts_of(trainer, best)


def run_train_stage(options: argparse.Namespace) -> dict[str, Any] | None:
    from musiclm_pytorch.pretrained import find_pretrained
    from musiclm_pytorch.quantizer import MuLaNEmbedQuantizer
    from musiclm_pytorch.trainer.resumable_loader import seed_everything
    from musiclm_pytorch.trainer.stage_recipes import STAGE_RECIPES

    recipe = read_recipe(STAGE_RECIPES[options.stage], options)
    quantizer = None if options.quantizer is None else MuLaNEmbedQuantizer.from_pretrained(options.quantizer)
    condition = dict(quantizer=quantizer, text_encoder=open_text_encoder(options))
    seed_everything(recipe.seed)
    if options.begin_with is None:
        if recipe.training.get('melody_only'):
            raise ValueError('melody_only is for a stage that was trained without melodies: give it with --begin-with')
        model = recipe.build_model(options.tokens, **condition)
    else:
        model = begin_stage(find_pretrained(options.begin_with), options.stage, quantizer)
    adapt(model, options, options.begin_with, '--begin-with')
    held_out = options.valid_tokens
    return report(run_trainer(recipe, options, model, options.tokens, valid_tokens=held_out, **condition))


def begin_stage(folder: Path, stage: str, quantizer):
    """A stage, of a trainer's folder or that of a MusicLM, and what belongs to it in the quantizer."""
    from musiclm_pytorch.audiolm.saving import load_module
    from musiclm_pytorch.mulan.checkpoint import saved_kind
    from musiclm_pytorch.trainer.assembly import model_in
    from musiclm_pytorch.trainer.stages import CONDITIONING_FILE, load_stage, take_conditioning

    if saved_kind(folder) == 'MusicLM':
        model = load_module(folder / stage)
        if quantizer is not None:
            take_conditioning(folder / 'quantizer', stage, quantizer)
        return model
    folder = model_in(folder)
    model = load_module(folder)
    if quantizer is not None and (folder / CONDITIONING_FILE).is_file():
        load_stage(folder, model, quantizer, may_add_melody=True)
    return model


def begin_codec(folder: Path):
    """A codec that can be trained, of a trainer's folder or that of a MusicLM."""
    from musiclm_pytorch.audiolm.saving import load_module
    from musiclm_pytorch.mulan.checkpoint import saved_kind
    from musiclm_pytorch.trainer.assembly import model_in

    return load_module(folder / 'codec' if saved_kind(folder) == 'MusicLM' else model_in(folder))


def adapt(model, options: argparse.Namespace, start: str | None, name: str) -> None:
    """Put adapters on a model that was trained before, if `--lora` says so."""
    from musiclm_pytorch.mulan.lora import add_adapters

    if options.lora is None:
        return
    if start is None:
        raise ValueError(f'--lora {options.lora} adapts a model that is trained: give it with {name}')
    add_adapters(model, rank=options.lora)


def run_train_codec(options: argparse.Namespace) -> dict[str, Any] | None:
    from musiclm_pytorch.codecs.neural import NeuralCodec
    from musiclm_pytorch.pretrained import find_pretrained
    from musiclm_pytorch.trainer.resumable_loader import seed_everything
    from musiclm_pytorch.trainer.stage_recipes import CodecRecipe

    if fits_spectral_codec(options):
        if given := [name for name in ('begin_with', 'levels', 'decoder_only') if getattr(options, name)]:
            raise ValueError(
                f'--{given[0].replace("_", "-")} is for a codec that is trained step by step; the SpectralCodec of '
                f'{options.config} is fitted at once'
            )
        return run_fit_spectral_codec(options)
    recipe = read_recipe(CodecRecipe, options)
    seed_everything(recipe.seed)
    codec = recipe.build_model() if options.begin_with is None else begin_codec(find_pretrained(options.begin_with))
    for name, value in (('--levels', options.levels), ('--decoder-only', options.decoder_only or None)):
        if value is not None and (options.begin_with is None or not isinstance(codec, NeuralCodec)):
            raise ValueError(f'{name} is for a NeuralCodec that is trained: give it with --begin-with')
    if options.levels is not None:
        codec = codec.with_first_levels(options.levels)
    if options.decoder_only:
        codec.freeze_codes()
    data = recipe.open_data(options.data, codec)
    return report(run_trainer(recipe, options, codec, data, sample_rate=codec.target_sample_hz))


def run_trainer(recipe, options: argparse.Namespace, model, data, **keywords):
    """Train a model by a recipe; gives the trainer."""
    trainer = recipe.build_trainer(model, data, results_folder=Path(options.output), resume=options.resume, **keywords)
    if trainer.is_main and trainer.step > 0:
        print(f'going on from step {trainer.step}', flush=True)
    trainer.last_results = trainer.train()
    return trainer


def report(trainer) -> dict[str, Any] | None:
    """What came out of a training of a stage or a codec, in a few lines, and as facts of the main process."""
    if not trainer.is_main:
        return None
    print(f'{trainer.step} steps done; checkpoints, metrics.jsonl and the model are in {trainer.results_folder}')
    if results := trainer.last_results:
        found = {name: results[name] for name in ('loss', 'valid_loss') if name in results}
        print(', '.join(f'{name.replace("_", " ")} {value:.4g}' for name, value in found.items()))
    return facts_of(trainer, tell_best(trainer) if trainer.held_out else None)


def facts_of(trainer, best: dict | None) -> dict[str, Any]:
    return dict(steps=trainer.step, results=trainer.last_results, best=best, output=trainer.results_folder)


def tell_best(trainer) -> dict | None:
    """Print which model is in the folder `best`, and give what was found when it was chosen."""
    from musiclm_pytorch.trainer import best

    found = best.read(trainer.best_folder)
    if found is not None:
        print(
            f'the best model, of step {found["step"]}, chosen on {found["held_out"]} held-out items, is in '
            f'{trainer.best_folder}'
        )
    return found


def fits_spectral_codec(options: argparse.Namespace) -> bool:
    """Whether a recipe is one of every part that has a SpectralCodec for its codec."""
    from musiclm_pytorch.trainer.config_schema import read_content
    from musiclm_pytorch.trainer.recipes import is_whole
    from musiclm_pytorch.trainer.stage_recipes import CodecRecipe

    content = None if options.config is None else read_content(options.config)
    if not is_whole(content, CodecRecipe.SECTIONS) or content.get('codec') is not None:
        return False
    if content.get('pretrained_codec') is not None:
        raise ValueError(f'{options.config} takes a codec that is trained already; there is none to train')
    return True


def run_fit_spectral_codec(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.audiolm.saving import save_module
    from musiclm_pytorch.trainer.assembly import build_spectral_codec, fit_by_recipe

    if unused := sorted(overrides_of(options).keys() - {'seed'}):
        raise ValueError(
            f'{options.config} has a SpectralCodec, which is fitted at once: {unused[0]} means nothing to it'
        )
    recipe = read_whole(options, spectral_codec={} if options.seed is None else dict(seed=options.seed))
    codec = build_spectral_codec(recipe.fitted)
    options.audio_folder = None
    clips = open_clips(recipe, options, codec.target_sample_hz)
    missing = fit_by_recipe(recipe.fitted, 'spectral_codec', codec, clips)
    write_results(options.output, lambda folder: save_module(codec, folder))
    print(f'{len(missing)} levels of {codec.codebook_size} codes, in {options.output}')
    print(f'{missing[-1]:.1%} of the variance of the spectra is missing after the last level')
    return dict(missing=missing, output=options.output)


def run_train_all(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.trainer.pipeline import train_musiclm
    from musiclm_pytorch.trainer.pipeline_recipe import MusicLMRecipe
    from musiclm_pytorch.trainer.recipes import FILE

    config = options.config
    if config is None and options.resume and (kept := Path(options.output) / FILE).is_file():
        config = kept  # options of the command line change what the run was begun with
    recipe = None if config is None else MusicLMRecipe.load(config)
    if options.seed is not None:
        recipe = (recipe or MusicLMRecipe()).with_seed(options.seed)
    if options.fields:
        recipe = (recipe or MusicLMRecipe()).updated(options.fields, COMMAND_LINE)
    codec = options.codec
    if codec is None and options.codec_quantizers is not None:
        codec = None if recipe is None else recipe.fitted.pretrained_codec.get('source')
        if codec is None:
            raise ValueError('--codec-quantizers needs --codec, or a recipe with the section pretrained_codec')
    if codec is not None:
        recipe = (recipe or MusicLMRecipe()).with_pretrained_codec(codec, options.codec_quantizers)
        recipe = recipe.updated(options.fields, COMMAND_LINE)
    start = time.perf_counter()
    musiclm = train_musiclm(
        options.data,
        options.output,
        recipe,
        audio_folder=options.audio_folder,
        valid_data=options.valid_data,
        valid_audio_folder=options.valid_audio_folder,
        begin_with=options.begin_with,
        resume=options.resume,
        on_part=lambda name, seconds: print(f'{name}: {seconds:.0f} s', flush=True),
        on_begin=lambda name, number, parts: print(f'part {number} of {parts}, {name}', flush=True),
    )
    print(f'all of it: {time.perf_counter() - start:.0f} s')
    if musiclm is None:
        print(f'the stages, which read words, are in the folders {", ".join(STAGES)} of {options.output}')
        return dict(output=options.output)
    folder = Path(options.output) / 'musiclm'
    tell_model(folder)
    return dict(model=folder)
