"""What someone asks music for, read and checked: prompts, lengths and a prime; how to sample, and from what noise; and
how to be told of the progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from torch import Tensor
from tqdm import tqdm

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
from musiclm_pytorch.waves import Waves

# beyond these, logits overflow
LOWEST_TEMPERATURE, MOST_GUIDANCE = 0.001, 100
MOST_TEMPERATURE = 1000  # from there on, all tokens are as likely; float32 ends at 3e38

Progress = bool | Callable[[int, int], None]

# of what was drawn so far in a window, (b, n) int64, levels taking turns, and the logits (b, c) of the next token
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None

Sound = tuple[Tensor | np.ndarray, int]  # a wave as `prime_wave`, and its rate in Hz
PerStage = float | Sequence[float]
CountPerStage = int | Sequence[int | None] | None
ProcessorPerStage = LogitsProcessor | Sequence[LogitsProcessor | None] | None


# ---------------------------------------------------------------------------------------------------------------
# Prompts, lengths, a prime


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
    if not isinstance(latent, Tensor) or latent.ndim != 1 or not latent.is_floating_point():
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
        return round(float(sum(length for length, _ in story)), 6)  # 0.3 + 0.6 is no more than 0.9
    if len(given) == 2:
        raise ValueError(f'pass seconds or max_length, got both: {seconds} and {max_length}')
    if max_length is not None:
        return float(max_length / semantic_rate)
    return 10.0 if seconds is None else float(seconds)


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
    if isinstance(wave, Waves) and len(wave.pieces) > 1:  # as channels they would be mixed into one
        raise ValueError(f'{name} is {len(wave.pieces)} pieces of music; pass one, (music.pieces[0], rate)')
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


# ---------------------------------------------------------------------------------------------------------------
# Sampling


@typechecked
@dataclass(frozen=True)
class Sampling:
    """How one stage draws its tokens.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token
        top_k: only the k likeliest tokens
        top_p: only the fewest tokens that reach this probability together, of those that top_k leaves
        cond_scale: classifier-free guidance, null + cond_scale · (conditioned − null); 1 is without
        negative_scale: guidance away from a negative condition, if there is one: with it, negative_scale · (conditioned
            − negative) is added
        logits_processor: changes the logits before all of this but the guidance; a logit of −inf forbids a token

    Raises ValueError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    cond_scale: float = 1.0
    negative_scale: float = 1.0
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f'temperature must be 0 or above, got {self.temperature}')
        if self.temperature > MOST_TEMPERATURE:
            raise ValueError(f'temperature must be {MOST_TEMPERATURE} at most, got {self.temperature:g}')
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(f'temperature must be 0, or at least {LOWEST_TEMPERATURE}, got {self.temperature}')
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f'top_k must be at least 1, got {self.top_k}; None takes all tokens')
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f'top_p must lie in (0, 1], got {self.top_p}; None takes all tokens')
        if not abs(self.cond_scale) <= MOST_GUIDANCE:
            raise ValueError(
                f'cond_scale must lie between -{MOST_GUIDANCE} and {MOST_GUIDANCE}, got {self.cond_scale:g}; 1 to 5 is '
                'usual'
            )
        if not 0 <= self.negative_scale <= MOST_GUIDANCE:
            raise ValueError(f'negative_scale must lie between 0 and {MOST_GUIDANCE}, got {self.negative_scale:g}')

    def guided(self, more: float) -> Sampling:
        """The same with so many times the guidance, where there is any: at 1 there is none to increase."""
        if self.cond_scale <= 1:
            return self
        return replace(self, cond_scale=min(more * self.cond_scale, MOST_GUIDANCE))

    def draw(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Tokens (b,) for logits (b, c), by the inverse of the distribution function at `noise` (b,) in [0, 1).

        One number a token, so that a run is repeated by its seed whatever the number of codes. A code with a logit
        of −inf is never drawn.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        codes = None
        if self.top_k is not None or self.top_p is not None:
            top_k = logits.shape[-1] if self.top_k is None else min(self.top_k, logits.shape[-1])
            logits, codes = logits.topk(top_k, dim=-1)
        probabilities = (logits.float() / self.temperature).softmax(dim=-1)
        total = probabilities.cumsum(dim=-1)
        if self.top_p is not None:
            before = total - probabilities
            before[..., 0] = 0  # the likeliest always stays
            total = probabilities.masked_fill_(before >= self.top_p, 0).cumsum(dim=-1)
        drawn = torch.searchsorted(total, noise[:, None] * total[:, -1:], right=True)
        if codes is not None:
            drawn = codes.gather(-1, drawn)
        return drawn[:, 0]


class Noise:
    """Uniform numbers in [0, 1) for a batch, from one generator, or from one a sample.

    With one a sample, a sample gets the same numbers whatever else is in the batch.
    """

    def __init__(self, generator: Generators, batch: int):
        if isinstance(generator, Sequence) and len(generator) != batch:
            raise ValueError(f'got {len(generator)} generators for {batch} samples; pass one, or one a sample')
        self.generator = generator

    def draw(self, num_steps: int, rows: Sequence[int]) -> Tensor:
        """(rows, num_steps) float32; a row may be there more than once."""
        if isinstance(self.generator, Sequence):
            return torch.stack([_uniform((num_steps,), self.generator[row]).cpu() for row in rows])
        # steps first, so that a longer run begins as the shorter one
        return _uniform((num_steps, len(rows)), self.generator).t()


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = 'cpu' if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float32, device=device)


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


# ---------------------------------------------------------------------------------------------------------------
# Progress


class StopGeneration(Exception):
    """What a `progress` function raises to end the work; `MusicLM` then gives back the pieces that are done."""


@contextmanager
def counted_steps(progress: Progress, stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to tell the steps made to, which shows them as `progress` asks for."""
    done = 0
    with tqdm(total=total, desc=f'generating {stage}', disable=progress is not True) as bar:

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            bar.update(steps)
            if callable(progress):
                progress(done, total)

        yield advance
