"""What code written for musiclm-pytorch 0.2.8 calls on its trainer, and the functions beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from musiclm_pytorch.collectives import world_size
from musiclm_pytorch.trainer.optimizers import trained_names


def pad_to_longest_fn(data: Sequence[Any]) -> tuple[Any, ...]:
    """Batch items, tensors or tuples of tensors and strings: each field padded to its longest with zeros."""
    return _collate(data, lambda field: pad_sequence(field, batch_first=True))


def curtail_to_shortest_collate(data: Sequence[Any]) -> tuple[Any, ...]:
    """Batch items, tensors or tuples of tensors and strings: each field cut to its shortest, of 0.2.8 the token ids
    too. `collate_pairs` cuts nothing and gives lengths."""
    return _collate(data, lambda field: torch.stack([it[: min(map(len, field))] for it in field]))


def _collate(data: Sequence[Any], batch: Callable[[list[Tensor]], Tensor]) -> tuple[Any, ...]:
    fields = zip(*data) if isinstance(data[0], tuple) else [data]
    return tuple(list(field) if isinstance(field[0], str) else batch(list(field)) for field in fields)


def get_dataloader(ds: Dataset, pad_to_longest: bool = True, **kwargs: Any) -> DataLoader:
    """A `DataLoader` of such batches."""
    return DataLoader(ds, collate_fn=pad_to_longest_fn if pad_to_longest else curtail_to_shortest_collate, **kwargs)


class UpstreamNames:
    """Attributes of the trainer of 0.2.8 under their names."""

    @property
    def steps(self) -> Tensor:
        """`(1,)` float, the steps done: as 0.2.8 kept them. `trainer.step` is the number."""
        return torch.tensor([float(self.step)])

    @property
    def optim(self) -> torch.optim.Optimizer:
        return self.optimizer

    @property
    def ds(self) -> Dataset:
        """The data trained on."""
        return self.dataset

    @property
    def valid_ds(self) -> Dataset | None:
        """The data held out."""
        return self.valid_dataset

    @property
    def dl(self) -> DataLoader:
        """A loader of its own over the data trained on: batches for `mulan(**batch)`, in an order of its own."""
        return self._loader(self.dataset, shuffle=not isinstance(self.dataset, IterableDataset))

    @property
    def valid_dl(self) -> DataLoader | None:
        """The same over the data held out; None without any."""
        return None if self.valid_dataset is None else self._loader(self.valid_dataset)

    def _loader(self, dataset: Dataset, **keywords: Any) -> DataLoader:
        return DataLoader(dataset, batch_size=self.batches.batch_size, collate_fn=self.collate_fn, **keywords)

    @property
    def is_local_main(self) -> bool:
        return self.accelerator.is_local_main_process

    @property
    def is_distributed(self) -> bool:
        return world_size() > 1

    def print(self, msg: Any) -> None:
        """Print on the main process alone."""
        self.accelerator.print(msg)


def moments_by_name(saved: dict[str, Any], names: list[str], *, source: str | Path) -> dict[str, dict[str, Any]]:
    """What an optimizer knows of each weight, from its state dict, which numbers them in the order of `names`."""
    numbers = [number for group in saved['param_groups'] for number in group['params']]
    if len(numbers) != len(names):
        raise ValueError(f'{source} holds an optimizer of {len(numbers)} weights for a model of {len(names)}')
    return {name: saved['state'][number] for name, number in zip(names, numbers) if number in saved['state']}


def set_moments(optimizer: torch.optim.Optimizer, model: nn.Module, moments: dict[str, dict[str, Any]]) -> None:
    """Give an optimizer, grouped as it is, what another one of the same kind knew of each weight."""
    own = optimizer.state_dict()
    trained = enumerate(trained_names(optimizer, model))
    own['state'] = {number: moments[name] for number, name in trained if name in moments}
    optimizer.load_state_dict(own)
