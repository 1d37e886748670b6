"""Items of pairs to batches for MuLaN."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from musiclm_pytorch.checks import check_channels

logger = logging.getLogger(__name__)

WAVE_KEYS = ('wavs', 'wave', 'audio')
ID_KEYS = ('texts', 'ids')
STRING_KEYS = ('raw_texts', 'caption')


def collate_pairs(items: Sequence[Any], *, max_length: int | None = None, pad_id: int = 0) -> dict[str, Any] | None:
    """Pad items to a batch for `mulan(**batch)`.

    An item is a pair of wave and text in either order, told apart by type, or a dict with a wave under `wavs`, `wave`
    or `audio` and a text under `texts`, `ids`, `raw_texts` or `caption` (other keys are left alone). A wave is a
    floating-point tensor or array `(samples,)` or `(channels, samples)`, which is mixed down. A text is a string, or
    integer token ids `(tokens,)`, `(1, tokens)` or a list. Waves, strings or ids alone, outside of any tuple, make a
    batch of just these.

    Items that are None, as a data set gives for what it cannot read, are dropped, and their number is logged.

    Args:
        max_length: cut longer waves to this many samples. Texts are never cut.
        pad_id: what token ids are padded with: the `pad_id` of the text tower, which masks it.

    Returns:
        `wavs (b, samples)` float32, padded with zeros, `audio_lengths (b,)` int64, and either `raw_texts`, a list of
        `b` strings, or `texts (b, tokens)` int64. None if every item is None: there is no batch to compute.

    Raises:
        TypeError: an item that is neither, with its index and types. ValueError: an empty wave or one of a wrong
        shape; no items at all.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f'max_length must be at least 1 sample, got {max_length}')
    if len(items) == 0:
        raise ValueError('there are no items to collate')
    pairs = [(index, *split_item(item, f'item {index}')) for index, item in enumerate(items) if item is not None]
    if len(pairs) < len(items):
        logger.warning(
            'dropped %d of the %d items of a batch, which could not be read', len(items) - len(pairs), len(items)
        )
    if not pairs:
        return None

    first_of = {}
    for index, wave, text in pairs:
        of_text = [] if text is None else ['a string' if isinstance(text, str) else 'token ids']
        parts = [*(['a wave'] if wave is not None else []), *of_text]
        first_of.setdefault(' and '.join(parts), index)
    if len(first_of) > 1:
        found = [f'item {index} has {parts}' for parts, index in first_of.items()]
        raise TypeError(f'the items of a batch must be alike, but {", ".join(found)}')

    indices, waves, texts = zip(*pairs)
    batch = {}
    if waves[0] is not None:
        waves = [mono(wave, f'item {index}')[:max_length] for index, wave in zip(indices, waves)]
        batch['wavs'] = pad_sequence(waves, batch_first=True)
        batch['audio_lengths'] = torch.tensor([len(wave) for wave in waves])
    if isinstance(texts[0], str):
        batch['raw_texts'] = list(texts)
    elif texts[0] is not None:
        batch['texts'] = pad_sequence(texts, batch_first=True, padding_value=pad_id)
    return batch


def collate_for(items: list[Any], *, max_length: int | None, pad_id: int, with_lengths: bool) -> dict[str, Any] | None:
    """A batch for `mulan.pair_latents`, see `collate_pairs`; a module's function, so that workers can be sent it."""
    batch = collate_pairs(items, max_length=max_length, pad_id=pad_id)
    if batch is None or with_lengths:
        return batch
    # a tower without lengths can only be given what all items have
    lengths = batch.pop('audio_lengths')
    return batch | dict(wavs=batch['wavs'][:, : int(lengths.min())])


def split_item(item: Any, name: str) -> tuple[Tensor | None, str | Tensor | None]:
    """Wave and text of an item: a floating-point tensor, and a string or int64 ids `(tokens,)`.

    One of them is None for an item that is not a pair. Raises TypeError, starting with `name`, as `collate_pairs`.
    """
    if isinstance(item, Mapping):
        return split_mapping(item, name)
    if not isinstance(item, (tuple, list)) or is_list_of_ints(item):
        kind, value = classify(item, name)
        return (value, None) if kind == 'wave' else (None, value)
    parts = [classify(part, f'{name}, element {place},') for place, part in enumerate(item)]
    kinds = [kind for kind, _ in parts]
    if len(parts) != 2 or kinds.count('wave') != 1:
        hint = PCM_HINT if 'wave' not in kinds and 'ids' in kinds else ''
        got = ', '.join(describe(part) for part in item) or 'nothing'
        raise TypeError(f'{name} must be one wave and one text, got {got}{hint}')
    (wave,) = (value for kind, value in parts if kind == 'wave')
    (text,) = (value for kind, value in parts if kind != 'wave')
    return wave, text


def split_mapping(item: Mapping, name: str) -> tuple[Tensor, str | Tensor]:
    found = []
    for keys_of in ({'wave': WAVE_KEYS}, {'ids': ID_KEYS, 'string': STRING_KEYS}):
        given = [(kind, key) for kind, keys in keys_of.items() for key in keys if item.get(key) is not None]
        if len(given) != 1:
            keys = ', '.join(key for keys in keys_of.values() for key in keys)
            raise TypeError(f'{name} must have exactly one of {keys}, but its keys are {", ".join(map(str, item))}')
        ((wanted, key),) = given
        kind, value = classify(item[key], f'{name}[{key!r}]')
        if kind != wanted:
            hint = PCM_HINT if (wanted, kind) == ('wave', 'ids') else ''
            raise TypeError(f'{name}[{key!r}] must be {NAMES[wanted]}, got {describe(item[key])}{hint}')
        found.append(value)
    return found[0], found[1]


NAMES = {'wave': 'a floating-point wave', 'ids': 'integer token ids', 'string': 'a string'}
PCM_HINT = '; integer PCM must be converted first, for 16 bits: wave / 32768'


def classify(value: Any, name: str) -> tuple[str, Any]:
    """Tell wave, token ids and string apart, and bring them into one form."""
    if isinstance(value, str):
        return 'string', value
    if is_list_of_ints(value):
        value = torch.tensor(value, dtype=torch.long)
    if isinstance(value, np.ndarray) and value.dtype.kind in 'fiu':
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor) and value.is_floating_point():
        return 'wave', value
    if isinstance(value, Tensor) and value.dtype != torch.bool and not value.is_complex():
        if value.ndim == 2 and len(value) == 1:
            value = value[0]
        if value.ndim != 1:
            raise TypeError(f'{name} must hold token ids of shape (tokens,), got {describe(value)}{PCM_HINT}')
        return 'ids', value.long()
    raise TypeError(
        f'{name} must be a wave (floating-point tensor), token ids (integer tensor) or a string, got {describe(value)}'
    )


def mono(wave: Tensor, name: str) -> Tensor:
    """`(samples,)`, `(1, samples)` or `(channels, samples)` of any floating-point type to `(samples,)` float32."""
    check_channels(wave, f'{name}: wave')
    if wave.numel() == 0:
        raise ValueError(f'{name}: the wave is empty, of shape {tuple(wave.shape)}; give None for what cannot be read')
    wave = wave.float()
    return wave if wave.ndim == 1 else wave.mean(dim=0)


def read_item(item: Any, name: str) -> tuple[Tensor, str | Tensor | None] | None:
    """The wave of an item as `mono` gives it, and its text, if it has one; None for what could not be read.

    Raises TypeError for an item without a wave, and as `split_item`.
    """
    if item is None:
        return None
    wave, text = split_item(item, name)
    if wave is None:
        raise TypeError(f'{name} must be a wave or a pair of wave and text, got {describe(item)}')
    return mono(wave, name), text


def is_list_of_ints(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(it, (int, np.integer)) and not isinstance(it, bool) for it in value)
    )


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f'{value.dtype} of shape {tuple(value.shape)}'
    if isinstance(value, np.ndarray):
        return f'numpy {value.dtype} of shape {value.shape}'
    return type(value).__name__
