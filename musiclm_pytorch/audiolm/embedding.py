"""Token ids of audiolm-pytorch's stages as the vectors that their transformers read, for training and decoding."""

from __future__ import annotations

from torch import Tensor, nn

PAD = -1


def start(token: Tensor, batch: int) -> Tensor:
    """A start token `(d,)` before each of a batch: `(b, 1, d)`."""
    return token.expand(batch, 1, -1)


def embed_levels(
    ids: Tensor, levels: int | Tensor, embedding: nn.Embedding, level_embedding: nn.Embedding, codebook_size: int
) -> Tensor:
    """`(…, d)` of the ids `(…,)` of quantizers `levels`, one or as many as the last axis."""
    # the stages step by codebook_size, though a table with end tokens has a row more a quantizer
    return embedding(ids + levels * codebook_size) + level_embedding.weight[levels]
