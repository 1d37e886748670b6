"""Folders of results: earlier ones are kept, moved aside, or, when asked for, deleted."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)


def prepare_results_folder(folder: Path, *, resume: bool, clear: bool) -> None:
    """Make a folder for results: earlier ones stay if `resume`, are deleted if `clear`, or are moved aside."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if clear and folder.exists():
        shutil.rmtree(folder)
    elif not resume:
        _move_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _move_aside(folder: Path) -> None:
    """Rename a folder that is not empty to `name.1`, `name.2`, …, so that no earlier result is lost."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    number = 1
    while (target := folder.with_name(f'{folder.name}.{number}')).exists():
        number += 1
    folder.rename(target)
    logger.warning('%s held earlier results; they are now in %s', folder, target)
