"""Listen to ScoreMusic through figures: does a clip sound like its labels, and how many are rendered a second?

    python benchmarks/score_figures.py                                        # some minutes on two cores
    python benchmarks/score_figures.py --clips 100 --trained 0 --sound-font OTHER.sf3

Tempo and key are read by estimators that know nothing of the data set: librosa's tempo at its default prior around
120 BPM, and the correlations of librosa's chroma with the key profiles of Krumhansl and Kessler (1982) and of Albrecht
and Shanahan (2013), added. 'At any level' of the metre allows half, double, a third and three times the tempo, as
MIREX's second measure does. Dorian counts as minor and mixolydian as major. The same key estimate is made of the notes,
which tells the music from its sound. The other attributes are read by a logistic regression on spectral statistics,
fitted to clips of 'train' and tested on clips of 'valid', of another sound font if --other-font says so. Needs the
extras `test` and `scores`, and a sound font.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import librosa
import numpy as np
import torch
from results import add_out, write_results  # beside this file
from synthetic_figures import KRUMHANSL, classify, estimate_tempo, listen, within
from threadpoolctl import threadpool_limits

from musiclm_pytorch import ScoreMusic
from musiclm_pytorch.data.scores.composer import DRUM_CHANNEL, Part
from musiclm_pytorch.data.scores.labels import BRIGHT
from musiclm_pytorch.data.scores.midi import PROFILES

READ_BY_CLASSIFIER = ('family', 'register', 'drums', 'dynamics', 'texture', 'style')
LEVELS = (1 / 3, 1 / 2, 1, 2, 3)


def find_key(chroma: np.ndarray) -> tuple[int, str]:
    """Tonic and mode whose two profiles correlate most with a chroma or histogram of pitch classes `(12,)`."""
    found = {
        (tonic, mode): sum(np.corrcoef(np.roll(it[mode], tonic), chroma)[0, 1] for it in (KRUMHANSL, PROFILES))
        for mode in PROFILES
        for tonic in range(12)
    }
    return max(found, key=found.get)


def key_of_wave(wave: np.ndarray, rate: int) -> tuple[int, str]:
    return find_key(librosa.feature.chroma_cqt(y=wave, sr=rate, tuning=0.0, n_octaves=6).mean(axis=1))


def key_of_notes(parts: list[Part]) -> tuple[int, str]:
    histogram = np.zeros(12)
    for part in parts:
        if part.channel != DRUM_CHANNEL:
            for note in part.notes:
                histogram[note.pitch % 12] += min(note.length, 1.5) * note.velocity * 10 ** (part.level / 40)
    return find_key(histogram)


@threadpool_limits.wrap(limits=1)  # on a busy machine, threads at such small sizes cost several times the work
def measure(music: ScoreMusic) -> list[dict]:
    """What is right of each clip of a data set."""
    rows = []
    for i in range(len(music)):
        labels, wave = music.labels(i), music[i][0].numpy()
        key = (labels.tonic, 'major' if labels.mode in BRIGHT else 'minor')
        bpm, found = estimate_tempo(wave, music.sample_rate), key_of_wave(wave, music.sample_rate)
        right = {
            'tempo within 5 %': within(bpm, labels.bpm, 0.05),
            'the same at any level': any(within(bpm, labels.bpm * level, 0.05) for level in LEVELS),
            'key, tonic and mode': found == key,
            'the same of the notes': key_of_notes(music.parts(i)) == key,
            'mode': found[1] == key[1],
        }
        kinds = {name: getattr(labels, name) for name in ('style', 'texture', 'tempo', 'mode', 'drums')}
        rows.append(dict(right={name: bool(it) for name, it in right.items()}, kinds=kinds))
    return rows


def items_per_second(settings: dict, clips: int = 100) -> float:
    """Items a second of processor time on one core, caption included."""
    music = ScoreMusic(seed=1, **settings)
    music[0]
    start = time.process_time()
    for i in range(clips):
        music[i]
    return clips / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--clips', type=int, default=400, help='clips that are judged (default 400)')
    parser.add_argument('--trained', type=int, default=2000, help='clips the classifiers are fitted to (default 2000)')
    parser.add_argument('--seconds', type=float, default=5.0)
    parser.add_argument('--sample-rate', type=int, default=24000)
    parser.add_argument('--sound-font', help='path of the font (default: the one that is found)')
    parser.add_argument('--other-font', help='path of another font that the classifiers are tested on')
    add_out(parser, 'scores')
    args = parser.parse_args()

    torch.set_num_threads(1)
    settings = dict(seconds=args.seconds, sample_rate=args.sample_rate)
    fonts = dict(sound_font=args.sound_font)
    rows = measure(ScoreMusic(args.clips, split='valid', **settings, **fonts))
    figures = {name: float(np.mean([row['right'][name] for row in rows])) for name in rows[0]['right']}
    if args.trained:
        known = listen(ScoreMusic(args.trained, **settings, **fonts), range(args.trained))
        other = dict(sound_font=args.other_font or args.sound_font)
        heard = listen(ScoreMusic(args.clips, split='valid', **settings, **other), range(args.clips))
        figures |= {name: classify(name, known, heard) for name in READ_BY_CLASSIFIER}
    print('| attribute | right |\n|---|---|')
    for name, value in figures.items():
        print(f'| {name} | {value:.1%} |')
    speed = items_per_second({**settings, **fonts})
    print(f'\n{speed:.1f} items of {args.seconds:g} s at {args.sample_rate} Hz a second of one core')
    kinds = defaultdict(list)
    for row in rows:
        for kind in row['kinds'].items():
            kinds[kind].append(row['right'])
    for name in rows[0]['right']:
        told = (f'{kind} {value} {np.mean([it[name] for it in found]):.0%}' for (kind, value), found in kinds.items())
        print(f'\n{name}: {", ".join(sorted(told))}')
    report = dict(
        font=str(args.sound_font), **settings, clips=args.clips, figures=figures, items_per_second=speed, rows=rows
    )
    write_results(args.out, report)


if __name__ == '__main__':
    main()
