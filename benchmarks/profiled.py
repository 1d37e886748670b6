"""What the operators of a training step cost: for a benchmark to show where its time goes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def watch_steps(first: int, count: int, rows: int = 12) -> Callable[[int], None]:
    """A function to be called after each step. It tells on stderr what `count` steps after `first` cost, on average."""
    profiler = profile(activities=[ProfilerActivity.CPU])

    def after_step(step: int) -> None:
        if step == first:
            profiler.__enter__()
        if step != first + count:
            return
        profiler.__exit__(None, None, None)
        costs = sorted(profiler.key_averages(), key=lambda it: -it.self_cpu_time_total)
        total = sum(it.self_cpu_time_total for it in costs)
        print(f'a step takes {total / count / 1e3:.0f} ms, profiled; of these', file=sys.stderr)
        for it in costs[:rows]:
            print(f'{it.self_cpu_time_total / count / 1e3:8.1f} ms {it.key}', file=sys.stderr, flush=True)

    return after_step
