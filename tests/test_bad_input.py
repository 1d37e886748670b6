"""Whatever is passed in, the answer is a finite one or a ValueError or TypeError that says what to do."""

import math
import re

import pytest
import torch
from conftest import tiny_mulan
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

FLOATS = [torch.float32, torch.float64, torch.bfloat16]
OTHERS = [torch.int16, torch.uint8, torch.int64, torch.bool, torch.complex64]
SPOILERS = [0.0, math.nan, math.inf, -math.inf, 1e30]

# most draws are sound in most respects, so that the rare bad one meets otherwise good input
dimensions = st.sampled_from([2, 2, 2, 2, 1, 3])
batches = st.sampled_from([0, 1, 2, 2, 3, 3])
samples = st.sampled_from([0, 1, 30, 179, 180, 181, 400, 1000, 1000, 1000])
lengths = st.none() | st.lists(st.sampled_from([-1, 0, 1, 150, 180, 400, 1000, 1001, 10**9]), min_size=0, max_size=4)
strings = (
    st.lists(st.text(max_size=40), max_size=4) | st.lists(st.integers() | st.none(), max_size=2) | st.text(max_size=5)
)
ids = st.tuples(
    batches, st.sampled_from([0, 1, 5, 12, 13, 40]), st.sampled_from([torch.int64, torch.int32, torch.float32])
)

torch.manual_seed(0)
MODELS = {
    'fixed': tiny_mulan(dict(depth=1), dict(depth=1, num_tokens=49408)),
    'variable': tiny_mulan(
        dict(depth=1, support_variable_length=True, max_audio_length=900, audio_sample_rate=8000),
        dict(depth=1, num_tokens=49408),
        sigmoid_contrastive_loss=True,
        hierarchical_contrastive_loss=True,
    ),
}


def waves(ndim, batch, count, dtype, spoiler):
    shape = {1: (count,), 2: (batch, count), 3: (batch, 1, count)}[ndim]
    wavs = torch.randn(shape)
    if wavs.numel() and spoiler is not None:
        wavs.view(-1)[-1] = spoiler
    return wavs.to(dtype)


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    model=st.sampled_from(sorted(MODELS)),
    training=st.booleans(),
    ndim=dimensions,
    batch=batches,
    count=samples,
    dtype=st.sampled_from(FLOATS * 4 + OTHERS),
    spoiler=st.none() | st.sampled_from(SPOILERS),
    audio_lengths=lengths,
    sample_rate=st.sampled_from([None, None, None, 8000, 16000, 0, -5]),
    texts=st.none() | ids,
    raw_texts=st.none() | strings,
    top=st.sampled_from([99, 49407, 49408, -1]),
    asked=st.sampled_from([None, 'return_latents', 'return_similarities', 'return_pairwise_similarities']),
)
def test_finite_or_a_clear_error(
    model, training, ndim, batch, count, dtype, spoiler, audio_lengths, sample_rate, texts, raw_texts, top, asked
):
    mulan = MODELS[model].train(training)
    if texts is not None:
        rows, tokens, kind = texts
        texts = torch.randint(1, 50, (rows, tokens)).to(kind)
        if texts.numel():
            texts.view(-1)[-1] = top
    arguments = dict(texts=texts, raw_texts=raw_texts, audio_lengths=audio_lengths, sample_rate=sample_rate)
    if asked is not None:
        arguments[asked] = True
    try:
        with torch.no_grad():
            out = mulan(waves(ndim, batch, count, dtype, spoiler), **arguments)
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
