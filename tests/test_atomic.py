"""Files appear whole or not at all, and may be read by whom the umask admits."""

import os
import re
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_mulan

import musiclm_pytorch
from musiclm_pytorch import MuLaNIndex
from musiclm_pytorch.atomic import atomic_write, write_tensors, write_text
from musiclm_pytorch.pretrained.hub import save_encoder
from musiclm_pytorch.trainer import checkpoints


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
