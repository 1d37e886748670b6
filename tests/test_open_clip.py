"""MuLaN under open_clip's names; with open_clip_torch installed, under open_clip's own losses, loop and evaluation."""

import copy
import inspect
import math
import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.models import tiny_mulan
from helpers.processes import start_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from musiclm_pytorch import MuLaN, SyntheticMusic
from musiclm_pytorch.open_clip import (
    AudioBatch,
    MuLaNOpenCLIP,
    create_mulan_open_clip_model,
    create_open_clip_arguments,
    create_open_clip_data,
    create_open_clip_loss,
)
from musiclm_pytorch.open_clip.model import END, START, bare, framed

RATE = 8000
TEXTS = ['a slow flute melody', 'drums!', '', 'happy guitar music, 120 BPM, in C']


@pytest.fixture
def open_clip():
    return pytest.importorskip('open_clip')


@pytest.fixture
def loop(open_clip):
    return pytest.importorskip('open_clip_train.train')


def view(audio=None, text=None, framed_texts=False, output_dict=True, **keywords):
    """A model without anything random in training."""
    torch.manual_seed(0)
    audio = dict(support_variable_length=True, audio_sample_rate=RATE, **STILL, **(audio or {}))
    text = {**dict(num_tokens=49408, max_seq_len=40), **(text or {})}
    mulan = tiny_mulan(audio, text, **{**dict(decoupled_contrastive_learning=False), **keywords})
    return MuLaNOpenCLIP(mulan, framed_texts, output_dict)


STILL = dict(patch_dropout_prob=0.0, spec_aug_stretch_factor=1.0, spec_aug_freq_mask=0, spec_aug_time_mask=0)


def waves(batch=4, samples=2000, seed=1):
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: it.grad for name, it in model.named_parameters() if it.grad is not None}


def agree(found, wanted, bound=1e-5):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # those of small embeddings are large
        assert (found[name] - tensor).abs().max() <= bound * max(1.0, tensor.abs().max().item()), name


# ---- embeddings and similarities ----


def test_embeddings_are_the_latents_of_mulan():
    model = view().eval()
    wavs, ids = waves(), model.text.tokenize(TEXTS)
    assert torch.equal(model.encode_audio(wavs), model.mulan.get_audio_latents(wavs))
    assert torch.equal(model.encode_image(wavs), model.mulan.get_audio_latents(wavs))
    assert torch.equal(model.encode_text(ids), model.mulan.get_text_latents(ids))
    assert torch.equal(model.encode_text(TEXTS), model.mulan.get_text_latents(raw_texts=TEXTS))
    for found, wanted in (
        (model.encode_image(wavs, normalize=False), model.encode_audio(wavs)),
        (model.encode_text(TEXTS, normalize=False), model.encode_text(TEXTS)),
    ):
        assert ((found.norm(dim=-1) - 1).abs() > 0.01).all()
        torch.testing.assert_close(F.normalize(found, dim=-1), wanted)
    assert (model.embed_dim, model.context_length, model.vocab_size) == (16, 40, 49408)


def test_lengths_and_rates_arrive():
    model = view().eval()
    wavs, lengths = waves(3, 3000), [3000, 1111, 2222]
    wanted = torch.cat([model.encode_audio(wave[None, :length]) for wave, length in zip(wavs, lengths)])
    torch.testing.assert_close(model.encode_audio(wavs, lengths), wanted)
    torch.testing.assert_close(model.encode_audio(wavs, lengths, normalize=False).norm(dim=-1) > 0, torch.ones(3) > 0)
    batch = AudioBatch(wavs, torch.tensor(lengths))
    for found in (model.encode_audio(batch), model.encode_image(batch), model(batch)['image_features']):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(model(wavs, audio_lengths=lengths)['image_features'], wanted)
    torch.testing.assert_close(model.get_similarity(wavs, TEXTS, lengths)[0], model.get_logits(batch, TEXTS)[0])

    resampled = model.mulan.get_audio_latents(wavs, audio_lengths=lengths, sample_rate=11025)
    assert not torch.allclose(resampled, wanted, atol=1e-3)
    assert torch.equal(model.encode_audio(wavs, lengths, sample_rate=11025), resampled)
    assert torch.equal(model.encode_audio(AudioBatch(wavs, torch.tensor(lengths), 11025)), resampled)
    unscaled = model.encode_audio(wavs, lengths, normalize=False, sample_rate=11025)
    torch.testing.assert_close(F.normalize(unscaled, dim=-1), resampled)
    with pytest.raises(ValueError, match='leave out audio_lengths'):
        model.encode_audio(batch, lengths)


@pytest.mark.parametrize('sigmoid', [False, True])
def test_similarities_are_scaled_cosines_and_forward_gives_what_losses_take(sigmoid):
    model = view(sigmoid_contrastive_loss=sigmoid).eval()
    wavs = waves()
    found = model(wavs, TEXTS)
    assert list(found) == ['image_features', 'text_features', 'logit_scale', *(['logit_bias'] if sigmoid else [])]
    assert torch.equal(found['image_features'], model.encode_audio(wavs))
    assert torch.equal(found['text_features'], model.encode_text(TEXTS))
    assert found['logit_scale'].shape == ()
    assert found['logit_scale'].item() == pytest.approx(10)
    if sigmoid:
        assert found['logit_bias'].shape == ()
        assert found['logit_bias'].item() == -10
    assert list(model(audio=wavs, text=TEXTS))[:2] == ['audio_features', 'text_features']
    assert torch.equal(model(audio=wavs)['audio_features'], found['image_features'])
    assert model(image=wavs)['text_features'] is None
    assert model(text=TEXTS)['image_features'] is None
    model.output_dict = False
    as_tuple = model(wavs, TEXTS)
    assert isinstance(as_tuple, tuple)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, found.values(), strict=True))
    with pytest.raises(ValueError, match='two names of the same input'):
        model(wavs, audio=wavs)
    with pytest.raises(ValueError, match='pass waves, texts or both'):
        model()

    cosines = model.mulan(wavs[:3], raw_texts=TEXTS, return_pairwise_similarities=True)
    for logarithm, scale in ((math.log(7), 7), (10, 100)):  # the latter is far beyond the bound
        with torch.no_grad():
            model.logit_scale.fill_(logarithm)
            if sigmoid:
                model.logit_bias.fill_(-3)
        per_audio, per_text = model.get_similarity(wavs[:3], TEXTS)
        torch.testing.assert_close(per_audio, scale * cosines - 3 * sigmoid)
        assert torch.equal(per_text, per_audio.T)
        assert torch.equal(model.get_logits(wavs[:3], TEXTS)[0], per_audio)
    with torch.autocast('cpu', torch.bfloat16):
        assert model.get_similarity(wavs, TEXTS)[0].dtype == torch.float32


def test_what_is_wrong_with_an_input_is_said():
    model = view()
    for texts, error, message in (
        ([3], TypeError, 'put one text in a list'),
        (torch.ones(2, 3), TypeError, 'must be an integer tensor'),
        (torch.tensor([START, 5, END]), ValueError, 'must have shape'),
        (torch.tensor([[START, 49408, END]]), ValueError, 'token id 49408 is outside'),
    ):
        with pytest.raises(error, match=message):
            model.encode_text(texts)
    with pytest.raises(ValueError, match=r'num_tokens=100'):
        view(text=dict(num_tokens=100), framed_texts=True)
    with pytest.raises(ValueError, match='at least 3, got 2'):
        view(text=dict(max_seq_len=2), framed_texts=True)
    with pytest.raises(TypeError):
        MuLaNOpenCLIP(nn.Linear(2, 2))


# ---- start and end tokens ----

rows = st.lists(st.lists(st.integers(1, START - 1), max_size=7), min_size=1, max_size=4)


def padded(texts, pad, width=None):
    width = max(map(len, texts)) if width is None else width
    return torch.tensor([[*text, *[pad] * (width - len(text))] for text in texts]).reshape(len(texts), width)


@settings(max_examples=30, deadline=None)
@given(rows, st.sampled_from([0, 49000]), st.integers(0, 3), st.integers(3, 10))
def test_frames_come_off_and_go_on(texts, pad, spare, longest):
    texts = [[token for token in text if token != pad] for text in texts]
    width = max(1, max(map(len, texts)))
    wanted = padded(texts, pad, width)
    # open_clip pads with 0, whatever the tower's padding is
    with_frames = padded([[START, *text, END] for text in texts], 0, width + 2 + spare)
    assert torch.equal(bare(with_frames, pad), wanted)
    assert torch.equal(bare(padded(texts, pad, width + spare), pad), wanted)
    # row by row
    mixed = torch.stack(
        [with_frames[i] if i % 2 else padded([texts[i]], pad, width + 2 + spare)[0] for i in range(len(texts))]
    )
    assert torch.equal(bare(mixed, pad), wanted)

    cut = [text[: longest - 2] for text in texts]
    found = framed(wanted, pad, longest)
    assert torch.equal(found, padded([[START, *text, END] for text in cut], pad, min(width, longest - 2) + 2))
    # end tokens within a text, and texts cut without one
    assert bare(torch.tensor([[START, 5, END, 6, END, 0]]), 0).tolist() == [[5, END, 6]]
    assert bare(torch.tensor([[START, 5, 6, 7]]), 0).tolist() == [[5, 6, 7]]
    assert bare(torch.tensor([[5, 6, END]]), 0).tolist() == [[5, 6, END]]


@pytest.mark.parametrize('framed_texts', [False, True])
@pytest.mark.parametrize('pad_id', [0, 49000])
def test_a_tower_gets_the_form_it_was_trained_with(framed_texts, pad_id):
    model = view(text=dict(pad_id=pad_id), framed_texts=framed_texts).eval()
    plain = model.text.tokenize(TEXTS)
    with_frames = padded([[START, *[it for it in row if it != pad_id], END] for row in plain.tolist()], 0, 20)
    wanted = [[it for it in row if it != pad_id] + [0] * 2 * framed_texts for row in plain.tolist()]
    given_ids = []
    model.text.register_forward_pre_hook(lambda module, args: given_ids.append(args[0]))
    strings, ids, framed_ids = (model.encode_text(it) for it in (TEXTS, plain, with_frames))
    torch.testing.assert_close(ids, strings)
    torch.testing.assert_close(framed_ids, strings)
    for found in given_ids:
        assert (found[:, 0] == START).all() == framed_texts
        assert ((found == END).sum(dim=1) == framed_texts).all()
        assert (found != pad_id).sum(dim=1).tolist() == [len(row) for row in wanted]
    assert ('framed_texts=True' in repr(model)) == framed_texts


def test_long_texts_are_cut_alike():
    long = ['one two three four five six seven eight nine ten eleven twelve thirteen fourteen']
    plain, model = view(text=dict(max_seq_len=12)), view(text=dict(max_seq_len=12), framed_texts=True)
    with pytest.warns(UserWarning, match='a text of 14 tokens is cut to the context of 12'):
        bare_ids = plain.tokenize(long)
    with pytest.warns(UserWarning, match='is cut to the context of 12'):
        found = model.tokenize(long)
    longer = torch.arange(1, 15)[None]
    with pytest.warns(UserWarning, match='a text of 16 tokens is cut to the context of 12'):
        assert view(text=dict(max_seq_len=12), framed_texts=True).tokenize(longer).shape == (1, 12)
    assert found.shape == (1, 12)
    assert found[0, 0] == START
    assert found[0, -1] == END
    assert found[0, 1:-1].tolist() == bare_ids[0, :10].tolist()
    others = view(text=dict(num_tokens=60000))  # another vocabulary is taken as it comes
    ids = torch.tensor([[START, 5, END, 0, 0]])
    assert torch.equal(others.tokenize(ids), ids)


# ---- MuLaN's own parameters ----


def test_temperature_and_bias_are_mulans_own():
    model = view(sigmoid_contrastive_loss=True)
    assert model.logit_scale is model.mulan.contrast.temperatures
    assert model.logit_bias is model.mulan.contrast.bias
    assert view().logit_bias is None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.mulan.parameters()))
    sum(it.sum() for it in model(waves(), TEXTS).values()).backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model.mulan.contrast.temperatures.item(), math.log(10) - 0.1 * 10)
        torch.testing.assert_close(model.mulan.contrast.bias.item(), -10.1)
        model.logit_scale.clamp_(0, 1)  # as open_clip's loop does
    assert model.mulan.contrast.temperature().item() == pytest.approx(math.e)
    twin = copy.deepcopy(model)
    assert twin.logit_scale is twin.mulan.contrast.temperatures is not model.logit_scale
    state = model.state_dict()
    del model, optimizer
    twin.load_state_dict(state)
    assert twin.mulan.contrast.temperature().item() == pytest.approx(math.e)


@pytest.mark.parametrize('sigmoid', [False, True])
def test_state_moves_in_and_out(sigmoid, tmp_path):
    model, other = shaken(sigmoid), view(sigmoid_contrastive_loss=sigmoid)
    state = model.state_dict()
    own = {'logit_scale', *(['logit_bias'] if sigmoid else [])}
    inner = {f'mulan.{name}' for name in model.mulan.state_dict() if not name.startswith('contrast.')}
    assert state.keys() == own | inner

    save_file(state, str(tmp_path / 'model.safetensors'))
    other.load_state_dict(load_file(str(tmp_path / 'model.safetensors')), strict=True)
    agree(other.mulan.state_dict(), model.mulan.state_dict(), bound=0)
    missing = {name: it for name, it in state.items() if name != 'logit_scale'}
    with pytest.raises(RuntimeError, match='logit_scale'):
        other.load_state_dict(missing)

    model.mulan.save_pretrained(tmp_path / 'mulan')
    loaded = MuLaNOpenCLIP(MuLaN.from_pretrained(tmp_path / 'mulan'))
    agree(loaded.state_dict(), state, bound=0)
    # within a larger model, the names have another prefix
    pair = nn.ModuleList([model, other])
    pair.load_state_dict(pair.state_dict(), strict=True)


def shaken(sigmoid):
    """With other weights than a new one."""
    model = view(sigmoid_contrastive_loss=sigmoid)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def trainable(module):
    return {name for name, it in module.named_parameters() if it.requires_grad}


@pytest.mark.parametrize('tower', ['audio', 'text'])
def test_locked_towers_are_not_trained(tower):
    front_end = dict(spec_n_fft=512, spec_win_length=500, spec_n_mels=20, patch_size=4, clip_summary=True)
    model = view(dict(depth=3, **front_end), dict(depth=3))
    lock = model.lock_image_tower if tower == 'audio' else model.lock_text_tower
    everything = trainable(model.mulan)
    own = {name for name in everything if name.startswith((f'{tower}.', f'{tower}_to_latents.'))}
    projection = {f'{tower}_to_latents.weight', f'{tower}_to_latents.bias'}
    layers = [{name for name in own if f'.transformer.layers.{i}.' in name} for i in range(3)]
    norm = {f'{tower}.norm.learned_gamma'}
    wanted = [set(), projection, projection | norm | layers[2], projection | norm | layers[2] | layers[1]]
    for unlocked, left in enumerate(wanted):
        lock(unlocked)
        assert trainable(model.mulan) == everything - own | left
    lock(4)
    assert trainable(model.mulan) == everything - own | projection | norm | set().union(*layers)
    for unlocked in (5, 9):
        lock(unlocked)
        assert trainable(model.mulan) == everything
    lock()
    out = model(waves(), TEXTS)
    (out['image_features'] @ out['text_features'].T * out['logit_scale']).sum().backward()
    assert not any(name.removeprefix('mulan.') in own for name in gradients(model))
    with pytest.raises(ValueError, match='must be at least 0, got -1'):
        lock(-1)
    if tower == 'text':
        lock(freeze_layer_norm=False)
        left = {name for name in trainable(model.mulan) if name.startswith('text')}
        # three layers with a norm in front of attention and of the feed-forward, and the final norm
        assert len(left) == 7
        assert all(name.endswith('learned_gamma') for name in left)


def test_checkpointing_of_activations_changes_no_gradient():
    found = []
    for enable in (False, True):
        model = view()
        model.set_grad_checkpointing(enable)
        assert model.audio.transformer.checkpoint_activations == enable
        assert model.text.transformer.checkpoint_activations == enable
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            out = model(waves(), TEXTS)
        (out['image_features'] @ out['text_features'].T).square().sum().backward()
        found.append((sum(kept), gradients(model)))
    agree(found[1][1], found[0][1])
    assert found[1][0] < 0.7 * found[0][0]
    model.set_grad_checkpointing(False)
    assert not model.audio.transformer.checkpoint_activations
    assert not model.text.transformer.checkpoint_activations


def test_new_model_has_the_sizes_asked_for():
    sizes = dict(dim=32, depth=2, heads=2, dim_head=8, embed_dim=20)
    model = create_mulan_open_clip_model(
        **sizes, use_case='speech', audio_sample_rate=12000, sigmoid_contrastive_loss=True, text=dict(max_seq_len=20)
    )
    assert model.mulan.sample_rate == 12000
    assert model.mulan.audio.log_mel is not None
    assert (model.embed_dim, model.audio.depth, model.text.dim, model.context_length) == (20, 2, 32, 20)
    assert model.encode_audio(waves(2, 9000), torch.tensor([9000, 5000])).shape == (2, 20)
    assert model.logit_bias is not None
    assert model.output_dict
    model = create_mulan_open_clip_model(**sizes, word_prediction_weight=0.5, output_dict=False, framed_texts=True)
    assert model.mulan.words is not None
    assert model.framed_texts
    assert not model.output_dict
    assert not model.mulan.contrast.decoupled_contrastive_learning
    decoupled = create_mulan_open_clip_model(**sizes, decoupled_contrastive_learning=True)
    assert decoupled.mulan.contrast.decoupled_contrastive_learning
    with pytest.raises(ValueError, match="unknown use_case 'opera'"):
        create_mulan_open_clip_model(**sizes, use_case='opera')


def test_contract_runs_as_it_stands():
    from helpers.contract import run  # which the workers below need not import

    texts = ['a calm piano', 'fast drums']
    for given_texts in (texts, torch.randint(1, 1000, (2, 7))):
        names = run('05_open_clip.py', wavs=waves(2, 8000), audio_lengths=torch.tensor([8000, 6000]), texts=given_texts)
        assert names['audio_embeddings'].shape == names['text_embeddings'].shape == (2, 128)
        cosines = names['logits_per_audio'] / 10
        # in training mode patches are left out at random, so the towers are not asked again
        assert cosines.shape == (2, 2)
        assert cosines.abs().max() <= 1
        assert torch.equal(names['logits_per_text'], names['logits_per_audio'].T)


# ---- without open_clip ----


def test_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'open_clip', None)
    extra = r"needs the package open_clip_torch .*: pip install '\.\[openclip\]'"
    model = view()
    for call in (
        lambda: create_open_clip_loss(model),
        create_open_clip_arguments,
        lambda: create_open_clip_data([(torch.zeros(2000), 'x')] * 2, model, 2),
    ):
        with pytest.raises(ImportError, match=extra):
            call()
    data = create_open_clip_data([(torch.zeros(2000), 'x')] * 2, model, 2, tokenizer=model.tokenize)
    (batch,) = data.dataloader
    assert torch.equal(model.encode_text(batch[1]), model.encode_text(['x', 'x']))


def test_batches_carry_lengths_and_rate():
    model = view()
    clips = [(waves(1, 1500 + 100 * i)[0], 'a song') for i in range(5)]
    data = create_open_clip_data(clips, model, 2, training=False, sample_rate=11025, tokenizer=model.tokenize)
    assert (data.dataloader.num_samples, data.dataloader.num_batches) == (5, 3)
    batches = list(data.dataloader)
    assert [it.lengths is None or it.lengths.tolist() for it, _ in batches] == [[1500, 1600], [1700, 1800], True]
    assert [(len(it), it.shape, it.size(0)) for it, _ in batches][:2] == [(2, (2, 1600), 2), (2, (2, 1800), 2)]
    assert all(it.sample_rate == 11025 for it, _ in batches)
    moved = batches[0][0].to(device='cpu', dtype=torch.bfloat16, non_blocking=True)
    assert (moved.waves.dtype, moved.lengths.dtype, moved.sample_rate) == (torch.bfloat16, torch.int64, 11025)
    assert torch.equal(batches[0][0].to('cpu').waves, batches[0][0].waves)

    training = create_open_clip_data(clips, model, 2, tokenizer=model.tokenize)
    assert training.dataloader.num_batches == len(list(training.dataloader)) == 2
    training.set_epoch(3)  # there is nothing to set in one process
    deaf = MuLaNOpenCLIP(tiny_mulan({}, dict(num_tokens=49408)))  # without lengths: what all clips have
    pairs = [(wave, torch.tensor([3, 4])) for wave, _ in clips[:2]]
    ((audio, texts),) = create_open_clip_data(pairs, deaf, 2, training=False, tokenizer=model.tokenize).dataloader
    assert (audio.shape, audio.lengths, audio.sample_rate) == ((2, 1500), None, None)
    assert texts.tolist() == [[3, 4]] * 2
    music = SyntheticMusic(2, seconds=1.0, sample_rate=8000)
    ((audio, _),) = create_open_clip_data(music, model, 2, tokenizer=model.tokenize).dataloader
    assert audio.sample_rate == 8000

    many = [(waves(1)[0], torch.tensor([number])) for number in range(1, 41)]
    in_order, shuffled = (
        create_open_clip_data(many, model, 8, training=training, tokenizer=model.tokenize) for training in (False, True)
    )
    first, second, third = (torch.cat([ids for _, ids in it.dataloader]) for it in (in_order, shuffled, shuffled))
    assert first.flatten().tolist() == list(range(1, 41))
    assert not torch.equal(second, first)
    assert not torch.equal(third, second)
    assert torch.equal(second.sort(dim=0).values, first)


def test_data_that_cannot_be_trained_on_is_refused():
    model = view()
    clip = (waves(1)[0], 'x')
    with pytest.raises(ValueError, match='3 items do not fill a single batch of 4'):
        create_open_clip_data([clip] * 3, model, 4, tokenizer=model.tokenize)
    with pytest.raises(TypeError, match='must have a length and items by index, got generator'):
        create_open_clip_data((it for it in [clip]), model, 1, tokenizer=model.tokenize)
    keywords = dict(training=False, tokenizer=model.tokenize)
    assert len(next(iter(create_open_clip_data([clip, None], model, 2, **keywords).dataloader))[0]) == 1
    with pytest.raises(ValueError, match='2 of 2 clips of a batch could not be read'):
        next(iter(create_open_clip_data([None, None], model, 2, **keywords).dataloader))
    with pytest.raises(TypeError, match='must be pairs of a clip and a caption'):
        next(iter(create_open_clip_data([clip[0]] * 2, model, 2, **keywords).dataloader))


# ---- with open_clip ----


def test_names_and_signatures_are_those_of_open_clips_models(open_clip):
    def parameters(function):
        return list(inspect.signature(function).parameters)

    names = 'forward encode_text get_logits lock_text_tower set_grad_checkpointing no_weight_decay'
    peers = {open_clip.CustomTextCLIP: f'{names} encode_image lock_image_tower'}
    if hasattr(open_clip, 'CLAP'):  # after 3.3.0
        peers[open_clip.CLAP] = 'encode_audio encode_text no_weight_decay'
    for peer, methods in peers.items():
        for name in methods.split():
            wanted = parameters(getattr(peer, name))
            found = parameters(getattr(MuLaNOpenCLIP, name))
            if name == 'get_logits':
                assert len(wanted) == len(found)
            elif name == 'encode_audio':
                assert set(wanted) <= set(found)
            else:
                assert found[: len(wanted)] == wanted
    clip = open_clip.CLIP(**SMALL)
    model = view(sigmoid_contrastive_loss=True)
    theirs, ours = clip(text=torch.zeros(1, 77, dtype=torch.long)), model(text=['x'])
    assert theirs.keys() == ours.keys()
    assert all((theirs[name] is None) == (ours[name] is None) for name in ours)
    assert all(theirs[name].shape == ours[name].shape for name in ('logit_scale', 'logit_bias'))
    for name in ('output_dict', 'context_length', 'vocab_size', 'visual', 'logit_scale', 'logit_bias'):
        assert hasattr(clip, name)
        assert hasattr(model, name)


SMALL = dict(
    embed_dim=8,
    vision_cfg=dict(layers=1, width=16, head_width=8, image_size=32, patch_size=16),
    text_cfg=dict(context_length=77, vocab_size=49408, width=8, heads=1, layers=1),
    init_logit_bias=-10.0,
    output_dict=True,
)


def test_tokenizers_give_the_same_ids(open_clip):
    music = SyntheticMusic(50, split='valid')
    texts = [*(music.text(i) for i in range(50)), *TEXTS, 'Déjà-vu – 80’s “house” & R&B  ', '音楽 🎵 #1']
    mulan = view(text=dict(max_seq_len=75)).mulan
    for framed_texts in (False, True):
        model = MuLaNOpenCLIP(mulan, framed_texts=framed_texts)
        assert torch.equal(model.tokenize(open_clip.tokenize(texts)), model.tokenize(texts))
    theirs = open_clip.tokenize(texts)
    assert torch.equal(model.tokenize(texts), theirs[:, : model.tokenize(texts).shape[1]])


@pytest.mark.parametrize('sigmoid', [False, True])
def test_loss_and_gradients_are_mulans_own(open_clip, sigmoid):
    model = view(sigmoid_contrastive_loss=sigmoid)
    wavs, ids = waves(5), torch.randint(1, 49000, (5, 6))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(17))
    wanted = model.mulan(wavs, ids)
    wanted.backward()
    own = gradients(model)
    for output_dict in (True, False):
        model.zero_grad()
        model.output_dict = output_dict
        loss = create_open_clip_loss(model)
        assert type(loss) is (open_clip.loss.SigLipLoss if sigmoid else open_clip.ClipLoss)
        out = model(wavs, ids)
        found = loss(**out) if output_dict else loss(*out)
        assert (found - wanted).abs() <= 1e-5
        found.backward()
        agree(gradients(model), own)
    assert own['logit_scale'].abs() > 1e-4
    assert not sigmoid or own['logit_bias'].abs() > 1e-4


LOSSES = ['whole', 'create', 'bidir', 'gather']  # the second with open_clip's local loss


def loss_of(kind, model, rank=0, world_size=1):
    from open_clip.loss import ClipLoss, SigLipLoss

    if kind == 'create':
        return create_open_clip_loss(model, rank, world_size)
    place = dict(rank=rank, world_size=world_size)
    if kind in ('bidir', 'gather'):
        return SigLipLoss(dist_impl=kind, **place)
    return ClipLoss(local_loss=False, gather_with_grad=True, **place)


def pairs(count):
    return waves(count), torch.randint(1, 49000, (count, 6), generator=torch.Generator().manual_seed(3))


def worker(rank, world_size, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', HF_HUB_OFFLINE='1')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=world_size)
    wavs, ids = (it.chunk(world_size)[rank] for it in pairs(6))
    results = {}
    for kind in LOSSES:
        ddp = nn.parallel.DistributedDataParallel(view(sigmoid_contrastive_loss=kind in ('bidir', 'gather')))
        audio = AudioBatch(wavs) if kind == 'create' else wavs
        loss = loss_of(kind, ddp.module, rank, world_size)(**ddp(audio, ids))
        loss.backward()
        results[kind] = (loss.detach(), gradients(ddp.module))

    data = create_open_clip_data([(wave, f'text {i}') for i, wave in enumerate(waves(7))], ddp.module, 3)
    orders = []
    for epoch in range(2):
        data.set_epoch(epoch)
        orders.append([ids[:, 2].tolist() for _, ids in data.dataloader])
    results['data'] = orders
    unreadable = create_open_clip_data([(waves(1)[0], 'x'), None, None, None], ddp.module, 2)
    with pytest.raises(ValueError, match='of 2 clips of a batch could not be read'):
        next(iter(unreadable.dataloader))
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_mulan_on_the_joined_batch(open_clip, tmp_path):
    start_processes(worker, 2, str(tmp_path), count=2)
    results = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2)]
    for kind in LOSSES:
        model = view(sigmoid_contrastive_loss=kind in ('bidir', 'gather'))
        wanted = model.mulan(*pairs(6))
        wanted.backward()
        # where each rank has the loss of its own rows, their mean is that of all
        assert (torch.stack([result[kind][0] for result in results]).mean() - wanted).abs() <= 1e-5
        for result in results:
            agree(result[kind][1], gradients(model))

    first, second = (result['data'] for result in results)
    for epoch in range(2):
        shares = [[it for batch in order[epoch] for it in batch] for order in (first, second)]
        assert len(shares[0]) == len(shares[1]) == 3
        assert not set(shares[0]) & set(shares[1])
    assert first[0] != first[1]


def arguments(*flags):
    return create_open_clip_arguments(['--device', 'cpu', '--precision', 'fp32', '--workers', '0', *flags])


def clips(count, seed=0):
    """Clips of different lengths with captions."""
    music = SyntheticMusic(count, seconds=1.0, sample_rate=RATE, seed=seed)
    return [(music[i][0][: 4000 + 500 * (i % 5)], music.text(i)) for i in range(count)]


@pytest.mark.parametrize(('sigmoid', 'accumulated'), [(False, 1), (True, 2)])
def test_training_loop_does_what_mulans_own_would(loop, sigmoid, accumulated):
    model = view(sigmoid_contrastive_loss=sigmoid)
    own = copy.deepcopy(model.mulan)
    data = create_open_clip_data(clips(9), model, 2)
    args = arguments('--batch-size', '2', '--accum-freq', str(accumulated), '--grad-clip-norm', '1.0')
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(4)  # the order
    loop.train_one_epoch(
        model, {'train': data}, create_open_clip_loss(model), 0, optimizer, None, lambda step: None, None, args
    )

    torch.manual_seed(4)  # the order
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
    batches = list(data.dataloader)
    assert len(batches) == 4
    assert any(audio.lengths is not None for audio, _ in batches)
    for start in range(0, 4, accumulated):
        group = batches[start : start + accumulated]
        audio = [own.get_audio_latents(it.waves, audio_lengths=it.lengths) for it, _ in group]
        text = [MuLaNOpenCLIP(own).encode_text(it) for _, it in group]
        optimizer.zero_grad()
        loss = own.contrast(torch.cat(audio), torch.cat(text))
        loss.backward()
        if accumulated > 1:
            # open_clip adds up the gradients of the same loss, of which each batch is given its part; the scalars
            # get theirs from each
            for parameter in own.contrast.parameters():
                parameter.grad *= accumulated
        nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
    agree(model.mulan.state_dict(), own.state_dict(), bound=1e-4)
    assert not torch.equal(own.audio_to_latents.weight, view().mulan.audio_to_latents.weight)


def test_evaluation_of_the_loop_ranks_all_pairs(loop, tmp_path):
    model = view()
    args = arguments('--val-frequency', '1', '--batch-size', '4')
    args.save_logs, args.checkpoint_path = True, str(tmp_path)
    items = clips(10)
    data = {'val': create_open_clip_data(items, model, 4, training=False)}
    found = loop.evaluate(model, data, 1, args)

    with torch.no_grad():
        audio = torch.cat([model.encode_audio(wave[None]) for wave, _ in items])
        text = torch.cat([model.encode_text([text]) for _, text in items])
    cosines = audio @ text.T
    for name, table in (('image_to_text', cosines), ('text_to_image', cosines.T)):
        ranks = (table > table.diagonal()[:, None]).sum(dim=1)
        assert found[f'{name}_mean_rank'] == pytest.approx(ranks.float().mean().item() + 1)
        assert found[f'{name}_R@5'] == pytest.approx((ranks < 5).float().mean().item())
    assert found['num_samples'] == 10
    assert found['clip_val_loss'] > 0
    assert (tmp_path / 'results.jsonl').is_file()


def test_half_precision_in_the_loop(loop):
    model = view()
    before = copy.deepcopy(model.state_dict())
    data = create_open_clip_data(clips(4), model, 4)
    args = arguments('--batch-size', '4', '--precision', 'amp_bf16')
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = create_open_clip_loss(model)
    loop.train_one_epoch(model, {'train': data}, loss, 0, optimizer, None, lambda step: None, None, args)
    assert all(it.isfinite().all() for it in model.state_dict().values())
    assert not torch.equal(model.state_dict()['logit_scale'], before['logit_scale'])
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    loop.train_one_epoch(model, {'train': data}, loss, 0, optimizer, None, lambda step: None, None, args)
    assert model.mulan.contrast.temperature().item() == pytest.approx(100)
    assert model.mulan.contrast.temperatures.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize('sigmoid', [False, True])
def test_checkpoints_of_open_clip_load(open_clip, sigmoid, tmp_path):
    model, other = shaken(sigmoid), view(sigmoid_contrastive_loss=sigmoid)
    wrapped = {f'module.{name}': it for name, it in model.state_dict().items()}
    torch.save({'epoch': 1, 'name': 'x', 'state_dict': wrapped}, tmp_path / 'epoch_1.pt')
    open_clip.load_checkpoint(other, str(tmp_path / 'epoch_1.pt'))
    agree(other.mulan.state_dict(), model.mulan.state_dict(), bound=0)
    if not sigmoid:
        # weights of a softmax model, to be trained on with the sigmoid loss
        other = view(sigmoid_contrastive_loss=True)
        open_clip.load_checkpoint(other, str(tmp_path / 'epoch_1.pt'))
        assert torch.equal(other.logit_scale, model.logit_scale)
        assert other.mulan.contrast.bias.item() == 0


def test_weight_decay_leaves_out_temperature_and_bias(open_clip):
    optim = pytest.importorskip('timm.optim')
    model = view(sigmoid_contrastive_loss=True)
    optimizer = optim.create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.1)
    decayed = {id(it) for group in optimizer.param_groups if group['weight_decay'] > 0 for it in group['params']}
    assert not {id(model.mulan.contrast.temperatures), id(model.mulan.contrast.bias)} & decayed
    assert id(model.mulan.audio_to_latents.weight) in decayed
    assert len(decayed) == sum(isinstance(it, nn.Linear) for it in model.modules())
    # as open_clip's main program groups them
    names = [
        name for name, it in model.named_parameters() if it.ndim >= 2 and not ('bias' in name or 'logit_scale' in name)
    ]
    assert not any('contrast' in name for name in names)


def test_zero_shot_tagger_on_synthetic_music(open_clip):
    from musiclm_pytorch.evaluation.evaluator import load_mulan

    model = MuLaNOpenCLIP(load_mulan('tiny'))
    music = SyntheticMusic(16, seconds=3.0, sample_rate=RATE, split='valid', seed=11)
    names = list(music.ATTRIBUTES['instrument'])
    templates = ['a {} melody', '{} music', 'music played on the {}']
    classifier = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer('ViT-B-32'), names, templates)
    assert classifier.shape == (128, 8)
    own = open_clip.build_zero_shot_classifier(model, model.tokenize, names, templates)
    legacy = open_clip.build_zero_shot_classifier_legacy(model, model.tokenize, names, templates)
    torch.testing.assert_close(own, classifier)
    torch.testing.assert_close(legacy, classifier)

    targets = [names.index(music.labels(i).instrument) for i in range(16)]
    wavs = torch.stack([music[i][0] for i in range(16)])
    with torch.no_grad():
        # as open_clip_train.zero_shot does, whose count of what is right does not run with numpy 2.4
        logits = 100 * model(image=wavs)['image_features'] @ classifier
    assert (logits.argmax(dim=-1) == torch.tensor(targets)).float().mean() >= 0.9
