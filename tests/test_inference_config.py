"""InferenceConfig: what it takes, what it refuses, and JSON both ways."""

import dataclasses
import json

import pytest
import torch

from musiclm_pytorch.inference.config import InferenceConfig

OTHER = dict(
    use_quantization=True,
    use_mixed_precision=False,
    mixed_precision_dtype='fp16',
    compile_model='auto',
    batch_size=3,
    memory_efficient=True,
    device='cpu',
    onnx_opset=20,
)


def test_it_is_frozen():
    config = InferenceConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch_size = 2


def test_json_both_ways(tmp_path):
    config = InferenceConfig(**OTHER)
    assert set(OTHER) == {field.name for field in dataclasses.fields(config)}
    defaults = InferenceConfig()
    assert all(getattr(config, name) == value != getattr(defaults, name) for name, value in OTHER.items())
    text = config.to_json(tmp_path / 'config.json')
    assert json.loads(text) == OTHER
    assert InferenceConfig.from_json(text) == config
    assert InferenceConfig.from_json(tmp_path / 'config.json') == config
    assert InferenceConfig.from_json(str(tmp_path / 'config.json')) == config
    assert [path.name for path in tmp_path.iterdir()] == ['config.json']
    assert InferenceConfig.from_json('{"batch_size": 2}') == InferenceConfig(batch_size=2)


@pytest.mark.parametrize(
    ('error', 'says', 'values'),
    [
        (TypeError, "no field 'batchsize'.*'batch_size'", dict(batchsize=4)),
        (TypeError, "no field 'use_quantisation'.*'use_quantization'", dict(use_quantisation=True)),
        (TypeError, "use_quantization must be bool or 'auto', got 'yes'", dict(use_quantization='yes')),
        (TypeError, "compile_model must be bool or 'auto', got 1", dict(compile_model=1)),
        (TypeError, 'batch_size must be int', dict(batch_size=True)),
        (TypeError, 'batch_size must be int', dict(batch_size=2.0)),
        (TypeError, 'memory_efficient must be bool', dict(memory_efficient='auto')),
        (TypeError, 'device must be str', dict(device=None)),
        (ValueError, 'batch_size must be greater than 0, got 0', dict(batch_size=0)),
        (ValueError, "'bf16' or 'fp16', got 'int8'", dict(mixed_precision_dtype='int8')),
        (ValueError, "device must be .* got 'gpu'", dict(device='gpu')),
        (ValueError, 'between 18 and 23, got 11', dict(onnx_opset=11)),
    ],
)
def test_what_does_not_fit_is_refused(error, says, values):
    for make in (lambda: InferenceConfig(**values), lambda: InferenceConfig.from_json(json.dumps(values))):
        with pytest.raises(error, match=says):
            make()


def test_json_that_is_none_is_refused(tmp_path):
    (tmp_path / 'list').write_text('[1]')
    with pytest.raises(TypeError, match='names and values'):
        InferenceConfig.from_json(tmp_path / 'list')
    with pytest.raises(ValueError, match='not JSON'):
        InferenceConfig.from_json('{"batch_size": ')
    with pytest.raises(FileNotFoundError):
        InferenceConfig.from_json(tmp_path / 'nowhere.json')


def test_devices_of_this_machine():
    assert InferenceConfig(device='cpu').torch_device() == torch.device('cpu')
    assert InferenceConfig().torch_device().type == ('cuda' if torch.cuda.is_available() else 'cpu')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda', but torch finds no CUDA device"):
            InferenceConfig(device='cuda').torch_device()


def test_half_precision_of_a_device():
    cpu = torch.device('cpu')
    assert InferenceConfig().torch_dtype(cpu) == torch.bfloat16
    assert InferenceConfig(mixed_precision_dtype='fp16').torch_dtype(cpu) == torch.float16
