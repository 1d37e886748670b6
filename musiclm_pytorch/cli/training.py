"""What the subcommands of training share, and those of the codec, the tokens, the stages and the whole."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from musiclm_pytorch.cli.parts import add_codec_option, open_codec


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """The options that every training has."""
    parser.add_argument(
        '--config',
        metavar='FILE',
        help='a recipe: a YAML or JSON file, or a name that `musiclm recipes` lists; also one for `musiclm train all`, '
        'of which this part is taken. What it leaves out is as in the default recipe',
    )
    parser.add_argument('--output', metavar='FOLDER', required=True, help='where checkpoints, logs and the model go')
    parser.add_argument(
        '--resume',
        action='store_true',
        help='go on from the newest checkpoint under --output, if there is one, by the recipe there if there is no '
        '--config; without --resume, what is under --output is moved aside',
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument('--steps', type=int, metavar='N', help='steps of the whole run')
    length.add_argument('--epochs', type=int, metavar='N', help='passes over the data, in the whole run')
    parser.add_argument('--lr', type=float, metavar='RATE', help='highest learning rate')
    parser.add_argument('--seed', type=int, metavar='N', help='of the weights, the order of the data and the dropout')
    parser.add_argument('--precision', choices=['no', 'bf16', 'fp16', 'auto'], help='mixed precision; fp16 needs CUDA')
    parser.add_argument('--workers', type=int, metavar='N', help='processes that read data')
    parser.add_argument('--validate-every', type=int, metavar='N', help='steps between validations (default: an epoch)')
    parser.add_argument('--checkpoint-every', type=int, metavar='N', help='steps between checkpoints')
    parser.add_argument(
        '--checkpoint-minutes', type=float, metavar='N', help='minutes between checkpoints, if these are over sooner'
    )
    parser.add_argument(
        '--log-with', metavar='NAME', help="a tracker by Accelerate's name, such as tensorboard or wandb"
    )


# options that stand for a key of the section 'training'
OVERRIDES = dict(
    steps='num_train_steps',
    epochs='num_epochs',
    batch_size='batch_size',
    lr='lr',
    seed='seed',
    precision='mixed_precision',
    workers='num_workers',
    grad_cache_chunk_size='grad_cache_chunk_size',
    validate_every='validate_every',
    checkpoint_every='checkpoint_every',
    checkpoint_minutes='checkpoint_minutes',
    log_with='log_with',
)


def overrides_of(options: argparse.Namespace) -> dict:
    values = {key: getattr(options, name, None) for name, key in OVERRIDES.items()}
    return {key: value for key, value in values.items() if value is not None}


def train_stage(stage: str, description: str):
    """`musiclm train semantic|coarse|fine`: from cached tokens and a recipe to a trained stage."""

    def declare(models) -> None:
        parser = models.add_parser(stage, help=description, description=f'Train the {stage} stage: {description}.')
        parser.add_argument('--tokens', metavar='FOLDER', required=True, help='tokens, made by `musiclm tokens`')
        parser.add_argument('--valid-tokens', metavar='FOLDER', help='held-out tokens (default: a share of --tokens)')
        parser.add_argument(
            '--quantizer',
            metavar='FOLDER',
            help='the fitted quantizer that conditions the stage; without it, the stage has no conditioning',
        )
        add_training_options(parser)
        parser.add_argument('--batch-size', type=int, metavar='N', help='crops a micro-batch and process')
        parser.set_defaults(run=run_train_stage, prog=parser.prog, stage=stage)

    return declare


def train_codec(models) -> None:
    """`musiclm train codec`: from audio and a recipe to a codec."""
    parser = models.add_parser(
        'codec',
        help='the codec, waves to tokens and back',
        description='Train a SoundStream, or a NeuralCodec by the recipe codec_neural; or, by a recipe of every part '
        'that has no part codec, such as musiclm_small, fit a SpectralCodec, which takes a CPU half a minute.',
    )
    parser.add_argument('--data', metavar='SOURCE', required=True, help='as for `musiclm train mulan`')
    add_training_options(parser)
    parser.add_argument('--batch-size', type=int, metavar='N', help='crops a micro-batch and process')
    parser.set_defaults(run=run_train_codec, prog=parser.prog)


def train_all(models) -> None:
    """`musiclm train all`: from pairs of audio and text to a MusicLM."""
    parser = models.add_parser(
        'all',
        help='every part of MusicLM in turn, and the whole put together',
        description='Train MuLaN, quantizer, semantic tokenizer, codec and the three stages, each in a folder of its '
        'own under --output; the model is in the folder musiclm there. Interrupted, the same command with --resume '
        'goes on where it was.',
    )
    parser.add_argument('--data', metavar='SOURCE', required=True, help='as for `musiclm train mulan`')
    parser.add_argument(
        '--audio-folder',
        metavar='FOLDER',
        help='where the audio of a manifest lies, if not beside it; MusicCaps needs it',
    )
    parser.add_argument(
        '--valid-data',
        metavar='SOURCE',
        help='held-out pairs for MuLaN, as --data (default: a share of --data; none for shards)',
    )
    parser.add_argument(
        '--config',
        metavar='FILE',
        help='a recipe of every part: a YAML or JSON file, or a name that `musiclm recipes` lists, such as '
        'musiclm_small; what it leaves out is as in the default recipe',
    )
    parser.add_argument('--output', metavar='FOLDER', required=True, help='where everything goes')
    parser.add_argument(
        '--resume',
        action='store_true',
        help='go on with the run under --output, by the recipe there; otherwise what is there is moved aside',
    )
    parser.add_argument('--seed', type=int, metavar='N', help='of every part, instead of those of the recipe')
    add_codec_option(parser, 'instead of the one of the recipe')
    parser.set_defaults(run=run_train_all, prog=parser.prog)


def tokens(subcommands) -> None:
    """`musiclm tokens`: what the stages are trained on, computed once."""
    parser = subcommands.add_parser(
        'tokens',
        help='compute the tokens that the stages are trained on',
        description='Compute tokens of whole clips. Interrupted, the same command goes on where it was.',
    )
    parser.add_argument('--data', metavar='SOURCE', required=True, help='as for `musiclm train mulan`')
    parser.add_argument('-o', '--output', metavar='FOLDER', required=True, help='where the tokens go')
    for name, what in (('tokenizer', 'semantic tokenizer'), ('quantizer', 'quantizer')):
        parser.add_argument(f'--{name}', metavar='FOLDER', help=f'a trained {what}, for its tokens')
    add_codec_option(parser, 'for its tokens')
    parser.add_argument('--batch-size', type=int, metavar='N', default=8, help='waves at a time (default: %(default)s)')
    parser.add_argument(
        '--synthetic', nargs=2, metavar=('N', 'SECONDS'), default=('20000', '10'), help='clips of "--data synthetic"'
    )
    parser.add_argument(
        '--aside', action='store_true', help='tokens of something else under --output are moved aside, not an error'
    )
    # each kind of tokens lets one writer in: another process may compute another kind
    parser.set_defaults(run=run_tokens, prog=parser.prog, shares_output=True)


def run_train_stage(options: argparse.Namespace) -> None:
    from musiclm_pytorch.quantizer import MuLaNEmbedQuantizer
    from musiclm_pytorch.trainer.batches import seed_everything
    from musiclm_pytorch.trainer.stage_recipes import STAGE_RECIPES

    recipe = read_recipe(STAGE_RECIPES[options.stage], options)
    quantizer = None if options.quantizer is None else MuLaNEmbedQuantizer.from_pretrained(options.quantizer)
    seed_everything(recipe.seed)
    trainer = recipe.build_trainer(
        recipe.build_model(options.tokens, quantizer),
        options.tokens,
        valid_tokens=options.valid_tokens,
        quantizer=quantizer,
        results_folder=Path(options.output),
        resume=options.resume,
    )
    run_trainer(recipe, trainer)


def run_train_codec(options: argparse.Namespace) -> None:
    from musiclm_pytorch.trainer.batches import seed_everything
    from musiclm_pytorch.trainer.stage_recipes import CodecRecipe

    if fits_spectral_codec(options.config):
        run_fit_spectral_codec(options)
        return
    recipe = read_recipe(CodecRecipe, options)
    seed_everything(recipe.seed)
    codec = recipe.build_model()
    trainer = recipe.build_trainer(
        codec,
        recipe.open_data(options.data, codec),
        sample_rate=codec.target_sample_hz,
        results_folder=Path(options.output),
        resume=options.resume,
    )
    run_trainer(recipe, trainer)


def fits_spectral_codec(config: str | None) -> bool:
    """Whether a recipe is one of every part that has a SpectralCodec for its codec."""
    from musiclm_pytorch.trainer.recipes import is_whole
    from musiclm_pytorch.trainer.config_schema import read_content
    from musiclm_pytorch.trainer.stage_recipes import CodecRecipe

    content = None if config is None else read_content(config)
    if not is_whole(content, CodecRecipe.SECTIONS) or content.get('codec') is not None:
        return False
    if content.get('pretrained_codec') is not None:
        raise ValueError(f'{config} takes a codec that is trained already; there is none to train')
    return True


def run_fit_spectral_codec(options: argparse.Namespace) -> None:
    from musiclm_pytorch.audiolm.saving import save_module
    from musiclm_pytorch.data.opening import open_whole_clips
    from musiclm_pytorch.trainer.assembly import build_spectral_codec, fit_spectral_codec
    from musiclm_pytorch.trainer.folders import new_results
    from musiclm_pytorch.trainer.pipeline_recipe import MusicLMRecipe

    if unused := sorted(overrides_of(options).keys() - {'seed'}):
        raise ValueError(
            f'{options.config} has a SpectralCodec, which is fitted at once: {unused[0]} means nothing to it'
        )
    recipe = MusicLMRecipe.load(options.config)
    fitted = recipe.fitted.updated(spectral_codec={} if options.seed is None else dict(seed=options.seed))
    codec = build_spectral_codec(fitted)
    missing = fit_spectral_codec(
        fitted, codec, open_whole_clips(options.data, sample_rate=codec.target_sample_hz, **recipe.synthetic)
    )
    with new_results(Path(options.output), resume=False, clear=False):
        save_module(codec, options.output)
    print(f'{len(missing)} levels of {codec.codebook_size} codes, in {options.output}')
    print(f'{missing[-1]:.1%} of the variance of the spectra is missing after the last level')


def read_recipe(kind, options: argparse.Namespace):
    """The recipe named by the options, the one of an interrupted run, or the default one."""
    from musiclm_pytorch.trainer.recipes import FILE

    if options.config is None and options.resume and (Path(options.output) / FILE).is_file():
        options.config = Path(options.output) / FILE
    recipe = kind.default() if options.config is None else kind.load(options.config)
    return recipe.updated(training=overrides_of(options))


def run_trainer(recipe, trainer) -> None:
    if trainer.is_main and trainer.step > 0:
        print(f'going on from step {trainer.step}', flush=True)
    results = trainer.train(**recipe.train_keywords)
    if trainer.is_main:
        print(f'{trainer.step} steps done; checkpoints, metrics.jsonl and the model are in {trainer.results_folder}')
        if results:
            found = {name: results[name] for name in ('loss', 'valid_loss') if name in results}
            print(', '.join(f'{name.replace("_", " ")} {value:.4g}' for name, value in found.items()))
        if trainer.held_out:
            tell_best(trainer)


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


def run_tokens(options: argparse.Namespace) -> None:
    from musiclm_pytorch.audiolm.semantic import SemanticTokenizer
    from musiclm_pytorch.audiolm.tokens import compute_tokens
    from musiclm_pytorch.data.opening import open_whole_clips
    from musiclm_pytorch.quantizer import MuLaNEmbedQuantizer
    from musiclm_pytorch.trainer.assembly import model_in

    readers = dict(tokenizer=SemanticTokenizer.from_pretrained, quantizer=MuLaNEmbedQuantizer.from_pretrained)
    modules = {
        name: read(model_in(Path(folder)))
        for name, read in readers.items()
        if (folder := getattr(options, name)) is not None
    }
    if (codec := open_codec(options)) is not None:
        modules['codec'] = codec
    rates = [it.target_sample_hz for name, it in modules.items() if name != 'quantizer']
    rates += [modules['quantizer'].mulan.sample_rate] if 'quantizer' in modules else []
    if not rates or None in rates:
        raise ValueError('give at least one of --tokenizer, --codec and --quantizer, each of a known sample rate')
    length, seconds = options.synthetic
    dataset = open_whole_clips(
        options.data, sample_rate=max(rates), synthetic_length=int(length), synthetic_seconds=float(seconds)
    )
    compute_tokens(
        dataset,
        options.output,
        sample_rate=max(rates),
        batch_size=options.batch_size,
        on_change='aside' if options.aside else 'error',
        **modules,
    )
    print(f'tokens of {len(dataset)} clips are in {options.output}')


def run_train_all(options: argparse.Namespace) -> None:
    from musiclm_pytorch.trainer.pipeline import train_musiclm
    from musiclm_pytorch.trainer.pipeline_recipe import MusicLMRecipe

    recipe = None if options.config is None else MusicLMRecipe.load(options.config)
    if options.seed is not None:
        recipe = (recipe or MusicLMRecipe()).with_seed(options.seed)
    codec = options.codec
    if codec is None and options.codec_quantizers is not None:
        codec = None if recipe is None else recipe.fitted.pretrained_codec.get('source')
        if codec is None:
            raise ValueError('--codec-quantizers needs --codec, or a recipe with the section pretrained_codec')
    if codec is not None:
        recipe = (recipe or MusicLMRecipe()).with_pretrained_codec(codec, options.codec_quantizers)
    start = time.perf_counter()
    train_musiclm(
        options.data,
        options.output,
        recipe,
        audio_folder=options.audio_folder,
        valid_data=options.valid_data,
        resume=options.resume,
        on_part=lambda name, seconds: print(f'{name}: {seconds:.0f} s', flush=True),
        on_begin=lambda name, number, parts: print(f'part {number} of {parts}, {name}', flush=True),
    )
    print(f'all of it: {time.perf_counter() - start:.0f} s')
    folder = Path(options.output) / 'musiclm'
    print(f'the model is in {folder}; hear it with: musiclm generate "a slow piano melody" --model {folder} -o out')
