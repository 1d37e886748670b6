"""What this machine's processors compute in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_computing = [0, 1]  # blocks of `one_thread` that are under way, and how many threads there were before them
_lock = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread: where others share the cores, its threads wait for each other, busily. A
    thread of Python that is born meanwhile begins with one, too."""
    with _lock:
        if _computing[0] == 0:
            _computing[1] = torch.get_num_threads()
        _computing[0] += 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _computing[0] -= 1
            torch.set_num_threads(_computing[1])


@cache
def computes_in_bf16() -> bool:
    """Whether this processor has AVX-512 or AMX instructions for bf16; without them it is emulated, slowly."""
    can = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and bool(can.get('avx512_bf16') or can.get('amx_bf16'))


@cache
def has_slow_float32() -> bool:
    """Whether float32 products should go to oneDNN rather than to MKL, which is what PyTorch calls.

    MKL keeps its AVX-512 code for Intel's processors; on others with AVX-512, oneDNN is up to 1.7 times as fast.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == 'AVX512'
        and 'Intel' not in torch.cpu.get_capabilities().get('cpu_name', '')
    )


def half_precision(device_type: str) -> str:
    """The half precision of a kind of device: 'bf16', or 'fp16' on GPUs that only emulate it."""
    native = device_type != 'cuda' or torch.cuda.is_bf16_supported(including_emulation=False)
    return 'bf16' if native else 'fp16'
