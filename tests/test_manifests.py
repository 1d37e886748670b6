"""Manifests as people have them: what is read out of a table, and what is refused with a remedy."""

import csv
import json
import os

import pytest
from helpers.sounds import ramp, write

from musiclm_pytorch import AudioTextDataset
from musiclm_pytorch.data.clips import Clip, ClipTable
from musiclm_pytorch.data.manifests import list_manifest
from musiclm_pytorch.data.sources import list_clips, list_folder

RATE = 8000


@pytest.mark.parametrize('form', ['csv', 'tsv', 'jsonl'])
def test_manifest(tmp_path, form):
    write(tmp_path / 'audio' / 'a, b.wav', ramp(4), caption=None, subtype='FLOAT')
    audio = 'audio/a, b.wav'
    rows = [
        dict(path=audio, captions=['one', 'two'], start=1, end=2.5),
        dict(path=audio, captions=['a "quoted", text\nin two lines'], start=3, end=99),
        dict(path=str(tmp_path / audio), captions=['whole'], start='', end=''),
    ]
    path = tmp_path / f'manifest.{form}'
    with open(path, 'w', newline='') as file:
        if form == 'jsonl':
            file.writelines(json.dumps(row) + '\n' for row in rows)
        else:
            table = csv.DictWriter(file, rows[0], delimiter=',' if form == 'csv' else '\t')
            table.writeheader()
            table.writerows({**row, 'captions': json.dumps(row['captions'])} for row in rows)
    dataset = AudioTextDataset.from_manifest(path, sample_rate=RATE, max_seconds=None)
    assert [dataset.captions(i) for i in range(3)] == [tuple(row['captions']) for row in rows]
    for index, (start, end) in enumerate([(1, 2.5), (3, 4), (0, 4)]):
        wave = dataset[index]['wave']
        assert len(wave) == round((end - start) * RATE)
        assert float(wave[0]) == pytest.approx(start / 4 * 0.5, abs=1e-3)


def read(folder, name, content):
    """Path, captions, start and end of each clip of a manifest, and the reasons of what it skips."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    listing = list_manifest(folder / name)
    clips = [(str(clip.path.relative_to(folder)), *clip.captions, clip.start, clip.end) for clip in listing.clips]
    return clips, list(listing.skipped.values())


WHOLE = [('a.wav', 'one, two', 0.0, None), ('b.wav', 'three', 0.0, None)]


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('m.csv', 'audio,caption\na.wav,"one, two"\nb.wav,three\n'),
        ('m.csv', '\ufeffaudio,text,other\r\na.wav,"one, two",3\r\n\r\nb.wav,three,\r\n'),
        ('m.csv', '\n\nAudio , Caption\na.wav, "one, two"\n , \nb.wav , three,,\n'),
        ('m.csv', 'Caption;File Name\none, two;a.wav\nthree;b.wav\n'),
        ('m.csv', '\ufeffsep=;\nfile_name;transcription\na.wav;one, two\nb.wav;three\n'),
        ('m.csv', ',audio_filepath,Description,year\n0,a.wav,"one, two",1999\n1,b.wav,three\n'),
        ('m.csv', 'audio\ttext\na.wav\tone, two\nb.wav\tthree\n'),
        ('m.csv', 'audio,caption\ra.wav,"one, two"\rb.wav,three\r'),
        ('m.csv', 'path,duration,caption\na.wav,31.5,"one, two"\nb.wav,3:10,three\n'),
        ('m.csv', 'audio,caption,end_note,timestamp\na.wav,"one, two",C,2020-01-01T00:00\nb.wav,three,,\n'),
        ('m.tsv', '\ufeffaudio\tcaption\r\na.wav\tone, two\r\n\r\nb.wav\t"three"\r\n'),
        ('m.tsv', 'audio;caption\na.wav;one, two\nb.wav;three\n'),
        ('m.jsonl', '\ufeff{"Audio": "a.wav", "Text": "one, two"}\r\n\n\ufeff{"audio": "b.wav", "text": "three"}\r\n'),
        (
            'm.jsonl',
            '{"audio": {"path": "a.wav", "bytes": null}, "text": "one, two"}\n'
            '{"audio_filepath": "b.wav", "duration": 3.5, "sentence": "three", "note": NaN, "end": null}',
        ),
    ],
)
def test_tables_as_people_write_them(tmp_path, name, content):
    assert read(tmp_path, name, content) == (WHOLE, [])


def test_all_columns_of_captions_count(tmp_path):
    text = 'path,caption_1,caption_2,Caption,caption,captions,description\n'
    text += "a.wav,one,two,one,three,\"['four', 'it''s']\",no\n".replace("it''s", 'five')
    assert read(tmp_path, 'm.csv', text)[0] == [('a.wav', 'one', 'two', 'three', 'four', 'five', 0.0, None)]
    text = '{"file_name": "a.wav", "text": ["one", "nan", null], "captions": "[x", "caption": ""}\n'
    with pytest.raises(ValueError, match='captions is not a JSON list'):
        read(tmp_path, 'm.jsonl', text)
    assert read(tmp_path, 'm.jsonl', text.replace('[x', 'x'))[0] == [('a.wav', 'one', 'x', 0.0, None)]


@pytest.mark.parametrize('empty', ['', ' ', 'nan', 'NaN', 'None'])
def test_row_without_caption_is_named(tmp_path, empty):
    clips, reasons = read(tmp_path, 'm.csv', f'audio,caption,start\na.wav,{empty},1\nb.wav,x,{empty}\nc.wav\n')
    assert clips == [('b.wav', 'x', 0.0, None)]
    where = tmp_path / 'm.csv'
    assert reasons == [f'no caption in line {it} of {where}; it has audio, caption, start' for it in (2, 4)]


def test_in_tsv_a_quote_is_a_character(tmp_path):
    rows = ['calm', '"lo-fi beat', 'a 12" single', '""', '"as ""csv"" writes it"']
    text = 'audio\tcaption\n' + ''.join(f'{place}.wav\t{row}\n' for place, row in enumerate(rows))
    clips, reasons = read(tmp_path, 'm.tsv', text + '\n' + 'x' * 200_000 + '.wav\tlong')
    assert [clip[1] for clip in clips] == ['calm', '"lo-fi beat', 'a 12" single', 'as "csv" writes it', 'long']
    assert len(reasons) == 1


@pytest.mark.parametrize(
    ('header', 'cells'),
    [
        ('start,end', '65.5,130'),
        ('Start,End', '1:05.5,0:02:10'),
        ('start_time,end_time', '01:05.500,00:02:10.000'),
        ('startTime,stop', '"0:01:05,500",2:10'),
        ('start_s,end_s', '65.5,130.0'),
        ('start (seconds),end (seconds)', '65.5,130'),
        ('start_ms,end_ms', '65500,130000'),
        ('begin,stop', '65.5,130'),
        ('onset,offset', '65.5,130'),
        ('offset,duration', '65.5,64.5'),
        ('start,duration_ms', '65.5,64500'),
        ('start,end,duration', '65.5,130,300'),
        ('start,end,start_frame', '65.5,130,3000'),
    ],
)
def test_times(tmp_path, header, cells):
    table = f'audio,caption,{header}\na.wav,x,{cells}\n'
    assert read(tmp_path, 'm.csv', table)[0] == [('a.wav', 'x', 65.5, 130.0)]
    names, values = next(csv.reader([f'audio,caption,{header}'])), next(csv.reader([f'a.wav,x,{cells}']))
    assert read(tmp_path, 'm.jsonl', json.dumps(dict(zip(names, values))))[0] == [('a.wav', 'x', 65.5, 130.0)]


def test_times_that_are_missing(tmp_path):
    table = 'audio,caption,start,end\na.wav,x,,\nb.wav,x,nan,2\nc.wav,x,1,NaN\n'
    assert [clip[-2:] for clip in read(tmp_path, 'm.csv', table)[0]] == [(0, None), (0, 2), (1, None)]


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tmp_path / 'odd\\name.wav').touch()
    paths = ['~/a.wav', f'{tmp_path}/b.wav', 'sub\\c.wav', 'odd\\name.wav', './d.wav', '~e.wav']
    found = [clip[0] for clip in read(tmp_path, 'm.csv', 'audio,caption\n' + ''.join(f'{it},x\n' for it in paths))[0]]
    assert found == ['home/a.wav', 'b.wav', 'sub/c.wav', 'odd\\name.wav', 'd.wav', '~e.wav']


def test_tables_of_jamendo_and_song_describer(tmp_path):
    audio = tmp_path / 'audio'
    for name in ('14/214.mp3', '82/382.low.mp3', '84/976784.2min.mp3'):
        write(audio / name, ramp(1), caption=None)
    (tmp_path / 'autotagging.tsv').write_text(
        'TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS\n'
        'track_0000214\tartist_000014\talbum_000031\t14/214.mp3\t124.6\tgenre---punkrock\n'
        'track_0000382\tartist_000020\talbum_000046\t82/382.mp3\t211.1\tgenre---classical\tmood/theme---calm\n'
    )
    (tmp_path / 'song_describer.csv').write_text(
        'caption_id,track_id,caption,is_valid_subset,familiarity,artist_id,album_id,path,duration\n'
        '528,976784,"Upbeat, electronic",False,0,421686,115108,84/976784.mp3,140.5\n'
    )
    dataset = AudioTextDataset.from_manifest(tmp_path / 'autotagging.tsv', audio, sample_rate=RATE, max_seconds=None)
    assert [dataset.captions(it) for it in range(2)] == [('punkrock',), ('classical, calm',)]
    assert [len(dataset[it]['wave']) for it in range(2)] == [RATE, RATE]
    (clip,) = list_clips(tmp_path / 'song_describer.csv', audio).clips
    assert clip == Clip(audio / '84/976784.2min.mp3', ('Upbeat, electronic',), recording='84/976784.2min')
    (tmp_path / 'own.tsv').write_text('track_id\tpath\tduration\ttags\n1\ta.mp3\t3\trock\n')
    with pytest.raises(ValueError, match='line 2: tags must hold tags such as genre---rock'):
        list_manifest(tmp_path / 'own.tsv')
    with pytest.raises(FileNotFoundError, match='no folder of audio at'):
        list_manifest(tmp_path / 'own.tsv', tmp_path / 'none')


def test_audio_folder_of_hugging_face(tmp_path):
    for name in ('train/a.wav', 'train/sub/b.wav', 'test/c.wav', 'test/d.wav', 'e.wav'):
        write(tmp_path / name, ramp(2), caption=None)
    (tmp_path / 'e.txt').write_text('e')
    (tmp_path / 'metadata.csv').write_text('file_name,label\ne.wav,1\n')
    (tmp_path / 'train/metadata.csv').write_text('file_name,text,start,end\na.wav,a,0,1\na.wav,z,1,2\nsub/b.wav,b,,\n')
    (tmp_path / 'test/metadata.jsonl').write_text('{"file_name": "c.wav", "transcription": "c"}')
    listing = list_folder(tmp_path)
    found = [(clip.path.name, clip.captions, clip.start, clip.recording) for clip in listing.clips]
    assert found == [
        ('e.wav', ('e',), 0, 'e'),
        ('c.wav', ('c',), 0, 'test/c'),
        ('a.wav', ('a',), 0, 'train/a'),
        ('a.wav', ('z',), 1, 'train/a'),
        ('b.wav', ('b',), 0, 'train/sub/b'),
    ]
    assert list(listing.skipped) == [str(tmp_path / it) for it in ('metadata.csv', 'test/d.wav')]
    assert len(AudioTextDataset.from_path(tmp_path, sample_rate=RATE)) == 5


def test_table_of_clips_holds_what_was_put_in(tmp_path):
    clips = [
        Clip(tmp_path / 'a.wav', ('x',), recording='a'),
        Clip(tmp_path / 'ü\udcff.wav', ('[]', 'ü "q"\n\0'), 1.25, 0.1 + 0.2, ''),
        Clip(tmp_path / '..' / 'b', ('x',), 0.0, 3.0, '../b'),
        Clip(tmp_path / 'c.wav', ('x',), 2.0, None, 'other'),
    ]
    table = ClipTable(tmp_path)
    for clip in clips:
        table.append(os.path.relpath(clip.path, tmp_path), clip.captions * 2, clip.start, clip.end, clip.recording)
    assert [len(table), list(table)] == [4, clips]
    assert [table[-1], list(table[1:3]), list(table.take([3, 0]))] == [clips[3], clips[1:3], [clips[3], clips[0]]]
    with pytest.raises(IndexError, match='index 4 lies outside of the 4 clips'):
        table[4]


@pytest.mark.parametrize(
    ('name', 'text', 'says'),
    [
        (
            'm.csv',
            'path,caption,start\na.wav,x,soon\n',
            r"m.csv, line 2: start must be a number of seconds, got 'soon'",
        ),
        ('m.csv', 'path,caption,start\na.wav,x,-1\n', r'line 2: start must be a number of seconds from 0 on'),
        ('m.csv', 'path,caption,start,end\na.wav,x,2,1\n', r'line 2: end 1 must be greater than start 2'),
        ('m.csv', 'ytid,caption\nabc,x\n', r'for MusicCaps pass the folder of its audio too'),
        ('m.csv', 'path,caption\na.wav,x,y\n', r'line 2: more cells than columns'),
        ('m.csv', 'path,captions\na.wav,[x\n', r'line 2: captions is not a JSON list'),
        ('m.jsonl', '{"path": "a.wav"\n', r'm.jsonl, line 1 is not JSON'),
        ('m.jsonl', '\n[1]\n', r'line 2 must be an object'),
        (
            'm.jsonl',
            '{"path": "a.wav", "caption": 3}\n',
            r'line 1: caption must be a string or a list of strings, got 3',
        ),
        (
            'm.jsonl',
            '{"path": "a.wav", "caption": "x \\ud83d"}',
            r'line 1: caption holds half of a character, got .x .ud83d',
        ),
        ('m.csv', 'sound,caption\na.wav,x\n', r"no column or key audio, path or file_name: there are 'sound',"),
        ('m.csv', 'a.wav,a caption\nb.wav,x\n', r"line 2: no column or key audio.*there are 'a.wav', 'a caption'"),
        ('m.csv', 'audio,tags\na.wav,rock\n', r"no column caption or text: there are 'audio', 'tags'"),
        ('m.csv', 'audio,description,prompt\na.wav,x,y\n', r"'description' and 'prompt' may all be the caption"),
        ('m.csv', 'file,wav,caption\na.wav,b.wav,x\n', r"'file' and 'wav' may mean the same; rename"),
        ('m.csv', 'audio,audio,caption\na.wav,b.wav,x\n', r"'audio' and 'audio' may mean the same; rename"),
        ('m.csv', 'audio,caption\n,x\n', r'line 2: no file name under audio'),
        ('m.jsonl', '{"audio": 3, "text": "x"}', r'line 1: audio must be the path of a file, got 3'),
        ('m.jsonl', '{"audio": "a.wav", "text": "x", "text": "y"}', r"line 1: the key 'text' is given twice"),
        # times
        ('m.csv', 'audio,caption,start,start_s\na.wav,x,1,2\n', r"'start' and 'start_s' may mean the same; rename"),
        ('m.csv', 'audio,caption,start_frame\na.wav,x,\nb.wav,x,90\n', r"line 3: start_frame '90' reads as a time"),
        ('m.csv', 'audio,caption,start,length\na.wav,x,1,2\n', r"line 2: length '2' reads as a time"),
        ('m.csv', 'audio,caption,offset\na.wav,x,5\n', r"offset '5' reads as a time, .* rename the columns to start"),
        ('m.csv', 'audio,caption,segmentStart\na.wav,x,5\n', r"segmentStart '5' reads as a time"),
        ('m.jsonl', '{"audio": "a.wav", "text": "x", "timestamp": "0:30"}', r"timestamp '0:30' reads as a time"),
        ('m.csv', 'audio,caption,start\na.wav,x,1:75\n', r"line 2: start must be a number of seconds, got '1:75'"),
        ('m.csv', 'audio,caption,start_ms\na.wav,x,1:15\n', r"start_ms must be a number of milliseconds, got '1:15'"),
        ('m.csv', 'audio;caption;end\na.wav;x;1,5\n', r"line 2: end must be a number of seconds, got '1,5'"),
        # paths
        ('m.csv', 'audio,caption\nhttps://x.org/a.wav,x\n', r"line 2: 'https://x.org/a.wav' is an address; .* local"),
        ('m.csv', 'audio,caption\nfile:///a.wav,x\n', r"'file:///a.wav' is an address"),
        ('m.csv', 'audio,caption\nC:\\music\\a.wav,x\n', r'is a path of Windows; write it relative to the manifest'),
        # quotes, cells, encodings
        ('m.csv', 'audio,caption\na.wav,x\nb.wav,"lo-fi\nc.wav,y\n', r'line 3: the quote that opens here is never'),
        ('m.csv', 'audio,caption\na.wav,"lo-fi\nb.wav,"x"\n', r'line 2: text follows the closing quote .* or the'),
        ('m.csv', 'audio,text,caption\na.wav,"one\ntwo","x\ny\n', r'line 3: the quote that opens here is never'),
        ('m.csv', 'audio,caption\na.wav,"' + 'x\n' * 70000, r'line 2: the quote that opens here is never closed'),
        ('m.csv', "audio,captions\na.wav,['a' 'b']\n", r'line 2: captions is not a JSON list'),
        (
            'm.tsv',
            'audio\tcaption\na.wav\t"x\ny"\n',
            r'line 2: the quote that opens here is closed in line 3, .* commas',
        ),
        ('m.csv', 'audio\ttext\tn\na.wav\t"x\n\ny\nz"\t3\n', r'line 2: the quote that opens here is closed in line 5'),
        ('m.tsv', 'audio\tcaption\na.wav\tx\ty\n', r'line 2: more cells than columns; a cell must not hold a tab'),
        ('m.csv', 'audio,caption\na.wav,x\n'.encode('utf-16'), r'is not UTF-8 but UTF-16; save it as UTF-8'),
        ('m.jsonl', '{"audio": "a.wav", "text": "x"}'.encode('utf-16'), r'is not UTF-8 but UTF-16; save it as UTF-8'),
        ('m.csv', 'audio,caption\na.wav,x\n'.encode('utf-16-le'), r'holds zero bytes; save it as UTF-8, not UTF-16'),
        ('m.csv', 'audio,caption\na.wav,x\nb.wav,café\n'.encode('latin-1'), r'invalid .* at byte 31, in line 3; save'),
        ('m.txt', '', r'neither a folder nor a manifest; a manifest ends in .csv, .tsv, .jsonl'),
    ],
)
def test_errors_in_manifests_name_the_line(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=says):
        AudioTextDataset.from_manifest(tmp_path / name, sample_rate=RATE)
