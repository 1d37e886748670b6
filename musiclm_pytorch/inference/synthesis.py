"""Sound from a MuLaN alone: gradient ascent on its similarity with a text. It has no decoder to ask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_pytorch.audiolm.generation_args import Progress, counted_steps
from musiclm_pytorch.checks import check_finite, check_positive, typechecked
from musiclm_pytorch.mulan.model import MuLaN, evaluating

LEARNING_RATE = 0.1  # of Adam, on coefficients that begin as standard normal numbers
LOUDNESS = 0.2  # root mean square of a wave before it is bent into [-1, 1]
PIECE = 1_000_003  # between the seeds of two pieces of a sound
WINDOW_SECONDS, WINDOW_SAMPLES = 10.0, 160_000  # heard at once; the latter where the MuLaN knows no rate


@typechecked
def synthesise(
    mulan: MuLaN,
    texts: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    *,
    steps: int = 100,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress = False,
) -> list[Tensor]:
    """Sounds that the MuLaN finds near to texts, each of a shape of its own.

    What is sought is a wave's spectrum, as in feature visualisation (distill.pub/2017/feature-visualization), which
    begins as pink noise; the wave has a fixed loudness. What MuLaN hears in it people need not hear.

    Args:
        mulan: of waves, or of spectrograms; left as it is.
        texts: what the sounds are to be like.
        shapes: `(…, samples)`, the same wave in each leading place; it is made in pieces of at most 10 s, and one that
            is too short for the audio tower is heard with silence behind it. For a MuLaN of spectrograms the shape of
            one of them, as its audio tower takes it.
        steps: of Adam.
        seed: the same sounds again; what a text gives does not depend on those beside it, up to rounding.
        batch_size: pieces worked on at a time.
        progress: a bar, or a function of (steps, steps in all).

    Returns:
        a tensor a text, float32 on the CPU; waves lie in [-1, 1], spectrograms are not bounded.

    Raises:
        ValueError: not one shape a text; a spectrogram smaller than a patch.
    """
    check_positive(steps=steps, batch_size=batch_size)
    if len(texts) != len(shapes) or not texts:
        raise ValueError(f'got {len(texts)} texts and {len(shapes)} shapes; pass one or more, one shape a text')
    if mulan.audio.accept_spec:
        for shape in shapes:
            check_spectrogram(mulan, shape)
        parts = [[tuple(shape)] for shape in shapes]
    else:
        parts = [[(length,) for length in piece_lengths(mulan, shape[-1])] for shape in shapes]

    # pieces of one shape are worked on together; the place of a piece is its text and its number within that
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
    for text, own in enumerate(parts):
        for number, shape in enumerate(own):
            groups[shape].append((text, number))
    batches = [
        (shape, places[start : start + batch_size])
        for shape, places in groups.items()
        for start in range(0, len(places), batch_size)
    ]
    found: dict[tuple[int, int], Tensor] = {}
    with evaluating(mulan), counted_steps(progress, 'sound by gradient ascent', steps * len(batches)) as advance:
        with torch.no_grad():
            targets = torch.cat([mulan.get_text_latents(raw_texts=[text]) for text in texts])
        for shape, places in batches:
            seeds = [(seed + text + PIECE * number) % 2**32 for text, number in places]
            sounds = ascend(
                mulan,
                targets[[text for text, _ in places]],
                shape,
                seeds,
                steps=steps,
                advance=advance,
            )
            found |= zip(places, sounds)
    if mulan.audio.accept_spec:
        return [found[text, 0] for text in range(len(texts))]
    waves = [torch.cat([found[text, number] for number in range(len(own))]) for text, own in enumerate(parts)]
    return [wave.expand(tuple(shape)).clone() for wave, shape in zip(waves, shapes)]


def ascend(
    mulan: MuLaN,
    targets: Tensor,
    shape: tuple[int, ...],
    seeds: Sequence[int],
    *,
    steps: int,
    advance: Callable[[int], None],
) -> Tensor:
    """Sounds `(b, *shape)` on the CPU, each nearer to its row of `targets` `(b, dim_latent)` with every step.

    Raises ValueError when the similarity is NaN or infinite, as with a model whose weights are.
    """
    is_wave = not mulan.audio.accept_spec
    sought_shape = (shape[0] // 2 + 1, 2) if is_wave else shape
    rows = [
        torch.randn(sought_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) for seed in seeds
    ]
    sought = torch.stack(rows).to(mulan.device).requires_grad_()
    shortest = mulan.audio.min_samples

    optimizer = torch.optim.Adam([sought], lr=LEARNING_RATE)
    for _ in range(steps):
        heard = sought
        if is_wave:
            heard = wave_of(sought, shape[0])
            heard = F.pad(heard, (0, max(0, shortest - shape[0])))
        similarities = (mulan.get_audio_latents(heard) * targets).sum(dim=-1)
        check_finite(similarities[:, None], 'the similarity of sound {} with its text is NaN or infinite')
        # of the sought alone: the weights of the model keep the gradients that they have
        (sought.grad,) = torch.autograd.grad(-similarities.sum(), [sought])
        optimizer.step()
        advance(1)
    with torch.no_grad():
        return (wave_of(sought, shape[0]) if is_wave else sought).detach().float().cpu()


def wave_of(spectrum: Tensor, samples: int) -> Tensor:
    """Waves `(b, samples)` in [-1, 1] of coefficients `(b, samples // 2 + 1, 2)`, pink where those are white."""
    frequencies = torch.arange(spectrum.shape[1], device=spectrum.device).clamp(min=1).float()
    # without what is constant, which is not heard and would take up the loudness; a single sample has nothing else
    scale = frequencies.rsqrt() if samples == 1 else F.pad(frequencies[1:].rsqrt(), (1, 0))
    wave = torch.fft.irfft(torch.view_as_complex(spectrum) * scale, n=samples)
    loudness = wave.square().mean(dim=-1, keepdim=True).clamp(min=1e-12).sqrt()
    return torch.tanh(LOUDNESS * wave / loudness)


def piece_lengths(mulan: MuLaN, samples: int) -> list[int]:
    """Lengths of the pieces that a wave is made in: as few as may be, and as equal as may be."""
    rate = mulan.sample_rate
    window = WINDOW_SAMPLES if rate is None else round(WINDOW_SECONDS * rate)
    window = min(window, mulan.audio.max_audio_length or window)
    count = -(-samples // window)
    return [samples * (i + 1) // count - samples * i // count for i in range(count)]


def check_spectrogram(mulan: MuLaN, shape: tuple[int, ...]) -> None:
    bins, frames = mulan.audio.patch_size
    wanted, least = ('(frames, bins)', (frames, bins)) if mulan.audio.accept_spec_time_first else (
        '(bins, frames)',
        (bins, frames),
    )  # fmt: skip
    if len(shape) != 2 or shape[0] < least[0] or shape[1] < least[1]:
        raise ValueError(f'this MuLaN takes spectrograms {wanted} of at least {least}, got the shape {tuple(shape)}')
