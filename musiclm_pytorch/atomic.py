"""Files that appear whole under their name, or not at all, and tell when they are not what was written.

Imports nothing from the package.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKSUM = 'checksum'
DEEPEST = 100  # levels of arrays and objects in each other

# what a file system answers that cannot take more, or does not want to
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def naming(path: str | Path, aside: str | Path | None = None) -> Iterator[None]:
    """Name the file in errors of the file system that come of writing it, as of a full disk, whoever writes.

    Python names none in them, safetensors tells them in a text of its own, and a file `aside` is none that anyone
    knows.
    """
    try:
        yield
    except SafetensorError as error:
        if (told := re.search(r'os error (\d+)', str(error))) is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from error
    except OSError as error:
        is_own = error.errno in REFUSED if error.filename is None else str(error.filename) == str(aside)
        if not is_own:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` when the block ends, and is removed after an error.

    The file has the mode of one newly made (0666 less the umask), whatever writes it: safetensors makes files that
    nobody else may read. Its content is on the disk before its name says that it is whole.
    """
    path = Path(path)
    aside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    with naming(path, aside):
        aside.unlink(missing_ok=True)  # of a process of the same number that was killed
        mode = _mode_of_new(aside)
        try:
            yield aside
            aside.chmod(mode)
            sync(aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def written_together(folder: str | Path) -> Iterator[Path]:
    """A folder to write to; what it holds when the block ends takes the place of what has the same names in `folder`,
    its folders before its files. Whatever else lies there stays, and after an error all is as it was.
    """
    folder = Path(folder)
    made = [it for it in (folder, *folder.parents) if not it.exists()]
    # nobody clears what was there before
    aside, retired = (folder / f'.together.{os.getpid()}.{kind}' for kind in ('tmp', 'before'))
    try:
        with naming(folder):
            with suppress(OSError):  # not there, or not empty
                retired.rmdir()
            if retired.exists():  # of a process of the same number that was killed while it changed places
                retired.rename(free_name(folder / 'together'))
            shutil.rmtree(aside, ignore_errors=True)
            for path in (aside, retired):
                path.mkdir(parents=True)
        yield aside
        _take_places(aside, folder, retired)
        made = []
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(aside):
            raise
        raise OSError(error.errno, error.strerror, str(folder / Path(error.filename).relative_to(aside))) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for path in (retired, *made):
            with suppress(OSError):  # never made, or not empty
                path.rmdir()


def _take_places(aside: Path, folder: Path, retired: Path) -> None:
    names = [it.name for it in sorted(aside.iterdir(), key=lambda it: (it.is_file(), it.name))]
    try:
        for name in names:
            if (folder / name).exists():
                (folder / name).rename(retired / name)
            (aside / name).rename(folder / name)
        sync(folder)
    except BaseException as error:
        # by what is where: an interruption tells not whether a name had changed
        try:
            for name in names:
                if not (aside / name).exists():
                    (folder / name).rename(aside / name)
                if (retired / name).exists():
                    (retired / name).rename(folder / name)
        except BaseException as another:
            raise OSError(
                f'{folder} is neither what it was nor what was to be saved ({another!r}): what is missing of the '
                f'former lies in {retired}'
            ) from error
        raise


def write_together(files: Mapping[Path, str | bytes]) -> None:
    """Write files that belong together: the disk holds all of them before the first gets its name, and the first of
    the mapping gets it last."""
    with ExitStack() as stack:
        for path, content in files.items():
            content = content.encode('utf-8', errors='surrogateescape') if isinstance(content, str) else content
            stack.enter_context(atomic_write(path)).write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8; names of files that are none come back as the bytes that they were."""
    write_together({Path(path): text})


def parsed_json(text: str | bytes, **keywords: Any) -> Any:
    """Like `json.loads`, with ValueError where arrays and objects are nested deeper than any that are meant to be."""
    try:
        content = json.loads(text, **keywords)
    except RecursionError as error:
        raise ValueError(f'arrays and objects in it are nested more than {DEEPEST} levels deep') from error
    check_nesting(content)
    return content


def check_nesting(content: Any) -> None:
    """Raise ValueError for what whoever goes through it, level by level, would run out of stack in."""
    level = [content]
    for _ in range(DEEPEST + 1):
        # what an alias of YAML repeats is looked at once a level: copies of copies would be too many
        level = [*{id(it): it for it in level if isinstance(it, (dict, list))}.values()]
        if not level:
            return
        level = [inner for it in level for inner in (it.values() if isinstance(it, dict) else it)]
    raise ValueError(f'arrays and objects in it are nested more than {DEEPEST} levels deep')


def valid_json(content: Any, **keywords: Any) -> str:
    """Like `json.dumps`, with null for NaN and infinity, which JSON has no words for."""
    return json.dumps(json.loads(json.dumps(content, **keywords), parse_constant=lambda _: None), **keywords)


def write_json(path: str | Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + '\n')


def write_checked_json(path: str | Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write an object of JSON with the checksum of its content as its last key; `read_checked_json` looks at it."""
    write_text(path, checked_json(content, indent))


def checked_json(content: dict[str, Any], indent: int | None = 2) -> str:
    return json.dumps({**content, CHECKSUM: checksum_of_json(content)}, indent=indent, ensure_ascii=False) + '\n'


def read_checked_json(path: str | Path, verify: bool = True) -> Any:
    """What `write_checked_json` wrote, without its checksum; a file that has none is read as it is.

    Raises OSError, and ValueError for what is no JSON, or not what was written, unless `verify` is off.
    """
    try:
        content = parsed_json(Path(path).read_bytes().decode('utf-8', errors='surrogateescape'))
    except ValueError as error:
        raise ValueError(f'{path} is damaged, it is no JSON: {error}') from error
    if not isinstance(content, dict) or (told := content.pop(CHECKSUM, None)) is None:
        return content
    if verify and told != checksum_of_json(content):
        raise ValueError(
            f'{path} is not what was written: its checksum is that of another content. If it was changed by hand, take '
            f'its key {CHECKSUM!r} out; else it is damaged, and has to come from a copy'
        )
    return content


def checksum_of_json(content: dict[str, Any]) -> str:
    # as it comes back from a file: keys are strings, tuples are lists
    plain = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return xxhash.xxh3_64_hexdigest(plain.encode())


def write_tensors(path: str | Path, tensors: dict[str, Tensor], part_of: str | None = None) -> str:
    """Write contiguous tensors that share no memory, as safetensors, with their checksum in its metadata.

    `part_of` is kept with them: what they are of, such as the checksum of a config and a number, so that the file of
    another one does not pass for this.

    Returns:
        the checksum, for `read_tensors`.
    """
    checksum = checksum_of(tensors, part_of)
    # one key: safetensors writes several in another order each time
    metadata = {CHECKSUM: checksum if part_of is None else f'{checksum} {part_of}'}
    with atomic_write(path) as aside:
        save_file(tensors, str(aside), metadata=metadata)
    return checksum


def read_tensors(
    path: str | Path,
    verify: bool = True,
    part_of: str | None = None,
    checksums: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file of safetensors.

    Raises FileNotFoundError, and ValueError for a damaged file: also, unless `verify` is off, for one that
    `write_tensors` wrote with other content, as part of something else, or with another checksum than those given. A
    file without a checksum is read as it is.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'no file at {path}')
    try:
        with safe_open(str(path), 'pt') as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except Exception as error:  # one of many, by what is damaged
        raise ValueError(f'{path} is damaged, it cannot be read as safetensors: {error}') from error
    told, _, whole = metadata.get(CHECKSUM, '').partition(' ')
    if not verify or not told:
        if verify and checksums is not None:
            raise ValueError(f'{path} is not what was written: it has no checksum any more (verify=False reads it)')
        return tensors
    if told != checksum_of(tensors, whole or None):
        raise ValueError(
            f'{path} is damaged: it is not what was written, by its checksum; it has to come from a copy (verify=False '
            'reads it all the same)'
        )
    if (checksums is not None and told not in checksums) or (part_of is not None and whole not in ('', part_of)):
        raise ValueError(
            f'{path} is whole, but belongs to something else than the files beside it; all have to come from one copy '
            '(verify=False reads it all the same)'
        )
    return tensors


def tensor_sizes(folder: str | Path) -> list[int]:
    """Elements of each tensor in the files of safetensors in a folder, and in those right within, by their headers."""
    sizes, folder = [], Path(folder)
    for path in (*folder.glob('*.safetensors'), *folder.glob('*/*.safetensors')):
        try:
            with safe_open(str(path), 'pt') as file:
                sizes += [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f'{path} is damaged, it cannot be read as safetensors: {error}') from error
    return sizes


def checksum_of_bytes(content: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(content)


def checksum_of_file(path: str | Path) -> str:
    """The checksum of the bytes of a file that another library wrote."""
    with open(path, 'rb') as file:
        digest = xxhash.xxh3_64()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def checksum_of(tensors: dict[str, Tensor], part_of: str | None = None) -> str:
    digest = xxhash.xxh3_64() if part_of is None else xxhash.xxh3_64(part_of.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def open_modes(folder: str | Path) -> None:
    """Give the files in a folder that a library wrote the mode of new ones."""
    for path in Path(folder).iterdir():
        if path.is_file():
            probe = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
            try:
                path.chmod(_mode_of_new(probe))
            finally:
                probe.unlink(missing_ok=True)


def free_name(folder: Path) -> Path:
    """The first of `name.1`, `name.2`, … beside a folder that is not there: where it can be moved aside to."""
    number = 1
    while (target := folder.with_name(f'{folder.name}.{number}')).exists():
        number += 1
    return target


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
