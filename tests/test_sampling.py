"""From logits to tokens: against plain definitions, one row at a time."""

import math

import pytest
import torch

from musiclm_pytorch.audiolm.generate import Window, continued_windows, separate_windows
from musiclm_pytorch.audiolm.generation_args import Noise, Sampling


def plain_draw(logits: list[float], noise: float, sampling: Sampling) -> int:
    """The definition, in Python's floats."""
    if sampling.temperature == 0:
        return max(range(len(logits)), key=lambda code: logits[code])
    order = range(len(logits))
    if sampling.top_k is not None or sampling.top_p is not None:
        order = sorted(order, key=lambda code: -logits[code])[: sampling.top_k]
    weights = [math.exp((logits[code] - max(logits)) / sampling.temperature) for code in order]
    if sampling.top_p is not None:
        kept, reached = 0, 0.0
        while reached < sampling.top_p * sum(weights) and kept < len(weights):
            reached += weights[kept]
            kept += 1
        weights = weights[:kept]
    rest = noise * sum(weights)
    for code, weight in zip(order, weights):
        rest -= weight
        if rest < 0:
            return code
    raise AssertionError('noise must be below 1')


@pytest.mark.parametrize(
    'sampling',
    [
        Sampling(),
        Sampling(temperature=0.4),
        Sampling(temperature=0),
        Sampling(top_k=1),
        Sampling(top_k=4, temperature=2),
        Sampling(top_k=1000),
        Sampling(top_p=0.6),
        Sampling(top_p=1e-6),
        Sampling(top_p=1.0),
        Sampling(top_k=5, top_p=0.8, temperature=0.9),
    ],
    ids=str,
)
def test_draws_are_those_of_the_definition(sampling):
    logits, noise = torch.randn(200, 17) * 2, torch.rand(200)
    drawn = sampling.draw(logits, noise)
    assert drawn.dtype == torch.long
    assert drawn.tolist() == [
        plain_draw(row.tolist(), float(u), sampling) for row, u in zip(logits.double(), noise.double())
    ]


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, float('-inf'), 2.0])
    drawn = Sampling().draw(logits.expand(20000, -1), torch.rand(20000))
    found = drawn.bincount(minlength=4) / 20000
    torch.testing.assert_close(found, logits.softmax(dim=0), rtol=0, atol=0.015)
    assert found[2] == 0


@pytest.mark.parametrize('sampling', [Sampling(), Sampling(top_k=4), Sampling(top_p=1.0), Sampling(temperature=0)])
@pytest.mark.parametrize('noise', [0.0, 1 - 2**-24])
def test_forbidden_codes_never_come_out(sampling, noise):
    logits = torch.full((3, 5), float('-inf'))
    logits[0, 2] = logits[1, 4] = logits[2, 0] = 1.0
    assert sampling.draw(logits, torch.full((3,), noise)).tolist() == [2, 4, 0]


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together, alone = Noise(generators(3, 4, 5), 3).draw(6, range(3)), Noise(generators(4), 1).draw(6, [0])
    assert torch.equal(together[1:2], alone)
    noise = Noise(generators(3, 4, 5), 3)
    assert torch.equal(noise.draw(6, [0, 2]), together[[0, 2]])
    assert torch.equal(noise.draw(6, [1]), together[1:2])


def test_noise_of_one_generator():
    short, long = (Noise(torch.Generator().manual_seed(1), 3).draw(steps, range(3)) for steps in (20, 50))
    assert torch.equal(long[:, :20], short)
    torch.manual_seed(1)
    assert torch.equal(Noise(None, 3).draw(20, range(3)), short)
    assert ((short >= 0) & (short < 1)).all()
    with pytest.raises(ValueError, match='2 generators for 3 samples'):
        Noise([torch.Generator(), torch.Generator()], 3)


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        (dict(temperature=-1), 'temperature must be 0 or above, got -1'),
        (dict(temperature=float('inf')), 'temperature'),
        (dict(temperature=1e39), r'temperature must be 1000 at most, got 1e\+39'),
        (dict(temperature=1e-30), 'temperature must be 0, or at least 0.001, got 1e-30'),
        (dict(cond_scale=1e38), r'cond_scale must lie between -100 and 100, got 1e\+38; 1 to 5'),
        (dict(top_k=0), 'top_k must be at least 1'),
        (dict(top_p=0.0), 'top_p must lie in'),
        (dict(top_p=1.5), 'top_p must lie in'),
        (dict(cond_scale=float('nan')), 'cond_scale must lie between'),
        (dict(negative_scale=-1.0), 'negative_scale must lie between 0 and 100, got -1'),
    ],
)
def test_values_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        Sampling(**options)


def test_continued_windows():
    assert continued_windows(10, None, prime=3) == [Window(0, 3, 10)]
    assert continued_windows(10, 4, 2) == [Window(0, 0, 4), Window(2, 4, 6), Window(4, 6, 8), Window(6, 8, 10)]
    assert continued_windows(9, 4, 1, prime=2) == [Window(0, 2, 4), Window(3, 4, 7), Window(6, 7, 9)]
    assert continued_windows(9, 4, 3, prime=6) == [Window(3, 6, 7), Window(4, 7, 8), Window(5, 8, 9)]
    assert continued_windows(5, 4, 0, prime=4) == [Window(4, 4, 5)]
    assert continued_windows(4, 4, 0, prime=4) == []
    assert continued_windows(9, 4, 2, prime=3, prime_overlap=1) == [Window(2, 3, 6), Window(4, 6, 8), Window(6, 8, 9)]
    assert continued_windows(9, 4, 2, prime=6, prime_overlap=0) == [Window(6, 6, 9)]
    assert continued_windows(9, None, prime=6, prime_overlap=2) == [Window(4, 6, 9)]
    assert continued_windows(9, 4, 2, prime=1, prime_overlap=3) == continued_windows(9, 4, 2, prime=1)


def test_separate_windows():
    assert separate_windows(10, None, prime=3) == [Window(0, 3, 10)]
    assert separate_windows(8, 4) == [Window(0, 0, 4), Window(4, 4, 8)]
    assert separate_windows(10, 4) == [Window(0, 0, 4), Window(4, 4, 8), Window(6, 8, 10)]
    assert separate_windows(10, 4, prime=5) == [Window(4, 5, 8), Window(6, 8, 10)]
    assert separate_windows(10, 4, prime=9) == [Window(6, 9, 10)]
    assert separate_windows(3, 4) == [Window(0, 0, 3)]
    assert separate_windows(0, 4) == []


@pytest.mark.parametrize(
    ('length', 'window', 'prime'), [(1, 1, 0), (1, 3, 6), (7, 8, 1), (7, 3, 0), (40, 3, 6), (40, 8, 1)]
)
def test_windows_make_each_position_once(length, window, prime):
    for windows in [
        separate_windows(length, window, prime),
        *(
            continued_windows(length, window, overlap, prime, prime_overlap)
            for overlap in range(window)
            for prime_overlap in (None, *range(window))
        ),
    ]:
        made = [position for _, known, stop in windows for position in range(known, stop)]
        assert made == list(range(prime, length))
        assert all(stop - start <= window and start <= known for start, known, stop in windows)


@pytest.mark.parametrize(('window', 'overlap'), [(0, 0), (-2, 0), (4, 4), (4, -1)])
def test_impossible_windows(window, overlap):
    with pytest.raises(ValueError, match='must'):
        continued_windows(10, window, overlap)
    if window == 4:
        with pytest.raises(ValueError, match=f'prime_overlap must .* got {overlap}'):
            continued_windows(10, window, 0, 5, prime_overlap=overlap)
