"""What half precision, 8-bit integers, compiled code and ONNX Runtime bring: time, memory and likeness to float32.

Each combination runs in a process of its own, its runs in turn with those of the plain model (float32, eager, in
eval mode), so that whatever else the machine does slows both. The times are medians, `times plain` is the median of
the ratios of neighbours. Memory is the largest resident set while the combination runs, without the plain model.

    python benchmarks/inference.py                           # every combination, 3 s x 4, the contract's model
    python benchmarks/inference.py --only bf16 auto --seconds 10

What is timed is the embedding of `--batch` waves; the cosine is the smallest of all waves and texts. Needs
`pip install '.[inference]'`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import add_out, write_results  # beside this file

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_RATE = 16000
TOWER = dict(dim=512, depth=6, heads=8, dim_head=64)

HALF, INT8, COMPILED = dict(use_mixed_precision=True), dict(use_quantization=True), dict(compile_model=True)
COMBINATIONS = {
    'plain': {},
    'bf16': HALF,
    'fp16': dict(**HALF, mixed_precision_dtype='fp16'),
    'int8': INT8,
    'compile': COMPILED,
    'bf16+int8': HALF | INT8,
    'bf16+compile': HALF | COMPILED,
    'int8+compile': INT8 | COMPILED,
    'bf16+int8+compile': HALF | INT8 | COMPILED,
    'bf16, memory_efficient': dict(**HALF, memory_efficient=True),
    'auto': dict(use_mixed_precision='auto', use_quantization='auto', compile_model='auto'),
}
ONNX = 'onnxruntime'


def build():
    import torch

    from musiclm_pytorch import AudioSpectrogramTransformer, MuLaN, TextTransformer

    torch.manual_seed(0)
    audio = AudioSpectrogramTransformer(**TOWER, spec_n_fft=128, spec_win_length=24, spec_aug_stretch_factor=0.8)
    return MuLaN(audio_transformer=audio, text_transformer=TextTransformer(**TOWER)).eval()


def exported(mulan, folder: str, threads: int):
    """Functions from waves and from ids to latents, through ONNX Runtime; a file for each tower."""
    import onnxruntime
    import torch

    from musiclm_pytorch.inference.onnx import ONNXExporter

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads

    def embed(tower: str, name: str):
        path = ONNXExporter().export_mulan_to_onnx(mulan, Path(folder) / f'{tower}.onnx', towers=[tower])
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        return lambda values: torch.from_numpy(session.run(None, {name: values.cpu().numpy()})[0])

    return embed('audio', 'wavs'), embed('text', 'texts')


def measure(name: str, args: argparse.Namespace) -> dict:
    import torch
    import torch.nn.functional as F

    from musiclm_pytorch.inference.benchmark import peak_memory, reset_peak_memory, synchronize
    from musiclm_pytorch.inference.config import InferenceConfig
    from musiclm_pytorch.inference.optimize import OptimizedMuLaN

    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(1)
    wavs = 0.1 * torch.randn(args.batch, int(args.seconds * SAMPLE_RATE), generator=generator).to(device)
    texts = torch.randint(1, 20000, (args.batch, 64), generator=generator).to(device)

    mulan, folder = build().to(device), tempfile.TemporaryDirectory()
    with torch.no_grad():
        wanted = mulan.get_audio_latents(wavs), mulan.get_text_latents(texts)
    if name == ONNX:
        audio, text = exported(mulan, folder.name, torch.get_num_threads())
        chosen = 'float32'
    else:
        keywords = {'use_mixed_precision': False, 'batch_size': args.batch, 'device': args.device}
        optimized = OptimizedMuLaN(mulan, InferenceConfig(**(keywords | COMBINATIONS[name])))
        audio, text = optimized.get_audio_latents, optimized.get_text_latents
        chosen = str(optimized.dtype).removeprefix('torch.')
        chosen += ' int8' * optimized.quantized + ' compiled' * optimized.compiled
    del mulan
    gc.collect()

    def timed(embed) -> float:
        synchronize(device)
        start = time.perf_counter()
        embed(wavs)
        synchronize(device)
        return time.perf_counter() - start

    first = timed(audio)
    found = audio(wavs), text(texts)
    reset_peak_memory(device)
    timed(audio)
    memory = peak_memory(device) / 2**20
    cosine = min(F.cosine_similarity(mine.to(device), theirs).min().item() for mine, theirs in zip(found, wanted))

    plain = build().to(device)
    with torch.no_grad():
        timed(plain.get_audio_latents)
        pairs = [(timed(plain.get_audio_latents), timed(audio)) for _ in range(args.rounds)]
    folder.cleanup()
    return dict(
        name=name,
        chosen=chosen,
        seconds=statistics.median(mine for _, mine in pairs),
        plain_seconds=statistics.median(plain for plain, _ in pairs),
        times_plain=statistics.median(plain / mine for plain, mine in pairs),
        first_call_seconds=first,
        peak_mb=memory,
        cosine=cosine,
    )


def main(args: argparse.Namespace) -> None:
    rows = []
    print('| combination | computed in | s | plain s | times plain | first call, s | memory, MB | cosine |')
    print('|---|---|---|---|---|---|---|---|')
    for name in args.only or [*COMBINATIONS, ONNX]:
        command = [sys.executable, str(Path(__file__).resolve()), '--worker', name, '--device', args.device]
        for key in ('seconds', 'batch', 'rounds'):
            command += [f'--{key}', str(getattr(args, key))]
        paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
        environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(paths)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f'{name}:\n{done.stderr[-3000:]}')
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f'| {name} | {row["chosen"]} | {row["seconds"]:.2f} | {row["plain_seconds"]:.2f} '
            f'| {row["times_plain"]:.2f} | {row["first_call_seconds"]:.1f} | {row["peak_mb"]:.0f} '
            f'| {row["cosine"]:.6f} |',
            flush=True,
        )
    report = dict(
        device=args.device,
        seconds=args.seconds,
        batch=args.batch,
        rounds=args.rounds,
        combinations=rows,
    )
    write_results(args.out, report)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=[*COMBINATIONS, ONNX], help='which combinations (default: all)')
    parser.add_argument('--seconds', type=float, default=3.0, help='length of a wave (default 3)')
    parser.add_argument('--batch', type=int, default=4, help='waves embedded at once (default 4)')
    parser.add_argument('--rounds', type=int, default=5, help='timed runs of each (default 5)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    add_out(parser, 'inference')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments)))
    else:
        main(arguments)
