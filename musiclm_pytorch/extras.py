"""Packages of extras, and how to install them. Imports nothing from the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def how_to_install(extra: str) -> str:
    """The command that adds an extra. By the project's name, pip would take an older release from an index."""
    return f"pip install '.[{extra}]' in the source folder of musiclm-pytorch"


@contextmanager
def needing(need: str, extra: str) -> Iterator[None]:
    """Let an ImportError in the block begin with `need`, what needs which package, and tell how to install it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{need} ({error}): {how_to_install(extra)}') from error
