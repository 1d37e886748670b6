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
TILE, LANES, NONE = 64, 16, -1e30  # of the source
LOG2_E = math.log2(math.e)


@cache
def compiler() -> str | None:
    return shutil.which('g++')


def can_compile() -> bool:
    """Whether the C++ can be had here: it needs Linux with GNU's compiler and OpenMP, and AVX-512."""
    return (
        sys.platform == 'linux'
        and compiler() is not None
        and torch.backends.cpu.get_cpu_capability() == 'AVX512'
        and has_gnu_openmp()
    )


@cache
def library() -> ctypes.CDLL:
    """The compiled functions; the file is kept in the user's cache folder, by its source, compiler and processor.

    Raises RuntimeError with what the compiler says where it fails.
    """
    source = SOURCE.read_bytes()
    # the macros are those of the processor, since -march=native is among the flags
    asked = subprocess.run(
        [compiler(), *FLAGS, '-dM', '-E', '-x', 'c++', '/dev/null'], capture_output=True, check=True
    ).stdout
    digest = hashlib.sha256(repr((source, asked, FLAGS)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'musiclm-pytorch'
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home folder, or one that may not be written to
        folder = Path(tempfile.mkdtemp(prefix='musiclm-pytorch-'))
    path = folder / f'fast_layers-{digest}.so'
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            part = Path(aside) / 'fast_layers.o'
            # linked without OpenMP: its functions are those that PyTorch has loaded, so that threads are shared
            for command in (
                [compiler(), *FLAGS, '-c', str(SOURCE), '-o', str(part)],
                [compiler(), '-shared', str(part), '-o', str(part.with_suffix('.so'))],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise RuntimeError(f'{" ".join(command)} failed:\n{done.stderr[-2000:]}')
            part.with_suffix('.so').replace(path)
    found = ctypes.CDLL(str(path))
    found.fast_layers_memory.restype = ctypes.c_int64
    return found


@dataclass
class Keys:
    """Which keys there are, and the bias of each pair; in the units and order that the C++ reads.

    Attributes:
        mask: `(b, room)` float32, 0 for a key and `NONE` for what is none.
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
    """What `TorchParts` computes, in C++.

    Args:
        dtype: of the products, float32 or bfloat16.
        int8: whether products take bytes.
    """

    def __init__(self, dtype: torch.dtype, int8: bool):
        self.half, self.int8 = dtype == torch.bfloat16, int8
        self.takes = torch.uint8 if int8 else dtype

    @staticmethod
    def serves(dtype: torch.dtype, int8: bool) -> bool:
        """Whether this processor and machine have it for such products."""
        if dtype not in (torch.float32, torch.bfloat16) or not can_compile():
            return False
        needs = KNOWS_HALF * (dtype == torch.bfloat16) + KNOWS_BYTES * int8
        try:
            return library().fast_layers_knows() & needs == needs
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            logger.warning('torch.compile takes the place of C++ that could not be had: %s', error)
            return False

    def _call(self, name: str, *arguments: Tensor | int | None) -> int:
        """A function of the C++; all of its arguments are addresses or int64."""
        values = (self.half, self.int8, *arguments, torch.get_num_threads())
        return getattr(library(), f'fast_layers_{name}')(
            *(
                ctypes.c_void_p(None if it is None else it.data_ptr())
                if it is None or isinstance(it, Tensor)
                else ctypes.c_int64(it)
                for it in values
            )
        )

    def _results(self, rows: list[int], dim: int) -> tuple[Tensor, Tensor | None]:
        out = torch.empty(*rows, dim, dtype=self.takes)
        return out, torch.empty(*rows, 1) if self.int8 else None

    def keys(self, x: Tensor, bias: PositionBias | None, mask: Tensor | None) -> Keys:
        """Of tokens `(b, n, d)`, what all layers share; see `Keys`."""
        n = x.shape[1]
        mask = bias.key_mask() if bias is not None else mask
        taken = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        taken = F.pad(taken, (0, -n % TILE))  # all that is behind is no key
        added = torch.zeros(taken.shape).masked_fill_(~taken, NONE)
        if bias is None:
            return Keys(added)
        # the other way round, so that the bias of keys that follow each other follow each other
        table = F.pad(bias.table.float().flip(1) * LOG2_E, (0, LANES)).contiguous()
        base = bias.table.shape[1] - 1 - bias.centre
        return Keys(added, table, base, bias.codes.to(torch.int32).contiguous())

    def normed(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
        *rows, dim = x.shape
        out, scale = self._results(rows, dim)
        self._call('norm', x, None, None, gamma, None, out, scale, math.prod(rows), dim)
        return out, scale

    def added_and_normed(
        self, x: Tensor, product: Tensor, scale: Tensor | None, gamma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        *rows, dim = x.shape
        total, (out, out_scale) = torch.empty_like(x), self._results(rows, dim)
        self._call('norm', x, product, scale, gamma, total, out, out_scale, math.prod(rows), dim)
        return total, out, out_scale

    def added(self, x: Tensor, product: Tensor, scale: Tensor | None) -> Tensor:
        *rows, dim = x.shape
        total = torch.empty_like(x)
        self._call('norm', x, product, scale, None, total, None, None, math.prod(rows), dim)
        return total

    def gated(self, product: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        *rows, both = product.shape
        out, out_scale = self._results(rows, both // 2)
        self._call('gate', product, scale, out, out_scale, math.prod(rows), both // 2)
        return out, out_scale

    def attended(
        self, q: Tensor, kv: Tensor, scale: Tensor | None, gain: Tensor, heads: int, keys: Keys
    ) -> tuple[Tensor, Tensor | None]:
        batch, n, width = q.shape
        shape = batch, heads, n, width // heads
        if keys.memory is None:
            keys.memory = torch.empty(self._call('memory', *shape), dtype=torch.uint8)
        bias = None, 0, 0, None, 0
        if keys.table is not None:
            bias = keys.table, keys.table.shape[1], keys.base, keys.codes, n if len(keys.codes) > 1 else 0
        joined = torch.empty(batch, n, width)
        # powers of 2 are what is computed
        gain = gain * LOG2_E
        self._call('attend', q, kv, scale, gain, *bias, keys.mask, keys.memory, joined, *shape)
        out, out_scale = self._results([batch, n], width)
        self._call('cast', joined, out, out_scale, batch * n, width)
        return out, out_scale
