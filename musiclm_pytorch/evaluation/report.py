"""Evaluations on disk: JSON, tables and a page in a single file to look at and listen to; and several side by side."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Plot

from musiclm_pytorch.atomic import read_checked_json, write_together
from musiclm_pytorch.checks import check_not_negative, typechecked
from musiclm_pytorch.evaluation.inputs import list_clips, read_clip
from musiclm_pytorch.evaluation.metric import GROUPS
from musiclm_pytorch.gallery import page_of, picture
from musiclm_pytorch.waves import sound_bytes

RESULTS, FIGURES, CLIPS, PAGE_FILE = 'report.json', 'figures.csv', 'clips.csv', 'report.html'
COMPARISON, TABLE, COMPARISON_PAGE = 'comparison.json', 'comparison.csv', 'comparison.html'
# facts that have to be equal where metrics of runs are compared; a run without references has no word in the last two
SETTINGS = ('mulan', 'seed', 'sample_rate', 'reference', 'tagger')
# what is drawn of every clip: key of its row, label
PANELS = dict(cosine='cosine with its text', loudness='loudness, LUFS', tempo='tempo, BPM', bandwidth='bandwidth, Hz')
# metrics whose names are not their paths' words
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
    check_free(Path(folder), RESULTS, overwrite)
    if not {'about', 'clips'} <= results.keys():
        raise ValueError(
            'results must be those of MusicLMEvaluator.evaluate, with about and clips, not of one group alone'
        )
    check_not_negative(players=players)
    clips = [] if generated_audio is None else list_clips(generated_audio, audio_lengths)
    if clips and len(clips) != len(results['clips']):
        raise ValueError(
            f'got {len(clips)} clips for results of {len(results["clips"])}; pass those that were evaluated'
        )
    facts = results['about']
    body, rows = [about(facts), image(plot_clips(results), 'distributions over clips')], []
    for group in GROUPS:
        cells = {}
        for path, metric in figures_in(results.get(group, {})).items():
            known = {key: metric.get(key) for key in ('value', *BOUNDS)}
            rows.append(dict(group=group, figure='.'.join(path), **known, details=json.dumps(details_of(metric))))
            cells[path] = metric_cells(metric)
        body += [table_html(group, ('value', '95 % interval', 'clips', ''), cells)] if cells else []
    if clips[:players]:
        body.append('<h2>Clips</h2>')
        rate = sample_rate or facts['sample_rate']
        body += [player(clip, rate, row) for clip, row in zip(clips[:players], results['clips'])]
    texts = {
        RESULTS: json.dumps(results, indent=2, allow_nan=False) + '\n',  # a folder with it is whole
        FIGURES: table_csv(rows),
        CLIPS: table_csv(results['clips']),
    }
    return write_page(folder, PAGE_FILE, title, body, texts)


@typechecked
def compare_reports(
    reports: Mapping[str, str | Path], folder: str | Path, *, title: str = 'Comparison', overwrite: bool = False
) -> Path:
    """Put evaluations side by side: `comparison.json`, `comparison.csv` and `comparison.html`.

    Args:
        reports: the folder that `write_report` wrote, for each name of a run.
        folder: where the files go.
        overwrite: write over a comparison that is there already.

    Returns:
        the path of the page.

    Raises:
        FileNotFoundError: a folder without a report. FileExistsError: the folder has a comparison already.
        ValueError: fewer than two runs, or runs that another MuLaN, seed, sample rate, tagger or set of reference clips
            was used for: their metrics cannot be compared.
    """
    if len(reports) < 2:
        raise ValueError(f'a comparison needs two reports at least, got {len(reports)}')
    check_free(Path(folder), COMPARISON, overwrite)
    runs = {name: read_report(path) for name, path in reports.items()}
    check_comparable(runs)
    rows, flat, tables = [], [], []  # one of the first two for each metric that any run has
    for group in GROUPS:
        own = {name: figures_in(run.get(group, {})) for name, run in runs.items()}
        cells = {}
        for path in dict.fromkeys(path for metrics in own.values() for path in metrics):
            of_runs = {name: metrics.get(path) for name, metrics in own.items()}
            row = dict(group=group, figure='.'.join(path))
            rows.append(row | dict(runs=of_runs))
            for name, metric in of_runs.items():
                row |= {f'{name} {key}': (metric or {}).get(key) for key in ('value', 'low', 'high')}
            flat.append(row)
            cells[path] = [f'<td class="run">{run_cell(it)}</td>' for it in of_runs.values()]
        tables += [table_html(group, runs, cells)] if cells else []
    body = [image(plot_intervals(rows, list(runs)), 'metrics with their intervals'), *tables]
    texts = {COMPARISON: json.dumps(rows, indent=2) + '\n', TABLE: table_csv(flat)}
    return write_page(folder, COMPARISON_PAGE, title, body, texts)


def check_free(folder: Path, name: str, overwrite: bool) -> None:
    """Raise FileExistsError for a report that is there already and may not be written over."""
    if (folder / name).exists() and not overwrite:
        raise FileExistsError(
            f'{folder / name} is there already; give another folder, or say that it may be overwritten'
        )


def read_report(folder: str | Path) -> dict[str, Any]:
    """The results in a folder that `write_report` wrote. Raises FileNotFoundError, ValueError for another file."""
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f'no {RESULTS} in {folder}; expected a folder written by `musiclm evaluate`')
    results = read_checked_json(path)
    if not isinstance(results, dict) or not isinstance(results.get('about'), dict):
        raise ValueError(f'{path} is not a report of this package')
    return results


def check_comparable(runs: Mapping[str, Mapping[str, Any]]) -> None:
    for setting in SETTINGS:
        found = {name: run['about'].get(setting) for name, run in runs.items()}
        if setting in ('reference', 'tagger'):
            found = {name: it for name, it in found.items() if runs[name]['about'].get('reference') is not None}
        if len({json.dumps(it) for it in found.values()}) > 1:
            told = ', '.join(f'{name} {it!r}' for name, it in found.items())
            raise ValueError(f'these reports were made with another {setting}: {told}; evaluate all runs in one way')


# ---- metrics in words and tables ----


def figures_in(results: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """All metrics of nested results, by their path."""
    if 'value' in results:
        return {path: results}
    found = {}
    for name, it in results.items():
        if isinstance(it, Mapping):
            found |= figures_in(it, (*path, name))
    return found


def about(facts: Mapping[str, Any]) -> str:
    """A line on what the metrics depend on: what judged, and beside what."""
    parts = [f'{facts["clips"]} clips', f'judged by {facts["name"]} ({facts["mulan"]})', f'tags by {facts["tagger"]}']
    if facts['reference_clips']:
        parts.append(f'{facts["reference_clips"]} clips of reference ({facts["reference"]})')
    parts += [f'seed {facts["seed"]}', f'musiclm-pytorch {facts["musiclm_pytorch"]}']
    return f'<p><small>{html.escape(", ".join(parts))}</small></p>'


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with every column that any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table_html(group: str, heads: Iterable[str], cells: Mapping[tuple[str, ...], Sequence[str]]) -> str:
    """A group's heading, and a table with a line of cells for each metric, by its path."""
    head = ''.join(f'<th>{html.escape(it)}</th>' for it in ('', *heads))
    lines = [f'<tr><td>{html.escape(label(path))}</td>{"".join(line)}</tr>' for path, line in cells.items()]
    return f'<h2>{GROUPS[group]}</h2>\n<table><tr>{head}</tr>\n' + '\n'.join(lines) + '\n</table>'


def metric_cells(metric: Mapping[str, Any]) -> list[str]:
    """Value, interval, count of clips, and what else is known, as cells of a table."""
    facts = {key: it for key, it in details_of(metric).items() if isinstance(it, int | float | str) and it != ''}
    told = (f'{key.replace("_", " ")} {in_digits(it)}' for key, it in facts.items())
    numbers = (shown(metric), range_of(metric), str(metric.get('count', '')))
    cells = [f'<td class="number">{html.escape(it)}</td>' for it in numbers]
    return [*cells, f'<td><small>{html.escape(metric.get("reason") or ", ".join(told))}</small></td>']


def run_cell(metric: Mapping[str, Any] | None) -> str:
    """What a run has for a metric, with its interval or the reason why it has none."""
    if metric is None:
        return '<small>not measured</small>'
    note = metric.get('reason') or range_of(metric)
    return f'{html.escape(shown(metric))}<br><small>{html.escape(note)}</small>'


def label(path: tuple[str, ...]) -> str:
    """The path of a metric in words."""
    return ', '.join(NAMES.get(part, part.replace('_', ' ')) for part in path)


def shown(metric: Mapping[str, Any]) -> str:
    """The value with four digits and its unit, or that there is none."""
    if metric['value'] is None:
        return 'not defined'
    return f'{metric["value"]:.4g} {metric.get("unit", "")}'.strip()


def range_of(metric: Mapping[str, Any]) -> str:
    return '' if metric.get('low') is None else f'{metric["low"]:.4g} to {metric["high"]:.4g}'


def details_of(metric: Mapping[str, Any]) -> dict[str, Any]:
    return {key: it for key, it in metric.items() if key not in ('value', *BOUNDS)}


def in_digits(value: Any) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


# ---- pictures, sounds, pages ----


def plot_clips(results: Mapping[str, Any]) -> Plot:
    """How each panel's value is spread over the clips, generated and of reference."""
    plot = Plot(figsize=(10, 5), layout='constrained')
    sides = {'generated': results['clips'], 'reference': results.get('reference_clips', [])}
    for axes, (key, name) in zip(plot.subplots(2, 2).flat, PANELS.items()):
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
    return plot


def plot_intervals(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Plot:
    """The metrics that differ and have an interval in every run, each on a scale of its own, one line a run."""
    kept = [row for row in rows if all(it is not None and it.get('low') is not None for it in row['runs'].values())]
    kept = [row for row in kept if len({metric['value'] for metric in row['runs'].values()}) > 1]
    lines = max(1, -(-len(kept) // 4))
    plot = Plot(figsize=(11, 0.6 + (0.5 + 0.28 * len(names)) * lines), layout='constrained')
    cells = list(plot.subplots(lines, 4, squeeze=False).flat)
    for axes, row in zip(cells, kept):
        for place, metric in enumerate(row['runs'].values()):
            value, low, high = metric['value'], metric['low'], metric['high']
            # a percentile interval need not hold the mean
            spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar(value, place, xerr=spread, fmt='o', capsize=3, color=COLOURS[place % len(COLOURS)])
        axes.set_title(label(tuple(row['figure'].split('.'))), fontsize=8)
        plain = [name.replace('$', r'\$') for name in names]  # no formulas
        axes.set(yticks=range(len(names)), yticklabels=plain, ylim=(-0.6, len(names) - 0.4))
        axes.tick_params(labelsize=7)
        axes.locator_params(axis='x', nbins=4)
        axes.invert_yaxis()
    for axes in cells[len(kept) :]:
        axes.set_axis_off()
    return plot


def image(plot: Plot, name: str) -> str:
    """A picture within the page."""
    buffer = io.BytesIO()
    plot.savefig(buffer, format='png', dpi=90)
    return f'<img src="{inline(buffer.getvalue(), "image/png")}" alt="{html.escape(name)}">'


def inline(content: bytes, kind: str) -> str:
    return f'data:{kind};base64,{base64.b64encode(content).decode()}'


def player(clip: Any, sample_rate: int, row: Mapping[str, Any]) -> str:
    """Text, numbers, spectrogram and player of a clip; its sound is within the page, as 16-bit FLAC."""
    wave, rate = read_clip(clip, sample_rate)
    note = ', '.join(f'{key.replace("_", " ")} {it:.4g}' for key, it in row.items() if isinstance(it, float))
    text, sound = str(row.get('text') or row['name']), inline(sound_bytes(wave, rate, '.flac'), 'audio/flac')
    return (
        f'<figure><figcaption>{html.escape(text)} <small>{html.escape(note)}</small></figcaption>\n'
        f'{image(picture(wave, rate), f"mel spectrogram of {text}")}\n'
        f'<audio controls preload="none" src="{sound}"></audio></figure>'
    )


def write_page(folder: str | Path, name: str, title: str, body: Sequence[str], texts: Mapping[str, str]) -> Path:
    """Write a page of these parts, and other files of a folder beside it; all of them or none. Returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_together({folder / file: text for file, text in {**texts, name: page_of(title, body)}.items()})
    return folder / name
