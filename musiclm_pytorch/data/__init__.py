"""Waves and captions in. Public names are imported on first use."""

from importlib import import_module

_HOME_OF = {
    'AudioTextDataset': 'datasets',
    'Clip': 'sources',
    'MusicLabels': 'attributes',
    'ShardItems': 'shards',
    'ShardedAudioText': 'shards',
    'SyntheticMusic': 'synthetic',
    'collate_pairs': 'collate',
    'open_pairs': 'opening',
    'write_shards': 'shard_writer',
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{_HOME_OF[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
