"""Our codecs, by k-means and neural: what comes back, streams, what depends on what, their place in AudioLM, faults."""

import copy
import math

import pytest
import torch
from helpers.notes import RATE, Notes, check_saved_and_in_audiolm, distance, notes
from helpers.training import assert_same

from musiclm_pytorch.audiolm.fingerprints import fingerprint
from musiclm_pytorch.audiolm.saving import load_module
from musiclm_pytorch.audiolm.spectral_codec import SpectralCodec, band_filters
from musiclm_pytorch.codecs import NeuralCodec, mel_distance
from musiclm_pytorch.codecs.residual import ResidualQuantizer
from musiclm_pytorch.trainer import CodecTrainer
from musiclm_pytorch.trainer.resumable_loader import seed_everything
from musiclm_pytorch.trainer.stage_recipes import CodecRecipe

SPECTRUM = dict(sample_rate=RATE, num_quantizers=3, window=0.064, hop=0.016, resolved_hz=800.0, bands=16)
SPECTRAL = SPECTRUM | dict(codebook_size=32, components=64)
NEURAL = SPECTRUM | dict(codebook_size=64, dim=16, encoder_depth=1, decoder_depth=2, codebook_dim=32, kernel=3)
FRAME = 128  # samples a code


def make_neural():
    torch.manual_seed(0)
    codec = NeuralCodec(**NEURAL)
    codec.fit([notes(100)])
    # blocks that do something, as after training
    for layer in (codec.encoder[-1], codec.decoder[-1]):
        torch.nn.init.normal_(layer.weight, std=0.003)
    return codec.eval()


@pytest.fixture(scope='module')
def neural():
    return make_neural()


@pytest.fixture(scope='module')
def spectral():
    codec = SpectralCodec(**SPECTRAL | dict(codebook_size=64))
    codec.fit(notes(100), max_vectors=3000)
    return codec


@pytest.fixture(params=['spectral', 'neural'])
def codec(request):
    return request.getfixturevalue(request.param)


# ---- what both promise ----


def test_waves_come_back_better_with_each_level(codec):
    waves = notes(4, seed=1)
    vectors, codes, loss = codec(waves, return_encoded=True)
    assert codes.shape == (4, 4000 // FRAME, 3)
    assert codes.dtype == torch.long
    assert vectors.shape == (4, 31, codec.codebook_dim)
    assert loss == 0
    lost = [distance(codec.decode(codes[..., :q]), waves[:, : 31 * FRAME]) for q in (1, 2, 3)]
    assert lost[2] < lost[1] < lost[0]
    assert lost[2] < 0.2
    assert torch.equal(codec(waves, return_codes_only=True), codes)
    assert torch.equal(codec.encode(waves), codes)
    before = torch.get_rng_state()
    made = codec(waves, return_recons_only=True)
    assert torch.equal(torch.get_rng_state(), before)  # random numbers of the caller are left alone
    assert torch.equal(made, codec.decode_from_codebook_indices(codes))  # the same at each call
    assert torch.equal(made[:, 0], codec.decode(codes))


@pytest.mark.parametrize('sizes', [(1,) * 93, (0, 90, 1, 2, 0), (12,), (0,), ()])
def test_what_is_streamed_is_the_whole(codec, sizes):
    """Whatever the chunks, and no later than it says; of the spectral codec to the bit."""
    codes = codec.encode(notes(2, seconds=3.0, seed=2))[:, : sum(sizes)]
    seen, given, waves = 0, 0, []

    def chunks():
        nonlocal seen
        for chunk in codes.split(sizes, dim=1) if sizes else ():
            assert seen * FRAME - given < codec.lag * RATE + FRAME
            seen += chunk.shape[1]
            yield chunk

    for wave in codec.decode_stream(chunks()):
        waves.append(wave)
        given += wave.shape[1]
    whole = codec.decode(codes)
    assert whole.shape == (2, sum(sizes) * FRAME)
    made = torch.cat([whole[:, :0], *waves], dim=1)
    error = 0 if isinstance(codec, SpectralCodec) else 1e-6 * whole.square().sum()
    assert (made - whole).square().sum() <= error


def test_a_wave_depends_on_its_own_codes_alone(codec):
    waves = notes(3, seed=1)
    codes = codec.encode(waves)
    assert torch.equal(torch.cat([codec.encode(row[None]) for row in waves]), codes)
    together, alone = codec.decode(codes), torch.cat([codec.decode(row[None]) for row in codes])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_what_comes_later_leaves_what_was_alone(codec):
    waves = notes(1, seconds=3.0, seed=3)
    changed = waves.clone()
    changed[:, 8000:] = 0
    codes = codec.encode(waves)
    near = (8000 - codec.n_fft // 2) // FRAME - 1
    assert torch.equal(codec.encode(changed)[:, :near], codes[:, :near])
    other = codes.clone()
    other[:, 60:] = 0
    settled = int(60 * FRAME - codec.lag * RATE)
    assert settled > 0
    torch.testing.assert_close(codec.decode(other)[:, :settled], codec.decode(codes)[:, :settled], atol=1e-5, rtol=0)


def test_no_frame_is_louder_than_it_may_be(neural):
    waves = notes(2, seed=1)
    waves[1] *= 0.2
    codes = neural.encode(waves)
    whole = neural.decode(codes)
    frames = whole.unfold(1, 2 * FRAME, FRAME).std(dim=2)
    limited = copy.deepcopy(neural)
    limited.loudest = float(frames.max()) / 1.3
    made = limited.decode(codes).unfold(1, 2 * FRAME, FRAME).std(dim=2)
    assert made.max() < 1.1 * limited.loudest  # phases of neighbours agree not quite
    soft = frames < 0.5 * limited.loudest
    assert soft.any()
    torch.testing.assert_close(made[soft], frames[soft], rtol=0.2, atol=1e-3)
    limited.loudest = 1.0
    assert torch.equal(limited.decode(codes), whole)
    codes[:] = torch.randint(64, codes.shape, generator=torch.Generator().manual_seed(0))
    wild = torch.cat([neural.amplitudes(100 * neural.vectors_of(codes))])
    assert (wild.square().sum(dim=1) / 3).max() < 1.01  # a wave within ±1


def test_silence_short_waves_and_other_rates(codec):
    assert codec.decode(codec.encode(torch.zeros(1, 2000))).isfinite().all()
    assert codec(notes(1)[:, :130], return_recons_only=True).shape == (1, 1, FRAME)
    codes = codec(notes(1)[0], return_codes_only=True)
    doubled = torch.nn.functional.interpolate(notes(1)[None], scale_factor=2, mode='linear')[0]
    assert codec(doubled, return_codes_only=True, input_sample_hz=2 * RATE).shape == codes.shape


def test_it_is_saved_and_goes_into_audiolm(codec, tmp_path):
    loaded = check_saved_and_in_audiolm(codec, tmp_path)
    if isinstance(codec, SpectralCodec):
        with pytest.raises(TypeError, match='not trained step by step; call its method fit'):
            CodecTrainer(loaded, Notes(2), batch_size=1)


@pytest.mark.parametrize(
    ('kind', 'keywords', 'message'),
    [
        *(
            (kind, *it)
            for kind in (SpectralCodec, NeuralCodec)
            for it in (
                (dict(hop=0.1, window=0.1), 'hop must lie between a sample and half of the window'),
                (dict(resolved_hz=2000.0), 'resolved_hz must lie below half'),
                (dict(codebook_size=0), 'codebook_size must be greater than 0'),
            )
        ),
        (NeuralCodec, dict(lookahead=3), 'lookahead must lie between 0 and 2, less than kernel'),
        (NeuralCodec, dict(iterations=-1), 'iterations must be at least 0'),
        (NeuralCodec, dict(quantizer_dropout=1.5), r'quantizer_dropout must lie in \[0, 1\]'),
    ],
)
def test_sizes_out_of_range(kind, keywords, message):
    with pytest.raises(ValueError, match=message):
        kind(**{**(SPECTRAL if kind is SpectralCodec else NEURAL), **keywords})


def test_what_goes_wrong(codec):
    with pytest.raises(ValueError, match='gives no loss here'):
        codec(notes(1))
    with pytest.raises(ValueError, match='100 samples is shorter than a code, 128'):
        codec.encode(torch.randn(1, 100))
    new, unfitted = NeuralCodec(**NEURAL), 'no codebooks yet; train it with CodecTrainer'
    for call in (lambda: new.encode(notes(1)), new.freeze_codes):
        with pytest.raises(ValueError, match=unfitted):
            call()
    with pytest.raises(ValueError, match='64 codes a level need at least 64 code frames, got 31'):
        new.fit([notes(1)])
    new = SpectralCodec(RATE, resolved_hz=800)
    with pytest.raises(ValueError, match='no codebooks yet; call fit'):
        new(notes(1), return_encoded=True)
    with pytest.raises(ValueError, match='512 codes of .* components need at least 512 vectors of 2 frames, got 25'):
        new.fit(notes(1))


# ---- by k-means ----


def test_fitting_is_repeatable_and_tells_what_is_missing():
    def fit(seed):
        codec = SpectralCodec(**SPECTRAL)
        return codec.fit(notes(40), max_items=30, max_vectors=900, seed=seed), codec.codebooks

    (missing, books), (again, same), (_, other) = fit(0), fit(0), fit(1)
    assert missing == again
    assert torch.equal(books, same)
    assert not torch.equal(books, other)
    assert 1 > missing[0] > missing[1] > missing[2] > 0


@pytest.mark.parametrize(
    ('n_fft', 'rate', 'resolved', 'bands'), [(256, 4000, 800, 16), (2048, 16000, 2000, 64), (64, 8000, 3900, 5)]
)
def test_bands_lead_back_to_bins(n_fft, rate, resolved, bands):
    analysis, synthesis = band_filters(n_fft, rate, resolved, bands)
    assert analysis.shape == synthesis.T.shape
    torch.testing.assert_close(synthesis.sum(dim=1), torch.ones(n_fft // 2 + 1))
    torch.testing.assert_close(analysis.sum(dim=1), torch.ones(len(analysis)))
    # whatever is a straight line across frequency comes back exactly between the first and the last band
    own = int(resolved * n_fft / rate) - 1
    assert torch.equal(synthesis[:own, :own], torch.eye(own))
    torch.testing.assert_close(analysis[:own, :own], torch.eye(own))


# ---- neural ----


def test_the_first_levels_are_a_codec_of_fewer_bits(neural):
    waves, fewer = notes(2, seed=3), neural.with_first_levels(2)
    codes = fewer.encode(waves)
    assert (fewer.num_quantizers, fewer.training) == (2, False)
    assert torch.equal(codes, neural.encode(waves)[..., :2])
    assert torch.equal(fewer.decode(codes), neural.decode(codes))
    for levels in (0, 4):
        with pytest.raises(ValueError, match=f'between 1 and 3, got {levels}'):
            neural.with_first_levels(levels)


def test_the_blocks_see_as_far_as_they_say(neural):
    """Gradients reach `past` frames back and `future` frames ahead, and not one further."""
    for blocks, width, ahead, back in ((neural.decoder, 32, neural.future, neural.past), (neural.encoder, None, 1, 1)):
        width = width or blocks[0].in_features
        vectors = torch.randn(1, 21, width, requires_grad=True)
        blocks(vectors)[:, 10].sum().backward()
        reached = vectors.grad.abs().sum(dim=(0, 2)).nonzero()[:, 0]
        assert (10 - reached.min(), reached.max() - 10) == (back, ahead)


def test_codes_and_waves_stay_when_the_model_is_cast(neural):
    waves = notes(1, seed=4)
    expected = neural.encode(waves)
    cast = make_neural().to(torch.bfloat16)
    assert torch.equal(cast.encode(waves), expected)
    assert torch.equal(cast.decode(expected), neural.decode(expected))


def test_as_it_is_by_default():
    codec = NeuralCodec()
    assert codec.frame_rate * codec.num_quantizers * math.log2(codec.codebook_size) <= 3000  # bit/s
    assert 2 * sum(it.numel() for it in codec.state_dict().values()) < 15e6  # bytes, in float16
    assert codec.lag < 1


def train(folder, codec, steps, seed=0, **keywords):
    seed_everything(seed)
    trainer = CodecTrainer(
        codec, Notes(60), batch_size=8, seconds=0.5, lr=3e-3, max_gain_db=3.0, checkpoint_every=5,
        results_folder=folder, accelerate_kwargs=dict(cpu=True), progress=False, **keywords,
    )  # fmt: skip
    found = []
    trainer.train(num_train_steps=steps, log_fn=lambda metrics: found.append(metrics['loss']))
    return found


def test_training_makes_it_better_and_goes_on_as_if_never_stopped(tmp_path):
    def elsewhere():
        torch.manual_seed(1)
        codec = NeuralCodec(**NEURAL)
        codec.fit([0.1 * torch.randn(100, RATE)])
        return codec

    straight, stopped, resumed = elsewhere(), elsewhere(), elsewhere()
    found = train(tmp_path / 'straight', straight, 40)
    assert sum(found[-10:]) < 0.7 * sum(found[:10])
    train(tmp_path / 'stopped', stopped, 20)
    train(tmp_path / 'stopped', resumed, 40, seed=9, resume=True)
    assert_same(resumed.state_dict(), straight.state_dict())
    loaded, wave = load_module(tmp_path / 'stopped' / 'last'), notes(1)
    assert torch.equal(loaded.decode(loaded.encode(wave)), resumed.eval().decode(resumed.encode(wave)))


def test_a_decoder_trained_alone_keeps_the_codes(tmp_path):
    codec, waves = make_neural(), notes(2, seed=3)
    codes, made, same = codec.encode(waves), codec.decode(codec.encode(waves)), fingerprint(codec)
    train(tmp_path, codec.freeze_codes(), 5)
    assert torch.equal(codec.eval().encode(waves), codes)
    assert fingerprint(codec) == same  # tokens stay valid
    assert not torch.equal(codec.decode(codes), made)
    loaded = load_module(tmp_path / 'last')
    assert torch.equal(loaded.decode(codes), codec.decode(codes))


def test_codes_that_no_wave_has_are_no_louder_than_a_wave_can_be(neural):
    loud = copy.deepcopy(neural)
    loud.decoder_line.bias.data += 100
    levels = loud.amplitudes(loud.vectors_of(loud.encode(notes(1))))
    assert levels.max() <= 2.001


def test_training_begins_by_fitting(tmp_path):
    codec = NeuralCodec(**NEURAL)
    train(tmp_path, codec, 1, use_ema=True)
    wave = notes(1, seed=1)
    for it in (codec.eval(), load_module(tmp_path / 'last')):
        assert distance(it(wave, return_recons_only=True)[:, 0], wave[:, : 31 * FRAME]) < 0.3


def test_codes_follow_what_comes_and_dead_ones_take_its_place():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(4, size=8, levels=1, decay=0.5)
    centres = 10 * torch.randn(4, 4)
    quantizer.codebooks[0, :4] = centres + 0.5
    quantizer.codebooks[0, 4:] = 1000.0  # nothing comes to them
    quantizer.counts.fill_(1)
    vectors = (centres.repeat(16, 1) + 0.01 * torch.randn(64, 4))[None].requires_grad_()
    quantized, _ = quantizer(vectors)
    quantized.sum().backward()
    assert torch.equal(vectors.grad, torch.ones_like(vectors))
    for _ in range(30):
        quantized = quantizer(vectors.detach())[0]
    assert (quantized - vectors).abs().max() < 0.1
    assert quantizer.codebooks.abs().max() < 100
    before = quantizer.codebooks.clone()
    assert torch.equal(quantizer.eval().vectors_of(quantizer(vectors)[1]), before[0][quantizer(vectors)[1][..., 0]])
    assert torch.equal(quantizer.codebooks, before)


def test_the_distance_of_mel_spectra():
    wave = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    assert mel_distance(wave, wave, RATE).tolist() == [0, 0]
    assert mel_distance(wave, wave / 2, RATE).tolist() == pytest.approx([20 * math.log10(2)] * 2)
    assert (mel_distance(wave, torch.zeros_like(wave), RATE) > 30).all()


def test_a_recipe_says_which_codec(tmp_path):
    recipe = CodecRecipe.from_content(dict(model=dict(kind='neural', **NEURAL)), 'recipe')
    assert type(recipe.build_model()) is NeuralCodec
    assert recipe.num_quantizers == 3
    assert CodecRecipe.from_content(recipe.to_dict(), 'again') == recipe
    assert CodecRecipe.default().num_quantizers == 8
    assert type(CodecRecipe.load('codec_neural').build_model()) is NeuralCodec
    with pytest.raises(TypeError, match='kind must be'):
        CodecRecipe.from_content(dict(model=dict(kind='other')), 'recipe')
    with pytest.raises(TypeError, match=r"section 'model'.*strides"):
        CodecRecipe.from_content(dict(model=dict(kind='neural', strides=[2, 4])), 'recipe').build_model()
