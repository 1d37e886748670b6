"""What happened when: metrics.jsonl, curves of it as a picture, and trackers of experiments by Accelerate's names."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from musiclm_pytorch.atomic import atomic_write, parsed_json, valid_json


class Journal:
    """Appends metrics to `metrics.jsonl` in a folder, a line each, null for NaN, and draws `curves.png` of them."""

    def __init__(self, folder: Path):
        self.path = folder / 'metrics.jsonl'
        self.picture = folder / 'curves.png'

    def write(self, part: str, step: int, metrics: dict[str, Any]) -> None:
        line = valid_json(dict(part=part, step=step, **metrics)) + '\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)  # where somebody has removed it, training goes on
        with self.path.open('ab+') as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b'\n':  # the last line was cut short when the process was killed
                    line = '\n' + line
            file.write(line.encode())

    def read(self, part: str) -> list[dict[str, Any]]:
        """The lines of a part, by step; where a run went on from an earlier step, without what came after that."""
        if not self.path.is_file():
            return []
        lines: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                entry = parsed_json(line)
            except ValueError:  # cut short when the process was killed
                continue
            if isinstance(entry, dict) and entry.get('part') == part and isinstance(entry.get('step'), int):
                while lines and lines[-1]['step'] >= entry['step']:
                    lines.pop()
                lines.append(entry)
        return lines

    def draw(self) -> None:
        """Draw the loss and the recalls over steps."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        panels = {
            'loss': [('train', 'loss'), ('valid', 'loss')],
            'learning rate': [('train', 'lr')],
            'recall at 1': [('valid', 'audio_to_text_recall_at_1'), ('valid', 'text_to_audio_recall_at_1')],
        }
        figure = Figure(figsize=(13, 3.6), layout='constrained')
        FigureCanvasAgg(figure)
        for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items()):
            for part, name in curves:
                points = [(line['step'], line.get(name)) for line in self.read(part)]
                points = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
                if points:
                    label = f'{part} {name.replace("_", " ")}'
                    axes.plot(*zip(*points), label=label, marker='.' if len(points) < 40 else None)
            axes.set(title=title, xlabel='step')
            if axes.lines:
                axes.legend(fontsize=8)
        with atomic_write(self.picture) as aside:
            figure.savefig(aside, dpi=110, format='png')


def check_trackers(log_with: str | list[str] | None, folder: Path) -> None:
    """Raise unless trackers can be used, before a run changes anything.

    Raises:
        ImportError: the package of one is not installed; Accelerate would leave it out. ValueError: a name that
        Accelerate does not know, or W&B without a login.
    """
    from accelerate.tracking import filter_trackers  # takes seconds

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
def tracking(accelerator: Any, config: dict[str, Any]) -> Iterator[None]:
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
