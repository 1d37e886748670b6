"""Prompts as people write them in a line: words, `@FILE` for a sound or a latent, and '70% this + 30% that'."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musiclm_pytorch.audiolm.generation_args import Mix, Prompt

SHARE = re.compile(r'\s*(\d+(?:\.\d+)?)\s*%\s*(\S.*?)\s*')
LATENT = '.npy'

# words; dict(sound=file), dict(latent=file), dict(mix=[(weight, form), …]); a story is dict(story=[(seconds, form), …])
Form = str | dict[str, Any]


def read_line(line: str) -> Form:
    """What a line says: '@hum.wav' is a sound to be like, '@piano.npy' a latent of MuLaN, '70% a piano + 30% @hum.wav'
    a mixture of what these are, all else words.

    Raises ValueError for a mixture of which a part has no share.
    """
    parts = line.split(' + ')
    found = [SHARE.fullmatch(part) for part in parts]
    if len(parts) > 1 and found[0]:
        if None in found:
            told = parts[found.index(None)].strip()
            raise ValueError(f'each part of a mixture has its share, as in "70% a piano + 30% drums", got {told!r}')
        return dict(mix=[(float(it[1]) / 100, read_line(it[2])) for it in found])
    if line.startswith('@'):
        return dict(latent=line[1:]) if line.lower().endswith(LATENT) else dict(sound=line[1:])
    return line


def prompt_of(form: Form, find: Callable[[str], Path] = Path) -> Prompt | list[tuple[float, Prompt]]:
    """What `MusicLM` takes of what a line says.

    find: gives the path of a file that is named.

    Raises ValueError for a latent that is no array of NumPy, FileNotFoundError for one that is not there.
    """
    if isinstance(form, str):
        return form
    ((kind, told),) = form.items()
    if kind == 'mix':
        return Mix([(weight, prompt_of(part, find)) for weight, part in told])
    if kind == 'story':
        return [(seconds, prompt_of(part, find)) for seconds, part in told]
    path = find(told)
    if kind == 'sound':
        return path
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f'{told} holds no array of NumPy, as a latent is: {error}') from error


def parts_of(prompt: Prompt | Sequence[tuple[float, Prompt]]) -> list[Prompt]:
    """The prompts of a story, or the one that there is."""
    return [it for _, it in prompt] if isinstance(prompt, list) else [prompt]
