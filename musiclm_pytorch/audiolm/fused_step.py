"""The Python side of `step_kernel.py`: where it can run, and the jobs it is given."""

from __future__ import annotations

import ctypes
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from musiclm_pytorch.audiolm.cached_transformer import Cache, CachedTransformer

# Up to so many rows, the weights' way through the memory takes longer than the arithmetic.
MOST_ROWS = 16
# Features or multiplications for which another thread is worth its share of the barriers.
DIM_A_THREAD = 64
WORK_A_THREAD = 2**15


@cache
def _kernel() -> tuple[ModuleType, ctypes._CFuncPtr]:
    from musiclm_pytorch.audiolm import step_kernel

    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return step_kernel, kind(('GOMP_parallel', ctypes.CDLL(None)))


def in_rows(weight: Tensor) -> Tensor:
    """A copy of a weight (out, in) as the kernel reads it: zeros behind each row, up to a multiple of its loops."""
    pad_to = _kernel()[0].PAD_TO
    return F.pad(weight, (0, -weight.shape[1] % pad_to)).contiguous()


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ for float32 x (…, padded in) of at most `MOST_ROWS` rows and W (out, padded in) from `in_rows`."""
    kernel, parallel = _kernel()
    num_out, size = weight.shape
    x, out = x.contiguous(), x.new_empty(*x.shape[:-1], num_out)
    num_rows = x.numel() // size
    job = np.array((num_rows, size, num_out, x.data_ptr(), weight.data_ptr(), out.data_ptr()), dtype=np.int64)
    threads = max(1, min(torch.get_num_threads(), weight.numel() // WORK_A_THREAD))
    parallel(kernel.product_task.address, job.ctypes.data, threads, 0)
    return out


class FusedStep:
    """`CachedTransformer.extend` by one token through the kernel. It holds what one generation needs between tokens."""

    def __init__(self, network: CachedTransformer, cache: Cache, batch: int):
        kernel, self.parallel = _kernel()
        self.run, self.cache, self.batch = kernel.token_task.address, cache, batch
        self.threads = max(1, min(torch.get_num_threads(), network.norm.shape[0] // DIM_A_THREAD))
        dim, heads, dim_head = network.norm.shape[0], network.heads, network.dim_head
        hidden, streams, threads = network.feedforwards[0].hidden_norm.shape[0], network.num_streams, self.threads
        width, num_cross = cache.v[0].shape[1], cache.cross_v[0].shape[1] if network.crosses else 0

        def padded(size: int) -> int:
            return size + -size % kernel.PAD_TO

        self.residual = torch.zeros(batch, streams, dim)
        self.output = torch.zeros(batch, dim)
        scratch = {
            kernel.RESIDUAL: self.residual,
            kernel.SPARE: torch.zeros(batch, streams, dim),
            kernel.MIXING: torch.zeros(batch, streams, streams + 2),
            kernel.INPUT: torch.zeros(batch, padded(dim)),
            kernel.NORMED: torch.zeros(batch, padded(dim)),
            kernel.QUERIES: torch.zeros(batch, padded(heads * dim_head)),
            kernel.KEY_VALUE: torch.zeros(batch, 2 * dim_head),
            kernel.FIRST_VALUES: torch.zeros(batch, dim_head),
            kernel.ATTENDED: torch.zeros(batch, padded(heads * dim_head)),
            kernel.OUTPUT: self.output,
            kernel.BOTH: torch.zeros(batch, 2 * hidden),
            kernel.GATED: torch.zeros(batch, padded(hidden)),
            kernel.SCORES: torch.zeros(threads, heads, max(width, num_cross)),
            kernel.MASK: torch.zeros(batch, width) if cache.mask is None else cache.mask.contiguous(),
            kernel.CROSS_BIAS: cache.cross_bias.expand(batch, 1, num_cross).contiguous(),
            kernel.NO_BIAS: torch.zeros(heads, num_cross),
            kernel.FINAL_GAMMA: network.norm.gamma,
            kernel.FINAL_BETA: network.norm.beta,
        }
        self.table = self._addresses(kernel, network, cache)

        self.job, self.kernel = np.zeros(kernel.NUM_FIELDS, dtype=np.int64), kernel
        sizes = {
            kernel.DIM: dim,
            kernel.HEADS: heads,
            kernel.DIM_HEAD: dim_head,
            kernel.HIDDEN: hidden,
            kernel.STREAMS: streams,
            kernel.LAYERS: len(network.attentions),
            kernel.ROWS: batch,
            kernel.WIDTH: width,
            kernel.MIXES_VALUES: network.mixes_values,
            kernel.CROSS_KEYS: num_cross,
            kernel.TABLE: self.table.ctypes.data,
        }
        for place, value in sizes.items():
            self.job[place] = value
        for place, tensor in scratch.items():
            self.job[place] = tensor.data_ptr()
        self.kept = scratch, network  # the job has their addresses only

    @staticmethod
    def _addresses(kernel: ModuleType, network: CachedTransformer, cache: Cache) -> np.ndarray:
        """Where the weights, keys and values of each layer lie, (layers, columns) int64."""
        table = np.zeros((len(network.attentions), kernel.NUM_COLUMNS), dtype=np.int64)

        def attention(columns, block, k, v):
            columns[kernel.TO_Q], columns[kernel.TO_KV] = block.to_q.weight.data_ptr(), block.to_kv.weight.data_ptr()
            columns[kernel.TO_OUT] = block.to_out.weight.data_ptr()
            columns[kernel.KEYS], columns[kernel.VALUES] = k.data_ptr(), v.data_ptr()

        def around(columns, block):
            if network.num_streams > 1:
                connection = block.connection
                columns[kernel.DYNAMIC], columns[kernel.STATIC], columns[kernel.SCALE] = (
                    it.data_ptr() for it in (connection.dynamic, connection.static, connection.scale)
                )
            columns[kernel.GAMMA], columns[kernel.BETA] = block.norm.gamma.data_ptr(), block.norm.beta.data_ptr()

        for layer, row in enumerate(table):
            around(row[kernel.SELF :], network.attentions[layer])
            attention(row[kernel.SELF :], network.attentions[layer], cache.k[layer], cache.v[layer])
            if network.crosses:
                around(row[kernel.CROSS :], network.crosses[layer])
                attention(row[kernel.CROSS :], network.crosses[layer], cache.cross_k[layer], cache.cross_v[layer])
            block, columns = network.feedforwards[layer], row[kernel.FEEDFORWARD :]
            around(columns, block)
            columns[kernel.TO_HIDDEN], columns[kernel.FROM_HIDDEN] = (
                it.weight.data_ptr() for it in (block.to_hidden, block.to_out)
            )
            norm = block.hidden_norm
            columns[kernel.HIDDEN_GAMMA], columns[kernel.HIDDEN_BETA] = norm.gamma.data_ptr(), norm.beta.data_ptr()
        return table

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (b, 1, d), bias (1, h, at least prefix + length + 1) → (b, 1, d)."""
        self.residual.copy_(x)  # the same to each stream
        job, kernel = self.job, self.kernel
        job[kernel.AT] = self.cache.prefix + self.cache.length
        job[kernel.BIAS], job[kernel.BIAS_WIDTH] = bias.data_ptr(), bias.stride(1)
        self.parallel(self.run, job.ctypes.data, self.threads, 0)
        self.cache.length += 1
        return self.output[:, None].clone()
