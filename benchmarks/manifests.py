"""What opening a long manifest or a folder of many files costs: time a row, and memory beside the size of the text.

    python benchmarks/manifests.py
    python benchmarks/manifests.py --rows 100000 --kinds csv jsonl

`AudioTextDataset` is opened without looking at the headers of the files, and then split. The sound files of a manifest
are not there; those of a folder are empty, each with a caption beside it, and the memory is set beside the captions and
paths.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import add_out, write_results  # beside this file


def write(folder: Path, kind: str, rows: int) -> tuple[Path, int]:
    """A source of so many rows, and the size of its text in bytes."""
    captions = (f'a slow piano piece in a minor key with soft drums, number {row}' for row in range(rows))
    named = ((f'audio/{row % 1000:03d}/{row:07d}.flac', caption) for row, caption in enumerate(captions))
    if kind == 'folder':
        size = 0
        for name, caption in named:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            path.with_suffix('.txt').write_text(caption)
            size += len(name) + len(caption)
        return folder, size
    path = folder / f'manifest.{kind}'
    with open(path, 'w') as file:
        if kind == 'jsonl':
            file.writelines(json.dumps(dict(audio=name, caption=caption)) + '\n' for name, caption in named)
        else:
            mark = ',' if kind == 'csv' else '\t'
            file.write(f'audio{mark}caption\n')
            file.writelines(f'{name}{mark}"{caption}"\n' for name, caption in named)
    return path, path.stat().st_size


def measure(source: str) -> None:
    """Print clips, seconds of clock and of CPU to open them, memory at the peak in bytes, and seconds to split them."""
    from musiclm_pytorch.data.datasets import AudioTextDataset

    before = int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()
    clock, cpu = time.perf_counter(), time.process_time()
    dataset = AudioTextDataset.from_path(source, sample_rate=16000, check_headers=False)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    split = time.perf_counter()
    dataset.split()
    print(json.dumps([len(dataset), clock, cpu, memory, time.perf_counter() - split]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, default=1_000_000, help='default: %(default)s')
    parser.add_argument('--kinds', nargs='+', default=['csv', 'tsv', 'jsonl'], help='csv, tsv, jsonl, folder')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    add_out(parser, 'manifests')
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    print('| source | MB of text | opening: µs a row | of which CPU | memory / text | split: µs a row |')
    print('|---|---|---|---|---|---|')
    rows = {}
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            source, size = write(Path(folder), kind, options.rows)
            # a process of its own, for its peak of memory
            command = [sys.executable, __file__, '--measure', str(source)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            clips, clock, cpu, memory, split = json.loads(output.splitlines()[-1])
            assert clips == options.rows
            clock, cpu, split = (it / options.rows * 1e6 for it in (clock, cpu, split))
            rows[kind] = dict(mb=size / 1e6, open_us=clock, open_cpu_us=cpu, memory=memory / size, split_us=split)
            cells = [kind, f'{size / 1e6:.0f}', f'{clock:.1f}', f'{cpu:.1f}', f'{memory / size:.2f}', f'{split:.1f}']
            print('|', ' | '.join(cells), '|', flush=True)
    write_results(options.out, dict(rows_each=options.rows, rows=rows))


if __name__ == '__main__':
    main()
