"""What is asked for on a page, checked and made into ranked clips. Without the page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from musiclm_pytorch.audiolm.generation_args import Mix, Progress, Prompt, StopGeneration, Story, read_seconds
from musiclm_pytorch.audiolm.stages import STAGES
from musiclm_pytorch.audiolm.streaming import MusicStream
from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.gallery import Clip, file_name, ranked_clips
from musiclm_pytorch.inference.written import MOST_PARTS, prompt_of, read_line
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.waves import Music

AT_ONCE = 2  # pieces: more are little faster (a sixth, four at once), and fewer are lost when the work is stopped


class MusicMaker:
    """What the page's buttons do, without the page.

    Args:
        musiclm: what makes the music.
        max_seconds, max_samples: the most that may be asked for at once.
        max_stream_seconds: the longest stream.
    """

    @typechecked
    def __init__(
        self,
        musiclm: MusicLM,
        *,
        max_seconds: float = 30.0,
        max_samples: int = 8,
        max_stream_seconds: float = 600.0,
    ):
        check_positive(max_seconds=max_seconds, max_samples=max_samples, max_stream_seconds=max_stream_seconds)
        self.musiclm = musiclm
        self.max_seconds = max_seconds
        self.max_samples = max_samples
        self.max_stream_seconds = max_stream_seconds

    def from_prompt(
        self,
        prompt: Prompt,
        seconds: float,
        prime: str | Path | None = None,
        melody: str | Path | None = None,
        **how: Any,
    ) -> list[Clip]:
        """The samples for a prompt, the best first; `how` as in `_make`.

        prime, melody: sound files, to go on from and whose melody is followed.

        Raises ValueError for an empty prompt and for what is out of range, naming both value and range.
        """
        check_says_something(prompt)
        check_length('music', seconds, self.max_seconds)
        melody = None if melody is None else Path(melody)
        return self._make(prompt, seconds=seconds, prime_wave_path=prime, melody=melody, **how)

    def from_story(self, rows: Sequence[Sequence[Any]], files: Sequence[str | Path] = (), **how: Any) -> list[Clip]:
        """The same for a story, rows of (seconds, prompt as `read_line` reads it); rows with neither are passed over.

        files: sounds and latents that the rows name, by their names without folders.

        Raises ValueError also for a row with one of the two only, and for a name that is none of the files.
        """
        given = {Path(file).name: Path(file) for file in files}

        def find(name: str) -> Path:
            if name not in given:
                raise ValueError(f'the story names @{name}, but the files with it are {", ".join(given) or "none"}')
            return given[name]

        story, told = read_story(rows, find)
        seconds = read_seconds(None, None, story, semantic_rate=None)
        check_length('music', seconds, self.max_seconds)
        return self._make(story, title=' – '.join(told), **how)

    def stream(
        self,
        prompt: Prompt,
        seconds: float,
        prime: str | Path | None = None,
        melody: str | Path | None = None,
        *,
        seed: int | None,
        cond_scale: float | None = None,
        temperature: float | None = None,
        negative: str | None = None,
    ) -> MusicStream:
        """Music as it is made; arguments and errors as of `from_prompt`."""
        check_says_something(prompt)
        check_length('stream', seconds, self.max_stream_seconds)
        return self.musiclm.stream(
            prompt,
            seconds=float(seconds),
            prime=None if prime is None else Path(prime),
            melody=None if melody is None else Path(melody),
            **self._sampling(seed, cond_scale, temperature, negative),
        )

    def remarks(
        self, prompts: Sequence[Prompt] | Story, negative: str | None = None, music: Music | None = None
    ) -> str:
        """What there is to say of prompts, and of the music made for one, in a line."""
        told = self.musiclm.prompt_warnings(prompts, music)
        if negative and negative.strip():
            told += self.musiclm.prompt_warnings([negative])
        return '; '.join(filter(None, told))

    def _sampling(
        self, seed: int | None, cond_scale: float | None, temperature: float | None, negative: str | None
    ) -> dict[str, Any]:
        if seed is None:
            raise ValueError('give a seed, any whole number; the same one makes the same music')
        sampling, own = dict(seed=int(seed)), self.musiclm.sampling
        if cond_scale is not None:
            sampling['cond_scale'] = in_proportion(own['cond_scale'], cond_scale, neutral=1.0)
        if temperature is not None:
            sampling['temperature'] = in_proportion(own['temperature'], temperature, neutral=0.0)
        if negative and negative.strip():
            sampling['negative'] = negative
        return sampling

    def _make(
        self,
        text: Prompt | Story,
        *,
        title: str | None = None,
        num_samples: int,
        seed: int | None,
        cond_scale: float | None = None,
        temperature: float | None = None,
        negative: str | None = None,
        report: Callable[[float, str], None] | None = None,
        **keywords: Any,
    ) -> list[Clip]:
        """Make `num_samples` pieces, a few at a time, and rank them.

        cond_scale, temperature: of the stage where the model's own is highest, the others in proportion; by default the
            model's own.
        negative: a prompt to keep away from.
        report: told the share of the work that is done, and what is being done. Where it raises `StopGeneration`, the
            pieces that are done by then are all that there are.
        """
        if not 1 <= num_samples <= self.max_samples:
            raise ValueError(f'the number of samples may be 1 to {self.max_samples}, got {num_samples}')
        num_samples, sampling = int(num_samples), self._sampling(seed, cond_scale, temperature, negative)
        seed = sampling.pop('seed')
        firsts = range(0, num_samples, AT_ONCE)
        counts = dict(parts=1 if title is None else len(text), rounds=len(firsts), stages=tuple(self.musiclm.stages))
        progress = stage_progress(report, **counts) if report else False
        made = []
        with contextlib.suppress(StopGeneration):
            for first in firsts:
                music = self.musiclm(
                    text,
                    num_samples=min(AT_ONCE, num_samples - first),
                    seed=seed + first,
                    return_all=True,
                    return_scores=True,
                    progress=progress,
                    **sampling,
                    **keywords,
                )
                made.append((music.waves[0], music.scores[0], music.seeds[0]))
        if not made:
            return []
        waves, scores, seeds = map(torch.cat, zip(*made))
        asked = [text] if title is None else text
        remark = self.remarks(asked, negative, Music(waves[None], scores[None]))
        title = title or title_of(text)
        return ranked_clips(title, waves, scores, seeds, name=file_name(title), remark=remark)


def check_says_something(prompt: Prompt) -> None:
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError('the prompt is empty; say what the music is like')


def check_length(what: str, seconds: float | None, most: float) -> None:
    if seconds is None or not 0 < seconds <= most:
        raise ValueError(f'the {what} may last up to {most:g} seconds, got {seconds}')


def title_of(prompt: Prompt) -> str:
    """A prompt of a page in words: a sound by the name of its file, a mixture by its parts and their weights."""
    if isinstance(prompt, Mix):
        return ' + '.join(f'{weight:g} {title_of(part)}' for weight, part in prompt.parts)
    return prompt.name if isinstance(prompt, Path) else str(prompt)


def read_mix(
    words: str, weight: float = 1.0, rows: Sequence[Sequence[Any]] = (), *sounds: tuple[str | None, float]
) -> Prompt:
    """What is asked for together: words, a table of (weight, words), and sounds, each a file or None, and its weight.

    A sound or words alone are what they are; what is not filled in is left out, and words before it or sounds whose
    weight is 0. Raises ValueError for another weight that is no number above 0, naming what it is of.
    """
    parts = [(weight, words)]
    for number, cells in enumerate(rows, 1):
        of, more = map(as_text, cells)
        if more:
            parts.append((as_number(of, f'row {number} of the other words needs its weight'), more))
    parts += [(of, file and Path(file)) for file, of in sounds]
    parts = [(of, it) for of, it in parts if of != 0 and as_text(it)]
    if not parts:
        return ''
    mix = Mix(parts)
    return mix if len(parts) > 1 else parts[0][1]


def read_story(
    rows: Sequence[Sequence[Any]], find: Callable[[str], Path]
) -> tuple[list[tuple[float, Prompt]], list[str]]:
    """The story in the rows (seconds, line) of a table that are filled in, and their lines; `find` as of `prompt_of`.

    Raises ValueError, naming the row.
    """
    story, lines = [], []
    for number, (length, prompt) in enumerate(rows, 1):
        length, prompt = as_text(length), as_text(prompt)
        if not length and not prompt:
            continue
        if not prompt:
            raise ValueError(f'row {number} of the story has no prompt')
        seconds = as_number(length, f'row {number} of the story needs its seconds')
        try:
            story.append((seconds, prompt_of(read_line(prompt), find)))
        except (OSError, ValueError) as error:
            raise ValueError(f'row {number} of the story: {error}') from error
        lines.append(prompt)
    if not story:
        raise ValueError('the story is empty; give seconds and a prompt in a row or more')
    if len(story) > MOST_PARTS:
        raise ValueError(f'a story may have {MOST_PARTS} parts at most, got {len(story)}')
    return story, lines


def as_text(cell: Any) -> str:
    """What stands in a cell of a table, nothing where it is not filled in."""
    return '' if cell is None or cell != cell else str(cell).strip()


def as_number(cell: str, needed: str) -> float:
    """Raises ValueError, saying what is needed, unless it is a number above 0."""
    try:
        number = float(cell)
        check_positive(number=number)
    except ValueError:
        raise ValueError(f'{needed}, a number above 0, got {cell!r}') from None
    return number


def highest(own: float | Sequence[float]) -> float:
    """What a slider shows for the model's own settings of three stages."""
    return float(max(own) if isinstance(own, Sequence) else own)


def in_proportion(own: float | Sequence[float], value: float, *, neutral: float) -> float | tuple[float, ...]:
    """The model's own settings of three stages, their distances from `neutral` stretched until the highest is `value`.

    A stage at `neutral` stays there, unless all are.
    """
    top = highest(own)
    if value == top:
        return own
    if not isinstance(own, Sequence) or top == neutral:
        return value
    return tuple(neutral + (it - neutral) * (value - neutral) / (top - neutral) for it in own)


def stage_progress(
    report: Callable[[float, str], None], parts: int, rounds: int = 1, stages: Sequence[str] = tuple(STAGES)
) -> Progress:
    """MusicLM's progress as a share of all of it.

    It begins anew for each part in each of the stages, for the waves and for the scores, in each round.
    """
    works = [f'{stage} tokens' for stage in stages for _ in range(parts)] + ['waves', 'scores']
    calls, last = 0, 0

    def advance(done: int, total: int) -> None:
        nonlocal calls, last
        calls += done <= last or calls == 0
        last = done
        place, work = divmod(calls - 1, len(works))
        what = works[work] if rounds == 1 else f'{works[work]}, round {place + 1} of {rounds}'
        report(min(1.0, (calls - 1 + done / total) / (rounds * len(works))), what)

    return advance
