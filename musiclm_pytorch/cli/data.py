"""The subcommands of data: `musiclm shard` and `musiclm tokens`."""

from __future__ import annotations

import argparse
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from musiclm_pytorch.cli.options import (
    AUDIO_FOLDER,
    add_codec,
    add_data,
    add_device,
    add_output,
    add_text_encoder,
    command,
    open_text_encoder,
    option,
)

# of what is made here
GIVEN = ('seconds', 'sample_rate', 'split', 'seed', 'sound_font', 'everyday')


def shard(subcommands) -> None:
    parser = command(
        subcommands,
        'shard',
        run_shard,
        'pack audio and captions into tar shards',
        'Pack audio and captions into tar shards of the WebDataset format. Interrupted, the same command goes on where '
        'it was.',
    )
    option(
        parser,
        'source',
        metavar='SOURCE',
        help='a folder, a .csv or .jsonl manifest, or the CSV of MusicCaps; or "synthetic" or "scores", music made '
        'here, which is then made once rather than at every reading',
    )
    add_output(parser, 'where the shards go', '-o')
    option(parser, '--audio-folder', metavar='FOLDER', help=AUDIO_FOLDER)
    option(parser, '--shard-size', metavar='N', default=1000, help='clips a shard')
    made = parser.add_argument_group('of "synthetic" and "scores"')
    option(made, '--clips', metavar='N', help='how many (default: 20000)')
    option(made, '--seconds', metavar='S', help='length of each (default: 10)')
    option(made, '--sample-rate', metavar='HZ', help='default: 24000')
    option(made, '--split', choices=['train', 'valid'], help='valid is music and phrasings that train has not')
    option(made, '--seed', metavar='N', help='another seed, other clips (default: 0)')
    option(made, '--sound-font', metavar='FILE', action='append', help='a .sf2 or .sf3, or several, that play')
    everyday = 'of "synthetic": share of the captions that are prompts in ordinary words (default: 0)'
    option(made, '--everyday', metavar='SHARE', type=float, help=everyday)


def run_shard(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.data.opening import GENERATED, SYNTHETIC
    from musiclm_pytorch.data.shard_writer import write_shards
    from musiclm_pytorch.data.sources import list_clips

    given = {name: getattr(options, name) for name in GIVEN}
    given = {name: it for name, it in dict(length=options.clips, **given).items() if it is not None}
    if options.source in GENERATED:
        if options.audio_folder is not None:
            raise ValueError(f'"{options.source}" is made here; --audio-folder belongs to a manifest')
        if options.everyday is not None and options.source != SYNTHETIC:
            raise ValueError(f'"{options.source}" has captions of its own; --everyday is of "{SYNTHETIC}"')
        listing = GENERATED[options.source](**dict(length=20_000, seconds=10.0, sample_rate=24000) | given)
    elif given:
        names = ', '.join('--clips' if name == 'length' else f'--{name.replace("_", "-")}' for name in given)
        raise ValueError(f'{names}: files have these already; they are of "synthetic" and "scores"')
    else:
        listing = list_clips(options.source, options.audio_folder)
        for name, reason in listing.skipped.items():
            logging.getLogger(__name__).warning('skipped %s: %s', name, reason)
    index = write_shards(
        listing,
        options.output,
        shard_size=options.shard_size,
        on_shard=lambda number, count: print(f'shard {number} of {count}', flush=True),
    )
    clips, shards = (sum(it) for it in zip(*((shard['samples'], shard['samples'] > 0) for shard in index['shards'])))
    print(f'{clips} clips in {shards} shards under {options.output}; {len(index["skipped"])} skipped')
    return dict(clips=clips, shards=shards, skipped=index['skipped'], output=options.output)


def tokens(subcommands) -> None:
    parser = command(
        subcommands,
        'tokens',
        run_tokens,
        'compute the tokens that the stages are trained on',
        'Compute tokens of whole clips. Interrupted, the same command goes on where it was. Under `torchrun` and '
        '`accelerate launch` the processes share the clips out.',
        # each kind of tokens lets one writer in: another process may compute another kind
        shares_output=True,
    )
    add_data(parser, audio_folder=False)
    add_output(parser, 'where the tokens go', '-o')
    for name, what in (('tokenizer', 'semantic tokenizer'), ('quantizer', 'quantizer')):
        option(parser, f'--{name}', metavar='FOLDER', help=f'a trained {what}, for its tokens')
    add_codec(parser, 'for its tokens')
    add_text_encoder(parser, 'what reads the captions for stages that are conditioned by words, beside the others')
    option(parser, '--batch-size', metavar='N', default=8, help='waves at a time')
    add_device(parser)
    parser.add_argument(
        '--synthetic', nargs=2, metavar=('N', 'SECONDS'), default=('20000', '10'), help='clips of "--data synthetic"'
    )
    aside = 'tokens of something else under --output are moved aside, not an error'
    option(parser, '--aside', action='store_true', help=aside)
    option(
        parser,
        '--ray',
        metavar='N',
        help='by N processes of Ray, which start again where one dies; on this machine, or where RAY_ADDRESS says',
    )


def run_tokens(options: argparse.Namespace) -> dict[str, Any] | None:
    from musiclm_pytorch.distributed.config import is_launched

    if options.ray is None:
        share = tuple(int(os.environ[name]) for name in ('RANK', 'WORLD_SIZE')) if is_launched() else (0, 1)
        clips = compute_share(options, share)
    else:
        from musiclm_pytorch.distributed.on_ray import run_on_ray

        if is_launched():
            raise ValueError('--ray starts processes itself: give it without torchrun and its like')
        share, on_gpus = (0, 1), options.device == 'cuda'
        clips, *_ = run_on_ray(partial(compute_share, options), options.ray, on_gpus=on_gpus)
    if share[0] > 0:
        return None
    print(f'tokens of {clips} clips are in {options.output}')
    return dict(clips=clips, output=options.output)


def compute_share(options: argparse.Namespace, share: tuple[int, int]) -> int:
    """The tokens of one process of so many; gives the number of all clips."""
    from musiclm_pytorch.audiolm.semantic import SemanticTokenizer
    from musiclm_pytorch.audiolm.tokens import compute_tokens
    from musiclm_pytorch.checks import check_device
    from musiclm_pytorch.data.opening import open_whole_clips
    from musiclm_pytorch.quantizer import MuLaNEmbedQuantizer
    from musiclm_pytorch.trainer.assembly import model_in

    # Ray shows each process its own GPU alone
    of_several = options.device == 'cuda' and share[1] > 1 and options.ray is None
    device = f'cuda:{os.environ["LOCAL_RANK"]}' if of_several else options.device
    check_device(device)
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
    if (encoder := open_text_encoder(options)) is not None:
        modules['text_encoder'] = encoder
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
        share=share,
        **{name: it.to(device) for name, it in modules.items()},
    )
    return len(dataset)


def open_codec(options: argparse.Namespace):
    """The codec that the options of `add_codec` name; None without one."""
    from musiclm_pytorch.trainer.assembly import load_codec

    if options.codec is not None:
        return load_codec(options.codec, options.codec_quantizers)
    if options.codec_quantizers is not None:
        raise ValueError('--codec-quantizers needs --codec')
    return None
