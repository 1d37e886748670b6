"""Features for training beside audiolm-pytorch's own forward: values and gradients, for all that a stage may be."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import audiolm_stages as stages
from helpers.audiolm_stages import COARSE, CODES, FINE, SEMANTIC
from helpers.training import assert_same
from hyper_connections.hyper_connections import HyperConnections
from torch import nn

from musiclm_pytorch.audiolm import convert
from musiclm_pytorch.audiolm.convert import audiolm_stage, own_stage
from musiclm_pytorch.audiolm.stages import STAGES
from musiclm_pytorch.audiolm.transformer import HyperConnection, without_denormals
from musiclm_pytorch.kernels import plain_kernels

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
        model = own_stage(model)
        tokens = dict(semantic=lambda: (ids,), coarse=lambda: (semantic, coarse), fine=lambda: (coarse, fine))[stage]()
        features = model.features(*tokens, seen=seen, conditioning=conditioning)
        heads = [model.own_heads()] if stage == 'semantic' else [model.given_heads(), model.own_heads()]
        return [taking_turns(*it) for it in zip(features, heads, strict=True)]

    return model, genuine, own


def taking_turns(features, heads):
    return torch.stack([F.linear(it, *heads[i % len(heads)]) for i, it in enumerate(features.unbind(dim=1))], dim=1)


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


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.filterwarnings('ignore:.*sdp_kernel.*:FutureWarning')
def test_values_and_gradients_of_audiolm_pytorch(stage, name):
    """Every second option with a mask of the tokens that attention sees."""
    model, genuine, own = make_case(stage, OPTIONS[name], masked=list(OPTIONS).index(name) % 2 == 0)
    compare(gradients(model, own), gradients(model, genuine))


@pytest.mark.parametrize('stage', STAGES)
def test_plain_operators_give_the_same(stage):
    """As on a GPU: whole attention, and gradients of streams by autograd."""
    model, _, own = make_case(stage, dict(audio_text_condition=True))
    found = gradients(model, own)
    with plain_kernels():
        compare(found, gradients(model, own))


@pytest.mark.parametrize('stage', STAGES)
def test_dropout_of_attention_that_is_set_later(stage):
    model, genuine, own = make_case(stage, {})
    model.transformer.layers[0].eval()
    attention = model.transformer.layers[1][0].branch
    attention.attn_dropout.p = attention.attend.attn_dropout.p = 0.5
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
    model = own_stage(stages.fine_stage())
    for coarse, fine in ((COARSE + 1, 1), (COARSE, FINE + 1)):
        with pytest.raises(ValueError, match='not of the same whole frames'):
            model.features(torch.zeros(1, coarse, dtype=torch.long), torch.zeros(1, fine, dtype=torch.long))


# ---- weights both ways ----


@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.parametrize('stage', STAGES)
def test_weights_go_both_ways(stage, name):
    """Under the same names, in the same order, drawn alike; and those of audiolm-pytorch are used where they are."""
    theirs = getattr(stages, f'{stage}_stage')(**OPTIONS[name])
    ours = own_stage(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one is other
    ours.double()
    assert {it.dtype for it in theirs.state_dict().values()} == {torch.float64}
    ours.float()
    back = audiolm_stage(ours)
    assert type(back) is type(theirs)
    assert_same(back.state_dict(), theirs.state_dict())
    fresh = []
    for kind in (type(theirs), type(ours)):
        torch.manual_seed(3)
        random.seed(3)
        fresh.append(kind(**convert.keywords_of(theirs)).state_dict())
    assert [*fresh[0]] == [*fresh[1]]
    assert_same(*fresh)


def test_what_is_no_stage():
    class Other(type(stages.coarse_stage())):
        def forward(self):
            return None

    with pytest.raises(TypeError, match='a forward of its own'):
        own_stage(Other(num_semantic_tokens=2, codebook_size=2, num_coarse_quantizers=1, dim=4, depth=1))
    with pytest.raises(TypeError, match='must be a FineTransformer, got a CoarseTransformer'):
        own_stage(stages.coarse_stage(), STAGES['fine'])
    with pytest.raises(ValueError, match="'somewhere/t5' is not known here; say cond_dim"):
        STAGES['semantic'](num_semantic_tokens=2, dim=4, depth=1, t5_name='somewhere/t5')


# ---- residual streams ----


class Network(nn.Module):
    """Two branches around which streams are mixed, by audiolm-pytorch's connections and by ours of the same weights."""

    def __init__(self, streams, dim):
        super().__init__()
        _, self.expand_streams, self.reduce_streams = HyperConnections.get_init_and_expand_reduce_stream_functions(
            streams
        )
        self.theirs = nn.ModuleList([HyperConnections(streams, dim=dim, branch=nn.Linear(dim, dim)) for _ in range(2)])
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        ours = [HyperConnection(dim, it.branch, streams) for it in self.theirs]
        for one, other in zip(ours, self.theirs):
            one._parameters, one.norm._parameters = other._parameters, other.norm._parameters
        self.ours, self.streams = tuple(ours), streams

    def genuine(self, x):
        x = self.expand_streams(x)
        for connection in self.theirs:
            x = connection(x)
        return self.reduce_streams(x)

    def own(self, x):
        x = x[:, :, None].expand(-1, -1, self.streams, -1)
        for connection in self.ours:
            branch_input, kept = connection.width(x, connection.mixing())
            x = connection.depth(connection.branch(branch_input), *kept)
        return x.sum(dim=2)


@pytest.mark.parametrize(('b', 'n', 'streams', 'dim'), [(1, 1, 2, 1), (2, 7, 3, 20), (3, 65, 4, 33)])
def test_streams_and_their_gradients(b, n, streams, dim):
    torch.manual_seed(3)
    network = Network(streams, dim).double()
    x = torch.randn(b, n, dim, dtype=torch.float64)
    x[0, 0] = 1e-14  # shorter than norms are taken to be
    weight = torch.randn(b, n, dim, dtype=torch.float64)

    def result(compute):
        given = x.clone().requires_grad_()
        out = compute(given)
        return [out, *torch.autograd.grad((out * weight).sum(), [given, *network.parameters()])]

    expected, found = result(network.genuine), result(network.own)
    with plain_kernels():
        plain = result(network.own)
    for it in zip(expected, found, plain):
        torch.testing.assert_close(it[1], it[0], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(it[2], it[0], atol=1e-9, rtol=1e-9)


def test_streams_stay_as_precise_as_the_weights_under_autocast():
    torch.manual_seed(3)
    network, x = Network(4, 16), torch.randn(2, 9, 16, requires_grad=True)
    for connection in network.ours:
        connection.branch = nn.Identity()  # whose products would be in half precision
    with torch.autocast('cpu', torch.bfloat16):
        found = network.own(x)
        gradient = torch.autograd.grad(found.sum(), x)
    expected = network.own(x)
    assert torch.equal(found, expected)
    assert torch.equal(gradient[0], torch.autograd.grad(expected.sum(), x)[0])


def test_next_to_nothing_becomes_nothing():
    x = torch.tensor([1e-39, -1e-25, 1e-10, -2.0, 0.0], requires_grad=True)
    out = without_denormals(x)
    assert out.tolist() == [0.0, 0.0, x[2].item(), -2.0, 0.0]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
