"""Whether a melody encoder finds the same melody, played otherwise, among 256: trained from nothing in some minutes.

    python benchmarks/melody.py                      # a few minutes on one core
    python benchmarks/melody.py --output melody      # and keeps the fitted MelodyQuantizer in a folder

Each pair is one melody by two players (eight instruments, or a hum), in two tempi, octaves and arrangements, in noise;
held-out pairs are of melodies that training never met.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_pytorch import MelodyEncoder, MelodyPairs, MelodyQuantizer, MelodyTrainer
from musiclm_pytorch.trainer.retrieval import retrieval_metrics

HELD_OUT = {
    'other instrument or hum, tempo within 1.25': dict(),
    'other instrument, tempo within 1.25': dict(hummed=0.0),
    'other instrument, tempo within 1.5': dict(hummed=0.0, tempo=1.5),
    'one of the two a hum, as a rule': dict(hummed=0.9),
}


def recall(anchors: Tensor, positives: Tensor) -> str:
    found = retrieval_metrics(anchors @ positives.T)
    return ' / '.join(f'{found[f"{way}_recall_at_1"]:.3f}' for way in ('audio_to_text', 'text_to_audio'))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=120)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--items', type=int, default=256, help='held-out melodies')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', help='where the MelodyQuantizer goes')
    options = parser.parse_args()

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
    for name, keywords in HELD_OUT.items():
        pairs = MelodyPairs(options.items, sample_rate=encoder.sample_rate, split='valid', **keywords)
        waves = [torch.stack(side) for side in zip(*(pairs[i] for i in range(options.items)))]
        latents = [torch.cat([encoder.embed(some) for some in side.split(64)]) for side in waves]
        coded = [F.normalize(melody.rq(side[:, None])[0][:, 0], dim=-1) for side in latents]
        chromas = [torch.cat([encoder.chroma(some) for some in side.split(64)]) for side in waves]
        plain = [F.normalize((it - it.mean(dim=1, keepdim=True)).flatten(1), dim=-1) for it in chromas]
        print(f'| {name} | {recall(*latents)} | {recall(*coded)} | {recall(*plain)} |', flush=True)
    if options.output:
        melody.save_pretrained(options.output)


if __name__ == '__main__':
    main()
