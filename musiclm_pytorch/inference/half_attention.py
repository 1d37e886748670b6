"""Attention with a position bias in half precision on a CPU, without gradients.

PyTorch's fused kernel runs there at float32's speed, whereas the products of oneDNN take half the time. So attention is
two products and a softmax between them, over as many scores at a time as the caches hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from musiclm_pytorch.mulan.attention import PositionBias

# scores held at a time
SCORES = 2**21
# fewer queries at a time than these make the products slow
MIN_ROWS = 128
# elements of a position bias that is kept; a larger one is looked up anew in each layer
KEPT_ELEMENTS = 2**24


class KeptBias:
    """A position bias, looked up block by block, and kept where it is shared and small: for the layers that follow, and
    for the next call at the same positions.

    Args:
        bias: of the tokens.
        dtype: to look it up in.
        keep: False keeps nothing.
    """

    def __init__(self, bias: PositionBias, dtype: torch.dtype, keep: bool):
        self.bias, self.table = bias, bias.table.to(dtype)
        self.shared = len(bias.codes) == 1 and bias.lengths is None
        elements = len(bias.table) * bias.codes.shape[1] ** 2
        self.blocks: dict | None = {} if keep and self.shared and elements <= KEPT_ELEMENTS else None

    def serves(self, bias: PositionBias) -> bool:
        """Whether what is kept is that of `bias`."""
        mine = self.bias
        return (
            self.blocks is not None
            and bias.lengths is None
            and bias.centre == mine.centre
            and torch.equal(bias.codes, mine.codes)
            and torch.equal(bias.table, mine.table)
        )

    def block(self, item: int, heads: slice, rows: slice, n: int) -> Tensor:
        """`(heads, rows, n)`."""
        place = (heads.start, rows.start)
        if self.blocks is not None and place in self.blocks:
            return self.blocks[place]
        block = self.bias.block(item, rows, n, heads, self.table)
        if self.blocks is not None:
            self.blocks[place] = block
        return block


def attend_in_half(q: Tensor, k: Tensor, v: Tensor, bias: KeptBias, weights_of: Callable) -> Tensor:
    """`mulan.attention.attend` of contiguous q, k and v, `(b, h, n, d)`.

    Args:
        weights_of: of scores and their bias, `softmax(scores + bias)` over the last axis.
    """
    batch, heads, total, _ = q.shape
    if bias.shared:
        out = torch.empty_like(q)
        items = max(1, SCORES // (heads * total**2))
        for some_heads, rows in spans(heads, total):
            block = bias.block(0, some_heads, rows, total)
            for start in range(0, batch, items):
                some = slice(start, min(start + items, batch))
                _attend(*(t[some, some_heads] for t in (q, k, v, out)), rows, block, weights_of)
        return out

    out = torch.zeros_like(q)
    lengths = [total] * batch if bias.bias.lengths is None else bias.bias.lengths.tolist()
    for item, n in enumerate(lengths):
        own = [t[item, None, :, :n].contiguous() for t in (q, k, v)]
        result = torch.empty_like(own[0])
        for some_heads, rows in spans(heads, n):
            block = bias.block(item, some_heads, rows, n)
            _attend(*(t[:, some_heads] for t in (*own, result)), rows, block, weights_of)
        out[item, :, :n] = result[0]
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: slice, bias: Tensor, weights_of: Callable) -> None:
    """Into `out[..., rows, :]`; the items are several only where all heads and rows are taken, so all is contiguous."""
    q, k, v, out = (t.flatten(0, 1) for t in (q, k, v, out))
    scores = torch.bmm(q[:, rows], k.transpose(1, 2))
    weights = weights_of(scores.view(-1, *bias.shape) if len(scores) > len(bias) else scores, bias)
    torch.bmm(weights.view_as(scores), v, out=out[:, rows])


def spans(heads: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Heads and queries to take at a time: all rows of some heads, or where one head is too much, some of its rows."""
    some_heads = max(1, min(heads, SCORES // n**2))
    some_rows = min(n, max(MIN_ROWS, SCORES // n))
    for head in range(0, heads, some_heads):
        for row in range(0, n, some_rows):
            yield slice(head, min(head + some_heads, heads)), slice(row, min(row + some_rows, n))
