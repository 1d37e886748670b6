"""Does the music obey the words? A judge reads from generated audio what the prompt asked for.

    python benchmarks/obedience.py                  # the tables of the model card, ten minutes on two cores
    python benchmarks/obedience.py --prompts 40     # the same on fewer prompts
    python benchmarks/obedience.py --parts stories primes  # where a story's prompt changes, and a prime ends
    python benchmarks/obedience.py --model small --sound-font /usr/share/sounds/sf2/TimGM6mb.sf2 \
        --trained-on /usr/share/sounds/sf2/FluidR3_GM.sf2 /usr/share/sounds/sf3/MuseScore_General_Full.sf3

The judge was trained on real audio of SyntheticMusic alone, with noise added: a small network for each attribute, for
the instrument on the mel spectrogram, for the others on its statistics and on the autocorrelation of the onset
strength. With sound fonts, it learned from them all, that which the model never heard and those that it was trained on:
one that knows a violin from a single font does not know that of another. The real audio beside the music is played by
each side alone. The prompts are phrasings that no training used. Beside the music of the whole model stand samples
without MuLaN's ranking and without guidance, and what each stage loses: real audio through the codec, real coarse codes
completed by the fine stage, real semantic tokens through the coarse and fine stages.

At last the test of MusicLM (arXiv 2301.11325, section 4 and appendix) for memorised music: the semantic stage goes on
from the first tokens of training clips, and what it says is compared with what the clip goes on with. What it says of
held-out clips tells how much of that follows from what is given, and is no memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import seams  # this and results are beside this file
import torch
import torch.nn.functional as F
from results import add_out, write_results
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from musiclm_pytorch import MusicLM, SyntheticMusic, generate_coarse, generate_fine
from musiclm_pytorch.audiolm.generation_args import Sampling
from musiclm_pytorch.data.attributes import INSTRUMENTS, MusicLabels
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.evaluation.memorization import memorisation, training_clips
from musiclm_pytorch.evaluation.metric import to_json

ROOT = Path(__file__).resolve().parent.parent
ASKED = ('instrument', 'tempo', 'register', 'drums')
TOLD = (*ASKED, 'mode', 'texture')
RATE, SECONDS = 16000, 5.0
PARTS = ('music', 'memory', 'stories', 'primes')
TARGETS = dict(instrument=0.85, tempo=0.75, register=0.85, drums=0.90)
# lags of the autocorrelation: from 0.1 s, faster than any beat, to 2.1 s, two slow ones
FAMILIES = {
    name: family
    for family, names in dict(
        keyboard=('piano', 'electric piano'),
        plucked=('guitar', 'electric guitar', 'harp'),
        strings=('strings', 'violin', 'cello'),
        wind=('flute', 'clarinet', 'saxophone'),
        brass=('brass', 'trumpet'),
        organ=('organ', 'accordion'),
        bell=('bell',),
        voice=('choir', 'synth'),
    ).items()
    for name in names
}
LAGS = np.geomspace(0.1, 2.1, 96)  # seconds
RANGE, FLOOR = 25.0, 40.0  # dB below the loudest, of what is heard and seen
COPIES, OFF = 3, 0.4

# ---- the judge ----


def hear(wave: np.ndarray) -> np.ndarray:
    """What the judge knows of `(samples,)`: statistics of each band, of its changes, and their rhythm.

    Nothing of it depends on how loud the wave is, or on what is 25 dB softer than its loudest moment.
    """
    mel = librosa.feature.melspectrogram(y=wave, sr=RATE, n_fft=1024, hop_length=128, n_mels=48, fmin=40)
    level = np.maximum(10 * np.log10(mel / (mel.max() + 1e-12) + 1e-12), -RANGE) / RANGE + 1  # 0 to 1
    step = np.diff(level, axis=1)
    onset = np.maximum(step, 0)
    energy = level.sum(axis=0) + 1e-6
    shape = (level / energy).mean(axis=1)  # of the spectrum, whatever the loudness of the moment
    statistics = [
        level.mean(axis=1),
        level.std(axis=1),
        shape / shape.max(),
        onset.mean(axis=1) * 10,
        np.abs(step).mean(axis=1) * 10,
        np.quantile(level, [0.1, 0.5, 0.9], axis=1).ravel(),
    ]
    bands = [onset[:16].mean(axis=0), onset[16:32].mean(axis=0), onset[32:].mean(axis=0), onset.mean(axis=0)]
    rhythm = []
    for band in bands:
        band = band - band.mean()
        spectrum = np.fft.rfft(band, 2 * len(band))
        correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: len(band)]
        correlation /= correlation[0] + 1e-9
        rhythm.append(np.interp(LAGS * RATE / 128, np.arange(len(band)), correlation))
    return np.concatenate([*statistics, *rhythm]).astype(np.float32)


def worn(wave: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The same wave, through a tilted spectrum and with noise 15 to 45 dB below: what sounds the same is the same."""
    spectrum = np.fft.rfft(wave)
    octaves = np.log2(np.maximum(np.arange(len(spectrum)) / len(wave) * RATE, 50) / 1000)
    wave = np.fft.irfft(spectrum * 10 ** (random.uniform(-3, 3) * octaves / 20), len(wave))
    noise = np.fft.rfft(random.standard_normal(len(wave)))
    noise = np.fft.irfft(noise * 10 ** (random.uniform(-6, 0) * octaves / 20), len(wave))
    return wave + noise * wave.std() / noise.std() * 10 ** (-random.uniform(15, 45) / 20)


def real_music(split: str, fonts: list[str] | None) -> SyntheticMusic:
    return SyntheticMusic(10**6, seed=7, seconds=SECONDS, sample_rate=RATE, split=split, sound_font=fonts)


def meet(task: tuple[str, list[str] | None, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What is heard and seen of some real clips; those of training are worn before they are heard."""
    split, fonts, start, stop = task
    torch.set_num_threads(1)
    music, random = real_music(split, fonts), np.random.default_rng(start)
    waves = [music[i][0].numpy() for i in range(start, stop)]
    heard = np.stack([hear(worn(wave, random) if split == 'train' else wave) for wave in waves])
    return heard, np.stack([see(wave) for wave in waves])


def see(wave: np.ndarray) -> np.ndarray:
    """A mel spectrogram, `(64, frames)` uint8: dB below the loudest, 60 at most."""
    mel = librosa.feature.melspectrogram(y=wave, sr=RATE, n_fft=1024, hop_length=320, n_mels=64, fmin=40)
    return np.minimum(-10 * np.log10(mel / (mel.max() + 1e-12) + 1e-12), 60).astype(np.uint8)


class Ear(nn.Module):
    """Reads the instrument from `see`: a few convolutions, and the mean over time and frequency."""

    def __init__(self, instruments: int):
        super().__init__()
        sizes, layers = (2, 32, 64, 96, 128), []
        for width, next_width in pairwise(sizes):
            layers += [nn.Conv2d(width, next_width, 3, stride=2, padding=1), nn.BatchNorm2d(next_width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], instruments))

    def forward(self, below: torch.Tensor) -> torch.Tensor:
        """`(b, 64, frames)` dB below the loudest; what is softer than the floor is silence."""
        level = (1 - below / FLOOR).clamp(min=0)
        place = torch.linspace(-1, 1, 64)[:, None].expand_as(level)
        return self.net(torch.stack((level, place), dim=1))


def worn_picture(below: torch.Tensor) -> torch.Tensor:
    """The same pictures through a tilted spectrum and with speckles of noise 10 to 40 dB below the loudest."""
    b, bands, _ = below.shape
    tilt = torch.empty(b, 1, 1).uniform_(-8, 8) * torch.linspace(-0.5, 0.5, bands)[:, None]
    noise = -torch.empty(b, 1, 1).uniform_(10, 40) + 10 * torch.empty_like(below).exponential_().log10()
    power = 10 ** ((tilt - below) / 10) + 10 ** (noise / 10)
    power = power / power.amax(dim=(1, 2), keepdim=True)
    return -10 * power.log10()


def train_ear(pictures: np.ndarray, wanted: torch.Tensor, instruments: int, epochs: int = 8) -> Ear:
    torch.manual_seed(0)
    ear, batch = Ear(instruments), 64
    pictures = torch.from_numpy(pictures)
    steps = epochs * (len(wanted) // batch)
    optimizer = torch.optim.AdamW(ear.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(wanted) // batch) == 0:
            order = torch.randperm(len(wanted)).split(batch)
        rows = order[step % (len(wanted) // batch)]
        loss = F.cross_entropy(ear(worn_picture(pictures[rows].float())), wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return ear.eval()


class Judge:
    """A classifier for each attribute: of what is heard, and for the instrument of what is seen."""

    def __init__(self, heard: np.ndarray, seen: np.ndarray, labels: list[MusicLabels]):
        self.instruments = tuple(sorted({it.instrument for it in labels}))
        wanted = torch.tensor([self.instruments.index(it.instrument) for it in labels])
        self.ear = train_ear(seen, wanted, len(self.instruments))
        self.models = {}
        # each clip several times, a little off, so that the networks do not rest on details
        random = np.random.default_rng(0)
        spread = OFF * heard.std(axis=0)
        heard = np.concatenate([heard + spread * random.standard_normal(heard.shape) for _ in range(COPIES)])
        for name in ASKED[1:]:
            network = MLPClassifier((128,), alpha=1e-2, early_stopping=True, n_iter_no_change=3, random_state=0)
            self.models[name] = make_pipeline(StandardScaler(), network)
            self.models[name].fit(heard, [str(getattr(it, name)) for it in labels] * COPIES)

    def named(self, heard: np.ndarray, seen: np.ndarray) -> dict[str, list[str]]:
        """The value of each attribute in each wave."""
        with torch.no_grad():
            parts = torch.cat([self.ear(part.float()) for part in torch.from_numpy(seen).split(100)]).argmax(dim=1)
        named = dict(instrument=[self.instruments[i] for i in parts.tolist()])
        return named | {name: list(map(str, model.predict(heard))) for name, model in self.models.items()}

    def right(self, heard: np.ndarray, seen: np.ndarray, labels: list[MusicLabels]) -> dict[str, float]:
        """Share of the waves in which each attribute is that of their labels."""
        named = self.named(heard, seen)
        pairs = {name: [(it, str(getattr(of, name))) for it, of in zip(named[name], labels)] for name in named}
        if len(self.instruments) > len(INSTRUMENTS):
            families = [(FAMILIES[it], FAMILIES[wanted]) for it, wanted in pairs['instrument']]
            pairs = dict(instrument=pairs.pop('instrument'), family=families) | pairs
        return {name: sum(it == wanted for it, wanted in each) / len(each) for name, each in pairs.items()}

    def nearer(
        self, heard: np.ndarray, seen: np.ndarray, own: list[MusicLabels], other: list[MusicLabels]
    ) -> np.ndarray:
        """Which waves are likelier, all attributes together, to have their own labels than the other ones."""
        with torch.no_grad():
            parts = torch.cat([self.ear(part.float()) for part in torch.from_numpy(seen).split(100)])
        likely = dict(instrument=(self.instruments, parts.log_softmax(dim=1).double().numpy()))
        for name, model in self.models.items():
            likely[name] = (tuple(model.classes_), np.log(model.predict_proba(heard) + 1e-9))
        for name, (values, table) in likely.items():
            picked = [
                table[range(len(table)), [values.index(str(getattr(it, name))) for it in side]] for side in (own, other)
            ]
            likely[name] = picked[0] - picked[1]
        return sum(likely.values()) > 0


def train_judge(
    clips: int, tested: int, fonts: list[str] | None, pool: ProcessPoolExecutor, folder: Path
) -> tuple[Judge, dict[str, float]]:
    """The judge, and its accuracy on real held-out audio. What was heard once is kept in `folder`."""

    def collect(split: str, count: int) -> tuple[np.ndarray, np.ndarray, list[MusicLabels]]:
        path = folder / '-'.join(['heard', *(Path(it).stem for it in fonts or ()), split, f'{count}.npz'])
        if not path.exists():
            parts = list(pool.map(meet, [(split, fonts, i, min(i + 50, count)) for i in range(0, count, 50)]))
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(path, heard=np.concatenate([it for it, _ in parts]), seen=np.concatenate([it for _, it in parts]))
        music, found = real_music(split, fonts), np.load(path)
        return found['heard'], found['seen'], [music.labels(i) for i in range(count)]

    judge = Judge(*collect('train', clips))
    return judge, judge.right(*collect('valid', tested))


# ---- what is judged ----


def ask(prompts: int, font: str | None) -> tuple[list[str], list[MusicLabels]]:
    """Prompts in held-out phrasings that tell every attribute, and what they ask for."""
    music = SyntheticMusic(1, seconds=SECONDS, sample_rate=RATE, split='valid', sound_font=font)
    labels = [music.draw_labels(10_000 + seed) for seed in range(prompts)]
    return [music.caption(it, seed, mention=TOLD) for seed, it in enumerate(labels)], labels


def sing(musiclm: MusicLM, prompts: list[str], samples: int, batch: int, **keywords) -> tuple[torch.Tensor, ...]:
    """Waves `(prompts, samples, n)` and scores."""
    waves, scores = [], []
    for start in range(0, len(prompts), batch):
        music = musiclm(
            prompts[start : start + batch],
            num_samples=samples,
            seconds=SECONDS,
            seed=start,
            return_all=True,
            return_scores=True,
            **keywords,
        )
        waves.append(music.waves)
        scores.append(music.scores)
    return torch.cat(waves), torch.cat(scores)


@torch.no_grad()
def from_real(musiclm: MusicLM, prompts: list[str], real: torch.Tensor, sampling: list[Sampling], batch: int) -> dict:
    """Waves made of real audio, at the model's rate: by the codec, by the fine stage too, by coarse and fine stage."""
    codec, stages, made = musiclm.codec, musiclm.stages, dict(codec=[], fine=[], coarse=[])
    levels = stages['coarse'].num_coarse_quantizers
    windows = [round(seconds * musiclm.frame_rate) for seconds in musiclm.windows]
    for start in range(0, len(real), batch):
        waves, texts = real[start : start + batch], prompts[start : start + batch]
        codes = codec.encode(waves)
        indices = musiclm.mulan_embed_quantizer.indices(raw_texts=texts)
        generator = torch.Generator().manual_seed(start)
        condition = {name: musiclm.mulan_embed_quantizer.embed(indices, name) for name in stages}
        coarse = generate_coarse(
            stages['coarse'],
            musiclm.tokenizer(waves, input_sample_hz=musiclm.sample_rate),
            max_length=codes.shape[1],
            min_length=codes.shape[1],
            text_embeds=condition['coarse'],
            sampling=sampling[1],
            unique_consecutive=False,
            window=windows[1],
            overlap=windows[1] // 2,
            semantic_per_frame=musiclm.semantic_rate / musiclm.frame_rate,
            generator=generator,
        ).tokens
        for name, given in dict(codec=None, fine=codes[..., :levels], coarse=coarse).items():
            if given is not None and 'fine' in stages:
                fine = dict(text_embeds=condition['fine'], sampling=sampling[2], window=windows[2], generator=generator)
                given = torch.cat((given, generate_fine(stages['fine'], given, **fine).tokens), dim=-1)
            made[name].append(codec.decode(codes if given is None else given))
    if 'fine' not in stages:  # real coarse codes are all of them
        del made['fine']
    return {name: torch.cat(waves) for name, waves in made.items()}


# ---- memorised music ----


def memorised(
    musiclm: MusicLM, clips: int, fonts: list[str] | None, prompts: tuple[int, ...], **which: Any
) -> dict[int, dict]:
    """Shares of clips whose continuation is said again, exactly or nearly, by the length of the prompt."""
    rate = musiclm.sample_rate
    music = SyntheticMusic(24_000, seconds=SECONDS, sample_rate=rate, sound_font=fonts, **which)
    known = training_clips(musiclm, [music[i][0] for i in range(clips)], sample_rate=rate)
    return to_json(memorisation(musiclm, known.tokens, known.indices, prompts, new_tokens=None))


# ---- together ----


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    musiclm = MusicLM.from_pretrained(args.model)
    report = dict(parts=args.parts)
    with ProcessPoolExecutor(args.processes, mp_context=get_context('spawn')) as pool:
        perceive = partial(perceived, pool, musiclm.sample_rate)
        if {'music', 'stories'} & set(args.parts):
            fonts = args.sound_font and [args.sound_font, *(args.trained_on or ())]
            judge, accuracy = train_judge(args.clips, args.tested, fonts, pool, args.data)
        if 'music' in args.parts:
            rows = judge_music(musiclm, args, judge, accuracy, perceive)
            report |= dict(prompts=args.prompts, samples=args.samples, rows=rows)
        if 'stories' in args.parts:
            valid = SyntheticMusic(1, seconds=SECONDS, sample_rate=RATE, split='valid', sound_font=args.sound_font)
            pairs = seams.contrasting(valid, args.stories, apart=ASKED, told=TOLD, seed=args.stories_from)
            report['stories'] = seams.stories(musiclm, pairs, args.seeds, partial(nearer, judge, perceive))
            seams.show(report['stories'])
    if 'primes' in args.parts:
        report['primes'] = seams.primes(musiclm, args.primes)
        seams.show(report['primes'])
    if 'memory' in args.parts:
        told = musiclm, args.memorised, args.trained_on, (0, 12, 31)
        report['memorised'] = memorised(*told, seed=args.memorised_seed, split='train')
        report['held_out'] = memorised(*told, seed=args.memorised_seed, split='valid')
        for kind, of in (('memorised', 'training'), ('held_out', 'held-out')):
            for prompt, found in report[kind].items():
                print(f'{prompt} tokens of a {of} clip given:', json.dumps(found))
    report['seconds'] = time.perf_counter() - start
    write_results(args.out, report)


def perceived(pool: ProcessPoolExecutor, rate: int, waves: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What is heard and seen of `(b, samples)` at `rate` Hz."""
    waves = list(resample(waves, rate, RATE).numpy())
    return tuple(np.stack(list(pool.map(it, waves, chunksize=10))) for it in (hear, see))


def nearer(judge: Judge, perceive: Callable, waves: torch.Tensor, *labels: list[MusicLabels]) -> np.ndarray:
    return judge.nearer(*perceive(waves), *labels)


def judge_music(
    musiclm: MusicLM, args: argparse.Namespace, judge: Judge, accuracy: dict[str, float], perceive: Callable
) -> dict[str, dict[str, float]]:
    """Music of the whole model, and what each stage loses."""
    prompts, labels = ask(args.prompts, args.sound_font)
    music = SyntheticMusic(1, seconds=SECONDS, sample_rate=musiclm.sample_rate, sound_font=args.sound_font)
    rows: dict[str, dict[str, float]] = {}
    show(rows, 'real held-out audio: the judge itself', accuracy)

    def judged(name: str, waves: torch.Tensor) -> None:
        show(rows, name, judge.right(*perceive(waves), labels))

    given = dict(temperature=args.temperature, cond_scale=args.cond_scale)
    keywords = {name: tuple(value or musiclm.sampling[name]) for name, value in given.items()}
    waves, scores = sing(musiclm, prompts, args.samples, args.batch, **keywords)
    place = torch.arange(len(prompts))
    judged(f'the best of {args.samples} by MuLaN', waves[place, scores.argmax(dim=1)])
    judged('without ranking', waves[:, 0])
    plain, _ = sing(musiclm, prompts, 1, args.batch, **{**keywords, 'cond_scale': 1.0})
    judged('without ranking and guidance', plain[:, 0])
    real = torch.stack([music.render(it, seed) for seed, it in enumerate(labels)])
    judged('real audio of the same labels', real)
    if args.trained_on:
        known = SyntheticMusic(1, seconds=SECONDS, sample_rate=musiclm.sample_rate, sound_font=args.trained_on)
        heard = torch.stack([known.render(it, seed) for seed, it in enumerate(labels)])
        judged('the same by the fonts that the model was trained on', heard)
    samplings = [Sampling(temperature=t, cond_scale=c) for t, c in zip(*keywords.values())]
    for name, made in from_real(musiclm, prompts, real, samplings, args.batch).items():
        what = dict(
            codec='real audio through the codec: the ceiling',
            fine='real coarse codes, the fine stage',
            coarse=f'real semantic tokens, the coarse {"and fine stages" if "fine" in musiclm.stages else "stage"}',
        )
        judged(what[name], made)
    return rows


def show(rows: dict, name: str, shares: dict[str, float]) -> None:
    if not rows:
        print('| | ' + ' | '.join(shares) + ' |\n|' + '---|' * (len(shares) + 1))
    rows[name] = shares
    print(f'| {name} | ' + ' | '.join(f'{share:.1%}' for share in shares.values()) + ' |', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='tiny', help='name or folder of the model (default: tiny)')
    parser.add_argument('--sound-font', help='one that the model never heard; without it, music is synthesised')
    parser.add_argument('--trained-on', nargs='+', help='the sound fonts that the model was trained on')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS[:2]), help='(default: %(default)s)')
    parser.add_argument('--prompts', type=int, default=200)
    parser.add_argument('--samples', type=int, default=4, help='pieces that MuLaN chooses from (default 4)')
    parser.add_argument('--temperature', type=float, nargs=3, help='instead of those of the model')
    parser.add_argument('--cond-scale', type=float, nargs=3, help='instead of those of the model')
    parser.add_argument('--batch', type=int, default=25, help='prompts at a time')
    parser.add_argument('--clips', type=int, default=5000, help='real clips that the judge learns from')
    parser.add_argument('--tested', type=int, default=500, help='real held-out clips that the judge is tested on')
    parser.add_argument('--memorised', type=int, default=200, help='training clips of the test of memory')
    parser.add_argument('--memorised-seed', type=int, default=1, help="of the training's clips (default 1)")
    parser.add_argument('--stories', type=int, default=6, help='stories of two contrasting parts')
    parser.add_argument('--stories-from', type=int, default=20_000, help='seed that they are drawn from')
    parser.add_argument('--seeds', type=int, default=8, help='pieces for each story')
    parser.add_argument('--primes', type=int, default=20, help='held-out clips to go on from')
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--data', type=Path, default=ROOT / 'build' / 'obedience', help='where to keep what was heard')
    add_out(parser, 'obedience')
    main(parser.parse_args())
