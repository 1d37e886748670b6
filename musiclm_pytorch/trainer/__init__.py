"""Training. Names are imported on first use."""

from musiclm_pytorch.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        'CodecTrainer': 'codec',
        'CoarseTrainer': 'stages',
        'FineTrainer': 'stages',
        'MuLaNRecipe': 'recipes',
        'MuLaNTrainer': 'mulan',
        'SemanticTrainer': 'stages',
        'Trainer': 'loop',
        'load_stage': 'stages',
    },
)
