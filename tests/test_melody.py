"""The same melody is the same whoever plays it; codes of melodies condition the semantic stage, which follows them."""

from fractions import Fraction

import numpy as np
import pytest
import soundfile
import torch
from helpers.stage_parts import make_quantizer, make_transformer
from torch import nn

from musiclm_pytorch import (
    MelodyEncoder,
    MelodyPairs,
    MelodyQuantizer,
    MelodyTrainer,
    MuLaNEmbedQuantizer,
    MusicLM,
    SemanticTrainer,
    StopGeneration,
    TokenCrops,
    compute_tokens,
    generate_semantic,
)
from musiclm_pytorch.audiolm.convert import SoundStream
from musiclm_pytorch.audiolm.generation_args import Sampling
from musiclm_pytorch.audiolm.saving import load_module
from musiclm_pytorch.cli import main
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.data.composition import Note
from musiclm_pytorch.data.melodies import PLAYERS, Melody
from musiclm_pytorch.mulan.lora import add_adapters
from musiclm_pytorch.mulan.melody import semi_hard_triplet_loss
from musiclm_pytorch.pretrained import HOME
from musiclm_pytorch.trainer.stages import load_stage, take_conditioning

RATE = 8000
TONES = (60, 64, 67, 71)


def tiny_encoder(**keywords):
    torch.manual_seed(0)
    return MelodyEncoder(**{**dict(dim=16, depth=1, heads=2, dim_head=8, dim_latent=16), **keywords}).eval()


def tones(pitches, each=0.5, rate=RATE):
    """Sines one after the other, `(samples,)`."""
    t = torch.arange(round(each * rate)) / rate
    return torch.cat([0.3 * torch.sin(2 * torch.pi * 440 * 2 ** ((it - 69) / 12) * t) for it in pitches])


# what it learns from; more in test_generated.py


@pytest.mark.parametrize('player', PLAYERS)
def test_every_player_plays_the_notes_in_time(player):
    pitches = (60, 67, 64, 69)
    piece = Melody(tuple(Note(i, 1.0, pitch, 1.0) for i, pitch in enumerate(pitches)), (), (), 120.0, 0)
    wave = MelodyPairs(1, seconds=2.0).play(piece, player, 1.0, np.random.default_rng(3))
    chroma = MelodyEncoder(bins=12).chroma(wave[None])[0]
    # 20 frames a second, half a second a note; a hum may be out of tune by half a semitone
    heard = [chroma[:, 10 * i + 4 : 10 * i + 10].sum(dim=1).topk(2).indices.tolist() for i in range(4)]
    assert all(pitch % 12 in found for pitch, found in zip(pitches, heard)), heard


@pytest.mark.parametrize(
    ('keywords', 'message'),
    [
        (dict(tempo=0.5), 'tempo must lie in 1 to 4, got 0.5'),
        (dict(transpose=12), 'transpose must lie in 0 to 11 semitones, got 12'),
        (dict(hummed=1.5), r'hummed must lie in \[0, 1\), got 1.5'),
    ],
)
def test_pairs_out_of_range(keywords, message):
    with pytest.raises(ValueError, match=message):
        MelodyPairs(**keywords)


# the encoder


@torch.no_grad()
def test_windows_are_those_of_the_wave_alone():
    encoder = tiny_encoder(seconds=1.0, hop=0.5)
    wave = tones((60, 64, 67, 71, 72))
    found = encoder(wave[None])
    assert found.shape == (1, 5, 16)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(1, 5))
    for i in range(5):
        alone = encoder(wave[None, 4000 * i : 4000 * i + 8000])[0, 0]
        torch.testing.assert_close(found[0, i], alone, atol=1e-4, rtol=0)
    both = encoder(torch.stack([tones((72, 71, 67, 64, 60)), wave]))
    torch.testing.assert_close(both[1], found[0], atol=1e-4, rtol=0)
    assert encoder(wave[None, :50]).shape == (1, 1, 16)


@torch.no_grad()
def test_loudness_octave_and_rate_do_not_matter_but_notes_do():
    encoder = tiny_encoder()
    wave = tones((60, 64, 67, 71))
    plain = encoder(wave[None])[0, 0]

    def likeness(other, rate=RATE):
        return float(encoder(other[None], sample_rate=rate)[0, 0] @ plain)

    assert likeness(0.01 * wave) > 0.9999
    assert likeness(tones((60, 64, 67, 71), rate=24000), 24000) > 0.999
    up = likeness(tones((72, 76, 79, 83)))
    assert up > 0.99
    assert likeness(tones((60, 61, 66, 70))) < up


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (lambda: MelodyEncoder(bins=18), ValueError, 'bins must be a multiple of 12'),
        (lambda: MelodyEncoder(sample_rate=4000), ValueError, 'at least 6000 Hz'),
        (lambda: MelodyEncoder(hop=0.0), ValueError, 'hop must be greater than 0'),
        (lambda: tiny_encoder()(torch.zeros(1, 0)), ValueError, r'\(1, 0\) have no samples'),
        (lambda: tiny_encoder()(torch.zeros(8000)), ValueError, r'for one wave pass wavs\[None\]'),
        (lambda: tiny_encoder()(torch.zeros(1, 80).long()), TypeError, 'integer PCM'),
        (lambda: MelodyTrainer(tiny_encoder(), MelodyPairs(4), batch_size=1), ValueError, 'batch_size must be 2'),
        (lambda: semi_hard_triplet_loss(torch.ones(1, 2), torch.ones(1, 2)), ValueError, 'a batch of 2 at least'),
        (lambda: MelodyQuantizer(tiny_encoder())(torch.zeros(1, 80)), ValueError, 'no codebooks yet: call melody.fit'),
        (lambda: make_quantizer().add_melody(MelodyQuantizer(tiny_encoder())), ValueError, 'no codebooks yet'),
    ],
)
def test_what_goes_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_semi_hard_negatives_by_hand():
    # squared distances of anchor i to positive j
    anchors = torch.eye(3)
    positives = 1 - torch.tensor([[0.2, 0.3, 0.9], [0.5, 0.4, 0.1], [0.8, 0.7, 0.6]]) / 2
    # 0: 0.3 is the nearest beyond 0.2; 1: 0.5 beyond 0.4; 2: 0.7 beyond 0.6
    rows = [0.2 - 0.3 + 0.2, 0.4 - 0.5 + 0.2, 0.6 - 0.7 + 0.2]
    # 0: 0.5 beyond 0.2; 1: 0.7 beyond 0.4; 2: 0.9 beyond 0.6
    columns = [0.0, 0.0, 0.0]
    expected = (sum(rows) / 3 + sum(columns) / 3) / 2
    assert float(semi_hard_triplet_loss(anchors, positives.T)) == pytest.approx(expected, abs=1e-6)
    # none is further away than the own one: the furthest
    alike = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert float(semi_hard_triplet_loss(alike, -alike)) == pytest.approx(0.2)


def test_trainer_learns_and_what_it_writes_is_the_encoder(tmp_path):
    encoder = tiny_encoder(dim=32, seconds=1.5)
    keywords = dict(seconds=1.5, hummed=0.0, tempo=1.0)
    trainer = MelodyTrainer(
        encoder,
        MelodyPairs(32, **keywords),
        valid_pairs=MelodyPairs(16, split='valid', **keywords),
        batch_size=16,
        lr=3e-3,
        results_folder=tmp_path / 'run',
        progress=False,
    )
    before = trainer.validate()['recall_at_1']
    found = trainer.train(num_train_steps=8)
    assert found['valid_recall_at_1'] > before
    wave = tones(TONES)[None]
    loaded = load_module(tmp_path / 'run' / 'last')
    with torch.no_grad():
        torch.testing.assert_close(loaded(wave), encoder.eval()(wave))


# the whole chain


class ToneTokenizer(nn.Module):
    """Semantic tokens that tell which of the tones each tenth of a second is."""

    target_sample_hz, downsample_factor, codebook_size = RATE, 800, len(TONES)

    def forward(self, waves, flatten=True):
        hertz = 440 * 2 ** ((torch.tensor(TONES) - 69) / 12)
        angle = 2 * torch.pi * hertz[:, None] * torch.arange(800) / RATE
        frames = waves[:, : waves.shape[1] // 800 * 800].unflatten(1, (-1, 800))
        return ((frames @ angle.cos().T) ** 2 + (frames @ angle.sin().T) ** 2).argmax(dim=-1)


class Tunes(torch.utils.data.Dataset):
    """Melodies of two seconds that differ in the order of their tones, all with the same caption."""

    sample_rate = RATE
    orders = ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1))

    def __len__(self):
        return len(self.orders)

    def __getitem__(self, index):
        return dict(wave=tones([TONES[i] for i in self.orders[index]]), caption='clip 1')


def melody_quantizer():
    melody = MelodyQuantizer(tiny_encoder(seconds=0.5, hop=0.5), num_quantizers=2, codebook_size=4)
    with torch.no_grad():
        waves = torch.stack([it['wave'] for it in Tunes()])
        melody.fit(melody.encoder(waves + 1e-3 * torch.randn_like(waves)).flatten(0, 1))
    return melody.eval()


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
    """A semantic stage that was trained on four melodies with one caption, and the folder of all that."""
    folder = tmp_path_factory.mktemp('melodies')
    quantizer = make_quantizer().add_melody(melody_quantizer())
    tokenizer = ToneTokenizer()
    compute_tokens(Tunes(), folder / 'tokens', tokenizer=tokenizer, quantizer=quantizer, progress=False)
    stage = make_transformer('semantic', len(TONES), conditioned=True, dim=32, cond_dim=16)
    trainer = SemanticTrainer(
        stage.scale_initial_weights(),
        folder / 'tokens',
        quantizer=quantizer,
        batch_size=4,
        seconds=2.0,
        text_share=1.0,
        cond_drop_prob=0.0,
        melody_drop_prob=0.1,
        mask_prob=0.0,
        lr=1e-2,
        valid_frac=0,
        results_folder=folder / 'semantic',
        progress=False,
    )
    trainer.train(num_train_steps=90)
    return folder, quantizer, stage.eval()


def musiclm_of(quantizer, stage):
    codec = SoundStream(
        channels=4, strides=(2, 4, 4), channel_mults=(1, 2, 2), codebook_dim=8, codebook_size=8,
        rq_num_quantizers=3, target_sample_hz=1600, attn_dim_head=4, attn_heads=1, use_local_attn=False,
    )  # fmt: skip
    for layer in codec.rq.rvqs[0].layers:
        layer._codebook.initted.fill_(True)
    return MusicLM(
        mulan_embed_quantizer=quantizer,
        semantic=stage,
        coarse=make_transformer('coarse', len(TONES), 8),
        fine=make_transformer('fine', codes=8),
        codec=codec,
        tokenizer=ToneTokenizer(),
        windows=(2.0, 2.0, 2.0),
        sampling=dict(temperature=0.0, cond_scale=1.0),
    ).eval()


def tokens_of(musiclm, text='clip 1', **keywords):
    """The semantic tokens that music would be made of, `(n,)`, or `(p, n)` of several prompts."""
    drawn = {}

    def look(tokens, logits):
        drawn[0] = torch.cat((tokens, logits[:, :-1].argmax(dim=1, keepdim=True)), dim=1)
        return logits

    def stop(*_):
        raise StopGeneration

    with pytest.raises(StopGeneration):
        musiclm(text, seed=0, logits_processor=(look, stop, None), **keywords)
    return drawn[0].squeeze(0)


def test_music_follows_the_melody_given(chain, tmp_path):
    _, quantizer, stage = chain
    musiclm = musiclm_of(quantizer, stage)
    tunes = [it['wave'] for it in Tunes()]
    wanted = ToneTokenizer()(torch.stack(tunes))
    made = tokens_of(musiclm, ['clip 1'] * 4, seconds=2.0, melody=[(wave, RATE) for wave in tunes])
    agreement = (made[:, None] == wanted).float().mean(dim=-1)  # melodies made × melodies given
    assert agreement.diagonal().min() > 0.9
    assert (agreement - torch.eye(4)).max() < 0.6
    # softer, at another rate, from a file
    soundfile.write(tmp_path / 'hum.wav', 0.2 * tones([TONES[i] for i in Tunes.orders[2]], rate=16000).numpy(), 16000)
    assert torch.equal(tokens_of(musiclm, seconds=2.0, melody=tmp_path / 'hum.wav'), made[2])


def test_a_melody_goes_on_through_the_windows_of_longer_music(chain):
    _, quantizer, stage = chain
    wave = torch.cat([it['wave'] for it in Tunes()])[None, : 6 * RATE]
    made = generate_semantic(
        stage,
        max_length=70,
        min_length=70,
        window=20,
        overlap=10,
        text_embeds=quantizer(raw_texts=['clip 1'], namespace='semantic').detach(),
        melody=quantizer.embed_melody(quantizer.melody(wave), 60, Fraction(10)).detach(),  # the last second without
        sampling=Sampling(temperature=0.0),
    ).tokens
    assert (made[:, :60] == ToneTokenizer()(wave)).float().mean() > 0.8


@pytest.mark.parametrize('primed', [0, 15, 35])  # tenths of a second: none, of a window, of more than one
def test_a_stream_follows_the_melody_in_time_and_goes_on_without(chain, primed):
    _, quantizer, stage = chain
    musiclm, drawn = musiclm_of(quantizer, stage), []
    wave = torch.cat([it['wave'] for it in Tunes()])[: 6 * RATE]

    def look(tokens, logits):
        drawn.append(int(logits[0, :-1].argmax()))
        return logits

    prime = (wave[: primed * RATE // 10], RATE) if primed else None
    how = dict(seed=0, logits_processor=(look, None, None), prime=prime)
    with musiclm.stream('clip 1', melody=(wave, RATE), **how) as stream:
        while len(drawn) + primed < 100:
            next(stream)
    first = max(0, primed - 1)  # the last tenth of a second is made again
    wanted = ToneTokenizer()(wave[None])[0, first:].tolist()
    assert np.mean([one == other for one, other in zip(drawn, wanted)]) > 0.8
    with pytest.raises(ValueError, match='this model has no melody encoder'):
        musiclm_of(make_quantizer(), stage).stream('clip 1', melody=(wave, RATE))


def test_saved_and_loaded_with_all_that_conditions(chain, tmp_path):
    folder, quantizer, _ = chain
    wave = Tunes()[1]['wave'][None]
    quantizer.save_pretrained(tmp_path / 'quantizer')
    loaded = MuLaNEmbedQuantizer.from_pretrained(tmp_path / 'quantizer')
    codes = loaded.melody(wave)
    assert torch.equal(codes, quantizer.melody(wave))
    indices = quantizer.indices(raw_texts=['clip 1'])
    torch.testing.assert_close(loaded.embed(indices, 'semantic'), quantizer.embed(indices, 'semantic'))
    wanted = quantizer.embed_melody(codes, 25, Fraction(10))
    torch.testing.assert_close(loaded.embed_melody(codes, 25, Fraction(10)), wanted)
    # a window begins with every fifth token, four windows are there, and the melody ends with the last
    assert torch.equal(wanted[:, :5], wanted[:, :1].expand(-1, 5, -1))
    assert wanted[:, :20].any(dim=-1).all()
    assert not wanted[:, 20:].any()
    # what the trainer wrote is what it trained
    fresh = make_quantizer().add_melody(melody_quantizer())
    again = make_transformer('semantic', len(TONES), conditioned=True, dim=32, cond_dim=16)
    load_stage(folder / 'semantic' / 'last', again, fresh)
    torch.testing.assert_close(fresh.embed_melody(codes, 25, Fraction(10)), wanted)
    with pytest.raises(ValueError, match='was trained with a melody, or with another one'):
        load_stage(folder / 'semantic' / 'last', again, make_quantizer())
    with pytest.raises(ValueError, match='has a melody already'):
        fresh.add_melody(melody_quantizer())


def test_crops_begin_where_windows_of_melodies_begin(chain):
    folder, quantizer, _ = chain
    crops = TokenCrops(folder / 'tokens', 'semantic', seconds=1.0, text_share=1.0, melody=True)
    whole = [quantizer.melody(it['wave'][None])[0] for it in Tunes()]
    wanted = ToneTokenizer()(torch.stack([it['wave'] for it in Tunes()]))
    for _ in range(5):
        for i, crop in enumerate(crops):
            begins = [b for b in range(3) if torch.equal(crop['semantic'], wanted[i, 5 * b : 5 * b + 10])]
            assert any(torch.equal(crop['melody'], whole[i][b : b + 2]) for b in begins)


def test_models_and_tokens_without_melodies_say_so(chain, tmp_path):
    folder, quantizer, stage = chain
    plain = make_quantizer()
    musiclm = musiclm_of(plain, make_transformer('semantic', len(TONES), conditioned=True))
    with pytest.raises(ValueError, match='this model has no melody encoder: fit a MelodyQuantizer'):
        musiclm('clip 1', seconds=1.0, melody=(tones(TONES), RATE))
    with pytest.raises(ValueError, match='got 2 melodies for 1 pieces; pass one, or one for each prompt'):
        musiclm_of(quantizer, stage)('clip 1', seconds=1.0, melody=2 * [(tones(TONES), RATE)])
    with pytest.raises(TypeError, match='melody must tell its rate: pass the pair of it and its rate'):
        musiclm_of(quantizer, stage)('clip 1', seconds=1.0, melody=tones(TONES))
    compute_tokens(Tunes(), tmp_path / 'tokens', tokenizer=ToneTokenizer(), quantizer=plain, progress=False)
    shared = dict(quantizer=quantizer, batch_size=2, seconds=1.0, results_folder=tmp_path / 'run')
    with pytest.raises(FileNotFoundError, match='no melody tokens in'):
        SemanticTrainer(stage, tmp_path / 'tokens', **shared)
    with pytest.raises(ValueError, match='tell no times, so a stage of them follows no melody'):
        SemanticTrainer(stage, folder / 'tokens', unique_consecutive=True, **shared)
    with pytest.raises(ValueError, match='do not fit a quantizer with a melody'):
        SemanticTrainer(stage, TokenCrops(folder / 'tokens', 'semantic', seconds=1.0), **shared | dict(seconds=None))


def test_a_stage_trained_without_melodies_goes_on_with_them(chain, tmp_path):
    folder, quantizer, _ = chain
    plain, stage = make_quantizer(), make_transformer('semantic', len(TONES), conditioned=True, dim=32, cond_dim=16)
    how = dict(batch_size=2, seconds=2.0, valid_frac=0, progress=False)
    sure = dict(melody_drop_prob=0.0, cond_drop_prob=0.0)
    trained = SemanticTrainer(stage, folder / 'tokens', quantizer=plain, results_folder=tmp_path / 'plain', **how)
    trained.train(num_train_steps=1)
    plain.save_pretrained(tmp_path / 'quantizer')
    own = make_quantizer().add_melody(melody_quantizer())
    again = make_transformer('semantic', len(TONES), conditioned=True, dim=32, cond_dim=16)
    load_stage(tmp_path / 'plain' / 'last', again, own, may_add_melody=True)
    # before it has learned them, they change nothing
    ids, codes = torch.tensor([[0, 1, 2, 3]]), quantizer.melody(Tunes()[0]['wave'][None])
    conditioning = plain(raw_texts=['clip 1'], namespace='semantic')
    melody = own.embed_melody(codes, 4, Fraction(10))
    assert torch.equal(own(raw_texts=['clip 1'], namespace='semantic'), conditioning)
    before = stage.eval().loss(ids, conditioning=conditioning)
    assert torch.equal(again.eval().loss(ids, conditioning=conditioning, melody=melody), before)
    # and it does learn them, from the folder of a MusicLM, too; alone if asked, so that nothing else changes
    taken = make_quantizer().add_melody(melody_quantizer())
    take_conditioning(tmp_path / 'quantizer', 'semantic', taken)
    assert torch.equal(taken(raw_texts=['clip 1'], namespace='semantic'), conditioning)
    SemanticTrainer(
        again, folder / 'tokens', quantizer=taken, results_folder=tmp_path / 'run', melody_only=True, **sure, **how
    ).train(num_train_steps=1)
    assert not taken.melody_embedding.is_new
    assert torch.equal(again.eval().loss(ids, conditioning=conditioning), before)
    # afterwards the whole can be trained again
    assert all(it.requires_grad for it in (*again.parameters(), taken.cond_embeddings['semantic']))
    with pytest.raises(ValueError, match='melody_only needs a quantizer with a melody'):
        SemanticTrainer(stage, folder / 'tokens', quantizer=plain, melody_only=True, results_folder=tmp_path, **how)
    add_adapters(stage, rank=2)
    with pytest.raises(ValueError, match='melodies are new to this stage, and adapters alone would be trained'):
        SemanticTrainer(stage, folder / 'tokens', quantizer=own, results_folder=tmp_path / 'lora', **how)
    with pytest.raises(ValueError, match='this stage has adapters; use one of them'):
        SemanticTrainer(stage, folder / 'tokens', quantizer=own, melody_only=True, results_folder=tmp_path, **how)


def test_the_shipped_model_follows_a_melody():
    """Two tunes a semitone apart, so that no pitch class of the one is in the other at the same time."""
    musiclm, chroma = MusicLM.from_pretrained('tiny'), MelodyEncoder(bins=12).chroma
    tunes = [tones([it + by for it in (60, 64, 67, 64)], each=0.75) for by in (0, 1)]
    prompts = 3 * ['a flute melody without drums']
    for given in tunes:
        made = musiclm(prompts, seconds=3.0, seed=0, melody=(given, RATE))
        made = chroma(resample(made, musiclm.sample_rate, RATE))
        # the share of frames in which the loudest pitch class is that of a tune
        shares = [(made.argmax(dim=1) == chroma(it[None]).argmax(dim=1)).float().mean().item() for it in tunes]
        own = shares.pop(0 if given is tunes[0] else 1)
        assert own > 0.3
        assert own > 3 * shares[0]


@pytest.mark.slow
def test_from_the_command_line_to_a_quantizer(music, tmp_path, capsys):
    melody = ['train', 'melody', '--steps', '2', '--batch-size', '4', '--seconds', '1', '--hop', '0.5']
    sizes = ['--quantizers', '1', '--codebook-size', '2']
    assert main([*melody, *sizes, '--output', str(tmp_path / 'melody')]) == 0
    assert 'R@1 0.' in capsys.readouterr().out
    source = ['--mulan', str(HOME / 'tiny' / 'quantizer' / 'mulan'), '--data', str(music)]
    added = ['--melody', str(tmp_path / 'melody'), '--output', str(tmp_path / 'quantizer')]
    assert main(['train', 'quantizer', *source, *sizes, *added]) == 0
    quantizer = MuLaNEmbedQuantizer.from_pretrained(tmp_path / 'quantizer')
    assert quantizer.melody(torch.zeros(1, RATE)).shape == (1, 2, 1)
    assert quantizer(raw_texts=['a flute'], namespace='semantic').shape[1] == 1
