"""Training on several processes. Names are imported on first use."""

from musiclm_pytorch.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        'DistributedConfig': 'config',
        'create_distributed_config': 'config',
        'DistributedMuLaNTrainer': 'trainer',
        'run_distributed_training': 'trainer',
    },
)
