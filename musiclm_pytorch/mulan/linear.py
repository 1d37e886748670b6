"""The one place that picks how a matrix product of a layer is computed."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from musiclm_pytorch.mulan.kernels import fast_kernels_allowed

# below this many multiplications a call costs more than it saves
MIN_MULTIPLICATIONS = 2**24


@cache
def has_fast_float32() -> bool:
    """Whether float32 products should go through oneDNN rather than MKL, which is what PyTorch calls.

    MKL keeps its AVX-512 code for Intel's processors; on others with AVX-512, oneDNN is about twice as fast.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == 'AVX512'
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    )


class Linear(nn.Linear):
    """`nn.Linear` without a bias, through the faster library where float32 runs on a CPU.

    A subclass, so that tools which go by the exact type of a layer have to be told of it, such as
    `torch.ao.quantization.quantize_dynamic(mulan, {Linear})`.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.device.type == 'cpu'
            and x.dtype == self.weight.dtype == torch.float32
            and x.numel() * self.out_features >= MIN_MULTIPLICATIONS
            and torch.backends.mkldnn.enabled
            and not torch.is_autocast_enabled('cpu')
            and has_fast_float32()
            and fast_kernels_allowed()
        ):
            return _OneDNNLinear.apply(x, self.weight)
        return super().forward(x)


class _OneDNNLinear(torch.autograd.Function):
    """x Wᵀ and its gradients, each through oneDNN."""

    @staticmethod
    def forward(ctx, x, weight):
        x = x.contiguous()  # of rows with gaps between them, the gradient of the weight takes a hundred times as long
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _product(grad.contiguous().flatten(0, -2).t(), x.flatten(0, -2).t())
        return grad_x, grad_weight


def _product(x: Tensor, weight: Tensor) -> Tensor:
    # the operator that torch.compile emits for linear layers on a CPU
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, 'none', [], '')
