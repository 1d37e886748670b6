"""Token ids of a text with and without the start and end tokens that open_clip's tokenizer puts around them.

Both tokenizers have CLIP's byte-pair encoding and give the same ids. x-clip's, which MuLaN reads, gives these alone
(bare); open_clip's puts a start token in front and an end token behind (framed).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_pytorch.checks import values_can_be_checked

START, END = 49406, 49407


def bare(ids: Tensor, pad_id: int) -> Tensor:
    """Ids `(b, n)` without start and end tokens, `(b, m)`; rows that begin with no start token are as before.

    What follows an end token is padding, with whatever it was padded. Columns that are padding in all rows are cut.
    """
    ids = ids.long()
    places = torch.arange(ids.shape[1], device=ids.device)
    is_framed = ids[:, :1] == START
    # the last end token closes the text; without one, as after a careless cut, all of the row is text
    ends = torch.where(ids == END, places, -1).amax(dim=1, keepdim=True)
    ends = torch.where(ends < 0, ids.shape[1], ends)
    shifted = F.pad(ids[:, 1:], (0, 1), value=pad_id).masked_fill(places >= ends - 1, pad_id)
    ids = torch.where(is_framed, shifted, ids)
    if not values_can_be_checked():
        return ids
    return ids[:, : max(1, int(_lengths(ids, pad_id).max()))]


def framed(ids: Tensor, pad_id: int, longest: int) -> Tensor:
    """Bare ids `(b, n)` between start and end tokens, `(b, m)` with `m` of at most `longest`: longer texts are cut."""
    ids = ids[:, : longest - 2]
    lengths = _lengths(ids, pad_id)
    out = F.pad(ids, (1, 1), value=pad_id)
    out[:, 0] = START
    return out.scatter(1, lengths[:, None] + 1, END)


def _lengths(ids: Tensor, pad_id: int) -> Tensor:
    """`(b,)`: ids of each row up to its last that is no padding."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return torch.where(ids != pad_id, places, 0).amax(dim=1)
