"""CLIP's byte-pair encoding, as x-clip brings it along."""

from __future__ import annotations

from functools import cache
from importlib import util
from pathlib import Path
from typing import Any


@cache
def clip_tokenizer() -> Any:
    """`x_clip.tokenizer.tokenizer`, with `encode` and `decode`, without importing the rest of x_clip, which takes
    torchvision. The first call reads CLIP's 49,000 merges."""
    folder = Path(util.find_spec('x_clip').origin).parent
    spec = util.spec_from_file_location('x_clip.tokenizer', folder / 'tokenizer.py')
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tokenizer
