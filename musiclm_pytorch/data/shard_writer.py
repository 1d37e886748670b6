"""Writing tar shards, which `shards` reads."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor

from musiclm_pytorch.atomic import checksum_of_bytes, naming, write_checked_json
from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.data.audio import AudioFile
from musiclm_pytorch.data.clips import Clip, ClipTable, Listing
from musiclm_pytorch.data.collate import mono, split_item
from musiclm_pytorch.data.datasets import AudioTextDataset
from musiclm_pytorch.data.generated import GeneratedMusic
from musiclm_pytorch.data.rates import agreed_rate
from musiclm_pytorch.data.reading import finite, first_of, logger
from musiclm_pytorch.data.shard_reader import AUDIO_CHECKSUM, NOTE_CHECKSUM, checksum_of_note
from musiclm_pytorch.data.shards import INDEX, key_of, read_index, webdataset
from musiclm_pytorch.data.sources import AUDIO_SUFFIXES
from musiclm_pytorch.locking import only_writer

BLOCK = 2**20  # samples decoded at a time to see whether a file is sound
# how many bits of a file count; lossy formats are decoded to 16 as usual
INT16 = {'PCM_S8', 'PCM_U8', 'PCM_16', 'ULAW', 'ALAW'}
INT32 = {'PCM_24', 'PCM_32'}
FLOATS = {'FLOAT', 'DOUBLE'}


@typechecked
def write_shards(
    dataset: Any,
    folder: str | Path,
    shard_size: int = 1000,
    sample_rate: int | None = None,
    on_shard: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a data set as tar files of WebDataset, for `ShardedAudioText` and other readers of that format.

    A clip that is a whole file is stored as it is, byte by byte. A part of a file, or one whose name does not end as
    sound does, is decoded at its own rate and channels and stored as FLAC (of 16 or 24 bits, as the file has; as WAV
    of floats where samples exceed 1, or FLAC has no such rate). Nothing is cropped or drawn at random: that is the
    reader's. Of `SyntheticMusic` and `ScoreMusic`, waves are kept in 16 bits, with all the captions that they give a
    clip. Every clip is decoded once; one that does not decode is skipped, named in the log and noted in the index.

    A shard is written aside and renamed, then noted in `index.json`. If writing is interrupted, the same call goes on
    with the first shard that is not noted.

    Args:
        dataset: an `AudioTextDataset`, a list of `Clip`, or any data set of fixed size whose items are pairs of a wave
            and a string, as `collate_pairs` takes them.
        folder: where to; it may hold the beginning of the same shards, but no others.
        shard_size: clips a shard, at most.
        sample_rate: of the waves in Hz, for a data set that is not made of files and does not tell its `sample_rate`.
        on_shard: called after each shard with its number, from 1 on, and the number of shards.

    Returns:
        the index: `shards`, a list of dicts with `name` and `samples`, `skipped` with a reason for each name, …

    Raises:
        ImportError: webdataset is not installed. ValueError: the folder holds shards of something else; no clip can
        be read. FolderInUseError: another call writes there.
    """
    check_positive(shard_size=shard_size)
    TarWriter = webdataset().TarWriter
    samples = Samples(dataset, sample_rate)
    folder = Path(folder)
    with only_writer(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return _write(samples, folder, shard_size, TarWriter, on_shard)


def _write(
    samples: Samples,
    folder: Path,
    shard_size: int,
    TarWriter: Callable[..., Any],
    on_shard: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    index = begin(folder, samples, shard_size)
    count = -(-len(samples) // shard_size)

    shards = index['shards']
    removed = [i for i, it in enumerate(shards) if it['samples'] and not (folder / it['name']).is_file()]
    for number in [*removed, *range(len(shards), count)]:
        path = folder / f'shard-{number:06d}.tar'
        aside, written, skipped, first = folder / f'.{path.name}.partial', 0, {}, None
        try:
            with naming(path, aside), open(aside, 'wb') as stream:
                with TarWriter(stream, encoder=False, mtime=0) as tar:
                    for place in range(number * shard_size, min((number + 1) * shard_size, len(samples))):
                        name, sample = samples.read(place)
                        if isinstance(sample, str):
                            logger.warning('skipped %s: %s', name, sample)
                            skipped[name] = sample
                            continue
                        first = first or json.loads(sample['json'])[NOTE_CHECKSUM]
                        tar.write({'__key__': key_of(path, written), **sample})
                        written += 1
                stream.flush()
                os.fsync(stream.fileno())
                if written:
                    os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        shards[number : number + 1] = [dict(name=path.name, samples=written, first=first)]
        index['skipped'] |= skipped
        write_index(folder, index)
        if on_shard is not None:
            on_shard(number + 1, count)

    if not any(shard['samples'] for shard in shards):
        (folder / INDEX).unlink()
        raise ValueError(f'no clip can be read; {first_of(index["skipped"])}')
    index['complete'] = True
    write_index(folder, index)
    return index


def begin(folder: Path, samples: Samples, shard_size: int) -> dict[str, Any]:
    """The index of what is there already, checked to be the beginning of the same."""
    fingerprint = samples.fingerprint()
    if (folder / INDEX).is_file():
        index = read_index(folder)
        if (index['fingerprint'], index['shard_size']) != (fingerprint, shard_size):
            raise ValueError(
                f'{folder} holds shards of other clips, or of another shard_size ({index["shard_size"]}); '
                'choose another folder or remove this one'
            )
        return index
    foreign = sorted(folder.glob('*.tar'))
    if foreign:
        raise ValueError(f'{folder} holds {foreign[0].name}, which was not written here; choose another folder')
    index = dict(fingerprint=fingerprint, shard_size=shard_size, complete=False, shards=[], skipped=samples.skipped)
    write_index(folder, index)
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    write_checked_json(folder / INDEX, index, indent=1)


class Samples:
    """A data set as files of a WebDataset sample: from clips where it has them, from its items otherwise."""

    def __init__(self, dataset: Any, sample_rate: int | None):
        clips = dataset.clips if isinstance(dataset, (AudioTextDataset, Listing)) else None
        if isinstance(dataset, ClipTable) or (
            isinstance(dataset, Sequence) and all(isinstance(it, Clip) for it in dataset)
        ):
            clips = dataset
        self.clips: Sequence[Clip] | None = clips
        self.items = dataset
        self.rate = sample_rate
        self.skipped = dict(dataset.skipped) if isinstance(dataset, (AudioTextDataset, Listing)) else {}
        if clips is None:
            if not hasattr(dataset, '__len__'):
                raise TypeError(
                    f'{type(dataset).__name__} has no length; shards are written of data sets of fixed size'
                )
            self.rate = agreed_rate(dataset, sample_rate)

    def __len__(self) -> int:
        return len(self.items if self.clips is None else self.clips)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        if isinstance(self.items, GeneratedMusic):
            digest.update(repr(self.items).encode())
        elif self.clips is None:
            digest.update(f'{type(self.items).__name__} {len(self)} {self.rate}'.encode())
        for clip in self.clips or ():
            fields = [clip.recording, clip.path.name, clip.start, clip.end, *clip.captions]
            digest.update(json.dumps(fields).encode() + b'\n')
        return digest.hexdigest()[:16]

    def read(self, place: int) -> tuple[str, dict[str, bytes] | str]:
        """A name, and the files of the sample by suffix or the reason why there are none."""
        if self.clips is None:
            return f'item {place}', self._from_item(place)
        clip = self.clips[place]
        try:
            suffix, audio = stored(clip)
        except (OSError, ValueError) as error:
            return clip.name, str(error)
        note = dict(captions=clip.captions, source=clip.recording or clip.path.name, start=clip.start, end=clip.end)
        return clip.name, {suffix: audio, 'json': as_json(note, audio)}

    def _from_item(self, place: int) -> dict[str, bytes] | str:
        generated = isinstance(self.items, GeneratedMusic)
        try:
            item = self.items[place]
        except ValueError as error:
            if not generated:
                raise
            return str(error)  # a sound font may lack an instrument, or some of its notes
        if item is None:
            return 'the data set gives None for it'
        wave, text = split_item(item, f'item {place}')
        if wave is None or not isinstance(text, str):
            raise TypeError(f'item {place} must be a wave and a string; token ids need the tokenizer they came from')
        try:
            samples = finite(mono(wave, f'item {place}'), f'item {place}')[None]
            suffix, audio = encoded(samples, self.rate, 'PCM_16' if generated else 'PCM_24')
        except ValueError as error:
            return str(error)
        captions = self.items.captions(place) if generated else [text]
        return {suffix: audio, 'json': as_json(dict(captions=captions), audio)}


def stored(clip: Clip) -> tuple[str, bytes]:
    """Suffix and content of the file that a clip is stored as. Raises OSError or ValueError if it does not decode."""
    with AudioFile(clip.path) as file:
        dtype = 'int16' if file.subtype in INT16 else 'int32' if file.subtype in INT32 else 'float32'
        start = round(clip.start * file.sample_rate)
        stop = len(file) if clip.end is None else min(len(file), round(clip.end * file.sample_rate))
        if stop <= start:
            raise ValueError(f'{clip.name} holds no samples; the file has {len(file) / file.sample_rate:.3g} s')
        suffix = clip.path.suffix.lower()
        if start == 0 and clip.end is None and suffix in AUDIO_SUFFIXES:  # by which readers know it
            for at in range(start, stop, BLOCK):
                finite(file.read_channels(at, min(at + BLOCK, stop)), file.name)
            return suffix.removeprefix('.'), clip.path.read_bytes()
        samples = finite(file.read_channels(start, stop, dtype), file.name)
        return encoded(samples, file.sample_rate, 'PCM_24' if file.subtype in INT32 | FLOATS else 'PCM_16')


def encoded(samples: Tensor, rate: int, subtype: str) -> tuple[str, bytes]:
    """`(channels, samples)` as FLAC, or as WAV of floats where FLAC cannot hold it."""
    has_rate = rate < 2**16 or (rate <= 655350 and rate % 10 == 0)
    fits = has_rate and len(samples) <= 8 and not (samples.is_floating_point() and samples.abs().max() > 1)
    if not fits and not samples.is_floating_point():
        samples = samples.float() / -torch.iinfo(samples.dtype).min
    suffix, subtype = ('flac', subtype) if fits else ('wav', 'FLOAT')
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.T.numpy(), rate, subtype, format=suffix.upper())
    return suffix, buffer.getvalue()


def as_json(note: dict[str, Any], audio: bytes) -> bytes:
    """A note with the checksums of the audio beside it and of itself."""
    note = {**note, AUDIO_CHECKSUM: checksum_of_bytes(audio)}
    # what is no UTF-8 of a file's name stands there as JSON writes it in ASCII
    note = json.dumps({**note, NOTE_CHECKSUM: checksum_of_note(note)}, ensure_ascii=False)
    return note.encode(errors='backslashreplace')
