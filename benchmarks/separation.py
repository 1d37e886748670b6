"""Do the distances put sets of music in the right order, and fall as noise is taken out of a set?

    python benchmarks/separation.py              # 300 clips a set, some ten minutes on two cores
    python benchmarks/separation.py --clips 60

The reference are real clips of SyntheticMusic. Beside them are measured, all by the MuLaN of the model that ships:
other real clips, the same through the model's codec (its ceiling), what the model makes of their captions, the real
clips with noise, and noise alone. Those without noise mixed in get a report, and `comparison.html` puts them side by
side.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch
from results import write_results  # beside this file

from musiclm_pytorch import MusicLM, MusicLMEvaluator, SyntheticMusic
from musiclm_pytorch.evaluation import compare_reports, write_report
from musiclm_pytorch.evaluation.evaluator import GROUPS
from musiclm_pytorch.evaluation.metric import to_json

ROOT = Path(__file__).resolve().parent.parent
RATE, SECONDS = 16000, 5.0
SNRS = (-10, 0, 10, 20, 30)  # dB, of real clips with noise
REPORTED = ('real', 'codec', 'model', 'noise')
DISTANCES = ('frechet_audio_distance', 'frechet_infinity', 'kernel_audio_distance')


def with_noise(wave: torch.Tensor, snr: float, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(wave.shape, generator=generator)
    return wave + noise * wave.std() * 10 ** (-snr / 20)


@torch.no_grad()
def through_codec(musiclm: MusicLM, waves: list[torch.Tensor]) -> list[torch.Tensor]:
    made = []
    for wave in waves:
        codes = musiclm.codec.encode(wave[None])
        made.append(musiclm.codec.decode(codes).reshape(-1)[: len(wave)])
    return made


def sets_of(musiclm: MusicLM, clips: int) -> tuple[list[torch.Tensor], list[str], dict[str, list[torch.Tensor]]]:
    """Reference clips, texts, and sets of clips of these texts by name."""
    music = SyntheticMusic(2 * clips, seed=11, seconds=SECONDS, sample_rate=RATE, split='valid')
    reference = [music[index][0] for index in range(clips)]
    real, texts = zip(*(music[index] for index in range(clips, 2 * clips)))
    generator = torch.Generator().manual_seed(0)
    sets = dict(real=list(real), codec=through_codec(musiclm, real))
    sets['model'] = list(musiclm(list(texts), seconds=SECONDS, seed=0, max_batch=16, progress=True))
    for snr in reversed(SNRS):
        sets[f'real, noise {snr} dB below'] = [with_noise(wave, snr, generator) for wave in real]
    sets['noise'] = [0.1 * torch.randn(len(wave), generator=generator) for wave in real]
    return reference, list(texts), sets


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    musiclm = MusicLM.from_pretrained('tiny')
    reference, texts, sets = sets_of(musiclm, args.clips)
    evaluator = MusicLMEvaluator(mulan=musiclm.mulan_embed_quantizer.mulan, name='tiny', progress=True)
    found = {}
    print('| set | FAD | FAD∞ | KAD | cosine with the text | R@1 |\n|---|---|---|---|---|---|')
    for name, waves in sets.items():
        waves = [wave.flatten() for wave in waves]
        groups = [group for group in GROUPS if name in REPORTED or group != 'music_structure']
        results = evaluator.evaluate(waves, reference, texts=texts, sample_rate=RATE, groups=groups)
        if name in REPORTED:
            title = f'{name}: {args.clips} clips'
            write_report(results, args.out / name, waves, sample_rate=RATE, title=title, overwrite=True)
        quality, alignment = results['audio_quality'], results['text_audio_alignment']
        distances = {it: quality[it]['mulan']['value'] for it in DISTANCES}
        cosine, recall = (alignment[it] for it in ('mulan_cycle_consistency', 'text_to_audio_recall_at_1'))
        found[name] = distances | dict(cosine=to_json(cosine), recall_at_1=to_json(recall))
        cells = ['-' if it is None else f'{it:.3f}' for it in distances.values()]
        cells += [f'{it["value"]:.3f} ({it["low"]:.3f} to {it["high"]:.3f})' for it in (cosine, recall)]
        print(f'| {name} | ' + ' | '.join(cells) + ' |', flush=True)
    page = compare_reports({name: args.out / name for name in REPORTED}, args.out, overwrite=True)

    noisy = [name for name in sets if name.startswith('real, noise')]
    in_order = {}
    orders = {', '.join(REPORTED): list(REPORTED), 'less noise, nearer': ['real', *noisy]}
    for label, names in orders.items():
        for distance in DISTANCES:
            values = [found[name][distance] for name in names]
            right = None not in values and all(near < far for near, far in pairwise(values))
            in_order[f'{label}, {distance}'] = right
            print(f'{label}, {distance}: {"in order" if right else "NOT in order"}')
    print(f'{time.perf_counter() - start:.0f} s; the page is {page}')
    write_results(args.out / 'separation.json', dict(clips=args.clips, sets=found, in_order=in_order))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--clips', type=int, default=300, help='clips a set (default 300; FAD∞ takes 256 at least)')
    parser.add_argument('--out', type=Path, default=ROOT / 'build' / 'separation')
    main(parser.parse_args())
