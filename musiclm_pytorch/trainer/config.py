"""What every training can be told: one dataclass, which keywords, recipes and the command line are fields of.

Nothing heavy is loaded with it, so that the command line can tell its options.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

OPTIMIZERS = ('adam', 'adamw', 'lion', 'muon')
SCHEDULES = ('constant', 'linear', 'cosine')
SHIPPED = Path(__file__).resolve().parent / 'shipped_recipes'
PRECISIONS = ('no', 'bf16', 'fp16', 'auto')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What all trainers share. Each takes one as `config`, and the fields as keywords too, which come before it:
    `MuLaNTrainer(mulan, dataset, lr=1e-3)` is `MuLaNTrainer(mulan, dataset, config=TrainingConfig(lr=1e-3))`.

    Attributes:
        num_train_steps: steps of the whole run, where `train` is not told otherwise.
        num_epochs: passes over the data, in the whole run; one where neither is given.
        batch_size: items a micro-batch and process; by default 32, or what the data set has for each process.
        grad_accum_every: micro-batches a step, which has the gradient of one batch of all their items.
        lr: highest learning rate; by default 3e-4, of a codec 2e-4.
        betas: decay of the moving averages of the gradient and of its square.
        weight_decay: of matrices alone, never of gains, biases, embeddings or temperatures.
        optimizer: 'adam', 'adamw', 'lion', or 'muon': Muon for the matrices of hidden linear layers and AdamW for the
            rest, at one learning rate, some two to five times AdamW's best one.
        max_grad_norm: largest norm of the gradients; None for no clipping.
        lr_scheduler_type: 'constant', 'linear' or 'cosine'; see `optimizers.learning_rate`.
        warmup_steps: steps over which the learning rate rises from 0.
        min_lr_ratio: share of the learning rate that is left at the end.
        mixed_precision: 'no', 'bf16' (slow on a CPU without instructions for it), 'fp16' (on CUDA only), or 'auto',
            what is fast; by default as `accelerate launch` says, else 'no'.
        use_ema: keep an exponential moving average of the weights, used for validation and the best model.
        ema_beta: how much of the average stays at each update.
        ema_update_every: steps between its updates.
        results_folder: where checkpoints, logs and curves go. Nothing in it changes before `train`.
        resume: go on from the newest checkpoint in the results folder; without one, begin at step 0 and say so. A best
            model that is there is replaced by a better one only. Without `resume`, what is in the folder is moved
            aside, to a folder beside it.
        force_clear_prev_results: True deletes what is in the results folder instead.
        checkpoint_every: steps between checkpoints.
        checkpoint_minutes: minutes between checkpoints, if these are over sooner; None for no clock.
        max_checkpoints: how many are kept.
        validate_every: steps between validations; by default an epoch, or as often as checkpoints where the data set
            does not tell how long an epoch is.
        valid_frac: share of the data held out for validation, where no held-out data are given.
        random_split_seed: of that split.
        max_valid_items: held-out items that validation looks at, at most; by default 1024 pairs, 256 crops of tokens or
            64 waves.
        log_with: trackers by Accelerate's names, such as 'tensorboard' or 'wandb'. Each `train()` is a run of its own;
            to log to one that you have open, pass `train(log_fn=run.log)`.
        log_every: steps between lines in `metrics.jsonl` and the trackers.
        num_workers: processes that read data.
        prefetch_factor: batches that each of them reads ahead.
        drop_last: leave out the last, smaller batch of an epoch.
        seed: of the weights of a recipe's model, the order of the data and everything random in a step.
        accelerate_kwargs: further keywords of `accelerate.Accelerator`.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: a value that no training can have, by its name.
    """

    num_train_steps: int | None = None
    num_epochs: int | None = None
    batch_size: int | None = None
    grad_accum_every: int = 1
    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    optimizer: str = 'adam'
    max_grad_norm: float | None = 0.5
    lr_scheduler_type: str = 'constant'
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    mixed_precision: str | None = None
    use_ema: bool = False
    ema_beta: float = 0.999
    ema_update_every: int = 1
    results_folder: str | Path = './results'
    resume: bool = False
    force_clear_prev_results: bool | None = None
    checkpoint_every: int = 1000
    checkpoint_minutes: float | None = 10.0
    max_checkpoints: int = 5
    validate_every: int | None = None
    valid_frac: float = 0.05
    random_split_seed: int = 42
    max_valid_items: int | None = None
    log_with: Any = None
    log_every: int = 10
    num_workers: int = 0
    prefetch_factor: int | None = None
    drop_last: bool = True
    seed: int = 42
    accelerate_kwargs: dict | None = None
    progress: bool = True

    def __post_init__(self):
        import numpy as np

        from musiclm_pytorch.checks import check_choice, check_not_negative, check_positive, check_probability, fitted

        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, np.generic):
                value = value.item()
            if hint in (int, int | None) and isinstance(value, float) and value.is_integer():
                value = int(value)  # 1e3 steps
            object.__setattr__(self, name, fitted(value, hint, name))
        check_positive(**{name: getattr(self, name) for name in POSITIVE})
        check_not_negative(**{name: getattr(self, name) for name in NOT_NEGATIVE})
        decays = {f'betas[{i}]': beta for i, beta in enumerate(self.betas)}
        check_probability(valid_frac=self.valid_frac, ema_beta=self.ema_beta, **decays)
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f'min_lr_ratio must lie in [0, 1], got {self.min_lr_ratio}')
        if self.prefetch_factor is not None and self.num_workers == 0:
            raise ValueError(f'prefetch_factor={self.prefetch_factor} needs num_workers of at least 1')
        if self.num_epochs is not None and self.num_train_steps is not None:
            raise ValueError(
                f'pass num_epochs or num_train_steps, got both: {self.num_epochs} and {self.num_train_steps}'
            )
        for name, choices in CHOICES.items():
            check_choice(choices, **{name: getattr(self, name)})

    def updated(self, **fields: Any) -> TrainingConfig:
        """The same with other values for some fields. Raises TypeError for what is no field, naming the nearest."""
        for name in fields.keys() - {it.name for it in dataclasses.fields(self)}:
            raise TypeError(f'unexpected keyword argument {name!r}; {nearest(name, self.__dict__)}')
        # two ways to say how long: one takes the place of the other
        for name, other in (('num_epochs', 'num_train_steps'), ('num_train_steps', 'num_epochs')):
            if fields.get(name) is not None:
                fields.setdefault(other, None)
        return dataclasses.replace(self, **fields)

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {it.name: own for it in dataclasses.fields(self) if (own := getattr(self, it.name)) != it.default}


class TrainingKeywords(TypedDict, total=False):
    """The fields of `TrainingConfig` as keywords: for type checkers and editors, which no program can tell them."""

    num_train_steps: int | None
    num_epochs: int | None
    batch_size: int | None
    grad_accum_every: int
    lr: float | None
    betas: tuple[float, float]
    weight_decay: float
    optimizer: str
    max_grad_norm: float | None
    lr_scheduler_type: str
    warmup_steps: int
    min_lr_ratio: float
    mixed_precision: str | None
    use_ema: bool
    ema_beta: float
    ema_update_every: int
    results_folder: str | Path
    resume: bool
    force_clear_prev_results: bool | None
    checkpoint_every: int
    checkpoint_minutes: float | None
    max_checkpoints: int
    validate_every: int | None
    valid_frac: float
    random_split_seed: int
    max_valid_items: int | None
    log_with: Any
    log_every: int
    num_workers: int
    prefetch_factor: int | None
    drop_last: bool
    seed: int
    accelerate_kwargs: dict | None
    progress: bool


POSITIVE = (
    *('num_train_steps', 'num_epochs', 'batch_size', 'grad_accum_every', 'lr', 'max_grad_norm', 'ema_update_every'),
    *('checkpoint_every', 'checkpoint_minutes', 'max_checkpoints', 'validate_every', 'max_valid_items', 'log_every'),
)
NOT_NEGATIVE = ('weight_decay', 'warmup_steps', 'num_workers', 'seed', 'random_split_seed')
CHOICES = dict(optimizer=OPTIMIZERS, lr_scheduler_type=SCHEDULES, mixed_precision=PRECISIONS)


def field_parameters(without: Mapping[str, Any] = {}) -> list[inspect.Parameter]:
    """The fields as keywords of a signature."""
    own, hints = inspect.signature(TrainingConfig).parameters, typing.get_type_hints(TrainingConfig)
    return [it.replace(annotation=hints[name]) for name, it in own.items() if name not in without]


def field_docs(config: type = TrainingConfig) -> dict[str, str]:
    """What the docstring tells of each field."""
    lines = inspect.getdoc(config).partition('Attributes:\n')[2].partition('\n\n')[0]
    found = re.findall(r'^    (\w+): (.*(?:\n        .*)*)', lines, re.M)
    return {name: ' '.join(text.split()) for name, text in found}


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob('*.yaml'))}


def nearest(name: Any, known: Mapping[str, Any]) -> str:
    """A hint at what was meant."""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f'did you mean {close[0]!r}?' if close else f'known are {", ".join(sorted(known))}'
