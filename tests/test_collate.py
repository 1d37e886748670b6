"""Batches of pairs: everything that upstream's data sets give is taken, and nothing is cut or guessed."""

import logging

import numpy as np
import pytest
import torch
from helpers.models import tiny_mulan
from torch.utils.data import DataLoader

from musiclm_pytorch import collate_pairs

WAVE = torch.linspace(-1, 1, 50)
IDS = torch.tensor([5, 6, 7])


@pytest.mark.parametrize(
    'item',
    [
        (WAVE, 'text'),
        ('text', WAVE),
        [WAVE, 'text'],
        (WAVE[None], 'text'),
        (torch.stack([WAVE * 2, WAVE * 0]), 'text'),
        (WAVE.double(), 'text'),
        (WAVE.numpy(), 'text'),
        dict(wavs=WAVE, raw_texts='text'),
        dict(wave=WAVE, caption='text', labels=dict(tempo=90)),
        dict(audio=WAVE.numpy(), caption='text', texts=None),
    ],
)
def test_pairs_with_strings(item):
    batch = collate_pairs([item, (WAVE[:20], 'other')])
    assert batch.keys() == {'wavs', 'audio_lengths', 'raw_texts'}
    assert batch['raw_texts'] == ['text', 'other']
    assert batch['wavs'].dtype == torch.float32
    torch.testing.assert_close(batch['wavs'][0], WAVE)
    assert torch.equal(batch['wavs'][1], torch.cat([WAVE[:20], torch.zeros(30)]))
    assert batch['audio_lengths'].tolist() == [50, 20]
    assert batch['audio_lengths'].dtype == torch.int64


def test_halves_become_floats():
    for half in (torch.float16, torch.bfloat16):
        batch = collate_pairs([(torch.stack([WAVE, WAVE]).to(half), 'x')])
        assert torch.equal(batch['wavs'][0], WAVE.to(half).float())


@pytest.mark.parametrize(
    'item',
    [
        (WAVE, IDS),
        (IDS, WAVE),
        (WAVE, IDS.int()),
        (WAVE, IDS[None]),
        (WAVE, [5, 6, np.int64(7)]),
        (WAVE, IDS.numpy()),
        (WAVE, IDS.to(torch.uint8)),
        dict(wave=WAVE, ids=IDS),
        dict(audio=WAVE, texts=[5, 6, 7]),
    ],
)
def test_pairs_with_ids_are_padded_never_cut(item):
    batch = collate_pairs([item, (WAVE[:20], torch.tensor([1])), (torch.arange(1, 10), WAVE)])
    assert batch.keys() == {'wavs', 'audio_lengths', 'texts'}
    assert batch['texts'].dtype == torch.int64
    assert batch['texts'].tolist() == [[5, 6, 7] + [0] * 6, [1] + [0] * 8, list(range(1, 10))]
    assert collate_pairs([item, (WAVE, [1])], pad_id=9)['texts'].tolist() == [[5, 6, 7], [1, 9, 9]]


def test_items_alone():
    assert collate_pairs([WAVE, WAVE[:9]]).keys() == {'wavs', 'audio_lengths'}
    assert collate_pairs(['a', 'b']) == dict(raw_texts=['a', 'b'])
    assert collate_pairs([IDS, [1]])['texts'].tolist() == [[5, 6, 7], [1, 0, 0]]


def test_maximum_length_crops_waves_only():
    batch = collate_pairs([(WAVE, IDS), (WAVE[:5], IDS)], max_length=10)
    assert torch.equal(batch['wavs'][0], WAVE[:10])
    assert batch['audio_lengths'].tolist() == [10, 5]
    assert batch['texts'].shape == (2, 3)
    with pytest.raises(ValueError, match='max_length must be at least 1 sample, got 0'):
        collate_pairs([(WAVE, IDS)], max_length=0)


def test_none_is_dropped_and_counted(caplog):
    with caplog.at_level(logging.WARNING):
        batch = collate_pairs([None, (WAVE, 'a'), None, (WAVE[:5], 'b')])
    assert batch['raw_texts'] == ['a', 'b']
    assert batch['audio_lengths'].tolist() == [50, 5]
    assert 'dropped 2 of the 4 items' in caplog.text
    assert collate_pairs([None, None]) is None
    with pytest.raises(ValueError, match='there are no items'):
        collate_pairs([])


INT_WAVE = (WAVE * 1000).to(torch.int16)


@pytest.mark.parametrize(
    ('item', 'says'),
    [
        ((WAVE, WAVE), r'item 1 must be one wave and one text, got torch.float32 of shape \(50,\), torch.float32'),
        ((WAVE,), r'item 1 must be one wave and one text, got torch.float32 of shape \(50,\)$'),
        ((), 'item 1 must be one wave and one text, got nothing'),
        ((WAVE, 'a', IDS), r'item 1 must be one wave and one text, got .*, str, torch.int64'),
        (('a', 'b'), 'item 1 must be one wave and one text, got str, str$'),
        ((INT_WAVE, 'a'), r'got torch.int16 of shape \(50,\), str; integer PCM must be converted first.* / 32768'),
        ((INT_WAVE, IDS), 'integer PCM must be converted first'),
        ((torch.stack([INT_WAVE, INT_WAVE]), 'a'), r'item 1, element 0, must hold token ids of shape .*integer PCM'),
        ((WAVE, ['a', 'b']), r'item 1, element 1, must be a wave .*, token ids .* or a string, got list'),
        ((WAVE, None), r'element 1, must be .* got NoneType'),
        ((WAVE, True), r'element 1, must be .* got bool'),
        ((WAVE, torch.ones(3, dtype=torch.bool)), r'element 1, .* got torch.bool of shape \(3,\)'),
        (
            (WAVE, torch.tensor(3)),
            r'element 1, must hold token ids of shape \(tokens,\), got torch.int64 of shape \(\)',
        ),
        (dict(wave=WAVE), r'item 1 must have exactly one of texts, ids, raw_texts, caption, but its keys are wave'),
        (dict(caption='a'), r'exactly one of wavs, wave, audio, but its keys are caption'),
        (dict(wave=WAVE, audio=WAVE, caption='a'), 'exactly one of wavs, wave, audio'),
        (dict(wave=WAVE, ids=IDS, caption='a'), 'exactly one of texts, ids, raw_texts, caption'),
        (dict(wave=INT_WAVE, caption='a'), r"item 1\['wave'\] must be a floating-point wave, got torch.int16.*PCM"),
        (dict(wave=WAVE, texts='a'), r"item 1\['texts'\] must be integer token ids, got str"),
        (dict(wave=WAVE, caption=IDS), r"item 1\['caption'\] must be a string, got torch.int64"),
        (3, r'item 1 must be a wave .* got int'),
        ((WAVE, IDS), r'the items of a batch must be alike, but item 0 has .*string, item 1 has .*token ids'),
        (WAVE, r'must be alike, but item 0 has a wave and a string, item 1 has a wave$'),
    ],
)
def test_ambiguous_items_are_named(item, says):
    with pytest.raises(TypeError, match=says):
        collate_pairs([(WAVE, 'text'), item])


@pytest.mark.parametrize(
    ('wave', 'says'),
    [
        (torch.zeros(0), 'item 0: the wave is empty'),
        (torch.zeros(50, 2), r'item 0: wave must have shape .*channels, samples\), got \(50, 2\), .*wave.T'),
        (torch.zeros(1, 1, 50), 'item 0: wave must have shape'),
        (torch.tensor(0.5), 'item 0: wave must have shape'),
    ],
)
def test_wrong_shapes(wave, says):
    with pytest.raises(ValueError, match=says):
        collate_pairs([(wave, 'a')])


def test_batch_goes_into_the_model():
    mulan = tiny_mulan(dict(support_variable_length=True), dict(max_seq_len=12)).eval()
    items = [(torch.randn(1000), torch.tensor([1, 2])), (torch.randn(700), torch.tensor([3, 4, 5, 6]))]
    (batch,) = DataLoader(items, batch_size=2, collate_fn=collate_pairs)
    assert mulan(**batch).isfinite()
    # neither the padding of the wave nor that of the ids shows
    latents = mulan(**batch, return_latents=True)
    alone = mulan.get_audio_latents(items[1][0][None]), mulan.get_text_latents(items[0][1][None])
    torch.testing.assert_close(latents[0][1], alone[0][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(latents[1][0], alone[1][0], atol=1e-5, rtol=1e-4)
