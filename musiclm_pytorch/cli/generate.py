"""`musiclm generate`, `stream` and `infill`: words to music, with a page to hear and see it, or for a player."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musiclm_pytorch.cli.options import SHIPPED, add_model, add_output, add_place, command, load_musiclm, option
from musiclm_pytorch.version import __version__

if TYPE_CHECKING:
    from musiclm_pytorch.gallery import Clip
    from musiclm_pytorch.inference.written import Form

PROMPT = 'words in quotes; @FILE for a sound to be like, or a latent of MuLaN in .npy; or "70%% a piano + 30%% @FILE"'
NEGATIVE = 'what the music is to keep away from, as PROMPT'
FORMATS = ('wav', 'flac', 'ogg', 'mp3')
MELODY = 'a sound file, such as of a hum, whose melody to follow'


def generate(subcommands) -> None:
    parser = command(
        subcommands,
        'generate',
        run_generate,
        'make music that fits the words',
        'Make music for one prompt or more: sound files, a page with players, spectrograms and the scores by which '
        'MuLaN ranks the samples of a prompt, and prompts.json, which holds what makes each piece again. The first '
        'sample of a prompt is that of the highest score. What is made is written prompt by prompt: Ctrl-C leaves what '
        'is done.',
    )
    option(parser, 'prompts', metavar='PROMPT', nargs='*', help=f'what the music is like: {PROMPT}')
    add_mix(parser)
    told = 'a part of one piece whose prompt changes on the way; all of these are its parts in order'
    parser.add_argument('--story', metavar=('SECONDS', 'PROMPT'), nargs=2, action='append', help=told)
    option(parser, '--negative', metavar='PROMPT', help=NEGATIVE)
    add_output(parser, 'where files and page go', '-o')
    which = '(default: small, or tiny, which follows melodies, where there is one)'
    add_model(parser, f'a folder written by MusicLM.save_pretrained, or {SHIPPED} {which}', default=None)
    option(parser, '--num-samples', metavar='N', default=1, help='pieces a prompt')
    length = 'length, the prime included (default: 10, or that of the story)'
    option(parser, '--seconds', metavar='S', type=float, help=length)
    option(parser, '--seed', metavar='N', default=0, help='another seed, other music')
    for name, kind, what in (
        ('temperature', float, 'temperature'),
        ('top-k', int, 'only the k likeliest tokens'),
        ('top-p', float, 'only the fewest tokens that reach this probability together'),
        ('cond-scale', float, 'guidance by the prompt; 1 is none'),
        ('negative-scale', float, 'guidance away from --negative (default: 1)'),
    ):
        each = f'{what}: one number, or one for each of three stages'
        option(parser, f'--{name}', metavar='X', type=kind, nargs='+', help=each)
    option(parser, '--prime', metavar='FILE', help='a sound file to go on from')
    option(parser, '--melody', metavar='FILE', help=MELODY)
    option(
        parser,
        '--max-batch',
        metavar='N',
        help='pieces made at a time: fewer need less memory, more take less time, and prompts are then written '
        'together (default: those of a prompt)',
    )
    option(parser, '--format', choices=FORMATS, default='wav', help='of the files')
    add_place(parser)
    option(parser, '--overwrite', action='store_true', help='write over a page that is in the folder already')


def stream(subcommands) -> None:
    parser = command(
        subcommands,
        'stream',
        run_stream,
        'play music while it is made',
        'Make music for a prompt without end and write it to the standard output while it is made: musiclm '
        'stream "a slow piano" | ffplay -nodisp -i -',
        facts=False,
    )
    option(parser, 'prompt', metavar='PROMPT', nargs='?', help='as of `musiclm generate`')
    add_mix(parser)
    add_model(parser)
    option(parser, '--seconds', metavar='S', help='end after so many (default: never)')
    option(parser, '--seed', metavar='N', default=0, help='another seed, other music')
    option(parser, '--negative', metavar='PROMPT', help=NEGATIVE)
    option(parser, '--prime', metavar='FILE', help='a sound file to begin with and go on from')
    option(parser, '--melody', metavar='FILE', help=f'{MELODY} from the beginning on, once')
    sizes = 'opus is in Ogg, a fifth to a third of the bytes'
    option(parser, '--format', choices=('wav', 'opus'), default='wav', help=sizes)
    add_place(parser)


def add_mix(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--mix',
        metavar=('WEIGHT', 'PROMPT'),
        nargs=2,
        action='append',
        help='a prompt with its weight; all of these are one prompt together',
    )


def infill(subcommands) -> None:
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
    add_model(parser, default='small')
    option(parser, '--num-samples', metavar='N', default=8, help='candidates to choose from')
    option(parser, '--seed', metavar='N', default=0, help='another seed, other music')
    add_place(parser)


def run_stream(options: argparse.Namespace) -> None:
    if sys.stdout.isatty():
        raise ValueError('this is a terminal, which plays no sound: add "| ffplay -nodisp -i -", or "> music.wav"')

    from musiclm_pytorch.inference.written import prompt_of
    from musiclm_pytorch.mulan.text_transformer import PromptWarning
    from musiclm_pytorch.waves import STREAMS

    given = read_given([] if options.prompt is None else [options.prompt], options.mix)
    if len(given) > 1:
        raise ValueError('a stream is for one prompt: give a PROMPT, or --mix, not both')
    prompt = prompt_of(given[0][1])
    sounds = dict(prime=options.prime, melody=options.melody)
    how = {name: Path(it) for name, it in sounds.items() if it is not None}
    if options.negative is not None:
        how['negative'] = prompt_in(options.negative)
    musiclm = load_musiclm(options)
    warnings.simplefilter('ignore', PromptWarning)  # it is told in a line
    for remark in filter(None, musiclm.prompt_warnings([prompt, *([how['negative']] if 'negative' in how else [])])):
        tell(remark)
    with musiclm.stream(prompt, seconds=options.seconds, seed=options.seed, **how) as music:
        samples = None if options.seconds is None else round(options.seconds * music.sample_rate)
        encoder = STREAMS[options.format](music.sample_rate, samples)
        try:
            for wave in music:
                sys.stdout.buffer.write(encoder.push(wave))
                sys.stdout.buffer.flush()
            sys.stdout.buffer.write(encoder.close())
        except BrokenPipeError:  # the player was closed, which is how a stream without end ends
            discard_output()


def run_infill(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.waves import format_of

    format_of(Path(options.output).suffix)  # before music is made
    prompt = prompt_in(options.prompt)
    music = load_musiclm(options).infill(
        Path(options.sound),
        options.start,
        options.end,
        prompt,
        num_samples=options.num_samples,
        seed=options.seed,
    )
    files = music.save(options.output)
    print(*files)
    return dict(files=files)


def discard_output() -> None:
    """Let what waits to be printed, and cannot be, go nowhere: else the interpreter tries once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_generate(options: argparse.Namespace) -> dict[str, Any]:
    from musiclm_pytorch.audiolm.generation_args import read_seconds
    from musiclm_pytorch.gallery import check_no_page
    from musiclm_pytorch.inference.written import prompt_of

    folder, given = Path(options.output), read_given(options.prompts, options.mix, options.story)
    prompts = [told for told, _ in given]
    asked_for = [prompt_of(form) for _, form in given]
    story = asked_for[0] if options.story else None
    seconds = read_seconds(options.seconds, None, story, semantic_rate=None)
    negative = None if options.negative is None else prompt_in(options.negative)
    check_no_page(folder, options.overwrite)
    earlier = listed_in(folder) if options.overwrite else []
    alone = options.prompts
    if len(alone) > 1 and all(len(prompt.split()) == 1 for prompt in alone):
        tell(f'these are {len(alone)} prompts, each with music of its own; for one, quote it: "{" ".join(alone)}"')

    from musiclm_pytorch.gallery import file_name, ranked_clips, write_clip
    from musiclm_pytorch.mulan.text_transformer import PromptWarning

    options.model = options.model or ('small' if options.melody is None else 'tiny')
    musiclm = load_musiclm(options)
    sampling = {
        name: it for name in (*musiclm.sampling, 'negative_scale') if (it := getattr(options, name)) is not None
    }
    sampling = musiclm.sampling | {name: it[0] if len(it) == 1 else tuple(it) for name, it in sampling.items()}
    how = dict(model=options.model, dtype=options.dtype, version=__version__)
    how |= dict(seconds=seconds, prime=options.prime)
    how |= dict(melody=options.melody, negative=options.negative, **sampling)
    remarks = musiclm.prompt_warnings(story or asked_for)
    for prompt, remark in zip(prompts, remarks):
        if remark:
            tell(f'"{prompt}": {remark}')

    made: list[Clip] = []
    done, start = 0, time.perf_counter()
    at_once = max(1, (options.max_batch or 1) // max(1, options.num_samples))  # prompts
    try:
        while done < len(prompts):
            some = prompts[done : done + at_once]
            if sys.stderr.isatty():
                tell(f'prompt {done + 1} of {len(prompts)}: {some[0]}')
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', PromptWarning)  # they are told in lines
                asked = story or asked_for[done : done + at_once]
                music = musiclm(
                    asked,
                    negative=negative,
                    num_samples=options.num_samples,
                    seconds=None if story else seconds,
                    seed=options.seed + done * options.num_samples,
                    melody=None if options.melody is None else Path(options.melody),
                    prime_wave_path=options.prime,
                    max_batch=options.max_batch,
                    return_all=True,
                    return_scores=True,
                    progress=sys.stderr.isatty(),
                    **sampling,
                )
            folder.mkdir(parents=True, exist_ok=True)
            told = musiclm.prompt_warnings(asked, music)
            for prompt, remark, *ranked in zip(some, told, music.waves, music.scores, music.seeds):
                if more := remark.removeprefix(remarks[done]).removeprefix('; '):
                    tell(f'"{prompt}": {more}')
                done += 1
                clips = ranked_clips(prompt, *ranked, name=f'{done:02d}-{file_name(prompt)}', remark=remark)
                for clip in clips:
                    clip = replace(clip, suffix=f'.{options.format}')
                    write_clip(folder, clip, musiclm.sample_rate)
                    made.append(clip)
                    print(f'{clip.note}  {folder / clip.file}', flush=True)
            pieces = write_lists(folder, made, how, dict(given), earlier)
    except KeyboardInterrupt:
        if not made:
            raise
        write_lists(folder, made, how, dict(given), earlier)
        whole = len(prompts) * options.num_samples
        raise KeyboardInterrupt(
            f'interrupted; {len(made)} of {whole} pieces are done, on the page in {folder}'
        ) from None
    took = time.perf_counter() - start
    if left := [file for file in earlier if file not in pieces and (folder / file).exists()]:
        tell(f'{folder} still holds {len(left)} files of the earlier page, such as {left[0]}, which this one has not')
    print(f'{len(made) * seconds:g} s of music in {took:.1f} s; the page is {folder / "index.html"}')
    pieces = [dict(file=folder / it.file, **pieces[it.file], warning=it.remark) for it in made]
    return dict(pieces=pieces, page=folder / 'index.html')


def read_given(
    prompts: list[str], mix: list[list[str]] | None, story: list[list[str]] | None = None
) -> list[tuple[str, Form]]:
    """What is asked for: of each piece what tells of it, and what that says."""
    given = [(prompt, read_line(prompt)) for prompt in prompts]
    if mix:
        parts = numbered(mix, '--mix', 'a weight')
        given.append((' + '.join(f'{weight} {prompt}' for weight, prompt in mix), dict(mix=parts)))
    if story:
        if given:
            raise ValueError('a story is one piece: give --story, or other prompts, not both')
        parts = numbered(story, '--story', 'seconds')
        given.append((' – '.join(prompt for _, prompt in story), dict(story=parts)))
    if not given:
        raise ValueError('say what the music is like: give a PROMPT, --mix or --story')
    return given


def numbered(pairs: list[list[str]], option: str, what: str) -> list[tuple[float, Form]]:
    """Numbers and what the lines beside them say. Raises ValueError for what is no number above 0."""
    from musiclm_pytorch.checks import check_positive

    parts = []
    for number, line in pairs:
        try:
            value = float(number)
        except ValueError as error:
            raise ValueError(f'{option} takes {what}, a number, and a prompt: {error}') from error
        check_positive(**{f'the {what.split()[-1]} of {line!r}': value})
        parts.append((value, read_line(line)))
    return parts


def read_line(line: str) -> Form:
    """What a line says, see `written.read_line`. Raises ValueError for the name of a file as words."""
    from musiclm_pytorch.inference.written import read_line

    if os.path.splitext(line)[1] and os.path.isfile(line):
        raise ValueError(f'{line} is a file here: for music that is like it, write @{line}')
    return read_line(line)


def prompt_in(line: str) -> Any:
    from musiclm_pytorch.inference.written import prompt_of

    return prompt_of(read_line(line))


def listed_in(folder: Path) -> list[str]:
    """The sound files in a folder that its `prompts.json` names."""
    from musiclm_pytorch.atomic import parsed_json

    try:
        content = parsed_json((folder / 'prompts.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):  # none, or no longer one
        return []
    names = content if isinstance(content, dict) else ()
    return [name for name in names if Path(name).name == name and Path(name).suffix[1:] in FORMATS]


def write_lists(
    folder: Path, clips: list[Clip], how: dict[str, Any], given: dict[str, Any], earlier: list[str]
) -> dict[str, dict]:
    """The page of clips that are there, and `prompts.json`: what makes each again, which `musiclm evaluate` reads where
    the prompts are words. Of the files listed `earlier`, those go that are such a clip in another format."""
    from musiclm_pytorch.atomic import write_text
    from musiclm_pytorch.gallery import write_page

    pieces = {
        clip.file: dict(prompt=given[clip.section], seed=clip.seed, **how, score=round(clip.score, 4)) for clip in clips
    }
    write_text(folder / 'prompts.json', json.dumps(pieces, indent=2, ensure_ascii=False) + '\n')
    settings = [f'{name.replace("_", " ")} {it}' for name, it in how.items() if it is not None]
    write_page(folder, clips, title='Music', intro=', '.join(settings))
    names = {clip.name for clip in clips}
    for file in earlier:
        if file not in pieces and Path(file).stem in names:
            (folder / file).unlink(missing_ok=True)
    return pieces


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
