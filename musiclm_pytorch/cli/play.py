"""`musiclm infill`: another piece for a gap; `musiclm train melody`: what melodies given to `musiclm generate` need."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from musiclm_pytorch.cli.generate import prompt_of
from musiclm_pytorch.cli.options import add_model, add_output, add_place, command, option, place_of, write_results


def infill(subcommands) -> None:
    """`musiclm infill`: seconds of a sound file made anew."""
    parser = command(
        subcommands,
        'infill',
        run_infill,
        'replace seconds of a sound file',
        'Write a sound file again with other music between two times, that fits the words and both sides, which stay '
        'as they are but for a crossfade of 40 ms.',
        shares_output=True,  # one file, which appears whole
    )
    option(parser, 'sound', metavar='FILE', help='the sound file')
    option(parser, 'prompt', metavar='PROMPT', help='as of `musiclm generate`')
    option(parser, '--start', metavar='S', required=True, help='where the gap begins, in seconds')
    option(parser, '--end', metavar='S', required=True, help='where it ends')
    add_output(parser, '.wav, .flac, .ogg or .mp3', '-o', metavar='FILE')
    add_model(parser)
    option(parser, '--num-samples', metavar='N', default=8, help='candidates to choose from')
    option(parser, '--seed', metavar='N', default=0, help='another seed, other music')
    add_place(parser)


def run_infill(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.checks import check_device
    from musiclm_pytorch.musiclm import MusicLM
    from musiclm_pytorch.waves import format_of

    format_of(Path(options.output).suffix)  # before music is made
    check_device(options.device)
    musiclm = MusicLM.from_pretrained(options.model, **place_of(options))
    music = musiclm.infill(
        Path(options.sound),
        options.start,
        options.end,
        prompt_of(options.prompt),
        num_samples=options.num_samples,
        seed=options.seed,
    )
    files = music.save(options.output)
    print(*files)
    return dict(files=files)


def train_melody(models) -> None:
    """`musiclm train melody`: from generated pairs to a MelodyQuantizer."""
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
