"""Files of this repository, and disks that are full."""

import resource
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def largest_file(size):
    """No file of this process grows beyond `size`: as on a full disk, writing fails in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


ROOT = Path(__file__).resolve().parents[2]


def tracked_files() -> list[Path]:
    listing = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip('not a git checkout')
    return [ROOT / name for name in listing.stdout.split('\0') if name and (ROOT / name).is_file()]
