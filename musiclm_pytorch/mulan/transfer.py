"""A MuLaN that begins with what fits of the weights of another one, such as one of another vocabulary."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_pytorch.mulan import checkpoint
from musiclm_pytorch.mulan.text_transformer import TextTransformer, known_ids

TOKENS, POSITIONS = 'text.token_emb.weight', 'text.pos_emb.weight'
MOST_NAMED = 8


@torch.no_grad()
def load_matching(mulan: nn.Module, folder: str | Path) -> list[str]:
    """Take over what fits of the MuLaN in `folder`; see `MuLaN.load_matching`."""
    config, weights = checkpoint.read_mulan(folder)
    rows = {
        TOKENS: partial(rows_of_tokens, mulan.text.config, config['text']),
        POSITIONS: lambda own, found: (torch.arange(min(len(own), len(found))),) * 2,
    }
    left, taken, total = [], 0, 0
    for name, own in mulan.named_parameters():
        name = name.replace('_orig_mod.', '')  # of torch.compile
        found = weights.pop(name, None)
        total += own.numel()
        if found is None:
            left.append(f'{name}, which is not there')
        elif own.shape == found.shape and name not in rows:
            own.copy_(found)
            taken += own.numel()
        elif name not in rows or own.shape[1:] != found.shape[1:]:
            left.append(f'{name} {tuple(own.shape)}, which is {tuple(found.shape)} there')
        else:
            with config.refused("'text' must hold the keywords of a TextTransformer", config['text']):
                here, there = rows[name](own, found)
                if name == TOKENS and len(here):
                    unite_records(mulan.text, config)
            own[here] = found[there].to(own)
            taken += own[here].numel()
            if missing := len(own) - len(here):
                left.append(f'{missing} of the {len(own)} rows of {name}')
    # buffers are computed from the config
    buffers = {name for name, _ in mulan.named_buffers()}
    left += [f'{name} of that model, which has no place here' for name in weights if name not in buffers]
    if left:
        more = f', and {len(left) - MOST_NAMED} more' if len(left) > MOST_NAMED else ''
        warnings.warn(
            f'{taken / total:.0%} of the weights come from {folder}; not {"; ".join(left[:MOST_NAMED])}{more}',
            stacklevel=4,  # past this function, no_grad, and the method
        )
    return left


def unite_records(text: TextTransformer, config: checkpoint.SavedConfig) -> None:
    """What was trained there is trained here, too; if nobody knows what that was, nobody knows it here."""
    theirs = config['text']
    theirs = known_ids(theirs['num_tokens'], theirs['known_tokens'], checkpoint.trained_tokens(config))
    known = text.trained_tokens is not None and theirs is not None
    text.trained_tokens = text.trained_tokens | theirs if known else None


def rows_of_tokens(here: dict[str, Any], there: dict[str, Any], *_: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the tokens that two text towers of these configs share, in either."""
    if here['num_tokens'] != there['num_tokens']:  # their ids are of different tokenizers
        return torch.arange(0), torch.arange(0)
    mine, others = (dict(rows_of(it)) for it in (here, there))
    shared = [token for token in mine if token in others]
    return torch.tensor([mine[it] for it in shared]), torch.tensor([others[it] for it in shared])


def rows_of(config: dict[str, Any]) -> Iterator[tuple[int | str, int]]:
    """Token and row of each embedding of a text tower; 'others' share one, where not all tokens are known."""
    known = config['known_tokens']
    if known is None:
        yield from ((token, token) for token in range(config['num_tokens']))
    else:
        yield from ((token, row) for row, token in enumerate(known))
        yield 'others', len(known)
