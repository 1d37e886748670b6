"""The notebooks run as they stand, and keep what they printed, drew and played."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / 'examples' / 'notebooks').glob('*.ipynb'))


def cells_of(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [it | dict(source=''.join(it['source'])) for it in cells if it['cell_type'] == 'code']


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda it: it.stem)
def test_cells_run_in_order(path, monkeypatch, tmp_path, curves):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPLBACKEND', 'agg')
    names = {}
    for number, cell in enumerate(cells_of(path)):
        exec(compile(cell['source'], f'{path.name}, cell {number}', 'exec'), names)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda it: it.stem)
def test_outputs_are_kept(path):
    cells = cells_of(path)
    assert [it['execution_count'] for it in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell['outputs']]
    assert not any(it['output_type'] == 'error' for it in outputs)
    assert any('image/png' in it.get('data', {}) for it in outputs)
    assert path.stat().st_size < 1_000_000


def test_music_plays_in_a_notebook_that_has_music():
    (first,) = (it for it in NOTEBOOKS if it.stem == 'first_music')
    pages = [
        ''.join(o['data']['text/html'])
        for it in cells_of(first)
        for o in it['outputs']
        if 'text/html' in o.get('data', {})
    ]
    assert sum(page.count('<audio') for page in pages) >= 6
