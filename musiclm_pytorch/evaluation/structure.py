"""How a clip is made as music: tempo and beats, key, form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.evaluation.clips import SILENT, check_clip, mean_of_clips, silence_share
from musiclm_pytorch.evaluation.figures import Figure, mean_figure, undefined
from musiclm_pytorch.evaluation.form import form
from musiclm_pytorch.evaluation.tempo import RATE, mel_power, rhythm
from musiclm_pytorch.evaluation.tonality import TONICS, find_tuning, folding, pitch_spectrum, tonality

# below, nothing is measured
LEAST_SECONDS = 1.0
# the fields of `StructureResult` that are figures
FIGURES = (
    'tempo',
    'pulse_clarity',
    'beat_variation',
    'onset_density',
    'key_strength',
    'pitch_class_entropy',
    'segments',
    'repetition',
)


@dataclass(frozen=True)
class StructureResult:
    """The structure of one clip. A figure that is not defined has the reason.

    seconds: length of the clip.
    tempo: BPM. Not defined for less than 3 s, less than 3 onsets, or where pulse_clarity is below 0.2.
    pulse_clarity: autocorrelation, at one beat, of how much louder each moment is than the last: 1 repeats exactly.
    beat_variation: standard deviation over mean of the time between beats: 0 for a metronome.
    onset_density: notes and strokes that begin, a second.
    key_strength: correlation of the key's profile with how much there is of each pitch class, -1 to 1. The best of 24
        keys has some 0.5 in noise.
    pitch_class_entropy: bits, of the energy in each pitch class: 0 for one of them, log2(12) = 3.58 for all alike.
    segments: into how many parts the boundaries cut the clip. Not defined for 4 s and less.
    repetition: share of the passages of 2 s that come again in the clip, 0 to 1. Not defined for 4 s and less.
    tonic, mode: of the key, pitch class 0 (C) to 11 (B) and 'major' or 'minor'; None where key_strength is undefined.
    onsets, beats, boundaries: when, in seconds, from first to last.
    """

    seconds: float
    tempo: Figure
    pulse_clarity: Figure
    beat_variation: Figure
    onset_density: Figure
    key_strength: Figure
    pitch_class_entropy: Figure
    segments: Figure
    repetition: Figure
    tonic: int | None = None
    mode: str | None = None
    onsets: tuple[float, ...] = ()
    beats: tuple[float, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def key(self) -> str | None:
        """Name of the key as mir_eval takes it, such as 'C# minor'."""
        return key_name(self.tonic, self.mode)

    def figures(self) -> dict[str, Figure]:
        """The fields that are figures, by name."""
        return {name: getattr(self, name) for name in FIGURES}

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        plain = dict(seconds=self.seconds, key=self.key)
        plain |= {name: list(getattr(self, name)) for name in ('onsets', 'beats', 'boundaries')}
        return {name: it.to_dict() for name, it in self.figures().items()} | plain


@typechecked
def structure_of(wave: Tensor, sample_rate: int) -> StructureResult:
    """Listen to one clip, at 16 kHz whatever its rate: what lies above 8 kHz is not heard.

    - Onsets and tempo: spectral flux of a mel spectrogram, its autocorrelation with a log-normal prior around 120 BPM
      of one octave. That prior decides between a tempo and its half or double; beats by dynamic programming
      (Ellis, 2007).
    - Key: the mean of the constant-Q chroma, tuned to the clip, and the profiles of Krumhansl and Kessler (1982).
    - Boundaries: checkerboard novelty (Foote, 2000) on the similarity of chroma and timbre, 2 s on either side.
    - Repetition: passages of 2 s whose centred chroma comes again with a cosine of 0.9.

    Args:
        wave: `(samples,)`, floating point.
        sample_rate: Hz.

    Raises:
        TypeError, ValueError: anything but a wave with finite samples and a sample rate.
    """
    samples = check_clip(wave, sample_rate)
    seconds = len(samples) / sample_rate
    if seconds < LEAST_SECONDS:
        return nothing_of(seconds, f'a clip of {seconds:.2f} s is shorter than {LEAST_SECONDS:g} s')
    import librosa

    samples = (samples - samples.mean()).astype(np.float32)
    samples = librosa.resample(samples, orig_sr=sample_rate, target_sr=RATE)
    if silence_share(samples, RATE) == 1:
        return nothing_of(seconds, SILENT)
    mel, spectrum = mel_power(samples), pitch_spectrum(samples)
    to_classes = folding(find_tuning(spectrum))
    return StructureResult(
        seconds,
        **rhythm(mel, seconds),
        **tonality(spectrum, to_classes),
        **form(mel, to_classes @ spectrum, seconds),
    )


@typechecked
def summarise_structure(results: Sequence[StructureResult], seed: int = 0) -> dict[str, Figure]:
    """The mean over clips of each figure, with its bootstrap interval, and major_share, that of clips in major.

    Clips without a value are left out of a mean, and counted. Raises ValueError for no clips.
    """
    found = mean_of_clips([it.figures() for it in results], seed=seed)
    modes = [float(it.mode == 'major') for it in results if it.mode is not None]
    return found | dict(major_share=mean_figure(modes, seed=seed, missing='no clip has a key'))


def nothing_of(seconds: float, reason: str) -> StructureResult:
    """Every figure undefined."""
    return StructureResult(seconds, **dict.fromkeys(FIGURES, undefined(reason)))


def key_name(tonic: int | None, mode: str | None) -> str | None:
    return None if tonic is None else f'{TONICS[tonic]} {mode}'
