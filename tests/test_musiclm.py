"""Text to music: lengths, seeds, choice by MuLaN, continuation, stories, and what goes wrong."""

import math

import numpy as np
import pytest
import soundfile
import torch
from helpers.models import tiny_audio
from helpers.music import RATE, TOKEN_RATE, build_audio_lm, build_quantizer, stop_at_once

from musiclm_pytorch import MusicLM, NeuralCodec, Sampling, StopGeneration, generate_coarse, generate_semantic
from musiclm_pytorch.audiolm.semantic_mulan import MuLaNSemanticTokenizer
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.mulan.layers import l2norm


@pytest.fixture(scope='module')
def musiclm():
    torch.manual_seed(0)
    return MusicLM(build_audio_lm(), build_quantizer())


def test_the_best_is_what_mulan_finds_nearest(musiclm):
    prompts = ['a slow flute', 'fast drums', 'an organ']
    waves, scores = musiclm(prompts, num_samples=4, seconds=0.5, seed=1, return_all=True, return_scores=True)
    assert waves.shape == (3, 4, 800)
    assert waves.dtype == torch.float32
    assert scores.shape == (3, 4)
    mulan = musiclm.mulan_embed_quantizer.mulan
    for i, prompt in enumerate(prompts):
        text = mulan.get_text_latents(raw_texts=[prompt])[0]
        expected = mulan.get_audio_latents(waves[i], sample_rate=RATE) @ text
        torch.testing.assert_close(scores[i], expected, atol=1e-5, rtol=0)
    best = musiclm(prompts, num_samples=4, seconds=0.5, seed=1)
    assert torch.equal(best, waves[torch.arange(3), scores.argmax(dim=1)])
    assert len({wave.sum().item() for wave in waves[0]}) == 4


def test_music_longer_than_mulans_tower_takes_is_heard_whole(musiclm, monkeypatch, recwarn):
    mulan, wave = musiclm.mulan_embed_quantizer.mulan, 0.1 * torch.randn(1, 3 * RATE)
    monkeypatch.setattr(mulan.audio, 'max_audio_length', mulan.sample_rate // 2)
    expected = mulan.embed_audio(wave, window=0.5, hop=0.5, sample_rate=RATE)
    torch.testing.assert_close(musiclm.hear(wave, RATE), expected)
    assert not recwarn.list


def test_what_is_done_when_it_is_stopped_is_given_back(musiclm):
    keywords = dict(num_samples=2, seconds=0.4, seed=5, max_batch=1, return_all=True, return_scores=True)
    whole = musiclm(['a', 'b', 'c'], **keywords)

    def made_until(done):
        stages = 0

        def report(step, total):
            nonlocal stages
            stages += step == total
            if stages == 4 * done + 1:  # three stages and a wave for each piece by itself
                raise StopGeneration

        return musiclm(['a', 'b', 'c'], progress=report, **keywords)

    # pieces; what is given back of the prompts
    for done, kept in ((1, (1, 1)), (2, (1, 2)), (5, (2, 2)), (6, (3, 2))):
        made = made_until(done)
        assert made.waves.shape[:2] == made.scores.shape == made.seeds.shape == kept
        for given, wanted in zip((*made, made.seeds), (*whole, whole.seeds)):
            assert torch.equal(given, wanted[: kept[0], : kept[1]])
    with pytest.raises(StopGeneration):
        musiclm('a', seconds=0.4, progress=stop_at_once)


def test_logits_are_processed_stage_by_stage(musiclm):
    seen = {}

    def only(stage, code):
        def process(tokens, logits):
            seen.setdefault(stage, []).append(tokens.shape[1])
            assert tokens.dtype == torch.long
            assert (tokens == code).all()
            return torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([code]), 0.0)

        return process

    keywords = dict(seconds=0.4, seed=5)
    plain = musiclm('a', **keywords)
    made = musiclm('a', logits_processor=(only('semantic', 2), None, only('fine', 3)), **keywords)
    assert seen == dict(semantic=[0, 1, 2, 3], fine=list(range(20)))
    assert not torch.equal(made, plain)
    assert torch.equal(musiclm('a', logits_processor=lambda tokens, logits: logits, **keywords), plain)
    with pytest.raises(TypeError, match=r'must give logits as it gets them, \(1, 7\) of floats, got None'):
        musiclm('a', logits_processor=lambda tokens, logits: None, **keywords)
    for value in (-torch.inf, torch.nan):
        with pytest.raises(ValueError, match='of a CoarseTransformer leaves no token at step 0'):
            musiclm('a', logits_processor=(None, lambda _, it, value=value: it * 0 + value, None), **keywords)


def test_a_seed_makes_a_piece_again_alone_and_in_batches(musiclm):
    shared = dict(seconds=0.4, return_all=True)
    whole = musiclm(['a', 'b'], 2, seed=2**63 - 2, return_scores=True, **shared)
    assert whole.seeds.tolist() == [[2**63 - 2, 2**63 - 1], [0, 1]]
    waves, scores = whole
    for row, prompt in enumerate(['a', 'b']):
        for column, seed in enumerate(whole.seeds[row].tolist()):
            alone = musiclm(prompt, seconds=0.4, seed=seed, return_scores=True)
            torch.testing.assert_close(alone.waves[0], waves[row, column], atol=1e-5, rtol=0)
            torch.testing.assert_close(alone.scores[0, 0], scores[row, column], atol=1e-5, rtol=0)
    torch.testing.assert_close(musiclm(['a', 'b'], 2, seed=2**63 - 2, max_batch=3, **shared), waves, atol=1e-5, rtol=0)
    torch.testing.assert_close(musiclm(['a', 'b'], seed=[2**63 - 1, 1], **shared), waves[:, 1:], atol=1e-5, rtol=0)
    for seeds in (whole.seeds, whole.seeds.numpy(), whole.seeds.view(-1).tolist()):
        torch.testing.assert_close(musiclm(['a', 'b'], 2, seed=seeds, **shared), waves, atol=1e-5, rtol=0)
    for seed in (whole.seeds[1, 1], whole.seeds.numpy()[1, 1], [np.int64(1)]):
        torch.testing.assert_close(musiclm('b', seed=seed, **shared)[0], waves[1, 1:], atol=1e-5, rtol=0)
    with pytest.raises(TypeError, match='integer'):
        musiclm('b', seed=torch.tensor(0.5))
    with pytest.raises(ValueError, match='got 2 seeds for 4 pieces; pass one, or one a piece'):
        musiclm(['a', 'b'], 2, seed=[1, 2])


def test_without_a_seed_the_global_generator_decides(musiclm):
    def draw():
        music = musiclm('a', 2, seconds=0.3, return_all=True, return_scores=True)
        return music.waves, music.seeds, torch.rand(2)

    torch.manual_seed(3)
    first, other = draw(), draw()
    torch.manual_seed(3)
    assert all(map(torch.equal, draw(), first))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(3)
    torch.randint(2**32, ())  # all that a call takes
    assert torch.equal(torch.rand(2), first[2])
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    musiclm('a', seconds=0.2, seed=1)  # and with a seed, nothing
    assert torch.equal(torch.rand(2), expected)


def test_each_stage_gets_its_own_namespace(musiclm):
    codes = musiclm.mulan_embed_quantizer.indices(raw_texts=['a'])
    asked = {}
    handles = []
    for name, stage in musiclm.stages.items():
        hook = stage.proj_text_embed.register_forward_hook
        handles.append(hook(lambda module, inputs, output, name=name: asked.setdefault(name, inputs[0])))
    musiclm('a', seconds=0.2, seed=0)
    for handle in handles:
        handle.remove()
    for name in musiclm.stages:
        expected = musiclm.mulan_embed_quantizer.embed(codes, name)
        assert any(torch.equal(row, expected[0]) for row in asked[name]), name


@pytest.mark.parametrize('unique_consecutive', [False, True])
def test_longer_than_every_window(unique_consecutive):
    torch.manual_seed(0)
    audio_lm = build_audio_lm(unique_consecutive=unique_consecutive)
    music = MusicLM(audio_lm, build_quantizer(), windows=(1.0, 0.5, 0.2))('a', seconds=2.3, seed=1)
    assert music.shape == (1, round(2.3 * RATE))
    assert music[:, -200:].std() > 0


def test_goes_on_from_a_prime(musiclm, tmp_path):
    time = torch.arange(800) / 1600
    prime = 0.8 * torch.sin(2 * torch.pi * 200 * time)
    whole = musiclm('a', 2, seconds=1.0, prime_wave=prime, prime_wave_input_sample_hz=RATE, seed=1, return_all=True)
    assert whole.shape == (1, 2, RATE)
    # the samples come back as they are, up to the crossfade of 40 ms
    assert torch.equal(whole[0, :, :736], prime[:736].expand(2, -1))
    assert not torch.equal(whole[0, 0, 800:], whole[0, 1, 800:])
    # under a story, too, and in batches
    story = musiclm([(0.3, 'a'), (0.4, 'b'), (0.3, 'c')], prime_wave=prime, prime_wave_input_sample_hz=RATE, seed=1)
    assert story.shape == (1, RATE)
    assert torch.equal(story[0, :736], prime[:736])
    # stereo at another rate, from a file
    stereo = torch.stack((prime, 0.5 * prime), dim=1).repeat_interleave(2, 0)
    soundfile.write(tmp_path / 'prime.wav', stereo.numpy(), 3200, subtype='FLOAT')
    music = musiclm('a', seconds=1.0, prime_wave_path=tmp_path / 'prime.wav')
    assert music.shape == (1, RATE)
    torch.testing.assert_close(music[0, :736], resample(stereo.mean(dim=1), 3200, RATE)[:736])
    # shorter than a token and a code
    assert torch.equal(
        musiclm('a', seconds=1.0, prime_wave=prime[:70], prime_wave_input_sample_hz=RATE)[0, :6], prime[:6]
    )


def test_sounds_like_the_prime(musiclm, monkeypatch):
    quantizer, conditions = musiclm.mulan_embed_quantizer, []
    embed = quantizer.embed
    monkeypatch.setattr(quantizer, 'embed', lambda *given: conditions.append(given) or embed(*given))
    prime = 0.1 * torch.randn(2, 1800, generator=torch.Generator().manual_seed(0)).cumsum(dim=1)
    texts = ['slow flute', 'bright drums']
    with torch.no_grad():
        latents = quantizer.mulan.get_text_latents(raw_texts=texts)
        heard = quantizer.mulan.get_audio_latents(prime.mean(dim=0, keepdim=True), sample_rate=RATE)
    read, both = (quantizer.indices(latents=it) for it in (latents, l2norm(latents + heard)))
    assert not torch.equal(read, both)
    own = dict(prime_wave_input_sample_hz=RATE)
    # the sound of the prime is that of both prompts, but of a story's first part alone, and not of so short a one
    for text, given, sounds in (
        (texts, dict(prime_wave=prime, seconds=1.3, **own), both),
        ([(1.3, texts[0]), (0.2, texts[1])], dict(prime_wave=prime, **own), torch.stack((both[0], read[1]))),
        (texts, dict(prime_wave=prime[:, :800], seconds=0.7, **own), read),
        (texts, dict(seconds=0.2), read),
    ):
        conditions.clear()
        musiclm(text, **given)
        for name, wanted in dict(semantic=read, coarse=sounds, fine=sounds).items():
            found = torch.cat([indices for indices, namespace in conditions if namespace == name])
            assert torch.equal(found, wanted), (name, text)


def test_a_story_follows_its_prompts(musiclm):
    story, seen = [(0.5, 'slow flute'), (0.75, 'a fast flute')], []
    prefill = musiclm.semantic.prefill
    musiclm.semantic.prefill = lambda ids, **keywords: seen.append(ids) or prefill(ids, **keywords)
    music = musiclm(story, seed=2)
    del musiclm.semantic.prefill
    assert [given.shape[1] for given in seen] == [0, 2]  # of the part before, 0.2 s
    assert music.shape == (1, round(1.25 * RATE))
    again = musiclm([(0.5, 'slow flute'), (0.75, 'bright guitar, please')], seed=2)
    codes = musiclm.mulan_embed_quantizer.indices(raw_texts=['a fast flute', 'bright guitar, please'])
    assert not torch.equal(codes[0], codes[1])
    # the next part comes in by a crossfade, no earlier than in the middle of the one before
    assert torch.equal(music[:, :384], again[:, :384])
    assert not torch.allclose(music[:, 800:900], again[:, 800:900])


def test_a_stage_without_conditioning():
    torch.manual_seed(0)
    quantizer = build_quantizer(conditioning_dims=(16,), namespaces=('semantic',))
    assert MusicLM(build_audio_lm(conditioned=('semantic',)), quantizer)('a', seconds=0.3).shape == (1, 480)


def test_length_in_tokens_and_progress(musiclm):
    steps = []
    musiclm.train()
    music = musiclm('a', max_length=4, progress=lambda done, total: steps.append((done, total)))
    assert music.shape == (1, 4 * RATE // TOKEN_RATE)
    assert steps[-1][0] == steps[-1][1]
    assert musiclm.semantic.training  # its mode is left as it was
    musiclm.eval()


def test_saved_and_rebuilt(musiclm, tmp_path):
    torch.manual_seed(0)
    tower = tiny_audio(depth=1, audio_sample_rate=800, spec_n_fft=64, patch_size=(33, 4))
    tokenizer = MuLaNSemanticTokenizer(tower, codebook_size=6)
    tokenizer.fit(torch.randn(4, 1600))
    sampling = dict(temperature=(0.9, 0.8, 0.7), cond_scale=1.5)
    saved = MusicLM(build_audio_lm(tokenizer=tokenizer), build_quantizer(), windows=(2.0, 1.0, 0.5), sampling=sampling)
    saved.save_pretrained(tmp_path / 'music')
    assert not list(tmp_path.rglob('*.pt'))
    rebuilt = MusicLM.from_pretrained(tmp_path / 'music')
    assert rebuilt.windows == (2.0, 1.0, 0.5)
    keywords = dict(num_samples=2, seconds=0.7, seed=4, prime_wave=torch.randn(400), prime_wave_input_sample_hz=RATE)
    music = saved('slow flute', **keywords)
    assert torch.equal(rebuilt('slow flute', **keywords), music)
    assert torch.equal(rebuilt('slow flute', **sampling, **keywords), music)  # what suits the model is saved with it
    assert not torch.equal(rebuilt('slow flute', temperature=0.1, **keywords), music)
    with pytest.raises(ValueError, match="sampling may hold temperature, .* got 'heat'"):
        MusicLM(build_audio_lm(), build_quantizer(), sampling=dict(heat=1.0))

    with pytest.raises(FileNotFoundError, match=r'has no config.json; the model in it is .*music, so pass that'):
        MusicLM.from_pretrained(tmp_path)

    size = sum(path.stat().st_size for path in (tmp_path / 'music').rglob('*.safetensors'))
    saved.save_pretrained(tmp_path / 'half', dtype=torch.float16)
    assert sum(path.stat().st_size for path in (tmp_path / 'half').rglob('*.safetensors')) < 0.75 * size
    half = MusicLM.from_pretrained(tmp_path / 'half')
    for name, weight in half.state_dict().items():
        own = saved.state_dict()[name]
        assert weight.dtype == own.dtype
        torch.testing.assert_close(weight, own, atol=1e-6, rtol=1e-3)

    with torch.no_grad():
        next(half.stages['fine'].parameters()).fill_(1e6)
    with pytest.raises(ValueError, match='holds 1e.06, too large for torch.float16'):
        half.save_pretrained(tmp_path / 'huge', dtype=torch.float16)
    with pytest.raises(ValueError, match='the semantic tokenizer, a Tokenizer, cannot be saved'):
        musiclm.save_pretrained(tmp_path / 'other')
    with pytest.raises(FileNotFoundError, match="there is no folder tinny, nor a model of that name .* has .*'tiny'"):
        MusicLM.from_pretrained('tinny')


def test_without_a_fine_stage_the_coarse_codes_are_the_music(tmp_path):
    parts = {name: getattr(build_audio_lm(), name).transformer for name in ('semantic', 'coarse')}
    codec = NeuralCodec(RATE, codebook_size=8, num_quantizers=3, dim=16, bands=8, resolved_hz=400.0)
    codec.fit([torch.randn(4, 2 * RATE, generator=torch.Generator().manual_seed(0))])
    tokenizer = MuLaNSemanticTokenizer(tiny_audio(depth=1, audio_sample_rate=800, spec_n_fft=64), codebook_size=6)
    tokenizer.fit(torch.randn(4, 1600, generator=torch.Generator().manual_seed(0)))
    parts |= dict(mulan_embed_quantizer=build_quantizer(), tokenizer=tokenizer)
    musiclm = MusicLM(**parts, codec=codec.with_first_levels(2), windows=(2.0, 1.0, 0.4)).eval()
    assert list(musiclm.stages) == ['semantic', 'coarse']

    codes = musiclm.mulan_embed_quantizer.indices(raw_texts=['slow flute'])
    generator, semantic_rate = torch.Generator().manual_seed(4), musiclm.semantic_rate
    told = {name: musiclm.mulan_embed_quantizer.embed(codes, name) for name in ('semantic', 'coarse')}
    length = math.ceil(0.8 * semantic_rate)
    keywords = dict(sampling=Sampling(cond_scale=3.0), generator=[generator])
    semantic = generate_semantic(
        musiclm.semantic, max_length=length, min_length=length, text_embeds=told['semantic'], **keywords
    ).tokens
    coarse = generate_coarse(
        musiclm.coarse, semantic, max_length=20, min_length=20, text_embeds=told['coarse'], unique_consecutive=False,
        semantic_per_frame=semantic_rate / musiclm.frame_rate, **keywords,
    ).tokens  # fmt: skip
    music = musiclm('slow flute', seconds=0.8, seed=4, temperature=1.0)
    assert music.std() > 0.001
    torch.testing.assert_close(music, codec.with_first_levels(2).eval().decode(coarse), atol=1e-5, rtol=0)

    musiclm.save_pretrained(tmp_path / 'music')
    rebuilt = MusicLM.from_pretrained(tmp_path / 'music')
    sound = dict(prime_wave=music[0, :800], prime_wave_input_sample_hz=RATE)
    story = [(0.7, 'slow flute'), (0.7, 'bright drums')]
    assert torch.equal(rebuilt(story, seed=1, **sound), musiclm(story, seed=1, **sound))
    stream = rebuilt.stream('slow flute', seconds=2.4, seed=1, prime=(music[0], RATE))
    played = torch.cat([next(stream), next(stream)])
    stream.set_prompt('bright drums')
    played = torch.cat([played, *stream])
    assert len(played) == round(2.4 * RATE)
    assert played[-RATE:].std() > 0.001
    assert rebuilt.infill((played[:RATE], RATE), 0.3, 0.6, 'slow flute', seed=0).shape[-1] == RATE
    with pytest.raises(ValueError, match='has a fine stage, which this MusicLM goes without'):
        _ = musiclm.audio_lm
    with pytest.raises(ValueError, match='the stages make 2 levels of codes, but the codec has 3; pass a fine stage'):
        MusicLM(**parts, codec=codec)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(text=''), ValueError, "a prompt must say something, got ''"),
        (dict(text=['a', '  ']), ValueError, 'a prompt must say something'),
        (dict(text=[]), ValueError, 'text is an empty list'),
        (dict(text='a', seconds=0.0), ValueError, r'seconds must be greater than 0, got 0.0'),
        (dict(text='a', seconds=-1.0), ValueError, 'seconds must be greater than 0'),
        (dict(text='a', seconds=1.0, max_length=4), ValueError, 'pass seconds or max_length, got both'),
        (dict(text='a', num_samples=0), ValueError, 'num_samples must be greater than 0, got 0'),
        (dict(text='a', temperature=(1.0, 0.5)), ValueError, 'temperature must be one number or three'),
        (dict(text='a', temperature=-1.0), ValueError, 'temperature must be 0 or above'),
        (dict(text=[(1.0, 'a')], seconds=2.0), ValueError, 'a story tells its length itself'),
        (dict(text=[(-1.0, 'a')]), ValueError, "the length of 'a' in seconds must be greater than 0"),
        (dict(text=3), TypeError, '3'),
        (dict(text='a', prime_wave=torch.randn(100)), ValueError, 'prime_wave needs its rate'),
        (dict(text='a', prime_wave=torch.randn(800), prime_wave_input_sample_hz=RATE, seconds=0.5), ValueError,
         'the prime lasts 0.50 s and the music 0.5 s'),
        (dict(text='a', prime_wave=torch.full((800,), torch.nan), prime_wave_input_sample_hz=RATE), ValueError,
         'prime_wave holds NaN or infinity'),
        (dict(text='a', prime_wave=np.ones(8, dtype='int16'), prime_wave_input_sample_hz=RATE), TypeError,
         'prime_wave must be a floating-point tensor, got torch.int16, integer PCM; .* prime_wave / 32768'),
        (dict(text='a', prime_wave=np.ones((800, 2)), prime_wave_input_sample_hz=RATE), ValueError,
         r'got \(800, 2\), which has more channels than samples; soundfile gives .* pass prime_wave.T'),
        (dict(text='a', prime_wave_path='nowhere.wav'), FileNotFoundError, 'no audio file at nowhere.wav'),
    ],
)  # fmt: skip
def test_bad_calls(musiclm, arguments, error, message):
    with pytest.raises(error, match=message):
        musiclm(**arguments)


@pytest.mark.parametrize(
    ('audio_lm', 'quantizer', 'message'),
    [
        (dict(conditioned=()), {}, 'no stage takes conditioning'),
        ({}, dict(namespaces=('semantic', 'coarse'), conditioning_dims=(16, 16)), "no namespace 'fine'"),
        ({}, dict(conditioning_dims=(16, 12, 16)), 'the coarse stage takes conditioning of width 16'),
        (dict(codes=9), {}, 'the stages have 8 codes a codebook, but the codec 9'),
    ],
)
def test_parts_that_do_not_fit(audio_lm, quantizer, message):
    with pytest.raises(ValueError, match=message):
        MusicLM(build_audio_lm(**audio_lm), build_quantizer(**quantizer))


def test_quantizers_that_do_not_fit():
    quantizer = build_quantizer()
    with pytest.raises(ValueError, match='build AudioLM without audio_conditioner'):
        MusicLM(build_audio_lm(audio_conditioner=quantizer), quantizer)
    unfitted = MusicLM(build_audio_lm(), build_quantizer(fitted=False))
    for call in unfitted, unfitted.stream:
        with pytest.raises(ValueError, match='the quantizer has no codebooks yet'):
            call('a')
