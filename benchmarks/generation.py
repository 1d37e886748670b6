"""Sampling from AudioLM's stages: `generate_*` of this library against audiolm-pytorch's own `generate`.

Same weights, one process; this library runs before and after each run of the other, and its median counts. Before any
timing, both sides' logits of one batch have to agree. Stages of dim 512 and depth 6, 3 coarse and 5 fine quantizers of
1024 codes, cross-attention to 12 conditioning embeddings, random weights. Laying out the weights for decoding (some
60 ms a stage, once) is not timed.

    python benchmarks/generation.py                       # everything, about six minutes on two free cores
    python benchmarks/generation.py --parts floor growth  # only this library's own figures, in seconds
    python benchmarks/generation.py --device cuda --dtype bf16 --compile --parts floor growth

audiolm-pytorch makes samples one after another where musiclm-pytorch 0.2.8 asks for several, so its time for 4 samples
is four times that of one. Its fine stage is measured at two lengths and extrapolated as a + b n² to the 300 frames of
6 s; its semantic and coarse stage are measured in full. Parts that are extrapolated are marked in the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from results import add_out, write_results  # beside this file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('HF_HUB_OFFLINE', '1')
warnings.filterwarnings('ignore', category=FutureWarning)

import torch  # noqa: E402

from musiclm_pytorch.audiolm import convert  # noqa: E402
from musiclm_pytorch.audiolm.generate import generate_coarse, generate_fine, generate_semantic  # noqa: E402
from musiclm_pytorch.audiolm.generation_args import Sampling  # noqa: E402

DIM, DEPTH, CODES, COARSE, FINE = 512, 6, 1024, 3, 5
SECONDS, SEMANTIC_RATE, FRAME_RATE = 6, 25, 50
FRAMES, SEMANTIC = SECONDS * FRAME_RATE, SECONDS * SEMANTIC_RATE
SAMPLES, FINE_WINDOW = 4, 150
PARTS = ['coarse', 'fine', 'all', 'floor', 'growth']


class Stages:
    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(0)
        sizes = dict(dim=DIM, depth=DEPTH, audio_text_condition=True)
        semantic = convert.SemanticTransformer(num_semantic_tokens=CODES, **sizes)
        coarse = convert.CoarseTransformer(
            num_semantic_tokens=CODES, codebook_size=CODES, num_coarse_quantizers=COARSE, **sizes
        )
        fine = convert.FineTransformer(
            codebook_size=CODES, num_coarse_quantizers=COARSE, num_fine_quantizers=FINE, **sizes
        )
        with torch.no_grad():
            semantic.to_logits.bias[CODES] = -1e4  # audiolm-pytorch would stop at an end token
        self.transformers = [stage.to(args.device).eval() for stage in (semantic, coarse, fine)]
        # the wrappers ask a codec for its number of quantizers
        codec = convert.SoundStream(channels=4, codebook_dim=8, codebook_size=CODES, rq_num_quantizers=COARSE + FINE)
        codec = codec.to(args.device)
        self.upstream = [
            convert.SemanticTransformerWrapper(transformer=semantic, unique_consecutive=False),
            convert.CoarseTransformerWrapper(transformer=coarse, codec=codec, unique_consecutive=False),
            convert.FineTransformerWrapper(transformer=fine, codec=codec),
        ]
        dtype = torch.bfloat16 if args.dtype == 'bf16' else torch.float32
        self.ours = [convert.own_stage(copy.deepcopy(stage)).to(dtype) for stage in self.transformers]
        self.options = dict(compile=args.compile)
        self.device, self.cond_scale = args.device, args.cond_scale
        self.sampling = Sampling(top_k=CODES // 10, cond_scale=args.cond_scale)

    def codes(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, CODES, shape, device=self.device)

    def embeds(self, batch: int) -> torch.Tensor:
        return torch.randn(batch, 12, DIM, device=self.device)

    def generate_upstream(self, stage: int, **inputs) -> None:
        self.upstream[stage].generate(
            text_embeds=self.embeds(1), cond_scale=self.cond_scale, filter_thres=0.9, **inputs
        )

    def generate_ours(self, batch: int, semantic: int, coarse: int, fine: int, fine_window: int | None = None) -> None:
        """The stages with a length above 0, each from random tokens of the one before, for `batch` samples."""
        given = dict(text_embeds=self.embeds(batch), sampling=self.sampling, **self.options)
        if semantic:
            generate_semantic(self.ours[0], max_length=semantic, min_length=semantic, num_samples=batch, **given)
        if coarse:
            ids = self.codes(batch, SEMANTIC)
            generate_coarse(self.ours[1], ids, max_length=coarse, min_length=coarse, **given)
        if fine:
            generate_fine(self.ours[2], self.codes(batch, fine, COARSE), window=fine_window, **given)


@torch.inference_mode()
def check_agreement(stages: Stages) -> dict[str, float]:
    """Largest difference of teacher-forced logits in each stage, over the spread of the logits."""
    if stages.ours[0].to_logits.weight.dtype != torch.float32:
        return {}
    embeds, ids = stages.embeds(2), stages.codes(2, 20)
    coarse, fine = stages.codes(2, 8, COARSE), stages.codes(2, 8, FINE)
    given = dict(text_embeds=embeds, cond_drop_prob=0.0)
    semantic_stage, coarse_stage, fine_stage = stages.transformers
    wanted = [
        semantic_stage(ids=ids[:, :-1], **given),
        coarse_stage(semantic_token_ids=ids, coarse_token_ids=coarse.flatten(1)[:, :-1], **given)[1],
        fine_stage(coarse_token_ids=coarse, fine_token_ids=fine.flatten(1)[:, :-1], **given)[1],
    ]
    sessions = [
        stages.ours[0].prefill(ids[:, :0], max_tokens=20, conditioning=embeds),
        stages.ours[1].prefill(ids, ids[:, :0], max_tokens=8 * COARSE, conditioning=embeds),
        stages.ours[2].prefill(coarse.flatten(1), ids[:, :0], max_tokens=8 * FINE, conditioning=embeds),
    ]
    errors = {}
    for name, ours, session, logits, tokens in zip(
        ('semantic', 'coarse', 'fine'), stages.ours, sessions, wanted, (ids, coarse, fine)
    ):
        found = []
        for token in tokens.flatten(1).unbind(dim=1):
            found.append(ours.next_logits(session))
            if len(found) < logits.shape[1]:
                ours.decode_step(session, token)
        errors[name] = ((torch.stack(found, dim=1) - logits).abs().max() / logits.std()).item()
    print('largest difference of logits over their spread:', {name: f'{error:.1e}' for name, error in errors.items()})
    if max(errors.values()) > 1e-4:
        raise SystemExit('the sides disagree; timing them would compare different things')
    return errors


def seconds(run: Callable[[], None], repeats: int = 1) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by copying 256 MB with all threads. Decoding only reads, which can be faster."""
    source = torch.ones(2**26, device=device)
    target = torch.ones_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats=15)


def token_times(stages: Stages, rows: int, num_tokens: int) -> list[float]:
    """Seconds of each token of the coarse stage, with what draws it."""
    stage = stages.ours[1]
    with torch.inference_mode():
        session = stage.prefill(
            stages.codes(rows, SEMANTIC),
            stages.codes(rows, 0),
            max_tokens=num_tokens + 1,
            conditioning=stages.embeds(rows),
            **stages.options,
        )
        noise, times = torch.rand(rows, num_tokens).to(stages.device), []

        def step(column: int) -> None:
            logits = stage.next_logits(session)[:, :CODES]
            stage.decode_step(session, stages.sampling.draw(logits, noise[:, column]))

        for column in range(num_tokens):
            times.append(seconds(lambda column=column: step(column)))
    return times


def around(times: list[float], token: int) -> float:
    return statistics.median(times[token - 40 : token + 40])


def measure(stages: Stages, parts: list[str], repeats: int) -> dict:
    found = {}
    stages.generate_ours(1, 4, 4, 4)  # warm up
    if 'floor' in parts or 'growth' in parts:
        bandwidth = copy_bandwidth(stages.device)
        weight_bytes = sum(it.nbytes for it in stages.ours[1].transformer.parameters() if it.ndim == 2)
        found |= dict(copy_gb_s=bandwidth / 1e9, weight_mb=weight_bytes / 1e6, floor_ms=1e3 * weight_bytes / bandwidth)
        for rows in (1, SAMPLES, 2 * SAMPLES):
            times = token_times(stages, rows, 1600 if 'growth' in parts else 200)
            own = found[f'{rows} rows'] = dict(token_100_ms=1e3 * around(times, 100))
            own |= dict(share_of_floor=weight_bytes / bandwidth / around(times, 100))
            own |= dict(tokens_per_second=rows / around(times, 100))
            if 'growth' in parts:
                own |= dict(token_1500_ms=1e3 * around(times, 1500), growth=around(times, 1500) / around(times, 100))
        print(json.dumps(found, indent=2))
    if 'coarse' in parts or 'all' in parts:
        ids = stages.codes(1, SEMANTIC)
        found['coarse'] = compare(
            'coarse, 300 frames, 1 sample',
            lambda: stages.generate_upstream(1, semantic_token_ids=ids, max_time_steps=FRAMES),
            lambda: stages.generate_ours(1, 0, FRAMES, 0),
            repeats,
        )
    if 'fine' in parts or 'all' in parts:
        for frames in (75, 150):
            given = stages.codes(1, frames, COARSE)
            found[f'fine {frames}'] = compare(
                f'fine, {frames} frames, 1 sample',
                lambda given=given: stages.generate_upstream(2, coarse_token_ids=given),
                lambda frames=frames: stages.generate_ours(1, 0, 0, frames),
                repeats,
            )
    if 'all' in parts:
        found['semantic'] = compare(
            f'semantic, {SEMANTIC} tokens, 1 sample',
            lambda: stages.generate_upstream(0, max_length=SEMANTIC),
            lambda: stages.generate_ours(1, SEMANTIC, 0, 0),
            repeats,
        )
        short, long = found['fine 75']['upstream'], found['fine 150']['upstream']
        square = (long - short) / (150**2 - 75**2)
        fine = long + square * (FRAMES**2 - 150**2)
        upstream = SAMPLES * (found['semantic']['upstream'] + found['coarse']['upstream'] + fine)
        for name, window in (('fine in windows of 3 s', FINE_WINDOW), ('fine in one piece', None)):
            ours = seconds(
                lambda window=window: stages.generate_ours(SAMPLES, SEMANTIC, FRAMES, FRAMES, window), repeats
            )
            found[f'all, {name}'] = dict(upstream=upstream, ours=ours, ratio=upstream / ours, extrapolated=True)
            print(f'{SAMPLES} samples of {SECONDS} s, {name}', found[f'all, {name}'])
    return found


def compare(name: str, upstream: Callable[[], None], ours: Callable[[], None], repeats: int) -> dict[str, float]:
    before = [seconds(ours) for _ in range(repeats)]
    theirs = seconds(upstream)
    mine = statistics.median(before + [seconds(ours) for _ in range(repeats)])
    found = dict(upstream=theirs, ours=mine, ratio=theirs / mine)
    print(name, {key: round(value, 2) for key, value in found.items()}, flush=True)
    return found


def show(found: dict) -> None:
    rows = {name: row for name, row in found.items() if isinstance(row, dict) and 'ratio' in row}
    if rows:
        print('\n| what | audiolm-pytorch | ours | faster |\n|---|---|---|---|')
    for name, row in rows.items():
        mark = ' (extrapolated)' if row.get('extrapolated') else ''
        print(f'| {name} | {row["upstream"]:.1f} s{mark} | {row["ours"]:.2f} s | {row["ratio"]:.1f} × |')


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    stages = Stages(args)
    agreement = check_agreement(stages)
    found = measure(stages, args.parts, args.repeats)
    show(found)
    report = dict(
        device=args.device,
        dtype=args.dtype,
        compile=args.compile,
        cond_scale=args.cond_scale,
        agreement=agreement,
        **found,
    )
    write_results(args.out, report)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument('--repeats', type=int, default=2, help='runs of this library before and after the other one')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--dtype', choices=('fp32', 'bf16'), default='fp32')
    parser.add_argument('--compile', action='store_true', help='fixed shapes, on a GPU as a CUDA graph')
    parser.add_argument('--cond-scale', type=float, default=1.0, help='guidance of both sides (default 1, none)')
    add_out(parser, 'generation')
    main(parser.parse_args())
