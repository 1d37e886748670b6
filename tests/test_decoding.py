"""Generation by each stage, against a plain loop over the stages' own uncached forward."""

from fractions import Fraction

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

from musiclm_pytorch.audiolm.convert import own_stage
from musiclm_pytorch.audiolm.generate import generate_coarse, generate_fine, generate_semantic
from musiclm_pytorch.audiolm.generation_args import Sampling
from musiclm_pytorch.audiolm.stages import CoarseTransformer, logits_of

CROSS = dict(audio_text_condition=True)
SAMPLING = Sampling(temperature=0.9, top_k=9, top_p=0.95)
BUILD = dict(semantic=semantic_stage, coarse=coarse_stage, fine=fine_stage)
GENERATE = dict(semantic=generate_semantic, coarse=generate_coarse, fine=generate_fine)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniform(num_steps: int, seed: int) -> torch.Tensor:
    return torch.rand(num_steps, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def plain(stage, *given, known=(), noise, sampling=SAMPLING, text_embeds=None, min_length=99) -> list[int]:
    """The tokens of one sample, those `known` and one for each of `noise`, up to the end token: a plain loop, which
    computes everything anew for each. That `features` are audiolm-pytorch's shows `test_teacher_forcing.py`."""
    stage, given, tokens = own_stage(stage), [it.flatten(1) for it in given], list(known)
    for u in noise:
        ids, (frame, level) = torch.tensor([tokens], dtype=torch.long), divmod(len(tokens), stage.num_levels)
        conditions = [None] if text_embeds is None else [text_embeds, torch.zeros_like(text_embeds)]
        features = [stage.features(*given, ids, conditioning=it)[-1][:, -1] for it in conditions]
        conditioned, null = [logits_of(it, *stage.own_heads()[level]) for it in (features[0], features[-1])]
        logits = null + (conditioned - null) * sampling.cond_scale
        if stage.end_id is not None and (level or frame < min_length):
            logits[:, stage.end_id] = float('-inf')
        token = int(sampling.draw(logits, u[None]))
        if token == stage.end_id:
            break
        tokens.append(token)
    return tokens


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
@pytest.mark.parametrize(
    ('name', 'known'), [('semantic', 0), ('semantic', 3), ('coarse', 0), ('coarse', 2), ('fine', 0), ('fine', 2)]
)
def test_tokens_of_each_stage(name, known, cond_scale):
    """With a prime, guidance and samples that end early, the shortest after `least` tokens or frames."""
    stage, sampling, text_embeds = BUILD[name](**CROSS), Sampling(top_k=9, cond_scale=cond_scale), embeds(5, 3, 32)
    given, own, lengths, least = [], (), [7] * 5, 3
    if name == 'semantic':
        prime, keywords = codes(5, known, num=SEMANTIC), dict(max_length=7, min_length=least)
    elif name == 'coarse':
        given, prime = [codes(5, 6, num=SEMANTIC)], codes(5, known, COARSE)
        given[0][1, 4:], given[0][2, 5:] = -1, SEMANTIC
        keywords = dict(max_length=7, min_length=least)
    else:
        given, prime, keywords, lengths = [codes(5, 5, COARSE)], codes(5, known, FINE), {}, [5, 4, 3, 5, 5]
        given[0][1, 4:], given[0][2, 3, 1:] = -1, CODES  # codes that end with a sample
    if name != 'fine':
        likes_to_end(stage, own_stage(stage).end_id)
    keywords |= dict(text_embeds=text_embeds, prime=prime, sampling=sampling, generator=generators(*range(5)))
    found = GENERATE[name](stage, *given, **keywords)
    wanted, levels = [], own_stage(stage).num_levels
    for row, length in enumerate(lengths):
        own = [it[row : row + 1].clone() for it in given]
        if name == 'fine':
            own[0][:, length:] = -1
        how = dict(known=prime[row].flatten().tolist(), noise=uniform((length - known) * levels, row))
        wanted.append(
            plain(stage, *own, **how, sampling=sampling, text_embeds=text_embeds[row : row + 1], min_length=least)
        )
    assert_same(found, wanted)
    assert len(set(map(len, wanted))) > 1
    assert min(map(len, wanted)) >= least * levels


def test_semantic_continues_primes_of_different_lengths():
    stage, prime = likes_to_end(semantic_stage(), SEMANTIC), codes(3, 5, num=SEMANTIC)
    prime[1, 2:], prime[2, 4:] = -1, -1
    found = generate_semantic(stage, max_length=12, prime=prime, sampling=SAMPLING, generator=generators(5, 6, 9))
    wanted = []
    for seed, row in zip((5, 6, 9), prime):
        known = row[row != -1].tolist()
        wanted.append(plain(stage, known=known, noise=uniform(12, seed)[: 12 - len(known)], min_length=1))
    assert_same(found, wanted)


@pytest.mark.parametrize('options', [{}, dict(flash_attn=True, num_residual_streams=1)], ids=['default', 'flash'])
def test_a_sample_does_not_depend_on_its_batch(options):
    semantic, coarse, fine = (stage(**CROSS, **options) for stage in BUILD.values())
    likes_to_end(coarse, CODES)
    text_embeds, sampling = embeds(4, 3, 32), Sampling(cond_scale=2.0)
    semantic_ids, codes_given = codes(4, 8, num=SEMANTIC), codes(4, 6, COARSE)
    windows = dict(window=3, overlap=1, semantic_per_frame=1.5)

    def run(rows):
        def own():
            return dict(text_embeds=text_embeds[rows], sampling=sampling, generator=generators(*rows))

        return (
            generate_semantic(semantic, max_length=9, **own()),
            generate_coarse(coarse, semantic_ids[rows], max_length=6, **windows, **own()),
            generate_fine(fine, codes_given[rows], window=4, **own()),
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
    keywords = dict(window=5, overlap=2, prime_overlap=prime_overlap, prime=prime, text_embeds=stories)
    found = generate_semantic(
        stage, max_length=12, min_length=12, sampling=SAMPLING, generator=generators(3), **keywords
    )
    generator, tokens, number = torch.Generator().manual_seed(3), prime[0].tolist(), 0
    while len(tokens) < 12:
        seen = len(tokens) if len(tokens) < 5 and number == 0 else 2
        if number == 0 and prime_overlap is not None:
            seen = prime_overlap
        begin = len(tokens) - seen
        noise = torch.rand(min(5 - seen, 12 - len(tokens)), generator=generator)
        tokens[begin:] = plain(stage, known=tokens[begin:], noise=noise, text_embeds=stories[min(number, 1)])
        number += 1
    assert_same(found, [tokens])


def told_the_time(stage):
    """The same coarse stage with an embedding of the semantic token of the time."""
    plain = own_stage(stage)
    stage = CoarseTransformer(**plain.config | dict(semantic_per_frame=2 / 3)).eval()
    stage.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.normal_(stage.aligned_embedding.weight)
    return stage


# the semantic tokens of windows, how many frames each goes on from, and how many it makes: frames [0, 4), [2, 6),
# [4, 8), [6, 9), in semantic tokens [0, 2.7), [1.3, 4), [2.7, 5.3), [4, 6)
WINDOWS = [(0, 3, 0, 4), (1, 4, 2, 2), (2, 6, 2, 2), (4, 6, 2, 1)]
# the same, begun where a frame and a semantic token begin together: at frames 0, 0, 3 and 6
WHOLE = [(0, 3, 0, 4), (0, 4, 4, 2), (2, 6, 3, 2), (4, 6, 2, 1)]
LAST = [(3, 6, 1, 3)]  # from the end of a prime: frames [5, 9), in semantic tokens [3.3, 6)


@pytest.mark.parametrize(
    ('known', 'keywords', 'windows'),
    [
        (0, dict(window=4, overlap=2), WINDOWS),
        (0, dict(window=4, overlap=2, unique_consecutive=True), WINDOWS),
        (0, dict(window=4, overlap=2), WHOLE),
        (6, dict(window=4, prime_overlap=1), LAST),
        (6, dict(prime_overlap=1), LAST),
    ],
)
def test_coarse_windows_see_the_semantic_tokens_of_their_time(known, keywords, windows):
    stage, semantic_ids, prime = coarse_stage(), codes(1, 6, num=3), codes(1, known, COARSE)
    stage = told_the_time(stage) if windows is WHOLE else stage
    keywords = dict(semantic_per_frame=Fraction(2, 3), prime=prime, sampling=SAMPLING) | keywords
    found = generate_coarse(stage, semantic_ids, max_length=9, min_length=9, generator=generators(3), **keywords)
    generator, tokens = torch.Generator().manual_seed(3), prime.flatten().tolist()
    for first, last, overlap, made in windows:
        seen = semantic_ids[:, first:last]
        seen = torch.unique_consecutive(seen, dim=1) if 'unique_consecutive' in keywords else seen
        begin, noise = len(tokens) - overlap * COARSE, torch.rand(made * COARSE, generator=generator)
        tokens[begin:] = plain(stage, seen, known=tokens[begin:], noise=noise)
    assert_same(found, [tokens])


@pytest.mark.parametrize('max_batch', [32, 1, 2])
@pytest.mark.parametrize('known', [0, 1])
def test_fine_windows_are_apart_from_each_other(max_batch, known):
    stage, coarse, prime = fine_stage(), codes(2, 8, COARSE), codes(2, known, FINE)
    coarse[1, 2:] = -1  # shorter than a window
    keywords = dict(window=3, max_batch=max_batch, prime=prime, sampling=SAMPLING)
    found = generate_fine(stage, coarse, generator=generators(3, 4), **keywords)
    generator, wanted = torch.Generator().manual_seed(3), prime[0].flatten().tolist()
    for start, kept in [(0, known), (3, 0), (5, 1)]:
        given = wanted if start == 0 else []
        noise = torch.rand(3 * FINE - len(given), generator=generator)
        made = plain(stage, coarse[:1, start : start + 3], known=given, noise=noise)
        wanted = wanted + made[kept * FINE :]
    given = prime[1].flatten().tolist()
    short = plain(stage, coarse[1:, :3], known=given, noise=uniform(2 * FINE - len(given), 4))
    assert_same(found, [wanted, short])


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
