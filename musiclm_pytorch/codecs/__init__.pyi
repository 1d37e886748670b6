from .distance import mel_distance as mel_distance
from .neural import NeuralCodec as NeuralCodec
from .pretrained import PretrainedCodec as PretrainedCodec
