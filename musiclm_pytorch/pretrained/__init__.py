"""The models that ship with the package, each a folder beside this file with a card of its own."""

from __future__ import annotations

from pathlib import Path

HOME = Path(__file__).resolve().parent


def pretrained_names() -> list[str]:
    """Names that `find_pretrained` knows."""
    return sorted(path.parent.name for path in HOME.glob('*/config.json'))


def find_pretrained(folder: str | Path) -> Path:
    """The folder of a model: one on disk, or else the one of that name that ships with the package.

    Raises FileNotFoundError if there is neither.
    """
    path = Path(folder)
    if path.exists():
        return path
    if str(folder) in pretrained_names():
        return HOME / str(folder)
    shipped = ', '.join(map(repr, pretrained_names())) or 'none'
    raise FileNotFoundError(
        f'there is no folder {folder}, nor a model of that name in the package, which has {shipped}'
    )
