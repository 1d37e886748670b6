"""Search among latents, against a plain ranking; the files of an index; and `musiclm index` and `musiclm search`."""

import argparse
import json
import math
import sys

import numpy as np
import pytest
import soundfile
import torch
from helpers.models import tiny_mulan
from safetensors.torch import save_file

from musiclm_pytorch.atomic import read_checked_json
from musiclm_pytorch.cli import main
from musiclm_pytorch.cli.search import index as declare_index
from musiclm_pytorch.cli.search import search as declare_search
from musiclm_pytorch.data.synthetic import SyntheticMusic
from musiclm_pytorch.evaluation.evaluator import load_mulan
from musiclm_pytorch.evaluation.tagging import ZeroShotTagger
from musiclm_pytorch.inference import search as module
from musiclm_pytorch.inference.search import Match, MuLaNIndex
from musiclm_pytorch.mulan.layers import l2norm

try:
    import faiss  # noqa: F401
except ImportError:
    BACKENDS = ['torch']
else:
    BACKENDS = ['torch', 'faiss']
RATE = 8000


def mulan(**audio):
    torch.manual_seed(0)
    return tiny_mulan(dict(audio_sample_rate=RATE, **audio), dict(num_tokens=49408)).eval()


def build(latents, backend='torch', **keywords):
    index = MuLaNIndex(dim=latents.shape[1], backend=backend, **keywords)
    index.add([f'clip {i}' for i in range(len(latents))], latents)
    return index


def plain(latents, query, k):
    """Rows and cosines in float64: the highest first, equal ones in order."""
    latents, query = latents.double().numpy(), query.double().numpy()
    cosines = latents @ query / np.linalg.norm(latents, axis=1) / np.linalg.norm(query)
    rows = np.argsort(-cosines.round(9), kind='stable')[:k]
    return rows.tolist(), cosines[rows].tolist()


# ---- searching ----


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('count', 'dim', 'k'), [(1, 3, 5), (7, 1, 2), (333, 17, 10), (333, 17, 333), (2000, 24, 120)])
def test_nearest_is_the_plain_ranking(backend, count, dim, k):
    latents, queries = torch.randn(count, dim), torch.randn(5, dim)
    scores, rows = build(latents, backend).nearest(queries, k)
    assert rows.shape == scores.shape == (5, min(k, count))
    for query, got, cosines in zip(queries, rows, scores):
        wanted, values = plain(latents, query, k)
        assert got.tolist() == wanted
        assert cosines.tolist() == pytest.approx(values, abs=1e-6)
        alone = build(latents, backend).nearest(query[None], k)
        assert torch.equal(alone[1][0], got)


@pytest.mark.parametrize('backend', BACKENDS)
def test_equal_clips_come_in_order_however_many(backend):
    latents = torch.randn(400, 6)
    latents[30:390] = latents[30]  # more than are fetched at first
    scores, rows = build(latents, backend).nearest(latents[30:31], 4)
    assert rows.tolist() == [[30, 31, 32, 33]]
    assert scores.tolist() == [[pytest.approx(1.0, abs=1e-6)] * 4]


@pytest.mark.parametrize('backend', BACKENDS)
def test_clips_that_float32_cannot_tell_apart_are_ranked_in_float64(backend):
    query = torch.nn.functional.normalize(torch.randn(1, 64), dim=1)
    latents = query + 3e-4 * torch.randn(300, 64)
    index = build(latents, backend)
    scores, rows = index.nearest(query, 20)
    query = module.unit_vectors(query, 'query')
    exact = (index.vectors.double() @ query[0].double()).float()
    assert rows[0].tolist() == exact.argsort(descending=True, stable=True)[:20].tolist()
    assert torch.equal(scores[0], exact[rows[0]])


def test_many_queries_are_answered_in_parts(monkeypatch):
    latents, queries = torch.randn(50, 8), torch.randn(9, 8)
    whole = build(latents).nearest(queries, 3)
    monkeypatch.setattr(module, 'MOST_NUMBERS', 400)
    parts = build(latents).nearest(queries, 3)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    assert build(latents).nearest(torch.empty(0, 8), 3)[1].shape == (0, 3)


def test_clips_may_be_added_in_parts_and_of_any_length():
    latents, query = torch.randn(10, 4), torch.randn(1, 4)
    index = MuLaNIndex(dim=4, backend='torch')
    index.add(['a', 'b', 'c'], latents[:3])
    index.nearest(query)
    index.add([], latents[:0])
    scales = torch.logspace(-37, 37, 7)[:, None]
    index.add(list('defghij'), latents[3:] * scales)
    assert index.names == list('abcdefghij')
    assert len(index) == 10
    assert torch.allclose(index.vectors, l2norm(latents), atol=1e-6)
    assert index.nearest(query, 4)[1].tolist() == build(latents).nearest(query, 4)[1].tolist()


@pytest.mark.parametrize(
    ('names', 'latents', 'error', 'says'),
    [
        (['b'], torch.randn(2, 4), ValueError, r'must have shape \(1, 4\), got \(2, 4\)'),
        (['b'], torch.randn(1, 5), ValueError, r'must have shape \(1, 4\), got \(1, 5\)'),
        (['b', 'a'], torch.randn(2, 4), ValueError, "'a' is in the index already"),
        (['b', 'b'], torch.randn(2, 4), ValueError, "'b' is in the index already"),
        (['b', 'c'], torch.tensor([[1.0] * 4, [math.nan] * 4]), ValueError, r'latents\[1\] holds NaN'),
        (['b', 'c'], torch.tensor([[1.0] * 4, [0.0] * 4]), ValueError, r'latents\[1\] is all zeros'),
        (['b'], torch.ones(1, 4, dtype=torch.long), TypeError, 'floating-point'),
        ('b', torch.randn(1, 4), TypeError, 'list of strings'),
    ],
)
def test_bad_clips_are_refused_and_nothing_is_added(names, latents, error, says):
    index = MuLaNIndex(dim=4)
    index.add(['a'], torch.randn(1, 4))
    with pytest.raises(error, match=says):
        index.add(names, latents)
    assert index.names == ['a']
    assert index.vectors.shape == (1, 4)


def test_bad_queries_are_refused():
    with pytest.raises(ValueError, match='the index is empty'):
        MuLaNIndex(dim=4).nearest(torch.randn(1, 4))
    index = build(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r'queries must have shape \(q, 4\)'):
        index.nearest(torch.randn(4))
    with pytest.raises(ValueError, match=r'queries\[0\] holds NaN'):
        index.nearest(torch.full((1, 4), math.inf))
    with pytest.raises(ValueError, match='k must be greater than 0'):
        index.nearest(torch.randn(1, 4), 0)
    with pytest.raises(ValueError, match='search_text needs the MuLaN'):
        index.search_text('a flute')
    with pytest.raises(ValueError, match='needs a MuLaN, or else dim'):
        MuLaNIndex()
    with pytest.raises(ValueError, match='the index is 4 wide, but the latents of this MuLaN 16'):
        MuLaNIndex(mulan(), dim=4)


def test_faiss_is_named_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, 'faiss', None)
    assert MuLaNIndex(dim=4).backend == 'torch'
    with pytest.raises(ImportError, match=r"pip install '\.\[search\]'"):
        MuLaNIndex(dim=4, backend='faiss')


def test_words_and_sounds_are_searched_by_the_model():
    model = mulan()
    waves = 0.1 * torch.randn(6, 3000)
    with torch.no_grad():
        index = MuLaNIndex(model)
        index.add([str(i) for i in range(6)], model.get_audio_latents(waves))
        text = model.get_text_latents(raw_texts=['a slow flute'])
    wanted, values = plain(index.vectors, text[0], 6)
    found = index.search_text('a slow flute', 4)
    assert [match.name for match in found] == [str(row) for row in wanted[:4]]
    assert [match.score for match in found] == pytest.approx(values[:4], abs=1e-5)
    nearest = index.search_audio(waves[3], 1)
    assert nearest == [Match('3', pytest.approx(1.0, abs=1e-5))]
    with pytest.raises(ValueError, match='the text is empty'):
        index.search_text(' ')
    with pytest.raises(ValueError, match=r'one wave \(samples,\)'):
        index.search_audio(waves)


def test_tags_are_those_of_the_tagger():
    model = mulan()
    index = MuLaNIndex(model)
    index.add(list('abc'), torch.randn(3, 16))
    words = ['organ', 'flute', 'choir', 'drums']
    scores = ZeroShotTagger(model, words).scores_of(index.vectors)
    for row, found in zip(scores, index.tags(words, k=2)):
        assert [tag.name for tag in found] == [words[i] for i in row.argsort(descending=True)[:2]]
        assert [tag.score for tag in found] == pytest.approx(row.sort(descending=True).values[:2].tolist(), abs=1e-6)
    assert [len(found) for found in index.tags(words, k=9)] == [4] * 3
    assert index.tags(words, names=['c', 'a']) == [index.tags(words)[2], index.tags(words)[0]]
    with pytest.raises(ValueError, match="no clip 'd' in the index"):
        index.tags(words, names=['d'])


# ---- files ----


def test_an_index_comes_back_from_disk(tmp_path):
    model, latents = mulan(), torch.randn(20, 16)
    index = MuLaNIndex(model, about=dict(folder='ö/♪'))
    names = [f'ö/♪ {i}\udcff.wav' for i in range(20)]  # also what is no Unicode
    index.add(names, latents)
    index.save(tmp_path / 'deep' / 'index')
    files = sorted(path.name for path in (tmp_path / 'deep' / 'index').iterdir())
    assert files[0] == 'index.json'
    assert len(files) == 2
    assert files[1].endswith('.safetensors')
    again = MuLaNIndex.load(tmp_path / 'deep' / 'index', model)
    assert again.names == names
    assert again.about == dict(folder='ö/♪')
    assert torch.equal(again.vectors, index.vectors)
    assert again.search_text('an organ') == index.search_text('an organ')
    without = MuLaNIndex.load(tmp_path / 'deep' / 'index')
    assert torch.equal(without.vectors, index.vectors)
    again.add(['new'], torch.randn(1, 16))
    assert len(again) == 21


def test_an_index_is_not_written_over_by_mistake(tmp_path):
    first, second = build(torch.randn(3, 4)), build(torch.randn(5, 4))
    first.save(tmp_path)
    with pytest.raises(FileExistsError, match='holds an index already'):
        second.save(tmp_path)
    assert len(MuLaNIndex.load(tmp_path)) == 3
    second.save(tmp_path, overwrite=True)
    assert torch.equal(MuLaNIndex.load(tmp_path).vectors, second.vectors)
    assert len(list(tmp_path.iterdir())) == 2
    second.save(tmp_path, overwrite=True)  # the very same
    assert len(MuLaNIndex.load(tmp_path)) == 5

    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'config.json').touch()
    with pytest.raises(FileExistsError, match='is the folder of a model'):
        first.save(tmp_path / 'model')
    with pytest.raises(ValueError, match='the index is empty'):
        MuLaNIndex(dim=4).save(tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('stage', ['write_tensors', 'replace'])
def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch, stage):
    first, second = build(torch.randn(3, 4)), build(torch.randn(5, 4))
    first.save(tmp_path / 'old')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'old').iterdir()}

    def fail(*_):
        raise OSError('no space left')

    if stage == 'write_tensors':
        monkeypatch.setattr(module, 'write_tensors', fail)
    else:
        replace = module.Path.replace
        monkeypatch.setattr(
            module.Path, 'replace', lambda path, to: fail() if to.name == 'index.json' else replace(path, to)
        )
    for folder in ('old', 'new'):
        with pytest.raises(OSError, match='no space left'):
            second.save(tmp_path / folder, overwrite=True)
    assert not (tmp_path / 'new').exists()
    found = {path.name: path.read_bytes() for path in (tmp_path / 'old').iterdir()}
    assert found == before
    assert torch.equal(MuLaNIndex.load(tmp_path / 'old').vectors, first.vectors)


def test_damaged_files_are_told(tmp_path):
    index = build(torch.randn(3, 4))
    index.save(tmp_path)
    path = tmp_path / 'index.json'
    content = read_checked_json(path)
    (vectors,) = tmp_path.glob('*.safetensors')

    def refuse(says, error=ValueError, **changes):
        path.write_text(json.dumps({**content, **changes}))
        with pytest.raises(error, match=says):
            MuLaNIndex.load(tmp_path)

    refuse('do not fit', names=['a', 'b'])
    refuse('do not fit', names=['a', 'b', 'a'])
    refuse('do not fit', dim=5)
    refuse('names is wrong', names='abc')
    refuse('is wrong', names=['a', 'b', 3])
    refuse('of version 2', version=2)
    refuse('does not lie beside it', vectors='../x.safetensors')
    refuse('no x.safetensors', FileNotFoundError, vectors='x.safetensors')
    for text, says in (('[1', 'index.json is damaged, it is no JSON'), ('[1]', 'is not the index.json of an index')):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            MuLaNIndex.load(tmp_path)
    save_file(dict(vectors=index.vectors), str(vectors))
    refuse('it has no checksum any more')
    del content['weights']  # as in an index from before there were checksums
    save_file(dict(vectors=torch.full((3, 4), math.nan)), str(vectors))
    refuse('holds NaN')
    save_file(dict(other=torch.ones(3, 4)), str(vectors))
    refuse('is damaged')
    vectors.write_bytes(vectors.read_bytes()[:-4])
    refuse('is damaged')
    with pytest.raises(FileNotFoundError, match='expected a folder written by MuLaNIndex.save'):
        MuLaNIndex.load(tmp_path / 'nowhere')


def test_the_latents_of_another_model_are_refused(tmp_path):
    one, other = mulan(), mulan()
    with torch.no_grad():
        other.text_to_latents.weight += 0.1
    index = MuLaNIndex(one)
    index.add(['a'], torch.randn(1, 16))
    index.save(tmp_path)
    assert len(MuLaNIndex.load(tmp_path, mulan())) == 1
    with pytest.raises(ValueError, match='made with another MuLaN'):
        MuLaNIndex.load(tmp_path, other)
    with pytest.raises(ValueError, match='the index is 16 wide, but the latents of this MuLaN 8'):
        MuLaNIndex.load(tmp_path, tiny_mulan(dict(depth=1), dict(depth=1), dim_latent=8))


# ---- the commands ----


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Eight clips of synthetic music in three formats, with their texts, and a file that is none."""
    folder = tmp_path_factory.mktemp('music')
    music = SyntheticMusic(8, seconds=2.0, sample_rate=16000, split='valid')
    texts, suffixes = {}, {4: 'flac', 6: 'aiff'}
    for i in range(8):
        wave, text = music[i]
        path = folder / ('deep' if i % 2 else '.') / f'{i}.{suffixes.get(i, "wav")}'
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, wave.numpy(), 16000)
        if i == 4:  # as written to a pipe: the header tells no length
            path.write_bytes(path.read_bytes()[:22] + bytes(4) + path.read_bytes()[26:])
        texts[path] = text
    (folder / 'broken.wav').write_bytes(b'no sound')
    (folder / 'notes.txt').write_text('no sound either')
    return folder, texts


def run(*arguments):
    parser = argparse.ArgumentParser()
    subcommands = parser.add_subparsers()
    declare_index(subcommands)
    declare_search(subcommands)
    options = parser.parse_args([str(it) for it in arguments])
    options.run(options)


def test_a_folder_is_searched_by_words_and_by_sound(folder, tmp_path, capsys, caplog):
    music, texts = folder
    out = tmp_path / 'index'
    run('index', music, '-o', out)
    assert capsys.readouterr().out == f'8 clips in {out}; 1 skipped\n'
    assert 'broken.wav cannot be read as audio' in caplog.text
    with pytest.raises(FileExistsError, match='holds an index already'):
        run('index', music, '-o', out)

    tiny = load_mulan('tiny')
    index = MuLaNIndex.load(out, tiny)
    assert sorted(index.names) == ['0.wav', '2.wav', '4.flac', '6.aiff', *(f'deep/{i}.wav' for i in (1, 3, 5, 7))]
    path, text = list(texts.items())[3]
    run('search', out, text, '-k', 3, '--tags', 2)
    lines = capsys.readouterr().out.splitlines()
    wanted = index.search_text(text, 3)
    for line, match, tags in zip(lines, wanted, index.tags(k=2, names=[match.name for match in wanted]), strict=True):
        assert line == f'{match.score:.3f}  {music / match.name}  {tags[0].name}, {tags[1].name}'
    ranks = [[match.name for match in index.search_text(it, 8)].index(p.relative_to(music).as_posix())
             for p, it in texts.items()]  # fmt: skip
    assert sum(ranks) / 8 < 2  # 3.5 by chance
    assert 'does not know' not in caplog.text
    index.search_text('a lofi flute')
    assert 'the model does not know lofi' in caplog.text
    run('search', out, '--audio', path, '-k', 2)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f'1.000  {path}'
    assert main(['search', str(out), '--audio', str(path), '-k', '2', '--json']) == 0
    (found, _) = json.loads(capsys.readouterr().out)['matches']
    assert (found['file'], round(found['score'], 3), found['tags']) == (str(path), 1.0, [])


def test_files_that_are_gone_are_not_found(tmp_path, capsys, caplog):
    music = SyntheticMusic(3, seconds=1.0, sample_rate=16000)
    folder, out = tmp_path / 'music', tmp_path / 'index'
    folder.mkdir()
    for i in range(3):
        soundfile.write(folder / f'{i}.wav', music[i][0].numpy(), 16000)
    run('index', folder, '-o', out)
    run('search', out, 'a flute')
    lines = [line for line in capsys.readouterr().out.splitlines()[1:] if '1.wav' not in line]

    (folder / '1.wav').unlink()
    run('search', out, 'a flute')
    assert capsys.readouterr().out.splitlines() == lines
    assert f'1 of the clips of the index are no more in {folder}, such as 1.wav' in caplog.text
    folder.rename(tmp_path / 'moved')
    with pytest.raises(FileNotFoundError, match='none of the 3 clips of the index are in .* makes it anew'):
        run('search', out, 'a flute')


def test_clips_are_taken_out():
    torch.manual_seed(0)
    latents, whole, part = torch.randn(4, 8), MuLaNIndex(dim=8), MuLaNIndex(dim=8)
    whole.add(list('abcd'), latents)
    part.add(['a', 'c'], latents[[0, 2]])
    with pytest.raises(ValueError, match="no clip 'x' in the index"):
        whole.remove(['a', 'x'])
    whole.remove(['b', 'd'])
    assert whole.names == part.names
    assert all(map(torch.equal, whole.nearest(latents), part.nearest(latents)))


def test_bad_searches_are_told(folder, tmp_path):
    out = tmp_path / 'index'
    index = MuLaNIndex(dim=128)
    index.add(['a'], torch.randn(1, 128))
    index.save(tmp_path / 'plain')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad' / 'a.wav').touch()
    for arguments, error, says in (
        (['index', tmp_path / 'none', '-o', out], FileNotFoundError, 'no folder at'),
        (['index', tmp_path / 'empty', '-o', out], FileNotFoundError, 'no sound files under'),
        (['index', tmp_path / 'bad', '-o', out], ValueError, 'none of the 1 sound files .* could be embedded'),
        (['index', folder[0], '-o', out, '--window', 0], ValueError, 'window must be greater than 0'),
        (['index', folder[0], '-o', out, '--model', 'tinny'], FileNotFoundError, 'there is no folder tinny'),
        (['search', tmp_path / 'empty', 'a flute'], FileNotFoundError, 'no index.json in'),
        (['search', tmp_path / 'plain', 'a flute'], ValueError, 'does not say which model'),
        (['search', tmp_path / 'plain'], ValueError, 'either a TEXT or --audio'),
        (['search', tmp_path / 'plain', 'x', '--audio', 'y'], ValueError, 'either a TEXT or --audio'),
        (['search', tmp_path / 'plain', '--audio', tmp_path / 'y'], FileNotFoundError, 'no sound file at'),
        (['search', tmp_path / 'plain', 'x', '-k', 0], ValueError, '-k must be at least 1'),
    ):
        with pytest.raises(error, match=says):
            run(*arguments)
    assert not out.exists()
