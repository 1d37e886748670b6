import pytest
import torch
import torch.nn.functional as F

from musiclm_pytorch import kernels
from musiclm_pytorch.kernels import plain_kernels
from musiclm_pytorch.mulan.layers import FeedForward, Linear, Transformer


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN's product wherever there is one, for small sizes and on any processor."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip('PyTorch was built without oneDNN')
    monkeypatch.setattr(kernels, 'MIN_MULTIPLICATIONS', 0)
    monkeypatch.setattr(kernels, 'has_slow_float32', lambda: True)


@pytest.mark.parametrize('shape', [(5, 7, 33), (1, 1, 33), (3, 33), (2, 3, 5, 33)])
@pytest.mark.parametrize('strided', [False, True])
def test_onednn_product_equals_pytorchs(shape, strided, onednn):
    layer, x = Linear(33, 19), torch.randn(*shape[:-1], 66)[..., ::2] if strided else torch.randn(shape)
    x.requires_grad_()
    weight = torch.randn(*shape[:-1], 19)

    results = []
    for compute in (lambda x: F.linear(x, layer.weight), layer):
        out = compute(x)
        assert out.layout == torch.strided
        results.append((out, *torch.autograd.grad((out * weight).sum(), (x, layer.weight))))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_onednn_product_follows_autocast_and_freezing(onednn):
    layer, x = Linear(8, 4), torch.randn(3, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.weight.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(3, -1))
    assert layer.weight.grad is None


def test_a_transformer_through_onednn_is_the_same(onednn):
    transformer, x = Transformer(dim=16, depth=2, dim_head=4, heads=2), torch.randn(2, 5, 16, requires_grad=True)

    def results():
        out = transformer(x)[-1]
        return out, *torch.autograd.grad(out.square().sum(), (x, *transformer.parameters()))

    with plain_kernels():
        expected = results()
    for checkpoint in (False, True):
        transformer.checkpoint_activations = checkpoint
        torch.testing.assert_close(results(), expected, atol=1e-4, rtol=1e-4)


def test_products_can_be_differentiated_twice_by_plain_kernels(onednn):
    layer, x = FeedForward(6), torch.randn(2, 3, 6, requires_grad=True)
    with plain_kernels():
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (twice,) = torch.autograd.grad(gradient.square().sum(), x)
    assert twice.isfinite().all()
    assert twice.abs().max() > 0


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
