"""Threads that compute side by side on a CPU, each with its share of the cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

MOST_WORKERS = 8
AHEAD = 2  # items a thread that are begun beyond the one whose result is waited for


def count_workers(device: torch.device, items: int = MOST_WORKERS) -> int:
    """How many threads to compute so many items with: on a CPU those that torch has; elsewhere one."""
    return max(1, min(torch.get_num_threads(), MOST_WORKERS, items)) if device.type == 'cpu' else 1


@contextmanager
def workers(count: int, threads: int | None = None) -> Iterator[Callable]:
    """A `map` over so many threads, lazy: `AHEAD` items a thread, and one, are under way or done and not taken.

    Items side by side use the cores better than one after another, each on all cores: between two operators all
    threads wait for the slowest.

    Args:
        count: of threads.
        threads: with how many of torch's threads each computes, by default its share of them.
    """
    before = torch.get_num_threads()
    each = max(1, before // count) if threads is None else threads
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(each,))
    try:
        yield lambda work, items: _in_order(pool, AHEAD * count, work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # each thread has a number of its own, but new ones begin with the last one set


def _in_order(pool: ThreadPoolExecutor, ahead: int, work: Callable, items: Iterable) -> Iterator[Any]:
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
