"""What a crop out of a long file costs: time and samples decoded, the first look at the file, and reading it whole.

    python benchmarks/data.py
    python benchmarks/data.py --minutes 10 --formats wav mp3
    python benchmarks/data.py --peer FOLDER     # beside another checkout, such as a git worktree of an older commit

Files are written to a temporary folder first (white noise, mono: the hardest content for a codec). Times are medians
over random crops on one thread, files in the page cache; each checkout reads the same files in a process of its own,
and they take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from results import add_out, write_results  # beside this file

ROOT = Path(__file__).resolve().parent.parent
FILE_RATE, MODEL_RATE = 44100, 16000
# container, codec, options of the codec, options of the container; None for libsndfile
FORMATS = {
    **dict.fromkeys(('wav', 'flac', 'ogg')),
    'mp3': ('mp3', 'libmp3lame', dict(b='128000'), {}),
    'mp3-vbr': ('mp3', 'libmp3lame', dict(global_quality='500', flags='+qscale'), dict(write_xing='0')),
    'm4a': ('ipod', 'aac', dict(b='128000', aac_pns='0'), {}),  # coded noise is decoded from the start on
    'opus': ('ogg', 'libopus', dict(b='64000'), {}),
}


def write_long(path: Path, kind: str, minutes: float) -> None:
    generator = np.random.default_rng(0)
    pieces = ((generator.standard_normal(FILE_RATE * 10) * 0.1).astype('float32') for _ in range(round(minutes * 6)))
    if FORMATS[kind] is None:
        with soundfile.SoundFile(path, 'w', FILE_RATE, 1) as file:
            for piece in pieces:
                file.write(piece)
        return
    import av

    container, codec, options, muxer = FORMATS[kind]
    rate = 48000 if kind == 'opus' else FILE_RATE
    with av.open(str(path), 'w', format=container, options=muxer) as output:
        stream = output.add_stream(codec, rate=rate, layout='mono', options=options)
        into = av.AudioResampler(stream.format, 'mono', rate, stream.frame_size)
        for piece in pieces:
            frame = av.AudioFrame.from_ndarray(piece[None], format='fltp', layout='mono')
            frame.sample_rate = FILE_RATE
            for part in into.resample(frame):
                output.mux(stream.encode(part))
        for part in into.resample(None):
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))


def counted(function) -> tuple[float, int]:
    """Seconds that a call takes and samples that it decodes."""
    read, by_sndfile = [], soundfile.SoundFile.read

    def counting(self, frames=-1, *args, **keywords):
        result = by_sndfile(self, frames, *args, **keywords)
        read.append(len(result))
        return result

    soundfile.SoundFile.read = counting
    try:
        from musiclm_pytorch.data.audio import decoding
    except ImportError:  # an older checkout
        decoding = None
    if decoding is not None:
        by_ffmpeg = decoding.as_channels
        decoding.as_channels = lambda frame: read.append(frame.samples) or by_ffmpeg(frame)
    try:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start, sum(read)
    finally:
        soundfile.SoundFile.read = by_sndfile
        if decoding is not None:
            decoding.as_channels = by_ffmpeg


def read_whole(path: Path) -> torch.Tensor:
    from musiclm_pytorch.data.audio import AudioFile, resample

    with AudioFile(path) as file:
        return resample(file.read(0, len(file)), file.sample_rate, MODEL_RATE)


def measure(path: Path, seconds: float, crops: int) -> dict:
    """Of the checkout that is imported."""
    import av  # noqa: F401  not counted as part of a first opening

    from musiclm_pytorch.data.datasets import AudioTextDataset, Clip

    torch.set_num_threads(1)  # as in the workers of a DataLoader
    warm = path.with_name('warm.wav')
    soundfile.write(warm, np.zeros(FILE_RATE), FILE_RATE)
    AudioTextDataset([Clip(warm, ('x',))], sample_rate=MODEL_RATE)
    started = time.perf_counter()
    dataset = AudioTextDataset([Clip(path, ('x',))], sample_rate=MODEL_RATE, max_seconds=seconds)
    opened = time.perf_counter() - started
    times, read = [], []
    for epoch in range(crops):
        dataset.set_epoch(epoch)
        took, samples = counted(lambda: dataset[0])
        times.append(took)
        read.append(samples)
    if dataset.skipped:
        raise ValueError(f'{path} cannot be read: {dataset.skipped}')
    rate = 48000 if path.suffix == '.opus' else FILE_RATE
    whole, _ = counted(lambda: read_whole(path))
    return dict(
        first_open_ms=opened * 1000,
        crop_ms=statistics.median(times) * 1000,
        crop_seconds_read=statistics.median(read) / rate,
        whole_ms=whole * 1000,
    )


def measured(tree: Path, path: Path, options: argparse.Namespace) -> dict | None:
    """By a process that imports the package from `tree`; None if it cannot read the file."""
    command = [sys.executable, __file__, '--of', str(path)]
    command += ['--seconds', str(options.seconds), '--crops', str(options.crops)]
    environment = {**os.environ, 'PYTHONPATH': str(tree)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path.parent)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def best(rows: list[dict | None]) -> dict | None:
    rows = [row for row in rows if row]
    return {name: min(row[name] for row in rows) for name in rows[0]} if rows else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=60.0, help='length of the file (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=5.0, help='length of a crop (default: %(default)s)')
    parser.add_argument('--crops', type=int, default=20, help='crops to take (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=2, help='turns, of which the best counts (default: %(default)s)')
    parser.add_argument('--formats', nargs='+', choices=FORMATS, default=list(FORMATS), help='default: all')
    parser.add_argument('--peer', metavar='FOLDER', type=Path, help='another checkout to read the same files with')
    parser.add_argument('--of', metavar='FILE', type=Path, help=argparse.SUPPRESS)
    add_out(parser, 'data')
    options = parser.parse_args()
    random.seed(0)
    if options.of is not None:
        print(json.dumps(measure(options.of, options.seconds, options.crops)))
        return

    print(f'a crop of {options.seconds:g} s out of {options.minutes:g} minutes, {FILE_RATE} to {MODEL_RATE} Hz\n')
    print('| format | checkout | first open: ms | crop: ms | crop: s decoded | whole: ms |\n|---|---|---|---|---|---|')
    trees = {'this': ROOT} | ({'peer': options.peer.resolve()} if options.peer else {})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.formats:
            path = Path(folder) / f'long.{kind.split("-")[0]}'
            write_long(path, kind, options.minutes)
            found = {name: [] for name in trees}
            for _ in range(options.rounds):
                for name, tree in trees.items():
                    found[name].append(measured(tree, path, options))
            path.unlink()
            for name in trees:
                row = best(found[name])
                rows.append(dict(format=kind, checkout=name, **(row or {})))
                cells = ('cannot be read', '', '', '')
                if row:
                    cells = [f'{row["first_open_ms"]:.1f}', f'{row["crop_ms"]:.1f}']
                    cells += [f'{row["crop_seconds_read"]:.2f}', f'{row["whole_ms"]:.0f}']
                print(f'| {kind} | {name} | {" | ".join(cells)} |', flush=True)
    setting = dict(minutes=options.minutes, seconds=options.seconds, crops=options.crops, rounds=options.rounds)
    write_results(options.out, dict(setting=setting, rows=rows))


if __name__ == '__main__':
    main()
