"""What the stages add to attention scores for the positions of query and key, row by row.

audiolm-pytorch computes the full n × n matrix at each token. Its entries depend on the difference of two positions
only, so a table with one column a difference holds them all, and a new token needs one row. Gradients reach what the
table was computed from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionBias:
    """Rows of a position bias. With `table=None` there is none, and the rows only keep tokens from looking ahead.

    table: (h, k), the bias by `codes[query] − codes[key] + zero`
    codes: (n,) int64, one a position of the sequence
    across: (h, 1), the bias where `query_groups` and `key_groups` (n,) differ, whatever the table says
    """

    def __init__(
        self,
        table: Tensor | None,
        codes: Tensor,
        *,
        zero: int = 0,
        across: Tensor | None = None,
        query_groups: Tensor | None = None,
        key_groups: Tensor | None = None,
    ):
        self.table, self.codes, self.zero = table, codes, zero
        self.query_groups, self.key_groups = query_groups, key_groups
        if across is not None:
            # a column more, after those of the differences
            self.table = torch.cat((table, across), dim=1)

    def rows(self, start: int, stop: int, *, heads: int, num_keys: int, prefix: int = 0) -> Tensor:
        """(stop − start, heads, prefix + num_keys): for the tokens [start, stop), over `prefix` keys without a position
        and the tokens [0, num_keys); −inf for keys later than the query."""
        queries = torch.arange(start, stop, device=self.codes.device)[:, None]
        is_later = torch.arange(num_keys, device=self.codes.device) > queries
        if self.table is None:
            rows = torch.zeros(stop - start, heads, num_keys, device=self.codes.device)
        else:
            rows = self.block(start, stop, num_keys=num_keys).transpose(0, 1)
        rows = rows.masked_fill(is_later[:, None], float('-inf'))
        return F.pad(rows, (prefix, 0))

    def block(self, start: int, stop: int, *, num_keys: int) -> Tensor:
        """(heads, stop − start, num_keys) of the table, for the tokens [start, stop) over [0, num_keys); anything for
        keys later than the query. There has to be a table."""
        queries = torch.arange(start, stop, device=self.codes.device)[:, None]
        # a later key's column may lie outside of the table, and its value does not matter
        differences = self.table.shape[1] - (self.query_groups is not None)
        columns = (self.codes[queries] - self.codes[:num_keys] + self.zero).clamp_(0, differences - 1)
        if self.query_groups is not None:
            columns.masked_fill_(self.query_groups[queries] != self.key_groups[:num_keys], differences)
        if self.table.device.type != 'cpu':
            return self.table[:, columns]
        # whose gradient a CPU sums up five times as fast
        return self.table.index_select(1, columns.flatten()).view(len(self.table), *columns.shape)


def relative_table(relative: nn.Module | None, length: int, device: torch.device) -> Tensor | None:
    """(h, length) of a `RelativePositionBias`: by how many positions the query comes after the key."""
    if relative is None:
        return None
    dtype = next(relative.parameters()).dtype
    x = torch.arange(length, device=device).to(dtype)[:, None]
    return at_least_float32(_run_mlp(relative.net, x).t()).contiguous()


def _run_mlp(layers: nn.Module, x: Tensor) -> Tensor:
    # half precision tells no positions apart beyond 256
    with torch.autocast(x.device.type, enabled=False):
        for layer in [it for it in layers.modules() if not list(it.children())]:
            x = layer(x)
            if isinstance(layer, nn.SiLU):
                # positions are numbers up to some thousands, many of which it takes almost to zero
                x = without_denormals(x)
    return x


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_denormals(x: Tensor) -> Tensor:
    """x with zeros for what is so small that processors multiply it a hundred times slower.

    What is zero keeps its gradient, and what becomes zero has none.
    """
    return x.masked_fill((x.abs() < 1e-20) & (x != 0), 0)


def semantic_bias(transformer: nn.Module, length: int) -> PositionBias:
    """For [start, token, token, …], `length` in all."""
    device = transformer.device
    codes = torch.arange(length, device=device)
    return PositionBias(relative_table(transformer.transformer.rel_pos_bias, length, device), codes)


def coarse_bias(transformer: nn.Module, num_semantic: int, length: int) -> PositionBias:
    """For [start, semantic …, start, coarse …], `length` in all; one learned value between the two parts."""
    device = transformer.device
    codes = torch.arange(length, device=device)
    table = relative_table(transformer.transformer.rel_pos_bias, length, device)
    if table is None:
        return PositionBias(None, codes)
    is_coarse = codes > num_semantic
    across = at_least_float32(transformer.cross_attn_bias[:, 0])
    return PositionBias(table, codes, across=across, query_groups=is_coarse, key_groups=is_coarse)


def fine_bias(transformer: nn.Module, num_frames: int) -> PositionBias:
    """For [start, coarse …, start, fine …], whole frames of each, by the differences in frame and quantizer.

    Each start token has one learned value with everything, itself too. The MLP takes the differences shifted so that
    they start at zero, hence what it gives depends on the number of frames.
    """
    device = transformer.device
    num_coarse, num_fine = transformer.num_coarse_quantizers, transformer.num_fine_quantizers
    width = 2 * (num_coarse + num_fine) - 1  # differences of quantizers
    frames = torch.arange(num_frames, device=device)[:, None]
    coarse = frames * width + torch.arange(num_coarse, device=device)
    fine = frames * width + torch.arange(num_coarse, num_coarse + num_fine, device=device)
    start = frames.new_zeros(1)
    codes = torch.cat((start, coarse.flatten(), start, fine.flatten()))
    if transformer.pos_bias_mlp is None:
        return PositionBias(None, codes)

    heights = torch.arange(2 * num_frames - 1, device=device)
    inputs = torch.cartesian_prod(heights, torch.arange(width, device=device))
    dtype = next(transformer.pos_bias_mlp.parameters()).dtype
    table = at_least_float32(_run_mlp(transformer.pos_bias_mlp, inputs.to(dtype)).t()).contiguous()
    is_start = torch.zeros_like(codes)
    is_start[0] = is_start[1 + num_frames * num_coarse] = 1
    return PositionBias(
        table,
        codes,
        zero=(num_frames - 1) * width + num_coarse + num_fine - 1,
        across=at_least_float32(transformer.null_pos_bias[:, 0]),
        query_groups=is_start,
        key_groups=2 * is_start,
    )
