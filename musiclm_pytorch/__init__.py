"""MusicLM in PyTorch. Names are imported on first use, so that the package itself costs next to nothing."""

from musiclm_pytorch.lazy import lazy_names
from musiclm_pytorch.version import __version__

_HOMES = {
    'audiolm.crops': ['TokenCrops'],
    'audiolm.decoding': ['generate_coarse', 'generate_fine', 'generate_semantic'],
    'audiolm.sampling': ['Sampling'],
    'audiolm.semantic': ['SemanticTokenizer'],
    'audiolm.semantic_mulan': ['MuLaNSemanticTokenizer'],
    'audiolm.semantic_transformers': ['TransformersSemanticTokenizer'],
    'audiolm.spectral_codec': ['SpectralCodec'],
    'audiolm.stages': ['CoarseDecoder', 'FineDecoder', 'SemanticDecoder'],
    'audiolm.tokens': ['compute_tokens'],
    'data.attributes': ['MusicLabels'],
    'data.collate': ['collate_pairs'],
    'data.datasets': ['AudioTextDataset'],
    'data.shard_writer': ['write_shards'],
    'data.shards': ['ShardedAudioText'],
    'data.scores.dataset': ['ScoreMusic'],
    'data.scores.labels': ['ScoreLabels'],
    'data.synthetic': ['SyntheticMusic'],
    'distributed.config': ['DistributedConfig', 'create_distributed_config'],
    'distributed.trainer': ['DistributedMuLaNTrainer', 'run_distributed_training'],
    'evaluation.evaluator': ['MusicLMEvaluator'],
    'inference.benchmark': ['benchmark_inference_speed'],
    'inference.config': ['InferenceConfig'],
    'inference.engine': ['BatchInferenceEngine'],
    'inference.onnx': ['ONNXExporter'],
    'inference.packaging': ['DeploymentPackager'],
    'inference.optimize': ['OptimizedMuLaN'],
    'inference.search': ['MuLaNIndex'],
    'mulan.audio_transformer': ['AudioSpectrogramTransformer'],
    'mulan.text_transformer': ['TextTransformer'],
    'mulan.contrastive': [
        'MultiLayerContrastiveLoss',
        'SigmoidContrastiveLearning',
        'SoftmaxContrastiveLearning',
    ],
    'mulan.model': ['MuLaN'],
    'mulan.vocabulary': ['PromptWarning'],
    'musiclm': ['MusicLM'],
    'open_clip': ['MuLaNOpenCLIP', 'create_mulan_open_clip_model'],
    'quantizer': ['MuLaNEmbedQuantizer'],
    'trainer.assembly': ['assemble_musiclm'],
    'trainer.codec': ['CodecTrainer'],
    'trainer.mulan': ['MuLaNTrainer'],
    'trainer.pipeline': ['train_musiclm'],
    'trainer.pipeline_recipe': ['MusicLMRecipe'],
    'trainer.stages': ['CoarseTrainer', 'FineTrainer', 'SemanticTrainer'],
    'waves': ['Music', 'Waves'],
    'mulan.recipes': [
        'create_optimized_audiospectrogram_transformer',
        'get_optimal_spectrogram_params',
    ],
}

__getattr__, __dir__, __all__ = lazy_names(__name__, {name: home for home, names in _HOMES.items() for name in names})
__all__ = ['__version__', *__all__]
