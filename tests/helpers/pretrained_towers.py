"""Text and audio encoders of `transformers`, tiny and random, each in a folder with what prepares its inputs."""

import torch
import transformers

from helpers.stage_parts import RATE

WORDS = ['a', 'calm', 'fast', 'flute', 'cello', 'with', 'drums', 'clip', *'0123456789']
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
# ten samples a frame, in two convolutions
CONVOLUTIONS = dict(
    conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)  # fmt: skip


def bert_tokenizer():
    vocabulary = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS]
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})


def t5_tokenizer():
    pieces = ['<pad>', '</s>', '<unk>', '▁', *(f'▁{word}' for word in WORDS)]
    return transformers.T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


def t5():
    sizes = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


TEXT = {
    't5': (t5, t5_tokenizer),
    'bert': (
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(vocab_size=32, max_position_embeddings=12, **SMALL)
        ),
        bert_tokenizer,
    ),
}
AUDIO = {
    'ast': (
        lambda: transformers.ASTModel(
            transformers.ASTConfig(
                **SMALL, patch_size=4, frequency_stride=4, time_stride=4, max_length=60, num_mel_bins=8
            )
        ),
        lambda: transformers.ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=8, max_length=60),
    ),
    'hubert': (
        lambda: transformers.HubertModel(transformers.HubertConfig(**SMALL, **CONVOLUTIONS)),
        lambda: transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True),
    ),
    'wav2vec2': (
        lambda: (
            transformers.Wav2Vec2ForPreTraining(
                transformers.Wav2Vec2Config(**SMALL, **CONVOLUTIONS, proj_codevector_dim=8, codevector_dim=8)
            ).wav2vec2
        ),
        lambda: transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE),
    ),
    'whisper': (
        lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                **dict(vocab_size=20, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=1),
                **dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16),
                **dict(max_source_positions=60, encoder_layerdrop=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2),
                decoder_start_token_id=1,
            )
        ),
        lambda: transformers.WhisperFeatureExtractor(
            feature_size=8, sampling_rate=RATE, hop_length=10, chunk_length=1, n_fft=40
        ),
    ),
    # its feature extractor makes frames of 400 samples, whatever their rate
    'w2v-bert': (
        lambda: transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**SMALL, conv_depthwise_kernel_size=3)),
        lambda: transformers.SeamlessM4TFeatureExtractor(),
    ),
}


def save_tower(name, folder):
    """The folder, as one of the Hub holds such a model."""
    torch.manual_seed(3)
    for make in (TEXT | AUDIO)[name]:
        make().save_pretrained(folder)
    return folder
