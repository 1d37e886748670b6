"""A sound font of a few kB for the tests: every program of General MIDI is a sine, the drums are noise."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

RATE = 24000
LOOP = 240  # samples of the loop, ten periods of 1000 Hz
GENERATORS = dict(instrument=41, sample=53, mode=54, root=58, release=38)


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack('<I', len(body)) + body + b'\0' * (len(body) % 2)


def _list(name: bytes, *chunks: bytes) -> bytes:
    return _chunk(b'LIST', name + b''.join(chunks))


def _name(text: str) -> bytes:
    return text.encode().ljust(20, b'\0')


def write_sound_font(path: Path, programs: range = range(128), drums: bool = True, gain: float = 0.5) -> Path:
    """Write a .sf2 with a sine of 1 kHz for each of `programs`, and a drum kit of noise; of another `gain`, louder."""
    t = np.arange(RATE // 2)
    sine = gain * np.sin(2 * np.pi * 1000 * t / RATE)
    noise = gain * np.random.default_rng(0).standard_normal(RATE // 5) / 3 * np.exp(-np.arange(RATE // 5) / 800)
    silence = np.zeros(46)
    waves = [sine, noise]
    data, headers, at = [], [], 0
    for number, (wave, root) in enumerate(zip(waves, (83, 60))):  # 1 kHz is near B5
        data += [wave, silence]
        bounds = (at, at + len(wave), at + 4 * LOOP, at + len(wave) - 4 * LOOP if number == 0 else at + 5 * LOOP)
        correction = -21 if number == 0 else 0  # cents by which 1 kHz lies above B5, taken back
        headers.append(_name(f'wave {number}') + struct.pack('<5IBbHH', *bounds, RATE, root, correction, 0, 1))
        at += len(wave) + len(silence)
    headers.append(_name('EOS') + bytes(26))
    pcm = (np.clip(np.concatenate(data), -1, 1) * 32767).astype('<i2').tobytes()

    def zones(lists: list[list[tuple[int, int]]]) -> tuple[list[bytes], bytes, list[int]]:
        bags, generators, count = [], b'', 0
        for zone in lists:
            bags.append(struct.pack('<HH', count, 0))
            generators += b''.join(struct.pack('<Hh', *it) for it in zone)
            count += len(zone)
        return [*bags, struct.pack('<HH', count, 0)], generators + bytes(4), list(range(len(lists) + 1))

    looped = [(GENERATORS['release'], -3000), (GENERATORS['mode'], 1), (GENERATORS['sample'], 0)]
    struck = [(GENERATORS['release'], 0), (GENERATORS['mode'], 0), (GENERATORS['sample'], 1)]
    instrument_bags, instrument_generators, places = zones([looped, struck])
    instruments = [_name(name) + struct.pack('<H', at) for name, at in zip(('sine', 'noise', 'EOI'), places)]
    presets = [(number, 0, 0) for number in programs] + ([(0, 128, 1)] if drums else [])
    preset_bags, preset_generators, places = zones([[(GENERATORS['instrument'], which)] for _, _, which in presets])
    preset_headers = [
        _name(f'preset {bank} {number}') + struct.pack('<HHHIII', number, bank, at, 0, 0, 0)
        for (number, bank, _), at in zip(presets, places)
    ]
    preset_headers.append(_name('EOP') + struct.pack('<HHHIII', 0, 0, places[-1], 0, 0, 0))
    info = _list(
        b'INFO', _chunk(b'ifil', struct.pack('<HH', 2, 1)), _chunk(b'isng', b'EMU8000\0'), _chunk(b'INAM', b'Tests\0')
    )
    articulation = _list(
        b'pdta',
        _chunk(b'phdr', b''.join(preset_headers)),
        _chunk(b'pbag', b''.join(preset_bags)),
        _chunk(b'pmod', bytes(10)),
        _chunk(b'pgen', preset_generators),
        _chunk(b'inst', b''.join(instruments)),
        _chunk(b'ibag', b''.join(instrument_bags)),
        _chunk(b'imod', bytes(10)),
        _chunk(b'igen', instrument_generators),
        _chunk(b'shdr', b''.join(headers)),
    )
    path.write_bytes(_chunk(b'RIFF', b'sfbk' + info + _list(b'sdta', _chunk(b'smpl', pcm)) + articulation))
    return path
