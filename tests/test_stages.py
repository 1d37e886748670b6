"""The trainers of the stages: audiolm-pytorch's losses, what is random and when, states, and what goes wrong."""

import json
import math
from functools import partial
from itertools import islice

import pytest
import torch
from helpers.stage_parts import (
    STAGES,
    Clips,
    ClockCodec,
    ClockTokenizer,
    draw_items,
    gradients_of_step,
    make_quantizer,
    make_trainer,
    make_transformer,
    transformer_for,
)
from helpers.training import assert_resuming_changes_nothing, assert_same, weights
from safetensors.torch import load_file

from musiclm_pytorch.audiolm import stages
from musiclm_pytorch.audiolm.convert import (
    CoarseTransformerWrapper,
    FineTransformerWrapper,
    SemanticTransformerWrapper,
    SoundStream,
    audiolm_stage,
    own_stage,
)
from musiclm_pytorch.audiolm.crops import PAD, TokenCrops, collate_tokens
from musiclm_pytorch.audiolm.generate import generate_coarse
from musiclm_pytorch.audiolm.stages import CoarseTransformer, FineTransformer, forgetful_mask
from musiclm_pytorch.audiolm.tokens import compute_tokens
from musiclm_pytorch.trainer.resumable_loader import DummyBatch
from musiclm_pytorch.trainer.stages import CoarseTrainer, Stage, load_stage


@pytest.fixture(scope='module')
def codec():
    return SoundStream(
        codebook_size=12, channels=2, strides=(2, 2), channel_mults=(1, 1), codebook_dim=4, rq_num_quantizers=3,
        use_local_attn=False, multi_spectral_window_powers_of_two=(6,),
    )  # fmt: skip


# ---- losses ----


def wrapped(stage, transformer, codec, semantic, codes, conditioning, unique, mask_prob):
    """audiolm-pytorch's own loss, in training mode, where its labels have end tokens."""
    keywords = dict(transformer=transformer, mask_prob=mask_prob)
    if stage == 'semantic':
        wrapper = SemanticTransformerWrapper(unique_consecutive=unique, **keywords).train()
        given = dict(semantic_token_ids=semantic)
    elif stage == 'coarse':
        wrapper = CoarseTransformerWrapper(codec=codec, unique_consecutive=unique, **keywords).train()
        given = dict(semantic_token_ids=semantic, coarse_token_ids=codes[..., :2])
    else:
        wrapper = FineTransformerWrapper(codec=codec, **keywords).train()
        given = dict(coarse_token_ids=codes[..., :2], fine_token_ids=codes[..., 2:])
    return wrapper(**given, text_embeds=conditioning, return_loss=True, cond_drop_prob=0.0)


def own(stage, transformer, semantic, codes, conditioning, mask_prob):
    ids = dict(semantic=(semantic,), coarse=(semantic, codes[..., :2]), fine=(codes[..., :2], codes[..., 2:]))[stage]
    return own_stage(transformer).loss(*ids, conditioning=conditioning, mask_prob=mask_prob)


def draw_tokens(b=3, n=9, t=5):
    return torch.randint(4, (b, n)), torch.randint(12, (b, t, 3))


@pytest.mark.parametrize(
    ('conditioned', 'unique', 'mask_prob'),
    [(False, False, 0.0), (True, True, 0.3), (True, False, 0.3), (False, True, 0.0)],
)
@pytest.mark.parametrize('stage', STAGES)
def test_losses_and_gradients_of_the_wrappers(stage, conditioned, unique, mask_prob, codec):
    """The same noise too: forgetful masks are drawn as theirs are."""
    semantic, codes = draw_tokens()
    transformer = audiolm_stage(make_transformer(stage, conditioned=conditioned))
    conditioning = torch.randn(3, 2, 16, requires_grad=True) if conditioned else None
    torch.manual_seed(1)
    expected = wrapped(stage, transformer, codec, semantic, codes, conditioning, unique, mask_prob)
    leaves = [*([conditioning] if conditioned else []), *transformer.parameters()]
    gradients = torch.autograd.grad(expected, leaves, allow_unused=True)
    if unique:
        rows = [torch.unique_consecutive(ids) for ids in semantic]
        semantic = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        assert (semantic == PAD).any()
    torch.manual_seed(1)
    found = own(stage, transformer, semantic, codes, conditioning, mask_prob)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    for own_gradient, gradient in zip(torch.autograd.grad(found, leaves, allow_unused=True), gradients):
        assert (own_gradient is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(own_gradient, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('stage', STAGES)
def test_every_parameter_gets_a_gradient(stage):
    """Or several processes would wait for it for ever."""
    transformer = make_transformer(stage, conditioned=True)
    model = Stage(transformer, torch.nn.Parameter(torch.randn(2, 6, 16)), cond_drop_prob=0.9, mask_prob=0.2,
                  prefix_loss_weight=1.0)  # fmt: skip
    semantic, codes = draw_tokens()
    model(semantic=semantic, codec=codes, conditioning=torch.randint(6, (3, 2))).backward()
    assert [name for name, it in model.named_parameters() if it.grad is None] == []


def test_a_coarse_stage_that_is_told_the_time_follows_it():
    """Codes that are those of the semantic token of their time, in windows of many tokens."""

    def learn(semantic_per_frame):
        torch.manual_seed(0)
        stage = CoarseTransformer(
            codebook_size=8, num_coarse_quantizers=1, num_semantic_tokens=8, dim=16, depth=1, heads=2, dim_head=8,
            num_residual_streams=1, semantic_per_frame=semantic_per_frame,
        ).scale_initial_weights()  # fmt: skip
        optimizer = torch.optim.Adam(stage.parameters(), 1e-2)
        for _ in range(60):
            semantic = torch.randint(8, (16, 20))
            loss = stage.loss(semantic, semantic.repeat_interleave(2, dim=1)[..., None], prefix_loss_weight=0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    # every second code repeats the one before
    assert learn(0.5) < 0.25 < 0.75 < learn(None)


def test_the_time_of_a_coarse_stage_is_that_of_its_tokens(tmp_path, tokens):
    stage = transformer_for('coarse', conditioned=False, semantic_per_frame=0.3)
    keywords = dict(results_folder=tmp_path, seconds=0.2)
    with pytest.raises(ValueError, match=r'semantic tokens a frame, but the transformer was built for .* = 0\.3'):
        CoarseTrainer(stage, tokens, **keywords)
    with pytest.raises(ValueError, match='tell no times.*unique_consecutive=False'):
        CoarseTrainer(stage, tokens, **keywords, unique_consecutive=True)
    semantic = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r'built for semantic_per_frame = 0\.3, got 0\.5'):
        generate_coarse(stage, semantic, max_length=8, semantic_per_frame=0.5)
    with pytest.raises(ValueError, match='tell no times'):
        generate_coarse(stage, semantic, max_length=8, unique_consecutive=True)
    with pytest.raises(ValueError, match='audiolm-pytorch builds no CoarseTransformer'):
        audiolm_stage(stage)


@pytest.mark.parametrize(('n', 'prob', 'hidden'), [(20, 0.15, 3), (3, 0.1, 0), (4, 0.9, 3)])
def test_forgetful_masks_hide_a_share_but_never_the_first(n, prob, hidden):
    masks = torch.stack([forgetful_mask((5, n), prob, torch.device('cpu')) for _ in range(50)])
    assert ((~masks).sum(dim=-1) == hidden).all()
    assert masks[..., 0].all()
    if hidden:
        assert not masks[..., 1:].flatten(0, 1).all(dim=0).any()  # every other one is hidden now and then


# ---- training ----


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokens')
    compute_tokens(
        Clips((2.0, 1.0, 2.0, 1.5, 2.0, 2.0, 0.5, 2.0)), folder, tokenizer=ClockTokenizer(), codec=ClockCodec(),
        quantizer=make_quantizer(), progress=False,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize('stage', STAGES)
def test_a_tiny_batch_is_learned_by_heart(tmp_path, tokens, stage):
    """And several trainers live in one process; the quantizer's embeddings of the stage move, the others stay."""
    quantizer = make_quantizer()
    before = weights(quantizer)
    transformer = transformer_for(stage, heads=4, dim_head=16)
    crops = TokenCrops(tokens, stage, seconds=0.1, training=False, items=[0, 1], text_share=1.0)
    assert not torch.equal(crops[0]['conditioning'], crops[1]['conditioning'])
    run = make_trainer(
        tmp_path, crops, stage, transformer, quantizer, seconds=None, valid_frac=0.0, mask_prob=0.0,
        cond_drop_prob=0.0, lr=2e-2, max_grad_norm=None,
    )  # fmt: skip
    found = []
    run.train(num_train_steps=60, log_fn=lambda metrics: found.append(metrics['loss']))
    assert found[0] > math.log(256)
    assert found[-1] < 0.05
    changed = {name for name, tensor in quantizer.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f'cond_embeddings.{stage}'}

    # what was saved comes back into audiolm-pytorch's own module, and into another quantizer
    other, other_quantizer = transformer_for(stage, heads=4, dim_head=16, seed=8), make_quantizer()
    other.load_state_dict(load_file(tmp_path / 'last' / 'model.safetensors'), strict=True)
    load_stage(tmp_path / 'last', other, other_quantizer)
    assert_same(weights(other), weights(transformer))
    assert_same(weights(other_quantizer.cond_embeddings), weights(quantizer.cond_embeddings))


@pytest.mark.parametrize(
    ('stage', 'prefix_loss_weight'),
    [('semantic', 1.0), ('coarse', 0.3), ('coarse', 0.0), ('fine', 0.3), ('fine', 0.0)],
)
def test_micro_batches_have_the_gradient_of_one_batch(tmp_path, tokens, stage, prefix_loss_weight):
    """The mean over all tokens of the step, whatever the lengths and however the items are dealt out."""
    run = make_trainer(
        tmp_path, tokens, stage, mask_prob=0.0, cond_drop_prob=0.0, prefix_loss_weight=prefix_loss_weight
    )
    for equal in (True, False):
        for unique in (False, True):
            items = draw_items(5, equal)
            collate = partial(collate_tokens, unique_consecutive=unique)
            loss, expected = gradients_of_step(run, [collate(items)])
            assert max(it.abs().max() for it in expected.values()) > 1e-3
            for sizes in ((3, 2), (2, 2, 1)):
                batches = [collate(part) for part in batched(items, sizes)]
                dummy = DummyBatch(batches[0])  # adds nothing
                found_loss, found = gradients_of_step(run, [*batches, dummy])
                assert found_loss == pytest.approx(loss, abs=1e-5)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def batched(items, sizes):
    items = iter(items)
    return [list(islice(items, size)) for size in sizes]


def test_the_loss_of_validation_is_that_of_all_tokens_at_once(tmp_path, tokens):
    """In batches whose clips have other lengths: the mean of their means is another number."""
    found = []
    for batch_size in (1, 3):
        run = make_trainer(tmp_path, tokens, 'coarse', seconds=2.0, valid_frac=0.5, batch_size=batch_size)
        assert len({it['semantic'].shape for it in map(run.valid_tokens.__getitem__, range(4))}) > 1
        found.append(run.validate()['loss'])
    batch = run.collate_fn([run.valid_tokens[index] for index in range(4)])
    with torch.no_grad():
        expected = run.model.eval()(**batch).item()
    assert found == pytest.approx([expected] * 2, abs=1e-5)


RUNS = {
    'plain': dict(),
    'average': dict(use_ema=True, lr_scheduler_type='cosine', warmup_steps=3, optimizer='adamw', weight_decay=0.1),
    'accumulated': dict(grad_accum_every=2, batch_size=1),
}


@pytest.mark.parametrize(('stage', 'name'), [('semantic', 'plain'), ('coarse', 'average'), ('fine', 'accumulated')])
def test_resuming_equals_never_having_stopped(tmp_path, tokens, stage, name):
    """To the bit: crops, masks, dropped conditions, weights, embeddings and averages."""
    quantizers = []

    def make(folder, resume):
        quantizers.append(make_quantizer())
        if resume:
            torch.nn.init.normal_(quantizers[-1].cond_embeddings[stage])
        keywords = dict(RUNS[name], checkpoint_every=3, stage=stage, cond_drop_prob=0.4, resume=resume)
        transformer = transformer_for(stage, seed=99 if resume else 3)
        return make_trainer(folder, tokens, transformer=transformer, quantizer=quantizers[-1], **keywords)

    _, straight = assert_resuming_changes_nothing(tmp_path, make, steps=8, stop_at=7, saved_at=6)
    assert torch.equal(quantizers[-1].cond_embeddings[stage], straight.model.embeddings)
    for which in ('best', 'last'):
        assert_same(*(load_file(tmp_path / run / which / 'model.safetensors') for run in ('straight', 'stopped')))


def test_masks_and_dropping_in_training_only_and_still_after_validation(tmp_path, tokens, monkeypatch):
    """Upstream's first validation turns them off for good, and the end tokens with them."""
    seen = []

    ends = []
    genuine = stages.with_end
    monkeypatch.setattr(stages, 'with_end', lambda ids, end: ends.append(genuine(ids, end)) or ends[-1])
    run = make_trainer(
        tmp_path, tokens, batch_size=6, cond_drop_prob=0.5, validate_every=2, mask_prob=0.2, max_valid_items=2
    )
    loss = run.transformer.loss

    def spy(semantic, *, conditioning, mask_prob, **keywords):
        seen.append((mask_prob, (conditioning == 0).all(dim=-1).all(dim=-1), conditioning, torch.is_grad_enabled()))
        return loss(semantic, conditioning=conditioning, mask_prob=mask_prob, **keywords)

    run.transformer.loss = spy
    run.train(num_train_steps=12)
    training, validation = ([it for it in seen if it[-1] is mode] for mode in (True, False))
    assert len(training) == 12
    assert len(validation) == 6
    assert {it[0] for it in training} == {0.2}
    assert {it[0] for it in validation} == {0.0}
    dropped = torch.cat([it[1] for it in training])
    assert 18 < dropped.sum() < 54  # of 72 items, each as a whole
    for _, gone, conditioning, _ in training:
        assert (conditioning[~gone] != 0).all()
    assert not torch.cat([it[1] for it in validation]).any()
    assert all(((labels == 512).sum(dim=-1) == 1).all() for labels in ends)


def test_training_makes_guidance_real(tmp_path, tokens):
    """After training with dropped conditions, the two branches differ, and the null one is no worse than chance."""
    quantizer = make_quantizer()
    run = make_trainer(tmp_path, tokens, quantizer=quantizer, cond_drop_prob=0.5, lr=5e-3, mask_prob=0.0)
    run.train(num_train_steps=30)
    stage = run.model.eval()
    batch = run.collate_fn([run.valid_tokens[0]])
    with torch.no_grad():
        conditioning, _ = stage.embed(batch['conditioning'], None, None, batch['semantic'].shape[1])
        with_it, without = (
            stage.transformer.loss(batch['semantic'], conditioning=it)
            for it in (conditioning, torch.zeros_like(conditioning))
        )
    assert with_it != without
    assert without < math.log(513)


def test_mixed_precision_and_repetitions(tmp_path, tokens):
    run = make_trainer(tmp_path, tokens, 'coarse', unique_consecutive=True, mixed_precision='bf16')
    results = run.train(num_train_steps=2)
    assert math.isfinite(results['valid_loss'])
    assert all(it.dtype == torch.float32 for it in run.model.parameters())
    config = json.loads((tmp_path / 'last' / 'config.json').read_text())
    assert config['stage']['unique_consecutive'] is True
    assert config['model'] == 'CoarseTransformer'


def test_without_conditioning(tmp_path, tokens):
    run = make_trainer(tmp_path, tokens, 'fine', conditioned=False)
    run.train(num_train_steps=2)
    assert not (tmp_path / 'last' / 'conditioning.safetensors').exists()
    load_stage(tmp_path / 'last', transformer_for('fine', conditioned=False))
    with pytest.raises(FileNotFoundError, match='trained without conditioning'):
        load_stage(tmp_path / 'last', transformer_for('fine', conditioned=False), make_quantizer())


# ---- bad input ----


@pytest.mark.parametrize(
    ('keywords', 'error', 'message'),
    [
        (dict(transformer=lambda: transformer_for('fine')), TypeError, 'must be a SemanticTransformer, got a Fine'),
        (dict(transformer=lambda: with_own_forward()), TypeError, 'Changed has a forward of its own'),
        (dict(transformer=lambda: make_transformer('semantic', conditioned=True)), ValueError,
         'semantic tokens in .* have codebook_size 512, but the transformer was built for 20'),
        (dict(transformer=lambda: transformer_for('semantic', conditioned=False)), ValueError,
         'built without conditioning'),
        (dict(conditioned=False, transformer=lambda: transformer_for('semantic')), ValueError, 'needs the quantizer'),
        (dict(quantizer=lambda: make_quantizer(dim=12)), ValueError, "of 'semantic' have width 12.*takes 16"),
        (dict(quantizer=lambda: refitted()), ValueError, 'another quantizer or another MuLaN'),
        (dict(namespace='middle'), ValueError, "no namespace 'middle', but semantic, coarse, fine"),
        (dict(stage='coarse', transformer=lambda: make_transformer('coarse', 512, 12, True)), ValueError,
         'codec tokens in .* have codebook_size 1024, but the transformer was built for 12'),
        (dict(mask_prob=1.0), ValueError, r'mask_prob must lie in \[0, 1\)'),
        (dict(cond_drop_prob=-0.1), ValueError, 'cond_drop_prob'),
        (dict(prefix_loss_weight=-1.0), ValueError, 'prefix_loss_weight'),
        (dict(batch_size=50), ValueError, 'fewer than one batch of 50'),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together(tmp_path, tokens, keywords, error, message):
    keywords = {name: it() if callable(it) else it for name, it in keywords.items()}
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, tokens, **keywords)


def with_own_forward():
    transformer = audiolm_stage(transformer_for('semantic'))

    class Changed(type(transformer)):
        def forward(self, **keywords):
            return super().forward(**keywords)

    transformer.__class__ = Changed
    return transformer


def refitted():
    quantizer = make_quantizer()
    quantizer.fit(torch.nn.functional.normalize(torch.randn(60, 16), dim=-1), seed=1)
    return quantizer


def test_crops_of_another_stage(tmp_path, tokens):
    with pytest.raises(ValueError, match="crops for the stage 'fine', not 'semantic'"):
        make_trainer(tmp_path, TokenCrops(tokens, 'fine'), seconds=None)
    with pytest.raises(ValueError, match='belong to TokenCrops'):
        make_trainer(tmp_path, TokenCrops(tokens, 'semantic'), seconds=3.0)


def test_weights_of_another_model(tmp_path, tokens):
    make_trainer(tmp_path, tokens).train(num_train_steps=1)
    with pytest.raises(ValueError, match='do not fit this model'):
        load_stage(tmp_path / 'last', transformer_for('semantic', dim=24))
    with pytest.raises(
        ValueError, match=r'embeddings in .* have shape \(2, 6, 16\), but those of the quantizer \(2, 6, 12\)'
    ):
        load_stage(tmp_path / 'last', transformer_for('semantic'), make_quantizer(dim=12))
    with pytest.raises(FileNotFoundError, match=r'no config.json in .*nowhere'):
        load_stage(tmp_path / 'nowhere', transformer_for('semantic'))


@pytest.mark.parametrize('stage', ['coarse', 'fine'])
def test_new_weights_are_scaled_so_that_the_loss_begins_at_chance(stage):
    codes = dict(codebook_size=512, num_coarse_quantizers=2, dim=64, depth=1)
    tokens = dict(codec=torch.randint(0, 512, (4, 24, 5)))
    if stage == 'coarse':
        codes['num_semantic_tokens'] = 512
        tokens['semantic'] = torch.randint(0, 512, (4, 12))
    else:
        codes['num_fine_quantizers'] = 3
    kind = dict(coarse=CoarseTransformer, fine=FineTransformer)[stage]

    def first_loss(transformer):
        stage = Stage(transformer, None, cond_drop_prob=0.0, mask_prob=0.0, prefix_loss_weight=0.0)
        return stage(**tokens).item()

    transformer = kind(**codes)
    assert first_loss(transformer) > math.log(512) + 3
    assert transformer.scale_initial_weights() is transformer
    assert first_loss(transformer) == pytest.approx(math.log(512), abs=0.3)
    embeddings = [it.weight for it in transformer.modules() if isinstance(it, torch.nn.Embedding)]
    assert embeddings
    assert all(0.08 < it.std() < 0.12 for it in embeddings)
