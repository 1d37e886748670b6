"""How subcommands declare their options, in a line each, and what several of them share. Loads nothing heavy."""

from __future__ import annotations

import argparse
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from musiclm_pytorch.cli.parser import models_that_ship, or_a_path, recipes_that_ship
from musiclm_pytorch.trainer.config import CHOICES, TrainingConfig, field_docs

KINDS: dict[str, type] = dict(N=int, HZ=int, S=float, X=float)  # what an option takes, by its metavar; else a string
FIELD = re.compile(r'--(\w+(?:\.\w+)+)(?:=(.*))?', re.DOTALL)

AUDIO_FOLDER = 'where the audio of a manifest lies, if not beside it; MusicCaps needs it'
PAIRS = (
    'pairs of audio and text: a folder, a .csv or .jsonl manifest, a folder of tar shards, the CSV of MusicCaps, '
    '"synthetic" or "scores"'
)
SHIPPED = 'the name of a model that ships'
ANY_MULAN = 'a folder of a MuLaN or of a MusicLM, or the name of one that ships'
WHOLE = 'musiclm train all'
COMMAND_LINE = 'the command line'  # what errors begin with
# options of trainings that stand for a field of TrainingConfig, whose documentation is their help
OVERRIDES = dict(
    steps='num_train_steps',
    epochs='num_epochs',
    batch_size='batch_size',
    lr='lr',
    seed='seed',
    precision='mixed_precision',
    workers='num_workers',
    validate_every='validate_every',
    checkpoint_every='checkpoint_every',
    checkpoint_minutes='checkpoint_minutes',
    log_with='log_with',
    grad_cache_chunk_size='grad_cache_chunk_size',
)


def command(
    parsers: Any, name: str, run: Callable, help: str, description: str, facts: bool = True, **defaults: Any
) -> Any:
    """A subcommand that `run` does the work of.

    facts: whether `run` returns what came out, a dict that `--json` prints; None where another process does.
    """
    parser = parsers.add_parser(name, help=help, description=description)
    parser.set_defaults(run=run, prog=parser.prog, json=False, **defaults)
    if facts:
        what = 'print what came out as one JSON object, and all else to stderr'
        parser.add_argument('--json', action='store_true', help=what)
    return parser


def option(
    parser: Any, *names: str, metavar: str | None = None, help: str, completer: Callable | None = None, **keywords: Any
) -> None:
    """An option or an argument; its default stands in the help unless it is none. Shells complete what `completer`
    gives, else paths."""
    if 'action' not in keywords or keywords['action'] == 'append':
        keywords |= dict(type=KINDS.get(metavar, str)) if 'type' not in keywords else {}
        keywords |= {} if 'choices' in keywords else dict(metavar=metavar)
    if keywords.get('default') is not None:
        help += ' (default: %(default)s)'
    action = parser.add_argument(*names, help=help, **keywords)
    if completer is not None:
        action.completer = completer


def add_model(
    parser: Any, what: str = f'a folder written by MusicLM.save_pretrained, or {SHIPPED}', default: str | None = 'tiny'
) -> None:
    option(parser, '--model', metavar='FOLDER', default=default, help=what, completer=or_a_path(models_that_ship))


def add_device(parser: Any) -> None:
    option(parser, '--device', default='cpu', help='such as cuda')


def add_place(parser: Any) -> None:
    """Where a model computes, and in what."""
    add_device(parser)
    dtypes = ('float32', 'bfloat16', 'auto')
    what = 'of the weights; auto: bfloat16 for large stages where the processor gains by it'
    option(parser, '--dtype', choices=dtypes, default='float32', help=what)


def load_musiclm(options: argparse.Namespace):
    """The model of `add_model`, where `add_place` says."""
    from musiclm_pytorch.musiclm import MusicLM

    return MusicLM.from_pretrained(options.model, **place_of(options))


def place_of(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_place` says, as keywords of `from_pretrained`."""
    import torch

    return dict(device=options.device, dtype=dict(float32=None, bfloat16=torch.bfloat16, auto='auto')[options.dtype])


def add_output(parser: Any, help: str, *short: str, metavar: str = 'FOLDER') -> None:
    option(parser, *short, '--output', metavar=metavar, required=True, help=help)


def add_data(parser: Any, help: str = 'as for `musiclm train mulan`', *, audio_folder: bool = True) -> None:
    option(parser, '--data', metavar='SOURCE', required=True, help=help)
    if audio_folder:
        option(parser, '--audio-folder', metavar='FOLDER', help=AUDIO_FOLDER)


def add_valid_data(parser: Any, help: str) -> None:
    option(parser, '--valid-data', metavar='SOURCE', help=help)
    also = 'the same for --valid-data as --audio-folder for --data'
    option(parser, '--valid-audio-folder', metavar='FOLDER', help=also)


def add_config(parser: Any, what: str) -> None:
    """A recipe; from then on, any key of it is an option too."""
    option(parser, '--config', metavar='FILE', help=what, completer=or_a_path(recipes_that_ship))
    example = '--mulan.training.lr 1e-3' if 'every part' in what else '--training.warmup_steps 100'
    parser.epilog = f'Any key of the recipe is an option too, such as {example}; `musiclm recipes --keys` lists them.'
    parser.set_defaults(takes_fields=True)


def add_text_encoder(parser: Any, what: str) -> None:
    option(
        parser,
        '--text-encoder',
        metavar='SOURCE',
        help=f'{what}: the folder of a T5, a BERT or another text encoder of transformers, or its name on the Hugging '
        'Face Hub, such as google/t5-v1_1-base',
    )


def open_text_encoder(options: argparse.Namespace):
    """The encoder that this option names; None without it."""
    from musiclm_pytorch.mulan.pretrained_towers import PretrainedTextTransformer

    return None if options.text_encoder is None else PretrainedTextTransformer(options.text_encoder)


def add_codec(parser: Any, why: str) -> None:
    """Which trained codec is used."""
    option(
        parser,
        '--codec',
        metavar='SOURCE',
        help=f'a trained codec, {why}: its folder, or that of an EnCodec, a DAC or a Mimi of transformers, or its name '
        'on the Hugging Face Hub, such as facebook/encodec_24khz',
    )
    what = 'levels of it that are used: of a codec of transformers (default: 8), or of a NeuralCodec (default: all)'
    option(parser, '--codec-quantizers', metavar='N', help=what)


def add_training(parser: Any, *more: str) -> None:
    """The options that every training has."""
    add_config(
        parser,
        'a recipe: a YAML or JSON file, or a name that `musiclm recipes` lists; also one for `musiclm train all`, of '
        'which this part is taken. What it leaves out is as in the default recipe',
    )
    add_output(parser, 'where checkpoints, logs and the model go')
    option(
        parser,
        '--resume',
        action='store_true',
        help='go on from the newest checkpoint under --output, if there is one, by the recipe there if there is no '
        '--config; without --resume, what is under --output is moved aside',
    )
    length = parser.add_mutually_exclusive_group()
    by_recipe = '(default: as in the recipe)'
    docs = field_docs() | dict(
        grad_cache_chunk_size='pairs embedded at a time: less memory, the same step',
        num_epochs=f'passes over the data, in the whole run {by_recipe}',
        lr=f'learning rate {by_recipe}',
    )
    hints = typing.get_type_hints(TrainingConfig)
    for name, field in OVERRIDES.items():
        if field not in hints and name not in more:
            continue
        kinds = {int: 'N', float: 'X'}
        found = [kinds[it] for it in kinds if it in (hints.get(field, int), *typing.get_args(hints.get(field)))]
        choices = dict(choices=CHOICES[field]) if field in CHOICES else dict(metavar=found[0] if found else 'NAME')
        target = length if name in ('steps', 'epochs') else parser
        option(
            target,
            f'--{name.replace("_", "-")}',
            help=help_of(docs[field]),
            **choices,
        )


def help_of(doc: str) -> str:
    """The first sentence of what a docstring tells of a field."""
    return doc.partition('. ')[0].rstrip('.').replace('%', '%%')


def overrides_of(options: argparse.Namespace) -> dict[str, Any]:
    values = {key: getattr(options, name, None) for name, key in OVERRIDES.items()}
    return {key: value for key, value in values.items() if value is not None}


def split_fields(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Arguments, and the keys of a recipe among them: `--training.lr 1e-3` is `{'training': {'lr': '1e-3'}}`.

    Raises ValueError for a key without a value, and for one that cannot be read.
    """
    rest, fields, words = [], {}, iter(arguments)
    for word in words:
        if word == '--':
            rest += [word, *words]
            break
        found = FIELD.fullmatch(word)
        if found is None:
            rest.append(word)
            continue
        import yaml

        from musiclm_pytorch.trainer.config_schema import Word

        value = next(words, None) if found[2] is None else found[2]
        if value is None or (found[2] is None and value.startswith('--')):
            raise ValueError(f'{word} needs a value')
        *parts, key = found[1].split('.')
        section = fields
        try:
            for part in parts:
                section = section.setdefault(part, {})
            section[key] = Word(value, yaml.safe_load(value))
        except (yaml.YAMLError, AttributeError, TypeError) as error:
            raise ValueError(f'{word} {value!r} cannot be read: {" ".join(str(error).split())}') from error
    return rest, fields


def read_recipe(kind, options: argparse.Namespace):
    """The recipe named by the options, the one of an interrupted run, or the default one; with the options in it."""
    from musiclm_pytorch.trainer.config_schema import check_sections
    from musiclm_pytorch.trainer.recipes import FILE

    if options.config is None and options.resume and (Path(options.output) / FILE).is_file():
        options.config = Path(options.output) / FILE
    recipe = kind.default() if options.config is None else kind.load(options.config)
    fields = check_sections(options.fields, kind.SECTIONS, COMMAND_LINE)
    return recipe.updated(training=overrides_of(options)).updated(**fields)


def read_whole(options: argparse.Namespace, **sections: dict):
    """The recipe of every part named by the options, or the default one; with the options in it."""
    from musiclm_pytorch.trainer.pipeline_recipe import MusicLMRecipe

    recipe = MusicLMRecipe() if options.config is None else MusicLMRecipe.load(options.config)
    return recipe.updated(sections, COMMAND_LINE).updated(options.fields, COMMAND_LINE)


def write_results(output: str, save) -> None:
    """Let `save` write into a folder of its own; what was there is moved aside."""
    from musiclm_pytorch.trainer.folders import new_results

    with new_results(Path(output), resume=False, clear=False):
        save(output)


def open_clips(recipe, options: argparse.Namespace, sample_rate: int):
    from musiclm_pytorch.data.opening import open_whole_clips

    audio_folder = options.audio_folder
    return open_whole_clips(options.data, sample_rate=sample_rate, audio_folder=audio_folder, **recipe.synthetic)


def tell_model(folder: str | Path) -> None:
    print(f'the model is in {folder}; hear it with: musiclm generate "a slow piano melody" --model {folder} -o out')
