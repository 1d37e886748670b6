"""What was written and has changed since is refused by name: weights, configs, tokens, indices."""

import json

import pytest
import torch
from helpers.models import tiny_mulan
from helpers.stage_parts import make_quantizer

from musiclm_pytorch import MuLaN, MuLaNEmbedQuantizer, MuLaNIndex
from musiclm_pytorch.atomic import CHECKSUM, read_checked_json, read_tensors, write_checked_json, write_tensors


def flip(path, place):
    """Change one bit of the byte at a place, from 0 (the first) to 1 (the last)."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


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
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], it) and found[name].dtype == it.dtype for name, it in TENSORS.items())
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
            assert all(torch.equal(found[name], it) for name, it in TENSORS.items())
            assert found.keys() == TENSORS.keys()


def test_tensors_without_a_checksum_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, str(tmp_path / 'x.safetensors'))
    assert torch.equal(read_tensors(tmp_path / 'x.safetensors')['a'], TENSORS['a'])


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


@pytest.mark.parametrize('file', ['model.safetensors', 'config.json'])
def test_a_model_that_changed_is_refused_by_the_name_of_its_file(tmp_path, file):
    tiny_mulan().save_pretrained(tmp_path)
    if file == 'config.json':
        path = tmp_path / file
        path.write_text(path.read_text().replace('"dim_head": 8', '"dim_head": 9', 1))
    else:
        flip(tmp_path / file, 0.75)
    with pytest.raises(ValueError, match=file):
        MuLaN.from_pretrained(tmp_path)


def test_a_change_can_be_passed_over(tmp_path):
    tiny_mulan().save_pretrained(tmp_path)
    flip(tmp_path / 'model.safetensors', 0.999)
    assert isinstance(MuLaN.from_pretrained(tmp_path, verify=False), MuLaN)


def test_what_lies_within_a_folder_is_checked_too(tmp_path):
    quantizer = make_quantizer()
    quantizer.save_pretrained(tmp_path)
    flip(tmp_path / 'mulan' / 'model.safetensors', 0.9)
    with pytest.raises(ValueError, match=r'mulan/model\.safetensors is damaged'):
        MuLaNEmbedQuantizer.from_pretrained(tmp_path)
    MuLaNEmbedQuantizer.from_pretrained(tmp_path, verify=False)


def test_an_index_that_changed_is_refused(tmp_path):
    index = MuLaNIndex(dim=4)
    index.add(['a', 'b'], torch.eye(4)[:2])
    index.save(tmp_path / 'index')
    (vectors,) = (tmp_path / 'index').glob('vectors-*')
    flip(vectors, 1.0)
    with pytest.raises(ValueError, match='vectors-.* is damaged'):
        MuLaNIndex.load(tmp_path / 'index')
    index.save(tmp_path / 'index', overwrite=True)
    path = tmp_path / 'index' / 'index.json'
    path.write_text(path.read_text().replace('"b"', '"c"'))
    with pytest.raises(ValueError, match=r'index\.json is not what was written'):
        MuLaNIndex.load(tmp_path / 'index')
    assert MuLaNIndex.load(tmp_path / 'index', verify=False).names == ['a', 'c']
