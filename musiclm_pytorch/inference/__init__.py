"""MuLaN and MusicLM at work: optimised, in batches, searched, exported, packaged, served. Imported on first use."""

from musiclm_pytorch.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        'BatchInferenceEngine': 'engine',
        'DeploymentPackager': 'packaging',
        'EmbeddedFiles': 'engine',
        'InferenceConfig': 'config',
        'Match': 'search',
        'MuLaNIndex': 'search',
        'ONNXExporter': 'onnx',
        'OptimizedMuLaN': 'optimize',
        'ServiceConfig': 'service.config',
        'benchmark_inference_speed': 'benchmark',
        'create_app': 'app',
        'create_service': 'service.config',
        'launch_app': 'app',
        'synthesise': 'synthesis',
    },
)
