"""Taggers, KL, areas under curves, and MagnaTagATune from a small table."""

import math
import sys

import numpy as np
import pytest
import soundfile
import torch
from helpers.models import tiny_mulan
from sklearn.metrics import average_precision_score, roc_auc_score

from musiclm_pytorch.evaluation import tagging
from musiclm_pytorch.evaluation.embedders import MuLaNEmbedder
from musiclm_pytorch.evaluation.inputs import TOP_TAGS, read_magnatagatune
from musiclm_pytorch.evaluation.tagging import (
    MUSIC_TAGS,
    PaSSTTagger,
    Tagger,
    ZeroShotTagger,
    kl_figures,
    tagging_figures,
    tagging_of_files,
)
from musiclm_pytorch.mulan.layers import l2norm

RATE = 800


@pytest.fixture(scope='module')
def mulan():
    torch.manual_seed(0)
    audio = dict(depth=1, audio_sample_rate=RATE, spec_n_fft=64)
    return tiny_mulan(audio, dict(depth=1, num_tokens=49408, max_seq_len=16)).eval()


def waves(*seconds):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(round(RATE * it), generator=generator) - 0.5 for it in seconds]


# ---- zero-shot ----


def test_scores_are_cosines_with_the_mean_prompt_and_probabilities_at_the_temperature_of_the_model(mulan):
    tags, templates = ('piano', 'heavy metal', 'slow'), ('{}', '{} music')
    tagger = ZeroShotTagger(mulan, tags, templates)
    assert isinstance(tagger, Tagger)
    assert (tagger.tags, tagger.sample_rate) == (tags, RATE)
    given = waves(1, 2.3)
    scores = tagger.scores(given)
    with torch.no_grad():
        latents = torch.cat([mulan.get_audio_latents(wave[None]) for wave in given])
        prompts = [mulan.get_text_latents(raw_texts=[tag, f'{tag} music']).mean(dim=0) for tag in tags]
    expected = torch.cosine_similarity(latents[:, None], torch.stack(prompts), dim=-1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(tagger.scores_of(latents), expected, atol=1e-5, rtol=0)
    expected = (scores * mulan.contrast.temperatures.exp().item()).softmax(dim=1)  # its bound is far
    torch.testing.assert_close(tagger.probabilities(given), expected)
    torch.testing.assert_close(tagger.probabilities_of(latents), expected)


@pytest.mark.parametrize('longest', [0.25, 1.5, None])
def test_waves_are_tagged_as_their_embeddings(longest):
    # windows of less than a second leave nothing out between them
    audio = dict(depth=1, audio_sample_rate=RATE, spec_n_fft=64)
    torch.manual_seed(0)
    short = tiny_mulan(audio | dict(max_audio_length=longest and round(longest * RATE)), dict(num_tokens=49408)).eval()
    tagger = ZeroShotTagger(short, ('a', 'b', 'c'), window=2.0)
    embedder = MuLaNEmbedder(short, window_seconds=longest or 2.0, hop_seconds=min(1.0, longest or 2.0))
    given = waves(3, 2.2, 0.24)
    means = torch.stack([l2norm(frames.mean(dim=0)) for frames in embedder.embed(given)])
    torch.testing.assert_close(tagger.probabilities(given), tagger.probabilities_of(means), atol=1e-5, rtol=1e-4)


def test_the_shortest_wave_is_that_of_the_tower(mulan):
    tagger = ZeroShotTagger(mulan, ('a', 'b'))
    assert tagger.min_samples == MuLaNEmbedder(mulan).min_samples > 1
    (wave,) = waves(1)
    assert tagger.probabilities([wave[: tagger.min_samples]]).shape == (1, 2)
    with pytest.raises(ValueError, match=f'but a tagger needs {tagger.min_samples}; leave it out'):
        tagger.probabilities([wave[: tagger.min_samples - 1]])


def test_prompts_in_batches_are_the_same_and_the_mode_is_kept(mulan):
    mulan.train()
    few = ZeroShotTagger(mulan, batch_size=7).tag_latents
    assert mulan.training
    assert mulan.text.training
    mulan.eval()
    torch.testing.assert_close(few, ZeroShotTagger(mulan, batch_size=500).tag_latents, atol=1e-5, rtol=0)
    assert few.shape == (len(MUSIC_TAGS), 16)
    assert not few.requires_grad


def test_bad_taggers(mulan):
    deaf = tiny_mulan(text=dict(num_tokens=49408))
    for build, message in [
        (lambda: ZeroShotTagger(mulan, ()), 'tags must be one or more different names'),
        (lambda: ZeroShotTagger(mulan, ('a', 'a')), 'tags must be one or more different names'),
        (lambda: ZeroShotTagger(mulan, 'rock'), 'tags must be one or more different names'),
        (lambda: ZeroShotTagger(mulan, ('a',), ('music',)), 'in the place of the tag'),
        (lambda: ZeroShotTagger(mulan, ('a',), window=0.0), 'window must be greater than 0'),
        (lambda: ZeroShotTagger(deaf).scores([torch.zeros(4000)]), 'does not know its sample rate'),
        (lambda: ZeroShotTagger(mulan).scores([]), 'no waves to tag'),
        (lambda: ZeroShotTagger(mulan).scores([*waves(1), torch.zeros(1, 9)]), r'waves\[1\] must have shape'),
        (lambda: ZeroShotTagger(mulan).scores([torch.tensor([math.nan] * 800)]), r'waves\[0\] holds NaN'),
        (lambda: ZeroShotTagger(mulan).scores([torch.zeros(0)]), r'waves\[0\] has 0 samples'),
        (lambda: ZeroShotTagger(mulan).scores_of(torch.zeros(2, 3)), r'latents must have shape \(n, 16\)'),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


# ---- PaSST ----


def test_passt_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'hear21passt', None)
    monkeypatch.setitem(sys.modules, 'hear21passt.models.passt', None)
    with pytest.raises(ImportError, match=r"hear21passt.*pip install '\.\[eval\]'"):
        PaSSTTagger('weights.pt')


@pytest.fixture(scope='module')
def passt(tmp_path_factory):
    """Random weights: the published ones may not be downloaded here."""
    models = pytest.importorskip('hear21passt.models.passt')
    path = tmp_path_factory.mktemp('passt') / 'weights.pt'
    net = models.get_model('passt_s_swa_p16_128_ap476', pretrained=False)
    torch.save(net.state_dict(), path)
    return PaSSTTagger(path), path


def test_passt_averages_segments(passt, capsys):
    tagger, _ = passt
    assert isinstance(tagger, Tagger)
    capsys.readouterr()
    wave = 0.1 * torch.randn(12 * 32000)
    # the rest of the second wave is too short for a patch, and left out
    found = tagger.probabilities([wave, wave[: 10 * 32000 + 4800], wave[10 * 32000 :]])
    assert capsys.readouterr().out == ''
    assert found.shape == (3, 527)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(found[0], (found[1] + found[2]) / 2)
    assert (found[1] - found[2]).abs().max() > 1e-6
    with pytest.raises(ValueError, match=r'waves\[0\] has 4800 samples, but a tagger needs 4801'):
        tagger.probabilities([wave[:4800]])


def test_passt_wants_its_weights(passt, tmp_path):
    _, path = passt
    with pytest.raises(FileNotFoundError, match='no weights of PaSST at'):
        PaSSTTagger(tmp_path / 'nothing.pt')
    with pytest.raises(ValueError, match='do not fit this model'):
        PaSSTTagger(path, arch='passt_l_kd_p16_128_ap47')


# ---- KL ----


def distributions(n, tags, seed=0):
    return torch.randn(n, tags, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(dim=-1)


def test_kl_of_pairs_is_that_of_audiocraft():
    generated, reference = distributions(9, 5), distributions(9, 5, seed=1)
    figures = kl_figures(generated, reference)
    assert set(figures) == {'kl_reference_generated', 'kl_generated_reference'}
    # audiocraft: KL(target ‖ generated) by torch, with ε beside the generated
    for name, target, other in [
        ('kl_reference_generated', reference, generated),
        ('kl_generated_reference', generated, reference),
    ]:
        expected = torch.nn.functional.kl_div((other + 1e-6).log(), target, reduction='none').sum(dim=-1)
        assert figures[name].value == pytest.approx(expected.mean().item(), abs=1e-5)
        assert figures[name].low < figures[name].value < figures[name].high
        assert (figures[name].count, figures[name].unit) == (9, 'nats')
    assert figures['kl_reference_generated'].value != figures['kl_generated_reference'].value
    assert kl_figures(generated.numpy(), reference.numpy()) == figures


def test_kl_of_the_same_is_nothing_and_of_the_excluded_is_finite():
    probs = distributions(4, 6)
    assert kl_figures(probs, probs)['kl_reference_generated'].value == pytest.approx(0, abs=1e-5)
    sure = torch.eye(3)
    value = kl_figures(sure, sure.roll(1, dims=0))['kl_reference_generated'].value
    assert value == pytest.approx(-math.log(1e-6), abs=1e-4)


def test_kl_of_sets_compares_their_means():
    generated, reference = distributions(5, 4), distributions(8, 4, seed=1)
    figures = kl_figures(generated, reference, paired=False)
    p, q = reference.double().mean(dim=0), generated.double().mean(dim=0)
    figure = figures['kl_of_means_reference_generated']
    assert figure.value == pytest.approx(float((p * (p.log() - (q + 1e-6).log())).sum()), abs=1e-9)
    assert figure.low is None
    assert figure.details == dict(generated=5, reference=8)
    assert figures['kl_of_means_generated_reference'].value == pytest.approx(
        float((q * (q.log() - (p + 1e-6).log())).sum()), abs=1e-9
    )
    # in any order
    turned = kl_figures(generated.flip(0), reference, paired=False)
    assert turned['kl_of_means_reference_generated'].value == pytest.approx(figure.value)


@pytest.mark.parametrize(
    ('generated', 'reference', 'message'),
    [
        (distributions(3, 4), distributions(4, 4), 'no pairs; pass paired=False'),
        (distributions(3, 4), distributions(3, 5), 'the same tagger, got 4 tags'),
        (distributions(3, 4)[0], distributions(3, 4), r'generated_probs must have shape \(clips, tags\)'),
        (distributions(0, 4), distributions(0, 4), r'generated_probs must have shape \(clips, tags\)'),
        (torch.randn(3, 4), distributions(3, 4), r'generated_probs\[0\] is no distribution'),
        (distributions(3, 4), distributions(3, 4) * math.nan, r'reference_probs\[0\] is no distribution'),
        (distributions(3, 4), 1.01 * distributions(3, 4), 'pass probabilities, not scores'),
    ],
)
def test_bad_distributions(generated, reference, message):
    with pytest.raises(ValueError, match=message):
        kl_figures(generated, reference)


# ---- areas under curves ----


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(tagging, 'RESAMPLES', 40)


def test_areas_are_those_of_each_tag():
    random = np.random.default_rng(0)
    truth = random.random((41, 5)) < np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    scores = np.round(random.standard_normal((41, 5)) + truth, 1)  # with ties
    tags = [f'tag {i}' for i in range(5)]
    figures = tagging_figures(scores, truth, tags)
    for name, measure in dict(roc_auc=roc_auc_score, pr_auc=average_precision_score).items():
        expected = [measure(truth[:, i], scores[:, i]) for i in range(5)]
        by_tag = figures[f'{name}_by_tag']
        assert list(by_tag) == tags
        assert [it.value for it in by_tag.values()] == pytest.approx(expected)
        assert [it.details['share'] for it in by_tag.values()] == pytest.approx(truth.mean(axis=0))
        assert figures[name].value == pytest.approx(np.mean(expected))
        assert figures[name].details == dict(tags_counted=5, tags_given=5)
        assert figures[name].count == 41


def test_tags_that_all_or_no_clips_have_are_left_out():
    truth = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1]])
    scores = torch.tensor([[0.1, 0.2, 0.9], [0.3, 0.4, 0.5], [0.3, 0.1, 0.2]])
    figures = tagging_figures(scores, torch.from_numpy(truth), ('all', 'none', 'some'))
    for name in ('roc_auc', 'pr_auc'):
        by_tag = figures[f'{name}_by_tag']
        assert (by_tag['all'].value, by_tag['all'].reason) == (None, 'every clip has the tag')
        assert (by_tag['none'].value, by_tag['none'].reason) == (None, 'no clip has the tag')
        assert figures[name].value == by_tag['some'].value
        assert figures[name].details == dict(tags_counted=1, tags_given=3)
    assert figures['roc_auc'].value == 0.5

    nothing = tagging_figures(scores[:, :2], truth[:, :2], ('all', 'none'))
    assert nothing['roc_auc'].value is None
    assert nothing['roc_auc'].reason == 'no tag has clips with and without it'


def test_means_over_tags_have_the_interval_of_resampled_clips():
    random = np.random.default_rng(1)
    truth = random.random((40, 3)) < np.array([0.03, 0.3, 0.6])
    truth[0, 0], truth[1:, 0] = True, False  # a resample without clip 0 has no such tag
    scores = np.round(random.standard_normal((40, 3)) + truth, 1)
    figures = tagging_figures(scores, truth, ('a', 'b', 'c'), seed=4)
    draws = np.random.default_rng(4).integers(40, size=(tagging.RESAMPLES, 40))
    for name, measure in dict(roc_auc=roc_auc_score, pr_auc=average_precision_score).items():
        means = []
        for drawn in draws:
            pairs = [(truth[drawn, tag], scores[drawn, tag]) for tag in range(3)]
            means.append(np.mean([measure(wanted, own) for wanted, own in pairs if 0 < wanted.sum() < 40]))
        assert (figures[name].low, figures[name].high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
        assert figures[name].low < figures[name].value < figures[name].high
    assert tagging_figures(scores, truth, ('a', 'b', 'c'), seed=5)['pr_auc'].low != figures['pr_auc'].low


def test_files_are_tagged_as_their_waves(mulan, tmp_path):
    given = waves(1, 2.3, 0.7, 1, 1.2)
    paths = []
    for i, wave in enumerate(given):
        paths.append(tmp_path / f'{i}.wav')
        soundfile.write(paths[-1], wave.numpy(), RATE, 'FLOAT')
    truth = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [0, 1]], dtype=bool)
    tagger = ZeroShotTagger(mulan, ('piano', 'slow'), window=1.0)
    found = tagging_of_files(tagger, paths, truth, batch_size=2, seed=3)
    assert found == tagging_figures(tagger.scores(given), truth, tagger.tags, seed=3)
    assert found['roc_auc'].low is not None
    assert tagging_of_files(tagger, [str(it) for it in paths], torch.from_numpy(truth), seed=3) == found

    with pytest.raises(ValueError, match=r'truth must have the shape \(files, tags\), \(4, 2\)'):
        tagging_of_files(tagger, paths[:4], truth)
    soundfile.write(paths[3], np.zeros(9), RATE)
    with pytest.raises(ValueError, match=r'3\.wav: mulan needs at least .* got 9; leave it out'):
        tagging_of_files(tagger, paths, truth)


@pytest.mark.parametrize(
    ('scores', 'truth', 'tags', 'message'),
    [
        (np.zeros((3, 2)), np.zeros((3, 2)), ('a',), r'the shape \(clips, 1\)'),
        (np.zeros((3, 2)), np.zeros((4, 2)), ('a', 'b'), r'got \(3, 2\) and \(4, 2\)'),
        (np.zeros((0, 2)), np.zeros((0, 2)), ('a', 'b'), r'got \(0, 2\)'),
        (np.full((3, 2), math.inf), np.zeros((3, 2)), ('a', 'b'), r'scores\[0\] hold NaN or infinity'),
        (np.zeros((3, 2)), np.full((3, 2), 0.5), ('a', 'b'), 'truth must hold True and False'),
        (np.zeros((3, 2)), np.zeros((3, 2)), ('a', 'a'), 'different names'),
    ],
)
def test_bad_scores(scores, truth, tags, message):
    with pytest.raises(ValueError, match=message):
        tagging_figures(scores, truth, tags)


# ---- MagnaTagATune ----

CLIPS = {
    '0/first.mp3': {'guitar'},
    'b/second.mp3': {'guitar', 'no vocals'},
    'c/third.mp3': set(),
    'd/fourth.mp3': {'choral', 'slow', 'hissing'},
    'f/fifth, live.mp3': {'hissing'},
    'e/sixth.mp3': {'guitar'},
}


def write_annotations(path, clips, tags=('hissing', *TOP_TAGS), change=lambda lines: lines):
    lines = [['clip_id', *tags, 'mp3_path']]
    lines += [[str(i), *(str(int(tag in own)) for tag in tags), name] for i, (name, own) in enumerate(clips.items())]
    path.write_text('\n'.join(change(['\t'.join(f'"{it}"' for it in line) for line in lines])) + '\n')
    return path


def test_splits_and_truth(tmp_path):
    path = write_annotations(tmp_path / 'annotations_final.csv', CLIPS)
    paths = {
        split: [it.as_posix() for it in read_magnatagatune(path, split=split).paths] for split in ('train', 'valid')
    }
    assert paths == dict(train=['0/first.mp3', 'b/second.mp3'], valid=['c/third.mp3'])
    found = read_magnatagatune(path)
    assert [it.as_posix() for it in found.paths] == ['d/fourth.mp3', 'f/fifth, live.mp3', 'e/sixth.mp3']
    assert found.tags == TOP_TAGS
    assert found.truth.dtype == bool
    named = [{tag for tag, has in zip(found.tags, row) if has} for row in found.truth]
    assert named == [{'choral', 'slow'}, set(), {'guitar'}]
    assert len(TOP_TAGS) == len(set(TOP_TAGS)) == 50
    assert len(read_magnatagatune(path, untagged=False).paths) == 2
    found = read_magnatagatune(path, tags=('hissing', 'guitar'), untagged=False)
    assert found.truth.tolist() == [[True, False], [True, False], [False, True]]


def test_files_are_looked_for_and_empty_ones_left_out(tmp_path):
    path = write_annotations(tmp_path / 'annotations_final.csv', CLIPS)
    music = tmp_path / 'mp3'
    for name in CLIPS:
        (music / name).parent.mkdir(parents=True, exist_ok=True)
        (music / name).write_bytes(b'' if 'sixth' in name else b'sound')
    found = read_magnatagatune(path, music)
    assert found.paths == [music / 'd/fourth.mp3', music / 'f/fifth, live.mp3']
    assert len(found.truth) == 2
    (music / 'd/fourth.mp3').unlink()
    with pytest.raises(FileNotFoundError, match=r'fourth\.mp3, which is not there; pass the folder that holds'):
        read_magnatagatune(path, music)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda lines: [line.replace('\t', ',') for line in lines],
            'has no columns clip_id … mp3_path, parted by tabs',
        ),
        (lambda lines: [], 'has no columns clip_id'),
        (lambda lines: [lines[0].replace('guitar', 'banjo'), *lines[1:]], "no column for the tags 'guitar'"),
        (lambda lines: [*lines, '"9"\t"1"'], 'line 8 of .* has 2 columns, not 53'),
        (lambda lines: [it.replace('"1"', '"yes"') for it in lines], "line 2 of .* has 'yes' in the column of a tag"),
        (lambda lines: [it.replace('d/', 'z/') for it in lines], "line 5 of .* has the path 'z/fourth.mp3'"),
        (lambda lines: [it.replace('d/', '../d/') for it in lines], 'not one in the folders 0 to f'),
        (lambda lines: lines[:2], "no clip of the split 'test'"),
    ],
)
def test_bad_annotations(tmp_path, change, message):
    path = write_annotations(tmp_path / 'annotations_final.csv', CLIPS, change=change)
    with pytest.raises(ValueError, match=message) as error:
        read_magnatagatune(path)
    assert str(path) in str(error.value)
    assert 'annotations_final.csv' in str(error.value)


def test_bad_requests(tmp_path):
    path = write_annotations(tmp_path / 'annotations_final.csv', CLIPS)
    with pytest.raises(FileNotFoundError, match='it should be MagnaTagATune'):
        read_magnatagatune(tmp_path / 'nothing.csv')
    with pytest.raises(ValueError, match="unknown split 'dev'; choose one of 'train', 'valid', 'test'"):
        read_magnatagatune(path, split='dev')
    with pytest.raises(ValueError, match='tags must be a list of names'):
        read_magnatagatune(path, tags='guitar')
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='cannot be read as a table'):
        read_magnatagatune(path)
