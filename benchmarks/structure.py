"""Is the structure of SyntheticMusic heard as its labels say?

    python benchmarks/structure.py                # 400 clips of 'valid' at 5 s and at 10 s, minutes on one core
    python benchmarks/structure.py --clips 50

Tempo, beats and key by `structure_of`, which knows nothing of the data set, scored by mir_eval. A tempo counts as right
within 4 % of the true one; half and double are wrong but in the row that says so. Boundaries are those between three
clips joined to one. Needs the extra `eval`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import librosa
import mir_eval
import numpy as np
import torch
from results import add_out, write_results  # beside this file
from threadpoolctl import threadpool_limits  # a requirement of scikit-learn

from musiclm_pytorch import SyntheticMusic
from musiclm_pytorch.evaluation.clip_metrics import (
    StructureResult,
    StructureTruth,
    score_structure,
    structure_of,
    summarise_structure,
)
from musiclm_pytorch.evaluation.metric import to_json

SETTINGS = {'5 s, 16 kHz': (5.0, 16000), '10 s, 22.05 kHz': (10.0, 22050)}
ROWS = {
    'key_exact': 'key, tonic and mode',
    'key_weighted': "key, MIREX' weighted score",
    'tempo_4': 'tempo within 4 %',
    'tempo_4_octave': 'tempo within 4 %, half and double allowed',
    'beats': 'beats, F-measure within 70 ms',
}
# seconds: the first beat lies 10 to 60 ms after the start
FIRST_BEAT = 0.035


def truth_of(music: SyntheticMusic, i: int) -> StructureTruth:
    labels = music.labels(i)
    beats = np.arange(FIRST_BEAT, music.seconds, 60 / labels.bpm).tolist()
    return StructureTruth(tempo=labels.bpm, tonic=labels.tonic, mode=labels.mode, beats=beats)


def listen(music: SyntheticMusic) -> tuple[list[StructureResult], float]:
    """The structure of every clip, and the median milliseconds that one took."""
    structure_of(music[0][0], music.sample_rate)  # compiles parts of librosa
    found, times = [], []
    for i in range(len(music)):
        wave = music[i][0]
        start = time.perf_counter()
        found.append(structure_of(wave, music.sample_rate))
        times.append(time.perf_counter() - start)
    return found, statistics.median(times) * 1e3


def score_joined(count: int, rate: int = 16000) -> dict[str, float]:
    """Boundaries of `count` clips of 15 s, three parts of other labels each, and of as many that are of one part."""
    music = SyntheticMusic(3 * count, split='valid', seed=1, sample_rate=rate)
    whole = SyntheticMusic(count, split='valid', seed=2, sample_rate=rate, seconds=15.0)
    joined = [structure_of(torch.cat([music[3 * i + k][0] for k in range(3)]), rate) for i in range(count)]
    scores = score_structure(joined, [StructureTruth(boundaries=(5.0, 10.0))] * count)
    alone = [structure_of(whole[i][0], rate).segments.value for i in range(count)]
    return dict(
        boundaries_05=scores['boundaries_05'].value,
        boundaries_3=scores['boundaries_3'].value,
        segments_of_three=float(np.mean([it.segments.value for it in joined])),
        segments_of_one=float(np.mean(alone)),
    )


@threadpool_limits.wrap(limits=1)
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--clips', type=int, default=400, help='clips of each length (default 400)')
    parser.add_argument('--joined', type=int, default=100, help='clips of three parts (default 100)')
    add_out(parser, 'structure')
    args = parser.parse_args()

    torch.set_num_threads(1)
    report = dict(
        librosa=librosa.__version__,
        mir_eval=mir_eval.__version__,
        clips=args.clips,
        joined=args.joined,
    )
    for name, (seconds, rate) in SETTINGS.items():
        music = SyntheticMusic(args.clips, split='valid', seconds=seconds, sample_rate=rate)
        found, milliseconds = listen(music)
        scores = score_structure(found, [truth_of(music, i) for i in range(args.clips)])
        report[name] = dict(
            milliseconds=milliseconds, scores=to_json(scores), summary=to_json(summarise_structure(found))
        )
    print(f'| {args.clips} clips of SyntheticMusic, valid |', ' | '.join(SETTINGS), '|\n|---|' + '---|' * len(SETTINGS))
    for key, title in ROWS.items():
        print(f'| {title} |', ' | '.join(f'{report[name]["scores"][key]["value"]:.1%}' for name in SETTINGS), '|')
    print('| ms a clip, one core |', ' | '.join(f'{report[name]["milliseconds"]:.0f}' for name in SETTINGS), '|')
    report['joined_scores'] = parts = score_joined(args.joined)
    print(f'\n{args.joined} clips of three parts of 5 s, 16 kHz:')
    print(f'boundaries, F-measure within 0.5 s {parts["boundaries_05"]:.1%}, within 3 s {parts["boundaries_3"]:.1%}')
    print(
        f'parts found {parts["segments_of_three"]:.2f} of 3, '
        f'and {parts["segments_of_one"]:.2f} in 15 s that are of one part'
    )
    write_results(args.out, report)


if __name__ == '__main__':
    main()
