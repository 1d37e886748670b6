"""The training loop, one for all trainers: what to compute is theirs, how to train is here."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from ema_pytorch import EMA
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Unpack

from musiclm_pytorch.audiolm.saving import describe
from musiclm_pytorch.checks import check_choice, check_positive
from musiclm_pytorch.collectives import gather_sizes, mean_over_ranks, num_launched, rank, world_size
from musiclm_pytorch.kernels.processor import computes_in_bf16, half_precision
from musiclm_pytorch.locking import only_writer
from musiclm_pytorch.mulan import checkpoint
from musiclm_pytorch.mulan.display import size_of
from musiclm_pytorch.mulan.model import evaluating
from musiclm_pytorch.trainer import best, checkpoints
from musiclm_pytorch.trainer.callbacks import Callback, CallOnStep, ProgressBar
from musiclm_pytorch.trainer.config import PRECISIONS, TrainingConfig, TrainingKeywords, field_parameters
from musiclm_pytorch.trainer.grouping import Grouping
from musiclm_pytorch.trainer.interrupts import end_by, stop_requests
from musiclm_pytorch.trainer.metrics_logger import Journal, check_trackers, tracking
from musiclm_pytorch.trainer.optimizers import build_optimizer, learning_rate
from musiclm_pytorch.trainer.resumable_loader import DummyBatch, SeededItems, default_batch_size, open_batches
from musiclm_pytorch.trainer.state import Resumable

logger = logging.getLogger(__name__)

DTYPES = {'no': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
UNUSABLE_BATCHES = 1000  # in a row, after which a stream without epochs is given up


def fast_precision(device: torch.device) -> str:
    """'bf16' where a device computes in it; else 'fp16' on CUDA and 'no' on a CPU."""
    return half_precision(device.type) if device.type == 'cuda' or computes_in_bf16() else 'no'


def precision_for(name: str | None, device: torch.device, *, tell: bool = True) -> str:
    """The precision of that name on a device; of None, what `accelerate launch --mixed_precision` says.

    Raises ValueError for an unknown one, and for fp16 without CUDA.
    """
    name = name or os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')
    check_choice(PRECISIONS, mixed_precision=name)
    if name == 'fp16' and not torch.cuda.is_available():
        raise ValueError("mixed_precision='fp16' needs a CUDA device; use 'bf16' on a CPU")
    if name == 'bf16' and device.type == 'cpu' and not computes_in_bf16() and tell:
        logger.warning(
            'this processor has no AVX-512 or AMX instructions for bf16 and emulates it, slowly; '
            "mixed_precision='auto' takes what is fast"
        )
    return fast_precision(device) if name == 'auto' else name


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not a number, or the model has collapsed."""


class Trainer(Resumable):
    """Trains a model on batches: optimizer, schedule, precision, averages, checkpoints, logs, several processes.

    A subclass gives `compute_gradients` (the loss of the micro-batches of a step, its gradients accumulated) and may
    give `validate`. Everything random is a function of `seed` and the step, so a run that was resumed equals one that
    was never stopped.

    A trainer may be told anything else when it resumes. Learning rate, schedule, betas, decay, clipping, length,
    precision, averaging, accumulation and all that is about files and logs hold from there on; 'adam' and 'adamw' go on
    from each other, an average that is new starts from the loaded weights. With another batch size or number of
    processes the data go on at the same item of the epoch, and epochs are counted on from there; with other data,
    seed, or groups a new pass over them begins, which is logged. Refused by name are another model, 'lion' after 'adam'
    and the other way round, other frozen weights, and another split, which would hold out what was trained on.

    Args:
        model: what is trained.
        step_module: the module whose forward pass the subclass calls; it is wrapped for several processes.
        dataset: a map-style data set, `ShardedAudioText`, or another `IterableDataset`, which is not entered again
            where a run was stopped.
        collate_fn: makes a batch of a list of items.
        grouping: arranges the order of the items; see `trainer.grouping`.
        callbacks: see `Callback`.
        config: what every training can be told; or leave it out, or parts of it, and pass
        further keywords: fields of `TrainingConfig`, which come before it.
    """

    #: what fields of `TrainingConfig` that are None by default are for this kind
    DEFAULTS: ClassVar[Mapping[str, Any]] = dict(lr=3e-4)
    #: whether some weights have no part in the loss
    some_unused = False

    def __init_subclass__(cls, **keywords: Any):
        super().__init_subclass__(**keywords)
        cls.__signature__ = _with_fields(cls)

    def __init__(
        self,
        model: nn.Module,
        step_module: nn.Module,
        dataset: Dataset,
        *,
        collate_fn: Callable,
        grouping: Grouping | None = None,
        callbacks: Sequence[Callback] = (),
        config: TrainingConfig | None = None,
        **keywords: Unpack[TrainingKeywords],
    ):
        config = self.complete(config, keywords)
        self.config = config
        # As attributes, too. These may be changed while it trains: lr, max_grad_norm, grad_accum_every, and how often
        # it validates, saves and logs; what the optimizer, the schedule and the data were built with may not.
        vars(self).update(vars(config))
        # the same one wherever the program is by then
        self.results_folder = Path(config.results_folder).absolute()
        self.schedule = dict(
            schedule=config.lr_scheduler_type, warmup_steps=config.warmup_steps, min_lr_ratio=config.min_lr_ratio
        )
        self.collate_fn = collate_fn
        self.callbacks = [*callbacks]
        self.step = 0
        self.position = 0  # in the data, in batches of this process
        # step, position and batches a step, of where a step last came to be another share of an epoch
        self.counted_from = 0, 0, config.grad_accum_every
        self.running: Sequence[Callback] = self.callbacks
        self.own_data: tuple[int, Iterator[Any]] | None = None  # of `train_step`, and where it stands
        self.best: float | None = None  # score of the best model so far
        self.validated: int | None = None  # step of the last validation
        self.results_opened = False

        # Accelerate keeps one precision for all that a process does; here each trainer has its own
        self.accelerator = Accelerator(
            mixed_precision='no',
            log_with=config.log_with,
            project_dir=str(self.results_folder),
            **self.accelerate_keywords(config.accelerate_kwargs or {}),
        )
        self.mixed_precision = precision_for(config.mixed_precision, self.device, tell=self.is_main)
        handler = self.accelerator.scaler_handler
        scaling = {} if handler is None else handler.to_kwargs()
        self.scaler = torch.amp.GradScaler(self.device.type, **scaling) if self.mixed_precision == 'fp16' else None

        if self.is_main:
            check_trackers(config.log_with, self.results_folder)
        # the first process alone may know that a launcher has started all of them again
        self.resume = bool(gather_sizes(int(config.resume), self.device)[0])
        self.clear = bool(config.force_clear_prev_results)

        self.batches = open_batches(
            dataset,
            grouping,
            batch_size=config.batch_size or default_batch_size(dataset),
            collate_fn=collate_fn,
            seed=config.seed,
            drop_last=config.drop_last,
            num_workers=config.num_workers,
            prefetch_factor=config.prefetch_factor,
            pin_memory=self.device.type == 'cuda',
        )
        self.steps_per_epoch = None  # of a stream, nobody knows
        if self.batches.batches_per_epoch is not None:
            self.steps_per_epoch = max(1, self.batches.batches_per_epoch // config.grad_accum_every)
        self.validate_every = config.validate_every or self.steps_per_epoch or config.checkpoint_every

        self.model = model.to(self.device)
        self.ema = None
        if config.use_ema:
            self.ema = EMA(
                model,
                beta=config.ema_beta,
                update_every=config.ema_update_every,
                update_after_step=0,
                include_online_model=False,
            )
        self.step_module = self.distribute(step_module)
        self.optimizer_name = config.optimizer
        self.optimizer = build_optimizer(config.optimizer, model, config.lr, config.betas, config.weight_decay)
        self.journal = Journal(self.results_folder) if self.is_main else None

        if self.resume:
            self.go_on()

    @classmethod
    def complete(cls, config: TrainingConfig | None, keywords: Mapping[str, Any]) -> TrainingConfig:
        """A config with keywords in it, and what is left open as is usual for this kind of trainer."""
        try:
            config = (TrainingConfig() if config is None else config).updated(**keywords)
        except TypeError as error:
            raise TypeError(f'{cls.__name__}: {error}') from None
        return config.updated(**{name: it for name, it in cls.DEFAULTS.items() if getattr(config, name) is None})

    # what a subclass gives

    def compute_gradients(self, batches: list[Any]) -> dict[str, float]:
        """Accumulate the gradients of one step over its micro-batches; returns metrics, `loss` among them."""
        raise NotImplementedError

    def validate(self) -> dict[str, Any] | None:
        """Metrics on held-out data, `score` among them (higher is better); None if there is no such data."""
        return None

    valid_dataset: Any = None  # held-out items, by index
    held_out_by: dict[str, Any] | None = None  # how they were chosen from the data set, if they were
    least_held_out = 1  # items that validation takes

    @property
    def held_out(self) -> int | None:
        """The number of items that validation looks at; None where no validation is wanted."""
        if self.valid_dataset is None:
            return None if self.held_out_by is None else 0
        return min(len(self.valid_dataset), self.max_valid_items)

    def save_model(self, folder: Path) -> None:
        """Write the model (its average, where there is one) for use: what `audiolm.saving.load_module` reads."""
        model = self.evaluated_model
        checkpoint.write_folder(folder, describe(model) | dict(step=self.step), model.state_dict())

    def count_items(self, batch: Any) -> int | None:
        """The number of items in a batch that are trained on, None where it cannot be used."""
        if batch is None:
            return None
        return 0 if isinstance(batch, DummyBatch) else 1

    smallest_batch = 1  # items, over all processes
    saves_last = False  # whether the model at the end of training is written too, not the best alone

    def as_dummy(self, batch: Any) -> Any:
        """Mark a batch as one that takes part in a step and adds nothing to it, for a process that has no items left
        at the uneven end of an epoch."""
        return DummyBatch(batch)

    # how it is trained

    def accelerate_keywords(self, given: dict[str, Any]) -> dict[str, Any]:
        """What Accelerate is told beside `accelerate_kwargs`, whose word counts.

        Accelerate 1.15 takes each of several processes without a GPU for the only one, unless it is told of the CPU.
        DDP waits for gradients of all weights, unless it is told that some have none.
        """
        told = dict(given)
        if num_launched() > 1 and not torch.accelerator.is_available():
            told.setdefault('cpu', True)
        handlers = given.get('kwargs_handlers') or []
        if self.some_unused and not any(isinstance(it, DistributedDataParallelKwargs) for it in handlers):
            told['kwargs_handlers'] = [DistributedDataParallelKwargs(find_unused_parameters=True), *handlers]
        return told

    def distribute(self, step_module: nn.Module) -> nn.Module:
        """Wrap what is trained for several processes."""
        return self.accelerator.prepare(step_module)

    def autocast(self) -> contextlib.AbstractContextManager:
        dtype, handler = DTYPES[self.mixed_precision], self.accelerator.autocast_handler
        keywords = {'enabled': True} if handler is None else handler.to_kwargs()
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype, **keywords)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def accumulate(
        self,
        batches: list[Any],
        compute: Callable[[Any], tuple[Tensor, dict[str, Tensor]]],
        count: Callable[[Any], Tensor | int],
    ) -> dict[str, float]:
        """Accumulate the gradients of a loss that is a mean over parts, such as tokens: the mean over all of the step.

        A step has one gradient, however its parts are shared out to micro-batches and processes.

        Args:
            batches: of this process.
            compute: the mean loss of one of them, through the step module, and its detached metrics, means likewise.
            count: the number of parts of one of them.

        Returns:
            the metrics, means over all parts of the step.
        """
        counts = [0 if isinstance(batch, DummyBatch) else count(batch) for batch in batches]
        counts = torch.stack([torch.as_tensor(it, dtype=torch.float32, device=self.device) for it in counts])
        # gradients are averaged over processes, so all shares add up to the number of these
        shares = counts / mean_over_ranks(counts.sum())
        sums: dict[str, Tensor] = {}
        for number, (batch, share) in enumerate(zip(batches, shares), start=1):
            batch = batch.batch if isinstance(batch, DummyBatch) else batch
            # gradients are averaged over processes once a step
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.step_module):
                with self.autocast():
                    loss, metrics = compute(batch)
                self.backward(loss * share)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value * share
        return {name: mean_over_ranks(value).item() for name, value in sums.items()}

    def held_out_batches(self, indices: Iterable[int]) -> Iterator[Any]:
        """Batches of held-out items, alike at each validation."""
        return self.batches_of(self.valid_dataset, indices, self.batches.batch_size)

    def batches_of(self, dataset: Dataset, indices: Iterable[int], size: int) -> Iterator[Any]:
        """Batches of some items, the same whenever they are read, on the device; what cannot be read is left out."""
        items, keys = SeededItems(dataset, self.seed), [(0, index) for index in indices]
        loader = DataLoader(items, sampler=keys, batch_size=size, collate_fn=self.collate_fn)
        return (send_to_device(batch, self.device) for batch in loader if batch is not None)

    @torch.no_grad()
    def mean_over_held_out(self, measure: Callable[[nn.Module, Any], tuple[Tensor, Tensor | int]]) -> float | None:
        """The mean over all held-out parts, such as tokens, of what `measure` finds of a model and a batch: a sum and a
        number of parts; each process takes a share of the items. None if there are none."""
        if not self.held_out:
            return None
        sums, model = torch.zeros(2, device=self.device), self.evaluated_model
        with evaluating(model):
            for batch in self.held_out_batches(range(rank(), self.held_out, world_size())):
                sums += torch.stack([torch.as_tensor(it, device=self.device).float() for it in measure(model, batch)])
        total, count = (mean_over_ranks(part).item() for part in sums)
        return total / count if count else None

    def clip_gradients(self) -> float:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))

    # places

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that validation judges: the average of the weights, where there is one."""
        return self.model if self.ema is None else self.ema.ema_model

    # training

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(step {self.step}, batches of {self.batches.batch_size} × {self.grad_accum_every}, '
            f'{self.mixed_precision}, in {self.results_folder},\n  {size_of(self.model)})'
        )

    def train(
        self,
        num_epochs: int | None = None,
        num_train_steps: int | None = None,
        with_validation: bool = True,
        log_fn: Callable[[dict[str, float]], None] | None = None,
    ) -> dict[str, Any]:
        """Train up to a step of the whole run: a resumed run does the rest only.

        Args:
            num_epochs: passes over the data; or
            num_train_steps: steps. If neither is given, as the trainer was built.
            with_validation: validate every `validate_every` steps and at the end.
            log_fn: called with the metrics of each step.

        Returns:
            the last metrics, of training and validation.

        Raises:
            FolderInUseError: another training writes into the results folder, or has since. TrainingError: it cannot
            go on.
        """
        total = self.total_steps(num_epochs, num_train_steps)
        results: dict[str, Any] = {}
        data = self.batches.iterate(self.position)
        bar = ProgressBar()
        self.running = [bar, *([] if log_fn is None else [CallOnStep(log_fn)]), *self.callbacks]
        if with_validation and self.is_main:
            best.warn_of_few(self.held_out, self.least_held_out)
        with contextlib.ExitStack() as stack:
            if self.is_main:
                stack.enter_context(only_writer(self.results_folder))
            with self.opening_results():
                stack.enter_context(self.tracking(total))
            stack.callback(bar.close)
            stop = stack.enter_context(stop_requests())
            stopped, saved, saved_at, self.stopping = 0, self.step, time.monotonic(), False
            self.tell('on_train_begin', total)
            while self.step < total and not stopped:
                results |= self.optimize(data, total)
                self.tell('on_step', results)
                # before the checkpoint: a run that goes on from it has this behind it
                if with_validation and (self.step % self.validate_every == 0 or self.step == total):
                    results |= self.run_validation()
                stopped, ended, due = self.agree(stop.number, time.monotonic() - saved_at)
                if due or stopped or self.step % self.checkpoint_every == 0:
                    self.save()
                    saved, saved_at = self.step, time.monotonic()
                total = self.step if ended else total
            if self.step >= total:
                # resumed at its end, or ended sooner, a run may have this to do still
                if with_validation and self.validated != self.step:
                    results |= self.run_validation()
                    saved = None
                if saved != self.step:
                    self.save()
                if self.saves_last and self.is_main:
                    self.save_model(self.results_folder / 'last')
            if self.journal is not None:
                self.journal.draw()
            self.tell('on_train_end', results)
            stopped, *_ = self.agree(stop.number, 0.0)
        if stopped:
            where = 'the end of training' if self.step >= total else f'step {self.step} of {total}'
            end_by(
                stopped,
                f'stopped by {signal.Signals(stopped).name} at {where}, with a checkpoint in {self.checkpoint_folder}; '
                'to go on from there, resume',
                tell=self.is_main,
            )
        return results

    def total_steps(self, num_epochs: int | None = None, num_train_steps: int | None = None) -> int:
        """Steps of the whole run: of so many epochs or steps, or as the trainer was told, or one epoch."""
        if num_epochs is None and num_train_steps is None:
            num_epochs, num_train_steps = self.num_epochs, self.num_train_steps
        elif num_epochs is not None and num_train_steps is not None:
            raise ValueError(f'pass num_epochs or num_train_steps, got both: {num_epochs} and {num_train_steps}')
        check_positive(num_epochs=num_epochs, num_train_steps=num_train_steps)
        if num_train_steps is not None:
            return num_train_steps
        if self.batches.batches_per_epoch is None:
            raise ValueError('the data set does not tell how long an epoch is; pass num_train_steps')
        if self.counted_from[2] != self.grad_accum_every:
            self.counted_from = self.step, self.position, self.grad_accum_every
        step, position, together = self.counted_from
        return step + math.ceil(((num_epochs or 1) * self.batches.batches_per_epoch - position) / together)

    def tell(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all callbacks."""
        for callback in self.running:
            getattr(callback, hook)(self, *arguments)

    def stop(self) -> None:
        """End training after the step, as if it had its length: for callbacks."""
        self.stopping = True

    def agree(self, stop: int, seconds: float) -> tuple[int, bool, bool]:
        """What all processes do after a step: the signal that ends training, whichever of them it has reached, whether
        one has called `stop`, and whether a checkpoint is due by the clock of the first, `seconds` after the last."""
        due = self.checkpoint_minutes is not None and seconds >= 60 * self.checkpoint_minutes
        told = gather_sizes(4 * stop + 2 * self.stopping + due, self.device)
        return max(it // 4 for it in told), any(it // 2 % 2 for it in told), bool(told[0] % 2)

    def train_step(self) -> dict[str, float]:
        """One step, with a checkpoint where one is due by steps: for a loop of your own, in place of `train`.

        Returns the metrics of the step, `loss` among them. The schedule is that of the config's steps or epochs, or
        of one epoch.
        """
        total = self.total_steps()
        with self.opening_results():
            if self.own_data is None or self.own_data[0] != self.position:
                self.own_data = (self.position, self.batches.iterate(self.position))
            metrics = self.optimize(self.own_data[1], total)
        self.own_data = (self.position, self.own_data[1])
        self.tell('on_step', metrics)
        if self.step % self.checkpoint_every == 0:
            self.save()
        return metrics

    def optimize(self, data: Iterator[Any], total: int) -> dict[str, float]:
        """One step of the optimizer."""
        start = time.perf_counter()
        rate = learning_rate(self.step, lr=self.lr, total_steps=total, **self.schedule)
        for group in self.optimizer.param_groups:
            group['lr'] = rate

        self.model.train()
        self.optimizer.zero_grad()  # a step that an error or a signal broke off has left some
        metrics = self.compute_gradients([self.next_batch(data) for _ in range(self.grad_accum_every)])
        if not math.isfinite(metrics['loss']):
            raise TrainingError(
                f'the loss is {metrics["loss"]} at step {self.step}; lower the learning rate ({rate:.1e}) or look at '
                f'the data of this step. The newest checkpoint is in {self.checkpoint_folder}'
            )
        if self.max_grad_norm is not None:
            metrics['grad_norm'] = self.clip_gradients()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update()

        self.step += 1
        metrics |= dict(lr=rate, seconds=time.perf_counter() - start)
        if self.step % self.log_every == 0 or self.step == total:
            self.log(metrics, 'train')
        return metrics

    def next_batch(self, data: Iterator[Any]) -> Any:
        """The next batch that can be trained on; what the data set could not read may leave none or too little."""
        for _ in range(self.batches.batches_per_epoch or UNUSABLE_BATCHES):
            batch = next(data)
            if batch is not None and self.batches.own_items(self.position) == 0:
                batch = self.as_dummy(batch)
            self.position += 1
            # all processes take a batch or none does, since each waits for the others in the step
            count = self.count_items(batch)
            counts = gather_sizes(-1 if count is None else count, self.device)
            if min(counts) >= 0 and sum(counts) >= self.smallest_batch:
                return send_to_device(batch, self.device)
            logger.warning('left out a batch at step %d: too few of its items could be read', self.step)
        raise TrainingError(f'no batch of a whole epoch could be used at step {self.step}; look at the log of the data')

    def run_validation(self) -> dict[str, Any]:
        states = checkpoints.random_states()
        metrics = self.validate()
        # looking at the model must not change what training draws next
        checkpoints.restore_random_states(states)
        self.validated = self.step
        if metrics is None:
            return {}
        self.log(metrics, 'valid')
        if not math.isfinite(metrics.get('loss', 0.0)):
            logger.warning(
                'the held-out loss is %s at step %d: training has diverged; lower the learning rate, and go on from a '
                'checkpoint in %s',
                metrics['loss'],
                self.step,
                self.checkpoint_folder,
            )
        elif math.isfinite(metrics['score']) and (self.best is None or metrics['score'] > self.best):
            if self.is_main:
                found = dict(step=self.step, held_out=self.held_out) | metrics
                best.write(self.best_folder, self.save_model, replace=self.best is not None, found=found)
            self.best = metrics['score']
        self.tell('on_validation', metrics)
        return {f'valid_{name}': value for name, value in metrics.items()}

    # logs

    def tracking(self, total: int) -> contextlib.AbstractContextManager:
        config = dict(lr=self.lr, batch_size=self.batches.batch_size, total_steps=total, seed=self.seed)
        return tracking(self.accelerator, config | self.schedule)

    def log(self, metrics: dict[str, Any], part: str) -> None:
        if self.journal is not None:
            self.journal.write(part, self.step, metrics)
        numbers = {f'{part}/{name}': value for name, value in metrics.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=self.step)


def _with_fields(kind: type[Trainer]) -> inspect.Signature:
    """A trainer's signature with the fields of `TrainingConfig` among its keywords, for help, editors and recipes."""
    _, *own = inspect.signature(kind.__init__).parameters.values()
    named = {it.name: it for it in own if it.kind is not inspect.Parameter.VAR_KEYWORD}
    fields = [] if len(named) == len(own) else field_parameters(named)
    fields = [it.replace(default=kind.DEFAULTS.get(it.name, it.default)) for it in fields]
    return inspect.Signature([*named.values(), *fields])


Trainer.__signature__ = _with_fields(Trainer)


def detached(loss: Tensor) -> float:
    return loss.detach().float().item()
