import math

import pytest
import torch
import torch.nn.functional as F

from musiclm_pytorch import MultiLayerContrastiveLoss, SigmoidContrastiveLearning, SoftmaxContrastiveLearning


def latents(*shape):
    return F.normalize(torch.randn(2, *shape, dtype=torch.float64), dim=-1).float()


def plain_softmax(audio, text, temperature, decoupled):
    """−s_ii/τ + log Σ e^{s_ij/τ} in both directions, averaged (facts of the papers, in float64)."""
    logits = (audio.double() @ text.double().T) * temperature
    total = 0.0
    for scores in (logits, logits.T):
        for i, row in enumerate(scores):
            others = torch.cat([row[:i], row[i + 1 :]]) if decoupled else row
            total = total + others.exp().sum().log() - row[i]
    return total / (2 * len(logits))


def plain_sigmoid(audio, text, temperature, bias):
    """−(1/B) Σ log σ(z (t s + b)), z = ±1, in float64."""
    logits = (audio.double() @ text.double().T) * temperature + bias
    total = 0.0
    for i, row in enumerate(logits):
        for j, logit in enumerate(row):
            total = total - torch.log(1 / (1 + torch.exp(-logit if i == j else logit)))
    return total / len(logits)


@pytest.mark.parametrize('decoupled', [True, False])
@pytest.mark.parametrize('batch', [2, 5])
def test_softmax_equals_formula(decoupled, batch):
    audio, text = latents(batch, 7)
    loss = SoftmaxContrastiveLearning(decoupled_contrastive_learning=decoupled)(audio, text)
    torch.testing.assert_close(loss.double(), plain_softmax(audio, text, 10, decoupled), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('batch', [1, 5])
def test_sigmoid_equals_formula(batch):
    audio, text = latents(batch, 7)
    loss = SigmoidContrastiveLearning()(audio, text)
    torch.testing.assert_close(loss.double(), plain_sigmoid(audio, text, 10, -10), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    'loss_of', [SoftmaxContrastiveLearning, SigmoidContrastiveLearning], ids=['softmax', 'sigmoid']
)
def test_layers_are_summed_each_with_its_own_temperature(loss_of):
    audio, text = latents(3, 5, 7)
    loss = loss_of(layers=3)
    with torch.no_grad():
        loss.temperatures.copy_(torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))
    single = loss_of()
    expected = 0.0
    for i in range(3):
        with torch.no_grad():
            single.temperatures.fill_(i + 1.0)
        expected += single(audio[i], text[i])
    torch.testing.assert_close(loss(audio, text), expected)


LOSSES = {
    'softmax': SoftmaxContrastiveLearning,
    'decoupled': lambda: SoftmaxContrastiveLearning(decoupled_contrastive_learning=True),
    'sigmoid': SigmoidContrastiveLearning,
}


@pytest.mark.parametrize('loss_of', LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize('log_temperature', [-20.0, math.log(100), 90.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_losses_are_finite_at_any_temperature_and_precision(loss_of, log_temperature, dtype):
    loss = loss_of()
    with torch.no_grad():
        loss.temperatures.fill_(log_temperature)
    same = latents(4, 7)[0]
    cases = [(same, same), (same, -same), (same[:1].expand(4, -1), same[:1].expand(4, -1)), latents(4, 7)]
    for audio, text in cases:
        audio, text = (t.clone().to(dtype).requires_grad_() for t in (audio, text))
        expected = loss(audio, text)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            value = loss(audio, text)
        assert torch.equal(value, expected)
        assert value.dtype == torch.float32
        assert value.isfinite()
        value.backward()
        for gradient in (audio.grad, text.grad, loss.temperatures.grad):
            assert gradient.isfinite().all()


def test_temperature_is_bounded_and_can_come_back():
    loss = SoftmaxContrastiveLearning()
    with torch.no_grad():
        loss.temperatures.fill_(8.0)
    assert loss.temperature().item() == 100.0
    # badly matched pairs ask for a lower temperature: their gradient must get through
    audio, _ = latents(4, 7)
    loss(audio, audio.roll(1, dims=0)).backward()
    assert loss.temperatures.grad.item() > 0
    # descending along a negative gradient would raise it further
    loss.zero_grad()
    (-loss.temperature()).sum().backward()
    assert loss.temperatures.grad.item() == 0


@pytest.mark.parametrize('decoupled', [True, False])
def test_one_pair_has_nothing_to_contrast_with(decoupled):
    audio, text = latents(1, 7)
    with pytest.raises(ValueError, match='at least 2 pairs, got 1.*drop_last=True.*sigmoid_contrastive_loss'):
        SoftmaxContrastiveLearning(decoupled_contrastive_learning=decoupled)(audio, text)


@pytest.mark.parametrize(('layers', 'shape'), [(1, (7,)), (1, (2, 3, 5, 7)), (3, (5, 7)), (3, (2, 5, 7))])
def test_latents_of_a_wrong_rank_or_number_of_layers(layers, shape):
    with pytest.raises(ValueError, match=r'latents must have shape .*, got \('):
        SigmoidContrastiveLearning(layers=layers)(torch.randn(shape), torch.randn(shape))
    with pytest.raises(ValueError, match=r'got \(3, 7\) and \(4, 7\)'):
        SoftmaxContrastiveLearning()(torch.randn(3, 7), torch.randn(4, 7))
    with pytest.raises(ValueError, match='init_temp must be greater than 0'):
        SigmoidContrastiveLearning(init_temp=-1)


def test_multi_layer_loss_ignores_padding():
    loss = MultiLayerContrastiveLoss(audio_dim=6, text_dim=5, dim_latent=4, layers=2)
    audio, text = torch.randn(2, 3, 9, 6), torch.randn(2, 3, 4, 5)
    mask = torch.arange(9) < torch.tensor([[9], [2], [5]])
    expected = loss(audio_layers=audio, text_layers=text, audio_mask=mask)
    audio.masked_fill_(~mask[None, ..., None], float('nan'))
    torch.testing.assert_close(loss(audio_layers=audio, text_layers=text, audio_mask=mask), expected)
