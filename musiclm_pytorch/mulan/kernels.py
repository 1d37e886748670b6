"""Whether hand-written kernels may stand in for PyTorch's own operators, and what the processor computes in."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from musiclm_pytorch.checks import is_traced

_plain = False


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Compute with PyTorch's own operators only, in more time and memory.

    The fast kernels have a hand-written backward pass, which cannot be differentiated again: gradient penalties
    (`create_graph=True`) and `torch.func` need this context around the forward pass.
    """
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def fast_kernels_allowed() -> bool:
    return not _plain and not is_traced()


def computes_in_bf16() -> bool:
    """Whether this processor has AVX-512 or AMX instructions for bf16; without them it is emulated, slowly."""
    return torch.backends.mkldnn.is_available() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


@cache
def has_gnu_openmp() -> bool:
    """Whether PyTorch runs its threads through an OpenMP with GNU's entry points, which other code can then share."""
    return sys.platform == 'linux' and hasattr(ctypes.CDLL(None), 'GOMP_parallel')


def half_precision(device_type: str) -> str:
    """The half precision of a kind of device: 'bf16', or 'fp16' on GPUs that only emulate it."""
    native = device_type != 'cuda' or torch.cuda.is_bf16_supported(including_emulation=False)
    return 'bf16' if native else 'fp16'
