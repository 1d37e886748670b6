"""What each fast path of `musiclm_pytorch.kernels` brings: time of one thread without it, beside that with all of them.

    python benchmarks/kernels.py                    # MuLaN's training step and embedding, a stage's step and decoding
    python benchmarks/kernels.py --cases decode:4 --repeats 9

Both forms run in turns, in one process and in processor time, so that whatever else the machine does slows both; the
ratio is the median of those of neighbours, and the numbers of both have to agree. A case is `mulan:seconds:batch` (a
training step), `embed:seconds:batch`, `stage:frames:batch` (a training step of the coarse stage, dim 512, depth 6) or
`decode:rows` (24 frames of it); `-bf16` after the name computes in bfloat16. What is for CUDA is not measured here.

    python benchmarks/kernels.py --cases halves:1 halves:4 halves:8

`halves:rows` is `decode` with the stage that `dtype='auto'` makes, and `float32` the same in float32: how many times as
long that takes, how far the logits of the two lie apart (root mean square over their spread; 0.05 at most), and the
share of the weights' memory.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mulan as mulan_benchmark
import torch
from torch import Tensor

CASES = ['mulan:3:4', 'mulan-bf16:3:4', 'embed:10:2', 'stage:120:2', 'stage-bf16:120:2']
CASES += ['decode:1', 'decode:8', 'halves:1', 'halves:4', 'halves:8']
CODES, COARSE = 1024, 3
NEVER = 'fast_kernels_allowed', lambda: False
MULAN = {
    'attention': ('musiclm_pytorch.kernels.attention', *NEVER),
    'linear': ('musiclm_pytorch.kernels', *NEVER),
}
STAGE = {
    'block_attention': ('musiclm_pytorch.audiolm.transformer', *NEVER),
    'residual_streams': ('musiclm_pytorch.kernels.residual_streams', *NEVER),
    'linear': MULAN['linear'],
}
DECODING = {'step_kernel': ('musiclm_pytorch.audiolm.decode_step', 'WORTH_LOADING', float('inf'))}


def halves(rows: int) -> tuple[dict[str, Callable[[], Tensor]], float, float]:
    """Decoding in float32 and as `dtype='auto'` says, the distance of their logits, and the share of memory."""
    from musiclm_pytorch.audiolm.decode_step import fastest_dtype

    decode, _ = case_of(f'decode:{rows}')
    whole = decode.keywords['stage']
    half = copy.deepcopy(whole).to(fastest_dtype(whole))
    ids, embeds = decode.keywords['semantic'], decode.keywords['text_embeds']
    tokens = torch.randint(CODES, (12 * COARSE, rows))

    @torch.inference_mode()
    def logits(stage: torch.nn.Module) -> Tensor:
        given = dict(max_tokens=12 * COARSE, conditioning=embeds, total_tokens=24 * COARSE)
        state = stage.prefill(ids, torch.zeros(rows, 0, dtype=torch.long), **given)
        found = []
        for own in tokens:
            found.append(stage.next_logits(state))
            if len(found) < len(tokens):
                stage.decode_step(state, own)
        return torch.stack(found)

    wanted, found = logits(whole), logits(half)
    sizes = [sum(it.numel() * it.itemsize for it in stage.parameters()) for stage in (half, whole)]
    runs = {name: partial(decode, stage=stage) for name, stage in dict(auto=half, float32=whole).items()}
    return runs, ((found - wanted).square().mean().sqrt() / wanted.std()).item(), sizes[0] / sizes[1]


def measure_halves(name: str, repeats: int) -> None:
    torch.manual_seed(0)
    runs, error, memory = halves(int(name.partition(':')[2]))
    if error > 0.05:
        raise SystemExit(f'{name}: the logits differ by {error:.1e}')
    times: dict[str, list[float]] = {path: [] for path in runs}
    for _ in range(repeats + 1):
        for path, run in runs.items():
            start = time.process_time()
            run()
            times[path].append(time.process_time() - start)
    ratio = statistics.median(slow / fast for slow, fast in zip(times['float32'][1:], times['auto'][1:]))
    told = f'{statistics.median(times["auto"][1:]):.2f} s | {ratio:.2f} | {error:.0e}'
    print(f'| {name}, {memory:.2f} of the memory | float32 | {told} |', flush=True)


def case_of(name: str) -> tuple[Callable[[], Tensor], dict]:
    """What is timed, which gives some of its numbers, and the fast paths in it."""
    what, *sizes = name.split(':')
    what, _, half = what.partition('-')
    sizes = [int(size) for size in sizes]
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=bool(half))

    def gradients(loss: Tensor, model: torch.nn.Module) -> Tensor:
        model.zero_grad()
        loss.backward()
        found = [it.grad.flatten() for it in model.parameters() if it.grad is not None]
        return torch.cat([loss.detach()[None].float(), *found])

    if what in ('mulan', 'embed'):
        model = mulan_benchmark.build(None).train(what == 'mulan')
        wavs, texts = mulan_benchmark.batch_of(*sizes)

        def step() -> Tensor:
            if what == 'embed':
                with torch.no_grad(), autocast:
                    return model.get_audio_latents(wavs).flatten().float()
            with autocast:
                loss = model(wavs, texts)
            return gradients(loss, model)

        return step, MULAN

    from musiclm_pytorch.audiolm.generate import generate_coarse
    from musiclm_pytorch.audiolm.generation_args import Sampling
    from musiclm_pytorch.audiolm.stages import CoarseTransformer

    frames, rows = sizes if what == 'stage' else (24, *sizes)
    stage = CoarseTransformer(
        num_semantic_tokens=CODES,
        codebook_size=CODES,
        num_coarse_quantizers=COARSE,
        dim=512,
        depth=6,
        audio_text_condition=True,
    )
    semantic, embeds = torch.randint(CODES, (rows, 2 * frames)), torch.randn(rows, 12, stage.conditioning_dim)
    codes = torch.randint(CODES, (rows, frames, COARSE))
    if what == 'decode':
        stage.eval()
        given = dict(text_embeds=embeds, max_length=frames, min_length=frames, sampling=Sampling(temperature=0))

        def decode(stage: torch.nn.Module, semantic: Tensor, **given: Any) -> Tensor:
            return generate_coarse(stage, semantic, **given).tokens.float()

        return partial(decode, stage=stage, semantic=semantic, **given), DECODING

    def train() -> Tensor:
        with autocast:
            loss = stage.loss(semantic, codes, conditioning=embeds)
        return gradients(loss, stage)

    return train, STAGE


def measure(name: str, repeats: int) -> None:
    torch.manual_seed(0)
    step, paths = case_of(name)
    times: dict[str, list[float]] = {path: [] for path in ('all', *paths)}
    found = {}
    for _ in range(repeats + 1):
        for path in times:
            with patch('.'.join(paths[path][:2]), paths[path][2]) if path in paths else nullcontext():
                torch.manual_seed(0)
                start = time.process_time()
                found[path] = step()
                times[path].append(time.process_time() - start)
    for path in paths:
        error = ((found[path] - found['all']).norm() / found['all'].norm()).item()
        if error > (0.05 if 'bf16' in name else 1e-4):
            raise SystemExit(f'{name} without {path} differs by {error:.1e}')
        # the first of each warms up
        ratio = statistics.median(plain / fast for plain, fast in zip(times[path][1:], times['all'][1:]))
        print(
            f'| {name} | {path} | {statistics.median(times["all"][1:]):.2f} s | {ratio:.2f} | {error:.0e} |', flush=True
        )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', default=CASES)
    parser.add_argument('--repeats', type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f'load {Path("/proc/loadavg").read_text().split()[0]}, torch {torch.__version__}')
    print('| case | without | with all | times as long | numbers within |\n|---|---|---|---|---|')
    for case in arguments.cases:
        (measure_halves if case.startswith('halves') else measure)(case, arguments.repeats)
