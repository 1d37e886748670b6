"""The one place that imports audiolm-pytorch: its names, and its modules as ours, and back.

It is imported on first use of one of its names, which come from here:

    from musiclm_pytorch.audiolm.convert import SoundStream

Whoever imports it, once this file is loaded, finds it as follows.

Importing audiolm_pytorch replaces `warnings.warn` by a function that does nothing and sets the root logger and
transformers' logger to ERROR: that is undone. Its three transformers ask the Hugging Face Hub for the configuration of
a T5 when they are built, even where the width of their conditioning is given: it is there already. They encode texts by
`batch_encode_plus` of a tokenizer, which transformers 5 has no longer: it is a call of the tokenizer. Its folder reader
and its trainers read and write sound with torchaudio, which needs torchcodec and FFmpeg for that: they use soundfile.
Its SoundStream forgets what it was built with: it keeps its keywords, which `saving` writes. The annotations of its
wrappers and trainers, which beartype checks, admit no other conditioner, tokenizer and codec than its own: those of
ours that `passes_as` names are taken, too.

Raises ImportError if audiolm-pytorch or a usable fairseq is missing.
"""

from __future__ import annotations

import _warnings
import functools
import inspect
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from importlib import import_module, util
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from musiclm_pytorch.audiolm.protocols import Codec, Tokenizer
from musiclm_pytorch.audiolm.stages import STAGES, T5_NAME, StageTransformer
from musiclm_pytorch.mulan.checkpoint import plain_state
from musiclm_pytorch.mulan.lora import adapters_of

S = TypeVar('S', bound=StageTransformer)

NAME = 'audiolm_pytorch'
CONFIG = 'built_with'  # where a module of audiolm-pytorch keeps its keywords

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


def __getattr__(name: str) -> Any:
    if not name[0].isupper():  # what audiolm-pytorch has to offer are classes
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(audiolm_pytorch(), name)


def audiolm_pytorch() -> ModuleType:
    """The package, imported."""
    try:
        return import_module(NAME)
    except ModuleNotFoundError as error:
        if error.name != NAME:
            raise
        raise ImportError(
            'audiolm-pytorch is not installed, whose modules this takes; install it with '
            '`pip install "audiolm-pytorch>=2.4,<3"`'
        ) from error


def is_of(module: Any, *names: str) -> bool:
    """Whether something is of one of these classes of audiolm-pytorch, which is not imported to find out."""
    package = sys.modules.get(NAME)
    return package is not None and isinstance(module, tuple(getattr(package, name) for name in names))


# ---------------------------------------------------------------------------------------------------------------
# Modules of audiolm-pytorch as ours, and back


def own_stage(stage: nn.Module, kind: type[S] = StageTransformer) -> S:
    """A stage of audiolm-pytorch as ours, with the very same parameters: what trains or moves the one does so to the
    other. Ours come back as they are.

    Raises TypeError for anything but a stage of that kind, or one with a `forward` of its own, ValueError for one of
    audiolm-pytorch with adapters.
    """
    if isinstance(stage, kind):
        return stage
    if adapters_of(stage):
        raise ValueError(
            f'the adapters of this {type(stage).__name__} are on the module of audiolm-pytorch, whose weights ours '
            'would not find; merge_adapters makes them part of it, or put them on own_stage(stage)'
        )
    wanted = {name: it for name, it in STAGES.items() if issubclass(it, kind)}.values()
    for own in wanted:
        if is_of(stage, own.__name__):
            theirs = getattr(audiolm_pytorch(), own.__name__)
            if type(stage).forward is not theirs.forward:
                raise TypeError(f'{type(stage).__name__} has a forward of its own, which would not be called')
            state = random.getstate()
            with torch.device('meta'):
                found = own(**keywords_of(stage))
            random.setstate(state)
            for name, module in found.named_modules():
                given = stage.get_submodule(name)
                module.__dict__['_parameters'], module.__dict__['_buffers'] = given._parameters, given._buffers
                module.training = given.training
                if isinstance(given, nn.Dropout):
                    module.p = given.p
                elif hasattr(given, 'attn_dropout'):
                    module.dropout = given.attn_dropout.p
            return found
    names = ' or '.join(it.__name__ for it in wanted)
    raise TypeError(f'transformer must be a {names}, got a {type(stage).__name__}')


def keywords_of(stage: nn.Module) -> dict[str, Any]:
    """What a stage of audiolm-pytorch was built with, read off it."""
    network = stage.transformer
    attention, _, feed_forward = network.layers[0]
    projection = stage.proj_text_embed
    dim = len(network.norm.gamma)
    own = {
        name: getattr(stage, name)
        for name in ('num_semantic_tokens', 'codebook_size', 'num_coarse_quantizers', 'num_fine_quantizers', 'pad_id')
        if hasattr(stage, name)
    }
    if hasattr(stage, 'to_semantic_logits'):
        own['project_semantic_logits'] = stage.to_semantic_logits is not None
    if hasattr(stage, 'fine_logit_weights'):
        own['project_coarse_logits'] = stage.coarse_logit_weights is not None
    bias = stage.pos_bias_mlp if hasattr(stage, 'pos_bias_mlp') else network.rel_pos_bias
    keywords = dict(
        dim=dim,
        depth=len(network.layers),
        heads=attention.branch.heads,
        dim_head=attention.branch.to_kv.out_features // 2,
        attn_dropout=attention.branch.attn_dropout.p,
        ff_dropout=feed_forward.branch[4].p,
        has_condition=stage.has_condition,
        cond_dim=projection.in_features if isinstance(projection, nn.Linear) else dim,
        cond_as_self_attn_prefix=network.cond_as_self_attn_prefix,
        cond_drop_prob=stage.cond_drop_prob,
        grad_shrink_alpha=network.grad_shrink.keywords['alpha'],
        rel_pos_bias=bias is not None,
        flash_attn=attention.branch.attend.flash,
        num_residual_streams=getattr(attention, 'num_residual_streams', 1),
        add_value_residual=network.add_value_residual,
    )
    if attention.branch.num_null_kv:
        keywords['num_null_kv'] = attention.branch.num_null_kv
    if getattr(stage, 'reads_text', False):  # a note of our trainers, and of `audiolm_stage`
        keywords['reads_text'] = True
    return own | keywords


def audiolm_stage(stage: StageTransformer) -> nn.Module:
    """One of our stages as audiolm-pytorch's module of that name, with a copy of its weights, adapters merged.

    Raises ValueError for options that audiolm-pytorch does not have.
    """
    kind = getattr(audiolm_pytorch(), type(stage).__name__)
    # what audiolm-pytorch does not know is left out where it is not used
    ours = [('reads_text', stage.config.get('reads_text')), ('semantic_per_frame', None)]
    keywords = {name: it for name, it in stage.config.items() if (name, it) not in ours}
    try:
        theirs = kind(**keywords)
    except (TypeError, AssertionError) as error:
        raise ValueError(f'audiolm-pytorch builds no {kind.__name__} of {keywords}: {error}') from error
    theirs.load_state_dict(plain_state(stage))
    theirs.reads_text = stage.reads_text
    return theirs.to(stage.device).train(stage.training)


class AudioLMPart(nn.Module):
    """What is called like a codec or tokenizer of audiolm-pytorch, by the names of the protocols."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    @property
    def sample_rate(self) -> int:
        return int(self.module.target_sample_hz)

    @property
    def frame_rate(self) -> Fraction:
        return Fraction(self.sample_rate, int(self.module.downsample_factor))


class AudioLMCodec(AudioLMPart):
    """A `SoundStream`, an `EncodecWrapper`, or what is called like them, as a `Codec`."""

    @property
    def num_quantizers(self) -> int:
        return int(self.module.num_quantizers * self.module.rq_groups)

    @property
    def codebook_size(self) -> int:
        size = getattr(self.module, 'codebook_size', None)
        return int(size or self.module.rq.codebook_size)  # EncodecWrapper has the latter

    def encode(self, waves: Tensor) -> Tensor:
        return self.module(waves, return_encoded=True)[1]

    def decode(self, codes: Tensor) -> Tensor:
        # an EncodecWrapper takes the waves of a batch for parts of one, and adds them up
        parts = codes.split(1) if is_of(self.module, 'EncodecWrapper') else [codes]
        return rearrange(torch.cat([self.module.decode_from_codebook_indices(it) for it in parts]), 'b 1 n -> b n')


class AudioLMTokenizer(AudioLMPart):
    """A `HubertWithKmeans`, a `FairseqVQWav2Vec`, or what is called like them, as a `Tokenizer`."""

    @property
    def frame_rate(self) -> Fraction:
        return super().frame_rate * getattr(self.module, 'groups', 1)

    @property
    def codebook_size(self) -> int:
        return int(self.module.codebook_size)

    def encode(self, waves: Tensor) -> Tensor:
        ids = self.module(waves, flatten=False)
        if len(ids) != len(waves):
            raise ValueError(f'the tokenizer must give ids of shape (b, n), got {tuple(ids.shape)}')
        return rearrange(ids, 'b ... -> b (...)')


def own_codec(codec: Any) -> Codec:
    """A codec of audiolm-pytorch, or what is called like one, as a `Codec`. Raises TypeError for anything else."""
    return _own(codec, Codec, AudioLMCodec, ('target_sample_hz', 'downsample_factor', 'num_quantizers'))


def own_tokenizer(tokenizer: Any) -> Tokenizer:
    """The same for a semantic tokenizer, as a `Tokenizer`."""
    return _own(tokenizer, Tokenizer, AudioLMTokenizer, ('target_sample_hz', 'downsample_factor', 'codebook_size'))


def _own(module: Any, protocol: type, adapter: Callable[[nn.Module], Any], needed: tuple[str, ...]) -> Any:
    if isinstance(module, protocol):
        return module
    if missing := [name for name in needed if not hasattr(module, name)]:
        remedy = ''
        if hasattr(getattr(module, 'config', None), 'model_type'):
            ours = 'musiclm_pytorch.PretrainedCodec' if protocol is Codec else 'TransformersSemanticTokenizer'
            remedy = f'; {ours} makes one of a model of transformers'
        raise TypeError(
            f'a {type(module).__name__} is no {protocol.__name__}, and has no {" and no ".join(missing)} as one of '
            f'audiolm-pytorch has{remedy}'
        )
    return adapter(module)


def unwrapped(module: Any) -> Any:
    """What `own_codec` or `own_tokenizer` was given."""
    return module.module if isinstance(module, AudioLMPart) else module


# ---------------------------------------------------------------------------------------------------------------
# What its import is to find


_passing: list[tuple[type, str]] = []


def passes_as(name: str) -> Callable[[type], type]:
    """Decorate a class whose instances audiolm-pytorch is to take for those of its class `name`: when it is imported,
    that becomes a base, behind the others. What the class has of its own stays."""

    def decorate(cls: type) -> type:
        _passing.append((cls, name))
        if NAME in sys.modules:
            _add_base(cls, getattr(_classes(sys.modules[NAME]), name))
        return cls

    return decorate


def _add_base(cls: type, base: type) -> None:
    if not issubclass(cls, base):
        cls.__bases__ = (*(it for it in cls.__bases__ if it is not nn.Module), base)


def _classes(package: ModuleType) -> Any:
    package.AudioConditionerBase = package.utils.AudioConditionerBase
    return package


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
    if getattr(warn, '__module__', None) == f'{NAME}.hubert_kmeans':
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


class _SoundFiles:
    """torchaudio, except that files are read and written by soundfile."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module('torchaudio'), name)

    @staticmethod
    def load(path: str | Path) -> tuple[Tensor, int]:
        """`(channels, samples)` float32 in [-1, 1], and the rate in Hz."""
        from musiclm_pytorch.data.audio import AudioFile

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


def _tokenizer_of_t5(name: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    tokenizer.batch_encode_plus = tokenizer.__call__
    return tokenizer


def _adapt(package: ModuleType) -> None:
    from transformers import T5Config

    package.t5.T5_CONFIGS.setdefault(T5_NAME, {}).setdefault('config', T5Config(**T5_CONFIG))
    for module in (package.data, package.trainer, package.audiolm_pytorch):
        module.torchaudio = _SoundFiles()
    package.t5.get_tokenizer = _tokenizer_of_t5
    _keep_keywords(package.SoundStream)
    for cls, name in _passing:
        _add_base(cls, getattr(_classes(package), name))


class _Adapting(Loader):
    """The loader of audiolm-pytorch, with what comes before and after."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        _require_fairseq()
        with _side_effects_undone():
            self.loader.exec_module(module)
        _adapt(module)


class _Finder(MetaPathFinder):
    searching = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != NAME or self.searching:
            return None
        self.searching = True
        try:
            spec = util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Adapting(spec.loader)
        return spec


if NAME in sys.modules:
    with _side_effects_undone():
        _adapt(sys.modules[NAME])
else:
    sys.meta_path.insert(0, _Finder())
