"""How fast a MuLaN embeds on this machine, and in how much memory."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musiclm_pytorch.checks import check_not_negative, check_positive, typechecked
from musiclm_pytorch.inference.config import InferenceConfig
from musiclm_pytorch.inference.optimize import OptimizedMuLaN
from musiclm_pytorch.mulan.model import MuLaN

SAMPLE_RATE = 16000  # of a model that does not know its own


@typechecked
def benchmark_inference_speed(
    model: MuLaN | OptimizedMuLaN,
    config: InferenceConfig | None = None,
    num_runs: int = 100,
    warmup_runs: int = 10,
    seconds: float = 1.0,
    tokens: int = 32,
) -> dict[str, Any]:
    """Time the embedding of waves and texts, as a config makes a model ready for it.

    A run embeds `config.batch_size` waves of noise and as many texts of random ids. The device is waited for before
    and after each run. Compiling happens in the warm-up; without one it is part of the first run.

    Args:
        model: a MuLaN, which is made ready by `config` (the model itself is not touched), or one that is ready.
        config: by default that of an `OptimizedMuLaN`, else `InferenceConfig()`; only with a MuLaN.
        num_runs, warmup_runs: how many runs are timed, and how many go before.
        seconds: length of a wave, at the model's rate or at 16 kHz where it does not know its own.
        tokens: length of a text, at most what the model reads.

    Returns:
        `average_time_ms`, `median_time_ms`, `p95_time_ms` (interpolated, as numpy does), `min_time_ms`,
        `max_time_ms` of a run; `samples_per_second`, pairs of a wave and a text by the average time;
        `peak_memory_mb`, in MiB, the most that was allocated on the GPU, or that the whole process held on a CPU,
        during the timed runs (where the system cannot tell that, since the process began); and what was timed:
        `num_runs`, `batch_size`, `audio_seconds`, `sample_rate`, `tokens`, `device`, `dtype`, `quantized`,
        `compiled`.

    Raises:
        ValueError: no runs, a config beside a model that is ready, a wave shorter than a patch.
    """
    check_positive(num_runs=num_runs, seconds=seconds, tokens=tokens)
    check_not_negative(warmup_runs=warmup_runs)
    if isinstance(model, MuLaN):
        model = OptimizedMuLaN(model, config)
    elif config is not None and config != model.config:
        raise ValueError('an OptimizedMuLaN has a config already; leave out config, or pass the MuLaN it was made from')
    if model.mulan.audio.accept_spec:
        raise ValueError('this MuLaN takes spectrograms, and waves are what is timed')

    batch, rate = model.config.batch_size, model.sample_rate or SAMPLE_RATE
    tokens = min(tokens, model.mulan.text.max_seq_len)
    generator = torch.Generator().manual_seed(0)
    wavs = 0.1 * torch.randn(batch, round(seconds * rate), generator=generator)
    texts = torch.randint(model.mulan.text.num_tokens, (batch, tokens), generator=generator)
    wavs, texts = wavs.to(model.device), texts.to(model.device)

    def run() -> float:
        synchronize(model.device)
        start = time.perf_counter()
        model.get_audio_latents(wavs)
        model.get_text_latents(texts)
        synchronize(model.device)
        return time.perf_counter() - start

    for _ in range(warmup_runs):
        run()
    reset_peak_memory(model.device)
    times = [1000 * run() for _ in range(num_runs)]
    average = statistics.fmean(times)
    return dict(
        average_time_ms=average,
        median_time_ms=statistics.median(times),
        p95_time_ms=float(np.percentile(times, 95)),
        min_time_ms=min(times),
        max_time_ms=max(times),
        samples_per_second=1000 * batch / average,
        peak_memory_mb=peak_memory(model.device) / 2**20,
        num_runs=num_runs,
        batch_size=batch,
        audio_seconds=wavs.shape[1] / rate,
        sample_rate=rate,
        tokens=tokens,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix('torch.'),
        quantized=model.quantized,
        compiled=model.compiled,
    )


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from here on, where the system can do that."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    elif Path('/proc/self/clear_refs').exists():
        # without the permission, the peak is that since the process began, as the docstring says
        with contextlib.suppress(PermissionError):
            Path('/proc/self/clear_refs').write_text('5')


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or that this process held of a CPU's memory."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    status = Path('/proc/self/status')
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith('VmHWM:'):
                return int(line.split()[1]) * 1024
    # kilobytes, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
