"""The subcommands of recipes, of the parts that are fitted in one go, and of the whole put together."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from musiclm_pytorch.cli.data import open_codec
from musiclm_pytorch.cli.options import (
    WHOLE,
    add_codec,
    add_config,
    add_data,
    add_output,
    add_valid_data,
    command,
    open_clips,
    option,
    read_whole,
    tell_model,
    write_results,
)
from musiclm_pytorch.cli.parser import models_that_ship, or_a_path, recipes_that_ship
from musiclm_pytorch.trainer.config import nearest, shipped_recipes


def train_melody(models) -> None:
    parser = command(
        models,
        'melody',
        run_train_melody,
        'the melody encoder and its quantizer',
        'Train a melody encoder on generated pairs of the same melody and fit its quantizer, for `musiclm train '
        'quantizer --melody`: some minutes on one core. What is under --output is moved aside.',
    )
    add_output(parser, 'where the MelodyQuantizer goes')
    option(parser, '--steps', metavar='N', default=150, help='of the training')
    option(parser, '--batch-size', metavar='N', default=20, help='pairs of 4 s, or of a window, a step')
    option(parser, '--quantizers', metavar='N', default=4, help='levels of codes')
    option(parser, '--codebook-size', metavar='N', default=256, help='codes a level')
    option(parser, '--seed', metavar='N', default=42, help='of weights, melodies and k-means')
    option(parser, '--seconds', metavar='S', default=1.0, help='length of the windows')
    option(parser, '--hop', metavar='S', default=0.24, help='distance between two')


def train_quantizer(models) -> None:
    parser = command(
        models,
        'quantizer',
        run_train_quantizer,
        'the quantizer between MuLaN and the stages',
        'Fit the codebooks of the quantizer to the latents of audio and captions.',
    )
    add_fitting(parser, 'quantizer')
    dims = 'widths of the semantic, coarse and fine stage (default: 512)'
    option(parser, '--dims', metavar='N', nargs=3, help=dims)
    option(parser, '--quantizers', metavar='N', help='levels (default: 8)')
    option(parser, '--codebook-size', metavar='N', help='codes a level (default: 1024)')
    option(parser, '--melody', metavar='FOLDER', help='what `musiclm train melody` wrote, for the semantic stage')


def train_tokenizer(models) -> None:
    parser = command(
        models,
        'tokenizer',
        run_train_tokenizer,
        'the semantic tokenizer',
        "Fit the semantic tokenizer: k-means over the hidden states of a trained MuLaN's audio tower, or of an audio "
        'model of transformers.',
    )
    add_fitting(parser, 'tokenizer')
    option(parser, '--codebook-size', metavar='N', help='different tokens (default: 1024)')
    layer = "of the audio tower (default: MuLaN's patches, the 7th of another model)"
    option(parser, '--layer', metavar='N', help=layer)


def add_fitting(parser: argparse.ArgumentParser, part: str) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    what = 'a trained MuLaN, or the folder of its training'
    if part == 'tokenizer':
        option(
            source,
            '--model',
            metavar='SOURCE',
            help='HuBERT, MERT, w2v-BERT, Whisper, CLAP or their like: the folder of a model of transformers, or its '
            'name on the Hugging Face Hub',
        )
    else:
        what += '; or a CLAP of transformers, its folder or its name on the Hugging Face Hub'
    option(source, '--mulan', metavar='SOURCE', help=what, completer=or_a_path(models_that_ship))
    add_data(parser)
    add_config(parser, f"a recipe of every part, as for `{WHOLE}`, whose section '{part}' counts")
    add_output(parser, f'where the {part} goes')
    option(parser, '--max-items', metavar='N', help='clips of --data used (default: all)')
    option(parser, '--seed', metavar='N', help='of the k-means')


def assemble(subcommands) -> None:
    parser = command(
        subcommands,
        'assemble',
        run_assemble,
        'put the trained parts of a MusicLM together',
        'Put a MusicLM together from the folders quantizer, tokenizer, codec, semantic, coarse and fine under PARTS, '
        'each written by the training of that name. Of what was trained, the best model is taken.',
    )
    option(parser, 'parts', metavar='PARTS', help='the folder that the parts are in')
    add_output(parser, 'where the MusicLM goes', '-o')
    add_config(parser, f"a recipe of every part, as for `{WHOLE}`; its section 'musiclm' counts: windows, sampling …")
    add_codec(parser, 'where the parts have none')
    held_out = 'held-out pairs, as --data of the trainings: what `usual_score_prompts` of the section is measured on'
    add_valid_data(parser, held_out)


def recipes(subcommands) -> None:
    parser = command(
        subcommands,
        'recipes',
        run_recipes,
        'list the recipes that come with the package, or print one',
        'List the recipes that come with the package, or print one. --config of every training takes their names; to '
        'change one, print it into a file: musiclm recipes musiclm_small > my.yaml',
    )
    which = 'the recipe to print; with --keys a part, such as mulan'
    option(parser, 'name', metavar='NAME', nargs='?', help=which, completer=recipes_that_ship)
    keys = 'list the keys that a recipe may have, with their types and defaults'
    option(parser, '--keys', action='store_true', help=keys)


def run_train_melody(options: argparse.Namespace) -> dict[str, Any]:
    import tempfile

    from musiclm_pytorch.trainer.assembly import fit_melody
    from musiclm_pytorch.trainer.stage_recipes import MelodyRecipe

    levels = dict(num_quantizers=options.quantizers, codebook_size=options.codebook_size)
    recipe = MelodyRecipe.default().updated(
        model=dict(seconds=options.seconds, hop=options.hop, **levels),
        data=dict(seconds=max(4.0, options.seconds)),
        training=dict(num_train_steps=options.steps, batch_size=options.batch_size, seed=options.seed),
    )
    with tempfile.TemporaryDirectory() as folder:
        melody, found, left = fit_melody(recipe, folder)
    write_results(options.output, melody.save_pretrained)
    print(f'the same window among those held out, in another performance: R@1 {found["valid_recall_at_1"]:.3f}')
    told = f'{len(left)} levels of {melody.codebook_size} codes, {left[-1]:.1%} missing after the last'
    print(f'{told}, in {options.output}')
    return dict(results=found, missing=left, output=options.output)


def run_train_quantizer(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.codecs.melody import MelodyQuantizer
    from musiclm_pytorch.trainer.assembly import fit_quantizer

    names = dict(quantizers='rq_num_quantizers', codebook_size='codebook_size', max_items='max_items', seed='seed')
    recipe, mulan = read_whole(options, quantizer=given(options, names)), open_mulan(options)
    clips = open_clips(recipe, options, mulan.sample_rate)
    quantizer, missing = fit_quantizer(recipe.fitted, mulan, clips, options.dims or recipe.conditioning_dims)
    if options.melody is not None:
        quantizer.add_melody(MelodyQuantizer.from_pretrained(options.melody))
    write_results(options.output, quantizer.save_pretrained)
    print(f'{len(missing)} levels of {quantizer.codebook_size} codes, in {options.output}')
    print(f'{missing[-1]:.1%} of the squared length of the latents are missing after the last level')
    return dict(missing=missing, output=options.output)


def run_train_tokenizer(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.mulan.model import MuLaN
    from musiclm_pytorch.trainer.assembly import build_tokenizer, fit_by_recipe

    names = {name: name for name in ('model', 'codebook_size', 'layer', 'max_items', 'seed')}
    recipe, mulan = read_whole(options, tokenizer=given(options, names)), None
    if options.mulan is not None:
        if (model := recipe.fitted.tokenizer.get('model')) is not None:
            raise ValueError(
                f'{options.config} has {model} as the model of its section tokenizer, and --mulan names '
                f'{options.mulan}: leave one of them out'
            )
        mulan = open_mulan(options)
        if not isinstance(mulan, MuLaN):
            raise ValueError(
                f'{options.mulan} is a {type(mulan.model).__name__}, no MuLaN of this package: pass the folder or '
                'the name of the CLAP as --model'
            )
    tokenizer = build_tokenizer(recipe.fitted, mulan)
    clips = open_clips(recipe, options, tokenizer.target_sample_hz)
    missing = fit_by_recipe(recipe.fitted, 'tokenizer', tokenizer, clips)
    write_results(options.output, tokenizer.save_pretrained)
    rate = tokenizer.target_sample_hz / tokenizer.downsample_factor
    print(f'{tokenizer.codebook_size} semantic tokens, {rate:.3g} a second, in {options.output}')
    print(f'{missing:.1%} of the variance of the features is missing')
    return dict(missing=missing, tokens_per_second=rate, output=options.output)


def given(options: argparse.Namespace, names: dict[str, str]) -> dict:
    """Keys of a section, from the options that were given."""
    return {key: it for name, key in names.items() if (it := getattr(options, name)) is not None}


def open_mulan(options: argparse.Namespace):
    from musiclm_pytorch.mulan.pretrained import load_joint
    from musiclm_pytorch.trainer.assembly import model_in

    mulan = load_joint(model_in(Path(options.mulan)))
    if mulan.sample_rate is None:
        raise ValueError('the model does not know its sample rate; build it with audio_sample_rate')
    return mulan


def run_assemble(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.trainer.assembly import assemble_by_recipe

    recipe = read_whole(options)
    if ('usual_score_prompts' in recipe.fitted.musiclm) != (options.valid_data is not None):
        raise ValueError('usual_score_prompts and --valid-data belong together: how many captions, and which')
    musiclm, dtype = assemble_by_recipe(
        recipe.fitted,
        options.parts,
        lambda mulan: recipe.mulan.open_data(
            options.valid_data, mulan, audio_folder=options.valid_audio_folder, training=False
        ),
        codec=open_codec(options),
    )
    write_results(options.output, lambda folder: musiclm.save_pretrained(folder, dtype=dtype))
    tell_model(options.output)
    return dict(model=options.output)


def run_recipes(options: argparse.Namespace) -> dict[str, Any]:
    if options.keys:
        from musiclm_pytorch.trainer.pipeline_recipe import list_keys

        lines = list_keys(options.name)
        print('\n'.join(lines))
        return dict(keys=dict(line.split(': ', 1) for line in lines))
    shipped = shipped_recipes()
    if options.name is None:
        about = {name: path.read_text(encoding='utf-8').partition('. ')[0][2:] for name, path in shipped.items()}
        for name, what in about.items():
            print(f'{name:16} {what}')
        return dict(recipes=about)
    if options.name not in shipped:
        raise ValueError(f'there is no recipe {options.name!r} in the package; {nearest(options.name, shipped)}')
    text = shipped[options.name].read_text(encoding='utf-8')
    print(text, end='')
    return dict(recipe=options.name, text=text)
