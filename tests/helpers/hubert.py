"""Tiny HuBERTs, as transformers builds them and as fairseq saves them."""

import re

import joblib
import torch
from sklearn.cluster import KMeans
from transformers import HubertConfig, HubertModel

LAYOUTS = {
    'base': (
        {'feat_extract_norm': 'group', 'do_stable_layer_norm': False, 'conv_bias': False},
        {'extractor_mode': 'default', 'layer_norm_first': False, 'conv_bias': False},
    ),
    'large': (
        {'feat_extract_norm': 'layer', 'do_stable_layer_norm': True, 'conv_bias': True},
        {'extractor_mode': 'layer_norm', 'layer_norm_first': True, 'conv_bias': True},
    ),
}


SIZES = (
    {
        'conv_dim': [12, 12, 12, 20],
        'conv_kernel': [10, 3, 3, 2],
        'conv_stride': [5, 2, 2, 2],
        'hidden_size': 24,
        'intermediate_size': 40,
        'num_hidden_layers': 3,
        'num_attention_heads': 4,
        'num_conv_pos_embeddings': 6,
        'num_conv_pos_embedding_groups': 3,
    },
    {
        'conv_feature_layers': '[(12,10,5)] + [(12, 3, 2)] * 2 + [(20,2,2)]',
        'encoder_embed_dim': 24,
        'encoder_ffn_embed_dim': 40,
        'encoder_layers': 3,
        'encoder_attention_heads': 4,
        'conv_pos': 6,
        'conv_pos_groups': 3,
        'activation_fn': 'gelu',
        'label_rate': '${task.label_rate}',
    },
)


FAIRSEQ_NAMES = (
    (r'^feature_extractor\.conv_layers\.(\d+)\.conv\.', r'feature_extractor.conv_layers.\1.0.'),
    (r'^feature_projection\.layer_norm\.', 'layer_norm.'),
    (r'^feature_projection\.projection\.', 'post_extract_proj.'),
    (r'^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0$', 'encoder.pos_conv.0.weight_g'),
    (r'^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1$', 'encoder.pos_conv.0.weight_v'),
    (r'^encoder\.pos_conv_embed\.conv\.bias$', 'encoder.pos_conv.0.bias'),
    (r'\.attention\.', '.self_attn.'),
    (r'^(encoder\.layers\.\d+)\.layer_norm\.', r'\1.self_attn_layer_norm.'),
    (r'\.feed_forward\.intermediate_dense\.', '.fc1.'),
    (r'\.feed_forward\.output_dense\.', '.fc2.'),
)


def make_hubert(layout, **changes):
    """A random model. Norms and biases are random as well: mixed up, ones and zeros would go unnoticed."""
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**{**SIZES[0], **LAYOUTS[layout][0], **changes})).eval()
    for name, parameter in model.named_parameters():
        is_scale = name.endswith(('norm.weight', 'original0'))
        torch.nn.init.normal_(parameter, mean=1.0 if is_scale else 0.0, std=0.3)
    return model


def make_settings(layout, **changes):
    return {'_name': 'hubert', **SIZES[1], **LAYOUTS[layout][1], **changes}


def fairseq_weights(model, layout):
    norm = '2.' if layout == 'base' else '2.1.'
    names = (*FAIRSEQ_NAMES, (r'^(feature_extractor\.conv_layers\.\d+)\.layer_norm\.', rf'\1.{norm}'))
    weights = {}
    for name, value in model.state_dict().items():
        if name == 'masked_spec_embed':
            continue
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        weights[name] = value.clone()
    # what only pretraining uses
    width = model.config.hidden_size
    weights.update({'mask_emb': torch.randn(width), 'label_embs_concat': torch.randn(11, 8)})
    weights.update({'final_proj.weight': torch.randn(8, width), 'final_proj.bias': torch.randn(8)})
    return weights


def make_checkpoint(layout, settings=None, **changes):
    model = make_hubert(layout, **changes)
    settings = make_settings(layout) if settings is None else settings
    return model, {'args': None, 'cfg': {'model': settings}, 'model': fairseq_weights(model, layout)}


def reference_layers(model, wave):
    """The output of each layer of a transformers model, before any final norm, and its final output."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in model.encoder.layers]
    with torch.inference_mode():
        final = model(wave).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [out[0] if isinstance(out, tuple) else out for out in outputs], final


def save_kmeans(frames, path):
    kmeans = KMeans(n_clusters=7, n_init=1, random_state=0).fit(frames.numpy())
    joblib.dump(kmeans, path)
    return torch.from_numpy(kmeans.cluster_centers_)
