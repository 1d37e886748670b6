"""Music in many styles, played by the sampled instruments of a sound font. Public names are imported on first use."""

from musiclm_pytorch.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__, {'ScoreMusic': 'dataset', 'ScoreLabels': 'labels', 'find_sound_font': 'rendering'}
)
