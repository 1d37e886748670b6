"""Pairs of audio and text from whatever a user points at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.data import Dataset

from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.data.datasets import AudioTextDataset
from musiclm_pytorch.data.scores.dataset import ScoreMusic
from musiclm_pytorch.data.shards import ShardedAudioText, ShardItems, parts_of
from musiclm_pytorch.data.synthetic import SyntheticMusic

SYNTHETIC = 'synthetic'
#: sources that are made when they are asked for
GENERATED = {SYNTHETIC: SyntheticMusic, 'scores': ScoreMusic}


@typechecked
def open_pairs(
    source: str | Path,
    *,
    sample_rate: int,
    audio_folder: str | Path | None = None,
    training: bool = True,
    max_seconds: float | None = 10.0,
    min_seconds: float = 0.5,
    seed: int = 0,
    check_headers: bool = True,
    mixed_shards: int = 16,
    synthetic_length: int = 20_000,
    synthetic_valid_length: int = 256,
    mentions: Mapping[str, float] | None = None,
    sound_font: str | Sequence[str] | None = None,
) -> Dataset:
    """The data set at `source`: a folder, a manifest, MusicCaps' CSV (with `audio_folder`), shards, 'synthetic', which
    is `SyntheticMusic`, or 'scores', which is `ScoreMusic` with the sound font that it finds.

    A folder with .tar files in it is one of shards, and so is one of folders that `write_shards` filled. A folder named
    synthetic or scores is reached as './synthetic'.

    Args:
        sample_rate: of the waves given, in Hz.
        audio_folder: where the audio of a manifest lies, by default beside it.
        training: random crops and captions; otherwise fixed ones, and the held-out split of what is generated.
        max_seconds, min_seconds, seed: as in `AudioTextDataset`; a generated wave is `max_seconds` long.
        check_headers: as in `AudioTextDataset`; shards and generated music have nothing to check.
        mixed_shards: as in `ShardedAudioText`.
        synthetic_length, synthetic_valid_length: items of what is generated, in training and outside of it.
        mentions: of what is generated, the share of the captions that tell an attribute, as in `SyntheticMusic`.
        sound_font: of what is generated, a path or several, as in `SyntheticMusic` and `ScoreMusic`.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or nothing usable.
    """
    crops = dict(sample_rate=sample_rate, max_seconds=max_seconds, min_seconds=min_seconds, seed=seed)
    if str(source) in GENERATED:
        if max_seconds is None:
            raise ValueError(f'{source} music has no length of its own; give max_seconds')
        length, split = (synthetic_length, 'train') if training else (synthetic_valid_length, 'valid')
        make = GENERATED[str(source)]
        more = dict(split=split, mentions=mentions, sound_font=sound_font)
        return make(length, seed=seed, seconds=max_seconds, sample_rate=sample_rate, **more)
    path = Path(source)
    if audio_folder is None and (path.suffix == '.tar' or any(path.glob('*.tar')) or parts_of(path)):
        return ShardedAudioText(source, **crops, training=training, mixed_shards=mixed_shards)
    if audio_folder is None and not path.exists():
        raise FileNotFoundError(f'no folder, manifest or shards at {source}')
    return AudioTextDataset.from_path(source, audio_folder, **crops, training=training, check_headers=check_headers)


@typechecked
def open_whole_clips(
    source: str | Path,
    *,
    sample_rate: int,
    audio_folder: str | Path | None = None,
    synthetic_length: int = 20_000,
    synthetic_seconds: float = 10.0,
    synthetic_seed: int = 0,
    synthetic_mentions: Mapping[str, float] | None = None,
    synthetic_sound_font: str | Sequence[str] | None = None,
) -> Dataset:
    """The same for what is computed once: items by index, alike at each visit, clips from beginning to end.

    Args:
        synthetic_length, synthetic_seconds: clips of what is generated, of its split 'train', and how long each is.
        synthetic_seed, synthetic_mentions, synthetic_sound_font: their seed, what their captions tell, and what plays
            them, as `mentions` and `sound_font` of `open_pairs`.
        others: as in `open_pairs`.
    """
    generated = str(source) in GENERATED
    dataset = open_pairs(
        source,
        sample_rate=sample_rate,
        audio_folder=audio_folder,
        training=generated,
        max_seconds=synthetic_seconds if generated else None,
        synthetic_length=synthetic_length,
        seed=synthetic_seed if generated else 0,
        mentions=synthetic_mentions,
        sound_font=synthetic_sound_font,
    )
    return ShardItems(dataset) if isinstance(dataset, ShardedAudioText) else dataset
