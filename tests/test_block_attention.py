"""Causal attention by blocks beside audiolm-pytorch's own: values and gradients, and no change to a state dict."""

import copy

import pytest
import torch
from stage_parts import make_transformer

from musiclm_pytorch.audiolm.block_attention import BLOCK, BlockCausalAttend, use_block_attention


def genuine_attend(**keywords):
    attention = next(it for it in make_transformer('semantic', **keywords).modules() if hasattr(it, 'attend'))
    return attention.attend


@pytest.mark.parametrize('n', [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize('prefix', [0, 3])
@pytest.mark.parametrize(('masked', 'biased'), [(False, False), (True, False), (False, True), (True, True)])
def test_values_and_gradients(n, prefix, masked, biased):
    attend = genuine_attend()
    q = torch.randn(2, 3, n, 8, requires_grad=True)
    k, v = (torch.randn(2, n + prefix, 8, requires_grad=True) for _ in range(2))
    mask = (torch.rand(2, n + prefix) > 0.4).index_fill(1, torch.tensor([0]), True) if masked else None
    bias = torch.randn(3, n, n + prefix, requires_grad=True) if biased else None
    leaves = [q, k, v, *([bias] if biased else [])]
    weight = torch.randn(2, 3, n, 8)
    results = []
    for module in (attend, BlockCausalAttend(attend)):
        out = module(q, k, v, mask=mask, attn_bias=bias)
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_double_precision_gradients():
    block = BlockCausalAttend(genuine_attend())
    q = torch.randn(1, 2, BLOCK + 2, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, BLOCK + 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(2, BLOCK + 2, BLOCK + 2, dtype=torch.float64, requires_grad=True)
    out = [
        torch.autograd.grad(it(q, k, v, attn_bias=bias).sin().sum(), (q, k, v, bias)) for it in (block, block.attend)
    ]
    for found, expected in zip(*out):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_autocast_multiplies_in_half_precision_alone():
    attend = genuine_attend()
    q = torch.randn(2, 3, BLOCK + 5, 8, requires_grad=True)
    k, v = (torch.randn(2, BLOCK + 5, 8, requires_grad=True) for _ in range(2))
    bias = torch.randn(3, BLOCK + 5, BLOCK + 5, requires_grad=True)
    expected = attend(q, k, v, attn_bias=bias)
    wanted = torch.autograd.grad(expected.sin().sum(), (q, k, v, bias))
    with torch.autocast('cpu', torch.bfloat16):
        found = BlockCausalAttend(attend)(q, k, v, attn_bias=bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
    for gradient, own in zip(torch.autograd.grad(found.float().sin().sum(), (q, k, v, bias)), wanted):
        assert gradient.dtype == torch.float32
        assert (gradient - own).norm() < 0.02 * own.norm()


@pytest.mark.parametrize('case', ['dropout', 'flash'])
def test_what_it_leaves_to_the_genuine_one(case, monkeypatch):
    keywords = dict(dropout=dict(attn_dropout=0.5), flash=dict(flash_attn=True)).get(case, {})
    block = BlockCausalAttend(genuine_attend(**keywords))
    calls = []
    monkeypatch.setattr(block.attend, 'forward', lambda q, *_, **__: calls.append(1) or q)
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 4, 8)
    block.train()(q, k, k)
    assert calls
    if case == 'dropout':
        block.eval()(q, k, k)
        assert len(calls) == 1


@pytest.mark.parametrize('stage', ['semantic', 'coarse', 'fine'])
def test_a_transformer_keeps_its_state_dict_and_its_numbers(stage):
    plain = make_transformer(stage, conditioned=True, depth=2)
    fast = copy.deepcopy(plain)
    use_block_attention(fast)
    use_block_attention(fast)
    assert sum(isinstance(it, BlockCausalAttend) for it in fast.modules()) == 2  # cross-attention is left alone
    assert fast.state_dict().keys() == plain.state_dict().keys()
    copy.deepcopy(fast).load_state_dict(plain.state_dict())
    assert next(it for it in fast.modules() if isinstance(it, BlockCausalAttend)).causal is True
    ids = torch.randint(12, (2, 160))
    given = dict(
        semantic=dict(ids=ids),
        coarse=dict(semantic_token_ids=ids, coarse_token_ids=ids),
        fine=dict(coarse_token_ids=ids, fine_token_ids=ids),
    )[stage]
    outs = []
    for model in (plain, fast):
        logits = model(**given, text_embeds=torch.ones(2, 3, 16), cond_drop_prob=0.0)
        logits = logits if isinstance(logits, tuple) else (logits,)
        sum(it.square().mean() for it in logits).backward()
        outs.append([*logits, *(it.grad for it in model.parameters())])
    for expected, found in zip(*outs):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
