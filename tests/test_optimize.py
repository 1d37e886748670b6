"""OptimizedMuLaN against the model it was made from, and the timing of it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import tiny_mulan
from torch import nn

from musiclm_pytorch.inference import benchmark, optimize
from musiclm_pytorch.inference.benchmark import benchmark_inference_speed
from musiclm_pytorch.inference.config import InferenceConfig
from musiclm_pytorch.inference.optimize import OptimizedMuLaN, choices
from musiclm_pytorch.mulan.layers import Linear

PLAIN = dict(use_mixed_precision=False, device='cpu')
HALF = dict(use_mixed_precision=True, device='cpu')


def model(**keywords):
    torch.manual_seed(0)
    audio = dict(support_variable_length=True, audio_sample_rate=8000, **keywords.pop('audio', {}))
    return tiny_mulan(audio=audio, **keywords)


def batch(items=3):
    generator = torch.Generator().manual_seed(1)
    wavs = 0.1 * torch.randn(items, 2500, generator=generator)
    return wavs, torch.randint(0, 100, (items, 9), generator=generator)


def similarity(found, wanted):
    assert found.dtype == wanted.dtype == torch.float32
    assert not found.requires_grad
    return F.cosine_similarity(found, wanted, dim=-1).min().item()


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-4)


def both(optimized, plain, least):
    """Waves, waves with lengths, and texts."""
    wavs, texts = batch()
    for call, given, more in (
        ('get_audio_latents', wavs, {}),
        ('get_audio_latents', wavs, dict(audio_lengths=torch.tensor([2500, 900, 1700]))),
        ('get_text_latents', texts, {}),
    ):
        with torch.no_grad():
            found, wanted = (getattr(it, call)(given, **more) for it in (optimized, plain))
        assert similarity(found, wanted) >= least


@pytest.mark.parametrize('memory_efficient', [False, True])
@pytest.mark.parametrize(('dtype', 'least'), [('bf16', 0.999), ('fp16', 0.99999)])
def test_half_precision_comes_close(dtype, least, memory_efficient, monkeypatch):
    # blocks of few rows, so that there are several
    monkeypatch.setattr('musiclm_pytorch.kernels.attention.SHORT', 4)
    monkeypatch.setattr('musiclm_pytorch.kernels.attention.BLOCK_ELEMENTS', 64)
    monkeypatch.setattr('musiclm_pytorch.kernels.attention.MIN_BLOCK_ROWS', 5)
    plain = model().eval()
    config = InferenceConfig(**HALF, mixed_precision_dtype=dtype, memory_efficient=memory_efficient)
    optimized = OptimizedMuLaN(plain, config)
    weight = optimized.mulan.audio.transformer.transformer.layers[0][0].to_q.weight
    assert weight.dtype == optimized.dtype == {'bf16': torch.bfloat16, 'fp16': torch.float16}[dtype]
    both(optimized, plain, least)


@pytest.mark.parametrize('precision', [PLAIN, HALF])
def test_int8_comes_close(precision):
    pytest.importorskip('torchao')
    plain = model().eval()
    optimized = OptimizedMuLaN(plain, InferenceConfig(use_quantization=True, **precision))
    layers = [it for it in optimized.mulan.audio.transformer.modules() if isinstance(it, Linear)]
    assert len(layers) == 10
    assert all(type(it.weight) is not nn.Parameter for it in layers), 'a layer was not quantised'
    assert optimized.quantized
    both(optimized, plain, 0.99)


@pytest.mark.slow
def test_compiled_code_gives_the_same():
    plain = model().eval()
    compiled = OptimizedMuLaN(plain, InferenceConfig(**HALF, compile_model=True))
    assert compiled.compiled
    both(compiled, plain, 0.999)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_context_of_the_caller_changes_nothing(dtype):
    optimized, wavs = OptimizedMuLaN(model(), InferenceConfig(**HALF)), batch()[0]
    wanted = optimized.get_audio_latents(wavs)
    with torch.autocast('cpu', dtype=dtype):
        found = optimized.get_audio_latents(wavs)
    assert similarity(found.float(), wanted) > 0.9999


def test_the_model_given_is_left_as_it_was():
    plain = model().train()
    before = copy.deepcopy(plain.state_dict())
    modules = [type(module) for module in plain.modules()]
    optimized = OptimizedMuLaN(plain, InferenceConfig(**HALF))
    optimized.get_audio_latents(batch()[0])
    assert plain.training
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert modules == [type(module) for module in plain.modules()]
    for name, value in plain.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    wavs, texts = batch()
    plain(wavs, texts).backward()


@pytest.mark.parametrize(
    ('settings', 'parts'),
    [(dict(batch_size=2), [2, 2, 1]), (dict(memory_efficient=True), [1] * 5), (dict(batch_size=5), [5])],
)
def test_large_batches_are_computed_in_parts(settings, parts):
    plain = model().eval()
    optimized = OptimizedMuLaN(plain, InferenceConfig(**PLAIN, **settings))
    sizes = []
    for tower in (optimized.mulan.audio, optimized.mulan.text):
        tower.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    wavs, texts = batch(5)
    given = dict(wavs=wavs, texts=texts, audio_lengths=[2500, 900, 1700, 2500, 2000], return_latents=True)
    with torch.no_grad():
        for found, wanted in zip(optimized(**given), plain(**given)):
            close(found, wanted)
    assert sizes == parts * 2


@pytest.mark.parametrize('hierarchical', [False, True])
def test_it_is_called_as_the_model_is(hierarchical):
    plain = model(hierarchical_contrastive_loss=hierarchical).eval()
    optimized = OptimizedMuLaN(plain, InferenceConfig(**PLAIN, batch_size=2))
    wavs, texts = batch()
    lengths = torch.tensor([2500, 900, 1700])
    for keywords in (
        {},
        dict(audio_lengths=lengths),
        dict(return_latents=True),
        dict(return_similarities=True),
        dict(return_pairwise_similarities=True),
        dict(sample_rate=16000),
    ):
        with torch.no_grad():
            wanted = plain(wavs, texts, **keywords)
        found = optimized(wavs, texts, **keywords)
        for mine, theirs in zip(*((it if isinstance(it, tuple) else (it,)) for it in (found, wanted))):
            assert not mine.requires_grad
            close(mine, theirs)
    worded = model(text=dict(num_tokens=49408)).eval()
    raw_texts = ['a slow tune', '', 'drums']
    found = OptimizedMuLaN(worded, InferenceConfig(**PLAIN, batch_size=2)).get_text_latents(raw_texts=raw_texts)
    close(found, worded.get_text_latents(raw_texts=raw_texts).detach())
    for call, inputs in (('get_audio_latents', wavs), ('get_text_latents', texts)):
        found, wanted = (getattr(it, call)(inputs, return_all_layers=True) for it in (optimized, plain))
        for mine, theirs in zip(found, wanted):
            close(mine, theirs.detach())
    with pytest.raises(ValueError, match='got 3 waves but 2 texts'):
        optimized(wavs, texts[:2], return_similarities=True)
    with pytest.raises(ValueError, match='either token ids'):
        optimized.get_text_latents()
    with pytest.raises(TypeError, match='wavs must be'):
        optimized.get_audio_latents(None)


def test_it_cannot_be_trained():
    optimized = OptimizedMuLaN(model())
    assert not any(module.training for module in optimized.modules())
    assert optimized.eval() is optimized
    with pytest.raises(ValueError, match='cannot be trained'):
        optimized.train()


def test_quantization_without_torchao_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'torchao.quantization', None)
    with pytest.raises(ImportError, match=r'\.\[inference\]'):
        OptimizedMuLaN(model(), InferenceConfig(use_quantization=True, device='cpu'))


def test_what_auto_chooses(monkeypatch):
    cpu = torch.device('cpu')
    automatic = InferenceConfig(use_quantization='auto', compile_model='auto', device='cpu')
    plain = (False, torch.float32, False)
    narrow, wide = model(), model(audio=dict(dim=256, depth=1), text=dict(dim=256, depth=1))

    for bf16 in (True, False):
        monkeypatch.setattr(optimize, 'computes_in_bf16', lambda it=bf16: it)
        assert choices(narrow, automatic, cpu) == plain
        assert choices(wide, automatic, cpu) == (False, torch.bfloat16 if bf16 else torch.float32, False)
        assert choices(wide, InferenceConfig(mixed_precision_dtype='fp16'), cpu) == plain
        asked = InferenceConfig(**HALF, use_quantization=True, compile_model=True)
        assert choices(narrow, asked, cpu) == (True, torch.bfloat16, True)


# ---- timing ----


def test_speed_is_that_of_the_runs(monkeypatch):
    times = iter([0.0, 9.0, 10.0, 10.1, 20.0, 20.2, 30.0, 30.6])  # a warm-up of 9 s, then 100, 200 and 600 ms
    monkeypatch.setattr(benchmark.time, 'perf_counter', lambda: next(times))
    config = InferenceConfig(**PLAIN, batch_size=2)
    results = benchmark_inference_speed(model(), config, num_runs=3, warmup_runs=1, seconds=0.25, tokens=40)
    assert results['average_time_ms'] == pytest.approx(300)
    assert results['median_time_ms'] == pytest.approx(200)
    assert results['p95_time_ms'] == pytest.approx(np.percentile([100, 200, 600], 95))
    assert results['samples_per_second'] == pytest.approx(2 / 0.3)
    stated = {name: results[name] for name in ('num_runs', 'batch_size', 'audio_seconds', 'sample_rate', 'tokens')}
    assert stated == dict(num_runs=3, batch_size=2, audio_seconds=0.25, sample_rate=8000, tokens=12)
    made = dict(device='cpu', dtype='float32', quantized=False, compiled=False)
    assert made.items() <= results.items()


def test_peak_memory_holds_what_was_held():
    cpu = torch.device('cpu')
    benchmark.reset_peak_memory(cpu)
    before = benchmark.peak_memory(cpu)
    # much, beside what earlier tests may give back meanwhile
    held = torch.ones(600, 2**20 // 4)
    del held
    assert benchmark.peak_memory(cpu) - before == pytest.approx(600 * 2**20, rel=0.15)


def test_timing_that_makes_no_sense_is_refused():
    plain = model()
    for says, keywords in (
        ('num_runs must be greater than 0', dict(num_runs=0)),
        ('warmup_runs must be at least 0', dict(warmup_runs=-1)),
        ('one patch needs at least', dict(seconds=0.001)),
    ):
        with pytest.raises(ValueError, match=says):
            benchmark_inference_speed(plain, InferenceConfig(**PLAIN), **keywords)
    with pytest.raises(ValueError, match='has a config already'):
        benchmark_inference_speed(OptimizedMuLaN(plain, InferenceConfig(**PLAIN)), InferenceConfig(**HALF))


@pytest.mark.parametrize('keywords', [PLAIN, HALF])
def test_a_bad_item_is_named_by_its_place_in_the_whole_batch(keywords):
    optimized = OptimizedMuLaN(model(), InferenceConfig(**keywords, batch_size=2))
    wavs, texts = batch(items=5)
    wavs[3, 7] = float('nan')
    texts[4, 2] = 10**6
    with pytest.raises(ValueError, match=r'wavs\[3\] holds NaN'):
        optimized.get_audio_latents(wavs)
    with pytest.raises(ValueError, match='1000000'):
        optimized.get_text_latents(texts)
