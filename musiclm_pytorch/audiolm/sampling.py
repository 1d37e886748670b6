"""From logits to tokens: temperature, top-k, top-p, where the randomness comes from, and the loop over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from musiclm_pytorch.audiolm.embedding import PAD
from musiclm_pytorch.audiolm.stages import Session
from musiclm_pytorch.checks import typechecked

# On an accelerator, asking whether all samples have ended waits for it: not at each token.
ASK_EVERY = 16

# beyond these, logits overflow
LOWEST_TEMPERATURE, MOST_GUIDANCE = 0.001, 100

Progress = bool | Callable[[int, int], None]

Generators = torch.Generator | Sequence[torch.Generator] | None


@typechecked
@dataclass(frozen=True)
class Sampling:
    """How one stage draws its tokens.

    temperature: divides the logits; 0 always takes the likeliest token
    top_k: only the k likeliest tokens
    top_p: only the fewest tokens that reach this probability together, of those that top_k leaves
    cond_scale: classifier-free guidance, null + cond_scale · (conditioned − null); 1 is without

    Raises ValueError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    cond_scale: float = 1.0

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

    def draw(self, num_steps: int, rows: Sequence[int] | None = None) -> Tensor:
        """(rows or b, num_steps) float32."""
        rows = range(self.batch) if rows is None else rows
        if isinstance(self.generator, Sequence):
            return torch.stack([_uniform((num_steps,), self.generator[row]).cpu() for row in rows])
        # steps first, so that a longer run begins as the shorter one
        return _uniform((num_steps, len(rows)), self.generator).t()


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, device='cpu' if generator is None else generator.device)


def sample(
    session: Session,
    sampling: Sampling,
    noise: Tensor,
    *,
    end_id: int | None = None,
    may_end_from: Sequence[int] = (),
    may_end_every: int = 1,
    advance: Callable[[int], None],
) -> Tensor:
    """Draw a token for each column of `noise` (b, n), fewer once all samples have drawn `end_id`.

    may_end_from: the first step at which each sample may end; may_end_every: it may at each so many steps

    Returns tokens (b, n): what follows the end of a sample is to be ignored.
    """
    batch, num_steps = noise.shape
    noise = noise.to(session.features.device)
    tokens = torch.full((batch, num_steps), PAD, dtype=torch.long, device=noise.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=noise.device)
    earliest = torch.tensor(may_end_from, device=noise.device)
    ask_every = 1 if noise.device.type == 'cpu' else ASK_EVERY
    for step in range(num_steps):
        logits = session.logits()
        if end_id is not None:
            if step % may_end_every or step < min(may_end_from):
                logits[:, end_id] = float('-inf')
            elif step < max(may_end_from):
                logits[:, end_id].masked_fill_(step < earliest, float('-inf'))
        drawn = sampling.draw(logits, noise[:, step])
        tokens[:, step] = drawn
        if end_id is not None:
            ended |= drawn == end_id
            if step % ask_every == 0 and ended.all():
                advance(num_steps - step)
                break
        if step + 1 < num_steps:
            session.push(drawn)
        advance(1)
    return tokens


def first_ends(tokens: Tensor, end_id: int) -> list[int]:
    """How many tokens of each row (b, n) stand in front of its first `end_id`, n where there is none."""
    is_end = tokens == end_id
    return torch.where(is_end.any(dim=1), is_end.long().argmax(dim=1), tokens.shape[1]).tolist()


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
