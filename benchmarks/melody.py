"""Whether a melody encoder finds the same melody, played otherwise, among 256, and whether music follows its melody.

    python benchmarks/melody.py                      # a few minutes on one core
    python benchmarks/melody.py --output melody      # and keeps the fitted MelodyQuantizer in a folder
    python benchmarks/melody.py --parts music --model tiny

Each pair is one melody by two players (eight instruments, or a hum), in two tempi, octaves and arrangements, in noise;
held-out pairs are of melodies that training never met.

Music is made for prompts that ask for every attribute, with a held-out melody in the tempo and mode of the prompt,
played by another instrument in any register, or hummed. Two numbers compare it with the melody: raw chroma accuracy,
the share of the frames with a pitch in the melody in which the loudest pitch class of the music is the same, and the
correlation of all pitch classes over time. Neither forgives another key. Beside them stands the same for all other
melodies of the list, and whether the music obeys its words with and without a melody (the judge of obedience.py).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import obedience  # this and results are beside this file
import torch
import torch.nn.functional as F
from results import add_out, write_results
from torch import Tensor

from musiclm_pytorch import MelodyEncoder, MelodyPairs, MelodyQuantizer, MelodyTrainer, MusicLM, SyntheticMusic
from musiclm_pytorch.data.attributes import INSTRUMENTS, MusicLabels, choose, generator
from musiclm_pytorch.data.composition import compose
from musiclm_pytorch.data.melodies import hum
from musiclm_pytorch.mulan.melody import Chromagram
from musiclm_pytorch.trainer.retrieval import retrieval_metrics

HELD_OUT = {
    'other instrument or hum, tempo within 1.25': dict(),
    'other instrument, tempo within 1.25': dict(hummed=0.0),
    'other instrument, tempo within 1.5': dict(hummed=0.0, tempo=1.5),
    'one of the two a hum, as a rule': dict(hummed=0.9),
}


def recall(anchors: Tensor, positives: Tensor) -> list[float]:
    """From the first to the second, and back."""
    found = retrieval_metrics(anchors @ positives.T)
    return [float(found[f'{way}_recall_at_1']) for way in ('audio_to_text', 'text_to_audio')]


@torch.no_grad()
def retrieval(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    encoder, begin = MelodyEncoder(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        MelodyTrainer(
            encoder,
            MelodyPairs(options.steps * options.batch_size, sample_rate=encoder.sample_rate),
            batch_size=options.batch_size,
            lr_scheduler_type='cosine',
            warmup_steps=min(20, options.steps // 2),
            seed=options.seed,
            results_folder=folder,
            checkpoint_every=options.steps,
        ).train(num_train_steps=options.steps)
    took, encoder = time.perf_counter() - begin, encoder.eval()
    melody = MelodyQuantizer(encoder).eval()
    left = melody.fit(MelodyPairs(1024, seed=1, sample_rate=encoder.sample_rate))

    print(f'{options.steps} steps of {options.batch_size} pairs in {took:.0f} s, {torch.get_num_threads()} threads;')
    print(f'{left[-1]:.1%} of the length of embeddings are missing after {melody.num_quantizers} levels of codes\n')
    print(
        f'R@1 among {options.items}, first to second and back\n\n| held-out pairs | embeddings | codes | chroma alone |'
    )
    print('|---|---|---|---|')
    rows = []
    for name, keywords in HELD_OUT.items():
        pairs = MelodyPairs(options.items, sample_rate=encoder.sample_rate, split='valid', **keywords)
        waves = [torch.stack(side) for side in zip(*(pairs[i] for i in range(options.items)))]
        latents = [torch.cat([encoder.embed(some) for some in side.split(64)]) for side in waves]
        coded = [F.normalize(melody.rq(side[:, None])[0][:, 0], dim=-1) for side in latents]
        chromas = [torch.cat([encoder.chroma(some) for some in side.split(64)]) for side in waves]
        plain = [F.normalize((it - it.mean(dim=1, keepdim=True)).flatten(1), dim=-1) for it in chromas]
        own = dict(embeddings=recall(*latents), codes=recall(*coded), chroma=recall(*plain))
        print(
            f'| {name} | ' + ' | '.join(' / '.join(f'{it:.3f}' for it in both) for both in own.values()) + ' |',
            flush=True,
        )
        rows.append(dict(held_out=name, **own))
    if options.output:
        melody.save_pretrained(options.output)
    how = dict(steps=options.steps, batch_size=options.batch_size, items=options.items, seconds=took)
    return how | dict(missing=left, rows=rows)


def asked(count: int) -> tuple[list[str], list[MusicLabels], dict[str, list[tuple[torch.Tensor, int]]]]:
    """Prompts in held-out phrasings for melodies alone or accompanied, what they ask for, and for each a melody."""
    music = SyntheticMusic(1, seconds=obedience.SECONDS, sample_rate=obedience.RATE, split='valid')
    prompts, wanted, given = [], [], dict(played=[], hummed=[])
    for i in range(count):
        random = generator(7, i)
        own = music.draw_labels(90_000 + i, texture=choose(random, ('melody', 'accompanied')))
        others = [it for it in INSTRUMENTS if it != own.instrument]
        same = dict(tempo=own.tempo, mode=own.mode, bpm=own.bpm, texture='melody', drums=False)
        tune = music.draw_labels(95_000 + i, instrument=choose(random, others), **same)
        prompts.append(music.caption(own, i, mention=obedience.TOLD))
        wanted.append(own)
        given['played'].append((music.render(tune, i), music.sample_rate))
        notes, _ = compose(tune, music.seconds * tune.bpm / 60, random)
        how = dict(bpm=tune.bpm, samples=music.samples, rate=music.sample_rate, random=random)
        # in the range of a voice
        shift = 12 * round((57 - sum(it.pitch for it in notes) / len(notes)) / 12)
        notes = [replace(it, pitch=it.pitch + shift) for it in notes]
        given['hummed'].append((torch.from_numpy(hum(notes, **how)), music.sample_rate))
    return prompts, wanted, given


def agreement(given: torch.Tensor, made: torch.Tensor) -> dict[str, float]:
    """Raw chroma accuracy and correlation of chromas `(b, 12, t)`: of each with its own melody, and with the others."""
    frames = min(given.shape[-1], made.shape[-1])
    given, made = given[..., :frames], made[..., :frames]
    pitched = given.amax(dim=1) > 0.5 * given.amax(dim=(1, 2))[:, None]
    same = (given.argmax(dim=1)[:, None] == made.argmax(dim=1)) & pitched[:, None]
    right = same.sum(dim=-1) / pitched.sum(dim=-1, keepdim=True)
    centred = [F.normalize((it - it.mean(dim=1, keepdim=True)).flatten(1), dim=-1) for it in (given, made)]
    found = {}
    for name, table in dict(accuracy=right, correlation=centred[0] @ centred[1].T).items():
        own = table.diagonal()
        found |= {
            name: own.mean().item(),
            f'{name}, others': ((table.sum() - own.sum()) / table.numel() * len(own) / (len(own) - 1)).item(),
        }
    return found


@torch.no_grad()
def music(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    musiclm, chroma = MusicLM.from_pretrained(options.model), Chromagram(12, obedience.RATE)
    prompts, labels, given = asked(options.prompts)
    tunes = {name: chroma(torch.stack([wave for wave, _ in waves])) for name, waves in given.items()}
    with ProcessPoolExecutor(options.processes, mp_context=get_context('spawn')) as pool:
        perceive = partial(obedience.perceived, pool, musiclm.sample_rate)
        with torch.enable_grad():  # the judge learns here
            judge, _ = obedience.train_judge(options.clips, 100, None, pool, options.data)
        print(
            '| melody | accuracy | of others | ratio | correlation | of others | ' + ' | '.join(obedience.ASKED) + ' |'
        )
        print('|' + '---|' * (6 + len(obedience.ASKED)))
        for name, waves in dict(none=None, **given).items():
            made = []
            for start in range(0, len(prompts), options.batch):
                part = slice(start, start + options.batch)
                how = dict(seconds=obedience.SECONDS, seed=start, melody=None if waves is None else waves[part])
                made.append(musiclm(prompts[part], **how))
            made = torch.cat([torch.Tensor(it) for it in made])
            right = judge.right(*perceive(made), labels)
            heard = chroma(made)
            found = agreement(tunes.get(name, tunes['played']), heard)
            own, other = found['accuracy'], found['accuracy, others']
            numbers = f'{own:.3f} | {other:.3f} | {own / other:.2f}'
            numbers += f' | {found["correlation"]:.3f} | {found["correlation, others"]:.3f}'
            print(
                f'| {name} | {numbers} | ' + ' | '.join(f'{right[it]:.1%}' for it in obedience.ASKED) + ' |', flush=True
            )
            rows.append(dict(melody=name, **found, obeyed={it: float(right[it]) for it in obedience.ASKED}))
            if waves is not None and options.picture:
                draw(tunes[name][:4], heard[:4], prompts, f'{options.picture}-{name}.png')
    return dict(model=options.model, prompts=options.prompts, seconds=obedience.SECONDS, rows=rows)


def draw(given: torch.Tensor, made: torch.Tensor, prompts: list[str], path: str) -> None:
    """Chromas of melodies above those of the music made with them."""
    figure, axes = plt.subplots(2 * len(given), 1, figsize=(10, 4 * len(given)), layout='constrained')
    for i, pair in enumerate(zip(given, made)):
        for axis, what, of in zip(axes[2 * i :], pair, ('the melody given', prompts[i])):
            axis.imshow(what.numpy(), origin='lower', aspect='auto', cmap='magma')
            axis.set_title(of, fontsize=8)
    figure.savefig(path, dpi=70)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = dict(retrieval=retrieval, music=music)
    parser.add_argument('--parts', nargs='+', choices=parts, default=['retrieval'], help='(default: %(default)s)')
    parser.add_argument('--steps', type=int, default=120)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--items', type=int, default=256, help='held-out melodies')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', help='where the MelodyQuantizer goes')
    parser.add_argument('--model', default='tiny', help='of the part music: name or folder of a MusicLM')
    parser.add_argument('--prompts', type=int, default=96, help='melodies given')
    parser.add_argument('--batch', type=int, default=24, help='prompts at a time')
    parser.add_argument('--clips', type=int, default=5000, help='real clips that the judge learns from')
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--data', type=Path, default=obedience.ROOT / 'build' / 'obedience', help='as of obedience.py')
    parser.add_argument('--picture', help='begins the names of pictures of chromas, given and made')
    add_out(parser, 'melody')
    arguments = parser.parse_args()
    write_results(arguments.out, {part: parts[part](arguments) for part in arguments.parts})
