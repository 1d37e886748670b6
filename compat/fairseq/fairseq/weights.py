"""From the names of a HuBERT state dict in fairseq to those in `transformers.HubertModel`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

# fairseq's module to transformers', for those that hold a `weight` and a `bias` and no more.
MODULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r'(feature_extractor\.conv_layers\.\d+)\.0', r'\1.conv'),
        (r'(feature_extractor\.conv_layers\.0)\.2', r'\1.layer_norm'),  # a group norm, in the first layer only
        (r'(feature_extractor\.conv_layers\.\d+)\.2\.1', r'\1.layer_norm'),  # between two transpositions
        (r'layer_norm', r'feature_projection.layer_norm'),
        (r'post_extract_proj', r'feature_projection.projection'),
        (r'encoder\.layer_norm', r'encoder.layer_norm'),
        (r'(encoder\.layers\.\d+)\.self_attn\.([qkv]|out)_proj', r'\1.attention.\2_proj'),
        (r'(encoder\.layers\.\d+)\.self_attn_layer_norm', r'\1.layer_norm'),
        (r'(encoder\.layers\.\d+)\.fc1', r'\1.feed_forward.intermediate_dense'),
        (r'(encoder\.layers\.\d+)\.fc2', r'\1.feed_forward.output_dense'),
        (r'(encoder\.layers\.\d+)\.final_layer_norm', r'\1.final_layer_norm'),
    )
)

# The weight norm of the position convolution: torch's older and newer names for magnitude and direction. The
# checkpoint has one pair; the model has the newer where its torch and transformers know it.
WEIGHT_NORM_NAMES = (
    ('weight_g', 'parametrizations.weight.original0'),
    ('weight_v', 'parametrizations.weight.original1'),
)

# Parameters that only pretraining uses.
TRAINING_ONLY = re.compile(r'mask_emb|label_embs_concat|final_proj\.(weight|bias)|target_glu\.0\.(weight|bias)')

# Parameters by which other models that fairseq saves give themselves away.
OTHER_MODELS = (
    ('vector_quantizer.', 'vq-wav2vec'),
    ('feature_aggregator.', 'wav2vec'),
    ('quantizer.', 'wav2vec 2.0'),
    ('project_q.', 'wav2vec 2.0'),
    ('w2v_encoder.', 'a fine-tuned speech recogniser'),
    ('decoder.', 'a model with a decoder'),
)

# The least that makes a state dict a HuBERT (its first convolution, its first layer, its last norm), with the
# dimensions of each.
ESSENTIAL = {
    'feature_extractor.conv_layers.0.0.weight': 3,
    'encoder.layers.0.fc1.weight': 2,
    'encoder.layer_norm.weight': 1,
}

OFFERED = (
    'this stand-in for fairseq offers HuBERT checkpoints without a fine-tuning head, such as '
    "hubert_base_ls960.pt with audiolm-pytorch's HubertWithKmeans; for other models install the genuine fairseq"
)

NAMES_IN_A_MESSAGE = 8


def require_hubert(checkpoint: Any, origin: str) -> dict[str, torch.Tensor]:
    """The state dict of a HuBERT checkpoint, under fairseq's names.

    Raises ValueError, naming `origin`, if the checkpoint is not one that fairseq saved of a HuBERT.
    """
    weights = checkpoint.get('model') if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f'{origin} is not a checkpoint as fairseq saves it: it has no state dict "model"; {OFFERED}')
    for prefix, model in OTHER_MODELS:
        if any(name.startswith(prefix) for name in weights):
            raise ValueError(f'{origin} holds {model} (it has parameters "{prefix}…"), not HuBERT; {OFFERED}')
    if strangers := [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f'{origin} holds parameters that are no tensors: {_listed(strangers)}; {OFFERED}')
    if lacking := [
        f'{name} of {ndim} dimensions'
        for name, ndim in ESSENTIAL.items()
        if name not in weights or weights[name].ndim != ndim or not weights[name].numel()
    ]:
        raise ValueError(f'{origin} does not hold a HuBERT: it lacks {_listed(lacking)}; {OFFERED}')
    return dict(weights)


def renamed(
    weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], origin: str
) -> dict[str, torch.Tensor]:
    """The state dict under the names of `transformers.HubertModel`, in single precision.

    weights: fairseq's names to tensors.
    expected: the state dict of the model to be filled; only its names and shapes are read.
    Raises ValueError naming all parameters that are unknown, missing or of another shape.
    """
    found, unknown, mismatched = {}, [], []
    for name, value in weights.items():
        if TRAINING_ONLY.fullmatch(name):
            continue
        target = _target(name, expected)
        if target not in expected or target in found:
            unknown.append(name)
            continue
        found[target] = value.float() if value.is_floating_point() else value
        if value.shape != expected[target].shape:
            mismatched.append(f'{name} {tuple(value.shape)} instead of {tuple(expected[target].shape)}')

    problems = {
        'unknown to this model': unknown,
        'of another shape than the settings say': mismatched,
        "missing (by transformers' names)": [name for name in expected if name not in found],
    }
    if any(problems.values()):
        listed = '; '.join(f'{problem}: {_listed(names)}' for problem, names in problems.items() if names)
        raise ValueError(f'the parameters in {origin} do not fit. They are {listed}. Note that {OFFERED}')
    return found


def _target(name: str, expected: Mapping[str, torch.Tensor]) -> str | None:
    """The name in the model for a name in fairseq; None, or a name the model lacks, if there is none."""
    if name.startswith('encoder.pos_conv.'):
        return _pos_conv_target(name.removeprefix('encoder.pos_conv.'), expected)
    module, _, parameter = name.rpartition('.')
    for pattern, replacement in MODULES:
        if match := pattern.fullmatch(module):
            return f'{match.expand(replacement)}.{parameter}'
    return None


def _pos_conv_target(name: str, expected: Mapping[str, torch.Tensor]) -> str | None:
    """The convolution with its weight norm is the first module of fairseq's sequence; where a batch norm takes
    the place of the weight norm, it is the second."""
    position, _, parameter = name.partition('.')
    has_batch_norm = 'encoder.pos_conv_embed.batch_norm.weight' in expected
    module = {'0': 'batch_norm', '1': 'conv'}.get(position) if has_batch_norm else {'0': 'conv'}.get(position)
    alternatives = next((names for names in WEIGHT_NORM_NAMES if parameter in names), (parameter,))
    targets = [f'encoder.pos_conv_embed.{module}.{alternative}' for alternative in alternatives]
    return next((target for target in targets if target in expected), None)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f' and {len(names) - NAMES_IN_A_MESSAGE} more' if len(names) > NAMES_IN_A_MESSAGE else ''
    return ', '.join(names[:NAMES_IN_A_MESSAGE]) + more
