"""Trackers of experiments by Accelerate's names: checked before a run begins, started and ended with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers


def check_trackers(log_with: str | list[str] | None, folder: Path) -> None:
    """Raise unless trackers can be used, before a run changes anything.

    Raises:
        ImportError: the package of one is not installed; Accelerate would leave it out. ValueError: a name that
        Accelerate does not know, or W&B without a login.
    """
    names = log_with if isinstance(log_with, (list, tuple)) else [] if log_with is None else [log_with]
    found = [str(tracker) for tracker in filter_trackers(names, folder)]
    for name in map(str, names):
        if name not in found and name != 'all':
            raise ImportError(f'log_with={name!r} needs a package that is not installed: pip install {name}')
    if 'wandb' in found:
        _log_in()


def _log_in() -> None:
    import wandb

    if wandb.run is not None:  # one that is open already shows that it can
        return
    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise ValueError(f"log_with='wandb' cannot log in: {error} Or set WANDB_MODE=offline") from error


@contextmanager
def tracking(accelerator: Accelerator, config: dict[str, Any]) -> Iterator[None]:
    """A run of each tracker for the time of a block, beside those that other trainers or the program have open."""
    # W&B would hand out the run that is open already, whose settings change and which drops the steps it has had
    wandb = dict(reinit='create_new', config=config)
    started, exit_code = [], 1
    try:
        accelerator.init_trackers('training', init_kwargs=dict(wandb=wandb))
        started = accelerator.trackers
        for tracker in started:
            if tracker.name != 'wandb':  # Accelerate gives the config to the run that the program has open
                tracker.store_init_configuration(config)
        yield
        exit_code = 0
    finally:
        accelerator.trackers = []
        for tracker in started:
            if tracker.name == 'wandb' and accelerator.is_main_process:
                tracker.tracker.finish(exit_code=exit_code)
            else:
                tracker.finish()
