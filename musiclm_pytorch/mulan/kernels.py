"""Whether hand-written kernels may stand in for PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
