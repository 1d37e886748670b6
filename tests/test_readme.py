"""The README's code runs as it stands, one block after the other, and gives the shapes that it states."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')


@pytest.mark.slow
def test_code_and_shapes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names, checked = {}, 0
    for block in re.findall(r'```python\n(.*?)```', README, re.S):
        exec(compile(block, 'README.md', 'exec'), names)
        for name, shape in re.findall(r'^(\w+) = .*# (\([\d, ]*\))$', block, re.M):
            # a name may be assigned more than once; the last statement is the one that still stands
            if re.findall(rf'^{name} = .*$', block, re.M)[-1].endswith(shape):
                assert tuple(names[name].shape) == ast.literal_eval(shape), name
                checked += 1
    assert checked >= 6
    assert (tmp_path / 'my-mulan' / 'model.safetensors').is_file()


def test_links_lead_somewhere():
    for target in re.findall(r'\]\((?!http)([^)#]+)\)', README):
        assert (ROOT / target).exists(), target


def test_every_public_name_can_be_imported():
    import musiclm_pytorch

    for name in musiclm_pytorch.__all__:
        assert getattr(musiclm_pytorch, name) is not None
    assert set(musiclm_pytorch.__all__) <= set(dir(musiclm_pytorch))
    with pytest.raises(AttributeError, match='attribute MuLan'):
        _ = musiclm_pytorch.MuLan
