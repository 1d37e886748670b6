"""Music as it is given back: a tensor that knows its sample rate, saves itself, and plays in a notebook."""

from __future__ import annotations

import base64
import html
import io
import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import soundfile
import torch
from torch import Tensor

from musiclm_pytorch.atomic import atomic_write

# samples: libsndfile 1.2 does not bear all that it may be given for Vorbis
AT_ONCE = 2**16
KNEE = 0.9  # of full scale, from which on a stream is bent
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # Hz


class Waves(Tensor):
    """A tensor `(…, samples)` float32 of music, full scale at ±1, with its sample rate.

        music = musiclm('a calm piano', seconds=5)  # Waves of shape (1, 80000)
        music.save('piano.wav')
        music  # in a notebook: a player

    It is a tensor in every other way; what is computed of it (a slice, a sum) is a plain one.

    Attributes:
        sample_rate: in Hz.
    """

    sample_rate: int

    @classmethod
    def of(cls, waves: Tensor, sample_rate: int) -> Waves:
        """The same samples, in the same memory, with their rate."""
        waves = waves.as_subclass(cls)
        waves.sample_rate = sample_rate
        return waves

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return Tensor.__torch_function__(func, (Tensor,), args, kwargs or {})

    def __reduce_ex__(self, protocol: int):
        # as a plain tensor, which `torch.load` reads without knowing this class
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __copy__(self) -> Waves:
        return Waves.of(self.as_subclass(Tensor), self.sample_rate)

    def __deepcopy__(self, memo: dict) -> Waves:
        return Waves.of(self.as_subclass(Tensor).clone(), self.sample_rate)

    def __repr__(self, **_) -> str:
        return f'Waves of shape {tuple(self.shape)}: {self.shape[-1] / self.sample_rate:.4g} s at {self.sample_rate} Hz'

    @property
    def pieces(self) -> list[Tensor]:
        """Each wave `(samples,)`, in order."""
        return list(self.as_subclass(Tensor).reshape(-1, self.shape[-1]))

    def save(self, path: str | Path) -> list[Path]:
        """Write a file a piece, in the format of the ending: .wav (16 bit), .flac, .ogg or .mp3.

        One piece is written to `path`, several to `name-1.wav`, `name-2.wav`, … beside it; one that goes beyond [-1, 1]
        is made softer until it does not. Returns the paths. Raises ValueError for an ending that is none of these.
        """
        path = Path(path)
        pieces = self.pieces
        paths = [path if len(pieces) == 1 else path.with_stem(f'{path.stem}-{n}') for n in range(1, len(pieces) + 1)]
        for target, wave in zip(paths, pieces):
            with atomic_write(target) as aside:
                aside.write_bytes(sound_bytes(wave, self.sample_rate, path.suffix))
        return paths

    def _repr_html_(self) -> str:
        return players(self.pieces, self.sample_rate)


def sound_bytes(wave: Tensor, sample_rate: int, suffix: str = '.wav') -> bytes:
    """The bytes of a sound file with `(samples,)`, made softer as a whole where it goes beyond [-1, 1]."""
    file, name = io.BytesIO(), format_of(suffix)
    if name == 'MP3' and sample_rate not in MP3_RATES:
        raise ValueError(f'MP3 has no rate of {sample_rate} Hz; write music of it as .wav, .flac or .ogg')
    wave = wave.detach().cpu().float()
    if wave.numel():
        wave = wave / wave.abs().max().clamp(min=1.0)
    with soundfile.SoundFile(file, 'w', sample_rate, channels=1, format=name) as sound:
        for part in wave.split(AT_ONCE):
            sound.write(part.numpy())
    return file.getvalue()


def format_of(suffix: str) -> str:
    """libsndfile's name of a format that music is written in. Raises ValueError for any other ending."""
    name = suffix.removeprefix('.').upper()
    if name not in ('WAV', 'FLAC', 'OGG', 'MP3') or name not in soundfile.available_formats():
        raise ValueError(f'music can be written as .wav, .flac, .ogg or .mp3, not as {suffix!r}')
    return name


def bent(wave: Tensor) -> Tensor:
    """`(samples,)` within [-1, 1], for a stream, of which nobody knows how loud it will become: what lies within `KNEE`
    as it is, the rest smoothly below full scale, each sample by itself, so that blocks join."""
    over = (wave.abs() - KNEE) / (1 - KNEE)
    return torch.where(over > 0, wave.sign() * (KNEE + (1 - KNEE) * over.tanh()), wave)


class WavStream:
    """A WAV of one channel and 16 bits that grows.

    Args:
        sample_rate: in Hz.
        samples: that will come; None where no one knows how many.
    """

    media_type = 'audio/wav'

    def __init__(self, sample_rate: int, samples: int | None = None):
        most = 2**32 - 1  # what players take for a file that grows
        size = most if samples is None else min(2 * samples, most - 36)
        total, bytes_per_second = min(size + 36, most), 2 * sample_rate
        parts = b'RIFF', total, b'WAVE', b'fmt ', 16, 1, 1, sample_rate, bytes_per_second, 2, 16, b'data', size
        self._head = struct.pack('<4sI4s4sIHHIIHH4sI', *parts)

    def push(self, wave: Tensor) -> bytes:
        """What `(samples,)` add to the file; peaks from 0.9 of full scale on are `bent` below it."""
        head, self._head = self._head, b''
        levels = (bent(wave.detach().cpu().float()) * (2**15 - 1)).round().short()
        return head + levels.numpy().astype('<i2').tobytes()

    def close(self) -> bytes:
        """What is still missing."""
        return self._head


class OpusStream:
    """Opus in Ogg (RFC 7845) of one channel that grows: what was encoded is given out at once, and not kept.

    Args:
        sample_rate: in Hz; one that Opus does not know is resampled to 48000.
        samples: not needed here.
    """

    media_type = 'audio/ogg'
    bit_rate, page = 64_000, 100_000  # bits a second; microseconds

    def __init__(self, sample_rate: int, samples: int | None = None):
        import av

        self._written, self._samples, self._rate = bytearray(), 0, sample_rate
        options = dict(page_duration=str(self.page), flush_packets='1')
        self._file = av.open(self, 'w', format='ogg', options=options)
        rate = sample_rate if sample_rate in (8000, 12000, 16000, 24000, 48000) else 48000
        self._encoder = self._file.add_stream('libopus', rate=rate, layout='mono', bit_rate=self.bit_rate)

    def push(self, wave: Tensor) -> bytes:
        """As of `WavStream`; the last few hundredths of a second come with the next ones."""
        import av

        levels = bent(wave.detach().cpu().float())[None].numpy()
        frame = av.AudioFrame.from_ndarray(levels, format='fltp', layout='mono')
        frame.sample_rate, frame.time_base, frame.pts = self._rate, Fraction(1, self._rate), self._samples
        self._samples += levels.shape[1]
        self._file.mux(self._encoder.encode(frame))
        return self._taken()

    def close(self) -> bytes:
        """What is still missing."""
        self._file.mux(self._encoder.encode(None))
        self._file.close()
        return self._taken()

    def write(self, content: bytes) -> int:
        """For FFmpeg."""
        self._written += content
        return len(content)

    def _taken(self) -> bytes:
        taken, self._written = bytes(self._written), bytearray()
        return taken


STREAMS = dict(wav=WavStream, opus=OpusStream)


def players(pieces: Iterable[Tensor], sample_rate: int, notes: Sequence[str] = ()) -> str:
    """HTML with a player for each `(samples,)`, which holds its sound, and perhaps a note beside it."""
    rows = []
    for number, wave in enumerate(pieces):
        sound = base64.b64encode(sound_bytes(wave, sample_rate)).decode()
        note = f' {html.escape(notes[number])}' if notes else ''
        rows.append(f'<div><audio controls src="data:audio/wav;base64,{sound}"></audio>{note}</div>')
    return '\n'.join(rows)


class WavesAndScores(NamedTuple):
    waves: Tensor
    scores: Tensor


class Music(WavesAndScores):
    """What `MusicLM` gives with `return_scores`; it unpacks as `waves, scores`.

    Attributes:
        waves: `(prompts, samples)`, the best of each prompt, or `(prompts, num_samples, samples)` with `return_all`
        scores: `(prompts, num_samples)`, cosine of each sample with its prompt in MuLaN's space
        seeds: `(prompts, num_samples)` int64; a call with one of them as `seed`, and the same prompt and settings,
            makes that sample again, alone
    """

    seeds: Tensor | None

    def __new__(cls, waves: Tensor, scores: Tensor, seeds: Tensor | None = None) -> Music:
        music = super().__new__(cls, waves, scores)
        music.seeds = seeds
        return music

    def __reduce__(self) -> tuple:
        return _music, (*self, self.seeds, getattr(self.waves, 'sample_rate', None))

    def __repr__(self) -> str:
        waves, scores = (f'{tuple(it.shape)} {it.dtype}' for it in self)
        return f'Music(waves: {waves}, scores: {scores}, seeds: {None if self.seeds is None else self.seeds.tolist()})'

    def _repr_html_(self) -> str:
        """Players, in each prompt's samples the one of the highest score first."""
        waves, scores = self
        if waves.ndim == 2:  # the best of each prompt
            return players(waves, waves.sample_rate, [f'{it:.3f}' for it in scores.amax(dim=1).tolist()])
        order = scores.argsort(dim=1, descending=True)
        ranked = [(waves[p, s], f'{scores[p, s]:.3f}') for p, row in enumerate(order.tolist()) for s in row]
        return players([wave for wave, _ in ranked], waves.sample_rate, [note for _, note in ranked])


def _music(waves: Tensor, scores: Tensor, seeds: Tensor | None, sample_rate: int | None) -> Music:
    """What was pickled, in which `Waves` are a plain tensor."""
    return Music(waves if sample_rate is None else Waves.of(waves, sample_rate), scores, seeds)
