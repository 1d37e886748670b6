"""A token of a semantic stage by what decodes here, and by what could: ONNX Runtime, and 8-bit weights of torchao.

    python benchmarks/steps.py --rows 1 4 8

One thread, stages of dim 512 and depth 6 with random weights, conditioned by 12 embeddings, 32 tokens after a prefill.
All ways take the same tokens in turns, several times, and the median of processor time a token is told, which other
work on the machine reaches through caches and memory alone. Logits are compared first: those of float32 have to agree,
of the others the difference over the spread of the logits is told.

The graph for ONNX is a step with its cache: token, place, position bias, conditioning and the keys and values of all
layers in, logits and these out. `onnx int8` is the same by onnxruntime's dynamic quantization.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from results import add_out, write_results  # beside this file
from torch import Tensor, nn

from musiclm_pytorch.audiolm.stages import SemanticTransformer
from musiclm_pytorch.audiolm.transformer import Cache, Linear
from musiclm_pytorch.kernels import plain_kernels

CODES, TOKENS, TOLERANCE = 1024, 32, 1e-4
SIZES = dict(dim=512, depth=6)
WAYS = ('float32', 'bfloat16', 'plain', 'torchao int8', 'onnx', 'onnx int8')

Step = Callable[[Tensor], Tensor]  # tokens (b,) to the logits (b, c) of the next ones


class StepGraph(nn.Module):
    """What is exported: a step at fixed shapes, each token beside all places."""

    def __init__(self, stage: SemanticTransformer):
        super().__init__()
        self.stage = stage

    def forward(self, token: Tensor, at: Tensor, bias: Tensor, *pairs: Tensor) -> tuple[Tensor, ...]:
        network, half = self.stage.transformer, len(pairs) // 2
        kept, cross = pairs[:half], pairs[half:]
        keys, values = [it.clone() for it in kept[::2]], [it.clone() for it in kept[1::2]]
        mixing = [[it.mixing() for it in layer] for layer in network.layers]
        given = [(keys[0][:, :0], keys[0][:, :0])]  # without learned keys
        cache = Cache(given, None, list(zip(cross[::2], cross[1::2])), None, mixing, keys, values, at=at)
        features = network.run(self.stage.embed_own(token[:, None]), bias, cache)[:, -1]
        return nn.functional.linear(features, *self.stage.own_heads()[0]), *(x for it in zip(keys, values) for x in it)


def prepared(stage: SemanticTransformer, conditioning: Tensor):
    return stage.prefill(torch.empty(len(conditioning), 0, dtype=torch.int64), max_tokens=TOKENS + 1,
                         conditioning=conditioning, total_tokens=10_000)  # fmt: skip


def by_stage(stage: SemanticTransformer, conditioning: Tensor) -> Callable[[], Step]:
    def begin() -> Step:
        state = prepared(stage, conditioning)

        def step(tokens: Tensor) -> Tensor:
            stage.decode_step(state, tokens)
            return stage.next_logits(state)

        return step

    return begin


def inputs_of(stage: SemanticTransformer, conditioning: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What a graph takes after the prefill, and the position bias of each place to all others."""
    with plain_kernels():
        state = prepared(stage, conditioning)
    cache, places = state.cache, state.cache.keys[0].shape[1]
    named = {}
    for index, (pair, cross) in enumerate(zip(zip(cache.keys, cache.values), cache.cross)):
        named |= {f'kept_{index}_{it}': tensor for it, tensor in enumerate(pair)}
        named |= {f'cross_{index}_{it}': tensor for it, tensor in enumerate(cross)}
    kept = {name: tensor.clone() for name, tensor in sorted(named.items(), reverse=True) if name.startswith('kept')}
    order = [f'{what}_{index}_{it}' for what in ('kept', 'cross') for index in range(SIZES['depth']) for it in (0, 1)]
    table = torch.zeros(places, len(state.bias.block(0, 1, num_keys=1)), places)
    for place in range(places):
        row = state.bias.row(place)[:, :places]
        table[place, :, : row.shape[1]] = row
    return {name: kept.get(name, named[name]) for name in order}, table


def by_onnx(path: Path, stage: SemanticTransformer, conditioning: Tensor) -> Callable[[], Step]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    pairs, table = inputs_of(stage, conditioning)
    value = onnxruntime.OrtValue.ortvalue_from_numpy

    def begin() -> Step:
        feeds = {name: value(tensor.numpy()) for name, tensor in pairs.items()}
        kept, at = [name for name in pairs if name.startswith('kept')], 0

        def step(tokens: Tensor) -> Tensor:
            nonlocal at
            at += 1  # the start token is there
            own = dict(token=tokens.numpy(), at=torch.tensor([at]).numpy(), bias=table[at][:, None].numpy())
            outputs = session.run_with_ort_values(None, feeds | {name: value(it) for name, it in own.items()})
            feeds.update(zip(kept, outputs[1:]))
            return torch.from_numpy(outputs[0].numpy())

        return step

    return begin


def export(stage: SemanticTransformer, conditioning: Tensor, folder: Path) -> dict[str, Path]:
    """The graph in float32 and quantized."""
    from onnxruntime.quantization import quantize_dynamic

    pairs, table = inputs_of(stage, conditioning)
    inputs = (torch.zeros(len(conditioning), dtype=torch.int64), torch.tensor([1]), table[1][:, None], *pairs.values())
    paths = {name: folder / f'{name.replace(" ", "_")}.onnx' for name in ('onnx', 'onnx int8')}
    with torch.no_grad(), warnings.catch_warnings(), plain_kernels():
        warnings.simplefilter('ignore')
        names = ['token', 'at', 'bias', *pairs]
        outputs = ['logits', *(f'new_{name}' for name in pairs if name.startswith('kept'))]
        exported = torch.onnx.export(
            StepGraph(stage), inputs, dynamo=True, verbose=False, input_names=names, output_names=outputs
        )
        exported.save(str(paths['onnx']))
    quantize_dynamic(paths['onnx'], paths['onnx int8'])
    return paths


@torch.inference_mode()
def run(step: Step, tokens: Tensor) -> Tensor:
    return torch.stack([step(it) for it in tokens])


def measure(rows: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    stage = SemanticTransformer(num_semantic_tokens=CODES, audio_text_condition=True, **SIZES).eval()
    conditioning, tokens = torch.randn(rows, 12, SIZES['dim']), torch.randint(CODES, (TOKENS, rows))
    ways: dict[str, Callable[[], Step]] = dict(float32=by_stage(stage, conditioning))
    if 'bfloat16' in options.ways:
        ways['bfloat16'] = by_stage(copy.deepcopy(stage).bfloat16(), conditioning)
    if 'plain' in options.ways:
        ways['plain'] = by_stage(stage, conditioning)
    if 'torchao int8' in options.ways:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        rounded = copy.deepcopy(stage)
        quantize_(rounded.transformer, Int8WeightOnlyConfig(), filter_fn=lambda it, _: isinstance(it, Linear))
        ways['torchao int8'] = by_stage(rounded, conditioning)
    with tempfile.TemporaryDirectory() as folder:
        if any(name.startswith('onnx') for name in options.ways):
            for name, path in export(stage, conditioning, Path(folder)).items():
                ways[name] = by_onnx(path, stage, conditioning)
        logits, times = {}, {name: [] for name in ways}
        for _ in range(options.rounds + 1):  # the first loads and compiles
            for name, begin in ways.items():
                with plain_kernels() if name == 'plain' else torch.no_grad():
                    step = begin()
                    start = time.process_time()
                    logits[name] = run(step, tokens).float()
                    times[name].append((time.process_time() - start) / TOKENS)
    found, spread = {}, logits['float32'].std()
    for name, own in times.items():
        difference = ((logits[name] - logits['float32']).abs().max() / spread).item()
        if name in ('plain', 'onnx') and difference > TOLERANCE:
            raise RuntimeError(f'the logits of {name} differ by {difference:.1e} of their spread')
        seconds = statistics.median(own[1:])
        found[name] = dict(milliseconds=1000 * seconds, tokens_per_second=rows / seconds, difference=difference)
        print(f'{rows} rows  {name:13}{1000 * seconds:7.2f} ms a step {rows / seconds:7.0f} tokens/s, {difference:.1e}')
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, nargs='+', default=[1, 4, 8])
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS)
    parser.add_argument('--rounds', type=int, default=5)
    add_out(parser, 'steps')
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_results(options.out, dict(rows={rows: measure(rows, options) for rows in options.rows}))


if __name__ == '__main__':
    main()
