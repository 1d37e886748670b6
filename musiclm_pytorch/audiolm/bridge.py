"""The one place that imports audiolm-pytorch, and undoes what that import does to the rest of the program.

Importing audiolm_pytorch replaces `warnings.warn` by a function that does nothing and sets the root logger and
transformers' logger to ERROR. And its three transformers ask the Hugging Face Hub for the configuration of a T5
when they are built, even where the width of their conditioning is given. Its folder reader and its trainers read and
write sound with torchaudio, which needs torchcodec and FFmpeg for that: here they use soundfile. Its transformers and
SoundStream forget what they were built with, or pickle it: from here on they keep their keywords, which `saving`
writes. Its names come from here instead:

    from musiclm_pytorch.audiolm.bridge import SemanticTransformer

Raises ImportError if audiolm-pytorch or a usable fairseq is missing.
"""

import _warnings
import functools
import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torchaudio
from torch import Tensor, nn

from musiclm_pytorch.data.audio import AudioFile

__all__ = [
    'AudioConditionerBase',
    'AudioLM',
    'AudioLMSoundStream',
    'CoarseTransformer',
    'CoarseTransformerTrainer',
    'CoarseTransformerWrapper',
    'EncodecWrapper',
    'FairseqVQWav2Vec',
    'FineTransformer',
    'FineTransformerTrainer',
    'FineTransformerWrapper',
    'HubertWithKmeans',
    'MusicLMSoundStream',
    'SemanticTransformer',
    'SemanticTransformerTrainer',
    'SemanticTransformerWrapper',
    'SoundStream',
    'SoundStreamTrainer',
]

CONFIG = 'built_with'  # where a module keeps its keywords
T5_NAME = 'google/t5-v1_1-base'

# The model's published configuration. audiolm-pytorch reads the width; the rest keeps the entry true for others.
T5_CONFIG = {
    'd_ff': 2048,
    'd_kv': 64,
    'd_model': 768,
    'feed_forward_proj': 'gated-gelu',
    'num_heads': 12,
    'num_layers': 12,
    'tie_word_embeddings': False,
    'vocab_size': 32128,
}


def _import_audiolm() -> ModuleType:
    _require_fairseq()
    try:
        with _side_effects_undone():
            import audiolm_pytorch
    except ModuleNotFoundError as error:
        if error.name != 'audiolm_pytorch':
            raise
        raise ImportError(
            'audiolm-pytorch is not installed, which generation is built on; install it with '
            '`pip install "audiolm-pytorch>=2.4,<3"`'
        ) from error
    return audiolm_pytorch


def _require_fairseq() -> None:
    """audiolm-pytorch imports fairseq, whose own error messages say nothing of what to do."""
    try:
        import fairseq

        fairseq.checkpoint_utils.load_model_ensemble_and_task  # noqa: B018 - what audiolm-pytorch calls
    except Exception as error:  # the genuine fairseq fails in many ways, on Python 3.11 with a ValueError
        raise ImportError(
            f'audiolm-pytorch needs fairseq, and there is none that works here ({type(error).__name__}: {error}). '
            f'Install the stand-in that comes with the source of musiclm-pytorch: `pip uninstall fairseq`, then '
            f'`pip install ./compat/fairseq` at the root of its repository'
        ) from error


@contextmanager
def _side_effects_undone() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    warn, level, verbosity = warnings.warn, logging.root.level, transformers_logging.get_verbosity()

    # The program imported audiolm_pytorch before us. What was there before that is not recorded anywhere, so what
    # still is as audiolm_pytorch leaves it goes back to Python's and transformers' defaults.
    if getattr(warn, '__module__', None) == 'audiolm_pytorch.hubert_kmeans':
        warn = _warnings.warn
        level = logging.WARNING if level == logging.ERROR else level
        if verbosity == logging.ERROR:
            levels = transformers_logging.get_log_levels_dict()
            verbosity = levels.get(os.environ.get('TRANSFORMERS_VERBOSITY'), logging.WARNING)

    try:
        yield
    finally:
        warnings.warn = warn
        logging.root.setLevel(level)
        transformers_logging.set_verbosity(verbosity)


def _register_t5_config(t5: ModuleType) -> None:
    """Makes the width of the default T5 known. Its weights are still fetched when text is encoded with it."""
    from transformers import T5Config

    t5.T5_CONFIGS.setdefault(T5_NAME, {}).setdefault('config', T5Config(**T5_CONFIG))


class _SoundFiles:
    """torchaudio, except that files are read and written by soundfile."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torchaudio, name)

    @staticmethod
    def load(path: str | Path) -> tuple[Tensor, int]:
        """`(channels, samples)` float32 in [-1, 1], and the rate in Hz."""
        with AudioFile(path) as file:
            return file.read_channels(0, len(file)), file.sample_rate

    @staticmethod
    def save(path: str | Path, wave: Tensor, sample_rate: int) -> None:
        """Write `(channels, samples)`."""
        import soundfile

        soundfile.write(str(path), wave.detach().cpu().float().T.numpy(), sample_rate)


def _keep_keywords(cls: type) -> None:
    """Let instances of a class carry the plain keywords that they are built with."""
    init = cls.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self) is cls and not hasattr(self, CONFIG):
            given = dict(list(signature.bind(self, *args, **kwargs).arguments.items())[1:])
            given |= given.pop('kwargs', {})
            setattr(self, CONFIG, given)

    cls.__init__ = wrapper


_audiolm = _import_audiolm()
_register_t5_config(_audiolm.t5)
for _module in (_audiolm.data, _audiolm.trainer, _audiolm.audiolm_pytorch):
    _module.torchaudio = _SoundFiles()
for _name in ('SemanticTransformer', 'CoarseTransformer', 'FineTransformer', 'SoundStream'):
    _keep_keywords(getattr(_audiolm, _name))

AudioConditionerBase = _audiolm.utils.AudioConditionerBase
AudioLM = _audiolm.AudioLM

SemanticTransformer = _audiolm.SemanticTransformer
CoarseTransformer = _audiolm.CoarseTransformer
FineTransformer = _audiolm.FineTransformer

SemanticTransformerWrapper = _audiolm.SemanticTransformerWrapper
CoarseTransformerWrapper = _audiolm.CoarseTransformerWrapper
FineTransformerWrapper = _audiolm.FineTransformerWrapper

SoundStream = _audiolm.SoundStream
AudioLMSoundStream = _audiolm.AudioLMSoundStream
MusicLMSoundStream = _audiolm.MusicLMSoundStream
EncodecWrapper = _audiolm.EncodecWrapper

HubertWithKmeans = _audiolm.HubertWithKmeans
FairseqVQWav2Vec = _audiolm.FairseqVQWav2Vec

SoundStreamTrainer = _audiolm.SoundStreamTrainer
SemanticTransformerTrainer = _audiolm.SemanticTransformerTrainer
CoarseTransformerTrainer = _audiolm.CoarseTransformerTrainer
FineTransformerTrainer = _audiolm.FineTransformerTrainer


def conditioning_dim(stage: nn.Module) -> int:
    """Width of the conditioning that a stage of audiolm-pytorch was built for."""
    projection = stage.proj_text_embed
    return projection.in_features if isinstance(projection, nn.Linear) else stage.transformer.dim_context
