"""The models that ship with the package, each a folder beside this file with a card of its own."""

from __future__ import annotations

import json
from pathlib import Path

HOME = Path(__file__).resolve().parent


def pretrained_names() -> list[str]:
    """Names that `find_pretrained` knows."""
    return sorted(path.parent.name for path in HOME.glob('*/config.json'))


def find_pretrained(folder: str | Path, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder of a model: one on disk, one of the Hugging Face Hub (see `find_folder`), or else the one of that name
    that ships with the package.

    Raises FileNotFoundError if there is neither, or if the folder is not a model's but has one inside, which is named.
    """
    from musiclm_pytorch.pretrained.hub import find_folder  # imports torch, which names are listed without

    path = find_folder(folder, revision, subfolder)
    if path.exists():
        if not (path / 'config.json').exists() and (inside := models_inside(path)):
            raise FileNotFoundError(f'{folder} has no config.json; the model in it is {inside[0]}, so pass that')
        return path
    if str(folder) in pretrained_names():
        return HOME / str(folder)
    shipped = ', '.join(map(repr, pretrained_names())) or 'none'
    # such as results/best, of a training that kept none
    beside = models_inside(path.parent) if path.parent.is_dir() and path.name != str(path) else []
    hint = f'; the model beside it is {beside[0]}' if beside else ''
    raise FileNotFoundError(
        f'there is no folder {folder}, nor a model of that name in the package, which has {shipped}{hint}'
    )


def models_inside(folder: Path) -> list[Path]:
    """The folders of a MusicLM, and then those of a MuLaN, one or two levels below a folder."""
    found = []
    for path in (*sorted(folder.glob('*/config.json')), *sorted(folder.glob('*/*/config.json'))):
        try:
            found.append((json.loads(path.read_text(encoding='utf-8'))['model'], path.parent))
        except (ValueError, KeyError, TypeError, RecursionError):  # the config of something else
            continue
    return [inner for kind in ('MusicLM', 'MuLaN') for model, inner in found if model == kind]
