"""What was written and has changed since is refused, unless that is passed over: tensors and JSON."""

import json

import pytest
import torch
from helpers.models import tiny_mulan
from helpers.training import assert_same

from musiclm_pytorch import MuLaN, MuLaNIndex
from musiclm_pytorch.atomic import CHECKSUM, read_checked_json, read_tensors, write_checked_json, write_tensors

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
