"""Latents to conditioning: upstream's numbers, codebooks that are fitted once, and what goes wrong."""

import warnings

import pytest
import torch
from helpers.models import build_golden, tiny_mulan
from helpers.training import assert_same, weights
from sklearn.cluster import KMeans

from musiclm_pytorch import MuLaNEmbedQuantizer

NAMES = ('softmax_decoupled', 'softmax_hierarchical', 'sigmoid_hierarchical')


def tiny_quantizer(mulan=None, **keywords):
    keywords = dict(conditioning_dims=(8, 12, 10), rq_num_quantizers=3, codebook_size=5) | keywords
    return MuLaNEmbedQuantizer(mulan or tiny_mulan(dict(depth=1), dict(depth=1)), **keywords)


def latents(n=200, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=-1)


@pytest.fixture
def fitted():
    quantizer = tiny_quantizer()
    quantizer.fit(latents())
    return quantizer


@pytest.mark.parametrize('name', NAMES)
def test_numbers_of_upstream(name):
    mulan, golden = build_golden(name)
    quantizer = MuLaNEmbedQuantizer(
        mulan, conditioning_dims=(16, 20, 24), rq_num_quantizers=4, codebook_size=8, namespaces=NAMESPACES
    )
    state = {key.removeprefix('quantizer.'): it for key, it in golden.items() if key.startswith('quantizer.')}
    state |= {f'mulan.{key}': it for key, it in mulan.state_dict().items()}
    quantizer.load_state_dict(state, strict=True)
    quantizer.eval()
    for namespace in NAMESPACES:
        for kind, given in (('text', dict(texts=golden['in.texts'])), ('audio', dict(wavs=golden['in.wavs']))):
            found = quantizer(**given, namespace=namespace)
            torch.testing.assert_close(found, golden[f'out.cond_{kind}.{namespace}'], atol=1e-5, rtol=0)
    assert torch.equal(quantizer.indices(texts=golden['in.texts']), golden['out.rq_indices_text'])


NAMESPACES = ('semantic', 'coarse', 'fine')


def test_codes_are_the_nearest_means_level_by_level(fitted):
    given = latents(7, seed=1)
    residual = given
    expected = []
    for codebook in fitted._codebooks():
        nearest = (residual[:, None] - codebook.embed[0]).square().sum(dim=-1).argmin(dim=-1)
        expected.append(nearest)
        residual = residual - codebook.embed[0][nearest]
    indices = fitted.eval().indices(latents=given)
    assert torch.equal(indices, torch.stack(expected, dim=-1))
    conditioning = fitted(latents=given, namespace='coarse')
    assert conditioning.shape == (7, 3, 12)
    assert torch.equal(conditioning[4, 1], fitted.cond_embeddings['coarse'][1, indices[4, 1]])


def test_fit_tells_what_each_level_leaves():
    quantizer = tiny_quantizer(codebook_size=20)
    given = latents()
    missing = quantizer.fit(given)
    assert len(missing) == 3
    assert 1 > missing[0] > missing[1] > missing[2] > 0
    books = [layer._codebook.embed[0] for layer in quantizer.rq.layers]
    quantized = sum(book[own] for book, own in zip(books, quantizer.rq(given).unbind(dim=1)))
    assert (given - quantized).square().sum() / given.square().sum() == pytest.approx(missing[-1], rel=1e-4)
    # the first level is a plain k-means
    means = KMeans(20, n_init=1, max_iter=50, random_state=0).fit(given.numpy())
    assert missing[0] == pytest.approx(means.inertia_ / float(given.square().sum()), rel=1e-4)


def test_fitted_codebooks_stay(fitted):
    before = weights(fitted.rq)
    fitted.train()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for seed in range(3):
            fitted(latents=latents(30, seed=seed + 5))
    assert_same(weights(fitted.rq), before)
    assert not fitted.mulan.training


def test_fits_to_audio_and_text_of_a_data_set():
    mulan = tiny_mulan(dict(depth=1), dict(depth=1))
    pairs = [(torch.randn(900 + 10 * i), torch.randint(1, 100, (4 + i % 3,))) for i in range(12)]
    quantizer = tiny_quantizer(mulan, rq_num_quantizers=2, codebook_size=24)
    # 24 means of 24 latents are the latents: 12 of audio and 12 of text
    assert quantizer.fit(pairs, batch_size=1)[0] < 1e-6
    own = mulan.get_text_latents(pairs[3][1][None])
    assert (own - quantizer.rq.layers[0]._codebook.embed[0]).square().sum(dim=-1).min() < 1e-8
    with pytest.raises(ValueError, match='24 codes need at least as many different latents, got 8 in 8'):
        tiny_quantizer(mulan, codebook_size=24).fit(pairs, batch_size=2, max_items=4)


def test_unfitted_refuses_in_eval_mode_and_warns_once_in_training():
    quantizer = tiny_quantizer().eval()
    with pytest.raises(ValueError, match=r'no codebooks yet: call quantizer.fit\(dataset\)'):
        quantizer(latents=latents(4))
    with pytest.raises(ValueError, match='call fit before saving'):
        quantizer.save_pretrained('never')
    quantizer.train()
    with pytest.warns(UserWarning, match='change their meaning'):
        quantizer(latents=latents(40))
    before = quantizer.rq.layers[0]._codebook.embed.clone()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quantizer(latents=latents(40, seed=2))
    assert not torch.equal(quantizer.rq.layers[0]._codebook.embed, before)
    assert quantizer.eval()(latents=latents(4)).shape == (4, 3, 8)


def test_gradients_reach_the_embeddings_of_the_namespace_alone(fitted):
    assert [it.shape for it in fitted.parameters()] == [(3, 5, 8), (3, 5, 12), (3, 5, 10)]
    fitted(wavs=torch.randn(2, 900), namespace='fine').sum().backward()
    indices = fitted.indices(latents=latents(1))
    assert indices.dtype == torch.int64
    gradient = fitted.cond_embeddings['fine'].grad
    assert gradient.sum().item() == pytest.approx(2 * 3 * 10)
    assert fitted.cond_embeddings['coarse'].grad is None
    assert all(it.grad is None for it in fitted.mulan.parameters())


def test_dropped_conditions_are_whole_items_and_in_training_only():
    quantizer = tiny_quantizer(cond_drop_prob=0.5)
    quantizer.fit(latents())
    found = quantizer.train()(latents=latents(400))
    dropped = (found == 0).all(dim=-1).all(dim=-1)
    assert 150 < dropped.sum() < 250
    assert (found[~dropped] != 0).any(dim=-1).all()
    assert (quantizer.eval()(latents=latents(400)) != 0).any(dim=-1).all()


def test_waves_of_another_rate():
    mulan = tiny_mulan(dict(depth=1, audio_sample_rate=8000), dict(depth=1))
    quantizer = tiny_quantizer(mulan, rq_num_quantizers=6, sample_rate=16000)
    quantizer.fit(latents())
    quantizer.eval()
    wavs = torch.randn(2, 3000)
    expected = quantizer.indices(latents=mulan.get_audio_latents(wavs, sample_rate=16000))
    assert torch.equal(quantizer.indices(wavs), expected)
    own = quantizer.indices(latents=mulan.get_audio_latents(wavs))
    assert torch.equal(quantizer.indices(wavs, sample_rate=8000), own)


def test_saved_and_rebuilt(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / 'quantizer')
    rebuilt = MuLaNEmbedQuantizer.from_pretrained(tmp_path / 'quantizer')
    assert rebuilt.frozen
    assert not rebuilt.training
    wavs = torch.randn(2, 900)
    for namespace in NAMESPACES:
        assert torch.equal(rebuilt(wavs, namespace=namespace), fitted.eval()(wavs, namespace=namespace))
    assert rebuilt.state_dict().keys() == fitted.state_dict().keys()


def test_texts_as_strings_for_the_default_namespace():
    quantizer = tiny_quantizer(tiny_mulan(dict(depth=1), dict(depth=1, num_tokens=49408, max_seq_len=256)))
    quantizer.fit(latents())
    quantizer.set_default_namespace('coarse')
    texts = ['a slow flute', 'drums']
    given = quantizer.eval().mulan.get_text_latents(raw_texts=texts)
    assert torch.equal(quantizer(raw_texts=texts), quantizer(latents=given, namespace='coarse'))


@pytest.mark.parametrize(
    ('keywords', 'error', 'message'),
    [
        (dict(conditioning_dims=(8, 12)), ValueError, 'each namespace needs a width: got 2'),
        (dict(namespaces=('a', 'b', 'a')), ValueError, "different names, got .'a', 'b', 'a'"),
        (dict(namespaces='abc'), ValueError, 'different names'),
        (dict(conditioning_dims=(8, 0, 3)), ValueError, "conditioning_dims of 'coarse' must be greater than 0, got 0"),
        (dict(codebook_size=0), ValueError, 'codebook_size must be greater than 0'),
        (dict(cond_drop_prob=1.5), ValueError, r'cond_drop_prob must lie in \[0, 1\), got 1.5'),
        (dict(conditioning_dims='wide'), TypeError, 'wide'),
    ],
)
def test_bad_sizes(keywords, error, message):
    with pytest.raises(error, match=message):
        tiny_quantizer(**keywords)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(), 'pass one of wavs, texts, raw_texts and latents, got none'),
        (dict(wavs=torch.randn(1, 900), texts=torch.ones(1, 3, dtype=torch.long)), 'got wavs and texts'),
        (dict(latents=torch.randn(2, 7)), r'latents must have shape \(b, 16\), got \(2, 7\)'),
        (dict(latents=torch.randn(2, 16), namespace='bass'), "no namespace 'bass'; this quantizer has 'semantic'"),
    ],
)
def test_bad_calls(fitted, arguments, message):
    with pytest.raises(ValueError, match=message):
        fitted(**arguments)
