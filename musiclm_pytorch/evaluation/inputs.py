"""What an evaluation is given, in the forms that users have it: waves as a list of checked mono clips, and texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musiclm_pytorch.checks import as_tensor, check_audio, check_channels, check_lengths, described
from musiclm_pytorch.data.audio import AudioFile


def list_clips(
    audio: Any, audio_lengths: Any = None, *, name: str = 'generated_audio', lengths: str = 'audio_lengths'
) -> list[Tensor | Path]:
    """A batch or a list of waves or sound files as a list of `(samples,)` float32 waves and paths.

    Args:
        audio: `(b, samples)` or `(b, channels, samples)`; or a list of waves `(samples,)`, `(1, samples)` or
            `(channels, samples)`, and of paths. Waves are tensors or numpy arrays. Several channels are mixed down.
        audio_lengths: `(b,)` true lengths in samples: what lies beyond is padding, and is cut off. Files have none.
        name, lengths: how errors call them.

    Raises:
        TypeError: anything but floating-point waves and paths. ValueError: an empty list, an empty wave, another shape,
            NaN or infinity, a length of 0 or beyond the wave. FileNotFoundError: a path without a file.
    """
    audio = as_tensor(audio)
    if isinstance(audio, Tensor):
        if audio.ndim not in (2, 3):
            hint = f'; for one wave pass {name}[None]' if audio.ndim == 1 else ''
            raise ValueError(f'{name} must have shape (batch, samples), got {tuple(audio.shape)}{hint}')
        audio = list(audio)
    if isinstance(audio, str | Path) or not isinstance(audio, Sequence):
        raise TypeError(f'{name} must be a batch (batch, samples) or a list of waves, got {type(audio).__name__}')
    if len(audio) == 0:
        raise ValueError(f'{name} is empty; pass at least one clip')
    if audio_lengths is None:
        return [check_clip(it, f'{name}[{index}]') for index, it in enumerate(audio)]
    if not isinstance(audio_lengths, Sequence | Tensor):
        raise TypeError(f'{lengths} must be a list of lengths in samples, one a clip, got {described(audio_lengths)}')
    if len(audio_lengths) != len(audio):
        raise ValueError(f'got {len(audio_lengths)} {lengths} for {len(audio)} clips in {name}; pass one a clip')
    return [check_clip(it, f'{name}[{index}]', audio_lengths[index]) for index, it in enumerate(audio)]


def check_clip(clip: Any, name: str, length: Any = None) -> Tensor | Path:
    """One of `list_clips`, cut to its length."""
    if isinstance(clip, str | Path):
        if length is not None:
            raise ValueError(f'{name} is a file, which tells its own length; leave out audio_lengths')
        if not Path(clip).is_file():
            raise FileNotFoundError(f'{name}: no file at {clip}')
        return Path(clip)
    clip = as_tensor(clip)
    if not isinstance(clip, Tensor):
        raise TypeError(f'{name} must be a wave (samples,) or the path of a file, got {type(clip).__name__}')
    check_channels(clip, name)
    check_audio(clip, ndim=clip.ndim, shape='(samples,)', name=name)
    if clip.numel() == 0:
        raise ValueError(f'{name} has no samples')
    wave = clip.detach().float().cpu()
    wave = wave if wave.ndim == 1 else wave.mean(dim=0)
    if length is not None:
        try:
            (length,) = check_lengths([length], batch=1, limit=len(wave), unit='samples', device=wave.device).tolist()
        except (TypeError, ValueError) as error:
            raise type(error)(f'{name}: {error}') from error
        wave = wave[:length]
    check_wave(wave, name)
    return wave


def read_clip(clip: Tensor | Path, sample_rate: int) -> tuple[Tensor, int]:
    """The wave `(samples,)` of a clip and its rate in Hz: that of the file, or `sample_rate`."""
    if isinstance(clip, Tensor):
        return clip, sample_rate
    with AudioFile(clip) as file:
        wave, rate = file.read(0, len(file)), file.sample_rate
    if len(wave) == 0:
        raise ValueError(f'{clip} has no samples')
    check_wave(wave, str(clip))
    return wave, rate


def check_wave(wave: Tensor, name: str) -> None:
    wrong = ~torch.isfinite(wave)
    if wrong.any():
        raise ValueError(
            f'{name} holds NaN or infinity, first at sample {int(wrong.nonzero()[0])}; mend it or leave the clip out'
        )


def check_texts(texts: Any, clips: int) -> list[str]:
    """Texts as a list of `clips` strings that say something. Raises TypeError and ValueError."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(it, str) for it in texts):
        raise TypeError(f'texts must be a list of strings, one a clip, got {described(texts)}')
    if len(texts) != clips:
        raise ValueError(f'got {len(texts)} texts for {clips} generated clips; pass one text a clip')
    for index, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f'texts[{index}] is empty; every clip needs the text that it was made from')
    return list(texts)


def texts_by_file(content: Any, source: str) -> dict[str, str]:
    """The text of each file name in what a `prompts.json` holds.

    Args:
        content: for each file name its text; or an object that has it under `prompt`, beside what else made the piece,
            such as `seed`, `model`, `seconds` and `temperature`.
        source: what errors call it.

    Raises:
        ValueError: another form, naming the file it is wrong for.
    """
    if not isinstance(content, dict):
        raise ValueError(f'{source} must hold a text for each file name, got {content!r:.80}')
    texts = {name: it.get('prompt') if isinstance(it, dict) else it for name, it in content.items()}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(
                f'{source} must hold a text for {name}, or an object with the text under "prompt", for how well music '
                f'fits sounds and mixtures is not measured; got {content[name]!r:.80}'
            )
    return texts
