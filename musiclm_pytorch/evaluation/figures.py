"""What every measurement gives: a number with its uncertainty, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CONFIDENCE, RESAMPLES = 0.95, 2000
# numbers drawn at a time: bounds the memory of a bootstrap over many values
DRAWN_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Figure:
    """One measured number.

    value: the number; None where it is not defined, and then `reason` says why
    low, high: its confidence interval, where there is one
    count: how many items it was measured on
    unit: such as 'LUFS', 'BPM', 'dB'; '' for shares, cosines and the like
    details: JSON-able facts to read it by, such as a seed, R², or the name of an embedding
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int | None = None
    unit: str = ''
    reason: str = ''
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ('value', 'low', 'high'):
            number = getattr(self, name)
            if number is not None:
                if not math.isfinite(number):
                    raise ValueError(f'{name} of a figure must be finite, got {number}; say undefined(reason) instead')
                object.__setattr__(self, name, float(number))
        if self.value is None and not self.reason:
            raise ValueError('a figure without a value needs a reason')

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: 'value' always, the rest where it says something."""
        found: dict[str, Any] = dict(value=self.value)
        for name in ('low', 'high', 'count', 'unit', 'reason'):
            if (it := getattr(self, name)) not in (None, ''):
                found[name] = it
        return found | {name: to_json(it) for name, it in self.details.items()}


def undefined(reason: str, **details: Any) -> Figure:
    """A figure that cannot be had, and why."""
    return Figure(None, reason=reason, details=details)


def mean_figure(
    values: Sequence[float] | np.ndarray, *, unit: str = '', seed: int = 0, missing: str = '', **details: Any
) -> Figure:
    """The mean of one value an item, with the 95 % percentile bootstrap interval over items (Efron, 1979).

    Values that are not finite are left out and counted in the detail 'left_out'. With one value there is no interval.

    Args:
        values: `(n,)`.
        unit: of the values.
        seed: of the resampling.
        missing: what to say if no value is left.
        details: further facts.
    """
    values = np.asarray(values, dtype=np.float64)
    kept = values[np.isfinite(values)]
    if len(kept) < len(values):
        details['left_out'] = len(values) - len(kept)
    if len(kept) == 0:
        return undefined(missing or 'no item has a value', **details)
    mean = float(kept.mean())
    if len(kept) == 1:
        return Figure(mean, count=1, unit=unit, details=details)
    low, high = interval(resampled_means(kept, seed))
    return Figure(mean, low, high, len(kept), unit, details=details)


def resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    """Means of `RESAMPLES` draws with replacement from `(n,)` values."""
    random = np.random.default_rng(seed)
    rows = max(1, DRAWN_AT_ONCE // len(values))
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = random.integers(len(values), size=(min(rows, RESAMPLES - start), len(values)))
        means.append(values[drawn].mean(axis=1))
    return np.concatenate(means)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The percentile interval that holds `CONFIDENCE` of the samples."""
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def to_json(results: Any) -> Any:
    """Nested mappings and sequences of figures as plain dictionaries and lists."""
    if isinstance(results, Figure):
        return results.to_dict()
    if isinstance(results, Mapping):
        return {str(name): to_json(it) for name, it in results.items()}
    if isinstance(results, list | tuple):
        return [to_json(it) for it in results]
    return results
