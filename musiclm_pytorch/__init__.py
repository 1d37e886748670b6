from musiclm_pytorch.version import __version__
