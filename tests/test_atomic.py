"""Files appear whole or not at all, may be read by whom the umask admits, and are what was written."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_mulan
from helpers.training import assert_same
from safetensors.torch import save_file

import musiclm_pytorch
from musiclm_pytorch import InferenceConfig, MuLaN, MuLaNIndex
from musiclm_pytorch.atomic import (
    CHECKSUM,
    atomic_write,
    check_nesting,
    read_checked_json,
    read_tensors,
    write_checked_json,
    write_tensors,
    write_text,
)
from musiclm_pytorch.cli.evaluate import read_texts
from musiclm_pytorch.data.cells import captions_in_file, list_in
from musiclm_pytorch.data.tables import names_in
from musiclm_pytorch.pretrained.hub import save_encoder
from musiclm_pytorch.trainer import checkpoints
from musiclm_pytorch.trainer.config_schema import read_content


@pytest.fixture(params=[0o022, 0o007], ids=oct)
def mode(request):
    """What a new file gets under a umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_files_have_the_mode_of_new_ones(tmp_path, mode):
    """Those of encoders that another library writes, too."""
    from transformers import HubertConfig, HubertModel

    tiny_mulan().save_pretrained(tmp_path / 'mulan')
    tiny_mulan().save_pretrained(tmp_path / 'mulan')  # over what is there
    checkpoints.write(tmp_path / 'run', 3, dict(weight=torch.ones(2), step=3))
    index = MuLaNIndex(dim=4)
    index.add(['a', 'b', 'c', 'd'], torch.eye(4))
    index.save(tmp_path / 'index')
    config = HubertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        conv_dim=(8,), conv_kernel=(40,), conv_stride=(20,), num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=1,
    )  # fmt: skip
    save_encoder(tmp_path / 'encoder', HubertModel(config))
    files = [path for path in tmp_path.rglob('*') if path.is_file()]
    assert len(files) == 8
    assert {path: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys(files, mode)


def test_encoders_of_another_library_too(tmp_path, mode):
    from transformers import HubertConfig, HubertModel

    from musiclm_pytorch import TransformersSemanticTokenizer

    config = HubertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        conv_dim=(8,), conv_kernel=(40,), conv_stride=(20,), num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=1,
    )  # fmt: skip
    tokenizer = TransformersSemanticTokenizer(HubertModel(config), codebook_size=2, layer=1, target_sample_hz=800)
    tokenizer.fit(torch.randn(2, 800))
    tokenizer.save_pretrained(tmp_path)
    files = [path for path in tmp_path.rglob('*') if path.is_file()]
    assert {path.name for path in files} >= {'config.json', 'model.safetensors'}
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / 'weights.safetensors'
    write_tensors(path, dict(a=torch.ones(2)))
    content = path.read_bytes()

    def break_off():
        with atomic_write(path) as aside:
            aside.write_bytes(content[:9])
            raise ValueError('broken off')

    with pytest.raises(ValueError, match='broken off'):
        break_off()
    assert path.read_bytes() == content
    with pytest.raises(OSError, match='No such file'):
        write_text(tmp_path / 'nowhere' / 'a.txt', 'text')
    assert [it.name for it in tmp_path.iterdir()] == [path.name]


def test_names_that_are_no_text_are_kept(tmp_path):
    write_text(tmp_path / 'names', os.fsdecode(b'caf\xe9 \xc3\xa9'))
    assert (tmp_path / 'names').read_bytes() == b'caf\xe9 \xc3\xa9'


def test_nothing_else_writes_tensors():
    """What writes safetensors by itself leaves files that nobody else may read."""
    package = Path(musiclm_pytorch.__file__).parent
    writers = {
        path.relative_to(package).as_posix()
        for path in package.rglob('*.py')
        if re.search(r'\bsave_file\b', path.read_text(encoding='utf-8'))
    }
    assert writers == {'atomic.py'}


# ---- what was written and has changed since is refused, unless that is passed over ----


TENSORS = dict(
    a=torch.arange(60.0).reshape(5, 12),
    b=torch.ones(3, dtype=torch.bfloat16),
    c=torch.tensor(7),
    d=torch.zeros(0, 4),
    e=torch.tensor([True, False]),
)


def test_tensors_come_back_as_they_were_or_not_at_all(tmp_path):
    path = tmp_path / 'x.safetensors'
    write_tensors(path, TENSORS)
    found = read_tensors(path)
    assert_same(found, TENSORS)
    assert [it.dtype for it in found.values()] == [TENSORS[name].dtype for name in found]
    whole = path.read_bytes()
    for byte in range(len(whole)):
        content = bytearray(whole)
        content[byte] ^= 1 << byte % 8
        path.write_bytes(content)
        try:
            found = read_tensors(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 - not every byte matters
        else:
            # blanks and the name of the checksum may change, what it is of may not
            assert_same(found, TENSORS)


def test_tensors_know_what_they_are_part_of(tmp_path):
    path = tmp_path / 'x.safetensors'
    write_tensors(path, dict(a=torch.ones(3)), part_of='tokens 3')
    assert torch.equal(read_tensors(path, part_of='tokens 3')['a'], torch.ones(3))
    with pytest.raises(ValueError, match='belongs to something else'):
        read_tensors(path, part_of='tokens 4')
    written = path.read_bytes()
    write_tensors(path, dict(a=torch.ones(3)), part_of='tokens 3')
    assert path.read_bytes() == written  # with several keys, safetensors orders them anew each time
    save_file(TENSORS, path)
    assert torch.equal(read_tensors(path)['a'], TENSORS['a'])  # of others, without a checksum


def test_json_comes_back_as_it_was_or_not_at_all(tmp_path):
    path, content = tmp_path / 'x.json', dict(b=(1, 2.5), a={'é': None, 3: 'x\udcff'}, c=float('inf'))
    write_checked_json(path, content)
    assert read_checked_json(path) == dict(b=[1, 2.5], a={'é': None, '3': 'x\udcff'}, c=float('inf'))
    path.write_text(path.read_text(errors='surrogateescape').replace('2.5', '2.6'), errors='surrogateescape')
    with pytest.raises(ValueError, match=r"x\.json is not what was written.*take its key 'checksum' out"):
        read_checked_json(path)
    assert read_checked_json(path, verify=False)['b'] == [1, 2.6]
    changed = json.loads(path.read_text(errors='surrogateescape'))
    del changed[CHECKSUM]
    path.write_text(json.dumps(changed))
    assert read_checked_json(path)['b'] == [1, 2.6]


# the fewer levels are no more than Python's own reader bears
@pytest.mark.parametrize('levels', [150, 20_000])
@pytest.mark.parametrize(
    ('name', 'read'),
    [
        ('x.json', read_checked_json),
        ('x.json', InferenceConfig.from_json),
        ('x.json', read_content),
        ('x.yaml', read_content),
        ('x.json', lambda path: read_texts(path, [])),
        ('x.json', lambda path: captions_in_file(path.read_bytes(), '.json', 'x.json')),
        ('x.jsonl', names_in),
    ],
)
def test_what_is_nested_without_end_is_told_by_its_file(tmp_path, name, read, levels):
    path = tmp_path / name
    path.write_text(f'{{"a": {"[" * levels}{"]" * levels}}}\n')
    with pytest.raises(ValueError, match=rf'{name}.* nested (more than 100 levels|too) deep'):
        read(path)


def test_what_is_repeated_is_looked_at_once():
    shared, within = [], {}
    for _ in range(60):
        shared = [shared, shared]
    check_nesting(shared)
    within['itself'] = within
    with pytest.raises(ValueError, match='nested more than 100 levels deep'):
        check_nesting(within)


def test_cells_are_nested_so_deep_and_no_deeper(tmp_path):
    (tmp_path / 'x.json').write_text(f'{"[" * 100}{"]" * 100}')
    assert len(read_checked_json(tmp_path / 'x.json')) == 1
    for cell in ('[' * 20_000, f"['a', {'-' * 20_000}1]"):
        with pytest.raises(ValueError, match='nested more than 100 levels deep|captions is not a JSON list'):
            list_in(cell)


def test_a_change_can_be_passed_over(tmp_path):
    """What `verify=True` says of it is in test_damage.py, for each kind of file."""
    tiny_mulan().save_pretrained(tmp_path / 'mulan')
    path = tmp_path / 'mulan' / 'model.safetensors'
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'model\.safetensors is damaged'):
        MuLaN.from_pretrained(tmp_path / 'mulan')
    assert isinstance(MuLaN.from_pretrained(tmp_path / 'mulan', verify=False), MuLaN)

    index = MuLaNIndex(dim=4)
    index.add(['a', 'b'], torch.eye(4)[:2])
    index.save(tmp_path / 'index')
    path = tmp_path / 'index' / 'index.json'
    path.write_text(path.read_text().replace('"b"', '"c"'))
    with pytest.raises(ValueError, match=r'index\.json is not what was written'):
        MuLaNIndex.load(tmp_path / 'index')
    assert MuLaNIndex.load(tmp_path / 'index', verify=False).names == ['a', 'c']
