"""Sample rates where a data set meets a model: what both sides know is compared."""

from __future__ import annotations

from typing import Any

from musiclm_pytorch.checks import check_sample_rate


def rate_of(data: Any) -> int | None:
    """The rate in Hz of the waves of a data set, as its `sample_rate` or that of the data sets within it tells.

    None where nothing tells. Raises ValueError for data sets of different rates in one.
    """
    rate = getattr(data, 'sample_rate', None)
    if rate is not None:
        check_sample_rate(rate)
        return rate
    # torch's Subset and ConcatDataset
    within = [getattr(data, 'dataset', None), *(getattr(data, 'datasets', None) or ())]
    rates = {own for it in within if it is not None and it is not data and (own := rate_of(it)) is not None}
    if len(rates) > 1:
        raise ValueError(
            f'the data set joins waves at {" Hz and ".join(map(str, sorted(rates)))} Hz; open all at one sample_rate'
        )
    return next(iter(rates), None)


def agreed_rate(data: Any, sample_rate: int | None, default: int | None = None) -> int:
    """The rate in Hz of the waves of a data set: what it tells, what a call says, or else the default.

    Raises ValueError if the first two differ, or there is none.
    """
    own = rate_of(data)
    if sample_rate is not None:
        check_sample_rate(sample_rate)
        if own not in (None, sample_rate):
            raise ValueError(
                f'the data set gives waves at {own} Hz, but sample_rate={sample_rate}; leave sample_rate out: '
                'the waves are resampled where a model needs it'
            )
    rate = sample_rate or own or default
    if rate is None:
        raise ValueError(f'a {type(data).__name__} does not tell its sample rate; pass sample_rate')
    return rate


def check_rate(data: Any, rate: int | None, name: str = 'the data set') -> None:
    """Raise ValueError if a data set gives waves at another rate than a model takes, where both are known."""
    own = rate_of(data)
    if None not in (own, rate) and own != rate:
        raise ValueError(
            f'{name} gives waves at {own} Hz, but the model hears {rate} Hz; open the data with sample_rate={rate}, or '
            f'build the audio tower with audio_sample_rate={own}'
        )
