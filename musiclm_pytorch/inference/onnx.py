"""MuLaN as an ONNX file: waves and token ids in, latents out, the spectrogram inside the graph."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from musiclm_pytorch.atomic import atomic_write
from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.extras import needing
from musiclm_pytorch.inference.config import InferenceConfig
from musiclm_pytorch.mulan.model import MuLaN
from musiclm_pytorch.mulan.pretrained_towers import check_own
from musiclm_pytorch.version import __version__

TOWERS = ('audio', 'text')
TOLERANCE = 1e-4
SIZES = dict(  # names of the sizes of each input
    wavs=('waves', 'samples'),
    audio_lengths=('waves',),
    texts=('texts', 'tokens'),
)


class ONNXExporter:
    """Writes models as ONNX files and checks them before they are there.

    Args:
        config: of which `onnx_opset` counts. What is exported is the float32 model: quantization and half precision
            are for the runtime that the file is made for.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime are not installed.
    """

    @typechecked
    def __init__(self, config: InferenceConfig | None = None):
        self.config = InferenceConfig() if config is None else config
        with needing('ONNXExporter needs onnx, onnxscript and onnxruntime', 'inference'):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401

    @typechecked
    def export_mulan_to_onnx(self, mulan: MuLaN, export_path: str | Path, towers: Sequence[str] = TOWERS) -> Path:
        """Write both towers, or one, to one file. The model is not touched.

        Inputs: `wavs` `(waves, samples)` float32; `audio_lengths` `(waves,)` int64, true lengths in samples, only of a
        model with `support_variable_length`, and then always; `texts` `(texts, tokens)` int64, padded with the
        model's `pad_id`. Outputs: `audio_latents` `(waves, dim_latent)` and `text_latents` `(texts, dim_latent)`,
        float32, of length 1. All sizes but the last are free, from the shortest wave that makes a patch on; texts
        longer than `max_seq_len` and waves longer than `max_audio_length` are cut, as by the model. The numbers of
        waves and texts may differ. Values are not checked in the graph: ids have to lie in the vocabulary.

        The file is checked by onnx, and its numbers against the model's in ONNX Runtime, at sizes that the export
        has not seen, before it appears under its name; one that was there is kept until then.

        Args:
            mulan: the model, which is exported as in eval mode.
            export_path: the file; its folder is made where it is missing.
            towers: 'audio', 'text' or both. Runtimes want all inputs of a file, so export one to use one.

        Returns:
            the path.

        Raises:
            ValueError: unknown towers, or a model that takes spectrograms. TypeError: towers of `transformers`.
            RuntimeError: the exported graph gives other numbers than the model. And whatever torch's exporter raises.
        """
        if not towers or isinstance(towers, str) or len(set(towers)) < len(towers) or not set(towers) <= set(TOWERS):
            raise ValueError(f"towers must be ('audio',), ('text',) or both, got {towers!r}")
        check_own(mulan.audio, mulan.text, what='the export to ONNX')
        if 'audio' in towers and mulan.audio.accept_spec:
            raise ValueError(
                'this MuLaN takes spectrograms (accept_spec=True); only audio towers of waves are exported'
            )
        path = Path(export_path)
        graph = _Graph(copy.deepcopy(mulan).to('cpu', torch.float32).eval().requires_grad_(False), towers)

        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as aside:
            self._write(graph, aside)
            check_file(graph, aside)
        return path

    def _write(self, graph: _Graph, path: Path) -> None:
        import onnx

        # sizes of 1 would be taken for fixed
        inputs = graph.example(seed=0, items=2, patches=3, tokens=min(5, graph.mulan.text.max_seq_len))
        dynamic = {name: dict.fromkeys(range(it.ndim), torch.export.Dim.DYNAMIC) for name, it in inputs.items()}
        with torch.no_grad(), _quiet():
            # strict: by torch.compile's front end, which keeps the size of a batch free where `len` asks for it
            program = torch.export.export(graph, (), inputs, dynamic_shapes=dynamic, strict=True)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=self.config.onnx_opset,
                custom_translation_table={torch.ops.aten.remainder.Scalar: _remainder},
                input_names=list(inputs),
                output_names=graph.outputs,
            )
        model = exported.model_proto
        _name_sizes(model)
        # sizes of what lies between, as torch worked them out, mislead ONNX Runtime into buffers of a wrong size
        del model.graph.value_info[:]
        text, longest = graph.mulan.text, graph.mulan.audio.max_audio_length
        _limit(model, 'texts', 'Slice', text.max_seq_len)
        if longest is not None:
            _limit(model, 'wavs', 'Slice', longest)
            _limit(model, 'audio_lengths', 'Min', longest)
        model.producer_name, model.producer_version = 'musiclm-pytorch', __version__
        facts = dict(
            sample_rate=graph.mulan.sample_rate,
            dim_latent=graph.mulan.dim_latent,
            pad_id=text.pad_id,
            max_seq_len=text.max_seq_len,
        )
        onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
        onnx.save_model(model, str(path))


class _Graph(nn.Module):
    """What is exported: tensors by name in, a tuple of latents out."""

    def __init__(self, mulan: MuLaN, towers: Sequence[str]):
        super().__init__()
        self.mulan = mulan
        self.towers = [tower for tower in TOWERS if tower in towers]
        self.outputs = [f'{tower}_latents' for tower in self.towers]

    def forward(
        self, wavs: Tensor | None = None, audio_lengths: Tensor | None = None, texts: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        latents = []
        if wavs is not None:
            latents.append(self.mulan.get_audio_latents(wavs, audio_lengths=audio_lengths))
        if texts is not None:
            latents.append(self.mulan.get_text_latents(texts))
        return tuple(latents)

    def example(self, *, seed: int, items: int, patches: int, tokens: int) -> dict[str, Tensor]:
        """Inputs: `items` waves that are `patches` patches long, and one text more, of that many tokens."""
        generator = torch.Generator().manual_seed(seed)
        audio, text = self.mulan.audio, self.mulan.text
        inputs = {}
        if 'audio' in self.towers:
            shortest, samples = (audio.spec.min_samples(audio.patch_size[1] * count) for count in (1, patches))
            inputs['wavs'] = 0.1 * torch.randn(items, samples, generator=generator)
            if audio.support_variable_length:
                inputs['audio_lengths'] = torch.linspace(samples, shortest, items).long()
        if 'text' in self.towers:
            ids = torch.randint(text.num_tokens, (items + 1, tokens), generator=generator)
            ids[0, tokens // 2 :] = text.pad_id
            inputs['texts'] = ids
        return inputs


def check_file(graph: _Graph, path: Path) -> float:
    """Check an exported file by onnx's checker and against the model, at sizes other than those of the export.

    Returns the largest difference of a latent. Raises RuntimeError for one beyond 1e-4, and what the checker raises.
    """
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    worst = 0.0
    longest = graph.mulan.text.max_seq_len
    for seed, (items, patches, tokens) in enumerate(((1, 1, 1), (3, 7, longest + 3), (5, 2, longest)), start=1):
        inputs = graph.example(seed=seed, items=items, patches=patches, tokens=tokens)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of texts that are cut
            wanted = graph(**inputs)
        found = session.run(graph.outputs, {name: tensor.numpy() for name, tensor in inputs.items()})
        for name, mine, theirs in zip(graph.outputs, wanted, found):
            difference = (mine - torch.from_numpy(theirs)).abs().max().item()
            if not difference <= TOLERANCE:
                sizes = {key: tuple(tensor.shape) for key, tensor in inputs.items()}
                raise RuntimeError(
                    f'{name} of the exported graph differ by {difference:.1e} from the model at {sizes}; more than '
                    f'{TOLERANCE:g}. Nothing was written'
                )
            worst = max(worst, difference)
    return worst


def _remainder(self, other):
    """`integers % number`, where the number may be a size that is not known yet; onnxscript's wants it known."""
    from onnxscript import opset18 as op

    return op.Mod(self, op.CastLike(other, self))


def _name_sizes(model) -> None:
    """Give the free sizes of inputs and outputs names that can be read."""
    for value in [*model.graph.input, *model.graph.output]:
        names = SIZES.get(value.name) or SIZES['wavs' if value.name == 'audio_latents' else 'texts'][:1]
        for dim, name in zip(value.type.tensor_type.shape.dim, names):
            dim.dim_param = name


def _limit(model, name: str, operator: str, limit: int) -> None:
    """Cut an input of a graph at `limit` along its second axis (Slice), or its values at `limit` (Min).

    The exporter follows the branch that its example takes, one that needs no cut.
    """
    from onnx import helper, numpy_helper

    if name not in [it.name for it in model.graph.input]:
        return
    for node in model.graph.node:
        node.input[:] = [f'{name}_cut' if it == name else it for it in node.input]
    numbers = dict(starts=[0], ends=[limit], axes=[1]) if operator == 'Slice' else dict(limit=[limit])
    for key, value in numbers.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.int64), f'{name}_{key}'))
    inputs = [name, *(f'{name}_{key}' for key in numbers)]
    model.graph.node.insert(0, helper.make_node(operator, inputs, [f'{name}_cut'], name=f'{name}_limit'))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's talk of its own insides."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'onnxscript', 'onnx_ir', 'torch.export')]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)
