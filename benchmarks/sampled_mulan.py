"""Does the MuLaN of a model of sampled instruments know what it hears, also from a sound font that it never met?

    python benchmarks/sampled_mulan.py --model small --trained-on /usr/share/sounds/sf2/FluidR3_GM.sf2 \
        /usr/share/sounds/sf3/MuseScore_General_Full.sf3

pairs: clips of SyntheticMusic's split 'valid' in held-out phrasings. R@1 among 256 clips that differ in what captions
tell, by captions that tell all of it, and among the first 256 by captions as the data set writes them: these leave
out some, so that others fit as well, and the share that nobody could exceed is told beside. Attributes by the nearest
value, the mean of 16 texts each; a family is that of the nearest instrument.
recordings: drums and tempo the same way in 5 s of real recordings, of which those count whose reference is certain; see
`real_music.py`, whose references these are.

Needs the extras `test` and `scores`, FluidSynth, the fonts, and for the recordings the package musicnn (see
`musicnn_judge.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from musicnn_judge import MusicnnJudge
from obedience import FAMILIES, TOLD
from real_music import FONT, PAIRS, RECORDINGS, ROOT, TEXTS, Bench, Model, certain, crops_of
from real_music_judges import RATE, SECONDS, Clips, render, share, share_by_file
from results import add_out, write_results

from musiclm_pytorch import SyntheticMusic
from musiclm_pytorch.data.attributes import SAMPLED_ATTRIBUTES, MusicLabels
from musiclm_pytorch.evaluation.alignment import alignment_figures
from musiclm_pytorch.evaluation.metric import MetricValue

PARTS = ('pairs', 'recordings')


def music_of(length: int, fonts: Sequence[Path]) -> SyntheticMusic:
    return SyntheticMusic(length, split='valid', seconds=SECONDS, sample_rate=RATE, sound_font=[*map(str, fonts)])


def told_by(labels: MusicLabels) -> tuple:
    return tuple(getattr(labels, name) for name in TOLD)


def texts_of(music: SyntheticMusic, name: str) -> dict[object, list[str]]:
    """Texts that tell a value of one attribute alone, for each value."""
    return {
        value: [music.caption(music.draw_labels(seed, **{name: value}), seed, mention=(name,)) for seed in range(TEXTS)]
        for value in SAMPLED_ATTRIBUTES[name]
    }


def highest(labels: Sequence[MusicLabels]) -> MetricValue:
    """R@1 from text to audio of who hears all and takes one of the clips that a caption fits, at random."""
    told = [[name for name in TOLD if name in own.mentioned] for own in labels]
    fitting = [
        sum(all(getattr(other, name) == getattr(own, name) for name in names) for other in labels)
        for own, names in zip(labels, told)
    ]
    return share([1 / it for it in fitting])


def judge_pairs(models: Sequence[Model], clips: Clips) -> dict[str, dict[str, MetricValue]]:
    labels, music = clips.labels(), clips.music
    first = {}
    for place, own in enumerate(labels):
        first.setdefault(told_by(own), place)
    different = [*first.values()][:PAIRS]
    pairs = {
        'captions that tell all': (different, [music.caption(labels[i], i, mention=TOLD) for i in different]),
        'captions as they are': ([*range(PAIRS)], [music.text(clips.indices[i]) for i in range(PAIRS)]),
    }
    most = highest(labels[:PAIRS])
    rows = {'R@1, captions as they are, text to audio: nobody more': {model.name: most for model in models}}
    waves = [clips.wave(i) for i in range(len(clips))]
    for model in models:
        found: dict[str, MetricValue] = {}
        audio = model.hear(waves, RATE)
        for name, (places, texts) in pairs.items():
            figures = alignment_figures(audio[places], model.read(texts), texts)
            for way in ('text_to_audio', 'audio_to_text'):
                found[f'R@1, {name}, {way.replace("_", " ")}'] = figures[f'{way}_recall_at_1']
        for name in TOLD:
            nearest = model.nearest(audio, texts_of(music, name))
            both = [(value, getattr(own, name)) for value, own in zip(nearest, labels)]
            found[f'{name} among {len(SAMPLED_ATTRIBUTES[name])}'] = share([a == b for a, b in both])
            if name == 'instrument':
                groups = len(set(FAMILIES.values()))
                found[f'family among {groups}'] = share([FAMILIES[a] == FAMILIES[b] for a, b in both])
        for name, figure in found.items():
            rows.setdefault(name, {})[model.name] = figure
    return rows


def judge_recordings(models: Sequence[Model], bench: Bench) -> dict[str, dict[str, MetricValue]]:
    crops, rows = crops_of(bench.args.recordings, bench.args.every), {}
    music = music_of(1, [bench.args.sound_font])
    for name, values in certain(bench, [wave for _, wave in crops]).items():
        files = [crops[i][0] for i in values]
        for model in models:
            found = model.nearest(model.hear([crops[i][1] for i in values], RATE), texts_of(music, name))
            right = np.array([a == b for a, b in zip(found, values.values())])
            row = rows.setdefault(f'{name}, of {len(crops)} crops', {})
            row[model.name] = share_by_file(right, files)
            for value in sorted(set(values.values())):
                own = [i for i, it in enumerate(values.values()) if it == value]
                row = rows.setdefault(f'{name}, where it is {value}', {})
                row[model.name] = share_by_file(right[own], [files[i] for i in own])
    return rows


def main(args: argparse.Namespace) -> None:
    torch.set_grad_enabled(False)
    models = [Model.open(place, Path(place).name) for place in args.model]
    parts: dict[str, dict] = {}
    if 'pairs' in args.parts:
        for whose, fonts in (('a font that it never met', [args.sound_font]), ('its own fonts', args.trained_on)):
            if fonts:
                parts[whose] = judge_pairs(models, render(music_of(args.clips, fonts), args.data))
    if 'recordings' in args.parts:
        parts['recordings'] = judge_recordings(models, Bench(args, MusicnnJudge(args.musicnn)))
    for part, rows in parts.items():
        print(f'\n| {part} | ' + ' | '.join(it.name for it in models) + ' | of |\n|' + '---|' * (len(models) + 2))
        for name, row in rows.items():
            told = [row[model.name] for model in models]
            print(f'| {name} | ' + ' | '.join(f'{it.value:.1%}' for it in told) + f' | {told[0].count} |')
    rows = {
        part: {name: {who: it.to_dict() for who, it in row.items()} for name, row in its.items()}
        for part, its in parts.items()
    }
    write_results(args.out, dict(clips=args.clips, rows=rows))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', nargs='+', default=['small'], help='names or folders, of a MusicLM or a MuLaN')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=[*PARTS], help='(default: all)')
    parser.add_argument('--sound-font', type=Path, default=FONT, help='that training never met (default: %(default)s)')
    parser.add_argument('--trained-on', type=Path, nargs='*', default=[], help='the sound fonts of the model')
    parser.add_argument('--clips', type=int, default=600, help='of each font (default 600)')
    parser.add_argument('--every', type=float, default=15.0, help='seconds between crops of recordings (default 15)')
    parser.add_argument('--recordings', type=Path, default=RECORDINGS, help='a folder (default: %(default)s)')
    parser.add_argument('--musicnn', type=Path, help='wheel or folder of the package musicnn')
    parser.add_argument('--data', type=Path, default=ROOT / 'build' / 'sampled_mulan', help='where clips are kept')
    add_out(parser, 'sampled_mulan')
    main(parser.parse_args())
