"""Recipes of tiny models."""

from musiclm_pytorch import cli

TINY = """
audio: {dim: 32, depth: 1, heads: 2, dim_head: 8, audio_sample_rate: 8000, spec_hop_length: 400}
text: {dim: 24, depth: 1, heads: 2, dim_head: 8, max_seq_len: 32}
mulan: {dim_latent: 16}
"""


def written(folder, text, name='recipe.yaml'):
    path = folder / name
    path.write_text(text, encoding='utf-8')
    return path


SHORT = (
    TINY
    + """
data: {max_seconds: 1.0, synthetic_length: 12, synthetic_valid_length: 6}
training: {batch_size: 4, num_train_steps: 4, checkpoint_every: 2, progress: false, accelerate_kwargs: {cpu: true}}
"""
)


def run(*arguments):
    return cli.main(['train', 'mulan', *map(str, arguments)])


CODEC = dict(
    codebook_size=8, channels=4, strides=[4, 10], channel_mults=[1, 2], codebook_dim=8, rq_num_quantizers=3,
    use_local_attn=False, target_sample_hz=8000, multi_spectral_window_powers_of_two=[6],
    multi_spectral_n_ffts=128, multi_spectral_n_mels=8,
    complex_stft_discr_kwargs=dict(channels=2, n_fft=256, hop_length=64, win_length=256),
)  # fmt: skip
