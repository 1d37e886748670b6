"""The C++ of `fast_layers.cpp`, compiled for the processor at hand, and its functions over tensors."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_pytorch.mulan.attention import PositionBias
from musiclm_pytorch.mulan.kernels import has_gnu_openmp

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name('fast_layers.cpp')
FLAGS = ['-std=c++17', '-O3', '-march=native', '-mprefer-vector-width=512', '-fopenmp', '-fPIC']
# neither changes a result: no errno, and no trap, is looked at
FLAGS += ['-fno-math-errno', '-fno-trapping-math']
KNOWS_HALF, KNOWS_BYTES = 1, 2  # bits of `fast_layers_knows`
LOG2_E = math.log2(math.e)

# ---- the library ----


def compiler() -> str | None:
    return shutil.which('g++')


def can_compile() -> bool:
    """Whether there is what the C++ needs: Linux, GNU's compiler and OpenMP, and AVX-512."""
    return (
        sys.platform == 'linux'
        and compiler() is not None
        and torch.backends.cpu.get_cpu_capability() == 'AVX512'
        and has_gnu_openmp()
    )


def library() -> ctypes.CDLL:
    """The compiled functions. Raises RuntimeError with what the compiler says where it fails."""
    found = _library_or_error()
    if isinstance(found, Exception):
        raise RuntimeError(f'the C++ of the layers could not be had: {found}') from found
    return found


@cache
def _library_or_error() -> ctypes.CDLL | Exception:
    """Once a process: a failure is told once, and not tried again."""
    try:
        return _build()
    except (OSError, RuntimeError) as error:
        logger.warning('torch.compile takes the place of C++ that could not be had: %s', error)
        return error


def _build() -> ctypes.CDLL:
    """Load what was compiled earlier, or compile it; it is kept by its source, its compiler and the processor."""
    # the macros are those of the processor, since -march=native is among the flags
    macros = _run([compiler(), *FLAGS, '-dM', '-E', '-x', 'c++', '/dev/null'])
    digest = hashlib.sha256(repr((SOURCE.read_bytes(), macros, FLAGS)).encode()).hexdigest()[:16]
    with _cache_folder() as folder:
        path = folder / f'fast_layers-{digest}.so'
        if path.exists():
            try:
                return _load(path)
            except OSError:  # damaged
                path.unlink()
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            part, whole = Path(aside) / 'fast_layers.o', Path(aside) / 'fast_layers.so'
            _run([compiler(), *FLAGS, '-c', str(SOURCE), '-o', str(part)])
            # linked without OpenMP: its functions are those that PyTorch has loaded, so that threads are shared
            _run([compiler(), '-shared', str(part), '-o', str(whole)])
            found = _load(whole)
            whole.replace(path)
        return found


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f'{" ".join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}')
    return done.stdout


@contextmanager
def _cache_folder() -> Iterator[Path]:
    """The user's, or where there is no home folder, or one that may not be written to, one for this process alone."""
    try:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'musiclm-pytorch'
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(folder)
    except (OSError, RuntimeError):
        with tempfile.TemporaryDirectory(prefix='musiclm-pytorch-') as folder:
            yield Path(folder)
    else:
        yield folder


def _load(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.fast_layers_memory.restype = ctypes.c_int64
    return found


def constant(name: str, kind: type = ctypes.c_int64) -> int | float:
    """A constant of the C++."""
    return kind.in_dll(library(), f'fast_layers_{name}').value


# ---- its functions ----


@dataclass
class Keys:
    """Which keys there are, and the bias of each pair; in the units and order that the C++ reads.

    Attributes:
        mask: `(b, room)` float32, 0 for a key, and the constant `no_key` for what is none.
        table: `(h, columns)` float32, the bias of pairs of tokens, or None.
        base: the column of a pair of one code.
        codes: `(b or 1, n)` int32: a pair has the column `base - codes[query] + codes[key]`.
        memory: what the layers compute in, one after the other.
    """

    mask: Tensor
    table: Tensor | None = None
    base: int = 0
    codes: Tensor | None = None
    memory: Tensor | None = None


class NativeParts:
    """What `TorchParts` computes, in C++, on a CPU and without gradients.

    Args:
        dtype: of the products, float32 or bfloat16.
        int8: whether products take bytes.
    """

    def __init__(self, dtype: torch.dtype, int8: bool):
        self.dtype, self.int8 = dtype, int8
        self.takes = torch.uint8 if int8 else dtype

    @staticmethod
    def serves(dtype: torch.dtype, int8: bool) -> bool:
        """Whether this machine has it for such products. The first call compiles it, which takes seconds."""
        if dtype not in (torch.float32, torch.bfloat16) or not can_compile():
            return False
        if isinstance(_library_or_error(), Exception):
            return False
        needs = KNOWS_HALF * (dtype == torch.bfloat16) + KNOWS_BYTES * int8
        return constant('knows') & needs == needs

    def _call(self, name: str, tensors: list[tuple[Tensor | None, torch.dtype]], *numbers: int) -> int:
        """A function of the C++, which is given addresses, and so cannot tell what lies there."""
        values = [ctypes.c_int64(self.dtype == torch.bfloat16), ctypes.c_int64(self.int8)]
        for tensor, dtype in tensors:
            if tensor is not None and not (
                tensor.dtype == dtype and tensor.device.type == 'cpu' and tensor.is_contiguous()
            ):
                raise TypeError(
                    f'compiled layers take contiguous tensors of {dtype} on a CPU here, got {tensor.dtype} on '
                    f'{tensor.device}; an OptimizedMuLaN is not moved or cast, make it anew with another config'
                )
            values.append(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()))
        values += [ctypes.c_int64(number) for number in numbers]
        return getattr(library(), f'fast_layers_{name}')(*values)

    def _results(self, rows: list[int], dim: int) -> tuple[Tensor, Tensor | None]:
        return _empty(*rows, dim, dtype=self.takes), _empty(*rows, 1) if self.int8 else None

    def keys(self, x: Tensor, bias: PositionBias | None, mask: Tensor | None) -> Keys:
        """Of tokens `(b, n, d)`, what all layers share; see `Keys`."""
        n = x.shape[1]
        mask = bias.key_mask() if bias is not None else mask
        taken = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        taken = F.pad(taken, (0, -n % constant('tile')))  # all that is behind is no key
        added = _empty(*taken.shape).zero_().masked_fill_(~taken, constant('no_key', ctypes.c_float))
        if bias is None:
            return Keys(added)
        # the other way round, so that the biases of keys that follow each other follow each other
        table = F.pad(bias.table.float().flip(1) * LOG2_E, (0, constant('lanes'))).contiguous()
        base = bias.table.shape[1] - 1 - bias.centre
        return Keys(added, table, base, bias.codes.to(torch.int32).contiguous())

    def normed(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._norm(x, None, None, gamma, None)

    def added_and_normed(
        self, x: Tensor, product: Tensor, scale: Tensor | None, gamma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        total = torch.empty_like(x)
        return total, *self._norm(x, product, scale, gamma, total)

    def added(self, x: Tensor, product: Tensor, scale: Tensor | None) -> Tensor:
        total = torch.empty_like(x)
        self._norm(x, product, scale, None, total)
        return total

    def _norm(
        self, x: Tensor, product: Tensor | None, scale: Tensor | None, gamma: Tensor | None, total: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """`total` becomes x + product * scale; what is returned is the norm of that, or nothing without `gamma`."""
        *rows, dim = x.shape
        out, out_scale = (None, None) if gamma is None else self._results(rows, dim)
        tensors = [(x, torch.float32), (product, self.dtype), (scale, torch.float32), (gamma, torch.float32)]
        tensors += [(total, torch.float32), (out, self.takes), (out_scale, torch.float32)]
        self._call('norm', tensors, math.prod(rows), dim, torch.get_num_threads())
        return out, out_scale

    def gated(self, product: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        *rows, both = product.shape
        out, out_scale = self._results(rows, both // 2)
        tensors = [(product, self.dtype), (scale, torch.float32), (out, self.takes), (out_scale, torch.float32)]
        self._call('gate', tensors, math.prod(rows), both // 2, torch.get_num_threads())
        return out, out_scale

    def attended(
        self, q: Tensor, kv: Tensor, scale: Tensor | None, gain: Tensor, heads: int, keys: Keys
    ) -> tuple[Tensor, Tensor | None]:
        batch, n, width = q.shape
        shape = batch, heads, n, width // heads
        if keys.memory is None:
            keys.memory = _empty(self._call('memory', [], *shape), dtype=torch.uint8)
        columns = codes_of_item = 0
        if keys.table is not None:
            columns, codes_of_item = keys.table.shape[1], n if len(keys.codes) > 1 else 0
        joined = _empty(batch, n, width)
        gain = gain * LOG2_E  # powers of 2 are what is computed
        tensors = [(q, self.dtype), (kv, self.dtype), (scale, torch.float32), (gain, torch.float32)]
        tensors += [(keys.table, torch.float32), (keys.codes, torch.int32), (keys.mask, torch.float32)]
        tensors += [(keys.memory, torch.uint8), (joined, torch.float32)]
        self._call('attend', tensors, columns, keys.base, codes_of_item, *shape, torch.get_num_threads())

        out, out_scale = self._results([batch, n], width)
        tensors = [(joined, torch.float32), (out, self.takes), (out_scale, torch.float32)]
        self._call('cast', tensors, batch * n, width, torch.get_num_threads())
        return out, out_scale


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device='cpu')
