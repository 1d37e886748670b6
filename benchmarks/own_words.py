"""Does a model play what people ask for in their own words?

Prompts as people type them (`own_words.yaml`), each with what a fair listener would accept: some instruments, a tempo,
drums or none, or anything. The judge of `obedience.py` reads these from what is made; how often it is right on real
clips, it tells first. Where several models are given, they are asked the same with the same seeds.

    python benchmarks/own_words.py --models small --sound-font TimGM6mb.sf2 --trained-on FluidR3_GM.sf2 … --clips 3600

The prompts were written by someone who had not seen the words that models are taught (`data/everyday.yaml`), and none
was changed when they had been measured.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml
from obedience import perceived, sing, train_judge
from results import add_out, write_results

from musiclm_pytorch import MusicLM, PromptWarning
from musiclm_pytorch.data.attributes import SAMPLED

PROMPTS = yaml.safe_load(Path(__file__).with_suffix('.yaml').read_text(encoding='utf-8'))
NAMES = ('instrument', 'tempo', 'drums')


def expected(prompt: list) -> dict[str, set[str]]:
    """What each attribute that a listener has expectations of may be, as the judge names it."""
    _, instruments, tempo, drums = prompt
    given = dict(instrument=instruments, tempo=tempo and (tempo,), drums=None if drums is None else (str(drums),))
    return {name: set(it) for name, it in given.items() if it is not None}


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    prompts, wanted = [it[0] for it in PROMPTS], list(map(expected, PROMPTS))
    values = dict(instrument=len(SAMPLED), tempo=3, drums=2)
    chance = {name: mean([len(it[name]) / values[name] for it in wanted if name in it]) for name in NAMES}
    report = dict(prompts=len(prompts), samples=args.samples, models={}, chance=chance)
    with ProcessPoolExecutor(args.processes, mp_context=get_context('spawn')) as pool:
        fonts = [args.sound_font, *(args.trained_on or ())]
        judge, accuracy = train_judge(args.clips, args.tested, fonts, pool, args.data)
        report['judge'] = accuracy
        print('the judge on real clips:', ', '.join(f'{name} {accuracy[name]:.1%}' for name in NAMES))
        print('| | ' + ' | '.join(NAMES) + ' | words unknown |\n|---|---|---|---|---|')
        for model in args.models:
            musiclm = MusicLM.from_pretrained(model)
            waves, scores = sing(musiclm, prompts, args.samples, args.batch)
            best = waves[torch.arange(len(prompts)), scores.argmax(dim=1)]
            named = judge.named(*perceived(pool, musiclm.sample_rate, best))
            right = {
                name: mean([named[name][row] in it[name] for row, it in enumerate(wanted) if name in it])
                for name in NAMES
            }
            text = musiclm.mulan_embed_quantizer.mulan.text
            right['unknown'] = mean([bool(text.unknown_words(prompt)) for prompt in prompts])
            told = {
                prompt: {name: str(named[name][row]) for name in NAMES} | dict(unknown=text.unknown_words(prompt))
                for row, prompt in enumerate(prompts)
            }
            report['models'][Path(model).name] = dict(right=right, told=told)
            print(
                f'| {Path(model).name} | ' + ' | '.join(f'{share:.1%}' for share in right.values()) + ' |', flush=True
            )
        print('| chance | ' + ' | '.join(f'{share:.1%}' for share in chance.values()) + ' | |')
    report['seconds'] = time.perf_counter() - start
    write_results(args.out, report)


def mean(values: list) -> float:
    return sum(values) / len(values)


if __name__ == '__main__':
    import warnings

    warnings.simplefilter('ignore', PromptWarning)  # they are counted
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['small'], help='names or folders of models of a sound font')
    parser.add_argument('--sound-font', required=True, help='one that the models never heard')
    parser.add_argument('--trained-on', nargs='+', help='the sound fonts that they were trained on')
    parser.add_argument('--samples', type=int, default=4, help='pieces that MuLaN chooses from (default 4)')
    parser.add_argument('--batch', type=int, default=12, help='prompts at a time')
    parser.add_argument('--clips', type=int, default=3600, help='real clips that the judge learns from')
    parser.add_argument('--tested', type=int, default=300, help='real held-out clips that it is tested on')
    parser.add_argument('--processes', type=int, default=2, help='that hear')
    parser.add_argument('--data', type=Path, default=Path('build/obedience'), help='where what was heard is kept')
    add_out(parser, 'own_words')
    main(parser.parse_args())
