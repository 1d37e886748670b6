"""What MuLaN gives the music of a model for held-out captions of SyntheticMusic, and for words of random letters.

    python benchmarks/prompt_scores.py                     # of the model that ships as 'tiny', 200 prompts
    python benchmarks/prompt_scores.py --model results/tiny/musiclm --prompts 100

`musiclm train all` measures the first alone, by the key `musiclm.usual_score_prompts` of a recipe.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import torch
from results import add_out, write_results  # beside this file

from musiclm_pytorch import MusicLM, PromptWarning, SyntheticMusic

SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='tiny', help='a folder, or the name of a model that ships (default tiny)')
    parser.add_argument('--prompts', type=int, default=200, help='of either kind (default 200)')
    add_out(parser, 'prompt_scores')
    args = parser.parse_args()
    musiclm = MusicLM.from_pretrained(args.model)
    warnings.simplefilter('ignore', PromptWarning)
    music = SyntheticMusic(1, split='valid')
    held_out = [music.caption(music.draw_labels(20_000 + seed), 20_000 + seed) for seed in range(args.prompts)]
    random, letters = np.random.default_rng(SEED), np.array(list('abcdefghijklmnopqrstuvwxyz'))

    def nonsense() -> str:
        return ' '.join(''.join(random.choice(letters, length)) for length in random.integers(3, 10, size=3))

    usual, rows = None, []
    for name, prompts in dict(valid=held_out, nonsense=[nonsense() for _ in held_out]).items():
        parts = [
            musiclm(prompts[start : start + 25], 4, seconds=musiclm.windows[0], seed=4 * start, return_scores=True)
            for start in range(0, len(prompts), 25)
        ]
        scores = torch.cat([part.scores for part in parts])
        usual = round(scores[:, 0].quantile(0.05).item(), 3) if usual is None else usual
        for samples in (1, 2, 4):
            best = scores[:, :samples].amax(dim=1)
            mean, below = best.mean().item(), (best < usual).float().mean().item()
            rows.append(dict(prompts=name, samples=samples, mean=mean, below=below))
            print(f'{name}, best of {samples}: mean {mean:.3f}, {below:.1%} below {usual}')
    write_results(args.out, dict(model=args.model, prompts=args.prompts, usual=usual, rows=rows))


if __name__ == '__main__':
    main()
