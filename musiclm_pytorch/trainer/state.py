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
from musiclm_pytorch.trainer.folders import check_own, moved_aside, new_results, take
from musiclm_pytorch.trainer.optimizers import optimizers_of, trained_names

logger = logging.getLogger(__name__)


class Resumable:
    """The part of a trainer that keeps a run in a folder, and goes on from there."""

    run: str | None = None  # the name of this run in its folder, once that was opened
    recipe: Any = None  # what the trainer was built from, to be kept beside the results

    @property
    def checkpoint_folder(self) -> Path:
        return self.results_folder / 'checkpoints'

    @property
    def best_folder(self) -> Path:
        return self.results_folder / 'best'

    @contextlib.contextmanager
    def opening_results(self) -> Iterator[None]:
        """Take the results folder over, once; what was there is there again if the block fails.

        Raises FolderInUseError where another run has taken it over since.
        """
        if not (self.results_opened or self.resume):
            # of a checkpoint that was loaded: the model that reached it stays behind with what is moved aside
            self.best = self.validated = None
        if not self.is_main:
            yield
        elif self.results_opened:
            check_own(self.results_folder, self.run)
            yield
        else:
            with new_results(self.results_folder, resume=self.resume, clear=self.clear):
                yield
                self.run = take(self.results_folder)
            checkpoints.set_aside_after(self.checkpoint_folder, self.step)
            if self.recipe is not None:
                self.recipe.save(self.results_folder)
        self.results_opened = True
        self.accelerator.wait_for_everyone()

    def go_on(self) -> None:
        """Go on from the newest checkpoint in the results folder, or say that there is none."""
        found = checkpoints.read_newest(self.checkpoint_folder)
        if found is not None:
            self._load(*found)
            logger.info('resuming from %s', found[0])
            return
        self.best = best.known_score(self.best_folder, None, self.held_out)
        if self.is_main:
            kept = f'; {self.best_folder} is kept until a model is better' if self.best is not None else ''
            known = moved_aside(self.results_folder, 'checkpoints/step-*')
            hint = f'; earlier checkpoints are in {known}' if known is not None else ''
            logger.warning('no checkpoint in %s: training begins at step 0%s%s', self.results_folder, kept, hint)

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on. Every process has to call it."""
        return dict(
            step=self.step,
            best=self.best,
            validated=self.validated,
            data=self.batches.identity,
            epoch=self._epoch(),
            counted_from=self.counted_from,
            split=self.held_out_by,
            trained=trained_names(self.optimizer, self.model),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=None if self.scaler is None else self.scaler.state_dict(),
            ema=None if self.ema is None else self.ema.state_dict(),
            processes=gather_object([dict(random=checkpoints.random_states(), position=self.position)]),
            config=self.model_config(),
        )

    def model_config(self) -> dict[str, Any]:
        """What the model was built with, for the checkpoint."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; see `Trainer` for what a resumed run takes over. Its settings stay its own.

        Raises ValueError, before anything is changed, for a checkpoint of another model, of an optimizer that keeps
        other statistics, or of a run that trained on what is held out now.
        """
        changed = differences(state['config'], self.model_config())
        self._check(state, changed)
        self.model.load_state_dict(state['model'])
        if changed:
            logger.warning('the model was built otherwise, which holds from here on: %s', '; '.join(changed))

        # of the saved optimizer its statistics alone: learning rate, decay and betas are those of this run
        self.optimizer.load_state_dict(
            dict(state=state['optimizer']['state'], param_groups=self.optimizer.state_dict()['param_groups'])
        )
        self._restore_average(state['ema'])
        if self.scaler is not None and state['scaler'] is not None:
            running = {name: state['scaler'][name] for name in ('scale', '_growth_tracker')}
            self.scaler.load_state_dict(self.scaler.state_dict() | running)

        self.position = self._position(state)
        if len(state['processes']) == self.accelerator.num_processes:
            checkpoints.restore_random_states(state['processes'][self.accelerator.process_index]['random'])
        else:
            logger.warning('the number of processes changed: random states start afresh')
        self.step = state['step']
        if (state['data'], state.get('epoch')) == (self.batches.identity, self._epoch()):
            self.counted_from = state.get('counted_from', self.counted_from)
        else:
            self.counted_from = self.step, self.position, self.grad_accum_every
        self.validated = state.get('validated')
        self.best = best.known_score(self.best_folder, state['best'], self.held_out)

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
            found = path, checkpoints.read(path)
        else:
            found = checkpoints.read_newest(path) or checkpoints.read_newest(path / 'checkpoints')
        if found is None:
            raise FileNotFoundError(f'no checkpoint in {path}')
        self._load(*found)

    def _load(self, path: Path, state: dict[str, Any]) -> None:
        with checkpoints.restoring(path):
            self.load_state(state)

    def _check(self, state: dict[str, Any], changed: list[str]) -> None:
        where = f'the checkpoint in {self.results_folder}'
        saved, own = (
            {name: tuple(it.shape) for name, it in weights.items()}
            for weights in (state['model'], self.model.state_dict())
        )
        if saved != own:
            names = sorted(name for name in {**saved, **own} if saved.get(name) != own.get(name))
            raise ValueError(f'{where} is of another model: {"; ".join(changed) or f"{names[0]} and others differ"}')
        instead = 'or begin another run, in another folder, with the weights of this one'
        written_by = optimizers_of(state['optimizer']['state'].values())
        if written_by and self.optimizer_name not in written_by:
            kinds = ' or '.join(map(repr, written_by))
            raise ValueError(
                f'{where} was written with optimizer={kinds}, and optimizer={self.optimizer_name!r} '
                f'keeps other statistics; go on with optimizer={kinds}, {instead}'
            )
        now = trained_names(self.optimizer, self.model)
        then = state.get('trained', now)
        if differ := sorted({*then} ^ {*now}):
            raise ValueError(
                f'{where} was trained on {len(then)} tensors of the model, now it would be {len(now)}: {differ[0]} and '
                f'{len(differ) - 1} more are not in both; let the same ones require a gradient, {instead}'
            )
        split = state.get('split', self.held_out_by)
        if self.held_out_by is not None and split != self.held_out_by:
            was, now = (
                ', '.join(f'{name}={value}' for name, value in (it or {}).items()) for it in (split, self.held_out_by)
            )
            was = f'the split was {was}' if was else 'nothing was held out'
            raise ValueError(
                f'{where} is of a run in which {was}, now it is {now}: what was trained on would be held out; give the '
                'same, or held-out data of their own'
            )

    def _restore_average(self, average: dict[str, torch.Tensor] | None) -> None:
        if self.ema is None and average is not None:
            logger.warning(
                'the checkpoint has an average of the weights, which this run leaves out; use_ema=True goes on with it'
            )
        elif self.ema is not None and average is None:
            # it was built from weights that were never trained
            self.ema.copy_params_from_model_to_ema()
        elif self.ema is not None:
            self.ema.load_state_dict(average)

    def _epoch(self) -> dict[str, int | None]:
        """How long a pass over the data is, and a batch of all processes."""
        batches = self.batches
        return dict(batches=batches.batches_per_epoch, items=batches.batch_size * world_size())

    def _position(self, state: dict[str, Any]) -> int:
        """The position in the data, in batches of now, of a run that had batches of then."""
        position = max(process['position'] for process in state['processes'])
        then, now = dict(state['data']), dict(self.batches.identity)
        epoch, own = state.get('epoch', self._epoch()), self._epoch()
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
