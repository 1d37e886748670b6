"""`musiclm infill`: another piece for a gap; `musiclm train melody`: what melodies given to `musiclm generate` need."""

from __future__ import annotations

import argparse
from pathlib import Path

from musiclm_pytorch.cli_generate import add_model_option, prompt_of


def infill(subcommands) -> None:
    """`musiclm infill`: seconds of a sound file made anew."""
    parser = subcommands.add_parser(
        'infill',
        help='replace seconds of a sound file',
        description='Write a sound file again with other music between two times, that fits the words and both sides, '
        'which stay as they are but for a crossfade of 40 ms.',
    )
    parser.add_argument('sound', metavar='FILE', help='the sound file')
    parser.add_argument('prompt', metavar='PROMPT', help='as of `musiclm generate`')
    parser.add_argument('--start', metavar='S', type=float, required=True, help='where the gap begins, in seconds')
    parser.add_argument('--end', metavar='S', type=float, required=True, help='where it ends')
    parser.add_argument('-o', '--output', metavar='FILE', required=True, help='.wav, .flac, .ogg or .mp3')
    add_model_option(parser)
    parser.add_argument(
        '--num-samples', metavar='N', type=int, default=8, help='candidates to choose from (default: %(default)s)'
    )
    parser.add_argument('--seed', metavar='N', type=int, default=0, help='another seed, other music (default: 0)')
    parser.add_argument('--device', default='cpu', help='such as cuda (default: %(default)s)')
    # one file, which appears whole
    parser.set_defaults(run=run_infill, prog=parser.prog, shares_output=True)


def run_infill(options: argparse.Namespace) -> None:
    from musiclm_pytorch.checks import check_device
    from musiclm_pytorch.musiclm import MusicLM
    from musiclm_pytorch.waves import format_of

    format_of(Path(options.output).suffix)  # before music is made
    check_device(options.device)
    musiclm = MusicLM.from_pretrained(options.model).to(options.device)
    music = musiclm.infill(
        Path(options.sound),
        options.start,
        options.end,
        prompt_of(options.prompt),
        num_samples=options.num_samples,
        seed=options.seed,
    )
    print(*music.save(options.output))


def train_melody(models) -> None:
    """`musiclm train melody`: from generated pairs to a MelodyQuantizer."""
    parser = models.add_parser(
        'melody',
        help='the melody encoder and its quantizer',
        description='Train a melody encoder on generated pairs of the same melody and fit its quantizer, for '
        '`musiclm train quantizer --melody`: some minutes on one core. What is under --output is moved aside.',
    )
    parser.add_argument('--output', metavar='FOLDER', required=True, help='where the MelodyQuantizer goes')
    for name, default, what in (
        ('steps', 120, 'of the training'),
        ('batch-size', 64, 'pairs a step'),
        ('quantizers', 4, 'levels of codes'),
        ('codebook-size', 256, 'codes a level'),
        ('seed', 42, 'of weights, melodies and k-means'),
    ):
        parser.add_argument(f'--{name}', type=int, metavar='N', default=default, help=f'{what} (default: %(default)s)')
    for name, default, what in (('seconds', 4.0, 'length of the windows'), ('hop', 1.0, 'distance between two')):
        parser.add_argument(
            f'--{name}', type=float, metavar='S', default=default, help=f'{what} (default: %(default)s)'
        )
    parser.set_defaults(run=run_train_melody, prog=parser.prog)


def run_train_melody(options: argparse.Namespace) -> None:
    import tempfile

    from musiclm_pytorch.codecs.melody import MelodyQuantizer
    from musiclm_pytorch.data.melodies import MelodyPairs
    from musiclm_pytorch.mulan.melody import MelodyEncoder
    from musiclm_pytorch.trainer.batches import seed_everything
    from musiclm_pytorch.trainer.folders import new_results
    from musiclm_pytorch.trainer.melody import MelodyTrainer

    seed_everything(options.seed)
    encoder = MelodyEncoder(seconds=options.seconds, hop=options.hop)
    how = dict(seconds=max(1.0, options.seconds), sample_rate=encoder.sample_rate, seed=options.seed)
    pairs = MelodyPairs(options.steps * options.batch_size, **how)
    melody = MelodyQuantizer(encoder, options.quantizers, options.codebook_size)
    with tempfile.TemporaryDirectory() as folder:
        found = MelodyTrainer(
            encoder,
            pairs,
            valid_pairs=MelodyPairs(256, split='valid', **how),
            batch_size=options.batch_size,
            lr_scheduler_type='cosine',
            seed=options.seed,
            results_folder=folder,
        ).train(num_train_steps=options.steps)
    left = melody.eval().fit(pairs, max_items=max(1024, options.codebook_size), seed=options.seed)
    with new_results(Path(options.output), resume=False, clear=False):
        melody.save_pretrained(options.output)
    print(f'the same melody among 256 in another performance: R@1 {found["valid_recall_at_1"]:.3f}')
    told = f'{len(left)} levels of {melody.codebook_size} codes, {left[-1]:.1%} missing after the last'
    print(f'{told}, in {options.output}')
