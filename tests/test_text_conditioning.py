"""Stages that a T5 conditions: audiolm-pytorch's own, trained by our trainers and generating with either package."""

import json

import pytest
import torch
from helpers.music import build_audio_lm, build_quantizer
from helpers.pipeline import TINY
from helpers.pretrained_parts import Sounds
from helpers.pretrained_towers import save_tower
from helpers.stage_parts import make_quantizer, make_transformer

from musiclm_pytorch import (
    CoarseTrainer,
    FineTrainer,
    MusicLM,
    PretrainedTextTransformer,
    SemanticTrainer,
    TokenCrops,
    compute_tokens,
    generate_coarse,
    generate_fine,
    generate_semantic,
)
from musiclm_pytorch.audiolm.convert import audiolm_stage, own_stage
from musiclm_pytorch.audiolm.saving import load_module
from musiclm_pytorch.cli import main
from musiclm_pytorch.trainer import load_stage

TEXTS = ['a calm flute', 'fast drums with a cello']


@pytest.fixture(scope='module')
def t5(tmp_path_factory):
    return save_tower('t5', tmp_path_factory.mktemp('t5'))


@pytest.fixture
def encoder(t5):
    return PretrainedTextTransformer(t5)


def test_from_words_to_music(t5, encoder, tmp_path):
    audio_lm = build_audio_lm((), text_condition=dict(has_condition=True, t5_name=str(t5)))
    parts = dict(tokenizer=audio_lm.semantic.wav2vec, codec=audio_lm.fine.codec)
    tokens = compute_tokens(Sounds(), tmp_path / 'tokens', text_encoder=encoder, progress=False, **parts)
    words = TokenCrops(tokens, 'semantic', conditioning=False, words=True, seconds=0.3)[2]['words']
    assert encoder.processor.decode(words, skip_special_tokens=True) == 'clip 2'

    for trainer in SemanticTrainer, CoarseTrainer, FineTrainer:
        theirs = getattr(audio_lm, trainer.stage).transformer
        before = {name: it.clone() for name, it in theirs.state_dict().items()}
        keywords = dict(seconds=0.3, batch_size=2, num_train_steps=1, results_folder=tmp_path / trainer.stage)
        training = trainer(theirs, tokens, text_encoder=encoder, **keywords)
        assert training.train()['valid_loss'] > 0
        moved = {name for name, it in theirs.state_dict().items() if not torch.equal(it, before[name])}
        assert any('layers.0.1.branch.to_kv' in name for name in moved)  # cross-attention

    # by audiolm-pytorch, whose call of the tokenizer is bridged
    assert len(audio_lm.semantic.generate(text=TEXTS, batch_size=2, max_length=3)) == 2
    given = torch.randint(6, (2, 4))
    assert len(audio_lm.coarse.generate(semantic_token_ids=given, text=TEXTS, max_time_steps=2)) == 2
    assert len(audio_lm.fine.generate(coarse_token_ids=given.view(2, 2, 2), text=TEXTS)) == 2

    stages = {name: load_module(tmp_path / name / 'last') for name in ('semantic', 'coarse', 'fine')}
    assert all(it.reads_text for it in stages.values())
    assert own_stage(audio_lm.fine.transformer).reads_text
    vectors = dict(text_embeds=encoder.vectors(raw_texts=TEXTS))
    semantic = generate_semantic(stages['semantic'], max_length=8, generator=seeded(2), **vectors).tokens
    coarse = generate_coarse(stages['coarse'], semantic, max_length=6, generator=seeded(2), **vectors).tokens
    fine = generate_fine(stages['fine'], coarse, generator=seeded(2), **vectors).tokens
    assert fine.shape[:2] == coarse.shape[:2] == (2, 6)
    # a text is not told by what it is batched with
    alone = generate_semantic(
        stages['semantic'], max_length=8, generator=seeded(1), text_embeds=encoder.vectors(raw_texts=TEXTS[:1])
    ).tokens
    assert torch.equal(semantic[:1, : alone.shape[1]], alone)

    with pytest.raises(ValueError, match='semantic stage reads the words of a text, .* where MusicLM has codes'):
        MusicLM(mulan_embed_quantizer=build_quantizer(), **parts, **stages)


def test_the_command_trains_such_stages_at_once_and_part_by_part(t5, music, tmp_path, capsys):
    whole, parts, config = tmp_path / 'whole', tmp_path / 'parts', tmp_path / 'all.json'
    hubert = save_tower('hubert', tmp_path / 'hubert')
    tokenizer = dict(model=str(hubert), layer=1, codebook_size=4)
    content = {**TINY, 'tokenizer': tokenizer, 'text_encoder': dict(model=str(t5))}
    config.write_text(json.dumps(content))

    def run(*arguments):
        assert main(list(map(str, arguments))) == 0

    run('train', 'all', '--data', music, '--config', config, '--output', whole)
    out = capsys.readouterr().out
    made = ('tokenizer', 'codec', 'tokens', 'semantic', 'coarse', 'fine')
    assert [line.split(', ')[1] for line in out.splitlines() if line.startswith('part ')] == list(made)
    assert 'the stages, which read words, are in' in out
    assert {it.name for it in whole.iterdir() if it.is_dir()} == {*made}
    run('train', 'all', '--data', music, '--output', whole, '--resume')

    folders = [f'--{name}={whole / name}' for name in ('tokenizer', 'codec')]
    run('tokens', '--data', music, '-o', parts / 'tokens', *folders, '--text-encoder', t5)
    for stage in ('semantic', 'fine'):
        given = ['--tokens', parts / 'tokens', '--text-encoder', t5, '--config', config]
        run('train', stage, *given, '--output', parts / stage)
        one, other = (load_module(folder / stage / 'last') for folder in (whole, parts))
        assert one.reads_text
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    run('train', 'fine', *given, '--begin-with', parts / 'fine', '--output', tmp_path / 'on', '--lora', '2')

    for more, message in (
        (['--melody.training.num_train_steps', '1'], 'leave out text_encoder, or the part melody'),
        (['--begin-with', 'tiny'], 'is a MusicLM, whose stages read'),
    ):
        command = ['train', 'all', '--data', music, '--config', config, '--output', tmp_path / 'none', *more]
        assert main(list(map(str, command))) == 2
        assert message in capsys.readouterr().err


def seeded(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize('stage', ['semantic', 'coarse', 'fine'])
def test_padding_of_a_text_is_not_seen(stage, encoder):
    transformer = make_transformer(stage, has_condition=True, cond_dim=16).eval()
    transformer.read_text()
    ids = [torch.randint(8, (2, 6)), torch.randint(8, (2, 4, 3))]
    ids = dict(semantic=ids[:1], coarse=[ids[0], ids[1][..., :2]], fine=[ids[1][..., :2], ids[1][..., 2:]])[stage]
    vectors = encoder.vectors(raw_texts=TEXTS)
    assert (vectors[0, 4:] == 0).all()
    both = [transformer.loss(*(it[:1] for it in ids), conditioning=it) for it in (vectors[:1], vectors[:1, :4])]
    torch.testing.assert_close(*both)
    assert not torch.equal(both[0], transformer.loss(*(it[:1] for it in ids), conditioning=vectors[1:]))
    own = own_stage(audiolm_stage(transformer))
    assert own.reads_text
    torch.testing.assert_close(own.loss(*(it[:1] for it in ids), conditioning=vectors[:1]), both[0])


def test_the_encoder_gives_what_audiolm_pytorch_reads(t5, encoder):
    from audiolm_pytorch.t5 import t5_encode_text

    torch.testing.assert_close(t5_encode_text(TEXTS, name=str(t5)), encoder.vectors(raw_texts=TEXTS))


def test_what_does_not_belong_together(t5, encoder, tmp_path):
    parts = dict(tokenizer=build_audio_lm().semantic.wav2vec, progress=False)
    tokens = compute_tokens(Sounds(), tmp_path / 'tokens', text_encoder=encoder, **parts)

    def train(text_encoder=encoder, quantizer=None, source=tokens, seconds=0.3, **keywords):
        transformer = make_transformer('semantic', tokens=6, **{'has_condition': True, 'cond_dim': 16, **keywords})
        more = dict(quantizer=quantizer, text_encoder=text_encoder, seconds=seconds, batch_size=2)
        return SemanticTrainer(transformer, source, results_folder=tmp_path / 'run', **more)

    for wrong, message in (
        (dict(text_encoder=None), 'needs the quantizer that gives it, or a text_encoder'),
        (dict(has_condition=False), 'built without conditioning'),
        (dict(quantizer=make_quantizer()), 'by a quantizer or by a text_encoder, not by both'),
        (dict(cond_dim=12), 'gives vectors of width 16, but the transformer takes 12; build it with cond_dim=16'),
        (dict(text_encoder=PretrainedTextTransformer(t5, trained=True)), 'is not trained with it'),
        (dict(text_encoder=PretrainedTextTransformer(t5, max_seq_len=5)), 'computed with another text_encoder'),
        (
            dict(seconds=None, source=TokenCrops(tokens, 'semantic', conditioning=False)),
            'words=False do not fit a stage with a text',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(**wrong)
    train().train(num_train_steps=1)
    fresh = make_transformer('semantic', tokens=6, has_condition=True, cond_dim=16)
    load_stage(tmp_path / 'run' / 'last', fresh)
    assert fresh.reads_text
    silent = [torch.randn(1000)] * 3
    with pytest.raises(ValueError, match='gives waves without texts in words'):
        compute_tokens(silent, tmp_path / 'silent', text_encoder=encoder, sample_rate=800, progress=False)
