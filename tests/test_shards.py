"""Shards: what is written is what was there, each sample is read once by someone, and runs go on where they were."""

import io
import json
import logging
import pickle
import shutil
import sys
import tarfile
from itertools import chain, groupby

import numpy as np
import pytest
import soundfile
import torch
import webdataset
from helpers.sounds import damage, noise, ramp, write
from torch.utils.data import DataLoader, IterableDataset

from musiclm_pytorch import AudioTextDataset, ShardedAudioText, collate_pairs, write_shards
from musiclm_pytorch.data.clips import Clip
from musiclm_pytorch.data.opening import open_pairs

RATE = 8000


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    """Eleven captioned parts of one file, told apart by caption and by content."""
    path = write(tmp_path_factory.mktemp('audio') / 'a.wav', ramp(11), caption=None)
    return [Clip(path, (f'clip {index}',), float(index), index + 1.0, f'r{index}') for index in range(11)]


@pytest.fixture(scope='module')
def folders(clips, tmp_path_factory):
    """The same clips in shards of several sizes: 11, 4 and 1 shards."""
    root = tmp_path_factory.mktemp('shards')
    for size in (1, 3, 100):
        write_shards(clips, root / str(size), shard_size=size)
    return root


def opened(folder, **keywords):
    return ShardedAudioText(folder, **{**dict(sample_rate=RATE, max_seconds=0.6), **keywords})


def captions(items):
    return [None if item is None else item['caption'] for item in items]


EVERYTHING = sorted(f'clip {index}' for index in range(11))


# ---- writing ----


def test_whole_files_are_stored_byte_by_byte_and_parts_lossless(tmp_path):
    whole = [write(tmp_path / f'audio/whole.{suffix}', noise(1, 44100, 2), 44100) for suffix in ('wav', 'ogg', 'mp3')]
    source = write(tmp_path / 'audio/part.wav', noise(3, 44100, 2) * 9, 44100, subtype='PCM_16')
    wide = write(tmp_path / 'audio/wide.wav', noise(3), subtype='PCM_24')
    loud = write(tmp_path / 'audio/loud.wav', noise(3) * 30, subtype='FLOAT')
    clips = [Clip(path, ('a', 'ü')) for path in whole]
    clips += [Clip(path, ('b',), 0.5, 1.75) for path in (source, wide, loud)]
    index = write_shards(clips, tmp_path / 'shards')
    assert [shard['samples'] for shard in index['shards']] == [6]
    with tarfile.open(tmp_path / 'shards' / 'shard-000000.tar') as tar:
        files = {name.removeprefix('shard-000000-'): tar.extractfile(name).read() for name in tar.getnames()}
    for place, path in enumerate(whole):
        assert files[f'{place:06d}{path.suffix}'] == path.read_bytes()
        assert json.loads(files[f'{place:06d}.json'])['captions'] == ['a', 'ü']
    for name, path, dtype in [
        ('000003.flac', source, 'int16'),
        ('000004.flac', wide, 'int32'),
        ('000005.wav', loud, 'float32'),
    ]:
        (tmp_path / name).write_bytes(files[name])
        found, rate = soundfile.read(tmp_path / name, dtype=dtype, always_2d=True)
        original, original_rate = soundfile.read(path, dtype=dtype, always_2d=True)
        assert rate == original_rate
        assert np.array_equal(found, original[round(0.5 * rate) : round(1.75 * rate)])


@pytest.mark.parametrize(
    ('name', 'rate'), [('track01', RATE), ('01. A song', RATE), ('a.wave', RATE), ('a.bin', 70004)]
)
def test_names_without_a_suffix_of_sound_and_rates_that_flac_has_not(tmp_path, name, rate):
    path = write(tmp_path / name, noise(1, rate), rate, caption=None, format='WAV', subtype='PCM_16')
    write_shards([Clip(path, ('whole',)), Clip(path, ('part',), 0.25, 0.75)], tmp_path / 'shards')
    shards = opened(tmp_path / 'shards', max_seconds=None, training=False)
    files = AudioTextDataset([Clip(path, ('x',)), Clip(path, ('x',), 0.25, 0.75)], sample_rate=RATE, max_seconds=None)
    for found, wanted in zip(list(shards), files, strict=True):
        torch.testing.assert_close(found['wave'][100:-100], wanted['wave'][100:-100], atol=1e-4, rtol=0)


def test_reading_shards_is_reading_the_files(tmp_path):
    for index in range(5):
        write(tmp_path / f'audio/{index}.flac', noise(2, 16000, 2, seed=index), 16000, caption=f'{index}\nor {index}')
    dataset = AudioTextDataset.from_folder(tmp_path / 'audio', sample_rate=RATE, max_seconds=1.0, seed=5)
    write_shards(dataset, tmp_path / 'shards', shard_size=2)
    shards = opened(tmp_path / 'shards', max_seconds=1.0, seed=5)
    for training in (True, False):
        shards.training = training
        reference = dataset if training else dataset.validation()
        for epoch in range(3):
            shards.set_epoch(epoch)
            reference.set_epoch(epoch)
            found = {item['caption'][-1]: item for item in shards}
            assert len(found) == 5
            for index in range(5):
                item = reference[index]
                assert found[str(index)]['caption'] == item['caption']
                assert torch.equal(found[str(index)]['wave'], item['wave'])


def test_interrupted_writing_goes_on_without_repeats_or_gaps(tmp_path, clips):
    class Interrupted(Exception):
        pass

    def stop(number, count):
        assert count == 4
        if number == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        write_shards(clips, tmp_path / 'a', shard_size=3, on_shard=stop)
    with pytest.raises(ValueError, match='is not complete: writing was interrupted; run the same write again'):
        opened(tmp_path / 'a')
    # killed while it wrote a shard, and after it renamed one but before it noted it
    (tmp_path / 'a' / '.shard-000002.tar.partial').write_bytes(b'half')
    (tmp_path / 'a' / 'shard-000002.tar').write_bytes(b'unnoted')
    kept = (tmp_path / 'a' / 'shard-000001.tar').stat().st_mtime_ns
    index = write_shards(clips, tmp_path / 'a', shard_size=3)
    assert [shard['samples'] for shard in index['shards']] == [3, 3, 3, 2]
    assert (tmp_path / 'a' / 'shard-000001.tar').stat().st_mtime_ns == kept
    write_shards(clips, tmp_path / 'b', shard_size=3)
    for path in sorted((tmp_path / 'b').iterdir()):
        assert (tmp_path / 'a' / path.name).read_bytes() == path.read_bytes()
    assert sorted(it.name for it in (tmp_path / 'a').iterdir()) == sorted(it.name for it in (tmp_path / 'b').iterdir())

    (tmp_path / 'a' / 'shard-000001.tar').unlink()
    assert write_shards(clips, tmp_path / 'a', shard_size=3) == index
    for path in sorted((tmp_path / 'b').iterdir()):
        assert (tmp_path / 'a' / path.name).read_bytes() == path.read_bytes()

    class Breaks(list):
        def __getitem__(self, index):
            if index == 3:
                raise OSError('no space left on device')
            return torch.zeros(RATE), 'x'

    with pytest.raises(OSError, match='no space left'):
        write_shards(Breaks([0] * 5), tmp_path / 'c', shard_size=2, sample_rate=RATE)
    assert sorted(it.name for it in (tmp_path / 'c').iterdir()) == ['index.json', 'shard-000000.tar']


def test_folder_of_something_else_is_refused(tmp_path, clips):
    write_shards(clips, tmp_path / 'a', shard_size=3)
    before = {it.name: it.read_bytes() for it in (tmp_path / 'a').iterdir()}
    for other, size in ((clips[:-1], 3), (clips, 4)):
        with pytest.raises(ValueError, match='holds shards of other clips, or of another shard_size'):
            write_shards(other, tmp_path / 'a', shard_size=size)
    assert {it.name: it.read_bytes() for it in (tmp_path / 'a').iterdir()} == before
    (tmp_path / 'a' / 'index.json').unlink()
    with pytest.raises(ValueError, match='holds shard-000000.tar, which was not written here'):
        write_shards(clips, tmp_path / 'a', shard_size=3)
    (tmp_path / 'a' / 'index.json').write_text('{}')
    with pytest.raises(ValueError, match='index.json is damaged or was not written by write_shards'):
        opened(tmp_path / 'a')


def test_clips_that_do_not_decode_are_skipped_and_noted(tmp_path, clips, caplog):
    broken = write(tmp_path / 'broken.flac', noise(2), caption=None)
    damage(broken)
    nan = write(tmp_path / 'nan.wav', np.full((RATE, 1), np.nan), caption=None, subtype='FLOAT')
    missing = tmp_path / 'missing.wav'
    bad = [Clip(path, ('x',)) for path in (broken, nan, missing)] + [Clip(clips[0].path, ('x',), 20.0, 21.0)]
    index = write_shards([clips[0], *bad, clips[1]], tmp_path / 'a', shard_size=3)
    assert [shard['samples'] for shard in index['shards']] == [1, 1]
    assert list(index['skipped']) == [clip.name for clip in bad]
    for clip, reason in zip(bad, ['damaged between samples', 'NaN', 'no audio file', 'holds no samples']):
        assert reason in index['skipped'][clip.name]
        assert clip.name in caplog.text
    assert sorted(captions(opened(tmp_path / 'a'))) == ['clip 0', 'clip 1']
    with pytest.raises(ValueError, match='no clip can be read; 4 skipped, the first, .*broken.flac'):
        write_shards(bad, tmp_path / 'b', shard_size=3)


def test_other_data_sets(tmp_path):
    pairs = [(torch.full((RATE,), 0.1 * it), f'{it}') for it in range(3)] + [None]
    index = write_shards(pairs, tmp_path / 'a', sample_rate=RATE)
    assert index['skipped'] == {'item 3': 'the data set gives None for it'}
    items = list(opened(tmp_path / 'a', training=False))
    assert captions(items) == ['0', '1', '2']
    assert [float(item['wave'].mean()) for item in items] == pytest.approx([0, 0.1, 0.2], abs=1e-6)
    with pytest.raises(ValueError, match='a list does not tell its sample rate; pass sample_rate'):
        write_shards(pairs, tmp_path / 'b')
    with pytest.raises(TypeError, match='item 0 must be a wave and a string; token ids need the tokenizer'):
        write_shards([(torch.zeros(9), torch.tensor([1]))], tmp_path / 'c', sample_rate=RATE)
    with pytest.raises(TypeError, match='Endless has no length; shards are written of data sets of fixed size'):
        write_shards(Endless(), tmp_path / 'd', sample_rate=RATE)
    with pytest.raises(ValueError, match='shard_size must be greater than 0, got 0'):
        write_shards(pairs, tmp_path / 'e', shard_size=0, sample_rate=RATE)


def test_a_folder_of_folders_of_shards_is_all_of_them(folders, tmp_path):
    everything = opened(folders, training=False)
    assert captions(everything) == [f'clip {index}' for index in range(11)] * 3
    assert type(open_pairs(folders, sample_rate=RATE)) is ShardedAudioText
    assert sorted(captions(opened(folders))) == sorted(EVERYTHING * 3)
    # tars in folders that write_shards did not fill are not taken for the music of a folder of files
    write(tmp_path / 'music' / 'a.wav', ramp(2), caption='of a file')
    shutil.copytree(folders / '3', tmp_path / 'music' / 'backup')
    (tmp_path / 'music' / 'backup' / 'index.json').unlink()
    assert captions(open_pairs(tmp_path / 'music', sample_rate=RATE)) == ['of a file']


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


# ---- reading: every sample once ----


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize(
    ('size', 'world', 'workers'),
    [*((size, world, 0) for size in ('1', '3', '100') for world in (1, 2, 20)), ('3', 1, 3), ('3', 3, 2)],
)
def test_no_repeats_or_gaps_over_ranks_and_workers(folders, size, world, workers):
    parts = []
    for rank in range(world):
        dataset = opened(folders / size, rank=rank, world_size=world, batch_size=2)
        loader = DataLoader(dataset, 2, num_workers=workers, collate_fn=captions)
        parts.append([caption for batch in loader for caption in batch])
        assert len(parts[-1]) == len(dataset)
        assert len(loader) == -(-len(dataset) // 2)
    assert sorted(chain(*parts)) == EVERYTHING
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_order_depends_on_seed_and_epoch(folders):
    def order(seed, epoch, **keywords):
        dataset = opened(folders / '3', seed=seed, **keywords)
        dataset.set_epoch(epoch)
        return captions(dataset)

    assert order(0, 1) == order(0, 1)
    assert len({str(order(*it)) for it in [(0, 1), (0, 2), (1, 1), (2, 1)]}) == 4
    assert order(0, 1, training=False) == [f'clip {index}' for index in range(11)]
    # one shard at a time: shards in one order, samples within each in another
    alone = [int(caption.split()[1]) for caption in order(0, 1, mixed_shards=1)]
    visited = [shard for shard, _ in groupby(it // 3 for it in alone)]
    assert sorted(visited) == [0, 1, 2, 3]
    assert visited != [0, 1, 2, 3]
    assert captions(opened(folders / '100')) != [f'clip {index}' for index in range(11)]
    # two shards at a time: their samples are mixed with one another, and with no others
    mixed = [int(caption.split()[1]) // 3 for caption in order(0, 1, mixed_shards=2)]
    halves = [mixed[:cut] for cut in (5, 6) if not set(mixed[:cut]) & set(mixed[cut:])]
    assert halves
    assert any(a != b for a, b in zip(mixed, sorted(mixed)))


@pytest.mark.parametrize(('workers', 'stops'), [(0, (0, 1, 2, 3)), (2, (1,))])
def test_resuming_gives_exactly_the_rest(folders, workers, stops):
    def epoch(dataset):
        batches = DataLoader(dataset, 2, num_workers=workers, collate_fn=list)
        return [(item['caption'], item['wave'].tolist()) for batch in batches for item in batch]

    dataset = opened(folders / '3', batch_size=2, rank=1, world_size=2)
    dataset.set_epoch(4)
    whole = epoch(dataset)
    for batches in stops:
        state = json.loads(json.dumps(dataset.state_dict(batches * 2)))
        resumed = opened(folders / '3', batch_size=2, rank=1, world_size=2)
        resumed.load_state_dict(state)
        assert len(resumed) == len(whole[batches * 2 :])
        assert epoch(resumed) == whole[batches * 2 :]
    resumed.set_epoch(5)
    assert len(epoch(resumed)) == 6


def test_state_of_something_else_is_refused(folders):
    state = opened(folders / '3').state_dict(4)
    for other, says in [
        (opened(folders / '1'), 'fingerprint'),
        (opened(folders / '3', seed=1), 'seed 0, but here it is 1'),
        (opened(folders / '3', rank=0, world_size=2), 'world_size 1, but here it is 2'),
        (opened(folders / '3', training=False), 'training True, but here it is False'),
    ]:
        with pytest.raises(ValueError, match=says):
            other.load_state_dict(state)
    for epoch, position in ((-1, 0), (0, 12), (0, -1)):
        with pytest.raises(ValueError, match=f'got epoch {epoch} and position {position}'):
            opened(folders / '3').set_epoch(epoch, position)


def test_only_the_crop_is_read(tmp_path, monkeypatch):
    write(tmp_path / 'audio/a.flac', noise(60))
    write_shards(AudioTextDataset.from_folder(tmp_path / 'audio', sample_rate=RATE), tmp_path / 'shards')
    read, original = [], soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, 'read', lambda self, n, **kw: read.append(n) or original(self, n, **kw))
    assert len(list(opened(tmp_path / 'shards', max_seconds=2.0))) == 1
    assert sum(read) == 2 * RATE


# ---- faults ----


def test_damaged_members_are_skipped_and_named(tmp_path, clips, caplog):
    write_shards(clips, tmp_path, shard_size=100)
    path = tmp_path / 'shard-000000.tar'
    with tarfile.open(path) as tar:
        members = {member.name.removeprefix('shard-000000-'): member for member in tar}
    content = bytearray(path.read_bytes())
    flac, note, header = members['000002.flac'], members['000004.json'], members['000006.flac']
    content[flac.offset_data : flac.offset_data + flac.size] = bytes(flac.size)
    content[note.offset_data] = ord('x')
    content[header.offset : header.offset + 512] = b'\xff' * 512
    del content[members['000009.flac'].offset_data + 100 :]
    path.write_bytes(content)
    dataset = opened(tmp_path, training=False)
    items = list(dataset)
    assert len(items) == 11
    assert [index for index, item in enumerate(items) if item is None] == [2, 4, 6, 9, 10]
    assert captions(items)[5] == 'clip 5'
    reasons = {name.split('-')[-1]: reason for name, reason in dataset.skipped.items()}
    assert 'is damaged: it is not what was written' in reasons['000002']
    assert 'is not JSON' in reasons['000004']
    assert 'needs one audio file and a .json or .txt, but has .json' in reasons['000006']
    assert 'ends within shard-000000-000009.flac' in reasons['000009']
    assert 'not in the shard' in reasons['000010']
    assert caplog.text.count('skipped') == 5
    assert collate_pairs(items)['wavs'].shape[0] == 6


def test_missing_and_empty_shards(tmp_path, clips):
    write_shards(clips, tmp_path / 'a', shard_size=4)
    (tmp_path / 'a' / 'shard-000001.tar').unlink()
    with pytest.raises(FileNotFoundError, match='no shard at .*shard-000001.tar, though .*index.json names it'):
        opened(tmp_path / 'a')
    with pytest.raises(FileNotFoundError, match='no shard at .*none.tar'):
        opened([tmp_path / 'none.tar'])
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='holds no samples; a sample is an audio file and'):
        opened(tmp_path / 'empty')


@pytest.mark.parametrize(
    ('keywords', 'says'),
    [
        (dict(rank=0), 'rank and world_size go together'),
        (dict(rank=2, world_size=2), r'rank must lie in \[0, world_size\), got 2 of 2'),
        (dict(batch_size=0), 'batch_size must be greater than 0'),
        (dict(mixed_shards=0), 'mixed_shards must be greater than 0'),
    ],
)
def test_bad_arguments(folders, keywords, says):
    with pytest.raises(ValueError, match=says):
        opened(folders / '3', **keywords)


@pytest.mark.parametrize('use', [write_shards, opened])
def test_missing_webdataset_names_the_extra(tmp_path, monkeypatch, use):
    monkeypatch.setitem(sys.modules, 'webdataset', None)
    with pytest.raises(ImportError, match=r"pip install '\.\[shards\]'"):
        use([], tmp_path) if use is write_shards else use(tmp_path)


# ---- the format ----


def test_webdataset_reads_ours_and_we_read_its(tmp_path, folders, caplog):
    urls = [str(path) for path in sorted((folders / '3').glob('*.tar'))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [json.loads(sample['json'])['captions'] for sample in theirs] == [[f'clip {it}'] for it in range(11)]

    write(tmp_path / 'a.flac', ramp(1), caption=None)
    audio = (tmp_path / 'a.flac').read_bytes()
    with webdataset.ShardWriter(str(tmp_path / 'x-%06d.tar'), maxcount=2, verbose=0) as writer:
        for index in range(5):
            text = {'txt': f'clip {index}\n'} if index % 2 else {'json': {'text': f'clip {index}'}}
            writer.write({'__key__': f'sub/{index}', 'flac': audio, **text})
        writer.write({'__key__': 'mute', 'flac': audio})
    for shards in (tmp_path, str(tmp_path / 'x-{000000..000002}.tar'), sorted(tmp_path.glob('*.tar'))):
        dataset = opened(shards, training=False)
        assert captions(dataset) == [f'clip {index}' for index in range(5)]
        assert [name.split(': ')[1] for name in dataset.skipped] == ['mute']
    with caplog.at_level(logging.WARNING):
        assert len(pickle.loads(pickle.dumps(dataset))) == 5


def test_shards_of_other_tools(tmp_path):
    audio = write(tmp_path / 'a.flac', ramp(1), caption=None).read_bytes()
    files = {
        './v1.0/000.flac': audio,
        './v1.0/000.txt': b'\xef\xbb\xbfdots in a folder',
        'v1.0/._000.flac': b'of macOS',
        '__MACOSX/v1.0/000.flac': b'of macOS',
        './001.FLAC': audio,
        '001.JSON': b'\xef\xbb\xbf{"Description": "one", "tempo": 3}',
        '01. Song.flac': audio,
        '01. Song.txt': b'titles with a number',
        '01. Other.v2.flac': audio,
        '01. Other.v2.txt': b'and a version',
        '002.flac': audio,
        '002.txt': b'one',
        '002.drums.flac': b'a part',
        '002.v2.flac': audio,
        '002.v2.txt': b'another',
        '003.flac': audio,
        '003.cls': b'7',
        '004.flac': audio,
        '004.json': b'{"genre": "rock"}',
        '005.flac': audio,
        '005.txt': 'x'.encode('utf-16'),
    }
    with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    dataset = opened(tmp_path / 'x.tar', training=False)
    read = ['dots in a folder', 'one', 'titles with a number', 'and a version', 'one', 'another']
    assert captions(dataset) == [*read, None, None]
    reasons = {name.split(': ')[1]: reason for name, reason in dataset.skipped.items()}
    assert sorted(reasons) == ['003', '004', '005']
    assert 'needs one audio file and a .json or .txt, but has .flac, .cls' in reasons['003']
    assert '004.json is empty, or has none under caption, text or captions' in reasons['004']
    assert '005.txt is not UTF-8 but UTF-16' in reasons['005']
