"""A web page that makes music: words, or a story, to players, spectrograms and scores, and music that plays while it is
made. By Gradio (extra `app`)."""

from __future__ import annotations

import contextlib
import html
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from musiclm_pytorch.audiolm.generation_args import StopGeneration
from musiclm_pytorch.extras import needing
from musiclm_pytorch.gallery import Clip, file_name, write_clip
from musiclm_pytorch.inference.layout import CSS, lay_out
from musiclm_pytorch.inference.live import LiveMusic
from musiclm_pytorch.inference.music_maker import MusicMaker, read_mix, title_of
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.waves import bent, sound_bytes

if TYPE_CHECKING:
    import gradio

STREAMS = 2  # that play at once: two CPU cores make as many without a gap
MAX_WAITING = 16  # requests in line; who comes after them is told so
ANSWERING = 0.5  # seconds for answers to go out, and for those in line to have their turn
MAKING = 0.95  # of the bar; the rest is drawing
KEEP_FILES = 24 * 3600  # seconds for which what was made can be played and downloaded
MAX_UPLOAD = '50mb'
# on a narrow screen the music stands below what was clicked
SCROLL = "(...given) => { if (innerWidth < 768) document.getElementById('note').scrollIntoView(); return given }"
# what the browser has of a stream is not played to its end
PAUSE = "() => document.querySelectorAll('#live audio').forEach(it => it.pause())"


def create_app(
    musiclm: MusicLM,
    *,
    title: str = 'MusicLM',
    name: str | None = None,
    max_seconds: float = 30.0,
    max_samples: int = 8,
    max_stream_seconds: float = 600.0,
) -> gradio.Blocks:
    """The page; `launch_app` serves it.

    One request at a time makes pieces, and `STREAMS` at a time play; the others wait in line. gradio_client finds
    `/generate`, `/story`, `/stream`, whose outputs are music as it is made, `/change`, which concerns the stream that
    the same client has begun, and `/stop`, which ends whatever is being made for that client, and nothing of others.

    Args:
        musiclm: in eval mode, on its device.
        title: the heading.
        name: of the model, told below the heading with what it knows (`MusicLM.knows`).
        max_seconds, max_samples: the most that may be asked for at once.
        max_stream_seconds: the longest stream.

    Raises:
        ImportError: without Gradio.
        ValueError: limits that are not positive.
    """
    gr = import_gradio()
    followed = gr.Progress()  # Gradio finds it by being a default, and gives each call its own
    most = dict(max_seconds=max_seconds, max_samples=max_samples, max_stream_seconds=max_stream_seconds)
    maker = MusicMaker(musiclm, **most)
    live = LiveMusic(maker)

    # sessions whose page waits for what is being made for them, and those that wait no more
    waiting: set[str] = set()
    stopping: set[str] = set()
    at_work, closing = threading.Lock(), threading.Event()

    # what is None by default here and on the page, programs may leave out

    def generate(
        request,
        prompt,
        seconds,
        prime,
        melody,
        num_samples,
        cond_scale,
        temperature,
        seed,
        negative,
        weight=1.0,
        other_words=(),
        sound=None,
        sound_weight=1.0,
        other_sound=None,
        other_weight=1.0,
        progress=followed,
    ):
        def make(**how):
            mixed = read_mix(prompt, weight, other_words, (sound, sound_weight), (other_sound, other_weight))
            return maker.from_prompt(mixed, seconds, prime, melody, **how)

        return show(make, (num_samples, cond_scale, temperature, seed, negative), request, progress)

    def tell(request, rows, num_samples, cond_scale, temperature, seed, negative, named=None, progress=followed):
        settings = num_samples, cond_scale, temperature, seed, negative
        return show(partial(maker.from_story, rows, named or ()), settings, request, progress)

    def play(
        request,
        prompt,
        seconds,
        prime,
        cond_scale,
        temperature,
        seed,
        negative,
        melody=None,
        weight=1.0,
        other_words=(),
        sound=None,
        sound_weight=1.0,
        other_sound=None,
        other_weight=1.0,
    ):
        """First of all outputs, then of those that change; what was played comes last, as one piece."""
        if shutil.which('ffmpeg') is None:
            told = 'To play music while it is made, the page needs FFmpeg, which is not on its machine.'
            raise gr.Error(told, duration=None, print_exception=False)
        how = dict(cond_scale=cond_scale, temperature=temperature, seed=seed, negative=negative)
        rate, waves, prompts, samples = musiclm.sample_rate, [], [], 0
        with live.answering(), refusing():
            mixed = read_mix(prompt, weight, other_words, (sound, sound_weight), (other_sound, other_weight))
            playing = live.play(request.session_hash, mixed, seconds, prime, melody, **how)
            with contextlib.closing(playing):
                for wave, own in playing:
                    if own not in prompts[-1:]:
                        prompts.append(own)
                    waves.append(wave)
                    samples += len(wave)
                    note = f'Playing “{html.escape(title_of(own))}”: {samples / rate:.0f} s are made.'
                    told = with_remark(note, maker.remarks([own], negative))
                    # a part by itself is not made softer than its neighbours
                    yield [told, sound_bytes(bent(wave), rate), *[gr.skip()] * 4]
                    if request.session_hash in stopping:
                        break
            title = ' – '.join(map(title_of, prompts))
            clip = Clip(file_name(title), torch.cat(waves), 'what was played', f'seed {int(seed)}', title)
            note = f'Stopped after {samples / rate:.1f} of {seconds:g} s.'
            if samples == round(seconds * rate):
                note = f'All {seconds:g} s are made.'
            yield [with_remark(note, maker.remarks(prompts, negative)), gr.skip(), *kept([clip])]

    def change(
        request,
        prompt,
        weight=1.0,
        other_words=(),
        sound=None,
        sound_weight=1.0,
        other_sound=None,
        other_weight=1.0,
    ):
        with refusing():
            mixed = read_mix(prompt, weight, other_words, (sound, sound_weight), (other_sound, other_weight))
            live.set_prompt(request.session_hash, mixed)

    def show(
        make: Callable[..., list[Clip]], settings: tuple, request: gradio.Request, progress: gradio.Progress
    ) -> list[Any]:
        """What becomes of all outputs. The files lie where Gradio serves and, in time, deletes them."""

        def report(share: float, what: str) -> None:
            if closing.is_set() or request.session_hash in stopping:
                raise StopGeneration
            progress(MAKING * share, desc=what)

        begin = time.perf_counter()
        names = ('num_samples', 'cond_scale', 'temperature', 'seed', 'negative')
        if closing.is_set():
            raise gr.Error('The page is being closed.', duration=None, print_exception=False)
        at_work.acquire()  # one at a time as it is: for `close_app`
        waiting.add(request.session_hash)  # also a program, which has not called `begin`
        try:
            with refusing():
                clips = make(report=report, **dict(zip(names, settings)))
                shown = kept(clips, progress)
        finally:
            at_work.release()
            for sessions in (waiting, stopping):
                sessions.discard(request.session_hash)
        took = time.perf_counter() - begin
        return [noted(clips, int(settings[0]), took), *shown, *[*hidden] * (max_samples - len(clips))]

    def kept(clips: list[Clip], progress: Callable[..., Any] = lambda *_, **__: None) -> list[Any]:
        """What becomes of the outputs of so many pieces."""
        folder, shown = Path(it.heard.GRADIO_CACHE) / secrets.token_hex(16), []
        folder.mkdir(parents=True)
        for place, clip in enumerate(clips):
            progress(MAKING + (1 - MAKING) * place / len(clips), desc='drawing')
            write_clip(folder, clip, musiclm.sample_rate)
            path = folder / clip.name
            shown += [
                gr.Column(visible=True),
                f'**{clip.caption.capitalize()}** · {clip.note}',
                f'{path}.wav',
                gr.Image(f'{path}.png', alt_text=f'spectrogram of {clip.caption}: {clip.section}'),
            ]
        return shown

    @contextlib.contextmanager
    def refusing() -> Iterator[None]:
        """What someone asked for that cannot be is told in words."""
        try:
            yield
        except (ValueError, TypeError, OSError) as error:
            told = html.escape(without_folders(str(error)))
            raise gr.Error(told, duration=None, print_exception=False) from error

    def noted(clips: list[Clip], wanted: int, took: float) -> str:
        if not clips:
            return 'Stopped before a piece was done.'
        length = len(clips[0].wave) / musiclm.sample_rate
        stopped = f'Stopped, with {len(clips)} of {wanted} done: ' if len(clips) < wanted else ''
        note = f'{stopped}{len(clips)} × {length:g} s, made in {took:.1f} s. MuLaN likes the first best.'
        return with_remark(note, clips[0].remark)

    def begin(request, plays=False):
        """Nothing of the last prompt stays under the new one."""
        waiting.add(request.session_hash)
        stopping.discard(request.session_hash)
        player = gr.Audio(value=None, visible=plays)
        idle = [gr.Button(interactive=False)] * 3
        halting = gr.Button('Stop', visible=True, interactive=True)
        return ['Making music …', player, *[*hidden] * max_samples, halting, gr.Button(visible=plays), *idle]

    def begin_to_play(request):
        return begin(request, plays=True)

    def stop(request):
        if request.session_hash in waiting:  # also for its turn
            stopping.add(request.session_hash)
        live.stop(request.session_hash)
        return gr.Button('Stopping …', interactive=False)

    def end(request):
        waiting.discard(request.session_hash)
        return [*[gr.Button(visible=False)] * 2, *[gr.Button(interactive=True)] * 3]

    for function in (generate, tell, play, change, begin, begin_to_play, stop, end):
        function.__annotations__['request'] = gr.Request  # by which Gradio finds it
    hidden = gr.Column(visible=False), None, None, None

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, KEEP_FILES)) as page:
        it = lay_out(gr, musiclm, title=title, name=name, **most)
        outputs, pieces = it.outputs, [it.note, *it.outputs[2:]]
        buttons, aside = [it.halt, it.other, it.go, it.go_on, it.go_live], dict(queue=False, show_progress='hidden')

        def connect(triggers, first, make, inputs, changed, **how):
            made = gr.on(
                triggers, first, outputs=[*outputs, *buttons], js=SCROLL, **aside, api_visibility='private'
            ).then(make, inputs, changed, show_progress_on=it.note, **how)
            for ended in (made.success, made.failure):
                ended(end, outputs=buttons, **aside, api_visibility='private')

        # what came later stands behind the rest, so that calls of programs stay what they were
        alone = dict(concurrency_id='music', concurrency_limit=1)
        inputs = [it.prompt, it.seconds, it.prime, it.melody, *it.settings, *it.mixed]
        connect([it.go.click, it.prompt.submit], begin, generate, inputs, pieces, api_name='generate', **alone)
        connect([it.go_on.click], begin, tell, [it.rows, *it.settings, it.named], pieces, api_name='story', **alone)
        few = dict(concurrency_id='streams', concurrency_limit=STREAMS, show_progress='hidden')
        inputs = [it.live_prompt, it.live_seconds, it.live_prime, *it.settings[1:], it.live_melody, *it.live_mixed]
        connect([it.go_live.click], begin_to_play, play, inputs, outputs[:6], api_name='stream', **few)
        it.other.click(change, [it.live_prompt, *it.live_mixed], api_name='change', **aside)
        it.halt.click(stop, outputs=it.halt, js=PAUSE, api_name='stop', **aside)
        it.another.click(lambda: secrets.randbelow(2**31), outputs=it.seed, queue=False, api_visibility='private')
    page.at_work, page.closing, page.live = at_work, closing, live
    return page.queue(max_size=MAX_WAITING, api_open=False)


def launch_app(page: gradio.Blocks, *, host: str = '127.0.0.1', port: int = 7860, share: bool = False) -> str:
    """Serve the page from threads of its own; returns its address. `close_app` ends it.

    Args:
        page: from `create_app`.
        host, port: where it is served; '0.0.0.0' is every network that the machine is in.
        share: a public address as well, through Gradio's servers. Without it, nothing goes beyond `host`.

    Raises:
        ValueError: a port that cannot be.
        OSError: the port is taken, or the host is none of this machine.
    """
    gr = import_gradio()
    if not 0 < port < 65536:
        raise ValueError(f'port must lie between 1 and 65535, got {port}')
    font = ('system-ui', 'sans-serif')  # of the machine, so that no theme fetches one
    try:
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,  # what is not foreseen may tell of this machine
            inbrowser=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            max_file_size=MAX_UPLOAD,
            theme=gr.themes.Default(primary_hue='indigo', font=font, font_mono=font),
            css=CSS,
        )
    except OSError as error:
        raise OSError(f'cannot serve at {host}, port {port}, where something else may be; give another') from error
    return public or address


def close_app(page: gradio.Blocks) -> None:
    """End what `launch_app` began: the music that is being made or plays ends at its next step and shows what is done,
    which is waited for, and those in line are told. A thread at work would not outlive the end of the program."""
    page.closing.set()
    page.live.close()
    for _ in range(2):
        with page.at_work:
            time.sleep(ANSWERING)
    page.close(verbose=False)


def with_remark(note: str, remark: str) -> str:
    """In Markdown, with what there is to say of the prompts."""
    remark = html.escape(remark)
    return f'{note}\n\n**{remark[0].upper()}{remark[1:]}.**' if remark else note


def without_folders(text: str) -> str:
    """A message in which files are called by their names alone: where they lie concerns no visitor."""
    return re.sub(r'(?<![\w.:/])(?:/[^\s/\'",:;]+)+/(?=[^\s/\'",:;])', '', text)


def import_gradio() -> ModuleType:
    """Gradio, told before to look nothing up. Raises ImportError that names the extra."""
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    with needing('the web page needs gradio', 'app'):
        import gradio
    return gradio
