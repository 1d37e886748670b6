"""What a crop out of a long file costs: time and samples read, beside reading the file whole and cropping then.

    python benchmarks/data.py
    python benchmarks/data.py --minutes 10 --formats wav mp3

Files are written to a temporary folder first (white noise, mono: the hardest content for a codec). Times are medians
over random crops on one thread, files in the page cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.data.clips import Clip
from musiclm_pytorch.data.datasets import AudioTextDataset

ROOT = Path(__file__).resolve().parent.parent
FILE_RATE, MODEL_RATE = 44100, 16000


def write_long(path: Path, minutes: float) -> None:
    generator = np.random.default_rng(0)
    with soundfile.SoundFile(path, 'w', FILE_RATE, 1) as file:
        for _ in range(round(minutes * 6)):
            file.write((generator.standard_normal(FILE_RATE * 10) * 0.1).astype('float32'))


def counted(function) -> tuple[float, int]:
    """Seconds that a call takes and samples that it reads."""
    read, original = [], soundfile.SoundFile.read

    def counting(self, frames=-1, *args, **keywords):
        result = original(self, frames, *args, **keywords)
        read.append(len(result))
        return result

    soundfile.SoundFile.read = counting
    try:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start, sum(read)
    finally:
        soundfile.SoundFile.read = original


def whole_then_crop(path: Path, seconds: float) -> torch.Tensor:
    samples, rate = soundfile.read(path, dtype='float32')
    wave = resample(torch.from_numpy(samples), rate, MODEL_RATE)
    start = random.randrange(len(wave) - round(seconds * MODEL_RATE))
    return wave[start : start + round(seconds * MODEL_RATE)]


def measure(path: Path, seconds: float, crops: int) -> dict:
    dataset = AudioTextDataset([Clip(path, ('x',))], sample_rate=MODEL_RATE, max_seconds=seconds)
    times, read = [], []
    for epoch in range(crops):
        dataset.set_epoch(epoch)
        took, samples = counted(lambda: dataset[0])
        times.append(took)
        read.append(samples)
    whole, whole_read = counted(lambda: whole_then_crop(path, seconds))
    return dict(
        format=path.suffix[1:],
        crop_ms=statistics.median(times) * 1000,
        crop_seconds_read=statistics.median(read) / FILE_RATE,
        whole_ms=whole * 1000,
        whole_seconds_read=whole_read / FILE_RATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=60.0, help='length of the file (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=5.0, help='length of a crop (default: %(default)s)')
    parser.add_argument('--crops', type=int, default=20, help='crops to take (default: %(default)s)')
    parser.add_argument('--formats', nargs='+', default=['wav', 'flac', 'ogg', 'mp3'], help='default: %(default)s')
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in the workers of a DataLoader

    print(f'a crop of {options.seconds:g} s out of {options.minutes:g} minutes, {FILE_RATE} to {MODEL_RATE} Hz\n')
    print('| format | crop: ms | crop: s read | whole: ms | whole: s read |\n|---|---|---|---|---|')
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in options.formats:
            path = Path(folder) / f'long.{suffix}'
            write_long(path, options.minutes)
            row = measure(path, options.seconds, options.crops)
            rows.append(row)
            path.unlink()
            print(
                f'| {suffix} | {row["crop_ms"]:.1f} | {row["crop_seconds_read"]:.2f} '
                f'| {row["whole_ms"]:.0f} | {row["whole_seconds_read"]:.0f} |',
                flush=True,
            )
    results = ROOT / 'build' / 'benchmarks'
    results.mkdir(parents=True, exist_ok=True)
    machine = dict(processor=platform.processor() or platform.machine(), python=platform.python_version())
    setting = dict(minutes=options.minutes, seconds=options.seconds, crops=options.crops)
    (results / 'data.json').write_text(json.dumps(dict(machine=machine, setting=setting, rows=rows), indent=1))


if __name__ == '__main__':
    main()
