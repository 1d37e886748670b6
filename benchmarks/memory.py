"""Peak memory of a training step of MuLaN: a batch of 512 through GradCache, beside a plain batch of 32 and of 512.

    python benchmarks/memory.py
    python benchmarks/memory.py --cases 32 256:32 --seconds 4

A case is `batch` or `batch:chunk`. Each runs in a process of its own: forward and backward pass and a step of Adam, on
the CPU. The peak is that of the resident memory (ru_maxrss); what is "above the model" the step added to the process
with its model, its optimizer's state and its batch. Where a step would need more than --limit GB of address space, it
is stopped there. First it is checked that GradCache's gradients are those of the whole batch. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

import torch
from results import add_out, write_results  # beside this file

from musiclm_pytorch import MuLaN, TextTransformer, create_optimized_audiospectrogram_transformer
from musiclm_pytorch.trainer.grad_cache import grad_cache_backward, split_batch

RATE = 16000
GB = 2**30
TOLERANCE = 1e-5


def build(dim: int = 256, depth: int = 4, **audio) -> MuLaN:
    torch.manual_seed(0)
    return MuLaN(
        create_optimized_audiospectrogram_transformer(dim, depth, 'music', RATE, **audio),
        TextTransformer(dim=dim, depth=depth),
    ).train()


def pairs(batch: int, seconds: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    wavs = torch.randn(batch, round(seconds * RATE), generator=generator) * 0.1
    return dict(wavs=wavs, texts=torch.randint(1, 49000, (batch, 24), generator=generator))


def backward(mulan: MuLaN, batch: dict[str, torch.Tensor], chunk: int | None) -> torch.Tensor:
    """The gradients of a batch, at once or through GradCache; gives the loss."""
    if chunk is None:
        loss = mulan(**batch)
        loss.backward()
        return loss.detach()
    return grad_cache_backward(
        split_batch(batch, chunk),
        encode=lambda part: mulan.pair_latents(**part),
        loss_of=mulan.loss,
        backward=torch.Tensor.backward,
    )


def check_gradients() -> tuple[float, float]:
    """The largest difference between a gradient of GradCache and of the whole batch, and the largest gradient.

    Without random augmentation, which would be drawn in another order.
    """
    still = dict(patch_dropout_prob=0.0, spec_aug_stretch_factor=1.0, spec_aug_freq_mask=0, spec_aug_time_mask=0)
    mulan, batch = build(dim=64, depth=2, **still), pairs(12, 1.0)
    found = []
    for chunk in (None, 5):
        mulan.zero_grad()
        backward(mulan, batch, chunk)
        found.append([p.grad.clone() for p in mulan.parameters()])
    difference = max(float((a - b).abs().max()) for a, b in zip(*found))
    return difference, max(float(a.abs().max()) for a in found[0])


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mapped() -> tuple[int, int]:
    """Bytes of address space, as the limit counts them, and of resident memory of this process now."""
    with open('/proc/self/statm') as file:
        total, resident = (int(it) * resource.getpagesize() for it in file.read().split()[:2])
    return total, resident


def measure(case: str, seconds: float, limit: float) -> dict[str, float]:
    """Run one case in this process."""
    size, _, chunk = case.partition(':')
    mulan = build()
    optimizer = torch.optim.Adam(mulan.parameters(), lr=1e-4)
    # a small step first: what is allocated once should not count for the step
    backward(mulan, pairs(2, seconds), None)
    optimizer.step()
    optimizer.zero_grad()
    batch = pairs(int(size), seconds)
    total, before = mapped()
    resource.setrlimit(resource.RLIMIT_AS, (total + round(limit * GB),) * 2)
    start = time.perf_counter()
    loss = backward(mulan, batch, int(chunk) if chunk else None)
    optimizer.step()
    after = peak()
    return dict(peak=after / GB, above=(after - before) / GB, seconds=time.perf_counter() - start, loss=loss.item())


def run(case: str, options: argparse.Namespace) -> dict[str, float] | None:
    """Measure a case in a new process; None where it did not fit."""
    command = [sys.executable, __file__, '--case', case]
    command += ['--seconds', str(options.seconds), '--limit', str(options.limit), '--threads', str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    if 'allocate memory' in done.stderr or 'MemoryError' in done.stderr or done.returncode == -9:
        return None
    raise RuntimeError(f'the case {case} failed:\n{done.stderr}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--cases', nargs='+', default=['32', '512:32', '512'], metavar='CASE', help='batch or batch:chunk'
    )
    parser.add_argument('--seconds', type=float, default=2.0, help='length of a clip (default: %(default)s)')
    parser.add_argument('--limit', type=float, default=12.0, help='GB a step may take (default: %(default)s)')
    parser.add_argument('--threads', type=int, default=1, help='of torch (default: %(default)s)')
    parser.add_argument('--case', help=argparse.SUPPRESS)
    add_out(parser, 'memory')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(measure(options.case, options.seconds, options.limit)))
        return

    difference, largest = check_gradients()
    if not difference <= TOLERANCE:
        raise SystemExit(f"GradCache's gradients differ from the whole batch's by {difference:.1e}")
    print(f"GradCache's gradients differ from the whole batch's by {difference:.1e}; the largest is {largest:.1e}\n")
    print(
        f'torch {torch.__version__}, {platform.machine()}, {options.threads} thread(s), {options.seconds:g} s clips\n'
    )
    print('| batch | chunks of | peak, GB | above the model, GB | step, s |\n|---|---|---|---|---|')
    rows = {}
    for case in options.cases:
        size, _, chunk = case.partition(':')
        found = rows[case] = run(case, options)
        cells = [f'{found[key]:.2f}' for key in ('peak', 'above')] + [f'{found["seconds"]:.1f}'] if found else None
        cells = cells or [f'more than {options.limit:g}', f'more than {options.limit:g}', '–']
        print(f'| {size} | {chunk or "–"} | {" | ".join(cells)} |', flush=True)
    write_results(options.out, dict(seconds=options.seconds, limit_gb=options.limit, rows=rows))


if __name__ == '__main__':
    main()
