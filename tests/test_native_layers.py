"""The C++ between the products of a layer against the plain operators of `TorchParts`, on odd sizes."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_mulan
from test_attention import make

from musiclm_pytorch.inference import fast_layers, native_layers, optimize
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
    return torch.randn(shape).to(native.dtype), torch.rand(*shape[:-1], 1) + 0.5 if native.int8 else None


def number_of(found):
    result, scale = found
    return result.float() if scale is None else (result.float() - 128) * scale


def close(found, wanted, native, factor=1.0):
    """Found is a result and its scale; wanted float32."""
    result, scale = found
    assert result.dtype == native.takes
    assert (scale is None) == (not native.int8)
    limit = factor * ROUNDING[native.takes] * wanted.abs().max()
    torch.testing.assert_close(number_of(found), wanted, atol=limit.item(), rtol=0)


@pytest.mark.parametrize('dim', [1, 7, 40, 257])
def test_norms_and_sums(native, plain, dim):
    x, gamma = 3 * torch.randn(2, 5, dim) + 1, torch.randn(dim)
    x[0, 0] *= 1e-3  # whose variance is of the size of what is added to it
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
    # whose codes follow each other up to a multiple of a vector, one less, and one more
    'wide grid in order': dict(shared=True, width=32),
    'narrow grid in order': dict(shared=True, width=15),
    'odd grid in order': dict(shared=True, width=17),
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
    keys = native.keys(x, bias, mask)
    native.attended(q, kv, scale, gain, heads, keys)
    keys.memory.fill_(0xFF)  # all of it NaN, of which nothing may be left
    found = native.attended(q, kv, scale, gain, heads, keys)
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


def test_the_weights_are_a_softmax(native, plain):
    """Of the bias alone, which is exact, and read off values that are ones: what is left is the power of 2."""
    n = 16
    *_, bias = make(shared=True, batch=1, heads=1, height=1, width=n)
    bias.table *= 3
    kv = torch.cat([torch.randn(1, n, n), torch.eye(n)[None]], dim=-1).to(native.dtype)
    q, scale = product(native, 1, n, n)
    scale = None if scale is None else torch.ones_like(scale)
    found = number_of(native.attended(q, kv, scale, torch.zeros(n), 1, native.keys(q, bias, None)))
    wanted = bias.dense()[0].softmax(dim=-1)
    if native.int8:
        torch.testing.assert_close(found, wanted, atol=1 / 200, rtol=0)
    elif native.dtype == torch.float32:
        torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-6)
    else:
        # two roundings to eight bits, each of 0.17 % on average
        assert (found / wanted - 1).square().mean().sqrt() < 0.0028


def test_all_threads_compute_one_thing(native):
    (q, scale), (kv, _) = product(native, 3, 70, 24), product(native, 3, 70, 48)
    *_, bias = make(heads=3, height=7, width=10)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            keys = native.keys(q, bias, None)
            results.append(native.attended(q, kv, scale, torch.ones(8), 3, keys)[0])
        finally:
            torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_is_not_a_number_stays_with_its_item(native, plain):
    (q, scale), (kv, _) = product(native, 2, 9, 8), product(native, 2, 9, 16)
    kv[0, 3, 10] = float('nan')
    found = number_of(native.attended(q, kv, scale, torch.ones(4), 2, native.keys(q, None, None)))
    wanted, _ = plain.attended(q.float(), kv.float(), scale, torch.ones(4), 2, plain.keys(q, None, None))
    assert wanted[1].isfinite().all()
    assert found[1].isfinite().all()
    if not native.int8:  # a byte cannot tell; its scale does not, either
        assert torch.equal(found.isfinite(), wanted.isfinite())


# ---- in the layers ----


def compiled(plain, **keywords):
    return OptimizedMuLaN(
        plain, InferenceConfig(compile_model=True, use_mixed_precision=False, device='cpu', **keywords)
    )


def waves():
    return 0.1 * torch.randn(2, 3000)


def test_the_layers_are_those_of_the_transformer(native):
    if native.int8:
        pytest.importorskip('torchao')
    tower = tiny_mulan().eval().audio.transformer
    layers = fast_layers.FastLayers(tower, native.dtype, native.int8, keep_bias=True, compiled=True)
    assert isinstance(layers.parts, NativeParts)
    *_, bias = make(batch=2, heads=2, lengths=[15, 4])
    x = torch.randn(2, 15, 32)
    with torch.no_grad():
        for mine, theirs in zip(layers(x, bias=bias), tower(x, bias=bias)):
            real = bias.key_mask()
            atol = 1e-5 if native.takes == torch.float32 else 0.05
            torch.testing.assert_close(mine[real], theirs[real], atol=atol, rtol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_context_of_the_caller_changes_nothing(dtype):
    optimized, wavs = compiled(tiny_mulan()), waves()
    wanted = optimized.get_audio_latents(wavs)
    with torch.autocast('cpu', dtype=dtype):
        torch.testing.assert_close(optimized.get_audio_latents(wavs), wanted, atol=0.02, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(optimized.get_audio_latents(wavs), wanted)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(optimized.get_audio_latents(wavs), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_and_records_go_through_plain_operators():
    plain, wavs = tiny_mulan().eval(), waves()
    optimized = compiled(plain)
    grads = []
    for model in (plain, optimized.mulan):
        given = wavs.clone().requires_grad_()
        model.get_audio_latents(given).square().cumsum(dim=-1).sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        recorded = torch.jit.trace(optimized.mulan.audio, wavs)
        torch.testing.assert_close(recorded(wavs), plain.audio(wavs), atol=1e-5, rtol=1e-4)


def test_a_model_that_was_cast_is_refused():
    optimized = compiled(tiny_mulan()).to(torch.bfloat16)
    with pytest.raises(TypeError, match='make it anew with another config'):
        optimized.mulan.audio.transformer(torch.randn(1, 4, 32))


# ---- compiling ----


@pytest.fixture
def unbuilt(tmp_path, monkeypatch):
    """Nothing is compiled yet; the folder that it goes to."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    native_layers._library_or_error.cache_clear()
    yield tmp_path / 'musiclm-pytorch'
    native_layers._library_or_error.cache_clear()


def test_what_cannot_be_compiled_is_told_once_and_left_to_torch(unbuilt, tmp_path, monkeypatch, caplog):
    broken = tmp_path / 'broken.cpp'
    broken.write_text('int f() { return nothing; }')
    monkeypatch.setattr(native_layers, 'SOURCE', broken)
    layers = compiled(tiny_mulan()).mulan.audio.transformer
    assert isinstance(layers.parts, fast_layers.TorchParts)
    assert not NativeParts.serves(torch.float32, False)
    assert caplog.text.count('‘nothing’ was not declared') + caplog.text.count("'nothing' was not declared") == 1
    assert not list(unbuilt.iterdir())  # nothing half-made
    with pytest.raises(RuntimeError, match='was not declared'):
        native_layers.library()


def test_a_compiler_that_does_not_work_is_no_compiler(unbuilt, monkeypatch, caplog):
    monkeypatch.setattr(native_layers, 'compiler', lambda: '/bin/false')
    monkeypatch.setattr(optimize, 'computes_in_bf16', lambda: False)
    wide = tiny_mulan(audio=dict(dim=256, depth=1), text=dict(dim=256, depth=1))
    automatic = InferenceConfig(use_quantization='auto', compile_model='auto', device='cpu')
    assert optimize.choices(wide, automatic, torch.device('cpu')) == (False, torch.float32, False)
    assert '/bin/false' in caplog.text


def test_a_damaged_file_is_made_anew(unbuilt):
    native_layers.library()
    (path,) = unbuilt.iterdir()
    size = path.stat().st_size
    path.unlink()  # what is loaded must not change under us
    path.write_bytes(b'')
    native_layers._library_or_error.cache_clear()
    assert native_layers.constant('tile') == 64
    assert path.stat().st_size == size


def test_without_a_home_folder_it_is_compiled_all_the_same(unbuilt, tmp_path, monkeypatch):
    unbuilt.write_text('a file where the folder should be')
    monkeypatch.setattr(native_layers.tempfile, 'tempdir', str(tmp_path))
    assert native_layers.constant('tile') == 64
    assert list(tmp_path.iterdir()) == [unbuilt]  # nothing is left behind


def test_it_is_compiled_once(tmp_path):
    """Two processes at a time, and a third that finds what they made."""
    script = 'from musiclm_pytorch.inference.native_layers import constant; print(constant("tile"))'
    command, environment = [sys.executable, '-c', script], {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ['64', '64']
    (made,) = tmp_path.rglob('*.*')
    before = made.stat().st_mtime_ns
    subprocess.run(command, env=environment, check=True)
    assert list(tmp_path.rglob('*.*')) == [made]
    assert made.stat().st_mtime_ns == before
