"""One writer at a time in a folder, and one process at a time that has functions compiled.

Imports nothing from the package.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

BESIDE, WITHIN = '.{}.lock', '.lock'  # names of the file, the first by that of the folder
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what a file system answers that has none
NOT_HERE = {errno.EACCES, errno.EPERM, errno.EROFS}
PATIENCE = 0.3  # seconds for which a lock that is being let go is waited for
LONGEST_COMMAND = 120  # characters that are told of one

COMPILING = 600.0  # seconds for which another process may compile before this one no longer waits

_own = threading.local()
_compiled: set[Hashable] = set()


class FolderInUseError(OSError):
    """Another process, or another thread of this one, writes into the folder, or another run has done so since."""


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Keep every other writer out of a folder, which need not be there yet, while the block lasts.

    The lock is one of the operating system on a file beside the folder, so it goes with the process that holds it,
    however that ends; the file is removed with it. The folder may be renamed meanwhile. Where nothing may be written
    beside it, or it is a file system of its own, which other machines may see elsewhere, the file lies in it. On a file
    system without locks, a warning says so. A block within the block, of the same thread and folder, is free.

    Raises:
        FolderInUseError: another writer is there; it tells which. OSError: neither place may be written to.
    """
    folder = Path(folder).resolve()  # by whatever path it is reached
    held: set[Path] = vars(_own).setdefault('folders', set())
    if folder in held:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_parents_of(folder))
        places = [folder.with_name(BESIDE.format(folder.name))]
        if folder.is_dir():
            places.insert(0 if folder.is_mount() else 1, folder / WITHIN)
        for place in places:
            try:
                stack.enter_context(_locked(place, folder))
                break
            except OSError as error:
                if error.errno in NO_LOCKS:
                    logger.warning(
                        'the file system of %s has no locks (%s): nothing keeps a second writer out', folder, error
                    )
                    break
                if error.errno not in NOT_HERE or place == places[-1]:
                    raise
        held.add(folder)
        stack.callback(held.discard, folder)
        yield


@contextmanager
def _locked(path: Path, folder: Path) -> Iterator[None]:
    # a marker in place of a lock would outlive its process
    lock = FileLock(path, timeout=PATIENCE, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUseError(
            f'{folder} is being written by {_holder(path)}; wait for its end, or give another folder'
        ) from None
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno), str(folder)) from error
    try:
        with suppress(OSError):  # where the disk is full, what is written next will tell it, with its name
            path.write_text(json.dumps(_about_this_process()), encoding='utf-8')
        yield
    finally:
        # before it is let go: who waits for it sees that the file is gone, and makes a new one
        path.unlink(missing_ok=True)
        lock.release()


def _about_this_process() -> dict[str, str | int]:
    command = shlex.join([Path(sys.argv[0] or 'python').name, *sys.argv[1:]])
    if len(command) > LONGEST_COMMAND:
        command = f'{command[:LONGEST_COMMAND]} …'
    return dict(pid=os.getpid(), host=os.uname().nodename, command=command, since=time.strftime('%Y-%m-%d %H:%M:%S %z'))


def _holder(path: Path) -> str:
    try:
        return 'process {pid} on {host} since {since} ({command})'.format(**json.loads(path.read_text('utf-8')))
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun, or is about to end
        return 'another process'


@contextmanager
def _parents_of(folder: Path) -> Iterator[None]:
    """Make the folders above one, and remove those that are still empty at the end."""
    made = [path for path in folder.parents if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in made:
            try:
                path.rmdir()
            except OSError:  # something is in it, or has gone with it
                break


@contextmanager
def first_use(what: Hashable) -> Iterator[None]:
    """Keep other processes of this user from compiling functions while the block has `what` compiled, or read.

    numba (0.68) keeps what it compiles of one function in several files, each replaced on its own. Of two processes
    that compile the same at once, one may leave this file and one that; every later process crashes on the pair. So
    the first block of a process and `what` waits until no other process is in such a block, for ten minutes at most;
    what comes after it, and blocks within, cost nothing. Also a decorator of functions.

    what: tells what is compiled, kinds of numbers included where functions are compiled anew for each.
    """
    if what in _compiled or getattr(_own, 'compiles', False):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_only_compiler())
        _own.compiles = True
        stack.callback(setattr, _own, 'compiles', False)
        yield
    _compiled.add(what)


@contextmanager
def _only_compiler() -> Iterator[None]:
    # beside what several machines share, if they do: a home directory often comes with the packages in it
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'musiclm-pytorch'
    for folder in (cache, Path(tempfile.gettempdir()) / f'musiclm-pytorch-{os.getuid()}'):
        lock = FileLock(folder / 'compiling.lock', timeout=COMPILING, fallback_to_soft=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            logger.warning('another process compiles functions since %g s (%s); going on', COMPILING, lock.lock_file)
            break
        except OSError as error:  # not to be written, or without locks
            logger.debug('no lock in %s: %s', folder, error)
            continue
        try:
            yield
        finally:
            lock.release()
        return
    yield
