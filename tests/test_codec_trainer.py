"""Training codecs: which loss trains which side, that it learns, its states, and what goes wrong."""

import json
import random

import pytest
import torch
from helpers.training import assert_resuming_changes_nothing, assert_same, weights
from torch.utils.data import Dataset

from musiclm_pytorch.audiolm.convert import SoundStream
from musiclm_pytorch.audiolm.saving import load_module
from musiclm_pytorch.codecs.discriminator import SpectrogramDiscriminator
from musiclm_pytorch.codecs.neural import NeuralCodec
from musiclm_pytorch.trainer import CodecTrainer
from musiclm_pytorch.trainer.codec import WaveCrops, _CodecStep, discriminators_of
from musiclm_pytorch.trainer.resumable_loader import DummyBatch

RATE = 2000


class Tones(Dataset):
    sample_rate = RATE

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 3:
            return None
        return torch.sin(torch.arange(RATE) * (0.1 + 0.05 * index)), f'tone {index}'


def make_codec(seed=0, **keywords):
    torch.manual_seed(seed)
    random.seed(seed)
    return SoundStream(
        codebook_size=16, channels=4, strides=(2, 4), channel_mults=(1, 2), codebook_dim=8, rq_num_quantizers=2,
        use_local_attn=False, target_sample_hz=RATE, multi_spectral_window_powers_of_two=(6, 7),
        multi_spectral_n_ffts=128, multi_spectral_n_mels=8,
        complex_stft_discr_kwargs=dict(channels=2, n_fft=256, hop_length=64, win_length=256),
        discr_multi_scales=(1,),
        **keywords,
    )  # fmt: skip


def make_trainer(folder, codec=None, **keywords):
    defaults = dict(
        batch_size=3, seconds=0.2, lr=2e-3, results_folder=folder, accelerate_kwargs=dict(cpu=True), progress=False,
        valid_frac=0.2,
    )  # fmt: skip
    return CodecTrainer(codec or make_codec(), Tones(), **{**defaults, **keywords})


def gradients(parameters):
    return [None if it.grad is None else it.grad.clone() for it in parameters]


def test_each_loss_trains_its_own_side():
    """The gradients of one joined step are those of audiolm-pytorch's two losses, taken one after the other."""
    waves = torch.randn(2, 400)
    codec = make_codec().eval()  # quantizer dropout draws otherwise
    for name, buffer in codec.named_buffers():
        if name.endswith('embed'):
            buffer.normal_()
        if name.endswith('initted'):
            buffer.fill_(True)
    sides = codec.non_discr_parameters(), list(discriminators_of(codec).parameters())
    assert len({id(it) for side in sides for it in side}) == len(list(codec.parameters()))
    codec(waves).backward()
    expected = gradients(sides[0])
    codec.zero_grad()
    sum(loss for _, loss in codec(waves, return_discr_loss=True, return_discr_losses_separately=True)).backward()
    assert all(it.grad is None for it in sides[0])
    expected_discriminators = gradients(sides[1])
    codec.zero_grad()
    loss, metrics = _CodecStep(codec)(waves, False)
    loss.backward()
    for side, wanted in zip(sides, (expected, expected_discriminators)):
        for found, gradient in zip(gradients(side), wanted):
            assert (found is None) == (gradient is None)
            if found is not None:
                torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-4)
    together = metrics['loss'] + metrics['discriminator_loss']
    assert together.item() == pytest.approx(loss.item(), rel=1e-5)
    assert all(it.requires_grad for side in sides for it in side)


def test_the_codebooks_move_once_a_step():
    codec = make_codec().train()
    step = _CodecStep(codec)
    sizes = []
    codec.rq.register_forward_hook(lambda module, *_: sizes.append(module.training))
    step(torch.randn(2, 400), False)
    assert sizes == [True, False]
    assert codec.rq.training


def test_it_learns_and_what_it_wrote_comes_back(tmp_path):
    # the reconstruction alone, for the discriminators take their time
    codec = make_codec(feature_loss_weight=0.0, adversarial_loss_weight=0.0)
    keywords = dict(lr=1e-2, validate_every=25, use_ema=True, ema_beta=0.9, grad_penalty_every=None)
    run = make_trainer(tmp_path, codec, discriminator_max_grad_norm=1.0, **keywords)
    found = []
    run.train(num_train_steps=50, log_fn=lambda metrics: found.append(dict(metrics)))
    assert {'reconstruction', 'spectral', 'feature', 'discriminator_grad_norm'} <= found[0].keys()
    mean = [sum(it['reconstruction'] for it in part) / 10 for part in (found[:10], found[-10:])]
    assert mean[1] < 0.8 * mean[0]
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    valid = [line['loss'] for line in lines if line['part'] == 'valid']
    assert len(valid) == 2
    rebuilt = load_module(tmp_path / 'last')
    wave = torch.randn(1, 400)
    with torch.no_grad():
        expected = run.ema.ema_model.eval()(wave, return_recons_only=True)
        assert torch.equal(rebuilt(wave, return_recons_only=True), expected)


def test_resuming_equals_never_having_stopped(tmp_path):
    def make(folder, resume):
        keywords = dict(checkpoint_every=2, grad_accum_every=2, batch_size=2, grad_penalty_every=3, resume=resume)
        return make_trainer(folder, make_codec(4 if resume else 0), **keywords)

    assert_resuming_changes_nothing(tmp_path, make, steps=4, stop_at=3, saved_at=2)


def test_crops():
    dataset = [(torch.arange(100.0), 'x'), torch.arange(10.0)]
    crops = WaveCrops(dataset, sample_rate=RATE, to_rate=RATE, samples=40, training=False)
    assert torch.equal(crops[0], torch.arange(30.0, 70.0))
    assert torch.equal(crops[1], torch.cat([torch.arange(10.0), torch.zeros(30)]))
    crops.training = True
    starts = {int(crops[0][0]) for _ in range(600)}
    assert min(starts) == 0
    assert max(starts) == 60
    crops.max_gain_db = 6.0
    gains = {float(crops[1][1]) for _ in range(20)}
    assert len(gains) > 10
    assert all(0.5 < it < 2 for it in gains)
    assert len(WaveCrops(dataset, sample_rate=RATE, to_rate=3 * RATE, samples=31, training=False)[0]) == 31


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        (dict(seconds=0.001), 'less than one frame of the codec, 0.004 s'),
        (dict(seconds=0.0), 'seconds must be greater than 0'),
        (dict(sample_rate=-1), 'sample_rate must be greater than 0'),
        (dict(max_gain_db=-1.0), 'max_gain_db must be at least 0'),
        (dict(valid_frac=1.0), r'valid_frac must lie in \[0, 1\)'),
    ],
)
def test_settings_that_make_no_sense(tmp_path, keywords, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **keywords)


@pytest.mark.parametrize(('batch_size', 'threshold'), [(3, 0.1 * 3 * 50 / 16), (8, 2.0)])
def test_codes_are_not_replaced_for_want_of_frames(tmp_path, batch_size, threshold):
    """In a batch of few frames no code gets two of them, so that all would be dead at every step."""
    codec = make_codec()
    make_trainer(tmp_path, codec, batch_size=batch_size)
    found = [it.threshold_ema_dead_code for it in codec.rq.modules() if hasattr(it, 'threshold_ema_dead_code')]
    assert found == pytest.approx([threshold] * 2)


def test_micro_batches_have_the_gradient_of_one_batch(tmp_path):
    """The mean over all waves of the step, also where some of a micro-batch could not be read."""
    codec = make_codec()
    run = make_trainer(tmp_path, codec, grad_penalty_every=None, max_grad_norm=None)
    codec.eval()  # quantizer dropout draws otherwise, and codebooks move
    waves = torch.randn(5, 400)
    found = []
    for batches in ([waves], [waves[:3], waves[3:]], [waves[:3], DummyBatch(waves[:1]), waves[3:4], waves[4:]]):
        codec.zero_grad()
        metrics = run.compute_gradients(batches)
        found.append((metrics, {name: it.grad for name, it in codec.named_parameters() if it.grad is not None}))
    for metrics, own in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-4)
        torch.testing.assert_close(own, found[0][1], atol=1e-5, rtol=1e-4)


def neural(seed=0):
    torch.manual_seed(seed)
    sizes = dict(codebook_size=8, num_quantizers=2, dim=16, encoder_depth=1, decoder_depth=1)
    return NeuralCodec(sample_rate=RATE, resolved_hz=500.0, bands=16, **sizes)


def test_a_neural_codec_and_its_discriminator_train_their_own_side():
    """The gradients of one joined step are those of each side's losses alone."""
    waves = torch.randn(2, RATE)
    weights = dict(adversarial=0.5, feature=2.0, discriminator_loss=1.0)
    codec = neural()
    codec.fit([torch.randn(8, RATE)])
    codec.eval()  # quantizer dropout draws otherwise, and codebooks move
    step = _CodecStep(codec, weights)
    torch.nn.init.normal_(codec.decoder[-1].weight, std=0.1)
    step(waves, False)[0].backward()
    found = [gradients(side.parameters()) for side in (codec, step.discriminator)]
    step.zero_grad()
    loss, parts = codec.losses(waves, step.discriminator)
    (loss + 0.5 * parts['adversarial'] + 2.0 * parts['feature']).backward(retain_graph=True)
    assert all(it.grad is None for it in step.discriminator.parameters())
    expected = [gradients(codec.parameters())]
    step.zero_grad()
    parts['discriminator_loss'].backward()
    assert all(it.grad is None for it in codec.parameters())
    expected.append(gradients(step.discriminator.parameters()))
    torch.testing.assert_close(found, expected)
    for side in expected:
        assert any(it is not None and it.abs().sum() > 0 for it in side)


def test_a_discriminator_learns_to_tell_noise_from_tones():
    torch.manual_seed(0)
    discriminator = SpectrogramDiscriminator(channels=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    tones = -6.0 + 4.0 * (torch.arange(64) % 8 == 0).float()[:, None].expand(64, 24)
    noise = -5.5 + torch.randn(4, 64, 24)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = discriminator.losses(tones.expand(4, -1, -1), noise).discriminator_loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2, abs=0.5)
    assert losses[-1] < 0.2


def test_a_discriminator_is_part_of_the_run_but_not_of_the_model(tmp_path):
    """What is kept is the codec, the newest one."""

    def make(folder, resume):
        keywords = dict(checkpoint_every=2, validate_every=2, log_every=1, seconds=0.5, use_ema=True, resume=resume)
        return make_trainer(folder, neural(int(resume)), adversarial_loss_weight=0.1, **keywords)

    _, run = assert_resuming_changes_nothing(tmp_path, make, steps=4, stop_at=3, saved_at=2)
    assert any(name.startswith('discriminator') for name in weights(run.model))
    line = json.loads((tmp_path / 'straight' / 'metrics.jsonl').read_text().splitlines()[0])
    assert {'adversarial', 'feature', 'discriminator_loss'} <= line.keys()
    assert json.loads((tmp_path / 'straight' / 'best' / 'config.json').read_text())['step'] == 4
    kept = load_module(tmp_path / 'straight' / 'best')
    assert isinstance(kept, NeuralCodec)
    assert_same(weights(kept), weights(run.evaluated_model))


def test_a_soundstream_has_discriminators_of_its_own(tmp_path):
    with pytest.raises(ValueError, match='a SoundStream is built with one of its own'):
        make_trainer(tmp_path, adversarial_loss_weight=0.1)
