"""How well what was made for a gap leads to what follows the gap."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from musiclm_pytorch.audiolm.stages import StageTransformer, logits_of
from musiclm_pytorch.audiolm.transformer import at_least_float32
from musiclm_pytorch.mulan.model import evaluating


@torch.no_grad()
def log_likelihood(stage: StageTransformer, *ids: Tensor, known: int, conditioning: Tensor | None) -> Tensor:
    """The mean log-probability of a stage's own tokens from position `known` on, given all before them, `(b,)`.

    Args:
        ids: the tokens that the stage is given, unless it is semantic, and its own ones, `(b, n)` or `(b, t, q)`.
        known: own tokens or frames that are not told.
        conditioning: as of `StageTransformer.loss`.
    """
    *given, own = (rearrange(it, 'b n ... -> b (n ...)') for it in ids)
    heads, first = stage.own_heads(), known * stage.num_levels
    with evaluating(stage):
        features = stage.features(*given, own[:, :-1], conditioning=conditioning)[-1][:, first:]
    told = []
    for level, head in enumerate(heads):  # known ones are whole frames, so the first one told is of the first level
        logits = at_least_float32(logits_of(features[:, level :: len(heads)], *head))
        tokens = own[:, first + level :: len(heads)]
        told.append(logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0])
    return torch.cat(told, dim=1).mean(dim=1)
