"""Logits with kept keys and values are those of the stages' uncached features, at every position.

That these are audiolm-pytorch's own shows `test_teacher_forcing.py`.
"""

import copy
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.audiolm_stages import (
    COARSE,
    CODES,
    FINE,
    SEMANTIC,
    coarse_stage,
    codes,
    embeds,
    fine_stage,
    semantic_stage,
)
from helpers.training import assert_same, weights

from musiclm_pytorch.audiolm.convert import own_stage
from musiclm_pytorch.audiolm.decode_step import FusedStep
from musiclm_pytorch.audiolm.generate import generate_coarse
from musiclm_pytorch.audiolm.generation_args import Sampling
from musiclm_pytorch.audiolm.stages import CoarseTransformer, logits_of
from musiclm_pytorch.audiolm.transformer import Linear

CONDITIONS = {
    'plain': {},
    'cross': dict(audio_text_condition=True),
    'projected': dict(has_condition=True, cond_dim=20),
    'prefix': dict(audio_text_condition=True, cond_as_self_attn_prefix=True),
}
CONDITIONED = ['cross', 'projected', 'prefix']
BIASES = {'bias': {}, 'no bias': dict(rel_pos_bias=False), 'flash': dict(flash_attn=True)}
# every option with every other one
OPTIONS = {
    f'{condition} {bias}': dict(
        **CONDITIONS[condition],
        **BIASES[bias],
        num_residual_streams=(1, 3)[(i + j) % 2],
        add_value_residual=(True, False)[(i // 2 + j) % 2],
    )
    for i, condition in enumerate(CONDITIONS)
    for j, bias in enumerate(BIASES)
}


def conditioning(options: dict, batch: int, seed: int = 0) -> torch.Tensor | None:
    if not options.get('has_condition', options.get('audio_text_condition')):
        return None
    given = embeds(batch, 4, options.get('cond_dim', 32), seed=seed)
    given[0, 3] = 0  # the coarse stage masks rows of zeros, the others see them
    return given


def case(name: str, **options):
    """A stage, what is given ahead, and tokens of three samples."""
    if name == 'semantic':
        return own_stage(semantic_stage(**options)), (), codes(3, 9, num=SEMANTIC)
    if name == 'coarse':
        stage, ahead, tokens = coarse_stage(**options), codes(3, 7, num=SEMANTIC), codes(3, 4, COARSE)
        ahead[1, 5:], ahead[2, 3] = -1, SEMANTIC
    else:
        stage, ahead, tokens = fine_stage(**options), codes(3, 5, COARSE), codes(3, 5, FINE, seed=1)
        ahead[1, 4:], ahead[2, 3, 1] = -1, CODES
    return own_stage(stage), (ahead,), tokens


@torch.inference_mode()
def decoded(stage, *given: torch.Tensor, tokens: torch.Tensor, known: int, **keywords) -> torch.Tensor:
    """Logits (b, n, c) before each of the tokens (b, …) after the first `known` ones, decoded one by one."""
    given, tokens = [it.flatten(1) for it in given], tokens.flatten(1)
    state = stage.prefill(*given, tokens[:, :known], max_tokens=tokens.shape[1], **keywords)
    logits = [stage.next_logits(state)]
    for token in tokens[:, known:-1].unbind(dim=1):
        stage.decode_step(state, token)
        logits.append(stage.next_logits(state))
    return torch.stack(logits, dim=1)


@torch.inference_mode()
def uncached(stage, *given: torch.Tensor, tokens: torch.Tensor, known: int = 0, **keywords) -> torch.Tensor:
    """The same, without a cache."""
    given, tokens, heads = [it.flatten(1) for it in given], tokens.flatten(1), stage.own_heads()
    features = stage.features(*given, tokens[:, :-1], **keywords)[-1]
    logits = [logits_of(it, *heads[i % len(heads)]) for i, it in enumerate(features.unbind(1))]
    return torch.stack(logits[known:], dim=1)


@pytest.fixture(params=['plain', 'kernel'])
def step(request, monkeypatch):
    """Tokens computed operator by operator, or by the kernel, however few they are."""
    if request.param == 'kernel':
        monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.WORTH_LOADING', 0)


def assert_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.std() > 0.3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(('name', 'longest'), [('semantic', 4), ('coarse', 2 * COARSE), ('fine', 2 * FINE)])
def test_every_option(name, longest, options, monkeypatch):
    """From nothing and from a prompt, operator by operator and by the kernel."""
    stage, given, tokens = case(name, **options)
    keywords = dict(tokens=tokens, conditioning=conditioning(options, 3))
    wanted = uncached(stage, *given, **keywords)
    for _ in range(2):
        for known in (0, longest):
            assert_equal(decoded(stage, *given, known=known, **keywords), wanted[:, known:])
        monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.WORTH_LOADING', 0)


@pytest.mark.parametrize('known', [0, 2 * COARSE])
def test_semantic_tokens_of_the_same_time(known, step):
    plain = own_stage(coarse_stage())
    stage = CoarseTransformer(**plain.config | dict(semantic_per_frame=1.5)).eval()
    stage.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.normal_(stage.aligned_embedding.weight)
    ahead, tokens = codes(3, 7, num=SEMANTIC), codes(3, 6, COARSE)
    ahead[1, 5:], ahead[2, 3] = -1, SEMANTIC  # not there for some frames
    given = dict(tokens=tokens, known=known)
    assert_equal(decoded(stage, ahead, **given), uncached(stage, ahead, **given))
    # to each code is added what the next one is of
    added = stage.embed(ahead, tokens.flatten(1)) - plain.embed(ahead, tokens.flatten(1))
    places = [0] * 8 + [math.floor(1.5 * (i // COARSE)) for i in range(6 * COARSE + 1)]
    for row in range(3):
        for place, now in enumerate(places):
            is_there = place >= 8 and now < 7 and ahead[row, now] not in (-1, SEMANTIC)
            expected = stage.aligned_embedding.weight[ahead[row, now]] if is_there else torch.zeros(32)
            torch.testing.assert_close(added[row, place], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('step', ['plain', 'kernel'], indirect=True)
@pytest.mark.parametrize('condition', ['projected', 'prefix'])
def test_a_melody_is_told_in_time_and_guided_by(condition, step):
    options = CONDITIONS[condition]
    stage, _, tokens = case('semantic', **options)
    wanted, avoided, melody = (conditioning(options, 3, seed=seed) for seed in range(3))
    melody = torch.cat((melody, melody), dim=1)[:, :7]  # the last two tokens are without
    scales = dict(cond_scale=2.5, negative_scale=0.5)
    given = dict(conditioning=wanted, negative=avoided, melody=melody, **scales)
    found = decoded(stage, tokens=tokens, known=4, **given)

    def logits(conditions, melody=None):
        return uncached(stage, tokens=tokens, known=4, conditioning=conditions, melody=melody)

    own, null = logits(wanted, melody), logits(torch.zeros_like(wanted))
    assert_equal(found, null + 2.5 * (own - null) + 0.5 * (own - logits(avoided, melody)))
    # each token is told of the melody at its own time
    melody[:, 6] += 1
    changed = (logits(wanted, melody) - own).abs().amax(dim=(0, 2))
    assert (changed > 1e-3).tolist() == [False, False, True, False, False]


def test_guidance_of_the_coarse_stage_is_that_of_forward_with_cond_scale():
    theirs, text_embeds = coarse_stage(**CONDITIONS['cross']), conditioning(CONDITIONS['cross'], 2)
    semantic_ids, tokens = codes(2, 6, num=SEMANTIC), codes(2, 4, COARSE)
    given = dict(tokens=tokens, known=0, conditioning=text_embeds)
    found = decoded(own_stage(theirs), semantic_ids, cond_scale=2.5, **given)
    ids = dict(semantic_token_ids=semantic_ids, coarse_token_ids=tokens.flatten(1)[:, :-1])
    with torch.inference_mode():
        _, wanted = theirs.forward_with_cond_scale(**ids, text_embeds=text_embeds, cond_scale=2.5)
    assert_equal(found, wanted)
    assert (found - uncached(own_stage(theirs), semantic_ids, **given)).abs().max() > 0.1


@pytest.mark.parametrize('condition', CONDITIONED)
@pytest.mark.parametrize(('name', 'known'), [('semantic', 3), ('coarse', 0), ('fine', 0)])
def test_guidance_leads_away_from_zeros_and_from_a_negative_conditioning(name, known, condition, step):
    """Of which the coarse stage masks rows of zeros."""
    options = CONDITIONS[condition]
    stage, ahead, tokens = case(name, **options)
    given, avoided = conditioning(options, 3), conditioning(options, 3, seed=5)
    shared = dict(tokens=tokens, known=known)
    conditioned, negative, null = (
        uncached(stage, *ahead, conditioning=it, **shared) for it in (given, avoided, torch.zeros_like(given))
    )
    assert min((conditioned - it).abs().max() for it in (negative, null)) > 0.05
    for scale, away in ((3.0, None), (1.0, avoided), (2.5, avoided)):
        keywords = dict(cond_scale=scale, negative=away, negative_scale=0.5)
        wanted = null + (conditioned - null) * scale
        wanted = wanted if away is None else wanted + (conditioned - negative) * 0.5
        assert_equal(decoded(stage, *ahead, conditioning=given, **keywords, **shared), wanted)


def test_prompt_longer_than_its_blocks(monkeypatch):
    monkeypatch.setattr('musiclm_pytorch.audiolm.stages.PROMPT_BLOCK', 4)
    monkeypatch.setattr('musiclm_pytorch.audiolm.transformer.PositionBias.ROWS', 3)
    stage, given, tokens = case('fine')
    keywords = dict(tokens=tokens, known=FINE)
    assert_equal(decoded(stage, *given, **keywords), uncached(stage, *given, **keywords))


def test_null_keys_in_self_attention():
    stage, _, ids = case('semantic', num_null_kv=2, rel_pos_bias=False)
    assert_equal(decoded(stage, tokens=ids, known=2), uncached(stage, tokens=ids, known=2))
    with pytest.raises(ValueError, match='num_null_kv'):
        own_stage(semantic_stage(num_null_kv=1, flash_attn=True))


def test_a_position_without_features_leaves_no_trace(step):
    """Zeros have no direction: neither the norm of hyper-connections nor a row without keys may give NaN."""
    stage, given, tokens = case('coarse')
    assert (given[0] == 0).any()
    with torch.no_grad():
        stage.semantic_embedding.weight[0] = 0
    keywords = dict(tokens=tokens, known=COARSE)
    assert_equal(decoded(stage, *given, **keywords), uncached(stage, *given, **keywords))


def test_generating_leaves_the_stage_as_it_was():
    stage = own_stage(coarse_stage(**CONDITIONS['cross'], attn_dropout=0.5, ff_dropout=0.5)).train()
    before = weights(stage)
    given = dict(text_embeds=conditioning(CONDITIONS['cross'], 2), max_length=2, min_length=2)
    ids = codes(2, 5, num=SEMANTIC)
    found = [generate_coarse(stage, ids, sampling=Sampling(temperature=0), **given).tokens for _ in range(2)]
    assert torch.equal(found[0], found[1])  # no dropout
    assert stage.training
    assert_same(weights(stage), before)


@pytest.mark.parametrize(('batch', 'threads'), [(1, 1), (1, 2), (2, 3), (5, 2), (16, 3), (17, 2)])
def test_a_compiled_token_is_that_of_the_plain_operators(monkeypatch, batch, threads):
    """Rows and heads that the threads share unevenly; more rows than the kernel takes; a head that is no vector."""
    monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.DIM_A_THREAD', 1)
    stage = own_stage(coarse_stage(audio_text_condition=True, heads=3, dim_head=7, dim=40))
    semantic_ids, tokens, text_embeds = codes(batch, 7, num=SEMANTIC), codes(batch, 4, COARSE), embeds(batch, 4, 40)
    semantic_ids[0, 5:] = -1
    kinds = []

    def logits(worth_loading):
        monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.WORTH_LOADING', worth_loading)
        given = dict(max_tokens=4 * COARSE, conditioning=text_embeds)
        kinds.append(type(stage.prefill(semantic_ids, tokens.flatten(1)[:, :COARSE], **given).cache.step))
        return decoded(stage, semantic_ids, tokens=tokens, known=COARSE, conditioning=text_embeds)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, wanted = logits(0), logits(math.inf)
    finally:
        torch.set_num_threads(before)
    assert kinds == [FusedStep if batch <= 16 else type(None), type(None)]
    assert_equal(found, wanted)


@pytest.mark.slow
def test_a_token_on_a_processor_of_short_vectors(tmp_path):
    """Of four numbers, as on ARM, where sums of one product do not fit into one."""
    chosen = [
        f'{__file__}::test_a_compiled_token_is_that_of_the_plain_operators[{it}]' for it in ('1-1', '5-2', '16-3')
    ]
    environment = os.environ | dict(NUMBA_ENABLE_AVX='0', NUMBA_CACHE_DIR=str(tmp_path))
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_weights_that_torchao_rounded_are_computed_by_its_operators(monkeypatch):
    """They say that they are float32, and the kernel would read something else where they lie."""
    quantization = pytest.importorskip('torchao.quantization')
    monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.WORTH_LOADING', 0)
    stage = own_stage(coarse_stage(audio_text_condition=True, dim=64))
    given = dict(tokens=codes(2, 4, COARSE), known=COARSE, conditioning=embeds(2, 4, 64))
    semantic_ids = codes(2, 7, num=SEMANTIC)
    wanted = decoded(stage, semantic_ids, **given)
    chosen = dict(filter_fn=lambda module, _: isinstance(module, Linear))
    quantization.quantize_(stage.transformer, quantization.Int8WeightOnlyConfig(), **chosen)
    found = decoded(stage, semantic_ids, **given)
    assert not torch.equal(found, wanted)
    assert (found - wanted).square().mean().sqrt() < 0.05 * wanted.std()


@pytest.mark.parametrize(
    ('batch', 'options'),
    [
        (1, dict(heads=3, dim_head=7, dim=40)),
        (7, dict(heads=3, dim_head=7, dim=40)),
        (2, dict(dim=64, num_residual_streams=1, cond_as_self_attn_prefix=True)),
        (16, dict(dim=72, rel_pos_bias=False)),
    ],
    ids=['cross', 'cross, several', 'prefix', 'no bias'],
)
def test_a_compiled_token_reads_half_precision(monkeypatch, batch, options):
    """Beside the plain operators in float32 on the same rounded weights."""
    options = dict(audio_text_condition=True, heads=4) | options
    stage = own_stage(coarse_stage(**options)).bfloat16()
    before = [it.data_ptr() for it in stage.parameters()]
    semantic_ids, tokens = codes(batch, 7, num=SEMANTIC), codes(batch, 4, COARSE)
    semantic_ids[0, 5:] = -1
    given = dict(tokens=tokens, known=COARSE, conditioning=embeds(batch, 4, options['dim']))
    monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.WORTH_LOADING', math.inf)
    wanted = decoded(copy.deepcopy(stage).float(), semantic_ids, **given)
    plain = (decoded(stage, semantic_ids, **given) - wanted).square().mean().sqrt()
    monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.WORTH_LOADING', 0)
    found = decoded(stage, semantic_ids, **given)
    assert found.dtype == torch.float32
    # what the plain operators give is rounded, too
    assert (found - wanted).square().mean().sqrt() < 1.1 * plain < 0.1 * wanted.std()
    assert torch.equal(decoded(stage, semantic_ids, **given), found)
    assert before == [it.data_ptr() for it in stage.parameters()]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_product_of_the_kernel_is_the_same_whatever_is_beside_it(monkeypatch, dtype):
    """Bit by bit, in any number of rows and outputs; sizes that are no multiple of anything."""
    monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.WORTH_LOADING', 0)
    stage = own_stage(semantic_stage()).to(dtype)
    step = stage.prefill(codes(1, 1, num=SEMANTIC), max_tokens=4).cache.step
    generator = torch.Generator().manual_seed(0)
    for size, outputs in ((5, 3), (33, 8), (149, 18)):
        x, bias = torch.randn(16, size, generator=generator), torch.randn(outputs, generator=generator)
        weight = torch.randn(outputs, size, generator=generator).to(dtype)
        whole = step.linear(x, weight, bias)
        wanted = x.to(step.reads).double() @ weight.double().T + bias
        torch.testing.assert_close(whole.double(), wanted, rtol=0, atol=1e-4)
        for rows in range(1, 16):
            assert torch.equal(step.linear(x[:rows], weight, bias), whole[:rows])
        assert torch.equal(step.linear(x, weight[1:], bias[1:]), whole[:, 1:])


def test_half_precision_tells_positions_apart():
    stage = own_stage(semantic_stage()).bfloat16()
    table = stage.transformer.rel_pos_bias(400)
    assert table.dtype == torch.float32
    assert (table[:, 301:] != table[:, 300:-1]).any(dim=0).all()


def test_keys_beyond_the_vectors_of_the_kernel(step):
    """Numbers of keys that are no multiple of anything, and scores far apart."""
    stage, ids = own_stage(semantic_stage()), codes(2, 150, num=SEMANTIC)
    with torch.no_grad():
        for layer in stage.transformer.layers:
            layer[0].branch.to_q.weight.mul_(20)
    assert_equal(decoded(stage, tokens=ids, known=3), uncached(stage, tokens=ids, known=3))


def test_threads_sleep_between_tokens_work_side_by_side_and_end(monkeypatch):
    monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.WORTH_LOADING', 0)
    monkeypatch.setattr('musiclm_pytorch.audiolm.decode_step.DIM_A_THREAD', 1)
    stage, before = own_stage(semantic_stage()), threading.active_count()
    ids = codes(4, 12, num=SEMANTIC).unbind()

    @torch.inference_mode()  # which holds for one thread alone
    def logits(row, pause=0.0):
        state = stage.prefill(row[None, :1], max_tokens=len(row))
        for token in row[1:-1]:
            time.sleep(pause)
            stage.decode_step(state, token[None])
        return stage.next_logits(state)

    wanted = [uncached(stage, tokens=row[None])[:, -1] for row in ids]
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 3)
    assert_equal(logits(ids[0], pause=0.02), wanted[0])  # long enough for the others to fall asleep
    with ThreadPoolExecutor(len(ids)) as pool:
        for found, expected in zip(pool.map(logits, ids), wanted):
            assert_equal(found, expected)
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.02)
    assert threading.active_count() <= before


@pytest.mark.slow
def test_compiled():
    stage, _, ids = case('semantic')
    assert_equal(decoded(stage, tokens=ids, known=3, compile=True), uncached(stage, tokens=ids, known=3))


@pytest.mark.parametrize('condition', CONDITIONS)
def test_fixed_shapes(monkeypatch, condition):
    """What is compiled, as it is before."""
    monkeypatch.setattr(torch, 'compile', lambda function: function)
    stage, given, tokens = case('fine', **CONDITIONS[condition])
    keywords = dict(tokens=tokens, known=FINE, conditioning=conditioning(CONDITIONS[condition], 3))
    assert_equal(decoded(stage, *given, compile=True, **keywords), uncached(stage, *given, **keywords))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_recorded_graph():
    stage, coarse, tokens = (
        it.cuda() for it in (own_stage(fine_stage()), codes(2, 5, COARSE), codes(2, 5, FINE, seed=1))
    )
    keywords = dict(tokens=tokens, known=FINE)
    assert_equal(decoded(stage, coarse, compile=True, **keywords), uncached(stage, coarse, **keywords))
