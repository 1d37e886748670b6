"""How models are made ready for inference: one frozen dataclass, checked when it is made, JSON both ways.

Nothing heavy is loaded with it, so that the command line can tell the options of `service.config`.
"""

from __future__ import annotations

import functools
import json
import re
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from musiclm_pytorch.trainer.config import nearest

if TYPE_CHECKING:
    import torch

Choice = bool | Literal['auto']
DEVICE = re.compile(r'auto|cpu|cuda(:\d+)?')
DTYPES = {'bf16': 'bfloat16', 'fp16': 'float16'}
OPSETS = range(18, 24)  # what torch's exporter writes and ONNX Runtime of today reads


def checked_fields(init: Callable) -> Callable:
    """The `__init__` of a dataclass that checks the types of fields, and whose TypeError for an unknown one tells which
    was probably meant."""

    @functools.wraps(init)
    def wrapper(self: Any, **values: Any) -> None:
        from musiclm_pytorch.checks import fitted

        hints = typing.get_type_hints(type(self))
        for name, value in values.items():
            if name not in hints:
                raise TypeError(f'{type(self).__name__} has no field {name!r}; {nearest(name, hints)}')
            fitted(value, hints[name], name)
        init(self, **values)

    return wrapper


@dataclass(frozen=True)
class InferenceConfig:
    """What to trade for speed and memory. Fields are given by name.

    Where a field may be 'auto', the choice is made by `OptimizedMuLaN`, which knows the model and the machine, and
    is one that was measured to be faster than the plain model on such a machine.

    On a CPU, half precision pays with instructions for bf16 alone, 8-bit integers save memory and no time, and 'auto'
    takes neither them nor compiled code. Narrow models (below 256) gain nothing. Nothing was measured on GPUs.
    `benchmarks/inference.py` measures every combination.

    Attributes:
        use_quantization: compute the products of the transformers in 8-bit integers (needs torchao); weights take a
            quarter of the memory.
        use_mixed_precision: compute the transformers in half precision; spectrogram, position bias, norms of
            latents and losses stay float32.
        mixed_precision_dtype: 'bf16', 'fp16', or 'auto': bf16 on a CPU and on GPUs that compute in it, else fp16.
        compile_model: compile the feed-forward layers by torch.compile, whose first calls take up to minutes.
        batch_size: the most items that are computed at a time; larger batches are computed in parts.
        memory_efficient: compute one item at a time: less memory, more time.
        device: 'cpu', 'cuda', 'cuda:1', …; 'auto' is CUDA where there is one.
        onnx_opset: version of the ONNX operators that `ONNXExporter` writes, 18 to 23.

    Raises:
        TypeError: an unknown field or a value of a wrong type. ValueError: a value that cannot be honoured.
    """

    use_quantization: Choice = False
    use_mixed_precision: Choice = 'auto'
    mixed_precision_dtype: str = 'auto'
    compile_model: Choice = False
    batch_size: int = 8
    memory_efficient: bool = False
    device: str = 'auto'
    onnx_opset: int = 18

    def __post_init__(self):
        from musiclm_pytorch.checks import check_positive

        check_positive(batch_size=self.batch_size)
        if self.mixed_precision_dtype not in ('auto', *DTYPES):
            raise ValueError(
                f"mixed_precision_dtype must be 'auto', 'bf16' or 'fp16', got {self.mixed_precision_dtype!r}"
            )
        if not DEVICE.fullmatch(self.device):
            raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:0' and so on, got {self.device!r}")
        if self.onnx_opset not in OPSETS:
            raise ValueError(f'onnx_opset must lie between {OPSETS[0]} and {OPSETS[-1]}, got {self.onnx_opset}')

    def torch_device(self) -> torch.device:
        """The device on this machine. Raises ValueError where it has none of that kind or number."""
        import torch

        from musiclm_pytorch.checks import check_device

        if self.device == 'auto':
            return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        return check_device(self.device)

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        """The half precision that mixed precision computes in on a device."""
        import torch

        from musiclm_pytorch.kernels.processor import half_precision

        chosen = self.mixed_precision_dtype
        return getattr(torch, DTYPES[half_precision(device.type) if chosen == 'auto' else chosen])

    # JSON

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The config as JSON text, which is also written to `path` if that is given."""
        text = json.dumps(self.to_dict(), indent=2) + '\n'
        if path is not None:
            from musiclm_pytorch.atomic import write_text

            write_text(path, text)
        return text

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InferenceConfig:
        """A config from field names and values; fields that are not named keep their defaults."""
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise TypeError(f'an InferenceConfig is made of names and values, got {values!r:.80}')
        return cls(**values)

    @classmethod
    def from_json(cls, source: str | Path) -> InferenceConfig:
        """A config from JSON text, or from the file at a path (a `Path`, or a string that is no JSON object).

        Raises FileNotFoundError for a missing file, ValueError for what is no JSON, and what the constructor raises.
        """
        from musiclm_pytorch.atomic import parsed_json

        is_text = isinstance(source, str) and source.lstrip().startswith('{')
        text = source if is_text else Path(source).read_text(encoding='utf-8')
        try:
            values = parsed_json(text)
        except ValueError as error:
            raise ValueError(f'{"the text" if is_text else source} is not JSON: {error}') from error
        return cls.from_dict(values)


InferenceConfig.__init__ = checked_fields(InferenceConfig.__init__)
