"""Shares of a job as tasks of Ray, on this machine or on the cluster that `ray.init` finds, as by `RAY_ADDRESS`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from musiclm_pytorch.checks import check_positive
from musiclm_pytorch.extras import needing

RETRIES = 3  # of a share whose process dies, beyond which it is the share that kills it


def run_on_ray(job: Callable[[tuple[int, int]], Any], processes: int, *, on_gpus: bool = False) -> list[Any]:
    """What `job((number, processes))` gives for each number, all at the same time, each in a process of its own.

    A process that dies, or whose machine does, is started again. The job goes there by cloudpickle, so that it should
    name what it works on rather than hold it.

    Raises:
        ImportError: Ray is not installed. ValueError: more processes than Ray has processors, or GPUs: those that wait
            for the first one would keep it from its place. What a job raises. RuntimeError: a share whose process died
            each time.
    """
    check_positive(processes=processes)
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # it would tell its makers of each use
    with needing('tasks of Ray need ray', 'ray'):
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError
    is_own = not ray.is_initialized()
    if is_own:
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
    try:
        kind = 'GPU' if on_gpus else 'CPU'
        if (places := int(ray.cluster_resources().get(kind, 0))) < processes:
            raise ValueError(f'Ray has {places} {kind}s here, too few for {processes} processes that need one each')
        task = ray.remote(num_cpus=0 if on_gpus else 1, num_gpus=int(on_gpus), max_retries=RETRIES)(_run)
        shares = [task.remote(job, (number, processes), os.getcwd()) for number in range(processes)]
        waiting = shares
        while waiting:  # a share that fails is not to wait for the others
            done, waiting = ray.wait(waiting)
            ray.get(done)
        return ray.get(shares)
    except RayTaskError as error:
        raise error.cause from error
    except (WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
        raise RuntimeError(
            f'the process of a share died {1 + RETRIES} times, such as for want of memory; what is done is kept'
        ) from error
    finally:
        if is_own:
            ray.shutdown()


def _run(job: Callable[[tuple[int, int]], Any], share: tuple[int, int], folder: str) -> Any:
    os.chdir(folder)  # what paths are relative to; a cluster's processes begin elsewhere
    return job(share)
