"""`musiclm generate`: words to music, with a page to hear and see it."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def generate(subcommands) -> None:
    """`musiclm generate`: prompts to WAV files and a page."""
    parser = subcommands.add_parser(
        'generate',
        help='make music that fits the words',
        description='Make music for one prompt or more: WAV files, a page with players, spectrograms and the scores '
        'by which MuLaN ranks the samples of a prompt, and prompts.json. The first sample of a prompt is that of the '
        'highest score.',
    )
    parser.add_argument('prompts', metavar='PROMPT', nargs='+', help='what the music is like')
    parser.add_argument('-o', '--output', metavar='FOLDER', required=True, help='where WAVs and page go')
    add_model_option(parser)
    parser.add_argument(
        '--num-samples', metavar='N', type=int, default=1, help='pieces a prompt (default: %(default)s)'
    )
    parser.add_argument(
        '--seconds', metavar='S', type=float, default=10.0, help='length, the prime included (default: %(default)s)'
    )
    parser.add_argument('--seed', metavar='N', type=int, default=0, help='another seed, other music (default: 0)')
    for name, kind, what in (
        ('temperature', float, 'temperature'),
        ('top-k', int, 'only the k likeliest tokens'),
        ('top-p', float, 'only the fewest tokens that reach this probability together'),
        ('cond-scale', float, 'guidance by the prompt; 1 is none'),
    ):
        parser.add_argument(
            f'--{name}', metavar='X', type=kind, nargs='+', help=f'{what}: one number, or one for each of three stages'
        )
    parser.add_argument('--prime', metavar='FILE', help='a sound file to go on from')
    parser.add_argument('--max-batch', metavar='N', type=int, help='pieces made at a time, for less memory')
    parser.add_argument('--device', default='cpu', help='such as cuda (default: %(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='write over a page that is in the folder already')
    parser.set_defaults(run=run_generate, prog=parser.prog)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--model',
        metavar='FOLDER',
        default='tiny',
        help='a folder written by MusicLM.save_pretrained, or the name of a model that ships (default: %(default)s)',
    )


def run_generate(options: argparse.Namespace) -> None:
    page = Path(options.output) / 'index.html'
    if page.exists() and not options.overwrite:
        raise FileExistsError(f'{page} is there already; give another folder, or --overwrite')

    from musiclm_pytorch.gallery import file_name, ranked_clips, write_gallery
    from musiclm_pytorch.musiclm import MusicLM

    musiclm = MusicLM.from_pretrained(options.model).to(options.device)
    given = {name: getattr(options, name) for name in ('temperature', 'top_k', 'top_p', 'cond_scale')}
    given = {name: it[0] if len(it) == 1 else tuple(it) for name, it in given.items() if it is not None}
    start = time.perf_counter()
    music = musiclm(
        options.prompts,
        num_samples=options.num_samples,
        seconds=options.seconds,
        seed=options.seed,
        prime_wave_path=options.prime,
        max_batch=options.max_batch,
        return_all=True,
        return_scores=True,
        **given,
    )
    seconds = time.perf_counter() - start

    clips = []
    for number, (prompt, waves, scores) in enumerate(zip(options.prompts, music.waves, music.scores), 1):
        clips += ranked_clips(prompt, waves, scores, name=f'{number:02d}-{file_name(prompt)}')
    page = write_gallery(options.output, clips, musiclm.sample_rate, title='Music', overwrite=options.overwrite)
    prompts = {f'{clip.name}.wav': clip.section for clip in clips}  # what `musiclm evaluate` reads
    (Path(options.output) / 'prompts.json').write_text(json.dumps(prompts, indent=2) + '\n', encoding='utf-8')
    for clip in clips:
        print(f'{clip.note}  {Path(options.output) / clip.name}.wav')
    made = len(clips) * options.seconds
    print(f'{made:g} s of music in {seconds:.1f} s; the page is {page}')
