"""The subcommands of recipes, of the parts that are fitted in one go, and of the whole put together."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

WHOLE = 'musiclm train all'


def recipes(subcommands) -> None:
    """`musiclm recipes`: those that come with the package."""
    parser = subcommands.add_parser(
        'recipes',
        help='list the recipes that come with the package, or print one',
        description='List the recipes that come with the package, or print one. --config of every training takes their '
        'names; to change one, print it into a file: musiclm recipes musiclm_small > my.yaml',
    )
    parser.add_argument('name', metavar='NAME', nargs='?', help='the recipe to print')
    parser.set_defaults(run=run_recipes, prog=parser.prog)


def train_quantizer(models) -> None:
    """`musiclm train quantizer`: codebooks for the latents of a trained MuLaN."""
    parser = models.add_parser(
        'quantizer',
        help='the quantizer between MuLaN and the stages',
        description='Fit the codebooks of the quantizer to the latents of audio and captions.',
    )
    _add_fitting_options(parser, 'quantizer')
    parser.add_argument(
        '--dims', type=int, nargs=3, metavar='N', help='widths of the semantic, coarse and fine stage (default: 512)'
    )
    parser.add_argument('--quantizers', type=int, metavar='N', help='levels (default: 8)')
    parser.add_argument('--codebook-size', type=int, metavar='N', help='codes a level (default: 1024)')
    parser.add_argument('--melody', metavar='FOLDER', help='what `musiclm train melody` wrote, for the semantic stage')
    parser.add_argument(
        '--melody-windows', type=int, metavar='N', default=30, help='of it that a crop of that stage has at most (30)'
    )
    parser.set_defaults(run=run_train_quantizer, prog=parser.prog)


def train_tokenizer(models) -> None:
    """`musiclm train tokenizer`: k-means over what a trained MuLaN or another audio model hears."""
    parser = models.add_parser(
        'tokenizer',
        help='the semantic tokenizer',
        description="Fit the semantic tokenizer: k-means over the hidden states of a trained MuLaN's audio tower, or "
        'of an audio model of transformers.',
    )
    _add_fitting_options(parser, 'tokenizer')
    parser.add_argument('--codebook-size', type=int, metavar='N', help='different tokens (default: 1024)')
    parser.add_argument(
        '--layer', type=int, metavar='N', help="of the audio tower (default: MuLaN's patches, the 7th of another model)"
    )
    parser.set_defaults(run=run_train_tokenizer, prog=parser.prog)


def _add_fitting_options(parser: argparse.ArgumentParser, part: str) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    what = 'a trained MuLaN, or the folder of its training'
    if part == 'tokenizer':
        source.add_argument(
            '--model',
            metavar='SOURCE',
            help='HuBERT, MERT, w2v-BERT, Whisper, CLAP or their like: the folder of a model of transformers, or its '
            'name on the Hugging Face Hub',
        )
    else:
        what += '; or a CLAP of transformers, its folder or its name on the Hugging Face Hub'
    source.add_argument('--mulan', metavar='SOURCE', help=what)
    parser.add_argument('--data', metavar='SOURCE', required=True, help='as for `musiclm train mulan`')
    parser.add_argument('--audio-folder', metavar='FOLDER', help='as for `musiclm train mulan`')
    parser.add_argument(
        '--config',
        metavar='FILE',
        help=f"a recipe as for `{WHOLE}`, whose section '{part}' counts; what it leaves out is as by default",
    )
    parser.add_argument('--output', metavar='FOLDER', required=True, help=f'where the {part} goes')
    parser.add_argument('--max-items', type=int, metavar='N', help='clips of --data used (default: all)')
    parser.add_argument('--seed', type=int, metavar='N', help='of the k-means')


def assemble(subcommands) -> None:
    """`musiclm assemble`: trained parts to a MusicLM."""
    parser = subcommands.add_parser(
        'assemble',
        help='put the trained parts of a MusicLM together',
        description='Put a MusicLM together from the folders quantizer, tokenizer, codec, semantic, coarse and fine '
        'under PARTS, each written by the training of that name. Of what was trained, the best model is taken.',
    )
    parser.add_argument('parts', metavar='PARTS', help='the folder that the parts are in')
    parser.add_argument('-o', '--output', metavar='FOLDER', required=True, help='where the MusicLM goes')
    parser.add_argument(
        '--config',
        metavar='FILE',
        help=f"a recipe as for `{WHOLE}`, whose section 'musiclm' counts: windows and sampling",
    )
    add_codec_option(parser, 'where the parts have none')
    parser.set_defaults(run=run_assemble, prog=parser.prog)


def add_codec_option(parser: argparse.ArgumentParser, why: str) -> None:
    """Which trained codec is used."""
    parser.add_argument(
        '--codec',
        metavar='SOURCE',
        help=f'a trained codec, {why}: its folder, or that of an EnCodec, a DAC or a Mimi of transformers, or its name '
        'on the Hugging Face Hub, such as facebook/encodec_24khz',
    )
    parser.add_argument(
        '--codec-quantizers', type=int, metavar='N', help='levels of a codec of transformers that are used (default: 8)'
    )


def open_codec(options: argparse.Namespace):
    """The codec that the options of `add_codec_option` name; None without one."""
    from musiclm_pytorch.trainer.assembly import load_codec

    if options.codec is not None:
        return load_codec(options.codec, options.codec_quantizers)
    if options.codec_quantizers is not None:
        raise ValueError('--codec-quantizers needs --codec')
    return None


def run_recipes(options: argparse.Namespace) -> None:
    from musiclm_pytorch.trainer.sections import shipped_recipes

    shipped = shipped_recipes()
    if options.name is None:
        for name, path in shipped.items():
            print(f'{name:16} {path.read_text(encoding="utf-8").partition(". ")[0].removeprefix("# ")}')
    elif options.name in shipped:
        print(shipped[options.name].read_text(encoding='utf-8'), end='')
    else:
        raise ValueError(f'there is no recipe {options.name!r} in the package, which has {", ".join(shipped)}')


def run_train_quantizer(options: argparse.Namespace) -> None:
    from musiclm_pytorch.codecs.melody import MelodyQuantizer
    from musiclm_pytorch.trainer.assembly import fit_quantizer
    from musiclm_pytorch.trainer.folders import new_results

    names = dict(quantizers='rq_num_quantizers', codebook_size='codebook_size', max_items='max_items', seed='seed')
    recipe, mulan = _recipe_with('quantizer', names, options), _open_mulan(options)
    clips = _open_clips(recipe, options, mulan.sample_rate)
    quantizer, missing = fit_quantizer(recipe.fitted, mulan, clips, options.dims or recipe.conditioning_dims)
    if options.melody is not None:
        quantizer.add_melody(MelodyQuantizer.from_pretrained(options.melody), options.melody_windows)
    with new_results(Path(options.output), resume=False, clear=False):
        quantizer.save_pretrained(options.output)
    print(f'{len(missing)} levels of {quantizer.codebook_size} codes, in {options.output}')
    print(f'{missing[-1]:.1%} of the squared length of the latents are missing after the last level')


def run_train_tokenizer(options: argparse.Namespace) -> None:
    from musiclm_pytorch.mulan.model import MuLaN
    from musiclm_pytorch.trainer.assembly import build_tokenizer, fit_tokenizer
    from musiclm_pytorch.trainer.folders import new_results

    names = dict(model='model', codebook_size='codebook_size', layer='layer', max_items='max_items', seed='seed')
    recipe, mulan = _recipe_with('tokenizer', names, options), None
    if options.mulan is not None:
        if (model := recipe.fitted.tokenizer.get('model')) is not None:
            raise ValueError(
                f'{options.config} has {model} as the model of its section tokenizer, and --mulan names '
                f'{options.mulan}: leave one of them out'
            )
        mulan = _open_mulan(options)
        if not isinstance(mulan, MuLaN):
            raise ValueError(
                f'{options.mulan} is a {type(mulan.model).__name__}, no MuLaN of this package: pass the folder or '
                'the name of the CLAP as --model'
            )
    tokenizer = build_tokenizer(recipe.fitted, mulan)
    missing = fit_tokenizer(recipe.fitted, tokenizer, _open_clips(recipe, options, tokenizer.target_sample_hz))
    with new_results(Path(options.output), resume=False, clear=False):
        tokenizer.save_pretrained(options.output)
    rate = tokenizer.target_sample_hz / tokenizer.downsample_factor
    print(f'{tokenizer.codebook_size} semantic tokens, {rate:.3g} a second, in {options.output}')
    print(f'{missing:.1%} of the variance of the features is missing')


def _recipe_with(part: str, names: dict[str, str], options: argparse.Namespace):
    """The recipe with the options in it."""
    from musiclm_pytorch.trainer.pipeline_recipe import MusicLMRecipe

    recipe = MusicLMRecipe() if options.config is None else MusicLMRecipe.load(options.config)
    given = {key: it for option, key in names.items() if (it := getattr(options, option)) is not None}
    return replace(recipe, fitted=recipe.fitted.updated(**{part: given}))


def _open_mulan(options: argparse.Namespace):
    from musiclm_pytorch.mulan.pretrained import load_joint
    from musiclm_pytorch.trainer.assembly import model_in

    mulan = load_joint(model_in(Path(options.mulan)))
    if mulan.sample_rate is None:
        raise ValueError('the model does not know its sample rate; build it with audio_sample_rate')
    return mulan


def _open_clips(recipe, options: argparse.Namespace, sample_rate: int):
    from musiclm_pytorch.data.opening import open_whole_clips

    audio_folder = options.audio_folder
    return open_whole_clips(options.data, sample_rate=sample_rate, audio_folder=audio_folder, **recipe.synthetic)


def run_assemble(options: argparse.Namespace) -> None:
    from musiclm_pytorch.trainer.assembly import assemble_musiclm
    from musiclm_pytorch.trainer.folders import new_results
    from musiclm_pytorch.trainer.pipeline_recipe import MusicLMRecipe

    settings = {} if options.config is None else MusicLMRecipe.load(options.config).fitted.musiclm
    musiclm = assemble_musiclm(options.parts, codec=open_codec(options), **settings)
    with new_results(Path(options.output), resume=False, clear=False):
        musiclm.save_pretrained(options.output)
    print(
        f'the model is in {options.output}; hear it with: '
        f'musiclm generate "a slow piano melody" --model {options.output} -o out'
    )
