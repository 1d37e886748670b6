"""Music while it is made: how soon it begins, how much faster than it plays, several streams at once, and memory.

    python benchmarks/streaming.py                              # a few minutes
    python benchmarks/streaming.py --minutes 60 --only memory   # of an hour of music

A stream that is heard while it is made must never be late: a gap is a wave that comes after all before it have been
played since the first one.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from results import add_out, write_results  # beside this file

from musiclm_pytorch import MusicLM
from musiclm_pytorch.waves import STREAMS

PROMPT = 'a fast happy flute melody'
COLD = """
import time
from musiclm_pytorch import MusicLM
musiclm = MusicLM.from_pretrained({model!r})
begin = time.perf_counter()
next(musiclm.stream({prompt!r}, seed=1))
print(time.perf_counter() - begin)
"""


def arrivals(musiclm: MusicLM, seconds: float, seed: int) -> Iterator[tuple[float, float]]:
    """When each wave is there, in seconds from the call on, and how much music there is by then."""
    begin, made = time.perf_counter(), 0.0
    for wave in musiclm.stream(PROMPT, seconds=None, seed=seed):
        made += len(wave) / wave.sample_rate
        yield time.perf_counter() - begin, made
        if made >= seconds:
            return


def gap(found: list[tuple[float, float]]) -> float:
    """The longest silence, in seconds, for someone who listens from the first wave on."""
    return max([0.0, *(there - found[0][0] - made for (there, _), (_, made) in zip(found[1:], found))])


def side_by_side(musiclm: MusicLM, count: int, seconds: float) -> list[list[tuple[float, float]]]:
    found: list[list[tuple[float, float]]] = [[] for _ in range(count)]

    def run(number: int) -> None:
        found[number] += arrivals(musiclm, seconds, seed=number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def memory(model: str, minutes: float) -> list[dict[str, float]]:
    """Of a process that makes one stream and encodes it in each way, as the service does, and keeps nothing."""
    musiclm, made, rows = MusicLM.from_pretrained(model), 0.0, []
    stream = musiclm.stream(PROMPT, seed=0)
    encoders = [encoder(stream.sample_rate) for encoder in STREAMS.values()]
    for told in [it for it in (1, 10, 30) if it < minutes] + [minutes]:
        while made < 60 * told:
            wave = next(stream)
            for encoder in encoders:
                encoder.push(wave)
            made += len(wave) / wave.sample_rate
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with open('/proc/self/statm') as file:
            now = int(file.read().split()[1]) * resource.getpagesize() / 2**20
        what = f'after {told:g} minutes of a stream, as {" and as ".join(STREAMS)}: peak memory, and what is held, MB'
        row(what, f'{most:.0f}, {now:.0f}')
        rows.append(dict(minutes=told, peak_mb=most, held_mb=now))
    return rows


def row(what: str, figure: str) -> None:
    print(f'| {what} | {figure} |', flush=True)


def speed(options: argparse.Namespace) -> dict[str, Any]:
    musiclm = MusicLM.from_pretrained(options.model)
    script = COLD.format(model=options.model, prompt=PROMPT)
    cold = [
        float(subprocess.run([sys.executable, '-c', script], check=True, capture_output=True, text=True).stdout)
        for _ in range(options.rounds)
    ]
    cold = median(cold)
    row('first sound after the first call of a process, s', f'{cold:.2f}')
    whole, streams = [], []
    for seed in range(options.rounds + 1):  # in turn, the first ones to warm up
        begin = time.perf_counter()
        musiclm(PROMPT, seconds=options.seconds, seed=seed)
        whole.append(time.perf_counter() - begin)
        streams.append([*arrivals(musiclm, options.seconds, seed)])
    whole, streams = whole[1:], streams[1:]
    first, whole = median([found[0][0] for found in streams]), median(whole)
    factor = median([found[-1][1] / found[-1][0] for found in streams])
    row('first sound after a later call, s', f'{first:.3f}')
    row(f'a call for {options.seconds:g} s, s', f'{whole:.2f}')
    row('first sound over that call', f'{first / whole:.3f}')
    row('real-time factor of a stream', f'{factor:.1f}')
    row('longest gap, s', f'{max(map(gap, streams)):.2f}')
    at_once = [dict(streams=1, real_time_factor=factor, longest_gap_seconds=max(map(gap, streams)))]
    for count in (2, 3):
        found = side_by_side(musiclm, count, options.seconds)
        slowest = min(own[-1][1] / own[-1][0] for own in found)
        row(f'{count} streams at once: real-time factor of the slowest', f'{slowest:.1f}')
        row(f'{count} streams at once: longest gap, s', f'{max(map(gap, found)):.2f}')
        at_once.append(dict(streams=count, real_time_factor=slowest, longest_gap_seconds=max(map(gap, found))))
    seconds = dict(seconds=options.seconds, call_seconds=whole, first_sound_seconds=first)
    return seconds | dict(first_sound_of_a_process_seconds=cold, real_time_factor=factor, at_once=at_once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='tiny', help='a folder, or the name of a model that ships')
    parser.add_argument('--seconds', type=float, default=30.0, help='of the pieces compared')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--minutes', type=float, default=5.0, help='of the long stream whose memory is measured')
    parser.add_argument('--only', choices=('speed', 'memory'), help='the other takes its time')
    add_out(parser, 'streaming')
    options = parser.parse_args()

    load = ', '.join(f'{it:.1f}' for it in os.getloadavg())
    print(f'{torch.get_num_threads()} threads, load {load}; medians of {options.rounds}\n')
    row('', '')
    print('|---|---|')
    found: dict[str, Any] = dict(model=options.model, rounds=options.rounds)
    if options.only != 'memory':
        found |= speed(options)
    if options.only != 'speed':
        # a process whose memory nothing else has touched
        with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
            found['memory'] = pool.submit(memory, options.model, options.minutes).result()
    write_results(options.out, found)


if __name__ == '__main__':
    main()
