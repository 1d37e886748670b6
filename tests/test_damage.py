"""Damaged files of every kind: a clear error by the name of the file, and never another result without a word.

`benchmarks/damage.py` looks at thousands of variations, with their memory and time; here are a few of each kind.
"""

import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_mulan
from helpers.stage_parts import make_quantizer
from helpers.training import assert_same

from musiclm_pytorch import MuLaN, MuLaNEmbedQuantizer
from musiclm_pytorch.allocation import AllocationLimit
from musiclm_pytorch.atomic import read_checked_json
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.audiolm.spectral_codec import SpectralCodec
from musiclm_pytorch.mulan import checkpoint
from musiclm_pytorch.pretrained import find_pretrained

BENCHMARK = Path(__file__).parents[1] / 'benchmarks' / 'damage.py'


@pytest.fixture(scope='module')
def damage():
    sys.path.append(str(BENCHMARK.parent))  # for what is beside it
    spec = importlib.util.spec_from_file_location('damage', BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules['damage'] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules['damage']
    sys.path.remove(str(BENCHMARK.parent))


@pytest.mark.parametrize('name', ['mulan', 'quantizer', 'spectral codec', 'tokenizer', 'fine', 'index', 'recipes'])
def test_damage_is_told_by_the_name_of_the_file(damage, tmp_path, name):
    kind = damage.KINDS[name]
    sound, other = tmp_path / 'sound', tmp_path / 'other'
    kind.make(sound, 0)
    kind.make(other, 1)
    before = damage.look(kind, sound, None)
    limit = dict(memory=float('inf'), seconds=float('inf'))
    seen = set()
    for number, (way, file, content) in enumerate(damage.variations(kind, sound, other, random.Random(name), 1)):
        damaged = damage.copied(sound, tmp_path / str(number), file, content)
        found = damage.look(kind, damaged.parents[len(file.parts) - 1], damaged)
        outcome = damage.judged(found, before, file, way, limit)
        assert outcome not in damage.BAD, (way, file, found['text'])
        seen.add(outcome)
    assert 'error' in seen


def edited(folder, part, key, value):
    """The config in a folder with another value, and as before there were checksums."""
    path = folder / 'config.json'
    content = read_checked_json(path, verify=False)
    content[part][key] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(('key', 'value'), [('depth', 10**9), ('dim', 2**20), ('max_seq_len', 2**40), ('ff_mult', 1e9)])
def test_what_a_config_asks_for_is_compared_with_the_weights_first(tmp_path, key, value):
    tiny_mulan().save_pretrained(tmp_path)
    edited(tmp_path, 'text', key, value)
    with pytest.raises(
        ValueError,
        match=r"config\.json: what stands under 'text' builds no TextTransformer: (it asks for|\w+ is \d+, but)",
    ):
        MuLaN.from_pretrained(tmp_path)


def test_a_codebook_and_a_codec_of_millions_are_refused(tmp_path):
    make_quantizer().save_pretrained(tmp_path / 'quantizer')
    edited(tmp_path / 'quantizer', 'quantizer', 'codebook_size', 10**6)
    with pytest.raises(ValueError, match='it asks for a tensor of .* numbers, far more than the weights beside it'):
        MuLaNEmbedQuantizer.from_pretrained(tmp_path / 'quantizer')
    make_quantizer().save_pretrained(tmp_path / 'levels')
    edited(tmp_path / 'levels', 'quantizer', 'rq_num_quantizers', 10**9)
    with pytest.raises(ValueError, match='rq_num_quantizers is 1000000000, but none of the weights beside it has more'):
        MuLaNEmbedQuantizer.from_pretrained(tmp_path / 'levels')
    shutil.copytree(find_pretrained('tiny') / 'codec', tmp_path / 'codec')
    for key, value in (('sample_rate', 10**9), ('components', 10**7), ('num_quantizers', 10**6)):
        edited(tmp_path / 'codec', 'keywords', key, value)
        with pytest.raises(ValueError, match='builds no SpectralCodec|do not fit'):
            load_module(tmp_path / 'codec')


@pytest.mark.parametrize(
    'make',
    [
        lambda: torch.ones(2, 1).expand(2, 2**30).clone(),
        lambda: torch.cat([torch.ones(1).expand(2**24), torch.ones(1)]),
        lambda: torch.stack([torch.ones(1).expand(2**23), torch.ones(1).expand(2**23)]),
        lambda: torch.ones(2**12, 1) @ torch.ones(1, 2**12),
        lambda: torch.ones(1, 1).expand(2**24, 1) @ torch.ones(1),
    ],
)
def test_no_tensor_may_be_far_larger_than_the_weights(make):
    with AllocationLimit([100]), pytest.raises(ValueError, match='far more than the weights'):
        make()


def test_the_limit_holds_what_the_weights_need(tmp_path):
    with AllocationLimit([100]), pytest.raises(ValueError, match=r'cannot be, of sizes \[-3, 2\]'):
        torch.empty(-3, 2)
    with AllocationLimit([100]), pytest.raises(ValueError, match='far larger'):
        torch.stack([torch.zeros(2**20) for _ in range(100)])
    with AllocationLimit([2**24]):
        assert torch.ones(2**24).sum() == 2**24


def test_weights_of_another_training_do_not_pass_for_these(tmp_path):
    for name in ('a', 'b'):
        tiny_mulan().save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / 'a' / 'model.safetensors', tmp_path / 'b')
    with pytest.raises(ValueError, match=r'b/model\.safetensors is whole, but belongs to something else'):
        MuLaN.from_pretrained(tmp_path / 'b')
    MuLaN.from_pretrained(tmp_path / 'b', verify=False)


def test_a_model_written_over_is_the_old_or_the_new_one_wherever_it_stops(tmp_path, monkeypatch):
    old, new = tiny_mulan(), tiny_mulan()
    old.save_pretrained(tmp_path)

    def stop(write, after):
        def stopping(*args, **keywords):
            if after:
                write(*args, **keywords)
            raise KeyboardInterrupt

        return stopping

    for name, after in (('write_checked_json', False), ('write_tensors', False), ('write_tensors', True)):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, stop(getattr(checkpoint, name), after))
            with pytest.raises(KeyboardInterrupt):
                new.save_pretrained(tmp_path)
        found = MuLaN.from_pretrained(tmp_path).state_dict()
        assert_same(found, (new if after else old).state_dict())


def test_a_folder_of_several_models_is_never_a_mixture(tmp_path, monkeypatch):
    old, new = make_quantizer(), make_quantizer(seed=1)
    rename, refused = Path.rename, []

    def codes(quantizer):
        return [it for _, it in sorted(quantizer.state_dict().items())]

    def renaming(number, how):
        """Calls `how` at the rename of this number."""
        numbers = itertools.count()
        return lambda *it: how(*it) if next(numbers) == number else rename(*it)

    def save_stopped_at(number, how):
        monkeypatch.setattr(Path, 'rename', renaming(number, how))
        try:
            new.save_pretrained(tmp_path)
        finally:
            monkeypatch.setattr(Path, 'rename', rename)

    def interrupt(*_):
        raise KeyboardInterrupt

    old.save_pretrained(tmp_path)
    (tmp_path / 'notes.txt').write_text('notes')
    before = {it: it.read_bytes() for it in tmp_path.rglob('*') if it.is_file()}
    for number in itertools.count():
        try:
            save_stopped_at(number, interrupt)
            break
        except KeyboardInterrupt:
            assert {it: it.read_bytes() for it in tmp_path.rglob('*') if it.is_file()} == before
    assert number == 6  # a folder and two files, each of which was there before

    def interrupt_after(*it):
        rename(*it)
        raise KeyboardInterrupt

    old.save_pretrained(tmp_path)
    for number in range(6):  # just after a change of places, and once more on the way back
        monkeypatch.setattr(Path, 'rename', renaming(number, interrupt_after))
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path)
        monkeypatch.setattr(Path, 'rename', rename)
        assert {it: it.read_bytes() for it in tmp_path.rglob('*') if it.is_file()} == before

    def interrupt_often(path, target):
        interrupt_after(path, target) if path.is_file() else rename(path, target)

    monkeypatch.setattr(Path, 'rename', interrupt_often)
    with pytest.raises(OSError, match=r'what is missing of the former lies in .*\.together\.\d+\.before'):
        new.save_pretrained(tmp_path)
    monkeypatch.setattr(Path, 'rename', rename)
    assert {*before.values()} <= {it.read_bytes() for it in tmp_path.rglob('*') if it.is_file()}
    for number in range(6):
        shutil.rmtree(tmp_path)
        old.save_pretrained(tmp_path)
        if os.fork() == 0:
            save_stopped_at(number, lambda *_: os._exit(9))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
        try:
            found = codes(MuLaNEmbedQuantizer.from_pretrained(tmp_path))
        except (ValueError, FileNotFoundError) as error:
            refused.append(str(error))
        else:
            assert any(all(map(torch.equal, found, codes(it))) for it in (old, new))
    assert refused
    assert all(re.search('belongs to something else|^no (config.json|model.safetensors) in', it) for it in refused)
    new.save_pretrained(tmp_path)
    assert all(map(torch.equal, codes(MuLaNEmbedQuantizer.from_pretrained(tmp_path)), codes(new)))
    old.mulan.save_pretrained(tmp_path / 'mulan')
    with pytest.raises(ValueError, match='mulan belongs to something else'):
        MuLaNEmbedQuantizer.from_pretrained(tmp_path)
    MuLaNEmbedQuantizer.from_pretrained(tmp_path, verify=False)


def test_values_of_another_kind_are_told_by_key(tmp_path):
    codec = SpectralCodec(sample_rate=16000, codebook_size=4, num_quantizers=2)
    save_module(codec, tmp_path)
    for value in ('8', None, [8], -8, float('nan')):
        edited(tmp_path, 'keywords', 'codebook_size', value)
        with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json: what stands under 'keywords'.*codebook_size"):
            load_module(tmp_path)
