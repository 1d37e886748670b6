"""Does it learn? MuLaN against musiclm-pytorch 0.2.8 on SyntheticMusic: the same towers, data and number of pairs.

The clips are rendered once, to a file that both sides read, as often as it takes to see so many pairs. Each side trains
with its own trainer at three learning rates on some of the pairs, then at the best of them on all. Held-out
retrieval is measured on the way; at the end, each attribute is recognised zero-shot from phrasings that training never
used.

    python benchmarks/learning.py                          # all of it, hours: upstream is slow
    python benchmarks/learning.py --sides ours --lrs 1e-3  # ours alone, half an hour on two cores at most
    python benchmarks/learning.py --sides upstream         # the other side, beside what `--out` holds of ours
    python benchmarks/learning.py --throughput             # clips a second of the two loops, in turn
    python benchmarks/learning.py --throughput --model readme --batch-size 4  # both with the model of upstream's README

Our recipe predicts words beside the contrast, and draws every other batch, after a while, from groups of clips that are
alike in all but tempo and mode (`MuLaNTrainer(groups=…)`), which the labels tell. Upstream has nothing like it.

Each side has its own spectrogram: upstream's is linear power, here with the window, the hop and the number of patches
of ours, so that the towers see as many tokens. A run is a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from profiled import watch_steps
from upstream import install_upstream

ROOT = Path(__file__).resolve().parent.parent
SIDES = ('ours', 'upstream')
SAMPLE_RATE, SECONDS = 8000, 5.0
SAMPLES = round(SAMPLE_RATE * SECONDS)
ATTRIBUTES = ('instrument', 'tempo', 'mode', 'register', 'texture', 'drums')
RETRIEVAL, ZERO_SHOT, PROMPTS = 256, 1000, 24
TOWER = dict(dim=192, depth=4, heads=4, dim_head=48)
TEXT = dict(dim=192, depth=2, heads=4, dim_head=48)

# what is trained: ours with our recipe beside upstream's towers (for learning), or the same on both sides (for timing)
MODELS = ('recipe', 'same', 'readme')
README_TOWER = dict(dim=512, depth=6, heads=8, dim_head=64)  # both of upstream's README

# of our recipe: the weight of word prediction, and batches of clips that are alike in what is easy to hear
WORDS, GROUP_SIZE, GROUPS_AFTER = 1.0, 16, 0.15

# captions that tell more than usual, with --rich-captions
RICH = dict(tempo=0.85, mode=0.85, register=0.85, texture=0.75, drums=0.85, bpm=0.25, key=0.5)

# ---- data: rendered once, for both sides ----


def render(task: tuple[str, int, int, int]) -> None:
    """Write items `start` to `stop` of the training split into a file of `length` clips."""
    from musiclm_pytorch import SyntheticMusic

    path, length, start, stop = task
    torch.set_num_threads(1)
    music = SyntheticMusic(length, seconds=SECONDS, sample_rate=SAMPLE_RATE)
    waves = np.lib.format.open_memmap(path, 'r+')
    for index in range(start, stop):
        waves[index] = as_int16(music[index][0])


def as_int16(wave: torch.Tensor) -> np.ndarray:
    return (wave.numpy() * 32767).astype(np.int16)


def prepare(folder: Path, clips: int) -> float:
    """Render what is not there yet; returns the seconds that it took."""
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    waves, held_out = folder / f'train-{clips}.npy', folder / 'held-out.npz'
    if not waves.exists():
        aside = waves.with_suffix('.part')
        np.lib.format.open_memmap(aside, 'w+', np.int16, (clips, SAMPLES)).flush()
        step = 1000
        tasks = [(str(aside), clips, i, min(i + step, clips)) for i in range(0, clips, step)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(render, tasks))
        aside.rename(waves)
    if not held_out.exists():
        np.savez(held_out, **make_held_out())
    return time.perf_counter() - start


def make_held_out() -> dict[str, np.ndarray]:
    """Clips and phrasings of the split 'valid'.

    Retrieval: pairs that differ in at least one attribute from every other, each caption telling all of them.
    Zero-shot: other clips, and for each value of an attribute several prompts that tell this attribute alone.
    """
    from musiclm_pytorch import SyntheticMusic

    music = SyntheticMusic(100_000, seconds=SECONDS, sample_rate=SAMPLE_RATE, split='valid')
    kinds: dict[tuple, int] = {}
    for index in range(len(music)):
        labels = music.labels(index)
        kinds.setdefault(tuple(getattr(labels, name) for name in ATTRIBUTES), index)
        if len(kinds) == RETRIEVAL:
            break
    chosen = list(kinds.values())
    after = max(chosen) + 1
    zero_shot = range(after, after + ZERO_SHOT)
    prompts, owners = [], []
    for a, name in enumerate(ATTRIBUTES):
        for v, value in enumerate(music.ATTRIBUTES[name]):
            for seed in range(PROMPTS):
                labels = music.draw_labels(seed, **{name: value})
                prompts.append(music.caption(labels, seed, mention=(name,)))
                owners.append((a, v))
    truth = [
        [music.ATTRIBUTES[name].index(getattr(music.labels(index), name)) for name in ATTRIBUTES] for index in zero_shot
    ]
    return dict(
        retrieval_waves=np.stack([as_int16(music[index][0]) for index in chosen]),
        retrieval_texts=np.array([music.caption(music.labels(i), i, mention=ATTRIBUTES) for i in chosen]),
        zero_shot_waves=np.stack([as_int16(music[index][0]) for index in zero_shot]),
        zero_shot_truth=np.array(truth),
        prompts=np.array(prompts),
        prompt_owners=np.array(owners),
    )


class Rendered(torch.utils.data.Dataset):
    """The rendered clips and their captions. Files alone, since in upstream's process the package is not ours."""

    def __init__(self, args: argparse.Namespace):
        self.waves = np.load(args.data / f'train-{args.clips}.npy', mmap_mode='r')
        self.captions = json.loads(captions_file(args).read_text())[: args.use]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return as_wave(self.waves[index]), self.captions[index]


def synthetic(args: argparse.Namespace):
    from musiclm_pytorch import SyntheticMusic

    mentions = RICH if args.rich_captions else None
    return SyntheticMusic(args.clips, seconds=SECONDS, sample_rate=SAMPLE_RATE, mentions=mentions)


def captions_file(args: argparse.Namespace) -> Path:
    return args.data / f'captions-{args.clips}{"-rich" if args.rich_captions else ""}.json'


def write_captions(args: argparse.Namespace) -> None:
    music = synthetic(args)
    captions_file(args).write_text(json.dumps([music.text(index) for index in range(args.clips)]))


def alike(labels) -> tuple:
    """What clips of a group have in common: all but tempo and key."""
    return labels.instrument, labels.register, labels.texture, labels.drums


def as_wave(clip: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(clip.astype(np.float32) / 32767)


# ---- measuring: the same for both sides ----


@torch.no_grad()
def embed(mulan, waves=None, texts=None, size: int = 64) -> torch.Tensor:
    mulan.eval()
    if waves is not None:
        parts = [mulan.get_audio_latents(as_wave(waves[i : i + size])) for i in range(0, len(waves), size)]
    else:
        # one at a time: upstream's text tower lets padding in
        parts = [mulan.get_text_latents(raw_texts=[str(text)]) for text in texts]
    return torch.cat(parts)


def recall(mulan, held_out) -> dict[str, float]:
    """R@1 both ways among the retrieval pairs; ties count against."""
    similarities = embed(mulan, held_out['retrieval_waves']) @ embed(mulan, texts=held_out['retrieval_texts']).T
    own = similarities.diagonal()
    audio_to_text = ((similarities >= own[:, None]).sum(dim=1) == 1).float().mean()
    text_to_audio = ((similarities >= own[None]).sum(dim=0) == 1).float().mean()
    return dict(audio_to_text=audio_to_text.item(), text_to_audio=text_to_audio.item())


def zero_shot(mulan, held_out) -> dict[str, float]:
    """Share of clips whose attribute is that of the nearest class, a class being the mean of its prompts."""
    audio, prompts = embed(mulan, held_out['zero_shot_waves']), embed(mulan, texts=held_out['prompts'])
    owners, truth = torch.from_numpy(held_out['prompt_owners']), torch.from_numpy(held_out['zero_shot_truth'])
    shares = {}
    for a, name in enumerate(ATTRIBUTES):
        values = int(owners[owners[:, 0] == a, 1].max()) + 1
        classes = torch.stack([prompts[(owners[:, 0] == a) & (owners[:, 1] == v)].mean(dim=0) for v in range(values)])
        found = (audio @ torch.nn.functional.normalize(classes, dim=-1).T).argmax(dim=-1)
        shares[name] = (found == truth[:, a]).float().mean().item()
    return shares


# ---- the two sides ----


def build(side: str, model: str):
    from musiclm_pytorch import AudioSpectrogramTransformer, MuLaN, TextTransformer

    torch.manual_seed(0)
    if model == 'readme':
        audio = AudioSpectrogramTransformer(
            **README_TOWER, spec_n_fft=128, spec_win_length=24, spec_aug_stretch_factor=0.8
        )
        return MuLaN(audio_transformer=audio, text_transformer=TextTransformer(**README_TOWER))
    ours = side == 'ours' and model == 'recipe'
    if not ours:
        audio = AudioSpectrogramTransformer(
            **TOWER, spec_n_fft=1024, spec_win_length=1024, spec_hop_length=160, patch_size=(512, 4)
        )
    else:
        from musiclm_pytorch import create_optimized_audiospectrogram_transformer

        audio = create_optimized_audiospectrogram_transformer(
            **TOWER,
            use_case='tonal',
            audio_sample_rate=SAMPLE_RATE,
            # clips that are seen once or twice need no augmentation
            spec_aug_freq_mask=0,
            spec_aug_time_mask=0,
            patch_dropout_prob=0.0,
        )
    recipe = dict(word_prediction_weight=WORDS) if ours else {}
    return MuLaN(audio_transformer=audio, text_transformer=TextTransformer(**TEXT), **recipe)


def build_trainer(side: str, mulan, dataset, folder: Path, args: argparse.Namespace):
    from musiclm_pytorch.trainer import MuLaNTrainer

    common = dict(batch_size=args.batch_size, lr=args.lr, valid_frac=0.0, results_folder=str(folder))
    if side == 'upstream':
        return MuLaNTrainer(mulan, dataset, num_train_steps=1, force_clear_prev_results=False, **common)
    groups = {}
    if args.model == 'recipe':
        music = synthetic(args)
        groups = dict(
            groups=[alike(music.labels(index)) for index in range(len(dataset))],
            group_size=GROUP_SIZE,
            groups_after=round(GROUPS_AFTER * args.use / args.batch_size),
        )
    return MuLaNTrainer(
        mulan,
        dataset,
        weight_decay=0.05,
        max_grad_norm=1.0,
        mixed_precision=args.precision,
        compile_model=args.compile,
        lr_scheduler_type='cosine',
        warmup_steps=100,
        checkpoint_every=1_000_000,
        progress=False,
        **groups,
        **common,
    )


def train(side: str, args: argparse.Namespace) -> dict:
    """One run: curve of held-out recall, zero-shot shares at the end, seconds of training alone."""
    held_out = np.load(args.data / 'held-out.npz')
    dataset = Rendered(args)
    steps = args.use // args.batch_size
    look_at = {round(steps * part / args.looks) for part in range(1, args.looks + 1)} if args.looks else set()
    curve, times = [], []
    mulan = build(side, args.model)
    profiled = watch_steps(first=steps // 2, count=3) if args.profile else None

    def after_step(step: int, loss: float, seconds: float) -> None:
        times.append(seconds)
        if step in look_at:
            # looking draws nothing, and training goes on in training mode
            point = dict(pairs=step * args.batch_size, seconds=sum(times), loss=loss)
            point |= dict(**recall(mulan, held_out), zero_shot=zero_shot(mulan, held_out))
            curve.append(point)
            mulan.train()
            print(json.dumps(dict(side=side, lr=args.lr, **point)), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(side, mulan, dataset, Path(folder) / 'results', args)
        last = time.perf_counter()
        if side == 'upstream':
            for step in range(1, steps + 1):
                last = time.perf_counter()
                loss = trainer.train_step()['loss']
                after_step(step, loss, time.perf_counter() - last)
        else:

            def log_fn(metrics):
                nonlocal last
                after_step(trainer.step, metrics['loss'], time.perf_counter() - last)
                if profiled is not None:
                    profiled(trainer.step)
                last = time.perf_counter()

            trainer.train(num_train_steps=steps, with_validation=False, log_fn=log_fn)
    # compiling falls into the first steps
    found = dict(side=side, lr=args.lr, pairs=args.use, seconds=sum(times), step_seconds=statistics.median(times))
    found |= dict(clips_a_second=args.batch_size / found['step_seconds'], curve=curve)
    if args.save and side == 'ours':
        mulan.save_pretrained(args.save)
    return found


# ---- parent ----


def run(side: str, lr: float, use: int, looks: int, args: argparse.Namespace) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), '--worker', side, '--data', str(args.data)]
    command += ['--lr', str(lr), '--use', str(use), '--looks', str(looks), '--clips', str(args.clips)]
    command += ['--batch-size', str(args.batch_size)] + (['--save', str(args.save)] if args.save else [])
    command += ['--model', args.model, *(['--compile'] if args.compile else [])]
    command += ['--profile'] if args.profile and side == 'ours' else []
    command += ['--precision', args.precision, *(['--rich-captions'] if args.rich_captions else [])]
    path = args.upstream if side == 'upstream' else ROOT
    environment = {**os.environ, 'PYTHONPATH': str(path), 'HF_HUB_OFFLINE': '1'}
    # large blocks come and go at each step: without this, glibc asks the kernel for fresh pages every time
    environment |= {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': '-1'}
    # started elsewhere, so that the folder of this repository is not on the path by itself
    done = subprocess.run(
        command, env=environment, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f'{side} at {lr:g} ended with exit code {done.returncode}')
    return json.loads(done.stdout.splitlines()[-1])


def draw(runs: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    for found, colour in zip(runs, ('#1f6f8b', '#c0562f')):
        for way, style in (('text_to_audio', '-'), ('audio_to_text', '--')):
            points = [(0, 1 / RETRIEVAL)] + [(point['pairs'], point[way]) for point in found['curve']]
            label = f'{"musiclm-pytorch 0.2.8" if found["side"] == "upstream" else "here"}, {way.replace("_", " ")}'
            axes.plot(*zip(*points), style, color=colour, label=label, linewidth=1.6)
    axes.set(xlabel='pairs seen', ylabel=f'R@1 among {RETRIEVAL} held-out pairs', ylim=(0, 1))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def show(runs: list[dict]) -> None:
    names = ['R@1 text to audio', 'R@1 audio to text', *ATTRIBUTES, 'clips/s', 'lr']
    print('\n| | ' + ' | '.join(names) + ' |\n|' + '---|' * (len(names) + 1))
    for found in runs:
        last = found['curve'][-1]
        shares = [last['text_to_audio'], last['audio_to_text'], *last['zero_shot'].values()]
        cells = [f'{share:.1%}' for share in shares] + [f'{found["clips_a_second"]:.0f}', f'{found["lr"]:g}']
        print(f'| {found["side"]} | ' + ' | '.join(cells) + ' |')


def throughput(args: argparse.Namespace) -> dict[str, float]:
    """Median clips a second of the two loops, in turns."""
    use = args.batch_size * args.steps
    rates: dict[str, list[float]] = {side: [] for side in args.sides}
    for _ in range(args.rounds):
        for side in args.sides:
            found = run(side, 3e-4, use, 0, args)
            rates[side].append(found['clips_a_second'])
            start = found['seconds'] - found['step_seconds'] * args.steps
            print(f'{side}: {rates[side][-1]:.1f} clips/s, {start:.1f} s more for the first steps', flush=True)
    found = {side: statistics.median(values) for side, values in rates.items()}
    print('clips a second:', {side: round(value, 1) for side, value in found.items()}, rates)
    if len(found) == 2:
        print(f'ratio {found["ours"] / found["upstream"]:.2f}')
    return found


def evaluate(args: argparse.Namespace) -> None:
    """Print what a trained model of ours reaches."""
    from musiclm_pytorch import MuLaN

    mulan, held_out = MuLaN.from_pretrained(args.evaluate), np.load(args.data / 'held-out.npz')
    print(json.dumps(recall(mulan, held_out) | zero_shot(mulan, held_out)))


def main(args: argparse.Namespace) -> None:
    if 'upstream' in args.sides:
        install_upstream(args.upstream)
    rendering = prepare(args.data, args.clips)
    write_captions(args)
    print(f'{args.clips} clips of {SECONDS:g} s rendered in {rendering:.0f} s')
    if args.throughput:
        throughput(args)
        return
    if args.model != 'recipe':
        raise ValueError(f'what is learned is measured with the recipe; --model {args.model} needs --throughput')
    if args.evaluate is not None:
        evaluate(args)
        return
    trials, runs = [], []
    for side in args.sides:
        best = args.lrs[0]
        if len(args.lrs) > 1:
            side_trials = [run(side, lr, args.trial_pairs or args.pairs // 4, 1, args) for lr in args.lrs]
            trials += side_trials
            best = max(side_trials, key=lambda found: found['curve'][-1]['text_to_audio'])['lr']
        runs.append(run(side, best, args.pairs, args.looks, args))
        show(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    earlier = args.out / 'learning.json'
    if earlier.exists():
        # a side that was not asked for stays as it was measured last
        runs = [found for found in json.loads(earlier.read_text())['runs'] if found['side'] not in args.sides] + runs
    runs.sort(key=lambda found: SIDES.index(found['side']))
    draw(runs, args.out / 'learning.png')
    report = dict(
        date=datetime.date.today().isoformat(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        rendering_seconds=rendering,
        batch_size=args.batch_size,
        trials=trials,
        runs=runs,
    )
    (args.out / 'learning.json').write_text(json.dumps(report, indent=2) + '\n')
    print(f'\nwritten to {args.out}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sides', nargs='+', choices=SIDES, default=SIDES)
    parser.add_argument('--clips', type=int, default=64_000, help='clips to learn from (default 64,000)')
    parser.add_argument('--pairs', type=int, default=64_000, help='pairs that each side sees (default 64,000)')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--precision', choices=['auto', 'no', 'bf16'], default='auto', help='of our side')
    parser.add_argument('--compile', action='store_true', help='compile the towers of our side')
    parser.add_argument('--lrs', type=float, nargs='+', default=[5e-4, 1e-3, 2e-3], help='learning rates to try')
    parser.add_argument('--trial-pairs', type=int, help='pairs of a trial of a rate (default: a quarter of all)')
    parser.add_argument('--looks', type=int, default=8, help='points of the curve (default 8)')
    parser.add_argument('--throughput', action='store_true', help='only time the loops')
    parser.add_argument(
        '--model',
        choices=MODELS,
        default='recipe',
        help="our recipe's, or one for both sides: its towers, upstream's README's",
    )
    parser.add_argument('--steps', type=int, default=30, help='steps of a timing (default 30)')
    parser.add_argument('--profile', action='store_true', help='tell what the operators of a step of ours cost')
    parser.add_argument('--rounds', type=int, default=3, help='timings of each side (default 3)')
    parser.add_argument('--rich-captions', action='store_true', help='captions that tell more than usual')
    parser.add_argument('--evaluate', type=Path, metavar='FOLDER', help='only measure the model saved there')
    parser.add_argument('--save', type=Path, help='folder for the weights of our side')
    parser.add_argument('--data', type=Path, default=ROOT / 'build' / 'learning', help='where to render the clips')
    parser.add_argument('--out', type=Path, default=ROOT / 'build' / 'benchmarks')
    parser.add_argument('--upstream', type=Path, default=ROOT / 'build' / 'upstream', help='where to install upstream')
    parser.add_argument('--worker', choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument('--lr', type=float, help=argparse.SUPPRESS)
    parser.add_argument('--use', type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(train(arguments.worker, arguments)))
    else:
        main(arguments)
