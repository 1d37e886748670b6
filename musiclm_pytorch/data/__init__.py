"""Waves and captions in. Public names are imported on first use."""

from musiclm_pytorch.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        'AudioTextDataset': 'datasets',
        'Clip': 'clips',
        'MusicLabels': 'attributes',
        'ScoreLabels': 'scores.labels',
        'ScoreMusic': 'scores.dataset',
        'ShardItems': 'shards',
        'ShardedAudioText': 'shards',
        'SyntheticMusic': 'synthetic',
        'collate_pairs': 'collate',
        'open_pairs': 'opening',
        'write_shards': 'shard_writer',
    },
)
