"""Folders of results: earlier ones are kept, moved aside, or, when asked for, deleted."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from musiclm_pytorch.atomic import free_name, write_text
from musiclm_pytorch.locking import WITHIN, FolderInUseError

logger = logging.getLogger(__name__)

OWNER = 'run-id'  # the file that tells which run a folder is of
ASIDE = re.compile(r'\..+\.(\d+)\.(?:tmp|old)')  # names of what a process writes or removes, with its number


@contextmanager
def new_results(folder: Path, *, resume: bool, clear: bool) -> Iterator[None]:
    """Make a folder for results: earlier ones stay if `resume`, are deleted if `clear`, or are moved aside.

    The block is the last that can fail before anything is written: if it does, everything is as it was.
    """
    clear_leftovers(folder)
    was_there = folder.is_dir()
    earlier = None if resume else move_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if earlier is not None or not was_there:
            shutil.rmtree(folder)
        if earlier is not None:
            earlier.rename(folder)
        raise
    if earlier is not None and clear:
        shutil.rmtree(earlier)
    elif earlier is not None:
        logger.warning('%s held earlier results; they are now in %s', folder, earlier)


def take(folder: Path) -> str:
    """Make a folder that of another run from here on, and give the name of that run."""
    name = secrets.token_hex(8)
    write_text(folder / OWNER, name)
    return name


def check_own(folder: Path, run: str) -> None:
    """Raise FolderInUseError where a folder was taken by another run since; one that somebody has removed was not."""
    try:
        owner = (folder / OWNER).read_text(encoding='utf-8')
    except FileNotFoundError:
        return
    if owner != run:
        raise FolderInUseError(
            f'{folder} was taken by another run since this trainer last wrote there, and their checkpoints would mix; '
            'go on with that run by a trainer with resume=True, or keep this one by its save(FILE), and load(FILE) in '
            'a trainer with another results_folder'
        )


def move_aside(folder: Path) -> Path | None:
    """Rename a folder that is not empty to `name.1`, `name.2`, …, so that nothing in it is lost; tells where it is."""
    if not holds_something(folder):
        return None
    target = free_name(folder)
    folder.rename(target)
    return target


def holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(path.name not in (WITHIN, OWNER) for path in folder.iterdir())


def moved_aside(folder: Path, holding: str) -> Path | None:
    """The newest of the folders that were moved aside from `folder` and have a file of this pattern."""
    pattern = re.compile(rf'{re.escape(folder.name)}\.(\d+)')
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    numbers = sorted((int(found[1]) for path in beside if (found := pattern.fullmatch(path.name))), reverse=True)
    paths = (folder.with_name(f'{folder.name}.{number}') for number in numbers)
    return next((path for path in paths if any(path.glob(holding))), None)


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that are gone were writing, or removing, in a folder and those within it."""
    for path in [*folder.glob('.*'), *folder.glob('*/.*')]:
        found = ASIDE.fullmatch(path.name)
        if found is None or _is_alive(int(found[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if process == os.getpid():  # an earlier one of the same number: this one has begun nothing yet
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
