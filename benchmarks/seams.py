"""What happens where a story's prompt changes, and where music goes on from a prime: measured for `obedience.py`. And
where a stream takes another prompt or begins with a prime, and where a gap that was filled begins and ends:

    python benchmarks/seams.py --clips 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

import numpy as np
import torch
from results import add_out, write_results  # beside this file
from torch import Tensor

from musiclm_pytorch import MusicLM, SyntheticMusic
from musiclm_pytorch.audiolm.pieces import CROSSFADE
from musiclm_pytorch.data.attributes import MusicLabels

PART, STORY, GAP = 5.0, (5.0, 15.0), (2.0, 4.0)  # seconds
NEAR = 0.07  # seconds on either side of a seam in which a break would be
# (waves, their own labels, the other part's) → which are nearer to their own
Nearer = Callable[[Tensor, list[MusicLabels], list[MusicLabels]], np.ndarray]


def contrasting(
    music: SyntheticMusic, count: int, apart: Collection[str], told: Collection[str], seed: int
) -> list[tuple]:
    """Stories of two parts that differ in all attributes of `apart`: ((prompt, labels), (prompt, labels))."""
    found = []
    while len(found) < count:
        seed += 2
        pair = [music.draw_labels(seed + i) for i in range(2)]
        if all(getattr(pair[0], name) != getattr(pair[1], name) for name in apart):
            found.append(tuple((music.caption(it, seed + i, mention=told), it) for i, it in enumerate(pair)))
    return found


def stories(musiclm: MusicLM, pairs: list[tuple], seeds: int, nearer: Nearer) -> dict[str, dict[str, float]]:
    """For each five seconds of the second part, the share that MuLaN and the judge hear as its prompt; and the seam."""
    rate, mulan = musiclm.sample_rate, musiclm.mulan_embed_quantizer.mulan
    made: dict[str, list[Tensor]] = dict(story=[], cut=[], alone=[])
    for (first, _), (second, _) in pairs:
        how = dict(num_samples=seeds, seed=0, return_all=True)
        made['story'].append(musiclm([(STORY[0], first), (STORY[1], second)], **how)[0])
        before, alone = (musiclm(text, seconds=length, **how)[0] for length, text in zip(STORY, (first, second)))
        made['alone'].append(alone)
        made['cut'].append(torch.cat((before, alone), dim=-1))
    rows = {}
    for name, kind, begin in (('story', 'story', STORY[0]), ('the second prompt alone', 'alone', 0.0)):
        for start in np.arange(begin, begin + STORY[1], PART):
            piece = [waves[:, round(start * rate) : round((start + PART) * rate)] for waves in made[kind]]
            by_mulan = []
            for waves, ((other, _), (own, _)) in zip(piece, pairs):
                texts = mulan.get_text_latents(raw_texts=[own, other])
                scores = mulan.get_audio_latents(waves, sample_rate=rate) @ texts.T
                by_mulan.append((scores[:, 0] > scores[:, 1]).float().mean())
            own, other = ([pair[i][1] for pair in pairs for _ in range(seeds)] for i in (1, 0))
            by_judge = nearer(torch.cat(piece), own, other)
            rows[f'{name}, {start:g} to {start + PART:g} s'] = dict(
                mulan=float(torch.stack(by_mulan).mean()),
                mulan_worst_story=float(min(by_mulan)),
                judge=float(by_judge.mean()),
                judge_worst_story=float(by_judge.reshape(len(pairs), seeds).mean(axis=1).min()),
            )
    for name, kind in (('the seam', 'story'), ('the seam of a hard cut', 'cut')):
        rows[name] = seam(torch.cat(made[kind]), STORY[0], rate)
    rows['the whole crossfade'] = seam(torch.cat(made['story']), STORY[0], rate, CROSSFADE)
    return rows


def primes(musiclm: MusicLM, clips: int) -> dict[str, dict[str, float]]:
    """Held-out clips of ten seconds, and music that goes on from their first five under their caption."""
    rate, mulan = musiclm.sample_rate, musiclm.mulan_embed_quantizer.mulan
    music = SyntheticMusic(clips, seed=11, seconds=2 * PART, sample_rate=rate, split='valid')
    known, rows = round(PART * rate), {}
    real, texts = zip(*(music[i] for i in range(clips)))
    real = torch.stack(real)
    for name, gain in (('', 1.0), (' 20 dB softer', 0.1)):
        how = dict(seconds=2 * PART, prime_wave_input_sample_hz=rate)
        made = [
            musiclm(text, seed=i, prime_wave=wave[:known] * gain, **how)[0]
            for i, (wave, text) in enumerate(zip(real, texts))
        ]
        for what, waves in (('the clips', real * gain), ('music that goes on from them', torch.stack(made))):
            halves = [mulan.get_audio_latents(it, sample_rate=rate) for it in waves.split(known, dim=1)]
            inside = known - round(0.04 * rate)  # all but the crossfade
            rows[what + name] = dict(
                seam(waves, PART, rate),
                cosine_of_halves=float((halves[0] * halves[1]).sum(dim=1).mean().detach()),
                difference_from_given=float((waves - real * gain)[:, :inside].abs().max() / gain),
            )
    return rows


def infills(musiclm: MusicLM, clips: int) -> dict[str, dict[str, float]]:
    """Held-out clips of six seconds whose seconds 2 to 4 are made anew under their caption, and seams on both sides."""
    rate, (start, end) = musiclm.sample_rate, GAP
    music = SyntheticMusic(clips, seed=11, seconds=6.0, sample_rate=rate, split='valid')
    real, texts = zip(*(music[i] for i in range(clips)))
    places = slice(round(start * rate), round(end * rate))
    made: dict[str, list[Tensor]] = {'the clips': list(real)}
    for i, (wave, text) in enumerate(zip(real, texts)):
        for name, count in (('filled, of 8 candidates', 8), ('filled, of the first one', 1)):
            filled = musiclm.infill((wave, rate), start, end, text, num_samples=count, seed=8 * i)
            made.setdefault(name, []).append(filled)
        cut = wave.clone()
        cut[places] = musiclm(text, seconds=end - start, seed=8 * i)[0]
        made.setdefault('another piece cut in', []).append(cut)
    rows = {}
    for name, waves in made.items():
        for side, at in (('begins', start), ('ends', end)):
            rows[f'{name}, where the gap {side}'] = seam(torch.stack(waves), at, rate)
    return rows


def changes(musiclm: MusicLM, count: int) -> dict[str, dict[str, float]]:
    """Streams that take a contrasting prompt, beside those that keep theirs, those whose next prompt says the same, and
    two streams one after the other; and streams that go on from held-out clips."""
    rate, step = musiclm.sample_rate, musiclm.windows[2]
    music = SyntheticMusic(1, seconds=PART, sample_rate=rate, split='valid')
    apart = ('instrument', 'tempo', 'register', 'drums')
    made: dict[str, list[Tensor]] = {
        name: [] for name in ('the same prompt goes on', 'set again', 'set_prompt', 'another stream cut in')
    }
    for number, ((first, _), (second, _)) in enumerate(contrasting(music, count, apart, apart, seed=70000)):
        plain = streamed(musiclm, first, number)
        for name, prompt in (('set again', first), ('set_prompt', second)):
            waves = streamed(musiclm, first, number, prompt)
            begin = int((waves != plain).nonzero()[0])
            at = -(-begin // round(step * rate)) * round(step * rate)  # where the first of the new codes begins
            made[name].append(around(waves, at, rate))
        made['the same prompt goes on'].append(around(plain, at, rate))
        other = streamed(musiclm, second, number + count)
        made['another stream cut in'].append(around(torch.cat((plain[:at], other)), at, rate))
    clips = SyntheticMusic(count, seed=11, seconds=PART, sample_rate=rate, split='valid')
    made['a prime before it'] = [
        torch.cat(list(musiclm.stream(clips[i][1], seed=i, prime=(clips[i][0], rate), seconds=2 * PART)))
        for i in range(count)
    ]
    return {f'a stream, {name}': seam(torch.stack(waves), PART, rate) for name, waves in made.items()}


def streamed(musiclm: MusicLM, prompt: str, seed: int, then: str | None = None) -> Tensor:
    """Two parts of a stream and some seconds more, from the end of the first one on under another prompt."""
    stream, waves, given = musiclm.stream(prompt, seed=seed), [], 0
    while given < (2 * PART + 2) * musiclm.sample_rate:
        if then is not None and given >= PART * musiclm.sample_rate:
            stream.set_prompt(then)
            then = None
        waves.append(next(stream))
        given += len(waves[-1])
    return torch.cat(waves)


def around(waves: Tensor, at: int, rate: int) -> Tensor:
    return waves[at - round(PART * rate) : at + round(PART * rate)]


def seam(waves: Tensor, at: float, rate: int, fade: float = 0.0) -> dict[str, float]:
    """Medians over `(b, samples)`: the step of loudness between the half seconds before and after, in dB, and the
    largest spectral flux near the seam, the last `fade` seconds before it included, over its usual largest in as long a
    time elsewhere."""
    place, half, begin = round(at * rate), round(rate / 2), round((at - fade) * rate)
    before, after = (
        it.square().mean(dim=-1).clamp(min=1e-10).log10() * 10
        for it in (waves[:, begin - half : begin], waves[:, place : place + half])
    )
    hop = rate // 100
    window = torch.hann_window(6 * hop)
    spectrum = torch.stft(waves, len(window), hop, window=window, return_complex=True).abs().sqrt()
    flux = spectrum.diff(dim=-1).square().sum(dim=1).sqrt()
    span = round((2 * NEAR + fade) * rate / hop)
    largest = flux.unfold(1, span, span // 2).amax(dim=-1)  # (b, places)
    first = begin // hop - round(NEAR * rate / hop)
    return dict(
        loudness_step_db=float((after - before).abs().median()),
        flux=float((flux[:, first : first + span].amax(dim=1) / largest.median(dim=1).values).median()),
    )


def show(rows: dict[str, dict[str, float]]) -> None:
    """A table for each run of rows with the same columns."""
    columns: tuple = ()
    for name, row in rows.items():
        if tuple(row) != columns:
            columns = tuple(row)
            print('\n| | ' + ' | '.join(it.replace('_', ' ') for it in columns) + ' |\n|' + '---|' * (len(columns) + 1))
        print(f'| {name} | ' + ' | '.join(f'{value:.2f}' for value in row.values()) + ' |', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='tiny', help='a folder, or the name of a model that ships')
    parser.add_argument('--clips', type=int, default=8)
    add_out(parser, 'seams')
    options = parser.parse_args()
    musiclm = MusicLM.from_pretrained(options.model)
    report = dict(model=options.model, clips=options.clips)
    for part in (changes, infills):
        report[part.__name__] = part(musiclm, options.clips)
        show(report[part.__name__])
    write_results(options.out, report)
