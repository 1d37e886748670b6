"""The code of the README and of each page of docs runs as it stands, page by page, and gives the stated shapes."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {it.relative_to(ROOT).as_posix(): it.read_text(encoding='utf-8') for it in (ROOT / 'docs').rglob('*.md')}
PAGES['README.md'] = (ROOT / 'README.md').read_text(encoding='utf-8')
# `py` in place of `python` marks what needs a network, a sound font or an account
REFERENCE = runpy.run_path(str(ROOT / 'docs' / 'reference.py'))
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


def test_pages_have_code_to_run():
    assert {'README.md', 'docs/music.md', 'docs/mulan.md', 'docs/stages.md', 'docs/evaluation.md'} <= set(BLOCKS)


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    made = {f'reference/{room}.md' for room in REFERENCE['ROOMS']}  # with the site
    for target in re.findall(r'\]\((?!http)([^)#]+)[^)]*\)', PAGES[page]):
        assert target in made or (ROOT / page).parent.joinpath(target).exists(), target


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


def test_the_reference_tells_every_public_name():
    import musiclm_pytorch

    told = {path.rsplit('.', 1)[1] for paths in REFERENCE['public_names']().values() for path in paths}
    modules = {it for it in musiclm_pytorch.__all__ if type(getattr(musiclm_pytorch, it)).__name__ == 'module'}
    assert set(musiclm_pytorch.__all__) - modules - {'__version__'} <= told
