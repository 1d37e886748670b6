"""MagnaTagATune (Law et al., 2009) from disk: clips with the tags that people gave them, to test taggers on."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from musiclm_pytorch.checks import typechecked

logger = logging.getLogger(__name__)

# the 50 tags that most clips have, in that order
TOP_TAGS = (
    *('guitar', 'classical', 'slow', 'techno', 'strings', 'drums', 'electronic', 'rock', 'fast', 'piano', 'ambient'),
    *('beat', 'violin', 'vocal', 'synth', 'female', 'indian', 'opera', 'male', 'singing', 'vocals', 'no vocals'),
    *('harpsichord', 'loud', 'quiet', 'flute', 'woman', 'male vocal', 'no vocal', 'pop', 'soft', 'sitar', 'solo'),
    *('man', 'classic', 'choir', 'voice', 'new age', 'dance', 'male voice', 'female vocal', 'beats', 'harp', 'cello'),
    *('no voice', 'weird', 'country', 'metal', 'female voice', 'choral'),
)
# the usual split, by the folder that a clip lies in
SPLITS = dict(train='0123456789ab', valid='c', test='def')
ID, PATH = 'clip_id', 'mp3_path'


class MagnaTagATune(NamedTuple):
    """Clips of a split.

    paths: `n` of the sound files
    tags: the names of the columns of `truth`
    truth: `(n, tags)` bool, whether a clip has a tag
    """

    paths: list[Path]
    tags: tuple[str, ...]
    truth: np.ndarray


@typechecked
def read_magnatagatune(
    annotations: str | Path,
    folder: str | Path | None = None,
    split: str = 'test',
    *,
    tags: Sequence[str] = TOP_TAGS,
    untagged: bool = True,
) -> MagnaTagATune:
    """The clips of a split, in the order of the file.

    The split is the usual one by folders: 0 to b are for training, c for validation, d to f for the test.

    Args:
        annotations: MagnaTagATune's `annotations_final.csv`: columns parted by tabs, `clip_id`, one a tag with 0 or 1,
            and last `mp3_path`.
        folder: what the paths in it, such as `f/some-piece.mp3`, lie in. Then each file must be there; the empty ones
            (three clips are, all of them for training) are left out. Without, the paths stay as they are and nothing
            is looked at.
        split: 'train', 'valid' or 'test'.
        tags: those asked for, by default the 50 most frequent ones that papers measure.
        untagged: keep clips that have none of the tags. Papers differ here; both are in use.

    Raises:
        FileNotFoundError: no such annotations, or a clip that is not in `folder`. ValueError: an unknown split, a file
        that is not like that, or a split without clips.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {", ".join(map(repr, SPLITS))}, got {split!r}')
    if isinstance(tags, str) or not tags:
        raise ValueError(f'tags must be a list of names, got {tags!r}')
    if not Path(annotations).is_file():
        raise FileNotFoundError(
            f"no file at {annotations}; it should be MagnaTagATune's annotations_final.csv, which is downloaded apart "
            'from the audio'
        )
    paths, rows = [], []
    for path, truth in read_rows(Path(annotations), tags):
        if path.parts[0] not in SPLITS[split] or not (untagged or any(truth)):
            continue
        if folder is not None:
            path = Path(folder) / path
            if not path.is_file():
                raise FileNotFoundError(
                    f'{annotations} names {path}, which is not there; pass the folder that holds the folders 0 to f'
                )
            if path.stat().st_size == 0:
                logger.warning('left out %s, which is empty', path)
                continue
        paths.append(path)
        rows.append(truth)
    if not paths:
        raise ValueError(f'{annotations} has no clip of the split {split!r}; is it the whole annotations_final.csv?')
    return MagnaTagATune(paths, tuple(tags), np.array(rows, dtype=bool))


def read_rows(annotations: Path, tags: Sequence[str]) -> Iterator[tuple[Path, list[bool]]]:
    """The path and the truth of each clip."""
    hint = "; it should be MagnaTagATune's annotations_final.csv, unchanged"
    with open(annotations, newline='', encoding='utf-8') as file:
        table = csv.reader(file, delimiter='\t')
        try:
            header = next(table, [])
            if len(header) < 3 or (header[0], header[-1]) != (ID, PATH):
                raise ValueError(f'{annotations} has no columns {ID} … {PATH}, parted by tabs{hint}')
            if missing := [tag for tag in tags if tag not in header[1:-1]]:
                raise ValueError(f'{annotations} has no column for the tags {", ".join(map(repr, missing))}{hint}')
            places = [header.index(tag) for tag in tags]
            for row in table:
                where = f'line {table.line_num} of {annotations}'
                if len(row) != len(header):
                    raise ValueError(f'{where} has {len(row)} columns, not {len(header)}{hint}')
                if wrong := [row[place] for place in places if row[place] not in ('0', '1')]:
                    raise ValueError(f'{where} has {wrong[0]!r} in the column of a tag, not 0 or 1{hint}')
                path = Path(row[-1])
                # a path out of the folder would read any file
                if len(path.parts) != 2 or path.parts[0] not in (*''.join(SPLITS.values()),):
                    raise ValueError(f'{where} has the path {row[-1]!r}, not one in the folders 0 to f{hint}')
                yield path, [row[place] == '1' for place in places]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f'{annotations} cannot be read as a table: {error}{hint}') from error
