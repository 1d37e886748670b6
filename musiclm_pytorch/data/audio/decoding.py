"""Sound in packets (MP3, AAC, Vorbis, Opus …), decoded by FFmpeg: a piece is that of the whole file decoded.

Packets are listed once a file, almost without decoding: where they lie, and how many samples each gives. A piece is
decoded from so many packets before it that the decoder no longer depends on where it began.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np

from musiclm_pytorch.data.audio.index import Index, kept_indices, packed, resolved, unpacked
from musiclm_pytorch.data.audio.ogg import OggPages, read_packets, split_links

# Packets and seconds to decode before a piece, after which decoding is the same as from the start: MP3 keeps up to 511
# bytes, of as many as 26 packets at 8 kbit/s; Vorbis and AAC overlap two packets; Opus differs by less than 1e-5 of
# full scale after a second (its RFC 7845 asks for 80 ms, where 0.1 may remain). Others are decoded from the start.
RUN_UP = {
    **dict.fromkeys(('mp3', 'mp3float', 'mp2', 'mp2float', 'mp1', 'mp1float'), (32, 0.0)),
    **dict(aac=(8, 0.0), vorbis=(4, 0.0), opus=(2, 1.0)),
    **dict.fromkeys(('flac', 'alac', 'wavpack', 'adpcm_ms', 'adpcm_ima_wav'), (0, 0.0)),
}
MPEG_CODECS = [name for name in RUN_UP if name.startswith('mp')]
SUBTYPES = dict(mp3='MPEG_LAYER_III', mp2='MPEG_LAYER_II', mp1='MPEG_LAYER_I', gsm_ms='GSM610')
LOSSLESS = ('flac', 'alac', 'wavpack', 'ape', 'tta', 'pcm_')
# a playlist in place of sound would have FFmpeg open what it names
FORMATS = (
    'aac,ac3,aiff,amr,ape,asf,au,caf,dsf,eac3,flac,gsm,matroska,mov,mp3,mpc,mpc8,ogg,rm,spx,tak,tta,voc,w64,wav,wv'
)
PROBED = 8  # packets at either end that are decoded to see whether they give what the file says
NEAR = 64  # packets to either side of one about which FFmpeg is wrong
HEAD = 16  # bytes of a packet that are looked for in the file
PLANAR = dict(u='u', s='i', f='f', d='f')  # numpy's kinds, by what FFmpeg's names of formats begin with


class PacketFile:
    """A sound file that FFmpeg decodes. Raises ValueError without the name of the file, OSError.

    Args:
        source: a path, or a binary file that can seek, which is not closed here.
        key: what tells the content from others, for an index that is kept: by default path, size and time of change.
    """

    def __init__(self, source: str | BinaryIO, key: Hashable = None):
        self._file = open(source, 'rb') if isinstance(source, str) else source  # noqa: SIM115
        self._owns = isinstance(source, str)
        self._streams: dict[int, PacketStream] = {}
        try:
            if self._owns:
                status = os.fstat(self._file.fileno())
                key = (os.path.abspath(source), status.st_size, status.st_mtime_ns)
            self._indices = kept_indices.get(key)
            if self._indices is None:
                self._indices = tuple(self._scan())
                kept_indices.put(key, self._indices)
        except BaseException:
            self.close()
            raise
        first = self._indices[0]
        self.rate, self.channels, self.subtype = first.rate, first.channels, first.subtype
        self.ends = np.cumsum([index.length for index in self._indices])
        self.length = int(self.ends[-1])

    @property
    def is_whole(self) -> bool:
        """Whether its last packet decodes."""
        samples = self._indices[-1].samples
        return bool(samples) and bool(unpacked(samples)[-1] > 0)

    def _scan(self) -> Iterator[Index]:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        links = split_links(self._file, size) if self._file.read(4) == b'OggS' else [(0, size, None)]
        for number, (begin, stop, pages) in enumerate(links):
            stream = PacketStream(self._file, begin, stop)
            index = stream.scan(pages)
            if number == 0:
                first = index
            if (index.rate, index.channels) != (first.rate, first.channels):
                raise ValueError(
                    f'part {number + 1} of {len(links)} has {index.channels} channels at {index.rate} Hz, the first '
                    f'{first.channels} at {first.rate} Hz; split the file'
                )
            self._streams = {number: stream}
            yield index

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        if self._owns:
            self._file.close()

    def read(self, start: int, stop: int, dtype: str) -> np.ndarray:
        """`(channels, stop - start)`; fewer samples where the file ends before."""
        pieces = []
        for number, (index, end) in enumerate(zip(self._indices, self.ends)):
            first, last = max(start, end - index.length), min(stop, end)
            if first < last:
                for other in [it for it in self._streams if it != number]:
                    self._streams.pop(other).close()
                if number not in self._streams:
                    self._streams[number] = PacketStream(self._file, index.begin, index.stop, index)
                offset = int(end) - index.length
                pieces.append(self._streams[number].read(int(first) - offset, int(last) - offset))
        samples = np.concatenate(pieces, axis=1) if pieces else np.zeros((self.channels, 0), np.float32)
        return converted(samples, dtype)


class PacketStream:
    """One stream of sound in a file, from byte `begin` to `stop`."""

    def __init__(self, file: BinaryIO, begin: int, stop: int, index: Index | None = None):
        import av

        self._av, self._part = av, Section(file, begin, stop)
        self._later: Iterator[np.ndarray] | None = None
        self._container, self._stream = self._open()
        self._context = self._stream.codec_context
        self._context.flags2 |= av.codec.context.Flags2.skip_manual  # cut off by `trims`
        if index is not None:
            self._use(index)

    def _open(self) -> tuple[Any, Any]:
        # a name is no address here: FFmpeg reads through the open file, and opens no other
        part = Section(self._part.file, self._part.begin, self._part.stop)
        try:
            container = self._av.open(part, options=dict(format_whitelist=FORMATS), metadata_errors='ignore')
        except self._av.FFmpegError as error:
            raise ValueError(error.strerror) from error
        stream = container.streams.best('audio')
        if stream is None or stream.codec_context is None or not stream.codec_context.sample_rate:
            container.close()
            raise ValueError('it holds no sound that can be decoded' if stream else 'it holds no sound')
        stream.codec_context.thread_count = 1
        return container, stream

    def close(self) -> None:
        self._later = None
        self._container.close()

    # ---- listing ----

    def scan(self, pages: OggPages | None) -> Index:
        """The index, which is used from then on."""
        sizes, offsets, ticks, heads, trims = [], [], [], [], {}
        first, last, times = [], deque(maxlen=PROBED), []
        try:
            for packet in self._container.demux(self._stream):
                if not packet.size:
                    continue
                if packet.has_sidedata('skip_samples'):
                    skips = np.frombuffer(bytes(packet.get_sidedata('skip_samples'))[:8], '<u4')
                    trims[len(sizes)] = (int(skips[0]), int(skips[1]))
                content = memoryview(packet)
                times.append(packet.pts)
                if len(first) < PROBED:
                    first.append(bytes(content))
                last.append(packet)
                sizes.append(packet.size)
                offsets.append(-1 if packet.pos is None else packet.pos)
                ticks.append(packet.duration or 0)
                heads.append(bytes(content[:HEAD]))
        except self._av.FFmpegError as error:
            raise ValueError(f'it is damaged after packet {len(sizes)}: {error.strerror}') from error
        place = dict(begin=self._part.begin, stop=self._part.stop, subtype=self._subtype())
        located = self._located(sizes, offsets, heads, pages) if sizes and self._run_up() is not None else None
        if located is not None:
            about = dict(**place, **located, sizes=packed(sizes))
            self._use(Index(**about, rate=0, channels=0, length=0))
            if self._payloads_are(first, [bytes(it) for it in last]):
                samples, rate, channels = self._counted(ticks, times, heads)
                if self._context.codec.name == 'vorbis':
                    trims.setdefault(0, (int(samples[0]), 0))  # half a window, which no player plays
                cuts = resolved(trims, samples)
                length = int(samples.sum()) - sum(lead + tail for _, lead, tail in cuts)
                about |= dict(samples=packed(samples), trims=cuts)
                return self._use(Index(**about, rate=rate, channels=channels, length=length))
        length, rate, channels = 0, self._context.sample_rate, self._context.channels
        for frame in self._frames():
            length, channels = length + frame.shape[1], frame.shape[0]
        if sizes and not length:
            raise ValueError('none of its packets decodes')
        return self._use(Index(**place, rate=rate, channels=channels, length=length))

    def _run_up(self) -> tuple[int, float] | None:
        name = self._context.codec.name
        return (0, 0.0) if name.startswith('pcm_') else RUN_UP.get(name)

    def _subtype(self) -> str:
        name = self._context.codec.name
        if name.startswith(LOSSLESS):
            form = self._context.format  # None where no packet told it yet, as in WavPack of many channels
            return 'PCM_16' if form is not None and form.name.startswith(('s16', 'u8')) else 'PCM_32'
        return SUBTYPES.get(name.removesuffix('float'), name.upper())

    def _located(self, sizes, offsets, heads, pages: OggPages | None) -> dict[str, Any] | None:
        """How to find packets in the file, None if they do not lie there in one piece each."""
        if pages is not None:
            pages = pages.beginning_with(sizes)
            return None if pages is None else dict(pages=pages)
        if self._container.format.name == 'ogg' or min(offsets) < 0:
            return None
        starts, end = [], 0
        for offset, size, head in zip(offsets, sizes, heads):
            # before a packet of Matroska lies the header of its block
            if starts and offset == end:
                starts.append(offset)  # looked at by its neighbours: without a gap, there is no header
            else:
                at = self._part.at(offset, 4 * HEAD).find(head)
                if at < 0 or offset + at < end:
                    return None
                starts.append(offset + at)
            end = starts[-1] + size
        ends = np.array(starts) + np.array(sizes)
        return dict(gaps=packed(np.array(starts) - np.concatenate([[0], ends[:-1]])))

    def _payloads_are(self, first: list[bytes], last: list[bytes]) -> bool:
        count = len(self._sizes)
        return self._payloads(0, len(first)) == first and self._payloads(count - len(last), count) == last

    def _counted(self, ticks: list[int], times: list[int | None], heads: list[bytes]) -> tuple[np.ndarray, int, int]:
        """Samples of each packet, and rate and channels: by what the file says of how long packets last (`ticks`) and
        when they begin, if that is exact, agrees with itself and with what is decoded at either end."""
        count, decoded = len(ticks), self._decoded
        head = list(decoded(0, min(count, 2 * PROBED)))
        sounding = next((frames for frames in head if frames), None)
        if sounding is None:
            raise ValueError('none of its first packets decodes')
        rate, channels = self._context.sample_rate, sounding[0].shape[0]
        given = _counts(head)
        if count <= 2 * PROBED:
            return np.array(given), rate, channels
        per_tick = rate * self._stream.time_base
        told = np.array(ticks, np.int64) * per_tick.numerator
        exact = (told % per_tick.denominator == 0).all() and (per_tick <= 1 or len(set(ticks[:-1])) == 1)
        told //= per_tick.denominator
        if exact and per_tick <= 1:
            exact = None not in times and self._mended(told, np.array(times), np.array(ticks), per_tick)
        # the last few may be told by where the sound ends; they are as decoded
        begin, sure = count - PROBED, PROBED // 2
        tail = _counts(decoded(self._before(begin), count))[-PROBED:]
        if (
            not exact
            or given[1:] != told[1 : len(given)].tolist()
            or tail[:sure] != told[begin : begin + sure].tolist()
        ):
            return np.array(_counts(decoded(0, count))), rate, channels
        told[: len(given)], told[begin:] = given, tail
        if self._context.codec.name in MPEG_CODECS:
            # a tag or other bytes between frames come as a packet that does not decode
            for odd in np.flatnonzero(np.array([family(it) != family(heads[PROBED]) for it in heads])):
                told[odd] = _counts(decoded(self._before(int(odd)), int(odd) + 1))[-1]
        return told, rate, channels

    def _mended(self, told: np.ndarray, times: np.ndarray, ticks: np.ndarray, per_tick: Fraction) -> bool:
        """Whether packets give, in all, the time that passes: FFmpeg is wrong about some of Vorbis, but not about the
        time after them. Around such a place they are counted by decoding, in `told`."""
        odd = np.flatnonzero(np.diff(times) != ticks[:-1])
        if len(odd) * 4 * NEAR > len(told):
            return False
        for place in odd.tolist():
            first, last = max(0, place - NEAR), min(len(told), place + NEAR)
            told[first:last] = _counts(self._decoded(self._before(first), last))[first - last :]
        return int(told[:-1].sum()) == (times[-1] - times[0]) * per_tick

    # ---- reading ----

    def _use(self, index: Index) -> Index:
        self._index = index
        if index.sizes is None:
            return index
        self._sizes = unpacked(index.sizes)
        if index.pages is None:
            self._offsets = np.cumsum(unpacked(index.gaps) + self._sizes) - self._sizes
        if not index.samples:
            return index
        self._samples, self._leads = unpacked(index.samples), np.zeros(len(self._sizes), np.int64)
        kept = self._samples.copy()
        for packet, lead, tail in index.trims:
            self._leads[packet] = lead
            kept[packet] -= lead + tail
        self._ends = np.cumsum(kept)
        return index

    def read(self, start: int, stop: int) -> np.ndarray:
        if self._index.sizes is None:
            return self._read_on(start, stop)
        first = int(np.searchsorted(self._ends, start, 'right'))
        last = int(np.searchsorted(self._ends, stop, 'left')) + 1
        may_be_noisy = self._context.codec.name == 'aac'
        if may_be_noisy and (self._index.is_noisy or self._before(first) == 0):
            return self._read_on(start, stop)
        piece = self._joined(first, last)
        # AAC may keep the loudness of noise alone; the noise itself then depends on all the noise before, so that two
        # decodings of a piece differ
        if may_be_noisy and not np.array_equal(piece, self._joined(first, last)):
            self._index.is_noisy = True
            return self._read_on(start, stop)
        offset = start - (int(self._ends[first - 1]) if first else 0)
        return piece[:, offset : offset + stop - start]

    def _before(self, packet: int) -> int:
        """The packet to decode from, so that this one is as in the whole file."""
        packets, seconds = self._run_up()
        if seconds and self._index.samples:
            early = np.searchsorted(self._ends, self._begin_of(packet) - seconds * self._index.rate)
            packets = max(packets, packet - int(early))
        return max(0, packet - packets)

    def _joined(self, first: int, last: int) -> np.ndarray:
        """What packets `first` to `last` give."""
        begin, pieces = self._before(first), []
        for packet, frames in enumerate(self._decoded(begin, last), begin):
            if packet < first:
                continue
            (found,) = _counts([frames])
            if found != self._samples[packet] or any(it.shape[0] != self._index.channels for it in frames):
                at = self._begin_of(packet) / self._index.rate
                raise ValueError(f'packet {packet}, at {at:.2f} s, does not decode to what it should')
            if found:
                own = np.concatenate(frames, axis=1) if len(frames) > 1 else frames[0]
                lead = int(self._leads[packet])
                pieces.append(own[:, lead : lead + int(self._ends[packet]) - self._begin_of(packet)])
        return np.concatenate(pieces, axis=1)

    def _begin_of(self, packet: int) -> int:
        return int(self._ends[packet - 1]) if packet else 0

    def _decoded(self, first: int, last: int) -> Iterator[list[np.ndarray]]:
        """Of each packet its frames; none where it does not decode. The decoder begins anew."""
        self._context.flush_buffers()
        for payload in self._payloads(first, last):
            yield self._decode(self._context, self._av.Packet(payload))

    def _decode(self, context: Any, packet: Any) -> list[np.ndarray]:
        try:
            return [as_channels(frame) for frame in context.decode(packet)]
        except self._av.FFmpegError:  # of any kind: what is damaged may ask for what no decoder has
            return []

    def _payloads(self, first: int, last: int) -> list[bytes]:
        if self._index.pages is not None:
            return read_packets(self._part, self._index.pages, self._sizes, first, last)
        offsets, sizes = self._offsets[first:last].tolist(), self._sizes[first:last].tolist()
        if offsets[-1] + sizes[-1] - offsets[0] <= 2 * sum(sizes) + 2**16:
            content = self._part.at(offsets[0], offsets[-1] + sizes[-1] - offsets[0])
            return [content[at - offsets[0] : at - offsets[0] + size] for at, size in zip(offsets, sizes)]
        return [self._part.at(at, size) for at, size in zip(offsets, sizes)]

    def _read_on(self, start: int, stop: int) -> np.ndarray:
        """Decoding from the start of the file, or on from the last piece: what it held is kept until then."""
        if self._later is None or start < self._held_from:
            self._later, self._held, self._held_from, self._held_to = self._frames(), deque(), 0, 0
        while self._held_to < stop:
            frame = next(self._later, None)
            if frame is None:
                break
            self._held.append(frame)
            self._held_to += frame.shape[1]
            self._forget(start)
        self._forget(start)
        if not self._held:
            return np.zeros((self._index.channels, 0), np.float32)
        return np.concatenate(self._held, axis=1)[:, start - self._held_from : stop - self._held_from]

    def _forget(self, start: int) -> None:
        while self._held and self._held_from + self._held[0].shape[1] <= start:
            self._held_from += self._held.popleft().shape[1]

    def _frames(self) -> Iterator[np.ndarray]:
        """All that the file decodes to, as FFmpeg trims it."""
        container, stream = self._open()
        try:
            for packet in container.demux(stream):
                yield from self._decode(stream.codec_context, packet)
        except self._av.FFmpegError as error:
            raise ValueError(f'it is damaged: {error.strerror}') from error
        finally:
            container.close()


class Section(io.RawIOBase):
    """A part of an open file, read from a position of its own."""

    def __init__(self, file: BinaryIO, begin: int, stop: int):
        self.file, self.begin, self.stop, self._position = file, begin, stop, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.stop - self.begin}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.stop - self.begin - self._position)
        content = self.at(self._position, left if size < 0 else min(size, left))
        self._position += len(content)
        return content

    def at(self, offset: int, size: int) -> bytes:
        self.file.seek(self.begin + offset)
        return self.file.read(max(0, min(size, self.stop - self.begin - offset)))


def converted(samples: np.ndarray, dtype: str) -> np.ndarray:
    """Samples of a decoder, in its own type, as libsndfile gives them: floats of [-1, 1], or integers of full scale."""
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.int16) - 128) << 8
    bits = samples.dtype.itemsize * 8
    if samples.dtype.kind == 'f':
        if dtype == 'float32':
            return np.ascontiguousarray(samples, np.float32)
        full = 2.0 ** (np.iinfo(dtype).bits - 1)
        return np.clip(np.rint(samples * full), -full, full - 1).astype(dtype)
    if dtype == 'float32':
        return (samples * np.float32(2.0 ** (1 - bits))).astype(np.float32)
    wanted = np.iinfo(dtype).bits
    return (samples.astype(np.int64) << max(0, wanted - bits) >> max(0, bits - wanted)).astype(dtype)


def _counts(decoded: Iterable[list[np.ndarray]]) -> list[int]:
    """Samples of the frames of each packet."""
    return [sum(it.shape[1] for it in frames) for frames in decoded]


def family(head: bytes) -> int | None:
    """What all frames of one MPEG stream share: version, layer and rate; None for what is no frame."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    return (head[1] & 0xFE) << 8 | head[2] & 0x0C


def as_channels(frame: Any) -> np.ndarray:
    """`(channels, samples)` of a frame."""
    channels = len(frame.layout.channels)
    if not frame.format.is_planar:
        return frame.to_ndarray().reshape(-1, channels).T
    # one by one: to_ndarray of PyAV 18.1 took the process down on some frames of many
    dtype = f'{PLANAR[frame.format.name[0]]}{frame.format.bytes}'
    return np.stack([np.frombuffer(plane, dtype, frame.samples) for plane in frame.planes[:channels]])
