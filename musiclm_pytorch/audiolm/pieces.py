"""Pieces of music as wholes: three stages in turn, from a prime on and part by part, and their codes as waves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from musiclm_pytorch.audiolm.convert import own_codec, own_stage, own_tokenizer
from musiclm_pytorch.audiolm.generate import generate_coarse, generate_fine, generate_semantic, on_grid
from musiclm_pytorch.audiolm.generation_args import Progress, Sampling
from musiclm_pytorch.audiolm.protocols import Codec
from musiclm_pytorch.audiolm.stages import (
    STAGES,
    CoarseTransformer,
    FineTransformer,
    SemanticTransformer,
    StageTransformer,
    logits_of,
)
from musiclm_pytorch.audiolm.transformer import at_least_float32
from musiclm_pytorch.checks import check_positive
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.mulan.model import evaluating

FADE = 0.04  # seconds in which the one goes and the other comes
LEVEL = 1.0  # seconds on either side whose loudness is compared
MOST_GAIN = 6.0  # dB above or below that of all the given samples, so that what follows a fade-out is heard
# seconds of the part before that the first windows of a story's next part see: more carries the old prompt on,
# without any the music breaks off
CHANGE = 0.2
CHANGE_GUIDANCE = 2.0  # times as much guidance of the semantic stage there
# seconds in which what came in as loud as what was before finds its own loudness, where it does
SETTLE = 3.0
SILENT = 1e-4  # root mean square, -80 dB of full scale: too soft to tell a level
# seconds before a change of prompt in which the next part comes in and the one before goes
CROSSFADE = 0.3
# seconds at the end of a prime that are made again: tokens and codes there look beyond it, and tell of an end
REMADE = 0.1
# seconds of the right side of a gap by which candidates for it are judged
SEEN = 1.0
# frames: the convolutions of a codec reflect what they are given, and need something to reflect
SHORTEST_CODED = 32
DECODED_BEFORE = 1.0  # seconds of codes, more than a codec looks back

GENERATE = dict(semantic=generate_semantic, coarse=generate_coarse, fine=generate_fine)

# of each stage `(b, q, d)` of the prompt and of the negative one, if there is one
Conditions = Mapping[str, tuple[Tensor | None, Tensor | None]]


class Part(NamedTuple):
    """A part of the music under one conditioning: from when to when, in seconds."""

    begin: float
    end: float
    conditions: Conditions


def part_times(lengths: Sequence[float]) -> list[tuple[float, float]]:
    """From when to when each part of a story is made, in seconds.

    A part comes in `CROSSFADE` seconds before the one before ends, no earlier than in its middle.
    """
    ends = list(itertools.accumulate(lengths, initial=0.0))
    fades = [0.0, *(min(CROSSFADE, length / 2) for length in lengths)]
    return [(start - fade, end) for start, end, fade in zip(ends, ends[1:], fades)]


class AudioStages(nn.Module):
    """AudioLM (arXiv 2209.03143): three stages between a semantic tokenizer and a codec, under conditions from outside.

    Args:
        semantic, coarse, fine, codec, tokenizer: ours, or those of audiolm-pytorch. Without a fine stage the codec has
            the levels of the coarse one alone.
        windows: seconds that each stage sees at once.
        unique_consecutive: whether semantic tokens come without repetitions.

    Attributes:
        sample_rate: of the music, in Hz.
        frame_rate, semantic_rate: frames of the codec and semantic tokens a second, fractions.

    Raises ValueError for parts that do not fit each other.
    """

    def __init__(
        self,
        semantic: nn.Module,
        coarse: nn.Module,
        fine: nn.Module | None,
        codec: nn.Module,
        tokenizer: nn.Module,
        windows: tuple[float, float, float],
        unique_consecutive: bool,
    ):
        super().__init__()
        check_positive(**{f'the window of the {name} stage': it for name, it in zip(STAGES, windows)})
        for (name, kind), stage in zip(STAGES.items(), (semantic, coarse, fine)):
            setattr(self, name, None if stage is None else own_stage(stage, kind))
        self.codec, self.tokenizer = own_codec(codec), own_tokenizer(tokenizer)
        self.windows, self.unique_consecutive = windows, unique_consecutive
        self.sample_rate, self.frame_rate = self.codec.sample_rate, self.codec.frame_rate
        self.semantic_rate = self.tokenizer.frame_rate
        semantic, coarse, fine = self.semantic, self.coarse, self.fine
        made = coarse.num_levels + (0 if fine is None else fine.num_levels)
        checks = [
            ('coarse stage reads {} semantic tokens, but the semantic stage makes {}', coarse.num_semantic_tokens,
             semantic.num_semantic_tokens),
        ]  # fmt: skip
        if fine is not None:
            checks += [
                ('fine stage has {} codes a codebook, but the coarse stage {}', fine.codebook_size,
                 coarse.codebook_size),
                ('fine stage goes on after {} levels of codes, but the coarse stage makes {}',
                 fine.num_coarse_quantizers, coarse.num_levels),
            ]  # fmt: skip
        checks += [
            ('stages make {} levels of codes, but the codec has {}' + ('; pass a fine stage' if fine is None else ''),
             made, self.codec.num_quantizers),
            ('stages have {} codes a codebook, but the codec {}', coarse.codebook_size, self.codec.codebook_size),
        ]  # fmt: skip
        for what, ours, theirs in checks:
            if ours != theirs:
                raise ValueError(f'the {what.format(ours, theirs)}')

    @property
    def device(self) -> torch.device:
        return self.semantic.device

    @property
    def stages(self) -> dict[str, SemanticTransformer | CoarseTransformer | FineTransformer]:
        return {name: stage for name in STAGES if (stage := getattr(self, name)) is not None}

    def encode_prime(self, prime: tuple[Tensor, int] | None, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Semantic tokens `(b, n)`, coarse and fine codes `(b, t, q)` of a wave `(1, samples)` and its rate, up to
        `REMADE` seconds before its end."""
        coarse_levels, levels = self.coarse.num_levels, self.codec.num_quantizers
        semantic = torch.zeros(1, 0, dtype=torch.long, device=self.device)
        codes = torch.zeros(1, 0, levels, dtype=torch.long, device=self.device)
        if prime is not None:
            wave, rate = prime[0].to(self.device), prime[1]
            own = resample(wave, rate, self.tokenizer.sample_rate)
            if own.shape[-1] >= self.tokenizer.sample_rate / self.semantic_rate:
                semantic = self.tokenizer.encode(own)
                semantic = semantic[:, : max(0, semantic.shape[1] - steps_in(REMADE, self.semantic_rate))]
            if self.unique_consecutive:
                semantic = torch.unique_consecutive(semantic, dim=1)
            wave = resample(wave, rate, self.sample_rate)
            factor = int(self.sample_rate / self.frame_rate)
            if frames := wave.shape[-1] // factor:
                missing = SHORTEST_CODED * factor - wave.shape[-1]
                codes = self.codec.encode(F.pad(wave, (0, max(0, missing))))
                codes = codes[:, : max(0, frames - steps_in(REMADE, self.frame_rate))]
        semantic, codes = repeat(semantic, '1 n -> b n', b=batch), repeat(codes, '1 t q -> b t q', b=batch)
        return semantic.clone(), codes[..., :coarse_levels].clone(), codes[..., coarse_levels:].clone()

    def generate_parts(
        self,
        parts: Sequence[Part],
        samplings: Sequence[Sampling],
        *,
        prime: tuple[Tensor, int] | None,
        generators: Sequence[torch.Generator],
        progress: Progress = False,
        melody: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Semantic tokens `(b, n)` and codes of all levels `(b, t, q)` for each part, from the beginning of the music
        to its end, one sample a generator.

        Each part goes on from the one before under a conditioning of its own, `CROSSFADE` seconds before that ends.
        """
        semantic, coarse, fine = self.encode_prime(prime, len(generators))
        shared = dict(generator=generators, progress=progress)
        semantics = self._make_semantic(parts, semantic, samplings[0], melody=melody, **shared)
        coarses = self._make_coarse(parts, semantics, coarse, samplings[1], **shared)
        codes = self._make_fine(parts, coarses, fine, samplings[2], **shared)
        return list(zip(semantics, codes))

    def _make_semantic(
        self, parts: Sequence[Part], semantic: Tensor, sampling: Sampling, *, melody: Tensor | None, **shared: Any
    ) -> list[Tensor]:
        """Tokens `(b, n)` of each part, which go on from those of a prime."""
        made, known, window = [], semantic.shape[1], round(self.windows[0] * self.semantic_rate)
        for begin, end, conditions in parts:
            length = math.ceil(end * self.semantic_rate)
            steps = [(length, sampling, None)]
            if semantic.shape[1] > known:  # an earlier part has made what this one goes on from
                if not self.unique_consecutive:
                    semantic = semantic[:, : max(known, math.floor(begin * self.semantic_rate))]
                seen = min(steps_in(CHANGE, self.semantic_rate), window // 2)
                first = min(semantic.shape[1] - seen + window, length)
                steps.insert(0, (first, sampling.guided(CHANGE_GUIDANCE), seen))
            for stop, how, seen in steps:
                if stop > semantic.shape[1]:
                    keywords = dict(sampling=how, window=window, prime_overlap=seen, melody=melody, **shared)
                    semantic = extended(
                        self, 'semantic', prime=semantic, length=stop, conditions=conditions, **keywords
                    )
            made.append(semantic)
        return made

    def _make_coarse(
        self, parts: Sequence[Part], semantics: Sequence[Tensor], coarse: Tensor, sampling: Sampling, **shared: Any
    ) -> list[tuple[int, Tensor]]:
        """The first frame of each part that is its own, and codes `(b, t, q)` up to its end."""
        made, known, window = [], coarse.shape[1], round(self.windows[1] * self.frame_rate)
        for (begin, end, conditions), semantic in zip(parts, semantics):
            length, first, seen = math.ceil(end * self.frame_rate), 0, None
            if coarse.shape[1] > known:  # an earlier part has made what this one goes on from
                first = max(known, math.floor(begin * self.frame_rate))
                seen = min(steps_in(CHANGE, self.frame_rate), window // 2)
                coarse = coarse[:, :first]
            if self.unique_consecutive:  # no one knows which tokens belong to a window
                sight = dict(unique_consecutive=True)
            else:
                semantic = semantic[:, : math.ceil(end * self.semantic_rate)]
                per_frame = self.semantic_rate / self.frame_rate
                own = window if length > window else None
                sight = dict(window=own, prime_overlap=seen, semantic_per_frame=per_frame)
            if length > coarse.shape[1]:
                keywords = dict(sampling=sampling, **sight, **shared)
                coarse = extended(
                    self, 'coarse', semantic, prime=coarse, length=length, conditions=conditions, **keywords
                )
            made.append((first, coarse))
        return made

    def _make_fine(
        self,
        parts: Sequence[Part],
        coarses: Sequence[tuple[int, Tensor]],
        fine: Tensor,
        sampling: Sampling,
        **shared: Any,
    ) -> list[Tensor]:
        """Codes of all levels `(b, t, q)` of each part, from the beginning of the music to its end."""
        if self.fine is None:
            return [coarse for _, coarse in coarses]
        made, whole, window = [], fine[:, :0], round(self.windows[2] * self.frame_rate)
        for (_, _, conditions), (first, coarse) in zip(parts, coarses):
            keywords = dict(sampling=sampling, window=window, **shared)
            own = extended(self, 'fine', coarse[:, first:], prime=fine[:, first:], conditions=conditions, **keywords)
            whole = torch.cat((whole[:, :first], own), dim=1)
            made.append(torch.cat((coarse, whole), dim=-1))
        return made

    def likelihood_of(self, right: Tensor, semantic: Tensor, codes: Tensor, part: Part, end: float) -> Tensor:
        """How likely the beginning of a wave `(samples,)` is after each candidate of a part, of which `end` seconds
        count: the mean log-probability of its semantic tokens, and that of its coarse codes, added, `(b,)`."""
        b, levels = len(semantic), self.coarse.num_levels
        seen = min(SEEN, *(it / 2 for it in self.windows[:2]))
        following = right[: round((seen + REMADE) * self.sample_rate)]
        prime = (following[None], self.sample_rate) if len(following) else None
        next_semantic, next_coarse, _ = self.encode_prime(prime, b)
        known = math.ceil(end * self.semantic_rate), math.ceil(end * self.frame_rate)
        semantic = torch.cat((semantic[:, : known[0]], next_semantic), dim=1)
        coarse = torch.cat((codes[:, : known[1], :levels], next_coarse), dim=1)
        likely = torch.zeros(b, dtype=torch.float32, device=semantic.device)
        if next_semantic.shape[1]:
            begin = max(0, semantic.shape[1] - round(self.windows[0] * self.semantic_rate))
            told = dict(known=known[0] - begin, conditioning=part.conditions['semantic'][0])
            likely += log_likelihood(self.semantic, semantic[:, begin:], **told)
        if next_coarse.shape[1]:
            begin = max(0, coarse.shape[1] - round(self.windows[1] * self.frame_rate))
            per_frame = self.semantic_rate / self.frame_rate
            if self.coarse.semantic_per_frame is not None:
                begin = on_grid(begin, per_frame.denominator)
            read = semantic[:, math.floor(begin * per_frame) : math.ceil(coarse.shape[1] * per_frame)]
            told = dict(known=known[1] - begin, conditioning=part.conditions['coarse'][0])
            likely += log_likelihood(self.coarse, read, coarse[:, begin:], **told)
        return likely

    def decode_parts(self, codes: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
        """The wave `(samples,)` of one piece, of codes `(1, t, q)` for each part; each next one is faded in."""
        wave = None
        for part, own in zip(parts, codes):
            stop = round(part.end * self.sample_rate)
            if wave is None:
                wave = decode(self.codec, own)[0, :stop]
                continue
            first = math.floor(part.begin * self.frame_rate)
            skipped = max(0, first - steps_in(DECODED_BEFORE, self.frame_rate))
            before = wave[: int(skipped * self.sample_rate / self.frame_rate)]
            made = torch.cat((before, decode(self.codec, own[:, skipped:])[0, : stop - len(before)]))
            fade = len(wave) / self.sample_rate - float(first / self.frame_rate)
            wave = join(wave, made, self.sample_rate, fade=fade, settle=SETTLE)
        return wave


def extended(
    audio: AudioStages,
    name: str,
    *given: Tensor,
    prime: Tensor,
    conditions: Conditions,
    length: int | None = None,
    window: int | None = None,
    **how: Any,
) -> Tensor:
    """Tokens `(b, n)` or codes `(b, t, q)` of a stage, which begin with a prime.

    Args:
        given: what the stage is given, unless it is semantic.
        length: of all, the prime included; fine codes are as many as the coarse ones.
        window: seen at once; each window of the others continues half of the one before.
        how: keywords of `generate_semantic`, `generate_coarse` or `generate_fine`.
    """
    condition, negative = conditions[name]
    if length is not None:
        how |= dict(max_length=length, min_length=length, overlap=(window or 0) // 2)
    how |= dict(prime=prime, text_embeds=condition, negative_embeds=negative, window=window)
    return GENERATE[name](getattr(audio, name), *given, **how).tokens


@torch.no_grad()
def log_likelihood(stage: StageTransformer, *ids: Tensor, known: int, conditioning: Tensor | None) -> Tensor:
    """The mean log-probability of a stage's own tokens from position `known` on, given all before them, `(b,)`.

    Args:
        ids: the tokens that the stage is given, unless it is semantic, and its own ones, `(b, n)` or `(b, t, q)`.
        known: own tokens or frames that are not told.
        conditioning: as of `StageTransformer.loss`.
    """
    *given, own = (rearrange(it, 'b n ... -> b (n ...)') for it in ids)
    heads, first = stage.own_heads(), known * stage.num_levels
    with evaluating(stage):
        features = stage.features(*given, own[:, :-1], conditioning=conditioning)[-1][:, first:]
    told = []
    for level, head in enumerate(heads):  # known ones are whole frames, so the first one told is of the first level
        logits = at_least_float32(logits_of(features[:, level :: len(heads)], *head))
        tokens = own[:, first + level :: len(heads)]
        told.append(logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0])
    return torch.cat(told, dim=1).mean(dim=1)


def decode(codec: Codec, codes: Tensor) -> Tensor:
    """Waves `(b, samples)` of codes, also of so few that a codec needs more to work."""
    if hasattr(codec, 'decode_stream'):  # which takes any number
        return codec.decode(codes).float()
    spare = max(0, SHORTEST_CODED - codes.shape[1])
    whole = torch.cat((codes, codes[:, -1:].expand(-1, spare, -1)), dim=1)
    return codec.decode(whole).float()[:, : codes.shape[1] * int(codec.sample_rate / codec.frame_rate)]


# ---- where music that was given goes over into music that was made ----


def join(given: Tensor, made: Tensor, sample_rate: int, *, fade: float = FADE, settle: float | None = None) -> Tensor:
    """The given samples, and from their end on those that were made.

    given: (n,) samples; made: (..., m) samples, of which the first n stand for the given ones, n ≤ m as a rule.
    The last `fade` seconds of the given samples are crossfaded, at equal power, for the phases of a codec are not those
    of its input; all before is as it was given. What was made comes as loud as the last second of the given samples,
    within 6 dB of what would make it as loud as all of them, and not above full scale. It stays so, or finds its own
    loudness within `settle` seconds.

    Returns (..., m).
    """
    given = given[: made.shape[-1]]
    known, rest = len(given), made.shape[-1] - len(given)
    if rest == 0:
        return given.expand_as(made).clone()
    whole = gain_to(given, made[..., known:])
    span = min(round(LEVEL * sample_rate), known, rest)
    most = 10 ** (MOST_GAIN / 20)
    gain = gain_to(given[known - span :], made[..., known : known + span]).clamp(whole / most, whole * most)
    room = 1 / made[..., known:].abs().amax(dim=-1).clamp(min=SILENT, max=1)  # up to full scale
    gain = torch.minimum(gain, room)[..., None]
    if settle is not None:
        after = torch.arange(made.shape[-1], device=made.device).to(made.dtype) - known
        gain = gain ** (1 - after / (settle * sample_rate)).clamp(0, 1)
    made = made * gain

    fade = min(round(fade * sample_rate), known)
    angle = torch.linspace(0, math.pi / 2, fade, dtype=made.dtype, device=made.device)
    crossed = given[known - fade :] * angle.cos() + made[..., known - fade : known] * angle.sin()
    before = given[: known - fade].expand(*made.shape[:-1], -1)
    return torch.cat((before, crossed, made[..., known:]), dim=-1)


def gain_to(given: Tensor, made: Tensor) -> Tensor:
    """What makes (..., m) as loud as (n,), (...,); 1 where either is silent."""
    ours, theirs = (it.square().mean(dim=-1).sqrt() for it in (given, made))
    return torch.where((ours > SILENT) & (theirs > SILENT), ours / theirs.clamp(min=SILENT), 1.0)


def steps_in(seconds: float, rate: Fraction) -> int:
    """Tokens or frames in so short a time, one at least."""
    return max(1, round(seconds * rate))
