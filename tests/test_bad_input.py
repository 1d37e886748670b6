"""Whatever is passed in, the answer is a finite one or a ValueError or TypeError that says what to do."""

import math
import re

import pytest
import torch
from helpers.models import tiny_mulan
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

torch.manual_seed(0)
MODELS = {
    'fixed': tiny_mulan(dict(depth=1), dict(depth=1, num_tokens=49408)),
    'variable': tiny_mulan(
        dict(depth=1, support_variable_length=True, max_audio_length=900, audio_sample_rate=8000),
        dict(depth=1, num_tokens=49408),
        sigmoid_contrastive_loss=True,
        hierarchical_contrastive_loss=True,
    ),
    'log-mel': tiny_mulan(
        dict(depth=1, audio_sample_rate=8000, spec_n_fft=256, spec_n_mels=16), dict(depth=1, num_tokens=49408)
    ),
}

HALVES = [torch.float64, torch.bfloat16, torch.float16]
OTHERS = [torch.int16, torch.uint8, torch.int64, torch.bool, torch.complex64]

# what may be wrong with a call that is sound otherwise
SPOILED = {
    'ndim': st.sampled_from([1, 3]),
    'batch': st.sampled_from([0, 1, 4]),
    'count': st.sampled_from([0, 1, 30, 65, 128, 179, 180, 181, 400]),
    'dtype': st.sampled_from(HALVES + OTHERS),
    'sample': st.sampled_from([0.0, 1.0, 1e20, 1e30, math.nan, math.inf, -math.inf]),
    'audio_lengths': st.lists(st.sampled_from([-1, 0, 1, 150, 180, 400, 1000, 1001, 10**9, 2.5]), max_size=4),
    'sample_rate': st.sampled_from([8000, 16000, 22050, 0, -5, 8000.5, '8k']),
    'texts': st.tuples(
        st.sampled_from([0, 1, 2, 3]),
        st.sampled_from([0, 1, 5, 12, 13, 40]),
        st.sampled_from([torch.int64, torch.int32, torch.int16, torch.float32]),
        st.sampled_from([99, 49407, 49408, -1]),
    ),
    'raw_texts': st.lists(st.text(max_size=40), min_size=2, max_size=2)
    | st.lists(st.text(max_size=9) | st.integers() | st.none(), max_size=3)
    | st.text(max_size=5),
    'asked': st.sampled_from(['return_latents', 'return_similarities', 'return_pairwise_similarities']),
}


@st.composite
def calls(draw):
    names = draw(st.lists(st.sampled_from(sorted(SPOILED)), max_size=2, unique=True))
    return {name: draw(SPOILED[name]) for name in names}


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(call=calls(), model=st.sampled_from(sorted(MODELS)), training=st.booleans(), at=st.integers(0, 10**6))
def test_finite_or_a_clear_error(call, model, training, at):
    mulan = MODELS[model].train(training)
    batch, count = call.get('batch', 2), call.get('count', 1000)
    shape = {1: (count,), 2: (batch, count), 3: (batch, 1, count)}[call.get('ndim', 2)]
    wavs = torch.randn(shape)
    if 'sample' in call and wavs.numel():
        wavs.view(-1)[at % wavs.numel()] = call['sample']
    wavs = wavs.to(call.get('dtype', torch.float32))

    arguments = {name: call[name] for name in ('audio_lengths', 'sample_rate', 'raw_texts') if name in call}
    if 'texts' in call:
        rows, tokens, kind, top = call['texts']
        ids = torch.randint(1, 50, (rows, tokens))
        ids.view(-1)[-1:] = top
        arguments['texts'] = ids.to(kind)
    elif 'raw_texts' not in call:
        arguments['texts'] = torch.randint(1, 50, (batch, 5))
    if 'asked' in call:
        arguments[call['asked']] = True

    try:
        with torch.no_grad():
            out = mulan(wavs, **arguments)
    except (ValueError, TypeError) as error:
        event(f'{type(error).__name__}: {str(error)[:30]}')
        return
    event('an answer')
    for value in out if isinstance(out, tuple) else (out,):
        assert value.isfinite().all()


def test_messages_name_the_value():
    mulan = MODELS['fixed'].train()
    good = dict(wavs=torch.randn(2, 1000), texts=torch.ones(2, 5).long())
    bad = [
        (dict(wavs=torch.randn(1, 1000), texts=torch.ones(1, 5).long()), 'at least 2 pairs, got 1'),
        (dict(wavs=torch.randn(2, 1, 1000)), '(2, 1, 1000)'),
        (dict(texts=torch.full((2, 5), 60000)), '60000'),
        (dict(texts=None), 'got neither'),
        (dict(raw_texts=['a', 'b']), 'got both'),
        (dict(texts=torch.ones(3, 5).long()), '2 waves but 3 texts'),
        (dict(audio_lengths=[1000, 1000]), 'support_variable_length=True'),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=re.escape(message)):
            mulan(**{**good, **change})
