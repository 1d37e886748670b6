"""CLIP's byte-pair tokens; which words of a prompt a text tower never learned, and which would have mattered."""

from __future__ import annotations

import base64
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Words with what joins them: "hi-hats", "mid-range", "rock'n'roll"; neither punctuation nor underscores.
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
LONGEST = 40  # letters of a word that are shown
OWN = ('musiclm_pytorch', 'torch', 'beartype')  # packages in whose frames no one asked for music
# What a word is joined of, but for the endings of "singer's" and "don't", which tell nothing of the music.
PART = re.compile(r"(?<![^\W_])(?!(?<=['’])(?:s|t|m|d|re|ve|ll)\b)[^\W_]+")

# Articles, pronouns, prepositions, conjunctions and auxiliary verbs: what a sentence needs and a melody does not.
# Degrees ("very") and negations ("without") are none of them: they change what the music should be like.
FUNCTION_WORDS = frozenset(
    WORD.findall(
        'a an the this that these those some any i me my we us our you your he him his she her it its they them their '
        'one and or but so as if than then when while where which who what at by for from in into of off on onto over '
        'through to up upon with within is am are was were be been being do does did has have had can could will would '
        'shall should may might must there here'
    )
)
# What says that there is music, and not what it is like.
MUSIC_WORDS = frozenset(
    WORD.findall(
        'music piece track clip recording sound sounds sounding play plays played playing perform performs performed '
        'performing hear hears heard hearing listen listens listening make makes made making give want like please'
    )
)


class PromptWarning(UserWarning):
    """A prompt that a model does not understand, or music that does not come near its prompt."""


def says_something(word: str) -> bool:
    """Of the music. `word` is in lower case."""
    return word not in FUNCTION_WORDS | MUSIC_WORDS


def find_unknown_words(text: str, is_known: Callable[[str], bool]) -> list[str]:
    """The words of a text that say something and of which a part is not known, each once, as the text spells them.

    Joined by a hyphen, known words are known: "mid-range".
    """
    words: dict[str, str] = {}
    for word in WORD.findall(text):
        words.setdefault(word.lower(), word)
    return [
        word for lower, word in words.items() if says_something(lower) and not all(map(is_known, PART.findall(lower)))
    ]


def known_ids(num_tokens: int, known_tokens: Sequence[int] | None, trained_tokens: Tensor | None) -> Tensor | None:
    """The token ids that a text tower knows, `(num_tokens,)` bool; None where nothing tells.

    Args:
        num_tokens, known_tokens: of its config: ids beside `known_tokens` have no embedding of their own.
        trained_tokens: `(num_tokens,)` bool, its record of what it was trained on. An empty one tells nothing: either
            it was never trained, or in a way that leaves no record.
    """
    known = None if trained_tokens is None or not trained_tokens.any() else trained_tokens
    if known_tokens is None:
        return known
    own = torch.zeros(num_tokens, dtype=torch.bool)
    own[list(known_tokens)] = True
    return own if known is None else own & known


def packed(flags: Tensor) -> str:
    """A bool tensor as text: its bits up to the last that is set, in base64."""
    return base64.b64encode(np.packbits(flags.numpy()).tobytes().rstrip(b'\0')).decode()


def unpacked(text: str, size: int) -> Tensor:
    """The `(size,)` bool tensor that `packed` wrote. Raises ValueError for any other text."""
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{text!r:.40} is no base64') from error
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    if bits[size:].any():
        raise ValueError(f'there are {len(bits)} bits for {size} tokens')
    flags = torch.zeros(size, dtype=torch.bool)
    flags[: len(bits)] = torch.from_numpy(bits[:size].astype(bool))
    return flags


def unknown_words_line(words: list[str], knows: str | None) -> str:
    """What to tell who asked with words that the model does not know; nothing if it knows all."""
    if not words:
        return ''
    return f'the model does not know {listed(words)}{f"; it knows {knows}" if knows else ""}'


def low_score_line(best: float, usual: float | None) -> str:
    """What to tell of music whose best score lies below the usual."""
    if usual is None or best >= usual:
        return ''
    return (
        f'the music may not be what the prompt asks for: MuLaN gives it {best:.2f}, and most music for prompts that it '
        f'understands {usual:.2f} or more'
    )


def warn_of(lines: list[str]) -> None:
    """Warn of each line that says something, where this package was called from."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get('__name__', '').split('.')[0] in OWN:
        frame, level = frame.f_back, level + 1
    for line in dict.fromkeys(filter(None, lines)):
        warnings.warn(line, PromptWarning, stacklevel=level)


def listed(words: list[str], most: int = 20) -> str:
    """Words in a row, the first ones of many, and the beginning of what is no word."""
    return ', '.join(word[:LONGEST] for word in words[:most]) + (
        f' and {len(words) - most} words more' if len(words) > most else ''
    )


@cache
def clip_tokenizer() -> Any:
    """`x_clip.tokenizer.tokenizer`, with `encode` and `decode`, without importing the rest of x_clip, which takes
    torchvision. The first call reads CLIP's 49,000 merges."""
    folder = Path(util.find_spec('x_clip').origin).parent
    spec = util.spec_from_file_location('x_clip.tokenizer', folder / 'tokenizer.py')
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tokenizer
