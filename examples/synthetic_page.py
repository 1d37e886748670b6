"""Write a page to look at and listen to: SyntheticMusic's instruments and textures, with spectrograms and players.

    python examples/synthetic_page.py --out out/synthetic

Writes `index.html`, one WAV a clip, and `spectrograms.png` with all of them. Needs matplotlib.
"""

import argparse
import html
from pathlib import Path

import matplotlib.pyplot as plt
import soundfile
import torch
from torchaudio.functional import melscale_fbanks

from musiclm_pytorch import SyntheticMusic

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>SyntheticMusic</title>
<style>
  body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
  figure {{ margin: 2rem 0 }} img {{ width: 100% }} audio {{ width: 100% }} small {{ color: #555 }}
</style>
<h1>SyntheticMusic</h1>
{figures}
"""
FIGURE = """<figure>
  <figcaption>{caption}<br><small>{labels}</small></figcaption>
  <img src="{name}.png" alt="mel spectrogram of {name}">
  <audio controls preload="none" src="{name}.wav"></audio>
</figure>"""


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


def log_mel(wave: torch.Tensor, rate: int) -> torch.Tensor:
    """`(128, frames)`, in dB below the loudest."""
    n_fft = 1024 * max(1, round(rate / 16000))
    power = torch.stft(wave, n_fft, n_fft // 8, window=torch.hann_window(n_fft), return_complex=True).abs().square()
    mel = melscale_fbanks(n_fft // 2 + 1, 20.0, rate / 2, 128, rate).T @ power
    return 10 * torch.log10(mel / mel.max() + 1e-8)


def draw(axis, wave: torch.Tensor, rate: int, title: str) -> None:
    extent = (0, len(wave) / rate, 0, 128)
    axis.imshow(log_mel(wave, rate), origin='lower', aspect='auto', extent=extent, vmin=-80, vmax=0, cmap='magma')
    axis.set(title=title, yticks=[])
    axis.title.set_fontsize(8)
    axis.tick_params(labelsize=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('out/synthetic'))
    parser.add_argument('--seconds', type=float, default=5.0)
    parser.add_argument('--sample-rate', type=int, default=16000)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    music = SyntheticMusic(seconds=args.seconds, sample_rate=args.sample_rate)
    chosen = list(clips(music, args.seed))
    columns = 4
    sheet, axes = plt.subplots(-(-len(chosen) // columns), columns, figsize=(16, 10), layout='constrained')
    figures = []
    for axis, (name, labels) in zip(axes.flat, chosen):
        wave = music.render(labels, args.seed)
        caption = music.caption(labels, args.seed, mention=('instrument', 'tempo', 'mode', 'register', 'texture'))
        soundfile.write(args.out / f'{name}.wav', wave.numpy(), args.sample_rate)
        truth = f'{labels.instrument}, {labels.texture}, {labels.register}, {labels.key}, {labels.bpm:.0f} BPM'
        draw(axis, wave, args.sample_rate, f'{name}: {truth}')
        single, alone = plt.subplots(figsize=(9, 2.5), layout='constrained')
        draw(alone, wave, args.sample_rate, name)
        single.savefig(args.out / f'{name}.png', dpi=80)
        plt.close(single)
        truth += ', drums' if labels.drums else ''
        figures.append(FIGURE.format(name=name, caption=html.escape(caption), labels=html.escape(truth)))
    sheet.savefig(args.out / 'spectrograms.png', dpi=110)
    (args.out / 'index.html').write_text(PAGE.format(figures='\n'.join(figures)), encoding='utf-8')
    print(f'{len(figures)} clips on {args.out / "index.html"}')


if __name__ == '__main__':
    main()
