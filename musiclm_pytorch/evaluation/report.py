"""An evaluation on disk: JSON, tables and a page in a single file to look at and to listen to."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile
from matplotlib.figure import Figure as Plot

from musiclm_pytorch.atomic import write_together
from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.evaluation.inputs import list_clips, read_clip
from musiclm_pytorch.gallery import draw

RESULTS, FIGURES, CLIPS, PAGE_FILE = 'report.json', 'figures.csv', 'clips.csv', 'report.html'
GROUPS = dict(
    audio_quality='Audio quality',
    text_audio_alignment='Fit to the text',
    music_structure='Music structure',
)
# what is drawn of every clip: key of its row, label
PANELS = dict(cosine='cosine with its text', loudness='loudness, LUFS', tempo='tempo, BPM', bandwidth='bandwidth, Hz')
# figures whose names are not their paths' words
NAMES = dict(
    frechet_audio_distance='Fréchet audio distance',
    frechet_infinity='FAD∞',
    kernel_audio_distance='kernel audio distance',
    mulan='MuLaN',
    mulan_cycle_consistency='MuLan cycle consistency',
    clap='CLAP',
    vggish='VGGish',
    encodec='EnCodec',
    dc_offset='DC offset',
    kl_reference_generated='KL(reference ‖ generated)',
    kl_generated_reference='KL(generated ‖ reference)',
    kl_of_means_reference_generated='KL(reference ‖ generated) of the means',
    kl_of_means_generated_reference='KL(generated ‖ reference) of the means',
)
COLOURS = ('#1f6f8b', '#c0562f')  # generated, reference
BOUNDS = ('low', 'high', 'count', 'unit', 'reason')

STYLE = """
  body { font: 16px/1.5 sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
  table { border-collapse: collapse; margin: 0 0 2rem } td, th { text-align: left; padding: .2rem .8rem .2rem 0 }
  tr { border-bottom: 1px solid #ddd } td.run { max-width: 12rem }
  td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
  figure { margin: 0 0 2rem } img, audio { display: block; max-width: 100% } audio { width: 100% }
  small { color: #666 }
"""


@typechecked
def write_report(
    results: Mapping[str, Any],
    folder: str | Path,
    generated_audio: Any = None,
    *,
    audio_lengths: Any = None,
    sample_rate: int | None = None,
    title: str = 'Evaluation',
    players: int = 12,
    overwrite: bool = False,
) -> Path:
    """Write what `MusicLMEvaluator` found: `report.json`, `figures.csv`, `clips.csv` and `report.html`.

    Args:
        results: of `comprehensive_evaluation`.
        folder: where the files go.
        generated_audio, audio_lengths, sample_rate: the clips as they were evaluated, for the players; without them the
            page has none.
        title: of the page.
        players: clips that the page carries, the first ones; each adds some 200 kB for 5 s.
        overwrite: write over a report that is there already.

    Returns:
        the path of the page, which needs no other file.

    Raises:
        FileExistsError: the folder has a report already.
    """
    folder = Path(folder)
    check_free(folder, RESULTS, overwrite)
    if not {'about', 'clips'} <= results.keys():
        raise ValueError(
            'results must be those of MusicLMEvaluator.evaluate, with about and clips, not of one group alone'
        )
    if players < 0:
        raise ValueError(f'players must be 0 or more, got {players}')
    clips = [] if generated_audio is None else list_clips(generated_audio, audio_lengths)
    if clips and len(clips) != len(results['clips']):
        raise ValueError(
            f'got {len(clips)} clips for results of {len(results["clips"])}; pass those that were evaluated'
        )
    body = [about(results['about']), image(plot_clips(results), 'distributions over clips'), tables(results)]
    if clips[:players]:
        rate = sample_rate or results['about']['sample_rate']
        body.append('<h2>Clips</h2>')
        body += [player(clip, rate, row) for clip, row in zip(clips[:players], results['clips'])]
    folder.mkdir(parents=True, exist_ok=True)
    write_together(
        {
            folder / RESULTS: json.dumps(results, indent=2, allow_nan=False) + '\n',  # a folder with it is whole
            folder / FIGURES: table_csv(figure_rows(results)),
            folder / CLIPS: table_csv(results['clips']),
            folder / PAGE_FILE: page(title, body),
        }
    )
    return folder / PAGE_FILE


def check_free(folder: Path, name: str, overwrite: bool) -> None:
    """Raise FileExistsError for a report that is there already and may not be written over."""
    if (folder / name).exists() and not overwrite:
        raise FileExistsError(
            f'{folder / name} is there already; give another folder, or say that it may be overwritten'
        )


def about(facts: Mapping[str, Any]) -> str:
    """A line on what the figures depend on: what judged, and beside what."""
    parts = [f'{facts["clips"]} clips', f'judged by {facts["name"]} ({facts["mulan"]})', f'tags by {facts["tagger"]}']
    if facts['reference_clips']:
        parts.append(f'{facts["reference_clips"]} clips of reference ({facts["reference"]})')
    parts += [f'seed {facts["seed"]}', f'musiclm-pytorch {facts["musiclm_pytorch"]}']
    return f'<p><small>{html.escape(", ".join(parts))}</small></p>'


# ---- tables ----


def figures_in(results: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """All figures of nested results, by their path."""
    if 'value' in results:
        return {path: results}
    found = {}
    for name, it in results.items():
        if isinstance(it, Mapping):
            found |= figures_in(it, (*path, name))
    return found


def figure_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each figure of the three groups; what else is known of it stands in 'details', as JSON."""
    rows = []
    for group in GROUPS:
        for path, figure in figures_in(results.get(group, {})).items():
            details = {key: it for key, it in figure.items() if key not in ('value', *BOUNDS)}
            known = {key: figure.get(key) for key in ('value', *BOUNDS)}
            rows.append(dict(group=group, figure='.'.join(path), **known, details=json.dumps(details)))
    return rows


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with every column that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def tables(results: Mapping[str, Any]) -> str:
    """A table of figures for each group that was computed."""
    parts = []
    for group, heading in GROUPS.items():
        found = figures_in(results.get(group, {}))
        if not found:
            continue
        rows = []
        for path, figure in found.items():
            note = figure.get('reason') or details_of(figure)
            cells = ''.join(f'<td class="number">{html.escape(it)}</td>' for it in (shown(figure), range_of(figure)))
            count = figure.get('count', '')
            rows.append(
                f'<tr><td>{html.escape(label(path))}</td>{cells}<td class="number">{count}</td>'
                f'<td><small>{html.escape(note)}</small></td></tr>'
            )
        head = '<tr><th></th><th>value</th><th>95 % interval</th><th>clips</th><th></th></tr>'
        parts.append(f'<h2>{heading}</h2>\n<table>{head}\n' + '\n'.join(rows) + '\n</table>')
    return '\n'.join(parts)


def label(path: tuple[str, ...]) -> str:
    """The path of a figure in words."""
    return ', '.join(NAMES.get(part, part.replace('_', ' ')) for part in path)


def shown(figure: Mapping[str, Any]) -> str:
    """The value with four digits and its unit, or that there is none."""
    if figure['value'] is None:
        return 'not defined'
    return f'{figure["value"]:.4g} {figure.get("unit", "")}'.strip()


def range_of(figure: Mapping[str, Any]) -> str:
    return '' if figure.get('low') is None else f'{figure["low"]:.4g} to {figure["high"]:.4g}'


def details_of(figure: Mapping[str, Any]) -> str:
    """The details that are single numbers or words."""
    kept = {key: it for key, it in figure.items() if key not in ('value', *BOUNDS)}
    kept = {key: it for key, it in kept.items() if isinstance(it, int | float | str) and it != ''}
    numbers = (f'{it:.4g}' if isinstance(it, float) else str(it) for it in kept.values())
    return ', '.join(f'{key.replace("_", " ")} {number}' for key, number in zip(kept, numbers))


# ---- pictures and sounds ----


def plot_clips(results: Mapping[str, Any]) -> Plot:
    """How each panel's value is spread over the clips, generated and of reference."""
    figure = Plot(figsize=(10, 5), layout='constrained')
    sides = {'generated': results['clips'], 'reference': results.get('reference_clips', [])}
    for axes, (key, name) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        values = {side: [row[key] for row in rows if row.get(key) is not None] for side, rows in sides.items()}
        values = {side: it for side, it in values.items() if it}
        axes.set(xlabel=name, ylabel='share of clips')
        if not values:
            axes.text(0.5, 0.5, 'not measured', ha='center', va='center', transform=axes.transAxes, color='#666')
        for (side, it), colour in zip(values.items(), COLOURS):
            spread = (min(map(min, values.values())), max(map(max, values.values())))
            axes.hist(it, bins=20, range=spread, weights=[1 / len(it)] * len(it), alpha=0.6, label=side, color=colour)
        if len(values) > 1:
            axes.legend(frameon=False)
    return figure


def image(plot: Plot, name: str) -> str:
    """A picture within the page."""
    buffer = io.BytesIO()
    plot.savefig(buffer, format='png', dpi=90)
    return f'<img src="{inline(buffer, "image/png")}" alt="{html.escape(name)}">'


def inline(buffer: io.BytesIO, kind: str) -> str:
    return f'data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def player(clip: Any, sample_rate: int, row: Mapping[str, Any]) -> str:
    """Text, figures, spectrogram and player of a clip; its sound is within the page, as 16-bit FLAC."""
    wave, rate = read_clip(clip, sample_rate)
    sound, plot = io.BytesIO(), Plot(figsize=(9, 1.8), layout='constrained')
    soundfile.write(sound, wave.clamp(-1, 1).numpy(), rate, format='FLAC', subtype='PCM_16')
    draw(plot.subplots(), wave, rate)
    numbers = ((key, it) for key, it in row.items() if isinstance(it, float))
    note = ', '.join(f'{key.replace("_", " ")} {it:.4g}' for key, it in numbers)
    text = str(row.get('text') or row['name'])
    return (
        f'<figure><figcaption>{html.escape(text)} <small>{html.escape(note)}</small></figcaption>\n'
        f'{image(plot, f"mel spectrogram of {text}")}\n'
        f'<audio controls preload="none" src="{inline(sound, "audio/flac")}"></audio></figure>'
    )


def page(title: str, body: Sequence[str]) -> str:
    parts = '\n'.join(body)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f'<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n{parts}\n</html>\n'
    )
