"""Training states on disk: a folder a checkpoint, written atomically; tensors in safetensors, the rest JSON."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from musiclm_pytorch.atomic import (
    free_name,
    read_checked_json,
    read_tensors,
    sync,
    write_checked_json,
    write_tensors,
    written_together,
)

logger = logging.getLogger(__name__)

WEIGHTS = 'weights'  # the checksum of the tensors beside the state
NAME = 'step-{:09d}'
PATTERN = re.compile(r'step-(\d{9})')
TENSORS_FILE, STATE_FILE = 'state.safetensors', 'state.json'


def write(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint into `folder`; it appears whole under its name or not at all.

    `state` is a tree of dicts, lists, tuples, tensors, numbers, strings, booleans and None.
    """
    target = folder / NAME.format(step)
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, '', tensors)
    try:
        # of a run that was resumed from before this step, the new state replaces the old one
        with written_together(folder) as aside:
            made = aside / target.name
            made.mkdir()
            tree[WEIGHTS] = [write_tensors(made / TENSORS_FILE, tensors)]
            write_checked_json(made / STATE_FILE, tree, indent=None)
            sync(made)
    except OSError as error:
        raise OSError(
            error.errno,
            f'checkpoint {target} could not be written ({error.strerror or error}); the earlier ones are intact',
        ) from error
    return target


def write_file(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint as a file of its own, of safetensors; it appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_flatten(state, '', tensors)).encode()
    # among the tensors, their checksum is of it too
    write_tensors(path, tensors | {STATE_FILE: torch.frombuffer(bytearray(tree), dtype=torch.uint8)})


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, a folder or a file. Raises FileNotFoundError if there is none, ValueError if it is damaged."""
    if not path.exists():
        raise FileNotFoundError(f'no checkpoint at {path}')
    try:
        if path.is_file():
            tensors = read_tensors(path)
            if STATE_FILE not in tensors:
                raise ValueError(f'it is no checkpoint of a trainer, without a {STATE_FILE}')
            return _unflatten(json.loads(tensors.pop(STATE_FILE).numpy().tobytes()), tensors)
        tree = read_checked_json(path / STATE_FILE)
        checksums = tree.pop(WEIGHTS, None)
        return _unflatten(tree, read_tensors(path / TENSORS_FILE, checksums=checksums))
    except Exception as error:  # of safetensors, json and the file system, by what is damaged
        raise ValueError(f'checkpoint {path} is damaged: {error!r}') from error


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Name the checkpoint whose state is refused in the block, or is not one that a run writes."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:
        raise ValueError(f'checkpoint {path}: {error}') from error
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f'checkpoint {path} holds no state that a run wrote ({type(error).__name__}: {error}); remove it to go on '
            'from the one before'
        ) from error


def steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if PATTERN.fullmatch(path.name) and path.is_dir())


def read_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read; damaged ones are passed over with a warning."""
    for path in reversed(steps(folder)):
        try:
            return path, read(path)
        except ValueError as error:
            logger.warning('%s; going back to the one before', error)
    return None


def set_aside_after(folder: Path, step: int) -> None:
    """Move checkpoints of later steps to a folder beside `folder`: damaged ones, or those of a run that goes on from
    an earlier step now. Among its own, they would be taken for the newest."""
    later = [path for path in steps(folder) if int(PATTERN.fullmatch(path.name)[1]) > step]
    if not later:
        return
    target = free_name(folder)
    target.mkdir()
    for path in later:
        path.rename(target / path.name)
    logger.warning('the checkpoints of later steps than %d are now in %s', step, target)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted writer left behind."""
    for path in steps(folder)[:-keep]:
        # out of sight first: killed in the middle, no half of a checkpoint stays under the name of a whole one
        path.rename(folder / f'.{path.name}.{os.getpid()}.old')
    for path in (*folder.glob('.step-*'), *folder.glob('.together.*.tmp')):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob('.together.*.before'):  # what is in one has lost its place, and may be all that is left
        with suppress(OSError):
            path.rmdir()


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON tree in which tensors are references into `tensors`, and dict keys keep their types."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {'tensor': name}
    if isinstance(value, dict):
        items = [[key, _flatten(item, f'{name}/{key}', tensors)] for key, item in value.items()]
        return {'dict': items}
    if isinstance(value, (list, tuple)):
        kind = 'tuple' if isinstance(value, tuple) else 'list'
        return {kind: [_flatten(item, f'{name}/{i}', tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f'{name or "the state"} holds a {type(value).__name__}, which is neither a tensor nor JSON')


def _unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == 'tensor':
        return tensors[content]
    if kind == 'dict':
        return {key: _unflatten(item, tensors) for key, item in content}
    items = [_unflatten(item, tensors) for item in content]
    return tuple(items) if kind == 'tuple' else items


def random_states(cuda: bool = True) -> dict[str, Any]:
    """The states of the generators of torch, numpy and random in this process, and of CUDA where it is in use."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state()  # noqa: NPY002 - what data sets draw from
    return dict(
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if cuda and torch.cuda.is_initialized() else None,
        numpy=[kind, torch.from_numpy(keys.astype('int64')), position, has_gauss, gauss],
        random=random.getstate(),
    )


def restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states['torch'])
    if states['cuda'] is not None:
        torch.cuda.set_rng_state(states['cuda'])
    kind, keys, position, has_gauss, gauss = states['numpy']
    numpy.random.set_state((kind, keys.numpy().astype('uint32'), position, has_gauss, gauss))  # noqa: NPY002
    random.setstate(states['random'])
