"""A codec by k-means: what comes back, what the codes depend on, its place in AudioLM, and what goes wrong."""

import pytest
import torch
from helpers.notes import RATE, Notes, check_saved_and_in_audiolm, distance, notes

from musiclm_pytorch.audiolm.spectral_codec import SpectralCodec, band_filters
from musiclm_pytorch.trainer import CodecTrainer


@pytest.fixture(scope='module')
def codec():
    codec = SpectralCodec(
        RATE, codebook_size=64, num_quantizers=3, window=0.064, hop=0.016, bands=16, resolved_hz=800, components=64
    )
    codec.fit(notes(100), max_vectors=3000)
    return codec


def test_waves_come_back_better_with_each_level(codec):
    waves = notes(4, seed=1)
    _, codes, loss = codec(waves, return_encoded=True)
    assert codes.shape == (4, 4000 // 128, 3)
    assert codes.dtype == torch.long
    assert loss == 0
    lost = [distance(codec.decode_from_codebook_indices(codes[..., :q])[:, 0], waves[:, : 31 * 128]) for q in (1, 2, 3)]
    assert lost[2] < lost[1] < lost[0] < 0.5
    assert lost[2] < 0.15
    made = codec(waves, return_recons_only=True)
    assert made.shape == (4, 1, 31 * 128)
    assert torch.equal(made, codec.decode_from_codebook_indices(codes))  # the same at each call
    assert torch.equal(codec(waves, return_codes_only=True), codes)


def test_a_wave_depends_on_its_own_codes_alone(codec):
    codes = codec(notes(3, seed=1), return_codes_only=True)
    together = codec.decode_from_codebook_indices(codes)
    alone = torch.cat([codec.decode_from_codebook_indices(row[None]) for row in codes])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize('sizes', [(1,) * 93, (40, 53), (0, 90, 1, 2, 0), (93,), (12,), (0,)])
def test_what_is_streamed_is_the_whole(codec, sizes):
    """To the bit, whatever the chunks, and no later than it says."""
    codes = codec.encode(notes(2, seconds=3.0, seed=2))[:, : sum(sizes)]
    seen, waves = 0, []

    def chunks():
        nonlocal seen
        for chunk in codes.split(sizes, dim=1):
            given = sum(wave.shape[1] for wave in waves)
            assert seen * 128 - given < codec.lag * RATE + 128
            seen += chunk.shape[1]
            yield chunk

    for wave in codec.decode_stream(chunks()):
        waves.append(wave)
    whole = codec.decode(codes)
    assert whole.shape == (2, sum(sizes) * 128)
    assert torch.equal(torch.cat([whole[:, :0], *waves], dim=1), whole)


def test_what_comes_later_leaves_what_was_alone(codec):
    codes = codec.encode(notes(1, seconds=3.0, seed=3))
    other = codes.clone()
    other[:, 60:] = 0
    settled = int(60 * 128 - codec.lag * RATE)
    assert settled > 0
    assert torch.equal(codec.decode(other)[:, :settled], codec.decode(codes)[:, :settled])


def test_decoding_leaves_the_random_numbers_of_the_caller_alone(codec):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    codec(notes(1), return_recons_only=True)
    assert torch.equal(torch.rand(2), expected)


def test_fitting_is_repeatable_and_tells_what_is_missing():
    def fit(seed):
        codec = SpectralCodec(
            RATE, codebook_size=32, num_quantizers=3, window=0.064, hop=0.016, resolved_hz=800, bands=16, components=64
        )
        return codec.fit(notes(40), max_items=30, max_vectors=900, seed=seed), codec.codebooks

    (missing, books), (again, same), (_, other) = fit(0), fit(0), fit(1)
    assert missing == again
    assert torch.equal(books, same)
    assert not torch.equal(books, other)
    assert 1 > missing[0] > missing[1] > missing[2] > 0


def test_a_code_depends_on_what_is_near(codec):
    """Silence elsewhere leaves codes as they are; batches and rates change nothing."""
    wave = notes(1, seed=2)
    changed = wave.clone()
    changed[:, 3000:] = 0
    codes = codec(wave, return_codes_only=True)
    near = (3000 - codec.n_fft // 2) // 128 - 1
    assert torch.equal(codec(changed, return_codes_only=True)[:, :near], codes[:, :near])
    assert torch.equal(codec(torch.cat([changed, wave]), return_codes_only=True)[1:], codes)
    assert torch.equal(codec(wave[0], return_codes_only=True), codes)
    doubled = torch.nn.functional.interpolate(wave[None], scale_factor=2, mode='linear')[0]
    assert codec(doubled, return_codes_only=True, input_sample_hz=2 * RATE).shape == codes.shape


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


def test_it_is_saved_and_goes_into_audiolm(codec, tmp_path):
    loaded = check_saved_and_in_audiolm(codec, tmp_path)
    with pytest.raises(TypeError, match='not trained step by step; call its method fit'):
        CodecTrainer(loaded, Notes(2), batch_size=1)


def test_silence_and_short_waves(codec):
    assert codec(torch.zeros(1, 640), return_recons_only=True).isfinite().all()
    assert codec(notes(1)[:, :130], return_recons_only=True).shape == (1, 1, 128)


def test_what_goes_wrong(codec):
    new = SpectralCodec(RATE, resolved_hz=800)
    with pytest.raises(ValueError, match='no codebooks yet; call fit'):
        new(notes(1), return_encoded=True)
    with pytest.raises(ValueError, match='is not trained by a loss'):
        codec(notes(1))
    with pytest.raises(ValueError, match='100 samples is shorter than a code, 128'):
        codec(torch.randn(1, 100), return_encoded=True)
    with pytest.raises(ValueError, match='512 codes of .* components need at least 512 vectors of 2 frames, got 25'):
        new.fit(notes(1))
    for keywords, message in (
        (dict(hop=0.1, window=0.1), 'hop must lie between a sample and half of the window'),
        (dict(resolved_hz=2000.0), 'resolved_hz must lie below half'),
        (dict(codebook_size=0), 'codebook_size must be greater than 0'),
    ):
        with pytest.raises(ValueError, match=message):
            SpectralCodec(RATE, **keywords)
