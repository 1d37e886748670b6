"""Word prediction against a plain reference, and what it is for."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import tiny_mulan

from musiclm_pytorch import MuLaN
from musiclm_pytorch.mulan.contrastive import WordPrediction


def reference(latents, tokens, weight, pad_id):
    """The same, word by word and clip by clip."""
    texts = [set(row.tolist()) - {pad_id} for row in tokens]
    total = 0.0
    for word in sorted(set().union(*texts)):
        count = sum(word in text for text in texts)
        usual = torch.logit(torch.tensor((count + 0.5) / (len(texts) + 1)))
        for latent, text in zip(latents, texts):
            told = usual + latent.shape[0] ** 0.5 * (latent * weight[word]).sum()
            target = torch.tensor(float(word in text))
            total = total + F.binary_cross_entropy_with_logits(told, target)
            total = total - F.binary_cross_entropy_with_logits(usual, target)
    return total / len(texts)


@pytest.mark.parametrize(('clips', 'length', 'pad_id'), [(1, 4, 0), (2, 1, 0), (5, 7, 3), (7, 3, 0)])
def test_equals_the_reference(clips, length, pad_id):
    words = WordPrediction(dim_latent=6, num_tokens=11, pad_id=pad_id)
    torch.nn.init.normal_(words.token_emb.weight)
    latents = F.normalize(torch.randn(clips, 6), dim=-1)
    tokens = torch.randint(0, 11, (clips, length))
    tokens[0, 0] = 1  # some word
    one, other = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    loss = words(one, tokens)
    loss.backward()
    gradient, words.token_emb.weight.grad = words.token_emb.weight.grad, None
    expected = reference(other, tokens, words.token_emb.weight, pad_id)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient, words.token_emb.weight.grad, atol=1e-5, rtol=1e-4)


def test_knowing_nothing_costs_nothing_and_hearing_pays():
    words = WordPrediction(dim_latent=4, num_tokens=9)
    torch.nn.init.zeros_(words.token_emb.weight)
    latents = torch.eye(4).repeat(8, 1)
    tokens = torch.tensor([[1, 8], [2, 8], [3, 8], [4, 8]]).repeat(8, 1)
    assert words(latents, tokens).item() == 0
    optimizer = torch.optim.Adam(words.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = words(latents, tokens)
        loss.backward()
        optimizer.step()
    # four words of a quarter of the clips each, and one that all have
    entropy = 4 * -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    assert -entropy - 0.1 < loss.item() < -0.95 * entropy


def test_each_word_pulls_at_the_latents_from_the_first_step_on():
    torch.manual_seed(0)
    words = WordPrediction(dim_latent=128, num_tokens=9)
    latents = F.normalize(torch.randn(16, 128), dim=-1).requires_grad_()
    loss = words(latents, torch.tensor([[1, 8], [2, 8]]).repeat(8, 1))
    assert abs(loss.item()) < 1.5  # little more than what it costs to know nothing
    (gradient,) = torch.autograd.grad(loss, latents)
    told_apart = words.token_emb.weight[1] - words.token_emb.weight[2]
    # with a step against the gradient, each clip leans to its own word
    leaning = -gradient @ told_apart
    assert (leaning[0::2] > 0).all()
    assert (leaning[1::2] < 0).all()


@pytest.mark.parametrize('hierarchical', [False, True])
def test_mulan_adds_it_in_training_alone(hierarchical, tmp_path):
    keywords = dict(hierarchical_contrastive_loss=hierarchical)
    with pytest.raises(ValueError, match='word_prediction_weight must be 0 or more, got -1'):
        tiny_mulan(word_prediction_weight=-1.0)
    mulan = tiny_mulan(word_prediction_weight=0.5, **keywords)
    torch.nn.init.normal_(mulan.words.token_emb.weight)
    plain = tiny_mulan(**keywords)
    plain.load_state_dict({name: it for name, it in mulan.state_dict().items() if not name.startswith('words.')})
    mulan.eval()
    plain.eval()
    wavs, texts = torch.randn(3, 1500), torch.randint(0, 100, (3, 15))  # longer than the tower reads
    with pytest.warns(UserWarning, match='is cut'):
        torch.testing.assert_close(mulan(wavs, texts), plain(wavs, texts))

    mulan.training = plain.training = True  # the towers draw nothing
    added = mulan(wavs, texts) - plain(wavs, texts)
    audio, _ = plain(wavs, texts, return_latents=True)
    torch.testing.assert_close(added, 0.5 * mulan.words(audio, texts[:, :12]), atol=1e-5, rtol=1e-5)

    mulan.save_pretrained(tmp_path)
    again = MuLaN.from_pretrained(tmp_path)
    assert again.word_prediction_weight == 0.5
    assert torch.equal(again.words.token_emb.weight, mulan.words.token_emb.weight)


def test_strings_are_words_too():
    mulan = tiny_mulan({}, dict(num_tokens=49408), word_prediction_weight=1.0).train()
    loss = mulan(torch.randn(2, 1500), raw_texts=['a slow flute', 'a fast organ'])
    loss.backward()
    moved = mulan.words.token_emb.weight.grad.abs().sum(dim=1).nonzero()[:, 0]
    wanted = mulan.text.tokenize(['slow flute fast organ'])[0].unique()
    # 'a' is in both: its frequency says all, up to what keeps it from certainty
    assert set(wanted.tolist()) <= set(moved.tolist())
    assert len(moved) == 5
