"""What happens beside training, at hooks of the loop: yours by `callbacks=[…]` of any trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm


class Callback:
    """Hooks of a training; a subclass has those that it wants. Each process calls them with its `Trainer`.

    `trainer.step` is the number of steps done, `trainer.model` what is trained, `trainer.evaluated_model` its average,
    where there is one. `trainer.stop()` ends training after the step, with a validation and a checkpoint as at its end.
    What a hook raises ends training, too, without them. `train_step()`, for a loop of your own, calls `on_step` and
    `on_checkpoint` alone.
    """

    def on_train_begin(self, trainer: Any, total_steps: int) -> None:
        """The results folder is open, and the first step comes next."""

    def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
        """A step of the optimizer was made; `loss`, `lr`, `seconds` and others, and those of the last validation."""

    def on_validation(self, trainer: Any, metrics: dict[str, Any]) -> None:
        """Held-out data were looked at; `score` decides which model is best, higher is better."""

    def on_checkpoint(self, trainer: Any, folder: Path) -> None:
        """A checkpoint was written."""

    def on_train_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        """Training is over, or was stopped with a checkpoint."""


class ProgressBar(Callback):
    """Steps, loss and learning rate in a terminal."""

    def on_train_begin(self, trainer: Any, total_steps: int) -> None:
        hidden = not (trainer.progress and trainer.is_main)
        self.bar = tqdm(total=total_steps, initial=min(trainer.step, total_steps), disable=hidden, unit='step')

    def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.bar.update()
        self.bar.set_postfix(loss=f'{metrics["loss"]:.3f}', lr=f'{metrics["lr"]:.1e}')

    def close(self) -> None:
        if hasattr(self, 'bar'):
            self.bar.close()


class CallOnStep(Callback):
    """Calls a function with the metrics of each step."""

    def __init__(self, function: Callable[[dict[str, Any]], None]):
        self.function = function

    def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.function(metrics)
