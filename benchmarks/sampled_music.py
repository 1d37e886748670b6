"""Does music of sampled instruments have the instrument, tempo and drums of its prompt? A judge that is not ours tells.

    python benchmarks/sampled_music.py --model small --trained-on /usr/share/sounds/sf2/FluidR3_GM.sf2 \
        /usr/share/sounds/sf3/MuseScore_General_Full.sf3    # beside 'tiny'

Prompts are captions of SyntheticMusic in held-out phrasings; for comparison they are played by a sound font that
training never hears (Debian: timgm6mb-soundfont). Instrument (and so its family, of 8), register and drums are read by
logistic regressions on the features of musicnn, the tempo by one on the rhythm; all were fitted to other clips of that
font and of those that the model was trained on, for who knows a violin from one font alone does not know that of
another. Beside the music, the best of 4 by MuLaN, stand real clips of the same labels, and what the codec, the fine
stage from real coarse codes, and both later stages from real semantic tokens leave of those. FAD is taken on those
features to further real clips.

Needs the extras `test` and `scores`, FluidSynth, the font, and the package musicnn (see `musicnn_judge.py`).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from musicnn_judge import MusicnnJudge
from obedience import FAMILIES
from real_music import BASELINE, FONT, REAL, ROOT, frechet, from_real_clips, make
from real_music_judges import RATE, SECONDS, Heard, Probes, compare, listen, render, share
from results import add_out, write_results

from musiclm_pytorch import MusicLM, SyntheticMusic
from musiclm_pytorch.data.attributes import INSTRUMENTS, MusicLabels

ASKED = ('instrument', 'tempo', 'register', 'drums')
SHOWN = ('instrument', 'family', *ASKED[1:])  # a family is that of the instrument that was read


def main(args: argparse.Namespace) -> None:
    judge = MusicnnJudge(args.musicnn)

    def clips_of(count: int, split: str, seed: int, fonts: list[Path]):
        fonts = list(map(str, fonts))
        music = SyntheticMusic(count, seed=seed, split=split, seconds=SECONDS, sample_rate=RATE, sound_font=fonts)
        clips = render(music, args.data)
        waves = (clips.wave(i) for i in range(len(clips)))
        return clips, listen(judge, waves, RATE, args.data / f'heard-{clips.name}.npz')

    trained, heard = clips_of(args.trained, 'train', 11, [args.sound_font, *args.trained_on])
    probes = Probes(heard, trained.labels(), ASKED)
    clips, heard = clips_of(args.clips, 'valid', 3, [args.sound_font])
    labels = clips.labels()
    rows: dict[str, dict[str, object]] = {}

    def compared(heard: Heard, wanted: list[MusicLabels]) -> dict[str, np.ndarray]:
        read = probes.read(heard)
        pairs = zip(read['instrument'], wanted)
        return compare(read, wanted) | dict(family=np.array([FAMILIES[a] == FAMILIES[b.instrument] for a, b in pairs]))

    def show(who: str, right: dict, fad: object = None) -> None:
        rows[who] = {name: share(right[name]).to_dict() for name in right}
        told = [f'{right[name].mean():.1%}' for name in SHOWN]
        told.append('' if fad is None else f'{fad.value:.1f}')
        rows[who] |= {} if fad is None else dict(fad=fad.value)
        print(f'| {who} | ' + ' | '.join(told) + ' |', flush=True)

    print('| | ' + ' | '.join(SHOWN) + ' | FAD |\n|' + '---|' * (len(SHOWN) + 2))
    show(f'{REAL}: the probes themselves', compared(heard, labels))
    if args.trained_on:
        played, own = clips_of(args.clips, 'valid', 3, args.trained_on)
        show('the same by the fonts that the model was trained on', compared(own, played.labels()))
    for place in dict.fromkeys([BASELINE, *args.model]):
        musiclm = MusicLM.from_pretrained(place)
        # each model is asked for what it knows
        known = [i for i, it in enumerate(labels) if place != BASELINE or it.instrument in INSTRUMENTS][: args.prompts]
        wanted = [labels[i] for i in known]
        prompts = [clips.music.caption(labels[i], i, mention=(*ASKED, 'mode', 'texture')) for i in known]
        reference = heard.part(np.setdiff1d(np.arange(len(clips)), known))
        real = heard.part(known)
        show(f'{REAL}, as asked of {place}', compared(real, wanted), frechet(reference, real))
        if place != BASELINE:
            waves = [clips.wave(i) for i in known]
            for what, made in from_real_clips(musiclm, prompts, waves, args.batch).items():
                own = listen(judge, made, musiclm.sample_rate)
                show(f'{place}: {what}', compared(own, wanted), frechet(reference, own))
        start = time.perf_counter()
        own = listen(judge, make(musiclm, prompts, args.samples, args.batch, seed=1000), musiclm.sample_rate)
        took = time.perf_counter() - start
        show(f'{place}, the best of {args.samples}', compared(own, wanted), frechet(reference, own))
        rows[f'{place}, the best of {args.samples}'] |= dict(seconds=took)
    write_results(args.out, dict(prompts=args.prompts, samples=args.samples, rows=rows))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', nargs='*', default=['small'], help="names or folders, beside 'tiny'")
    parser.add_argument('--musicnn', type=Path, default=None, help='wheel or folder of the package musicnn')
    parser.add_argument('--sound-font', type=Path, default=FONT)
    parser.add_argument('--trained-on', type=Path, nargs='*', default=[], help='the sound fonts of the model')
    parser.add_argument('--data', type=Path, default=ROOT / 'build' / 'sampled_music', help='where clips are kept')
    parser.add_argument('--trained', type=int, default=1500, help='clips that the probes are fitted to')
    parser.add_argument('--clips', type=int, default=400, help='held-out clips')
    parser.add_argument('--prompts', type=int, default=72)
    parser.add_argument('--samples', type=int, default=4)
    parser.add_argument('--batch', type=int, default=12)
    add_out(parser, 'sampled_music')
    main(parser.parse_args())
