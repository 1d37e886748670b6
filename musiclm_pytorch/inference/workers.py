"""Threads that compute side by side on a CPU, each with its share of the cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

MOST_WORKERS = 8


def count_workers(device: torch.device, items: int = MOST_WORKERS) -> int:
    """How many threads to compute so many items with: on a CPU those that torch has; elsewhere one."""
    return max(1, min(torch.get_num_threads(), MOST_WORKERS, items)) if device.type == 'cpu' else 1


@contextmanager
def workers(count: int) -> Iterator[Callable]:
    """A `map` over so many threads.

    Items side by side use the cores better than one after another, each on all cores: between two operators all
    threads wait for the slowest.
    """
    if count == 1:
        yield map
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads // count,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)  # each thread has a number of its own, but new ones begin with the last one set
