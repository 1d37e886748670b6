"""What evaluation costs: FAD beside numpy's covariances, embedding clips beside MuLaN's forward, memory by clips.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --parts fad memory
    python benchmarks/evaluation.py --parts embedding --clips 64 --seconds 10 --rounds 7

fad: `GaussianStatistics` take 10,000 clips of 10 frames, 128 wide and float32, clip by clip, for each of two sets, and
`frechet_distance` follows; beside it `numpy.cov` of both sets, all frames in one array. The values are compared with
scipy's matrix root first.

embedding: `embed_clips` from WAV files of 44.1 kHz, read and resampled to 16 kHz as it goes; beside it the forward of
the same MuLaN over the same batches, whose waves are in memory at its own rate. Both give the same latents.

memory: what 100 to 100,000 clips add to the resident memory of a process of their own, the most that is seen at a look
every 100 clips (Linux). Beside them a list that keeps all frames shows that the look would tell: it has to grow. The
peak of ru_maxrss does not do here, for a process begins with that of its parent.

The two sides run in turn, and the medians over rounds count, of the times and of the rounds' ratios. Threads are the
default ones. Where the range of the ratios is wide, other processes took part, and the medians mean little.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from results import add_out, write_results  # beside this file

from musiclm_pytorch import MuLaN, TextTransformer, create_optimized_audiospectrogram_transformer
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.evaluation.distances import (
    FrameReservoir,
    GaussianStatistics,
    ThinnedStatistics,
    frechet_distance,
)
from musiclm_pytorch.evaluation.embedders import MuLaNEmbedder
from musiclm_pytorch.evaluation.inputs import embed_clips

CLIPS, FRAMES, DIM = 10_000, 10, 128
FILE_RATE, MODEL_RATE = 44100, 16000
PARTS = ['fad', 'embedding', 'memory']


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(ours: Callable[[], object], plain: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median seconds of both sides and the median ratio, after one round that warms up."""
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


def told(it: dict) -> str:
    low, high = it['ratios']
    return f'ratio {it["ratio"]:.3f} ({low:.3f} to {high:.3f} in {it["rounds"]} rounds)\n'


# ---- FAD ----


def measure_fad(rounds: int) -> dict:
    import scipy.linalg

    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(DIM, DIM, generator=generator) / DIM**0.5
    sets = [torch.randn(CLIPS * FRAMES, DIM, generator=generator) @ mixing + shift for shift in (0.0, 0.1)]
    clips = [frames.split(FRAMES) for frames in sets]
    arrays = [frames.numpy() for frames in sets]

    def fad() -> float:
        gathered = []
        for side in clips:
            gathered.append(GaussianStatistics(DIM))
            for frames in side:
                gathered[-1].update(frames)
        return frechet_distance(*gathered)

    (cov_a, cov_b), (mean_a, mean_b) = zip(*((np.cov(it.T.astype(float)), it.mean(0, dtype=float)) for it in arrays))
    root = np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    wanted = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    found = fad()
    if abs(found - wanted) > 1e-6 * wanted:
        raise SystemExit(f'FAD is {found}, but {wanted} by numpy and scipy; timing it would say nothing')
    # rowvar=False, as frames come in rows
    times = in_turn(fad, lambda: [np.cov(array, rowvar=False) for array in arrays], rounds)
    return dict(fad=found, by_scipy=float(wanted)) | times


# ---- embedding ----


def measure_embedding(clips: int, length: float, batch: int, rounds: int) -> dict:
    torch.manual_seed(0)
    mulan = MuLaN(
        create_optimized_audiospectrogram_transformer(256, 4, 'music', MODEL_RATE), TextTransformer(dim=256, depth=4)
    ).eval()
    embedder = MuLaNEmbedder(mulan, batch_size=batch)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f'{clip}.wav' for clip in range(clips)]
        for path in paths:
            soundfile.write(path, random.uniform(-0.3, 0.3, round(length * FILE_RATE)), FILE_RATE)
        read = [torch.from_numpy(soundfile.read(path, dtype='float32')[0]) for path in paths]
        waves = torch.stack([resample(wave, FILE_RATE, MODEL_RATE) for wave in read])

        def ours() -> torch.Tensor:
            return torch.cat([clip.frames['mulan'] for clip in embed_clips(paths, [embedder], batch_size=batch)])

        @torch.no_grad()
        def plain() -> torch.Tensor:
            return torch.cat([mulan.get_audio_latents(part) for part in waves.split(batch)])

        error = (ours() - plain()).abs().max().item()
        if error > 1e-5:
            raise SystemExit(f'the latents differ by up to {error:.1e}; timing them would compare different things')
        times = in_turn(ours, plain, rounds)
    return dict(clips=clips, seconds=length, batch=batch, largest_difference=error) | times


# ---- memory ----


def resident() -> float:
    """MB."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2**20


def gather(clips: int, kind: str) -> float:
    """MB that a number of clips add to a process, in statistics of a kind, or in a list."""
    kept: list[torch.Tensor] = []
    gaussian = GaussianStatistics(DIM)
    takes = dict(
        gaussian=lambda frames, _: gaussian.update(frames),
        thinned=ThinnedStatistics(DIM).update,
        reservoir=FrameReservoir(DIM).update,
        list=lambda frames, _: kept.append(frames),
    )
    take, generator = takes[kind], torch.Generator().manual_seed(0)
    before = most = resident()
    for clip in range(clips):
        take(torch.randn(FRAMES, DIM, generator=generator), clip)
        if clip % 100 == 99:
            most = max(most, resident())
    return most - before


def measure_memory() -> dict[str, dict[int, float]]:
    found: dict = {}
    for kind in ('gaussian', 'thinned', 'reservoir', 'list'):
        for clips in (100, 1000, 10_000, 100_000):
            command = [sys.executable, __file__, '--gather', kind, str(clips)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.setdefault(kind, {})[clips] = float(output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS, help='default: %(default)s')
    parser.add_argument('--rounds', type=int, default=5, help='timed rounds of each side (default: %(default)s)')
    parser.add_argument('--clips', type=int, default=32, help='clips to embed (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=10.0, help='length of a clip (default: %(default)s)')
    parser.add_argument('--batch', type=int, default=8, help='clips a batch (default: %(default)s)')
    parser.add_argument('--gather', nargs=2, help=argparse.SUPPRESS)
    add_out(parser, 'evaluation')
    options = parser.parse_args()
    if options.gather:
        kind, clips = options.gather
        print(gather(int(clips), kind))
        return

    found: dict = {}
    if 'fad' in options.parts:
        found['fad'] = it = measure_fad(options.rounds)
        print(f'FAD of {CLIPS} clips of {FRAMES} frames, {DIM} wide: {it["fad"]:.6f}, by scipy {it["by_scipy"]:.6f}')
        print(f'  {it["ours_s"]:.3f} s, numpy.cov of both sets {it["plain_s"]:.3f} s, {told(it)}')
    if 'embedding' in options.parts:
        found['embedding'] = it = measure_embedding(options.clips, options.seconds, options.batch, options.rounds)
        print(
            f'{it["clips"]} WAV files of {it["seconds"]:g} s, {FILE_RATE} to {MODEL_RATE} Hz, batches of {it["batch"]}'
        )
        print(f'  {it["ours_s"]:.2f} s, forward alone {it["plain_s"]:.2f} s, {told(it)}')
    if 'memory' in options.parts:
        found['memory_mb'] = it = measure_memory()
        for kind, added in it.items():
            print(f'MB added to {kind} by', ', '.join(f'{clips} clips: {mb:.1f}' for clips, mb in added.items()))

    write_results(options.out, found)


if __name__ == '__main__':
    main()
