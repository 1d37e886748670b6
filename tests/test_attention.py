"""Every kernel against the formula written out."""

import pytest
import torch
from einops import einsum, rearrange

from musiclm_pytorch.kernels import attention
from musiclm_pytorch.kernels.attention import GridBias, attend


def plain(q, k, v, bias=None, mask=None):
    """softmax(q kᵀ + bias) v, one pair of tokens at a time for the bias."""
    scores = einsum(q, k, 'b h i d, b h j d -> b h i j')
    if bias is not None:
        codes = bias.codes.expand(len(q), -1)
        rows = [
            torch.stack([torch.stack([bias.table[:, ci - cj + bias.centre] for cj in c]) for ci in c]) for c in codes
        ]
        scores = scores + rearrange(torch.stack(rows), 'b i j h -> b h i j')
        mask = bias.key_mask()
    if mask is not None:
        scores = scores.masked_fill(~rearrange(mask, 'b j -> b 1 1 j'), -torch.inf)
    return einsum(scores.softmax(dim=-1), v, 'b h i j, b h j d -> b h i d')


def make(batch=3, heads=2, height=3, width=5, keep=None, shared=False, lengths=None, dim=7):
    """Random inputs over a random choice of the positions of a grid."""
    stride, total = 2 * width - 1, height * width
    keep = keep or total
    grid = (torch.arange(height)[:, None] * stride + torch.arange(width)).flatten()
    codes = torch.stack([grid[torch.randperm(total)[:keep]] for _ in range(1 if shared else batch)])
    table = torch.randn(heads, (2 * height - 1) * stride)
    lengths = None if lengths is None else torch.tensor(lengths)
    bias = GridBias(table, codes, (height - 1) * stride + width - 1, lengths)
    q, k, v = torch.randn(3, batch, keep, heads, dim).transpose(2, 3)  # as projections lay them out
    return q, k, v, bias


CASES = {
    'whole grid': dict(),
    'one grid for all': dict(shared=True),
    'patch dropout': dict(keep=11),
    'lengths': dict(keep=13, lengths=[13, 1, 7]),
    'lengths on one grid': dict(shared=True, lengths=[2, 15, 9]),
    'one token': dict(keep=1),
    'one row': dict(height=1, width=9, heads=1, dim=3),
    'one sample': dict(batch=1, keep=14),
}


def kernels():
    return {
        'dense': attention._dense,
        'blockwise': attention._blockwise,
        'flex': attention._flex,
    }


BLOCKS = [2**20, 40, 1]


@pytest.mark.parametrize(
    ('kernel', 'block'), [('dense', 2**20), ('flex', 2**20), *(('blockwise', it) for it in BLOCKS)]
)
@pytest.mark.parametrize('case', CASES)
def test_kernel_equals_formula(kernel, case, block, monkeypatch):
    monkeypatch.setattr(attention, 'BLOCK_ELEMENTS', block)
    monkeypatch.setattr(attention, 'MIN_BLOCK_ROWS', 1)
    q, k, v, bias = make(**CASES[case])
    device = 'cpu'
    if kernel == 'flex' and torch.cuda.is_available():
        device = 'cuda'
        q, k, v, bias.table, bias.codes = (t.to(device) for t in (q, k, v, bias.table, bias.codes))
        bias.lengths = None if bias.lengths is None else bias.lengths.to(device)
    # FlexAttention has no backward pass on a CPU
    leaves = [] if (kernel, device) == ('flex', 'cpu') else [t.requires_grad_() for t in (q, k, v, bias.table)]
    # rows of padding have no meaning: neither compare them nor send a gradient through them
    real = (
        torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=device) if bias.lengths is None else bias.key_mask()
    )
    weight = torch.randn_like(q) * rearrange(real, 'b n -> b 1 n 1')

    results = []
    for compute in (plain, kernels()[kernel]):
        out = compute(q, k, v, bias) * rearrange(real, 'b n -> b 1 n 1')
        results.append((out, *(torch.autograd.grad((out * weight).sum(), leaves) if leaves else ())))
    tolerance = dict(atol=2e-6, rtol=2e-5) if device == 'cpu' else dict(atol=2e-2, rtol=2e-2)
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, **tolerance)


def test_padding_rows_are_finite():
    q, k, v, bias = make(keep=13, lengths=[13, 1, 7])
    for kernel in kernels().values():
        assert kernel(q, k, v, bias).isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    q, k, v, bias = make(keep=11)
    expected = plain(q, k, v, bias)
    out = attend(*(t.to(dtype) for t in (q, k, v)), bias=bias)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('block', BLOCKS)
def test_blocks_in_half_precision(case, block, monkeypatch):
    monkeypatch.setattr(attention, 'BLOCK_ELEMENTS', block)
    monkeypatch.setattr(attention, 'MIN_BLOCK_ROWS', 1)
    q, k, v, bias = make(**CASES[case])
    real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if bias.lengths is None else bias.key_mask()
    weight = torch.randn_like(q) * rearrange(real, 'b n -> b 1 n 1')
    halves = [t.to(torch.bfloat16) for t in (q, k, v)]
    results = []
    for compute, given in ((plain, [t.float() for t in halves]), (attention._blockwise, halves)):
        leaves = [t.detach().requires_grad_() for t in (*given, bias.table)]
        bias.table = leaves[-1]
        out = compute(*leaves[:3], bias) * rearrange(real, 'b n -> b 1 n 1')
        results.append([out, *torch.autograd.grad((out.float() * weight).sum(), leaves)])
    for found, expected in zip(results[1], results[0]):
        torch.testing.assert_close(found.float(), expected, atol=0.06, rtol=0.06)


@pytest.mark.parametrize('masked', [False, True])
def test_short_sequences_in_half_precision_without_a_bias(masked):
    q, k, v = (t.to(torch.bfloat16).requires_grad_() for t in torch.randn(3, 2, 3, 9, 4))
    mask = torch.rand(2, 9) > 0.4 if masked else None
    if masked:
        mask[:, 0] = True
    weight = torch.randn(2, 3, 9, 4)
    results = []
    for compute in (attend, plain):
        leaves = [q, k, v] if compute is attend else [t.detach().float().requires_grad_() for t in (q, k, v)]
        out = compute(*leaves, mask=mask)
        results.append([out, *torch.autograd.grad((out.float() * weight).sum(), leaves)])
    for found, expected in zip(*results):
        torch.testing.assert_close(found.float(), expected, atol=0.06, rtol=0.06)


def test_mask_without_bias_equals_formula():
    q, k, v = torch.randn(3, 2, 3, 9, 4, requires_grad=True).unbind(0)
    mask = torch.rand(2, 9) > 0.4
    mask[:, 0] = True
    torch.testing.assert_close(attend(q, k, v, mask=mask), plain(q, k, v, mask=mask), atol=1e-6, rtol=1e-5)


def test_dropout_drops_weights_and_keeps_the_mean():
    q, k, v, bias = make(batch=1, keep=4)
    out = torch.stack([attend(q, k, v, bias=bias, dropout=0.5) for _ in range(2000)])
    assert (out[0] - out[1]).abs().max() > 0.01
    error = out.mean(dim=0) - plain(q, k, v, bias)
    assert error.abs().max() < 6 * (out.std(dim=0) / 2000**0.5).max()
