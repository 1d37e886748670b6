"""Embedders on tiny models of the real classes, and clips on their way through them."""

import math
import sys
import threading

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from helpers.clap import RATE, tiny_clap
from helpers.models import tiny_mulan
from scipy.signal import get_window

from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.evaluation.embedders import (
    CLAPEmbedder,
    Embedder,
    EnCodecEmbedder,
    MuLaNEmbedder,
    VGGishEmbedder,
    vggish_patches,
)
from musiclm_pytorch.evaluation.evaluator import Evaluator
from musiclm_pytorch.evaluation.inputs import embed_clips
from musiclm_pytorch.evaluation.tagging import TagDivergence, TaggerEmbedder, ZeroShotTagger


def noise(*samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    waves = [0.1 * torch.randn(n, generator=generator) for n in samples]
    return waves if len(waves) > 1 else waves[0]


def mulan(**audio):
    torch.manual_seed(0)
    return tiny_mulan(audio={**dict(audio_sample_rate=RATE, patch_dropout_prob=0.5), **audio})


def embedded_alone(embedder, waves):
    return [embedder.embed([wave])[0] for wave in waves]


def agree(found, wanted, atol=1e-5):
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted):
        assert mine.dtype == torch.float32
        assert not mine.requires_grad
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=1e-4)


# ---- MuLaN ----


@pytest.mark.parametrize('variable', [True, False])
def test_mulan_gives_one_latent_a_clip(variable):
    model = mulan(support_variable_length=variable).train()
    embedder = MuLaNEmbedder(model, batch_size=3)
    assert isinstance(embedder, Embedder)
    waves = noise(4000, 3500, 4000, 2777, 4000, 4000, 3500)
    found = embedder.embed(waves)
    assert model.training
    assert all(frames.shape == (1, 16) for frames in found)
    model.eval()
    with torch.no_grad():
        agree(found, [model.get_audio_latents(wave[None]) for wave in waves])
    assert embedder.embed([]) == []


def test_mulan_computes_a_batch_of_clips_at_once():
    model = mulan(support_variable_length=True).eval()
    batches = []
    model.audio.register_forward_pre_hook(lambda _, args: batches.append(tuple(args[0].shape)))
    MuLaNEmbedder(model, batch_size=4).embed(noise(2000, 2500, 2000, 2000, 2500, 2600))
    assert batches == [(4, 2500), (2, 2600)]


def test_mulan_gives_a_latent_a_window():
    model = mulan().eval()
    embedder = MuLaNEmbedder(model, window_seconds=0.25, hop_seconds=0.1)
    long, short = noise(4100, 1500)
    starts = [0, 800, 1600, 2100]  # the last window ends with the clip
    wanted = model.get_audio_latents(torch.stack([long[start : start + 2000] for start in starts])).detach()
    agree(embedder.embed([long, short]), [wanted, model.get_audio_latents(short[None]).detach()])
    assert [len(it) for it in MuLaNEmbedder(model, window_seconds=0.25).embed([long, short])] == [3, 1]


def test_mulan_takes_clips_from_min_samples_to_its_longest():
    embedder = MuLaNEmbedder(mulan(max_audio_length=3000))
    assert len(embedder.embed(noise(embedder.min_samples, 3000))) == 2
    with pytest.raises(ValueError, match=f'mulan needs at least {embedder.min_samples} samples at 8000 Hz'):
        embedder.embed([noise(embedder.min_samples - 1)])
    with pytest.raises(ValueError, match='max_audio_length is 3000; pass window_seconds=0.375'):
        embedder.embed([noise(3001)])
    assert len(MuLaNEmbedder(embedder.mulan, window_seconds=0.375).embed([noise(3001)])[0]) == 2


@pytest.mark.parametrize(
    ('says', 'call'),
    [
        ('does not know its sample rate', lambda: MuLaNEmbedder(tiny_mulan())),
        ('takes spectrograms', lambda: MuLaNEmbedder(mulan(accept_spec=True))),
        ('pass window_seconds too', lambda: MuLaNEmbedder(mulan(), hop_seconds=1.0)),
        ('window_seconds=0.001 is 8 at 8000 Hz', lambda: MuLaNEmbedder(mulan(), window_seconds=0.001)),
        ('samples, but window_seconds=1', lambda: MuLaNEmbedder(mulan(max_audio_length=4000), window_seconds=1.0)),
        ('batch_size must be greater than 0', lambda: MuLaNEmbedder(mulan(), batch_size=0)),
        (r'waves\[1\] must have', lambda: MuLaNEmbedder(mulan()).embed([noise(4000), torch.zeros(1, 4000)])),
        (r'waves\[1\] must be a float', lambda: MuLaNEmbedder(mulan()).embed([noise(4000), torch.ones(4000).short()])),
    ],
)
def test_mulan_that_does_not_fit_and_waves_of_another_kind_are_refused(says, call):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


# ---- CLAP ----


@pytest.mark.parametrize('fusion', [False, True])
def test_clap_gives_a_frame_a_window_and_is_not_random(fusion):
    model, processor = tiny_clap(fusion)
    embedder = CLAPEmbedder(model, processor, batch_size=2)
    assert isinstance(embedder, Embedder)
    assert (embedder.sample_rate, embedder.dim) == (RATE, 12)
    waves = noise(8000, 20000, 1, 3000)
    np.random.seed(7)  # noqa: NPY002
    found = embedder.embed(waves)
    assert np.random.rand() == pytest.approx(0.07630829)  # noqa: NPY002  # the first number after that seed
    assert [len(frames) for frames in found] == [1, 3, 1, 1]
    agree(found, embedded_alone(embedder, waves))
    torch.testing.assert_close(torch.cat(found).norm(dim=-1), torch.ones(6))
    agree([found[1][1:]], [torch.cat(embedder.embed([waves[1][8000:16000], waves[1][12000:]]))])
    assert embedder.embed([]) == []
    texts = ['slow', 'a fast tune', 'far too long to fit into this tiny tower, word after word']
    latents = embedder.embed_texts(texts)
    agree([latents], [torch.cat([embedder.embed_texts([text]) for text in texts])])
    torch.testing.assert_close(latents.norm(dim=-1), torch.ones(3))
    assert (latents[0] - latents[1]).norm() > 1e-3
    for wrong in ('slow', []):
        with pytest.raises(ValueError, match='strings in a list'):
            embedder.embed_texts(wrong)

    inputs = processor.feature_extractor(waves[0].numpy(), sampling_rate=RATE, return_tensors='pt')
    with torch.no_grad():
        output = model.eval().get_audio_features(
            input_features=inputs['input_features'], is_longer=torch.zeros(1, 1, dtype=torch.bool)
        )
    agree(found[:1], [F.normalize(getattr(output, 'pooler_output', output), dim=-1)])


def test_clap_is_read_from_a_local_folder_only(tmp_path):
    model, processor = tiny_clap()
    model.save_pretrained(tmp_path / 'clap')
    processor.save_pretrained(tmp_path / 'clap')
    wave = noise(5000)
    agree(CLAPEmbedder(tmp_path / 'clap').embed([wave]), CLAPEmbedder(model, processor).embed([wave]))
    with pytest.raises(FileNotFoundError, match='no CLAP model with its processor at .*hf download'):
        CLAPEmbedder(tmp_path / 'nothing')
    with pytest.raises(ValueError, match='needs its processor'):
        CLAPEmbedder(model)
    with pytest.raises(TypeError, match='got Linear'):
        CLAPEmbedder(torch.nn.Linear(1, 1), processor)


# ---- EnCodec ----


def tiny_encodec(**keywords):
    encodec = pytest.importorskip('encodec')
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    torch.manual_seed(0)
    size = dict(dimension=16, n_filters=2, ratios=[4, 2], lstm=1, causal=True)
    return encodec.EncodecModel(
        SEANetEncoder(**size),
        SEANetDecoder(**size),
        ResidualVectorQuantizer(dimension=16, n_q=2, bins=16),
        **{**dict(target_bandwidths=[1.0], sample_rate=RATE, channels=1), **keywords},
    )


@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
def test_encodec_gives_what_its_quantizer_gets():
    model = tiny_encodec()
    embedder = EnCodecEmbedder(model, batch_size=2)
    assert isinstance(embedder, Embedder)
    assert (embedder.sample_rate, embedder.dim, embedder.min_samples) == (RATE, 16, 8)
    waves = noise(800, 801, 800, 8, 800)
    found = embedder.embed(waves)
    assert [len(frames) for frames in found] == [100, 101, 100, 1, 100]
    agree(found, embedded_alone(embedder, waves))
    seen = []
    model.quantizer.encode = lambda embeddings, *_: seen.append(embeddings) or torch.zeros(2, 1, 1)
    model.encode(waves[1][None, None])
    agree(found[1:2], [seen[0][0].T.detach()])
    with pytest.raises(ValueError, match='encodec needs at least 8 samples'):
        embedder.embed([noise(7)])
    assert embedder.embed([]) == []


@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
def test_encodec_refuses_what_is_not_its_model():
    with pytest.raises(ValueError, match="'stereo' takes 2 channels in segments of 1.0 s"):
        EnCodecEmbedder(tiny_encodec(channels=2, segment=1.0, name='stereo'))
    with pytest.raises(TypeError, match='got Linear'):
        EnCodecEmbedder(torch.nn.Linear(1, 1))


@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
def test_encodec_is_read_from_a_local_file_only(tmp_path):
    encodec = pytest.importorskip('encodec')
    model = encodec.EncodecModel.encodec_model_24khz(pretrained=False)
    torch.save(model.state_dict(), tmp_path / 'encodec.th')
    embedder = EnCodecEmbedder(tmp_path / 'encodec.th')
    assert (embedder.sample_rate, embedder.dim, embedder.min_samples) == (24000, 128, 320)
    wave = noise(6400)
    agree(embedder.embed([wave]), EnCodecEmbedder(model).embed([wave]))
    with pytest.raises(FileNotFoundError, match=r'no weights of .*encodec_24khz-d7cc33bc.th, at .*nothing.th'):
        EnCodecEmbedder(tmp_path / 'nothing.th')


# ---- VGGish ----


def plain_log_mel(samples):
    """The definition in numpy."""

    def mel(frequency):
        return 1127 * np.log(1 + frequency / 700)

    bins, edges = mel(np.linspace(0, 8000, 257)), np.linspace(mel(125), mel(7500), 66)
    filters = np.stack([np.interp(bins, edges[i : i + 3], [0, 1, 0]) for i in range(64)], axis=1)
    frames = np.lib.stride_tricks.sliding_window_view(samples, 400)[::160] * get_window('hann', 400)
    return np.log(np.abs(np.fft.rfft(frames, 512)) @ filters + 0.01)


def test_vggish_features_are_their_definition():
    wave = noise(VGGishEmbedder.min_samples + 100)
    found = vggish_patches(wave)
    assert found.shape == (1, 96, 64)
    np.testing.assert_allclose(found[0, :4], plain_log_mel(wave.double().numpy()[: 400 + 3 * 160]), atol=1e-4)
    assert len(vggish_patches(noise(15600 + 95 * 160))) == 1
    assert len(vggish_patches(noise(15600 + 96 * 160))) == 2
    assert torch.equal(vggish_patches(torch.zeros(15600)), torch.full((1, 96, 64), math.log(0.01)))


@pytest.fixture
def vggish_weights(tmp_path):
    """Weights by the names of torchvggish; the large ones repeat a row, so that the file is small."""
    generator = torch.Generator().manual_seed(0)
    state, width = {}, 1
    for layer, channels in zip((0, 3, 6, 8, 11, 13), (64, 128, 256, 256, 512, 512)):
        spread = math.sqrt(2 / (9 * width))
        state[f'features.{layer}.weight'] = spread * torch.randn(channels, width, 3, 3, generator=generator)
        state[f'features.{layer}.bias'] = 0.1 * torch.randn(channels, generator=generator)
        width = channels
    for layer, inputs, outputs in ((0, 12288, 4096), (2, 4096, 4096), (4, 4096, 128)):
        row = torch.randn(1, inputs, generator=generator) / math.sqrt(inputs)
        state[f'embeddings.{layer}.weight'] = row.expand(outputs, -1)
        state[f'embeddings.{layer}.bias'] = torch.randn(outputs, generator=generator)
    torch.save(state, tmp_path / 'vggish.pth')
    return tmp_path / 'vggish.pth', state


def plain_vggish(patch, state):
    """The network layer by layer, for one patch `(96, 64)`."""
    x = patch[None, None]
    for layer in (0, 3, 6, 8, 11, 13):
        x = F.relu(F.conv2d(x, state[f'features.{layer}.weight'], state[f'features.{layer}.bias'], padding=1))
        if layer in (0, 3, 8, 13):
            x = F.max_pool2d(x, 2)
    assert x.shape == (1, 512, 6, 4)
    x = torch.stack([x[0, :, t, f] for t in range(6) for f in range(4)]).flatten()
    for layer in (0, 2, 4):
        x = state[f'embeddings.{layer}.weight'] @ x + state[f'embeddings.{layer}.bias']
        x = x if layer == 4 else F.relu(x)
    return x


def test_vggish_is_its_network_on_patches(vggish_weights):
    path, state = vggish_weights
    embedder = VGGishEmbedder(path, batch_size=2)
    assert isinstance(embedder, Embedder)
    assert (embedder.sample_rate, embedder.dim, embedder.min_samples) == (16000, 128, 15600)
    waves = noise(15600, 50000)
    found = embedder.embed(waves)
    assert [frames.shape for frames in found] == [(1, 128), (3, 128)]
    agree(found[1:], [torch.stack([plain_vggish(it, state) for it in vggish_patches(waves[1])])], atol=1e-4)
    assert (found[1] < 0).any()
    agree(found, embedded_alone(embedder, waves), atol=1e-4)
    assert embedder.embed([]) == []
    with pytest.raises(ValueError, match='vggish needs at least 15600 samples at 16000 Hz, got 15599'):
        embedder.embed([noise(15599)])


def test_weights_that_do_not_fit_are_named(vggish_weights, tmp_path):
    path, state = vggish_weights
    with pytest.raises(FileNotFoundError, match=r'no weights of .*vggish-10086976.pth, at .*nothing.pth'):
        VGGishEmbedder(tmp_path / 'nothing.pth')
    torch.save({**state, 'embeddings.4.bias': torch.zeros(64)}, path)
    with pytest.raises(ValueError, match=r'embeddings.4.bias is \(64,\) .* ought to be \(128,\)'):
        VGGishEmbedder(path)
    torch.save({'weight': torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r'features.0.weight is missing; .* and \d+ more'):
        VGGishEmbedder(path)
    torch.save(threading.Thread, path)  # a class, which loading would have to import
    with pytest.raises(ValueError, match='damaged, or holds more than tensors'):
        VGGishEmbedder(path)


@pytest.mark.parametrize(('package', 'embedder'), [('transformers', CLAPEmbedder), ('encodec', EnCodecEmbedder)])
def test_missing_package_is_named_with_its_extra(monkeypatch, package, embedder):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the package {package} .*: pip install '\.\[eval\]'"):
        embedder('anywhere')


# ---- many clips ----


def test_clips_come_in_order_by_every_embedder(tmp_path):
    coarse, fine = MuLaNEmbedder(mulan()), MuLaNEmbedder(mulan(audio_sample_rate=12000), window_seconds=0.2)
    fine.name = 'fine'
    waves = noise(9000, 4000, 16000, 7001, 4000)
    soundfile.write(tmp_path / 'stereo.wav', torch.stack([waves[2], -0.5 * waves[2]], dim=1).numpy(), 16000, 'FLOAT')
    sources = [(waves[0], RATE), (waves[1], 11025), tmp_path / 'stereo.wav', (waves[3], 12000), (waves[4], RATE)]
    monos = [(waves[0], RATE), (waves[1], 11025), (0.25 * waves[2], 16000), (waves[3], 12000), (waves[4], RATE)]
    for batch_size in (1, 2, 16):
        found = list(embed_clips((it for it in sources), [coarse, fine], batch_size=batch_size))
        assert [clip.index for clip in found] == [0, 1, 2, 3, 4]
        for (_, frames, missing), (wave, rate) in zip(found, monos):
            assert missing == {}
            for embedder in (coarse, fine):
                wanted = embedder.embed([resample(wave, rate, embedder.sample_rate)])
                agree([frames[embedder.name]], wanted)
    assert list(embed_clips([], [coarse])) == []


def test_clips_that_are_too_short_have_a_reason():
    embedder = MuLaNEmbedder(mulan(), window_seconds=0.25)
    shorter = MuLaNEmbedder(mulan(spec_hop_length=4))
    shorter.name = 'shorter'
    samples = embedder.min_samples - 1
    assert shorter.min_samples <= samples
    sources = [(wave, RATE) for wave in noise(3000, samples, 2000)] + [(torch.zeros(0), RATE)]
    found = list(embed_clips(sources, [embedder, shorter]))
    assert [list(clip.frames) for clip in found] == [['mulan', 'shorter'], ['shorter'], ['mulan', 'shorter'], []]
    assert found[1].missing == {
        'mulan': f'mulan needs at least {embedder.min_samples} samples at 8000 Hz, got {samples}'
    }
    assert 'got 0' in found[3].missing['shorter']
    agree([found[2].frames['mulan']], embedder.embed([sources[2][0]]))


@pytest.mark.parametrize(
    ('error', 'says', 'source'),
    [
        (FileNotFoundError, r'no audio file at nowhere\.wav', 'nowhere.wav'),
        (ValueError, 'clip 4 holds NaN', (torch.full((3000,), math.nan), RATE)),
        (ValueError, r'clip 4 must have shape \(samples,\)', (torch.zeros(1, 3000), RATE)),
        (TypeError, 'sample_rate must be an integer in Hz, got 0.5', (torch.zeros(3000), 0.5)),
        (TypeError, 'clip 4 must be a path or a pair of a wave and its rate, got Tensor', torch.zeros(2)),
    ],
)
def test_error_of_the_reader_reaches_the_caller_behind_the_clips_before(error, says, source):
    before = threading.active_count()
    sources = (it for it in [*[(noise(3000), RATE)] * 4, source, (noise(3000), RATE)])
    clips = embed_clips(sources, [MuLaNEmbedder(mulan())], batch_size=2)
    assert [next(clips).index for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(error, match=says):
        next(clips)
    assert threading.active_count() == before


class Picky:
    """One frame a clip: the logarithm of its loudest sample. Refuses what is too loud, by the place in the batch."""

    name, sample_rate, dim, min_samples = 'picky', RATE, 1, 10

    def __init__(self, error=ValueError):
        self.error = error

    def embed(self, waves):
        for place, wave in enumerate(waves):
            if wave.max() > 2:
                raise self.error(f'waves[{place}] is too loud')
        return [wave.max().log().view(1, 1) for wave in waves]


@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_what_an_embedder_cannot_take_names_the_clip_and_the_embedder(tmp_path, batch_size):
    waves = [0.5 * torch.ones(100) for _ in range(5)]
    loud, silent = [*waves[:3], 3 * torch.ones(100), waves[4]], [*waves[:3], torch.zeros(100), waves[4]]
    for bad, says in (
        (loud, r'clip 3: picky cannot embed it: waves\[0\] is too loud'),
        (silent, 'clip 3: picky gives NaN or infinity for it'),
    ):
        with pytest.raises(ValueError, match=f'^{says}'):
            list(embed_clips([(wave, RATE) for wave in bad], [Picky()], batch_size=batch_size))
        soundfile.write(tmp_path / 'bad.wav', bad[3].numpy(), RATE, 'FLOAT')
        sources = [*[(wave, RATE) for wave in waves], tmp_path / 'bad.wav']
        with pytest.raises(ValueError, match=rf'bad\.wav{says[6:]}'):
            list(embed_clips(sources, [Picky()], batch_size=batch_size))
    with pytest.raises(RuntimeError, match=r'^waves\[.\] is too loud'):
        list(embed_clips([(wave, RATE) for wave in loud], [Picky(RuntimeError)], batch_size=batch_size))


def test_clips_go_by_their_indices_in_a_larger_set():
    waves = [torch.ones(100) / (1 + index) for index in range(5)]
    found = list(embed_clips([(wave, RATE) for wave in waves], [Picky()], batch_size=2, indices=range(1, 11, 2)))
    assert [clip.index for clip in found] == [1, 3, 5, 7, 9]
    assert [clip.frames['picky'].exp().item() for clip in found] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    with pytest.raises(ValueError, match='clip 8: picky gives NaN'):
        list(embed_clips([(waves[0], RATE), (0 * waves[0], RATE)], [Picky()], indices=[4, 8]))
    with pytest.raises(ValueError, match='argument 2 is longer'):
        list(embed_clips([(wave, RATE) for wave in waves], [Picky()], indices=[1, 2]))


# ---- sets of clips ----


def test_a_tagger_leaves_short_clips_out():
    model = tiny_mulan(dict(audio_sample_rate=RATE), dict(num_tokens=49408))
    tagger = ZeroShotTagger(model, ('a', 'b', 'c'))
    clips = noise(4000, tagger.min_samples - 1, 3000)
    metric = TagDivergence(tagger)
    Evaluator([metric], batch_size=2).update(clips, sample_rate=RATE)
    found = metric.state['generated']
    assert set(found) == {0, 2}
    torch.testing.assert_close(found[2] / found[2].sum(), tagger.probabilities(clips[2:])[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match='the tagger does not know the rate'):
        TaggerEmbedder(ZeroShotTagger(tiny_mulan(text=dict(num_tokens=49408)), ('a',)))


def test_reader_stays_near_the_models_and_ends_with_them():
    taken = []

    def sources():
        for index in range(1000):
            taken.append(index)
            yield noise(2000), RATE

    before = threading.active_count()
    clips = embed_clips(sources(), [MuLaNEmbedder(mulan())], batch_size=2, prefetch=3)
    for index in range(10):
        assert next(clips).index == index
    # 5 batches are out, 3 wait in the queue, and one waits for a place in it
    assert len(taken) <= 2 * (5 + 3 + 1)
    clips.close()
    assert threading.active_count() == before
    assert len(taken) < 30


def test_embedders_of_one_name_are_refused():
    embedder = MuLaNEmbedder(mulan())
    for embedders, keywords, says in (
        ([], {}, 'one or more of different names, got none'),
        ([embedder] * 2, {}, 'names of their own, got mulan, mulan'),
        ([embedder], dict(batch_size=0), 'batch_size must be greater than 0'),
    ):
        with pytest.raises(ValueError, match=says):
            embed_clips([], embedders, **keywords)
