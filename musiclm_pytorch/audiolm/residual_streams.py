"""Residual streams of audiolm-pytorch's transformers (hyper-connections, arXiv 2409.19606), on a CPU fast.

Around each branch, a token's streams are mixed by a small matrix of its own. Here the streams of a token lie together,
`(b, n, s, d)`, as those products take them, and gradients are written out: autograd over the steps in between, and the
copies that bring streams to the front and back, cost more than the products of the layers.
"""

from __future__ import annotations

from functools import partial

import torch
from hyper_connections.hyper_connections import HyperConnections, add
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from musiclm_pytorch.mulan.kernels import fast_kernels_allowed

TINY = 1e-12  # norms are at least that, as in `F.normalize`

# under autocast, streams and weights stay in float32
in_float32 = partial(torch.amp.custom_fwd, device_type='cpu', cast_inputs=torch.float32)
as_forward = partial(torch.amp.custom_bwd, device_type='cpu')


class ResidualStreams:
    """The residual streams of one pass through a `Transformer` of audiolm-pytorch.

    For each of its layers' branches: `enter`, the branch, `leave`. On other devices than CPUs, with a single stream and
    with connections that are set up in another way, the transformer's own modules do it.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self.network = network
        connections = [it for layer in network.layers for it in layer if it is not None]
        self.together = device.type == 'cpu' and fast_kernels_allowed() and all(map(_is_simple, connections))

    def expand(self, x: Tensor) -> Tensor:
        """`(b, n, d)` in each of the streams."""
        if not self.together:
            return self.network.expand_streams(x)
        return x[:, :, None].repeat(1, 1, self.network.layers[0][0].num_residual_streams, 1)

    def reduce(self, streams: Tensor) -> Tensor:
        """The sum of the streams, `(b, n, d)`."""
        return streams.sum(dim=2) if self.together else self.network.reduce_streams(streams)

    def enter(self, connection: nn.Module, streams: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the branch of a connection takes, `(b, n, d)`, the mixed streams, and what else `leave` takes."""
        if not self.together:
            return connection.width_connection(streams)
        gain = (connection.norm.gamma + 1) * connection.norm.scale
        scales = [connection.dynamic_alpha_scale] * connection.dynamic_alpha_fn.shape[1]
        branch_input, mixed, beta = _Mix.apply(
            streams,
            gain[:, None] * torch.cat((connection.dynamic_alpha_fn, connection.dynamic_beta_fn[:, None]), dim=1),
            torch.cat((connection.static_alpha, connection.static_beta[:, None]), dim=1),
            torch.stack((*scales, connection.dynamic_beta_scale)),
        )
        return branch_input, mixed, dict(beta=beta)

    def leave(self, connection: nn.Module, branch_output: Tensor, mixed: Tensor, **rest: Tensor) -> Tensor:
        """The streams with what the branch gave, `(b, n, d)`."""
        if not self.together:
            return connection.depth_connection(branch_output, mixed, **rest)
        return _Add.apply(branch_output, mixed, rest['beta'])


def _is_simple(connection: nn.Module) -> bool:
    """Whether it mixes as the transformers of audiolm-pytorch let it."""
    return (
        type(connection) is HyperConnections
        and connection.num_fracs == connection.num_input_views == 1
        and connection.add_branch_out_to_residual
        and connection.depth_residual_fn is add
        and connection.dropout.p == 0
        and isinstance(connection.act, nn.Tanh)
        and not connection.channel_first
    )


class _Mix(torch.autograd.Function):
    """Weighs and adds the streams of each token, by weights that depend on the token.

    `x (b, n, s, d)`, `projection (d, k)`, `static (s, k)`, `scale (k,)`, where the k = s + 2 weights of a stream go to
    the branch, to each of the s streams, and to what the branch will give:
    weights = tanh(projection of x at length 1) · scale + static.
    """

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
    """`y (b, n, d)`, weighted by `beta (b, n, s)`, to each of the streams `x (b, n, s, d)`."""

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
