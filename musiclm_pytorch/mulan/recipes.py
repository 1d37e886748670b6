"""Spectrogram settings that suit a kind of audio, at any sample rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.spectrogram import mel_filters


@dataclass(frozen=True)
class _Recipe:
    n_mels: int
    f_min: float  # Hz
    f_max: float  # Hz
    window: float  # seconds
    hop: float  # seconds
    stretch_factor: float = 0.8
    frames: int | None = None  # of a patch that holds all bands; None for patches of 16 × 16
    summary: bool = False


_RECIPES = {
    'music': _Recipe(n_mels=128, f_min=30.0, f_max=16000.0, window=0.025, hop=0.010, stretch_factor=1.0),
    'tonal': _Recipe(
        n_mels=160, f_min=40.0, f_max=8000.0, window=0.128, hop=0.020, stretch_factor=1.0, frames=4, summary=True
    ),
    'speech': _Recipe(n_mels=80, f_min=0.0, f_max=8000.0, window=0.025, hop=0.010),
    'general': _Recipe(n_mels=64, f_min=50.0, f_max=14000.0, window=0.032, hop=0.010),
}

PATCH = 16


@typechecked
def get_optimal_spectrogram_params(audio_sample_rate: int = 16000, use_case: str = 'music') -> dict[str, Any]:
    """Keywords for `AudioSpectrogramTransformer(**params)`: a log-mel front end for a kind of audio.

    'music' is the front end of the papers. 'tonal' is for small models and for pitch: patches of 80 ms that hold the
    whole spectrum, at a quarter of the tokens.

    Where the numbers come from:

    - 'music': 128 mel bands, windows of 25 ms every 10 ms, as MuLan describes its AST tower (arXiv 2208.12415, which
      names 64 and 128 bands; the finer one tells neighbouring pitches apart). From 30 Hz, just above the lowest note
      of a piano (27.5 Hz) and below the lowest of a bass guitar (41.2 Hz), to 16 kHz or half the sample rate.
    - 'tonal': windows of 128 ms, whose resolution of 16 Hz (four bins of a Hann window between two sines: 31 Hz) tells
      the overtones of neighbouring semitones apart, which 25 ms do not; 160 bands from 40 Hz to 8 kHz every 20 ms. A
      patch is 4 frames of all bands: an interval lies within one token, wherever its notes are. Beside the patches,
      the pitch classes and the repetition of onsets of the whole clip are read (`clip_summary`), which tell mode and
      tempo far sooner. It is the front end of `benchmarks/learning.py`.
    - 'speech': 80 bands over 0 to 8,000 Hz, 25 ms every 10 ms: Whisper's front end (arXiv 2212.04356, section 2.2).
    - 'general': 64 bands over 50 to 14,000 Hz, 32 ms every 10 ms: PANNs on AudioSet (arXiv 1912.10211, section V).
    - Elsewhere patches of 16 × 16; mask sizes of 48 / 128 of the bands and 192 / 1,024 of ten seconds of frames, and
      the fixed normalisation by AudioSet's mean and deviation: AST (arXiv 2104.01778).
    - The FFT is the next power of two that holds the window and puts a bin into every mel band (zero padding
      interpolates the spectrum; it does not change the resolution). Where the sample rate is so low that even a
      window's own resolution, four bins of padding to one, leaves bands empty, there are fewer bands, a multiple of
      the patch height.
    - No time stretch for 'music' and 'tonal', because captions speak of tempo and a stretch would change it under an
      unchanged caption; elsewhere it and the patch dropout stay the defaults of musiclm-pytorch, 0.8 and 0.25.

    Args:
        audio_sample_rate: sample rate of the waves in Hz, at least 1,000.
        use_case: 'music', 'tonal', 'speech' or 'general'.

    Raises:
        ValueError: an unknown use case or a sample rate below 1,000 Hz.
    """
    if use_case not in _RECIPES:
        raise ValueError(f'unknown use_case {use_case!r}; choose one of {", ".join(map(repr, _RECIPES))}')
    check_positive(audio_sample_rate=audio_sample_rate)
    if audio_sample_rate < 1000:
        raise ValueError(f'audio_sample_rate is in Hz and must be at least 1000, got {audio_sample_rate}')
    recipe = _RECIPES[use_case]

    win_length = round(recipe.window * audio_sample_rate)
    f_max = min(recipe.f_max, audio_sample_rate / 2)
    n_fft = 2 ** (win_length - 1).bit_length()
    n_mels, widest_fft = recipe.n_mels, n_fft * 4
    while not _fills_every_band(n_mels, n_fft, audio_sample_rate, recipe.f_min, f_max):
        if n_fft < widest_fft:
            n_fft *= 2
        else:
            n_mels -= PATCH

    return dict(
        audio_sample_rate=audio_sample_rate,
        patch_size=PATCH if recipe.frames is None else (n_mels, recipe.frames),
        spec_n_fft=n_fft,
        spec_win_length=win_length,
        spec_hop_length=round(recipe.hop * audio_sample_rate),
        spec_power=2,
        spec_n_mels=n_mels,
        spec_f_min=recipe.f_min,
        spec_f_max=f_max,
        clip_summary=recipe.summary,
        spec_aug_stretch_factor=recipe.stretch_factor,
        spec_aug_freq_mask=n_mels * 48 // 128,
        spec_aug_time_mask=192,
    )


def _fills_every_band(n_mels: int, n_fft: int, sample_rate: int, f_min: float, f_max: float) -> bool:
    filters = mel_filters(n_mels, bins=n_fft // 2 + 1, sample_rate=sample_rate, f_min=f_min, f_max=f_max)
    return bool((filters.amax(dim=0) > 0).all())


@typechecked
def create_optimized_audiospectrogram_transformer(
    dim: int,
    depth: int,
    use_case: str = 'music',
    audio_sample_rate: int = 16000,
    **keywords: Any,
) -> AudioSpectrogramTransformer:
    """An audio tower with the front end of `get_optimal_spectrogram_params`; it knows its sample rate.

    Args:
        dim, depth: size of the tower.
        use_case: 'music', 'tonal', 'speech' or 'general'.
        audio_sample_rate: sample rate of the waves in Hz.
        keywords: any further keyword of `AudioSpectrogramTransformer`; one of the recipe's overrides it.
    """
    params = get_optimal_spectrogram_params(audio_sample_rate=audio_sample_rate, use_case=use_case)
    return AudioSpectrogramTransformer(dim=dim, depth=depth, **{**params, **keywords})
