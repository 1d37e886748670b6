"""What tokens were computed with and from, in a few short hashes that can be compared and say what changed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_pytorch.data.collate import split_item

PLAIN = (bool, int, float, str)
# what training the stages changes of a quantizer, and what says how it is used rather than what it computes
CHANGING = (
    *('cond_embeddings', 'conditioning_dims', 'namespaces', 'cond_drop_prob', 'melody', 'melody_embedding'),
    *('training', 'warned', 'frozen', 'source', 'name_or_path'),
)
PROBES = 4  # items of a data set that are looked at


def fingerprint(module: nn.Module) -> dict[str, str]:
    """The kind of a module, and hashes of its weights and of its settings, as far as they are plain attributes.

    The conditioning embeddings of a quantizer do not count, nor does its melody: its codes are the same without them.
    Nor does what a module names in `BESIDE_CODES`, such as a codec's decoder.
    """
    changing = (*CHANGING, *getattr(module, 'BESIDE_CODES', ()))
    weights = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.split('.')[0] not in changing:
            weights.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}'.encode())
            weights.update(_bytes(tensor))
    settings = [
        f'{name}.{key}={value!r}'
        for name, child in module.named_modules()
        for key, value in sorted(vars(child).items())
        if not key.startswith('_') and not {key, name.split('.')[0]} & {*changing} and _is_plain(value)
    ]
    return dict(kind=type(module).__name__, weights=weights.hexdigest()[:16], settings=_hash('\n'.join(settings)))


def fingerprint_data(dataset: Any) -> dict[str, Any]:
    """The kind and the settings of a data set, its clips by name, and the content of a few items.

    Raises ValueError if an item is another one at a second visit.
    """
    found: dict[str, Any] = dict(kind=type(dataset).__name__)
    for key, value in sorted(getattr(dataset, '__dict__', {}).items()):
        if not key.startswith('_') and key not in CHANGING and _is_plain(value):
            found[key] = list(value) if isinstance(value, tuple) else value
    clips = getattr(dataset, 'clips', None)
    if clips is not None:
        found['clips'] = _hash('\n'.join(f'{it.name} {it.start} {it.end} {it.captions}' for it in clips))
    probed = sorted({round(part * (len(dataset) - 1) / (PROBES - 1)) for part in range(PROBES)})
    hashes = [_hash_item(dataset, index) for index in probed]
    if _hash_item(dataset, probed[0]) != hashes[0]:
        raise ValueError(
            f'item {probed[0]} of this {type(dataset).__name__} is another one at each visit; tokens are computed '
            'once, so pass a data set without randomness'
        )
    found['content'] = _hash(' '.join(hashes))
    return found


def differences(saved: Any, own: Any, name: str = '') -> list[str]:
    """Where two trees of plain facts differ, but for the version of the package that wrote them."""
    if isinstance(saved, dict) and isinstance(own, dict):
        keys = sorted({*saved, *own} - {'version'})
        return [it for key in keys for it in differences(saved.get(key), own.get(key), f'{name}.{key}'.lstrip('.'))]
    return [] if saved == own else [f'{name} was {saved!r:.60} and is {own!r:.60} now']


def _hash_item(dataset: Any, index: int) -> str:
    item = dataset[index]
    if item is None:
        return 'unreadable'
    wave, text = split_item(item, f'item {index}')
    parts = [_bytes(it) if isinstance(it, Tensor) else str(it).encode() for it in (wave, text)]
    return hashlib.sha256(b'|'.join(parts)).hexdigest()


def _is_plain(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) in (tuple, list) and all(type(it) in PLAIN for it in value))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _hash(text: str) -> str:
    # the names of files need not be UTF-8
    return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]
