"""MusicLM in PyTorch. Names are imported on first use, so that the package itself costs next to nothing."""

from importlib import import_module

from musiclm_pytorch.version import __version__

_HOMES = {
    'musiclm_pytorch.audiolm.crops': ['TokenCrops'],
    'musiclm_pytorch.audiolm.decoding': ['generate_coarse', 'generate_fine', 'generate_semantic'],
    'musiclm_pytorch.audiolm.sampling': ['Sampling'],
    'musiclm_pytorch.audiolm.semantic': ['SemanticTokenizer'],
    'musiclm_pytorch.audiolm.semantic_mulan': ['MuLaNSemanticTokenizer'],
    'musiclm_pytorch.audiolm.semantic_transformers': ['TransformersSemanticTokenizer'],
    'musiclm_pytorch.audiolm.spectral_codec': ['SpectralCodec'],
    'musiclm_pytorch.audiolm.stages': ['CoarseDecoder', 'FineDecoder', 'SemanticDecoder'],
    'musiclm_pytorch.audiolm.tokens': ['compute_tokens'],
    'musiclm_pytorch.data.attributes': ['MusicLabels'],
    'musiclm_pytorch.data.collate': ['collate_pairs'],
    'musiclm_pytorch.data.datasets': ['AudioTextDataset'],
    'musiclm_pytorch.data.shard_writer': ['write_shards'],
    'musiclm_pytorch.data.shards': ['ShardedAudioText'],
    'musiclm_pytorch.data.synthetic': ['SyntheticMusic'],
    'musiclm_pytorch.distributed.config': ['DistributedConfig', 'create_distributed_config'],
    'musiclm_pytorch.distributed.trainer': ['DistributedMuLaNTrainer', 'run_distributed_training'],
    'musiclm_pytorch.evaluation.evaluator': ['MusicLMEvaluator'],
    'musiclm_pytorch.inference.config': ['InferenceConfig'],
    'musiclm_pytorch.inference.engine': ['BatchInferenceEngine'],
    'musiclm_pytorch.inference.optimize': ['OptimizedMuLaN'],
    'musiclm_pytorch.inference.search': ['MuLaNIndex'],
    'musiclm_pytorch.mulan.audio_transformer': ['AudioSpectrogramTransformer'],
    'musiclm_pytorch.mulan.text_transformer': ['TextTransformer'],
    'musiclm_pytorch.mulan.contrastive': [
        'MultiLayerContrastiveLoss',
        'SigmoidContrastiveLearning',
        'SoftmaxContrastiveLearning',
    ],
    'musiclm_pytorch.mulan.model': ['MuLaN'],
    'musiclm_pytorch.musiclm': ['MusicLM'],
    'musiclm_pytorch.open_clip': ['MuLaNOpenCLIP', 'create_mulan_open_clip_model'],
    'musiclm_pytorch.quantizer': ['MuLaNEmbedQuantizer'],
    'musiclm_pytorch.trainer.codec': ['CodecTrainer'],
    'musiclm_pytorch.trainer.mulan': ['MuLaNTrainer'],
    'musiclm_pytorch.trainer.pipeline': ['train_musiclm'],
    'musiclm_pytorch.trainer.pipeline_recipe': ['MusicLMRecipe'],
    'musiclm_pytorch.trainer.stages': ['CoarseTrainer', 'FineTrainer', 'SemanticTrainer'],
    'musiclm_pytorch.mulan.recipes': [
        'create_optimized_audiospectrogram_transformer',
        'get_optimal_spectrogram_params',
    ],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ['__version__', *sorted(_HOME_OF)]


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
