"""What plays on a page while it is made: a stream a visitor, which nothing outlives. Without the page."""

import threading
import time

import pytest
import torch
from helpers.music import RATE, build_audio_lm, build_quantizer

from musiclm_pytorch import Mix, MusicLM
from musiclm_pytorch.inference.live import LiveMusic
from musiclm_pytorch.inference.music_maker import MusicMaker

PROMPT = 'a slow flute'


@pytest.fixture(scope='module')
def musiclm():
    torch.manual_seed(0)
    return MusicLM(build_audio_lm(), build_quantizer(), windows=(2.0, 1.0, 0.4))


@pytest.fixture
def live(musiclm):
    return LiveMusic(MusicMaker(musiclm, max_stream_seconds=100.0))


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr('musiclm_pytorch.inference.live.AHEAD', 1000.0)


def test_the_pieces_are_those_of_the_stream(musiclm, live, hurried, tmp_path):
    prime = tmp_path / 'prime.wav'
    musiclm(PROMPT, seconds=1.2, seed=1).save(prime)
    how = dict(cond_scale=2.0, temperature=1.0, negative='drums')
    sampling = dict(cond_scale=2.0, temperature=(1.0, 0.95, 0.4), negative='drums')
    mix = Mix([(0.7, PROMPT), (0.3, prime)])
    for prompt, given, own in ((PROMPT, None, None), (PROMPT, str(prime), prime), (mix, None, None)):
        pieces = [wave for wave, _ in live.play('me', prompt, 4, given, seed=3, **how)]
        stream = musiclm.stream(prompt, seconds=4.0, prime=own, seed=3, **sampling)
        assert torch.equal(torch.cat(pieces), torch.cat(list(stream)))
    assert not live.playing


def test_a_prompt_is_changed_by_whoever_hears_it(musiclm, live, hurried):
    """And by no other, who plays beside it."""
    streams = {name: live.play(name, PROMPT, 4, seed=3) for name in ('one', 'other')}
    first = {name: next(it) for name, it in streams.items()}
    live.set_prompt('one', 'drums')
    rest = {name: list(it) for name, it in streams.items()}
    assert {prompt for _, prompt in rest['one']} == {'drums'}
    assert {prompt for _, prompt in rest['other']} == {PROMPT}
    whole = {name: torch.cat([first[name][0], *(it for it, _ in rest[name])]) for name in streams}
    assert torch.equal(whole['other'], torch.cat(list(musiclm.stream(PROMPT, seconds=4.0, seed=3))))
    assert not torch.equal(whole['one'], whole['other'])


def test_it_is_not_made_faster_than_it_is_heard_and_stops_at_once(live, monkeypatch):
    monkeypatch.setattr('musiclm_pytorch.inference.live.AHEAD', 1.0)
    before, made = threading.active_count(), []

    def listen():
        made.extend(wave for wave, _ in live.play('me', PROMPT, 100, seed=3))

    thread = threading.Thread(target=listen)
    begin = time.monotonic()
    thread.start()
    while not made:
        time.sleep(0.01)
    time.sleep(0.5)
    seconds = sum(map(len, made)) / RATE
    assert seconds <= time.monotonic() - begin + 1.0 + 0.4  # and a step
    live.stop('me')
    thread.join()
    assert sum(map(len, made)) < 100 * RATE
    assert threading.active_count() == before
    assert not live.playing
    live.stop('me')  # nothing is left to stop


def test_a_stream_that_no_one_takes_any_more_ends(live, hurried):
    playing = live.play('me', PROMPT, 100, seed=3)
    next(playing)
    with pytest.raises(ValueError, match='music is playing here already; stop it first'):
        next(live.play('me', PROMPT, 100, seed=3))
    assert list(live.playing) == ['me']
    del playing
    assert not live.playing
    with pytest.raises(ValueError, match='seed'):
        next(live.play('me', PROMPT, 100, seed=None))
    assert not live.playing  # not held by what could not begin


def test_all_end_with_the_page(live, monkeypatch):
    monkeypatch.setattr('musiclm_pytorch.inference.live.LAST_STEP', None)  # however busy the machine is
    threads = [threading.Thread(target=lambda name=name: list(live.play(name, PROMPT, 100, seed=3))) for name in 'ab']
    for thread in threads:
        thread.start()
    while len(live.playing) < 2:
        time.sleep(0.01)
    live.close()
    assert not live.playing
    for thread in threads:
        thread.join()
    with pytest.raises(ValueError, match='the page is being closed'):
        next(live.play('c', PROMPT, 100, seed=3))


def test_the_end_waits_until_what_was_played_is_shown(live):
    closing = threading.Thread(target=live.close)
    with live.answering():
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
    closing.join()


@pytest.mark.parametrize(
    ('given', 'error', 'message'),
    [
        (dict(prompt=' '), ValueError, 'the prompt is empty'),
        (dict(seconds=101), ValueError, 'the stream may last up to 100 seconds, got 101'),
        (dict(temperature=-1.0), ValueError, 'temperature must be 0 or above'),
        (dict(prime='none.wav'), FileNotFoundError, 'no audio file at none.wav'),
    ],
)
def test_what_cannot_be_played_is_told(live, given, error, message):
    with pytest.raises(error, match=message):
        next(live.play('me', **{**dict(prompt=PROMPT, seconds=2, seed=0), **given}))


def test_a_model_without_melodies_is_told(live, tmp_path):
    with pytest.raises(ValueError, match='this model has no melody encoder'):
        live.maker.from_prompt(PROMPT, 1.0, melody=tmp_path / 'hum.wav', num_samples=1, seed=3)
    with pytest.raises(ValueError, match='this model has no melody encoder'):
        next(live.play('me', PROMPT, 1.0, melody=tmp_path / 'hum.wav', seed=3))


def test_a_prompt_changes_only_where_something_plays(live):
    with pytest.raises(ValueError, match='nothing plays here whose prompt could change; play something first'):
        live.set_prompt('me', 'drums')
    with pytest.raises(ValueError, match='the prompt is empty'):
        live.set_prompt('me', ' ')
