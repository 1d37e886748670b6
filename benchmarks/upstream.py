"""The released library that benchmarks compare with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

UPSTREAM = 'musiclm-pytorch==0.2.8'


def install_upstream(folder: Path) -> None:
    """Install it into a folder of its own, to be put on the path instead of this repository."""
    if (folder / 'musiclm_pytorch').is_dir():
        return
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', str(folder), UPSTREAM]
    subprocess.run(pip, check=True)
