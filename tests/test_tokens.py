"""The cache of tokens: what is in it, that it goes on where it was, that it knows what it was made of; and crops."""

import random

import numpy
import pytest
import torch
from helpers.stage_parts import LENGTHS, RATE, Clips, ClockCodec, ClockTokenizer, clock, compute, make_quantizer
from torch.utils.data import DataLoader

from musiclm_pytorch import SyntheticMusic
from musiclm_pytorch.audiolm.convert import SoundStream
from musiclm_pytorch.audiolm.crops import PAD, TokenCrops, collate_tokens
from musiclm_pytorch.audiolm.fingerprints import fingerprint
from musiclm_pytorch.audiolm.tokens import compute_tokens


def files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob('*.safetensors'))}


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    return compute(tmp_path_factory.mktemp('tokens'))


# ---- computing ----


def test_tokens_of_long_and_short_clips_are_those_of_the_whole(tokens):
    """Windows of 3 s with context: every frame of every clip once, in order; what cannot be read is left out."""
    semantic = TokenCrops(tokens, 'semantic', seconds=60, conditioning=False, training=False)
    fine = TokenCrops(tokens, 'fine', seconds=60, conditioning=False, training=False)
    assert semantic.items.tolist() == [0, 1, 3, 4]
    for index, seconds in enumerate((2.0, 9.6, 4.0, 4.0)):
        assert torch.equal(semantic[index]['semantic'], torch.arange(round(seconds * 50)))
        frames = torch.arange(round(seconds * 75))
        assert torch.equal(fine[index]['codec'], frames[:, None] + torch.arange(3))


def test_waves_of_one_length_are_computed_together_at_the_rate_of_each_module(tmp_path):
    tokenizer, codec = ClockTokenizer(), ClockCodec()
    tokenizer.target_sample_hz = 2 * RATE
    compute_tokens(
        Clips((2.0, 1.0, 2.0, 2.0)), tmp_path, tokenizer=tokenizer, codec=codec, batch_size=2, progress=False
    )
    assert sorted(tokenizer.seen) == [(1, 2400), (1, 4800), (2, 4800)]
    assert sorted(codec.seen) == [(1, 1200), (1, 2400), (2, 2400)]
    crops = TokenCrops(tmp_path, 'coarse', conditioning=False, training=False)
    assert len(crops[0]['semantic']) == 200
    assert crops.streams['semantic'].rate == 100


def test_an_interrupted_computation_goes_on_where_it_was(tmp_path):
    straight, stopped = tmp_path / 'straight', tmp_path / 'stopped'
    compute(straight, Clips([2.0] * 8))
    tokenizer, dataset = ClockTokenizer(), Clips([2.0] * 8)
    dataset._fail_at = 4  # neither the first nor the last, nor one of those looked at beforehand
    with pytest.raises(KeyboardInterrupt):
        compute(stopped, dataset)
    with pytest.raises(ValueError, match=r'lacks 2 of 4 shards.*compute_tokens again'):
        TokenCrops(stopped, 'semantic', conditioning=False)
    before = files(stopped)
    assert len(before) == 4
    dataset._fail_at = None
    compute(stopped, dataset, tokenizer=tokenizer)
    assert sum(shape[0] for shape in tokenizer.seen) == 4
    after = files(stopped)
    assert before.items() <= after.items()
    assert [path.read_bytes() for path in after] == [path.read_bytes() for path in files(straight)]
    assert not list(tmp_path.rglob('*.tmp'))
    compute(stopped, dataset)
    assert files(stopped) == after


def test_a_damaged_shard_is_computed_again(tmp_path, caplog):
    compute(tmp_path)
    path = tmp_path / 'codec' / '00001.safetensors'
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r'00001.safetensors is damaged'):
        TokenCrops(tmp_path, 'fine', conditioning=False)
    compute(tmp_path)
    assert 'computed again' in caplog.text
    assert path.read_bytes() == whole


@pytest.mark.parametrize('what', ['weights', 'settings', 'data', 'shards'])
def test_another_fingerprint_names_what_changed_or_starts_aside(tmp_path, what):
    compute(tmp_path / 'tokens')
    codec, keywords, dataset = ClockCodec(), {}, None
    if what == 'weights':
        codec.weight[0] = 2
    elif what == 'settings':
        codec.lost = 1
    elif what == 'data':
        dataset = Clips((*LENGTHS[:-1], 5.0))
    else:
        keywords = dict(shard_size=3)
    named = dict(weights='module.weights', settings='module.settings', data=r'data.content', shards='shard_size was 2')
    with pytest.raises(ValueError, match=rf"codec holds tokens of something else: .*{named[what]}.*on_change='aside'"):
        compute(tmp_path / 'tokens', dataset, tokenizer=None, codec=codec, **keywords)
    compute(tmp_path / 'tokens', dataset, tokenizer=None, codec=codec, on_change='aside', **keywords)
    assert (tmp_path / 'tokens' / 'codec.1' / 'stream.json').is_file()
    assert TokenCrops(tmp_path / 'tokens', 'fine', conditioning=False)
    if what == 'data':
        with pytest.raises(ValueError, match='computed from different data sets'):
            TokenCrops(tmp_path / 'tokens', 'coarse', conditioning=False)


def test_codes_of_audio_and_text_are_those_of_the_quantizer(tmp_path):
    quantizer, dataset = make_quantizer(), Clips((2.0, 3.0, 1.0, 2.0))
    mark = fingerprint(quantizer)
    compute(tmp_path, dataset, quantizer=quantizer, mulan_seconds=2.0, mulan_hop=1.0)
    assert fingerprint(quantizer) == mark
    crops = TokenCrops(tmp_path, 'semantic', training=False, seconds=1.0)
    assert crops.streams['audio'].lengths.tolist() == [1, 2, 1, 1]
    windows = torch.stack([clock(3.0)[:2400], clock(3.0)[1200:]])
    expected = quantizer.indices(windows)
    assert torch.equal(crops.streams['audio'].read(1, 0, 9), expected)
    assert torch.equal(crops[1]['conditioning'], expected[0])
    assert torch.equal(crops[2]['conditioning'], quantizer.indices(clock(1.0)[None])[0])
    texts = TokenCrops(tmp_path, 'semantic', training=False, seconds=1.0, text_share=1.0)
    for index in range(4):
        assert torch.equal(texts[index]['conditioning'], quantizer.indices(raw_texts=[f'clip {index}'])[0])
    # training the embeddings leaves the codes as they are; another MuLaN does not
    with torch.no_grad():
        quantizer.cond_embeddings['coarse'].add_(1)
    assert fingerprint(quantizer) == mark
    with torch.no_grad():
        next(iter(quantizer.mulan.parameters())).add_(1)
    assert fingerprint(quantizer) != mark


def test_a_real_codec_on_synthetic_music(tmp_path):
    """Ids of SoundStream, through the cache, are those of the module on the whole wave."""
    codec = SoundStream(
        codebook_size=16, channels=2, strides=(4, 8), channel_mults=(2, 2), codebook_dim=8, rq_num_quantizers=3,
        use_local_attn=False, target_sample_hz=8000, multi_spectral_window_powers_of_two=(6,),
    )  # fmt: skip
    music = SyntheticMusic(3, seconds=1, sample_rate=8000)
    with pytest.raises(ValueError, match='SoundStream has codebooks that no training has reached'):
        compute_tokens(music, tmp_path, codec=codec, progress=False)
    while not all(it.all() for name, it in codec.named_buffers() if name.endswith('initted')):
        codec(torch.randn(2, 4000), return_encoded=True)
    mark = fingerprint(codec)
    compute_tokens(music, tmp_path, codec=codec, progress=False, window_seconds=30)
    assert fingerprint(codec) == mark
    assert codec.training  # as it was
    codec.eval()
    crops = TokenCrops(tmp_path, 'fine', seconds=1, conditioning=False, training=False)
    for index in range(3):
        _, ids, _ = codec(music[index][0][None], return_encoded=True)
        assert torch.equal(crops[index]['codec'], ids[0])


# ---- crops ----


def test_crops_of_both_streams_are_of_the_same_time(tmp_path):
    compute(tmp_path, Clips((2.0, 9.6, 0.5, 4.0)), tokenizer=ClockTokenizer(lost=1))
    crops = TokenCrops(tmp_path, 'coarse', seconds=1.5, conditioning=False)
    random.seed(0)
    starts = set()
    for _ in range(60):
        for index in (0, 1, 3):
            item = crops[index]
            start = int(item['semantic'][0])
            assert torch.equal(item['semantic'], start + torch.arange(75))
            assert torch.equal(item['codec'][:, 0] * 2, 3 * start + 2 * torch.arange(112))
            starts.add((index, start))
    assert len({start for index, start in starts if index == 1}) > 30
    # both ends of a clip are reached: 2 s less the lost frame leave 13 places on the grid of two semantic frames
    assert {start for index, start in starts if index == 0} == set(range(0, 25, 2))
    # a clip shorter than the crop is whole, without the frame that its tokenizer lost
    assert torch.equal(crops[2]['semantic'], torch.arange(24))
    assert torch.equal(crops[2]['codec'][:, 0], torch.arange(37))


def test_a_share_of_the_crops_begins_where_clips_do(tmp_path):
    compute(tmp_path, Clips([9.0] * 40))
    for share, least, most in ((0.0, 0, 12), (0.5, 70, 130), (1.0, 200, 200)):
        crops = TokenCrops(tmp_path, 'coarse', seconds=1.0, conditioning=False, begin_share=share)
        train, valid = crops.split(0.25)  # which keep it
        random.seed(0)
        starts = [int(train[index % 30]['semantic'][0]) for index in range(200)]
        assert least <= starts.count(0) <= most
        assert valid[0]['semantic'][0] > 0  # in the middle, as ever


def test_validation_crops_stay_and_splits_share_nothing(tmp_path):
    compute(tmp_path, Clips([4.0] * 8))
    train, valid = TokenCrops(tmp_path, 'coarse', seconds=1.0, conditioning=False).split(0.25)
    assert (len(train), len(valid)) == (6, 2)
    assert not {*train.items} & {*valid.items}
    assert torch.equal(valid[0]['semantic'], valid[0]['semantic'])
    assert valid[0]['semantic'][0] == 76  # on the grid, in the middle
    assert len({int(train[0]['semantic'][0]) for _ in range(20)}) > 3


def test_several_folders_of_tokens_follow_one_another(tmp_path):
    folders = [tmp_path / name for name in ('first', 'second')]
    lengths = [2.0, None, 4.0], [6.0, 3.0]
    for folder, own in zip(folders, lengths):
        compute(folder, Clips(own))
    both, *alone = (
        TokenCrops(it, 'coarse', seconds=1.0, conditioning=False, training=False) for it in (folders, *folders)
    )
    assert both.items.tolist() == [0, 2, 3, 4]
    for item, own in zip(both, [*alone[0], *alone[1]], strict=True):
        assert all(torch.equal(item[name], own[name]) for name in own)
    parts = both.split(0.25)
    assert sorted(it for part in parts for it in part.items) == both.items.tolist()

    compute_tokens(
        Clips([2.0]), tmp_path / 'other', tokenizer=ClockTokenizer(lost=1), codec=ClockCodec(), progress=False
    )
    with pytest.raises(ValueError, match=r'other/semantic was not computed as .*first/semantic was: module\.'):
        TokenCrops([folders[0], tmp_path / 'other'], 'coarse', conditioning=False)
    for wrong in ([], [folders[0], folders[1] / '..' / 'first']):
        with pytest.raises(ValueError, match='one folder of tokens or several that differ'):
            TokenCrops(wrong, 'coarse')


def test_workers_read_what_the_main_process_reads(tmp_path):
    compute(tmp_path, Clips([4.0] * 6))
    crops = TokenCrops(tmp_path, 'coarse', seconds=1.0, conditioning=False, training=False)
    crops[0]
    batches = [list(DataLoader(crops, batch_size=2, collate_fn=collate_tokens, num_workers=n)) for n in (0, 1)]
    for own, other in zip(*batches):
        assert all(torch.equal(own[name], other[name]) for name in ('semantic', 'codec'))


def test_batches_are_padded_and_repetitions_left_out_when_asked():
    items = [
        dict(semantic=torch.tensor(ids), codec=torch.ones(n, 2).long()) for ids, n in (([1, 1, 2, 2, 1], 1), ([3], 2))
    ]
    batch = collate_tokens(items)
    assert batch['semantic'].tolist() == [[1, 1, 2, 2, 1], [3, PAD, PAD, PAD, PAD]]
    assert batch['codec'].tolist() == [[[1, 1], [PAD, PAD]], [[1, 1], [1, 1]]]
    assert collate_tokens(items, unique_consecutive=True)['semantic'].tolist() == [[1, 2, 1], [3, PAD, PAD]]


# ---- bad input ----


class Noise(Clips):
    def __getitem__(self, index):
        return torch.rand(1200), numpy.array([1, 2])


class Restless(Clips):
    training = True


class Silent(Clips):
    def __getitem__(self, index):
        return clock(1.0)


@pytest.mark.parametrize(
    ('dataset', 'keywords', 'error', 'message'),
    [
        (Noise([1.0]), {}, ValueError, 'another one at each visit'),
        (Restless([1.0]), {}, ValueError, r'draws crops at random.*validation\(\)'),
        (Clips([1.0]), dict(tokenizer=None, codec=None), ValueError, 'nothing to compute'),
        (Clips([]), {}, ValueError, 'empty'),
        ([(clock(1.0), 'x')], {}, ValueError, 'list does not tell its sample rate'),
        (Clips([1.0]), dict(sample_rate=0), ValueError, 'sample_rate must be greater than 0'),
        (Clips([1.0]), dict(on_change='ask'), ValueError, "unknown on_change 'ask'"),
        (Clips([1.0]), dict(codec=torch.nn.Linear(1, 1)), TypeError, 'Linear is no Codec, and has no target_sample_hz'),
        (Clips([11.0]), {}, ValueError, r'semantic tokens lie between 0 and 549, outside of the codebook of 512'),
        (Silent([1.0]), dict(quantizer=make_quantizer()), ValueError, 'waves without texts; pass texts=False'),
    ],
)
def test_what_cannot_be_computed_is_said(tmp_path, dataset, keywords, error, message):
    with pytest.raises(error, match=message):
        compute(tmp_path, dataset, **keywords)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(stage='medium'), ValueError, "unknown stage 'medium'"),
        (dict(stage='coarse', seconds=0.0), ValueError, 'seconds must be greater than 0'),
        (dict(stage='coarse', seconds=0.015), ValueError, 'not even one frame of the semantic tokens, 50 a second'),
        (dict(stage='coarse', conditioning=True), FileNotFoundError, 'no audio tokens in'),
        (dict(stage='coarse', text_share=0.5), ValueError, 'text_share needs conditioning'),
        (dict(stage='coarse', begin_share=1.5), ValueError, r'begin_share must lie in \[0, 1\], got 1.5'),
        (dict(stage='coarse', items=[2]), ValueError, "no item with tokens for the stage 'coarse'"),
    ],
)
def test_crops_that_cannot_be_taken(tokens, arguments, error, message):
    with pytest.raises(error, match=message):
        TokenCrops(tokens, **{**dict(conditioning=False), **arguments})
