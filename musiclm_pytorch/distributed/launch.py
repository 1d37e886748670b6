"""Start the processes of a job from a script or a notebook, and bring back what they made.

The workers never import the caller's `__main__`: they are fresh interpreters that read the job, model and data set
included, from a folder that only this user can open. So neither an `if __name__ == '__main__'` nor a file to import is
needed, and a data set may be defined in a notebook.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# A job goes from this process to its own children, in a folder of mode 0700, as multiprocessing hands over what it
# pickles through a pipe. It is no format of files that people keep or exchange: those are never unpickled.
import cloudpickle
import torch
from accelerate.utils import patch_environment
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from musiclm_pytorch.distributed.config import DistributedConfig
from musiclm_pytorch.mulan.lora import adapters_of
from musiclm_pytorch.mulan.model import MuLaN

JOB_FILE, ERROR_FILE, LOG_FILE, OUTCOME_FILE = 'job.pickle', 'error.pickle', 'log.jsonl', 'outcome.pt'


def launch(
    job: dict[str, Any], config: DistributedConfig, log_fn: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Run `job` (see `worker.run`) on the processes of a config under torch's elastic launcher.

    Returns:
        what worker 0 wrote: `weights`, `trained_tokens`, `results` and `step`.

    Raises:
        what a worker raised, where starting again would not help; RuntimeError when the restarts are used up.
    """
    folder = Path(tempfile.mkdtemp(prefix='musiclm-'))
    try:
        _write_job(job | dict(mulan=_on_cpu(job['mulan']), wants_log=log_fn is not None), folder)
        with _forwarded(folder / LOG_FILE, log_fn), _undisturbed():
            _run_workers(folder, config)
        return torch.load(folder / OUTCOME_FILE, weights_only=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_job(job: dict[str, Any], folder: Path) -> None:
    if adapters_of(job['mulan']):
        raise ValueError(
            'a MuLaN with adapters cannot be sent to other processes: start the script with torchrun or accelerate '
            'launch, or merge_adapters before'
        )
    try:
        with (folder / JOB_FILE).open('wb') as file:
            cloudpickle.dump(job, file)
    except (pickle.PicklingError, TypeError, AttributeError) as error:  # by what it is that cannot be sent
        raise TypeError(
            f'the model, the data set or a setting cannot be sent to other processes ({error}); let the data set open '
            'files and connections when it is first read, or start the script with torchrun'
        ) from error


def read_job(folder: Path) -> dict[str, Any]:
    with (folder / JOB_FILE).open('rb') as file:
        return cloudpickle.load(file)


def write_error(folder: Path, error: Exception) -> None:
    """Leave an error for the launching process; the first one of several counts."""
    try:
        content = cloudpickle.dumps(error)
        cloudpickle.loads(content)
    except Exception:  # an exception class may refuse either; its text always goes
        content = cloudpickle.dumps(RuntimeError(f'{type(error).__name__}: {error}'))
    aside = folder / f'.{ERROR_FILE}.{os.getpid()}'
    aside.write_bytes(content)
    with contextlib.suppress(FileExistsError):
        os.link(aside, folder / ERROR_FILE)


def _run_workers(folder: Path, config: DistributedConfig) -> None:
    # the workers find the modules that this process finds, before anything of theirs is imported
    code = (
        f'import sys; sys.path[:] = {sys.path!r}; from musiclm_pytorch.distributed.worker import run; run(sys.argv[1])'
    )
    alone = config.num_nodes == 1
    launcher = LaunchConfig(
        min_nodes=config.num_nodes,
        max_nodes=config.num_nodes,
        nproc_per_node=config.world_size // config.num_nodes,
        run_id=uuid.uuid4().hex if alone else 'musiclm',
        rdzv_backend='c10d',
        rdzv_configs=dict(is_host=config.node_rank == 0),
        rdzv_endpoint='127.0.0.1:0' if alone else f'{config.master_addr}:{config.master_port}',
        local_addr='127.0.0.1' if alone else None,
        max_restarts=config.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / 'logs')),
    )
    try:
        elastic_launch(launcher, sys.executable)('-c', code, str(folder))
    except (ChildFailedError, json.JSONDecodeError) as failed:
        if (folder / ERROR_FILE).exists():
            raise cloudpickle.loads((folder / ERROR_FILE).read_bytes()) from failed
        if isinstance(failed, json.JSONDecodeError):
            # torch's launcher reads what a process tells of its failure, even where it ended it in the middle of that
            raise RuntimeError(
                f'a process of {config.world_size} ended while it told what had failed; with resume=True training goes '
                'on from the newest checkpoint'
            ) from failed
        rank, failure = failed.get_first_failure()
        raise RuntimeError(
            f'process {rank} of {config.world_size} failed (exit code {failure.exitcode}) and '
            f'{config.max_restarts} restarts did not help: {failure.message}; with resume=True training goes on from '
            'the newest checkpoint'
        ) from failed
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from stopped
        raise SystemExit(128 + stopped.sigval) from stopped


def _on_cpu(mulan: MuLaN) -> MuLaN:
    """A model whose tensors do not all arrive on one GPU."""
    return mulan if mulan.device.type == 'cpu' else copy.deepcopy(mulan).cpu()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Undo what the elastic launcher leaves in its process: signal handlers and an environment variable."""
    names = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGQUIT')
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {name: signal.getsignal(signal.Signals[name]) for name in names}
    environment = dict(
        TORCHELASTIC_SIGNALS_TO_HANDLE=','.join(names),
        # processes that are started again must not meet in the store that holds the addresses of those that died
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1',
    )
    try:
        with patch_environment(**environment):
            yield
    finally:
        for name, handler in handlers.items():
            if handler is not None:
                signal.signal(signal.Signals[name], handler)


@contextlib.contextmanager
def _forwarded(path: Path, log_fn: Callable[[dict[str, Any]], None] | None) -> Iterator[None]:
    """Call `log_fn` here, in a thread, with what worker 0 logs; its error comes up once training has ended."""
    if log_fn is None:
        yield
        return
    path.touch()
    done = threading.Event()

    def forward() -> None:
        with path.open(encoding='utf-8') as file:
            unfinished = ''
            while True:
                last = done.is_set()
                *lines, unfinished = (unfinished + file.read()).split('\n')
                for line in lines:
                    log_fn(json.loads(line))
                if last:
                    return
                done.wait(0.1)

    with ThreadPoolExecutor(1) as pool:
        forwarding = pool.submit(forward)
        try:
            yield
        finally:
            done.set()
    forwarding.result()
