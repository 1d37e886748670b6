"""The path of upstream's single module: everything public again, for code that imports from it."""

from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.contrastive import (
    MultiLayerContrastiveLoss,
    SigmoidContrastiveLearning,
    SoftmaxContrastiveLearning,
)
from musiclm_pytorch.mulan.layers import GEGLU, Attention, FeedForward, LayerNorm, Transformer
from musiclm_pytorch.mulan.model import MuLaN, interspersed_indices
from musiclm_pytorch.mulan.text_transformer import TextTransformer

__all__ = [
    'GEGLU',
    'Attention',
    'AudioSpectrogramTransformer',
    'FeedForward',
    'LayerNorm',
    'MuLaN',
    'MultiLayerContrastiveLoss',
    'SigmoidContrastiveLearning',
    'SoftmaxContrastiveLearning',
    'TextTransformer',
    'Transformer',
    'interspersed_indices',
]
