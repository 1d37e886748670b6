"""Build sound fonts whose instruments sound unlike those of the usual ones: a MuLaN shall learn instruments, not fonts.

    npm pack tonejs-instrument-{violin,cello,flute,clarinet,trumpet,trombone,french-horn,saxophone,piano,organ}-mp3
    npm pack tonejs-instrument-{harp,harmonium,guitar-acoustic,guitar-electric,guitar-nylon}-mp3
    python examples/varied_fonts.py recorded . -o recorded.sf2       # samples by N. Brosowsky and others, CC BY 3.0
    python examples/varied_fonts.py modelled -o modelled.sf2         # Debian: apt-get install stk
    python examples/varied_fonts.py patches /usr/share/midi/freepats -o freepats.sf2       # Debian: freepats
    for seed in 0 1 2 3 4; do
        python examples/varied_fonts.py varied FluidR3_GM.sf2 recorded.sf2 modelled.sf2 --seed $seed -o varied$seed.sf2
    done

`varied` plays other fonts' instruments through a random equaliser, with a note repeated from a few periods of the tone,
vibrato, a second voice out of tune, another attack or decay, and few samples that each serve many keys, as small fonts
do. The fonts have the instruments of `SyntheticMusic`, some of them a part, and are passed beside whole ones:
`SyntheticMusic(sound_font=['FluidR3_GM.sf2', 'varied0.sf2', …])`. It needs the extra `scores`.
"""

from __future__ import annotations

import argparse
import io
import itertools
import re
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import butter, resample_poly, sosfilt

from musiclm_pytorch.data.sampled import PROGRAMS
from musiclm_pytorch.data.scores.composer import Note, Part
from musiclm_pytorch.data.scores.instruments import INSTRUMENTS
from musiclm_pytorch.data.scores.rendering import SoundFont

RATE = 44100
Notes = dict[int, np.ndarray]  # a wave for each of some keys
Presets = dict[tuple[int, int], Notes]  # by bank and program
DRUMS = (128, 0)
DYING = {'piano', 'guitar', 'bell', 'electric piano', 'harp'}  # what is struck or plucked dies away
STEPS = dict(C=0, Cs=1, D=2, Ds=3, E=4, F=5, Fs=6, G=7, Gs=8, A=9, As=10, B=11)
RECORDED = {
    'piano': ('piano',),
    'guitar-nylon': ('nylon guitar',),
    'guitar-acoustic': ('steel guitar',),
    'flute': ('flute',),
    'trombone': ('trombone',),
    'organ': ('church organ',),
    'violin': ('violin',),
    'cello': ('cello',),
    'harp': ('harp',),
    'clarinet': ('clarinet',),
    'saxophone': ('alto sax', 'tenor sax', 'baritone sax'),
    'trumpet': ('trumpet',),
    'harmonium': ('accordion',),
}
# of STK: its name for an instrument, what it is here, and the keys where it is in tune
MODELLED = {
    'Clarinet': (('clarinet',), 48, 96),
    'Saxofony': (('alto sax', 'tenor sax', 'baritone sax'), 33, 81),
    'Flute': (('flute',), 57, 96),
    'Bowed': (('violin',), 57, 72),
    'Rhodey': (('electric piano',), 33, 96),
    'BeeThree': (('church organ',), 33, 96),
    'FMVoices': (('choir', 'voice oohs'), 33, 96),
    'TubeBell': (('tubular bells',), 33, 96),
    'Plucked': (('nylon guitar',), 33, 78),
    'StifKarp': (('steel guitar',), 33, 84),
}
PATCH, INSTRUMENT, LAYER, SAMPLE = 129, 63, 47, 96  # bytes of the heads of Gravis Ultrasound's patches


def finished(wave: np.ndarray, seconds: float = 4.0) -> np.ndarray:
    """Of the same loudness as the others, ending softly."""
    wave = np.asarray(wave, np.float64)[: int(seconds * RATE)]
    wave = wave * (0.12 / max(1e-9, float(np.sqrt(np.mean(wave[:RATE] ** 2)))))
    wave = wave * min(1.0, 0.95 / max(1e-9, float(np.abs(wave).max())))
    end = min(len(wave) // 4, 2000)
    wave[len(wave) - end :] *= np.linspace(1, 0, end)
    return wave


def write(path: Path, presets: Presets) -> None:
    """A .sf2 in which each key plays the nearest sample, once and to its end (SoundFont 2.01)."""

    def chunk(tag: bytes, body: bytes) -> bytes:
        return tag + struct.pack('<I', len(body)) + body + b'\0' * (len(body) % 2)

    def label(text: str) -> bytes:
        return text.encode()[:19].ljust(20, b'\0')

    heads = dict.fromkeys(('phdr', 'pbag', 'pmod', 'pgen', 'inst', 'ibag', 'imod', 'igen', 'shdr'), b'')
    waves, at, zone = [], 0, 0
    for number, ((bank, program), notes) in enumerate(sorted(presets.items())):
        name = label(f'{bank} {program}')
        heads['phdr'] += name + struct.pack('<HHHIII', program, bank, number, 0, 0, 0)
        heads['pbag'] += struct.pack('<HH', number, 0)
        heads['pgen'] += struct.pack('<HH', 41, number)  # the instrument
        heads['inst'] += name + struct.pack('<H', zone)
        keys = sorted(notes)
        edges = [0, *((low + high + 1) // 2 for low, high in itertools.pairwise(keys)), 128]
        for key, low, high in zip(keys, edges, edges[1:]):
            data = np.round(np.clip(notes[key], -1, 1) * 32767).astype('<i2')
            heads['ibag'] += struct.pack('<HH', 3 * zone, 0)
            heads['igen'] += struct.pack('<HBB', 43, low, high - 1)  # its keys
            heads['igen'] += struct.pack('<HhHH', 38, -2786, 53, zone)  # 0.2 s of release, the sample
            heads['shdr'] += label(f'{bank} {program} {key}')
            heads['shdr'] += struct.pack('<5IBbHH', at, at + len(data), at, at + len(data), RATE, key, 0, 0, 1)
            waves += [data, np.zeros(46, '<i2')]
            at, zone = at + len(data) + 46, zone + 1
    count = len(presets)
    heads['phdr'] += label('EOP') + struct.pack('<HHHIII', 0, 0, count, 0, 0, 0)
    heads['pbag'] += struct.pack('<HH', count, 0)
    heads['inst'] += label('EOI') + struct.pack('<H', zone)
    heads['ibag'] += struct.pack('<HH', 3 * zone, 0)
    heads['shdr'] += label('EOS') + bytes(26)
    heads |= {name: heads[name] + bytes(4) for name in ('pgen', 'igen')} | dict(pmod=bytes(10), imod=bytes(10))
    info = chunk(b'ifil', struct.pack('<HH', 2, 1)) + chunk(b'isng', b'EMU8000\0') + chunk(b'INAM', label(path.stem))
    body = chunk(b'LIST', b'INFO' + info)
    body += chunk(b'LIST', b'sdta' + chunk(b'smpl', np.concatenate(waves).tobytes()))
    body += chunk(b'LIST', b'pdta' + b''.join(chunk(name.encode(), it) for name, it in heads.items()))
    path.write_bytes(chunk(b'RIFF', b'sfbk' + body))


def named(names: Iterable[str], notes: Notes) -> Presets:
    return {(0, INSTRUMENTS[name].program): notes for name in names}


def shifted(wave: np.ndarray, cents: float) -> np.ndarray:
    places = np.arange(int(len(wave) / 2 ** (cents / 1200))) * 2 ** (cents / 1200)
    return np.interp(places, np.arange(len(wave)), wave)


def together(players: list[Notes], random: np.random.Generator) -> Notes:
    """Three of each that has a note near, a little out of tune and of time."""
    found = {}
    for key in sorted({it for notes in players for it in notes})[::2]:
        total = np.zeros(4 * RATE)
        for notes in players:
            near = min(notes, key=lambda it: abs(it - key))
            for _ in range(3 if abs(near - key) <= 4 else 0):
                late = int(random.uniform(0, 1500))
                wave = shifted(notes[near], 100 * (key - near) + random.uniform(-12, 12))[: len(total) - late]
                total[late : late + len(wave)] += wave
        found[key] = finished(total)
    return found


def driven(notes: Notes, gain: float) -> Notes:
    return {key: finished(np.tanh(gain * wave)) for key, wave in notes.items()}


def recorded(folder: Path) -> Presets:
    """The instruments of the packages that `npm pack` left in a folder."""

    def read(name: str) -> Notes:
        notes = {}
        packages = sorted(folder.glob(f'tonejs-instrument-{name}-mp3-*.tgz'))
        if not packages:
            raise FileNotFoundError(f'no package of the {name} is in {folder}; npm pack tonejs-instrument-{name}-mp3')
        with tarfile.open(packages[-1]) as package:
            for member in package:
                if found := re.fullmatch(r'package/([A-G]s?)(\d)\.mp3', member.name):
                    wave, rate = soundfile.read(io.BytesIO(package.extractfile(member).read()), always_2d=True)
                    wave = resample_poly(wave.mean(axis=1), RATE, rate)
                    first = int(np.argmax(np.abs(wave) > 0.02 * np.abs(wave).max()))
                    notes[12 * (int(found[2]) + 1) + STEPS[found[1]]] = finished(wave[max(0, first - 200) :], 6)
        return notes

    random, notes = np.random.default_rng(0), {name: read(name) for name in (*RECORDED, 'french-horn')}
    presets: Presets = {}
    for name, names in RECORDED.items():
        presets |= named(names, notes[name])
    brass = together([notes['trumpet'], notes['trombone'], notes['french-horn']], random)
    presets |= named(['string ensemble'], together([notes['violin'], notes['cello']], random))
    presets |= named(['brass section'], brass)
    guitar = read('guitar-electric')
    return presets | named(['overdriven guitar'], driven(guitar, 6)) | named(['distorted guitar'], driven(guitar, 25))


def modelled() -> Presets:
    """Physical models of STK, played by its `stk-demo`, and synthesisers."""
    presets: Presets = {}
    with tempfile.TemporaryDirectory() as folder:
        score, sound = Path(folder, 'note.ski'), Path(folder, 'note.wav')
        for name, (names, low, high) in MODELLED.items():
            notes = {}
            for key in range(low, high + 1, 3):
                score.write_text(f'NoteOn 0 1 {key} 100\nNoteOff 3.5 1 {key} 100\n')
                command = ['stk-demo', name, '-n', '1', '-s', str(RATE), '-ow', str(sound), '-if', str(score)]
                subprocess.run(command, check=True, capture_output=True)
                notes[key] = finished(soundfile.read(sound)[0])
            presets |= named(names, notes)
    presets |= named(['overdriven guitar'], driven(presets[0, INSTRUMENTS['nylon guitar'].program], 8))
    presets |= named(['distorted guitar'], driven(presets[0, INSTRUMENTS['steel guitar'].program], 40))
    time, random = np.arange(3 * RATE) / RATE, np.random.default_rng(0)
    for name, even, detuned, bright in (
        ('square lead', False, [0], 10),
        ('saw lead', True, [0], 10),
        ('polysynth', True, [-9, 0, 8], 6),
    ):
        notes = {}
        for key in range(36, 97, 4):
            wave = np.zeros_like(time)
            pitch = 440 * 2 ** ((key - 69) / 12)
            for cents in detuned:
                own, phase = pitch * 2 ** (cents / 1200), random.uniform(0, 2 * np.pi)
                for partial in range(1, min(60, int(16000 / own)) + 1, 1 if even else 2):
                    wave += np.sin(2 * np.pi * own * partial * time + phase * partial) / partial
            wave = sosfilt(butter(2, min(18000, pitch * bright), fs=RATE, output='sos'), wave)
            notes[key] = finished(wave * np.minimum(1, time / 0.01) * (0.6 + 0.4 * np.exp(-3 * time)))
        presets |= named([name], notes)
    for name, ratio, decay in (('celesta', 4.0, 2.5), ('glockenspiel', 2.76, 1.8), ('music box', 5.4, 3.0)):
        notes = {}
        for key in range(48, 104, 4):
            partials = [440 * 2 ** ((key - 69) / 12) * it for it in (1, ratio, 2.1 * ratio)]
            waves = [
                level * np.exp(-decay * speed * time) * np.sin(2 * np.pi * hz * time)
                for hz, level, speed in zip(partials, (1, 0.5, 0.25), (1, 1.8, 4))
                if hz < 20000
            ]
            notes[key] = finished(sum(waves) * np.minimum(1, time / 0.002))
        presets |= named([name], notes)
    return presets


def read_patch(path: Path) -> Iterable[tuple[float, np.ndarray]]:
    """Frequency in Hz and wave of each sample of a patch of Gravis Ultrasound, its loop played out."""
    data = path.read_bytes()
    if not data.startswith(b'GF1PATCH1'):
        raise ValueError(f'{path} is no patch of Gravis Ultrasound')
    at = PATCH + INSTRUMENT + LAYER
    for _ in range(data[PATCH + INSTRUMENT + 6]):
        size, start, stop, rate, _, _, root = struct.unpack_from('<3IH3I', data, at + 8)
        modes = data[at + 55]  # 16 bits, unsigned, looped, to and fro, backwards
        at += SAMPLE
        wave = np.frombuffer(data, '<i2' if modes & 1 else 'i1', size // (1 + (modes & 1)), at) / (
            32768 if modes & 1 else 128
        )
        at += size
        if modes & 2:
            wave = (wave + 2) % 2 - 1
        if modes & 16:
            wave = wave[::-1]
        start, stop = start // (1 + (modes & 1)), stop // (1 + (modes & 1))
        if modes & 4 and start + 8 < stop <= len(wave) + 1:
            loop = np.concatenate([wave[start:stop], wave[start:stop][::-1]]) if modes & 8 else wave[start:stop]
            wave = np.concatenate([wave[:stop], np.tile(loop, 4 * rate // len(loop) + 1)])[: 4 * rate]
        ratio = Fraction(RATE / rate).limit_denominator(400)
        yield root / 1000, resample_poly(wave, ratio.numerator, ratio.denominator)


def patches(folder: Path) -> Presets:
    """FreePats' instruments and drums: `NNN_name.pat` in the folders Tone_000 and Drum_000."""
    plucked = {INSTRUMENTS[name].program for kind in DYING for names in PROGRAMS[kind].values() for name in names}
    presets: Presets = {DRUMS: {}}
    for path in sorted(folder.glob('*_000/[0-9][0-9][0-9]_*.pat')):
        number = int(path.name[:3])
        if path.parent.name == 'Drum_000':
            presets[DRUMS][number] = finished(next(iter(read_patch(path)))[1], 2)
            continue
        notes = {}
        for hz, wave in read_patch(path):
            key = 69 + 12 * np.log2(hz / 440)
            fading = np.exp(-np.arange(len(wave)) / RATE * 1.3) if number in plucked else 1
            notes[round(key)] = finished(shifted(wave * fading, 100 * (round(key) - key)))
        presets[0, number] = {key: wave for key, wave in notes.items() if 0 < key < 128}
    if len(presets) == 1:
        raise FileNotFoundError(f'no patches are in {folder}')
    return presets


def equaliser(random: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    hills = [
        (random.uniform(-9, 9), np.log(150) + random.random() * np.log(8000 / 150), random.uniform(0.5, 1.5))
        for _ in range(3)
    ]
    tilt = random.uniform(-3, 2)

    def apply(wave: np.ndarray) -> np.ndarray:
        hz = np.maximum(np.fft.rfftfreq(len(wave), 1 / RATE), 1)
        gain = tilt * np.log2(np.maximum(hz, 100) / 1000)
        gain = gain + sum(dB * np.exp(-(((np.log2(hz) - at / np.log(2)) / width) ** 2)) for dB, at, width in hills)
        return np.fft.irfft(np.fft.rfft(wave) * 10 ** (gain / 20), len(wave))

    return apply


def looped(wave: np.ndarray, first: int, length: int) -> np.ndarray:
    """The wave up to `first`, and from there `length` samples of it again and again."""
    if first + 2 * length > len(wave):
        return wave
    fade = np.linspace(0, 1, length)
    period = wave[first + length : first + 2 * length] * (1 - fade) + wave[first : first + length] * fade
    return np.concatenate([wave[: first + length], np.tile(period, len(wave) // length + 1)])[: len(wave)]


def varied(fonts: list[Path], seed: int) -> Presets:
    """The instruments of other fonts, each changed in a way of its own."""
    random, opened, presets = np.random.default_rng(seed), [SoundFont.open(it.resolve()) for it in fonts], {}
    time = np.arange(int(3.5 * RATE)) / RATE
    for kind, name in sorted({(kind, it) for kind, by in PROGRAMS.items() for names in by.values() for it in names}):
        program, dying = INSTRUMENTS[name].program, kind in DYING
        able = [it for it in opened if it.preset(0, program)]
        font, velocity = able[random.integers(len(able))], int(random.integers(60, 120))
        step, equalise, attack = int(random.integers(5, 12)), equaliser(random), random.uniform(0.05, 0.35)
        short, periods = random.random() < 0.6, int(random.integers(2, 30))
        detuned = random.uniform(3, 18) if random.random() < 0.35 else 0
        depth = random.uniform(3, 25) if random.random() < 0.4 and not dying else 0
        speed, decay, highest = random.uniform(4, 6.5), random.uniform(0.6, 4), random.choice([4000, 6000, 9000, 20000])
        rise = random.uniform(0.001, 0.08) if random.random() < 0.5 and not dying else 0
        notes: Notes = {}
        for key in range(int(random.integers(30, 30 + step)), 100, step):
            stroke = Part('lead', 0, program, 0.0, (Note(0.0, 3.5, key, velocity),))
            wave = font.render([stroke], len(time), RATE).astype(np.float64)
            if np.abs(wave).max() < 1e-4:
                continue
            wave = equalise(wave)
            if short:
                wave = looped(wave, int(attack * RATE), round(periods * RATE / (440 * 2 ** ((key - 69) / 12))))
                wave = wave * np.exp(-np.maximum(0, time - attack) * decay) if dying else wave
            if detuned:
                second = shifted(wave, detuned)
                wave[: len(second)] += second
            if depth:
                swing = RATE * (2 ** (depth / 1200) - 1) / (2 * np.pi * speed) * np.sin(2 * np.pi * speed * time)
                wave = np.interp(np.arange(len(wave)) + swing * np.minimum(1, time / 0.4), np.arange(len(wave)), wave)
            if highest < 20000:
                wave = sosfilt(butter(4, highest, fs=RATE, output='sos'), wave)
            notes[key] = finished(wave * np.minimum(1, time / rise) if rise else wave, 3.2)
        presets[0, program] = notes
    return presets


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kind', choices=['recorded', 'modelled', 'patches', 'varied'])
    parser.add_argument('sources', type=Path, nargs='*', help='a folder, or the sound fonts to change')
    parser.add_argument('--seed', type=int, default=0, help='of what is drawn for `varied` (default 0)')
    parser.add_argument('-o', '--output', type=Path, required=True)
    args = parser.parse_args()
    if args.kind != 'modelled' and not args.sources:
        parser.error(f'{args.kind} needs its sources')
    made = dict(
        recorded=lambda: recorded(args.sources[0]),
        modelled=modelled,
        patches=lambda: patches(args.sources[0]),
        varied=lambda: varied(args.sources, args.seed),
    )
    write(args.output, made[args.kind]())
    SoundFont.open(args.output.resolve())  # which raises if FluidSynth cannot read it
    print(f'{args.output} has {args.output.stat().st_size / 1e6:.0f} MB')
