"""Alignment of audio and text: retrieval against plain loops, duplicates, and p-values against all permutations."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from musiclm_pytorch.evaluation import alignment
from musiclm_pytorch.evaluation.alignment import alignment_figures
from musiclm_pytorch.trainer.retrieval import retrieval_metrics


def latents(n, d=16, noise=1.0, seed=0):
    """Texts, and audio near them."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(n, d, generator=generator)
    audio = text + noise * torch.randn(n, d, generator=generator)
    return F.normalize(audio, dim=-1), F.normalize(text, dim=-1)


def test_cosines_and_their_mean():
    audio, text = latents(7)
    figures = alignment_figures(audio, text, permutations=10)
    expected = F.cosine_similarity(audio.double(), text.double())
    assert figures['cosines'] == pytest.approx(expected.tolist(), abs=1e-6)
    mean = figures['mulan_cycle_consistency']
    assert mean.value == pytest.approx(expected.mean().item(), abs=1e-6)
    assert mean.count == 7
    assert mean.low < mean.value < mean.high
    renamed = alignment_figures(audio, text, name='clap_score', permutations=10)
    assert renamed.pop('clap_score') == figures.pop('mulan_cycle_consistency')
    assert renamed == figures


@pytest.mark.parametrize('n', [2, 11, 40])
@pytest.mark.parametrize('noise', [0.3, 1.5])
def test_retrieval_without_duplicates_is_that_of_the_trainer(n, noise):
    audio, text = latents(n, noise=noise, seed=n)
    expected = retrieval_metrics(audio @ text.T)
    figures = alignment_figures(audio, text, permutations=1)
    for direction in ('audio_to_text', 'text_to_audio'):
        for k in (1, 5, 10):
            figure = figures[f'{direction}_recall_at_{k}']
            if n > k:
                assert figure.value == pytest.approx(expected[f'{direction}_recall_at_{k}'])
                assert figure.low <= figure.value <= figure.high
            else:
                assert figure.value is None
                assert f'more than {k} different texts' in figure.reason
        assert figures[f'{direction}_median_rank'].value == expected[f'{direction}_median_rank']


def naive_ranks(scores, texts):
    """The rank of each own column among those of other texts, ties counting against it."""
    return [
        1 + sum(texts[j] != texts[i] and scores[i, j] >= scores[i, i] for j in range(len(texts)))
        for i in range(len(texts))
    ]


def test_clips_of_the_same_text_are_no_negatives_of_each_other():
    audio, text = latents(13, noise=1.2)
    texts = [f'text {i % 9}' for i in range(13)]
    text = text[[texts.index(it) for it in texts]]
    figures = alignment_figures(audio, text, texts, permutations=50)
    scores = (audio.double() @ text.double().T).numpy()
    for direction, table in (('audio_to_text', scores), ('text_to_audio', scores.T)):
        ranks = naive_ranks(table, texts)
        assert ranks != naive_ranks(table, range(13))  # it makes a difference here
        for k in (1, 5, 10):
            found = figures[f'{direction}_recall_at_{k}'].value
            assert found == pytest.approx(np.mean([rank <= k for rank in ranks]))
        assert figures[f'{direction}_median_rank'].value == sorted(ranks)[6]
    margins = [scores[i, i] - np.mean([scores[i, j] for j in range(13) if texts[j] != texts[i]]) for i in range(13)]
    assert figures['margin'].value == pytest.approx(np.mean(margins), abs=1e-6)


def test_a_text_embedded_twice_with_different_rounding_is_one_text():
    audio, text = latents(6)
    text[3] = text[0]
    shifted = text.clone()
    shifted[3] = F.normalize(text[3] + 1e-6, dim=-1)
    texts = ['a', 'b', 'c', 'a', 'd', 'e']
    assert alignment_figures(audio, shifted, texts) == alignment_figures(audio, text, texts)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize('held', [1, 700, 150 * 149])
def test_blocks_of_pairs_give_what_all_at_once_give(monkeypatch, held):
    audio, text = latents(150, d=8)
    texts = [f'text {i % 120}' for i in range(150)]
    text = text[[texts.index(it) for it in texts]]
    whole = alignment_figures(audio, text, texts, permutations=50)
    monkeypatch.setattr(alignment, 'PAIRS_AT_ONCE', held)
    with LargestTensor() as largest:
        found = alignment_figures(audio, text, texts, permutations=50)
    assert largest.elements <= max(held, 150 * 8)
    assert found.keys() == whole.keys()
    margin = found.pop('margin')
    assert margin.value == pytest.approx(whole['margin'].value, abs=1e-12)
    assert margin.details == whole.pop('margin').details
    assert found == whole


def test_equal_cosines_are_ties_wherever_they_stand(monkeypatch):
    """Collapsed latents look as bad as they are."""
    # as matrix products round them, equal cosines may differ by their place
    audio, text = latents(1, d=200)
    for n in (9, 64, 101):
        monkeypatch.setattr(alignment, 'PAIRS_AT_ONCE', 7 * n)
        figures = alignment_figures(audio.expand(n, -1), text.expand(n, -1), permutations=1)
        assert figures['text_to_audio_median_rank'].value == figures['audio_to_text_median_rank'].value == n
        assert figures['audio_to_text_recall_at_5'].value == 0
        assert figures['margin'].value == pytest.approx(0, abs=1e-7)
        assert figures['margin'].details['p_value'] == 1


def test_recall_that_cannot_fail_is_undefined():
    audio, text = latents(6)
    figures = alignment_figures(audio, text[[0, 0, 0, 0, 0, 5]], ['a', 'a', 'a', 'a', 'a', 'b'])
    # for an 'a' there is one other text, for 'b' there are five
    assert figures['audio_to_text_recall_at_1'].value is not None
    assert figures['audio_to_text_recall_at_5'].value is None


@pytest.mark.parametrize('texts', [None, ['a', 'b', 'a', 'c', 'b']])
def test_small_sets_get_the_exact_p_value(texts):
    audio, text = latents(5, noise=3.0, seed=3)
    if texts:
        text = text[[texts.index(it) for it in texts]]
    margin = alignment_figures(audio, text, texts)['margin']
    scores = (audio.double() @ text.double().T).numpy()
    means = [np.mean([scores[i, j] for i, j in enumerate(order)]) for order in itertools.permutations(range(5))]
    expected = np.mean([mean >= means[0] - 1e-9 for mean in means])
    assert margin.details['p_value'] == pytest.approx(expected)
    assert margin.details['permutations'] == 119
    # two pairs of equal texts: four of the 120 orders are the given one
    assert margin.details['smallest_p'] == pytest.approx((4 if texts else 1) / 120)
    assert margin.details['p_value'] >= margin.details['smallest_p']


def test_drawn_permutations_come_near_the_exact_p_value():
    audio, text = latents(6, noise=4.0, seed=5)
    exact = alignment_figures(audio, text)['margin'].details
    drawn = alignment_figures(audio, text, permutations=500, seed=1)['margin'].details
    assert (exact['permutations'], drawn['permutations']) == (719, 500)
    assert 0.02 < exact['p_value'] < 0.98
    error = math.sqrt(exact['p_value'] * (1 - exact['p_value']) / 500)
    assert abs(drawn['p_value'] - exact['p_value']) < 4 * error
    assert drawn['smallest_p'] == pytest.approx(1 / 501)


def test_margin_tells_belonging_from_chance():
    near = alignment_figures(*latents(30), permutations=999)['margin']
    audio, text = latents(30)
    far = alignment_figures(audio, text.roll(1, dims=0), permutations=999)['margin']
    assert near.details['p_value'] == 1 / 1000 == near.details['smallest_p']
    assert near.low > 0.2
    assert far.details['p_value'] > 0.05
    assert far.low < 0 < far.high


def test_p_values_of_unrelated_latents_are_uniform():
    found = []
    for seed in range(100):
        audio, _ = latents(6, seed=seed)
        _, text = latents(6, seed=seed + 1000)
        found.append(alignment_figures(audio, text, permutations=39)['margin'].details['p_value'])
    assert 0.4 < np.mean(found) < 0.6
    assert np.mean(np.array(found) <= 0.1) < 0.2


def test_one_pair_has_a_cosine_and_nothing_else():
    figures = alignment_figures(*latents(1))
    assert figures['mulan_cycle_consistency'].value == pytest.approx(figures['cosines'][0])
    assert figures['mulan_cycle_consistency'].low is None
    others = [figure for key, figure in figures.items() if key not in ('cosines', 'mulan_cycle_consistency')]
    assert len(others) == 9
    assert all(figure.value is None and figure.reason for figure in others)


def test_equal_texts_alone_have_no_margin():
    audio, text = latents(4)
    figures = alignment_figures(audio, text[[0, 0, 0, 0]], ['a'] * 4)
    assert 'the same text' in figures['margin'].reason
    assert figures['text_to_audio_median_rank'].value is None


def test_repeats_by_its_seed():
    audio, text = latents(20)
    assert alignment_figures(audio, text, permutations=100) == alignment_figures(audio, text, permutations=100)
    other = alignment_figures(audio, text, permutations=100, seed=1)
    assert other != alignment_figures(audio, text, permutations=100)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda a, t: (a[:2], t), 'must come in pairs of one shape'),
        (lambda a, t: (a[0], t[0]), 'must come in pairs of one shape'),
        (lambda a, t: (a[:0], t[:0]), 'no pairs to compare'),
        (lambda a, t: (a, 2 * t), r'text_latents\[0\] has length 2, not 1; pass torch.nn.functional.normalize'),
        (lambda a, t: (a.index_fill(0, torch.tensor([1]), math.nan), t), r'audio_latents\[1\] has length nan'),
        (lambda a, t: (a, t, ['a', 'b']), 'got 2 texts for 3 pairs'),
    ],
)
def test_bad_latents(change, message):
    with pytest.raises(ValueError, match=message):
        alignment_figures(*change(*latents(3)))
