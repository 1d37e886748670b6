"""Does a model play what people ask for in their own words?

Prompts as someone might type them, who has read no documentation, each with what a listener would expect of the music:
one of some instruments, a tempo, drums or none. The judge of `obedience.py` reads these from what is made. Where
several models are given, they are asked the same with the same seeds.

    python benchmarks/everyday.py --models small --sound-font TimGM6mb.sf2 --trained-on FluidR3_GM.sf2 … --clips 3600

The phrasings are nobody's but this script's; nothing was trained or chosen on them.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from obedience import perceived, sing, train_judge
from results import add_out, write_results

from musiclm_pytorch import MusicLM, PromptWarning
from musiclm_pytorch.data.attributes import SAMPLED

KEYS, BOWED, HORNS = ('piano', 'electric piano'), ('strings', 'violin', 'cello'), ('brass', 'trumpet')
GUITARS, REEDS, BELLS = ('guitar', 'electric guitar'), ('saxophone', 'clarinet'), ('bell', 'harp')
# a prompt, instruments that fit, tempo, drums; None where any fits
PROMPTS = (
    ('a calm piano piece', ('piano',), 'slow', None),
    ('relaxing lofi beat to study to', (*KEYS, 'guitar'), 'slow', True),
    ('upbeat techno track for my workout', ('synth',), 'fast', True),
    ('sad solo violin', ('violin',), 'slow', None),
    ('heavy metal riff, super fast', ('electric guitar',), 'fast', True),
    ('epic orchestral trailer music', ('strings', *HORNS), None, None),
    ('soothing music to help my baby fall asleep', BELLS, 'slow', False),
    ('smoky late night jazz with a sax', ('saxophone',), None, None),
    ('happy birthday party music', None, 'fast', None),
    ('gentle fingerpicked acoustic guitar by the fire', ('guitar',), 'slow', None),
    ('spooky haunted house organ', ('organ',), None, None),
    ('a joyful irish jig on the fiddle', ('violin',), 'fast', None),
    ('dreamy ambient pads, no beat', ('synth', 'strings', 'choir'), 'slow', False),
    ('8-bit boss fight', ('synth',), 'fast', None),
    ('monks chanting in a monastery', ('choir',), 'slow', False),
    ('a royal trumpet fanfare for the king', HORNS, None, None),
    ('romantic cello for a wedding', ('cello', 'strings'), 'slow', None),
    ('energetic punk rock song with loud drums', ('electric guitar',), 'fast', True),
    ('french cafe accordion', ('accordion',), None, None),
    ('twinkling music box lullaby', ('bell',), 'slow', False),
    ('peaceful flute in the forest at sunrise', ('flute',), 'slow', None),
    ('80s synthwave driving at night', ('synth',), None, True),
    ('angelic harp music from heaven', ('harp',), 'slow', None),
    ('funky rhodes groove with a tight beat', ('electric piano',), None, True),
    ('dark cinematic strings, slow and tense', BOWED, 'slow', None),
    ('brass band marching in a parade', HORNS, None, True),
    ('mellow clarinet tune', ('clarinet',), None, None),
    ('church hymn', ('organ', 'choir'), 'slow', None),
    ('a fast and furious chase scene', None, 'fast', None),
    ('lonely piano on a rainy day', ('piano',), 'slow', False),
    ('hip hop beat', None, None, True),
    ('cheerful accordion polka', ('accordion',), 'fast', None),
    ('choir singing softly', ('choir',), None, None),
    ('blues guitar solo, slow, with drums', ('electric guitar',), 'slow', True),
    ('christmas bells', ('bell',), None, None),
    ('meditation music', None, 'slow', False),
    ('aggressive distorted guitars and pounding drums', ('electric guitar',), 'fast', True),
    ('a cute little tune on a glockenspiel', ('bell',), None, None),
    ('club banger, edm, high energy', ('synth',), 'fast', True),
    ('melancholic saxophone ballad', ('saxophone',), 'slow', None),
    ('string quartet playing something serene', BOWED, 'slow', None),
    ('quick baroque organ fugue', ('organ',), 'fast', None),
    ('spanish guitar, passionate and rapid', ('guitar',), 'fast', None),
    ('jazz piano trio with drums', KEYS, None, True),
    ('lively mariachi trumpets', ('trumpet', 'brass'), 'fast', None),
    ('retro synth arpeggio', ('synth',), None, None),
    ('tender love song on the piano', ('piano',), 'slow', None),
    ('mysterious music for outer space', ('synth', 'strings', 'choir'), None, None),
)
NAMES = ('instrument', 'tempo', 'drums')


def expected(prompt: tuple) -> dict[str, set[str]]:
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
        judge, _ = train_judge(args.clips, args.tested, fonts, pool, args.data)
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
    add_out(parser)
    main(parser.parse_args())
