"""The tokens of a data set, computed once and kept on disk, so that a step of a stage costs its transformer alone.

A cache is a folder with one folder a stream: `semantic` ids, `codec` ids, MuLaN's codes of the `audio` and of the
`text`, codes of the `melody`, and the `words` of the text as a text encoder's ids. Each stream holds what it was
computed with and from, and its shards:

    tokens/codec/stream.json
    tokens/codec/00000.safetensors    values (frames, q), ends (items,): where each item's frames end

So another codec, for instance, leaves the semantic ids as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from musiclm_pytorch.atomic import free_name, read_checked_json, write_checked_json, write_tensors
from musiclm_pytorch.audiolm.convert import own_codec, own_tokenizer
from musiclm_pytorch.audiolm.fingerprints import differences, fingerprint, fingerprint_data
from musiclm_pytorch.checks import check_choice, check_positive, fitted, typechecked
from musiclm_pytorch.data.audio import batches_by_length, resample
from musiclm_pytorch.data.collate import read_item
from musiclm_pytorch.data.rates import agreed_rate
from musiclm_pytorch.locking import only_writer
from musiclm_pytorch.mulan.model import evaluating
from musiclm_pytorch.mulan.pretrained import cut

logger = logging.getLogger(__name__)

STREAM_FILE = 'stream.json'
SHARD = '{:05d}.safetensors'
POLL = 0.05  # seconds between two looks at what another process moves aside
CONTEXT_SECONDS = 1.0  # on both sides of a window of long audio, so that its edges are tokenized as its middle is
SIZES = ('quantizers', 'codebook_size')
FACTS = dict(semantic=(*SIZES, 'rate'), codec=(*SIZES, 'rate'), audio=(*SIZES, 'seconds', 'hop'), text=SIZES)
FACTS |= dict(melody=(*SIZES, 'rate'), words=SIZES)
ON_CHANGE = ('error', 'aside')


class Item(NamedTuple):
    """What can be read of an item of the data set."""

    wave: Tensor  # (samples,)
    text: str | Tensor | None


@dataclass
class Stream:
    """One kind of tokens: how they are computed, and what is to be known of them."""

    name: str
    compute: Callable[[list[Item]], list[Tensor]]  # each (frames, q)
    facts: dict[str, Any]  # JSON
    fingerprint: dict[str, str]


@typechecked
def compute_tokens(
    dataset: Any,
    folder: str | Path,
    *,
    tokenizer: nn.Module | None = None,
    codec: nn.Module | None = None,
    quantizer: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
    sample_rate: int | None = None,
    texts: bool = True,
    batch_size: int = 8,
    shard_size: int = 256,
    window_seconds: float = 30.0,
    mulan_seconds: float = 10.0,
    mulan_hop: float = 5.0,
    on_change: str = 'error',
    progress: bool = True,
    share: tuple[int, int] = (0, 1),
) -> Path:
    """Compute the tokens of a data set, or what is missing of them: interrupted, the same call goes on where it was.

    Args:
        dataset: items by index as `collate_pairs` takes them, the same at each visit: whole clips, not random crops.
        folder: the cache; several calls may fill its streams, with the same data set, at the same time too if each
            fills streams of its own.
        tokenizer: a `Tokenizer`, or `HubertWithKmeans` of audiolm-pytorch.
        codec: a `Codec`, or `SoundStream` or `EncodecWrapper` of audiolm-pytorch.
        quantizer: a fitted `MuLaNEmbedQuantizer`; gives codes of windows of the audio and, with `texts`, of the texts,
            and with a melody those of melodies.
        text_encoder: a `PretrainedTextTransformer`, such as a T5; gives the ids of the texts' tokens.
        sample_rate: of the waves in Hz; by default the data set's `sample_rate`. Each module gets its own rate.
        batch_size: waves of equal length computed at a time.
        shard_size: items of the data set a shard.
        window_seconds: longer audio is tokenized piece by piece, with context on both sides.
        mulan_seconds, mulan_hop: length of MuLaN's windows and distance between two.
        on_change: what to do about a stream that was computed with another module, of other data, or with other
            settings: 'error', or 'aside', which moves it to a folder beside it and begins anew.
        progress: show a progress bar.
        share: number of this process, from 0 on, and that of all processes that compute these tokens together, such as
            those of torchrun. Each computes its share of the shards, and returns when that is there; they need not run
            at the same time, and any number of them may go on where others were.

    Returns:
        the folder.

    Raises:
        ValueError: nothing to compute, settings that do not fit, or a stream that differs, naming what changed.
        FolderInUseError: another call fills one of the streams.
    """
    check_positive(
        batch_size=batch_size,
        shard_size=shard_size,
        window_seconds=window_seconds,
        mulan_seconds=mulan_seconds,
        mulan_hop=mulan_hop,
    )
    check_choice(ON_CHANGE, on_change=on_change)
    if getattr(dataset, 'training', False):
        raise ValueError(
            f'this {type(dataset).__name__} draws crops at random; tokens are computed once: pass '
            'dataset.validation(), built with max_seconds=None for whole clips'
        )
    rank, processes = share
    if not 0 <= rank < processes:
        raise ValueError(f'share must be the number of a process, from 0 on, and that of all of them, got {share}')
    rate = agreed_rate(dataset, sample_rate)
    if len(dataset) == 0:
        raise ValueError('the data set is empty')

    streams = []
    if tokenizer is not None:
        streams.append(_semantic_stream(tokenizer, rate, batch_size, window_seconds))
    if codec is not None:
        streams.append(_codec_stream(codec, rate, batch_size, window_seconds))
    if quantizer is not None:
        streams.append(_audio_stream(quantizer, rate, batch_size, mulan_seconds, mulan_hop))
        if texts:
            streams.append(_text_stream(quantizer, batch_size))
        if quantizer.melody is not None:
            streams.append(_melody_stream(quantizer.melody, rate, batch_size))
    if text_encoder is not None:
        streams.append(_words_stream(text_encoder))
    if not streams:
        raise ValueError('nothing to compute: pass a tokenizer, a codec, a quantizer or a text_encoder')

    folder = Path(folder)
    data = fingerprint_data(dataset) | dict(sample_rate=rate)
    with ExitStack() as stack:
        for stream in streams if rank == 0 else ():  # the first process keeps other runs out
            stack.enter_context(only_writer(folder / stream.name))
        for stream in streams:
            _open_stream(folder / stream.name, stream, data, len(dataset), shard_size, on_change, first=rank == 0)
        shards = range(math.ceil(len(dataset) / shard_size))
        for number in tqdm(shards[rank::processes], disable=not progress or rank > 0, unit='shard', desc='tokens'):
            indices = range(number * shard_size, min((number + 1) * shard_size, len(dataset)))
            _compute_shard(dataset, indices, folder, number, streams)
    return folder


def _compute_shard(dataset: Any, indices: range, folder: Path, number: int, streams: list[Stream]) -> None:
    missing = [stream for stream in streams if not _is_whole(folder / stream.name / SHARD.format(number))]
    if not missing:
        return
    items = [read_item(dataset[index], f'item {index}') for index in indices]
    readable = [Item(*item) for item in items if item is not None]
    for stream in missing:
        with torch.no_grad():
            computed = iter(stream.compute(readable))
        rows = [None if item is None else next(computed) for item in items]
        path = folder / stream.name / SHARD.format(number)
        _write_shard(path, rows, stream.facts, shard_identity(read_stream(path.parent), number))


# ---- what each stream computes ----


def _semantic_stream(tokenizer: nn.Module, rate: int, batch_size: int, window_seconds: float) -> Stream:
    own, groups = own_tokenizer(tokenizer), getattr(tokenizer, 'groups', 1)
    frame_rate = own.frame_rate / groups

    def encode(waves: Tensor) -> Tensor:
        return rearrange(own.encode(waves), 'b (n g) -> b n g', g=groups)

    return Stream(
        'semantic',
        lambda items: _tokenize(items, own, encode, rate, frame_rate, batch_size, window_seconds),
        dict(rate=str(frame_rate), quantizers=groups, codebook_size=own.codebook_size),
        fingerprint(_initialised(tokenizer)),
    )


def _codec_stream(codec: nn.Module, rate: int, batch_size: int, window_seconds: float) -> Stream:
    own = own_codec(codec)
    return Stream(
        'codec',
        lambda items: _tokenize(items, own, own.encode, rate, own.frame_rate, batch_size, window_seconds),
        dict(rate=str(own.frame_rate), quantizers=own.num_quantizers, codebook_size=own.codebook_size),
        fingerprint(_initialised(codec)),
    )


def _audio_stream(quantizer: nn.Module, rate: int, batch_size: int, seconds: float, hop: float) -> Stream:
    def compute(items: list[Item]) -> list[Tensor]:
        pieces, counts = cut([item.wave for item in items], round(seconds * rate), round(hop * rate))

        def codes(waves: Tensor) -> Tensor:
            return quantizer.indices(waves, sample_rate=rate)

        with evaluating(quantizer):
            found = iter(_in_batches(pieces, codes, batch_size, quantizer.device))
        return [torch.stack([next(found) for _ in range(count)]) for count in counts]

    facts = dict(seconds=seconds, hop=hop, quantizers=quantizer.num_codebooks, codebook_size=quantizer.codebook_size)
    return Stream('audio', compute, facts, fingerprint(quantizer))


def _text_stream(quantizer: nn.Module, batch_size: int) -> Stream:
    def compute(items: list[Item]) -> list[Tensor]:
        if any(item.text is None for item in items):
            raise ValueError('the data set gives waves without texts; pass texts=False')
        found = []
        with evaluating(quantizer):
            for start in range(0, len(items), batch_size):
                texts = [item.text for item in items[start : start + batch_size]]
                if isinstance(texts[0], str):
                    found.append(quantizer.indices(raw_texts=texts))
                else:
                    found += [quantizer.indices(texts=ids[None].to(quantizer.device)) for ids in texts]
        return list(rearrange(torch.cat(found), 'b q -> b 1 q')) if found else []

    facts = dict(quantizers=quantizer.num_codebooks, codebook_size=quantizer.codebook_size)
    return Stream('text', compute, facts, fingerprint(quantizer))


def _words_stream(encoder: nn.Module) -> Stream:
    def compute(items: list[Item]) -> list[Tensor]:
        if any(not isinstance(item.text, str) for item in items):
            raise ValueError('the data set gives waves without texts in words, which a text_encoder reads')
        return [rearrange(encoder.tokenize([item.text]), '1 n -> n 1').cpu() for item in items]

    return Stream('words', compute, dict(quantizers=1, codebook_size=encoder.num_tokens), fingerprint(encoder))


def _melody_stream(melody: nn.Module, rate: int, batch_size: int) -> Stream:
    def compute(items: list[Item]) -> list[Tensor]:
        codes = partial(melody, sample_rate=rate)
        return _in_batches([item.wave for item in items], codes, batch_size, _device_of(melody))

    facts = dict(rate=str(melody.rate), quantizers=melody.num_quantizers)
    return Stream('melody', compute, facts | dict(codebook_size=melody.codebook_size), fingerprint(melody))


def _initialised(module: nn.Module) -> nn.Module:
    """Raises ValueError for a module with codebooks that are still to be made."""
    if not all(bool(it.all()) for name, it in module.named_buffers() if name.endswith('initted')):
        # in eval mode too, vector-quantize-pytorch would make them of the first batch that comes
        raise ValueError(
            f'this {type(module).__name__} has codebooks that no training has reached yet; train it, or load '
            'its weights'
        )
    return module


def _tokenize(
    items: list[Item],
    module: nn.Module,
    call: Callable[[Tensor], Tensor],
    rate: int,
    frame_rate: Fraction,
    batch_size: int,
    window_seconds: float,
) -> list[Tensor]:
    """`(frames, q)` ids of each item."""
    own_rate, factor = module.sample_rate, int(module.sample_rate / frame_rate)
    waves = [resample(item.wave, rate, own_rate) for item in items]
    window = max(1, round(window_seconds * own_rate / factor))  # in frames
    context = round(CONTEXT_SECONDS * own_rate / factor)
    pieces, kept = [], []
    for number, wave in enumerate(waves):
        frames = len(wave) // factor
        for start in range(0, max(1, frames), window):
            stop = start + window
            if stop + context >= frames:  # what would be left is too little to stand alone
                stop = frames
            before, after = max(0, start - context), stop + context
            # a module may give a frame more or less at the end of the audio than the audio is long: that counts
            last = stop == frames
            pieces.append(wave[before * factor :] if last else wave[before * factor : after * factor])
            kept.append((number, slice(start - before, None if last else stop - before)))
            if last:
                break
    with evaluating(module):
        found = _in_batches(pieces, call, batch_size, _device_of(module))
    rows: list[list[Tensor]] = [[] for _ in waves]
    for ids, (number, part) in zip(found, kept):
        rows[number].append(ids[part])
    return [torch.cat(row) for row in rows]


def _in_batches(
    waves: list[Tensor], call: Callable[[Tensor], Tensor], batch_size: int, device: torch.device
) -> list[Tensor]:
    """A call's result for each wave; only waves of one length are computed together, so nothing is padded."""
    results: dict[int, Tensor] = {}
    for chosen in batches_by_length(waves, batch_size, mixed=False):
        results |= zip(chosen, call(torch.stack([waves[i] for i in chosen]).to(device)).cpu())
    return [results[index] for index in range(len(waves))]


def _device_of(module: nn.Module) -> torch.device:
    tensor = next((it for them in (module.parameters(), module.buffers()) for it in them), None)
    return torch.device('cpu') if tensor is None else tensor.device


# ---- on disk ----


def _open_stream(
    folder: Path, stream: Stream, data: dict[str, Any], items: int, shard_size: int, on_change: str, *, first: bool
) -> None:
    """Make the folder of a stream, or see that what is there is of the same stream. Of several processes the `first`
    moves another one aside, which the others wait for."""
    own = dict(
        stream=stream.name,
        facts=stream.facts,
        module=stream.fingerprint,
        data=data,
        items=items,
        shard_size=shard_size,
    )
    changed = _changes(folder, own)
    if changed == []:
        return
    if changed and on_change == 'error':
        raise ValueError(
            f"{folder} holds tokens of something else: {'; '.join(changed)}. Give another folder, or on_change='aside'"
        )
    while changed and not first:
        time.sleep(POLL)
        changed = _changes(folder, own)
    if changed:
        target = free_name(folder)
        folder.rename(target)
        logger.warning('%s held tokens of something else (%s); they are now in %s', folder, '; '.join(changed), target)
    folder.mkdir(parents=True, exist_ok=True)
    write_checked_json(folder / STREAM_FILE, own)


def _changes(folder: Path, own: dict[str, Any]) -> list[str] | None:
    """In what the stream in a folder differs from another; None if there is none, or it is just being moved aside."""
    try:
        return differences(read_stream(folder), own)
    except FileNotFoundError:
        return None


def read_stream(folder: Path) -> dict[str, Any]:
    """What is known of a stream. Raises FileNotFoundError if there is none, ValueError if it is damaged."""
    path = folder / STREAM_FILE
    if not path.is_file():
        raise FileNotFoundError(f'no {folder.name} tokens in {folder.parent}; compute them with compute_tokens')
    remedy = f'remove {folder} and compute its tokens again'
    try:
        about = read_checked_json(path)
    except ValueError as error:
        raise ValueError(f'{error}; {remedy}') from error
    try:
        kinds = dict(stream=str, facts=dict, module=dict, data=dict, items=int, shard_size=int)
        about = {**about, **{key: fitted(about[key], kind, key) for key, kind in kinds.items()}}
        facts = about['facts']
        kinds = dict(quantizers=int, codebook_size=int, rate=str, seconds=float, hop=float)
        if missing := [key for key in FACTS.get(folder.name, ()) if key not in facts]:
            raise KeyError(f'facts.{missing[0]}')
        numbers = {key: fitted(facts[key], kind, f'facts.{key}') for key, kind in kinds.items() if key in facts}
        numbers |= dict(items=about['items'], shard_size=about['shard_size'])
        if 'rate' in numbers:
            numbers['rate'] = float(Fraction(numbers['rate']))
        check_positive(**numbers)
    except KeyError as error:
        raise ValueError(f'{path} has no {error}; {remedy}') from error
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f'{path} holds what no stream has: {error}; {remedy}') from error
    return about


def shard_identity(about: dict[str, Any], number: int) -> str:
    """What a shard is part of, so that none passes for another one."""
    return f'{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]} {number}'


def _write_shard(path: Path, rows: list[Tensor | None], facts: dict[str, Any], part_of: str) -> None:
    """An item that could not be read has no frames."""
    quantizers = facts['quantizers']
    empty = torch.empty(0, quantizers, dtype=torch.int64)
    rows = [empty if row is None else row for row in rows]
    values = torch.cat(rows)
    if values.shape[1] != quantizers:
        raise ValueError(f'{path.parent.name} tokens must have {quantizers} quantizers, got {values.shape[1]}')
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < facts['codebook_size']:
        raise ValueError(
            f'{path.parent.name} tokens lie between {int(values.min())} and {int(values.max())}, outside of the '
            f'codebook of {facts["codebook_size"]}'
        )
    kind = torch.int16 if facts['codebook_size'] <= 2**15 else torch.int32
    ends = torch.tensor([len(row) for row in rows]).cumsum(0)
    write_tensors(path, dict(values=values.to(kind).contiguous(), ends=ends), part_of)


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(str(path), 'pt') as file:
            return {*file.keys()} == {'values', 'ends'}
    except SafetensorError as error:
        logger.warning('%s is damaged (%s); it is computed again', path, error)
        return False
