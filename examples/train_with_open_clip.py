"""Teach the MusicLM that ships with the package German, by open_clip's training loop and loss.

A new text tower learns from German captions of SyntheticMusic where MuLaN's audio tower, which is locked, puts the
clips (LiT, arXiv 2111.07991). The latents of audio stay as they were, so the quantizer and the stages of MusicLM stay
valid: with the new MuLaN in its place, MusicLM reads German prompts, and ranks what it makes by them. The MuLaN of
before, which reads English alone, tells which instrument it hears in the music. No downloads; some minutes on one core.

    pip install '.[openclip]'
    python examples/train_with_open_clip.py
"""

import argparse
import logging
import random
from pathlib import Path

import open_clip
import soundfile
import torch
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import evaluate, train_one_epoch
from torch.utils.data import Dataset

from musiclm_pytorch import MuLaN, MusicLM, SyntheticMusic, TextTransformer
from musiclm_pytorch.open_clip import (
    MuLaNOpenCLIP,
    create_open_clip_arguments,
    create_open_clip_data,
    create_open_clip_loss,
)

GERMAN = {
    'instrument': {
        'piano': 'Klavier',
        'guitar': 'Gitarre',
        'strings': 'Streicher',
        'flute': 'Flöte',
        'brass': 'Blechbläser',
        'organ': 'Orgel',
        'bell': 'Glocken',
        'synth': 'Synthesizer',
    },
    'tempo': {'slow': 'langsam', 'medium': 'mäßig bewegt', 'fast': 'schnell'},
    'mode': {'major': 'in Dur', 'minor': 'in Moll'},
    'register': {'low': 'tief', 'middle': 'in mittlerer Lage', 'high': 'hoch'},
    'texture': {
        'melody': 'einstimmige Melodie',
        'chords': 'Akkorde',
        'accompanied': 'Melodie mit Begleitung',
        'arpeggio': 'Arpeggio',
    },
    'drums': {True: 'mit Schlagzeug', False: 'ohne Schlagzeug'},
}


class GermanMusic(Dataset):
    """SyntheticMusic with German captions, which leave out one attribute in five and come in any order."""

    def __init__(self, length: int, seed: int, sample_rate: int):
        self.music = SyntheticMusic(length, seed=seed, sample_rate=sample_rate)
        self.sample_rate = sample_rate

    def __len__(self) -> int:
        return len(self.music)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        wave, _ = self.music[index]
        labels = self.music.labels(index)
        draw = random.Random(f'{self.music.seed} {index}')
        told = [words[getattr(labels, name)] for name, words in GERMAN.items() if draw.random() < 0.8]
        draw.shuffle(told)
        return wave, ', '.join(told) or 'Musik'


def build(mulan: MuLaN) -> MuLaNOpenCLIP:
    """The audio side of a MuLaN, locked, beside a new text tower."""
    text = TextTransformer(dim=128, depth=2, heads=4, dim_head=32, max_seq_len=64)
    new = MuLaN(mulan.audio, text, mulan.dim_latent, decoupled_contrastive_learning=False)
    new.audio_to_latents = mulan.audio_to_latents
    model = MuLaNOpenCLIP(new)
    model.lock_image_tower()
    return model


def train(model: MuLaNOpenCLIP, clips: int, epochs: int, batch_size: int, lr: float) -> None:
    args = create_open_clip_arguments(
        [
            *('--device', 'cuda' if torch.cuda.is_available() else 'cpu', '--precision', 'fp32'),
            *('--batch-size', str(batch_size), '--epochs', str(epochs), '--val-frequency', '1'),
            *('--grad-clip-norm', '1', '--log-every-n-steps', '20'),
        ]
    )
    model.to(args.device)
    rate = model.mulan.sample_rate
    data = {
        'train': create_open_clip_data(GermanMusic(clips, seed=0, sample_rate=rate), model, batch_size),
        'val': create_open_clip_data(GermanMusic(128, seed=1, sample_rate=rate), model, batch_size, training=False),
    }
    optimizer = torch.optim.AdamW([it for it in model.parameters() if it.requires_grad], lr=lr, weight_decay=0.01)
    steps = data['train'].dataloader.num_batches * epochs
    scheduler = cosine_lr(optimizer, lr, max(1, steps // 20), steps)
    loss = create_open_clip_loss(model)
    evaluate(model, data, 0, args)
    for epoch in range(epochs):
        train_one_epoch(model, data, loss, epoch, optimizer, None, scheduler, None, args)
        evaluate(model, data, epoch + 1, args)
    model.eval().cpu()


@torch.no_grad()
def generate(musiclm: MusicLM, judge: MuLaNOpenCLIP, folder: Path) -> None:
    """The best of four for a German prompt an instrument, and what the English MuLaN hears in it."""
    names = list(GERMAN['instrument'])
    templates = ['a {} melody', '{} music', 'music played on the {}']
    classifier = open_clip.build_zero_shot_classifier(judge, judge.tokenize, names, templates)
    folder.mkdir(parents=True, exist_ok=True)
    right = 0
    for name, german in GERMAN['instrument'].items():
        prompt = f'{german}, langsam, einstimmige Melodie, ohne Schlagzeug'
        music = musiclm(prompt, num_samples=4, seconds=5, seed=0, return_scores=True)
        latent = judge.encode_audio(music.waves, sample_rate=musiclm.sample_rate)
        heard = names[int((latent @ classifier).argmax())]
        right += heard == name
        scores = ' '.join(f'{score:.2f}' for score in music.scores[0].tolist())
        print(f'{prompt:60} heard: {heard:8} scores of the four: {scores}')
        soundfile.write(folder / f'{name}.wav', music.waves[0].numpy(), musiclm.sample_rate)
    print(f'{right} of {len(names)} instruments as asked for; the music is in {folder}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--clips', type=int, default=4096, help='clips to learn from (default 4096)')
    parser.add_argument('--epochs', type=int, default=3, help='times that each is seen (default 3)')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--output', type=Path, default=Path('german'), help='folder for model and music')
    options = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format='%(message)s', force=True)
    torch.manual_seed(0)
    musiclm = MusicLM.from_pretrained('tiny')
    english = MuLaNOpenCLIP(musiclm.mulan_embed_quantizer.mulan)
    german = build(english.mulan)
    train(german, options.clips, options.epochs, options.batch_size, options.lr)

    german.mulan.save_pretrained(options.output / 'mulan')
    musiclm.mulan_embed_quantizer.mulan = german.mulan
    generate(musiclm.eval(), english, options.output)


if __name__ == '__main__':
    main()
