"""The evaluator as a whole, its report, and the commands `musiclm evaluate` and `musiclm compare`."""

import csv
import json
import os
import re
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import soundfile
import torch
import torch.distributed as dist
from helpers.models import tiny_mulan
from helpers.processes import start_processes

from musiclm_pytorch import MusicLMEvaluator, SyntheticMusic
from musiclm_pytorch.cli import main
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.evaluation import (
    ClipMetric,
    Evaluator,
    FrechetAudioDistance,
    KernelAudioDistance,
    Metric,
    MusicStructure,
    SignalQuality,
    TagDivergence,
    Tagging,
    TextAudioAlignment,
)
from musiclm_pytorch.evaluation.embedders import MuLaNEmbedder
from musiclm_pytorch.evaluation.evaluator import GROUPS, load_mulan
from musiclm_pytorch.evaluation.metric import to_json
from musiclm_pytorch.evaluation.report import compare_reports, figures_in, write_report
from musiclm_pytorch.evaluation.tagging import MUSIC_TAGS, ZeroShotTagger

RATE = 16000


@pytest.fixture(scope='module')
def tiny():
    return load_mulan('tiny')


def music():
    music = SyntheticMusic(10, seconds=2.0, sample_rate=RATE, split='valid')
    waves, texts = zip(*(music[index] for index in range(10)))
    return list(waves), list(texts)


@pytest.fixture(scope='module')
def pairs():
    return music()


@pytest.fixture(scope='module')
def results(tiny, pairs):
    waves, texts = pairs
    evaluator = MusicLMEvaluator(mulan=tiny)
    return evaluator.comprehensive_evaluation(texts[:5], waves[:5], waves[5:], sample_rate=RATE)


def test_results_are_figures_that_json_takes(results):
    assert set(results) == {'about', 'clips', 'reference_clips', *GROUPS}
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    for group in GROUPS:
        figures = figures_in(results[group])
        assert len(figures) >= 10
        for figure in figures.values():
            assert isinstance(figure['value'], float) or figure['reason']
            if 'low' in figure:
                assert figure['low'] <= figure['high']
    assert [row['name'] for row in results['clips']] == [f'clip {i}' for i in range(5)]
    assert len(results['reference_clips']) == 5


def test_alignment_is_that_of_mulan(tiny, pairs, results):
    waves, texts = pairs
    with torch.no_grad():
        audio = torch.cat([tiny.get_audio_latents(wave[None], sample_rate=RATE) for wave in waves[:5]])
        text = torch.cat([tiny.get_text_latents(raw_texts=[text]) for text in texts[:5]])
    cosines = (audio * text).sum(dim=1)
    assert [row['cosine'] for row in results['clips']] == pytest.approx(cosines.tolist(), abs=1e-4)
    consistency = results['text_audio_alignment']['mulan_cycle_consistency']
    assert consistency['value'] == pytest.approx(cosines.mean().item(), abs=1e-4)
    assert consistency['low'] < consistency['value'] < consistency['high']
    assert results['text_audio_alignment']['margin']['p_value'] < 0.05  # these are clips and their own captions


def test_distances_fall_as_noise_is_taken_out(tiny, pairs):
    waves, _ = pairs
    generator = torch.Generator().manual_seed(0)
    noises = [wave.std() * torch.randn(wave.shape, generator=generator) for wave in waves[:5]]
    evaluator = MusicLMEvaluator(mulan=tiny)
    found = []
    for level in (10.0, 1.0, 0.01):
        noisy = [wave + level * noise for wave, noise in zip(waves, noises)]
        quality = evaluator.audio_quality(noisy, waves[:5], sample_rate=RATE)
        found.append([quality[it]['mulan']['value'] for it in ('frechet_audio_distance', 'kernel_audio_distance')])
    for farther, nearer in pairwise(found):
        assert all(near < far for near, far in zip(nearer, farther)), found


def test_groups_alone_are_as_in_all(tiny, pairs, results):
    waves, texts = pairs
    evaluator = MusicLMEvaluator(mulan=tiny)
    assert evaluator.audio_quality(waves[:5], waves[5:], sample_rate=RATE) == results['audio_quality']
    assert evaluator.music_structure(waves[:5], waves[5:], sample_rate=RATE) == results['music_structure']
    alone = evaluator.text_audio_alignment(texts[:5], waves[:5], sample_rate=RATE)
    assert alone == results['text_audio_alignment']


def test_forms_of_waves_are_alike(tiny, pairs, tmp_path):
    waves, texts = pairs
    evaluator = MusicLMEvaluator(mulan=tiny)
    keywords = dict(texts=texts[:3], groups=['audio_quality', 'text_audio_alignment'])
    plain = evaluator.evaluate(waves[:3], sample_rate=RATE, **keywords)
    batch = torch.nn.functional.pad(torch.stack(waves[:3]), (0, 500), value=0.7)
    lengths = torch.full((3,), 2 * RATE)
    for given, own_lengths in (
        ([waves[0][None], torch.stack([waves[1], waves[1]]), waves[2]], None),
        (batch, lengths),
        (batch, lengths.tolist()),
    ):
        assert evaluator.evaluate(given, audio_lengths=own_lengths, sample_rate=RATE, **keywords) == plain
    files = []
    for index, wave in enumerate(waves[:3]):
        files.append(tmp_path / f'{index}.wav')
        soundfile.write(files[-1], wave.numpy(), RATE, subtype='FLOAT')
    from_files = evaluator.evaluate(files, **keywords)
    assert all(from_files[group] == plain[group] for group in keywords['groups'])


def test_the_rate_matters(tiny, pairs):
    waves, _ = pairs
    evaluator = MusicLMEvaluator(mulan=tiny)
    as_is, slower = (
        evaluator.music_structure(waves[:1], sample_rate=rate)['generated']['onset_density']['value']
        for rate in (RATE, RATE // 2)
    )
    assert slower < 0.8 * as_is
    assert tiny.sample_rate == 8000
    assert evaluator.evaluate(waves[:1], groups=['audio_quality'])['about']['sample_rate'] == 8000


def test_odd_clips_are_measured_as_far_as_they_go(tiny):
    """Silence, one clip, a clip shorter than a frame: figures without a value, never NaN."""
    evaluator = MusicLMEvaluator(mulan=tiny)
    texts = ['a flute', 'a piano', 'an organ']
    waves = [torch.zeros(RATE), 0.1 * torch.randn(50), torch.sin(torch.arange(3.0 * RATE) / 10)]
    found = evaluator.comprehensive_evaluation(texts, waves, waves, sample_rate=RATE)
    json.dumps(found, allow_nan=False)
    assert found['clips'][0]['loudness'] is None
    assert found['clips'][1]['cosine'] is None
    assert found['text_audio_alignment']['mulan_cycle_consistency']['count'] == 2
    assert found['audio_quality']['signal']['silent_clips']['value'] == 1
    alone = evaluator.comprehensive_evaluation(texts[:1], waves[2:], sample_rate=RATE)
    assert 'reference_clips' not in alone
    assert 'other text' in alone['text_audio_alignment']['audio_to_text_median_rank']['reason']
    short = evaluator.comprehensive_evaluation(texts[:1], waves[1:2], sample_rate=RATE)
    assert short['text_audio_alignment'].keys() == alone['text_audio_alignment'].keys()
    assert 'no clip can be embedded' in short['text_audio_alignment']['mulan_cycle_consistency']['reason']


def test_further_embedders_and_taggers(tiny, pairs):
    waves, _ = pairs

    class Whole(MuLaNEmbedder):
        name = 'whole'

    tagger = ZeroShotTagger(tiny, tags=MUSIC_TAGS[:5])
    evaluator = MusicLMEvaluator(mulan=tiny, embedders=[Whole(tiny)], tagger=tagger)
    found = evaluator.audio_quality(waves[:3], waves[3:6], sample_rate=RATE, paired=True)
    by_embedder = found['frechet_audio_distance']
    assert by_embedder['whole']['value'] == pytest.approx(by_embedder['mulan']['value'], abs=1e-5)
    probabilities = tagger.probabilities([resample(wave, RATE, 8000) for wave in waves[:6]])
    p, q = probabilities[3:].double(), probabilities[:3].double()
    expected = (p * (p.log() - (q + 1e-6).log())).sum(dim=1).mean().item()
    assert found['tags']['kl_reference_generated']['value'] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match='names of their own, got mulan, tags, mulan'):
        MusicLMEvaluator(mulan=tiny, embedders=[MuLaNEmbedder(tiny)])


def test_words_that_the_mulan_does_not_know_are_told(tiny, caplog):
    evaluator = MusicLMEvaluator(mulan=tiny)
    evaluator.embed_texts(['a flute', 'a slow organ'])
    assert 'does not know' not in caplog.text
    evaluator.embed_texts(['a lofi flute', 'a flute', 'a flute', 'lofi with a kazoo'])
    assert 'the model does not know lofi, kazoo, in 2 of 3 different texts' in caplog.text


def test_a_mulan_that_knows_no_rate(caplog):
    mulan = tiny_mulan({}, dict(num_tokens=49408))
    assert mulan.sample_rate is None
    evaluator = MusicLMEvaluator(mulan=mulan)
    waves = [torch.randn(RATE, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = evaluator.comprehensive_evaluation(['a', 'b'], waves, waves)
    assert found['about']['sample_rate'] == 16000
    assert '16000 Hz is assumed' in caplog.text
    assert found['audio_quality']['tags']['kl_of_means_reference_generated']['value'] is not None


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (dict(generated_audio=[]), ValueError, 'generated_audio is empty'),
        (dict(generated_audio=torch.zeros(800)), ValueError, r'generated_audio\[None\]'),
        (dict(generated_audio='x.wav'), TypeError, 'got str'),
        (
            dict(generated_audio=[torch.zeros(5, dtype=torch.int16)] * 2),
            TypeError,
            r'generated_audio\[0\] must be a flo',
        ),
        (dict(generated_audio=[torch.randn(9), torch.tensor([0.0, float('nan')])]), ValueError, r'\[1\] holds NaN'),
        (dict(generated_audio=[torch.randn(9), torch.zeros(0)]), ValueError, r'\[1\] has no samples'),
        (dict(generated_audio=['nowhere.wav', 'x']), FileNotFoundError, r'\[0\]: no file at nowhere.wav'),
        (dict(texts=['a']), ValueError, 'got 1 texts for 2 generated clips'),
        (dict(texts='ab'), TypeError, 'texts must be a list of strings|Sequence'),
        (dict(texts=['a', ' ']), ValueError, r'texts\[1\] is empty'),
        (dict(texts=None), ValueError, 'needs texts'),
        (dict(audio_lengths=[5]), ValueError, 'got 1 audio_lengths for 2 clips'),
        (dict(audio_lengths=5), TypeError, 'audio_lengths must be a list of lengths'),
        (dict(reference_audio=[torch.randn(9)] * 2, reference_lengths=[1]), ValueError, 'got 1 reference_lengths'),
        (dict(audio_lengths=[900, 901]), ValueError, r'generated_audio\[1\]: .*901'),
        (dict(reference_audio=[]), ValueError, 'reference_audio is empty'),
        (dict(sample_rate=0), ValueError, 'sample_rate must be greater than 0'),
        (dict(groups=['quality']), ValueError, "groups must be some of audio_quality.*'quality'"),
        (dict(paired=True), ValueError, 'got 2 generated and 0 reference clips'),
    ],
)
def test_bad_input_is_named(tiny, change, error, message):
    given = dict(generated_audio=[torch.randn(900), torch.randn(900)], texts=['a', 'b'], sample_rate=RATE) | change
    with pytest.raises(error, match=message):
        MusicLMEvaluator(mulan=tiny).evaluate(given.pop('generated_audio'), **given)


def test_what_an_evaluator_is_not_built_with(tiny):
    for keywords, message in (
        (dict(device='gpu'), "'gpu' is no device"),
        (dict(device='cuda:99'), "device='cuda:99', but torch finds"),
        (dict(seed=-1), 'seed must be at least 0, got -1'),
    ):
        with pytest.raises(ValueError, match=message):
            MusicLMEvaluator(mulan=tiny, **keywords)


# ---- processes ----


class Strange(Exception):
    """Whose constructor takes more than a message, so that it cannot be raised again from one."""

    def __init__(self, message, more='more'):
        super().__init__(message, more)


class Picky(ClipMetric):
    """Refuses what is too loud."""

    def __init__(self, error=ValueError):
        super().__init__()
        self.error = error

    def measure(self, wave, sample_rate):
        if wave.max() > 2:
            raise self.error('too loud')
        return dict(loudest=wave.max().item())


def worker(rank, folder):
    """Measures a whole set, and sets with a clip that only rank 1 has and cannot measure."""
    os.environ.update(MASTER_ADDR='127.0.0.1')
    torch.set_num_threads(1)
    (folder / f'broken.{rank}').write_bytes(b'no sound')
    # a rank that waited for another that failed gives up
    keywords = dict(init_method=f'file://{folder}/rendezvous', timeout=timedelta(minutes=2))
    dist.init_process_group('gloo', rank=rank, world_size=2, **keywords)
    waves, texts = music()
    evaluator = MusicLMEvaluator(mulan=load_mulan('tiny'))
    found = [evaluator.comprehensive_evaluation(texts[:5], waves[:5], waves[5:], sample_rate=RATE)]
    clips = [torch.full((100,), 1.0 + index / 10) for index in range(4)]
    for last, error in ((folder / f'broken.{rank}', ValueError), (3 * clips[3], ValueError), (3 * clips[3], Strange)):
        try:
            Evaluator([Picky(error)]).update([*clips[:3], last], sample_rate=RATE)
        except Exception as raised:
            found.append(f'{type(raised).__name__}: {raised}')
    (folder / f'found{rank}').write_text(json.dumps(found))
    dist.destroy_process_group()


def test_processes_find_what_one_finds_and_fail_together(results, tmp_path):
    start_processes(worker, tmp_path, count=2)
    found, other = (json.loads((tmp_path / f'found{rank}').read_text()) for rank in range(2))
    assert found == other
    assert_alike(found[0], results)
    broken, loud, strange = found[1:]
    assert broken.startswith(f'ValueError: rank 1: {tmp_path}/broken.1 cannot be read as audio')
    assert loud == 'ValueError: rank 1: clip 3: too loud'
    assert strange == "RuntimeError: rank 1: Strange: ('too loud', 'more')"


def assert_alike(found, wanted):
    """Equal but for rounding."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_alike(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted):
            assert_alike(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    else:
        assert found == wanted


# ---- metrics of one's own ----


class ZeroCrossings(ClipMetric):
    """How often a second a wave changes its sign: a metric as a user writes it."""

    def measure(self, wave, sample_rate):
        return dict(zero_crossings=(wave.sign().diff() != 0).sum().item() * sample_rate / len(wave))


class Lengths(Metric):
    """Without a value a clip: sums of numbers and tensors, and a list."""

    group = 'music_structure'

    def initial_state(self):
        return dict(seconds=0.0, samples=torch.zeros(()), texts=[])

    def update(self, clip):
        self.state['seconds'] += len(clip.wave) / clip.sample_rate
        self.state['samples'] += len(clip.wave)
        self.state['texts'] += [clip.text] * (clip.text is not None)

    def compute(self):
        return dict(seconds=self.state['seconds'], samples=self.state['samples'].item(), texts=len(self.state['texts']))


def test_a_metric_of_ones_own_stands_beside_the_others(tiny, pairs, tmp_path):
    waves, texts = pairs
    evaluator = MusicLMEvaluator(mulan=tiny, metrics=[ZeroCrossings(), Lengths()])
    asked = dict(sample_rate=RATE, groups=['audio_quality', 'music_structure'])
    for _ in range(2):  # nothing is left over from an evaluation before
        found = evaluator.evaluate(waves[:3], waves[3:5], texts=texts[:3], **asked)
    own = [row['zero_crossings'] for row in found['clips']]
    assert own == [ZeroCrossings().measure(wave, RATE)['zero_crossings'] for wave in waves[:3]]
    assert found['audio_quality']['zero_crossings']['value'] == pytest.approx(sum(own) / 3)
    assert found['audio_quality']['zero_crossings']['low'] <= found['audio_quality']['zero_crossings']['value']
    assert found['music_structure']['seconds'] == dict(value=10.0)  # of 5 clips
    assert [len(found[rows]) for rows in ('clips', 'reference_clips')] == [3, 2]
    page = write_report(found, tmp_path / 'out').read_text()
    assert 'zero crossings' in page
    plain = MusicLMEvaluator(mulan=tiny).evaluate(waves[:3], waves[3:5], texts=texts[:3], **asked)
    assert plain['audio_quality'].items() <= found['audio_quality'].items()


def everything(tiny):
    embedder = MuLaNEmbedder(tiny, 1.0)
    metrics = [SignalQuality(), MusicStructure(), TextAudioAlignment(embedder), FrechetAudioDistance(embedder)]
    metrics += [KernelAudioDistance(embedder), TagDivergence(embedder, paired=True), ZeroCrossings(), Lengths()]
    return [
        *metrics,
        Tagging(ZeroShotTagger(tiny, ('piano', 'flute')), torch.arange(8).reshape(4, 2) % 3 == 0, embedder=embedder),
    ]


def test_shards_of_a_set_add_up_to_the_whole(tiny):
    music = SyntheticMusic(4, seconds=2.0, sample_rate=RATE, split='valid')
    waves, texts = map(list, zip(*(music[index] for index in range(4))))
    whole, *shards = (Evaluator(everything(tiny), batch_size=3) for _ in range(3))
    whole.update(music)  # a data set, read as it goes
    whole.update(waves[::-1], sample_rate=RATE, is_reference=True)
    for shard, places in zip(shards, (slice(3), slice(3, 4))):
        start = places.start or 0
        shard.update(waves[places], texts[places], sample_rate=RATE, first_index=start)
        shard.update(waves[::-1][places], sample_rate=RATE, is_reference=True, first_index=start)
    with pytest.raises(ValueError, match='clip 0 comes twice; tell shards of a set apart by first_index'):
        shards[0].merge(shards[0])
    with pytest.raises(ValueError, match='clips of clip 0 are in both; give clips of shards their own indices'):
        shards[0].metrics[0].merge(shards[0].metrics[0])
    shards[0].merge(shards[1])
    found, wanted = (to_json(it.compute()) for it in (shards[0], whole))
    assert_alike(found, wanted)
    assert wanted['audio_quality']['frechet_audio_distance']['mulan']['value'] == pytest.approx(0, abs=1e-6)
    assert wanted['music_structure']['samples']['value'] == 8 * 2 * RATE
    assert wanted['tagging']['roc_auc']['count'] == 4
    rows = whole.clip_rows(list('abcd'), texts)
    assert_alike(shards[0].clip_rows(list('abcd'), texts), rows)
    assert {'cosine', 'loudness', 'tempo', 'zero_crossings'} <= rows[3].keys()
    whole.reset()
    with pytest.raises(ValueError, match='no clips to measure'):
        whole.compute()


def test_what_goes_wrong_leaves_the_evaluator_as_it_was(tiny, pairs):
    waves, _ = pairs
    evaluator = Evaluator([SignalQuality(), FrechetAudioDistance(MuLaNEmbedder(tiny))], reference=False)
    for part in (waves[:1], waves[1:2]):  # batch after batch
        evaluator.update(part, sample_rate=RATE)
    before = to_json(evaluator.compute())
    assert before['audio_quality']['frechet_infinity']['mulan'] == dict(value=None, reason='it needs reference audio')
    broken = torch.tensor([0.0, float('nan')])
    for message, call in [
        (r'\[1\] holds NaN', lambda: evaluator.update([waves[2], broken], sample_rate=RATE)),
        ('clip 1 comes twice', lambda: evaluator.update(waves[:3], sample_rate=RATE, first_index=1)),
        ('pass sample_rate in Hz', lambda: evaluator.update(waves)),
        ('first_index must be at least 0', lambda: evaluator.update(waves, sample_rate=8, first_index=-1)),
        ('with reference=True', lambda: evaluator.update(waves, sample_rate=8, is_reference=True)),
        ('the same metrics', lambda: evaluator.merge(Evaluator([SignalQuality()]))),
        ('at least one metric', lambda: Evaluator([])),
        ('names of their own, got mulan, mulan', lambda: Evaluator(everything(tiny) + everything(tiny))),
        ('group of a metric must be one of', lambda: MusicLMEvaluator(tiny, metrics=everything(tiny)[-1:])),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
        assert to_json(evaluator.compute()) == before
    twice = Evaluator([SignalQuality(), SignalQuality()])
    twice.update(waves[:1], sample_rate=RATE)
    with pytest.raises(ValueError, match='two metrics are named audio_quality.signal.loudness'):
        twice.compute()


# ---- on disk ----


def test_report(results, pairs, tmp_path):
    page = write_report(results, tmp_path / 'out', pairs[0][:5], sample_rate=RATE, title='A & B', players=2)
    assert {path.name for path in page.parent.iterdir()} == {'report.json', 'figures.csv', 'clips.csv', 'report.html'}
    assert json.loads((page.parent / 'report.json').read_text()) == results
    text = page.read_text()
    assert text.count('<audio') == 2
    assert '<title>A &amp; B</title>' in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing outside of the file
    with open(page.parent / 'figures.csv', newline='') as file:
        rows = {(row['group'], row['figure']): row for row in csv.DictReader(file)}
    consistency = results['text_audio_alignment']['mulan_cycle_consistency']
    assert float(rows['text_audio_alignment', 'mulan_cycle_consistency']['low']) == consistency['low']
    assert len(rows) == sum(len(figures_in(results[group])) for group in GROUPS)
    with open(page.parent / 'clips.csv', newline='') as file:
        assert [row['text'] for row in csv.DictReader(file)] == pairs[1][:5]
    assert f'judged by MuLaN ({results["about"]["mulan"]})' in text
    with pytest.raises(FileExistsError, match='report.json is there already'):
        write_report(results, tmp_path / 'out')
    for wrong, keywords, message in (
        (results['audio_quality'], {}, 'not of one group alone'),
        (results, dict(players=-1), 'players must be at least 0'),
        (results, dict(generated_audio=pairs[0][:3]), 'got 3 clips for results of 5'),
    ):
        with pytest.raises(ValueError, match=message):
            write_report(wrong, tmp_path / 'never', **keywords)
    assert not (tmp_path / 'never').exists()
    write_report(results, tmp_path / 'out', overwrite=True)
    assert '<audio' not in page.read_text()


def test_comparison(results, tmp_path, tiny, pairs):
    waves, texts = pairs
    other = MusicLMEvaluator(mulan=tiny).evaluate(
        waves[3:9], texts=texts[3:9], sample_rate=RATE, groups=['text_audio_alignment']
    )
    for name, it in dict(a=results, b=other).items():
        write_report(it, tmp_path / name)
    page = compare_reports({'first': tmp_path / 'a', 'second': tmp_path / 'b'}, tmp_path / 'out')
    rows = {row['figure']: row['runs'] for row in json.loads((tmp_path / 'out' / 'comparison.json').read_text())}
    runs = rows['mulan_cycle_consistency']
    assert runs['first'] == results['text_audio_alignment']['mulan_cycle_consistency']
    assert runs['second'] == other['text_audio_alignment']['mulan_cycle_consistency']
    assert rows['signal.loudness']['second'] is None
    assert 'not measured' in page.read_text()
    with open(tmp_path / 'out' / 'comparison.csv', newline='') as file:
        table = {row['figure']: row for row in csv.DictReader(file)}
    assert float(table['mulan_cycle_consistency']['second high']) == runs['second']['high']

    compare_reports({'a $^$': tmp_path / 'a', 'b': tmp_path / 'b'}, tmp_path / 'odd')
    moved = results | dict(about=results['about'] | dict(reference='others'))
    write_report(moved, tmp_path / 'e')
    with pytest.raises(ValueError, match='another reference: a .*, e .others.'):
        compare_reports(dict(a=tmp_path / 'a', e=tmp_path / 'e'), tmp_path / 'out2')
    reseeded = MusicLMEvaluator(mulan=tiny, seed=1).evaluate(waves[:2], sample_rate=RATE, groups=['audio_quality'])
    write_report(reseeded, tmp_path / 'c')
    with pytest.raises(ValueError, match='another seed: a 0, c 1'):
        compare_reports(dict(a=tmp_path / 'a', c=tmp_path / 'c'), tmp_path / 'out2')
    with pytest.raises(FileNotFoundError, match=r'no report\.json'):
        compare_reports(dict(a=tmp_path / 'a', d=tmp_path), tmp_path / 'out2')
    with pytest.raises(FileExistsError, match=r'comparison\.json'):
        compare_reports(dict(a=tmp_path / 'a', b=tmp_path / 'b'), tmp_path / 'out')


# ---- commands ----


@pytest.fixture
def folders(tmp_path, pairs):
    """Generated clips with prompts.json, as `musiclm generate` writes them, and clips of reference."""
    for name, waves in dict(generated=pairs[0][:3], reference=pairs[0][3:6]).items():
        (tmp_path / name).mkdir()
        for index, wave in enumerate(waves):
            soundfile.write(tmp_path / name / f'{index}.wav', wave.numpy(), RATE)
    prompts = {f'{index}.wav': text for index, text in enumerate(pairs[1][:3])}
    (tmp_path / 'generated' / 'prompts.json').write_text(json.dumps(prompts))
    return tmp_path


def test_evaluate_and_compare(folders, pairs, capsys, caplog):
    (folders / 'reference' / '1.wav').write_bytes(b'no sound')
    command = ['evaluate', '--generated', str(folders / 'generated'), '-o', str(folders / 'one')]
    texts = ['--texts', str(folders / 'generated' / 'prompts.json'), '--reference', str(folders / 'reference')]
    assert main([*command, *texts, '--paired']) == 0
    assert re.match('2 clips; 2 files skipped; .*report.html', capsys.readouterr().out)
    assert f'skipped {folders / "reference" / "1.wav"}: ' in caplog.text
    found = json.loads((folders / 'one' / 'report.json').read_text())
    assert [row['text'] for row in found['clips']] == [pairs[1][0], pairs[1][2]]
    assert 'kl_reference_generated' in found['audio_quality']['tags']
    assert main(command) == 2
    assert 'report.json is there already' in capsys.readouterr().err
    assert main([*command[:-1], str(folders / 'two')]) == 0  # without texts
    assert 'text_audio_alignment' not in json.loads((folders / 'two' / 'report.json').read_text())
    compared = ['compare', str(folders / 'one'), f'bare={folders / "two"}', '-o', str(folders / 'both')]
    assert main(compared) == 0
    assert (folders / 'both' / 'comparison.html').is_file()
    for index in range(3):
        (folders / 'generated' / f'{index}.wav').write_bytes(b'')
    assert main([*command[:-1], str(folders / 'none')]) == 2
    assert re.search('none of the 3 sound files in .*0.wav cannot be read as audio', capsys.readouterr().err)


@pytest.mark.parametrize(
    ('texts', 'message'),
    [
        (('t.txt', 'one\ntwo'), 'has 2 lines for 3 sound files'),
        (('t.json', '{"0.wav": "a"}'), 'has no text for 1.wav, and for 2 of 3 files'),
        (('t.json', '{'), 'is not JSON'),
        (('t.json', '{"0.wav": {"seed": 1}}'), 'a text for 0.wav, or an object with the text under "prompt"'),
        (('t.csv', 'name,text\n0.wav,a'), 'must have the columns file and text'),
        (('t.doc', ''), 'must end in .txt, .json or .csv'),
    ],
)
def test_texts_that_do_not_fit(folders, capsys, texts, message):
    (folders / texts[0]).write_text(texts[1])
    command = ['evaluate', '--generated', str(folders / 'generated'), '--texts', str(folders / texts[0])]
    assert main([*command, '-o', str(folders / 'out')]) == 2
    assert message in capsys.readouterr().err
    assert not (folders / 'out').exists()


def test_texts_as_lines_or_table(folders):
    from musiclm_pytorch.cli.evaluate import read_texts, sound_files

    files = sound_files(str(folders / 'generated'))
    (folders / 't.txt').write_text('a\nb\nc\n')
    (folders / 't.csv').write_text('text,file\nb,1.wav\nc,2.wav\na,0.wav\n')
    # with what else made a piece, or without
    made = {'0.wav': {'prompt': 'a', 'seed': 3, 'temperature': [1.0, 0.9, 0.4]}, '1.wav': 'b', '2.wav': {'prompt': 'c'}}
    (folders / 't.json').write_text(json.dumps(made))
    for name in ('t.txt', 't.csv', 't.json'):
        assert read_texts(str(folders / name), files) == ['a', 'b', 'c']
    # as other programs write them
    (folders / 't.csv').write_text('\ufefffile,text\r\n0.wav,"one\nline"\r\n1.wav,b\r\n2.wav,c\r\n', encoding='utf-8')
    assert read_texts(str(folders / 't.csv'), files) == ['one\nline', 'b', 'c']
    (folders / 't.txt').write_bytes('a\u2028b\r\nb\r\nc\r\n'.encode())
    assert read_texts(str(folders / 't.txt'), files) == ['a\u2028b', 'b', 'c']


def test_files_by_name_and_number(tmp_path):
    from musiclm_pytorch.cli.evaluate import paired_with, sound_files

    for name in ('clip_10.wav', 'clip_2.wav', 'clip_1.wav', 'notes.txt'):
        (tmp_path / name).touch()
    files = sound_files(str(tmp_path))
    assert [path.name for path in files] == ['clip_1.wav', 'clip_2.wav', 'clip_10.wav']
    others = [Path('b/clip_10.flac'), Path('b/clip_1.flac'), Path('b/clip_2.flac')]
    assert [path.stem for path in paired_with(files, others)] == ['clip_1', 'clip_2', 'clip_10']
    with pytest.raises(ValueError, match='clip_2 is in one alone'):
        paired_with(files, [*others[:2], Path('b/clip_3.flac')])


def test_models_that_judge(tmp_path):
    mulan = tiny_mulan()
    mulan.save_pretrained(tmp_path)
    assert torch.equal(load_mulan(tmp_path).audio_to_latents.weight, mulan.audio_to_latents.weight)
    with pytest.raises(FileNotFoundError, match='nowhere'):
        load_mulan(Path('nowhere'))
