"""What audiolm-pytorch calls of `fairseq.checkpoint_utils`."""

import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairseq.hubert import build_hubert


def load_model_ensemble_and_task(
    filenames: str | os.PathLike | Iterable[str | os.PathLike] | Mapping[str | os.PathLike, Any],
    arg_overrides: None = None,
    task: Any = None,
    strict: bool = True,
    suffix: str = '',
    num_shards: int = 1,
) -> tuple[list[nn.Module], dict[str, Any], Any]:
    """Builds the HuBERT models of fairseq checkpoints.

    filenames: paths of checkpoints, read without unpickling any code; or a mapping of paths to checkpoints
        loaded already, whose files are not read again.
    task: handed back as it is.

    Returns the models (`fairseq.hubert.HubertFeatures`, in eval mode), the configuration of the last one as
    plain dicts and lists (empty if the checkpoint has none), and the task.

    Raises FileNotFoundError for a path that is not there; ValueError for a checkpoint that is not a HuBERT or
    holds more than data, and for the options of fairseq that are not offered.
    """
    refused = {
        'arg_overrides': arg_overrides not in (None, {}),
        'strict': strict is not True,
        'suffix': suffix != '',
        'num_shards': num_shards != 1,
    }
    if any(refused.values()):
        names = ', '.join(name for name, is_refused in refused.items() if is_refused)
        raise ValueError(f'{names}: this stand-in for fairseq loads checkpoints as they are; leave the default')

    loaded = filenames if isinstance(filenames, Mapping) else {}
    models, cfg = [], {}
    for path in [filenames] if isinstance(filenames, (str, os.PathLike)) else filenames:
        checkpoint = loaded[path] if path in loaded else _read(path)
        model, cfg = build_hubert(checkpoint, origin=os.fspath(path))
        models.append(model)
    if not models:
        raise ValueError('no checkpoint was given; pass at least one path')
    return models, cfg, task


def _read(path: str | os.PathLike) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist or is not a file')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'{path} holds more than the data of a fairseq checkpoint and was not loaded. If you trust its '
            f'source, register what this message names with torch.serialization.add_safe_globals: {error}'
        ) from error
