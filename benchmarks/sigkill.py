"""Kill a training run with SIGKILL again and again, at random moments, and look at what is left each time.

    python benchmarks/sigkill.py
    python benchmarks/sigkill.py --kills 200 --seed 1

A tiny MuLaN trains on noise and writes a checkpoint at every step. After each kill, every checkpoint under its name has
to load, no step may be lost that had a checkpoint before the kill, and the next run goes on from there.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import add_out, write_results  # beside this file

from musiclm_pytorch.trainer import checkpoints

PROGRAM = """
import sys
import torch
from musiclm_pytorch import AudioSpectrogramTransformer, MuLaN, MuLaNTrainer, TextTransformer

torch.set_num_threads(1)
torch.manual_seed(0)
sizes = dict(dim=32, depth=1, heads=2, dim_head=8)
text = TextTransformer(**sizes, num_tokens=100, max_seq_len=8)
mulan = MuLaN(AudioSpectrogramTransformer(**sizes), text, dim_latent=16)
pairs = [(torch.randn(1200), torch.randint(1, 100, (5,))) for _ in range(16)]
trainer = MuLaNTrainer(
    mulan, pairs, batch_size=4, valid_frac=0, checkpoint_every=1, max_checkpoints=3, results_folder=sys.argv[1],
    resume=True, use_ema=True, progress=False, accelerate_kwargs=dict(cpu=True),
)
print(trainer.step, flush=True)
trainer.train(num_train_steps=10**9, with_validation=False)
"""


def newest_step(folder: Path) -> int:
    found = checkpoints.steps(folder)
    return int(checkpoints.PATTERN.fullmatch(found[-1].name)[1]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--longest', type=float, default=1.5, help='seconds of training before a kill, at most')
    add_out(parser, 'sigkill')
    options = parser.parse_args()
    draw = random.Random(options.seed)
    in_the_middle = damaged = lost = wrong_start = 0
    step = 0
    with tempfile.TemporaryDirectory() as results:
        folder = Path(results) / 'checkpoints'
        for _ in range(options.kills):
            process = subprocess.Popen([sys.executable, '-c', PROGRAM, results], stdout=subprocess.PIPE, text=True)
            wrong_start += int(process.stdout.readline()) != step
            time.sleep(draw.random() * options.longest)
            before = newest_step(folder)
            process.kill()
            process.wait()
            process.stdout.close()

            in_the_middle += any(folder.glob('.step-*'))
            for path in checkpoints.steps(folder):
                try:
                    checkpoints.read(path)
                except ValueError as error:
                    print(error)
                    damaged += 1
            found = checkpoints.read_newest(folder)
            step = 0 if found is None else found[1]['step']
            lost += step < before
    print(f'{options.kills} kills, step {step} reached')
    print(f'{in_the_middle} in the middle of writing or removing a checkpoint')
    print(f'{damaged} checkpoints that did not load')
    print(f'{lost} times a step was lost that had a checkpoint')
    print(f'{wrong_start} runs that did not start from the newest checkpoint')
    found = dict(kills=options.kills, step=step, in_the_middle=in_the_middle, damaged=damaged, lost=lost)
    write_results(options.out, found | dict(wrong_start=wrong_start))
    sys.exit(bool(damaged or lost or wrong_start))


if __name__ == '__main__':
    main()
