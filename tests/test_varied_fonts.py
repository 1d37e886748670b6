"""The sound fonts that `examples/varied_fonts.py` builds: what FluidSynth plays of them."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers.sound_font import write_sound_font

from musiclm_pytorch.data.sampled import PROGRAMS
from musiclm_pytorch.data.scores.composer import DRUM_CHANNEL, Note, Part
from musiclm_pytorch.data.scores.instruments import INSTRUMENTS
from musiclm_pytorch.data.scores.rendering import SoundFont

pytest.importorskip('fluidsynth', exc_type=ImportError)
SCRIPT = Path(__file__).parents[1] / 'examples' / 'varied_fonts.py'


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('varied_fonts', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tone(hz, seconds=1.0, rate=44100):
    return 0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)


def loudest_hz(wave, rate=44100):
    wave = wave[2000:20000]
    return np.abs(np.fft.rfft(wave * np.hanning(len(wave)))).argmax() * rate / len(wave)


def play(font, program, key, channel=0):
    return font.render([Part('lead', channel, program, 0.0, (Note(0.0, 0.6, key, 100),))], 30000, 44100)


def test_keys_play_the_nearest_sample_at_their_pitch(script, tmp_path):
    presets = {
        (0, 40): {60: tone(261.63), 72: tone(523.25)},
        (0, 2): {69: tone(440.0)},
        script.DRUMS: {36: tone(100.0)},
    }
    script.write(tmp_path / 'few.sf2', presets)
    font = SoundFont.open(tmp_path / 'few.sf2')
    assert [font.preset(0, it) for it in (40, 2, 41)] == [(0, 40), (0, 2), None]
    assert font.preset(DRUM_CHANNEL, 8) == (128, 0)
    for program, key, hz in ((40, 60, 261.63), (40, 69, 440.0), (40, 62, 293.66), (2, 57, 220.0)):
        assert loudest_hz(play(font, program, key)) == pytest.approx(hz, rel=0.01)
    assert loudest_hz(play(font, 0, 36, DRUM_CHANNEL)) == pytest.approx(100, rel=0.05)


def test_other_fonts_instruments_keep_their_pitch_and_change_their_sound(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, 'PROGRAMS', {it: PROGRAMS[it] for it in ('harp', 'violin')})
    source = write_sound_font(tmp_path / 'source.sf2')
    one, same, other = (script.varied([source], seed) for seed in (0, 0, 1))
    programs = {INSTRUMENTS[it].program for it in ('harp', 'violin', 'fiddle')}
    assert one.keys() == other.keys() == {(0, it) for it in programs}
    for preset, notes in one.items():
        assert all(np.array_equal(wave, same[preset][key]) for key, wave in notes.items())
        assert notes.keys() != other[preset].keys() or any(
            not np.array_equal(it, other[preset][k]) for k, it in notes.items()
        )
        assert all(np.abs(wave).max() <= 0.95 and abs(wave[-1]) < 1e-6 for wave in notes.values())
        key = min(notes, key=lambda it: abs(it - 72))
        assert loudest_hz(notes[key]) == pytest.approx(440 * 2 ** ((key - 69) / 12), rel=0.02)


@pytest.mark.parametrize(('modes', 'kind'), [(0x01, '<i2'), (0x05, '<i2'), (0x03, '<u2'), (0x06, 'u1'), (0x0D, '<i2')])
def test_patches_of_all_kinds_of_samples_are_read(script, tmp_path, modes, kind):
    """16 or 8 bits, signed or not, looped or not, the loop to and fro."""
    width = np.dtype(kind).itemsize
    wave = 0.3 * np.cos(2 * np.pi * np.arange(4410) / 50)  # 441 Hz, the same backwards
    middle = 2 ** (8 * width - 1) if 'u' in kind else 0
    data = np.round(wave * (2 ** (8 * width - 1) - 1) + middle).astype(kind).tobytes()
    loop = (50 * 20 * width, 50 * 40 * width)  # whole periods
    head = (
        bytes(8)
        + struct.pack('<3IH3I', len(data), *loop, 22050, 0, 0, 441_000)
        + bytes(21)
        + bytes([modes])
        + bytes(40)
    )
    path = tmp_path / '040_violin.pat'
    counted = bytearray(129 + 63 + 47)
    counted[:12], counted[129 + 63 + 6] = b'GF1PATCH110\0', 1
    path.write_bytes(bytes(counted) + head + data)
    ((hz, found),) = script.read_patch(path)
    assert hz == 441
    assert len(found) == (4 * 44100 if modes & 4 else 0.2 * 44100)
    assert loudest_hz(np.tile(found, 4)) == pytest.approx(441, rel=0.01)
    assert np.abs(found[2000:6000]).max() == pytest.approx(0.3, rel=0.05)
    path.write_bytes(b'RIFF')
    with pytest.raises(ValueError, match='no patch of Gravis Ultrasound'):
        next(iter(script.read_patch(path)))
