"""Several evaluations side by side: one table and one page."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Plot

from musiclm_pytorch.atomic import read_checked_json, write_together
from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.evaluation.report import (
    COLOURS,
    GROUPS,
    RESULTS,
    check_free,
    figures_in,
    image,
    label,
    page,
    range_of,
    shown,
    table_csv,
)

COMPARISON, TABLE, PAGE_FILE = 'comparison.json', 'comparison.csv', 'comparison.html'
# facts that have to be equal where figures of runs are compared; a run without references has no word in the last two
SETTINGS = ('mulan', 'seed', 'sample_rate', 'reference', 'tagger')


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
            was used for: their figures cannot be compared.
    """
    folder = Path(folder)
    if len(reports) < 2:
        raise ValueError(f'a comparison needs two reports at least, got {len(reports)}')
    check_free(folder, COMPARISON, overwrite)
    runs = {name: read_report(path) for name, path in reports.items()}
    check_comparable(runs)
    rows = comparison_rows(runs)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(runs)
    body = [image(plot_intervals(rows, names), 'figures with their intervals'), comparison_table(rows, names)]
    write_together(
        {
            folder / COMPARISON: json.dumps(rows, indent=2) + '\n',  # a folder with it is whole
            folder / TABLE: table_csv([flat(row) for row in rows]),
            folder / PAGE_FILE: page(title, body),
        }
    )
    return folder / PAGE_FILE


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


def comparison_rows(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each figure that any run has: group, name, and what each run has for it (None if nothing)."""
    rows = []
    for group in GROUPS:
        found = {name: figures_in(run.get(group, {})) for name, run in runs.items()}
        paths = dict.fromkeys(path for figures in found.values() for path in figures)
        rows += [
            dict(group=group, figure='.'.join(path), runs={name: it.get(path) for name, it in found.items()})
            for path in paths
        ]
    return rows


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for CSV: value and bounds of each run in columns of their own."""
    cells = {
        f'{name} {key}': None if figure is None else figure.get(key)
        for name, figure in row['runs'].items()
        for key in ('value', 'low', 'high')
    }
    return dict(group=row['group'], figure=row['figure']) | cells


def comparison_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    parts = []
    for group, heading in GROUPS.items():
        own = [row for row in rows if row['group'] == group]
        if not own:
            continue
        head = ''.join(f'<th>{html.escape(name)}</th>' for name in names)
        lines = []
        for row in own:
            cells = ''.join(f'<td class="run">{cell(figure)}</td>' for figure in row['runs'].values())
            lines.append(f'<tr><td>{html.escape(label(tuple(row["figure"].split("."))))}</td>{cells}</tr>')
        parts.append(f'<h2>{heading}</h2>\n<table><tr><th></th>{head}</tr>\n' + '\n'.join(lines) + '\n</table>')
    return '\n'.join(parts)


def cell(figure: Mapping[str, Any] | None) -> str:
    """What a run has for a figure, with its interval or the reason why it has none."""
    if figure is None:
        return '<small>not measured</small>'
    note = figure.get('reason') or range_of(figure)
    return f'{html.escape(shown(figure))}<br><small>{html.escape(note)}</small>'


def plot_intervals(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Plot:
    """The figures that differ and have an interval in every run, each on a scale of its own, one line a run."""
    kept = [row for row in rows if all(it is not None and it.get('low') is not None for it in row['runs'].values())]
    kept = [row for row in kept if len({figure['value'] for figure in row['runs'].values()}) > 1]
    columns = 4
    lines = max(1, -(-len(kept) // columns))
    plot = Plot(figsize=(11, 0.6 + (0.5 + 0.28 * len(names)) * lines), layout='constrained')
    cells = list(plot.subplots(lines, columns, squeeze=False).flat)
    for axes, row in zip(cells, kept):
        for place, figure in enumerate(row['runs'].values()):
            value, low, high = figure['value'], figure['low'], figure['high']
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
