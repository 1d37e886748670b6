"""What the page shows, before anything happens: its tabs, settings, recorders and places for what is made."""

from __future__ import annotations

import html
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from musiclm_pytorch.inference.music_maker import highest
from musiclm_pytorch.musiclm import MusicLM

if TYPE_CHECKING:
    import gradio

EXAMPLES = (
    'a fast happy flute melody',
    'a slow low organ in minor, with drums',
    'a high piano at a medium tempo',
)
STORY = [[3, 'a slow low organ'], [3, 'a fast high flute with drums'], [None, ''], [None, '']]
TOLD = (
    'One piece, whose prompt changes on the way. A row may also say “70% a calm piano + 30% drums”, or name a file '
    'that is given below, a sound to be like or a latent of MuLaN: “@hum.wav”.'
)
MIX = [[1, ''], [1, '']]
SHOWN_AT_FIRST = 4  # samples
NO_MELODY = (
    'This model was trained without melodies and cannot follow one; `musiclm train melody` is the first step to one '
    'that does.'
)
MIXED = 'The words above and what is given here make one prompt together, each by its weight. Words may be left out.'
CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: auto !important }
.sample { gap: var(--spacing-sm) !important; margin-bottom: var(--spacing-xl) }
.sample audio { width: calc(100% - 36px) }
#note { min-height: 6rem }
#note .pending { opacity: 0 }
footer { display: none !important }
"""


def lay_out(
    gr: ModuleType,
    musiclm: MusicLM,
    *,
    title: str,
    name: str | None,
    max_seconds: float,
    max_samples: int,
    max_stream_seconds: float,
) -> SimpleNamespace:
    """The components of the page, by name, inside of the `gr.Blocks` that is open; arguments as of `create_app`.

    `settings` are those of all tabs, `mixed` and `live_mixed` what `read_mix` takes beside the words. `outputs` are the
    note, the player of a stream and, four for each sample, a column with its score, player and picture.
    """
    has_melodies = musiclm.mulan_embed_quantizer.melody is not None

    def words(first: str, **how: Any) -> gradio.Textbox:
        return gr.Textbox(label='What is the music like?', value=first, lines=2, **how)

    def duration(least: float, first: float, most: float, **how: Any) -> gradio.Slider:
        return gr.Slider(min(least, most), most, min(first, most), label='Seconds', **how)

    def recorder(what: str, **how: Any) -> gradio.Audio:
        return gr.Audio(label=what, type='filepath', sources=['microphone', 'upload'], **how)

    def table(rows: list, first: str, **how: Any) -> gradio.Dataframe:
        return gr.Dataframe(
            rows,
            headers=[first, 'prompt'],
            datatype=['number', 'str'],
            column_count=2,
            column_widths=['25%', '75%'],
            type='array',
            interactive=True,
            **how,
        )

    def weight(label: str, **how: Any) -> gradio.Slider:
        return gr.Slider(0, 2, 1, step=0.05, label=label, **how)

    def mixture(prefix: str) -> list[Any]:
        with gr.Accordion('Mix with sounds or other words', open=False, elem_id=f'{prefix}mix'):
            gr.Markdown(MIXED)
            found = [weight('Weight of the words above', elem_id=f'{prefix}mix-weight')]
            found.append(table(MIX, 'weight', label='Other words', elem_id=f'{prefix}mix-words'))
            for place, what in enumerate(('A sound to be like', 'Another sound'), 1):
                found.append(recorder(what, elem_id=f'{prefix}mix-sound-{place}'))
                found.append(weight('Its weight', elem_id=f'{prefix}mix-weight-{place}'))
        return found

    def primed(told: str, prefix: str) -> gradio.Audio:
        with gr.Accordion('Go on from a recording', open=False):
            return recorder(told, elem_id=f'{prefix}prime')

    def followed(prefix: str) -> gradio.Audio:
        with gr.Accordion('Follow a melody', open=False):
            gr.Markdown(NO_MELODY, visible=not has_melodies, elem_id=f'{prefix}no-melody')
            return recorder('Hum or play it', visible=has_melodies, elem_id=f'{prefix}melody')

    it = SimpleNamespace()
    gr.Markdown(f'# {title}\n{who_plays(name, musiclm.knows)}', elem_id='about')
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            with gr.Tab('Prompt'):
                it.prompt = words(EXAMPLES[0], elem_id='prompt')
                gr.Examples([[example] for example in EXAMPLES], it.prompt, label='For example', cache_examples=False)
                it.seconds = duration(1, 5, max_seconds, step=0.5, elem_id='seconds')
                it.mixed = mixture('')
                it.prime = primed('The music begins with it, and the seconds count it', '')
                it.melody = followed('')
                it.go = gr.Button('Make music', variant='primary', elem_id='generate')
            with gr.Tab('Story'):
                gr.Markdown(TOLD)
                it.rows = table(STORY, 'seconds', show_label=False, elem_id='story')
                it.named = gr.File(
                    label='Sounds and latents that it names',
                    file_count='multiple',
                    file_types=['audio', '.npy'],
                    type='filepath',
                    height=160,
                    elem_id='story-files',
                )
                it.go_on = gr.Button('Tell the story', variant='primary', elem_id='tell')
            with gr.Tab('Stream'):
                gr.Markdown('It plays while it is made, and its prompt may change on the way.')
                it.live_prompt = words(EXAMPLES[1], elem_id='live-prompt')
                it.live_seconds = duration(5, 60, max_stream_seconds, step=1, elem_id='live-seconds')
                it.live_mixed = mixture('live-')
                it.live_prime = primed('The stream begins with it', 'live-')
                it.live_melody = followed('live-')
                it.go_live = gr.Button('Play', variant='primary', elem_id='play')
                it.other = gr.Button('Go on with this prompt', visible=False, elem_id='change')
            with gr.Group():
                num_samples = gr.Slider(
                    1, max_samples, min(SHOWN_AT_FIRST, max_samples), step=1, label='Samples', elem_id='samples'
                )
                own = highest(musiclm.sampling['cond_scale'])
                cond_scale = gr.Slider(
                    1, max(10, own), own, step=0.1, label='Guidance', info='how closely to follow the words'
                )
                it.seed = gr.Number(0, precision=0, label='Seed', info='the same seed, the same music', elem_id='seed')
                it.another = gr.Button('Another seed', size='sm', elem_id='another')
            with gr.Accordion('More', open=False):
                negative = gr.Textbox('', label='Keep away from', placeholder='drums', elem_id='negative')
                own = highest(musiclm.sampling['temperature'])
                temperature = gr.Slider(
                    0, max(1.5, own), own, step=0.05, label='Temperature', info='how much is left to chance'
                )
        with gr.Column(scale=3, min_width=320):
            it.note = gr.Markdown('The music appears here.', elem_id='note')
            it.halt = gr.Button('Stop', variant='stop', size='sm', visible=False, elem_id='stop')
            it.heard = gr.Audio(
                label='While it is made',
                streaming=True,
                autoplay=True,
                interactive=False,
                visible=False,
                buttons=[],
                elem_id='live',
            )
            it.outputs = [it.note, it.heard]
            for _ in range(max_samples):
                it.outputs += sample(gr)
    it.settings = [num_samples, cond_scale, temperature, it.seed, negative]
    return it


def sample(gr: ModuleType) -> list[Any]:
    """A place for a piece: a column, hidden at first, and in it score, player and picture."""
    plain = gr.WaveformOptions(show_recording_waveform=False)  # the browser's own player
    with gr.Column(visible=False, elem_classes='sample') as column:
        score = gr.Markdown(elem_classes='score')
        player = gr.Audio(
            show_label=False, type='filepath', interactive=False, buttons=['download'], waveform_options=plain
        )
        picture = gr.Image(show_label=False, type='filepath', format='png', interactive=False, buttons=['fullscreen'])
    return [column, score, player, picture]


def who_plays(name: str | None, knows: str | None) -> str:
    """The line below the heading, in Markdown: which model makes the music, and what it knows."""
    by = f', by the model `{name}`' if name else ''  # in a code span, nothing is markup
    return f'Words to music{by}.' + (f' It knows {html.escape(knows, quote=False)}.' if knows else '')
