"""Other people's models, tiny and random, as their own configs build them, and the way from waves to saved music."""

import torch
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

from helpers.stage_parts import RATE, make_quantizer, make_transformer
from musiclm_pytorch import (
    CoarseTrainer,
    FineTrainer,
    MuLaNSemanticTokenizer,
    MusicLM,
    PretrainedCodec,
    SemanticTrainer,
    compute_tokens,
)

CODEC_RATE = 1600
ENCODEC = dict(
    sampling_rate=CODEC_RATE, hidden_size=8, num_filters=4, upsampling_ratios=[8, 4], codebook_size=16, codebook_dim=8,
    num_lstm_layers=1, target_bandwidths=[0.2, 1.0],
)  # fmt: skip
CODECS = {
    'encodec of 24 kHz': lambda: EncodecModel(EncodecConfig(**ENCODEC)),
    # stereo, in chunks of 20 frames that overlap by one, each with a loudness of its own
    'encodec of 48 kHz': lambda: EncodecModel(
        EncodecConfig(
            **{**ENCODEC, 'codebook_size': 256, 'target_bandwidths': [0.4, 1.2]},
            **dict(audio_channels=2, normalize=True, chunk_length_s=0.4, overlap=0.01, norm_type='time_group_norm'),
            use_causal_conv=False,
        )
    ),
    # a stride of 5, as at 24 kHz: its decoder gives a sample a frame too few
    'dac': lambda: DacModel(
        DacConfig(
            **dict(encoder_hidden_size=4, downsampling_ratios=[8, 5], decoder_hidden_size=16, n_codebooks=4),
            **dict(codebook_size=16, codebook_dim=4, sampling_rate=CODEC_RATE),
        )
    ),
    'mimi': lambda: MimiModel(
        MimiConfig(
            **dict(sampling_rate=CODEC_RATE, hidden_size=16, num_filters=4, upsampling_ratios=[8, 4], codebook_size=16),
            **dict(codebook_dim=8, num_quantizers=4, vector_quantization_hidden_dimension=8, num_hidden_layers=1),
            **dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=16, upsample_groups=16),
        )
    ),
}  # fmt: skip


def make_codec_model(kind):
    """In eval mode; codebooks, which begin as zeros, are drawn."""
    torch.manual_seed(4)
    model = CODECS[kind]().eval()
    for name, buffer in model.named_buffers():
        if name.endswith(('.embed', '.embed_sum')):
            buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


class Sounds(torch.utils.data.Dataset):
    """Noise that swells, of several odd lengths, with captions."""

    sample_rate = RATE

    def __len__(self):
        return 6

    def __getitem__(self, index):
        time = torch.arange(1000 + 37 * index) / RATE
        wave = torch.randn(len(time), generator=torch.Generator().manual_seed(index))
        return dict(wave=0.3 * wave * (3 * time).sin(), caption=f'clip {index}')


def from_waves_to_saved_music(folder, codec=None, tokenizer=None, quantizer=None, mulan=None):
    """Tokens of a data set, a step of each stage, music, and the same music of the saved and loaded model, which is
    returned; `mulan` is one that cannot be saved."""
    codec = PretrainedCodec(make_codec_model('dac'), num_quantizers=3) if codec is None else codec
    quantizer = make_quantizer() if quantizer is None else quantizer
    if tokenizer is None:
        tokenizer = MuLaNSemanticTokenizer(make_quantizer().mulan, codebook_size=8)
        tokenizer.fit(Sounds())
    parts = dict(codec=codec, tokenizer=tokenizer)
    tokens = compute_tokens(Sounds(), folder / 'tokens', quantizer=quantizer, progress=False, **parts)
    for trainer in SemanticTrainer, CoarseTrainer, FineTrainer:
        sizes = dict(num_fine_quantizers=codec.num_quantizers - 2) if trainer is FineTrainer else {}
        sizes = dict(tokens=tokenizer.codebook_size, codes=codec.codebook_size, **sizes)
        stage = make_transformer(trainer.stage, conditioned=True, **sizes)
        keywords = dict(seconds=0.3, batch_size=2, num_train_steps=1, results_folder=folder / trainer.stage)
        training = trainer(stage, tokens, quantizer=quantizer, **keywords)
        assert training.train()['loss'] > 0
        parts[trainer.stage] = stage
    musiclm = MusicLM(mulan_embed_quantizer=quantizer, windows=(0.5, 0.3, 0.3), **parts).eval()
    keywords = dict(num_samples=2, seconds=0.71, seed=1, prime_wave=Sounds()[0]['wave'][:500])
    music = musiclm('clip 1', prime_wave_input_sample_hz=RATE, **keywords)
    assert music.shape == (1, round(0.71 * musiclm.sample_rate))
    assert music.isfinite().all()
    assert music.std() > 0

    musiclm.save_pretrained(folder / 'music')
    assert {it.suffix for it in (folder / 'music').rglob('*') if it.is_file()} <= {'.json', '.safetensors', '.txt'}
    loaded = MusicLM.from_pretrained(folder / 'music', mulan=mulan)
    close = dict(atol=0, rtol=0) if type(loaded.codec) is type(codec) else dict(atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loaded('clip 1', prime_wave_input_sample_hz=RATE, **keywords), music, **close)
    return loaded
