"""Waves and captions in. Names are imported on first use."""

from importlib import import_module

_HOMES = {
    'musiclm_pytorch.data.attributes': ['MusicLabels'],
    'musiclm_pytorch.data.synthetic': ['SyntheticMusic'],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
