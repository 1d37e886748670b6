"""What someone asks music for, read and checked: prompts, lengths, how to sample, and a prime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import reduce
from torch import Tensor

from musiclm_pytorch.audiolm.sampling import LogitsProcessor, Sampling
from musiclm_pytorch.audiolm.stages import STAGES
from musiclm_pytorch.checks import (
    as_tensor,
    check_audio,
    check_channels,
    check_finite,
    check_positive,
    check_sample_rate,
    described,
    typechecked,
)
from musiclm_pytorch.data.audio import AudioFile

Sound = tuple[Tensor | np.ndarray, int]  # a wave as `prime_wave`, and its rate in Hz
PerStage = float | Sequence[float]
CountPerStage = int | Sequence[int | None] | None
ProcessorPerStage = LogitsProcessor | Sequence[LogitsProcessor | None] | None


class NoDirectionError(ValueError):
    """Of a prompt that points nowhere."""


class Mix:
    """Several prompts as one, each with its weight: the direction of the sum of their latents.

        musiclm(Mix([(0.7, 'a calm piano'), (0.3, 'drums')]))

    Args:
        parts: pairs of a weight above 0 and a prompt of any kind.

    Raises ValueError for none, or a weight that is not above 0.
    """

    @typechecked
    def __init__(self, parts: Sequence[tuple[float, Any]]):
        if not parts:
            raise ValueError('a Mix of nothing is no prompt; pass pairs of weight and prompt')
        for weight, prompt in parts:
            if not is_prompt(prompt):
                raise TypeError(f'a Mix holds pairs of weight and prompt, got {described(prompt)} for a prompt')
            check_positive(**{f'the weight of {described(prompt)}': weight})
        self.parts = list(parts)

    def __repr__(self) -> str:
        return ' + '.join(f'{weight:g} {described(prompt)}' for weight, prompt in self.parts)


# words; a sound: a file, a wave with its rate, or `Waves`; a latent of MuLaN `(d,)`; several of them
Prompt = str | Path | Tensor | np.ndarray | Sound | Mix
Story = Sequence[tuple[float, Prompt]]


def is_prompt(given: Any) -> bool:
    """One prompt, rather than several or a story."""
    is_sound = isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor | np.ndarray)
    return is_sound or isinstance(given, str | Path | Tensor | np.ndarray | Mix)


def read_prompts(text: Prompt | Sequence[Prompt] | Story) -> tuple[list[Prompt], Story | None]:
    """The prompts as `read_prompt` gives them, and the story if it is one.

    Raises ValueError for none, an empty one, or a part of a story without length; TypeError for what is neither.
    """
    items = [text] if is_prompt(text) else list(text)
    if not items:
        raise ValueError('text is an empty list; pass at least one prompt')
    is_story = not is_prompt(items[0])
    for item in items:
        if is_prompt(item) == is_story or (is_story and (not isinstance(item, tuple | list) or len(item) != 2)):
            raise TypeError(
                'text is a prompt, a list of prompts, or a story of pairs (seconds, prompt) alone, got a list with '
                f'{described(item)}'
            )
    prompts = [read_prompt(prompt) for prompt in ([prompt for _, prompt in items] if is_story else items)]
    if not is_story:
        return prompts, None
    for length, prompt in items:
        check_positive(**{f'the length of {described(prompt)} in seconds': length})
    return prompts, items


def read_prompt(prompt: Prompt) -> Prompt:
    """Words as they are, a sound as `(1, samples)` and its rate, a latent as a tensor `(d,)`, or a `Mix` of these.

    Raises ValueError for words that say nothing, or for what is no sound and no latent; FileNotFoundError for a missing
    file.
    """
    if isinstance(prompt, Mix):
        return Mix([(weight, read_prompt(part)) for weight, part in prompt.parts])
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f'a prompt must say something, got {prompt!r}')
        return prompt
    if isinstance(prompt, Path | tuple) or getattr(prompt, 'sample_rate', None):
        return read_sound(prompt, name='the wave of a prompt')
    latent = as_tensor(prompt)
    if latent.ndim != 1 or not latent.is_floating_point():
        raise ValueError(
            f'an array as a prompt is a latent of MuLaN, (d,) of floats, got {tuple(latent.shape)} {latent.dtype}; '
            'for a sound, pass the pair of its wave and its rate in Hz'
        )
    check_finite(latent[None], 'a latent holds NaN or infinity')
    return latent.float()


def read_sound(sound: Path | Sound | Tensor, *, name: str) -> Sound:
    """A file, a wave with its rate, or `Waves`, as `(1, samples)` and its rate in Hz.

    Raises ValueError for what is no wave, TypeError for one that does not tell its rate, FileNotFoundError for a
    missing file.
    """
    if isinstance(sound, Path):
        with AudioFile(sound) as file:
            sound = file.read(0, len(file)), file.sample_rate
    elif rate := getattr(sound, 'sample_rate', None):
        sound = sound, rate
    if not isinstance(sound, tuple):
        raise TypeError(f'{name} must tell its rate: pass the pair of it and its rate in Hz, got {described(sound)}')
    return read_wave(*sound, name=name)


def words_in(prompt: Prompt) -> list[str]:
    """What a prompt says, part by part."""
    if isinstance(prompt, Mix):
        return [words for _, part in prompt.parts for words in words_in(part)]
    return [prompt] if isinstance(prompt, str) else []


def read_seconds(seconds: float | None, max_length: int | None, story: Story | None, *, semantic_rate: Any) -> float:
    """The length of the music in seconds, 10 by default; `max_length` counts semantic tokens."""
    given = [name for name, it in dict(seconds=seconds, max_length=max_length).items() if it is not None]
    if story:
        if given:
            raise ValueError(f'a story tells its length itself; leave out {given[0]}')
        return float(sum(length for length, _ in story))
    if len(given) == 2:
        raise ValueError(f'pass seconds or max_length, got both: {seconds} and {max_length}')
    if max_length is not None:
        return float(max_length / semantic_rate)
    return 10.0 if seconds is None else float(seconds)


def read_sampling(*, conditioned: Sequence[bool], **given: Any) -> list[Sampling]:
    """How each stage samples, from one value for all of them or three; a stage without conditioning has no guidance."""
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, Sequence) else (value,) * len(STAGES)
        if len(given[name]) != len(STAGES):
            raise ValueError(f'{name} must be one number or three, for {", ".join(STAGES)}, got {value}')
    samplings = []
    for i, has_condition in enumerate(conditioned):
        own = {key: values[i] for key, values in given.items()}
        samplings.append(Sampling(**own if has_condition else {**own, 'cond_scale': 1.0}))
    return samplings


def read_prime(
    wave: Tensor | np.ndarray | None, rate: int | None, path: str | Path | None, *, seconds: float
) -> tuple[Tensor, int] | None:
    """The prime as `(1, samples)` and its rate in Hz.

    Raises ValueError for a prime without a rate, of another shape, or no shorter than the music, TypeError for
    integers, FileNotFoundError for a missing file.
    """
    if wave is None and path is None:
        return None
    if wave is not None and path is not None:
        raise ValueError('pass prime_wave or prime_wave_path, not both')
    if path is not None:
        with AudioFile(path) as file:
            check_shorter(len(file) / file.sample_rate, seconds)  # before hours of it are read
            wave, rate = file.read(0, len(file)), file.sample_rate
    if rate is None:
        raise ValueError('prime_wave needs its rate in Hz: pass prime_wave_input_sample_hz')
    wave, rate = read_wave(wave, rate, name='prime_wave')
    check_shorter(wave.shape[-1] / rate, seconds)
    return wave, rate


def read_wave(wave: Tensor | np.ndarray, rate: int, *, name: str) -> tuple[Tensor, int]:
    """`(samples,)` or `(channels, samples)` as `(1, samples)` float32, and its rate in Hz."""
    check_sample_rate(rate)
    wave = as_tensor(wave)
    check_channels(wave, name)
    wave = check_audio(wave, ndim=wave.ndim, shape='(samples,) or (channels, samples)', name=name)
    if wave.shape[-1] == 0:
        raise ValueError(f'{name} of shape {tuple(wave.shape)} has no samples')
    wave = wave.float()
    wave = wave[None] if wave.ndim == 1 else reduce(wave, 'c n -> 1 n', 'mean')
    check_finite(wave, f'{name} holds NaN or infinity')
    return wave, rate


def check_shorter(prime: float, seconds: float) -> None:
    """Raise ValueError unless a prime of so many seconds leaves some of the music to make."""
    if prime >= seconds:
        raise ValueError(
            f'the prime lasts {prime:.2f} s and the music {seconds:g} s, the prime included; ask for more seconds'
        )
