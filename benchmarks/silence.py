"""How many pieces for slow prompts without drums are silent, though nobody asked for silence?

    python benchmarks/silence.py --models small

A stage that hardly saw the beginning of clips may take the quiet before a first note for silence and go on so. Silent
is a root mean square below 0.02; music of the training has 0.1.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from results import add_out, write_results

from musiclm_pytorch import MusicLM, PromptWarning

VIOLINS = ('sad solo violin', 'a slow violin in a minor key without drums', 'a sad violin')
OTHERS = (
    'a slow cello without drums', 'calm strings', 'a slow sad flute without drums', 'peaceful choir',
    'a slow accordion in minor', 'a low slow organ', 'a calm saxophone', 'a slow trumpet in a minor key, no drums',
    'relaxing synth pads, no beat',
)  # fmt: skip


def silent(musiclm: MusicLM, prompt: str, samples: int, seed: int) -> int:
    waves = musiclm(prompt, num_samples=samples, seconds=5, seed=seed, return_all=True)[0]
    return int((waves.pow(2).mean(dim=-1).sqrt() < 0.02).sum())


def main(args: argparse.Namespace) -> None:
    report = dict(samples=args.samples, models={})
    for model in args.models:
        musiclm, found = MusicLM.from_pretrained(model), {}
        for name, prompts in (('violins', VIOLINS), ('others', OTHERS)):
            found[name] = sum(silent(musiclm, prompt, args.samples, args.seed) for prompt in prompts)
            print(f'{Path(model).name}, {name}: {found[name]} of {args.samples * len(prompts)} silent', flush=True)
        report['models'][Path(model).name] = found
    write_results(args.out, report)


if __name__ == '__main__':
    warnings.simplefilter('ignore', PromptWarning)  # of scores
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['small'], help='names or folders')
    parser.add_argument('--samples', type=int, default=24, help='pieces a prompt (default 24)')
    parser.add_argument('--seed', type=int, default=0)
    add_out(parser, 'silence')
    main(parser.parse_args())
