"""The C++ between the products of a layer against the plain operators of `TorchParts`, on odd sizes."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_mulan
from test_attention import make

from musiclm_pytorch.inference import fast_layers, native_layers
from musiclm_pytorch.inference.config import InferenceConfig
from musiclm_pytorch.inference.fast_layers import TorchParts
from musiclm_pytorch.inference.native_layers import NativeParts, can_compile
from musiclm_pytorch.inference.optimize import OptimizedMuLaN

pytestmark = pytest.mark.skipif(not can_compile(), reason='no compiler, or no AVX-512')

# what rounding to the numbers that the next product takes may change, of the largest
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.uint8: 1 / 250}


@pytest.fixture(params=[(torch.float32, False), (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)])
def native(request):
    if not NativeParts.serves(*request.param):
        pytest.skip('this processor has no instructions for it')
    return NativeParts(*request.param)


@pytest.fixture
def plain():
    return TorchParts(torch.float32, int8=False, keep_bias=False, compiled=False)


def product(native, *shape):
    """What a product may give, and its scale where products are of bytes."""
    dtype = torch.bfloat16 if native.half else torch.float32
    return torch.randn(shape).to(dtype), torch.rand(*shape[:-1], 1) + 0.5 if native.int8 else None


def close(found, wanted, native, factor=1.0):
    """Found is a result and its scale; wanted float32."""
    result, scale = found
    assert result.dtype == native.takes
    assert (scale is None) == (not native.int8)
    number = result.float() if scale is None else (result.float() - 128) * scale
    limit = factor * ROUNDING[native.takes] * wanted.abs().max()
    torch.testing.assert_close(number, wanted, atol=limit.item(), rtol=0)


@pytest.mark.parametrize('dim', [1, 7, 40, 257])
def test_norms_and_sums(native, plain, dim):
    x, gamma = 3 * torch.randn(2, 5, dim) + 1, torch.randn(dim)
    close(native.normed(x, gamma), plain.normed(x, gamma)[0], native)
    added, scale = product(native, 2, 5, dim)
    total, *normed = native.added_and_normed(x, added, scale, gamma)
    wanted, wanted_normed, _ = plain.added_and_normed(x, added.float(), scale, gamma)
    torch.testing.assert_close(total, wanted)
    close(normed, wanted_normed, native)
    torch.testing.assert_close(native.added(x, added, scale), wanted)


@pytest.mark.parametrize('inner', [1, 19, 64, 171])
def test_gates(native, plain, inner):
    both, scale = product(native, 3, 4, 2 * inner)
    both[0] *= 30  # where GELU is 0, or what it is given
    both[1] *= 1e-3
    for item in range(3):
        given = None if scale is None else scale[item]
        close(native.gated(both[item], given), plain.gated(both[item].float(), given)[0], native)


CASES = {
    'one grid': dict(shared=True),
    'wide grid in order': dict(shared=True, width=40),  # whose codes follow each other
    'positions of each item': dict(),
    'lengths': dict(shared=True, lengths=[2, 15, 9]),
    'patch dropout': dict(keep=13, lengths=[13, 1, 7]),
}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize(('heads', 'dim_head'), [(2, 4), (3, 7), (1, 65), (2, 64)])
def test_attention_with_a_position_bias(native, plain, case, heads, dim_head):
    """On a grid and on some of its patches, in one length and in several; heads that are no whole vectors or tiles."""
    *_, bias = make(**CASES[case], heads=heads)
    if 'order' in case:
        bias.codes = bias.codes.sort().values
    check_attention(native, plain, bias.codes.shape[1], heads, dim_head, bias, None)


@pytest.mark.parametrize('n', [1, 6, 63, 64, 65, 200])
def test_attention_with_a_mask(native, plain, n):
    mask = torch.rand(3, n) < 0.6
    mask[:, 0] = True
    check_attention(native, plain, n, 2, 16, None, mask)
    check_attention(native, plain, n, 2, 16, None, None)


def check_attention(native, plain, n, heads, dim_head, bias, mask):
    torch.manual_seed(0)
    (q, scale), (kv, _) = product(native, 3, n, heads * dim_head), product(native, 3, n, 2 * heads * dim_head)
    gain, x = 4 * torch.rand(dim_head), torch.zeros(3, n, 1)
    found = native.attended(q, kv, scale, gain, heads, native.keys(x, bias, mask))
    wanted, _ = plain.attended(q.float(), kv.float(), scale, gain, heads, plain.keys(x, bias, mask))
    real = None if bias is None else bias.key_mask()
    if real is not None:
        found = found[0].masked_fill(~real[..., None], 128 if native.int8 else 0), found[1]
        wanted = wanted.masked_fill(~real[..., None], 0.0)
    # queries and keys are rounded too, and scores are up to 4 * sqrt(dim_head) of them
    close(found, wanted, native, factor=1 if native.takes == torch.float32 else 4)


def test_attention_to_nothing_is_finite(native):
    q, kv = product(native, 2, 5, 8), product(native, 2, 5, 16)
    keys = native.keys(torch.zeros(2, 5, 1), None, torch.tensor([[False] * 5, [True] * 5]))
    result, _ = native.attended(q[0], kv[0], q[1], torch.ones(4), 2, keys)
    assert result.float().isfinite().all()


def test_scores_far_apart_neither_overflow_nor_vanish(native, plain):
    """A bias of many thousands, as a model that has gone astray may have it."""
    *_, bias = make(shared=True)
    bias.table *= 1e4
    check_attention(native, plain, bias.codes.shape[1], 2, 8, bias, None)


def test_all_threads_compute_one_thing(native):
    (q, scale), (kv, _) = product(native, 3, 70, 24), product(native, 3, 70, 48)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            keys = native.keys(torch.zeros(3, 70, 1), None, None)
            results.append(native.attended(q, kv, scale, torch.ones(8), 3, keys)[0])
        finally:
            torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_cannot_be_compiled_is_told_and_left_to_torch(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(native_layers, 'FLAGS', [*native_layers.FLAGS, '-include', 'nowhere.h'])
    monkeypatch.setattr(native_layers, 'library', native_layers.library.__wrapped__)
    assert not NativeParts.serves(torch.float32, False)
    assert 'nowhere.h' in caplog.text
    assert not list(tmp_path.rglob('*.*'))  # nothing half-made
    config = InferenceConfig(compile_model=True, use_mixed_precision=False, device='cpu')
    layers = OptimizedMuLaN(tiny_mulan(), config).mulan.audio.transformer
    assert isinstance(layers.parts, fast_layers.TorchParts)


def test_it_is_compiled_once(tmp_path):
    """Two processes at a time, and a third that finds what they made."""
    script = 'from musiclm_pytorch.inference.native_layers import library; print(library()._name)'
    command, environment = [sys.executable, '-c', script], {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = {process.communicate()[0].strip() for process in both}
    (made,) = tmp_path.rglob('*.*')
    assert names == {str(made)}
    before = made.stat().st_mtime_ns
    third = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert third == str(made)
    assert made.stat().st_mtime_ns == before
