"""x Wᵀ in float32 on a CPU, through the faster of the two libraries that PyTorch carries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.kernels import fast_kernels_allowed
from musiclm_pytorch.kernels.processor import has_slow_float32

# below this many multiplications a call costs more than it saves
MIN_MULTIPLICATIONS = 2**27


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)`, with a gradient that cannot be differentiated again where oneDNN computes it."""
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
