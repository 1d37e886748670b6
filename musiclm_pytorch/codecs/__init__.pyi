from .discriminator import SpectrogramDiscriminator as SpectrogramDiscriminator
from .distance import mel_distance as mel_distance
from .melody import MelodyQuantizer as MelodyQuantizer
from .neural import NeuralCodec as NeuralCodec
from .pretrained import PretrainedCodec as PretrainedCodec
