"""MusicLM in PyTorch. Names are imported on first use, so that the package itself costs next to nothing."""

import lazy_loader

from musiclm_pytorch.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
