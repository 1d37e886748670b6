"""The parts of a tiny MusicLM, whose semantic tokens tell how loud it is."""

import torch
from torch import nn

from helpers.models import tiny_mulan
from musiclm_pytorch import MuLaNEmbedQuantizer, StopGeneration
from musiclm_pytorch.audiolm.convert import (
    AudioLM,
    CoarseTransformer,
    FineTransformer,
    HubertWithKmeans,
    SemanticTransformer,
    SoundStream,
)

RATE, HOP, TOKEN_RATE = 1600, 32, 10  # Hz, samples a frame, semantic tokens a second


ADJECTIVES, NOUNS = (
    ('slow', 'a fast', 'one deep and', 'bright'),
    ('flute', 'drums', 'cathedral organ', 'guitar, please'),
)


class Tokenizer(HubertWithKmeans):
    """Semantic tokens that tell how loud a tenth of a second is: one k-means of one feature, made by hand."""

    def __init__(self):
        nn.Module.__init__(self)
        self.target_sample_hz = 800
        self.seq_len_multiple_of = None

    codebook_size = 6
    downsample_factor = 80

    def forward(self, waves, flatten=True, input_sample_hz=None):
        loudness = waves[:, : waves.shape[1] // 80 * 80].unflatten(1, (-1, 80)).abs().amax(dim=-1)
        return (loudness * 6).long().clamp(max=5)


def build_audio_lm(
    conditioned=('semantic', 'coarse', 'fine'), dim=16, unique_consecutive=False, tokenizer=None, codes=8,
    text_condition=None, **keywords,
):  # fmt: skip
    torch.manual_seed(1)
    shared = dict(dim=dim, depth=1, heads=2, **(text_condition or {}))
    coarse = dict(codebook_size=8, num_coarse_quantizers=2)
    codec = SoundStream(
        channels=4, strides=(2, 4, 4), channel_mults=(1, 2, 2), codebook_dim=8, codebook_size=codes,
        rq_num_quantizers=3, target_sample_hz=RATE, attn_dim_head=4, attn_heads=1, use_local_attn=False,
    )  # fmt: skip
    for layer in codec.rq.rvqs[0].layers:
        layer._codebook.initted.fill_(True)
        layer._codebook.embed.normal_()
    return AudioLM(
        wav2vec=tokenizer or Tokenizer(),
        codec=codec,
        semantic_transformer=SemanticTransformer(
            num_semantic_tokens=6, audio_text_condition='semantic' in conditioned, **shared
        ),
        coarse_transformer=CoarseTransformer(
            num_semantic_tokens=6, audio_text_condition='coarse' in conditioned, **coarse, **shared
        ),
        fine_transformer=FineTransformer(
            num_fine_quantizers=1, audio_text_condition='fine' in conditioned, **coarse, **shared
        ),
        unique_consecutive=unique_consecutive,
        **keywords,
    ).eval()


def build_quantizer(fitted=True, **keywords):
    mulan = tiny_mulan(
        dict(depth=1, audio_sample_rate=800, spec_n_fft=64), dict(depth=1, num_tokens=49408, max_seq_len=64)
    )
    keywords = dict(conditioning_dims=(16, 16, 16), rq_num_quantizers=2, codebook_size=5) | keywords
    quantizer = MuLaNEmbedQuantizer(mulan, **keywords)
    # far larger than after initialisation, so that conditions make a difference in an untrained stage
    for embedding in quantizer.parameters():
        embedding.data.normal_()
    if fitted:
        prompts = [f'{adjective} {noun}' for adjective in ADJECTIVES for noun in NOUNS]
        quantizer.fit(mulan.eval().get_text_latents(raw_texts=prompts))
    return quantizer.eval()


def stop_at_once(*_):
    raise StopGeneration
