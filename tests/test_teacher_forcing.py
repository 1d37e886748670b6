"""Features for training beside audiolm-pytorch's own forward: values and gradients, for all that a stage may be."""

import copy

import audiolm_stages as stages
import pytest
import torch
import torch.nn.functional as F
from audiolm_stages import COARSE, CODES, FINE, SEMANTIC
from hyper_connections.hyper_connections import HyperConnections
from torch import nn

from musiclm_pytorch.audiolm import teacher_forcing
from musiclm_pytorch.audiolm.position_bias import without_denormals
from musiclm_pytorch.audiolm.residual_streams import ResidualStreams
from musiclm_pytorch.audiolm.teacher_forcing import coarse_features, fine_features, semantic_features

OPTIONS = dict(
    plain={},
    crossing=dict(audio_text_condition=True),
    crossing_projected=dict(audio_text_condition=True, cond_dim=24),
    prefixed=dict(audio_text_condition=True, cond_as_self_attn_prefix=True),
    one_stream=dict(num_residual_streams=1),
    three_streams=dict(num_residual_streams=3, audio_text_condition=True),
    no_position_bias=dict(rel_pos_bias=False),
    null_keys=dict(rel_pos_bias=False, num_null_kv=2),
    flash=dict(flash_attn=True),
    no_value_residual=dict(add_value_residual=False, audio_text_condition=True),
    dropping=dict(attn_dropout=0.3, ff_dropout=0.2),
)  # fmt: skip


def make_case(stage, options):
    """A stage, its own logits of some tokens, and ours, both as functions of the model."""
    torch.manual_seed(1)
    model = getattr(stages, f'{stage}_stage')(**options).train()
    seen = None
    if stage == 'semantic':
        ids = torch.randint(SEMANTIC, (2, 150))
        mask = torch.rand(2, 150) > 0.3
        given, seen = dict(ids=ids, self_attn_mask=mask), F.pad(mask, (1, 0), value=True)
    elif stage == 'coarse':
        semantic, coarse = torch.randint(SEMANTIC, (2, 33)), torch.randint(CODES, (2, 40 * COARSE + 1))
        seen = torch.rand(2, 33 + 40 * COARSE + 3) > 0.3
        given = dict(semantic_token_ids=semantic, coarse_token_ids=coarse, self_attn_mask=seen)
    else:
        coarse, fine = torch.randint(CODES, (2, 30 * COARSE)), torch.randint(CODES, (2, 30 * FINE - 1))
        coarse[1, -2 * COARSE :] = -1
        given = dict(coarse_token_ids=coarse, fine_token_ids=fine)
    if seen is not None:
        seen[:, 0] = True

    conditioning = None
    if options.get('audio_text_condition'):
        conditioning = torch.randn(2, 3, options.get('cond_dim', 32))
        conditioning[1] = 0 if stage != 'semantic' else 1

    def genuine(model):
        inputs = {key: it.clone() for key, it in given.items()}
        logits = model(**inputs, text_embeds=conditioning, cond_drop_prob=0.0)
        return list(logits) if isinstance(logits, tuple) else [logits]

    def own(model):
        keywords = dict(seen=seen, conditioning=conditioning)
        if stage == 'semantic':
            return [model.to_logits(semantic_features(model, ids, **keywords))]
        if stage == 'coarse':
            first, second = coarse_features(model, semantic, coarse, **keywords)
            return [model.to_semantic_logits(first), taking_turns(second, model.coarse_logit_weights)]
        first, second = fine_features(model, coarse, fine, **keywords)
        return [taking_turns(first, model.coarse_logit_weights), taking_turns(second, model.fine_logit_weights)]

    return model, genuine, own


def taking_turns(features, weights):
    levels = torch.arange(features.shape[1]) % len(weights)
    return torch.einsum('b n d, n c d -> b n c', features, weights[levels])


def gradients(model, compute):
    model = copy.deepcopy(model)
    torch.manual_seed(2)  # of dropout
    out = compute(model)
    sum(it.sin().mean() for it in out).backward()
    return out, {name: it.grad for name, it in model.named_parameters() if it.grad is not None}


def compare(gradient, wanted):
    assert gradient.keys() >= wanted.keys()
    rounding = 1e-5 * torch.stack([it.norm() for it in wanted.values()]).norm()  # all that some have
    for key, it in gradient.items():
        difference = it - wanted.get(key, 0)
        assert difference.norm() < 1e-3 * (it - difference).norm() + rounding, key


@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.parametrize('stage', ['semantic', 'coarse', 'fine'])
@pytest.mark.filterwarnings('ignore:.*sdp_kernel.*:FutureWarning')
def test_values_and_gradients_of_audiolm_pytorch(stage, name):
    model, genuine, own = make_case(stage, OPTIONS[name])
    (expected, wanted), (found, gradient) = gradients(model, genuine), gradients(model, own)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    compare(gradient, wanted)


@pytest.mark.parametrize('stage', ['semantic', 'coarse', 'fine'])
def test_what_is_left_to_audiolm_pytorch_gives_the_same(stage, monkeypatch):
    """As on a GPU: whole attention, and its own residual streams."""
    model, _, own = make_case(stage, dict(audio_text_condition=True))
    found, gradient = gradients(model, own)
    monkeypatch.setattr(teacher_forcing, '_runs_by_blocks', lambda *_: False)
    monkeypatch.setattr('musiclm_pytorch.audiolm.residual_streams._is_simple', lambda *_: False)
    expected, wanted = gradients(model, own)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    compare(gradient, wanted)


# ---- residual streams ----


class Network(nn.Module):
    """What `ResidualStreams` needs of a transformer: two branches."""

    def __init__(self, streams, dim, **keywords):
        super().__init__()
        _, self.expand_streams, self.reduce_streams = HyperConnections.get_init_and_expand_reduce_stream_functions(
            streams
        )
        connections = [HyperConnections(streams, dim=dim, branch=nn.Linear(dim, dim), **keywords) for _ in range(2)]
        self.layers = nn.ModuleList([nn.ModuleList(connections)])
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def genuine(self, x):
        x = self.expand_streams(x)
        for connection in self.layers[0]:
            x = connection(x)
        return self.reduce_streams(x)

    def own(self, x):
        residual = ResidualStreams(self, x.device)
        x = residual.expand(x)
        for connection in self.layers[0]:
            branch_input, mixed, rest = residual.enter(connection, x)
            x = residual.leave(connection, connection.branch(branch_input), mixed, **rest)
        return residual.reduce(x)


@pytest.mark.parametrize(('b', 'n', 'streams', 'dim'), [(1, 1, 2, 1), (2, 7, 3, 20), (3, 65, 4, 33)])
def test_streams_and_their_gradients(b, n, streams, dim):
    torch.manual_seed(3)
    network = Network(streams, dim).double()
    x = torch.randn(b, n, dim, dtype=torch.float64)
    x[0, 0] = 1e-14  # shorter than norms are taken to be
    weight = torch.randn(b, n, dim, dtype=torch.float64)
    results = []
    for compute in (network.genuine, network.own):
        given = x.clone().requires_grad_()
        out = compute(given)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [given, *network.parameters()])])
    assert ResidualStreams(network, x.device).together
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_streams_stay_as_precise_as_the_weights_under_autocast():
    torch.manual_seed(3)
    network, x = Network(4, 16), torch.randn(2, 9, 16, requires_grad=True)
    for connection in network.layers[0]:
        connection.branch = nn.Identity()  # whose products would be in half precision
    with torch.autocast('cpu', torch.bfloat16):
        found = network.own(x)
        gradient = torch.autograd.grad(found.sum(), x)
    expected = network.own(x)
    assert torch.equal(found, expected)
    assert torch.equal(gradient[0], torch.autograd.grad(expected.sum(), x)[0])


def test_connections_set_up_in_another_way_are_left_alone():
    network = Network(4, 16, tanh=False)
    assert not ResidualStreams(network, torch.device('cpu')).together
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(network.own(x), network.genuine(x))


def test_next_to_nothing_becomes_nothing():
    x = torch.tensor([1e-39, -1e-25, 1e-10, -2.0], requires_grad=True)
    out = without_denormals(x)
    assert out.tolist() == [0.0, 0.0, x[2].item(), -2.0]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [0.0, 0.0, 1.0, 1.0]
