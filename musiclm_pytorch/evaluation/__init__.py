"""Measuring generated music: quality, fit to the text, structure, memorisation. Names are imported on first use."""

from importlib import import_module

_HOME_OF = {
    'CLAPEmbedder': 'embedders',
    'EnCodecEmbedder': 'embedders',
    'Figure': 'figures',
    'FrameReservoir': 'kernel',
    'GaussianStatistics': 'frechet',
    'MuLaNEmbedder': 'embedders',
    'MusicLMEvaluator': 'evaluator',
    'PaSSTTagger': 'tagging',
    'StructureTruth': 'structure_scores',
    'ThinnedStatistics': 'frechet',
    'VGGishEmbedder': 'embedders',
    'ZeroShotTagger': 'tagging',
    'alignment_figures': 'alignment',
    'compare_reports': 'compare',
    'compare_structure': 'structure_scores',
    'embed_clips': 'embedding',
    'frechet_audio_distance': 'frechet',
    'frechet_distance': 'frechet',
    'frechet_infinity': 'frechet',
    'kernel_audio_distance': 'kernel',
    'kl_figures': 'tagging',
    'load_mulan': 'evaluator',
    'memorisation': 'memory',
    'read_magnatagatune': 'magnatagatune',
    'score_structure': 'structure_scores',
    'signal_quality': 'quality',
    'structure_of': 'structure',
    'tagging_figures': 'areas',
    'tagging_of_files': 'areas',
    'training_clips': 'memory',
    'write_report': 'report',
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{_HOME_OF[name]}'), name)
    globals()[name] = value  # over a submodule of the same name, too
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
