"""Generation by each stage, against a plain loop over the stages' own uncached forward."""

from fractions import Fraction

import pytest
import torch
from helpers.audiolm_stages import (
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

from musiclm_pytorch.audiolm.convert import own_stage
from musiclm_pytorch.audiolm.generate import generate_coarse, generate_fine, generate_semantic
from musiclm_pytorch.audiolm.generation_args import Sampling

CROSS = dict(audio_text_condition=True)
SAMPLING = Sampling(temperature=0.9, top_k=9, top_p=0.95)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniform(num_steps: int, seed: int) -> torch.Tensor:
    return torch.rand(num_steps, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------
# The plain loop: one sample, everything computed anew for each token


def plain(logits_of, given, noise, *, sampling=SAMPLING, end_id=None, may_end=lambda index: True) -> list[int]:
    """The tokens after those `given`, one for each of `noise`, up to the end token.

    logits_of: tokens (1, n) → the conditioned and the null logits (c,) of the next one
    """
    tokens = list(given)
    for u in noise:
        conditioned, null = logits_of(torch.tensor([tokens], dtype=torch.long))
        logits = null + (conditioned - null) * sampling.cond_scale
        if end_id is not None and not may_end(len(tokens)):
            logits[end_id] = float('-inf')
        token = int(sampling.draw(logits[None], u[None]))
        if token == end_id:
            break
        tokens.append(token)
    return tokens[len(given) :]


def plain_semantic(stage, noise, *, text_embeds=None, given=(), min_length=1, sampling=SAMPLING):
    def logits_of(tokens):
        null = None if text_embeds is None else torch.zeros_like(text_embeds)
        return [semantic_logits(stage, tokens, e)[0, -1].clone() for e in (text_embeds, null)]

    return plain(logits_of, given, noise, sampling=sampling, end_id=SEMANTIC, may_end=lambda index: index >= min_length)


def plain_coarse(stage, semantic_ids, noise, *, text_embeds=None, given=(), min_frames=1, sampling=SAMPLING):
    def logits_of(tokens):
        return [coarse_logits(stage, semantic_ids, tokens, text_embeds, drop)[0, -1].clone() for drop in (0.0, 1.0)]

    def may_end(index):
        return index % COARSE == 0 and index // COARSE >= min_frames

    return plain(logits_of, given, noise, sampling=sampling, end_id=CODES, may_end=may_end)


def plain_fine(stage, coarse, noise, *, text_embeds=None, given=(), sampling=SAMPLING):
    def logits_of(tokens):
        null = None if text_embeds is None else torch.zeros_like(text_embeds)
        return [fine_logits(stage, coarse, tokens, e)[0, -1].clone() for e in (text_embeds, null)]

    return plain(logits_of, given, noise, sampling=sampling)


def likes_to_end(stage, end_id: int):
    """The stage with a higher probability of its end token."""
    with torch.no_grad():
        if hasattr(stage, 'to_logits'):
            stage.to_logits.bias[end_id] += 1.5
        else:
            stage.coarse_logit_weights.mul_(0.3)
            stage.coarse_logit_weights[0, end_id] *= 5
    return stage


def assert_same(found, wanted: list[list[int]]) -> None:
    """Tokens (b, n) or codes (b, t, q) against flat lists, with padding behind."""
    tokens, lengths = found
    width = tokens[0, 0].numel()
    assert [length * width for length in lengths.tolist()] == [len(own) for own in wanted]
    for row, own in zip(tokens.flatten(1).tolist(), wanted):
        assert row == own + [-1] * (len(row) - len(own))


# ---------------------------------------------------------------------------------------------------------------
# The same tokens from the same noise


@pytest.mark.parametrize('cond_scale', [1.0, 2.0])
@pytest.mark.parametrize('known', [0, 3])
def test_semantic(cond_scale, known):
    stage, seeds = likes_to_end(semantic_stage(**CROSS), SEMANTIC), range(5)
    sampling = Sampling(temperature=0.9, top_k=9, cond_scale=cond_scale)
    text_embeds, prime = embeds(5, 3, 32), codes(5, known, num=SEMANTIC)
    found = generate_semantic(
        stage,
        max_length=14,
        min_length=5,
        text_embeds=text_embeds,
        prime=prime,
        sampling=sampling,
        generator=generators(*seeds),
    )
    wanted = [
        given
        + plain_semantic(
            stage, uniform(14 - known, seed), text_embeds=e[None], given=given, min_length=5, sampling=sampling
        )
        for seed, e, given in zip(seeds, text_embeds, prime.tolist())
    ]
    assert_same(found, wanted)
    assert len(set(map(len, wanted))) > 1
    assert min(map(len, wanted)) >= 5


def test_semantic_continues_primes_of_different_lengths():
    stage, prime = likes_to_end(semantic_stage(), SEMANTIC), codes(3, 5, num=SEMANTIC)
    prime[1, 2:], prime[2, 4:] = -1, -1
    found = generate_semantic(stage, max_length=12, prime=prime, sampling=SAMPLING, generator=generators(5, 6, 9))
    wanted = []
    for seed, given in zip((5, 6, 9), ([*prime[0].tolist()], prime[1, :2].tolist(), prime[2, :4].tolist())):
        wanted.append(given + plain_semantic(stage, uniform(12, seed)[: 12 - len(given)], given=given))
    assert_same(found, wanted)


@pytest.mark.parametrize('cond_scale', [1.0, 2.0])
@pytest.mark.parametrize('known', [0, 2])
def test_coarse(cond_scale, known):
    stage, seeds = likes_to_end(coarse_stage(**CROSS), CODES), range(6)
    sampling = Sampling(top_k=9, cond_scale=cond_scale)
    semantic_ids, text_embeds, prime = codes(6, 6, num=SEMANTIC), embeds(6, 3, 32), codes(6, known, COARSE)
    semantic_ids[1, 4:], semantic_ids[2, 5:] = -1, SEMANTIC
    found = generate_coarse(
        stage,
        semantic_ids,
        max_length=7,
        min_length=3,
        text_embeds=text_embeds,
        prime=prime,
        sampling=sampling,
        generator=generators(*seeds),
    )
    wanted = [
        given
        + plain_coarse(
            stage,
            ids[None],
            uniform((7 - known) * COARSE, seed),
            text_embeds=e[None],
            given=given,
            min_frames=3,
            sampling=sampling,
        )
        for seed, ids, e, given in zip(seeds, semantic_ids, text_embeds, prime.flatten(1).tolist())
    ]
    assert_same(found, wanted)
    assert len(set(map(len, wanted))) > 1


@pytest.mark.parametrize('cond_scale', [1.0, 2.0])
@pytest.mark.parametrize('known', [0, 2])
def test_fine(cond_scale, known):
    stage, seeds = fine_stage(**CROSS), range(3)
    sampling = Sampling(cond_scale=cond_scale)
    coarse, text_embeds, prime = codes(3, 5, COARSE), embeds(3, 3, 32), codes(3, known, FINE)
    coarse[1, 4:], coarse[2, 3, 1:] = -1, CODES
    found = generate_fine(
        stage, coarse, text_embeds=text_embeds, prime=prime, sampling=sampling, generator=generators(*seeds)
    )
    wanted, lengths = [], (5, 4, 3)
    for row, (seed, given, length) in enumerate(zip(seeds, prime.flatten(1).tolist(), lengths)):
        own = coarse[row : row + 1].clone()
        own[:, length:] = -1
        noise = uniform((length - known) * FINE, seed)
        tokens = plain_fine(stage, own, noise, text_embeds=text_embeds[row : row + 1], given=given, sampling=sampling)
        wanted.append(given + tokens)
    assert_same(found, wanted)


@pytest.mark.parametrize('options', [{}, dict(flash_attn=True, num_residual_streams=1)], ids=['default', 'flash'])
def test_a_sample_does_not_depend_on_its_batch(options):
    semantic, coarse, fine = (stage(**CROSS, **options) for stage in (semantic_stage, coarse_stage, fine_stage))
    likes_to_end(coarse, CODES)
    text_embeds, sampling = embeds(4, 3, 32), Sampling(cond_scale=2.0)
    semantic_ids, codes_given = codes(4, 8, num=SEMANTIC), codes(4, 6, COARSE)

    def run(rows):
        own = dict(text_embeds=text_embeds[rows], sampling=sampling)
        return (
            generate_semantic(semantic, max_length=9, generator=generators(*rows), **own),
            generate_coarse(
                coarse,
                semantic_ids[rows],
                max_length=6,
                window=3,
                overlap=1,
                semantic_per_frame=1.5,
                generator=generators(*rows),
                **own,
            ),
            generate_fine(fine, codes_given[rows], window=4, generator=generators(*rows), **own),
        )

    together = run([0, 1, 2, 3])
    for row in range(4):
        for one, all_of_them in zip(run([row]), together):
            assert torch.equal(one.tokens[0], all_of_them.tokens[row])
            assert one.lengths[0] == all_of_them.lengths[row]


# ---------------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize(('known', 'prime_overlap'), [(0, None), (3, None), (7, None), (3, 1), (7, 3), (7, 0)])
def test_semantic_windows_continue_the_end_of_the_one_before(known, prime_overlap):
    stage, prime = semantic_stage(**CROSS), codes(1, known, num=SEMANTIC)
    stories = [embeds(1, 3, 32, seed=1), embeds(1, 3, 32, seed=2)]
    found = generate_semantic(
        stage,
        max_length=12,
        min_length=12,
        window=5,
        overlap=2,
        prime_overlap=prime_overlap,
        prime=prime,
        text_embeds=stories,
        sampling=SAMPLING,
        generator=generators(3),
    )
    generator, tokens, number = torch.Generator().manual_seed(3), prime[0].tolist(), 0
    while len(tokens) < 12:
        given = tokens if len(tokens) < 5 and number == 0 else tokens[-2:]
        if number == 0 and prime_overlap is not None:
            given = tokens[len(tokens) - prime_overlap :]
        noise = torch.rand(min(5 - len(given), 12 - len(tokens)), generator=generator)
        tokens = tokens + plain_semantic(stage, noise, text_embeds=stories[min(number, 1)], given=given, min_length=99)
        number += 1
    assert_same(found, [tokens])


@pytest.mark.parametrize('window', [4, None])
def test_coarse_codes_go_on_from_the_end_of_a_prime(window):
    stage, semantic_ids, prime = coarse_stage(), codes(1, 6, num=3), codes(1, 5, COARSE)
    found = generate_coarse(
        stage,
        semantic_ids,
        max_length=8,
        min_length=8,
        window=window,
        prime=prime,
        prime_overlap=1,
        semantic_per_frame=Fraction(2, 3),
        sampling=SAMPLING,
        generator=generators(3),
    )
    noise = torch.rand(3 * COARSE, generator=torch.Generator().manual_seed(3))
    # frames [4, 8), in semantic tokens [2.7, 5.3)
    given = prime.flatten().tolist()
    new = plain_coarse(stage, semantic_ids[:, 2:6], noise, given=given[-COARSE:], min_frames=99)
    assert_same(found, [given + new])


@pytest.mark.parametrize('unique_consecutive', [False, True])
def test_coarse_windows_see_the_semantic_tokens_of_their_time(unique_consecutive):
    stage, semantic_ids = coarse_stage(), codes(1, 6, num=3)
    found = generate_coarse(
        stage,
        semantic_ids,
        max_length=9,
        min_length=9,
        window=4,
        overlap=2,
        semantic_per_frame=Fraction(2, 3),
        unique_consecutive=unique_consecutive,
        sampling=SAMPLING,
        generator=generators(3),
    )
    generator, tokens = torch.Generator().manual_seed(3), []
    # frames [0, 4), [2, 6), [4, 8), [6, 9), in semantic tokens [0, 2.7), [1.3, 4), [2.7, 5.3), [4, 6)
    for first, last, known in [(0, 3, 0), (1, 4, 2), (2, 6, 2), (4, 6, 2)]:
        seen = semantic_ids[:, first:last]
        seen = torch.unique_consecutive(seen, dim=1) if unique_consecutive else seen
        given = tokens[len(tokens) - known * COARSE :]
        noise = torch.rand(min(4 - known, 9 - len(tokens) // COARSE) * COARSE, generator=generator)
        tokens = tokens + plain_coarse(stage, seen, noise, given=given, min_frames=99)
    assert_same(found, [tokens])


@pytest.mark.parametrize('max_batch', [32, 1, 2])
@pytest.mark.parametrize('known', [0, 1])
def test_fine_windows_are_apart_from_each_other(max_batch, known):
    stage, coarse, prime = fine_stage(), codes(2, 8, COARSE), codes(2, known, FINE)
    coarse[1, 2:] = -1  # shorter than a window
    found = generate_fine(
        stage,
        coarse,
        window=3,
        max_batch=max_batch,
        prime=prime,
        sampling=SAMPLING,
        generator=generators(3, 4),
    )
    generator, wanted = torch.Generator().manual_seed(3), prime[0].flatten().tolist()
    for start, kept in [(0, known), (3, 0), (5, 1)]:
        given = wanted if start == 0 else []
        noise = torch.rand(3 * FINE - len(given), generator=generator)
        tokens = given + plain_fine(stage, coarse[:1, start : start + 3], noise, given=given, sampling=SAMPLING)
        wanted = wanted + tokens[kept * FINE :]
    given = prime[1].flatten().tolist()
    short = plain_fine(stage, coarse[1:, :3], uniform(2 * FINE - len(given), 4), given=given, sampling=SAMPLING)
    assert_same(found, [wanted, given + short])


def test_cost_of_windows_grows_with_the_length_only():
    """Positions that attention may see at once are bounded by the window, in all three stages."""
    seen = []
    stages = [own_stage(it) for it in (semantic_stage(), coarse_stage(), fine_stage())]
    for stage in stages:
        start = stage.transformer.start_cache
        stage.transformer.start_cache = lambda batch, capacity, start=start, **rest: (
            seen.append((batch, capacity)) or start(batch, capacity, **rest)
        )
    semantic = generate_semantic(stages[0], max_length=60, min_length=60, window=10, overlap=5)
    assert max(capacity for _, capacity in seen) <= 1 + 10
    windows = dict(window=8, overlap=4, semantic_per_frame=1.0)
    coarse = generate_coarse(stages[1], semantic.tokens, max_length=60, min_length=60, **windows)
    assert max(capacity for _, capacity in seen) <= 2 + 8 + 8 * COARSE
    fine = generate_fine(stages[2], coarse.tokens, window=6)
    assert seen[-1] == (10, 2 + 6 * (COARSE + FINE) - 1)
    assert len(seen) == 11 + 14 + 1
    assert fine.tokens.shape == (1, 60, FINE)


# ---------------------------------------------------------------------------------------------------------------
# Ends, primes, progress


def test_generation_stops_once_all_samples_have_ended():
    stage, steps = semantic_stage(), []
    with torch.no_grad():
        stage.to_logits.bias[SEMANTIC] += 100
    found = generate_semantic(
        stage, max_length=50, min_length=3, num_samples=2, progress=lambda *step: steps.append(step)
    )
    assert found.lengths.tolist() == [3, 3]
    assert found.tokens.shape == (2, 50)
    assert (found.tokens[:, 3:] == -1).all()
    assert len(steps) == 4  # not 50
    assert steps[0] == (1, 50)
    assert steps[-1] == (50, 50)


def test_coarse_never_is_empty_and_never_ends_inside_a_frame():
    stage = coarse_stage()
    with torch.no_grad():
        stage.coarse_logit_weights[:, CODES] = 100 * stage.transformer.norm.gamma.sign()
    found = generate_coarse(stage, codes(8, 4, num=SEMANTIC), max_length=6)
    assert (found.lengths >= 1).all()
    for row, length in zip(found.tokens, found.lengths):
        assert ((row[:length] >= 0) & (row[:length] < CODES)).all()
        assert (row[length:] == -1).all()


def test_last_fine_code_is_allowed():
    stage = fine_stage()
    with torch.no_grad():
        stage.fine_logit_weights.zero_()
    found = generate_fine(stage, codes(4, 40, COARSE), window=10, generator=torch.Generator().manual_seed(0))
    assert found.tokens.unique().tolist() == list(range(CODES))


def test_coarse_lengths_of_each_sample():
    found = generate_coarse(coarse_stage(), codes(3, 4, num=SEMANTIC), max_length=[2, 5, 3], min_length=2)
    assert found.tokens.shape == (3, 5, COARSE)
    assert (found.lengths <= torch.tensor([2, 5, 3])).all()


def test_prime_as_long_as_the_result_is_the_result():
    prime = codes(2, 4, num=SEMANTIC)
    assert torch.equal(generate_semantic(semantic_stage(), max_length=4, prime=prime).tokens, prime)
    prime = codes(2, 4, COARSE)
    given = generate_coarse(coarse_stage(), codes(2, 4, num=SEMANTIC), max_length=4, prime=prime)
    assert torch.equal(given.tokens, prime)
    fine = codes(2, 4, FINE)
    assert torch.equal(generate_fine(fine_stage(), prime, prime=fine, window=2).tokens, fine)


def test_a_seed_repeats_a_run():
    stage = semantic_stage()
    runs = [
        generate_semantic(stage, max_length=20, min_length=20, num_samples=3, generator=generator).tokens
        for generator in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1), torch.Generator())
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_results_can_be_trained_on():
    stage = semantic_stage()
    tokens, lengths = generate_semantic(stage, max_length=6, min_length=6)
    assert not tokens.is_inference()
    assert not lengths.is_inference()
    stage(ids=tokens).sum().backward()
    assert stage.semantic_embedding.weight.grad.abs().sum() > 0


def test_progress_bar(capsys):
    generate_fine(fine_stage(), codes(1, 2, COARSE), progress=True)
    assert '4/4' in capsys.readouterr().err
    generate_fine(fine_stage(), codes(1, 2, COARSE))
    assert capsys.readouterr().err == ''


def test_bfloat16_makes_codes():
    stage = own_stage(coarse_stage(**CROSS)).bfloat16()
    given = dict(text_embeds=embeds(1, 3, 32), sampling=Sampling(cond_scale=3.0, top_p=0.9))
    found = generate_coarse(stage, codes(2, 4, num=SEMANTIC), max_length=4, min_length=4, **given)
    assert found.lengths.tolist() == [4, 4]
    assert ((found.tokens >= 0) & (found.tokens < CODES)).all()


# ---------------------------------------------------------------------------------------------------------------
# Bad input

IDS, FRAMES = codes(2, 4, num=SEMANTIC), codes(2, 4, COARSE)
GIVEN = embeds(2, 3, 32)


@pytest.mark.parametrize(
    ('make', 'says'),
    [
        (lambda: generate_semantic(semantic_stage(), max_length=0), 'max_length must be greater than 0, got 0'),
        (lambda: generate_semantic(semantic_stage(), max_length=5, min_length=6), 'min_length must lie between 1 and'),
        (lambda: generate_semantic(semantic_stage(), max_length=3, prime=IDS), '4 tokens, more than max_length = 3'),
        (lambda: generate_semantic(semantic_stage(), max_length=5, prime=IDS + SEMANTIC), 'between -1 and 10'),
        (lambda: generate_semantic(semantic_stage(), max_length=5, prime=-IDS.sign()), 'in front of tokens'),
        (lambda: generate_semantic(semantic_stage(), max_length=5, prime=IDS, num_samples=3), 'num_samples is 3'),
        (lambda: generate_semantic(semantic_stage(), max_length=5, prime=IDS[0]), r'\(4, any\), got \(4,\)'),
        (lambda: generate_semantic(semantic_stage(), max_length=5, text_embeds=GIVEN), 'without has_condition'),
        (lambda: generate_semantic(semantic_stage(**CROSS), max_length=5), 'pass text_embeds'),
        (lambda: generate_semantic(semantic_stage(**CROSS), max_length=5, text_embeds=GIVEN[..., :8]), r'n, 32\)'),
        (
            lambda: generate_semantic(semantic_stage(**CROSS), max_length=5, text_embeds=GIVEN, num_samples=3),
            r'\(3, n, 32\), or \(1, n, 32\)',
        ),
        (lambda: generate_semantic(semantic_stage(), max_length=5, sampling=Sampling(cond_scale=2)), 'guide by'),
        (lambda: generate_semantic(semantic_stage(), max_length=5, window=3, overlap=3), 'overlap must lie between'),
        (lambda: generate_semantic(semantic_stage(), max_length=5, generator=generators(1, 2)), '2 generators for 1'),
        (lambda: generate_coarse(coarse_stage(), IDS, max_length=5, window=3), 'semantic_per_frame must be'),
        (lambda: generate_coarse(coarse_stage(), IDS, max_length=[5]), '1 lengths for 2 samples'),
        (lambda: generate_coarse(coarse_stage(), IDS, max_length=[5, 0]), 'max_length must be greater than 0'),
        (lambda: generate_coarse(coarse_stage(), IDS, max_length=3, prime=FRAMES), '4 frames, more than'),
        (lambda: generate_coarse(coarse_stage(), IDS, max_length=5, prime=FRAMES[..., :2]), r'\(2, any, 3\)'),
        (lambda: generate_coarse(coarse_stage(), IDS[:0], max_length=5), 'empty batch'),
        (lambda: generate_coarse(coarse_stage(), IDS + SEMANTIC, max_length=5), 'between -1 and 11'),
        (lambda: generate_fine(fine_stage(), FRAMES[..., :2]), r'\(any, any, 3\), got \(2, 4, 2\)'),
        (lambda: generate_fine(fine_stage(), FRAMES, window=0), 'window must be at least 1'),
        (lambda: generate_fine(fine_stage(), FRAMES, max_batch=0), 'max_batch must be greater than 0'),
        (lambda: generate_fine(fine_stage(), FRAMES, prime=codes(2, 5, FINE)), '5 frames, more than the 4'),
    ],
)
def test_bad_values(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_bad_types():
    with pytest.raises(TypeError, match='int64'):
        generate_fine(fine_stage(), FRAMES.float())
    with pytest.raises(TypeError, match='transformer'):
        generate_coarse(fine_stage(), IDS, max_length=5)
