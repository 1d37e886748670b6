"""Music while it is made: the three stages step by step, and codes to waves as they come."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from musiclm_pytorch.audiolm.generate import on_grid
from musiclm_pytorch.audiolm.generation_args import Prompt, Sampling
from musiclm_pytorch.audiolm.pieces import (
    CHANGE,
    CHANGE_GUIDANCE,
    DECODED_BEFORE,
    FADE,
    SETTLE,
    AudioStages,
    Conditions,
    decode,
    extended,
    join,
    steps_in,
)
from musiclm_pytorch.audiolm.protocols import Codec
from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.kernels.processor import one_thread
from musiclm_pytorch.mulan.model import evaluating
from musiclm_pytorch.waves import Waves

DECODED_AFTER = 0.25  # seconds of codes behind those that are asked for, more than a codec looks ahead
ENDLESS = 600.0  # seconds: as long as that, what has no end is worth the kernels
CROSSED = 0.01  # seconds over which a codec that looks further goes over from piece to piece


class StageStream:
    """Codes of all levels, step by step without end, in bounded memory.

    In each step the semantic stage, then the coarse and the fine one make what is missing up to the same frame. The
    semantic stage sees as much of what it has made as leaves room in its window; the coarse one goes on from half a
    window, and windows of the fine stage are made apart from each other.

    Args:
        audio: the stages, with semantic tokens that come with repetitions.
        samplings: of each stage.
        seconds: that will be made, as far as it is known.
        generator: what the tokens are drawn with, on the stages' device.
        prime: semantic tokens `(1, n)`, coarse and fine codes `(1, t, q)` to go on from.
        melody: `(1, m, d)`, of the melody at the time of each semantic token from the first one of the prime on, as of
            `generate_semantic`; each window sees what is of its time, and later ones go on without.
    """

    def __init__(
        self,
        audio: AudioStages,
        *,
        samplings: Sequence[Sampling],
        seconds: float | None,
        generator: torch.Generator,
        prime: tuple[Tensor, Tensor, Tensor] | None = None,
        melody: Tensor | None = None,
    ):
        self.audio, self.samplings, self.generator = audio, samplings, generator
        rates = audio.semantic_rate, audio.frame_rate, audio.frame_rate
        self.per_frame = Fraction(rates[0]) / Fraction(rates[1])
        self.windows = [max(1, round(seconds * rate)) for seconds, rate in zip(audio.windows, rates)]
        self.totals = [math.ceil((seconds or ENDLESS) * rate) for rate in rates]
        self.melody = melody
        self.made = 0  # frames so far
        empty = torch.zeros(1, 0, dtype=torch.long, device=generator.device)
        self.semantic, self.first_semantic = empty, 0  # what is still needed, and the number of its first token
        levels = audio.coarse.num_levels, audio.codec.num_quantizers - audio.coarse.num_levels
        self.coarse, self.fine = (empty[..., None].expand(-1, -1, q) for q in levels)
        self.seen_from = 0, 0  # the first token and frame that what follows may depend on
        self.guided_until = 0
        if prime is not None:
            self.semantic, self.coarse, self.fine = prime
            self.made = self.coarse.shape[1]
            self._forget()

    def step(self, frames: int, conditions: Conditions, *, changes: bool = False) -> Tensor:
        """The next codes, `(1, frames, q)`.

        With `changes`, the conditions are others than before: what was made under those is seen for `CHANGE` seconds
        only, and the next window of the semantic stage is guided more, as in a story.
        """
        if changes:
            tokens = self.first_semantic + self.semantic.shape[1]
            seen = steps_in(CHANGE, self.audio.semantic_rate), steps_in(CHANGE, self.audio.frame_rate)
            self.seen_from = max(0, tokens - seen[0]), max(0, self.made - seen[1])
            self.guided_until = self.seen_from[0] + self.windows[0]
        stop = self.made + frames
        self._extend_semantic(math.ceil(stop * self.per_frame), conditions)
        self._extend_coarse(stop, conditions)
        if self.audio.fine is None:
            self.fine = self.coarse[..., :0]
        else:
            self._extend_fine(stop, conditions)
        self.made = stop
        new = torch.cat((self.coarse[:, -frames:], self.fine[:, -frames:]), dim=-1)
        self._forget()
        return new

    def _extend_semantic(self, stop: int, conditions: Conditions) -> None:
        have, window, sampling = self.first_semantic + self.semantic.shape[1], self.windows[0], self.samplings[0]
        if have >= stop:
            return
        seen = min(have - self.seen_from[0], max(window // 2, window - (stop - have)))
        length, first = seen + stop - have, have - seen
        made = extended(
            self.audio,
            'semantic',
            prime=self.semantic[:, self.semantic.shape[1] - seen :],
            length=length,
            conditions=conditions,
            window=window,
            melody=None if self.melody is None else self.melody[:, first : first + length],
            sampling=sampling.guided(CHANGE_GUIDANCE) if have < self.guided_until else sampling,
            total_length=self.totals[0],
            generator=self.generator,
        )
        self.semantic = torch.cat((self.semantic, made[:, seen:]), dim=1)

    def _extend_coarse(self, stop: int, conditions: Conditions) -> None:
        window = self.windows[1]
        seen = min(self.made - self.seen_from[1], window // 2)
        # from a frame on that begins with a token
        first = on_grid(self.made - seen, self.per_frame.denominator, far=math.inf)
        known, begin = self.made - first, int(first * self.per_frame) - self.first_semantic
        made = extended(
            self.audio,
            'coarse',
            self.semantic[:, begin : math.ceil(stop * self.per_frame) - self.first_semantic],
            prime=self.coarse[:, self.coarse.shape[1] - known :],
            length=stop - first,
            conditions=conditions,
            window=window,
            prime_overlap=seen,
            semantic_per_frame=self.per_frame,
            sampling=self.samplings[1],
            total_length=self.totals[1],
            generator=self.generator,
        )
        self.coarse = torch.cat((self.coarse, made[:, known:]), dim=1)

    def _extend_fine(self, stop: int, conditions: Conditions) -> None:
        """A window that is not whole begins earlier, with what is there."""
        window, new = self.windows[2], stop - self.made
        known = min(self.fine.shape[1], -new % window)
        made = extended(
            self.audio,
            'fine',
            self.coarse[:, self.coarse.shape[1] - new - known :],
            prime=self.fine[:, self.fine.shape[1] - known :],
            conditions=conditions,
            window=window,
            sampling=self.samplings[2],
            total_length=self.totals[2],
            generator=self.generator,
        )
        self.fine = torch.cat((self.fine, made[:, known:]), dim=1)

    def _forget(self) -> None:
        frames = max(self.windows[1] // 2 + self.per_frame.denominator, self.windows[2])
        self.coarse, self.fine = self.coarse[:, -frames:].clone(), self.fine[:, -frames:].clone()
        begin = on_grid(max(0, self.made - self.windows[1] // 2), self.per_frame.denominator, far=math.inf)
        have = self.first_semantic + self.semantic.shape[1]
        first = max(self.first_semantic, min(int(begin * self.per_frame), have - self.windows[0]))
        self.semantic, self.first_semantic = self.semantic[:, first - self.first_semantic :].clone(), first


class MusicStream(Iterator[Waves]):
    """Music as it is made, of `MusicLM.stream`: an iterator of `Waves (samples,)`, one after the other.

        with musiclm.stream('a calm piano') as stream:
            for wave in stream:
                play(wave)

    On a CPU it computes with one of PyTorch's threads, so that several streams play side by side, a thread each.

    Attributes:
        sample_rate: of the waves, in Hz.
        seed: what makes the same music again, as long as prompts change at the same places.
    """

    def __init__(
        self,
        stages: StageStream,
        conditions_of: Callable[[Any], Conditions],
        conditions: Conditions,
        *,
        seconds: float | None,
        seed: int,
        given: Tensor | None = None,
        coded_from: int = 0,
    ):
        """conditions: those to begin with. given: `(samples,)` to begin with, whose codes from sample `coded_from` on
        the stages have as their prime."""
        self.sample_rate, self.seed = stages.audio.sample_rate, seed
        self._conditions_of, self._codec = conditions_of, stages.audio.codec
        self._waiting = deque([conditions], maxlen=1)
        self._closed = False
        samples = None if seconds is None else round(seconds * self.sample_rate)
        self._waves = self._play(stages, samples, given, coded_from)

    @typechecked
    def set_prompt(self, prompt: Prompt) -> None:
        """Go on with another prompt, from the next step on, a window of the fine stage long; at any time, from any
        thread. Errors and warnings are those of `MusicLM.stream`."""
        self._waiting.append(self._conditions_of(prompt))

    def close(self) -> None:
        """End the stream: there is no further wave. From another thread, once the wave that is being made is there."""
        self._closed = True
        with suppress(ValueError):  # it is at work, and ends by itself
            self._waves.close()

    def __next__(self) -> Waves:
        if self._closed:
            raise StopIteration
        with one_thread(), evaluating(self._codec):
            return next(self._waves)

    def __enter__(self) -> MusicStream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _codes(self, stages: StageStream, frames: float) -> Iterator[Tensor]:
        """Those of the prime that are still there, and then what is made."""
        if stages.made:
            yield torch.cat((stages.coarse, stages.fine), dim=-1)
        conditions, step = None, stages.windows[2]
        while stages.made < frames:
            changes = conditions is not None and len(self._waiting) > 0
            if self._waiting:
                conditions = self._waiting.pop()
            yield stages.step(int(min(step, frames - stages.made)), conditions, changes=changes)

    @torch.no_grad()
    def _play(self, stages: StageStream, samples: int | None, given: Tensor | None, coded_from: int) -> Iterator[Waves]:
        frames, played = math.inf, 0
        if samples is not None:
            frames = math.ceil((samples - coded_from) * self._codec.frame_rate / self.sample_rate)
        factor = int(self.sample_rate / self._codec.frame_rate)
        begin = coded_from + (stages.made - stages.coarse.shape[1]) * factor
        waves = (wave[0].float() for wave in decode_stream(self._codec, self._codes(stages, frames)))
        if given is not None:
            waves = go_on_from(given, waves, begin, self.sample_rate)
        for wave in waves:
            if samples is not None:
                wave = wave[: samples - played]
            if len(wave):
                played += len(wave)
                yield Waves.of(wave.clone(), self.sample_rate)


def go_on_from(given: Tensor, made: Iterator[Tensor], begin: int, sample_rate: int) -> Iterator[Tensor]:
    """The given samples `(n,)`, at once, and then those made, of which the first is number `begin`, n at most.

    What follows comes as loud and is crossfaded, see `join`, and finds its own loudness within `SETTLE` seconds, which
    are waited for while the given samples are heard.
    """
    inside, stop = max(0, len(given) - round(FADE * sample_rate)), len(given) + round(SETTLE * sample_rate)
    yield given[:inside]
    first = given[:begin]
    for wave in made:
        first = torch.cat((first, wave))
        if len(first) >= stop:
            break
    yield join(given, first[:stop], sample_rate, settle=SETTLE)[inside:]
    yield first[stop:]
    yield from made


def decode_stream(codec: Codec, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Codes as they come, `(b, t, q)` each, to waves `(b, samples)`, as early as the codec allows.

    A codec that has a `decode_stream` does it itself. Any other decodes each chunk with `DECODED_BEFORE` and
    `DECODED_AFTER` seconds of codes around it; together these waves are those of all codes at once, if no sample
    depends on codes further away. Where one does, what is made of two pieces is crossfaded.
    """
    own = getattr(codec, 'decode_stream', None)
    return own(chunks) if own is not None else _decode_overlapping(codec, chunks)


@torch.no_grad()
def _decode_overlapping(codec: Codec, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    factor = int(codec.sample_rate / codec.frame_rate)
    before, after = (steps_in(it, codec.frame_rate) for it in (DECODED_BEFORE, DECODED_AFTER))
    codes, given, tail = None, 0, None  # the first `given` frames of `codes` are decoded

    def piece(stop: int) -> Tensor:
        nonlocal codes, given, tail
        waves = decode(codec, codes)
        made = waves[:, given * factor : stop * factor].clone()
        if tail is not None and made.shape[1]:
            count = min(tail.shape[1], made.shape[1])
            share = torch.linspace(0, 1, count, dtype=made.dtype, device=made.device)
            made[:, :count] = torch.lerp(tail[:, :count], made[:, :count], share)
        tail = waves[:, stop * factor :][:, : round(CROSSED * codec.sample_rate)]
        dropped = max(0, stop - before)
        codes, given = codes[:, dropped:], stop - dropped
        return made

    for chunk in chunks:
        codes = chunk if codes is None else torch.cat((codes, chunk), dim=1)
        if (settled := codes.shape[1] - after) > given:
            yield piece(settled)
    if codes is not None and codes.shape[1] > given:
        yield piece(codes.shape[1])
