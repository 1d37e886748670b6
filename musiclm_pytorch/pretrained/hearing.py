"""Audio encoders of `transformers`: the part of a model that hears, what prepares its waves, and its frames."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from musiclm_pytorch.pretrained.hub import load_transformers, load_wave_encoder, read_settings


class Kind(NamedTuple):
    """How the part that hears is had of a model that does more, by its `model_type`."""

    model: str  # class of `transformers` that is that part
    unneeded: tuple[str, ...] = ()  # its weights that nothing reads


WHISPER = Kind(
    'WhisperForAudioClassification', ('projector.weight', 'projector.bias', 'classifier.weight', 'classifier.bias')
)
CLAP = Kind('ClapAudioModelWithProjection')
KINDS = dict(whisper=WHISPER, clap=CLAP, clap_audio_model=CLAP)


def load_hearing(source: str | Path, unneeded: Sequence[str] = ('masked_spec_embed',)) -> nn.Module:
    """The part of a model that hears, by folder or name on the Hub; errors and `unneeded` as of `load_transformers`."""
    settings = read_settings(source)
    kind = settings.get('model_type')
    if kind is None:
        raise ValueError(
            f'the config.json of {source} does not say which model it is (model_type); those that are read are models '
            f'of transformers with layers in encoder.layers, such as HuBERT and MERT, and {", ".join(KINDS)}'
        )
    if kind in KINDS:
        return hearing_part(load_transformers(source, KINDS[kind].model, unneeded=KINDS[kind].unneeded))
    return load_wave_encoder(source, settings, unneeded=unneeded)


def hearing_part(model: nn.Module) -> nn.Module:
    """The part of a Whisper or a CLAP that hears, of other models all."""
    kind = KINDS.get(getattr(getattr(model, 'config', None), 'model_type', None))
    if kind is None:
        return model
    import transformers

    is_part = isinstance(model, getattr(transformers, kind.model))
    if kind is CLAP:
        part = model if is_part else transformers.ClapAudioModelWithProjection(model.config.audio_config)
        part.audio_model, part.audio_projection = model.audio_model, model.audio_projection
        return part
    part = model if is_part else transformers.WhisperForAudioClassification(model.config)
    part.encoder, part.projector, part.classifier = model.get_encoder(), nn.Identity(), nn.Identity()
    return part


def padded_to(feature_extractor: Any) -> int | None:
    """Samples of the window that a feature extractor pads every wave to, of Whisper and CLAP."""
    return getattr(feature_extractor, 'nb_max_samples', getattr(feature_extractor, 'n_samples', None))


def extract(feature_extractor: Any, wavs: Sequence[np.ndarray]) -> Tensor:
    """Waves of one length, each `(samples,)`, to what the model takes."""
    keywords = dict(padding='pad') if hasattr(feature_extractor, 'nb_max_samples') else dict(pad_to_multiple_of=None)
    state = np.random.get_state()  # noqa: NPY002 - CLAP's draws an item of those with fusion
    prepared = feature_extractor(
        list(wavs), sampling_rate=feature_extractor.sampling_rate, return_tensors='pt', **keywords
    )
    np.random.set_state(state)  # noqa: NPY002
    # all waves are as long as each other: there is nothing to mask
    return prepared['input_features' if 'input_features' in prepared else 'input_values']


def framing_of(model: nn.Module, feature_extractor: Any, rate: int) -> tuple[int, int]:
    """Samples from one frame to the next, and samples that a frame needs."""
    if model.main_input_name == 'input_values':
        factor, receptive = 1, 1
        for kernel, stride in zip(model.config.conv_kernel, model.config.conv_stride):
            receptive += (kernel - 1) * factor
            factor *= stride
        return factor, receptive
    if feature_extractor is None:
        raise ValueError(f'a {type(model).__name__} takes no waves; it needs its feature_extractor')
    if (samples := padded_to(feature_extractor)) is not None:
        if model.config.model_type == 'whisper':
            frames = model.config.max_source_positions
        else:  # of the image that CLAP folds its spectrogram into
            encoder = model.audio_model.audio_encoder
            frames = encoder.freq_ratio * encoder.input_resolutions[-1][1]
        factor, rest = divmod(samples, frames)
        if rest:
            raise ValueError(f'{type(model).__name__} gives {frames} frames of {samples} samples, no whole number each')
        return factor, factor

    # frames are made by the feature extractor, and the model keeps them: measure their distance, and the shortest
    # wave that gives as many as a second does
    def frames(samples: int) -> int:
        return extract(feature_extractor, np.zeros((1, samples), dtype=np.float32)).shape[1]

    count = frames(rate)
    a_second = (frames(9 * rate) - count) // 8
    factor, rest = divmod(rate, a_second) if a_second else (0, 0)
    if not factor or rest:
        raise ValueError(f'{type(feature_extractor).__name__} gives no fixed number of frames a second')
    shortest = bisect.bisect_left(range(rate), count, lo=rate - 2 * factor, key=frames)
    return factor, shortest - (count - 1) * factor
