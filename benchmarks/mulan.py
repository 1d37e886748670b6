"""MuLaN against musiclm-pytorch 0.2.8: time and peak memory of training steps and of embedding, by audio length.

Each measurement runs in a process of its own, the two libraries in turn, on the same weights and inputs. Before any
timing, both compute latents, loss and gradients of one batch, which have to agree.

    python benchmarks/mulan.py                          # the table of docs/speed.md
    python benchmarks/mulan.py --cases train:3:4 embed:3:4
    python benchmarks/mulan.py --device cuda --dtype bf16 --cases train:10:64

A case is what:seconds:batch. Peak memory is the largest resident set of the whole process (on CUDA, what the
allocator handed out). Upstream's stretch augmentation does nothing, so ours is off here and both see as many frames.
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
from pathlib import Path

from results import add_out, write_results
from upstream import install_upstream

ROOT = Path(__file__).resolve().parent.parent
SIDES = ('upstream', 'ours')
SAMPLE_RATE = 16000
CASES = ['train:1:4', 'train:3:4', 'train:10:2', 'train:30:2', 'embed:1:4', 'embed:3:4', 'embed:10:4', 'embed:30:4']

# the dimensions of the quick start
AUDIO = dict(dim=512, depth=6, heads=8, dim_head=64, spec_n_fft=128, spec_win_length=24)
TEXT = dict(dim=512, depth=6, heads=8, dim_head=64)

# ---- worker: one library, one measurement ----


def build(weights: Path | None):
    import torch
    from safetensors.torch import load_file

    from musiclm_pytorch import AudioSpectrogramTransformer, MuLaN, TextTransformer

    torch.manual_seed(0)
    audio = AudioSpectrogramTransformer(**AUDIO, spec_aug_stretch_factor=1.0)
    mulan = MuLaN(audio_transformer=audio, text_transformer=TextTransformer(**TEXT))
    if weights is not None:
        # this buffer holds no weight but a table that depends on the stretch factor
        state = load_file(str(weights))
        state['audio.aug.0.phase_advance'] = mulan.state_dict()['audio.aug.0.phase_advance']
        mulan.load_state_dict(state, strict=True)
    return mulan


def batch_of(seconds: float, batch: int):
    import torch

    generator = torch.Generator().manual_seed(1)
    wavs = torch.randn(batch, int(seconds * SAMPLE_RATE), generator=generator)
    texts = torch.randint(1, 20000, (batch, 256), generator=generator)
    return wavs, texts


def agree(weights: Path, out: Path) -> None:
    """Latents, loss and gradients of one batch in eval mode."""
    from safetensors.torch import save_file

    mulan = build(weights).eval()
    wavs, texts = batch_of(0.5, 3)
    loss = mulan(wavs, texts)
    loss.backward()
    found = {f'grad.{name}': p.grad for name, p in mulan.named_parameters() if p.grad is not None}
    found |= dict(loss=loss.detach(), audio=mulan.get_audio_latents(wavs), text=mulan.get_text_latents(texts))
    save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, str(out))


def measure(case: str, weights: Path, repeats: int, device: str, dtype: str) -> dict:
    import torch

    what, seconds, batch = case.split(':')
    mulan = build(weights).to(device)
    mulan.train(what == 'train')
    wavs, texts = (t.to(device) for t in batch_of(float(seconds), int(batch)))
    optimizer = torch.optim.Adam(mulan.parameters(), lr=1e-4)
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == 'bf16')

    def step():
        if what == 'embed':
            with torch.no_grad(), autocast:
                mulan.get_audio_latents(wavs)
            return
        with autocast:
            loss = mulan(wavs, texts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = []
    step()
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)

    peak = torch.cuda.max_memory_allocated() if device == 'cuda' else peak_resident()
    return dict(seconds=statistics.median(times), peak_gb=peak / 1e9, times=times)


def peak_resident() -> int:
    """Bytes of the largest resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(args: argparse.Namespace) -> None:
    if args.memory_gb is not None:
        # fail with an error instead of taking the machine down
        limit = int(args.memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if args.worker == 'weights':
        from safetensors.torch import save_file

        save_file(build(None).state_dict(), str(args.out))
    elif args.worker == 'agree':
        agree(args.weights, args.out)
    else:
        print(json.dumps(measure(args.worker, args.weights, args.repeats, args.device, args.dtype)))


# ---- parent ----


def run(side: str, job: str, weights: Path, args: argparse.Namespace, out: Path | None = None) -> dict | None:
    """Run a worker; None when it ran out of memory."""
    path = args.upstream if side == 'upstream' else ROOT
    command = [sys.executable, str(Path(__file__).resolve()), '--worker', job, '--weights', str(weights)]
    command += ['--repeats', str(args.repeats), '--device', args.device, '--dtype', args.dtype]
    command += ['--memory-gb', str(args.memory_gb)] + (['--out', str(out)] if out else [])
    environment = {**os.environ, 'PYTHONPATH': str(path), 'HF_HUB_OFFLINE': '1'}
    # started elsewhere, so that the folder of this repository is not on the path by itself
    done = subprocess.run(
        command, env=environment, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        out_of_memory = ("can't allocate memory", 'MemoryError', 'CUDA out of memory')
        if done.returncode == -9 or any(phrase in done.stderr for phrase in out_of_memory):
            return None
        raise RuntimeError(f'{side}, {job}:\n{done.stderr[-3000:]}')
    return {} if out else json.loads(done.stdout.splitlines()[-1])


def check_agreement(folder: Path) -> dict[str, float]:
    from safetensors.torch import load_file

    theirs, ours = (load_file(str(folder / f'{side}.safetensors')) for side in SIDES)
    if theirs.keys() != ours.keys():
        raise SystemExit(f'the sides compute different things: {sorted(theirs.keys() ^ ours.keys())}')
    errors = dict(latents=0.0, loss=0.0, gradients=0.0)
    for name, theirs_value in theirs.items():
        difference = (theirs_value - ours[name]).abs().max().item()
        if name in ('audio', 'text'):
            errors['latents'] = max(errors['latents'], difference)
        else:
            kind = 'loss' if name == 'loss' else 'gradients'
            # a gradient that is zero but for rounding has no relative error
            errors[kind] = max(errors[kind], difference / max(theirs_value.abs().max().item(), 1e-4))
    print('agreement:', ', '.join(f'{kind} {error:.1e}' for kind, error in errors.items()))
    if errors['latents'] > 1e-5 or errors['loss'] > 1e-4 or errors['gradients'] > 1e-3:
        raise SystemExit('the sides disagree; timing them would compare different things')
    return errors


def show(rows: list[dict]) -> None:
    print('\n| case | upstream | ours | time | upstream | ours | memory |')
    print('|---|---|---|---|---|---|---|')
    for row in rows:
        theirs, ours = row['upstream'], row['ours']
        what, seconds, batch = row['case'].split(':')
        cells = [f'{"training step" if what == "train" else "embedding"}, {seconds} s, batch {batch}']
        for key, unit in (('seconds', 's'), ('peak_gb', 'GB')):
            both = [f'{side[key]:.2f} {unit}' if side else 'out of memory' for side in (theirs, ours)]
            cells += [*both, f'{ours[key] / theirs[key]:.2f}' if theirs and ours else '–']
        print('| ' + ' | '.join(cells) + ' |')


def main(args: argparse.Namespace) -> None:
    install_upstream(args.upstream)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        weights = folder / 'weights.safetensors'
        run('ours', 'weights', weights, args, out=weights)
        for side in SIDES:
            run(side, 'agree', weights, args, out=folder / f'{side}.safetensors')
        agreement = check_agreement(folder)
        for case in args.cases:
            row = dict(case=case, **{side: run(side, case, weights, args) for side in SIDES})
            print(
                case,
                {
                    side: row[side] and (round(row[side]['seconds'], 3), round(row[side]['peak_gb'], 2))
                    for side in SIDES
                },
            )
            rows.append(row)
    show(rows)
    report = dict(
        device=args.device,
        dtype=args.dtype,
        memory_limit_gb=args.memory_gb,
        repeats=args.repeats,
        agreement=agreement,
        cases=rows,
    )
    write_results(args.out, report)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', default=CASES, help='what:seconds:batch, what being train or embed')
    parser.add_argument('--repeats', type=int, default=5, help='timed steps a case, after one warm-up (default 5)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--dtype', choices=('fp32', 'bf16'), default='fp32')
    parser.add_argument('--memory-gb', type=float, default=24.0, help='limit of a process (default 24)')
    parser.add_argument('--upstream', type=Path, default=ROOT / 'build' / 'upstream', help='where to install upstream')
    add_out(parser, 'mulan')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    parser.add_argument('--weights', type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    worker(arguments) if arguments.worker else main(arguments)
