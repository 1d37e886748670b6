"""MuLaN and MusicLM at work: optimised, in batches, searched, exported, packaged. Names are imported on first use."""

from importlib import import_module

_HOME_OF = {
    'BatchInferenceEngine': 'engine',
    'DeploymentPackager': 'packaging',
    'EmbeddedFiles': 'engine',
    'InferenceConfig': 'config',
    'Match': 'search',
    'MuLaNIndex': 'search',
    'ONNXExporter': 'onnx',
    'OptimizedMuLaN': 'optimize',
    'benchmark_inference_speed': 'benchmark',
    'synthesise': 'synthesis',
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{_HOME_OF[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
