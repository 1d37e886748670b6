"""Sampling from the stages of AudioLM: text or audio embeddings → semantic tokens → coarse codes → fine codes.

Exact against the stages' own uncached forward in float32, at a constant cost a token: keys and values are kept in
place, all samples and both branches of guidance are one batch. Long results are made in windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_pytorch.audiolm.bridge import CoarseTransformer, FineTransformer, SemanticTransformer
from musiclm_pytorch.audiolm.embedding import PAD
from musiclm_pytorch.audiolm.sampling import Generators, Noise, Progress, Sampling, counted_steps, first_ends, sample
from musiclm_pytorch.audiolm.stages import CoarseDecoder, FineDecoder, SemanticDecoder
from musiclm_pytorch.audiolm.windows import Window, continued_windows, separate_windows
from musiclm_pytorch.checks import check_positive, typechecked

Embeds = Tensor | Sequence[Tensor] | None

PLAIN = Sampling()


class TokenSequences(NamedTuple):
    """tokens: (b, n) semantic tokens or (b, t, q) codes, int64, −1 after the end of a sample
    lengths: (b,) int64, tokens or frames of each sample before its end"""

    tokens: Tensor
    lengths: Tensor


@typechecked
@torch.inference_mode()
def generate_semantic(
    transformer: SemanticTransformer | SemanticDecoder,
    *,
    max_length: int,
    num_samples: int | None = None,
    text_embeds: Embeds = None,
    prime: Tensor | None = None,
    sampling: Sampling = PLAIN,
    min_length: int = 1,
    window: int | None = None,
    overlap: int = 0,
    prime_overlap: int | None = None,
    generator: Generators = None,
    progress: Progress = False,
) -> TokenSequences:
    """Sample semantic tokens until the end token or `max_length`.

    transformer: the stage, or a `SemanticDecoder` of it, which saves laying out the weights at each call
    max_length, min_length: tokens, the prime included; no sample ends before `min_length`
    num_samples: batch size, if neither the conditioning nor the prime tells it
    text_embeds: (b, n, d), or (1, n, d) for all samples; a list has one for each window, the last one stays
    prime: (b, n) int64 tokens that the result begins with, padded with −1 behind shorter ones
    window, overlap: at most `window` tokens are seen at once, each window continues the last `overlap` of the one
        before; None sees everything
    prime_overlap: how many tokens of the prime the first window sees, at most; None for all of them where they are
        fewer than a window, else for `overlap`. What a new text shall not be held by is better left out
    generator: one, or one a sample, which makes samples independent of the batch they are in
    progress: True for a bar, or a function of steps done and steps in all

    Returns tokens (b, n) and lengths (b,), without the end token.
    Raises ValueError for lengths, windows, tokens or shapes that do not fit.
    """
    decoder = transformer if isinstance(transformer, SemanticDecoder) else SemanticDecoder(transformer)
    _check_lengths(max_length, min_length)
    batch = _batch_size(num_samples, prime=prime, text_embeds=text_embeds)
    prime = _empty(batch, 0) if prime is None else prime
    _check_ids('prime', prime, (batch, None), decoder.codebook_size, may_pad=True)
    lengths = (prime != PAD).sum(dim=1)
    known = int(lengths.max())
    is_prefix = torch.arange(prime.shape[1], device=prime.device) < lengths[:, None]
    if not torch.equal(prime != PAD, is_prefix):
        raise ValueError('prime has padding (−1) in front of tokens; it may only stand behind them')
    if known > max_length:
        raise ValueError(f'prime has {known} tokens, more than max_length = {max_length}')

    if (window is not None or prime_overlap is not None) and int(lengths.min()) < known:
        raise ValueError(
            f'with a window or prime_overlap, all primes must have the same length, got {lengths.tolist()}'
        )

    # the primes end at the same place, so that all samples go on from it; the shift goes away in the end
    shift = (known - lengths).tolist()
    end = max_length + max(shift)
    tokens = _empty(batch, end).to(decoder.device)
    for row, (own, first) in enumerate(zip(prime, shift)):
        tokens[row, first:known] = own[: known - first]
    windows = continued_windows(end, window, overlap, known, prime_overlap)
    noise, stops = Noise(generator, batch), [first + max_length for first in shift]
    active = list(range(batch))
    with counted_steps(progress, 'semantic', sum(w.stop - w.known for w in windows)) as advance:
        for number, (start, known, stop) in enumerate(windows):
            rows = active = [row for row in active if known < stops[row]]
            if not rows:
                break
            embeds = decoder.check_condition(_at(text_embeds, number), batch, sampling.cond_scale)
            session = decoder.begin(
                tokens[rows, start:known],
                max_tokens=stop - start,
                text_embeds=None if embeds is None else embeds[rows],
                cond_scale=sampling.cond_scale,
            )
            new = sample(
                session,
                sampling,
                noise.draw(stop - known, rows),
                end_id=decoder.end_id,
                may_end_from=[shift[row] + min_length - known for row in rows],
                advance=advance,
            )
            tokens[rows, known:stop] = new
            ends = first_ends(new, decoder.end_id)
            for row, length in zip(rows, ends):
                if length < stop - known:
                    stops[row] = min(stops[row], known + length)
            active = [row for row, length in zip(rows, ends) if length == stop - known]
    rows = [row[first:last] for row, first, last in zip(tokens, shift, stops)]
    return _padded(rows, tokens.new_full((max_length,), PAD))


@typechecked
@torch.inference_mode()
def generate_coarse(
    transformer: CoarseTransformer | CoarseDecoder,
    semantic_ids: Tensor,
    *,
    max_length: int | Sequence[int],
    text_embeds: Embeds = None,
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
) -> TokenSequences:
    """Sample coarse codes for semantic tokens, until the end token or `max_length` frames.

    semantic_ids: (b, n) int64, −1 or the end token where there are none: those are not attended to, as in training
    max_length: frames, the prime included; or one number a sample
    prime: (b, frames, q) int64 codes that the result begins with
    unique_consecutive: whether the stage was trained on semantic tokens without repetitions, which are then dropped
    window, overlap, prime_overlap: in frames, as in `generate_semantic`. With a window or a `prime_overlap`, what is
        seen of the semantic tokens is those of the same time, hence `semantic_per_frame`, the tokens' rate over the
        frames'; they must hold repetitions
    transformer, text_embeds, sampling, min_length, generator, progress: as in `generate_semantic`

    Returns codes (b, t, q) and lengths (b,) in frames.
    Raises ValueError for lengths, windows, tokens or shapes that do not fit.
    """
    decoder = transformer if isinstance(transformer, CoarseDecoder) else CoarseDecoder(transformer)
    num_semantic_tokens, q = decoder.transformer.num_semantic_tokens, decoder.num_quantizers
    batch = len(semantic_ids)
    _check_ids('semantic_ids', semantic_ids, (None, None), num_semantic_tokens + 1, may_pad=True)
    limits = [max_length] * batch if isinstance(max_length, int) else list(max_length)
    if len(limits) != batch:
        raise ValueError(f'max_length has {len(limits)} lengths for {batch} samples')
    _check_lengths(max(limits, default=0), min_length)
    check_positive(max_length=min(limits))
    prime = _empty(batch, 0, q) if prime is None else prime
    _check_ids('prime', prime, (batch, None, q), decoder.codebook_size)
    known, end = prime.shape[1], max(limits)
    if known > min(limits):
        raise ValueError(f'prime has {known} frames, more than max_length = {min(limits)}')
    windows = continued_windows(end, window, overlap, known, prime_overlap)
    has_spans = window is not None or prime_overlap is not None
    if has_spans and (semantic_per_frame is None or semantic_per_frame <= 0):
        raise ValueError(
            f'with a window or prime_overlap, semantic_per_frame must be a number above 0, got {semantic_per_frame}'
        )

    semantic_ids = semantic_ids.to(decoder.device)
    codes = _empty(batch, end, q).to(decoder.device)
    codes[:, :known] = prime
    noise, active = Noise(generator, batch), list(range(batch))
    with counted_steps(progress, 'coarse', sum(w.stop - w.known for w in windows) * q) as advance:
        for number, (start, known, stop) in enumerate(windows):
            rows = active = [row for row in active if known < limits[row]]
            if not rows:
                break
            embeds = decoder.check_condition(_at(text_embeds, number), batch, sampling.cond_scale)
            seen = semantic_ids[rows]
            if has_spans:
                seen = seen[:, _semantic_span(start, stop, semantic_per_frame)]
            session = decoder.begin(
                _without_repetitions(seen) if unique_consecutive else seen,
                codes[rows, start:known],
                max_frames=stop - start,
                text_embeds=None if embeds is None else embeds[rows],
                cond_scale=sampling.cond_scale,
            )
            new = sample(
                session,
                sampling,
                noise.draw((stop - known) * q, rows),
                end_id=decoder.end_id,
                may_end_from=[(min_length - known) * q for _ in rows],
                may_end_every=q,  # only between frames, as in the labels of training
                advance=advance,
            )
            ends = [length // q for length in first_ends(new, decoder.end_id)]
            codes[rows, known:stop] = new.unflatten(1, (-1, q))
            for row, length in zip(rows, ends):
                if length < stop - known:
                    limits[row] = min(limits[row], known + length)
            active = [row for row, length in zip(rows, ends) if length == stop - known]
    return _padded([row[:limit] for row, limit in zip(codes, limits)], codes.new_full((end, q), PAD))


@typechecked
@torch.inference_mode()
def generate_fine(
    transformer: FineTransformer | FineDecoder,
    coarse_codes: Tensor,
    *,
    text_embeds: Embeds = None,
    prime: Tensor | None = None,
    sampling: Sampling = PLAIN,
    window: int | None = None,
    max_batch: int = 32,
    generator: Generators = None,
    progress: Progress = False,
) -> TokenSequences:
    """Sample the fine codes of coarse codes.

    coarse_codes: (b, t, q) int64; −1 or the end token in a frame means that the sample has ended before it
    prime: (b, frames, q') int64 fine codes that the result begins with
    window: frames; all windows are made apart from each other, in one batch. It should be the length of the crops
        that the stage was trained on, for its position bias depends on it; shorter samples are padded to it
    max_batch: the most windows at once, which bounds memory
    transformer, text_embeds, sampling, generator, progress: as in `generate_semantic`

    Returns codes (b, t, q') and lengths (b,) in frames.
    Raises ValueError for windows, tokens or shapes that do not fit.
    """
    decoder = transformer if isinstance(transformer, FineDecoder) else FineDecoder(transformer)
    stage, q = decoder.transformer, decoder.num_quantizers
    _check_ids('coarse_codes', coarse_codes, (None, None, stage.num_coarse_quantizers), stage.eos_id + 1, may_pad=True)
    check_positive(max_batch=max_batch)
    coarse_codes = coarse_codes.to(decoder.device)
    batch, num_frames, _ = coarse_codes.shape
    is_frame = ((coarse_codes != PAD) & (coarse_codes != stage.eos_id)).all(dim=-1)
    lengths = is_frame.long().cumprod(dim=-1).sum(dim=-1)
    prime = _empty(batch, 0, q) if prime is None else prime
    _check_ids('prime', prime, (batch, None, q), decoder.codebook_size)
    known = prime.shape[1]
    if known > num_frames:
        raise ValueError(f'prime has {known} frames, more than the {num_frames} of coarse_codes')
    coarse_codes = coarse_codes.masked_fill(
        torch.arange(num_frames, device=decoder.device)[:, None] >= lengths[:, None, None], PAD
    )

    codes = _empty(batch, num_frames, q).to(decoder.device)
    codes[:, :known] = prime
    noise = Noise(generator, batch)
    jobs = [
        _Job(row, number, w, max(known - w.start, 0))
        for row, length in enumerate(lengths.tolist())
        for number, w in enumerate(separate_windows(length, window, known))
    ]
    noises = {job: noise.draw((job.window.stop - job.window.start - job.begin) * q, [job.row])[0] for job in jobs}
    context = window or num_frames
    padded = F.pad(coarse_codes, (0, 0, 0, context), value=PAD)
    groups = list(_batches(jobs, max_batch))
    num_steps = [max(len(noises[job]) for job in group) for group in groups]
    with counted_steps(progress, 'fine', sum(num_steps)) as advance:
        for group, steps in zip(groups, num_steps):
            embeds = [
                decoder.check_condition(_at(text_embeds, job.number), batch, sampling.cond_scale) for job in group
            ]
            session = decoder.begin(
                torch.stack([padded[job.row, job.window.start : job.window.start + context] for job in group]),
                torch.stack([codes[job.row, job.window.start : job.window.start + job.begin] for job in group]),
                max_frames=group[0].begin + steps // q,
                text_embeds=None if embeds[0] is None else torch.stack([e[job.row] for e, job in zip(embeds, group)]),
                cond_scale=sampling.cond_scale,
            )
            drawn = torch.stack([F.pad(noises[job], (0, steps - len(noises[job]))) for job in group])
            new = sample(session, sampling, drawn, advance=advance).unflatten(1, (-1, q))
            for job, own in zip(group, new):
                start, first, stop = job.window
                codes[job.row, first:stop] = own[first - start - job.begin : stop - start - job.begin]
    return _padded([row[:length] for row, length in zip(codes, lengths.tolist())], codes.new_full((num_frames, q), PAD))


class _Job(NamedTuple):
    """One window of one sample in the fine stage, of which the first `begin` frames belong to the prime."""

    row: int
    number: int
    window: Window
    begin: int


def _batches(jobs: list[_Job], max_batch: int) -> Iterator[list[_Job]]:
    """Jobs that can go side by side: with as many frames given."""
    for begin in sorted({job.begin for job in jobs}):
        alike = [job for job in jobs if job.begin == begin]
        yield from (alike[at : at + max_batch] for at in range(0, len(alike), max_batch))


def _at(text_embeds: Embeds, number: int) -> Tensor | None:
    """The conditioning of a window."""
    if text_embeds is None or isinstance(text_embeds, Tensor):
        return text_embeds
    return text_embeds[min(number, len(text_embeds) - 1)]


def _semantic_span(start: int, stop: int, semantic_per_frame: float | Fraction) -> slice:
    """The semantic tokens that overlap the frames [start, stop) in time."""
    rate = Fraction(semantic_per_frame).limit_denominator(10_000)
    return slice(math.floor(start * rate), math.ceil(stop * rate))


def _without_repetitions(ids: Tensor) -> Tensor:
    rows = [torch.unique_consecutive(row[row != PAD]) for row in ids]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def _empty(batch: int, *shape: int) -> Tensor:
    return torch.full((batch, *shape), PAD, dtype=torch.long)


def _padded(rows: list[Tensor], template: Tensor) -> TokenSequences:
    # plain tensors: a loss could not be computed from those that inference mode makes
    with torch.inference_mode(False):
        tokens = torch.full((len(rows), *template.shape), PAD, device=template.device)
        lengths = torch.tensor([len(row) for row in rows], device=template.device)
    for own, row in zip(tokens, rows):
        own[: len(row)] = row
    return TokenSequences(tokens, lengths)


# ---------------------------------------------------------------------------------------------------------------
# Checks of arguments


def _check_lengths(max_length: int, min_length: int) -> None:
    check_positive(max_length=max_length)
    if not 1 <= min_length <= max_length:
        raise ValueError(f'min_length must lie between 1 and max_length = {max_length}, got {min_length}')


def _batch_size(num_samples: int | None, *, prime: Tensor | None, text_embeds: Embeds) -> int:
    check_positive(num_samples=num_samples)
    if prime is not None:
        if num_samples not in (None, len(prime)):
            raise ValueError(f'num_samples is {num_samples}, but prime has {len(prime)} samples')
        return len(prime)
    embeds = _at(text_embeds, 0)
    return num_samples or (1 if embeds is None else len(embeds))


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
