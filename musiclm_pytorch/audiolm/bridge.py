"""audiolm-pytorch's names, for programs that import them from here; `convert` has them."""

from typing import Any

from musiclm_pytorch.audiolm import convert


def __getattr__(name: str) -> Any:
    return getattr(convert, name)
