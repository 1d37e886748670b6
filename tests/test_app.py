"""The web page: what its buttons do, the command, and the page itself in a browser, from the click to the sound."""

import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
import soundfile
import torch
from helpers.music import build_audio_lm, build_quantizer, stop_at_once
from helpers.processes import free_port

from musiclm_pytorch import Mix, MusicLM, StopGeneration
from musiclm_pytorch.cli import main
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.gallery import write_clip
from musiclm_pytorch.inference.app import close_app, create_app, launch_app, without_folders
from musiclm_pytorch.inference.layout import EXAMPLES, who_plays
from musiclm_pytorch.inference.music_maker import (
    MusicMaker,
    highest,
    in_proportion,
    read_mix,
    stage_progress,
)

ROOT = Path(__file__).parents[1]
RATE = 16000
PROMPT = 'a slow low organ'
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--autoplay-policy=no-user-gesture-required',
    '--use-fake-device-for-media-stream',  # a microphone that hears beeps
    '--use-fake-ui-for-media-stream',
]
needs_ffmpeg = pytest.mark.skipif(shutil.which('ffmpeg') is None, reason='FFmpeg, which encodes streams, is not here')


@pytest.fixture(scope='module')
def tiny():
    return MusicLM.from_pretrained('tiny')


@pytest.fixture(scope='module')
def maker(tiny):
    return MusicMaker(tiny, max_seconds=4.0, max_samples=3)


# what the buttons do


def test_a_prompt_gives_what_the_model_gives_in_the_order_of_scores(tiny, maker):
    clips = maker.from_prompt(PROMPT, 0.4, num_samples=3, seed=4)
    waves, scores = tiny(PROMPT, 3, seconds=0.4, seed=4, return_all=True, return_scores=True)
    order = scores[0].argsort(descending=True)
    assert [clip.note for clip in clips] == [f'MuLaN: {scores[0, index]:.3f} · seed {4 + index}' for index in order]
    for clip, index in zip(clips, order):
        torch.testing.assert_close(clip.wave, waves[0, index])  # made in other company
        assert (clip.seed, clip.score) == (4 + index, pytest.approx(scores[0, index].item(), abs=1e-4))
    assert [clip.name for clip in clips] == [f'a-slow-low-organ-{place}' for place in (1, 2, 3)]

    # where the sliders stand at first, nothing is changed
    sliders = {name: highest(tiny.sampling[name]) for name in ('cond_scale', 'temperature')}
    again = maker.from_prompt(PROMPT, 0.4, num_samples=3, seed=4, **sliders)
    assert all(torch.equal(clip.wave, other.wave) for clip, other in zip(clips, again))
    other = maker.from_prompt(PROMPT, 0.4, num_samples=1, seed=4, cond_scale=5.0, temperature=0.5)
    scaled = tiny(PROMPT, seconds=0.4, seed=4, cond_scale=(5.0, 1.0, 1.0), temperature=(0.5, 0.375, 0.25))
    torch.testing.assert_close(other[0].wave, scaled[0])


def test_a_story_and_a_prime_go_to_the_model(tiny, maker, tmp_path):
    shares = []
    rows = [[0.5, PROMPT], ['', None], ['0.7', ' a flute '], [float('nan'), '']]
    clips = maker.from_story(rows, num_samples=1, seed=2, report=lambda *told: shares.append(told))
    assert torch.equal(clips[0].wave, tiny([(0.5, PROMPT), (0.7, 'a flute')], seed=2)[0])
    assert clips[0].section == f'{PROMPT} – a flute'
    assert all(one <= other for (one, _), (other, _) in itertools.pairwise(shares))
    assert shares[-1][0] == pytest.approx(1)
    assert [what for what, _ in itertools.groupby(what for _, what in shares)] == [
        'semantic tokens',
        'coarse tokens',
        'fine tokens',
        'waves',
        'scores',
    ]

    soundfile.write(tmp_path / 'prime.wav', clips[0].wave[:3200].numpy(), RATE)
    primed = maker.from_prompt(PROMPT, 0.4, tmp_path / 'prime.wav', num_samples=1, seed=3)
    expected = tiny(PROMPT, seconds=0.4, seed=3, prime_wave_path=tmp_path / 'prime.wav')
    assert torch.equal(primed[0].wave, expected[0])

    avoiding = maker.from_prompt(PROMPT, 0.4, num_samples=1, seed=3, negative='drums')
    assert torch.equal(avoiding[0].wave, tiny(PROMPT, seconds=0.4, seed=3, negative='drums')[0])
    hummed = maker.from_prompt(PROMPT, 0.4, None, str(tmp_path / 'prime.wav'), num_samples=1, seed=3)
    expected = tiny(PROMPT, seconds=0.4, seed=3, melody=tmp_path / 'prime.wav')
    assert torch.equal(hummed[0].wave, expected[0])

    mix = read_mix(PROMPT, 0.7, [[1, ''], ['0.5', 'drums']], (None, 1), (str(tmp_path / 'prime.wav'), 0.3))
    mixed = maker.from_prompt(mix, 0.4, num_samples=1, seed=3)
    expected = tiny(Mix([(0.7, PROMPT), (0.5, 'drums'), (0.3, tmp_path / 'prime.wav')]), seconds=0.4, seed=3)
    assert torch.equal(mixed[0].wave, expected[0])
    assert mixed[0].section == f'0.7 {PROMPT} + 0.5 drums + 0.3 prime.wav'


def test_a_story_names_sounds_latents_and_mixtures(tiny, maker, tmp_path):
    hum, latent = tmp_path / 'hum.wav', tmp_path / 'latent.npy'
    soundfile.write(hum, 0.2 * np.random.default_rng(1).standard_normal(32000), RATE)
    np.save(latent, np.random.default_rng(2).standard_normal(tiny.mulan_embed_quantizer.mulan.dim_latent))
    rows = [[0.4, '@hum.wav'], [0.5, f'60% {PROMPT} + 40% @latent.npy']]
    clips = maker.from_story(rows, [str(hum), str(latent)], num_samples=1, seed=2)
    own = tiny([(0.4, hum), (0.5, Mix([(0.6, PROMPT), (0.4, np.load(latent))]))], seed=2)
    assert torch.equal(clips[0].wave, own[0])
    assert clips[0].section == f'@hum.wav – 60% {PROMPT} + 40% @latent.npy'
    with pytest.raises(ValueError, match='the story names @drums.wav, but the files with it are hum.wav'):
        maker.from_story([[1, '@drums.wav']], [str(hum)], num_samples=1, seed=2)
    for name in (str(hum), '../hum.wav'):  # nothing else of the machine is read
        with pytest.raises(ValueError, match='but the files with it are hum.wav'):
            maker.from_story([[1, f'@{name}']], [str(hum)], num_samples=1, seed=2)


def test_a_mixture_is_what_is_filled_in():
    nothing = [[1, ''], [None, None]], (None, 1), ('', 1)
    assert read_mix(PROMPT) == read_mix(PROMPT, 1, *nothing) == read_mix(PROMPT, 0.5, *nothing) == PROMPT
    for words, weight in ((' ', 1), (PROMPT, 0)):
        assert read_mix(words, weight, [], ('a.wav', 0.2), ('b.wav', 0)) == Path('a.wav')
        assert read_mix(words, weight, *nothing) == ''
    for given, told in (
        ((1, [['', 'drums']]), "row 1 of the other words needs its weight, a number above 0, got ''"),
        ((1, [[1, 'a flute'], [0, 'drums']]), "row 2 of the other words needs its weight, a number above 0, got '0'"),
        ((-1,), f"the weight of '{PROMPT}' must be greater than 0, got -1"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            read_mix(PROMPT, *given)


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (dict(prompt=' \n'), 'the prompt is empty'),
        (dict(seconds=4.5), 'up to 4 seconds, got 4.5'),
        (dict(seconds=0), 'up to 4 seconds, got 0'),
        (dict(seconds=None), 'up to 4 seconds, got None'),
        (dict(seconds=float('nan')), 'up to 4 seconds, got nan'),
        (dict(num_samples=4), 'may be 1 to 3, got 4'),
        (dict(num_samples=0), 'may be 1 to 3, got 0'),
        (dict(seed=None), 'give a seed'),
        (dict(temperature=-1.0), 'temperature must be 0 or above'),
    ],
)
def test_what_cannot_be_made_is_told(maker, given, message):
    with pytest.raises(ValueError, match=message):
        maker.from_prompt(**{**dict(prompt=PROMPT, seconds=1.0, num_samples=1, seed=0), **given})


@pytest.mark.parametrize(
    ('rows', 'message'),
    [
        ([], 'the story is empty'),
        ([['', None], [None, ' ']], 'the story is empty'),
        ([[1, 'a flute'], [2, '']], 'row 2 of the story has no prompt'),
        ([['long', 'a flute']], "row 1 of the story needs its seconds, a number above 0, got 'long'"),
        ([[-1, 'a flute']], "got '-1'"),
        ([['inf', 'a flute']], "got 'inf'"),
        ([[None, 'a flute']], "got ''"),
        ([[2, 'a flute'], [3, 'an organ']], 'up to 4 seconds, got 5'),
    ],
)
def test_stories_that_cannot_be_told_are_told_why(maker, rows, message):
    with pytest.raises(ValueError, match=message):
        maker.from_story(rows, num_samples=1, seed=0)


def test_settings_keep_their_proportion():
    assert in_proportion((2.0, 1.5, 1.0), 3.0, neutral=1.0) == (3.0, 2.0, 1.0)
    assert in_proportion([2.0, 1.5, 1.0], 1.0, neutral=1.0) == (1.0, 1.0, 1.0)
    assert in_proportion((0.8, 0.6, 0.4), 0.4, neutral=0.0) == pytest.approx((0.4, 0.3, 0.2))
    assert in_proportion((1.0, 1.0, 1.0), 4.0, neutral=1.0) == 4.0
    assert in_proportion(3.0, 4.0, neutral=1.0) == 4.0
    own = (1.1, 1.3, 0.7)
    assert in_proportion(own, highest(own), neutral=1.0) is own


def test_progress_counts_stages_of_one_step():
    told = []
    advance = stage_progress(lambda *it: told.append(it), parts=1)
    for done, total in ((1, 1), (1, 1), (1, 2), (2, 2), (1, 1), (1, 1)):
        advance(done, total)
    assert [share for share, _ in told] == pytest.approx([0.2, 0.4, 0.5, 0.6, 0.8, 1])
    assert [what.split()[0] for _, what in told] == ['semantic', 'coarse', 'fine', 'fine', 'waves', 'scores']


@pytest.mark.filterwarnings('ignore::musiclm_pytorch.PromptWarning')
def test_work_that_is_stopped_gives_back_what_is_done(tiny, maker):
    told = []

    def report(share, what):
        told.append(what)
        if share > 0.6:  # in the second round of two
            raise StopGeneration

    clips = maker.from_prompt('a lofi organ', 0.5, num_samples=3, seed=4, report=report)
    assert sorted(clip.seed for clip in clips) == [4, 5]
    assert clips[0].score >= clips[1].score
    assert told[-1] == 'coarse tokens, round 2 of 2'
    assert clips[0].remark.startswith('the model does not know lofi; it knows')
    whole = maker.from_prompt('a lofi organ', 0.5, num_samples=2, seed=4)
    assert all(torch.equal(clip.wave, other.wave) for clip, other in zip(clips, whole))
    assert maker.from_story([[0.5, PROMPT]], num_samples=3, seed=4, report=stop_at_once) == []


def test_messages_tell_names_and_no_folders():
    assert without_folders("/tmp/gradio/1a/organ.mp3: not a sound file; '/srv/x/y.wav'") == (
        "organ.mp3: not a sound file; 'y.wav'"
    )
    assert without_folders('1/2 of 3/4, at https://x.org/a/b, and/or') == '1/2 of 3/4, at https://x.org/a/b, and/or'


@pytest.mark.parametrize(
    ('name', 'knows', 'told'),
    [
        ('my_folder', 'pianos & bells', 'Words to music, by the model `my_folder`. It knows pianos &amp; bells.'),
        ('<folder>', None, 'Words to music, by the model `<folder>`.'),
        (None, 'a <b>', 'Words to music. It knows a &lt;b&gt;.'),
        (None, None, 'Words to music.'),
    ],
)
def test_the_model_that_plays_is_told(name, knows, told):
    assert who_plays(name, knows) == told


# the command


def test_a_page_whose_model_follows_no_melody_says_so():
    app = create_app(MusicLM(build_audio_lm(), build_quantizer()))
    found = {it['props'].get('elem_id'): it['props'] for it in app.config['components']}
    assert found['no-melody']['value'].startswith('This model was trained without melodies and cannot follow one')
    for prefix in ('', 'live-'):
        assert (found[f'{prefix}no-melody']['visible'], found[f'{prefix}melody']['visible']) == (True, False)


def test_a_missing_extra_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(ImportError, match=r"pip install '\.\[app\]'"):
        create_app(tiny)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--model', 'tinny'], 'there is no folder tinny'),
        (['--max-seconds', '0'], 'max_seconds must be greater than 0'),
        (['--max-samples', '-1'], 'max_samples must be greater than 0'),
        (['--port', '70000'], 'port must lie between 1 and 65535, got 70000'),
    ],
)
def test_bad_options_are_told_in_a_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path))
    assert main(['app', *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(tiny, tmp_path):
    from gradio_client import Client
    from gradio_client.exceptions import AppError
    from gradio_client.utils import Status

    port = free_port()
    environment = {**os.environ, 'TMPDIR': str(tmp_path), 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    environment.pop('GRADIO_TEMP_DIR', None)
    command = [sys.executable, '-m', 'musiclm_pytorch.cli', 'app', '--port', str(port), '--max-samples', '2']
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == f'the page is at http://127.0.0.1:{port}/ until Ctrl-C\n'
        with pytest.raises(OSError, match=f'cannot serve at 127.0.0.1, port {port}, where something else may be'):
            launch_app(create_app(tiny), port=port)
        client = Client(
            f'http://127.0.0.1:{port}', verbose=False, analytics_enabled=False, download_files=str(tmp_path / 'got')
        )
        about = next(
            it['props']['value'] for it in client.config['components'] if it['props'].get('elem_id') == 'about'
        )
        assert f'by the model `tiny`. It knows {tiny.knows}.' in about
        sliders = [highest(tiny.sampling[name]) for name in ('cond_scale', 'temperature')]
        _, score, path, picture, *others = client.predict(PROMPT, 1, None, None, 1, *sliders, 5, api_name='/generate')
        assert score.startswith('**Sample 1** · MuLaN: ')
        heard, rate = soundfile.read(path)
        assert rate == RATE
        np.testing.assert_allclose(heard, tiny(PROMPT, seconds=1.0, seed=5)[0].numpy(), atol=1e-4)
        assert Path(picture['value']).read_bytes().startswith(b'\x89PNG')
        assert others == [None] * 3  # the slot that is not needed
        kept = list(tmp_path.glob('musiclm-app-*/*/*.wav'))
        assert len(kept) == 1
        jobs = [client.submit(PROMPT, 20, None, None, 2, *sliders, 5, api_name='/generate') for _ in range(2)]
        while not any(job.status().code is Status.PROGRESS for job in jobs):
            time.sleep(0.1)
        server.terminate()
        notes, errors = [], []
        for job in jobs:
            try:
                notes.append(job.result(60))
            except AppError as error:
                errors.append(str(error))
        assert errors == ['The page is being closed.']  # whoever was in line
        assert notes[0][2] is None  # no piece was done
    except BaseException:
        server.kill()
        raise
    finally:
        code = server.wait(60)
        server.stdout.close()
    assert code == 0
    assert not list(tmp_path.glob('musiclm-app-*'))


# the page


def encoders():
    """The processes of FFmpeg that this one has started and that still live."""
    children = ' '.join(it.read_text() for it in Path(f'/proc/{os.getpid()}/task').glob('*/children')).split()
    names = [Path(f'/proc/{child}/comm') for child in children]
    return [it for it in names if it.exists() and it.read_text().strip() == 'ffmpeg']


def nothing_plays(app):
    for _ in range(600):
        if not app.live.playing and not encoders():
            return True
        time.sleep(0.1)
    return False


def until(found, job):
    """What is found, as soon as it is, while a job runs."""
    while not (it := found()):
        assert not job.done()
        time.sleep(0.05)
    return it


def segments(playlist):
    """The sound of a stream as far as it is encoded, by its address."""
    return b''.join(
        httpx.get(f'{playlist.rpartition("/")[0]}/{line}').raise_for_status().content
        for line in httpx.get(playlist).raise_for_status().text.splitlines()
        if line.endswith('.aac')
    )


@pytest.mark.slow
@needs_ffmpeg
def test_a_stream_is_there_before_it_is_made(tiny, served, tmp_path, monkeypatch):
    """In segments while it is made, and as a file in the end; its prompt may change, and it stops."""
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    sliders = [highest(tiny.sampling[name]) for name in ('cond_scale', 'temperature')]
    client = Client(served.address, verbose=False, analytics_enabled=False, download_files=False)
    job = client.submit(PROMPT, 7, None, *sliders, 5, api_name='/stream')
    note, playing, *_ = until(job.outputs, job)[0]
    assert note.startswith(f'Playing “{PROMPT}”: ')
    until(lambda: segments(playing['url']), job)
    note, _, score, file, _ = job.result(300)
    assert (note, score) == ('All 7 s are made.', '**What was played** · seed 5')
    made, rate = soundfile.read(io.BytesIO(httpx.get(file['url']).content), dtype='int16')
    expected = torch.cat(list(tiny.stream(PROMPT, seconds=7.0, seed=5)))
    assert rate == RATE
    assert np.abs(made.astype(int) - as_written(expected)).max() <= 1
    with av.open(io.BytesIO(segments(job.outputs()[0][1]['url'])), format='aac') as container:
        heard = np.concatenate([it.to_ndarray()[0] for it in container.decode(audio=0)])[1024:]  # what AAC begins with
    assert len(made) <= len(heard) < len(made) + 2048
    assert np.corrcoef(heard[: len(made)], made)[0, 1] > 0.95
    assert nothing_plays(served.app)

    hum = tmp_path / 'hum.wav'
    soundfile.write(hum, expected[:RATE].numpy(), RATE, subtype='FLOAT')
    drums = dict(headers=['weight', 'prompt'], data=[[0.5, 'drums']], metadata=None)
    given = handle_file(hum), 1, drums, handle_file(hum), 0.3
    job = client.submit(PROMPT, 60, None, *sliders, 5, '', *given, api_name='/stream')
    until(job.outputs, job)
    with pytest.raises(AppError, match='music is playing here already; stop it first'):
        client.predict(PROMPT, 60, None, *sliders, 5, api_name='/stream')
    client.predict('a fast flute', 0.5, drums, api_name='/change')
    until(lambda: job.outputs()[-1][0].startswith('Playing “0.5 a fast flute + 0.5 drums”: '), job)
    assert job.outputs()[0][0].startswith(f'Playing “1 {PROMPT} + 0.5 drums + 0.3 hum.wav”: ')
    client.predict(api_name='/stop')
    note, _, _, file, _ = job.result(60)
    made, _ = soundfile.read(io.BytesIO(httpx.get(file['url']).content), dtype='int16')
    assert note == f'Stopped after {len(made) / RATE:.1f} of 60 s.'
    assert len(made) < 40 * RATE
    mix = Mix([(1.0, PROMPT), (0.5, 'drums'), (0.3, hum)])
    first = next(tiny.stream(mix, seconds=60.0, seed=5, melody=hum))
    assert np.abs(made[: len(first)].astype(int) - as_written(first)).max() <= 1
    assert nothing_plays(served.app)

    client.predict(api_name='/stop')  # nothing plays, and what comes next is not stopped
    for given, message in (((' ', 9), 'the prompt is empty'), ((PROMPT, 601), 'is greater than maximum value 600')):
        with pytest.raises(AppError, match=message):
            client.predict(*given, None, *sliders, 5, api_name='/stream')
    with pytest.raises(AppError, match='nothing plays here whose prompt could change'):
        client.predict('a fast flute', api_name='/change')
    monkeypatch.setenv('PATH', '')
    with pytest.raises(AppError, match='the page needs FFmpeg, which is not on its machine'):
        client.predict(PROMPT, 9, None, *sliders, 5, api_name='/stream')


@pytest.mark.slow
@needs_ffmpeg
def test_a_closed_page_has_shown_what_was_played(tiny, tmp_path, monkeypatch):
    from gradio_client import Client

    def slowly(*arguments):
        time.sleep(2.0)
        write_clip(*arguments)

    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path))
    monkeypatch.setattr('musiclm_pytorch.inference.app.write_clip', slowly)
    monkeypatch.setattr('musiclm_pytorch.inference.app.ANSWERING', 3.0)  # however busy the machine is
    monkeypatch.setattr('musiclm_pytorch.inference.live.LAST_STEP', None)
    app = create_app(tiny)
    client = Client(launch_app(app, port=free_port()), verbose=False, analytics_enabled=False, download_files=False)
    job = client.submit(PROMPT, 60, None, api_name='/stream')
    until(job.outputs, job)
    close_app(app)
    note, _, score, _, picture = job.result(60)
    assert note.startswith('Stopped after ')
    assert score.startswith('**What was played**')
    assert picture['value']['path'].endswith('.png')  # which goes with the page


@pytest.mark.slow
def test_a_program_stops_the_piece_that_is_made_for_it_and_no_other(served):
    from gradio_client import Client
    from gradio_client.utils import Status

    how = dict(verbose=False, analytics_enabled=False, download_files=False)
    own, other = (Client(served.address, **how) for _ in range(2))
    job = own.submit(PROMPT, 8, None, None, 4, api_name='/generate')
    until(lambda: job.status().code is Status.PROGRESS, job)
    other.predict(api_name='/stop')
    time.sleep(1.0)
    assert not job.done()
    own.predict(api_name='/stop')
    assert job.result(60)[0].startswith('Stopped')


# the page in a browser


class Served:
    """A page at an address, and the addresses beyond this machine that its process turned to."""

    def __init__(self, address):
        self.address, self.strangers, self.watching = address, [], True

    def audit(self, event, arguments):
        if self.watching and event in ('socket.connect', 'socket.getaddrinfo'):
            where = arguments[1] if event == 'socket.connect' else arguments
            host = where[0] if isinstance(where, tuple) else None  # others are paths of local sockets
            if host is not None and str(host) not in ('127.0.0.1', 'localhost', '::1', "b'localhost'"):
                who = ''.join(traceback.format_stack(limit=12))
                self.strangers.append(f'{host}, by thread {threading.current_thread().name}:\n{who}')


@pytest.fixture(scope='module')
def served(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('GRADIO_TEMP_DIR', str(tmp_path_factory.mktemp('made')))
        port = free_port()
        it = Served(f'http://127.0.0.1:{port}/')
        sys.addaudithook(it.audit)  # for as long as the process lives, hence `watching`
        it.app = app = create_app(tiny, name='a_tiny_<model>', max_seconds=8.0, max_samples=4)
        assert launch_app(app, port=port) == it.address
        yield it
        it.watching = False
        app.close(verbose=False)


@pytest.fixture(scope='module')
def browser():
    names = ('chromium', 'chromium-browser', 'google-chrome')
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f'no browser to look at the page with: none of {", ".join(names)} is installed')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(served, browser):
    page = browser.new_page(viewport=dict(width=1280, height=900))
    page.set_default_timeout(60_000)
    page.asked = []
    page.on('request', lambda request: page.asked.append(request.url))
    page.goto(served.address)
    page.wait_for_selector('#generate')
    yield page
    page.close()


def fill(page, name, value):
    """Type into the number box of a slider, or into a number."""
    box = page.locator(f'#{name} input[type=number]')
    box.fill(str(value))
    box.press('Tab')


def type_into(page, row, column, text, enter=True, table='story'):
    """Into a cell of a table, as a double click opens it; without Enter, the cell stays open."""
    cell = page.locator(f'#{table} [data-row="{row}"][data-col="{column}"]:visible')
    cell.dblclick()
    cell.locator('textarea').fill(text)
    if not enter:
        return
    cell.locator('textarea').press('Enter')
    cell.locator('span[data-editable]', has_text=re.compile(f'^{re.escape(text)}$')).wait_for()


def shown(page, count):
    """Scores, sounds and the pictures' widths of the samples that are on the page, once there are `count`."""
    page.wait_for_function(
        """count => {
            const samples = [...document.querySelectorAll('.sample')].filter(it => it.offsetParent)
            return samples.length == count && samples.every(it => {
                const [audio, image] = [it.querySelector('audio'), it.querySelector('img')]
                return audio?.src && audio.readyState >= 1 && image?.complete && image.naturalWidth
            })
        }""",
        arg=count,
    )
    samples = page.locator('.sample:visible')
    scores = [float(it.split('MuLaN:')[1].split('·')[0]) for it in samples.locator('.block.score').all_inner_texts()]
    sources = samples.locator('audio').evaluate_all('all => all.map(it => it.src)')
    widths = samples.locator('img').evaluate_all('all => all.map(it => it.naturalWidth)')
    waves = []
    for source in sources:
        wave, rate = soundfile.read(io.BytesIO(page.request.get(source).body()), dtype='int16')
        assert rate == RATE
        waves.append(wave)
    return scores, waves, widths


def fits(page, width):
    """What was made is on a screen of this width, and the page has scrolled to it."""
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.wait_for_function("document.querySelector('#note').getBoundingClientRect().top < innerHeight")


def as_written(wave):
    """What a wave is in a file of 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, wave.clamp(-1, 1).numpy(), RATE, format='WAV')
    return soundfile.read(io.BytesIO(file.getvalue()), dtype='int16')[0]


@pytest.mark.slow
def test_from_the_click_to_the_sound(tiny, served, page):
    assert page.inner_text('#about p') == f'Words to music, by the model a_tiny_<model>. It knows {tiny.knows}.'
    page.fill('#prompt textarea', PROMPT)
    fill(page, 'seconds', 1.5)
    fill(page, 'samples', 3)
    fill(page, 'seed', 7)
    page.click('#generate')
    scores, waves, widths = shown(page, 3)
    fits(page, 1280)

    music = tiny(PROMPT, 3, seconds=1.5, seed=7, return_all=True, return_scores=True)
    order = music.scores[0].argsort(descending=True)
    assert scores == pytest.approx(music.scores[0, order].tolist(), abs=6e-4)
    assert scores == sorted(scores, reverse=True)
    for wave, index in zip(waves, order):
        assert abs(wave.astype(int) - as_written(music.waves[0, index])).max() <= 1
    assert all(width > 300 for width in widths)
    assert {int(it) for it in re.findall(r'seed (\d+)', page.inner_text('body'))} == {7, 8, 9}

    # it plays, and is downloaded under a name that tells what it is
    player = page.locator('.sample audio').first
    assert player.evaluate('it => it.duration') == pytest.approx(1.5, abs=0.01)
    player.evaluate('it => it.play()')
    page.wait_for_function("document.querySelector('.sample audio').currentTime > 0.2")
    with page.expect_download() as download:
        page.locator('.sample [data-testid=download-link]').first.click()
    assert download.value.suggested_filename == 'a-slow-low-organ-1.wav'
    assert np.array_equal(soundfile.read(download.value.path(), dtype='int16')[0], waves[0])

    # fewer samples hide what is left over; another seed is another piece
    page.click('#another')
    page.wait_for_function("document.querySelector('#seed input').value != '7'")
    fill(page, 'samples', 1)
    page.click('#generate')
    _, others, _ = shown(page, 1)
    assert not any(np.array_equal(others[0], wave) for wave in waves)

    assert all(url.startswith((served.address, 'data:', 'blob:')) for url in page.asked)
    assert not served.strangers, '\n'.join(served.strangers)


@pytest.mark.slow
def test_a_story_is_typed_and_told(tiny, page, tmp_path):
    page.click('button[role=tab]:has-text("Story")')
    fill(page, 'samples', 2)
    fill(page, 'seed', 3)
    soundfile.write(tmp_path / 'hum.wav', 0.2 * np.random.default_rng(1).standard_normal(32000), RATE)
    page.set_input_files('#story-files input[type=file]', tmp_path / 'hum.wav')
    page.wait_for_selector('#story-files :text("hum")')
    mixed = '50% drums + 50% @hum.wav'
    for row, (seconds, prompt) in enumerate([('0.5', PROMPT), ('1', 'a fast flute'), ('0.8', mixed)]):
        for column, text in enumerate((seconds, prompt)):
            type_into(page, row, column, text, enter=text != mixed)
    page.click('#tell')
    scores, waves, widths = shown(page, 2)
    mix = Mix([(0.5, 'drums'), (0.5, tmp_path / 'hum.wav')])
    music = tiny([(0.5, PROMPT), (1, 'a fast flute'), (0.8, mix)], 2, seed=3, return_all=True, return_scores=True)
    order = music.scores[0].argsort(descending=True)
    assert scores == pytest.approx(music.scores[0, order].tolist(), abs=6e-4)
    for wave, index in zip(waves, order):
        assert abs(wave.astype(int) - as_written(music.waves[0, index])).max() <= 1
    assert all(width > 300 for width in widths)


@pytest.mark.slow
def test_errors_are_shown_in_words(page):
    page.fill('#prompt textarea', '  ')
    page.click('#generate')
    page.wait_for_selector('text=the prompt is empty; say what the music is like')
    page.click('button[role=tab]:has-text("Story")')
    type_into(page, 0, 0, '100')
    page.click('#tell')
    page.wait_for_selector('text=the music may last up to 8 seconds, got 103')
    type_into(page, 0, 0, '-1')
    page.click('#tell')
    page.wait_for_selector("text=row 1 of the story needs its seconds, a number above 0, got '-1'")
    assert page.locator('.sample:visible').count() == 0


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::musiclm_pytorch.PromptWarning')
def test_stop_ends_the_work_and_shows_what_is_done(page, monkeypatch):
    page.set_viewport_size(dict(width=360, height=800))
    fill(page, 'seconds', 1)
    fill(page, 'samples', 1)
    page.click('#generate')
    shown(page, 1)
    fits(page, 360)
    made, calls = MusicLM.forward, []

    def slow_from_the_second_round_on(self, *arguments, **given):
        calls.append(given['seed'])
        for step in range(300 if len(calls) > 1 else 0):
            given['progress'](step + 1, 300)
            time.sleep(0.1)
        return made(self, *arguments, **given)

    monkeypatch.setattr(MusicLM, 'forward', slow_from_the_second_round_on)
    page.fill('#prompt textarea', 'baroque harpsichord <i>')
    fill(page, 'samples', 4)
    fill(page, 'seed', 20)
    page.click('#generate')
    page.wait_for_selector('text=round 2 of 2')
    assert page.locator('.sample:visible').count() == 0  # those of the last prompt are gone
    assert page.locator('#generate').is_disabled()
    page.click('#stop')
    shown(page, 2)
    assert calls == [20, 22]
    note = page.inner_text('#note')
    assert 'Stopped, with 2 of 4 done' in note
    assert 'The model does not know baroque, harpsichord; it knows piano, guitar' in note
    page.wait_for_selector('#generate:not([disabled])')
    assert not page.locator('#stop').is_visible()


@pytest.mark.slow
@needs_ffmpeg
def test_it_plays_while_it_is_made(served, page):
    page.set_viewport_size(dict(width=400, height=900))
    page.click('button[role=tab]:has-text("Stream")')
    page.fill('#live-prompt textarea', PROMPT)
    page.click('#live-mix button:has-text("Mix with sounds or other words")')
    type_into(page, 1, 1, 'drums', table='live-mix-words')
    page.locator('button:has-text("Follow a melody"):visible').click()
    record(page, 'live-melody')
    assert page.evaluate('document.documentElement.scrollWidth') <= 400
    page.click('#play')
    page.wait_for_selector(f'text=Playing “1 {PROMPT} + 1 drums”')
    page.wait_for_function("document.querySelector('#live audio')?.currentTime > 0.5")
    assert page.locator('#play').is_disabled()
    assert list(served.app.live.playing)
    fits(page, 400)
    page.fill('#live-prompt textarea', 'a fast flute')
    page.click('#change')
    page.wait_for_selector('text=Playing “1 a fast flute + 1 drums”')
    page.click('#stop')
    page.wait_for_selector('text=Stopped after')
    assert page.evaluate("document.querySelector('#live audio').paused")
    page.wait_for_selector('#play:not([disabled])')
    assert not page.locator('#stop').is_visible()
    assert not page.locator('#change').is_visible()
    page.wait_for_function("document.querySelector('.sample audio').readyState >= 1")
    assert page.locator('.sample:visible').count() == 1

    page.click('#play')
    page.wait_for_selector('text=s are made.')
    assert list(served.app.live.playing)
    page.goto('about:blank')  # whoever leaves hears nothing
    assert nothing_plays(served.app)
    assert all(url.startswith((served.address, 'data:', 'blob:', 'about:')) for url in page.asked)


def record(page, name):
    """Beeps, for some seconds, by the recorder of this name; the file that the page has of them."""
    known = set(Path(os.environ['GRADIO_TEMP_DIR']).glob('*/audio*.wav'))
    for _ in range(3):  # a busy browser may have heard nothing when it is told to stop, and has no file then
        page.click(f'#{name} .record-button')
        page.wait_for_timeout(1500)
        page.click(f'#{name} .stop-button')
        for _ in range(150):
            if uploaded := set(Path(os.environ['GRADIO_TEMP_DIR']).glob('*/audio*.wav')) - known:
                page.wait_for_timeout(1000)  # for the page to know it
                return uploaded.pop()
            page.wait_for_timeout(100)
    pytest.fail(f'nothing was recorded by {name}')


@pytest.mark.slow
def test_what_is_recorded_is_gone_on_from_and_mixed(tiny, page):
    page.click('button:has-text("Follow a melody")')
    page.wait_for_selector('#melody .record-button')
    assert not page.locator('#no-melody').is_visible()
    page.locator('button:has-text("Go on from a recording"):visible').click()
    prime = record(page, 'prime')
    page.click('#mix button:has-text("Mix with sounds or other words")')
    sound = record(page, 'mix-sound-1')
    fill(page, 'mix-weight-1', 0.5)
    fill(page, 'seconds', 8)
    fill(page, 'samples', 1)
    page.click('#generate')
    scores, waves, _ = shown(page, 1)
    recorded, rate = soundfile.read(prime, dtype='float32', always_2d=True)
    assert 1 < len(recorded) / rate < 7
    given = resample(torch.from_numpy(recorded.mean(axis=1))[None], rate, RATE)[0][: -RATE // 10]
    assert given.abs().max() > 0.01  # the beeps
    assert np.abs(as_written(given).astype(int) - waves[0][: len(given)]).max() <= 2
    prompt = Mix([(1.0, EXAMPLES[0]), (0.5, sound)])
    expected = tiny(prompt, seconds=8.0, seed=0, prime_wave_path=prime, return_scores=True)
    assert scores == pytest.approx(expected.scores[0].tolist(), abs=6e-4)
    assert np.abs(as_written(expected.waves[0]).astype(int) - waves[0]).max() <= 1


@pytest.mark.slow
def test_one_request_at_a_time_makes_music(served, monkeypatch):
    from gradio_client import Client

    made, now, most = MusicLM.forward, [], []

    def counted(*arguments, **keywords):
        now.append(threading.get_ident())
        most.append(len(now))
        time.sleep(0.3)
        try:
            return made(*arguments, **keywords)
        finally:
            now.pop()

    monkeypatch.setattr(MusicLM, 'forward', counted)
    client = Client(served.address, verbose=False, analytics_enabled=False, download_files=False)
    jobs = [client.submit(PROMPT, 1, None, None, 1, 2, 0.8, seed, api_name='/generate') for seed in (1, 2)]
    story = dict(headers=['seconds', 'prompt'], data=[[1, 'a flute']], metadata=None)
    jobs.append(client.submit(story, 1, 2, 0.8, 3, api_name='/story'))
    for job in jobs:
        job.result(timeout=300)
    assert most == [1, 1, 1]
