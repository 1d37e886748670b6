"""Write a page to look at and listen to: SyntheticMusic's instruments and textures, with spectrograms and players.

    python examples/synthetic_page.py --out out/synthetic

Writes `index.html`, one WAV a clip, and `spectrograms.png` with all of them. Needs matplotlib.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from musiclm_pytorch import SyntheticMusic
from musiclm_pytorch.gallery import Clip, draw, write_gallery


def clips(music: SyntheticMusic, seed: int):
    """One clip of each instrument, then one of each texture and register, and one with drums; (name, labels) each."""
    plain = dict(tempo='medium', register='middle', texture='accompanied', drums=False)
    for instrument in music.ATTRIBUTES['instrument']:
        yield instrument, music.draw_labels(seed, **{**plain, 'instrument': instrument})
    for texture in music.ATTRIBUTES['texture']:
        yield texture, music.draw_labels(seed, **{**plain, 'instrument': 'piano', 'texture': texture})
    for register in ('low', 'high'):
        yield f'{register}-flute', music.draw_labels(seed, **{**plain, 'instrument': 'flute', 'register': register})
    for tempo in ('slow', 'fast'):
        kind = {**plain, 'instrument': 'guitar', 'texture': 'melody', 'drums': True, 'tempo': tempo}
        yield f'{tempo}-drums', music.draw_labels(seed, **kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('out/synthetic'))
    parser.add_argument('--seconds', type=float, default=5.0)
    parser.add_argument('--sample-rate', type=int, default=16000)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()

    music = SyntheticMusic(seconds=args.seconds, sample_rate=args.sample_rate)
    chosen = list(clips(music, args.seed))
    columns = 4
    sheet, axes = plt.subplots(-(-len(chosen) // columns), columns, figsize=(16, 10), layout='constrained')
    page = []
    for axis, (name, labels) in zip(axes.flat, chosen):
        wave = music.render(labels, args.seed)
        caption = music.caption(labels, args.seed, mention=('instrument', 'tempo', 'mode', 'register', 'texture'))
        truth = f'{labels.instrument}, {labels.texture}, {labels.register}, {labels.key}, {labels.bpm:.0f} BPM'
        draw(axis, wave, args.sample_rate)
        axis.set_title(f'{name}: {truth}', fontsize=8)
        truth += ', drums' if labels.drums else ''
        page.append(Clip(name, wave, caption, truth))
    written = write_gallery(args.out, page, args.sample_rate, title='SyntheticMusic', overwrite=True)
    sheet.savefig(args.out / 'spectrograms.png', dpi=110)
    print(f'{len(page)} clips on {written}')


if __name__ == '__main__':
    main()
