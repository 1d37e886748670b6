"""Argument checks shared by every room. Imports nothing from the package."""

from __future__ import annotations

import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec

import numpy as np
import torch
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from torch import Tensor

P = ParamSpec('P')


class ArgumentTypeError(TypeError):
    """Of what beartype finds, without the numbers of the tensors and arrays that it shows."""

    NUMBERS = re.compile(r'"?\b(tensor|array)\([^()]*\)+"?')

    def __init__(self, message: str):
        super().__init__(self.NUMBERS.sub(r'<\1>', message))


# beartype raises its own exception class by default; users catch TypeError
typechecked = beartype(conf=BeartypeConf(violation_type=ArgumentTypeError, is_pep484_tower=True))


# YAML 1.1 takes 5e-4 for a string: it wants a dot before the exponent
NUMBER = re.compile(r'[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+')
CONF = BeartypeConf(is_pep484_tower=True)  # an int where a float is asked for


def keywords_of(target: Callable) -> dict[str, Any]:
    """Names and types of what a function or class can be called with, `*args` and `**keywords` left out."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [it for it in inspect.signature(target).parameters.values() if it.kind in named and it.name != 'self']
    told = {it.name: Any if it.annotation is inspect.Parameter.empty else it.annotation for it in parameters}
    return {name: hints.get(name, hint) for name, hint in told.items()}


def fitted(value: Any, hint: Any, where: str) -> Any:
    """A value as a type hint wants it. Raises TypeError that starts with `where`."""
    candidates = [value]
    if isinstance(value, list):
        candidates.append(tuple(value))
    if isinstance(value, str) and NUMBER.fullmatch(value):
        candidates.append(float(value))
    if isinstance(value, bool) and hint is not Any and bool not in (hint, *typing.get_args(hint)):
        candidates = []  # Python takes yes for the number 1
    for candidate in candidates:
        if is_bearable(candidate, hint, conf=CONF):
            return candidate
    raise TypeError(f'{where} must be {shown_hint(hint)}, got {shown(value)}')


def as_tuples(value: Any) -> Any:
    """What a file of JSON or YAML holds, with tuples for its lists."""
    if isinstance(value, dict):
        return {name: as_tuples(item) for name, item in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def shown_hint(hint: Any) -> str:
    """A type as people write it: `float | None`, but "bool or 'auto'"."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ' or '.join(map(repr, parts))
    if any(typing.get_origin(part) is typing.Literal for part in parts):
        return ' or '.join('None' if part is type(None) else shown_hint(part) for part in parts)
    told = hint.__name__ if inspect.isclass(hint) and not parts else str(hint)
    return told.replace('pathlib.', '').replace('typing.', '')


def shown(value: Any) -> str:
    return f'{value!r:.60} ({type(value).__name__})'


def records_config(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate `__init__`, so that the plain keywords a module was built with stand in `module.config`.

    Submodules among the arguments are left out: they carry a config of their own.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        init(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        (_, module), *arguments = bound.arguments.items()
        module.config = {}
        for name, value in arguments:
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                module.config |= value
            elif not isinstance(value, torch.nn.Module):
                module.config[name] = value

    return wrapper


def is_traced() -> bool:
    """Whether torch.compile, an exporter or torch.jit.trace records the code just now."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def values_can_be_checked() -> bool:
    """Whether tensor *values* may be looked at and decided upon: not in a recording, which must fit any values."""
    return not is_traced()


def check_positive(**values: float | None) -> None:
    """Raise ValueError unless each keyword is None or a finite number above zero."""
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f'{name} must be greater than 0, got {value}')


def check_not_negative(**values: float) -> None:
    """Raise ValueError unless each keyword is a number from zero on."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f'{name} must be at least 0, got {value}')


def check_choice(choices: Iterable[str], **values: str | None) -> None:
    """Raise ValueError unless each keyword is None or one of `choices`."""
    for name, value in values.items():
        if value is not None and value not in choices:
            raise ValueError(f'unknown {name} {value!r}; choose one of {", ".join(map(repr, choices))}')


def check_probability(**values: float) -> None:
    """Raise ValueError unless each keyword lies in [0, 1)."""
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f'{name} must lie in [0, 1), got {value}')


def check_device(device: str | torch.device) -> torch.device:
    """A device that is there. Raises ValueError for any other."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{str(device)!r} is no device; pass one such as 'cpu' or 'cuda'") from error
    if found.type == 'cuda' and (found.index or 0) >= torch.cuda.device_count():
        there = f'{torch.cuda.device_count()} CUDA devices' if torch.cuda.is_available() else 'no CUDA device'
        raise ValueError(f'device={str(device)!r}, but torch finds {there} here; pass another, or leave it out')
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:  # by the kind of device
        raise ValueError(f'device={str(device)!r} is not there, as far as torch knows; pass another') from error
    return found


def as_tensor(audio: Any, device: torch.device | None = None) -> Any:
    """A numpy array of numbers as a tensor on `device`, by default the CPU; anything else as it is, to be checked."""
    if not isinstance(audio, np.ndarray) or audio.dtype.kind not in 'fiubc':
        return audio
    # a copy: torch takes neither negative strides nor a foreign byte order, and warns of what is read-only
    return torch.from_numpy(np.array(audio, dtype=audio.dtype.newbyteorder('='), order='C')).to(device or 'cpu')


def described(value: Any) -> str:
    """What an error says of a value: of numbers in bulk how many, not which."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f'{type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}'
    return ArgumentTypeError.NUMBERS.sub(r'<\1>', repr(value))[:80]


def check_channels(wave: Tensor | np.ndarray, name: str) -> None:
    """Raise ValueError unless a wave is `(samples,)` or `(channels, samples)`, with fewer channels than samples."""
    if wave.ndim in (1, 2) and (wave.ndim == 1 or wave.shape[0] <= wave.shape[1]):
        return
    hint = ''
    if wave.ndim == 2:
        hint = f', which has more channels than samples; soundfile gives (samples, channels): pass {name}.T'
    raise ValueError(f'{name} must have shape (samples,) or (channels, samples), got {tuple(wave.shape)}{hint}')


def check_audio(audio: Any, *, ndim: int, shape: str, name: str = 'wavs', device: torch.device | None = None) -> Tensor:
    """Check rank, dtype and size of a batch of waves or spectrograms; a numpy array becomes a tensor on `device`.

    Raises TypeError for anything but floating-point numbers, ValueError for a wrong rank or an empty batch.
    """
    audio = as_tensor(audio, device)
    if not isinstance(audio, Tensor):
        raise TypeError(f'{name} must be a torch.Tensor of shape {shape}, got {type(audio).__name__}')
    if not audio.is_floating_point():
        hint = ''
        if name != 'spectrograms' and not audio.is_complex() and audio.dtype != torch.bool:
            hint = f', integer PCM; convert it to [-1, 1] first, for 16 bits: {name} / 32768'
        raise TypeError(f'{name} must be a floating-point tensor, got {audio.dtype}{hint}')
    if audio.ndim != ndim:
        hint = ''
        if ndim == 2 and audio.ndim == 1:
            hint = f'; for one wave pass {name}[None]'
        elif ndim == 2 and audio.ndim == 3:
            hint = f'; for (batch, channels, samples) mix down first: {name}.mean(dim=1)'
        raise ValueError(f'{name} must have shape {shape}, got {tuple(audio.shape)}{hint}')
    if ndim > 1 and audio.shape[0] == 0:
        raise ValueError(f'{name} is an empty batch of shape {tuple(audio.shape)}; pass at least one item')
    return audio


def is_finite(values: Tensor) -> bool:
    """Whether none is NaN or infinite."""
    # both come through a sum, which is one pass; a sum that overflowed by itself is looked at again
    return bool(torch.isfinite(values.sum()) or torch.isfinite(values).all())


def check_finite(values: Tensor, fault: str) -> None:
    """Raise ValueError, naming the first item of the batch that holds NaN or infinity in place of `{}` in `fault`."""
    if not values_can_be_checked() or is_finite(values):
        return
    finite = torch.isfinite(values).flatten(1).all(dim=-1)
    raise ValueError(fault.format(int((~finite).nonzero()[0])))


def check_sample_rate(sample_rate: Any) -> None:
    """Raise TypeError unless a sample rate is an int, ValueError unless it is above zero."""
    if not isinstance(sample_rate, int) or isinstance(sample_rate, bool):
        raise TypeError(f'sample_rate must be an integer in Hz, got {described(sample_rate)}')
    check_positive(sample_rate=sample_rate)


def check_lengths(
    lengths: Tensor | Sequence[int], *, batch: int, limit: int, unit: str, device: torch.device
) -> Tensor:
    """Turn `audio_lengths` into an int64 tensor `(batch,)` on `device`, each in [1, limit].

    Raises TypeError for non-integers, ValueError for a wrong shape or a length of 0 or beyond `limit`.
    """
    lengths = torch.as_tensor(lengths, device=device)
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.is_complex():
        raise TypeError(f'audio_lengths must be integers (a count of {unit}), got {lengths.dtype}')
    if lengths.shape != (batch,):
        raise ValueError(f'audio_lengths must have shape ({batch},), one length an item, got {tuple(lengths.shape)}')
    lengths = lengths.long()
    if values_can_be_checked() and not ((lengths >= 1) & (lengths <= limit)).all():
        bad = int(((lengths < 1) | (lengths > limit)).nonzero()[0])
        raise ValueError(
            f'audio_lengths[{bad}] is {int(lengths[bad])}, but must lie between 1 and the {limit} {unit} given'
        )
    return lengths
