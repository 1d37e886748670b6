"""Does a model trained on ScoreMusic know real instruments and ordinary words? Judges that are not ours tell.

    python benchmarks/real_music.py --model small build/other          # all parts, beside 'tiny'
    python benchmarks/real_music.py --model build/small/mulan/best --parts mulan recordings    # a MuLaN alone

Everything is measured with a sound font that training never hears (Debian: timgm6mb-soundfont), compositions of
ScoreMusic's split 'valid' and its held-out phrasings.

mulan: lead, its family (among 12, and among 8 groups of them), style, tempo and drums by the nearest texts, and
retrieval among 256 pairs of clip and caption.
recordings: drums and tempo the same way in 5 s of real recordings, of which only those count whose reference is
certain: musicnn gives 'drums' a probability above 0.15, or 'drums', 'beat' and 'beats' one below 0.01 each; all
estimators of tempo agree within 4 %, and that far from the borders of the classes. Intervals are over files.
generated: music for captions that name the lead's family, the tempo, and drums or a solo or duo, the best of 4 by
MuLaN.
Family and drums are read by a logistic regression on musicnn's features, tempo by one on the rhythm; both were fitted
to other real clips of the same font. Beside it real clips of the same labels, and what the model's parts leave of
those: the codec, the fine stage from real coarse codes, both later stages from real semantic tokens. FAD is taken on
musicnn's features to real clips of the font that are no part of the rest.
prompts: 24 prompts as ordinary users write them; is what is named among musicnn's first 5 tags, or does a warning tell
words that the model does not know, or that even the best piece fits less than usual? 'Of other prompts' is the same
with the music of the others: chance.
time: 5 s of one sample, the models in turn; the median.

Needs the extras `test` and `scores`, FluidSynth, the font, and the package musicnn (see `musicnn_judge.py`). What was
rendered and heard is kept in --data; empty it when a judge or the data set changes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from musicnn_judge import RATE as HEARD_RATE
from musicnn_judge import TAGS, MusicnnJudge
from obedience import from_real
from real_music_judges import (
    AGREE,
    RATE,
    SECONDS,
    Clips,
    Heard,
    Probes,
    compare,
    listen,
    ratio,
    render,
    share,
    share_by_file,
    tempo_estimators,
)
from results import write_results
from torch import Tensor

from musiclm_pytorch import MuLaN, MusicLM, ScoreMusic
from musiclm_pytorch.audiolm.generation_args import Sampling
from musiclm_pytorch.data.audio import AudioFile, resample
from musiclm_pytorch.data.scores.instruments import INSTRUMENTS
from musiclm_pytorch.data.scores.labels import TEMPO_BORDERS, tempo_class
from musiclm_pytorch.evaluation.alignment import alignment_figures
from musiclm_pytorch.evaluation.distances import GaussianStatistics, frechet_audio_distance
from musiclm_pytorch.evaluation.metric import MetricValue, to_json
from musiclm_pytorch.mulan.layers import l2norm
from musiclm_pytorch.mulan.text_transformer import PromptWarning
from musiclm_pytorch.pretrained import find_pretrained

ROOT = Path(__file__).resolve().parent.parent
FONT = Path('/usr/share/sounds/sf2/TimGM6mb.sf2')
RECORDINGS = Path('/usr/share/games/wesnoth/1.16/data/core/music')  # Debian: wesnoth-1.16-music, GPL and CC BY-SA
PARTS = ('mulan', 'recordings', 'generated', 'prompts', 'time')
BASELINE = 'tiny'
PAIRS, TEXTS, CHECKED = 256, 16, 150  # of retrieval; prompts for each value; clips that references are checked on
# below for no drums, above for drums: right in 93 and 92 % of 201 and 118 real clips of ScoreMusic
DRUM_TAGS, SURE = ('drums', 'beat', 'beats'), (0.01, 0.15)
REAL = 'real clips'
PARTS_LEFT = dict(
    codec='through its codec', fine='real coarse codes, its fine stage', coarse='real semantic tokens, its other stages'
)
# a prompt, and the tags of MagnaTagATune that name the instrument or style in it
ORDINARY = {
    'a calm piano piece': ('piano',),
    'fast heavy metal guitar riff': ('metal', 'guitar', 'rock'),
    'lo-fi hip hop beat to study to': ('beat', 'beats', 'drums'),
    'upbeat techno track for the gym': ('techno', 'electronic', 'dance'),
    'sad solo violin': ('violin', 'strings'),
    'classical string quartet': ('strings', 'violin', 'cello', 'classical', 'classic'),
    'ambient music for meditation': ('ambient', 'new age'),
    'gentle acoustic guitar by the campfire': ('guitar',),
    'a choir singing in a cathedral': ('choir', 'choral'),
    'baroque harpsichord music': ('harpsichord',),
    'a relaxing harp melody': ('harp',),
    'indian sitar music': ('sitar', 'indian'),
    'rock song with electric guitar and drums': ('rock', 'guitar', 'drums'),
    'country music, road trip': ('country',),
    'jazz piano trio in a smoky bar': ('piano',),
    'epic orchestral film score': ('classical', 'classic', 'strings'),
    '80s synth pop': ('synth', 'pop', 'electronic'),
    'a cheerful flute tune': ('flute',),
    'slow cello solo': ('cello', 'strings'),
    'heavy drums and percussion': ('drums', 'beat', 'beats'),
    'dance music with a strong beat': ('dance', 'beat', 'beats', 'techno'),
    'opera aria with orchestra': ('opera', 'classical', 'classic'),
    'dreamy synthesizer pads': ('synth', 'ambient', 'electronic'),
    '8-bit video game music': ('electronic', 'synth'),
}


@dataclass
class Model:
    """What is measured: a MuLaN, and the MusicLM around it, if there is one."""

    name: str
    mulan: MuLaN
    musiclm: MusicLM | None = None

    @classmethod
    def open(cls, place: str, name: str) -> Model:
        folder = find_pretrained(place)
        if json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('model') == 'MuLaN':
            return cls(name, MuLaN.from_pretrained(folder))
        musiclm = MusicLM.from_pretrained(folder)
        return cls(name, musiclm.mulan_embed_quantizer.mulan, musiclm)

    @torch.no_grad()
    def hear(self, waves: Sequence[Tensor], rate: int) -> Tensor:
        """Latents `(n, d)` of waves of one length."""
        parts = (torch.stack(list(waves[i : i + 16])) for i in range(0, len(waves), 16))
        return torch.cat([self.mulan.get_audio_latents(part, sample_rate=rate) for part in parts])

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        parts = (list(texts[i : i + 64]) for i in range(0, len(texts), 64))
        return torch.cat([self.mulan.get_text_latents(raw_texts=part) for part in parts])

    def nearest(self, audio: Tensor, prompts: dict[Any, list[str]]) -> list:
        """For each latent the value whose prompts, on average, lie nearest."""
        texts = torch.stack([l2norm(self.read(own).mean(dim=0)) for own in prompts.values()])
        values = list(prompts)
        return [values[i] for i in (audio @ texts.T).argmax(dim=1).tolist()]


@dataclass
class Bench:
    """What all parts share: the judge, the data sets, and the rows that come of it."""

    args: argparse.Namespace
    judge: MusicnnJudge
    rows: dict[str, dict[str, dict[str, MetricValue]]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def music(self, length: int, split: str, seed: int = 0) -> ScoreMusic:
        return ScoreMusic(
            length, seed=seed, split=split, seconds=SECONDS, sample_rate=RATE, sound_font=self.args.sound_font
        )

    def valid(self) -> Clips:
        return render(self.music(self.args.clips, 'valid'), self.args.data)

    def heard(self, clips: Clips) -> Heard:
        path = self.args.data / f'heard-{clips.name}.npz'
        return listen(self.judge, (clips.wave(i) for i in range(len(clips))), RATE, path)

    def probes(self) -> Probes:
        """Fitted to clips of the same font and other seeds."""
        clips = render(self.music(self.args.trained, 'train', seed=11), self.args.data)
        return Probes(self.heard(clips), clips.labels())

    def add(self, part: str, measure: str, who: str, figure: MetricValue) -> None:
        self.rows.setdefault(part, {}).setdefault(measure, {})[who] = figure


# ---- the parts ----


def judge_mulan(bench: Bench, models: list[Model]) -> None:
    clips = bench.valid()
    labels = clips.labels()
    texts = [clips.music.text(i) for i in clips.indices[:PAIRS]]
    prompts = {name: clips.music.prompts(name, TEXTS) for name in ('family', 'lead', 'style', 'tempo', 'drums')}
    waves = [clips.wave(i) for i in range(len(clips))]
    for model in models:
        audio = model.hear(waves, RATE)
        found = {name: model.nearest(audio, own) for name, own in prompts.items()}
        for name, values in compare(found, labels).items():
            among = 8 if name == 'family of 8' else len(prompts[name])
            bench.add('mulan', f'{name.removesuffix(" of 8")} among {among}', model.name, share(values))
        families = [INSTRUMENTS[it].family for it in found['lead']]
        for name, values in compare(dict(family=families), labels).items():
            bench.add('mulan', f'{name}, that of the nearest lead', model.name, share(values))
        figures = alignment_figures(audio[:PAIRS], model.read(texts), texts)
        for direction in ('audio_to_text', 'text_to_audio'):
            name = f'R@1, {direction.replace("_", " ")}, {len(texts)} pairs'
            bench.add('mulan', name, model.name, figures[f'{direction}_recall_at_1'])


def crops_of(folder: Path, every: float) -> list[tuple[str, Tensor]]:
    """5 s at `RATE`, at regular distances, of each recording, with the name of its file; silent ones are left out."""
    found = []
    for path in sorted(it for it in folder.rglob('*') if it.suffix.lower() in ('.ogg', '.flac', '.wav', '.mp3')):
        with AudioFile(path) as file:
            samples = round(SECONDS * RATE)
            for start in range(0, file.length_at(RATE) - samples + 1, round(every * RATE)):
                wave = file.read_at(start, start + samples, RATE)
                if wave.square().mean() > 1e-5:  # −50 dB
                    found.append((path.name, wave))
    return found


def certain(bench: Bench, waves: Sequence[Tensor]) -> dict[str, dict[int, Any]]:
    """Drums and tempo class by the place of the waves `(samples,)` at `RATE` of which the judges are certain."""
    estimators, places, (low, high) = tempo_estimators(), [TAGS.index(it) for it in DRUM_TAGS], SURE
    bench.more['estimators'] = list(estimators)
    found: dict[str, dict[int, Any]] = dict(drums={}, tempo={})
    for i, wave in enumerate(waves):
        wave = resample(wave, RATE, HEARD_RATE)
        likely = bench.judge.probabilities([wave])[0][places]
        if likely[0] > high or likely.max() < low:
            found['drums'][i] = bool(likely[0] > high)
        bpm = [estimate(wave) for estimate in estimators.values()]
        if is_certain(bpm):
            found['tempo'][i] = tempo_class(statistics.median(bpm))
    return found


def judge_recordings(bench: Bench, models: list[Model]) -> None:
    clips, crops = bench.valid(), crops_of(bench.args.recordings, bench.args.every)
    labels = clips.labels()[:CHECKED]
    for name, own in certain(bench, [clips.wave(i) for i in range(len(labels))]).items():
        right = [value == getattr(labels[i], name) for i, value in own.items()]
        bench.add('recordings', f'{name}: the reference, of {len(labels)} clips of ScoreMusic', REAL, share(right))
    for name, own in certain(bench, [wave for _, wave in crops]).items():
        prompts = clips.music.prompts(name, TEXTS)
        files, values = [crops[i][0] for i in own], list(own.values())
        for model in models:
            found = model.nearest(model.hear([crops[i][1] for i in own], RATE), prompts) if own else []
            right = np.array([a == b for a, b in zip(found, values)])
            bench.add('recordings', f'{name}, of {len(crops)} crops', model.name, share_by_file(right, files))
            for value in sorted(set(values)):
                rows = [i for i, it in enumerate(values) if it == value]
                figure = share_by_file(right[rows], [files[i] for i in rows])
                bench.add('recordings', f'{name}, where it is {value}', model.name, figure)


def is_certain(bpm: Sequence[float]) -> bool:
    """Whether all estimates agree, and half and double are no matter of a few BPM more or less."""
    middle = statistics.median(bpm)
    if not middle or any(abs(it / middle - 1) > AGREE for it in bpm):
        return False
    return all(abs(middle / border - 1) > AGREE for border, _ in TEMPO_BORDERS.values() if border)


def ask(clips: Clips, prompts: int) -> tuple[list[int], list[str]]:
    """Places of clips, families in turn, and captions that name lead family, tempo, and drums, or a solo or duo."""
    labels, taken = clips.labels(), []
    waiting = {family: [] for family in ScoreMusic.ATTRIBUTES['family']}
    for place, it in enumerate(labels):
        if it.drums or it.texture in ('solo', 'duo'):
            waiting[it.family].append(place)
    for turn in count():
        if len(taken) >= prompts or not any(len(own) > turn for own in waiting.values()):
            break
        taken += [own[turn] for own in waiting.values() if len(own) > turn]
    taken = taken[:prompts]
    told = [('family', 'tempo', 'drums' if labels[i].drums else 'texture') for i in taken]
    return taken, [clips.music.caption(labels[i], i, mention=mention) for i, mention in zip(taken, told)]


def make(musiclm: MusicLM, prompts: Sequence[str], samples: int, batch: int, seed: int) -> list[Tensor]:
    """The best of so many pieces for each prompt, `(samples,)` each."""
    return make_and_warn(musiclm, prompts, samples, batch, seed)[0]


def make_and_warn(
    musiclm: MusicLM, prompts: Sequence[str], samples: int, batch: int, seed: int
) -> tuple[list[Tensor], list[str]]:
    """The best of so many pieces for each prompt, and what a user is told of prompt and piece."""
    waves: list[Tensor] = []
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', PromptWarning)  # they are returned
        for i in range(0, len(prompts), batch):
            some = list(prompts[i : i + batch])
            given = dict(num_samples=samples, seconds=SECONDS, seed=seed + i * samples)
            music = musiclm(some, return_all=True, return_scores=True, **given)
            waves += [own[place] for own, place in zip(torch.Tensor(music.waves), music.scores.argmax(dim=1))]
            lines += musiclm.prompt_warnings(some, music)
    return waves, lines


@torch.no_grad()
def from_real_clips(musiclm: MusicLM, prompts: list[str], waves: list[Tensor], batch: int) -> dict[str, Tensor]:
    """What each part of the model leaves of real clips, `(n, samples)`."""
    samplings = [
        Sampling(temperature=temperature, cond_scale=scale)
        for temperature, scale in zip(*(musiclm.sampling[name] for name in ('temperature', 'cond_scale')))
    ]
    real = resample(torch.stack(waves), RATE, musiclm.sample_rate)
    made = from_real(musiclm, prompts, real, samplings, batch)
    return {PARTS_LEFT[name]: it[:, : round(SECONDS * musiclm.sample_rate)] for name, it in made.items()}


def frechet(reference: Heard, heard: Heard) -> MetricValue:
    sides = []
    for side in (reference, heard):
        sides.append(GaussianStatistics(side.features.shape[-1]))
        sides[-1].update(torch.from_numpy(side.features).flatten(0, 1))
    return frechet_audio_distance(*sides, embedding='musicnn')


def judge_generated(bench: Bench, models: list[Model]) -> None:
    clips, probes = bench.valid(), bench.probes()
    heard, labels = bench.heard(clips), clips.labels()
    for name, right in probes.right(heard, labels).items():
        bench.add('generated', f'{name}: the probe itself', REAL, share(right))
    taken, prompts = ask(clips, bench.args.prompts)
    wanted = [labels[i] for i in taken]
    reference = heard.part(np.setdiff1d(np.arange(len(clips)), taken))
    real = probes.right(heard.part(taken), wanted)

    def judge(who: str, own: Heard) -> None:
        right = probes.right(own, wanted)
        for name, values in right.items():
            bench.add('generated', f'{name}, right', who, share(values))
            if who != REAL:
                bench.add('generated', f'{name}, as a share of real clips', who, ratio(values, real[name]))
        for value, name in ((True, 'drums, where asked for'), (False, 'no drums, in a solo or duo')):
            rows = [i for i, it in enumerate(wanted) if it.drums is value]
            bench.add('generated', name, who, share(right['drums'][rows]))
        bench.add('generated', 'FAD', who, frechet(reference, own))

    judge(REAL, heard.part(taken))
    for model in models:
        musiclm, waves = model.musiclm, [clips.wave(i) for i in taken]
        for what, made in from_real_clips(musiclm, prompts, waves, bench.args.batch).items():
            judge(f'{model.name}, {what}', listen(bench.judge, made, musiclm.sample_rate))
        start = time.perf_counter()
        made = make(musiclm, prompts, bench.args.samples, bench.args.batch, seed=1000)
        print(f'{model.name}: {len(made)} prompts in {time.perf_counter() - start:.0f} s', flush=True)
        judge(model.name, listen(bench.judge, made, musiclm.sample_rate))
    bench.more['generated'] = dict(prompts=prompts, samples=bench.args.samples)


def judge_prompts(bench: Bench, models: list[Model]) -> None:
    prompts, named = list(ORDINARY), list(ORDINARY.values())
    for model in models:
        made, warned = make_and_warn(model.musiclm, prompts, bench.args.samples, bench.args.batch, seed=2000)
        likely = bench.judge.probabilities([resample(it, model.musiclm.sample_rate, HEARD_RATE) for it in made])
        first = [bench.judge.first_tags(it) for it in likely]
        # hits[i, j]: what prompt i names is heard in the music of prompt j
        hits = np.array([[bool({*own} & {*tags}) for tags in first] for own in named])
        unknown = model.musiclm.prompt_warnings(prompts)
        told, right = np.array([bool(it) for it in warned]), hits.diagonal()
        others = (hits.sum() - right.sum()) / (hits.size - len(hits))
        bench.add('prompts', 'named and heard', model.name, share(right))
        bench.add('prompts', 'of other prompts', model.name, MetricValue(others, count=hits.size - len(hits)))
        bench.add('prompts', 'heard, or warned of', model.name, share(right | told))
        bench.add('prompts', 'with unknown words', model.name, share([bool(it) for it in unknown]))
        bench.add('prompts', 'heard, where not warned of', model.name, share(right[~told]))
        bench.more.setdefault('prompts', {})[model.name] = [
            dict(prompt=prompt, named=own, tags=tags, heard=bool(hit), warning=line)
            for prompt, own, tags, hit, line in zip(prompts, named, first, right, warned)
        ]


def judge_time(bench: Bench, models: list[Model]) -> None:
    took: dict[str, list[float]] = {model.name: [] for model in models}
    for turn in range(bench.args.rounds + 1):  # the first one warms up
        for model in models:
            start = time.perf_counter()
            make(model.musiclm, ['a calm piano piece'], 1, 1, seed=turn)
            took[model.name].append(time.perf_counter() - start)
    for name, times in took.items():
        figure = MetricValue(statistics.median(times[1:]), count=bench.args.rounds, unit='s')
        bench.add('time', f'{SECONDS:g} s of one sample, s', name, figure)
        part = statistics.median(a / b for a, b in zip(times[1:], took[BASELINE][1:]))
        bench.add('time', f'the same over that of {BASELINE!r}', name, MetricValue(part, count=bench.args.rounds))


# ---- together ----


def show(part: str, rows: dict[str, dict[str, MetricValue]]) -> None:
    """A table with a row for each measure and a column for each model: the share, its interval, and of how many."""
    names = list(dict.fromkeys(name for own in rows.values() for name in own))
    print(f'\n| {part} | ' + ' | '.join(names) + ' |\n|' + '---|' * (len(names) + 1))
    for measure, own in rows.items():
        print(f'| {measure} | ' + ' | '.join(told(own.get(name)) for name in names) + ' |', flush=True)


def told(figure: MetricValue | None) -> str:
    if figure is None or figure.value is None:
        return '–'
    if figure.low is None:
        return f'{figure.value:.3g}'
    return f'{figure.value:.1%} ({figure.low:.1%} to {figure.high:.1%}; {figure.count})'


def names_of(places: Sequence[str]) -> list[str]:
    """The last part of each path that tells it from the others."""
    short = [Path(it).name for it in places]
    return [own if short.count(own) == 1 else str(place) for own, place in zip(short, places)]


def main(args: argparse.Namespace) -> None:
    places = [BASELINE, *(it for it in args.model if it != BASELINE)]
    models = [Model.open(*it) for it in zip(places, names_of(places))]
    bench = Bench(args, MusicnnJudge(args.musicnn))
    whole = [model for model in models if model.musiclm is not None]
    judges = dict(
        mulan=judge_mulan,
        recordings=judge_recordings,
        generated=judge_generated,
        prompts=judge_prompts,
        time=judge_time,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        start = time.perf_counter()
        hears = part in ('mulan', 'recordings')
        for model in models:
            if not hears and model not in whole:
                print(f'{part}: {model.name} is a MuLaN, which makes no music')
        judges[part](bench, models if hears else whole)
        show(part, bench.rows[part])
        bench.more.setdefault('seconds', {})[part] = round(time.perf_counter() - start)
        report = dict(
            models=dict(zip(names_of(places), places)),
            settings={name: str(it) if isinstance(it, Path) else it for name, it in vars(args).items()},
            rows=to_json(bench.rows),
            **bench.more,
        )
        write_results(args.out / 'real_music.json', report)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', nargs='*', default=[], help="names or folders, beside 'tiny'")
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS), help='(default: all)')
    parser.add_argument('--prompts', type=int, default=100, help='prompts of the part generated (default 100)')
    parser.add_argument('--samples', type=int, default=4, help='pieces that MuLaN chooses from (default 4)')
    parser.add_argument('--batch', type=int, default=10, help='prompts at a time (default 10)')
    parser.add_argument('--clips', type=int, default=1024, help="real clips of 'valid' (default 1024)")
    parser.add_argument('--trained', type=int, default=1000, help='real clips for the probes (default 1000)')
    parser.add_argument('--every', type=float, default=15.0, help='seconds between crops of recordings (default 15)')
    parser.add_argument('--rounds', type=int, default=5, help='timed pieces of each model (default 5)')
    parser.add_argument('--sound-font', type=Path, default=FONT, help='that training never met (default: %(default)s)')
    parser.add_argument('--recordings', type=Path, default=RECORDINGS, help='a folder (default: %(default)s)')
    parser.add_argument('--musicnn', type=Path, help='wheel or folder of the package musicnn')
    parser.add_argument('--data', type=Path, default=ROOT / 'build' / 'real_music', help='where to keep what was heard')
    parser.add_argument('--out', type=Path, default=ROOT / 'build' / 'real_music', help='folder of the report')
    main(parser.parse_args())
