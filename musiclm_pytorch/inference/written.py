"""Prompts as people write them in a line: words, `@FILE` for a sound or a latent, and '70% this + 30% that'."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from musiclm_pytorch.audiolm.generation_args import Mix, Prompt

SHARE = re.compile(r'(\d+(?:\.\d+)?)\s*%\s*(.+)', re.DOTALL)
LATENT = '.npy'
MOST_PARTS = 32  # of a story where anyone may ask: each costs a fifth of a second beside its music

# words; dict(sound=file), dict(latent=file), dict(mix=[(weight, form), …]); a story is dict(story=[(seconds, form), …])
Form = str | dict[str, Any]


def read_line(line: str) -> Form:
    """What a line says: '@hum.wav' is a sound to be like, '@piano.npy' a latent of MuLaN, '70% a piano + 30% @hum.wav'
    a mixture of what these are, all else words.

    Raises ValueError for a mixture of which a part has no share.
    """
    parts = line.split(' + ')
    if len(parts) > 1 and SHARE.match(parts[0].strip()):
        mix = []
        for part in parts:
            if (found := SHARE.fullmatch(part.strip())) is None:
                raise ValueError(
                    f'each part of a mixture has its share, as in "70% a piano + 30% drums", got {part.strip()!r}'
                )
            mix.append((float(found[1]) / 100, read_line(found[2])))
        return dict(mix=mix)
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
        if not path.is_file():  # before other music is made
            raise FileNotFoundError(f'no audio file at {told}')
        return path
    try:
        latent = np.load(path, mmap_mode='r', allow_pickle=False)  # of what a file claims, nothing is allocated
    except (ValueError, EOFError) as error:
        raise ValueError(f'{told} holds no array of NumPy, as a latent is: {error}') from error
    if not isinstance(latent, np.ndarray) or latent.ndim != 1 or latent.dtype.kind != 'f':
        what = f'{latent.shape} of {latent.dtype}' if isinstance(latent, np.ndarray) else type(latent).__name__
        raise ValueError(f'{told} holds {what}, but a latent of MuLaN is (d,) of floats')
    return np.array(latent)
