"""Causal attention by blocks and whole beside audiolm-pytorch's own: values and gradients."""

import pytest
import torch

from musiclm_pytorch.audiolm.convert import audiolm_pytorch
from musiclm_pytorch.kernels.attention import BLOCK, block_causal_attention, causal_blocks, plain_attention


def genuine_attend():
    return audiolm_pytorch().attend.Attend(causal=True)


def in_blocks(bias):
    """Of `(h, n, n)`, what `block_causal_attention` takes."""
    n = bias.shape[1]
    return [bias[:, start:stop, :stop] for start, stop, _ in causal_blocks(n, n)]


@pytest.mark.parametrize('n', [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize(
    ('prefix', 'masked', 'biased'), [(0, False, False), (3, True, False), (3, False, True), (0, True, True)]
)
def test_values_and_gradients(n, prefix, masked, biased):
    q = torch.randn(2, 3, n, 8, requires_grad=True)
    k, v = (torch.randn(2, n + prefix, 8, requires_grad=True) for _ in range(2))
    mask = (torch.rand(2, n + prefix) > 0.4).index_fill(1, torch.tensor([0]), True) if masked else None
    bias = torch.randn(3, n, n, requires_grad=True) if biased else None
    leaves = [q, k, v, *([bias] if biased else [])]
    whole = torch.nn.functional.pad(bias, (prefix, 0)) if biased else None
    outs = (
        genuine_attend()(q, k, v, mask=mask, attn_bias=whole),
        block_causal_attention(q, k, v, mask, in_blocks(bias) if biased else None),
        plain_attention(q, k, v, mask, bias),
        plain_attention(q, k, v, mask, bias, fused=True),
    )
    weight = torch.randn(2, 3, n, 8)
    results = [(out, *torch.autograd.grad((out * weight).sum(), leaves)) for out in outs]
    for expected, *others in zip(*results):
        for found in others:
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        found = block_causal_attention(q, k, v, mask, in_blocks(bias) if biased else None)
    torch.testing.assert_close(found, outs[0], atol=2e-5, rtol=1e-4)


def test_double_precision_gradients():
    q = torch.randn(1, 2, BLOCK + 2, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, BLOCK + 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(2, BLOCK + 2, BLOCK + 2, dtype=torch.float64, requires_grad=True)
    outs = block_causal_attention(q, k, v, bias=in_blocks(bias)), genuine_attend()(q, k, v, attn_bias=bias)
    for found, expected in zip(*(torch.autograd.grad(out.sin().sum(), (q, k, v, bias)) for out in outs)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_autocast_multiplies_in_half_precision_alone():
    q = torch.randn(2, 3, BLOCK + 5, 8, requires_grad=True)
    k, v = (torch.randn(2, BLOCK + 5, 8, requires_grad=True) for _ in range(2))
    bias = torch.randn(3, BLOCK + 5, BLOCK + 5, requires_grad=True)
    expected = genuine_attend()(q, k, v, attn_bias=bias)
    wanted = torch.autograd.grad(expected.sin().sum(), (q, k, v, bias))
    with torch.autocast('cpu', torch.bfloat16):
        found = block_causal_attention(q, k, v, bias=in_blocks(bias))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
    for gradient, own in zip(torch.autograd.grad(found.float().sin().sum(), (q, k, v, bias)), wanted):
        assert gradient.dtype == torch.float32
        assert (gradient - own).norm() < 0.02 * own.norm()
