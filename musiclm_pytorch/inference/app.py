"""A web page that makes music: words, or a story, to players, spectrograms and scores. By Gradio (extra `app`)."""

from __future__ import annotations

import html
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from musiclm_pytorch.audiolm.sampling import StopGeneration
from musiclm_pytorch.extras import how_to_install
from musiclm_pytorch.gallery import Clip, write_clip
from musiclm_pytorch.inference.music_maker import MusicMaker, highest
from musiclm_pytorch.musiclm import MusicLM

if TYPE_CHECKING:
    import gradio

EXAMPLES = (
    'a fast happy flute melody',
    'a slow low organ in minor, with drums',
    'a bright high piano at a medium tempo',
)
STORY = [[3, 'a slow low organ'], [3, 'a fast high flute with drums'], [None, ''], [None, '']]
SHOWN_AT_FIRST = 4  # samples
MAX_WAITING = 16  # requests in line; who comes after them is told so
ANSWERING = 0.5  # seconds for answers to go out, and for those in line to have their turn
MAKING = 0.95  # of the bar; the rest is drawing
KEEP_FILES = 24 * 3600  # seconds for which what was made can be played and downloaded
MAX_UPLOAD = '50mb'
# on a narrow screen the music stands below what was clicked
SCROLL = "(...given) => { if (innerWidth < 768) document.getElementById('note').scrollIntoView(); return given }"
CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: auto !important }
.sample { gap: var(--spacing-sm) !important; margin-bottom: var(--spacing-xl) }
.sample audio { width: calc(100% - 36px) }
#note { min-height: 6rem }
#note .pending { opacity: 0 }
footer { display: none !important }
"""


def create_app(
    musiclm: MusicLM,
    *,
    title: str = 'MusicLM',
    name: str | None = None,
    max_seconds: float = 30.0,
    max_samples: int = 8,
) -> gradio.Blocks:
    """The page; `launch_app` serves it.

    One request at a time makes music, the others wait in line. gradio_client finds `/generate` and `/story`.

    Args:
        musiclm: in eval mode, on its device.
        title: the heading.
        name: of the model, told below the heading with what it knows (`MusicLM.knows`).
        max_seconds, max_samples: the most that may be asked for at once.

    Raises:
        ImportError: without Gradio.
        ValueError: limits that are not positive.
    """
    gr = import_gradio()
    followed = gr.Progress()  # Gradio finds it by being a default, and gives each call its own
    maker = MusicMaker(musiclm, max_seconds=max_seconds, max_samples=max_samples)

    stopping: set[str] = set()  # sessions that wait no more for what is being made for them
    at_work, closing = threading.Lock(), threading.Event()

    def generate(request, prompt, seconds, prime, *settings, progress=followed):
        return show(lambda **how: maker.from_prompt(prompt, seconds, prime, **how), settings, request, progress)

    def tell(request, rows, *settings, progress=followed):
        return show(lambda **how: maker.from_story(rows, **how), settings, request, progress)

    def show(
        make: Callable[..., list[Clip]], settings: tuple, request: gradio.Request, progress: gradio.Progress
    ) -> list[Any]:
        """What becomes of all outputs. The files lie where Gradio serves and, in time, deletes them."""

        def report(share: float, what: str) -> None:
            if closing.is_set() or request.session_hash in stopping:
                raise StopGeneration
            progress(MAKING * share, desc=what)

        begin = time.perf_counter()
        names = ('num_samples', 'cond_scale', 'temperature', 'seed')
        folder = Path(players[0].GRADIO_CACHE) / secrets.token_hex(16)
        shown = []
        if closing.is_set():
            raise gr.Error('The page is being closed.', duration=None, print_exception=False)
        at_work.acquire()  # one at a time as it is: for `close_app`
        try:
            clips = make(report=report, **dict(zip(names, settings)))
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
        except (ValueError, TypeError, OSError) as error:
            told = html.escape(without_folders(str(error)))
            raise gr.Error(told, duration=None, print_exception=False) from error
        finally:
            at_work.release()
            stopping.discard(request.session_hash)
        took = time.perf_counter() - begin
        return [noted(clips, int(settings[0]), took), *shown, *[*hidden] * (max_samples - len(clips))]

    def noted(clips: list[Clip], wanted: int, took: float) -> str:
        if not clips:
            return 'Stopped before a piece was done.'
        length = len(clips[0].wave) / musiclm.sample_rate
        stopped = f'Stopped, with {len(clips)} of {wanted} done: ' if len(clips) < wanted else ''
        note = f'{stopped}{len(clips)} × {length:g} s, made in {took:.1f} s. MuLaN likes the first best.'
        remark = html.escape(clips[0].remark)
        return f'{note}\n\n**{remark[0].upper()}{remark[1:]}.**' if remark else note

    def begin(request):
        """Nothing of the last prompt stays under the new one."""
        stopping.discard(request.session_hash)
        idle = [gr.Button(interactive=False)] * 2
        return ['Making music …', *[*hidden] * max_samples, gr.Button('Stop', visible=True, interactive=True), *idle]

    def stop(request):
        stopping.add(request.session_hash)
        return gr.Button('Stopping …', interactive=False)

    def end():
        return [gr.Button(visible=False), *[gr.Button(interactive=True)] * 2]

    for function in (generate, tell, begin, stop):
        function.__annotations__['request'] = gr.Request  # by which Gradio finds it
    hidden = gr.Column(visible=False), None, None, None

    plain = gr.WaveformOptions(show_recording_waveform=False)  # the browser's own player
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, KEEP_FILES)) as page:
        gr.Markdown(f'# {title}\n{who_plays(name, musiclm.knows)}', elem_id='about')
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                with gr.Tab('Prompt'):
                    prompt = gr.Textbox(label='What is the music like?', value=EXAMPLES[0], lines=2, elem_id='prompt')
                    gr.Examples([[it] for it in EXAMPLES], prompt, label='For example', cache_examples=False)
                    seconds = gr.Slider(
                        min(1, max_seconds),
                        max_seconds,
                        min(5, max_seconds),
                        step=0.5,
                        label='Seconds',
                        elem_id='seconds',
                    )
                    with gr.Accordion('Go on from a recording', open=False):
                        prime = gr.Audio(
                            label='The music begins with it, and the seconds count it',
                            type='filepath',
                            sources='upload',
                        )
                    go = gr.Button('Make music', variant='primary', elem_id='generate')
                with gr.Tab('Story'):
                    gr.Markdown('One piece, whose prompt changes on the way.')
                    rows = gr.Dataframe(
                        STORY,
                        headers=['seconds', 'prompt'],
                        datatype=['number', 'str'],
                        column_count=2,
                        column_widths=['25%', '75%'],
                        type='array',
                        interactive=True,
                        show_label=False,
                        elem_id='story',
                    )
                    go_on = gr.Button('Tell the story', variant='primary', elem_id='tell')
                with gr.Group():
                    num_samples = gr.Slider(
                        1, max_samples, min(SHOWN_AT_FIRST, max_samples), step=1, label='Samples', elem_id='samples'
                    )
                    own = highest(musiclm.sampling['cond_scale'])
                    cond_scale = gr.Slider(
                        1, max(10, own), own, step=0.1, label='Guidance', info='how closely to follow the words'
                    )
                    seed = gr.Number(0, precision=0, label='Seed', info='the same seed, the same music', elem_id='seed')
                    another = gr.Button('Another seed', size='sm', elem_id='another')
                with gr.Accordion('More', open=False):
                    own = highest(musiclm.sampling['temperature'])
                    temperature = gr.Slider(
                        0, max(1.5, own), own, step=0.05, label='Temperature', info='how much is left to chance'
                    )
            with gr.Column(scale=3, min_width=320):
                note = gr.Markdown('The music appears here.', elem_id='note')
                halt = gr.Button('Stop', variant='stop', size='sm', visible=False, elem_id='stop')
                players, outputs = [], [note]
                for _ in range(max_samples):
                    with gr.Column(visible=False, elem_classes='sample') as column:
                        score = gr.Markdown(elem_classes='score')
                        player = gr.Audio(
                            show_label=False,
                            type='filepath',
                            interactive=False,
                            buttons=['download'],
                            waveform_options=plain,
                        )
                        picture = gr.Image(
                            show_label=False, type='filepath', format='png', interactive=False, buttons=['fullscreen']
                        )
                    players.append(player)
                    outputs += [column, score, player, picture]

        settings = [num_samples, cond_scale, temperature, seed]
        buttons, aside = [halt, go, go_on], dict(queue=False, show_progress='hidden', api_visibility='private')
        for triggers, make, inputs, name in (
            ([go.click, prompt.submit], generate, [prompt, seconds, prime], 'generate'),
            ([go_on.click], tell, [rows], 'story'),
        ):
            made = gr.on(triggers, begin, outputs=[*outputs, *buttons], js=SCROLL, **aside).then(
                make,
                [*inputs, *settings],
                outputs,
                api_name=name,
                concurrency_id='music',
                concurrency_limit=1,
                show_progress_on=note,
            )
            for ended in (made.success, made.failure):
                ended(end, outputs=buttons, **aside)
        halt.click(stop, outputs=halt, **aside)
        another.click(lambda: secrets.randbelow(2**31), outputs=seed, queue=False, api_visibility='private')
    page.at_work, page.closing = at_work, closing
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
    """End what `launch_app` began: the music that is being made ends at its next step and shows what is done, and those
    who wait are told. A thread at work would not outlive the end of the program."""
    page.closing.set()
    for _ in range(2):
        with page.at_work:
            time.sleep(ANSWERING)
    page.close(verbose=False)


def who_plays(name: str | None, knows: str | None) -> str:
    """The line below the heading, in Markdown: which model makes the music, and what it knows."""
    by = f', by the model `{name}`' if name else ''  # in a code span, nothing is markup
    return f'Words to music{by}.' + (f' It knows {html.escape(knows, quote=False)}.' if knows else '')


def without_folders(text: str) -> str:
    """A message in which files are called by their names alone: where they lie concerns no visitor."""
    return re.sub(r'(?<![\w.:/])(?:/[^\s/\'",:;]+)+/(?=[^\s/\'",:;])', '', text)


def import_gradio() -> ModuleType:
    """Gradio, told before to look nothing up. Raises ImportError that names the extra."""
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f'the web page needs gradio: {how_to_install("app")}') from error
    return gradio
