"""The stand-in for fairseq: HuBERT checkpoints in fairseq's form come back as the model they were made from."""

import argparse
import collections
import contextlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import textwrap
import types
import typing
from pathlib import Path

import pytest
import torch
from helpers.hubert import LAYOUTS, fairseq_weights, make_checkpoint, make_settings, reference_layers, save_kmeans

import fairseq
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from musiclm_pytorch.audiolm.convert import FairseqVQWav2Vec, HubertWithKmeans

ROOT = Path(__file__).resolve().parents[1]

without_omegaconf = pytest.mark.skipif(
    importlib.util.find_spec('omegaconf') is not None, reason='omegaconf is installed, so its names are left to it'
)

# Small models in the two layouts of the published ones, each with fairseq's words for it.

SHORTEST = 60  # samples: one frame of these convolutions


def built(checkpoint):
    [model], _, _ = load_model_ensemble_and_task({'hubert.pt': checkpoint})
    return model


def features(model, wave, output_layer=None, **keywords):
    with torch.inference_mode():
        return model(wave, features_only=True, mask=False, output_layer=output_layer, **keywords)['x']


# Objects that pickle under the names of classes that are not installed here.


@contextlib.contextmanager
def classes_named(*names):
    """Plain classes by last name, importable as `names` (which pickle insists on) within the context."""
    before = dict(sys.modules)
    made = types.SimpleNamespace()
    try:
        for name in names:
            module, _, last = name.rpartition('.')
            made_class = type(last, (), {'__module__': module})
            for parent in [*module.split('.')[:1], module]:
                sys.modules.setdefault(parent, types.ModuleType(parent))
            setattr(sys.modules[module], last, made_class)
            setattr(made, last, made_class)
        yield made
    finally:
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]


def with_state(kind, **state):
    made = kind.__new__(kind)
    made.__dict__.update(state)
    return made


def save_with_dictionary(checkpoint, path):
    with classes_named('fairseq.data.dictionary.Dictionary') as named:
        dictionary = with_state(named.Dictionary, symbols=['<s>', '0'], count=[1, 1], indices={'<s>': 0, '0': 1})
        torch.save({**checkpoint, 'task_state': {'dictionaries': [dictionary]}}, path)


def save_with_omegaconf(checkpoint, path):
    nodes = ('AnyNode', 'BooleanNode', 'IntegerNode', 'StringNode')
    with classes_named(
        'omegaconf.dictconfig.DictConfig',
        'omegaconf.listconfig.ListConfig',
        'omegaconf.base.ContainerMetadata',
        'omegaconf.base.Metadata',
        'fairseq.models.hubert.hubert.HubertConfig',
        *(f'omegaconf.nodes.{node}' for node in nodes),
    ) as named:

        def converted(value, parent, object_type=dict):
            metadata = {'ref_type': typing.Any, 'optional': True, 'flags': None}
            container = {**metadata, 'object_type': object_type, 'resolver_cache': collections.defaultdict(dict)}
            if isinstance(value, dict):
                made = with_state(named.DictConfig, _parent=parent)
                made._metadata = with_state(named.ContainerMetadata, **container, key_type=str, element_type=int)
                made._content = {key: converted(item, made) for key, item in value.items()}
            elif isinstance(value, list):
                made = with_state(named.ListConfig, _parent=parent)
                container.update(object_type=list, ref_type=typing.List[int])  # noqa: UP006 - as it is in files
                made._metadata = with_state(named.ContainerMetadata, **container)
                made._content = [converted(item, made) for item in value]
            else:
                kinds = {bool: named.BooleanNode, int: named.IntegerNode, str: named.StringNode}
                made = with_state(kinds.get(type(value), named.AnyNode), _parent=parent, _val=value)
                made._metadata = with_state(named.Metadata, **metadata)
            return made

        cfg = {'common': {'seed': 1337, 'user_dir': None}, 'model': {**checkpoint['cfg']['model'], 'latent': [2]}}
        cfg = converted(cfg, None, named.HubertConfig)
        torch.save({**checkpoint, 'cfg': cfg}, path)


def save_with_namespace(checkpoint, path):
    args = argparse.Namespace(arch='hubert', **checkpoint['cfg']['model'])
    torch.save({'args': args, 'model': checkpoint['model'], 'extra_state': collections.OrderedDict(epoch=1)}, path)


SAVERS = (save_with_dictionary, save_with_namespace, pytest.param(save_with_omegaconf, marks=without_omegaconf))


@pytest.mark.parametrize('save', SAVERS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_features_and_tokens_through_audiolm(layout, save, tmp_path):
    hubert, checkpoint = make_checkpoint(layout)
    save(checkpoint, tmp_path / 'hubert.pt')
    wave = torch.randn(2, 1600)
    layers, final = reference_layers(hubert, wave)

    for number, expected in enumerate(layers, start=1):
        centres = save_kmeans(expected.flatten(0, 1), tmp_path / 'kmeans.bin')
        tokenizer = HubertWithKmeans(tmp_path / 'hubert.pt', tmp_path / 'kmeans.bin', output_layer=number)
        torch.testing.assert_close(features(tokenizer.model, wave, number), expected, atol=1e-5, rtol=0)
        nearest = (expected[:, :, None] - centres).square().sum(dim=-1).argmin(dim=-1)
        assert torch.equal(tokenizer(wave), nearest)

    # it stays deterministic in a model that trains
    torch.nn.ModuleList([tokenizer]).train()
    assert tokenizer.model.hubert.config.hidden_dropout > 0
    torch.testing.assert_close(features(tokenizer.model, wave), final, atol=1e-5, rtol=0)
    if layout == 'large':  # otherwise this test would not see whether the final norm is left out
        assert (layers[-1] - final).abs().max() > 0.1


def test_every_shape_of_a_wave_gives_the_same_features_of_the_layers_needed():
    model = built(make_checkpoint('base')[1])
    wave = torch.randn(1, 1000)
    expected = features(model, wave, 1)
    for same in (wave[0], wave[:, None], wave.double()):
        assert torch.equal(features(model, same, 1), expected)
    assert features(model, torch.randn(2, SHORTEST), 1).shape == (2, 1, 24)
    ran = []
    for number, layer in enumerate(model.hubert.encoder.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    features(model, wave, 2)
    assert ran == [1, 2]


@pytest.mark.parametrize('layout', LAYOUTS)
def test_padding_mask_is_that_of_frames_that_are_padding_throughout(layout):
    hubert, checkpoint = make_checkpoint(layout)
    model = built(checkpoint)
    wave = torch.randn(3, 1607)
    padding = torch.zeros(3, 1607, dtype=torch.bool)
    padding[1, 700:] = True
    padding[2, :] = True

    with torch.inference_mode():
        result = model(wave, padding_mask=padding, features_only=True, mask=False)
        frames = result['x'].shape[1]
        run = 1607 // frames
        expected_mask = [[all(row[f * run : (f + 1) * run]) for f in range(frames)] for row in padding.tolist()]
        assert result['padding_mask'].tolist() == expected_mask
        assert 0 < sum(expected_mask[1]) < frames

        expected = hubert.encoder(result['features'].clone(), attention_mask=~result['padding_mask'])[0]
    kept = ~result['padding_mask']
    torch.testing.assert_close(result['x'][kept], expected[kept], atol=1e-5, rtol=0)
    assert result['x'].isfinite().all()
    model.hubert.config._attn_implementation = 'eager'  # where a row of nothing but padding could become NaN
    torch.testing.assert_close(features(model, wave, padding_mask=padding)[kept], expected[kept], atol=1e-5, rtol=0)
    assert features(model, wave, padding_mask=padding).isfinite().all()

    # What only frames of the padding see does not matter; except to the group norm, which is over the whole wave.
    if layout == 'large':
        seen = (int((~result['padding_mask'][1]).sum()) - 1) * 40 + SHORTEST
        wave[1, seen:] = torch.randn(1607 - seen)
        same = features(model, wave, padding_mask=padding)
        torch.testing.assert_close(same[1][kept[1]], result['x'][1][kept[1]], atol=1e-5, rtol=0)


def test_calls_that_are_not_offered_say_so():
    _, checkpoint = make_checkpoint('base')
    model = built(checkpoint)
    wave = torch.randn(1, 500)
    for layer in (0, 4, -1, True, 1.0):
        with pytest.raises(ValueError, match=rf'output_layer is {layer!r}; this HuBERT has layers 1 to 3'):
            features(model, wave, layer)
    with pytest.raises(ValueError, match=r'mask=True.*pretraining'):
        model(wave, features_only=True, output_layer=1)
    with pytest.raises(ValueError, match=r'features_only=False.*pretraining'):
        model(wave, mask=False, output_layer=1)
    with pytest.raises(TypeError, match=r'not torch\.int16'):
        features(model, wave.short(), 1)
    with pytest.raises(ValueError, match=r'shape \(1, 2, 500\)'):
        features(model, torch.randn(1, 2, 500), 1)
    with pytest.raises(ValueError, match=f'has {SHORTEST - 1} samples; HuBERT needs at least {SHORTEST}'):
        features(model, torch.randn(1, SHORTEST - 1), 1)
    with pytest.raises(ValueError, match=r'padding_mask has shape \(1, 400\)'):
        features(model, wave, 1, padding_mask=torch.zeros(1, 400, dtype=torch.bool))


# Variants of checkpoints


def test_settings_are_read_off_the_tensors_where_the_checkpoint_has_none():
    sizes = {'conv_dim': [8] * 7, 'conv_kernel': [10, 3, 3, 3, 3, 2, 2], 'conv_stride': [5, 2, 2, 2, 2, 2, 2]}
    wave = torch.randn(1, 4000)
    for layout, width, heads in (('base', 768, 12), ('large', 1280, 16)):
        changes = {**sizes, 'hidden_size': width, 'num_attention_heads': heads, 'num_hidden_layers': 1}
        hubert, checkpoint = make_checkpoint(layout, num_conv_pos_embedding_groups=16, **changes)
        del checkpoint['cfg'], checkpoint['args']
        torch.testing.assert_close(
            features(built(checkpoint), wave), reference_layers(hubert, wave)[1], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ('missing', 'message'),
    [
        ('conv_feature_layers', r'no conv_feature_layers .* kernels \(10, 3, 3, 2\)'),
        ('encoder_attention_heads', 'no encoder_attention_heads .* width 24'),
    ],
)
def test_settings_that_neither_side_tells_are_asked_for(missing, message):
    _, checkpoint = make_checkpoint('base')
    del checkpoint['cfg']['model'][missing]
    with pytest.raises(ValueError, match=message):
        built(checkpoint)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('conv_feature_layers', '[(12,10,5)] * 1000000000000'),
        ('conv_feature_layers', '[(12,10,5)] + [open("ran", "w")]'),
        ('conv_feature_layers', '[(12,10)]'),
        ('conv_feature_layers', '[]'),
        ('conv_feature_layers', '((((' * 500),
        ('encoder_attention_heads', 5),
        ('encoder_layers', 10**12),
        ('encoder_embed_dim', '24'),
        ('layer_norm_first', 'yes'),
        ('extractor_mode', 'batch_norm'),
        ('activation_fn', ['gelu']),
    ],
)
def test_settings_that_make_no_sense_are_named(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, checkpoint = make_checkpoint('base', make_settings('base', **{name: value}))
    with pytest.raises(ValueError, match=f'{name} is {re.escape(repr(value))}'):
        built(checkpoint)
    assert not list(tmp_path.iterdir())  # an expression is not evaluated


def test_settings_within_themselves_are_refused():
    _, checkpoint = make_checkpoint('base')
    checkpoint['cfg']['model']['self'] = checkpoint['cfg']
    with pytest.raises(ValueError, match='contain themselves'):
        built(checkpoint)


@pytest.mark.parametrize(('fairseq_name', 'name'), [('relu', 'relu'), ('gelu_accurate', 'gelu_new'), ('swish', 'silu')])
def test_the_activation_is_that_of_the_settings(fairseq_name, name):
    settings = make_settings('base', activation_fn=fairseq_name)
    hubert, checkpoint = make_checkpoint('base', settings, hidden_act=name)
    wave = torch.randn(1, 500)
    torch.testing.assert_close(features(built(checkpoint), wave), reference_layers(hubert, wave)[1])


def test_half_precision_checkpoints_become_single_precision_models():
    _, checkpoint = make_checkpoint('base')
    checkpoint['model'] = {name: value.half() for name, value in checkpoint['model'].items()}
    assert {parameter.dtype for parameter in built(checkpoint).parameters()} == {torch.float32}


@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
@pytest.mark.parametrize('old_transformers', [False, True])
@pytest.mark.parametrize('old_torch', [False, True])
def test_both_forms_of_the_weight_norm_on_both_sides(old_transformers, old_torch, monkeypatch):
    hubert, checkpoint = make_checkpoint('large')
    weights = checkpoint['model']
    if not old_torch:
        for number, letter in enumerate('gv'):
            value = weights.pop(f'encoder.pos_conv.0.weight_{letter}')
            weights[f'encoder.pos_conv.0.parametrizations.weight.original{number}'] = value
    if old_transformers:  # it takes the older weight norm where torch lacks the newer
        monkeypatch.delattr(torch.nn.utils.parametrizations, 'weight_norm')
    model = built(checkpoint)
    assert hasattr(model.hubert.encoder.pos_conv_embed.conv, 'weight_g') is old_transformers
    wave = torch.randn(1, 500)
    torch.testing.assert_close(features(model, wave), reference_layers(hubert, wave)[1], atol=1e-5, rtol=0)


def test_a_batch_norm_in_the_place_of_the_weight_norm():
    hubert, checkpoint = make_checkpoint('base', conv_pos_batch_norm=True)
    hubert.encoder.pos_conv_embed.batch_norm.running_mean.normal_()
    hubert.encoder.pos_conv_embed.batch_norm.running_var.uniform_(0.5, 2)
    checkpoint['model'] = {
        name.replace('pos_conv_embed.batch_norm.', 'pos_conv.0.').replace('pos_conv_embed.conv.', 'pos_conv.1.'): value
        for name, value in fairseq_weights(hubert, 'base').items()
        if name != 'encoder.pos_conv.0.bias'
    }
    checkpoint['model']['encoder.pos_conv.1.bias'] = hubert.encoder.pos_conv_embed.conv.bias.detach()
    wave = torch.randn(1, 500)
    torch.testing.assert_close(features(built(checkpoint), wave), reference_layers(hubert, wave)[1], atol=1e-5, rtol=0)


def test_no_projection_between_equal_widths():
    changes = {'conv_dim': [12, 12, 12, 24]}
    settings = make_settings('base', conv_feature_layers='[(12,10,5)] + [(12,3,2)]*2 + [(24,2,2)]')
    hubert, checkpoint = make_checkpoint('base', settings, **changes)
    hubert.feature_projection.projection = torch.nn.Identity()
    for parameter in ('weight', 'bias'):
        del checkpoint['model'][f'post_extract_proj.{parameter}']
    wave = torch.randn(1, 500)
    torch.testing.assert_close(features(built(checkpoint), wave), reference_layers(hubert, wave)[1], atol=1e-5, rtol=0)


# What comes back, and errors that name what is wrong


def test_paths_and_mappings_give_models_settings_and_the_task(tmp_path):
    _, checkpoint = make_checkpoint('base')
    paths = [tmp_path / 'one.pt', tmp_path / 'two.pt']
    for path in paths:
        save_with_namespace(checkpoint, path)
    task = object()
    models, cfg, same_task = load_model_ensemble_and_task(paths, task=task)
    assert len(models) == 2
    assert not any(model.training for model in models)
    assert cfg['encoder_layers'] == 3
    assert same_task is task

    (model,), cfg, task = load_model_ensemble_and_task(str(paths[0]))
    assert type(cfg) is dict
    assert task is None
    wave = torch.randn(1, 500)
    assert torch.equal(features(model, wave), features(models[1], wave))


def test_files_and_options_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pt does not exist'):
        load_model_ensemble_and_task([tmp_path / 'nowhere.pt'])
    with pytest.raises(ValueError, match='no checkpoint was given'):
        load_model_ensemble_and_task([])
    _, checkpoint = make_checkpoint('base')
    for option in ({'arg_overrides': {'data': '.'}}, {'strict': False}, {'suffix': '-a'}, {'num_shards': 2}):
        with pytest.raises(ValueError, match=next(iter(option))):
            load_model_ensemble_and_task({'hubert.pt': checkpoint}, **option)


def test_parameters_that_do_not_fit_are_named():
    _, checkpoint = make_checkpoint('base')
    weights = checkpoint['model']
    del weights['encoder.layers.1.fc2.bias']
    weights['encoder.layers.0.adapter.weight'] = torch.zeros(1)
    weights['layer_norm.bias'] = torch.zeros(3)
    with pytest.raises(ValueError, match='do not fit') as raised:
        built(checkpoint)
    message = str(raised.value)
    assert 'hubert.pt' in message
    assert 'unknown to this model: encoder.layers.0.adapter.weight' in message
    assert "missing (by transformers' names): encoder.layers.1.feed_forward.output_dense.bias" in message
    assert 'of another shape than the settings say: layer_norm.bias (3,) instead of (20,)' in message


@pytest.mark.parametrize(
    ('extra', 'model'),
    [
        ('quantizer.vars', 'wav2vec 2.0'),
        ('w2v_encoder.proj.weight', 'a fine-tuned speech recogniser'),
        ('decoder.embed_tokens.weight', 'a model with a decoder'),
    ],
)
def test_other_models_are_refused_by_name(extra, model):
    _, checkpoint = make_checkpoint('base')
    checkpoint['model'][extra] = torch.zeros(1)
    with pytest.raises(ValueError, match=f'holds {model} .*{re.escape(extra[:7])}.* offers HuBERT checkpoints'):
        built(checkpoint)


@pytest.mark.parametrize('checkpoint', [[], {}, {'model': None}, {'model': {}}, {'model': {'encoder.x': 1}}])
def test_what_is_no_checkpoint_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r'hubert\.pt .*offers HuBERT checkpoints'):
        built(checkpoint)


def test_vq_wav2vec_says_what_is_offered(tmp_path):
    weights = {
        'feature_extractor.conv_layers.0.0.weight': torch.zeros(4, 1, 10),
        'vector_quantizer.embedding': torch.zeros(8, 2, 4),
        'feature_aggregator.conv_layers.0.1.weight': torch.zeros(4, 4, 2),
    }
    torch.save({'args': argparse.Namespace(arch='wav2vec'), 'model': weights}, tmp_path / 'vq.pt')
    with pytest.raises(ValueError, match=r'vq\.pt holds vq-wav2vec .*HubertWithKmeans'):
        FairseqVQWav2Vec(tmp_path / 'vq.pt')


# Files that want to run something


class Attack:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


ATTACKS = {
    'os.system': lambda marker: Attack(os.system, f'touch {marker}'),
    'builtins.eval': lambda marker: Attack(eval, f'open({str(marker)!r}, "w").close()'),
    'builtins.exec': lambda marker: Attack(exec, f'open({str(marker)!r}, "w").close()'),
    'builtins.open': lambda marker: Attack(open, str(marker), 'w'),
    'subprocess.check_call': lambda marker: Attack(subprocess.check_call, ['touch', str(marker)]),
}

HIDING_PLACES = {
    'in the open': lambda named, attack: attack,
    'state of an inert class': lambda named, attack: with_state(named.Dictionary, symbols=[attack]),
    'arguments of an inert class': lambda named, attack: Attack(named.Dictionary, attack),
    'attribute of a namespace': lambda named, attack: argparse.Namespace(arch='hubert', data=attack),
    'default of a dict': lambda named, attack: collections.defaultdict(dict, a=attack),
    'state of an ordered dict': lambda named, attack: with_state(collections.OrderedDict, _metadata=attack),
}


@pytest.mark.parametrize(
    ('name', 'place'),
    [*((name, 'in the open') for name in ATTACKS), *(('builtins.open', place) for place in [*HIDING_PLACES][1:])],
)
def test_a_checkpoint_cannot_run_anything(name, place, tmp_path):
    marker = tmp_path / 'ran'
    _, checkpoint = make_checkpoint('base')
    with classes_named('fairseq.data.dictionary.Dictionary') as named:
        named.Dictionary.__init__ = lambda self, *args: None
        hidden = HIDING_PLACES[place](named, ATTACKS[name](marker))
        torch.save({**checkpoint, 'task_state': hidden}, tmp_path / 'hubert.pt')

        torch.load(tmp_path / 'hubert.pt', weights_only=False)
        assert marker.exists(), 'the attack itself does not work, so this test would show nothing'
        marker.unlink()

    save_kmeans(torch.randn(8, 24), tmp_path / 'kmeans.bin')
    with pytest.raises(pickle.UnpicklingError):
        HubertWithKmeans(tmp_path / 'hubert.pt', tmp_path / 'kmeans.bin')
    with pytest.raises(ValueError, match=r'hubert\.pt holds more than the data'):
        load_model_ensemble_and_task([tmp_path / 'hubert.pt'])
    assert not marker.exists()


def test_inert_objects_keep_their_state_apart_and_other_classes_stay_refused(tmp_path):
    names = ('fairseq.data.dictionary.Dictionary', 'fairseq.data.dictionary.Other', 'omegaconf.omegaconf.OmegaConf')
    state = {'__class__': argparse.Namespace, '__setstate__': 1, 'args': 2, 'stands_for': 'me'}
    with classes_named(*names) as named:
        torch.save(with_state(named.Dictionary, **state), tmp_path / 'inert.pt')
        for kind in (named.Other, named.OmegaConf):
            torch.save(with_state(kind, a=1), tmp_path / 'object.pt')
            with pytest.raises(pickle.UnpicklingError, match=kind.__name__):
                torch.load(tmp_path / 'object.pt', weights_only=True)
    inert = torch.load(tmp_path / 'inert.pt', weights_only=True)
    assert type(inert).__mro__[1] is fairseq.inert.Inert
    assert repr(inert) == '<inert fairseq.data.dictionary.Dictionary>'
    assert inert.args == ()
    assert inert.state == state


def test_a_program_with_classes_of_its_own_keeps_them(tmp_path):
    """In a program of its own, as it is about what is registered before and after `import fairseq`. It has an
    omegaconf, and classes of its own under a name of ours."""
    _, checkpoint = make_checkpoint('base')
    save_with_omegaconf(checkpoint, tmp_path / 'omegaconf.pt')
    save_with_dictionary(checkpoint, tmp_path / 'dictionary.pt')
    for name, classes in {
        'base': ('ContainerMetadata', 'Metadata'),
        'dictconfig': ('DictConfig',),
        'listconfig': ('ListConfig',),
        'nodes': ('AnyNode', 'BooleanNode', 'IntegerNode', 'StringNode'),
    }.items():
        module = tmp_path / 'omegaconf' / f'{name}.py'
        module.parent.mkdir(exist_ok=True)
        module.write_text('\n'.join(f'class {kind}: pass' for kind in classes))
    program = f"""
        import operator, pickle, sys, torch
        from torch.serialization import add_safe_globals

        class Mine: pass
        add_safe_globals([(Mine, 'fairseq.data.dictionary.Dictionary')])
        import fairseq
        assert callable(fairseq.checkpoint_utils.load_model_ensemble_and_task)
        assert 'transformers' not in sys.modules, 'import fairseq imports transformers'
        assert 'omegaconf' not in sys.modules, 'import fairseq imports omegaconf'

        checkpoint = torch.load({str(tmp_path / 'dictionary.pt')!r})
        assert type(checkpoint['task_state']['dictionaries'][0]) is Mine

        try:
            torch.load({str(tmp_path / 'omegaconf.pt')!r})
        except pickle.UnpicklingError as error:
            assert 'omegaconf' in str(error)
        else:
            raise AssertionError('omegaconf is not for us to register')

        from omegaconf import base, dictconfig, listconfig, nodes
        modules = (base, dictconfig, listconfig, nodes)
        add_safe_globals([kind for module in modules for kind in vars(module).values() if isinstance(kind, type)])
        add_safe_globals([operator.getitem])
        checkpoint = torch.load({str(tmp_path / 'omegaconf.pt')!r})
        assert type(checkpoint['cfg']) is dictconfig.DictConfig
        [model], cfg, _ = fairseq.checkpoint_utils.load_model_ensemble_and_task({{'a.pt': checkpoint}})
        assert cfg['common'] == {{'seed': 1337, 'user_dir': None}} and cfg['model']['latent'] == [2]
        assert len(model.hubert.encoder.layers) == 3
    """
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])}
    subprocess.run([sys.executable, '-c', textwrap.dedent(program)], cwd=ROOT, env=environment, check=True)
