"""What codecs leave of music: mel distance, ViSQOL, bit rate, and how fast they decode, side by side in one run.

    python benchmarks/codecs.py --codec mine=results/last --other-font /usr/share/sounds/sf2/TimGM6mb.sf2
    python benchmarks/codecs.py --codec mine=results/last --recordings /usr/share/games/wesnoth/1.16/data/core/music

Beside the codecs given are measured that of the model that ships (16 kHz) and a SpectralCodec at its usual size, fitted
here to clips of ScoreMusic's 'train' at 24 kHz. The clips are those of 'valid', of another sound font if --other-font
says so, and crops of the recordings. All is compared at 24 kHz: a codec of a lower rate loses what lies above it,
which the distance up to 8 kHz leaves out. ViSQOL (MOS from 1 to 5, its mode for audio) is that of `visqol-python`;
without that package its column is empty. Needs the extra `scores`, and a sound font.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from results import add_out, write_results  # beside this file
from torch import Tensor

from musiclm_pytorch import ScoreMusic, SpectralCodec
from musiclm_pytorch.audiolm.saving import load_module
from musiclm_pytorch.codecs import mel_distance
from musiclm_pytorch.data.audio import AudioFile, resample
from musiclm_pytorch.pretrained import find_pretrained

RATE = 24000
SUFFIXES = ('.ogg', '.flac', '.wav', '.mp3')


def read_recordings(folders: list[Path], count: int, seconds: float) -> Tensor:
    """`(up to count, samples)`: the middle of as many files, evenly chosen, that are long enough."""
    files = sorted(it for folder in folders for it in folder.rglob('*') if it.suffix.lower() in SUFFIXES)
    samples, waves = round(seconds * RATE), []
    for i in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int):
        with AudioFile(files[i]) as file:
            start = (file.length_at(RATE) - samples) // 2
            if start >= 0:
                waves.append(file.read_at(start, start + samples, RATE))
    return torch.stack(waves)


def visqol() -> Callable[[Tensor, Tensor], float] | None:
    """A function of a wave and its copy at `RATE`, or None without the package."""
    if importlib.util.find_spec('visqol') is None:
        return None
    from visqol import VisqolApi

    api = VisqolApi()
    api.create(mode='audio')

    def measure(wave: Tensor, made: Tensor) -> float:
        ours, theirs = (resample(it[None], RATE, 48000)[0].double().numpy() for it in (wave, made))
        return float(api.measure_from_arrays(ours, theirs, sample_rate=48000).moslqo)

    return measure


def through(codec: torch.nn.Module, wave: Tensor) -> tuple[Tensor, float]:
    """What a codec makes of `(samples,)` at `RATE`, and the seconds of processor time that decoding took."""
    codes = codec.encode(resample(wave[None], RATE, codec.sample_rate))
    start = time.process_time()
    made = codec.decode(codes)
    took = time.process_time() - start
    return resample(made, codec.sample_rate, RATE)[0], took


def measure(codec: torch.nn.Module, waves: Tensor, mos: Callable | None, judged: int) -> dict[str, float | None]:
    through(codec, waves[0])  # the first call plans
    distances, scores, took = [], [], 0.0
    for number, wave in enumerate(waves):
        made, seconds = through(codec, wave)
        took += seconds
        length = min(len(made), len(wave))
        wave, made = wave[:length], made[:length]
        distances.append([float(mel_distance(wave[None], made[None], RATE, hz)) for hz in (8000, None)])
        if mos is not None and number < judged:
            scores.append(mos(wave, made))
    near, full = np.mean(distances, axis=0)
    return {
        'mel distance to 8 kHz, dB': float(near),
        'to 12 kHz, dB': float(full),
        'ViSQOL': float(np.mean(scores)) if scores else None,
        'decoding, × real time': waves.numel() / RATE / took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--codec', action='append', default=[], metavar='NAME=FOLDER', help='a codec to measure, too')
    parser.add_argument('--clips', type=int, default=100, help='clips of each set (default 100)')
    parser.add_argument('--judged', type=int, default=30, help='of which ViSQOL hears as many (default 30)')
    parser.add_argument('--seconds', type=float, default=5.0)
    parser.add_argument(
        '--fitted', type=int, default=1000, help='clips the SpectralCodec is fitted to, 0 for none (default 1000)'
    )
    parser.add_argument('--sound-font', help='path of the font (default: the one that is found)')
    parser.add_argument('--other-font', help='path of the font of the clips that are measured')
    parser.add_argument('--recordings', type=Path, nargs='*', default=[], help='folders of real music')
    add_out(parser, 'codecs')
    args = parser.parse_args()

    torch.set_num_threads(1)
    named = dict(it.split('=', 1) for it in args.codec)
    codecs = {'shipped': load_module(find_pretrained('tiny') / 'codec')}
    if args.fitted:
        codecs['SpectralCodec'] = SpectralCodec(sample_rate=RATE)
        clips = ScoreMusic(args.fitted, seconds=args.seconds, sample_rate=RATE, sound_font=args.sound_font)
        codecs['SpectralCodec'].fit(clips, max_vectors=60_000)
    codecs |= {name: load_module(folder) for name, folder in named.items()}

    held_out = ScoreMusic(
        args.clips, seconds=args.seconds, sample_rate=RATE, split='valid', sound_font=args.other_font or args.sound_font
    )
    sets = {'ScoreMusic': torch.stack([held_out[i][0] for i in range(args.clips)])}
    if args.recordings:
        sets['recordings'] = read_recordings(args.recordings, args.clips, args.seconds)
    mos, rows = visqol(), []
    for title, waves in sets.items():
        for name, codec in codecs.items():
            bits = float(codec.frame_rate) * codec.num_quantizers * math.log2(codec.codebook_size)
            row = {'set': f'{title}, {len(waves)} clips', 'codec': name, 'Hz': codec.sample_rate, 'kbit/s': bits / 1000}
            rows.append(row | measure(codec, waves, mos, args.judged))
            if len(rows) == 1:
                print('| ' + ' | '.join(rows[0]) + ' |\n|' + '---|' * len(rows[0]))
            shown = (f'{it:.2f}' if isinstance(it, float) else it or '–' for it in rows[-1].values())
            print('| ' + ' | '.join(map(str, shown)) + ' |', flush=True)
    write_results(args.out, dict(seconds=args.seconds, judged=args.judged, rows=rows))


if __name__ == '__main__':
    main()
