"""New weights of AudioLM's stages, drawn so that they learn from the first step."""

from __future__ import annotations

import torch
from torch import nn

EMBEDDINGS, LOGITS = 0.1, 0.02  # standard deviations


@torch.no_grad()
def scale_initial_weights(transformer: nn.Module) -> nn.Module:
    """Scale the embeddings and the weights of the logits of a new transformer, and give it back.

    audiolm-pytorch draws both with a deviation of 1: the loss of 512 codes begins at 35 to 45 in place of ln 512 = 6.2,
    and a step of Adam hardly moves an embedding of that size.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Embedding):
            module.weight.mul_(EMBEDDINGS)
    for name, weight in transformer.named_parameters():
        if name.endswith('start_token'):
            weight.mul_(EMBEDDINGS)
        elif name.endswith('logit_weights'):
            weight.mul_(LOGITS)
    return transformer
