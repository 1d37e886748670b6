"""Tiny stages of audiolm-pytorch with weights that make every part matter, and their uncached logits."""

import random
import warnings

import torch
import torch.nn.functional as F
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


@torch.inference_mode()
def semantic_logits(stage, ids, text_embeds=None):
    """(b, n + 1, c): for the token after each of 0 … n tokens."""
    return _quiet(stage, ids=ids, text_embeds=text_embeds, cond_drop_prob=0.0)


@torch.inference_mode()
def coarse_logits(stage, semantic_ids, tokens, text_embeds=None, drop=0.0):
    """The same for flat coarse tokens (b, n), the semantic padding masked as the training wrapper masks it."""
    is_real = (semantic_ids != -1) & (semantic_ids != SEMANTIC)
    return _quiet(
        stage,
        semantic_token_ids=semantic_ids.masked_fill(~is_real, 0),
        coarse_token_ids=tokens,
        self_attn_mask=F.pad(is_real, (1, tokens.shape[1] + 1), value=True),
        text_embeds=text_embeds,
        cond_drop_prob=drop,
    )[1]


@torch.inference_mode()
def fine_logits(stage, coarse_codes, tokens, text_embeds=None):
    """The same for flat fine tokens (b, n)."""
    return _quiet(
        stage, coarse_token_ids=coarse_codes, fine_token_ids=tokens, text_embeds=text_embeds, cond_drop_prob=0.0
    )[1]


def _quiet(stage, **inputs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # of flash attention's way to choose a kernel
        return stage(**inputs)
