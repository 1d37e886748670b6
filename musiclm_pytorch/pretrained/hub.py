"""Models of `transformers`, from a folder or from the Hugging Face Hub. No code of a repository is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from musiclm_pytorch.atomic import checksum_of_file, naming, open_modes

ENCODER_FOLDER = 'encoder'


def read_settings(source: str | Path) -> dict[str, Any]:
    """The `config.json` of a model of `transformers`. Raises FileNotFoundError if there is none."""
    from transformers import PreTrainedConfig

    if Path(source).exists() and not Path(source, 'config.json').is_file():
        raise FileNotFoundError(f'{source} has no config.json, so it is no folder of a model')
    try:
        return PreTrainedConfig.get_config_dict(source)[0]
    except OSError as error:
        raise FileNotFoundError(f'{source} is neither the folder of a model nor on the Hugging Face Hub') from error


def load_transformers(
    source: str | Path, kind: str = 'AutoModel', *, config: Any = None, unneeded: Sequence[str] = ()
) -> nn.Module:
    """A model of `transformers` in float32, in eval mode, whose weights are all there.

    Args:
        source: folder of a model, or its name on the Hugging Face Hub.
        kind: name of the class in `transformers`.
        config: in place of the saved one.
        unneeded: how the names of weights end that may be missing.

    Raises:
        FileNotFoundError: no such model. ValueError: a model of another kind, weights that do not fit.
    """
    import transformers

    keywords = {} if config is None else dict(config=config)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would list what is missing; that is judged here
    try:
        model, report = getattr(transformers, kind).from_pretrained(
            source, output_loading_info=True, dtype=torch.float32, **keywords
        )
    except OSError as error:
        raise FileNotFoundError(f'{source} is neither the folder of a model nor on the Hugging Face Hub') from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    missing = {it for it in report['missing_keys'] if not it.endswith(tuple(unneeded))}
    if missing or report['mismatched_keys']:
        raise ValueError(
            f'the weights in {source} do not fill this {type(model).__name__}: {len(missing)} are missing, such as '
            f'{min(missing, default="none")}, and {len(report["mismatched_keys"])} have another shape'
        )
    return model.eval()


def load_processor(source: str | Path, kind: str) -> Any:
    """What prepares the inputs of a model: `kind` names the class in `transformers`. Raises FileNotFoundError."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(f'{source} has no {kind}: {" ".join(str(error).split())}') from error


def save_encoder(folder: Path, *parts: Any) -> dict[str, Any]:
    """Write a model of `transformers` and what prepares its inputs into a folder within; gives what `find_encoder`
    wants to know."""
    inside = folder / ENCODER_FOLDER
    with naming(inside):
        for part in parts:
            part.save_pretrained(inside)
    open_modes(inside)
    checksums = {it.name: checksum_of_file(it) for it in sorted(inside.iterdir())}
    return dict(folder=ENCODER_FOLDER, checksums=checksums)


def find_encoder(config: Any, verify: bool) -> Path:
    """The folder that `save_encoder` wrote, of the `SavedConfig` that has what it gave under 'encoder'.

    Raises FileNotFoundError for a missing file and, with `verify`, ValueError for one that is not what was written.
    """
    with config.refused("'encoder' must name a folder beside it", config['encoder']):
        inside = config.path.parent / config['encoder']['folder']
        checksums = dict(config['encoder'].get('checksums', {})) if verify else {}
    for name, checksum in checksums.items():
        if not (inside / name).is_file():
            raise FileNotFoundError(f'no {name} in {inside}, which {config.path} names')
        if checksum_of_file(inside / name) != checksum:
            raise ValueError(
                f'{inside / name} is damaged: it is not what was written, by its checksum; it has to come from a '
                'copy (verify=False reads it all the same)'
            )
    return inside
