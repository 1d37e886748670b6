"""The state of a run: everything that the rest of it depends on, and what of that a resumed run takes over."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from musiclm_pytorch.audiolm.fingerprints import differences
from musiclm_pytorch.collectives import world_size
from musiclm_pytorch.trainer import best, checkpoints
from musiclm_pytorch.trainer.folders import moved_aside, new_results

logger = logging.getLogger(__name__)


class Resumable:
    """The part of a trainer that keeps a run in a folder, and goes on from there."""

    recipe: Any = None  # what the trainer was built from, to be kept beside the results

    @property
    def checkpoint_folder(self) -> Path:
        return self.results_folder / 'checkpoints'

    @property
    def best_folder(self) -> Path:
        return self.results_folder / 'best'

    @contextlib.contextmanager
    def opening_results(self) -> Iterator[None]:
        """Take the results folder over, once; what was there is there again if the block fails."""
        if not self.is_main or self.results_opened:
            yield
        else:
            with new_results(self.results_folder, resume=self.resume, clear=self.clear):
                yield
            checkpoints.set_aside_after(self.checkpoint_folder, self.step)
            if self.recipe is not None:
                self.recipe.save(self.results_folder)
        self.results_opened = True
        self.accelerator.wait_for_everyone()

    def go_on(self) -> None:
        """Go on from the newest checkpoint in the results folder, or say that there is none."""
        found = checkpoints.read_newest(self.checkpoint_folder)
        if found is not None:
            path, state = found
            with checkpoints.restoring(path):
                self.load_state(state)
            logger.info('resuming from %s', path)
            return
        self.best = best.known_score(self.best_folder, None, self.held_out)
        if self.is_main:
            kept = f'; {self.best_folder} is kept until a model is better' if self.best is not None else ''
            known = moved_aside(self.results_folder, 'checkpoints/step-*')
            hint = f'; earlier checkpoints are in {known}' if known is not None else ''
            logger.warning('no checkpoint in %s: training begins at step 0%s%s', self.results_folder, kept, hint)

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on. Every process has to call it."""
        return _capture(self)

    def model_config(self) -> dict[str, Any]:
        """What the model was built with, for the checkpoint."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; see `Trainer` for what a resumed run takes over."""
        _restore(self, state)

    def save(self, path: str | Path | None = None) -> None:
        """Write a checkpoint and prune old ones, or write one to a file that is yours. Every process has to call it."""
        with self.opening_results() if path is None else contextlib.nullcontext():
            state = self.state()
        if self.is_main and path is not None:
            checkpoints.write_file(Path(path), state)
        elif self.is_main:
            checkpoints.write(self.checkpoint_folder, self.step, state)
            checkpoints.prune(self.checkpoint_folder, self.max_checkpoints)
        self.accelerator.wait_for_everyone()
        if path is None:
            self.tell('on_checkpoint', self.checkpoint_folder / checkpoints.NAME.format(self.step))

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint: a file or folder of one, or a folder of several, of which the newest is taken."""
        path = Path(path)
        if path.is_file() or checkpoints.PATTERN.fullmatch(path.name):
            state = checkpoints.read(path)
            with checkpoints.restoring(path):
                self.load_state(state)
            return
        for folder in (path, path / 'checkpoints'):
            if (found := checkpoints.read_newest(folder)) is not None:
                with checkpoints.restoring(found[0]):
                    self.load_state(found[1])
                return
        raise FileNotFoundError(f'no checkpoint in {path}')


def _capture(trainer: Resumable) -> dict[str, Any]:
    """Every process has to call it."""
    return dict(
        step=trainer.step,
        best=trainer.best,
        validated=trainer.validated,
        data=trainer.batches.identity,
        epoch=_epoch(trainer),
        split=trainer.held_out_by,
        trained=_trained(trainer),
        model=trainer.model.state_dict(),
        optimizer=trainer.optimizer.state_dict(),
        scaler=None if trainer.scaler is None else trainer.scaler.state_dict(),
        ema=None if trainer.ema is None else trainer.ema.state_dict(),
        processes=gather_object([dict(random=checkpoints.random_states(), position=trainer.position)]),
        config=trainer.model_config(),
    )


def _restore(trainer: Resumable, state: dict[str, Any]) -> None:
    """Put a trainer where a run was. Its settings stay its own: what a checkpoint holds is what they have led to.

    Raises ValueError, before anything is changed, for a checkpoint of another model, of an optimizer that keeps other
    statistics, or of a run that trained on what is held out now.
    """
    changed = differences(state['config'], trainer.model_config())
    _check(trainer, state, changed)
    trainer.model.load_state_dict(state['model'])
    if changed:
        logger.warning('the model was built otherwise, which holds from here on: %s', '; '.join(changed))

    # of the saved optimizer its statistics alone: learning rate, decay and betas are those of this run
    trainer.optimizer.load_state_dict(
        dict(state=state['optimizer']['state'], param_groups=trainer.optimizer.state_dict()['param_groups'])
    )
    _restore_average(trainer, state['ema'])
    if trainer.scaler is not None and state['scaler'] is not None:
        running = {name: state['scaler'][name] for name in ('scale', '_growth_tracker')}
        trainer.scaler.load_state_dict(trainer.scaler.state_dict() | running)

    trainer.position = _position(trainer, state)
    if len(state['processes']) == trainer.accelerator.num_processes:
        checkpoints.restore_random_states(state['processes'][trainer.accelerator.process_index]['random'])
    else:
        logger.warning('the number of processes changed: random states start afresh')
    trainer.step = state['step']
    trainer.validated = state.get('validated')
    trainer.best = best.known_score(trainer.best_folder, state['best'], trainer.held_out)


def _check(trainer: Resumable, state: dict[str, Any], changed: list[str]) -> None:
    where = f'the checkpoint in {trainer.results_folder}'
    saved, own = (
        {name: tuple(it.shape) for name, it in weights.items()}
        for weights in (state['model'], trainer.model.state_dict())
    )
    if saved != own:
        names = sorted(name for name in {**saved, **own} if saved.get(name) != own.get(name))
        raise ValueError(f'{where} is of another model: {"; ".join(changed) or f"{names[0]} and others differ"}')
    instead = 'or begin another run, in another folder, with the weights of this one'
    kinds = {True: "'adam' or 'adamw'", False: "'lion'"}
    statistics = state['optimizer']['state'].values()
    second_moments, own = any('exp_avg_sq' in it for it in statistics), trainer.optimizer_name != 'lion'
    if statistics and second_moments != own:
        raise ValueError(
            f'{where} was written with optimizer={kinds[second_moments]}, and optimizer={trainer.optimizer_name!r} '
            f'keeps other statistics; go on with optimizer={kinds[second_moments]}, {instead}'
        )
    now = _trained(trainer)
    then = state.get('trained', now)
    if differ := sorted({*then} ^ {*now}):
        raise ValueError(
            f'{where} was trained on {len(then)} tensors of the model, now it would be {len(now)}: {differ[0]} and '
            f'{len(differ) - 1} more are not in both; let the same ones require a gradient, {instead}'
        )
    split = state.get('split', trainer.held_out_by)
    if trainer.held_out_by is not None and split != trainer.held_out_by:
        was = 'nothing was held out' if split is None else f'the split was {_shown(split)}'
        raise ValueError(
            f'{where} is of a run in which {was}, now it is {_shown(trainer.held_out_by)}: what was trained on would '
            'be held out; give the same, or held-out data of their own'
        )


def _shown(split: dict[str, Any]) -> str:
    return ', '.join(f'{name}={value}' for name, value in split.items())


def _trained(trainer: Resumable) -> list[str]:
    """Names of what the optimizer trains."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [names[id(parameter)] for group in trainer.optimizer.param_groups for parameter in group['params']]


def _restore_average(trainer: Resumable, average: dict[str, torch.Tensor] | None) -> None:
    if trainer.ema is None and average is not None:
        logger.warning(
            'the checkpoint has an average of the weights, which this run leaves out; use_ema=True goes on with it'
        )
    elif trainer.ema is not None and average is None:
        # it was built from weights that were never trained
        trainer.ema.copy_params_from_model_to_ema()
    elif trainer.ema is not None:
        trainer.ema.load_state_dict(average)


def _epoch(trainer: Resumable) -> dict[str, int | None]:
    """How long a pass over the data is, and a batch of all processes."""
    batches = trainer.batches
    return dict(batches=batches.batches_per_epoch, items=batches.batch_size * world_size())


def _position(trainer: Resumable, state: dict[str, Any]) -> int:
    """The position in the data, in batches of now, of a run that had batches of then."""
    position = max(process['position'] for process in state['processes'])
    then, now = dict(state['data']), dict(trainer.batches.identity)
    epoch, own = state.get('epoch', _epoch(trainer)), _epoch(trainer)
    if (then, epoch) == (now, own) or None in (epoch['batches'], own['batches']):
        return position
    passes, batch = divmod(position, epoch['batches'])
    # groups of like items are arranged by the batch; other orders are those of the items
    sizes = dict(batch_size=None) if 'grouping' not in now else {}
    if then | sizes == now | sizes:
        seen = batch * epoch['items']
        logger.warning(
            'a batch has %d items now, not %d: going on behind the %d items that this pass over the data has had',
            own['items'],
            epoch['items'],
            seen,
        )
        return passes * own['batches'] + min(seen // own['items'], own['batches'])
    logger.warning(
        'the checkpoint was made with data %s, now it is %s: the order of the data changes, and a new pass begins',
        state['data'],
        now,
    )
    return (passes + (batch > 0)) * own['batches']
