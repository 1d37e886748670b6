"""Music while it is made: the same as whole, repeatable, steered, bounded, ended."""

import copy
import threading
from pathlib import Path

import pytest
import soundfile
import torch
from einops import rearrange
from helpers.music import RATE, build_audio_lm, build_quantizer
from torch import nn

from musiclm_pytorch import MusicLM, PromptWarning
from musiclm_pytorch.audiolm.generate import generate_coarse
from musiclm_pytorch.audiolm.generation_args import Sampling
from musiclm_pytorch.audiolm.pieces import join
from musiclm_pytorch.audiolm.streaming import StageStream, decode_stream
from musiclm_pytorch.waves import Waves

WINDOWS = (2.0, 1.0, 0.4)  # seconds; a step of the stream is the last of them
STEP = round(0.4 * RATE)


@pytest.fixture(scope='module')
def musiclm():
    torch.manual_seed(0)
    return MusicLM(build_audio_lm(), build_quantizer(), windows=WINDOWS)


@pytest.fixture(scope='module')
def tiny():
    return MusicLM.from_pretrained('tiny')


def taken(stream, samples):
    """The first samples of a stream, as they come."""
    waves = []
    while sum(map(len, waves)) < samples:
        waves.append(next(stream))
    return torch.cat(waves)[:samples]


def test_a_stream_of_a_step_is_the_call_of_that_length(musiclm, tiny):
    hum = torch.sin(torch.arange(8000) * 0.2), 16000
    for model, seconds, more in ((musiclm, 0.4, {}), (tiny, 0.96, {}), (tiny, 0.96, dict(melody=hum))):
        whole = model('a slow flute', seconds=seconds, seed=3, **more)[0]
        stream = model.stream('a slow flute', seconds=seconds, seed=3, **more)
        waves = list(stream)
        assert {wave.sample_rate for wave in waves} == {stream.sample_rate} == {model.sample_rate}
        torch.testing.assert_close(torch.cat(waves), whole, atol=1e-5, rtol=0)


def test_a_seed_makes_a_stream_again_and_seconds_cut_it(musiclm):
    endless = taken(musiclm.stream('a slow flute', seed=5), 3000)
    cut = list(musiclm.stream('a slow flute', seed=5, seconds=1.9))
    assert sum(map(len, cut)) == round(1.9 * RATE)
    # the last of what is cut off is decoded without what follows
    assert torch.equal(torch.cat(cut)[:2500], endless[:2500])
    assert not torch.equal(taken(musiclm.stream('a slow flute', seed=6), 2500), endless[:2500])
    torch.manual_seed(4)
    drawn = musiclm.stream('a slow flute')
    assert torch.equal(taken(drawn, 1000), taken(musiclm.stream('a slow flute', seed=drawn.seed), 1000))


def test_a_stream_goes_on_from_a_given_sound(musiclm, tmp_path):
    """Which comes back sample by sample, whatever its length, and is counted."""
    given = Waves.of(0.3 * torch.sin(torch.arange(2720) ** 1.1 * 0.2), RATE)
    how = dict(prime=given, seed=3)
    cut = torch.cat(list(musiclm.stream('a slow flute', **how, seconds=6.0)))
    assert len(cut) == 6 * RATE
    kept = len(given) - round(0.04 * RATE)
    assert torch.equal(cut[:kept], given[:kept])
    endless = taken(musiclm.stream('a slow flute', **how), 8000)
    assert torch.equal(cut[:8000], endless)
    loudness = [it.square().mean().sqrt() for it in (given[-1600:], endless[len(given) :][:1600])]
    assert 0.5 < loudness[1] / loudness[0] < 2
    soundfile.write(tmp_path / 'prime.wav', given.numpy(), RATE, subtype='FLOAT')
    from_file = musiclm.stream('a slow flute', seed=3, prime=tmp_path / 'prime.wav')
    assert torch.equal(taken(from_file, 8000), endless)

    plain = musiclm.stream('a slow flute', **how)
    stream = musiclm.stream('a slow flute', **how)
    assert torch.equal(next(stream), next(plain))
    stream.set_prompt('fast drums')
    assert not torch.equal(next(stream), next(plain))

    for seconds in (0.01, 0.05, 5.0):  # less than a frame, less than a token, more than a stage sees
        given = torch.rand(2, round(seconds * RATE)) - 0.5
        made = torch.cat(list(musiclm.stream('a slow flute', seed=1, prime=(given, RATE), seconds=seconds + 0.5)))
        assert len(made) == round((seconds + 0.5) * RATE)
        kept = max(0, given.shape[1] - round(0.04 * RATE))
        assert torch.equal(made[:kept], given.mean(dim=0)[:kept])


def test_after_a_prime_the_waves_are_those_of_all_codes_at_once(tiny, monkeypatch):
    given, decoded = 0.2 * torch.rand(22400), []
    whole, streamed = tiny.codec.decode, tiny.codec.decode_stream

    def kept(chunks):
        decoded.append([*chunks])
        return streamed(decoded[-1])

    monkeypatch.setattr(tiny.codec, 'decode_stream', kept)
    made = torch.cat(list(tiny.stream('a slow flute', prime=(given, 16000), seconds=2.2, seed=3)))
    codes = torch.cat(decoded[0], dim=1)
    before = (round(2.2 * 25) - codes.shape[1]) * 640
    own = torch.cat((given[:before], whole(codes)[0]))
    assert torch.equal(made, join(given, own, 16000, settle=3.0)[: len(made)])


def stage_stream(musiclm, windows, **sampling):
    """Step by step, and under which conditions."""
    audio = copy.copy(musiclm)
    audio.windows = windows
    how = dict(samplings=[Sampling(**sampling)] * 3, seconds=None, generator=torch.Generator().manual_seed(0))
    stages = StageStream(audio, **how)
    read = musiclm.mulan_embed_quantizer
    return stages, {name: (read(raw_texts=['a slow flute'], namespace=name), None) for name in musiclm.stages}


@pytest.mark.parametrize(('window', 'step'), [(20, 20), (6, 15)])  # begin with a semantic token, or between two
def test_coarse_codes_go_with_the_tokens_of_their_time(musiclm, window, step):
    """Step by step they are those of all tokens at once, where windows begin at the same frames."""
    stages, conditions = stage_stream(musiclm, (2.0, window / 50, step / 50), temperature=0.0)
    codes, tokens = [], []
    for _ in range(12):
        before = stages.first_semantic + stages.semantic.shape[1]
        stages._forget = lambda: None
        codes.append(stages.step(step, conditions))
        tokens.append(stages.semantic[:, before - stages.first_semantic :])
        del stages._forget
        stages._forget()
    whole = generate_coarse(
        musiclm.coarse,
        torch.cat(tokens, dim=1),
        max_length=12 * step,
        min_length=12 * step,
        text_embeds=conditions['coarse'][0],
        sampling=Sampling(temperature=0.0),
        window=window,
        overlap=window // 2,
        semantic_per_frame=musiclm.semantic_rate / musiclm.frame_rate,
    ).tokens
    assert torch.equal(torch.cat(codes, dim=1)[..., :2], whole)


def test_memory_is_bounded(musiclm):
    stages, conditions = stage_stream(musiclm, WINDOWS)
    sizes = []
    for _ in range(16):
        stages.step(20, conditions)
        sizes.append(sum(it.untyped_storage().nbytes() for it in (stages.semantic, stages.coarse, stages.fine)))
    assert max(sizes[8:]) <= max(sizes[:8])


class LookingCodec(nn.Module):
    """A plain `Codec`: each frame's samples tell the codes around it, as far as it looks."""

    sample_rate, frame_rate, num_quantizers, codebook_size = 800, 50, 2, 100

    def __init__(self, back, ahead):
        super().__init__()
        self.back, self.ahead = back, ahead

    def encode(self, waves):
        raise NotImplementedError

    def decode(self, codes):
        level = codes.float().sum(dim=-1)
        padded = nn.functional.pad(level, (self.back, self.ahead))
        mean = padded.unfold(1, self.back + 1 + self.ahead, 1).mean(dim=-1)
        return rearrange(mean[..., None].expand(-1, -1, 16), 'b t n -> b (t n)').clone()


@pytest.mark.parametrize('sizes', [(1,) * 80, (3, 70, 20, 0, 67), (5,), ()])
def test_plain_codecs_stream_what_they_make_of_all_codes(musiclm, sizes):
    """Those that look no further than is decoded around each piece; others go over smoothly."""
    codes = torch.randint(0, 8, (2, sum(sizes), 3))
    for codec, known in ((musiclm.codec, 400), (LookingCodec(20, 11), 0)):  # a SoundStream reflects its beginning
        made = torch.cat([torch.zeros(2, 0), *decode_stream(codec, codes.split(sizes, dim=1) if sizes else [])], dim=1)
        assert made.shape == (2, sum(sizes) * codec.sample_rate // codec.frame_rate)
        if sizes:
            padded = torch.cat((codes, codes[:, -1:].expand(-1, 32, -1)), dim=1) if sum(sizes) < 32 else codes
            whole = codec.decode(padded)[:, : made.shape[1]]
            torch.testing.assert_close(made[:, known:], whole[:, known:], atol=1e-5, rtol=1e-5)
    if len(sizes) > 1:
        made = torch.cat(list(decode_stream(LookingCodec(80, 30), codes.split(sizes, dim=1))), dim=1)
        assert (made.diff(dim=1).abs() < 2).all()


def test_a_new_prompt_is_heard_within_two_steps(musiclm):
    plain = taken(musiclm.stream('a slow flute', seed=1), 4 * STEP)
    stream = musiclm.stream('a slow flute', seed=1)
    waves = [next(stream), next(stream)]
    told = sum(map(len, waves))
    setting = threading.Thread(target=stream.set_prompt, args=('fast drums',))
    setting.start()
    setting.join()
    waves = torch.cat([*waves, taken(stream, 4 * STEP - told)])
    differs = (waves != plain).nonzero()[0]
    assert told <= differs < told + 2 * STEP
    with pytest.raises(ValueError, match='a prompt must say something'):
        stream.set_prompt(' ')


def test_the_shipped_model_follows_a_new_prompt(tiny):
    prompts = ['a slow piano in a low register', 'a fast happy flute melody with drums']
    stream = tiny.stream(prompts[0], seed=2)
    before = taken(stream, 4 * 16000)
    stream.set_prompt(prompts[1])
    after = taken(stream, 6 * 16000)[2 * 16000 :]
    mulan = tiny.mulan_embed_quantizer.mulan
    heard = mulan.get_audio_latents(torch.stack((before, after)), sample_rate=16000)
    similarities = heard @ mulan.get_text_latents(raw_texts=prompts).T
    assert similarities[0].argmax() == 0
    assert similarities[1].argmax() == 1


def test_words_that_the_model_does_not_know_are_told(tiny):
    with pytest.warns(PromptWarning, match='does not know lofi') as told:
        stream = tiny.stream('a lofi flute', negative='an organ', seed=1)
    assert told[0].filename == __file__
    with pytest.warns(PromptWarning, match='does not know dubstep') as told:
        stream.set_prompt('dubstep')
    assert told[0].filename == __file__


def test_it_ends_when_it_is_closed(musiclm):
    with musiclm.stream('a slow flute', seed=1) as stream:
        next(stream)
    assert list(stream) == []
    stream.close()
    assert [len(wave) for wave in musiclm.stream('a slow flute', seconds=0.01)] == [16]


def test_streams_side_by_side_leave_mode_and_threads_as_they_were(musiclm):
    begun, born, other = threading.Event(), [], torch.get_num_threads() + 1
    before = torch.get_num_threads()

    def second():
        begun.wait()
        taken(musiclm.stream('an organ', seed=2), 2 * STEP)
        born.append(torch.get_num_threads())

    thread = threading.Thread(target=second)
    torch.set_num_threads(other)
    musiclm.train()
    modes = [it.training for it in musiclm.modules()]
    try:
        thread.start()
        stream = musiclm.stream('a slow flute', seed=1)
        begun.set()
        taken(stream, 3 * STEP)
        thread.join()
        assert [it.training for it in musiclm.modules()] == modes
        later = threading.Thread(target=lambda: born.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert [torch.get_num_threads(), *born] == [other] * 3
    finally:
        musiclm.eval()
        torch.set_num_threads(before)


def test_what_goes_wrong(musiclm):
    for prompt in (3, ['a', 'b'], [(1.0, 'a')]):
        with pytest.raises(TypeError, match='prompt'):
            musiclm.stream('a slow flute').set_prompt(prompt)
    with pytest.raises(ValueError, match='seconds must be greater than 0, got 0'):
        musiclm.stream('a slow flute', seconds=0.0)
    with pytest.raises(ValueError, match='a prompt must say something'):
        musiclm.stream('')
    for prime, error, says in (
        (torch.zeros(RATE), TypeError, 'prime must tell its rate'),
        ((torch.zeros(RATE), RATE), ValueError, 'the prime lasts 1.00 s and the music 1 s, the prime included'),
        ((torch.full((9,), torch.nan), RATE), ValueError, 'prime holds NaN'),
        (Path('none.wav'), FileNotFoundError, 'no audio file at none.wav'),
    ):
        with pytest.raises(error, match=says):
            musiclm.stream('a slow flute', seconds=1.0, prime=prime)
    without = MusicLM(build_audio_lm(unique_consecutive=True), build_quantizer())
    with pytest.raises(ValueError, match='train them with unique_consecutive=False'):
        without.stream('a slow flute')
