"""From logits to tokens: temperature, top-k, top-p, and where the randomness comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from musiclm_pytorch.checks import typechecked

# beyond these, logits overflow
LOWEST_TEMPERATURE, MOST_GUIDANCE = 0.001, 100

Progress = bool | Callable[[int, int], None]

# of what was drawn so far in a window, (b, n) int64, levels taking turns, and the logits (b, c) of the next token
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class StopGeneration(Exception):
    """What a `progress` function raises to end the work; `MusicLM` then gives back the pieces that are done."""


Generators = torch.Generator | Sequence[torch.Generator] | None


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
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f'temperature must be 0 or above, got {self.temperature}')
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
        self.generator, self.batch = generator, batch

    def draw(self, num_steps: int, rows: Sequence[int]) -> Tensor:
        """(rows, num_steps) float32; a row may be there more than once."""
        if isinstance(self.generator, Sequence):
            return torch.stack([_uniform((num_steps,), self.generator[row]).cpu() for row in rows])
        # steps first, so that a longer run begins as the shorter one
        return _uniform((num_steps, len(rows)), self.generator).t()


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, device='cpu' if generator is None else generator.device)


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
