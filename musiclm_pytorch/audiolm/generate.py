"""Sampling from the stages of AudioLM: text or audio embeddings → semantic tokens → coarse codes → fine codes.

Exact against the stages' own uncached forward in float32, at a constant cost a token: keys and values are kept in
place, all samples and both branches of guidance are one batch. Long results are made in windows, so that time and
memory grow with their length only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.audiolm.convert import own_stage
from musiclm_pytorch.audiolm.decode_step import FusedStep
from musiclm_pytorch.audiolm.generation_args import (
    Generators,
    LogitsProcessor,
    Noise,
    Progress,
    Sampling,
    counted_steps,
)
from musiclm_pytorch.audiolm.stages import (
    NO_TIMES,
    PAD,
    STAGES,
    CoarseTransformer,
    FineTransformer,
    GenerationState,
    SemanticTransformer,
    StageTransformer,
)
from musiclm_pytorch.checks import check_positive, described, typechecked
from musiclm_pytorch.kernels.processor import one_thread
from musiclm_pytorch.mulan.model import evaluating

FAR = 8  # frames

Embeds = Tensor | Sequence[Tensor] | None

PLAIN = Sampling()
# On an accelerator, asking whether all samples have ended waits for it: not at each token.
ASK_EVERY = 16


class TokenSequences(NamedTuple):
    """tokens: (b, n) semantic tokens or (b, t, q) codes, int64, −1 after the end of a sample
    lengths: (b,) int64, tokens or frames of each sample before its end"""

    tokens: Tensor
    lengths: Tensor


class Window(NamedTuple):
    """Positions [start, stop) of the whole: those before `known` are given, the rest is generated."""

    start: int
    known: int
    stop: int


class Job(NamedTuple):
    """A window of a sample, its number among the sample's windows, and from where on what it makes is kept."""

    row: int
    number: int
    window: Window
    kept: int

    @property
    def given(self) -> int:
        return self.window.known - self.window.start


# ---------------------------------------------------------------------------------------------------------------
# The three stages


@typechecked
def generate_semantic(
    transformer: nn.Module,
    *,
    max_length: int,
    num_samples: int | None = None,
    text_embeds: Embeds = None,
    negative_embeds: Tensor | None = None,
    melody: Tensor | None = None,
    prime: Tensor | None = None,
    sampling: Sampling = PLAIN,
    min_length: int = 1,
    window: int | None = None,
    overlap: int = 0,
    prime_overlap: int | None = None,
    generator: Generators = None,
    progress: Progress = False,
    total_length: int | None = None,
    compile: bool = False,
) -> TokenSequences:
    """Sample semantic tokens until the end token or `max_length`.

    Args:
        transformer: the stage, ours or audiolm-pytorch's
        max_length, min_length: tokens, the prime included; no sample ends before `min_length`
        num_samples: batch size, if neither the conditioning nor the prime tells it
        text_embeds: (b, n, d), or (1, n, d) for all samples; a list has one for each window, the last one stays
        negative_embeds: (b, n, d) or (1, n, d), what to keep away from, see `Sampling`; its n is that of text_embeds
        melody: (b, m, d) or (1, m, d), of the melody to follow at the time of each token, from the first one of the
            prime on, as of `StageTransformer.loss`; what is longer than it goes on without
        prime: (b, n) int64 tokens that the result begins with, padded with −1 behind shorter ones
        window, overlap: at most `window` tokens are seen at once, each window continues the last `overlap` of the one
            before; None sees everything
        prime_overlap: how many tokens of the prime the first window sees, at most; None for all of them where they are
            fewer than a window, else for `overlap`. What a new text shall not be held by is better left out
        generator: one, or one a sample, which makes samples independent of the batch they are in
        progress: True for a bar, or a function of steps done and steps in all
        total_length: of the whole, in tokens, if this is a part of it; by it, kernels are loaded or not
        compile: run steps through torch.compile at fixed shapes, on a GPU as a CUDA graph

    Returns tokens (b, n) and lengths (b,), without the end token.
    Raises ValueError for lengths, windows, tokens or shapes that do not fit, TypeError for another stage.
    """
    stage = own_stage(transformer, SemanticTransformer)
    _check_lengths(max_length, min_length)
    check_positive(num_samples=num_samples)
    if prime is None:
        embeds = _at(text_embeds, 0)
        prime = _empty(num_samples or (1 if embeds is None else len(embeds)), 0)
    elif num_samples not in (None, len(prime)):
        raise ValueError(f'num_samples is {num_samples}, but prime has {len(prime)} samples')
    batch = len(prime)
    _check_ids('prime', prime, (batch, None), stage.codebook_size, may_pad=True)
    lengths = (prime != PAD).sum(dim=1)
    if not torch.equal(prime != PAD, torch.arange(prime.shape[1], device=prime.device) < lengths[:, None]):
        raise ValueError('prime has padding (−1) in front of tokens; it may only stand behind them')
    longest, known = int(lengths.max()), int(lengths.min())
    if longest > max_length:
        raise ValueError(f'prime has {longest} tokens, more than max_length = {max_length}')
    if (window is not None or prime_overlap is not None) and known < longest:
        raise ValueError(
            f'with a window or prime_overlap, all primes must have the same length, got {lengths.tolist()}'
        )
    tokens = _empty(batch, max_length).to(stage.device)
    tokens[:, :longest] = prime[:, :longest]
    windows = continued_windows(max_length, window, overlap, known, prime_overlap)
    return _generate(
        stage,
        tokens[..., None],
        _side_by_side(windows, batch),
        lambda jobs: (),
        sampling=sampling,
        text_embeds=text_embeds,
        negative_embeds=negative_embeds,
        melody=None if melody is None else _conditioning(stage, melody, batch, sampling, 'melody'),
        may_end_from=min_length,
        noise=Noise(generator, batch),
        forced=lengths.tolist() if known < longest else None,
        progress=progress,
        total_length=total_length,
        compile=compile,
    )


@typechecked
def generate_coarse(
    transformer: nn.Module,
    semantic_ids: Tensor,
    *,
    max_length: int | Sequence[int],
    text_embeds: Embeds = None,
    negative_embeds: Tensor | None = None,
    prime: Tensor | None = None,
    sampling: Sampling = PLAIN,
    min_length: int = 1,
    unique_consecutive: bool = False,
    window: int | None = None,
    overlap: int = 0,
    prime_overlap: int | None = None,
    semantic_per_frame: float | Fraction | None = None,
    generator: Generators = None,
    progress: Progress = False,
    total_length: int | None = None,
    compile: bool = False,
) -> TokenSequences:
    """Sample coarse codes for semantic tokens, until the end token or `max_length` frames.

    Args:
        semantic_ids: (b, n) int64, −1 or the end token where there are none: those are not attended to, as in training
        max_length: frames, the prime included; or one number a sample
        prime: (b, frames, q) int64 codes that the result begins with
        unique_consecutive: whether the stage was trained on semantic tokens without repetitions, which are then dropped
        window, overlap, prime_overlap: in frames, as in `generate_semantic`. With a window or a `prime_overlap`, what
            is seen of the semantic tokens is those of the same time, hence `semantic_per_frame`, the tokens' rate over
            the frames'; they must hold repetitions

    Others are as in `generate_semantic`.

    Returns codes (b, t, q) and lengths (b,) in frames.
    Raises ValueError for lengths, windows, tokens or shapes that do not fit, TypeError for another stage.
    """
    stage = own_stage(transformer, CoarseTransformer)
    batch, q = len(semantic_ids), stage.num_levels
    _check_ids('semantic_ids', semantic_ids, (None, None), stage.num_semantic_tokens + 1, may_pad=True)
    limits = [max_length] * batch if isinstance(max_length, int) else list(max_length)
    if len(limits) != batch:
        raise ValueError(f'max_length has {len(limits)} lengths for {batch} samples')
    _check_lengths(max(limits, default=0), min_length)
    check_positive(max_length=min(limits))
    prime = _empty(batch, 0, q) if prime is None else prime
    _check_ids('prime', prime, (batch, None, q), stage.codebook_size)
    known, end = prime.shape[1], max(limits)
    if known > min(limits):
        raise ValueError(f'prime has {known} frames, more than max_length = {min(limits)}')
    windows = continued_windows(end, window, overlap, known, prime_overlap)
    has_spans = window is not None or prime_overlap is not None
    if has_spans and (semantic_per_frame is None or semantic_per_frame <= 0):
        raise ValueError(
            f'with a window or prime_overlap, semantic_per_frame must be a number above 0, got {semantic_per_frame}'
        )
    if (told := stage.semantic_per_frame) is not None:
        if unique_consecutive:
            raise ValueError(f'{NO_TIMES} semantic_per_frame; pass unique_consecutive=False')
        if semantic_per_frame is not None and abs(semantic_per_frame - told) > 1e-4:
            raise ValueError(
                f'this stage was built for semantic_per_frame = {told:g}, got {float(semantic_per_frame):g}'
            )
        # windows begin where a semantic token does, as the crops of training: a few frames earlier
        grid = Fraction(told).limit_denominator(10_000).denominator
        windows = [it._replace(start=on_grid(it.start, grid)) for it in windows]
    semantic_ids = semantic_ids.to(stage.device)
    codes = _empty(batch, end, q).to(stage.device)
    codes[:, :known] = prime

    def given(jobs: list[Job]) -> tuple[Tensor]:
        seen, window = semantic_ids[[job.row for job in jobs]], jobs[0].window
        if has_spans:
            rate = Fraction(semantic_per_frame).limit_denominator(10_000)
            seen = seen[:, math.floor(window.start * rate) : math.ceil(window.stop * rate)]
        if unique_consecutive:
            rows = [torch.unique_consecutive(row[row != PAD]) for row in seen]
            seen = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        return (seen,)

    return _generate(
        stage,
        codes,
        _side_by_side(windows, batch),
        given,
        sampling=sampling,
        text_embeds=text_embeds,
        negative_embeds=negative_embeds,
        limits=limits,
        may_end_from=min_length,
        noise=Noise(generator, batch),
        progress=progress,
        total_length=total_length,
        compile=compile,
    )


@typechecked
def generate_fine(
    transformer: nn.Module,
    coarse_codes: Tensor,
    *,
    text_embeds: Embeds = None,
    negative_embeds: Tensor | None = None,
    prime: Tensor | None = None,
    sampling: Sampling = PLAIN,
    window: int | None = None,
    max_batch: int = 32,
    generator: Generators = None,
    progress: Progress = False,
    total_length: int | None = None,
    compile: bool = False,
) -> TokenSequences:
    """Sample the fine codes of coarse codes.

    Args:
        coarse_codes: (b, t, q) int64; −1 or the end token in a frame means that the sample has ended before it
        prime: (b, frames, q') int64 fine codes that the result begins with
        window: frames; all windows are made apart from each other, in one batch. It should be the length of the crops
            that the stage was trained on, for its position bias depends on it; shorter samples are padded to it
        max_batch: the most windows at once, which bounds memory

    Others are as in `generate_semantic`.

    Returns codes (b, t, q') and lengths (b,) in frames.
    Raises ValueError for windows, tokens or shapes that do not fit, TypeError for another stage.
    """
    stage = own_stage(transformer, FineTransformer)
    q = stage.num_levels
    _check_ids('coarse_codes', coarse_codes, (None, None, stage.num_coarse_quantizers), stage.eos_id + 1, may_pad=True)
    check_positive(max_batch=max_batch)
    coarse_codes = coarse_codes.to(stage.device)
    batch, num_frames, _ = coarse_codes.shape
    is_frame = ((coarse_codes != PAD) & (coarse_codes != stage.eos_id)).all(dim=-1).long().cumprod(dim=-1)
    lengths = is_frame.sum(dim=-1).tolist()
    prime = _empty(batch, 0, q) if prime is None else prime
    _check_ids('prime', prime, (batch, None, q), stage.codebook_size)
    known = prime.shape[1]
    if known > num_frames:
        raise ValueError(f'prime has {known} frames, more than the {num_frames} of coarse_codes')
    codes = _empty(batch, num_frames, q).to(stage.device)
    codes[:, :known] = prime
    context = window or num_frames
    padded = F.pad(coarse_codes.masked_fill(is_frame[..., None] == 0, PAD), (0, 0, 0, context), value=PAD)

    # those go side by side that have as many frames given; a sample's windows stay in their order
    jobs = [
        Job(row, number, Window(w.start, max(known, w.start), w.stop), w.known)
        for row, length in enumerate(lengths)
        for number, w in enumerate(separate_windows(length, window, known))
    ]
    batches = []
    for begin in sorted({job.given for job in jobs}, reverse=True):
        alike = [job for job in jobs if job.given == begin]
        batches += [alike[at : at + max_batch] for at in range(0, len(alike), max_batch)]

    def given(jobs: list[Job]) -> tuple[Tensor]:
        return (torch.stack([padded[job.row, job.window.start :][:context].flatten() for job in jobs]),)

    return _generate(
        stage,
        codes,
        batches,
        given,
        sampling=sampling,
        text_embeds=text_embeds,
        negative_embeds=negative_embeds,
        limits=lengths,
        noise=Noise(generator, batch),
        progress=progress,
        total_length=total_length,
        compile=compile,
    )


# ---------------------------------------------------------------------------------------------------------------
# The loop


@torch.inference_mode()
def _generate(
    stage: StageTransformer,
    tokens: Tensor,
    batches: list[list[Job]],
    given: Callable[[list[Job]], tuple[Tensor, ...]],
    *,
    sampling: Sampling,
    text_embeds: Embeds,
    negative_embeds: Tensor | None,
    noise: Noise,
    melody: Tensor | None = None,
    limits: Sequence[int] | None = None,
    may_end_from: int = 0,
    forced: list[int] | None = None,
    progress: Progress,
    total_length: int | None,
    compile: bool,
) -> TokenSequences:
    """Fill `tokens (b, n, q)`, windows of several samples side by side, up to the end of each sample.

    given: what the stage is given for windows that go side by side
    melody: `(b, m, d)`, for a stage whose windows that go side by side are of the same time
    limits: the length of each sample, n by default
    may_end_from: where a sample may end at the earliest
    forced: of primes of different lengths how many tokens there are of each, if there is but one window
    """
    batch, length, q = tokens.shape
    limits = [length] * batch if limits is None else list(limits)
    name = next(name for name, kind in STAGES.items() if isinstance(stage, kind))
    negative = None if negative_embeds is None else _conditioning(stage, negative_embeds, batch, sampling)
    with evaluating(stage), counted_steps(progress, name, sum(_num_steps(jobs) for jobs in batches) * q) as advance:
        for jobs in batches:
            jobs = [job for job in jobs if job.window.known < limits[job.row]]
            if not jobs:
                continue
            rows, windows, steps = [job.row for job in jobs], [job.window for job in jobs], _num_steps(jobs) * q
            embeds = [_conditioning(stage, _at(text_embeds, job.number), batch, sampling) for job in jobs]
            state = stage.prefill(
                *given(jobs),
                torch.stack([tokens[row, w.start : w.known].flatten() for row, w in zip(rows, windows)]),
                max_tokens=jobs[0].given * q + steps,
                conditioning=None if embeds[0] is None else torch.stack([it[r] for it, r in zip(embeds, rows)]),
                negative=None if negative is None else negative[rows],
                melody=None if melody is None else melody[rows, windows[0].start : windows[0].stop],
                cond_scale=sampling.cond_scale,
                negative_scale=sampling.negative_scale,
                total_tokens=(total_length or length) * q,
                compile=compile,
            )
            drawn = torch.zeros(len(jobs), steps, dtype=torch.float32)
            counts = [(w.stop - w.known) * q for w in windows]
            if min(counts) == steps:
                drawn = noise.draw(steps, rows)
            else:
                for own, row, count in zip(drawn, rows, counts):
                    own[:count] = noise.draw(count, [row])[0]
            first = windows[0].known
            primes = None
            if forced is not None:
                # a sample with a longer prime begins later, and with the first of its random numbers
                ahead = [forced[row] - first for row in rows]
                drawn = torch.stack([own.roll(by) for own, by in zip(drawn, ahead)])
                primes = tokens[rows, first:, 0]
            # PyTorch's threads go on waiting for work, busily, where those of the kernel need the cores
            alone = one_thread() if isinstance(state.cache.step, FusedStep) else nullcontext()
            with alone:
                new = _sample(
                    stage,
                    state,
                    sampling,
                    drawn,
                    may_end_from=(may_end_from - first) * q,
                    primes=primes,
                    advance=advance,
                )
            # what stands in front of the first end token of each, all where there is none
            is_end = new == (PAD - 1 if stage.end_id is None else stage.end_id)
            ends = torch.where(is_end.any(dim=1), is_end.long().argmax(dim=1), steps).tolist()
            for (row, _, w, kept), own, end in zip(jobs, new.unflatten(1, (-1, q)), ends):
                tokens[row, kept : w.stop] = own[kept - w.known : w.stop - w.known]
                if end < steps:
                    limits[row] = min(limits[row], w.known + end // q)
    tokens = tokens[..., 0] if isinstance(stage, SemanticTransformer) else tokens
    return _padded([row[:limit] for row, limit in zip(tokens, limits)], tokens)


def _num_steps(jobs: list[Job]) -> int:
    return max(job.window.stop - job.window.known for job in jobs)


def _sample(
    stage: StageTransformer,
    state: GenerationState,
    sampling: Sampling,
    noise: Tensor,
    *,
    may_end_from: int,
    primes: Tensor | None,
    advance: Callable[[int], None],
) -> Tensor:
    """Draw a token for each column of `noise` (b, n), fewer once all samples have ended.

    may_end_from: the first step at which a sample may end, between frames only, as in the labels of training
    primes: (b, n) tokens to take instead, where they are not PAD

    Returns tokens (b, n): what follows the end of a sample is to be ignored.
    """
    batch, num_steps = noise.shape
    noise = noise.to(state.features.device)
    tokens = torch.full((batch, num_steps), PAD, dtype=torch.long, device=noise.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=noise.device)
    ask_every = 1 if noise.device.type == 'cpu' else ASK_EVERY
    for step in range(num_steps):
        logits = stage.next_logits(state)
        if sampling.logits_processor is not None:
            logits = _processed(sampling.logits_processor, tokens[:, :step], logits)
        if stage.end_id is not None and (step % stage.num_levels or step < may_end_from):
            logits[:, stage.end_id] = float('-inf')
        if sampling.logits_processor is not None and not (logits.amax(dim=-1) > float('-inf')).all():  # or NaN
            raise ValueError(
                f'the logits_processor of a {type(stage).__name__} leaves no token at step {step}: all are −inf, or '
                'one is NaN; leave one beside the end token'
            )
        drawn = sampling.draw(logits, noise[:, step])
        if primes is not None:
            drawn = torch.where(primes[:, step] == PAD, drawn, primes[:, step])
        tokens[:, step] = drawn
        if stage.end_id is not None:
            ended |= drawn == stage.end_id
            if step % ask_every == 0 and ended.all():
                advance(num_steps - step)
                break
        if step + 1 < num_steps:
            stage.decode_step(state, drawn)
        advance(1)
    return tokens


def _processed(process: LogitsProcessor, tokens: Tensor, logits: Tensor) -> Tensor:
    """What a caller's function makes of logits; it may write into what it is given."""
    processed = process(tokens.clone(), logits.clone())
    if not isinstance(processed, Tensor) or processed.shape != logits.shape or not processed.is_floating_point():
        raise TypeError(
            f'a logits_processor must give logits as it gets them, {tuple(logits.shape)} of floats, got '
            f'{described(processed)}'
        )
    return processed.to(logits)


def _conditioning(
    stage: StageTransformer, embeds: Tensor | None, batch: int, sampling: Sampling, what: str = 'text_embeds'
) -> Tensor | None:
    """The conditioning of `batch` samples, on the device of the stage."""
    name, width = type(stage).__name__, stage.conditioning_dim
    if embeds is None:
        if stage.has_condition:
            raise ValueError(f'this {name} is conditioned: pass text_embeds of shape (batch, n, dim)')
        if sampling.cond_scale != 1:
            raise ValueError(
                f'this {name} has no condition to guide by: cond_scale must be 1, got {sampling.cond_scale}'
            )
        return None
    if not stage.has_condition:
        raise ValueError(f'this {name} was built without has_condition, so it takes no {what}')
    if embeds.ndim != 3 or embeds.shape[0] not in (1, batch) or embeds.shape[2] != width:
        raise ValueError(
            f'{what} must have shape ({batch}, n, {width}), or (1, n, {width}) for all samples, '
            f'got {tuple(embeds.shape)}'
        )
    return embeds.to(stage.device).expand(batch, -1, -1)


def _at(text_embeds: Embeds, number: int) -> Tensor | None:
    """The conditioning of a window."""
    if text_embeds is None or isinstance(text_embeds, Tensor):
        return text_embeds
    return text_embeds[min(number, len(text_embeds) - 1)]


def _empty(batch: int, *shape: int) -> Tensor:
    return torch.full((batch, *shape), PAD, dtype=torch.long)


@torch.inference_mode(False)
def _padded(rows: Iterable[Tensor], like: Tensor) -> TokenSequences:
    """Plain tensors: a loss could not be computed from those that inference mode makes."""
    tokens = torch.full(like.shape, PAD, device=like.device)
    lengths = torch.tensor([len(row) for row in rows], device=like.device)
    with torch.inference_mode():
        for own, row in zip(tokens, rows):
            own[: len(row)] = row
    return TokenSequences(tokens, lengths)


# ---------------------------------------------------------------------------------------------------------------
# Windows


@typechecked
def continued_windows(
    length: int, window: int | None, overlap: int = 0, prime: int = 0, prime_overlap: int | None = None
) -> list[Window]:
    """Windows that each continue the one before from its last `overlap` positions, as MusicLM's semantic and coarse
    stages do (https://arxiv.org/abs/2301.11325, section 3: 15 of 30 s).

    length: positions in all, of which the first `prime` are given; window: the most a window holds, None for all
    prime_overlap: how many of the given positions the first window sees, at most; None for all of them where they are
        fewer than a window, else for `overlap`

    Raises ValueError unless 0 ≤ overlap < window and 0 ≤ prime_overlap < window.
    """
    if window is not None:
        _check_window(window)
    for name, seen in dict(overlap=overlap, prime_overlap=prime_overlap or 0).items():
        if seen < 0:
            raise ValueError(f'{name} must be 0 or above, got {seen}')
        if window is not None and seen >= window:
            raise ValueError(f'{name} must lie between 0 and window - 1 = {window - 1}, got {seen}')
    if prime_overlap is None:
        prime_overlap = prime if window is None or prime < window else overlap
    first = max(prime - prime_overlap, 0)
    if window is None:
        return [Window(first, prime, length)] if prime < length else []
    windows, known = [], prime
    while known < length:
        start = known - overlap if windows else first
        windows.append(Window(start, known, min(start + window, length)))
        known = windows[-1].stop
    return windows


def on_grid(start: int, grid: int, far: float = FAR) -> int:
    """The last of every `grid` frames up to `start`; where these lie further apart than `far`, it is taken as it is."""
    return start - start % grid if grid <= far else start


def separate_windows(length: int, window: int | None, prime: int = 0) -> list[Window]:
    """Windows side by side, made without each other's result, as MusicLM's fine stage does (3 s each).

    The last one is as long as the others, so that its positions are those of training: it begins before the end of
    the one before, and what that one has made of the shared stretch stays.
    """
    if window is None:
        return [Window(0, prime, length)] if prime < length else []
    _check_window(window)
    last = max(length - window, 0)
    windows = [
        Window(min(start, last), max(start, prime), min(start + window, length)) for start in range(0, length, window)
    ]
    return [w for w in windows if w.known < w.stop]


def _side_by_side(windows: list[Window], batch: int) -> list[list[Job]]:
    return [[Job(row, number, window, window.known) for row in range(batch)] for number, window in enumerate(windows)]


def _check_window(window: int) -> None:
    if window < 1:
        raise ValueError(f'window must be at least 1, got {window}; None generates all at once')


# ---------------------------------------------------------------------------------------------------------------
# Checks of arguments


def _check_lengths(max_length: int, min_length: int) -> None:
    check_positive(max_length=max_length)
    if not 1 <= min_length <= max_length:
        raise ValueError(f'min_length must lie between 1 and max_length = {max_length}, got {min_length}')


def _check_ids(name: str, ids: Tensor, shape: tuple[int | None, ...], num_ids: int, may_pad: bool = False) -> None:
    if ids.dtype != torch.long:
        raise TypeError(f'{name} must be int64, got {ids.dtype}')
    if ids.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, ids.shape)):
        wanted = ', '.join('any' if size is None else str(size) for size in shape)
        raise ValueError(f'{name} must have shape ({wanted}), got {tuple(ids.shape)}')
    if len(ids) == 0:
        raise ValueError(f'{name} is an empty batch of shape {tuple(ids.shape)}; pass at least one sample')
    low = PAD if may_pad else 0
    if ids.numel() and not low <= int(ids.min()) <= int(ids.max()) < num_ids:
        raise ValueError(f'{name} must lie between {low} and {num_ids - 1}, got {int(ids.min())} to {int(ids.max())}')
