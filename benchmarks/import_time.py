"""What `import musiclm_pytorch` costs beside torch, which it needs anyway.

Each import runs in a fresh interpreter, the two in turn, so that a slow moment of the machine hits both alike.

    python benchmarks/import_time.py [runs]
"""

import platform
import statistics
import subprocess
import sys
import tempfile

IMPORTS = ['import torch', 'import torch, musiclm_pytorch']
TIMED = 'import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)'


def seconds(statement: str) -> float:
    """How long `statement` takes in an interpreter that starts in an empty folder, its own start left out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-c', TIMED.format(statement)]
        return float(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)


def main(runs: int = 7) -> None:
    for statement in IMPORTS:  # read the files once, so that no run pays for a cold disk
        seconds(statement)
    taken = {statement: [] for statement in IMPORTS}
    for _ in range(runs):
        for statement in IMPORTS:
            taken[statement].append(seconds(statement))
    medians = [statistics.median(times) for times in taken.values()]
    print(f'Python {platform.python_version()}, median of {runs} runs\n')
    print(f'| {"statement":<45} | median s | min s | max s |')
    print(f'|{"-" * 47}|---------:|------:|------:|')
    for (statement, times), median in zip(taken.items(), medians, strict=True):
        print(f'| {f"`{statement}`":<45} | {median:8.3f} | {min(times):5.3f} | {max(times):5.3f} |')
    print(f'\nmusiclm_pytorch adds {1000 * (medians[1] - medians[0]):+.0f} ms ({medians[1] / medians[0] - 1:+.1%})')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
