"""Tiny stages of audiolm-pytorch with weights that make every part matter."""

import random

import torch
from torch import nn

from musiclm_pytorch.audiolm.convert import CoarseTransformer, FineTransformer, SemanticTransformer

SEMANTIC, CODES, COARSE, FINE = 11, 13, 3, 2
SIZES = dict(dim=32, depth=2, heads=2, dim_head=8)


def semantic_stage(**options) -> SemanticTransformer:
    return _build(SemanticTransformer, num_semantic_tokens=SEMANTIC, **options)


def coarse_stage(**options) -> CoarseTransformer:
    sizes = dict(num_semantic_tokens=SEMANTIC, codebook_size=CODES, num_coarse_quantizers=COARSE)
    return _build(CoarseTransformer, **sizes, **options)


def fine_stage(**options) -> FineTransformer:
    sizes = dict(codebook_size=CODES, num_coarse_quantizers=COARSE, num_fine_quantizers=FINE)
    return _build(FineTransformer, **sizes, **options)


def _build(kind: type, **options) -> nn.Module:
    """A stage away from its start, where hyper-connections do nothing, with logits as far apart as a trained one's."""
    random.seed(0)  # of the stream that a block reads at first
    torch.manual_seed(0)
    stage = kind(**{**SIZES, **options})
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if 'logit_weights' in name:
                parameter.mul_(0.2)
            noise = torch.randn(parameter.shape)
            parameter.add_(noise * (0.3 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.3))
    return stage.eval()


def codes(*shape: int, num: int = CODES, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, num, shape, generator=torch.Generator().manual_seed(seed))


def embeds(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
