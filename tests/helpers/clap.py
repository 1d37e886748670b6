"""A CLAP, tiny and random, as its own config builds it."""

import pytest
import torch

RATE = 8000


def tiny_clap(fusion=False):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.ClapConfig(
        text_config=dict(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=20,
        ),
        audio_config=dict(
            patch_embeds_hidden_size=16,
            depths=[1, 1],
            num_attention_heads=[2, 2],
            hidden_size=32,
            spec_size=64,
            num_mel_bins=16,
            window_size=4,
            patch_size=4,
            patch_stride=[4, 4],
            enable_fusion=fusion,
            fusion_type='aff_2d',
        ),
        projection_dim=12,
    )
    features = transformers.ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=RATE,
        hop_length=80,
        max_length_s=1,
        fft_window_size=256,
        frequency_max=4000,
        truncation='fusion' if fusion else 'rand_trunc',
    )
    tokens = ['<s>', '<pad>', '</s>', '<unk>', '<mask>', *'abcdefghijklmnopqrstuvwxyz', 'Ġ']
    tokenizer = transformers.RobertaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    return transformers.ClapModel(config), transformers.ClapProcessor(features, tokenizer)
