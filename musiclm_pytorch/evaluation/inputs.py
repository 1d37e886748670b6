"""What an evaluation is given, in the forms that users have it, and clips on their way: read ahead and embedded."""

from __future__ import annotations

import csv
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from musiclm_pytorch.checks import (
    as_tensor,
    check_audio,
    check_channels,
    check_choice,
    check_lengths,
    check_positive,
    check_sample_rate,
    described,
    is_finite,
    typechecked,
)
from musiclm_pytorch.data.audio import AudioFile, resample
from musiclm_pytorch.evaluation.embedders import Embedder, too_short
from musiclm_pytorch.evaluation.metric import EvaluationClip

logger = logging.getLogger(__name__)

# a sound file, which is mixed down to mono, or a wave `(samples,)` and its rate in Hz
Source: TypeAlias = str | Path | tuple[Tensor, int]


def list_clips(
    audio: Any, audio_lengths: Any = None, *, name: str = 'generated_audio', lengths: str = 'audio_lengths'
) -> list[Tensor | Path]:
    """A batch or a list of waves or sound files as a list of `(samples,)` float32 waves and paths.

    Args:
        audio: `(b, samples)` or `(b, channels, samples)`; or a list of waves `(samples,)`, `(1, samples)` or
            `(channels, samples)`, and of paths. Waves are tensors or numpy arrays. Several channels are mixed down.
        audio_lengths: `(b,)` true lengths in samples: what lies beyond is padding, and is cut off. Files have none.
        name, lengths: how errors call them.

    Raises:
        TypeError: anything but floating-point waves and paths. ValueError: an empty list, an empty wave, another shape,
            NaN or infinity, a length of 0 or beyond the wave. FileNotFoundError: a path without a file.
    """
    audio = as_tensor(audio)
    if isinstance(audio, Tensor):
        if audio.ndim not in (2, 3):
            hint = f'; for one wave pass {name}[None]' if audio.ndim == 1 else ''
            raise ValueError(f'{name} must have shape (batch, samples), got {tuple(audio.shape)}{hint}')
        audio = list(audio)
    if isinstance(audio, str | Path) or not isinstance(audio, Sequence):
        raise TypeError(f'{name} must be a batch (batch, samples) or a list of waves, got {type(audio).__name__}')
    if len(audio) == 0:
        raise ValueError(f'{name} is empty; pass at least one clip')
    if audio_lengths is None:
        return [check_clip(it, f'{name}[{index}]') for index, it in enumerate(audio)]
    if not isinstance(audio_lengths, Sequence | Tensor):
        raise TypeError(f'{lengths} must be a list of lengths in samples, one a clip, got {described(audio_lengths)}')
    if len(audio_lengths) != len(audio):
        raise ValueError(f'got {len(audio_lengths)} {lengths} for {len(audio)} clips in {name}; pass one a clip')
    return [check_clip(it, f'{name}[{index}]', audio_lengths[index]) for index, it in enumerate(audio)]


def check_clip(clip: Any, name: str, length: Any = None) -> Tensor | Path:
    """One of `list_clips`, cut to its length."""
    if isinstance(clip, str | Path):
        if length is not None:
            raise ValueError(f'{name} is a file, which tells its own length; leave out audio_lengths')
        if not Path(clip).is_file():
            raise FileNotFoundError(f'{name}: no file at {clip}')
        return Path(clip)
    clip = as_tensor(clip)
    if not isinstance(clip, Tensor):
        raise TypeError(f'{name} must be a wave (samples,) or the path of a file, got {type(clip).__name__}')
    check_channels(clip, name)
    check_audio(clip, ndim=clip.ndim, shape='(samples,)', name=name)
    if clip.numel() == 0:
        raise ValueError(f'{name} has no samples')
    wave = clip.detach().float().cpu()
    wave = wave if wave.ndim == 1 else wave.mean(dim=0)
    if length is not None:
        try:
            (length,) = check_lengths([length], batch=1, limit=len(wave), unit='samples', device=wave.device).tolist()
        except (TypeError, ValueError) as error:
            raise type(error)(f'{name}: {error}') from error
        wave = wave[:length]
    check_wave(wave, name)
    return wave


def read_clip(clip: Tensor | Path, sample_rate: int) -> tuple[Tensor, int]:
    """The wave `(samples,)` of a clip and its rate in Hz: that of the file, or `sample_rate`."""
    if isinstance(clip, Tensor):
        return clip, sample_rate
    wave, rate, name = read_source(clip, '')
    if len(wave) == 0:
        raise ValueError(f'{name} has no samples')
    return wave, rate


def read_source(source: Source, name: str) -> tuple[Tensor, int, str]:
    """The mono wave of a file, or of a pair of wave and rate which errors call `name`; its rate, and its name."""
    if isinstance(source, (str, Path)):
        with AudioFile(source) as file:
            wave, rate, name = file.read(0, len(file)), file.sample_rate, file.name
    else:
        if not isinstance(source, tuple) or len(source) != 2:
            raise TypeError(f'{name} must be a path or a pair of a wave and its rate, got {type(source).__name__}')
        wave, rate = source
        check_sample_rate(rate)
        check_audio(wave, ndim=1, shape='(samples,)', name=name)
    wave = wave.detach().float()
    check_wave(wave, name)
    return wave, rate, name


def check_wave(wave: Tensor, name: str) -> None:
    if not is_finite(wave):
        first = int((~torch.isfinite(wave)).nonzero()[0])
        raise ValueError(f'{name} holds NaN or infinity, first at sample {first}; mend it or leave the clip out')


def check_texts(texts: Any, clips: int) -> list[str]:
    """Texts as a list of `clips` strings that say something. Raises TypeError and ValueError."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(it, str) for it in texts):
        raise TypeError(f'texts must be a list of strings, one a clip, got {described(texts)}')
    if len(texts) != clips:
        raise ValueError(f'got {len(texts)} texts for {clips} generated clips; pass one text a clip')
    for index, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f'texts[{index}] is empty; every clip needs the text that it was made from')
    return list(texts)


def texts_by_file(content: Any, source: str) -> dict[str, str]:
    """The text of each file name in what a `prompts.json` holds.

    Args:
        content: for each file name its text; or an object that has it under `prompt`, beside what else made the piece,
            such as `seed`, `model`, `seconds` and `temperature`.
        source: what errors call it.

    Raises:
        ValueError: another form, naming the file it is wrong for.
    """
    if not isinstance(content, dict):
        raise ValueError(f'{source} must hold a text for each file name, got {content!r:.80}')
    texts = {name: it.get('prompt') if isinstance(it, dict) else it for name, it in content.items()}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(
                f'{source} must hold a text for {name}, or an object with the text under "prompt", for how well music '
                f'fits sounds, latents, mixtures and stories is not measured; got {content[name]!r:.80}'
            )
    return texts


# ---- clips on their way ----


class EmbeddedClip(NamedTuple):
    """One clip.

    index: its place among the sources, from 0, or the one of `indices`
    frames: by the name of an embedder, `(n, dim)` float32 on the CPU
    missing: by the name of an embedder, why there are no frames: the clip is too short for it
    """

    index: int
    frames: dict[str, Tensor]
    missing: dict[str, str]


@typechecked
def embed_clips(
    sources: Iterable[Source],
    embedders: Sequence[Embedder],
    *,
    batch_size: int = 16,
    prefetch: int = 2,
    indices: Iterable[int] | None = None,
) -> Iterator[EmbeddedClip]:
    """Embed clips, one after another in their order, by one or more embedders.

    A clip is read once and resampled to the rate of each embedder in a background thread, which is at most `prefetch`
    batches ahead; no more than `prefetch` + 1 batches of waves are in memory. `sources` may be a generator; it runs in
    that thread, too. Neighbours of one length share a batch best: sort the sources if their lengths differ a lot.

    Args:
        sources: paths of sound files, or pairs of a mono wave and its rate.
        embedders: with different names.
        batch_size: clips embedded at a time.
        prefetch: batches read ahead.
        indices: one a source, where these are a part of a set: what the clips and errors call them.

    Yields:
        an `EmbeddedClip` a source. A clip that is too short for an embedder has no frames by it, but a reason.

    Raises:
        ValueError: no embedders, two of one name; and, when it gets there, more or fewer indices than sources, a file
        that does not decode, NaN or infinity in samples or frames, and what an embedder cannot take, naming the clip
        (its file or index) and the embedder. FileNotFoundError. Whatever goes wrong in the thread reaches the caller.
    """
    check_positive(batch_size=batch_size, prefetch=prefetch)
    check_names([it.name for it in embedders])
    if not embedders:
        raise ValueError('embedders must be one or more of different names, got none')
    numbered = enumerate(sources) if indices is None else zip(indices, sources, strict=True)
    clips = evaluation_clips(((index, source, None) for index, source in numbered), embedders, batch_size, prefetch)
    return (EmbeddedClip(clip.index, dict(clip.frames), dict(clip.missing)) for clip in clips)


def check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f'embedders need names of their own, got {", ".join(names)}')


def evaluation_clips(
    sources: Iterable[tuple[int, Source, str | None]], embedders: Sequence[Embedder], batch_size: int, prefetch: int = 2
) -> Iterator[EvaluationClip]:
    """Clips with their waves and what each embedder gives, of indices, sources and texts; see `embed_clips`."""
    sources = iter(sources)
    rates = {embedder.sample_rate for embedder in embedders}

    def read() -> list[tuple[EvaluationClip, dict[int, Tensor]]]:
        batch = []
        for index, source, text in islice(sources, batch_size):
            wave, rate, name = read_source(source, f'clip {index}')
            by_rate = {to: resample(wave, rate, to) for to in rates}
            batch.append((EvaluationClip(index, name, wave, rate, text), by_rate))
        return batch

    reader = ThreadPoolExecutor(1, 'clip-reader')
    try:
        ahead = deque(reader.submit(read) for _ in range(prefetch))
        while batch := ahead.popleft().result():
            ahead.append(reader.submit(read))
            yield from embed_batch(batch, embedders)
    finally:
        reader.shutdown(cancel_futures=True)


def embed_batch(
    batch: list[tuple[EvaluationClip, dict[int, Tensor]]], embedders: Sequence[Embedder]
) -> Iterator[EvaluationClip]:
    """Clips with their frames, from their waves by rate. What goes wrong names the clip and the embedder."""
    frames: list[dict[str, Tensor]] = [{} for _ in batch]
    missing: list[dict[str, str]] = [{} for _ in batch]
    for embedder in embedders:
        waves = {place: waves[embedder.sample_rate] for place, (_, waves) in enumerate(batch)}
        fits = {place: wave for place, wave in waves.items() if len(wave) >= embedder.min_samples}
        for place in waves.keys() - fits.keys():
            missing[place][embedder.name] = too_short(embedder, len(waves[place]))
        try:
            found = embedder.embed(list(fits.values()))
        except ValueError as error:
            # in a batch, the error tells at best the place: each alone tells which clip it was
            if len(batch) > 1:
                for one in batch:
                    list(embed_batch([one], [embedder]))
            names = ', '.join(batch[place][0].name for place in fits)
            raise ValueError(f'{names}: {embedder.name} cannot embed it: {error}') from error
        for place, own in zip(fits, found):
            if not is_finite(own):
                raise ValueError(
                    f'{batch[place][0].name}: {embedder.name} gives NaN or infinity for it; are its samples within '
                    '[-1, 1]?'
                )
            frames[place][embedder.name] = own
    for (clip, _), own, without in zip(batch, frames, missing):
        yield replace(clip, frames=own, missing=without)


# ---- MagnaTagATune (Law et al., 2009): clips with the tags that people gave them ----

# the 50 tags that most clips have, in that order
TOP_TAGS = (
    *('guitar', 'classical', 'slow', 'techno', 'strings', 'drums', 'electronic', 'rock', 'fast', 'piano', 'ambient'),
    *('beat', 'violin', 'vocal', 'synth', 'female', 'indian', 'opera', 'male', 'singing', 'vocals', 'no vocals'),
    *('harpsichord', 'loud', 'quiet', 'flute', 'woman', 'male vocal', 'no vocal', 'pop', 'soft', 'sitar', 'solo'),
    *('man', 'classic', 'choir', 'voice', 'new age', 'dance', 'male voice', 'female vocal', 'beats', 'harp', 'cello'),
    *('no voice', 'weird', 'country', 'metal', 'female voice', 'choral'),
)
# the usual split, by the folder that a clip lies in
SPLITS = dict(train='0123456789ab', valid='c', test='def')
ID, PATH = 'clip_id', 'mp3_path'


class MagnaTagATune(NamedTuple):
    """Clips of a split.

    paths: `n` of the sound files
    tags: the names of the columns of `truth`
    truth: `(n, tags)` bool, whether a clip has a tag
    """

    paths: list[Path]
    tags: tuple[str, ...]
    truth: np.ndarray


@typechecked
def read_magnatagatune(
    annotations: str | Path,
    folder: str | Path | None = None,
    split: str = 'test',
    *,
    tags: Sequence[str] = TOP_TAGS,
    untagged: bool = True,
) -> MagnaTagATune:
    """The clips of a split, in the order of the file.

    The split is the usual one by folders: 0 to b are for training, c for validation, d to f for the test.

    Args:
        annotations: MagnaTagATune's `annotations_final.csv`: columns parted by tabs, `clip_id`, one a tag with 0 or 1,
            and last `mp3_path`.
        folder: what the paths in it, such as `f/some-piece.mp3`, lie in. Then each file must be there; the empty ones
            (three clips are, all of them for training) are left out. Without, the paths stay as they are and nothing
            is looked at.
        split: 'train', 'valid' or 'test'.
        tags: those asked for, by default the 50 most frequent ones that papers measure.
        untagged: keep clips that have none of the tags. Papers differ here; both are in use.

    Raises:
        FileNotFoundError: no such annotations, or a clip that is not in `folder`. ValueError: an unknown split, a file
        that is not like that, or a split without clips.
    """
    check_choice(SPLITS, split=split)
    if isinstance(tags, str) or not tags:
        raise ValueError(f'tags must be a list of names, got {tags!r}')
    if not Path(annotations).is_file():
        raise FileNotFoundError(
            f"no file at {annotations}; it should be MagnaTagATune's annotations_final.csv, which is downloaded apart "
            'from the audio'
        )
    paths, rows = [], []
    for path, truth in read_rows(Path(annotations), tags):
        if path.parts[0] not in SPLITS[split] or not (untagged or any(truth)):
            continue
        if folder is not None:
            path = Path(folder) / path
            if not path.is_file():
                raise FileNotFoundError(
                    f'{annotations} names {path}, which is not there; pass the folder that holds the folders 0 to f'
                )
            if path.stat().st_size == 0:
                logger.warning('left out %s, which is empty', path)
                continue
        paths.append(path)
        rows.append(truth)
    if not paths:
        raise ValueError(f'{annotations} has no clip of the split {split!r}; is it the whole annotations_final.csv?')
    return MagnaTagATune(paths, tuple(tags), np.array(rows, dtype=bool))


def read_rows(annotations: Path, tags: Sequence[str]) -> Iterator[tuple[Path, list[bool]]]:
    """The path and the truth of each clip."""
    hint = "; it should be MagnaTagATune's annotations_final.csv, unchanged"
    with open(annotations, newline='', encoding='utf-8') as file:
        table = csv.reader(file, delimiter='\t')
        try:
            header = next(table, [])
            if len(header) < 3 or (header[0], header[-1]) != (ID, PATH):
                raise ValueError(f'{annotations} has no columns {ID} … {PATH}, parted by tabs{hint}')
            if missing := [tag for tag in tags if tag not in header[1:-1]]:
                raise ValueError(f'{annotations} has no column for the tags {", ".join(map(repr, missing))}{hint}')
            places = [header.index(tag) for tag in tags]
            for row in table:
                where = f'line {table.line_num} of {annotations}'
                if len(row) != len(header):
                    raise ValueError(f'{where} has {len(row)} columns, not {len(header)}{hint}')
                if wrong := [row[place] for place in places if row[place] not in ('0', '1')]:
                    raise ValueError(f'{where} has {wrong[0]!r} in the column of a tag, not 0 or 1{hint}')
                path = Path(row[-1])
                # a path out of the folder would read any file
                if len(path.parts) != 2 or path.parts[0] not in (*''.join(SPLITS.values()),):
                    raise ValueError(f'{where} has the path {row[-1]!r}, not one in the folders 0 to f{hint}')
                yield path, [row[place] == '1' for place in places]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f'{annotations} cannot be read as a table: {error}{hint}') from error
