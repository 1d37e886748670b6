"""The code of the README and of each page of docs runs as it stands, page by page, and gives the stated shapes."""

import ast
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from musiclm_pytorch.cli.entry import read

ROOT = Path(__file__).parents[1]
PAGES = {it.relative_to(ROOT).as_posix(): it.read_text(encoding='utf-8') for it in (ROOT / 'docs').rglob('*.md')}
PAGES['README.md'] = (ROOT / 'README.md').read_text(encoding='utf-8')
# `py` in place of `python` marks what needs a network, a sound font or an account
REFERENCE = runpy.run_path(str(ROOT / 'docs' / 'reference.py'))
TABLES = runpy.run_path(str(ROOT / 'docs' / 'tables.py'))
BLOCKS = {name: found for name, text in PAGES.items() if (found := re.findall(r'```python\n(.*?)```', text, re.S))}


@pytest.mark.slow
@pytest.mark.parametrize('page', BLOCKS)
def test_code_and_shapes(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names, stated, checked = {}, 0, 0
    for block in BLOCKS[page]:
        exec(compile(block, page, 'exec'), names)
        for name, shape in re.findall(r'^(\w+) = .*# (\([\d, ]*\))', block, re.M):
            stated += 1
            # a name may be assigned more than once; the last statement is the one that still stands
            if f'# {shape}' in re.findall(rf'^{name} = .*$', block, re.M)[-1]:
                assert tuple(names[name].shape) == ast.literal_eval(shape), name
                checked += 1
    assert checked or not stated


@pytest.mark.parametrize('page', PAGES)
def test_blocks_of_code_are_closed(page):
    inside = False
    for line in PAGES[page].splitlines():
        if line.startswith('```'):
            assert not (inside and line != '```'), line
            inside = not inside
        assert not (inside and re.match('## ', line)), line
    assert not inside


def commands_of(text):
    """The lines of `musiclm` in a page's blocks for a shell, without what other programs do."""
    for block in re.findall(r'```(?:bash|sh)\n(.*?)```', text, re.S):
        for line in block.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            while 'musiclm' in words:
                words = words[words.index('musiclm') + 1 :]
                end = next((i for i, word in enumerate(words) if word in ('|', '>', '&', '&&', ';')), len(words))
                if words and words[0].isidentifier() and '…' not in words:
                    yield words[:end]


COMMANDS = [(name, command) for name, text in PAGES.items() for command in commands_of(text)]


@pytest.mark.parametrize(('page', 'command'), COMMANDS, ids=[f'{page}: {command[0]}' for page, command in COMMANDS])
def test_commands_can_be_typed(page, command):
    assert read(command).run


def test_pages_have_commands():
    assert {'generate', 'stream', 'train', 'tokens', 'evaluate', 'search'} <= {command[0] for _, command in COMMANDS}


def test_pages_have_code_to_run():
    assert {'README.md', 'docs/music.md', 'docs/mulan.md', 'docs/stages.md', 'docs/evaluation.md'} <= set(BLOCKS)


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    made = {f'reference/{room}.md' for room in REFERENCE['ROOMS']}  # with the site
    for target in re.findall(r'\]\((?!http)([^)#]+)[^)]*\)', PAGES[page]):
        assert target in made or (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize('page', TABLES['PAGES'], ids=lambda it: it.relative_to(ROOT).as_posix())
def test_figures_are_those_of_the_json(page):
    text = page.read_text(encoding='utf-8')
    assert TABLES['filled'](text) == text  # else: make figures
    for name in TABLES['MARKED'].findall(text):
        begin = text.index(f'<!-- table: {name} -->')
        end = text.index('<!-- end of table -->', begin)
        typed = re.sub(r'\d', '7', text[begin:end])
        assert TABLES['filled'](text[:begin] + typed + text[end:]) == text


def test_every_table_and_every_json_is_shown():
    shown = [it for page in TABLES['PAGES'] for it in TABLES['MARKED'].findall(page.read_text(encoding='utf-8'))]
    assert set(shown) == {it.__name__ for it in TABLES['TABLES']}
    for path in TABLES['FIGURES'].iterdir():
        found = json.loads(path.read_text(encoding='utf-8'), parse_constant=pytest.fail)
        assert path.stem.removesuffix('_small') == re.search(r'python benchmarks/(\w+)\.py', found['command'])[1]
        assert re.fullmatch(r'\d{4}-\d\d-\d\d', found['date'])
        assert found.keys() & {'note'} or {'processor', 'cores'} <= found['machine'].keys()


def test_what_benchmarks_write_can_be_shown(monkeypatch, tmp_path):
    results = runpy.run_path(str(ROOT / 'benchmarks' / 'results.py'))
    monkeypatch.setattr('sys.argv', ['/x/benchmarks/mulan.py', '--cases', 'train:3:4'])
    given = json.loads((TABLES['FIGURES'] / 'mulan.json').read_text(encoding='utf-8'))
    results['write_results'](
        tmp_path / 'a' / 'mulan.json', {key: given[key] for key in ('cases', 'agreement', 'memory_limit_gb')}
    )
    monkeypatch.setitem(TABLES['mulan'].__globals__, 'FIGURES', tmp_path / 'a')
    table = TABLES['mulan']()
    assert '(`python benchmarks/mulan.py --cases train:3:4`, ' in table
    assert '| training step, 3 s × 4 | 16.53 s | 2.86 s | **5.8** | 9.17 GB | 3.08 GB | **0.34** |' in table
    with pytest.raises(ValueError, match='not JSON compliant'):
        results['write_results'](tmp_path / 'b.json', dict(loss=float('nan')))


def test_the_readme_is_a_page():
    assert len(PAGES['README.md'].splitlines()) <= 180
    assert set(re.findall(r'\]\((docs/[^)#]+\.md)\)', PAGES['README.md'])) <= set(PAGES)


def test_every_public_name_can_be_imported():
    import musiclm_pytorch

    for name in musiclm_pytorch.__all__:
        assert getattr(musiclm_pytorch, name) is not None
    assert set(musiclm_pytorch.__all__) <= set(dir(musiclm_pytorch))
    with pytest.raises(AttributeError, match='attribute MuLan'):
        _ = musiclm_pytorch.MuLan


def test_the_reference_shows_arguments_as_lists():
    """A paragraph of `name: what it is` has a heading, Args or Attributes, without which it is shown as prose."""
    for path in {it for paths in REFERENCE['public_names']().values() for it in paths}:
        module, name = path.rsplit('.', 1)
        file = ROOT / f'{module.replace(".", "/")}.py'
        if not file.exists():
            file = file.with_suffix('') / '__init__.py'
        nodes = [it for it in ast.parse(file.read_text(encoding='utf-8')).body if getattr(it, 'name', None) == name]
        below = [it for node in nodes for it in node.body if isinstance(node, ast.ClassDef)]
        for node in [*nodes, *below]:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                told = ast.get_docstring(node) or ''
                assert not re.search(r'\n\n[a-z_]\w*(, [a-z_]\w*)*: \S', told), f'{path}, {node.name}'


def test_the_reference_tells_every_public_name():
    import musiclm_pytorch

    told = {path.rsplit('.', 1)[1] for paths in REFERENCE['public_names']().values() for path in paths}
    modules = {it for it in musiclm_pytorch.__all__ if type(getattr(musiclm_pytorch, it)).__name__ == 'module'}
    assert set(musiclm_pytorch.__all__) - modules - {'__version__'} <= told
