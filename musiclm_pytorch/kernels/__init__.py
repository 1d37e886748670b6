"""Fast paths: each a function in the place of plain PyTorch, which stands beside it and gives the same numbers.

All of it is PyTorch's public interface; a kernel may be deleted without changing a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from musiclm_pytorch.checks import is_traced

_plain = False


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
