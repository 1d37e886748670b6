"""Fast paths: each a function in the place of plain PyTorch, which stands beside it and gives the same numbers.

All of it is PyTorch's public interface; a kernel may be deleted without changing a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.checks import is_traced
from musiclm_pytorch.kernels.processor import has_slow_float32

_plain = False
# below this many multiplications a call costs more than it saves
MIN_MULTIPLICATIONS = 2**27


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Compute with PyTorch's own operators only, in more time and memory.

    The fast kernels cannot be differentiated twice: gradient penalties (`create_graph=True`) and `torch.func` need this
    context around the forward pass.
    """
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def fast_kernels_allowed() -> bool:
    return not _plain and not is_traced()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)`, in float32 on a CPU through the faster of the two libraries that PyTorch carries.

    Its gradient cannot be differentiated again where that is oneDNN.
    """
    if (
        x.device.type == 'cpu'
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)  # not one that is quantised or sharded
        and x.numel() * len(weight) >= MIN_MULTIPLICATIONS
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled('cpu')
        and fast_kernels_allowed()
        and has_slow_float32()
    ):
        # a copy in oneDNN's layout, the product of which is oneDNN's
        return F.linear(x.to_mkldnn(), weight).to_dense()
    return F.linear(x, weight)
