"""Logits with kept keys and values are those of the stages' own uncached forward, at every position."""

import itertools

import pytest
import torch
from audiolm_stages import (
    COARSE,
    CODES,
    FINE,
    SEMANTIC,
    coarse_logits,
    coarse_stage,
    codes,
    embeds,
    fine_logits,
    fine_stage,
    semantic_logits,
    semantic_stage,
)

from musiclm_pytorch.audiolm.fused_step import FusedStep
from musiclm_pytorch.audiolm.stages import CoarseDecoder, FineDecoder, SemanticDecoder
from musiclm_pytorch.mulan.kernels import has_gnu_openmp

CONDITIONS = {
    'plain': {},
    'cross': dict(audio_text_condition=True),
    'projected': dict(has_condition=True, cond_dim=20),
    'prefix': dict(audio_text_condition=True, cond_as_self_attn_prefix=True),
}
BIASES = {'bias': {}, 'no bias': dict(rel_pos_bias=False), 'flash': dict(flash_attn=True)}
# every option with every other one
OPTIONS = {
    ' '.join((condition, bias, f'{streams} streams', 'residual values' if mixed else '')).strip(): dict(
        **CONDITIONS[condition], **BIASES[bias], num_residual_streams=streams, add_value_residual=mixed
    )
    for condition, bias, streams, mixed in itertools.product(CONDITIONS, BIASES, (1, 3), (True, False))
}


def conditioning(options: dict, batch: int, seed: int = 0) -> torch.Tensor | None:
    if not options.get('has_condition', options.get('audio_text_condition')):
        return None
    given = embeds(batch, 4, options.get('cond_dim', 32), seed=seed)
    given[0, 3] = 0  # the coarse stage masks rows of zeros, the others see them
    return given


@torch.inference_mode()
def forced(session, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (b, n, c) before each of the tokens (b, n)."""
    logits = []
    for step, token in enumerate(tokens.unbind(dim=1)):
        logits.append(session.logits())
        if step + 1 < tokens.shape[1]:
            session.push(token)
    return torch.stack(logits, dim=1)


def assert_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.std() > 0.3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize('known', [0, 4])
def test_semantic(options, known):
    stage, ids, text_embeds = semantic_stage(**options), codes(2, 9, num=SEMANTIC), conditioning(options, 2)
    session = SemanticDecoder(stage).begin(ids[:, :known], max_tokens=9, text_embeds=text_embeds)
    assert_equal(forced(session, ids[:, known:]), semantic_logits(stage, ids, text_embeds)[:, known:-1])


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize('known', [0, 2])
def test_coarse(options, known):
    stage, text_embeds = coarse_stage(**options), conditioning(options, 3)
    semantic_ids, tokens = codes(3, 7, num=SEMANTIC), codes(3, 4, COARSE)
    semantic_ids[1, 5:], semantic_ids[2, 3] = -1, SEMANTIC
    decoder = CoarseDecoder(stage)
    session = decoder.begin(semantic_ids, tokens[:, :known], max_frames=4, text_embeds=text_embeds)
    wanted = coarse_logits(stage, semantic_ids, tokens.flatten(1)[:, :-1], text_embeds)
    assert_equal(forced(session, tokens[:, known:].flatten(1)), wanted[:, known * COARSE :])


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize('known', [0, 2])
def test_fine(options, known):
    stage, text_embeds = fine_stage(**options), conditioning(options, 3)
    coarse, tokens = codes(3, 5, COARSE), codes(3, 5, FINE, seed=1)
    coarse[1, 4:], coarse[2, 3, 1] = -1, CODES
    session = FineDecoder(stage).begin(coarse, tokens[:, :known], text_embeds=text_embeds)
    wanted = fine_logits(stage, coarse, tokens.flatten(1)[:, :-1], text_embeds)
    assert_equal(forced(session, tokens[:, known:].flatten(1)), wanted[:, known * FINE :])


@pytest.mark.parametrize('condition', ['cross', 'projected', 'prefix'])
def test_guidance_of_the_coarse_stage_is_that_of_forward_with_cond_scale(condition):
    stage, text_embeds = coarse_stage(**CONDITIONS[condition]), conditioning(CONDITIONS[condition], 2)
    semantic_ids, tokens = codes(2, 6, num=SEMANTIC), codes(2, 4, COARSE)
    decoder = CoarseDecoder(stage)
    session = decoder.begin(semantic_ids, tokens[:, :0], max_frames=4, text_embeds=text_embeds, cond_scale=2.5)
    with torch.inference_mode():
        _, wanted = stage.forward_with_cond_scale(
            semantic_token_ids=semantic_ids,
            coarse_token_ids=tokens.flatten(1)[:, :-1],
            text_embeds=text_embeds,
            cond_scale=2.5,
        )
    found = forced(session, tokens.flatten(1))
    assert_equal(found, wanted)
    assert (found - coarse_logits(stage, semantic_ids, tokens.flatten(1)[:, :-1], text_embeds)).abs().max() > 0.1


@pytest.mark.parametrize('condition', ['cross', 'projected', 'prefix'])
@pytest.mark.parametrize('stage_name', ['semantic', 'fine'])
def test_guidance_leads_away_from_a_conditioning_of_zeros(stage_name, condition):
    options = CONDITIONS[condition]
    text_embeds = conditioning(options, 2)
    if stage_name == 'semantic':
        stage, tokens = semantic_stage(**options), codes(2, 8, num=SEMANTIC)
        session = SemanticDecoder(stage).begin(tokens[:, :3], max_tokens=8, text_embeds=text_embeds, cond_scale=3.0)
        tokens, known = tokens, 3

        def logits(text_embeds):
            return semantic_logits(stage, tokens[:, :-1], text_embeds)
    else:
        stage, coarse, tokens, known = fine_stage(**options), codes(2, 4, COARSE), codes(2, 4, FINE), 0
        session = FineDecoder(stage).begin(coarse, tokens[:, :0], text_embeds=text_embeds, cond_scale=3.0)
        tokens = tokens.flatten(1)

        def logits(text_embeds):
            return fine_logits(stage, coarse, tokens[:, :-1], text_embeds)

    conditioned, null = logits(text_embeds), logits(torch.zeros_like(text_embeds))
    assert (conditioned - null).abs().max() > 0.05
    assert_equal(forced(session, tokens[:, known:]), (null + (conditioned - null) * 3.0)[:, known:])


def test_prompt_longer_than_its_blocks(monkeypatch):
    monkeypatch.setattr('musiclm_pytorch.audiolm.stages.PROMPT_BLOCK', 4)
    monkeypatch.setattr('musiclm_pytorch.audiolm.stages.BIAS_BLOCK', 3)
    stage, coarse, tokens = fine_stage(), codes(2, 5, COARSE), codes(2, 5, FINE, seed=1)
    session = FineDecoder(stage).begin(coarse, tokens[:, :1])
    wanted = fine_logits(stage, coarse, tokens.flatten(1)[:, :-1])
    assert_equal(forced(session, tokens.flatten(1)[:, FINE:]), wanted[:, FINE:])


def test_primes_of_different_lengths():
    stage, ids = semantic_stage(), codes(2, 9, num=SEMANTIC)
    prime = ids[:, :5].clone()
    prime[1] = torch.cat((torch.full((2,), -1), ids[1, :3]))
    session = SemanticDecoder(stage).begin(prime, max_tokens=9)
    found = forced(session, torch.stack((ids[0, 5:], ids[1, 3:7])))
    assert_equal(found[:1], semantic_logits(stage, ids[:1])[:, 5:-1])
    assert_equal(found[1:], semantic_logits(stage, ids[1:])[:, 3:7])


def test_null_keys_in_self_attention():
    stage, ids = semantic_stage(num_null_kv=2, rel_pos_bias=False), codes(2, 6, num=SEMANTIC)
    session = SemanticDecoder(stage).begin(ids[:, :2], max_tokens=6)
    assert_equal(forced(session, ids[:, 2:]), semantic_logits(stage, ids)[:, 2:-1])
    with pytest.raises(ValueError, match='num_null_kv'):
        SemanticDecoder(semantic_stage(num_null_kv=1, flash_attn=True))


def test_a_position_without_features_leaves_no_trace():
    """Zeros have no direction: neither the norm of hyper-connections nor a row without keys may give NaN."""
    stage = coarse_stage()
    with torch.no_grad():
        stage.semantic_embedding.weight[0] = 0
    semantic_ids, tokens = codes(2, 5, num=SEMANTIC), codes(2, 3, COARSE)
    semantic_ids[0, 2:] = -1
    session = CoarseDecoder(stage).begin(semantic_ids, tokens[:, :1], max_frames=3)
    found = forced(session, tokens[:, 1:].flatten(1))
    assert_equal(found, coarse_logits(stage, semantic_ids, tokens.flatten(1)[:, :-1])[:, COARSE:])


def test_decoder_leaves_the_stage_as_it_was():
    stage = coarse_stage(**CONDITIONS['cross'], attn_dropout=0.5, ff_dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    text_embeds, ids = conditioning(CONDITIONS['cross'], 2), codes(2, 5, num=SEMANTIC)
    decoder = CoarseDecoder(stage)
    found = [decoder.begin(ids, codes(2, 1, COARSE), max_frames=2, text_embeds=text_embeds).logits() for _ in range(2)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)  # no dropout
    assert stage.training
    for name, tensor in stage.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_bfloat16_stays_near():
    stage, coarse, tokens = fine_stage(), codes(2, 5, COARSE), codes(2, 5, FINE, seed=1)
    decoder = FineDecoder(stage, dtype=torch.bfloat16)
    assert decoder.weight_bytes_a_token * 2 == FineDecoder(stage).weight_bytes_a_token
    found = forced(decoder.begin(coarse, tokens[:, :1]), tokens.flatten(1)[:, FINE:])
    wanted = fine_logits(stage, coarse, tokens.flatten(1)[:, :-1])[:, FINE:]
    assert found.dtype == torch.float32
    assert (found - wanted).square().mean().sqrt() < 0.05 * wanted.std()


@pytest.mark.parametrize('threads', [1, 2, 3])
@pytest.mark.parametrize('batch', [1, 2, 5, 16, 17])
def test_a_compiled_token_is_that_of_the_plain_operators(monkeypatch, batch, threads):
    """Rows and heads that the threads share unevenly; more rows than the kernel takes; a head that is no vector."""
    if not has_gnu_openmp():
        pytest.skip('no GNU OpenMP')
    monkeypatch.setattr('musiclm_pytorch.audiolm.fused_step.DIM_A_THREAD', 1)
    monkeypatch.setattr('musiclm_pytorch.audiolm.fused_step.WORK_A_THREAD', 1)
    options = dict(audio_text_condition=True, heads=3, dim_head=7, dim=40)
    stage = coarse_stage(**options)
    semantic_ids, tokens, text_embeds = codes(batch, 7, num=SEMANTIC), codes(batch, 4, COARSE), embeds(batch, 4, 40)
    semantic_ids[0, 5:] = -1

    def logits():
        session = CoarseDecoder(stage).begin(semantic_ids, tokens[:, :1], max_frames=4, text_embeds=text_embeds)
        return type(session._step), forced(session, tokens[:, 1:].flatten(1))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kind, found = logits()
        assert kind is (FusedStep if batch <= 16 else type(None))
        monkeypatch.setattr('musiclm_pytorch.audiolm.cached_transformer.has_gnu_openmp', lambda: False)
        kind, wanted = logits()
        assert kind is type(None)
    finally:
        torch.set_num_threads(before)
    assert_equal(found, wanted)


def test_keys_beyond_the_vectors_of_the_kernel():
    """Numbers of keys that are no multiple of anything, and scores far apart."""
    stage, ids = semantic_stage(), codes(2, 150, num=SEMANTIC)
    with torch.no_grad():
        for layer in stage.transformer.layers:
            layer[0].branch.to_q.weight.mul_(20)
    session = SemanticDecoder(stage).begin(ids[:, :3], max_tokens=150)
    assert_equal(forced(session, ids[:, 3:]), semantic_logits(stage, ids)[:, 3:-1])


@pytest.mark.slow
def test_compiled():
    stage, ids = semantic_stage(), codes(2, 6, num=SEMANTIC)
    session = SemanticDecoder(stage, compile=True).begin(ids[:, :3], max_tokens=6)
    assert_equal(forced(session, ids[:, 3:]), semantic_logits(stage, ids)[:, 3:-1])


@pytest.mark.parametrize('condition', CONDITIONS)
def test_fixed_shapes(monkeypatch, condition):
    """What is compiled, as it is before."""
    monkeypatch.setattr(torch, 'compile', lambda function: function)
    options = CONDITIONS[condition]
    stage, coarse, tokens = fine_stage(**options), codes(2, 5, COARSE), codes(2, 5, FINE, seed=1)
    coarse[1, 4:], text_embeds = -1, conditioning(options, 2)
    session = FineDecoder(stage, compile=True).begin(coarse, tokens[:, :1], text_embeds=text_embeds)
    wanted = fine_logits(stage, coarse, tokens.flatten(1)[:, :-1], text_embeds)
    assert_equal(forced(session, tokens.flatten(1)[:, FINE:]), wanted[:, FINE:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_recorded_graph():
    stage, coarse, tokens = fine_stage().cuda(), codes(2, 5, COARSE).cuda(), codes(2, 5, FINE, seed=1).cuda()
    session = FineDecoder(stage, compile=True).begin(coarse, tokens[:, :1])
    wanted = fine_logits(stage, coarse, tokens.flatten(1)[:, :-1])
    assert_equal(forced(session, tokens.flatten(1)[:, FINE:]), wanted[:, FINE:])
