"""A page to look at and to listen to: a WAV, a spectrogram and a player for each clip."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from musiclm_pytorch.atomic import write_text, write_together
from musiclm_pytorch.mulan.spectrogram import mel_filters
from musiclm_pytorch.waves import sound_bytes

BANDS, RANGE = 128, 80.0  # of the pictures: mel bands, and dB from the loudest to black

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
  figure {{ margin: 0 0 2rem }} img, audio {{ display: block; width: 100% }} small {{ color: #666 }}
  table {{ border-collapse: collapse; margin: 0 0 2rem }} td, th {{ text-align: left; padding: .2rem .8rem .2rem 0 }}
  tr {{ border-bottom: 1px solid #ddd }} td.run {{ max-width: 12rem }}
  td.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
FIGURE = """<figure>
  <figcaption>{caption} <small>{note}</small></figcaption>
  <img src="{name}.png" alt="mel spectrogram of {caption}">
  <audio controls preload="none" src="{file}"></audio>
</figure>"""


@dataclass(frozen=True)
class Clip:
    """One clip of a page.

    name: of its files, without the ending
    wave: `(samples,)`, full scale at ±1; one that goes beyond is made softer
    caption, note: text beside it
    section: clips of one section stand together under it, as a heading
    remark: what there is to say of the section, below its heading
    score, seed: of a sample, MuLaN's cosine with the prompt, and what makes it again
    suffix: of its sound file, see `Waves.save`
    """

    name: str
    wave: Tensor
    caption: str
    note: str = ''
    section: str = ''
    remark: str = ''
    score: float | None = None
    seed: int | None = None
    suffix: str = '.wav'

    @property
    def file(self) -> str:
        return self.name + self.suffix


def ranked_clips(
    prompt: str, waves: Tensor, scores: Tensor, seeds: Tensor, *, name: str, remark: str = ''
) -> list[Clip]:
    """The samples `(num_samples, samples)` made for a prompt, the one of the highest score first.

    `name` is that of the files, to which a sample's place is added.
    """
    return [
        Clip(
            name=f'{name}-{place}',
            wave=waves[index],
            caption=f'sample {place}',
            note=f'MuLaN: {scores[index]:.3f} · seed {seeds[index]}',
            section=prompt,
            remark=remark,
            score=scores[index].item(),
            seed=seeds[index].item(),
        )
        for place, index in enumerate(scores.argsort(descending=True).tolist(), 1)
    ]


def file_name(prompt: str) -> str:
    """The first words of a prompt as a file name."""
    return '-'.join(re.findall(r'\w+', prompt.lower())[:6])[:48] or 'music'


def write_clip(folder: Path, clip: Clip, sample_rate: int) -> None:
    """Write its sound file and `name.png`."""
    image = io.BytesIO()
    picture(clip.wave, sample_rate).savefig(image, dpi=80, format='png')
    sound = sound_bytes(clip.wave, sample_rate, clip.suffix)
    write_together({folder / clip.file: sound, folder / f'{clip.name}.png': image.getvalue()})


def write_gallery(
    folder: str | Path, clips: Sequence[Clip], sample_rate: int, *, title: str, overwrite: bool = False
) -> Path:
    """Write `index.html` and, for each clip, `name.wav` (16 bit) and `name.png`; returns the path of the page.

    Raises FileExistsError if the folder has a page already, unless it may be overwritten.
    """
    folder = Path(folder)
    check_no_page(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        write_clip(folder, clip, sample_rate)
    return write_page(folder, clips, title=title)


def check_no_page(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError if a folder has a page, unless it may be overwritten."""
    page = folder / 'index.html'
    if page.exists() and not overwrite:
        raise FileExistsError(f'{page} is there already; give another folder, or --overwrite')


def write_page(folder: Path, clips: Sequence[Clip], *, title: str, intro: str = '') -> Path:
    """Write `index.html` of clips whose files are there, with a line of text in front; returns its path."""
    body, section = [f'<p>{html.escape(intro)}</p>'] if intro else [], ''
    for clip in clips:
        texts = {
            name: html.escape(getattr(clip, name)) for name in ('name', 'file', 'caption', 'note', 'section', 'remark')
        }
        if clip.section != section:
            section = clip.section
            body.append(f'<h2>{texts["section"]}</h2>')
            body += [f'<p><strong>{texts["remark"]}</strong></p>'] if clip.remark else []
        body.append(FIGURE.format(**texts))
    page = folder / 'index.html'
    write_text(page, page_of(title, body))
    return page


def page_of(title: str, body: Sequence[str]) -> str:
    """HTML of these parts under a heading."""
    return PAGE.format(title=html.escape(title), body='\n'.join(body))


def picture(wave: Tensor, sample_rate: int) -> Figure:
    """The log-mel spectrogram of `(samples,)` over time, from the loudest down to 80 dB below it."""
    figure = Figure(figsize=(9, 2.2), layout='constrained')
    draw(figure.subplots(), wave, sample_rate)
    return figure


def draw(axes, wave: Tensor, sample_rate: int) -> None:
    """The same into matplotlib's axes."""
    spectrogram = log_mel(wave, sample_rate).numpy()
    extent = (0, len(wave) / sample_rate, 0, BANDS)
    axes.imshow(spectrogram, origin='lower', aspect='auto', extent=extent, vmin=-RANGE, vmax=0, cmap='magma')
    axes.set(xlabel='seconds', yticks=[], ylabel='mel')


def log_mel(wave: Tensor, sample_rate: int) -> Tensor:
    """`(128, frames)`, in dB below the loudest; windows of some 64 ms, eight to a window."""
    n_fft = 2 ** round(sample_rate * 0.064).bit_length() // 2
    wave = torch.nn.functional.pad(wave.detach().cpu().float(), (0, max(0, n_fft - len(wave))))
    window = torch.hann_window(n_fft, dtype=torch.float32)
    power = torch.stft(wave, n_fft, n_fft // 8, window=window, return_complex=True).abs().square()
    filters = mel_filters(BANDS, bins=n_fft // 2 + 1, sample_rate=sample_rate, f_min=20.0, f_max=sample_rate / 2)
    mel = filters.T @ power
    return 10 * torch.log10((mel / mel.max().clamp(min=1e-10)).clamp(min=1e-10))
