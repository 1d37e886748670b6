"""MIDI files as scores: read by mido, cut into excerpts, and described by what is in them."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from musiclm_pytorch.data.attributes import choose
from musiclm_pytorch.data.scores.composer import DRUM_CHANNEL, Note, Part
from musiclm_pytorch.data.scores.instruments import BY_PROGRAM, INSTRUMENTS, REGISTERS
from musiclm_pytorch.data.scores.labels import ScoreLabels
from musiclm_pytorch.extras import needing

SUFFIXES = {'.mid', '.midi', '.kar', '.rmi'}
HELD_OUT = 8  # one file of so many belongs to 'valid'
NAMED_GROUPS = 88  # of programs below, one that is not in the table sounds like its neighbours of the same eight
# how often each degree of the scale sounds: Albrecht and Shanahan (2013)
PROFILES = {
    'major': (0.238, 0.006, 0.111, 0.006, 0.137, 0.094, 0.016, 0.214, 0.009, 0.080, 0.008, 0.081),
    'minor': (0.220, 0.006, 0.104, 0.123, 0.019, 0.103, 0.012, 0.214, 0.062, 0.022, 0.061, 0.052),
}
SURE, AHEAD = 0.75, 0.03  # correlation that a key needs, and by how much it must lead
LOUDNESS = {'soft': (0, 60), 'moderate': (60, 96), 'loud': (96, 128)}  # velocities
DUTY_OF_LOW = 50  # MIDI number under which a part's median makes it the bass


@dataclass(frozen=True)
class Event:
    """A note of a score, in seconds; `level` in dB is that of its channel's volume."""

    start: float
    length: float
    pitch: int
    velocity: int
    channel: int
    program: int
    level: float


@dataclass(frozen=True)
class Score:
    """The notes of a file in order of time; tempi (BPM of quarters) and metres with the seconds they begin at."""

    path: Path
    events: tuple[Event, ...]
    tempi: tuple[tuple[float, float], ...]
    metres: tuple[tuple[float, str], ...]


def find_scores(sources: Sequence[str | os.PathLike]) -> list[Path]:
    """MIDI files among `sources`, which are files and folders, in order of their names.

    Raises FileNotFoundError where nothing is, ValueError where no MIDI file is.
    """
    found: set[Path] = set()
    for source in map(Path, sources):
        if source.is_dir():
            found |= {it.resolve() for it in source.rglob('*') if it.suffix.lower() in SUFFIXES and it.is_file()}
        elif source.is_file():
            found.add(source.resolve())
        else:
            raise FileNotFoundError(f'no MIDI file or folder is at {source}')
    if len(found) < 2:
        raise ValueError(
            f'{len(found)} MIDI files are in {", ".join(map(str, sources))}; it takes 2 at least, one of them held out'
        )
    return sorted(found)


def files_of_split(files: list[Path], split: str) -> list[Path]:
    """Every eighth file is held out for 'valid'."""
    return [path for place, path in enumerate(files) if (place % HELD_OUT == 1) == (split == 'valid')]


@lru_cache(maxsize=256)
def read_score(path: Path) -> Score:
    """A MIDI file's notes, sustain pedal included. Raises ValueError, which names the file, for one that is damaged."""
    with needing('MIDI files need mido', 'scores'):
        import mido
    try:
        messages = list(mido.MidiFile(path, clip=True))
    except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f'{path} is no MIDI file that can be played: {error or type(error).__name__}') from error
    now = 0.0
    programs, volumes = [0] * 16, [100] * 16
    pedal = [False] * 16
    sounding: dict[tuple[int, int], tuple[float, int, int, int]] = {}
    released: dict[int, set[int]] = defaultdict(set)  # by the key, while the pedal holds them
    events, tempi, metres = [], [], []

    def end(channel: int, pitch: int) -> None:
        started = sounding.pop((channel, pitch), None)
        released[channel].discard(pitch)
        if started is not None:
            start, velocity, program, volume = started
            level = 40 * math.log10(max(volume, 1) / 100)
            events.append(Event(start, max(now - start, 0.02), pitch, velocity, channel, program, level))

    for message in messages:
        now += message.time
        if message.type == 'set_tempo':
            tempi.append((now, mido.tempo2bpm(message.tempo)))
        elif message.type == 'time_signature':
            metres.append((now, f'{message.numerator}/{message.denominator}'))
        elif message.type == 'program_change':
            programs[message.channel] = message.program
        elif message.type == 'control_change' and message.control == 7:
            volumes[message.channel] = message.value
        elif message.type == 'control_change' and message.control == 64:
            pedal[message.channel] = message.value >= 64
            if not pedal[message.channel]:
                for pitch in list(released[message.channel]):
                    end(message.channel, pitch)
        elif message.type == 'note_on' and message.velocity > 0:
            end(message.channel, message.note)
            channel = message.channel
            sounding[channel, message.note] = (now, message.velocity, programs[channel], volumes[channel])
        elif message.type in ('note_on', 'note_off'):
            if pedal[message.channel]:
                released[message.channel].add(message.note)
            else:
                end(message.channel, message.note)
    for channel, pitch in list(sounding):
        end(channel, pitch)
    if not any(it.channel != DRUM_CHANNEL and instrument_of(it.program) for it in events):
        raise ValueError(f'{path} holds no note of an instrument that has a name')
    events.sort(key=lambda it: (it.start, it.channel, it.pitch))
    return Score(path, tuple(events), tuple(tempi or [(0.0, 120.0)]), tuple(metres))


def instrument_of(program: int) -> str | None:
    """The name of a program, or of the one most like it; None for effects and the like."""
    if program in BY_PROGRAM:
        return BY_PROGRAM[program]
    group = [it for it in BY_PROGRAM if it // 8 == program // 8]
    return BY_PROGRAM[min(group, key=lambda it: abs(it - program))] if group and program < NAMED_GROUPS else None


def find_key(pitches: np.ndarray, weights: np.ndarray) -> tuple[int, str] | None:
    """Tonic and mode of notes weighted by their lengths; None where two keys are about as likely."""
    histogram = np.bincount(pitches % 12, weights, 12)
    if np.ptp(histogram) == 0:
        return None
    fit = {
        (tonic, mode): float(np.corrcoef(np.roll(profile, tonic), histogram)[0, 1])
        for mode, profile in PROFILES.items()
        for tonic in range(12)
    }
    first, second = sorted(fit, key=fit.get, reverse=True)[:2]
    return first if fit[first] >= SURE and fit[first] - fit[second] >= AHEAD else None


def cut(score: Score, seconds: float, random: np.random.Generator) -> tuple[ScoreLabels, list[Part]]:
    """Labels and parts of an excerpt of `seconds` that begins with a note of a named instrument."""
    named = [it.start for it in score.events if it.channel != DRUM_CHANNEL and instrument_of(it.program)]
    last = max(score.events, key=lambda it: it.start + it.length)
    latest = max(named[0], last.start + last.length - seconds)
    begin = choose(random, [start for start in named if start <= latest]) - random.uniform(0.01, 0.05)
    heard = [it for it in score.events if begin <= it.start < begin + seconds - 0.03]
    players: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for it in heard:
        players[it.channel, it.program].append(it)
    pitched = {key: notes for key, notes in players.items() if key[0] != DRUM_CHANNEL}
    tops = Counter()
    onsets = defaultdict(list)
    for it in heard:
        if it.channel != DRUM_CHANNEL and instrument_of(it.program):
            onsets[round(it.start, 2)].append(it)
    for together in onsets.values():
        highest = max(together, key=lambda it: it.pitch)
        tops[highest.channel, highest.program] += 1
    order = sorted(pitched, key=lambda key: (-tops[key], key))  # the lead is most often on top
    parts, channel = [], 0
    for key in order:
        parts.append(_part(channel, key[1], pitched[key][0].level, pitched[key], begin))
        channel += 2 if channel + 1 == DRUM_CHANNEL else 1
    kits = [key for key in players if key[0] == DRUM_CHANNEL]
    if kits:  # all of it by the kit that comes first
        notes = [it for key in kits for it in players[key]]
        parts.append(_part(DRUM_CHANNEL, kits[0][1], notes[0].level, notes, begin))
    return _describe(score, begin, order, pitched, drums=len(players) > len(pitched)), parts


def _part(channel: int, program: int, level: float, events: list[Event], begin: float) -> Part:
    notes = tuple(Note(max(it.start - begin, 0.0), it.length, it.pitch, it.velocity) for it in events)
    return Part('score', channel, program, min(level, 4.0), notes)


def _describe(
    score: Score,
    begin: float,
    order: list[tuple[int, int]],
    pitched: dict[tuple[int, int], list[Event]],
    *,
    drums: bool,
) -> ScoreLabels:
    known: dict[str, tuple[int, int]] = {}
    for key in order:
        if (name := instrument_of(key[1])) is not None:
            known.setdefault(name, key)
    lead, *others = known
    duties = ['lead']
    for name in others:
        median = np.median([it.pitch for it in pitched[known[name]]])
        duties.append('bass' if median < DUTY_OF_LOW and 'b' in INSTRUMENTS[name].duties else 'chords')
    everything = [it for notes in pitched.values() for it in notes]
    key = find_key(np.array([it.pitch for it in everything]), np.array([min(it.length, 2.0) for it in everything]))
    quarter = [bpm for at, bpm in score.tempi if at <= begin + 0.1] or [score.tempi[0][1]]
    metre = next((it for at, it in reversed(score.metres) if at <= begin + 0.1), None)
    compound = metre is not None and metre.endswith('/8') and int(metre.split('/')[0]) % 3 == 0
    middle = float(np.median([it.pitch for it in pitched[known[lead]]]))
    registers = sorted(REGISTERS, key=lambda it: abs(sum(REGISTERS[it]) / 2 - middle))
    velocity = float(np.mean([it.velocity for it in everything]))
    count = len(order)
    return ScoreLabels(
        instruments=tuple(known),
        duties=tuple(duties),
        texture='solo' if count == 1 else 'duo' if count == 2 else 'ensemble' if count <= 4 else 'full',
        bpm=round(quarter[-1] * (2 / 3 if compound else 1), 1),
        metre=metre,
        mode=key[1] if key else None,
        tonic=key[0] if key else None,
        drums=drums,
        register=registers[0],
        dynamics=next(name for name, (low, high) in LOUDNESS.items() if low <= velocity < high),
        source=score.path.name,
    )
