"""The HTTP service: a real server on the loopback, a real client, and every way to ask for too much or for nonsense."""

import asyncio
import base64
import contextlib
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import av
import httpx
import numpy as np
import pytest
import soundfile
import torch
from helpers.models import tiny_mulan
from helpers.music import build_audio_lm, build_quantizer
from helpers.serving import WAITS, served

from musiclm_pytorch import Mix, MusicLM
from musiclm_pytorch.cli import main
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.inference import InferenceConfig, OptimizedMuLaN, ServiceConfig, create_service
from musiclm_pytorch.inference.service.app import MEDIA_TYPES
from musiclm_pytorch.inference.service.worker import Abandoned, ModelWorker
from musiclm_pytorch.waves import OpusStream

ROOT = Path(__file__).resolve().parents[1]
RATE = 800  # of the small MuLaN; the music has twice as much
TEXTS = ['a slow flute', 'fast drums', '', 'one deep and cathedral organ, très grave']


def until(condition):
    end = time.monotonic() + WAITS
    while not condition():
        assert time.monotonic() < end, 'it does not come'
        time.sleep(0.01)


@contextlib.contextmanager
def busy(service):
    """The model is at work for as long as the block lasts."""
    begun, free = threading.Event(), threading.Event()
    service.worker.submit(lambda job: (begun.set(), free.wait(WAITS)))
    assert begun.wait(WAITS)
    try:
        yield
    finally:
        free.set()


@pytest.fixture(scope='module')
def musiclm():
    torch.manual_seed(0)
    return MusicLM(build_audio_lm(), build_quantizer()).eval()


@pytest.fixture(scope='module')
def tiny():
    """The model that ships, which follows melodies."""
    return MusicLM.from_pretrained('tiny')


@pytest.fixture
def streaming(musiclm, monkeypatch):
    """The same model with short windows."""
    monkeypatch.setattr(musiclm, 'windows', (2.0, 1.0, 0.4))
    return musiclm


@pytest.fixture(scope='module')
def service(musiclm):
    with served(
        musiclm, max_body_bytes=2**20, max_texts=30, max_text_chars=200, max_files=4, max_audio_seconds=40.0
    ) as it:
        yield it


@pytest.fixture(scope='module')
def mulan(musiclm):
    return musiclm.mulan_embed_quantizer.mulan


def file_of(wave, rate=RATE, kind='WAV', **keywords):
    """The bytes of a sound file."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, **keywords)
    return file.getvalue()


def sound(seconds=2.0, rate=RATE, kind='WAV', channels=1, seed=0):
    return file_of(np.random.default_rng(seed).uniform(-0.3, 0.3, (round(seconds * rate), channels)), rate, kind)


def coded(content):
    return base64.b64encode(content).decode()


def wave_of(content, rate=None):
    wave, found = soundfile.read(io.BytesIO(content), dtype='float32')
    assert rate in (None, found)
    return torch.from_numpy(wave)


def form(*contents):
    return [('audio', (f'{index}.x', content)) for index, content in enumerate(contents)]


def check_error(response, status, code, says=''):
    assert response.status_code == status, response.text
    assert response.headers['content-type'] == 'application/json'
    assert response.json().keys() == {'error'}
    assert response.json()['error'].keys() == {'code', 'message'}
    assert response.json()['error']['code'] == code
    assert re.search(says, response.json()['error']['message']), response.text


def own_texts(mulan, texts):
    with torch.no_grad():
        return torch.cat([mulan.get_text_latents(raw_texts=[text]) for text in texts])


def close(found, wanted):
    torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-5, rtol=0)


# ---- answers ----


def test_health(service):
    answer = service.client.get('/health').json()
    assert answer['status'] == 'ok'
    assert answer['model'] == 'MusicLM'
    assert answer['sample_rate'] == 2 * RATE
    assert answer['dim_latent'] == 16
    assert answer['requests'] == 0
    assert answer['limits'] == ServiceConfig(**answer['limits']).to_dict()
    paths = service.client.get('/openapi.json').json()['paths']
    assert paths.keys() == {'/', '/health', '/embed', '/rank', '/generate', '/stream', '/stream/{name}'}
    assert 'MusicLM' in service.client.get('/').json()['service']
    assert 'POST /generate' in service.client.get('/').json()['calls']
    assert set(paths['/embed']['post']['requestBody']['content']) == {'application/json', 'multipart/form-data'}


def test_programs_can_be_made_of_the_description(service):
    told = service.client.get('/openapi.json').json()
    references = re.findall(r'"\$ref": "#/([^"]*)"', json.dumps(told))
    assert references
    for reference in references:
        found = told
        for key in reference.split('/'):
            found = found[key]  # else the reference leads nowhere
        assert found['type'] == 'object'
    answers = {path: call['responses'] for path, calls in told['paths'].items() for call in calls.values()}
    assert answers['/generate']['200']['content'].keys() == {*MEDIA_TYPES.values(), 'application/json'}
    assert answers['/stream']['200']['content'].keys() == {'audio/wav', 'audio/ogg'}
    for path, answer in answers.items():
        assert answer.keys() == {'200', 'default'}, path
        assert answer['default']['content']['application/json']['schema'] == {'$ref': '#/components/schemas/Wrong'}


def test_files_get_the_models_own_latents(service, mulan, tmp_path):
    contents = [
        sound(0.5),
        sound(25.3, 1600, 'FLAC', channels=2),  # more than two windows
        sound(3.0, 15991, 'OGG', seed=1),  # a rate without a common divisor
        sound(2.0, 44100, 'MP3', channels=2, seed=2),
    ]
    wanted = []
    for index, content in enumerate(contents):
        (tmp_path / str(index)).write_bytes(content)
        wanted.append(mulan.embed_audio(tmp_path / str(index), window=10.0, hop=10.0))
    answer = service.client.post('/embed', files=form(*contents), data={'texts': TEXTS[:2]}).json()
    close(answer['audio_latents'], torch.stack(wanted))
    close(answer['text_latents'], own_texts(mulan, TEXTS[:2]))
    assert (torch.stack(wanted)[0] - torch.stack(wanted)[1]).abs().max() > 0.01
    answer = service.client.post('/embed', files=form(contents[2])).json()
    close(answer['audio_latents'], wanted[2][None])
    assert answer['text_latents'] == []


def test_rank_orders_both_ways(service, mulan):
    waves = [0.5 * torch.sin(torch.arange(1600) * step) for step in (0.05, 0.4, 1.3)]
    contents = [file_of(wave.numpy(), subtype='FLOAT') for wave in waves]
    answer = service.client.post('/rank', files=form(*contents), data={'texts': TEXTS}).json()
    with torch.no_grad():
        wanted = mulan(torch.stack(waves), raw_texts=TEXTS, return_pairwise_similarities=True)
    close(answer['similarities'], wanted)
    assert answer['files'] == ['0.x', '1.x', '2.x']
    assert answer['texts_by_file'] == wanted.argsort(dim=1, descending=True).tolist()
    assert answer['files_by_text'] == wanted.T.argsort(dim=1, descending=True).tolist()


def same_music(found, wanted):
    assert found.shape == wanted.shape
    assert wanted.std() > 0.001
    torch.testing.assert_close(found, wanted.clamp(-1, 1), atol=1e-4, rtol=0)  # 16 bits


def piece_of(piece):
    return wave_of(base64.b64decode(piece['wav']), 2 * RATE)


def test_generate_gives_the_music_of_the_seed(service, musiclm):
    body = dict(prompt='a slow flute', seconds=0.5, num_samples=3, seed=7, temperature=[1.0, 0.9, 0.5], cond_scale=2)
    answer = service.client.post('/generate', json=body)
    assert answer.headers['content-type'] == 'audio/wav'
    keywords = dict(num_samples=3, seconds=0.5, seed=7, temperature=(1.0, 0.9, 0.5), cond_scale=2.0)
    wave, scores = musiclm('a slow flute', return_scores=True, **keywords)
    same_music(wave_of(answer.content, 2 * RATE), wave[0])
    assert answer.headers['x-seed'] == '7'
    assert float(answer.headers['x-score']) == pytest.approx(scores.max().item(), abs=1e-5)


def test_generate_gives_all_pieces_best_first(service, musiclm):
    prompts = ['a slow flute', 'fast drums']
    body = dict(prompt=prompts, seconds=0.3, num_samples=2, seed=1, format='json', top_k=[None, 4, 3])
    answer = service.client.post('/generate', json=body).json()
    assert (answer['seed'], answer['sample_rate']) == (1, 2 * RATE)
    music = musiclm(prompts, 2, seconds=0.3, seed=1, top_k=(None, 4, 3), return_all=True, return_scores=True)
    pieces = answer['pieces']
    assert [piece['prompt'] for piece in pieces] == [prompts[0]] * 2 + [prompts[1]] * 2
    for row in range(2):
        order = music.scores[row].argsort(descending=True)
        for piece, place in zip(pieces[2 * row : 2 * row + 2], order):
            assert piece['score'] == pytest.approx(music.scores[row, place].item(), abs=1e-5)
            assert piece['seed'] == 1 + 2 * row + place
            same_music(piece_of(piece), music.waves[row, place])
    for piece in pieces:  # one by one
        alone = body | dict(prompt=piece['prompt'], num_samples=1, seed=piece['seed'])
        same_music(*map(piece_of, (piece, *service.client.post('/generate', json=alone).json()['pieces'])))


def test_music_like_a_sound_or_a_mixture_away_from_something(service, musiclm):
    latent = [1.0] * 16
    prompts = [
        dict(sound=coded(sound())),
        dict(mix=[(0.7, 'a slow flute'), (0.3, dict(latent=latent))]),
    ]
    body = dict(prompt=prompts, negative='fast drums', negative_scale=2.0, seconds=0.5, seed=1, format='json')
    answer = service.client.post('/generate', json=body).json()
    asked = [(wave_of(sound()), RATE), Mix([(0.7, 'a slow flute'), (0.3, torch.tensor(latent))])]
    own = musiclm(asked, seconds=0.5, seed=1, negative='fast drums', negative_scale=2.0)
    for piece, music in zip(answer['pieces'], own):
        same_music(piece_of(piece), music)
    flac = service.client.post('/generate', json=body | dict(prompt=prompts[0], format='flac'))
    assert flac.headers['content-type'] == 'audio/flac'
    assert soundfile.info(io.BytesIO(flac.content)).format == 'FLAC'
    for content, *wanted in (
        (sound(seconds=41.0), 422, 'invalid_request', 'more than the 40 s that are allowed'),
        (sound(seconds=0.01), 422, 'invalid_request', 'the sound of a prompt must last .* s at least, got 0.01 s'),
        (b'noise', 400, 'unreadable_audio', 'the sound of a prompt'),
    ):
        check_error(service.client.post('/generate', json=dict(prompt=dict(sound=coded(content)))), *wanted)


def test_a_story_is_one_piece_of_what_prompts_are(service, musiclm):
    latent = [1.0] * 16
    parts = [(0.3, 'a slow flute'), (0.4, dict(sound=coded(sound()))), (0.5, dict(mix=[(1, dict(latent=latent))]))]
    body = dict(prompt=dict(story=parts), num_samples=2, seed=1, format='json')
    pieces = service.client.post('/generate', json=body).json()['pieces']
    asked = [(0.3, 'a slow flute'), (0.4, (wave_of(sound()), RATE)), (0.5, torch.tensor(latent))]
    own = musiclm(asked, 2, seed=1, return_all=True, return_scores=True)
    assert [piece['score'] for piece in pieces] == pytest.approx(sorted(own.scores[0].tolist())[::-1], abs=1e-5)
    for piece in pieces:
        same_music(piece_of(piece), own.waves[0, piece['seed'] - 1])
        assert piece['prompt'].startswith('a slow flute – ')
    best = service.client.post('/generate', json=body | dict(format='wav'))
    assert float(best.headers['x-score']) == pytest.approx(own.scores.max().item(), abs=1e-5)
    for more, wanted in (
        (dict(seconds=3.0), 'a story tells its length itself; leave out seconds'),
        (dict(prompt=dict(story=[(-1, 'a flute'), (3, 'a flute')])), 'the length of .* must be .*-1'),
        (dict(prompt=dict(story=[(1e9, 'a flute')])), 'seconds must lie between'),
        (dict(prompt=dict(story=[])), 'a story may have 1 to 32 parts, got 0'),
        (dict(prompt=dict(story=[(0.1, 'a flute')] * 33)), 'a story may have 1 to 32 parts, got 33'),
        (dict(prompt=dict(story=[(3, 'a flute'), (4,)])), 'prompt.story.story.1.1: Field required'),
        (
            dict(prompt=dict(story=[(3, dict(sond=''))])),
            'prompt.story.story.0.1: Input should be a string, or an object',
        ),
        (dict(prompt=dict(sound='', x=1)), "unknown field 'x' in prompt.sound"),
    ):
        check_error(service.client.post('/generate', json=body | more), 422, 'invalid_request', wanted)


@pytest.mark.filterwarnings('error:Pydantic serializer warnings')
def test_music_goes_on_from_a_sound_and_follows_a_melody(tiny, service):
    begin, hum = coded(sound(0.5, 16000)), coded(file_of(0.5 * torch.sin(torch.arange(16000) * 0.2), 16000))
    prime, melody = (wave_of(base64.b64decode(it), 16000) for it in (begin, hum))
    body = dict(prompt='a slow flute', prime=begin, melody=hum, seconds=1.0, seed=3)
    with served(tiny, max_audio_seconds=2.0) as own_service:
        made = wave_of(own_service.client.post('/generate', json=body).content, 16000)
        keywords = dict(prime_wave=prime, prime_wave_input_sample_hz=16000, seconds=1.0, seed=3)
        same_music(made, tiny('a slow flute', melody=(melody, 16000), **keywords)[0])
        assert (made - tiny('a slow flute', **keywords)[0].clamp(-1, 1)).abs().max() > 0.01  # the melody is heard
        # a stream begins with the sound, and is like others
        mix = dict(mix=[[0.7, 'a slow flute'], [0.3, dict(sound=begin)]])
        streamed = dict(prompt=mix, negative=dict(sound=begin), seed=3, seconds=1.0)
        made = wave_of(
            own_service.client.post('/stream', json=streamed | dict(prime=begin, melody=begin)).content, 16000
        )
        like = prime, 16000
        own = dict(negative=like, prime=like, melody=like, seed=3, seconds=1.0)
        same_music(made, torch.cat(list(tiny.stream(Mix([(0.7, 'a slow flute'), (0.3, like)]), **own))))
        with own_service.client.stream('POST', '/stream', json=dict(prompt='a slow flute', seed=1)) as endless:
            told = own_service.client.post(f'/stream/{endless.headers["x-stream"]}', json=dict(prompt=mix))
            assert told.json()['warnings'] == {}
        for path in ('/generate', '/stream'):
            for changed, says in (
                (dict(seconds=0.5), 'the prime lasts 0.50 s and the music 0.5 s'),
                (dict(prime='?'), 'prime is no base64'),
                (dict(melody='?'), 'melody is no base64'),
                (dict(prime=coded(sound(1.5))), 'with melody, sounds last more than the 2 s that are allowed'),
                (dict(prompt=dict(mix=[[-1, 'a slow flute']])), 'must be greater than 0'),
            ):
                check_error(own_service.client.post(path, json=body | changed), 422, 'invalid_request', says)
            noise = body | dict(prime=coded(b'noise'))
            check_error(own_service.client.post(path, json=noise), 400, 'unreadable_audio', 'prime')
            tune = dict(prompt='a slow flute', melody=hum)  # for a model that follows none
            check_error(service.client.post(path, json=tune), 422, 'invalid_request', 'has no melody encoder')
        assert own_service.worker.streams == {}


def heard(music):
    """The samples of a WAV that grows, as far as it is there."""
    return np.frombuffer(music[44 : len(music) - len(music) % 2], '<i2') / (2**15 - 1)


def test_a_stream_is_the_models_own_until_its_client_goes(streaming):
    with served(streaming, max_streams=1) as service:
        query = dict(prompt='a slow flute', seed=3, temperature=0.9)
        answer = service.client.get('/stream', params=query | dict(seconds=1.25))
        assert answer.headers['content-type'] == 'audio/wav'
        own = torch.cat(list(streaming.stream('a slow flute', seed=3, temperature=0.9, seconds=1.25)))
        same_music(wave_of(answer.content, 2 * RATE), own)
        with service.client.stream('GET', '/stream', params=query) as endless:
            parts, music = endless.iter_bytes(), b''
            while len(music) < 44 + 2 * 3000:
                music += next(parts)
            assert soundfile.info(io.BytesIO(music)).samplerate == 2 * RATE
            np.testing.assert_allclose(heard(music)[:1500], own[:1500], atol=1e-4)
            check_error(service.client.get('/stream', params=query), 503, 'overloaded', '1 streams are playing already')
        until(lambda: not service.worker.streams)
        assert service.client.get('/stream', params=query | dict(seconds=0.1)).status_code == 200


def opus(content):
    """What a player makes of it, at the rate of the music, as far as it is there."""
    with av.open(io.BytesIO(content)) as file:
        parts = [frame.to_ndarray()[0] for frame in file.decode(audio=0)]
    return resample(torch.from_numpy(np.concatenate(parts)), 48000, 2 * RATE)


def test_a_stream_comes_as_opus_too_until_its_client_goes(streaming):
    own = torch.cat(list(streaming.stream('a slow flute', seed=3, seconds=2.5)))
    query = dict(prompt='a slow flute', seed=3, seconds=2.5)
    with served(streaming, max_streams=1) as service:
        for how, headers in ((dict(format='opus'), {}), ({}, dict(accept='audio/ogg, audio/*;q=0.5'))):
            answer = service.client.get('/stream', params=query | how, headers=headers)
            assert answer.headers['content-type'] == 'audio/ogg'
            made = opus(answer.content)
            assert len(made) == pytest.approx(len(own), abs=2)
            assert torch.corrcoef(torch.stack((made[: len(own)], own[: len(made)])))[0, 1] > 0.9
        for accept in ('*/*', 'audio/wav,audio/ogg', 'audio/ogg;q=0.1, audio/*', 'text/html;q=x'):
            answer = service.client.get('/stream', params=query | dict(seconds=0.1), headers=dict(accept=accept))
            assert answer.headers['content-type'] == 'audio/wav'
        endless = dict(prompt='a slow flute', seed=3, format='opus')
        with service.client.stream('GET', '/stream', params=endless) as answer:
            parts, music = answer.iter_bytes(), b''
            while len(music) < 8000:  # while it is made
                music += next(parts)
            assert len(opus(music)) > RATE
        until(lambda: not service.worker.streams)
    encoder, wave = OpusStream(RATE), 0.1 * torch.randn(RATE)
    sizes = [len(encoder.push(wave)) for _ in range(30)]
    assert max(sizes[2:]) < 2 * min(sizes[2:])  # bytes go out as they come


def test_a_stream_takes_another_prompt_and_ends_with_the_service(streaming):
    plain = streaming.stream('a slow flute', seed=1)
    with served(streaming) as service, service.client.stream(
        'GET', '/stream', params=dict(prompt='a slow flute', seed=1)
    ) as endless:  # fmt: skip
        name = endless.headers['x-stream']
        assert endless.headers['x-seed'] == '1'
        told = service.client.post(f'/stream/{name}', json=dict(prompt='fast drums'))
        assert told.json() == dict(stream=name, warnings={})
        told = service.client.post(f'/stream/{name}', json=dict(prompt=' '))
        check_error(told, 422, 'invalid_request', 'say something')
        told = service.client.post('/stream/x', json=dict(prompt='a'))
        check_error(told, 404, 'not_found', 'no stream x is playing')
        until(lambda: service.worker.streams[name] is not None)
        parts = endless.iter_bytes()
        music = next(parts)
        while len(music) < 44 + 2 * 5 * 2 * RATE:  # it is made 4 s ahead
            music += next(parts)
        own = np.concatenate([next(plain) for _ in range(12)])
        assert np.abs(heard(music)[: len(own)] - own).max() > 0.01
        service.worker.stop()
        assert isinstance(b''.join(parts), bytes)  # it ends


@pytest.mark.parametrize(
    ('query', 'says'),
    [
        (dict(), 'prompt: Field required'),
        (dict(prompt=''), 'a prompt must say something'),
        (dict(prompt='a' * 201), 'at most 200 are allowed'),
        (dict(prompt='a', negative='a' * 201), r'negative\[0\] has 201 characters'),
        (dict(prompt='a', seconds=0), 'seconds must be greater than 0'),
        (dict(prompt='a', seconds=1e308), 'infinity'),
        (dict(prompt='a', second=1), "unknown field 'second'; did you mean 'seconds'"),
        (dict(prompt='a', format='mp3'), "format: Input should be 'wav' or 'opus'"),
        (dict(prompt='a', prime='x'), "unknown field 'prime'"),
        (dict(prompt='a', top_p=2), r'top_p must lie in \(0, 1\]'),
    ],
)
def test_streams_that_make_no_sense(service, query, says):
    check_error(service.client.get('/stream', params=query), 422, 'invalid_request', says)
    assert service.worker.streams == {}


def test_a_seed_that_is_drawn_is_told(service):
    body = dict(prompt='fast drums', seconds=0.3)
    first, second = (service.client.post('/generate', json=body) for _ in range(2))
    assert first.headers['x-seed'] != second.headers['x-seed']
    assert first.content != second.content
    again = service.client.post('/generate', json=body | dict(seed=int(first.headers['x-seed'])))
    assert again.content == first.content


# ---- many at once ----


def at_once(service, *posts):
    """The responses to requests that are sent together."""
    with ThreadPoolExecutor(len(posts)) as pool:
        return list(pool.map(lambda it: service.client.post(it[0], **it[1]), posts))


def test_many_clients_get_their_own_answers(service, mulan, musiclm):
    texts = [[f'song {index}', *TEXTS[: index % 5]] for index in range(20)]
    content = sound(1.0)
    posts = [('/embed', dict(json={'texts': it})) for it in texts]
    posts += [('/rank', dict(files=form(content), data={'texts': it})) for it in texts[:3]]
    posts += [('/generate', dict(json=dict(prompt='fast drums', seconds=0.3, seed=seed))) for seed in range(3)]
    answers = at_once(service, *posts)
    assert [answer.status_code for answer in answers] == [200] * 26
    for answer, it in zip(answers, texts):
        close(answer.json()['text_latents'], own_texts(mulan, it))
    audio = mulan.embed_audio(wave_of(content))
    for answer, it in zip(answers[20:23], texts):
        close(answer.json()['similarities'][0], own_texts(mulan, it) @ audio)
    for seed, answer in enumerate(answers[23:]):
        same_music(wave_of(answer.content, 2 * RATE), musiclm('fast drums', seconds=0.3, seed=seed)[0])
    assert service.client.get('/health').json()['requests'] == 0


def counted(monkeypatch, owner, name):
    """The arguments of each call of a function, which does what it did."""
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **named: calls.append(given) or original(*given, **named))
    return calls


def test_texts_that_wait_are_embedded_together(service, mulan, monkeypatch):
    calls = counted(monkeypatch, service.worker.engine, 'embed_texts')
    posts = [('/embed', dict(json={'texts': [f'song {index}', 'drums']})) for index in range(10)]
    with ThreadPoolExecutor() as pool, busy(service):
        answers = pool.submit(at_once, service, *posts)
        until(lambda: len(service.worker._texts) == 10)
    assert [len(texts) for (texts,) in calls] == [20]
    for index, answer in enumerate(answers.result()):
        close(answer.json()['text_latents'], own_texts(mulan, [f'song {index}', 'drums']))


def test_what_the_house_cannot_hold_is_sent_away(musiclm):
    with served(musiclm, max_requests=4) as service, ThreadPoolExecutor(12) as pool:
        with busy(service):
            send = partial(service.client.post, '/embed')
            answers = [pool.submit(send, json={'texts': [f'song {index}']}) for index in range(12)]
            until(lambda: sum(answer.done() for answer in answers) == 8)
            refused = [answer.result() for answer in answers if answer.done()]
            assert service.client.get('/health').json()['requests'] == 4  # still answered
        for answer in refused:
            check_error(answer, 503, 'overloaded', '4 requests are being served')
            assert int(answer.headers['retry-after']) > 0
        assert sorted(answer.result().status_code for answer in answers) == [200] * 4 + [503] * 8
        assert service.client.post('/embed', json={'texts': ['a']}).status_code == 200


# ---- time ----


def test_work_that_has_not_begun_in_time_is_dropped(musiclm, monkeypatch):
    with served(musiclm, timeout=0.5) as service:
        calls = counted(monkeypatch, service.worker.engine, 'embed_texts')
        made = counted(monkeypatch, service.worker, '_generate')
        with busy(service):
            check_error(service.client.post('/embed', json={'texts': ['a']}), 504, 'timeout', 'within 0.5 s')
            check_error(service.client.post('/generate', json=dict(prompt='a')), 504, 'timeout')
            assert service.client.get('/health').json()['requests'] == 0
        service.worker.submit(lambda job: None).future.result(WAITS)  # all before it have had their turn
        assert calls == made == []


def test_texts_that_no_one_waits_for_any_more_are_left_out(mulan, monkeypatch):
    worker = ModelWorker(mulan)
    calls = counted(monkeypatch, worker.engine, 'embed_texts')
    free = threading.Event()
    worker.submit(lambda job: free.wait(WAITS))
    jobs = [worker.embed_texts([text]) for text in TEXTS]
    jobs[0].abandon()
    jobs[2].abandon()
    free.set()
    for index in (1, 3):
        close(jobs[index].future.result(WAITS).tolist(), own_texts(mulan, TEXTS[index : index + 1]))
    assert calls == [([TEXTS[1], TEXTS[3]],)]
    worker.close()


def test_music_of_a_client_that_has_gone_is_not_made_to_the_end(musiclm, monkeypatch):
    jobs, original = [], ModelWorker.generate
    monkeypatch.setattr(ModelWorker, 'generate', lambda *a, **k: jobs.append(original(*a, **k)) or jobs[-1])
    with served(musiclm, max_seconds=60.0) as service:
        with pytest.raises(httpx.ReadTimeout):
            service.client.post('/generate', json=dict(prompt='a', seconds=60, seed=0), timeout=0.5)
        assert isinstance(jobs[0].future.exception(WAITS), Abandoned)
        until(lambda: service.client.get('/health').json()['requests'] == 0)


def test_a_body_that_does_not_arrive_is_not_waited_for(musiclm):
    head = b'POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n'
    with served(musiclm, timeout=0.5) as service, socket.create_connection(service.address, WAITS) as connection:
        connection.sendall(head + b'{"texts')
        answer = ''
        while '}}' not in answer:
            answer += connection.recv(10000).decode()
        assert answer.startswith('HTTP/1.1 408 ')
        assert '"code":"request_timeout"' in answer


# ---- size ----


def test_a_large_body_is_refused_by_its_length(service):
    answer = service.client.post('/embed', content=b'x' * (2**20 + 1), headers={'content-type': 'application/json'})
    check_error(answer, 413, 'body_too_large', 'larger than the 1048576 bytes')
    # without reading it: this one is never sent
    with socket.create_connection(service.address, WAITS) as connection:
        connection.sendall(b'POST /rank HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n')
        assert connection.recv(10000).startswith(b'HTTP/1.1 413 ')


@pytest.mark.parametrize(
    ('path', 'kind'), [('/embed', 'application/json'), ('/rank', 'multipart/form-data; boundary=x')]
)
def test_a_large_body_is_refused_while_it_comes(service, path, kind):
    sent = []

    def chunks():
        yield b'--x\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
        for _ in range(200):
            sent.append(None)
            yield b' ' * 2**16

    answer = service.client.post(path, content=chunks(), headers={'content-type': kind})
    assert 'transfer-encoding' in answer.request.headers
    check_error(answer, 413, 'body_too_large')
    assert service.client.get('/health').json()['requests'] == 0
    assert service.client.post('/embed', json={'texts': ['a']}).status_code == 200


def test_a_body_of_just_the_size_is_taken_and_never_lies_on_disk(musiclm, mulan, monkeypatch):
    content = sound(30.0, 44100)  # larger than what Starlette keeps in memory by itself
    assert len(content) > 2**21

    def refuse(*_, **__):
        raise AssertionError('a file was made')

    monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, 'rollover', refuse)
    with httpx.Client(base_url='http://x') as client:
        size = int(client.build_request('POST', '/embed', files=form(content)).headers['content-length'])
    for allowed in (size, size - 1):
        with served(musiclm, max_body_bytes=allowed) as service:
            answer = service.client.post('/embed', files=form(content))
            if allowed == size:
                close(answer.json()['audio_latents'][0], mulan.embed_audio(wave_of(content), 10.0, 10.0, 44100))
            else:
                check_error(answer, 413, 'body_too_large')


# ---- nonsense ----

JSON = {'content-type': 'application/json'}


@pytest.mark.parametrize('path', ['/embed', '/generate'])
@pytest.mark.parametrize(
    'body', [b'', b'{', b'\xff\xfe', b'[' * 10**5, b'{"texts": ["\\ud800"]}', b'nonsense', b"{'a': 1}"]
)
def test_what_is_no_json(service, path, body):
    check_error(service.client.post(path, content=body, headers=JSON), 400, 'malformed_json', 'the body is not JSON')


@pytest.mark.parametrize(
    ('path', 'body', 'says'),
    [
        ('/embed', '[]', 'the body: Input should be an object'),
        ('/embed', '{}', 'texts: Field required'),
        ('/embed', '{"texts": []}', 'texts is empty'),
        ('/embed', '{"texts": "a"}', 'texts: Input should be a valid array'),
        ('/embed', '{"texts": ["a", 1, NaN]}', r'texts\.1: Input should be a valid string; texts\.2'),
        ('/embed', '{"texts": ["a"], "text": 1}', "unknown field 'text'; did you mean 'texts'?"),
        ('/embed', '{"texts": [1, 1, 1, 1, 1]}', 'and 2 more'),
        ('/embed', '{"texts": [' + '"a",' * 30 + '"a"]}', 'texts holds 31, but at most 30'),
        ('/embed', '{"texts": ["b", "' + 'a' * 201 + '"]}', r'texts\[1\] has 201 characters, but at most 200'),
        ('/generate', '{}', 'prompt: Field required'),
        ('/generate', '{"prompt": " "}', 'a prompt must say something'),
        ('/generate', '{"prompt": [], "format": "json"}', 'at least one prompt'),
        ('/generate', '{"prompt": 1}', 'valid string'),
        ('/generate', '{"prompt": ["a", "b"]}', "one prompt, not a list, or format 'json'"),
        ('/generate', '{"prompt": "a", "format": "aac"}', "format: Input should be 'wav', 'flac', 'ogg', 'mp3' or 'js"),
        ('/generate', '{"prompt": {"sound": "???"}}', 'the sound of a prompt is no base64'),
        ('/generate', '{"prompt": {"latent": [1, 2]}}', 'must have 16 numbers, got 2'),
        ('/generate', json.dumps(dict(prompt=dict(latent=[1e-9] * 16))), 'points nowhere'),
        ('/generate', json.dumps(dict(prompt=dict(mix=[[1, 'a']] * 300))), 'prompt holds .* but at most'),
        ('/generate', '{"prompt": {"mix": []}}', 'a Mix of nothing'),
        ('/generate', '{"prompt": {"mix": [[0, "a"]]}}', "the weight of 'a' must be greater than 0, got 0"),
        ('/generate', '{"prompt": "a", "negative": "b", "negative_scale": -1}', 'negative_scale must lie between 0'),
        ('/generate', '{"prompt": "a", "seconds": NaN}', 'seconds: Input should be a finite number'),
        ('/generate', '{"prompt": "a", "seconds": true}', 'seconds: Input should be a valid number'),
        ('/generate', '{"prompt": "a", "seconds": 31}', 'seconds must lie between .* and 30, got 31'),
        ('/generate', '{"prompt": "a", "num_samples": 0}', 'between 1 and 8, got 0'),
        ('/generate', '{"prompt": ["a", "b", "c"], "num_samples": 3, "format": "json"}', 'between 1 and 8, got 9'),
        ('/generate', '{"prompt": "a", "num_samples": 1.5}', 'num_samples: Input should be a valid integer'),
        ('/generate', '{"prompt": "a", "seed": -1}', 'seed must lie between 0'),
        ('/generate', '{"prompt": "a", "temperature": [1, 2]}', 'temperature must be one number or three'),
        ('/generate', '{"prompt": "a", "top_k": [0, 1, 1]}', 'top_k must be at least 1'),
    ],
)
def test_json_that_makes_no_sense(service, path, body, says):
    check_error(service.client.post(path, content=body, headers=JSON), 422, 'invalid_request', says)


@pytest.mark.parametrize(
    ('path', 'given', 'status', 'code', 'says'),
    [
        ('/rank', dict(data={'texts': 'a'}), 415, 'unsupported_media_type', 'multipart/form-data, got applica'),
        ('/embed', dict(content='{}'), 415, 'unsupported_media_type', 'application/json or multipart.*got none'),
        ('/rank', dict(files={'audio': b''}), 422, 'invalid_request', "'audio' and 'texts', got 1 and 0"),
        ('/rank', dict(files={'texts': (None, 'a')}), 422, 'invalid_request', "'audio' and 'texts', got 0 and 1"),
        ('/embed', dict(files={'sound': sound()}), 422, 'invalid_request', "unknown field 'sound'"),
        ('/embed', dict(files={'audio': (None, 'a')}), 422, 'invalid_request', "'audio' must be a file"),
        ('/embed', dict(files={'texts': b'a'}), 422, 'invalid_request', "'texts' must be text, not a file"),
        ('/embed', dict(files=form(*[b'x'] * 5)), 422, 'invalid_request', 'Maximum number of files is 4'),
        ('/embed', dict(files=form(*[sound(25.0)] * 2)), 422, 'invalid_request', 'lasts 50.0 s .*, but at most 40 s'),
        ('/embed', dict(files=form(sound()), data={'texts': ['a'] * 31}), 422, 'invalid_request', 'fields is 30'),
        ('/embed', dict(files=form(sound()), data={'texts': 'a' * 201}), 422, 'invalid_request', '201 characters'),
    ],
)
def test_forms_that_make_no_sense(service, path, given, status, code, says):
    check_error(service.client.post(path, **given), status, code, says)


@pytest.mark.parametrize('boundary', ['', '; boundary=x', '; boundary=' + 'x' * 1000])
def test_what_is_no_form(service, boundary):
    answer = service.client.post(
        '/rank', content=b'--y\r\nnonsense', headers={'content-type': f'multipart/form-data{boundary}'}
    )
    check_error(answer, 400, 'malformed_form', 'the body is not a form')


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        (b'', 'cannot be read as audio'),
        (b'no sound at all' * 100, 'cannot be read as audio'),
        (sound()[:20], 'cannot be read as audio'),
        (sound(0.0), 'has no samples'),
        (sound(0.02), 'samples'),  # shorter than the model's first window
        (sound(kind='FLAC', rate=8000, seconds=20.0)[:-20000], 'damaged|ends at sample'),
        (sound(channels=9), 'has 9 channels, but at most 8'),
        (file_of(np.array([0.1] * 900 + [np.nan] * 100), subtype='FLOAT'), 'NaN or inf'),
    ],
)
def test_sound_that_cannot_be_read_is_named(service, content, says):
    files = [('audio', ('good.wav', sound())), ('audio', ('bad.wav', content))]
    answer = service.client.post('/rank', files=files, data={'texts': 'a'})
    check_error(answer, 400, 'unreadable_audio', rf'^audio\[1\] \(bad.wav\).*({says})')


def test_elsewhere_and_otherwise(service):
    check_error(service.client.get('/nowhere'), 404, 'not_found', r'no GET /nowhere; call GET / or .* or POST /stream$')
    check_error(service.client.get('/embed'), 405, 'method_not_allowed', r'^there is no GET /embed; call POST /embed$')
    check_error(service.client.post('/'), 405, 'method_not_allowed', r'call GET /$')
    check_error(service.client.delete('/embed'), 405, 'method_not_allowed')


def test_a_failure_is_logged_and_not_told(service, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError('the secret of the house')

    with monkeypatch.context() as patch:
        patch.setattr(service.worker.engine, 'embed_texts', fail)
        answers = at_once(service, *[('/embed', dict(json={'texts': ['a']}))] * 3)
    for answer in answers:
        check_error(answer, 500, 'internal_error', 'its log tells why')
        assert 'secret' not in answer.text
    assert 'the secret of the house' in caplog.text
    assert 'Traceback' in caplog.text
    assert service.client.post('/embed', json={'texts': ['a']}).status_code == 200


# ---- models and settings ----


def test_a_mulan_alone_embeds_and_ranks(mulan):
    with served(mulan) as service:
        health = service.client.get('/health').json()
        assert (health['model'], health['generates'], health['sample_rate']) == ('MuLaN', False, RATE)
        assert service.client.post('/rank', files=form(sound()), data={'texts': 'a'}).status_code == 200
        check_error(service.client.post('/generate', json=dict(prompt='a')), 501, 'not_available', 'serve a MusicLM')


def test_an_optimized_model_answers_with_its_own_latents(mulan):
    fast = OptimizedMuLaN(mulan, InferenceConfig(use_mixed_precision=True, device='cpu'))
    with served(fast) as service:
        answer = service.client.post('/embed', json={'texts': TEXTS[:1]}).json()
    close(answer['text_latents'], fast.get_text_latents(raw_texts=TEXTS[:1]))
    assert (torch.tensor(answer['text_latents']) - own_texts(mulan, TEXTS[:1])).abs().max() > 1e-6


def test_an_application_may_be_started_twice(mulan):
    app = create_service(mulan)

    async def once():
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url='http://x') as client:
                return (await client.post('/embed', json={'texts': ['a']})).status_code

    assert [asyncio.run(once()) for _ in range(2)] == [200, 200]


def test_models_that_cannot_serve():
    knows_rate = dict(audio_sample_rate=8000)
    for model, error, says in [
        (tiny_mulan(text=dict(num_tokens=49408)), ValueError, 'does not know its sample rate'),
        (tiny_mulan(knows_rate), ValueError, 'takes no words, only its own 100 token ids'),
        (MusicLM(build_audio_lm(), build_quantizer(fitted=False)), ValueError, 'no codebooks yet'),
        ('tiny', TypeError, 'model'),
    ]:
        with pytest.raises(error, match=says):
            create_service(model)


@pytest.mark.parametrize(
    ('given', 'error', 'says'),
    [
        (dict(max_requests=0), ValueError, 'max_requests must be greater than 0, got 0'),
        (dict(max_files=True), TypeError, 'max_files must be int, got True'),
        (dict(timeout=float('inf')), ValueError, 'timeout must be greater than 0, got inf'),
        (dict(time_out=1), TypeError, "ServiceConfig has no field 'time_out'; did you mean 'timeout'?"),
    ],
)
def test_settings_are_checked(given, error, says):
    with pytest.raises(error, match=re.escape(says)):
        ServiceConfig(**given)


@pytest.mark.parametrize('package', ['fastapi', 'python_multipart'])
def test_a_missing_extra_is_named(mulan, monkeypatch, package, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    told = rf"needs {package} .*: pip install '\.\[serve\]'"
    with pytest.raises(ImportError, match=told):
        create_service(mulan)
    assert main(['serve']) == 2
    assert re.search(told, capsys.readouterr().err)


# ---- the command ----


def test_help_tells_every_limit_and_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['serve', '--help'])
    assert stopped.value.code == 0
    told = ' '.join(capsys.readouterr().out.split())
    for name, value in ServiceConfig().to_dict().items():
        assert re.search(rf'--{name.replace("_", "-")} [NS] .*?\(default: {value}\)', told), name


@pytest.mark.parametrize(
    ('options', 'says'),
    [
        (['--port', '70000'], '--port must lie between 0 and 65535, got 70000'),
        (['--timeout', '-1'], 'timeout must be greater than 0, got -1'),
        (['--model', 'nowhere'], 'no folder nowhere'),
        (['--model', '.'], 'config.json'),
    ],
)
def test_bad_options_are_one_line(tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.chdir(tmp_path)
    assert main(['serve', *options]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert says in error


@pytest.mark.skipif(shutil.which('curl') is None, reason='needs curl')
def test_the_documented_requests_are_answered(musiclm, tmp_path):
    (tmp_path / 'organ.mp3').write_bytes(sound(2.0, 44100, 'MP3'))
    commands = re.findall(r'^curl localhost:8000.*$', (ROOT / 'docs' / 'service.md').read_text(encoding='utf-8'), re.M)
    assert len(commands) == 5
    # `--json`, of curl 7.82, spelt out for older ones
    longer = {'--json': "-H 'Content-Type: application/json' -d", 'localhost:8000': '{host}:{port}'}
    with served(musiclm) as service:
        for command in commands:
            for short, long in longer.items():
                command = command.replace(short, long)
            host, port = service.address
            command = command.replace('{host}', host).replace('{port}', str(port)) + ' --fail --silent --show-error'
            done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f'{command}: {done.stderr}'
            assert '-o' in command or json.loads(done.stdout)
    assert len(wave_of((tmp_path / 'flute.wav').read_bytes(), 2 * RATE)) == 5 * 2 * RATE


@pytest.mark.filterwarnings('ignore::musiclm_pytorch.PromptWarning')
def test_words_that_the_model_does_not_know_are_told(tiny):
    with served(tiny) as service:
        body = dict(prompt='lofi флейта', seconds=0.2)
        line = unquote(service.client.post('/generate', json=body).headers['x-warning'])
        assert line.startswith('the model does not know lofi, флейта; it knows piano, guitar')
        assert 'x-warning' not in service.client.post('/generate', json=body | dict(prompt='a flute')).headers
        several = body | dict(prompt=['lofi флейта', 'a flute'], format='json')
        assert service.client.post('/generate', json=several).json()['warnings'] == {'lofi флейта': line}


@pytest.mark.slow
def test_the_command_serves_what_ships(tiny):
    command = [sys.executable, '-m', 'musiclm_pytorch.cli', 'serve', '--port', '0', '--max-texts', '2']
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r'running on (http://127\.0\.0\.1:\d+)', line):
                    break
            assert found, ''.join(lines)
            with httpx.Client(base_url=found[1], timeout=WAITS) as client:
                assert client.get('/health').json()['model'] == 'MusicLM'
                body = dict(prompt='a fast happy flute melody', seconds=1, seed=0)
                music = tiny('a fast happy flute melody', seconds=1, seed=0)[0]
                content = client.post('/generate', json=body).content
                torch.testing.assert_close(wave_of(content), music.clamp(-1, 1), atol=1e-3, rtol=0)
                check_error(client.post('/embed', json={'texts': ['a'] * 3}), 422, 'invalid_request', 'at most 2')
                with ThreadPoolExecutor() as pool:
                    answers = []
                    for number in range(4):  # one is at work, the others wait
                        answers.append(pool.submit(client.post, '/generate', json=body | dict(seconds=2)))
                        until(lambda: client.get('/health').json()['requests'] > number)  # noqa: B023 - now
                    process.send_signal(signal.SIGINT)
                    first, *others = (it.result() for it in answers)
                assert len(wave_of(first.content)) == 2 * len(music)
                for answer in others:
                    check_error(answer, 503, 'stopping', 'the service is ending')
                    assert int(answer.headers['retry-after']) > 0
                with pytest.raises(httpx.ConnectError):
                    client.get('/health')
            rest = process.communicate(timeout=WAITS)[1]
        finally:
            process.kill()  # does nothing to one that has ended
        assert process.returncode == 0
    assert 'Finished server process' in rest
    assert 'Traceback' not in rest


def test_who_waits_for_a_job_that_is_given_up_is_told(musiclm):
    """As the second signal gives it up; what is asked from then on is not begun."""
    with served(musiclm, max_seconds=60.0) as service, ThreadPoolExecutor() as pool:
        body = dict(prompt='a', seconds=60, seed=0)
        answer = pool.submit(service.client.post, '/generate', json=body)
        until(lambda: any(job.future.running() for job in service.worker._jobs))
        service.worker.stop(now=True)
        check_error(answer.result(WAITS), 503, 'stopping')
        check_error(service.client.post('/embed', json={'texts': ['a']}), 503, 'stopping')
