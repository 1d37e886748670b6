"""What a player plays is what `AudioFile` reads: any piece, of any coding, from wherever."""

import functools
import io
import pickle
import random
import struct
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import soundfile
import torch
from helpers.models import tiny_mulan
from torch.utils.data import DataLoader
from torchaudio import functional

from musiclm_pytorch.audiolm.generation_args import read_prime
from musiclm_pytorch.data.audio import AudioFile, resample
from musiclm_pytorch.data.clips import Clip
from musiclm_pytorch.data.datasets import AudioTextDataset
from musiclm_pytorch.data.shard_writer import write_shards
from musiclm_pytorch.data.shards import ShardedAudioText

RATE = 44100


@functools.cache
def signals(seconds: float = 1.5, rate: int = RATE) -> dict[str, np.ndarray]:
    """`(samples, 2)`"""
    draw = np.random.default_rng(0)
    time = np.arange(round(seconds * rate)) / rate
    chord = sum(0.15 * np.sin(2 * np.pi * f * time) for f in (220, 277, 330)) * np.exp(-3 * (4 * time % 1))
    mono = dict(
        tone=0.3 * np.sin(2 * np.pi * 440 * time),
        noise=0.1 * draw.standard_normal(len(time)),
        sweep=0.4 * np.sin(2 * np.pi * (100 * time + 3000 * time**2)),
        clicks=0.8 * (draw.random(len(time)) < 3e-4),
        chord=chord + 0.01 * draw.standard_normal(len(time)),
        quiet=1e-3 * chord,
    )
    return {name: np.stack([it, 0.7 * np.roll(it, 50)], axis=1).astype('float32') for name, it in mono.items()}


class Pipe(io.RawIOBase):
    """A file that cannot seek, as a pipe."""

    def __init__(self):
        self.content = b''

    def writable(self):
        return True

    def write(self, data):
        self.content += bytes(data)
        return len(data)


def by_ffmpeg(samples, container, codec, rate=RATE, piped=False, bit_rate=None, options=None, muxer=None) -> bytes:
    """`(samples, channels)` encoded."""
    target = Pipe() if piped else io.BytesIO()
    with av.open(target, 'w', format=container, options=muxer or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.layout = 'mono' if samples.shape[1] == 1 else 'stereo'
        if bit_rate:
            stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format='fltp', layout=stream.layout.name)
        frame.sample_rate = RATE
        into = av.AudioResampler(stream.format, stream.layout, rate, stream.frame_size or None)
        for piece in [*into.resample(frame), *into.resample(None)]:
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return target.content if piped else target.getvalue()


def by_sndfile(samples, kind, subtype=None, rate=RATE) -> bytes:
    target = io.BytesIO()
    with soundfile.SoundFile(target, 'w', rate, samples.shape[1], subtype, format=kind) as file:
        for start in range(0, len(samples), RATE):  # libsndfile crashes when it is given a minute for Vorbis at once
            file.write(samples[start : start + RATE])
    return target.getvalue()


def played(content: bytes) -> np.ndarray:
    """`(channels, samples)` that FFmpeg decodes, from the start to the end."""
    pieces = []
    with av.open(io.BytesIO(content), metadata_errors='ignore') as file:
        stream = file.streams.audio[0]
        for packet in file.demux(stream):
            try:
                frames = stream.decode(packet)
            except av.error.InvalidDataError:
                continue  # as ffmpeg goes on
            for frame in frames:
                values = frame.to_ndarray()
                values = values if frame.format.is_planar else values.reshape(-1, len(frame.layout.channels)).T
                whole = dict(i=2.0 ** (8 * values.itemsize - 1), f=1.0)[values.dtype.kind]
                pieces.append((values / whole).astype('float32'))
    return np.concatenate(pieces, axis=1)


NO_XING = dict(write_xing='0')
CODINGS = dict(
    wav=lambda it: by_sndfile(it, 'WAV', 'PCM_24'),
    flac=lambda it: by_sndfile(it, 'FLAC'),
    aiff=lambda it: by_sndfile(it, 'AIFF'),
    ms_adpcm=lambda it: by_sndfile(it, 'WAV', 'MS_ADPCM'),
    vorbis=lambda it: by_sndfile(it, 'OGG', 'VORBIS'),
    mp3_vbr=lambda it: by_sndfile(it, 'MP3'),  # soundfile's default
    gsm=lambda it: by_sndfile(it[::5, :1], 'WAV', 'GSM610', 8000),
    mp3_cbr=lambda it: by_ffmpeg(it, 'mp3', 'libmp3lame', bit_rate=128000),
    mp3_without_length=lambda it: by_ffmpeg(it, 'mp3', 'libmp3lame', options=dict(global_quality='500'), muxer=NO_XING),
    mp3_of_8_kbit=lambda it: by_ffmpeg(it[:, :1], 'mp3', 'libmp3lame', rate=22050, bit_rate=8000),
    mp3_piped=lambda it: by_ffmpeg(it, 'mp3', 'libmp3lame', piped=True),
    mp3_in_wav=lambda it: by_ffmpeg(it, 'wav', 'libmp3lame'),
    mp2=lambda it: by_ffmpeg(it, 'mp2', 'mp2'),
    opus=lambda it: by_ffmpeg(it, 'ogg', 'libopus', rate=48000),
    opus_of_16_kbit=lambda it: by_ffmpeg(it[:, :1], 'ogg', 'libopus', rate=48000, bit_rate=16000),
    opus_in_webm=lambda it: by_ffmpeg(it, 'webm', 'libopus', rate=48000),
    aac=lambda it: by_ffmpeg(it, 'adts', 'aac'),
    m4a=lambda it: by_ffmpeg(it, 'ipod', 'aac'),
    m4a_without_noise=lambda it: by_ffmpeg(it, 'ipod', 'aac', options=dict(aac_pns='0')),
    alac=lambda it: by_ffmpeg(it, 'ipod', 'alac'),
    wav_piped=lambda it: by_ffmpeg(it, 'wav', 'pcm_s16le', piped=True),
    flac_piped=lambda it: by_ffmpeg(it, 'flac', 'flac', piped=True),
    wma=lambda it: by_ffmpeg(it, 'asf', 'wmav2', bit_rate=128000),
    opus_in_mkv=lambda it: by_ffmpeg(it, 'matroska', 'libopus', rate=48000),
    aac_in_mov=lambda it: by_ffmpeg(it, 'mov', 'aac'),
    ac3=lambda it: by_ffmpeg(it, 'ac3', 'ac3', rate=48000, bit_rate=192000),
)


@pytest.mark.parametrize('coding', CODINGS)
def test_a_piece_is_that_of_what_plays(tmp_path, coding):
    draw = random.Random(coding)
    for name in ('noise', 'clicks', 'chord', 'quiet'):
        content = CODINGS[coding](signals()[name])
        whole = torch.from_numpy(played(content))
        total = whole.shape[1]
        (tmp_path / name).write_bytes(content)
        spans = [(start, min(total, start + draw.choice([1, 500, 9000]))) for start in draw.choices(range(total), k=5)]
        spans += [(0, 1), (total - 1, total), (1151, 1153), (total - 3000, total), (0, total), (40, 40)]
        draw.shuffle(spans)
        for source, pieces in ((tmp_path / name, spans[:3]), (io.BytesIO(content), spans)):
            with AudioFile(source) as file:
                assert (file.channels, len(file)) == tuple(whole.shape), name
                for start, stop in pieces:
                    piece = file.read_channels(start, stop)
                    assert piece.shape == (file.channels, stop - start)
                    torch.testing.assert_close(piece, whole[:, start:stop], atol=1e-4, rtol=0, msg=f'{name} {start}')
    # and it is the music, as far as a lossy codec goes
    assert abs(total / file.sample_rate - 1.5) < 0.2


def with_header(content: bytes, *patches: tuple[bytes, int, bytes]) -> bytes:
    """With other bytes at some distance after a marker."""
    made = bytearray(content)
    for marker, distance, value in patches:
        at = made.index(marker) + distance
        made[at : at + len(value)] = value
    return bytes(made)


@pytest.mark.parametrize(
    ('kind', 'patches'),
    [
        ('WAV', [(b'data', 4, b'\0' * 4)]),
        ('WAV', [(b'data', 4, b'\xff' * 4), (b'RIFF', 4, b'\xff' * 4)]),
        ('WAV', [(b'data', 4, struct.pack('<I', 0x7FFFF000))]),
        ('AU', [(b'.snd', 8, b'\xff' * 4)]),
        ('AIFF', [(b'SSND', 4, b'\0' * 4), (b'COMM', 10, b'\0' * 4)]),
        ('CAF', [(b'data', 4, b'\xff' * 8)]),
        ('FLAC', [(b'fLaC', 22, b'\0' * 4)]),
    ],
)
def test_a_header_that_does_not_know_the_length(kind, patches):
    samples = signals(0.5)['noise']
    with AudioFile(io.BytesIO(with_header(by_sndfile(samples, kind, 'PCM_16'), *patches))) as file:
        assert len(file) == len(samples)
        wanted = torch.from_numpy(np.rint(samples.T * 2**15).astype('int16'))
        assert (file.read_channels(0, len(file), 'int16') - wanted).abs().max() <= 1
        assert (file.read_channels(9000, 9100, 'int16') - wanted[:, 9000:9100]).abs().max() <= 1


def picture(size: int) -> bytes:
    """An ID3 tag with a picture in it."""
    content = b'\0image/jpeg\0\x03\0' + b'\xff\xfb\x90\x64' * (size // 4)
    frame = b'APIC' + struct.pack('>I', len(content)) + b'\0\0' + content
    length = len(frame)
    return b'ID3\x03\0\0' + bytes(length >> shift & 127 for shift in (21, 14, 7, 0)) + frame


def test_mp3_with_other_bytes_before_between_and_behind():
    samples = signals()['chord']
    plain, tagged = CODINGS['mp3_without_length'](samples), CODINGS['mp3_cbr'](samples)
    junk = np.random.default_rng(0).integers(0, 200, 3000, dtype=np.uint8).tobytes()
    frames = -(-len(samples) // 1152) * 1152
    for content, least in [
        (picture(20000) + plain, frames),
        (junk + plain, frames),
        (plain + b'TAG' + b'x' * 125, frames),
        (tagged + tagged, 2 * len(samples) - 1152),
        (plain + picture(400) + plain + picture(4000) + plain, 3 * frames - 2 * 1152),
        (tagged[len(tagged) // 2 :], len(samples) // 2 - 3 * 1152),
    ]:
        whole = torch.from_numpy(played(content))
        with AudioFile(io.BytesIO(content)) as file:
            assert least <= len(file) == whole.shape[1]
            for start in (0, len(file) // 2 - 2000, len(file) - 5000, len(file) // 3):
                torch.testing.assert_close(file.read_channels(start, start + 5000), whole[:, start : start + 5000])
            assert torch.equal(file.read_channels(0, len(file)), whole)


@pytest.mark.parametrize('coding', ['vorbis', 'opus'])
def test_a_chain_of_ogg_is_all_its_links(coding):
    links = [CODINGS[coding](samples) for samples in list(signals().values())[1:4]]
    whole = torch.from_numpy(np.concatenate([played(link) for link in links], axis=1))
    with AudioFile(io.BytesIO(b''.join(links))) as file:
        assert len(file) == whole.shape[1]
        each = len(file) // 3
        for start, stop in [(0, len(file)), (2 * each - 900, 2 * each + 900), (5, 9), (each, 3 * each), (3, 2 * each)]:
            torch.testing.assert_close(file.read_channels(start, stop), whole[:, start:stop], atol=1e-4, rtol=0)
    other = by_sndfile(signals()['tone'], 'OGG', rate=22050)
    with pytest.raises(ValueError, match='b.ogg cannot be read.*part 2 of 2 has 2 channels at 22050 Hz.*split'):
        AudioFile(io.BytesIO(CODINGS['vorbis'](signals()['tone']) + other), 'b.ogg')


@pytest.mark.parametrize('kept', [slice(4, 9), slice(0, 5)])
def test_flac_that_was_cut_without_decoding(kept):
    """`ffmpeg -c copy` takes frames as they are, and leaves the length that the header tells."""
    samples = signals()['noise']
    content = CODINGS['flac'](samples)
    with av.open(io.BytesIO(content)) as file:
        frames = [bytes(packet) for packet in file.demux() if packet.size]
    size = 4096  # libsndfile's samples a frame
    cut = content[: content.index(frames[0])] + b''.join(frames[kept])
    with AudioFile(io.BytesIO(cut)) as file:
        wanted = torch.from_numpy(samples[kept.start * size : kept.stop * size].T)
        assert len(file) == wanted.shape[1]
        torch.testing.assert_close(file.read_channels(0, len(file)), wanted, atol=1e-4, rtol=0)
    with AudioFile(io.BytesIO(cut[:-900]), 'song') as file, pytest.raises(ValueError, match='song is damaged'):
        file.read(0, len(file))  # broken off within a frame


def test_damage_is_named():
    samples = np.tile(signals()['noise'], (4, 1))
    for coding in ('flac', 'alac'):
        content = bytearray(CODINGS[coding](samples))
        middle = len(content) // 2
        content[middle : middle + 9000] = bytes(9000)
        with AudioFile(io.BytesIO(bytes(content)), 'song') as file:
            assert len(file) == len(samples)
            assert file.read(0, 9000).isfinite().all()
            with pytest.raises(ValueError, match='song is damaged between samples'):
                file.read(0, len(file))
    for content in (b'', b'no sound' * 999, CODINGS['m4a'](samples)[:9000], b'OggS' * 99, b'#EXTM3U\nsong.mp3\n' * 9):
        with pytest.raises(ValueError, match=r'song cannot be read as audio: \w'):
            AudioFile(io.BytesIO(content), 'song')


def test_channels_in_planes_are_in_their_order():
    samples = 0.1 * np.sin(2 * np.pi * 100 * np.arange(1, 7) * np.arange(RATE // 2)[:, None] / RATE)
    target, layout = io.BytesIO(), '5.1'
    with av.open(target, 'w', format='ipod') as output:
        stream = output.add_stream('alac', rate=RATE, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples.astype('float32').reshape(1, -1), format='flt', layout=layout)
        frame.sample_rate = RATE
        into = av.AudioResampler(stream.format, layout, RATE, stream.frame_size)
        for piece in [*into.resample(frame), *into.resample(None), None]:
            output.mux(stream.encode(piece))
    with AudioFile(target) as file:
        assert (len(file), file.channels) == samples.shape
        found = file.read_channels(9000, 9100)
    torch.testing.assert_close(found.T, torch.from_numpy(samples[9000:9100]).float(), atol=1e-4, rtol=0)


def test_packets_that_no_decoder_takes_are_passed_over():
    content = bytearray(CODINGS['alac'](signals()['noise']))
    content[content.rindex(b'alac') + 10] = 1  # samples a packet: FFmpeg tells of some that this is not implemented
    with AudioFile(io.BytesIO(bytes(content))) as file:
        assert 0 < len(file) < len(signals()['noise'])
        assert file.read(0, len(file)).isfinite().all()


class Counting(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size=-1):
        found = super().read(size)
        self.count += len(found)
        return found


@pytest.mark.parametrize('coding', ['mp3_vbr', 'mp3_cbr', 'vorbis', 'opus', 'opus_in_webm', 'm4a_without_noise'])
def test_a_piece_reads_about_itself(coding):
    content = CODINGS[coding](np.tile(signals()['chord'], (30, 1)))  # 45 seconds
    with AudioFile(Counting(content), key=('long', coding)) as file:
        total = len(file)
    source = Counting(content)
    with AudioFile(source, key=('long', coding)) as file:
        assert len(file) == total
        file.read(total // 2, total // 2 + 2 * file.sample_rate)
    # two seconds, of which AAC is read twice, a run-up of one, and what FFmpeg looks at to open a file
    assert source.count < len(content) * 0.2 + 2**17


def test_a_file_that_changes_is_read_anew(tmp_path):
    for name in ('tone', 'sweep'):
        content = CODINGS['mp3_cbr'](signals(1.0 if name == 'tone' else 1.2)[name])
        (tmp_path / 'a.mp3').write_bytes(content)
        with AudioFile(tmp_path / 'a.mp3') as file:
            assert torch.equal(file.read_channels(0, len(file)), torch.from_numpy(played(content)))


# ---- rates ----


@pytest.mark.parametrize(
    ('old', 'new'), [(44100, 16000), (22254, 16000), (3001, 2000), (2000, 3001), (5003, 800), (1, 3), (7, 2)]
)
def test_resampling_is_torchaudios_filter(old, new):
    wave = torch.rand(2, 3 * old + 17, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # of torchaudio, 22,254 Hz would take 1.5 GB
    wanted = functional.resample(wave, old, new, 6, 0.99) if old != 22254 else None
    found = resample(wave, old, new)
    assert found.shape == (2, -(-wave.shape[1] * new // old))
    if wanted is not None:
        both = min(found.shape[1], wanted.shape[1])
        torch.testing.assert_close(found[:, :both], wanted[:, :both], atol=1e-5, rtol=0)
    assert resample(wave.half(), old, new).dtype == torch.float32
    assert torch.equal(resample(wave[0, :0], old, new), torch.zeros(0))


def test_resampling_between_odd_rates_keeps_tones_and_gradients():
    for rate in (11127, 44101, 192001):
        time = torch.arange(rate, dtype=torch.float64) / rate
        found = resample(torch.sin(2 * torch.pi * 1000 * time).float(), rate, 16000)
        wanted = torch.sin(2 * torch.pi * 1000 * torch.arange(16000, dtype=torch.float64) / 16000).float()
        torch.testing.assert_close(found[500:-500], wanted[500:-500], atol=5e-3, rtol=0)
    wave = torch.randn(2, 300, requires_grad=True)
    for old, new in [(3001, 2000), (441, 160)]:
        out = resample(wave, old, new)
        given = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, wave, given)
        other = torch.randn_like(wave)
        # linear: <given, R other> = <Rᵀ given, other>
        torch.testing.assert_close((given * resample(other, old, new)).sum(), (gradient * other).sum())


@pytest.mark.parametrize('rate', [16000, 44101, 11127, 8000])
def test_a_piece_at_another_rate_is_that_of_the_whole(rate):
    with AudioFile(io.BytesIO(by_sndfile(signals()['noise'], 'WAV', 'FLOAT', 22254))) as file:
        whole = resample(file.read(0, len(file)), 22254, rate)
        total = file.length_at(rate)
        assert len(whole) == total
        for start, stop in [(0, total), (9000, 9001), (total - 1, total), (300, 9000), (5, 5), (total, total)]:
            torch.testing.assert_close(file.read_at(start, stop, rate), whole[start:stop], atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match=rf'samples 0 to {total + 1} at {rate} Hz lie outside'):
            file.read_at(0, total + 1, rate)


# ---- where files are used ----


def test_in_threads_workers_tars_and_models(tmp_path):
    samples = signals()['chord']
    clips = []
    for name in ('mp3_without_length', 'm4a', 'opus_in_webm', 'wma'):
        (tmp_path / f'{name}.bin').write_bytes(CODINGS[name](samples))
        clips.append(Clip(tmp_path / f'{name}.bin', (name,)))
    clips.append(Clip(tmp_path / 'mp3_without_length.bin', ('part',), 0.3, 0.9))
    dataset = AudioTextDataset(clips, sample_rate=8000, max_seconds=0.5, training=False)
    assert dataset.skipped == {}
    wanted = [dataset[index]['wave'] for index in range(len(clips))]
    with ThreadPoolExecutor(4) as pool:
        for index, item in enumerate(pool.map(lambda i: dataset[i % 5], range(40))):
            assert torch.equal(item['wave'], wanted[index % 5])
    loader = DataLoader(dataset, None, num_workers=2, multiprocessing_context='fork')
    assert all(torch.equal(item['wave'], wave) for item, wave in zip(loader, wanted, strict=True))
    with AudioFile(clips[0].path) as file, pytest.raises(TypeError):
        pickle.dumps(file)

    suffixes = {'mp3_without_length': '.mp3', 'm4a': '.m4a', 'opus_in_webm': '.webm', 'wma': '.wma'}
    stored = [Clip(it.path.rename(it.path.with_suffix(suffixes[it.path.stem])), it.captions) for it in clips[:4]]
    stored.append(Clip(stored[0].path, ('part',), 0.3, 0.9))
    assert write_shards(stored, tmp_path / 'shards')['skipped'] == {}
    shards = ShardedAudioText(tmp_path / 'shards', sample_rate=8000, max_seconds=0.5, training=False)
    for item, wave in zip(shards, wanted, strict=True):
        # a part is stored in 16 bits
        torch.testing.assert_close(item['wave'], wave, atol=1e-4 if item['caption'] == 'part' else 0, rtol=0)

    mulan = tiny_mulan(audio=dict(audio_sample_rate=8000)).eval()
    for clip in stored[:4]:
        wave = torch.from_numpy(played(clip.path.read_bytes())).mean(dim=0)
        with AudioFile(clip.path) as file:
            rate = file.sample_rate
        embedded = mulan.embed_audio(wave, window=0.5, hop=0.2, sample_rate=rate)
        torch.testing.assert_close(mulan.embed_audio(clip.path, window=0.5, hop=0.2), embedded, atol=1e-4, rtol=0)
        prime, prime_rate = read_prime(None, None, clip.path, seconds=9.0)
        assert prime_rate == rate
        torch.testing.assert_close(prime[0], wave, atol=1e-4, rtol=0)
