"""Text to music: MuLaN's conditioning, AudioLM's three stages, and a choice by MuLaN among what they make."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from musiclm_pytorch.atomic import write_checked_json, written_together
from musiclm_pytorch.audiolm.convert import audiolm_pytorch, audiolm_stage, unwrapped
from musiclm_pytorch.audiolm.decode_step import fastest_dtype
from musiclm_pytorch.audiolm.generation_args import (
    CountPerStage,
    Mix,
    NoDirectionError,
    PerStage,
    ProcessorPerStage,
    Progress,
    Prompt,
    Sampling,
    Sound,
    StopGeneration,
    Story,
    check_shorter,
    counted_steps,
    is_prompt,
    read_prime,
    read_prompt,
    read_prompts,
    read_sampling,
    read_seconds,
    read_sound,
    words_in,
)
from musiclm_pytorch.audiolm.pieces import FADE, AudioStages, Conditions, Part, decode, join, part_times
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.audiolm.semantic import SemanticTokenizer
from musiclm_pytorch.audiolm.stages import STAGES
from musiclm_pytorch.audiolm.streaming import MusicStream, StageStream
from musiclm_pytorch.checks import check_positive, fitted, keywords_of, typechecked
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.mulan.checkpoint import CONFIG_FILE, WITHIN, checksums_within, placing, read_config, store_as
from musiclm_pytorch.mulan.display import count_of, indented, size_of
from musiclm_pytorch.mulan.layers import l2norm
from musiclm_pytorch.mulan.lora import adapters_of
from musiclm_pytorch.mulan.model import evaluating
from musiclm_pytorch.mulan.text_transformer import low_score_line, unknown_words_line, warn_of
from musiclm_pytorch.pretrained import find_pretrained
from musiclm_pytorch.pretrained.hub import HubModel
from musiclm_pytorch.quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.version import __version__
from musiclm_pytorch.waves import Music, Waves

# how to sample where a model does not say: the temperatures of MusicLM (section 5.1)
SAMPLING = dict(temperature=(1.0, 0.95, 0.4), top_k=None, top_p=None, cond_scale=3.0)
# of a model that is saved; those from 'sampling' on may be missing
SETTINGS = ('windows', 'unique_consecutive', 'sampling', 'knows', 'usual_score')
RANKING_WINDOW = 10.0  # seconds that MuLaN hears at once (MusicLM, section 3.2)
# seconds of a prime at least by whose sound what follows is conditioned, too: less tells no timbre
HEARD = 1.0
Seed = SupportsIndex | np.ndarray | Tensor  # whole numbers, such as those of `Music`


class MusicLM(HubModel, AudioStages):
    """Text to music (arXiv 2301.11325).

        musiclm = MusicLM(audio_lm, mulan_embed_quantizer)
        music = musiclm('the crystalline sounds of the piano in a ballroom', num_samples=4)  # (1, samples)

    Args:
        audio_lm: an `AudioLM` of audiolm-pytorch, whose stages were built with `audio_text_condition = True`; its
            weights are used where they are. Or, in its place, `semantic`, `coarse`, `fine`, `codec` and `tokenizer`;
            without `fine`, the codec has the levels of the coarse stage alone, as `NeuralCodec.with_first_levels` and
            `PretrainedCodec(…, num_quantizers)` give it.
        mulan_embed_quantizer: fitted, with a namespace for each stage that is conditioned.
        windows: seconds that each stage sees at once, those of its training crops. Longer music continues the first two
            with half a window of overlap; the fine stage's windows are independent, and each is a step of a stream.
        sampling: what suits the model best, where a call does not say: some of `temperature`, `top_k`, `top_p` and
            `cond_scale`, as `forward` takes them. It is saved with the model.
        knows: what the model knows, in a line, for those whose prompt it does not understand; saved with the model.
            Which words it does not know, its MuLaN tells, whether or not there is such a line.
        usual_score: what most single samples for held-out prompts reach, as long as the first window; music below it is
            warned of. Saved, too.
        semantic, coarse, fine: the stages, ours or audiolm-pytorch's.
        codec: a `Codec`, or a codec of audiolm-pytorch.
        tokenizer: a `Tokenizer`, or one of audiolm-pytorch.
        unique_consecutive: whether semantic tokens come without repetitions, for stages trained so.

    Raises:
        ValueError: parts that do not fit each other.
    """

    @typechecked
    def __init__(
        self,
        audio_lm: nn.Module | None = None,
        mulan_embed_quantizer: MuLaNEmbedQuantizer | None = None,
        windows: tuple[float, float, float] = (30.0, 10.0, 3.0),
        sampling: dict[str, Any] | None = None,
        knows: str | None = None,
        usual_score: float | None = None,
        *,
        semantic: nn.Module | None = None,
        coarse: nn.Module | None = None,
        fine: nn.Module | None = None,
        codec: nn.Module | None = None,
        tokenizer: nn.Module | None = None,
        unique_consecutive: bool = False,
    ):
        parts = dict(semantic=semantic, coarse=coarse, fine=fine, codec=codec, tokenizer=tokenizer)
        if audio_lm is not None:
            if given := [name for name, part in parts.items() if part is not None]:
                raise ValueError(f'pass audio_lm or its parts, got audio_lm and {given[0]}')
            parts, unique_consecutive = parts_of(audio_lm)
        if mulan_embed_quantizer is None:
            raise ValueError('mulan_embed_quantizer is missing: a fitted MuLaNEmbedQuantizer gives the conditioning')
        if missing := [name for name, part in parts.items() if part is None and name != 'fine']:
            raise ValueError(
                'this AudioLM was built without wav2vec, whose rate tells how many tokens a second has'
                if audio_lm is not None
                else f'{missing[0]} is missing; pass an AudioLM, or all of {", ".join(parts)}'
            )
        super().__init__(**parts, windows=windows, unique_consecutive=unique_consecutive)
        self._given = (audio_lm,)  # its weights are counted once: it is none of the modules of this one
        self.mulan_embed_quantizer = mulan_embed_quantizer
        self.knows = knows
        self.usual_score = usual_score
        if unknown := (sampling or {}).keys() - SAMPLING.keys():
            raise ValueError(f'sampling may hold {", ".join(SAMPLING)}, got {sorted(unknown)[0]!r}')
        self.sampling = {**SAMPLING, **(sampling or {})}
        self.register_load_state_dict_pre_hook(_rename_weights)
        self._check_parts()

    def _check_parts(self) -> None:
        quantizer = self.mulan_embed_quantizer
        conditioned = [name for name, stage in self.stages.items() if stage.has_condition]
        if not conditioned:
            raise ValueError(
                'no stage takes conditioning, so the text would change nothing; build the transformers with '
                'audio_text_condition = True'
            )
        for name in conditioned:
            if self.stages[name].reads_text:
                raise ValueError(
                    f'the {name} stage reads the words of a text, by a text_encoder, where MusicLM has codes of '
                    "MuLaN's latents, which words, sounds and mixtures share; generate with generate_semantic, "
                    'generate_coarse and generate_fine, or with an AudioLM of audiolm-pytorch'
                )
            if name not in quantizer.namespaces:
                raise ValueError(
                    f'the quantizer has no namespace {name!r} for the {name} stage, only '
                    f'{", ".join(map(repr, quantizer.namespaces))}'
                )
            given, wanted = quantizer.cond_embeddings[name].shape[-1], self.stages[name].conditioning_dim
            if given != wanted:
                raise ValueError(
                    f'the {name} stage takes conditioning of width {wanted}, but the quantizer gives {given}; set its '
                    'conditioning_dims'
                )

    def __repr__(self) -> str:
        """In short; `print(musiclm.semantic)` shows the layers of a stage."""
        stages = ', '.join(
            f'{name} {count_of(stage)} ({seconds:g} s)'
            for (name, stage), seconds in zip(self.stages.items(), self.windows)
        )
        sampling = ', '.join(f'{name}={value}' for name, value in self.sampling.items() if value is not None)
        mulan = self.mulan_embed_quantizer.mulan
        return (
            f'{type(self).__name__}({size_of(self)}, music of {self.sample_rate} Hz,\n'
            f'  weights and windows: {stages},\n'
            f'  sampling: {sampling},\n'
            f'  {indented(mulan)})'
        )

    @property
    def audio_lm(self) -> nn.Module:
        """The `AudioLM` that was given, or else a new one of audiolm-pytorch, with a copy of the stages' weights.

        Raises ValueError for the one that was given while its stages have adapters, which it does not know, and where
        there is no fine stage.
        """
        if self.fine is None:
            raise ValueError('an AudioLM of audiolm-pytorch has a fine stage, which this MusicLM goes without')
        if self._given[0] is not None:
            if adapted := [name for name, stage in self.stages.items() if adapters_of(stage)]:
                raise ValueError(
                    f'the {adapted[0]} stage has adapters, which the AudioLM that was given does not know; '
                    f'merge_adapters(musiclm.{adapted[0]}) makes them part of its weights'
                )
            return self._given[0]
        return audiolm_pytorch().AudioLM(
            wav2vec=unwrapped(self.tokenizer),
            codec=unwrapped(self.codec),
            **{f'{name}_transformer': audiolm_stage(stage) for name, stage in self.stages.items()},
            unique_consecutive=self.unique_consecutive,
        )

    @typechecked
    @torch.no_grad()
    def forward(
        self,
        text: Prompt | Sequence[Prompt] | Story,
        num_samples: int = 1,
        *,
        seconds: float | None = None,
        max_length: int | None = None,
        temperature: PerStage | None = None,
        top_k: CountPerStage = None,
        top_p: PerStage | None = None,
        cond_scale: PerStage | None = None,
        negative: Prompt | None = None,
        negative_scale: PerStage = 1.0,
        logits_processor: ProcessorPerStage = None,
        melody: Path | Sound | Tensor | list[Path | Sound | Tensor] | None = None,
        prime_wave: Tensor | np.ndarray | None = None,
        prime_wave_input_sample_hz: int | None = None,
        prime_wave_path: str | Path | None = None,
        seed: Seed | Sequence[SupportsIndex] | None = None,
        max_batch: int | None = None,
        return_all: bool = False,
        return_scores: bool = False,
        progress: Progress = False,
    ) -> Tensor | Music:
        """Music for one prompt, for several, or for a story.

        Args:
            text: a prompt; or several; or a story, one piece whose prompt changes, as pairs of (seconds, prompt). A
                prompt is words; or a sound that the music is to be like: a `Path` of a file, the pair of a wave and its
                rate in Hz, or `Waves`; or a latent of MuLaN `(d,)`; or a `Mix` of these.
            num_samples: pieces made for each prompt, all at once, of which MuLaN chooses.
            seconds: length of the music, the prime included; 10 by default, for a story the sum of its parts.
            max_length: the same in semantic tokens, as `AudioLM` takes it.
            temperature, top_k, top_p, cond_scale: of all stages, or three for semantic, coarse and fine; see
                `Sampling`. By default as in `sampling`, or else MusicLM's temperatures (1.0, 0.95, 0.4) and a guidance
                of 3.
            negative: a prompt that the music is to keep away from, in all conditioned stages.
            negative_scale: how much, as `temperature` for all stages or three.
            logits_processor: a function of the tokens drawn so far in a window, `(b, n)` int64, levels taking turns,
                and the logits of the next ones, `(b, c)`, that gives logits; one for all stages, or three, None among
                them.
            melody: a sound whose melody the music is to follow from its beginning on, such as someone who hums: a
                `Path` of a file, the pair of a wave and its rate in Hz, or `Waves`; or a list of them, one for each
                prompt. The model must have been trained with melodies, see `MuLaNEmbedQuantizer.add_melody`. Longer
                music goes on without.
            prime_wave, prime_wave_input_sample_hz: music to go on from, a floating-point tensor or numpy array
                `(samples,)` or `(channels, samples)`, and its rate in Hz; or
            prime_wave_path: the file that it is in. The music begins with these samples (the mean of the channels, at
                `sample_rate`); their last 40 ms are crossfaded into what follows, which comes as loud. Coarse and fine
                stage are then conditioned on the mean of what MuLaN hears in the prime, of 1 s or more, and reads in
                the prompt, so that the timbre stays.
            seed: the same pieces again, also independent of `max_batch` and of grouping: the piece of number i, counted
                through all prompts, is the one that `seed + i` makes alone. Or one seed a piece, such as `seeds` of
                earlier music. By default a draw from torch's global generator, so that `torch.manual_seed` repeats it.
            max_batch: pieces made at a time, for less memory; all by default.
            return_all: all pieces of each prompt instead of the best.
            return_scores: the scores by which MuLaN chose, too.
            progress: a bar a stage, and for decoding and ranking; or a function of (steps, steps in all), which all of
                them call in turn. It may raise `StopGeneration`: whole pieces that are done by then are given back, of
                the first prompts or of the first one alone; if there are none, it is raised to the caller.

        Returns:
            `(prompts, samples)` float32 at `sample_rate`, the piece of each prompt that MuLaN finds nearest to it, as
            `Waves`: a tensor that saves itself and plays in a notebook. With `return_all`, `(prompts, num_samples,
            samples)`; with `return_scores`, a `Music`.

        Raises:
            ValueError: an empty prompt, a length that is not positive or no longer than the prime, an unfitted
                quantizer, a prime without a rate, a melody for a model that knows none.

        Warns (`PromptWarning`) of words that the model does not know, and of music that does not come near its prompt;
        see `prompt_warnings`.
        """
        # what is asked for
        check_positive(num_samples=num_samples, seconds=seconds, max_length=max_length, max_batch=max_batch)
        self.check_fitted()
        prompts, story = read_prompts(text)
        seconds = read_seconds(seconds, max_length, story, semantic_rate=self.semantic_rate)
        how = dict(temperature=temperature, top_k=top_k, top_p=top_p, cond_scale=cond_scale)
        samplings = self._samplings(**how, negative_scale=negative_scale, logits_processor=logits_processor)
        if seconds * self.sample_rate < 1:
            raise ValueError(f'seconds={seconds:g} is less than a sample of music, 1 / {self.sample_rate} s')
        if return_scores or (num_samples > 1 and not return_all):
            self._check_heard(seconds, 'music that is scored')
        negative = None if negative is None else read_prompt(negative)
        prime = read_prime(prime_wave, prime_wave_input_sample_hz, prime_wave_path, seconds=seconds)
        pieces = 1 if story else len(prompts)
        if isinstance(melody, list) and len(melody) != pieces:
            raise ValueError(f'got {len(melody)} melodies for {pieces} pieces; pass one, or one for each prompt')
        if melody is not None:
            melody = self._read_melodies(melody if isinstance(melody, list) else [melody], seconds)
            melody = melody.expand(pieces, -1, -1)
        times = part_times([length for length, _ in story]) if story else [(0.0, seconds)]
        # one generator a piece, so that a piece does not depend on those made beside it
        seeds = seeds_of(seed, total := pieces * num_samples)
        generators = [torch.Generator(self.device).manual_seed(it) for it in seeds]

        with evaluating(self):
            # prompts to codes of MuLaN's latents, a row a prompt or a part of the story
            heard = None if prime is None else resample(*prime, self.sample_rate)
            wanted, indices, sounds, avoided = self._read(prompts, negative, heard, is_story=story is not None)

            # codes to tokens to waves, `max_batch` pieces at a time
            waves, size = [], max_batch or total
            for start in range(0, total, size):
                prompt_of = [row // num_samples for row in range(start, min(start + size, total))]
                parts = []
                for number, time in enumerate(times):
                    own = [number] * len(prompt_of) if story else prompt_of
                    parts.append(Part(*time, self._conditions(indices[own], sounds[own], avoided)))
                try:
                    made = self.generate_parts(
                        parts,
                        samplings,
                        prime=prime,
                        generators=generators[start : start + size],
                        progress=progress,
                        melody=None if melody is None else melody[prompt_of],
                    )
                    with counted_steps(progress, 'waves', len(prompt_of)) as advance:
                        for own in zip(*(codes.split(1) for _, codes in made)):
                            waves.append(self.decode_parts(own, parts))
                            advance(1)
                except StopGeneration:
                    if not waves:
                        raise
                    pieces, num_samples = max(1, len(waves) // num_samples), min(len(waves), num_samples)
                    waves, seeds = waves[: pieces * num_samples], seeds[: pieces * num_samples]
                    wanted = wanted if story else wanted[:pieces]
                    progress = False
                    break
            waves = torch.stack(waves)
            if prime is not None:
                waves = join(heard[0].to(waves.device), waves, self.sample_rate)
            waves = rearrange(waves, '(p s) n -> p s n', s=num_samples)

            # the best piece of each prompt
            if return_scores or (num_samples > 1 and not return_all):
                try:
                    scores = self._score(waves, wanted, story, progress)
                except StopGeneration:  # what is done is ranked all the same
                    scores = self._score(waves, wanted, story)
                if not story:
                    warn_of(self._score_warnings(Music(waves, scores)))
        if not return_all:
            waves = waves[:, 0] if num_samples == 1 else waves[torch.arange(pieces), scores.argmax(dim=1)]
        waves = Waves.of(waves, self.sample_rate)
        return Music(waves, scores, torch.tensor(seeds).view(pieces, num_samples)) if return_scores else waves

    @typechecked
    @torch.no_grad()
    def stream(
        self,
        text: Prompt,
        *,
        seconds: float | None = None,
        temperature: PerStage | None = None,
        top_k: CountPerStage = None,
        top_p: PerStage | None = None,
        cond_scale: PerStage | None = None,
        negative: Prompt | None = None,
        negative_scale: PerStage = 1.0,
        logits_processor: ProcessorPerStage = None,
        melody: Path | Sound | Tensor | None = None,
        prime: Path | Sound | Tensor | None = None,
        seed: Seed | None = None,
    ) -> MusicStream:
        """Music for a prompt as it is made, without end unless `seconds` says so: an iterator of waves.

            with musiclm.stream('a calm piano') as stream:
                for wave in stream:  # Waves (samples,), a window of the fine stage long as a rule
                    play(wave)
                    if is_enough():
                        stream.set_prompt('fast drums')

        The stages work window by window, the codec decodes what no later code changes, and memory is bounded. The
        prompt may change while it plays: what is made from then on sees 0.2 s of what was, as in a story. A stream of a
        `seed` is the same each time, but other music than a call with it: its windows lie otherwise.

        With a `prime` (a `Path` of a file, the pair of a wave and its rate in Hz, or `Waves`), the stream begins with
        these samples, at `sample_rate`, which come at once, and `seconds` count them. The music goes on from them as
        that of a call does, until the prompt changes, but finds its own loudness within 3 s, which come as one wave.

        A `melody` is followed once, from the beginning of the stream on, a prime included: each window of the semantic
        stage is told what is of its time, under whatever prompt. What comes after its end is made without.

        Args, errors and warnings are those of `forward`. Raises ValueError also for stages trained on semantic tokens
        without repetitions, of which no one knows how many a second has.
        """
        check_positive(seconds=seconds)
        self.check_fitted()
        self._check_timed('they cannot stream')
        (seed,) = seeds_of(seed, 1)
        given, coded_from, codes = None, 0, None
        if prime is not None:
            given = resample(*read_sound(prime, name='prime'), self.sample_rate)[0].to(self.device)
            if seconds is not None:
                check_shorter(len(given) / self.sample_rate, seconds)
            coded_from = max(0, len(given) - round(self.windows[0] * self.sample_rate))  # more is not seen
        if melody is not None:
            melody = self._read_melodies([melody])
            melody = melody[:, math.floor(coded_from * self.semantic_rate / self.sample_rate) :]
        avoided = None if negative is None else read_prompt(negative)

        def conditions_of(prompt: Prompt, heard: Tensor | None = None) -> Conditions:
            return self._conditions(*self._read([read_prompt(prompt)], avoided, heard)[1:])

        conditions = conditions_of(text, None if given is None else given[None])
        if given is not None:
            with evaluating(self):
                codes = self.encode_prime((given[None, coded_from:], self.sample_rate), 1)
        how = dict(temperature=temperature, top_k=top_k, top_p=top_p, cond_scale=cond_scale)
        stages = StageStream(
            self,
            samplings=self._samplings(**how, negative_scale=negative_scale, logits_processor=logits_processor),
            seconds=seconds,
            generator=torch.Generator(self.device).manual_seed(seed),
            prime=codes,
            melody=melody,
        )
        return MusicStream(
            stages, conditions_of, conditions, seconds=seconds, seed=seed, given=given, coded_from=coded_from
        )

    @typechecked
    @torch.no_grad()
    def infill(
        self,
        wave: Path | Sound | Tensor,
        start: float,
        end: float,
        text: Prompt,
        *,
        num_samples: int = 8,
        temperature: PerStage | None = None,
        top_k: CountPerStage = None,
        top_p: PerStage | None = None,
        cond_scale: PerStage | None = None,
        seed: Seed | None = None,
        progress: Progress = False,
    ) -> Waves:
        """A sound with other music from second `start` to `end`; both sides are kept as they are.

            music = musiclm.infill(Path('in.wav'), 2.0, 4.0, 'a calm piano')

        The stages go on from the left side, as from a prime, and make `num_samples` candidates without knowledge of the
        right one. That chooses among them: the semantic and the coarse stage tell how likely the tokens of its first
        second are after each candidate, and the one of the highest mean log-probability is taken. Coarse and fine stage
        are conditioned on the mean of what MuLaN hears in both sides and reads in the prompt, as with a prime.

        What was made is crossfaded over 40 ms on either side, the last ones of the left and the first ones of the
        right, and comes as loud as each; over half of the gap it finds its own loudness. All other samples are those
        given: the mean of the channels, at `sample_rate`.

        Args:
            wave: a `Path` of a file, the pair of a wave, as `prime_wave`, and its rate in Hz, or `Waves`.
            start, end: of the gap in seconds, 0 to the sound's length. At either end there is one side only.
            text: what the gap is to be like, a prompt as of `forward`.
            num_samples: candidates.
            others: as of `forward`.

        Returns:
            `(samples,)` float32 at `sample_rate`.

        Raises:
            ValueError: a gap that lies not within the sound or is shorter than a token, stages trained on semantic
                tokens without repetitions, which tell no times, and what `forward` raises.
        """
        check_positive(num_samples=num_samples)
        self.check_fitted()
        self._check_timed('they fill no gap')
        samplings = self._samplings(temperature=temperature, top_k=top_k, top_p=top_p, cond_scale=cond_scale)
        given = resample(*read_sound(wave, name='wave'), self.sample_rate)[0].to(self.device)
        rate, length = self.sample_rate, given.shape[0] / self.sample_rate
        least = float(1 / min(self.semantic_rate, self.frame_rate))
        if not (start >= 0 and end <= length and end - start >= least):  # NaN is neither
            raise ValueError(
                f'the gap from {start:g} to {end:g} s must lie within the sound of {length:.3g} s and last '
                f'{least:.3g} s at least'
            )
        first, last = round(start * rate), round(end * rate)
        prompt = read_prompt(text)
        # the rest of the semantic stage's window is for the gap
        begin = max(0.0, start - self.windows[0] / 2)
        left, right = given[round(begin * rate) : first], given[last:]
        # seconds of a candidate: up to the end of the gap, and with what is crossfaded
        made = end - begin, min(end + FADE, length) - begin
        generators = [torch.Generator(self.device).manual_seed(it) for it in seeds_of(seed, num_samples)]
        with evaluating(self):
            _, *codes, _ = self._read([prompt], None, torch.cat((left, right))[None])
            part = Part(0.0, made[1], self._conditions(*(it.expand(num_samples, -1) for it in codes), None))
            prime = (left[None], rate) if len(left) else None
            ((semantic, codes),) = self.generate_parts(
                [part], samplings, prime=prime, generators=generators, progress=progress
            )
            best = self.likelihood_of(right, semantic, codes, part, made[0]).argmax()
            filled = decode(self.codec, codes[best, None])[0, : round(made[1] * rate)]
        whole = torch.cat((given[: first - len(left)], filled))
        if first:
            whole = join(given[:first], whole, rate, settle=(end - start) / 2)
        whole = F.pad(whole, (0, len(given) - len(whole)))  # the sum of rounded parts may lack a sample
        if len(right):  # the same from the other side
            whole = join(right.flip(0), whole.flip(0), rate, settle=(end - start) / 2).flip(0)
        return Waves.of(whole, rate)

    def _read(
        self, prompts: list[Prompt], negative: Prompt | None, heard: Tensor | None, *, is_story: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """MuLaN's latents `(p, d)` and codes `(p, q)` of prompts as `read_prompts` gives them; the codes that make the
        timbre; and those to keep away from, `(1, q)`. Warns of words that the model does not know.

        If what was heard, `(1, samples)`, from which the music goes on, lasts `HEARD` seconds, the timbre is by the
        mean of what MuLaN hears in it and reads in the prompts, of a story in the first one.
        """
        warn_of(self.prompt_warnings(prompts if negative is None else [*prompts, negative]))
        quantizer = self.mulan_embed_quantizer
        with evaluating(quantizer), torch.no_grad():
            wanted = self._latents(prompts)
            indices = sounds = quantizer.indices(latents=wanted)
            if heard is not None and heard.shape[-1] >= HEARD * self.sample_rate:
                goes_on = wanted[:1] if is_story else wanted
                both = quantizer.indices(latents=l2norm(goes_on + self.hear(heard, self.sample_rate)))
                sounds = torch.cat((both, indices[len(both) :]))
            avoided = None if negative is None else quantizer.indices(latents=self._latents([negative]))
        return wanted, indices, sounds, avoided

    def _conditions(self, indices: Tensor, sounds: Tensor, avoided: Tensor | None) -> Conditions:
        """What each stage is told, by codes as `_read` gives them: the semantic one has those of the prompts."""
        return {
            name: tuple(
                None if it is None or not stage.has_condition else self.mulan_embed_quantizer.embed(it, name)
                for it in (indices if name == 'semantic' else sounds, avoided)
            )
            for name, stage in self.stages.items()
        }

    def check_fitted(self) -> None:
        """Raise ValueError unless the quantizer is fitted."""
        if not self.mulan_embed_quantizer.is_fitted:
            raise ValueError('the quantizer has no codebooks yet; call mulan_embed_quantizer.fit(dataset) first')

    def check_follows_melodies(self) -> None:
        """Raise ValueError unless the model was trained for melodies."""
        if self.mulan_embed_quantizer.melody is None or not self.semantic.has_condition:
            raise ValueError(
                'this model has no melody encoder: fit a MelodyQuantizer, give it to add_melody of the '
                'MuLaNEmbedQuantizer, and train the semantic stage with that'
            )
        self._check_timed('they follow no melody')

    def _check_timed(self, so: str) -> None:
        if self.unique_consecutive:
            raise ValueError(
                f'these stages know semantic tokens without repetitions, which tell no times, so {so}; train them with '
                'unique_consecutive=False'
            )

    def _samplings(self, **given: Any) -> list[Sampling]:
        """How each stage samples: as given, or else as suits the model."""
        return read_sampling(
            **{name: self.sampling.get(name) if value is None else value for name, value in given.items()},
            conditioned=[name in self.stages and self.stages[name].has_condition for name in STAGES],
        )

    # warnings

    def prompt_warnings(self, prompts: Sequence[Prompt] | Story, music: Music | None = None) -> list[str]:
        """What someone should know who asks for these prompts: for each a line, empty where there is nothing to say; of
        a story, one line for all of it.

        A line names the words that the text tower does not know and what the model knows; and, given the `music` made
        for the prompts, it tells where the best score lies below `usual_score`. Music shorter than the semantic stage's
        window, in which MuLaN hears less, is not judged.
        """
        text, story = self.mulan_embed_quantizer.mulan.text, None
        if prompts and not is_prompt(prompts[0]):
            prompts, story = [prompt for _, prompt in prompts], prompts
        unknown = [[word for words in words_in(prompt) for word in text.unknown_words(words)] for prompt in prompts]
        if story is not None:  # its score is the mean of its parts', which tells nothing of how well it fits
            return [unknown_words_line(list(dict.fromkeys(chain.from_iterable(unknown))), self.knows)]
        lines = [unknown_words_line(words, self.knows) for words in unknown]
        if music is not None:
            lines = ['; '.join(filter(None, pair)) for pair in zip(lines, self._score_warnings(music))]
        return lines

    def _score_warnings(self, music: Music) -> list[str]:
        is_short = music.waves.shape[-1] < self.windows[0] * self.sample_rate
        usual = None if is_short else self.usual_score
        return [low_score_line(best, usual) for best in music.scores.amax(dim=1).tolist()]

    # what MuLaN reads and hears

    def _read_melodies(self, melodies: list[Path | Sound | Tensor], seconds: float | None = None) -> Tensor:
        """What the semantic stage is told of melodies in the first seconds of music, or up to the end of the longest,
        `(p, n, d)`."""
        self.check_follows_melodies()
        quantizer = self.mulan_embed_quantizer.melody
        codes = [quantizer(*read_sound(melody, name='melody')) for melody in melodies]
        if seconds is None:
            seconds = max(it.shape[1] for it in codes) / quantizer.rate
        told = dict(tokens=math.ceil(seconds * self.semantic_rate), rate=self.semantic_rate)
        return torch.cat([self.mulan_embed_quantizer.embed_melody(it, **told) for it in codes])

    def _latents(self, prompts: list[Prompt]) -> Tensor:
        """MuLaN's latents of prompts as `read_prompts` gives them, `(p, d)`."""
        words = [it for prompt in prompts for it in words_in(prompt)]
        told = iter(self.mulan_embed_quantizer.mulan.get_text_latents(raw_texts=words) if words else ())
        return torch.stack([self._latent(prompt, told) for prompt in prompts])

    def _latent(self, prompt: Prompt, told: Iterator[Tensor]) -> Tensor:
        """One of them, `(d,)`; `told` gives those of the words in it."""
        dim = self.mulan_embed_quantizer.dim
        if isinstance(prompt, str):
            return next(told)
        if isinstance(prompt, tuple):
            self._check_heard(prompt[0].shape[-1] / prompt[1], 'a sound as a prompt')
            return self.hear(*prompt)[0]
        if isinstance(prompt, Mix):
            latent = sum(weight * self._latent(part, told) for weight, part in prompt.parts)
        else:
            latent = prompt.to(self.device)
            if len(latent) != dim:
                raise ValueError(f'a latent as a prompt must have the {dim} numbers of this MuLaN, got {len(latent)}')
        if latent.norm() < 1e-6:
            raise NoDirectionError('a latent of zeros, or a Mix whose parts cancel out, points nowhere')
        return l2norm(latent)

    def _score(self, waves: Tensor, wanted: Tensor, story: Story | None, progress: Progress = False) -> Tensor:
        """Cosine of each wave of `(p, s, n)` with the latent of its prompt, or with the mean of a story's, `(p, s)`."""
        if story:
            shares = torch.tensor([length for length, _ in story], dtype=wanted.dtype, device=wanted.device)
            wanted = l2norm((wanted * shares[:, None]).sum(dim=0, keepdim=True))
        flat = rearrange(waves, 'p s n -> (p s) n')
        audio = []
        with counted_steps(progress, 'scores', len(flat)) as advance:
            for wave in flat.split(1):
                audio.append(self.hear(wave, self.sample_rate))
                advance(1)
        audio = rearrange(torch.cat(audio), '(p s) d -> p s d', s=waves.shape[1])
        return einsum(audio, wanted, 'p s d, p d -> p s')

    def _check_heard(self, seconds: float, what: str) -> None:
        mulan = self.mulan_embed_quantizer.mulan
        least = mulan.audio.min_samples / (mulan.sample_rate or self.sample_rate)
        if seconds < least:
            raise ValueError(f'{what} must last {least:.3g} s at least, for MuLaN to hear it, got {seconds:g} s')

    def hear(self, wave: Tensor, rate: int) -> Tensor:
        """MuLaN's latent of a wave `(1, samples)`, `(1, d)`: the mean over windows of a long one."""
        mulan, wave = self.mulan_embed_quantizer.mulan, wave.to(self.device)
        if mulan.sample_rate is None:
            warnings.warn(
                f'MuLaN does not know its sample rate and hears sound at {self.sample_rate} Hz; build its audio tower '
                'with audio_sample_rate',
                stacklevel=3,
            )
            return mulan.get_audio_latents(resample(wave, rate, self.sample_rate))
        if wave.shape[-1] > (window := mulan.window(RANKING_WINDOW)) * rate:
            return mulan.embed_audio(wave, window=window, hop=min(1.0, window), sample_rate=rate)
        return mulan.get_audio_latents(wave, sample_rate=rate)

    # saving

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write everything that `from_pretrained` rebuilds: MuLaN, quantizer, tokenizer, codec and stages.

        A model that is there before is replaced when all of this one is on the disk, which takes the place of both.

        With `dtype`, such as `torch.float16`, the weights are stored in it, for smaller files; they are float32 again
        when they are loaded. With `torch.int8` these are the matrices of the stages and of MuLaN, with a scale a row,
        and all else is float16, so that the codes and semantic tokens of sounds are what they were.

        Raises ValueError for a tokenizer or codec that cannot be saved, and for a weight too large for `dtype`.
        """
        folder = Path(folder)
        if not hasattr(self.tokenizer, 'save_pretrained'):
            raise ValueError(
                f'the semantic tokenizer, a {type(unwrapped(self.tokenizer)).__name__}, cannot be saved; use one of '
                'musiclm_pytorch.audiolm.semantic'
            )
        settings = {name: getattr(self, name) for name in SETTINGS}
        with written_together(folder) as aside:
            save_module(self.codec, aside / 'codec')
            for name, stage in self.stages.items():
                save_module(stage, aside / name)
            self.tokenizer.save_pretrained(aside / 'tokenizer')
            self.mulan_embed_quantizer.save_pretrained(aside / 'quantizer')
            if dtype is not None:
                store_as(aside, dtype, in_int8=('MuLaN', *(it.__name__ for it in STAGES.values())))
            within = checksums_within(aside, ('codec', *self.stages, 'tokenizer', 'quantizer'))
            config = dict(model='MusicLM', version=__version__, **settings, within=within)
            write_checked_json(aside / CONFIG_FILE, config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        mulan: nn.Module | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        device: str | torch.device = 'cpu',
        dtype: torch.dtype | Literal['auto'] | None = None,
        verify: bool = True,
    ) -> MusicLM:
        """Rebuild everything from a folder that `save_pretrained` wrote, in eval mode.

        'tiny' and 'small' in place of a folder are the models that ship with the package. `mulan` is used instead of
        the saved one, if given, and moved to `device`, but not cast. The other arguments and errors are as in
        `MuLaN.from_pretrained`; waves are float32 whatever the `dtype`.

        With `dtype='auto'`, stages whose weights decoding waits for are cast to bfloat16, half of the memory, where the
        processor computes in it; all else is as it is without. Music of a seed is then other music than in float32.
        """
        at = dict(device=device, dtype=None if dtype == 'auto' else dtype)
        place = placing(**at)
        folder = find_pretrained(folder, revision, subfolder)
        settings = read_config(folder, 'MusicLM', SETTINGS[:2], SETTINGS[2:], verify)
        with settings.refused("'sampling' must hold keywords", settings.content.get('sampling')):
            sampling = dict(settings.content.get('sampling') or {})
        settings.check_known(sampling, SAMPLING, 'sampling')
        has_fine = 'fine' in settings.content.get(WITHIN, STAGES)
        names = [name for name in (*STAGES, 'codec') if name != 'fine' or has_fine]
        parts = {name: load_module(folder / name, verify=verify) for name in names}
        parts['tokenizer'] = SemanticTokenizer.from_pretrained(folder / 'tokenizer', verify=verify)
        quantizer = MuLaNEmbedQuantizer.from_pretrained(folder / 'quantizer', mulan, verify=verify, **at)
        values = {name: settings.content.get(name) for name in SETTINGS if name != 'sampling'}
        with settings.refused('what stands there builds no MusicLM', values):
            hints = keywords_of(cls)
            values = {key: fitted(it, hints[key], key) for key, it in values.items()}
            musiclm = cls(mulan_embed_quantizer=quantizer, sampling=sampling, **values, **parts)
        for part in musiclm.eval().children():
            if part is not quantizer:  # a MuLaN that was given is not cast
                place(part)
        if dtype == 'auto':
            for stage in musiclm.stages.values():
                stage.to(fastest_dtype(stage))
        return musiclm


def parts_of(audio_lm: nn.Module) -> tuple[dict[str, nn.Module | None], bool]:
    """The stages, codec and tokenizer of an `AudioLM`, and whether its semantic tokens come without repetitions."""
    if not all(hasattr(audio_lm, name) for name in (*STAGES, 'audio_conditioner')):
        raise TypeError(f'audio_lm must be an AudioLM of audiolm-pytorch, got a {type(audio_lm).__name__}')
    if audio_lm.audio_conditioner is not None:
        raise ValueError(
            'build AudioLM without audio_conditioner: MusicLM conditions each stage itself, by its own namespace'
        )
    stages = {name: getattr(audio_lm, name).transformer for name in STAGES}
    parts = dict(**stages, codec=audio_lm.fine.codec, tokenizer=audio_lm.semantic.wav2vec)
    return parts, audio_lm.semantic.unique_consecutive


def _rename_weights(musiclm: MusicLM, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """State dicts of versions that held an `AudioLM`, with several names for a weight."""
    for key in [key for key in state if key.startswith(f'{prefix}audio_lm.')]:
        stage, part, name = key.removeprefix(f'{prefix}audio_lm.').split('.', 2)
        own = stage if part == 'transformer' else dict(codec='codec', wav2vec='tokenizer')[part]
        module = getattr(musiclm, own)
        own += '.module' if unwrapped(module) is not module else ''
        state[f'{prefix}{own}.{name}'] = state.pop(key)


def seeds_of(seed: Seed | Sequence[SupportsIndex] | None, pieces: int) -> list[int]:
    """The seed of each piece in [0, 2⁶³); without any, consecutive ones from a draw of torch's global generator on."""
    if seed is None:
        seed = int(torch.randint(2**32, ()))
    if isinstance(seed, (Tensor, np.ndarray)) and seed.ndim:
        seed = seed.reshape(-1).tolist()
    if not isinstance(seed, Sequence):
        seed = range(index(seed), index(seed) + pieces)
    if len(seed) != pieces:
        raise ValueError(f'got {len(seed)} seeds for {pieces} pieces; pass one, or one a piece')
    return [index(it) % 2**63 for it in seed]
