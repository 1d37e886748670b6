"""Data sets of files: what is read and how much of it, what is drawn, and what becomes of files that are no use."""

import csv
import json
import logging
import os
import pickle
import shutil

import numpy as np
import pytest
import soundfile
import torch
from helpers.processes import METHOD
from helpers.sounds import RATE, damage, noise, ramp, write
from torch.utils.data import DataLoader

from musiclm_pytorch import AudioTextDataset, ShardedAudioText, write_shards
from musiclm_pytorch.audiolm.fingerprints import fingerprint_data
from musiclm_pytorch.data.clips import Clip
from musiclm_pytorch.data.collate import collate_pairs
from musiclm_pytorch.data.sources import list_musiccaps


def opened(folder, **keywords):
    return AudioTextDataset.from_folder(folder, **{**dict(sample_rate=RATE, max_seconds=1.0), **keywords})


# ---- reading ----


def test_crop_of_a_long_file_reads_the_crop_only(tmp_path, monkeypatch):
    write(tmp_path / 'a.wav', noise(60, 16000), 16000)  # a .flac in test_shards.py, others in test_audio_files.py
    read, original = [], soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, 'read', lambda self, n, **kw: read.append(n) or original(self, n, **kw))
    dataset = opened(tmp_path, max_seconds=5.0)
    assert read == []  # opening looks at headers
    assert dataset[0]['wave'].shape == (5 * RATE,)
    assert 5 * 16000 <= sum(read) <= 5.1 * 16000


@pytest.mark.parametrize('rate', [8000, 11025, 44100])
def test_any_rate_and_channels_come_out_mono_at_the_models_rate(tmp_path, rate):
    seconds = 3
    tone = 0.4 * np.sin(2 * np.pi * 440 * np.arange(seconds * rate) / rate)
    write(tmp_path / 'a.wav', np.stack([tone, np.zeros_like(tone)], axis=1), rate)
    wave = opened(tmp_path, max_seconds=None)[0]['wave']
    assert wave.dtype == torch.float32
    assert wave.shape == (seconds * RATE,)
    expected = 0.2 * torch.sin(2 * np.pi * 440 * torch.arange(seconds * RATE) / RATE)
    torch.testing.assert_close(wave[100:-100], expected[100:-100], atol=2e-3, rtol=0)


def test_crops_move_in_training_and_stay_in_validation(tmp_path):
    write(tmp_path / 'a.wav', ramp(4), subtype='FLOAT')
    write(tmp_path / 'b.wav', ramp(0.7))
    dataset = opened(tmp_path)
    starts = []
    for epoch in range(30):
        dataset.set_epoch(epoch)
        wave = dataset[0]['wave']
        assert wave.shape == (RATE,)
        assert dataset[1]['wave'].shape == (5600,)  # shorter clips keep their length
        starts.append(float(wave[0] / 0.5 * 4))
    assert min(starts) < 0.5
    assert max(starts) > 2.5
    assert len(set(starts)) > 25
    fixed = dataset.validation()
    first = fixed[0]['wave']
    fixed.set_epoch(7)
    assert torch.equal(fixed[0]['wave'], first)
    assert float(first[0] / 0.5 * 4) == pytest.approx(1.5, abs=0.01)  # the middle
    assert dataset.training


def test_draws_depend_on_seed_epoch_and_index_alone(tmp_path):
    for index in range(4):
        write(tmp_path / f'{index}.wav', ramp(4), subtype='FLOAT', caption='one\ntwo\nthree\nfour')

    def items(seed, epoch, order=range(4)):
        dataset = opened(tmp_path, seed=seed)
        dataset.set_epoch(epoch)
        found = {index: dataset[index] for index in order}
        return [(float(found[index]['wave'][0]), found[index]['caption']) for index in range(4)]

    assert items(0, 3) == items(0, 3, order=[2, 0, 2, 3, 1])
    assert len({str(it) for it in (items(0, 3), items(0, 4), items(1, 3))}) == 3
    assert len({start for start, _ in items(0, 3)}) == 4


@pytest.mark.parametrize('context', ['fork', METHOD])
def test_set_epoch_and_faults_cross_to_living_workers(tmp_path, context):
    for index in range(3):
        write(tmp_path / f'{index}.wav', ramp(4), subtype='FLOAT')
    write(tmp_path / '3.wav', np.full((4 * RATE, 1), np.nan), subtype='FLOAT')
    dataset, alone = opened(tmp_path), opened(tmp_path)
    loader = DataLoader(
        dataset, 2, num_workers=1, persistent_workers=True, collate_fn=list, multiprocessing_context=context
    )
    for epoch in (0, 5):
        dataset.set_epoch(epoch)
        alone.set_epoch(epoch)
        found = [item for batch in loader for item in batch]
        assert [float(item['wave'][0]) for item in found[:3]] == [float(alone[i]['wave'][0]) for i in range(3)]
        assert found[3] is None
    assert dataset.skipped == {str(tmp_path / '3.wav'): 'unreadable, see the log of the worker'}


def test_captions_of_every_form(tmp_path):
    write(tmp_path / 'sub' / 'lines.wav', ramp(1), caption='first\n\n  second \nfirst\n')
    for name, content in dict(
        string='one', list=['one', 'two'], object=dict(caption='one'), both=dict(text='one', captions=['two', ''])
    ).items():
        write(tmp_path / f'{name}.wav', ramp(1), caption=None)
        (tmp_path / f'{name}.json').write_text(json.dumps(content))
    dataset = opened(tmp_path)
    found = {dataset.clips[i].path.stem: dataset.captions(i) for i in range(len(dataset))}
    assert found == dict(
        both=('one', 'two'), list=('one', 'two'), object=('one',), string=('one',), lines=('first', 'second')
    )
    lines = [clip.path.stem for clip in dataset.clips].index('lines')
    drawn = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        drawn.add(dataset[lines]['caption'])
    assert drawn == {'first', 'second'}
    assert dataset.validation()[lines]['caption'] == 'first'


def test_folder_that_is_reached_twice_counts_once(tmp_path):
    write(tmp_path / 'loop' / 'x.wav', ramp(1))
    write(tmp_path / 'other' / 'Y.WAV', ramp(1), caption=None)
    (tmp_path / 'other' / 'Y.TXT').write_text('\ufeffy', encoding='utf-8')
    (tmp_path / 'loop' / 'a').mkdir()
    (tmp_path / 'loop' / 'a' / 'up').symlink_to('..')
    (tmp_path / 'loop' / 'a' / 'self').symlink_to('self')
    (tmp_path / 'loop' / 'b').symlink_to(tmp_path / 'other')
    for hidden in ('.DS_Store', '._x.wav', '__MACOSX/x.wav', '.trash/x.wav'):
        write(tmp_path / 'loop' / hidden.replace('.wav', '') / 'z.wav', ramp(1))
        (tmp_path / 'loop' / f'._{hidden.replace("/", "")}.wav').touch()
    dataset = opened(tmp_path)
    assert [clip.path.name for clip in dataset.clips] == ['x.wav', 'Y.WAV']
    assert [dataset.captions(it) for it in range(2)] == [('a sound',), ('y',)]
    assert dataset.skipped == {}


# ---- MusicCaps ----


def test_musiccaps(tmp_path):
    folder = tmp_path / 'audio'
    ids = ['-0Gj8-vB1q4', '_aB-d_fG1h2', 'abcdefghijk', 'ABCDEFGHIJK', 'YYbcdefghij', 'lmnopqrstuv', 'missing0000']
    write(folder / f'[{ids[0]}]-[30-40].wav', ramp(10), caption=None)
    write(folder / f'{ids[1]}_30_40.flac', ramp(10), caption=None)
    write(folder / f'{ids[2]}.wav', ramp(10), caption=None)  # cut already
    write(folder / 'sub' / f'{ids[3]}.wav', ramp(60), caption=None)  # the whole track
    write(folder / f'Y{ids[4]}_30000_40000.wav', ramp(10), caption=None)
    write(folder / f'Some title [{ids[5]}].wav', ramp(60), caption=None)
    path = tmp_path / 'musiccaps-public.csv'
    with open(path, 'w', newline='') as file:
        table = csv.writer(file)
        table.writerow(['ytid', 'start_s', 'end_s', 'audioset_positive_labels', 'aspect_list', 'caption', 'author_id'])
        table.writerows([ytid, 30, 40, '/m/1', "['slow', 'rock \\'n\\' roll']", f'song {ytid}', 1] for ytid in ids)
    dataset = AudioTextDataset.from_musiccaps(path, folder, sample_rate=RATE, max_seconds=None)
    assert [dataset.captions(i)[0] for i in range(len(dataset))] == [f'song {ytid}' for ytid in ids[:6]]
    assert dataset.captions(0)[1] == "slow, rock 'n' roll"
    assert dataset.skipped == {'missing0000 [30-40]': f'no file named by it under {folder}'}
    for index in range(6):
        wave = dataset[index]['wave']
        assert len(wave) == 10 * RATE
        assert float(wave[0]) == pytest.approx(0.25 if index in (3, 5) else 0, abs=2e-3), ids[index]
    # cut at key frames: a file that ends before the clip does is no whole track
    rows = [('abcdefghij0', 30, 40, 12.5), ('abcdefghij1', 5, 15, 11.5), ('abcdefghij2', 5, 15, 14.95)]
    for ytid, _, _, length in rows:
        write(tmp_path / 'cut' / f'{ytid}.wav', ramp(length), caption=None)
    text = ''.join(f'{ytid},{start},{end},x\n' for ytid, start, end, _ in rows)
    (tmp_path / 'cut.csv').write_text(f'\ufeffytid,start_s,end_s,caption\n{text}')
    listing = list_musiccaps(tmp_path / 'cut.csv', tmp_path / 'cut')
    assert [(clip.start, clip.end) for clip in listing.clips] == [(0, None), (0, None), (5, 15)]

    plain = AudioTextDataset.from_musiccaps(path, folder, aspects=False, sample_rate=RATE)
    assert plain.captions(0) == (f'song {ids[0]}',)
    assert len(AudioTextDataset.from_path(path, folder, sample_rate=RATE)) == 6

    path.write_text('ytid,caption\nabcdefghijk,x\n')
    with pytest.raises(ValueError, match='line 2: no start_s and no end_s, which MusicCaps has'):
        AudioTextDataset.from_musiccaps(path, folder, sample_rate=RATE)
    path.write_text('ytid,start_s,end_s,caption,aspect_list\nabcdefghijk,1,2,x,os.getcwd()\n')
    with pytest.raises(ValueError, match='aspect_list must be a list of strings'):
        AudioTextDataset.from_musiccaps(path, folder, sample_rate=RATE)


# ---- faults ----


def test_unusable_files_are_skipped_counted_and_named(tmp_path, caplog):
    write(tmp_path / 'good.wav', ramp(2))
    write(tmp_path / 'short.wav', ramp(0.1))
    write(tmp_path / 'zero.wav', ramp(0))
    write(tmp_path / 'silent.wav', ramp(1), caption=None)
    write(tmp_path / 'blank.wav', ramp(1), caption=' \n')
    write(tmp_path / 'latin.wav', ramp(1), caption=None)
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9')
    write(tmp_path / 'json.wav', ramp(1), caption=None)
    (tmp_path / 'json.json').write_text('{')
    for name in ('empty.mp3', 'text.flac', 'apple.m4a'):
        (tmp_path / name).write_bytes(b'' if name == 'empty.mp3' else b'not audio at all')
        (tmp_path / name).with_suffix('.txt').write_text('x')
    with caplog.at_level(logging.WARNING):
        dataset = opened(tmp_path)
    reasons = {name.removeprefix(f'{tmp_path}/'): reason for name, reason in dataset.skipped.items()}
    expected = {
        'short.wav': 'too short: 0.1 s, but min_seconds is 0.5',
        'zero.wav': 'is empty',
        'silent.wav': 'no caption: neither',
        'blank.wav': 'is empty',
        'latin.wav': 'is not UTF-8',
        'json.wav': 'is not JSON',
        'empty.mp3': 'cannot be read as audio',
        'text.flac': 'cannot be read as audio',
        'apple.m4a': 'cannot be read as audio',
    }
    assert len(dataset) == 1
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name]
        assert any(str(tmp_path / name) in record.getMessage() for record in caplog.records)
    assert '1 clips, 9 skipped' in caplog.text
    # without looking at headers, what they tell is found when it is read
    later = opened(tmp_path, check_headers=False)
    assert len(later) == 6
    assert sum(later[index] is None for index in range(6)) == 5
    assert later.skipped.keys() == dataset.skipped.keys()


def test_damage_inside_is_found_when_read(tmp_path, caplog):
    write(tmp_path / 'a.flac', noise(3))
    write(tmp_path / 'b.wav', np.full((3 * RATE, 1), np.nan), subtype='FLOAT')
    write(tmp_path / 'c.wav', ramp(3))
    write(tmp_path / 'd.wav', ramp(3))
    damage(tmp_path / 'a.flac')
    dataset = opened(tmp_path, max_seconds=None)
    assert len(dataset) == 4
    assert dataset.skipped == {}
    (tmp_path / 'd.wav').unlink()
    for _ in range(2):  # named once, tried each time
        assert [dataset[index] is None for index in range(4)] == [True, True, False, True]
    assert [len(dataset), sorted(dataset.skipped)] == [4, [str(tmp_path / it) for it in ('a.flac', 'b.wav', 'd.wav')]]
    for reason, says in zip(dataset.skipped.values(), ['damaged between samples', 'NaN', 'no audio file at']):
        assert says in reason
    assert sum('skipped' in record.getMessage() for record in caplog.records) == 3
    batch = collate_pairs([dataset[index] for index in range(4)])
    assert batch['wavs'].shape == (1, 3 * RATE)
    write(tmp_path / 'd.wav', ramp(3))
    assert dataset[3] is not None


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder at'):
        opened(tmp_path / 'none')
    with pytest.raises(FileNotFoundError, match='no manifest at'):
        AudioTextDataset.from_manifest(tmp_path / 'none.csv', sample_rate=RATE)
    with pytest.raises(FileNotFoundError, match='no CSV of MusicCaps at'):
        AudioTextDataset.from_musiccaps(tmp_path / 'none.csv', tmp_path, sample_rate=RATE)
    with pytest.raises(ValueError, match=r'no audio files under .*; looked for .*\.flac'):
        opened(tmp_path)
    write(tmp_path / 'a.wav', ramp(1), caption=None)
    with pytest.raises(ValueError, match=r'gives no usable clip; 1 skipped, the first, .*a\.wav: no caption: neither'):
        opened(tmp_path)
    (tmp_path / 'captions.csv').write_text('audio,caption\na.wav,a flute\n')
    with pytest.raises(ValueError, match=r'there is .*captions\.csv: if it tells the captions, pass it as the data'):
        opened(tmp_path)


@pytest.mark.parametrize(
    ('keywords', 'error', 'says'),
    [
        (dict(sample_rate=0), ValueError, 'sample_rate must be greater than 0, got 0'),
        (dict(sample_rate='8k'), TypeError, 'sample_rate'),
        (dict(max_seconds=-1.0), ValueError, 'max_seconds must be greater than 0'),
        (dict(max_seconds=0.2), ValueError, 'max_seconds 0.2 must not be less than min_seconds 0.5'),
    ],
)
def test_bad_arguments(tmp_path, keywords, error, says):
    write(tmp_path / 'a.wav', ramp(1))
    with pytest.raises(error, match=says):
        opened(tmp_path, **keywords)


def test_indices(tmp_path):
    write(tmp_path / 'a.wav', ramp(1))
    dataset = opened(tmp_path)
    assert torch.equal(dataset[-1]['wave'], dataset[0]['wave'])
    with pytest.raises(IndexError, match='index 1 lies outside of the 1 clips'):
        dataset[1]
    with pytest.raises(ValueError, match='epoch must not be negative, got -1'):
        dataset.set_epoch(-1)
    assert len(pickle.loads(pickle.dumps(dataset))) == 1


# ---- splitting ----


def test_split_shares_no_recording(tmp_path):
    clips = []
    for index in range(10):
        path = write(tmp_path / f'{index}.wav', ramp(4), caption=None)
        clips += [Clip(path, (f'{index}',), start, start + 1.0, f'recording {index}') for start in range(3)]
    dataset = AudioTextDataset(clips, sample_rate=RATE)
    train, valid = dataset.split(0.2, seed=1)
    assert [len(train), len(valid)] == [24, 6]
    assert not {clip.path for clip in train.clips} & {clip.path for clip in valid.clips}
    assert [train.training, valid.training] == [True, False]
    again = AudioTextDataset(clips[::-1], sample_rate=RATE).split(0.2, seed=1)[1]
    assert set(again.clips) == set(valid.clips)
    assert {frozenset(dataset.split(0.2, seed=seed)[1].clips) for seed in range(5)} != {frozenset(valid.clips)}
    assert [len(it) for it in dataset.split(0.01)] == [27, 3]
    assert [len(it) for it in dataset.split(0.99)] == [3, 27]


@pytest.mark.parametrize('name', ['a.wave', 'B.MKV', 'c.mov', 'd.ac3'])
def test_sound_is_known_by_the_suffixes_that_people_give_it(tmp_path, name):
    write(tmp_path / name, ramp(1), format='WAV')
    (tmp_path / 'notes.md').write_text('no sound')
    assert [clip.path.name for clip in opened(tmp_path).clips] == [name]


@pytest.mark.parametrize('suffix', ['wav', 'ogg'])
def test_names_that_are_not_utf8(tmp_path, suffix):
    """As archives packed on another system leave them; a folder of them is split, packed and told apart as any."""
    name = os.fsdecode('Café'.encode('latin-1'))
    write(tmp_path / 'music' / f'a.{suffix}', ramp(1))
    shutil.copy(tmp_path / 'music' / f'a.{suffix}', tmp_path / 'music' / f'{name}.{suffix}')
    (tmp_path / 'music' / f'{name}.txt').write_text('a café')
    dataset = opened(tmp_path / 'music', max_seconds=None)
    assert sorted(item['caption'] for item in dataset) == ['a café', 'a sound']
    assert [len(side) for side in dataset.split(0.5)] == [1, 1]
    assert fingerprint_data(dataset.validation()) != fingerprint_data(dataset.split(0.5)[1])
    index = write_shards(dataset, tmp_path / 'shards')
    assert (index['shards'][0]['samples'], index['skipped']) == (2, {})
    shards = ShardedAudioText(tmp_path / 'shards', sample_rate=RATE)
    assert sorted(item['caption'] for item in shards) == ['a café', 'a sound']


def test_one_recording_under_several_names(tmp_path):
    write(tmp_path / 'a.wav', ramp(1))
    write(tmp_path / 'a.flac', ramp(1))
    (tmp_path / 'm.csv').write_text('path,caption\na.wav,x\n./a.wav,y\nsub/../a.flac,z\n')
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub' / 'link.wav').symlink_to(tmp_path / 'a.wav')
    (tmp_path / 'sub' / 'link.txt').write_text('x')
    (tmp_path / 'sub' / 'hard.wav').hardlink_to(tmp_path / 'a.wav')
    (tmp_path / 'sub' / 'hard.txt').write_text('x')
    listed = [AudioTextDataset.from_manifest(tmp_path / 'm.csv', sample_rate=RATE), opened(tmp_path)]
    for dataset, count in zip(listed, (3, 4)):
        assert len(dataset) == count
        with pytest.raises(ValueError, match='has one recording only, a; splitting needs at least two'):
            dataset.split()
    with pytest.raises(ValueError, match='valid_fraction must lie between 0 and 1, got 0'):
        dataset.split(0.0)
