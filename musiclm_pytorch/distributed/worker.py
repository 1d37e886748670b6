"""What one of the processes that `launch` starts does."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def run(folder: str) -> None:
    """Train the job in `folder`: its `mulan`, `dataset`, `config`, trainer `keywords` and arguments of `train`.

    Started again after a worker died, it goes on from the newest checkpoint in the results folder.
    """
    from musiclm_pytorch.distributed import launch

    path = Path(folder)
    if (path / launch.ERROR_FILE).exists():
        sys.exit(1)  # what failed before would fail again
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    from torch.distributed.elastic.multiprocessing.errors import record

    code = 0
    try:
        record(_train)(path)
    except KeyboardInterrupt as stopped:
        if os.environ['RANK'] == '0':
            logger.warning('%s', stopped)
        code = 130
    except SystemExit as stopped:
        code = stopped.code
    except Exception:
        traceback.print_exc()
        code = 1
    # what is left is to take the process group apart, in which torch 2.11 can wait for itself for ever: gloo's threads
    # let go of their last tensors under Python's lock, which the one that waits for these threads holds
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(path: Path) -> None:
    import torch

    from musiclm_pytorch.collectives import rank
    from musiclm_pytorch.distributed import launch
    from musiclm_pytorch.distributed.trainer import WorldTrainer
    from musiclm_pytorch.locking import FolderInUseError
    from musiclm_pytorch.trainer.trainer import TrainingError

    # the processes of a machine share its cores
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ['LOCAL_WORLD_SIZE'])))
    # faults of the input and of training itself come again; a lost process or connection does not
    lasting = (ValueError, TypeError, LookupError, AttributeError, ImportError, FileNotFoundError, TrainingError)
    lasting += (FolderInUseError,)
    try:
        job = launch.read_job(path)
        trainer = WorldTrainer(job['mulan'], job['dataset'], job['config'], **job['keywords'])
        log = None
        if job['wants_log'] and rank() == 0:
            log = (path / launch.LOG_FILE).open('a', encoding='utf-8', buffering=1)  # a line at a time

        def tell(metrics: dict[str, Any]) -> None:
            log.write(json.dumps(metrics) + '\n')

        results = trainer.train(**job['train'], log_fn=None if log is None else tell)
    except lasting as error:
        launch.write_error(path, error)
        raise
    if int(os.environ['LOCAL_RANK']) == 0:
        weights = {name: tensor.cpu() for name, tensor in trainer.whole_model.state_dict().items()}
        trained_tokens = trainer.whole_model.text.trained_tokens
        outcome = dict(weights=weights, trained_tokens=trained_tokens, results=results, step=trainer.step)
        torch.save(outcome, path / launch.OUTCOME_FILE)


def _end_with(parent: int) -> None:
    """End this process when the launching one has gone without a word; it would wait for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
