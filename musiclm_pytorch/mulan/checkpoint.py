"""MuLaN on disk: our folders, and the files that the trainer of musiclm-pytorch 0.2.8 wrote. Nothing in them is run."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from musiclm_pytorch.allocation import AllocationLimit
from musiclm_pytorch.atomic import (
    CHECKSUM,
    atomic_write,
    checked_json,
    checksum_of,
    parsed_json,
    read_checked_json,
    read_tensors,
    tensor_sizes,
    write_checked_json,
    write_tensors,
)
from musiclm_pytorch.checks import check_device, fitted, keywords_of
from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.int8 import dequantized, quantized
from musiclm_pytorch.mulan.pretrained_towers import PretrainedAudioTransformer, PretrainedTextTransformer
from musiclm_pytorch.mulan.text_transformer import TextTransformer, packed, unpacked
from musiclm_pytorch.pretrained import models_inside
from musiclm_pytorch.pretrained.hub import find_encoder, load_processor, save_encoder
from musiclm_pytorch.version import __version__

CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
PARTS, TRAINED = ('audio', 'text', 'mulan'), 'trained_tokens'  # of a MuLaN's config
PROCESSOR = '_processor'  # behind the name of a tower that others trained: what prepares its inputs
TOWERS = dict(
    audio=(AudioSpectrogramTransformer, PretrainedAudioTransformer), text=(TextTransformer, PretrainedTextTransformer)
)
PARAMETRIZED = '.parametrizations.weight.'
DOWN = f'{PARAMETRIZED}0.down'  # of an adapter
WEIGHTS = 'weights'  # where a config has the checksum of the weights beside it
WITHIN = 'within'  # where it has those of the configs in the folders within
MOST = 2**22  # sizes and rates in Hz are lower
VIOLATION = re.compile(r'parameter (\w+)=.* violates type hint (.+?), as ', re.DOTALL)

M = TypeVar('M', bound=nn.Module)


def save(mulan: nn.Module, folder: str | Path) -> None:
    """Write the config and weights of a MuLaN."""
    processors = {}
    for name, (own, pretrained) in TOWERS.items():
        tower = getattr(mulan, name)
        tower = getattr(tower, '_orig_mod', tower)
        if type(tower) is pretrained:
            # what prepares its inputs
            processors[f'{name}{PROCESSOR}'] = save_encoder(Path(folder), tower.processor, name=f'{name}{PROCESSOR}')
        elif type(tower) is not own:
            raise TypeError(
                f'a {type(tower).__name__} could not be rebuilt from its folder, only a plain {own.__name__} or a '
                f'{pretrained.__name__}; save its state_dict instead'
            )
    weights = plain_state(mulan)
    trained = mulan.text.trained_tokens
    told = processors | ({} if trained is None else {TRAINED: packed(trained)})
    write_folder(folder, config_of(mulan) | told, weights)


def plain_state(module: nn.Module, merged: bool = True) -> dict[str, Tensor]:
    """The state dict as it is without torch.compile and without adapters (`mulan.lora`), these merged or left out."""
    state = module.state_dict()
    adapted = {name.removesuffix(DOWN) for name in state if name.endswith(DOWN)}
    plain = {}
    for name, tensor in state.items():
        layer, inside, which = name.partition(PARAMETRIZED)
        if not inside or layer not in adapted:
            plain[name] = tensor
        elif which == 'original':
            plain[f'{layer}.weight'] = module.get_submodule(layer).weight if merged else tensor
    # torch.compile wraps a tower under this name
    return {name.replace('_orig_mod.', ''): tensor.detach() for name, tensor in plain.items()}


def write_folder(folder: str | Path, config: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """Write `config.json`, with this version and the checksum of the weights, and `model.safetensors`.

    Each is whole or not at all; interrupted between the two, the folder holds the model from before or the new one.

    Returns:
        the checksum of the weights.
    """
    folder = Path(folder)
    config = {'model': config['model'], 'version': __version__, **config}
    folder.mkdir(parents=True, exist_ok=True)
    # views of one storage, such as tied weights, are written as tensors of their own
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
    checksum = checksum_of(weights)
    _announce(folder / CONFIG_FILE, config, checksum)
    with atomic_write(folder / CONFIG_FILE) as aside:
        aside.write_text(checked_json({**config, WEIGHTS: [checksum]}), encoding='utf-8')
        write_tensors(folder / WEIGHTS_FILE, weights)
    return checksum


def _announce(path: Path, config: dict[str, Any], checksum: str) -> None:
    """Let the config of the same model that is to be written over know of the new weights beside the old ones."""
    try:
        before = read_checked_json(path)
        fresh = json.loads(json.dumps(config))
        if any(before.get(key) != it for key, it in fresh.items() if key not in ('step', 'version', TRAINED)):
            return
        write_checked_json(path, {**before, WEIGHTS: [*before[WEIGHTS], checksum]})
    except (FileNotFoundError, ValueError, KeyError, AttributeError):  # no config of today's is there
        return


def checksums_within(folder: str | Path, names: Iterable[str]) -> dict[str, str | None]:
    """What a config has under `within`, so that one folder of a model is not taken for that of another: the checksum
    of the config in each of the folders of these names. It has that of the weights in turn."""
    return {it: read_json_object(Path(folder) / it / CONFIG_FILE).get(CHECKSUM) for it in names}


def read_json_object(path: Path) -> dict[str, Any]:
    """An object as it stands in a file, empty where there is none."""
    try:
        content = parsed_json(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):  # whoever reads what belongs there tells more
        return {}
    return content if isinstance(content, dict) else {}


def store_as(folder: str | Path, dtype: torch.dtype, in_int8: Sequence[str] = ()) -> None:
    """Write the floating-point weights in a folder, and in the folders within, anew in another dtype.

    torch.int8 is for the matrices of the models `in_int8`, by the names in their configs; all else is float16 then.

    Raises ValueError for a weight that is too large for `dtype`, TypeError for one of other integers.
    """
    if not (dtype == torch.int8 or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise TypeError(f'weights are stored in a floating-point dtype such as torch.float16, or in int8, got {dtype}')
    # what lies deeper first: configs above have its checksum
    for path in sorted(Path(folder).rglob(WEIGHTS_FILE), key=lambda it: (-len(it.parts), it)):
        config = read_checked_json(path.with_name(CONFIG_FILE))
        if WEIGHTS not in config:  # an encoder that another library wrote, and reads
            continue
        weights, plain = read_tensors(path), torch.float16 if dtype == torch.int8 else dtype
        if dtype == torch.int8 and config['model'] in in_int8:
            stored = quantized(weights)
        else:
            stored = {name: it.to(plain) if it.is_floating_point() else it for name, it in weights.items()}
        for name, tensor in dequantized(stored).items():
            if not torch.equal(tensor.isfinite(), weights[name].isfinite()):
                raise ValueError(f'{name} in {path} holds {weights[name].abs().max():g}, too large for {plain}')
        if WITHIN in config:
            config[WITHIN] = checksums_within(path.parent, config[WITHIN])
        write_checked_json(path.with_name(CONFIG_FILE), {**config, WEIGHTS: [write_tensors(path, stored)]})


def config_of(mulan: nn.Module) -> dict[str, Any]:
    """What a MuLaN was built with."""
    return {
        'model': 'MuLaN',
        'version': __version__,
        'audio': mulan.audio.config,
        'text': mulan.text.config,
        'mulan': mulan.config,
    }


def load(
    cls: type[M],
    folder: str | Path,
    *,
    device: str | torch.device = 'cpu',
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> M:
    """Rebuild a MuLaN of class `cls` from its folder.

    Raises FileNotFoundError for a missing file, ValueError for a config or weights that do not belong together.
    """
    place = placing(device, dtype)
    config, weights = read_mulan(folder, verify)
    audio, text = (build_tower(config, name, verify) for name in TOWERS)
    mulan = config.build(cls, 'mulan', audio, text)
    load_strictly(mulan, weights, source=folder)
    mulan.text.trained_tokens = trained_tokens(config)
    return place(mulan.eval())


def build_tower(config: SavedConfig, name: str, verify: bool) -> nn.Module:
    """The tower `name` of a MuLaN, 'audio' or 'text', with weights still to come."""
    own, pretrained = TOWERS[name]
    key = f'{name}{PROCESSOR}'
    if key not in config.content:
        return config.build(own, name)
    kind = dict(audio='AutoFeatureExtractor', text='AutoTokenizer')[name]
    return config.build(pretrained.from_config, name, load_processor(find_encoder(config, verify, key), kind))


def read_mulan(folder: str | Path, verify: bool = True) -> tuple[SavedConfig, dict[str, Tensor]]:
    """Config and weights of a MuLaN."""
    optional = (TRAINED, *(f'{name}{PROCESSOR}' for name in TOWERS))
    return read_folder(folder, 'MuLaN', PARTS, optional=optional, verify=verify)


def trained_tokens(config: SavedConfig) -> Tensor | None:
    """The token ids that a MuLaN was trained on, `(num_tokens,)` bool; None where its config does not tell."""
    if (told := config.content.get(TRAINED)) is None:
        return None
    with config.refused(f'what stands under {TRAINED!r} are no tokens', told):
        return unpacked(told, config['text']['num_tokens'])


def placing(device: str | torch.device, dtype: torch.dtype | None) -> Callable[[M], M]:
    """What brings a model that was loaded to where `device` and `dtype` of every `from_pretrained` say.

    `dtype` is that of the weights; spectrograms, codecs of ours and k-means stay float32.

    Raises ValueError for a device that is not there, TypeError for what is no floating-point dtype.
    """
    found = check_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f'dtype must be a floating-point dtype such as torch.bfloat16, got {dtype!r}')
    return lambda module: module.to(device=found, dtype=dtype)


@contextmanager
def own_defaults() -> Iterator[None]:
    """In the block, modules are built in float32 on the CPU, whatever torch's defaults are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device('cpu'):
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class SavedConfig:
    """What a `config.json` holds, and how to build from it.

    Errors name the file, what stands there, and the versions. Whatever is built is no larger than the weights in the
    folder need: sizes that do not go with them are refused before anything is allocated.
    """

    path: Path
    content: dict[str, Any]

    def __getitem__(self, part: str) -> Any:
        return self.content[part]

    def build(self, kind: Callable[..., M], part: str, *arguments: Any) -> M:
        """`kind` with `arguments`, and the keywords that stand under `part`."""
        keywords, parameters = self.content[part], inspect.signature(kind).parameters
        if not isinstance(keywords, dict):
            raise ValueError(f'{self.path} must hold keywords under {part!r}, got {keywords!r:.80}')
        if not any(it.kind is it.VAR_KEYWORD for it in parameters.values()):
            self.check_known(keywords, parameters, part)
        with self.refused(f'what stands under {part!r} builds no {getattr(kind, "__name__", "model")}', keywords):
            hints = keywords_of(kind)
            keywords = {
                key: it if key not in hints or it == parameters[key].default else fitted(it, hints[key], key)
                for key, it in keywords.items()
            }
            sizes = tensor_sizes(self.path.parent)
            check_counts(keywords, max(sizes, default=0))
            with AllocationLimit(sizes), own_defaults():
                return kind(*arguments, **keywords)

    @contextmanager
    def refused(self, fault: str, values: Any) -> Iterator[None]:
        """Raise ValueError that begins with the file and `fault` for whatever goes wrong with `values` in the block."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # by constructors of several libraries, of which not all check what they are given
            if violation := VIOLATION.search(str(error)):  # beartype's
                reason = f'{violation[1]} must be {violation[2]}, got something else ({self._versions()})'
            elif isinstance(error, (TypeError, ValueError)):
                reason = f'{error} ({self._versions()})'
            else:
                text = ' '.join(str(error).split()) or 'no reason given'
                reason = f'{values!r:.300} ({type(error).__name__}: {text:.200}; {self._versions()})'
            raise ValueError(f'{self.path}: {fault}: {reason}') from error

    def check_known(self, keys: Sequence[str], known: Sequence[str], part: str | None = None) -> None:
        if unknown := [key for key in keys if key not in known]:
            place = '' if part is None else f' under {part!r}'
            raise ValueError(
                f'{self.path} has the unknown key {", ".join(map(repr, unknown))}{place}: {self._versions()}'
            )

    def check_within(self) -> None:
        """Raise ValueError unless the folders within are those that were written with this config."""
        told = self.content.get(WITHIN, {})
        if not isinstance(told, dict):
            raise ValueError(f'{self.path} must hold checksums under {WITHIN!r}, got {told!r:.80}')
        for name, found in checksums_within(self.path.parent, told).items():
            if found is not None and found != told[name]:
                raise ValueError(
                    f'{self.path.parent / name} belongs to something else than the files beside it; all have to come '
                    'from one copy (verify=False reads it all the same)'
                )

    def _versions(self) -> str:
        writer = self.content.get('version')
        if writer == __version__:
            return f'it was written by this version of musiclm-pytorch, {__version__}, and changed since'
        wrote = 'the file does not say which wrote it' if writer is None else f'it was written by {writer}'
        return f'this is version {__version__} of musiclm-pytorch, and {wrote}; load it with the version that wrote it'


def check_counts(keywords: dict[str, Any], largest: int) -> None:
    """Raise ValueError for an integer that no size, rate or count can be beside weights of at most `largest` numbers:
    constructors make lists of so many."""
    for key, value in keywords.items():
        for it in tree_leaves(value):
            if isinstance(it, int) and it > max(MOST, largest):
                raise ValueError(f'{key} is {it}, but none of the weights beside it has more than {largest} numbers')


def read_config(
    folder: str | Path, model: str, parts: Sequence[str], optional: Sequence[str] = (), verify: bool = True
) -> SavedConfig:
    """The config in a folder that `model.save_pretrained` wrote. It holds `parts`, and may hold what is `optional`.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one, one of another model, or unknown keys.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        beside = Path(folder).parent if Path(folder).name != str(folder) else None  # of results/best, results
        near = models_inside(Path(folder)) or (models_inside(beside) if beside else [])
        hint = f'; there is a model in {near[0]}' if near else ''
        raise FileNotFoundError(
            f'no {CONFIG_FILE} in {folder}; expected a folder written by {model}.save_pretrained{hint}'
        )
    content = read_checked_json(path, verify)
    try:
        for part in parts:
            content[part]
    except (KeyError, TypeError) as error:
        kind = content.get('model') if isinstance(content, dict) else None
        what = f'is that of a {kind}' if kind not in (None, model) else f'has no {error}, or is no object'
        raise ValueError(f'{path} is not the config of a {model}: it {what}') from error
    config = SavedConfig(path, content)
    config.check_known(content, ('model', 'version', WEIGHTS, WITHIN, *parts, *optional))
    if verify:
        config.check_within()
    return config


def saved_kind(folder: str | Path) -> Any:
    """What the config in a folder says that it is of, such as 'MusicLM'; None if there is no config."""
    path = Path(folder) / CONFIG_FILE
    content = read_checked_json(path, verify=False) if path.is_file() else None
    return content.get('model') if isinstance(content, dict) else None


def read_folder(
    folder: str | Path, model: str, parts: Sequence[str], optional: Sequence[str] = (), verify: bool = True
) -> tuple[SavedConfig, dict[str, Tensor]]:
    """The config, as `read_config` reads it, and the weights beside it."""
    config, path = read_config(folder, model, parts, optional, verify), Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f'no {WEIGHTS_FILE} in {folder}; expected a folder written by {model}.save_pretrained')
    checksums = config.content.get(WEIGHTS)
    if checksums is not None and not isinstance(checksums, list):
        raise ValueError(f'{config.path} must hold a list of checksums under {WEIGHTS!r}, got {checksums!r:.80}')
    return config, dequantized(read_tensors(path, verify, checksums=checksums))


class LoadUpstream:
    """`MuLaN.load_upstream(path)` builds a model from a file of upstream's trainer, `mulan.N.pt`.

    Called on an instance, it loads the weights into that model instead. Either way the model is returned.

    Upstream saved no config. Sizes are read off the weights; what weights do not show keeps upstream's default and
    can be said with `audio`, `text` and further keywords of `MuLaN`, for instance
    `MuLaN.load_upstream(path, audio=dict(spec_n_fft=256, spec_hop_length=64))`.

    Raises FileNotFoundError for a missing file, ValueError for one that does not hold a MuLaN.
    """

    def __get__(self, instance: nn.Module | None, owner: type) -> partial:
        bound = partial(_build_upstream, owner) if instance is None else partial(_load_upstream_into, instance)
        bound.__doc__ = self.__doc__
        return bound


def _build_upstream(
    cls: type,
    path: str | Path,
    *,
    audio: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **keywords: Any,
) -> nn.Module:
    state, _ = read_upstream(path)
    known_audio, known_text, known_mulan = _infer_config(state, known=audio or {}, source=path)
    with own_defaults():
        mulan = cls(
            AudioSpectrogramTransformer(**{**known_audio, **(audio or {})}),
            TextTransformer(**{**known_text, **(text or {})}),
            **{**known_mulan, **keywords},
        )
    load_strictly(mulan, state, source=path)
    return mulan.eval()


def _load_upstream_into(mulan: nn.Module, path: str | Path) -> nn.Module:
    load_strictly(mulan, read_upstream(path)[0], source=path)
    return mulan


def read_upstream(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """State dicts of model and optimizer (None without one) in a file of upstream's trainer, without DDP's prefix."""
    package = read_torch(path, 'checkpoint')
    state = package.get('model', package) if isinstance(package, dict) else None
    if not is_state(state):
        raise ValueError(f'{path} holds no state dict of a MuLaN under "model"')
    state = {name.removeprefix('module.'): tensor for name, tensor in state.items()}
    if 'audio_to_latents.weight' not in state:
        raise ValueError(f'{path} is not a MuLaN: it has no audio_to_latents.weight, but {sorted(state)[:3]} …')
    optimizer = package.get('optim') if 'model' in package else None
    return state, optimizer


def read_torch(path: str | Path, what: str) -> Any:
    """What `torch.save` wrote, tensors and plain values; nothing in it is run. Raises FileNotFoundError, ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'no {what} at {path}')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises one of many, by what is wrong with the file
        raise ValueError(f'{path} is damaged, or holds more than tensors; it was not loaded') from error


def is_state(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values())


def load_file(model: nn.Module, path: str | Path, what: str) -> None:
    """Load the state dict in a file of torch. Raises FileNotFoundError, and ValueError for one of another model."""
    state = read_torch(path, what)
    load_strictly(model, state if is_state(state) else {}, source=path)


def _infer_config(state: dict[str, Tensor], *, known: dict, source: str | Path) -> tuple[dict, dict, dict]:
    """Constructor keywords of both towers and of MuLaN, as far as the shapes of the weights tell them."""

    def tower(name: str) -> dict[str, Any]:
        attention, feed_forward = f'{name}.transformer.layers.0.0', f'{name}.transformer.layers.0.1'
        dim_inner, dim = state[f'{attention}.to_q.weight'].shape
        dim_head = len(state[f'{attention}.q_scale'])
        dim_hidden = state[f'{feed_forward}.4.weight'].shape[1]
        layers = {key.split('.')[3] for key in state if key.startswith(f'{name}.transformer.layers.')}
        # upstream rounds int(dim * mult * 2 / 3); the usual 4, or the smallest multiplier that gives this width
        mult = 4 if int(dim * 4 * 2 / 3) == dim_hidden else math.nextafter(dim_hidden * 3 / (dim * 2), math.inf)
        return dict(dim=dim, depth=len(layers), dim_head=dim_head, heads=dim_inner // dim_head, ff_mult=mult)

    audio, text = tower('audio'), tower('text')
    text['num_tokens'] = len(state['text.token_emb.weight'])
    text['max_seq_len'] = len(state['text.pos_emb.weight'])

    audio['spec_win_length'] = len(state['audio.spec.window'])
    if 'patch_size' not in known:
        area = len(state['audio.to_patch_tokens.1.weight'])
        audio['patch_size'] = math.isqrt(area)
        if audio['patch_size'] ** 2 != area:
            raise ValueError(f'{source} has patches of {area} values, not a square; say audio=dict(patch_size=(…, …))')
    # hop and transform leave no trace: upstream's defaults go with its default window only
    if audio['spec_win_length'] != 24 and 'spec_n_fft' not in known:
        raise ValueError(
            f'{source} has a window of {audio["spec_win_length"]} samples, not the default 24, so its spec_n_fft is '
            'probably not the default either, and the weights do not show it; say audio=dict(spec_n_fft=…) and, '
            'if it is not half of the window, spec_hop_length'
        )

    mulan = dict(
        dim_latent=len(state['audio_to_latents.weight']),
        sigmoid_contrastive_loss='contrast.bias' in state,
        hierarchical_contrastive_loss='audio_layers_indices' in state,
    )
    if mulan['hierarchical_contrastive_loss']:
        mulan['hierarchical_contrastive_loss_layers'] = len(state['audio_layers_indices'])
    return audio, text, mulan


def load_strictly(model: nn.Module, state: dict[str, Tensor], *, source: str | Path) -> None:
    """Load all weights of a model. Raises ValueError where names, shapes or kinds of numbers differ."""
    own = model.state_dict()
    faults = [f'{name} is missing' for name in own if name not in state]
    faults += [f'{name} has no place in it' for name in state if name not in own]
    faults += [
        f'{name} is {tuple(it.shape)} of {it.dtype}, and ought to be {tuple(own[name].shape)} of {own[name].dtype}'
        for name, it in state.items()
        if name in own and (it.shape, it.is_floating_point()) != (own[name].shape, own[name].is_floating_point())
    ]
    if faults:
        more = f', and {len(faults) - 4} more' if len(faults) > 4 else ''
        raise ValueError(
            f'the weights in {source} do not fit this model: {"; ".join(faults[:4])}{more}; weights and config must be '
            'of one model, as save_pretrained wrote them'
        )
    model.load_state_dict(state)
