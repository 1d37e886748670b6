"""What this machine's processors compute in."""

from __future__ import annotations

from functools import cache

import torch


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
