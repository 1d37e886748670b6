"""What batches save: many files beside a plain loop, search beside the product it needs, memory by hours of audio.

    python benchmarks/engine.py
    python benchmarks/engine.py --parts search --rounds 51

embedding: `embed_audio_files` over 200 WAV files of 44.1 kHz, whose lengths are drawn evenly in their logarithm from
0.5 to 12 s; beside it `MuLaN.embed_audio` of one file after another, with the same windows. Both read and resample, and
both give the same latents, which is checked first. Two models: the one that ships, and one of 256 features and 4 layers
with the front end for music. And `embed_texts` of 1,000 texts beside `get_text_latents` of one after another.

search: the 10 nearest of 100,000 vectors of 128 to one query, by each backend that is installed, beside the
matrix-vector product over them, `vectors @ query`. Both backends must give the same places and scores.

memory: what an hour of audio, and a tenth of it, adds to the resident memory of a process of their own (Linux).

ascent: seconds and similarities of sound by gradient ascent with the model that ships.

Two sides run in turn, and the medians over rounds count, of the times and of the rounds' ratios. Threads are the
default ones. Where the range of the ratios is wide, other processes took part, and the medians mean little.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from results import add_out, write_results  # beside this file

from musiclm_pytorch import MuLaN, TextTransformer, create_optimized_audiospectrogram_transformer
from musiclm_pytorch.evaluation.evaluator import load_mulan
from musiclm_pytorch.inference.config import InferenceConfig
from musiclm_pytorch.inference.engine import BatchInferenceEngine
from musiclm_pytorch.inference.search import MuLaNIndex
from musiclm_pytorch.inference.synthesis import synthesise

CLIPS, SHORTEST, LONGEST, FILE_RATE = 200, 0.5, 12.0, 44100
TEXTS, VECTORS, DIM, K = 1000, 100_000, 128, 10
PARTS = ['embedding', 'search', 'memory', 'ascent']


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(ours: Callable[[], object], plain: Callable[[], object], rounds: int) -> dict:
    """Median seconds of both sides and the median of ours / plain, after one round that warms up."""
    ours()
    plain()
    times = [(seconds(ours), seconds(plain)) for _ in range(rounds)]
    ratios = [mine / other for mine, other in times]
    return dict(
        ours_s=statistics.median(mine for mine, _ in times),
        plain_s=statistics.median(other for _, other in times),
        ratio=statistics.median(ratios),
        ratios=[min(ratios), max(ratios)],
        rounds=rounds,
    )


def check_same(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = (found - wanted).abs().max().item()
    if error > 1e-5:
        raise SystemExit(f'the latents differ by up to {error:.1e}; timing them would compare different things')
    return error


# ---- embedding ----


def build(name: str) -> MuLaN:
    if name == 'tiny':
        return load_mulan('tiny')
    torch.manual_seed(0)
    audio = create_optimized_audiospectrogram_transformer(256, 4, 'music', 16000)
    return MuLaN(audio, TextTransformer(dim=256, depth=4)).eval()


def measure_embedding(name: str, batch: int, rounds: int) -> dict:
    mulan = build(name)
    config = InferenceConfig(batch_size=batch, use_mixed_precision=False, device='cpu')
    engine = BatchInferenceEngine(mulan, config)
    noise = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f'{clip}.wav' for clip in range(CLIPS)]
        total = 0.0
        for path in paths:
            length = math.exp(noise.uniform(math.log(SHORTEST), math.log(LONGEST)))
            total += length
            soundfile.write(path, noise.uniform(-0.3, 0.3, round(length * FILE_RATE)), FILE_RATE)

        def ours() -> torch.Tensor:
            return engine.embed_audio_files(paths, window=10.0, hop=10.0).latents

        def plain() -> torch.Tensor:
            return torch.stack([mulan.embed_audio(path, window=10.0, hop=10.0) for path in paths])

        error = check_same(ours(), plain())
        files = in_turn(ours, plain, rounds) | dict(clips=CLIPS, seconds=total, largest_difference=error)

    words = ['slow', 'fast', 'low', 'high', 'calm', 'dark', 'happy', 'organ', 'flute', 'piano', 'and', 'the', 'minor']
    random.seed(0)
    texts = [' '.join(random.choices(words, k=random.randint(2, 30))) for _ in range(TEXTS)]

    @torch.no_grad()
    def one_by_one() -> torch.Tensor:
        return torch.cat([mulan.get_text_latents(raw_texts=[text]) for text in texts])

    error = check_same(engine.embed_texts(texts), one_by_one())
    texts_found = in_turn(lambda: engine.embed_texts(texts), one_by_one, rounds)
    return dict(batch=batch, files=files, texts=texts_found | dict(texts=TEXTS, largest_difference=error))


# ---- search ----


def measure_search(rounds: int) -> dict:
    torch.manual_seed(0)
    latents, query = torch.randn(VECTORS, DIM), torch.randn(1, DIM)
    names = [str(row) for row in range(VECTORS)]
    found, answers = {}, {}
    for backend in ['torch', *(['faiss'] if importlib.util.find_spec('faiss') else [])]:
        index = MuLaNIndex(dim=DIM, backend=backend)
        index.add(names, latents)
        vectors, flat = index.vectors, query[0] / query[0].norm()
        answers[backend] = index.nearest(query, K)
        wanted = (vectors @ flat).topk(K).indices
        if not torch.equal(answers[backend][1][0], wanted):
            raise SystemExit(f'{backend} does not find the nearest; timing it would say nothing')
        found[backend] = in_turn(lambda it=index: it.nearest(query, K), lambda v=vectors, q=flat: v @ q, rounds)
    if not all(torch.equal(*pair) for it in answers.values() for pair in zip(it, answers['torch'])):
        raise SystemExit('the backends differ')
    return found


# ---- memory ----


def resident() -> float:
    """MB."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2**20


def gather(path: str) -> float:
    """The most MB that embedding a file adds to this process, by a look every 20 ms, after a file that warms up."""
    engine = BatchInferenceEngine(load_mulan('tiny'))
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / 'warm.wav'
        soundfile.write(warm, np.zeros(20 * FILE_RATE), FILE_RATE)
        engine.embed_audio_files([warm])
    before = most = resident()
    done = threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, resident())

    thread = threading.Thread(target=look)
    thread.start()
    engine.embed_audio_files([path])
    done.set()
    thread.join()
    return most - before


def measure_memory() -> dict:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for minutes in (6, 60):
            path = Path(folder) / f'{minutes}.wav'
            noise = np.random.default_rng(0)
            with soundfile.SoundFile(path, 'w', FILE_RATE, 1) as file:
                for _ in range(minutes):
                    file.write(noise.uniform(-0.3, 0.3, 60 * FILE_RATE))
            command = [sys.executable, __file__, '--gather', str(path)]
            start = time.perf_counter()
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            whole = minutes * 60 * FILE_RATE * 4 / 2**20
            found[minutes] = dict(mb=float(output), samples_mb=whole, seconds=time.perf_counter() - start)
            path.unlink()
    return found


# ---- ascent ----


@torch.no_grad()
def measure_ascent() -> dict:
    mulan = load_mulan('tiny')
    texts = ['a slow low organ', 'a fast high flute', 'a calm piano', 'loud drums']
    samples = 5 * mulan.sample_rate
    wanted = mulan.get_text_latents(raw_texts=texts)
    found = {}
    for steps in (1, 25, 100):
        start = time.perf_counter()
        with torch.enable_grad():
            waves = torch.stack(synthesise(mulan, texts, [(samples,)] * len(texts), steps=steps))
        taken = time.perf_counter() - start
        cosines = mulan.get_audio_latents(waves) @ wanted.T
        own = cosines.diag().mean().item()
        others = (cosines.sum() - cosines.diag().sum()).item() / (len(texts) * (len(texts) - 1))
        found[steps] = dict(seconds=taken, own_text=own, other_texts=others)
    return found


def told(it: dict) -> str:
    low, high = it['ratios']
    return f'ratio {it["ratio"]:.3f} ({low:.3f} to {high:.3f} in {it["rounds"]} rounds)'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS, help='default: %(default)s')
    parser.add_argument('--rounds', type=int, default=5, help='timed rounds of each side (default: %(default)s)')
    parser.add_argument('--batch', type=int, default=16, help='windows a batch (default: %(default)s)')
    parser.add_argument('--models', nargs='+', default=['tiny', '256x4'], choices=['tiny', '256x4'])
    parser.add_argument('--gather', help=argparse.SUPPRESS)
    add_out(parser, 'engine')
    options = parser.parse_args()
    if options.gather:
        print(gather(options.gather))
        return

    found: dict = {}
    if 'embedding' in options.parts:
        found['embedding'] = {}
        for name in options.models:
            found['embedding'][name] = both = measure_embedding(name, options.batch, options.rounds)
            for kind, it in both.items():
                if kind != 'batch':
                    what = f'{it["seconds"]:.0f} s in {CLIPS} files' if kind == 'files' else f'{TEXTS} texts'
                    print(f'{name}, {what}: {it["ours_s"]:.2f} s, plain loop {it["plain_s"]:.2f} s, {told(it)}')
                    print(
                        f'  {1 / it["ratio"]:.2f} times the throughput; latents within {it["largest_difference"]:.1e}'
                    )
    if 'search' in options.parts:
        found['search'] = measure_search(max(options.rounds, 51))
        for backend, it in found['search'].items():
            times = f'{1e3 * it["ours_s"]:.2f} ms, the product alone {1e3 * it["plain_s"]:.2f} ms'
            print(f'{K} of {VECTORS} by {backend}: {times}, {told(it)}')
    if 'memory' in options.parts:
        found['memory'] = measure_memory()
        for minutes, it in found['memory'].items():
            print(
                f'{minutes} minutes: {it["mb"]:.0f} MB more at most; its samples alone take {it["samples_mb"]:.0f} MB'
            )
    if 'ascent' in options.parts:
        found['ascent'] = measure_ascent()
        for steps, it in found['ascent'].items():
            print(
                f'{steps} steps for 4 sounds of 5 s: {it["seconds"]:.1f} s; similarity with their texts '
                f'{it["own_text"]:.3f}, with the others {it["other_texts"]:.3f}'
            )

    write_results(options.out, found)


if __name__ == '__main__':
    main()
