"""How the benchmarks keep what they measured: JSON with what it was measured by, when and on what."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def add_out(parser: argparse.ArgumentParser, name: str) -> None:
    """The option `--out`: where `write_results` writes."""
    path = ROOT / 'build' / 'benchmarks' / f'{name}.json'
    parser.add_argument('--out', type=Path, default=path, help='JSON of the figures (default: build/benchmarks/)')


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:  # only Linux has it
        lines = []
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor() or platform.machine())


def write_results(path: Path, found: Mapping[str, Any]) -> None:
    """Write what was found, beside the command, the date and the machine.

    `docs/figures` keeps those that the pages show, and `make figures` makes their tables of them.
    """
    import torch

    report = dict(
        command=shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]]),
        date=datetime.date.today().isoformat(),
        machine=dict(
            processor=processor(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | dict(found), indent=2, allow_nan=False) + '\n', encoding='utf-8')
    print(f'\nwritten to {path}')
