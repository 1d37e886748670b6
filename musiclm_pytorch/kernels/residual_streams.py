"""Width and depth connections of residual streams (hyper-connections, arXiv 2409.19606), on a CPU fast.

Around each branch, a token's streams are mixed by a small matrix of its own. The streams of a token lie together,
`(b, n, s, d)`, as those products take them, and gradients are written out: autograd over the steps in between costs
more than the products of the layers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from musiclm_pytorch.kernels import fast_kernels_allowed

TINY = 1e-12  # norms are at least that, as in `F.normalize`

# under autocast, streams and weights stay in float32
in_float32 = partial(torch.amp.custom_fwd, device_type='cpu', cast_inputs=torch.float32)
as_forward = partial(torch.amp.custom_bwd, device_type='cpu')


def mix(x: Tensor, projection: Tensor, static: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighs and adds the residual streams of each token, by weights that depend on the token.

    Args:
        x: `(b, n, s, d)`.
        projection, static, scale: `(d, k)`, `(s, k)` and `(k,)`, where the k = s + 2 weights of a stream go to the
            branch, to each of the s streams, and to what the branch will give:
            weights = tanh(projection of x at length 1) * scale + static.

    Returns:
        what the branch takes, `(b, n, d)`, the mixed streams, and `beta (b, n, s)`, which `add` takes.
    """
    if torch.is_grad_enabled() and _is_fast(x):
        return _Mix.apply(x, projection, static, scale)
    return plain_mix(x, projection, static, scale)


def plain_mix(x: Tensor, projection: Tensor, static: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        x, projection, static, scale = (it.to(torch.promote_types(it.dtype, torch.float32)) for it in
                                        (x, projection, static, scale))  # fmt: skip
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=TINY)
        weights = torch.addcmul(static, ((x @ projection) / norm).tanh(), scale)
        sums = torch.bmm(weights[..., :-1].flatten(0, 1).mT, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return sums[:, :, 0], sums[:, :, 1:], weights[..., -1]


def add(y: Tensor, x: Tensor, beta: Tensor) -> Tensor:
    """`y (b, n, d)`, weighted by `beta (b, n, s)`, to each of the streams `x (b, n, s, d)`."""
    if torch.is_grad_enabled() and _is_fast(x):
        return _Add.apply(y, x, beta)
    return torch.addcmul(x, beta[..., None], y.to(x.dtype)[:, :, None])


def _is_fast(x: Tensor) -> bool:
    return x.device.type == 'cpu' and fast_kernels_allowed()


class _Mix(torch.autograd.Function):
    """`plain_mix` with its gradient."""

    @staticmethod
    @in_float32
    def forward(ctx, x, projection, static, scale):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        projected = (x @ projection).div_(norm.clamp(min=TINY))
        weights = torch.addcmul(static, projected.tanh(), scale)
        # of all sums but the one for beta, `(b n, s + 1, d)`
        sums = torch.bmm(weights[..., :-1].flatten(0, 1).mT, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        ctx.save_for_backward(x, projection, scale, norm, projected, weights)
        # the mixed streams stay where they are: what comes next reads them once, and writes its sums anew
        return sums[:, :, 0].contiguous(), sums[:, :, 1:], weights[..., -1].contiguous()

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, grad_input, grad_mixed, grad_beta):
        x, projection, scale, norm, projected, weights = ctx.saved_tensors
        to_branch, to_streams = weights[..., :1].flatten(0, 1), weights[..., 1:-1].flatten(0, 1)
        streams, grad_input, grad_mixed = x.flatten(0, 1), grad_input.flatten(0, 1), grad_mixed.flatten(0, 1)
        grad_weights = torch.cat(
            (
                torch.linalg.vecdot(streams, grad_input[:, None])[..., None],
                torch.bmm(streams, grad_mixed.mT),
                grad_beta.flatten(0, 1)[..., None],
            ),
            dim=-1,
        ).view_as(weights)

        act, length = projected.tanh(), norm.clamp(min=TINY)
        grad_projected = grad_weights * scale * (1 - act.square())
        # a change along x leaves x at length 1 as it is
        along = -(grad_projected * projected).sum(dim=-1, keepdim=True) / length.square()
        along.masked_fill_(norm < TINY, 0)
        grad_projected /= length

        grad_x = torch.bmm(to_streams, grad_mixed).baddbmm_(to_branch, grad_input[:, None]).view_as(x)
        grad_x.addcmul_(along, x).flatten(0, 2).addmm_(grad_projected.flatten(0, 2), projection.T)
        grad_projection = x.flatten(0, 2).T @ grad_projected.flatten(0, 2)
        return grad_x, grad_projection, grad_weights.sum(dim=(0, 1)), (grad_weights * act).sum(dim=(0, 1, 2))


class _Add(torch.autograd.Function):
    """`add` with its gradient."""

    @staticmethod
    @in_float32
    def forward(ctx, y, x, beta):
        ctx.save_for_backward(y, beta)
        return torch.addcmul(x, beta[..., None], y[:, :, None])

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, grad):
        y, beta = ctx.saved_tensors
        grad = grad.contiguous()  # that of their sum is one gradient for all streams
        grad_y = torch.bmm(beta.flatten(0, 1)[:, None], grad.flatten(0, 1)).view_as(y)
        return grad_y, grad, torch.linalg.vecdot(grad, y[:, :, None])
