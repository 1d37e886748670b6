"""Features for training beside audiolm-pytorch's own forward: values and gradients, for all that a stage may be."""

import copy

import audiolm_stages as stages
import pytest
import torch
import torch.nn.functional as F
from audiolm_stages import COARSE, CODES, FINE, SEMANTIC
from hyper_connections.hyper_connections import HyperConnections
from torch import nn

from musiclm_pytorch.audiolm.position_bias import without_denormals
from musiclm_pytorch.audiolm.residual_streams import ResidualStreams
from musiclm_pytorch.audiolm.teacher_forcing import coarse_features, fine_features, semantic_features
from musiclm_pytorch.mulan.kernels import plain_kernels

STAGES = ('semantic', 'coarse', 'fine')
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
    flash_prefixed=dict(flash_attn=True, audio_text_condition=True, cond_as_self_attn_prefix=True),
    dropping=dict(attn_dropout=0.3, ff_dropout=0.2),
)


def make_case(stage, options, masked=True):
    """A stage, its own logits of some tokens, and ours, both as functions of the model."""
    torch.manual_seed(1)
    model = getattr(stages, f'{stage}_stage')(**options).train()
    seen = None
    if stage == 'semantic':
        ids = torch.randint(SEMANTIC, (2, 150))
        mask = torch.rand(2, 150) > 0.3
        ids[1, 120:] = -1
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
    if not masked:
        seen = None
        given.pop('self_attn_mask', None)

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


def compare(ours, theirs):
    """Values and gradients, as of `gradients`."""
    (found, gradient), (expected, wanted) = ours, theirs
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    assert gradient.keys() >= wanted.keys()
    rounding = 1e-5 * torch.stack([it.norm() for it in wanted.values()]).norm()  # all that some have
    for key, it in gradient.items():
        difference = it - wanted.get(key, 0)
        assert difference.norm() < 1e-3 * (it - difference).norm() + rounding, key


@pytest.mark.parametrize('masked', [True, False])
@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.filterwarnings('ignore:.*sdp_kernel.*:FutureWarning')
def test_values_and_gradients_of_audiolm_pytorch(stage, name, masked):
    model, genuine, own = make_case(stage, OPTIONS[name], masked)
    compare(gradients(model, own), gradients(model, genuine))


@pytest.mark.parametrize('stage', STAGES)
def test_what_is_left_to_audiolm_pytorch_gives_the_same(stage):
    """As on a GPU: whole attention, and its own residual streams."""
    model, _, own = make_case(stage, dict(audio_text_condition=True))
    found = gradients(model, own)
    with plain_kernels():
        compare(found, gradients(model, own))


@pytest.mark.parametrize('stage', STAGES)
def test_dropout_of_attention_that_is_set_later(stage):
    model, genuine, own = make_case(stage, {})
    model.transformer.layers[0].eval()
    model.transformer.layers[1][0].branch.attend.attn_dropout.p = 0.5
    compare(gradients(model, own), gradients(model, genuine))


@pytest.mark.parametrize('stage', STAGES)
def test_a_position_bias_that_begins_at_nothing_learns(stage):
    model, genuine, own = make_case(stage, {})
    last = model.pos_bias_mlp[-1] if stage == 'fine' else model.transformer.rel_pos_bias.net[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    found = gradients(model, own)
    compare(found, gradients(model, genuine))
    name = 'pos_bias_mlp.4.weight' if stage == 'fine' else 'transformer.rel_pos_bias.net.3.weight'
    assert found[1][name].abs().sum() > 0


@pytest.mark.parametrize('stage', STAGES)
def test_under_autocast_products_are_in_half_precision(stage):
    model, _, own = make_case(stage, dict(audio_text_condition=True))
    expected, _ = gradients(model, own)

    def in_half(model):
        with torch.autocast('cpu', torch.bfloat16):
            return [it.float() for it in own(model)]

    found, gradient = gradients(model, in_half)
    for one, other in zip(found, expected, strict=True):
        assert 0 < (one - other).norm() < 0.05 * other.norm()
    assert all(it.dtype == torch.float32 for it in gradient.values())


def test_second_derivatives_are_refused_or_plain():
    model, _, own = make_case('semantic', {})
    weight = model.transformer.layers[0][0].branch.to_q.weight
    (gradient,) = torch.autograd.grad(own(model)[0].sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.square().sum().backward()
    with plain_kernels():
        (gradient,) = torch.autograd.grad(own(model)[0].sum(), weight, create_graph=True)
    gradient.square().sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize('stage', STAGES)
def test_conditioning_that_does_not_fit(stage):
    _, _, own = make_case(stage, dict(audio_text_condition=True))
    with pytest.raises(ValueError, match='was built without conditioning: pass none'):
        own(getattr(stages, f'{stage}_stage')())
    with pytest.raises(ValueError, match='takes conditioning 24 wide, got 32'):
        own(getattr(stages, f'{stage}_stage')(audio_text_condition=True, cond_dim=24))
    _, _, own = make_case(stage, {})
    with pytest.raises(ValueError, match='was built with conditioning: pass it'):
        own(getattr(stages, f'{stage}_stage')(audio_text_condition=True))


def test_fine_tokens_of_other_frames():
    model = stages.fine_stage()
    for coarse, fine in ((COARSE + 1, 1), (COARSE, FINE + 1)):
        with pytest.raises(ValueError, match='not of the same whole frames'):
            fine_features(model, torch.zeros(1, coarse, dtype=torch.long), torch.zeros(1, fine, dtype=torch.long))


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
    x = torch.tensor([1e-39, -1e-25, 1e-10, -2.0, 0.0], requires_grad=True)
    out = without_denormals(x)
    assert out.tolist() == [0.0, 0.0, x[2].item(), -2.0, 0.0]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
