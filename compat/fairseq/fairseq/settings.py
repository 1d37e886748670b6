"""From what a checkpoint says about its model to the keywords of `transformers.HubertConfig`.

The settings lie flat in `args` (a Namespace) or under `cfg['model']` (a dict, or an omegaconf container as it
was pickled). Settings that are missing are read off the tensors, as far as those tell.
"""

import argparse
import ast
from collections.abc import Mapping
from typing import Any

from fairseq.inert import Inert

# Attention heads leave no trace in the shapes; these are the published models: base, large, extra large.
HEADS_BY_WIDTH = {768: 12, 1024: 16, 1280: 16}

# Nor do strides; these go with the kernels of all published models (320 samples a frame).
STRIDES_BY_KERNELS = {(10, 3, 3, 3, 3, 2, 2): (5, 2, 2, 2, 2, 2, 2)}

EXTRACTOR_NORMS = {'default': 'group', 'layer_norm': 'layer'}

ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_accurate': 'gelu_new',  # both of these are the tanh approximation
    'gelu_fast': 'gelu_new',
    'linear': 'linear',
    'relu': 'relu',
    'swish': 'silu',
    'tanh': 'tanh',
}

MAX_CONV_LAYERS = 64

_PENDING = object()


def plain(value: Any) -> Any:
    """The value with every container of settings in it as dict, list or tuple; other objects stay.

    omegaconf containers are read as they were pickled, interpolations unresolved, whether they are inert or
    (in a program that registered them) real.
    """
    return _plain(value, {})


def _plain(value: Any, done: dict[int, Any]) -> Any:
    if not isinstance(value, (dict, list, tuple, argparse.Namespace, Inert)) and not _is_omegaconf(value):
        return value

    # Each object once: a file can refer to one list from many places, or to a list from within itself.
    if done.get(id(value)) is _PENDING:
        raise ValueError('the settings of the checkpoint contain themselves; the file is not one fairseq wrote')
    if id(value) not in done:
        done[id(value)] = _PENDING
        done[id(value)] = _converted(value, done)
    return done[id(value)]


def _converted(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item, done) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(item, done) for item in value]) if type(value) in (list, tuple) else value
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value), done)

    state = value.state if isinstance(value, Inert) else vars(value)
    if isinstance(state, dict):
        for field in ('_content', '_val'):  # of containers, of nodes
            if field in state:
                return _plain(state[field], done)
    return value


def _is_omegaconf(value: Any) -> bool:
    return type(value).__module__.partition('.')[0] == 'omegaconf' and hasattr(value, '__dict__')


def settings_of(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The settings of the model, flat by name, and the whole configuration; both empty where there is none.

    fairseq keeps `args` for models trained before its configuration was hierarchical; where it is present
    it counts, as it does in fairseq.
    """
    args = plain(checkpoint.get('args'))
    if isinstance(args, dict):
        return args, args

    cfg = plain(checkpoint.get('cfg'))
    if not isinstance(cfg, dict):
        return {}, {}
    model = cfg.get('model')
    return (model if isinstance(model, dict) else cfg), cfg


def config_keywords(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Keywords for `transformers.HubertConfig`.

    settings: fairseq's names (`encoder_layers`, `extractor_mode`, …) to values; may be empty.
    shapes: fairseq's parameter names to shapes.
    Raises ValueError for settings that make no sense, and for missing ones that the shapes do not tell.
    """
    conv = _conv_layers(settings, shapes)
    (width,) = shapes['encoder.layer_norm.weight']
    inner, _ = shapes['encoder.layers.0.fc1.weight']
    _, width_a_group, kernel = _pos_conv_shape(shapes)

    # A depth that the parameters do not have would only be found after building so many layers.
    depth = _count(shapes, 'encoder.layers.')
    if _integer(settings, 'encoder_layers', depth) != depth:
        raise ValueError(
            f'encoder_layers is {settings["encoder_layers"]} in the checkpoint, but there are parameters '
            f'encoder.layers.* of {depth} layers'
        )

    # The norms' places in the transformer do not show in the shapes; in the published models they go with the
    # norms of the feature extractor.
    layer_norms = 'feature_extractor.conv_layers.0.2.1.weight' in shapes
    mode = _choice(settings, 'extractor_mode', 'layer_norm' if layer_norms else 'default', EXTRACTOR_NORMS)
    norm_first = _flag(settings, 'layer_norm_first', mode == 'layer_norm')

    return {
        'conv_dim': [channels for channels, _, _ in conv],
        'conv_kernel': [kernel for _, kernel, _ in conv],
        'conv_stride': [stride for _, _, stride in conv],
        'conv_bias': _flag(settings, 'conv_bias', 'feature_extractor.conv_layers.0.0.bias' in shapes),
        'feat_extract_norm': EXTRACTOR_NORMS[mode],
        'hidden_size': _integer(settings, 'encoder_embed_dim', width),
        'intermediate_size': _integer(settings, 'encoder_ffn_embed_dim', inner),
        'num_hidden_layers': depth,
        'num_attention_heads': _heads(settings, width),
        'hidden_act': ACTIVATIONS[_choice(settings, 'activation_fn', 'gelu', ACTIVATIONS)],
        'do_stable_layer_norm': norm_first,
        'num_conv_pos_embeddings': _integer(settings, 'conv_pos', kernel),
        'num_conv_pos_embedding_groups': _integer(settings, 'conv_pos_groups', width // width_a_group),
        'conv_pos_batch_norm': 'encoder.pos_conv.0.running_mean' in shapes,
        'mask_time_prob': 0.0,  # nothing is masked here; without this there would be a parameter for it
        'mask_feature_prob': 0.0,
    }


def _conv_layers(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """(channels, kernel, stride) of each convolution of the feature extractor."""
    given = settings.get('conv_feature_layers')
    if given is not None:
        return _parsed_conv_layers(given)

    prefix = 'feature_extractor.conv_layers.'
    layers = [shapes.get(f'{prefix}{layer}.0.weight', ()) for layer in range(_count(shapes, prefix))]
    kernels = tuple(shape[-1] if len(shape) == 3 else 0 for shape in layers)
    if kernels not in STRIDES_BY_KERNELS:
        raise ValueError(
            f'the checkpoint has no conv_feature_layers in its args or cfg, and the strides of an extractor '
            f'with kernels {kernels} cannot be told from the tensors; add it to checkpoint["cfg"]["model"]'
        )
    return [
        (channels, kernel, stride)
        for (channels, _, kernel), stride in zip(layers, STRIDES_BY_KERNELS[kernels], strict=True)
    ]


def _parsed_conv_layers(given: Any) -> list[tuple[int, int, int]]:
    """fairseq writes this setting as a Python expression and evaluates it. Here only what such an expression
    needs is understood: integers, tuples, lists, + of lists and * of a list and an integer."""
    refusal = ValueError(
        f'conv_feature_layers is {given!r} in the checkpoint; expected (channels, kernel, stride) triples of '
        f'positive integers, such as "[(512,10,5)] + [(512,3,2)] * 4", at most {MAX_CONV_LAYERS}'
    )

    def value_of(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Tuple):
            return tuple(value_of(item) for item in node.elts)
        if isinstance(node, ast.List):
            return [value_of(item) for item in node.elts]
        if isinstance(node, ast.BinOp):
            left, right = value_of(node.left), value_of(node.right)
            if isinstance(node.op, ast.Add) and type(left) is type(right) is list:
                return left + right
            if isinstance(node.op, ast.Mult):
                items, times = (left, right) if isinstance(left, list) else (right, left)
                if isinstance(items, list) and type(times) is int and times * len(items) <= MAX_CONV_LAYERS:
                    return items * times
        raise refusal

    layers = given
    if isinstance(given, str):
        try:
            layers = value_of(ast.parse(given.strip(), mode='eval').body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise refusal from None
    if not isinstance(layers, (list, tuple)) or not 0 < len(layers) <= MAX_CONV_LAYERS:
        raise refusal
    for layer in layers:
        if not isinstance(layer, (list, tuple)) or len(layer) != 3:
            raise refusal
        if not all(type(number) is int and number > 0 for number in layer):
            raise refusal
    return [tuple(layer) for layer in layers]


def _heads(settings: Mapping[str, Any], width: int) -> int:
    if settings.get('encoder_attention_heads') is None and width not in HEADS_BY_WIDTH:
        raise ValueError(
            f'the checkpoint has no encoder_attention_heads in its args or cfg, and the heads of a model of '
            f'width {width} cannot be told from the tensors; add it to checkpoint["cfg"]["model"]'
        )
    heads = _integer(settings, 'encoder_attention_heads', HEADS_BY_WIDTH.get(width))
    if width % heads:
        raise ValueError(f'encoder_attention_heads is {heads} in the checkpoint and does not divide its width {width}')
    return heads


def _pos_conv_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """(channels, channels a group, kernel) of the position convolution."""
    for name in ('0.weight_v', '0.parametrizations.weight.original1', '1.weight'):
        shape = shapes.get(f'encoder.pos_conv.{name}', ())
        if len(shape) == 3 and all(shape):
            return shape
    raise ValueError(
        'the checkpoint lacks encoder.pos_conv.0.weight_v of 3 dimensions, which HuBERT takes its positions from'
    )


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return len({name[len(prefix) :].split('.')[0] for name in shapes if name.startswith(prefix)})


def _given(settings: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    value = settings.get(name)
    return otherwise if value is None else value


def _integer(settings: Mapping[str, Any], name: str, otherwise: int | None) -> int:
    value = _given(settings, name, otherwise)
    if type(value) is not int or value < 1:
        raise ValueError(f'{name} is {value!r} in the checkpoint; expected a positive integer')
    return value


def _choice(settings: Mapping[str, Any], name: str, otherwise: str, choices: Mapping[str, str]) -> str:
    value = _given(settings, name, otherwise)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f'{name} is {value!r} in the checkpoint; expected one of {sorted(choices)}')
    return value


def _flag(settings: Mapping[str, Any], name: str, otherwise: bool) -> bool:
    value = _given(settings, name, otherwise)
    if type(value) is not bool:
        raise ValueError(f'{name} is {value!r} in the checkpoint; expected True or False')
    return value
