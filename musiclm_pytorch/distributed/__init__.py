"""Training on several processes. Names are imported on first use."""

from importlib import import_module

_HOME_OF = {
    'DistributedConfig': 'musiclm_pytorch.distributed.config',
    'create_distributed_config': 'musiclm_pytorch.distributed.config',
    'DistributedMuLaNTrainer': 'musiclm_pytorch.distributed.trainer',
    'run_distributed_training': 'musiclm_pytorch.distributed.trainer',
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_HOME_OF[name]), name)
