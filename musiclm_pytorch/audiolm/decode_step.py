"""A single token of a few rows through a `Transformer`, faster than operator by operator: what decoding waits for.

`step_for` gives what computes it, or None where the transformer's own `forward`, the plain form, does as well.
"""

from __future__ import annotations

import sys
import weakref
from functools import partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from musiclm_pytorch.audiolm.transformer import Cache, PositionBias, Step, Transformer
from musiclm_pytorch.kernels import fast_kernels_allowed
from musiclm_pytorch.kernels.processor import computes_in_bf16

# Up to so many rows, the weights' way through the memory takes longer than the arithmetic.
MOST_ROWS = 16
# Features for which another thread is worth its share of the barriers.
DIM_A_THREAD = 64
# Tokens of a sample times parameters for which loading the kernel, a second or two, pays. What it computes may differ
# in the last bits, so this depends on what is asked for alone: the same again is computed in the same way.
WORTH_LOADING = 5e8
# Parameters of a stage that no cache holds beside all else, so that half of their bytes is half of the time.
WORTH_HALVING = 2**22
FLOAT32 = dict(dtype=torch.float32, device='cpu')  # what the kernel reads and writes, whatever the default is
MASKED = -1e30  # added to the score of a key that is not seen; finite, for a query may see no key at all


def fastest_dtype(stage: nn.Module) -> torch.dtype:
    """That of the weights in which a stage decodes fastest: bfloat16 for a large one, on a CPU that computes in it."""
    weights = list(stage.parameters())
    gains = weights[0].device.type == 'cpu' and sys.platform == 'linux' and computes_in_bf16()
    is_large = sum(it.numel() for it in weights) >= WORTH_HALVING
    return torch.bfloat16 if gains and is_large else weights[0].dtype


def step_for(transformer: Transformer, cache: Cache, rows: int, tokens: int, compile: bool = False) -> Step | None:
    """What takes `(b, 1, d)` of the token after those in the cache, and the position bias, to its features `(b, 1, d)`.

    tokens: how many of a sample are made in all
    compile: by torch.compile at fixed shapes, on a GPU as a CUDA graph, recorded here and now
    """
    if compile:
        return FixedStep(transformer, cache, rows)
    weights = list(transformer.parameters())
    if sum(it.numel() for it in weights) * tokens < WORTH_LOADING or rows > MOST_ROWS:
        return None
    if any(map(parametrize.is_parametrized, transformer.modules())):  # adapters: the weights lie nowhere
        return None
    if any(type(it) is not nn.Parameter for it in weights):  # quantized from outside, as by torchao
        return None
    if any(it.device.type != 'cpu' or not it.is_contiguous() for it in weights):
        return None
    if {it.dtype for it in weights} not in ({torch.float32}, {torch.bfloat16}):
        return None
    return FusedStep(transformer, cache, rows) if fast_kernels_allowed() and sys.platform == 'linux' else None


class FixedStep:
    """At shapes that stay the same, to be compiled, and recorded on a GPU: each token looks at all places."""

    def __init__(self, transformer: Transformer, cache: Cache, rows: int):
        self.cache, places = cache, cache.keys[0].shape[1]
        device = cache.keys[0].device
        cache.at = torch.tensor([cache.ahead + cache.length], device=device)
        self.x = torch.zeros(rows, 1, transformer.dim, dtype=torch.float32, device=device)
        self.bias = torch.zeros(transformer.heads, 1, places - cache.ahead, dtype=torch.float32, device=device)
        self.run = partial(torch.compile(transformer.run), self.x, self.bias, cache)
        self.graph = None
        if device.type == 'cuda':
            # What this writes into the cache at `at` is written over by the first token.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.run()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.features = self.run()

    def __call__(self, x: Tensor, bias: PositionBias) -> Tensor:
        """Valid until the next call."""
        self.x.copy_(x)
        if bias.table is not None:
            row = bias.row(self.cache.length)[:, : self.bias.shape[-1]]
            self.bias[:, 0, : row.shape[-1]] = row
        self.cache.at.fill_(self.cache.ahead + self.cache.length)
        self.cache.length += 1
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.features


class FusedStep:
    """By `step_kernel.py`, as one call that threads share, on a CPU, with the weights in place.

    These are float32 or bfloat16; sums, keys and values are float32.
    """

    def __init__(self, transformer: Transformer, cache: Cache, rows: int):
        from musiclm_pytorch.kernels import step_kernel as kernel  # numba takes a second

        # not to own what owns this, so that its threads end as soon as nobody needs them
        self.cache, self.kernel = weakref.proxy(cache), kernel
        layers = [[None if it is None else (it.branch, mix) for it, mix in zip(layer, mixing)]
                  for layer, mixing in zip(transformer.layers, cache.mixing)]  # fmt: skip
        dim, heads, dim_head = transformer.dim, transformer.heads, transformer.dim_head
        hidden, streams = layers[0][2][0][5].in_features, transformer.num_residual_streams
        threads = max(1, min(torch.get_num_threads(), dim // DIM_A_THREAD))
        weights = str(transformer.norm.gamma.dtype).removeprefix('torch.')
        self.reads = getattr(torch, kernel.inputs_of(weights))
        self.crew = kernel.Crew(threads, weights)
        places, num_cross = cache.keys[0].shape[1], cache.cross[0][0].shape[1] if cache.cross else 0

        def additive(mask: Tensor | None, size: int) -> Tensor:
            shown = torch.zeros(rows, size, **FLOAT32)
            return shown if mask is None else shown.masked_fill_(~mask, MASKED)

        self.residual, self.output = torch.zeros(rows, streams, dim, **FLOAT32), torch.zeros(rows, dim, **FLOAT32)
        self.no_bias = torch.zeros(heads, places, **FLOAT32)
        scratch = {
            kernel.RESIDUAL: self.residual,
            kernel.SPARE: torch.zeros(rows, streams, dim, **FLOAT32),
            kernel.MIXING: torch.zeros(rows, streams, streams + 2, **FLOAT32),
            kernel.INPUT: torch.zeros(rows, dim, **FLOAT32),
            kernel.NORMED: torch.zeros(rows, dim, **FLOAT32),
            kernel.QUERIES: torch.zeros(rows, heads * dim_head, **FLOAT32),
            kernel.KEY_VALUE: torch.zeros(rows, 2 * dim_head, **FLOAT32),
            kernel.FIRST_VALUES: torch.zeros(rows, dim_head, **FLOAT32),
            kernel.ATTENDED: torch.zeros(rows, heads * dim_head, **FLOAT32),
            kernel.OUTPUT: self.output,
            kernel.BOTH: torch.zeros(rows, 2 * hidden, **FLOAT32),
            kernel.GATED: torch.zeros(rows, hidden, **FLOAT32),
            kernel.SCORES: torch.zeros(threads, heads, max(places, num_cross), **FLOAT32),
            kernel.MASK: additive(cache.mask, places),
            kernel.CROSS_MASK: additive(cache.cross_mask, num_cross),
            kernel.FINAL_GAMMA: transformer.norm.gamma.float(),
            kernel.FINAL_BETA: transformer.norm.beta.float(),
        }
        for name in ('INPUT', 'NORMED', 'ATTENDED', 'GATED'):
            own = scratch[getattr(kernel, name)]
            scratch[getattr(kernel, f'READ_{name}')] = own.to(self.reads)  # itself where that is float32
        # the dynamic weights as the kernel reads them, `(k, d)`
        self.mixing = [[None if it is None or it[1] is None else
                        tuple(part.float().contiguous() for part in (it[1][0].t(), *it[1][1:])) for it in layer]
                       for layer in layers]  # fmt: skip
        self.cross = [(k.contiguous(), v.contiguous()) for k, v in cache.cross]
        self.small: list[Tensor] = []  # float32 copies of what is no matrix
        self.table = self._addresses(kernel, layers)

        self.job = np.zeros(kernel.NUM_FIELDS, dtype=np.int64)
        sizes = {
            kernel.DIM: dim,
            kernel.HEADS: heads,
            kernel.DIM_HEAD: dim_head,
            kernel.HIDDEN: hidden,
            kernel.STREAMS: streams,
            kernel.LAYERS: len(layers),
            kernel.ROWS: rows,
            kernel.WIDTH: places,
            kernel.AHEAD: cache.ahead,
            kernel.MIXES_VALUES: transformer.add_value_residual,
            kernel.CROSS_KEYS: num_cross,
            kernel.BIAS: self.no_bias.data_ptr(),
            kernel.BIAS_WIDTH: self.no_bias.stride(0),
            kernel.TABLE: self.table.ctypes.data,
        }
        for place, value in sizes.items():
            self.job[place] = value
        for place, tensor in scratch.items():
            self.job[place] = tensor.data_ptr()
        self.scratch, self.transformer = scratch, transformer  # the job has their addresses only

    def _addresses(self, kernel: ModuleType, layers: list) -> np.ndarray:
        """Where the weights, keys and values of each layer lie, (layers, columns) int64."""
        table = np.zeros((len(layers), kernel.NUM_COLUMNS), dtype=np.int64)

        def put(columns: np.ndarray, **tensors: Tensor) -> None:
            for name, tensor in tensors.items():
                if name in ('GAMMA', 'BETA', 'HIDDEN_GAMMA', 'HIDDEN_BETA'):
                    tensor = tensor.float()
                    self.small.append(tensor)
                columns[getattr(kernel, name)] = tensor.data_ptr()

        for index, (row, layer, mixing) in enumerate(zip(table, layers, self.mixing)):
            pairs = [(self.cache.keys[index], self.cache.values[index]), self.cross[index] if self.cross else None]
            for begin, part, own in zip((kernel.SELF, kernel.CROSS, kernel.FEEDFORWARD), layer, mixing):
                if part is not None and own is not None:
                    put(row[begin:], **dict(zip(('DYNAMIC', 'STATIC', 'SCALE'), own)))
            for begin, part, pair in zip((kernel.SELF, kernel.CROSS), layer, pairs):
                if part is not None:
                    branch = part[0]
                    put(row[begin:], GAMMA=branch.norm.gamma, BETA=branch.norm.beta, KEYS=pair[0], VALUES=pair[1],
                        TO_Q=branch.to_q.weight, TO_KV=branch.to_kv.weight, TO_OUT=branch.to_out[0].weight)  # fmt: skip
            norm, to_hidden, _, hidden_norm, _, to_out = layer[2][0]
            put(row[kernel.FEEDFORWARD :], GAMMA=norm.gamma, BETA=norm.beta, TO_HIDDEN=to_hidden.weight,
                HIDDEN_GAMMA=hidden_norm.gamma, HIDDEN_BETA=hidden_norm.beta, FROM_HIDDEN=to_out.weight)  # fmt: skip
        return table

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b for `x (b, d)`."""
        x, weight = x.to(self.reads).contiguous(), weight.contiguous()
        out = torch.empty(len(x), len(weight), **FLOAT32)
        sizes = len(x), weight.shape[1], len(weight)
        job = np.array((*sizes, *(it.data_ptr() for it in (x, weight, out))), dtype=np.int64)
        self.crew.run(self.kernel.LINEAR, job)
        return out if bias is None else out.add_(bias)

    def __call__(self, x: Tensor, bias: PositionBias) -> Tensor:
        self.residual.copy_(x)  # the same to each stream
        job, kernel = self.job, self.kernel
        job[kernel.AT] = self.cache.ahead + self.cache.length
        if bias.table is not None:
            row = bias.row(self.cache.length)
            job[kernel.BIAS], job[kernel.BIAS_WIDTH] = row.data_ptr(), row.stride(0)
        self.crew.run(kernel.TOKEN, job)
        self.cache.length += 1
        return self.output[:, None].clone()
