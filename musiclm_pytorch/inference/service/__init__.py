"""MuLaN and MusicLM over HTTP. Names are imported on first use."""

from musiclm_pytorch.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {'ServiceConfig': 'config', 'create_service': 'config'})
