"""The test for memorised music: planted copies, exact transport, a calibrated threshold, and tiny models end to end."""

import pkgutil
import random

import numpy as np
import pytest
import torch
from helpers.music import RATE, build_audio_lm, build_quantizer
from scipy.optimize import linprog

from musiclm_pytorch import MusicLM, evaluation
from musiclm_pytorch.audiolm.generate import generate_semantic
from musiclm_pytorch.audiolm.generation_args import Sampling
from musiclm_pytorch.audiolm.semantic_mulan import MuLaNSemanticTokenizer
from musiclm_pytorch.evaluation.memorization import (
    Memorization,
    approximate_match_costs,
    codebook_distances,
    continuations,
    memorisation,
    negative_pairs,
    training_clips,
)

CODES = 40


def tokens(n, t, codes=CODES, seed=0):
    return torch.randint(codes, (n, t), generator=torch.Generator().manual_seed(seed))


def matches(generated, training, distances, **keywords):
    """Of sequences that come in two shards, merged."""
    metric, other = (Memorization(distances, **keywords) for _ in range(2))
    metric.update(generated[:2], training[:2])
    if len(generated) > 2:
        other.update(generated[2:], training[2:])
    metric.merge(other)
    assert torch.equal(torch.stack(metric.state['generated']), generated)
    return metric.compute()


@pytest.fixture
def distances():
    """Between centres that come in near pairs: 0 and 1, 2 and 3, and so on."""
    numbers = np.random.default_rng(0)
    centers = np.repeat(numbers.standard_normal((CODES // 2, 8)), 2, axis=0)
    centers += 0.01 * numbers.standard_normal(centers.shape)
    return np.linalg.norm(centers[:, None] - centers, axis=-1)


def transport_by_linear_program(first, second, distances):
    """The least cost of moving one histogram onto the other, with every flow a variable."""
    c = len(distances)
    histograms = [np.bincount(it, minlength=c) / len(it) for it in (first, second)]
    leaving = np.kron(np.eye(c), np.ones(c))
    arriving = np.kron(np.ones(c), np.eye(c))
    return linprog(distances.ravel(), A_eq=np.vstack((leaving, arriving)), b_eq=np.concatenate(histograms)).fun


def test_the_package_gives_the_function_though_its_module_is_imported():
    assert evaluation.memorisation is memorisation
    # an imported module takes the place of what has its name
    assert not {module.name for module in pkgutil.iter_modules(evaluation.__path__)} & set(evaluation.__all__)


@pytest.mark.parametrize('length', [1, 2, 7, 12])
def test_cost_is_that_of_optimal_transport(length):
    table = np.random.default_rng(length).random((6, 6))  # no metric: moving a token onto itself may cost
    first, second = tokens(5, length, codes=6, seed=1), tokens(5, length, codes=6, seed=2)
    costs = approximate_match_costs(first, second, table)
    expected = [transport_by_linear_program(a.numpy(), b.numpy(), table) for a, b in zip(first, second)]
    assert costs == pytest.approx(expected, abs=1e-9)


def test_copies_near_copies_and_strangers(distances):
    training = tokens(60, 25)
    found = matches(training, training, distances)
    assert found['exact'].value == found['approximate'].value == found['same_token'].value == 1
    assert found['exact'].low > 0.9  # Wilson: not sure of all clips there are

    near = training ^ 1  # the nearest centre of each
    found = matches(near, training, distances)
    assert found['exact'].value == found['same_token'].value == 0
    assert found['approximate'].value == 1
    assert found['approximate'].details['median_cost'] < 0.1 < found['approximate'].details['threshold']

    found = matches(tokens(60, 25, seed=9), training, distances)
    assert found['exact'].value == 0
    assert found['approximate'].value < 0.05
    assert found['exact'].high > 0.01

    mixed = torch.cat((training[:15], near[15:30], tokens(30, 25, seed=9)))
    found = matches(mixed, training, distances)
    assert found['exact'].value == 0.25
    assert found['approximate'].value == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize('rate', [0.0, 0.003, 0.05, 0.3])
def test_threshold_keeps_the_rate_of_false_positives(distances, rate):
    generated, training = tokens(40, 15, seed=3), tokens(40, 15, seed=4)
    details = matches(generated, training, distances, false_positive_rate=rate)['approximate'].details
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    costs = [approximate_match_costs(generated[[i]], training[[j]], distances)[0] for i, j in pairs]
    assert details['negatives'] == len(pairs)
    below = sum(cost < details['threshold'] for cost in costs)
    assert below == details['false_positives'] == int(rate * len(pairs))
    # any higher, and there were too many
    assert sum(cost <= details['threshold'] for cost in costs) > rate * len(pairs)
    assert details['median_cost_of_negatives'] == pytest.approx(np.median(costs))


def test_negatives_are_drawn_by_the_seed_and_never_of_the_same_clip():
    training = tokens(30, 4)
    training[7] = training[3]
    own, other = negative_pairs(training, 10**6, 0)
    expected = {(i, j) for i in range(30) for j in range(30) if i != j and {i, j} != {3, 7}}
    assert set(zip(own.tolist(), other.tolist())) == expected
    assert len(own) == len(expected)
    drawn = set(zip(*(it.tolist() for it in negative_pairs(training, 100, 1))))
    assert drawn <= expected
    assert 95 < len(drawn) <= 100
    assert drawn == set(zip(*(it.tolist() for it in negative_pairs(training, 100, 1))))
    assert drawn != set(zip(*(it.tolist() for it in negative_pairs(training, 100, 2))))


def test_without_negatives_nothing_is_near(distances):
    training = tokens(3, 5)
    for lone in (training[:1], training[[0, 0, 0]]):
        found = matches(lone, lone, distances, details=dict(prompt_length=2))
        assert found['exact'].value == 1
        assert found['approximate'].value is None
        assert 'no negatives' in found['approximate'].reason
        assert found['approximate'].details == dict(prompt_length=2)
    # generated alike whatever the clip, and clips of the same tokens in another order
    turned = torch.stack((training[0], training[0].roll(1)))
    found = matches(turned, turned, distances)
    assert 'cost nothing' in found['approximate'].reason


def test_wilson_interval_of_known_counts():
    generated = tokens(10, 3)
    training = generated.clone()
    training[:7, 1] = (training[:7, 1] + 1) % CODES
    figure = matches(generated, training, np.ones((CODES, CODES)))['exact']
    # Wilson (1927) in closed form
    n, share, z = 10, 0.3, 1.959964
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    assert (figure.value, figure.low, figure.high) == pytest.approx((share, middle - half, middle + half), abs=1e-6)


# ---- whole models ----


@pytest.fixture(scope='module')
def musiclm():
    torch.manual_seed(0)
    quantizer = build_quantizer()
    tokenizer = MuLaNSemanticTokenizer(quantizer.mulan, codebook_size=6)
    tokenizer.fit([torch.rand(9000) * torch.linspace(0, 1, 9000)])
    random.seed(2)  # hyper-connections draw from it where they begin
    audio_lm = build_audio_lm(tokenizer=tokenizer)
    torch.manual_seed(1)
    # so far from its start that all that it saw makes a difference to what it says
    with torch.no_grad():
        for name, weight in audio_lm.semantic.transformer.named_parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
            elif 'bias' not in name:
                weight.add_(0.3 * torch.randn(weight.shape))
    return MusicLM(audio_lm, quantizer)


@pytest.fixture(scope='module')
def clips(musiclm):
    generator = torch.Generator().manual_seed(1)
    times = torch.arange(6 * RATE) / RATE
    waves = [torch.sin(times * 100 * (i + 1) + i) * torch.rand(1, generator=generator) for i in range(5)]
    waves[2] = waves[2][:-700]
    return waves, training_clips(musiclm, waves, sample_rate=RATE)


def test_clips_are_heard_as_the_model_hears_them(musiclm, clips):
    waves, found = clips
    shortest = musiclm.tokenizer(waves[2][None], input_sample_hz=RATE).shape[1]
    assert found.tokens.shape == (5, shortest)
    assert found.indices.shape == (5, 2)
    for i, wave in enumerate(waves):
        assert torch.equal(found.tokens[i], musiclm.tokenizer(wave[None], input_sample_hz=RATE)[0, :shortest])
        assert torch.equal(found.indices[i], musiclm.mulan_embed_quantizer.indices(wave[None], sample_rate=RATE)[0])


def test_long_clips_are_heard_in_windows(musiclm):
    wave = torch.sin(torch.arange(12 * RATE) ** 1.5 / 9000)
    quantizer = musiclm.mulan_embed_quantizer
    latent = quantizer.mulan.embed_audio(wave, sample_rate=RATE)
    expected = quantizer.indices(latents=latent[None])
    assert torch.equal(training_clips(musiclm, [wave], sample_rate=RATE).indices, expected)


def likeliest(musiclm, known, codes, count):
    """Greedy decoding by the stage's own uncached forward, one token at a time."""
    stage = musiclm.stages['semantic']
    embeds = musiclm.mulan_embed_quantizer.embed(codes[None], 'semantic')
    known = known[None].clone()
    for _ in range(count):
        (features,) = stage.features(known, conditioning=embeds)
        logits = stage.to_logits(features)[0, -1]
        logits[stage.eos_id] = -torch.inf
        known = torch.cat((known, logits.argmax()[None, None]), dim=1)
    return known[0, -count:]


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_continuations_are_greedy_and_conditioned(musiclm, clips):
    found = clips[1]
    for prompt in (0, 4):
        said = continuations(musiclm, found.tokens, found.indices, prompt, prompt + 6, max_batch=2)
        with torch.inference_mode():
            expected = torch.stack([likeliest(musiclm, it[:prompt], c, 6) for it, c in zip(*found)])
        assert torch.equal(said, expected)


def test_long_continuations_see_a_window(musiclm, clips):
    found = clips[1]
    narrow = MusicLM(musiclm.audio_lm, musiclm.mulan_embed_quantizer, windows=(2.0, 10.0, 3.0))
    window = round(2 * narrow.semantic_rate)
    said = continuations(narrow, found.tokens, found.indices, 2, 20)
    expected = generate_semantic(
        narrow.stages['semantic'],
        max_length=20,
        min_length=20,
        text_embeds=narrow.mulan_embed_quantizer.embed(found.indices, 'semantic'),
        prime=found.tokens[:, :2],
        sampling=Sampling(temperature=0),
        window=window,
        overlap=window // 2,
    )
    assert 2 < window < 20
    assert torch.equal(said, expected.tokens[:, 2:])
    assert not torch.equal(said, continuations(musiclm, found.tokens, found.indices, 2, 20))


def test_a_stage_without_conditioning_and_repetitions(musiclm, clips):
    waves, _ = clips
    audio_lm = build_audio_lm(('coarse',), tokenizer=musiclm.tokenizer, unique_consecutive=True)
    plain = MusicLM(audio_lm, musiclm.mulan_embed_quantizer)
    shorter = training_clips(plain, waves[:1], sample_rate=RATE)
    whole = plain.tokenizer(waves[0][None], input_sample_hz=RATE)[0]
    assert torch.equal(shorter.tokens[0], torch.unique_consecutive(whole))
    assert shorter.tokens.shape[1] < len(whole)
    said = continuations(plain, shorter.tokens, shorter.indices, 1, 5)
    assert torch.equal(said, continuations(plain, shorter.tokens, shorter.indices + 1, 1, 5))


def test_a_model_that_says_its_clips_again_is_found(musiclm, clips):
    found = clips[1]
    total = found.tokens.shape[1]
    # clips that this untrained model would say, as if it had learned them
    said = continuations(musiclm, found.tokens, found.indices, 3, total)
    known = torch.cat((found.tokens[:, :3], said), dim=1)
    musiclm.train()  # which is left, and makes no difference
    figures = memorisation(musiclm, known, found.indices, (3, 6), new_tokens=8, seed=1)
    assert musiclm.training
    assert musiclm.stages['semantic'].training
    musiclm.eval()
    assert list(figures) == [3, 6]
    for prompt, found_there in figures.items():
        assert found_there['exact'].value == found_there['same_token'].value == 1
        assert found_there['exact'].details == dict(prompt_length=prompt)
    other = memorisation(musiclm, (known + 1) % 6, found.indices, (3,), new_tokens=None)[3]
    assert other['exact'].value == 0
    assert other['same_token'].value < 1
    assert other['approximate'].details['negatives'] <= 20


def test_distances_are_those_of_the_centres(musiclm):
    centers = musiclm.tokenizer.kmeans.centers.double()
    found = codebook_distances(musiclm.tokenizer)
    assert found == pytest.approx((centers[:, None] - centers).norm(dim=-1).numpy())
    assert (found.diagonal() == 0).all()
    with pytest.raises(TypeError, match='Linear has no k-means centres; pass distances'):
        codebook_distances(torch.nn.Linear(2, 2))


def test_bad_requests(musiclm, clips, distances):
    waves, found = clips
    ask = dict(musiclm=musiclm, tokens=found.tokens, indices=found.indices, prompt_lengths=(0,), new_tokens=5)
    for change, message in [
        (dict(prompt_lengths=(0, 500)), 'a prompt of 500 and 5 new tokens do not fit into clips of'),
        (dict(prompt_lengths=(found.tokens.shape[1],), new_tokens=None), 'one or more new tokens do not fit'),
        (dict(prompt_lengths=(-1,)), 'a prompt of -1'),
        (dict(indices=found.indices[:2]), r'indices must have shape \(5, q\)'),
        (dict(tokens=-found.tokens - 1), 'tokens holds the token -'),
        (dict(distances=np.zeros((2, 3))), r'distances must have shape \(tokens, tokens\)'),
        (dict(distances=np.zeros((1, 1))), r'has no row in distances of shape \(1, 1\)'),
        (dict(false_positive_rate=1.0), r'false_positive_rate must lie in \[0, 1\)'),
        (dict(negatives=0), 'negatives must be greater than 0'),
    ]:
        with pytest.raises(ValueError, match=message):
            memorisation(**{**ask, **change})
    with pytest.raises(TypeError, match='tokens must be int64'):
        memorisation(**{**ask, 'tokens': found.tokens.int()})
    with pytest.raises(ValueError, match='no clips to test with'):
        training_clips(musiclm, [], sample_rate=RATE)
    with pytest.raises(ValueError, match=r'waves\[1\] must have shape \(samples,\)'):
        training_clips(musiclm, [waves[0], waves[0][None]], sample_rate=RATE)
    with pytest.raises(ValueError, match='one semantic token needs'):
        training_clips(musiclm, [torch.zeros(10)], sample_rate=RATE)
    with pytest.raises(ValueError, match=r'generated has shape \(2, 3\), but is compared with \(2, 4\)'):
        matches(tokens(2, 3), tokens(2, 4), distances)
    with pytest.raises(ValueError, match='neither of them 0'):
        matches(tokens(2, 3)[:, :0], tokens(2, 3)[:, :0], distances)
    with pytest.raises(ValueError, match='no sequences to compare'):
        Memorization(distances).compute()
