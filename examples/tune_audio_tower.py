"""Tune the audio tower of a MuLaN to more sounds; its text tower, and what was trained on its texts, stay good.

    python examples/tune_audio_tower.py --model small --output results/tower \
        --sound-font FluidR3_GM.sf2 MuseScore_General_Full.sf3 --more varied0.sf2 varied1.sf2 freepats.sf2

Of four clips three are pieces of `SyntheticMusic`, by any of the fonts. One is an arrangement of `ScoreMusic`, whose
parts different fonts play, with drums of several kits and levels in rooms of all sizes, told by its tempo, drums and
mode, and now and then by who leads, in the words that the model knows. `varied_fonts.py` makes fonts to give with
--more. LiT (arXiv 2111.07991) locks a tower likewise, there that of the images. It needs the extra `scores`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from musiclm_pytorch import MuLaN, MuLaNTrainer, MusicLM, ScoreMusic, SyntheticMusic
from musiclm_pytorch.data.attributes import SAMPLED, TEMPI, MusicLabels, generator
from musiclm_pytorch.data.captions import write_caption
from musiclm_pytorch.data.sampled import PROGRAMS
from musiclm_pytorch.data.scores.composer import DRUM_CHANNEL, Part
from musiclm_pytorch.data.scores.labels import ScoreLabels, tempo_class
from musiclm_pytorch.data.scores.rendering import Room, SoundFont
from musiclm_pytorch.data.synthesis import CEILING, envelope
from musiclm_pytorch.pretrained import find_pretrained

MENTIONS = dict(tempo=0.85, mode=0.8, register=0.8, texture=0.75, drums=0.85, bpm=0.2, key=0.3)  # as it was trained
KITS = (0, 8, 16, 24, 25, 32, 40, 48)
CYMBALS = (42, 44, 46, 49, 51, 53, 59)  # which an orchestra's drummers hardly have
OWN = {name: instrument for instrument, by in PROGRAMS.items() for names in by.values() for name in names}


class Arrangements(ScoreMusic):
    """`ScoreMusic` by several fonts at once, its captions in the words of `SyntheticMusic`."""

    def __init__(self, *args, more: Sequence[Path], **keywords):
        super().__init__(*args, **keywords)
        self.more = [it.resolve() for it in more]

    def _captions(self, labels: ScoreLabels, index: int) -> list[str]:
        random = np.random.default_rng()  # others at each visit
        lead, told = OWN.get(labels.instruments[0]), ['tempo', 'drums']
        if labels.mode in ('major', 'minor') and random.random() < 0.4:
            told.append('mode')
        if lead and random.random() < dict(solo=0.9, duo=0.5).get(labels.texture, 0.25):
            told.append('instrument')
        tempo, mode = tempo_class(labels.bpm), labels.mode if labels.mode in ('major', 'minor') else 'major'
        own = dict(instrument=lead or 'piano', tempo=tempo, mode=mode, register=SAMPLED[lead or 'piano'][0])
        own |= dict(texture='melody', drums=labels.drums, tonic=0, bpm=sum(TEMPI[tempo]) / 2)
        return [write_caption(MusicLabels(**own), tuple(told), 'train', random)]

    def _wave(self, labels: ScoreLabels, parts: list[Part], key: tuple[int, ...]) -> Tensor:
        random = generator(*key)
        whole = [SoundFont.open(it) for it in self.sound_fonts]
        fonts = [*whole, *whole, *(SoundFont.open(it) for it in self.more)]
        room = Room(random.uniform(0.1, 0.95), random.uniform(0.1, 0.7), random.uniform(0, 0.9) ** 1.5)
        base, mixed = whole[random.integers(len(whole))], random.random() < 0.6
        orchestral, level, kit = random.random() < 0.25, random.uniform(-8, 7), int(random.choice(KITS))
        players: dict[SoundFont, list[Part]] = {}
        for part in parts:
            if part.channel == DRUM_CHANNEL:
                notes = tuple(it for it in part.notes if it.pitch not in CYMBALS) if orchestral else ()
                program = 48 if orchestral else kit if random.random() < 0.6 else part.program
                louder = abs(level) if orchestral else level
                part = replace(part, notes=notes or part.notes, program=program, level=part.level + louder)
            elif random.random() < 0.5:
                part = replace(part, level=part.level + random.uniform(-5, 5))
            font = fonts[random.integers(len(fonts))] if mixed else base
            players.setdefault(font if font.preset(part.channel, part.program) else base, []).append(part)
        wave = sum(font.render(own, self.samples, self.sample_rate, room) for font, own in players.items())
        wave = (wave - wave.mean()) * envelope(self.samples, self.sample_rate, 0.002, 0.02)
        power, peak = float(np.sqrt(np.mean(wave**2))), float(np.abs(wave).max())
        gain = min(random.uniform(0.05, 0.25) / max(power, 1e-7), CEILING / max(peak, 1e-7))
        return torch.from_numpy((wave * gain).astype(np.float32))


def main(args: argparse.Namespace) -> None:
    found = find_pretrained(args.model)
    musical = (found / 'quantizer').is_dir()
    mulan = MusicLM.from_pretrained(found).mulan_embed_quantizer.mulan if musical else MuLaN.from_pretrained(found)
    mulan.train()
    for module in (mulan.text, mulan.text_to_latents, mulan.contrast):
        module.requires_grad_(False)
    clips = dict(seconds=5.0, sample_rate=mulan.sample_rate, seed=args.seed)
    length = args.steps * args.batch_size
    own = [*args.sound_font, *args.sound_font, *args.more]  # whole ones twice as often
    pieces = SyntheticMusic(-(-3 * length // 4), sound_font=own, mentions=MENTIONS, **clips)
    scores = Arrangements(-(-length // 4), sound_font=args.sound_font, more=args.more, **clips)
    kinds = [(it.instrument, it.register, it.texture, it.drums) for it in map(pieces.labels, range(len(pieces)))]
    kinds += [it.style for it in map(scores.labels, range(len(scores)))]
    trainer = MuLaNTrainer(
        mulan,
        ConcatDataset([pieces, scores]),
        groups=kinds,  # every other batch is of like clips, from which it learns what tells those apart
        group_size=8,
        groups_after=50,
        batch_size=args.batch_size,
        num_train_steps=args.steps,
        lr=6e-4,
        betas=(0.9, 0.98),
        warmup_steps=60,
        lr_scheduler_type='cosine',
        min_lr_ratio=0.02,
        max_grad_norm=1.0,
        mixed_precision='auto',
        use_ema=False,
        valid_frac=0.01,
        num_workers=args.workers,
        results_folder=args.output,
    )
    trainer.train()
    print(f'the tuned MuLaN is in {Path(args.output) / "last"}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='small', help='a MusicLM or a MuLaN (default small)')
    parser.add_argument('--sound-font', type=Path, nargs='+', required=True, help='with all of General MIDI')
    parser.add_argument('--more', type=Path, nargs='*', default=[], help='fonts that may lack instruments')
    parser.add_argument('--steps', type=int, default=5000)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--workers', type=int, default=1, help='processes that render (default 1)')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--output', default='results/tower')
    main(parser.parse_args())
