"""Write a page to look at and listen to: SyntheticMusic's instruments and textures, or ScoreMusic's styles and
families of instruments, with spectrograms and players.

    python examples/synthetic_page.py --out out/synthetic
    python examples/synthetic_page.py --data scores --seconds 10 --sample-rate 24000 --out out/scores

Writes `index.html`, one WAV a clip, and `spectrograms.png` with all of them. Needs matplotlib, and for
'scores' the extra `scores`, FluidSynth and a sound font.
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt

from musiclm_pytorch import ScoreMusic, SyntheticMusic
from musiclm_pytorch.gallery import Clip, draw, write_gallery


def clips(music: SyntheticMusic, seed: int):
    """One clip of each instrument, then one of each texture and register, and two with drums; (name, labels, what is
    true of it) each."""

    def clip(name, **given):
        labels = music.draw_labels(seed, **given)
        truth = f'{labels.instrument}, {labels.texture}, {labels.register}, {labels.key}, {labels.bpm:.0f} BPM'
        return name, labels, truth + (', drums' if labels.drums else '')

    plain = dict(tempo='medium', register='middle', texture='accompanied', drums=False)
    for instrument in music.ATTRIBUTES['instrument']:
        yield clip(instrument, **{**plain, 'instrument': instrument})
    for texture in music.ATTRIBUTES['texture']:
        yield clip(texture, **{**plain, 'instrument': 'piano', 'texture': texture})
    for register in ('low', 'high'):
        yield clip(f'{register}-flute', **{**plain, 'instrument': 'flute', 'register': register})
    for tempo in ('slow', 'fast'):
        kind = {**plain, 'instrument': 'guitar', 'texture': 'melody', 'drums': True, 'tempo': tempo}
        yield clip(f'{tempo}-drums', **kind)


def score_clips(music: ScoreMusic, seed: int):
    """One clip of each style in a full arrangement, then one of each family of instruments alone."""
    kinds = [(style, dict(style=style, texture='full')) for style in music.ATTRIBUTES['style']]
    kinds += [(family, dict(family=family, texture='solo')) for family in music.ATTRIBUTES['family']]
    for number, (name, given) in enumerate(kinds):
        labels = music.draw_labels(seed + number, **given)
        told = [', '.join(labels.instruments), labels.key, f'{labels.bpm:.0f} BPM', labels.metre, labels.mood]
        yield name.replace(' ', '-'), labels, '; '.join([it for it in told if it] + ['drums'] * labels.drums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', choices=('synthetic', 'scores'), default='synthetic')
    parser.add_argument('--out', type=Path, default=Path('out/synthetic'))
    parser.add_argument('--seconds', type=float, default=5.0)
    parser.add_argument('--sample-rate', type=int, default=16000)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()

    kind, choose = {'synthetic': (SyntheticMusic, clips), 'scores': (ScoreMusic, score_clips)}[args.data]
    mention = ('instrument', 'tempo', 'mode', 'register', 'texture') if args.data == 'synthetic' else None
    music = kind(seconds=args.seconds, sample_rate=args.sample_rate)
    chosen = list(choose(music, args.seed))
    columns = 4
    rows = -(-len(chosen) // columns)
    sheet, axes = plt.subplots(rows, columns, figsize=(16, 2.5 * rows), layout='constrained')
    page = []
    for axis, (name, labels, truth) in zip(axes.flat, chosen):
        wave = music.render(labels, args.seed)
        draw(axis, wave, args.sample_rate)
        axis.set_title('\n'.join(textwrap.wrap(f'{name}: {truth}', 60)), fontsize=8)
        page.append(Clip(name, wave, music.caption(labels, args.seed, mention=mention), truth))
    for axis in axes.flat[len(chosen) :]:
        axis.remove()
    written = write_gallery(args.out, page, args.sample_rate, title=kind.__name__, overwrite=True)
    sheet.savefig(args.out / 'spectrograms.png', dpi=110)
    print(f'{len(page)} clips on {written}')


if __name__ == '__main__':
    main()
