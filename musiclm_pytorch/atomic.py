"""Files that appear whole under their name, or not at all. Imports nothing from the package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` when the block ends, and is removed after an error.

    The file has the mode of one newly made (0666 less the umask), whatever writes it: safetensors makes files that
    nobody else may read. Its content is on the disk before its name says that it is whole.
    """
    path = Path(path)
    aside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    aside.unlink(missing_ok=True)  # of a process of the same number that was killed
    mode = _mode_of_new(aside)
    try:
        yield aside
        aside.chmod(mode)
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8; names of files that are none come back as the bytes that they were."""
    with atomic_write(path) as aside:
        aside.write_text(text, encoding='utf-8', errors='surrogateescape')


def write_json(path: str | Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + '\n')


def write_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write contiguous tensors that share no memory, as safetensors."""
    with atomic_write(path) as aside:
        save_file(tensors, str(aside))


def open_modes(folder: str | Path) -> None:
    """Give the files in a folder that a library wrote the mode of new ones."""
    for path in Path(folder).iterdir():
        if path.is_file():
            probe = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
            try:
                path.chmod(_mode_of_new(probe))
            finally:
                probe.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Make sure that a file or folder survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode_of_new(path: Path) -> int:
    """Make an empty file, and tell its mode: asking for the umask would change it for other threads."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
