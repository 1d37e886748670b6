"""Parts to waves, by FluidSynth and a sound font (.sf2, .sf3)."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from ctypes import c_int, c_void_p
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from scipy.signal import resample_poly

from musiclm_pytorch.data.attributes import choose
from musiclm_pytorch.data.scores.composer import DRUM_CHANNEL, Part
from musiclm_pytorch.extras import how_to_install

# where Debian, Fedora, Arch, Homebrew and MacPorts put fonts; the larger and better ones first
FOLDERS = (
    '/usr/share/sounds/sf2',
    '/usr/share/sounds/sf3',
    '/usr/share/soundfonts',
    '/usr/local/share/soundfonts',
    '/opt/homebrew/share/soundfonts',
    '/opt/homebrew/share/fluid-synth/sf2',
    '/usr/local/share/fluid-synth/sf2',
    '/opt/local/share/sounds/sf2',
)
FONTS = ('FluidR3_GM.sf2', 'MuseScore_General.sf3', 'MuseScore_General_Lite.sf3', 'default-GM.sf2', 'default-GM.sf3')
VARIABLE = 'MUSICLM_SOUND_FONT'
BLOCK = 64  # samples that FluidSynth computes at once; an event takes effect at the next block
DRUM_BANK = 128
POLYPHONY = 128
SAMPLED = 44100  # Hz, the rate of most fonts' samples
WARNING = 2  # FluidSynth's number for the level of a message


def find_sound_font(sound_font: str | os.PathLike | None = None) -> Path:
    """The sound font given, or that of the environment's MUSICLM_SOUND_FONT, or one in a usual place.

    Raises FileNotFoundError, which says what to install, ValueError for a file that is no sound font.
    """
    given = sound_font or os.environ.get(VARIABLE)
    if given is None:
        for folder in FOLDERS:
            for name in FONTS:
                if (path := Path(folder, name)).is_file():
                    return path
        raise FileNotFoundError(
            'no sound font was found; install one (Debian: apt-get install fluid-soundfont-gm, Fedora: dnf install '
            f'fluid-soundfont-gm), or pass sound_font= or set {VARIABLE} to the path of a .sf2 or .sf3'
        )
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f'no sound font is at {path}')
    with path.open('rb') as file:
        head = file.read(12)
    if head[:4] != b'RIFF' or head[8:] != b'sfbk':
        raise ValueError(f'{path} is no sound font: it does not begin as a .sf2 or .sf3 does')
    return path.resolve()


def find_sound_fonts(sound_font: str | os.PathLike | Sequence[str | os.PathLike] | None = None) -> list[Path]:
    """`find_sound_font` of one or of several. Raises ValueError for none in a list."""
    several = isinstance(sound_font, Sequence) and not isinstance(sound_font, str)
    if several and not sound_font:
        raise ValueError('sound_font is an empty list; leave it out to look for one')
    return [find_sound_font(it) for it in (sound_font if several else [sound_font])]


@cache
def _library() -> tuple[ModuleType, SimpleNamespace]:
    """pyfluidsynth, and functions of FluidSynth that it does not declare."""
    try:
        import fluidsynth
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            raise ImportError(f'ScoreMusic needs pyfluidsynth: {how_to_install("scores")}') from error
        raise ImportError(
            'pyfluidsynth finds no FluidSynth on this machine; install it (Debian: apt-get install libfluidsynth3, '
            'Fedora: dnf install fluidsynth-libs, macOS: brew install fluid-synth)'
        ) from error

    def declared(name: str, gives: Any, *takes: Any) -> Callable[..., Any]:
        return fluidsynth.cfunc(name, gives, *((f'argument {place}', it, 1) for place, it in enumerate(takes)))

    # it would warn each time that a synthesiser gives back its font; errors are still told
    declared('fluid_set_log_function', c_void_p, c_int, c_void_p, c_void_p)(WARNING, None, None)
    channel = (c_void_p, c_int, c_int)  # samples, the first of them, from one to the next
    more = SimpleNamespace(
        add_font=declared('fluid_synth_add_sfont', c_int, c_void_p, c_void_p),
        remove_font=declared('fluid_synth_remove_sfont', c_int, c_void_p, c_void_p),
        font_at=declared('fluid_synth_get_sfont_by_id', c_void_p, c_void_p, c_int),
        preset_at=declared('fluid_sfont_get_preset', c_void_p, c_void_p, c_int, c_int),
        write=declared('fluid_synth_write_float', c_int, c_void_p, c_int, *channel, *channel),
    )
    return fluidsynth, more


class Room(NamedTuple):
    """How much a clip sounds of a room: size, damping and level of FluidSynth's reverb, each from 0 to 1."""

    size: float = 0.4
    damping: float = 0.3
    level: float = 0.4

    @classmethod
    def draw(cls, random: np.random.Generator) -> Room:
        return cls(random.uniform(0.1, 0.8), random.uniform(0.1, 0.7), random.uniform(0.0, 0.7) ** 1.5)


def draw_font(random: np.random.Generator, fonts: Sequence[Path], plays: Callable[[SoundFont], bool]) -> SoundFont:
    """One of the fonts at random, of those that play it where there are any: the others say what they lack."""
    opened = [SoundFont.open(it) for it in fonts]
    return choose(random, [it for it in opened if plays(it)] or opened)


class SoundFont:
    """A sound font in memory, shared by all that render with it in a process.

    A clip is rendered by a synthesiser of its own, since FluidSynth's reverb and voices remember what they played
    before: so a clip depends on its parts alone.
    """

    _loaded: dict[Path, SoundFont] = {}  # noqa: RUF012, a cache
    _lock = threading.Lock()

    def __init__(self, path: Path):
        self.path = path
        fluidsynth, more = _library()
        settings = fluidsynth.new_fluid_settings()
        self._keeper = fluidsynth.new_fluid_synth(settings)
        number = fluidsynth.fluid_synth_sfload(self._keeper, os.fsencode(path), 0)
        if number < 0:
            raise ValueError(f'FluidSynth cannot read the sound font {path}')
        self._font = more.font_at(self._keeper, number)

    @classmethod
    def open(cls, path: Path) -> SoundFont:
        """The font at a path, read once a process."""
        with cls._lock:
            if path not in cls._loaded:
                cls._loaded[path] = cls(path)
            return cls._loaded[path]

    def render(self, parts: Sequence[Part], samples: int, rate: int, room: Room | None = None) -> np.ndarray:
        """The parts together, `(samples,)` float32, mono, neither scaled nor clipped.

        FluidSynth lets what lies above half of its rate fold back, so it plays at a higher one where that is needed.

        Raises ValueError where the font lacks an instrument.
        """
        halves = max(2, math.ceil(1 + SAMPLED / rate))  # of the rate: what folds back lies above half of it
        halves += halves * rate % 2
        if halves == 2:
            return self.play(parts, samples, rate, room)
        wave = self.play(parts, -(-samples * halves // 2), halves * rate // 2, room)
        return resample_poly(wave, 2, halves)[:samples]

    def play(self, parts: Sequence[Part], samples: int, rate: int, room: Room | None = None) -> np.ndarray:
        """The same as FluidSynth computes it at this rate."""
        fluidsynth, more = _library()
        blocks = -(-samples // BLOCK)
        sound = np.zeros((2, blocks * BLOCK), np.float32)
        left, right = sound.ctypes.data, sound.ctypes.data + sound.strides[0]
        settings = fluidsynth.new_fluid_settings()
        channels = 1 + max((part.channel for part in parts), default=0)
        for name, value in {b'sample-rate': rate, b'gain': 0.2}.items():
            fluidsynth.fluid_settings_setnum(settings, b'synth.' + name, value)
        for name, value in {
            b'polyphony': POLYPHONY,
            b'midi-channels': -(-channels // 16) * 16,
            b'chorus.active': 0,
            b'reverb.active': int(room is not None),
        }.items():
            fluidsynth.fluid_settings_setint(settings, b'synth.' + name, value)
        with self._lock:  # the font counts who uses its samples, and does so without a lock
            synth = fluidsynth.new_fluid_synth(settings)
            number = more.add_font(synth, self._font)
            try:
                if room is not None:
                    fluidsynth.fluid_synth_set_reverb(synth, room.size, room.damping, 0.5, room.level)
                for part in parts:
                    self._seat(fluidsynth, synth, number, part)
                done = 0
                for block, on, channel, pitch, velocity in self._events(parts, rate, blocks):
                    if block > done:
                        more.write(synth, (block - done) * BLOCK, left, done * BLOCK, 1, right, done * BLOCK, 1)
                        done = block
                    if on:
                        fluidsynth.fluid_synth_noteon(synth, channel, pitch, velocity)
                    else:
                        fluidsynth.fluid_synth_noteoff(synth, channel, pitch)
                if blocks > done:
                    more.write(synth, (blocks - done) * BLOCK, left, done * BLOCK, 1, right, done * BLOCK, 1)
            finally:
                fluidsynth.fluid_synth_all_sounds_off(synth, -1)
                fluidsynth.fluid_synth_system_reset(synth)
                more.remove_font(synth, self._font)
                fluidsynth.delete_fluid_synth(synth)
                fluidsynth.delete_fluid_settings(settings)
        return sound.mean(axis=0)[:samples]

    def preset(self, channel: int, program: int) -> tuple[int, int] | None:
        """Bank and program that play this program on this channel of MIDI, None where the font lacks it."""
        bank = DRUM_BANK if channel == DRUM_CHANNEL else 0
        for number in (program, 0) if bank else (program,):  # many fonts have one drum kit only
            if _library()[1].preset_at(self._font, bank, number):
                return bank, number
        return None

    def _seat(self, fluidsynth: ModuleType, synth: int, number: int, part: Part) -> None:
        """Give a channel its instrument and its level."""
        found = self.preset(part.channel, part.program)
        if found is None:
            drums = part.channel == DRUM_CHANNEL
            what = 'a drum kit (bank 128)' if drums else f'program {part.program} of General MIDI'
            raise ValueError(f'{self.path} lacks {what}; give a sound font that has it, by itself or beside this one')
        bank, program = found
        fluidsynth.fluid_synth_program_select(synth, part.channel, number, bank, program)
        volume = round(min(127, 100 * 10 ** (part.level / 40)))  # of MIDI's volume, 40 dB are a tenth
        fluidsynth.fluid_synth_cc(synth, part.channel, 7, volume)
        fluidsynth.fluid_synth_cc(synth, part.channel, 91, 80)

    @staticmethod
    def _events(parts: Sequence[Part], rate: int, blocks: int) -> list[tuple[int, int, int, int, int]]:
        """(block, on, channel, pitch, velocity) in order of time, ends before beginnings. A note that is struck while
        it sounds ends first."""
        events = []
        for part in parts:
            until: dict[int, int] = {}
            for note in sorted(part.notes, key=lambda it: it.start, reverse=True):
                start = round(note.start * rate / BLOCK)
                end = max(start + 1, round((note.start + note.length) * rate / BLOCK))
                end = min(end, until.get(note.pitch, end))
                until[note.pitch] = start
                if start >= blocks or end <= start:
                    continue
                events.append((start, 1, part.channel, note.pitch, note.velocity))
                events.append((end, 0, part.channel, note.pitch, 0))
        return sorted(it for it in events if it[0] < blocks)
