"""What several processes cost: seconds a step against world size, and memory of the loss against the global batch.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --worlds 1 2 --steps 20 --out build/scaling.json

Steps: a small MuLaN on noise, one thread a process, gloo, a fixed batch a process ("weak scaling"): the median step of
process 0, and how it splits with the processes' waiting for each other. Loss: forward and backward of one process's
rows, B × (B · world) logits in both directions, with the columns of the other processes simulated; peak bytes by the
allocator of the profiler.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from unittest import mock

import torch
from results import add_out, write_results  # beside this file
from torch import nn

from musiclm_pytorch import AudioSpectrogramTransformer, MuLaN, TextTransformer
from musiclm_pytorch.distributed import DistributedConfig, DistributedMuLaNTrainer
from musiclm_pytorch.mulan import contrastive

DIM_LATENT = 128


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 4096

    def __getitem__(self, index):
        return torch.randn(16000), torch.randint(1, 1000, (16,))


def build() -> MuLaN:
    torch.manual_seed(0)
    sizes = dict(dim=128, depth=2, heads=4, dim_head=32)
    # 64 patches of 16 × 16: hops of 10 ms as in the recipes
    audio = AudioSpectrogramTransformer(**sizes, spec_n_fft=400, spec_win_length=400, spec_hop_length=160)
    return MuLaN(audio, TextTransformer(**sizes, num_tokens=1000, max_seq_len=16), dim_latent=DIM_LATENT)


def measure_steps(world: int, batch_size: int, steps: int, **fields) -> dict:
    mulan = build()
    seconds, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistributedMuLaNTrainer(
            mulan,
            Noise(),
            DistributedConfig(world_size=world, backend='gloo', **fields),
            batch_size=batch_size,
            valid_frac=0.0,
            results_folder=folder,
            progress=False,
        )
        trainer.train(num_train_steps=steps, log_fn=lambda metrics: seconds.append(metrics['seconds']))
    warm = seconds[len(seconds) // 4 :]
    return dict(
        world=world,
        fields=fields,
        batch_a_process=batch_size,
        seconds_a_step=statistics.median(warm),
        pairs_a_second=world * batch_size / statistics.median(warm),
        seconds_to_start_and_save=time.perf_counter() - started - sum(seconds),
        gradient_mib=sum(p.numel() for p in mulan.parameters()) * 4 / 2**20,
    )


def peak_of_loss(loss: nn.Module, local: int, total: int) -> tuple[int, float]:
    """Peak bytes beyond what was there, and seconds, of one process's share of a loss over `total` pairs."""
    world = total // local
    generator = torch.Generator().manual_seed(0)
    audio, text, others_audio, others_text = (
        nn.functional.normalize(torch.randn(1, n, DIM_LATENT, generator=generator), dim=-1)
        for n in (local, local, total - local, total - local)
    )
    # what the gather of the other processes would have brought, in the order in which the loss asks
    others = [others_text, others_audio]

    def gathered(latents, sizes):
        return torch.cat([latents, others[gathered.calls % 2]], dim=1) if total > local else latents

    def counted(latents, sizes):
        result = gathered(latents, sizes)
        gathered.calls += 1
        return result

    gathered.calls = 0
    leaves = [t.clone().requires_grad_() for t in (audio, text)]
    with (
        mock.patch.object(contrastive, 'gather_batch', counted),
        mock.patch.object(contrastive, 'rank', return_value=0),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile,
    ):
        start = time.perf_counter()
        (loss.loss_of_own_rows(*leaves, [local] * world) / total).backward()
        seconds = time.perf_counter() - start
    # the running total of the allocator's gains and losses, in the order in which they happened
    events = sorted(
        (event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]'),
        key=lambda event: event.start_ns(),
    )
    current = peak = 0
    for event in events:
        current += event.nbytes()
        peak = max(peak, current)
    return peak, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--worlds', type=int, nargs='+', default=[1, 2, 4])
    parser.add_argument('--batch-size', type=int, default=16, help='pairs a process')
    parser.add_argument('--steps', type=int, default=16)
    parser.add_argument('--locals', type=int, nargs='+', default=[32, 128, 512])
    parser.add_argument('--totals', type=int, nargs='+', default=[512, 2048, 8192, 32768])
    add_out(parser, 'scaling')
    options = parser.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.set_num_threads(1)

    print(f'{os.cpu_count()} cores, torch {torch.__version__}')
    result: dict[str, list] = dict(steps=[], loss=[])
    for fields in ({}, dict(use_fsdp=True)):
        for world in options.worlds:
            found = measure_steps(world, options.batch_size, options.steps, **fields)
            result['steps'].append(found)
            print(
                f'world {world} {"FSDP" if fields else "DDP"}: {found["seconds_a_step"]:.3f} s a step, '
                f'{found["pairs_a_second"]:.1f} pairs/s, {found["seconds_to_start_and_save"]:.1f} s around it, '
                f'gradients {found["gradient_mib"]:.1f} MiB'
            )
    for kind in (contrastive.SoftmaxContrastiveLearning, contrastive.SigmoidContrastiveLearning):
        for local in options.locals:
            for total in options.totals:
                if total < local:
                    continue
                loss = (
                    kind()
                    if kind is contrastive.SigmoidContrastiveLearning
                    else kind(decoupled_contrastive_learning=True)
                )
                peak_of_loss(loss, local, total)
                peak, seconds = peak_of_loss(loss, local, total)
                logits = local * total * 4
                entry = dict(kind=kind.__name__, local=local, total=total, peak_bytes=peak, seconds=seconds)
                result['loss'].append(entry)
                print(
                    f'{kind.__name__[:7]} {local} × {total}: peak {peak / 2**20:.1f} MiB, {peak / logits:.1f} times '
                    f'its logits, {seconds * 1000:.1f} ms'
                )
    write_results(options.out, result)


if __name__ == '__main__':
    main()
