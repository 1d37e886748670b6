"""What a prompt costs beside another checkout: files it passes, import, processor time and memory, tokens a second; and
what a training step of the stages does.

    git worktree add ../before COMMIT
    python benchmarks/prompt.py --before ../before

Each measurement runs in a process of its own, the two sides in turns, and medians are told. Processor times are of one
thread, for threads that wait for each other count as busy; tokens a second are those of all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from results import add_out, write_results  # beside this file

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ('audiolm_pytorch', 'transformers', 'sklearn', 'librosa', 'wandb', 'torchao')
CODES, COARSE, FINE, FRAMES = 1024, 3, 5, 24


# ---- children ----


def measure_import() -> dict:
    """Processor time over that of torch, and what is loaded that need not be."""
    import torch  # noqa: F401

    start = time.process_time()
    from musiclm_pytorch import MusicLM  # noqa: F401

    return dict(seconds=time.process_time() - start, heavy=[name for name in HEAVY if name in sys.modules])


def measure_generate() -> dict:
    """Processor time and peak memory of the command, imports and all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'musiclm_pytorch.cli', 'generate', 'a calm piano', '--seconds', '1']
        subprocess.run([*command, '-o', folder], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return dict(seconds=used.ru_utime + used.ru_stime, peak_mb=used.ru_maxrss / 1024)


def measure_files() -> dict:
    """The files of the package that run between the call of a model and its wave."""
    import musiclm_pytorch

    musiclm = musiclm_pytorch.MusicLM.from_pretrained('tiny')
    musiclm('a calm piano', seconds=1.0, seed=0)
    package, files = str(Path(musiclm_pytorch.__file__).parent), set()

    def look(frame, event, argument):
        if event == 'call' and frame.f_code.co_filename.startswith(package):
            files.add(frame.f_code.co_filename.removeprefix(package + os.sep))

    sys.setprofile(look)
    musiclm('a calm piano', seconds=1.0, seed=0)
    sys.setprofile(None)
    return dict(count=len(files), files=sorted(files))


def measure_tokens(rows: int, auto: bool = False) -> dict:
    """Tokens a second of the three stages as `MusicLM` calls them, dim 512, depth 6, samples side by side.

    In float32, or as `dtype='auto'` has them in a checkout that knows it.
    """
    import torch

    import musiclm_pytorch
    from musiclm_pytorch import generate_coarse, generate_fine, generate_semantic

    if hasattr(musiclm_pytorch, 'SemanticTransformer'):
        from musiclm_pytorch.audiolm import stages as kinds
    else:
        from musiclm_pytorch.audiolm import bridge as kinds
    sizes = dict(dim=512, depth=6, audio_text_condition=True)
    coarse = dict(codebook_size=CODES, num_coarse_quantizers=COARSE)
    torch.manual_seed(0)
    semantic = kinds.SemanticTransformer(num_semantic_tokens=CODES, **sizes).eval()
    stages = dict(
        semantic=semantic,
        coarse=kinds.CoarseTransformer(num_semantic_tokens=CODES, **coarse, **sizes).eval(),
        fine=kinds.FineTransformer(num_fine_quantizers=FINE, **coarse, **sizes).eval(),
    )
    if auto and find_spec('musiclm_pytorch.audiolm.decode_step'):
        from musiclm_pytorch.audiolm.decode_step import fastest_dtype

        for stage in stages.values():
            stage.to(fastest_dtype(stage))
    embeds = torch.randn(rows, 8, 512)
    ids, codes = torch.randint(0, CODES, (rows, 48)), torch.randint(0, CODES, (rows, FRAMES, COARSE))
    runs = dict(
        semantic=lambda length: generate_semantic(
            stages['semantic'], max_length=length, min_length=length, text_embeds=embeds
        ),
        coarse=lambda length: generate_coarse(
            stages['coarse'], ids, max_length=length, min_length=length, text_embeds=embeds
        ),
        fine=lambda length: generate_fine(stages['fine'], codes[:, :length], text_embeds=embeds),
    )
    found = {}
    for (name, run), length, levels in zip(runs.items(), (4 * FRAMES, FRAMES, FRAMES), (1, COARSE, FINE)):
        run(length)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run(length)
            times.append(time.perf_counter() - start)
        found[name] = rows * length * levels / min(times)
    return found


def measure_step() -> dict:
    """Processor time of a training step of each stage: the loss of two crops and its gradients, dim 512, depth 6."""
    import torch

    import musiclm_pytorch
    from musiclm_pytorch.trainer.stages import Stage

    if hasattr(musiclm_pytorch, 'SemanticTransformer'):
        from musiclm_pytorch.audiolm import stages as kinds
    else:
        from musiclm_pytorch.audiolm import bridge as kinds
    sizes = dict(dim=512, depth=6, audio_text_condition=True)
    coarse = dict(codebook_size=CODES, num_coarse_quantizers=COARSE)
    stages = dict(
        semantic=kinds.SemanticTransformer(num_semantic_tokens=CODES, **sizes),
        coarse=kinds.CoarseTransformer(num_semantic_tokens=CODES, **coarse, **sizes),
        fine=kinds.FineTransformer(num_fine_quantizers=FINE, **coarse, **sizes),
    )
    codec = torch.randint(0, CODES, (2, 100, COARSE + FINE))
    given = (
        dict(semantic=torch.randint(0, CODES, (2, 375))),
        dict(semantic=codec[..., 0], codec=codec),
        dict(codec=codec),
    )
    found = {}
    for (name, transformer), batch in zip(stages.items(), given):
        embeddings = torch.nn.Parameter(torch.randn(8, CODES, 512))
        stage = Stage(transformer, embeddings, cond_drop_prob=0.1, mask_prob=0.15, prefix_loss_weight=1.0).train()
        times = []
        for _ in range(5):
            start = time.thread_time()
            stage(**batch, conditioning=codec[:, 0]).backward()
            times.append(time.thread_time() - start)
        found[name] = min(times)
    return found


# ---- parent ----


def child(folder: Path, *what: str, threads: int) -> dict:
    environment = {**os.environ, 'PYTHONPATH': str(folder), 'OMP_NUM_THREADS': str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), '--child', *what]
    done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def medians(runs: list[dict]) -> dict:
    return {
        name: statistics.median(run[name] for run in runs) if isinstance(value, int | float) else value
        for name, value in runs[0].items()
    }


def main(args: argparse.Namespace) -> None:
    sides = dict(before=args.before, now=ROOT)
    tasks = dict(files=(1, 1), import_time=(args.rounds, 1), generate=(args.rounds, 1))
    tasks |= dict(step=(args.rounds, 1))
    tasks |= {f'tokens {rows}{kind}': (args.rounds, args.threads) for kind in ('', ' auto') for rows in (1, 4, 8)}
    report = {}
    for task, (rounds, threads) in tasks.items():
        if args.only and task.split()[0] not in args.only:
            continue
        runs = {side: [] for side in sides}
        for number in range(rounds + (task == 'generate')):
            for side, folder in sides.items():
                found = child(folder, *task.split(), threads=threads)
                if task != 'generate' or number > 0:  # the first fills caches
                    runs[side].append(found)
        report[task] = {side: medians(them) for side, them in runs.items()}
        print(task)
        for name, now in report[task]['now'].items():
            before = report[task]['before'][name]
            ratio = f', {now / before:.2f} times' if isinstance(now, int | float) else ''
            print(f'  {name}: {before} before, {now} now{ratio}', flush=True)
    write_results(args.out, report)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--before', type=Path, help='another checkout')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--only', nargs='+', choices=('files', 'import_time', 'generate', 'step', 'tokens'))
    add_out(parser, 'prompt')
    parser.add_argument('--child', nargs='+')
    arguments = parser.parse_args()
    if arguments.child:
        measures = dict(import_time=measure_import, generate=measure_generate, files=measure_files, step=measure_step)
        name, *rest = arguments.child
        print(json.dumps(measure_tokens(int(rest[0]), 'auto' in rest) if name == 'tokens' else measures[name]()))
    else:
        main(arguments)
