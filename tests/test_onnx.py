"""Exported files in ONNX Runtime against the model they were made from."""

import pytest
import torch
from helpers.models import tiny_mulan

from musiclm_pytorch.inference import onnx as exporting
from musiclm_pytorch.inference.config import InferenceConfig
from musiclm_pytorch.inference.onnx import ONNXExporter

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

LOG_MEL = dict(audio_sample_rate=8000, spec_n_fft=256, spec_win_length=200, spec_hop_length=80, spec_n_mels=16)


def model(audio=None, text=None):
    torch.manual_seed(0)
    # one layer a tower: the export of two takes as long again
    return tiny_mulan(audio=dict(depth=1, **(audio or {})), text=dict(depth=1, **(text or {})))


def run(path, **inputs):
    session = onnxruntime.InferenceSession(str(path))
    assert {it.name for it in session.get_inputs()} == set(inputs)
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {it.name: torch.from_numpy(value) for it, value in zip(session.get_outputs(), found)}


def agree(found, wanted):
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_both_towers_at_sizes_of_all_kinds(tmp_path):
    mulan = model().train()
    path = ONNXExporter(InferenceConfig(onnx_opset=20)).export_mulan_to_onnx(mulan, tmp_path / 'new' / 'mulan.onnx')
    assert mulan.training
    mulan.eval()
    written = onnx.load(path)
    assert [it.version for it in written.opset_import if it.domain == ''] == [20]
    shapes = {
        it.name: [size.dim_param or size.dim_value for size in it.type.tensor_type.shape.dim]
        for it in [*written.graph.input, *written.graph.output]
    }
    assert shapes == dict(
        wavs=['waves', 'samples'], texts=['texts', 'tokens'], audio_latents=['waves', 16], text_latents=['texts', 16]
    )
    shortest = mulan.audio.spec.min_samples(16)
    for waves, samples, texts, tokens in ((1, shortest, 4, 1), (7, 5011, 1, 12), (2, 777, 2, 5)):
        wavs, ids = torch.randn(waves, samples), torch.randint(0, 100, (texts, tokens))
        found = run(path, wavs=wavs, texts=ids)
        agree(found['audio_latents'], mulan.get_audio_latents(wavs))
        agree(found['text_latents'], mulan.get_text_latents(ids))
    with pytest.warns(UserWarning, match='is cut to the context'):
        wanted = mulan.get_text_latents(torch.arange(1, 31)[None])
    agree(run(path, wavs=wavs, texts=torch.arange(1, 31)[None])['text_latents'], wanted)
    assert [it.name for it in path.parent.iterdir()] == ['mulan.onnx']


@pytest.mark.slow
@pytest.mark.parametrize('more', [{}, dict(clip_summary=True, spec_n_fft=512, patch_size=(16, 4))])
def test_log_mel_with_lengths(tmp_path, more):
    mulan = model({**LOG_MEL, **more, 'support_variable_length': True, 'max_audio_length': 6000}).eval()
    path = ONNXExporter().export_mulan_to_onnx(mulan, str(tmp_path / 'audio.onnx'), towers=['audio'])
    for lengths, samples in (([4000, 1777, 2900], 4000), ([1500], 2100), ([7000, 2000], 7000)):
        wavs = torch.randn(len(lengths), samples)
        found = run(path, wavs=wavs, audio_lengths=torch.tensor(lengths))
        agree(found['audio_latents'], mulan.get_audio_latents(wavs, audio_lengths=lengths))


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / 'text.onnx'
    path.write_bytes(b'before')
    exporter = ONNXExporter()
    monkeypatch.setattr(exporting, 'TOLERANCE', -1.0)
    with pytest.raises(RuntimeError, match='text_latents of the exported graph differ by'):
        exporter.export_mulan_to_onnx(model(), path, towers=('text',))
    assert path.read_bytes() == b'before'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('towers', [(), 'audio', ('audio', 'audio'), ('words',)])
def test_towers_that_there_are_not_are_refused(towers, tmp_path):
    with pytest.raises(ValueError, match='towers must be'):
        ONNXExporter().export_mulan_to_onnx(model(), tmp_path / 'it.onnx', towers=towers)


def test_spectrograms_are_refused(tmp_path):
    with pytest.raises(ValueError, match='takes spectrograms'):
        ONNXExporter().export_mulan_to_onnx(model(dict(accept_spec=True)), tmp_path / 'it.onnx')
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r'\.\[inference\]'):
        ONNXExporter()
