"""Training. Names are imported on first use."""

from importlib import import_module

_HOME_OF = {
    'CodecTrainer': 'musiclm_pytorch.trainer.codec',
    'CoarseTrainer': 'musiclm_pytorch.trainer.stages',
    'FineTrainer': 'musiclm_pytorch.trainer.stages',
    'MuLaNRecipe': 'musiclm_pytorch.trainer.recipes',
    'MuLaNTrainer': 'musiclm_pytorch.trainer.mulan',
    'SemanticTrainer': 'musiclm_pytorch.trainer.stages',
    'Trainer': 'musiclm_pytorch.trainer.loop',
    'load_stage': 'musiclm_pytorch.trainer.stages',
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_HOME_OF[name]), name)
