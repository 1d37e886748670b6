"""The best model so far, with what was found when it was chosen: `validation.json` beside its weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from musiclm_pytorch.atomic import read_checked_json, write_checked_json
from musiclm_pytorch.trainer.folders import holds_something, move_aside

logger = logging.getLogger(__name__)

FILE = 'validation.json'
FEW = 30  # held-out items, below which chance has a large part in which model is best


def read(folder: Path) -> dict[str, Any] | None:
    """What was found of the weights in `folder`, `step`, `score` and `held_out` among it; None if it is not known."""
    try:
        found = read_checked_json(folder / FILE)
        return found if math.isfinite(found['score']) and {'step', 'held_out'} <= found.keys() else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning('%s is damaged (%r): what the model beside it has reached is not known', folder / FILE, error)
        return None


def write(folder: Path, save_model: Callable[[Path], None], *, replace: bool, found: dict[str, Any]) -> None:
    """Write a model and what was found of it.

    Args:
        folder: where it goes.
        save_model: writes the model into a folder.
        replace: the model that is there is known to be worse; otherwise it is moved aside.
        found: metrics; numbers of them are kept.
    """
    if not replace and (earlier := move_aside(folder)) is not None:
        logger.warning('%s held a model that cannot be compared with this run; it is now in %s', folder, earlier)
    # the file is there with the weights that it tells of or not at all
    (folder / FILE).unlink(missing_ok=True)
    save_model(folder)
    numbers = {name: value for name, value in found.items() if isinstance(value, (int, float))}
    write_checked_json(
        folder / FILE, {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    )


def known_score(folder: Path, score: float | None, held_out: int | None) -> float | None:
    """The score that the next model has to surpass; None if what is in `folder` cannot be compared with it.

    Args:
        score: of the best model when the checkpoint was written.
        held_out: items that validation looks at now.
    """
    if not holds_something(folder):
        return None
    found = read(folder)
    if found is None:
        return score
    # the model may be from after the checkpoint
    return found['score'] if found['held_out'] == held_out else None


def warn_of_few(held_out: int | None, least: int) -> None:
    """Say so where there are too few held-out items for a validation, or for one that tells models apart."""
    if held_out is None:
        return
    if held_out < least:
        logger.warning(
            'no validation and no best model: of held-out items there are %d, and it takes at least %d; raise '
            'valid_frac, or give held-out data',
            held_out,
            least,
        )
    elif held_out < FEW:
        logger.warning(
            'the best model is chosen on %d held-out items; below %d, much of that is chance: raise valid_frac, or '
            'give held-out data',
            held_out,
            FEW,
        )
