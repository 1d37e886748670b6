import pytest
import torch
import torch.nn.functional as F

from musiclm_pytorch.mulan import linear
from musiclm_pytorch.mulan.kernels import plain_kernels
from musiclm_pytorch.mulan.layers import Attention, FeedForward, LayerNorm, Transformer, directions, l2norm
from musiclm_pytorch.mulan.linear import Linear


@pytest.mark.parametrize('shape', [(5, 7, 33), (1, 1, 33), (3, 33), (2, 3, 5, 33)])
@pytest.mark.skipif(not linear.has_fast_float32(), reason='oneDNN has no AVX-512 here, so the product is PyTorch’s')
def test_onednn_product_equals_pytorchs(shape, monkeypatch):
    monkeypatch.setattr(linear, 'MIN_MULTIPLICATIONS', 0)
    layer, x = Linear(33, 19), torch.randn(shape, requires_grad=True)
    weight = torch.randn(*shape[:-1], 19)

    results = []
    for compute in (lambda x: F.linear(x, layer.weight), layer):
        out = compute(x)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (x, layer.weight))))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not linear.has_fast_float32(), reason='oneDNN has no AVX-512 here, so the product is PyTorch’s')
def test_onednn_product_follows_autocast_and_freezing(monkeypatch):
    monkeypatch.setattr(linear, 'MIN_MULTIPLICATIONS', 0)
    layer, x = Linear(8, 4), torch.randn(3, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.weight.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(3, -1))
    assert layer.weight.grad is None


def test_layer_norm_has_a_gain_and_no_bias():
    norm, x = LayerNorm(6), torch.randn(2, 6)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (6,)))
    assert [name for name, _ in norm.named_parameters()] == ['learned_gamma']
    assert not list(LayerNorm(6, scale=False).parameters())


def test_queries_and_keys_are_normalised():
    attention, x = Attention(dim=16, dim_head=4, heads=2), torch.randn(1, 5, 16)
    before = attention(x)
    with torch.no_grad():
        attention.to_q.weight.mul_(100.0)
    torch.testing.assert_close(attention(x), before, atol=1e-5, rtol=1e-4)


def test_feed_forward_is_two_thirds_as_wide():
    assert FeedForward(12, mult=4)[4].weight.shape == (12, 32)


def test_every_layer_is_returned():
    layers = Transformer(dim=16, depth=3, dim_head=4, heads=2)(torch.randn(2, 5, 16))
    assert [layer.shape for layer in layers] == [(2, 5, 16)] * 3


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        (dict(depth=0), 'depth must be greater than 0, got 0'),
        (dict(heads=-1), 'heads must be greater than 0, got -1'),
        (dict(attn_dropout=1.0), r'attn_dropout must lie in \[0, 1\), got 1.0'),
    ],
)
def test_bad_sizes(keywords, message):
    with pytest.raises(ValueError, match=message):
        Transformer(**{**dict(dim=16, depth=1), **keywords})


@pytest.mark.parametrize('with_gain', [False, True])
@pytest.mark.parametrize('shape', [(3, 2, 5, 7), (1, 4), (2, 1, 1, 3)])
def test_directions_equal_the_steps_written_out(shape, with_gain):
    t = torch.randn(shape).transpose(-2, 0).requires_grad_()  # not contiguous
    gain = torch.randn(shape[-1] if t.shape[-1] == shape[-1] else t.shape[-1], requires_grad=True)
    leaves = [t, gain] if with_gain else [t]
    weight = torch.randn_like(t)
    results = []
    for compute in (lambda t, gain=1.0: l2norm(t) * gain, directions):
        out = compute(*leaves)
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_directions_in_half_precision_and_of_nothing():
    t, gain = torch.randn(5, 9, dtype=torch.bfloat16, requires_grad=True), torch.randn(9, requires_grad=True)
    found, wanted = directions(t, gain), l2norm(t.detach().float()) * gain
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.02, rtol=0.02)
    zero = torch.zeros(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(directions(zero).sum(), zero)
    assert (directions(zero) == 0).all()
    assert gradient.isfinite().all()


def test_directions_can_be_differentiated_twice_by_plain_kernels():
    t = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with plain_kernels():
        assert torch.autograd.gradgradcheck(directions, t)
