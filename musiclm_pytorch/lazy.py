"""Names that a package has, imported on first use, and how to install an extra. Imports nothing from the package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def how_to_install(extra: str) -> str:
    """The command that adds an extra. By the project's name, pip would take an older release from an index."""
    return f"pip install '.[{extra}]' in the source folder of musiclm-pytorch"


def lazy_names(
    package: str, home_of: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names are imported on first use.

    Args:
        package: its `__name__`.
        home_of: for each name, the module below the package that has it.
    """

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        value = getattr(import_module(f'{package}.{home_of[name]}'), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return get, names, sorted(home_of)
