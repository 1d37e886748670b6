"""Notes to waves: eight instruments and a drum kit, band-limited at any sample rate, with numpy alone.

Struck and plucked sounds are sums of damped sinusoids, which one matrix product gives; blown, bowed and electronic
ones are harmonics of one phase, which Horner's rule gives. Nothing is sampled and nothing is filtered in a loop over
samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from musiclm_pytorch.data.composition import Note

HIGHEST = 0.45  # of the sample rate: no partial lies above, so that vibrato and envelopes do not fold back
MOST_PARTIALS = 48
UNTHREADED = 2**18  # multiplications that OpenBLAS leaves to one thread
LOUDNESS = 0.1  # root mean square of a clip, -20 dB of full scale
CEILING = 0.95


@dataclass
class Player:
    """What one clip's player keeps the same from note to note, drawn anew for each clip."""

    rate: int  # Hz
    brightness: float  # 1 is usual
    detune: float  # octaves
    vibrato_rate: float  # Hz
    vibrato_depth: float  # 1 is usual
    noise: np.ndarray  # (samples,) float32, longer than any note
    random: np.random.Generator

    @classmethod
    def draw(cls, rate: int, samples: int, random: np.random.Generator) -> Player:
        return cls(
            rate=rate,
            brightness=random.uniform(0.8, 1.25),
            detune=random.uniform(-8, 8) / 1200,
            vibrato_rate=random.uniform(4.8, 6.2),
            vibrato_depth=random.uniform(0.7, 1.3),
            noise=random.standard_normal(samples, dtype=np.float32),
            random=random,
        )

    def noise_of(self, samples: int) -> np.ndarray:
        start = int(self.random.random() * (len(self.noise) - samples + 1))
        return self.noise[start : start + samples]


# ---- building blocks; times in seconds, frequencies in Hz, waves (samples,) float32 ----


def damped_partials(
    hertz: np.ndarray, amplitudes: np.ndarray, decays: np.ndarray, phases: np.ndarray, samples: int, rate: int
) -> np.ndarray:
    """The sum of `amplitude · exp(-decay · t) · sin(2π · hertz · t + phase)` over partials below `HIGHEST`.

    The exponential of a sum is a product: with t in rows of √samples, the sum over partials is a matrix product.
    """
    below = hertz < HIGHEST * rate
    if not below.any():
        below = hertz == hertz.min()
    hertz, amplitudes, decays, phases = hertz[below], amplitudes[below], decays[below], phases[below]
    columns = max(16, math.isqrt(samples))
    rows = -(-samples // columns)
    turns = hertz / rate
    row, column = np.arange(rows)[:, None] * columns, np.arange(columns)
    # whole turns are taken off in float64, so that float32 is exact enough for the rest
    angle = ((turns * row + phases / (2 * np.pi)) % 1.0 * (2 * np.pi)).astype(np.float32)
    size = amplitudes * np.exp(-decays / rate * row)
    left = np.concatenate([np.sin(angle) * size, np.cos(angle) * size], axis=1).astype(np.float32)
    angle = (turns[:, None] * column % 1.0 * (2 * np.pi)).astype(np.float32)
    size = np.exp(-decays[:, None] / rate * column)
    right = np.concatenate([np.cos(angle) * size, np.sin(angle) * size], axis=0).astype(np.float32)
    # piece by piece: OpenBLAS would start its threads for more, which at this size only get in each other's way
    each = max(1, UNTHREADED // right.size)
    wave = np.empty((rows, columns), np.float32)
    for first in range(0, rows, each):
        np.matmul(left[first : first + each], right, out=wave[first : first + each])
    return wave.reshape(-1)[:samples]


def harmonics(phase: np.ndarray, amplitudes: np.ndarray, brightness: np.ndarray | float = 1.0) -> np.ndarray:
    """The sum of `amplitudes[k - 1] · brightness^(k - 1) · sin(k · phase)`; brightness in (0, 1], at each sample."""
    angle = (phase % (2 * np.pi)).astype(np.float32)
    turn = np.empty(len(angle), np.complex64)
    turn.real, turn.imag = np.cos(angle), np.sin(angle)
    step = turn * np.asarray(brightness, np.float32)
    total = np.full(len(angle), amplitudes[-1], np.complex64)
    for amplitude in amplitudes[-2::-1].tolist():
        total *= step
        total += amplitude
    total *= turn
    return total.imag


def harmonic_numbers(hertz: float, rate: int, margin: float = 1.03) -> np.ndarray:
    """1, 2, … up to the last harmonic that stays below `HIGHEST` with vibrato."""
    return np.arange(1, max(1, min(MOST_PARTIALS, int(HIGHEST * rate / (hertz * margin)))) + 1, dtype=np.float64)


def vibrato_phase(hertz: float, samples: int, player: Player, cents: float, delay: float, scoop: float = 0.0):
    """Phase of a tone whose vibrato of `cents` sets in after `delay`, and that comes from `scoop` cents below."""
    t = np.arange(samples) / player.rate
    depth = cents * player.vibrato_depth * np.minimum(1.0, t / max(delay, 1e-3))
    start = player.random.uniform(0, 2 * np.pi)
    bend = depth * np.sin(2 * np.pi * player.vibrato_rate * t + start) - scoop * np.exp(-t / 0.03)
    return np.cumsum(2 * np.pi * hertz / player.rate * (1.0 + bend * (math.log(2) / 1200)))


def envelope(samples: int, rate: int, attack: float, release: float) -> np.ndarray:
    """Rise, level, fall, each without a corner; shorter if the note is."""
    wave = np.ones(samples, np.float32)
    rise = min(max(2, int(attack * rate)), samples // 2)
    fall = min(max(2, int(release * rate)), samples // 2)
    wave[:rise] *= 0.5 - 0.5 * np.cos(np.pi * (np.arange(rise) + 0.5) / rise)
    wave[samples - fall :] *= 0.5 + 0.5 * np.cos(np.pi * (np.arange(fall) + 0.5) / fall)
    return wave


def resonances(hertz: np.ndarray, peaks: Sequence[tuple[float, float, float]], floor: float) -> np.ndarray:
    """The gain of a body or bell with (centre, width, gain) resonances, which stay where they are at every pitch."""
    return floor + sum(gain * np.exp(-0.5 * ((hertz - centre) / width) ** 2) for centre, width, gain in peaks)


def roll_off(hertz: float) -> float:
    """Exponent of a brightness: less is lost from one harmonic to the next where they lie closer together."""
    return min(1.5, max(0.3, hertz / 220))


def shaped_noise(noise: np.ndarray, rate: int, low: float, high: float) -> np.ndarray:
    """The part of `noise` between two frequencies, with soft edges."""
    spectrum = np.fft.rfft(noise)
    hertz = np.fft.rfftfreq(len(noise), 1 / rate) + 1e-3
    gain = 1 / np.sqrt((1 + (low / hertz) ** 6) * (1 + (hertz / high) ** 6))
    return np.fft.irfft(spectrum * gain, len(noise)).astype(np.float32)


# ---- instruments: (pitch in Hz, length in seconds, player) → wave with the release beyond the length ----


def piano(hertz: float, seconds: float, player: Player) -> np.ndarray:
    """Stiff strings (partials stretch upwards), struck at an eighth, two strings slightly apart, a hammer's thud."""
    rate = player.rate
    samples = int((seconds + 0.12) * rate)
    k = harmonic_numbers(hertz, rate)
    stiffness = 2.5e-4 * (hertz / 260) ** 0.8
    stretched = k * hertz * np.sqrt((1 + stiffness * k**2) / (1 + stiffness))
    size = (np.abs(np.sin(np.pi * k / 8.2)) + 0.1) * k ** (-0.9 / player.brightness) * np.exp(-stretched / 5000)
    decay = 0.7 + 0.35 * k + hertz / 500
    both = np.concatenate([stretched, stretched * 1.0006])
    wave = damped_partials(
        both,
        np.concatenate([size, 0.6 * size]),
        np.concatenate([decay * 1.6, decay * 0.6]),
        np.zeros(len(both)),
        samples,
        rate,
    )
    thud = player.noise_of(samples) * np.exp(-np.arange(samples) / (0.006 * rate))
    return (wave + 0.12 * thud * np.abs(size).sum() / 3).astype(np.float32) * envelope(samples, rate, 0.002, 0.12)


def guitar(hertz: float, seconds: float, player: Player) -> np.ndarray:
    """A string plucked near the bridge: bright at first, high partials die away soon; a body's resonances."""
    rate = player.rate
    samples = int((seconds + 0.06) * rate)
    k = harmonic_numbers(hertz, rate)
    size = np.abs(np.sin(np.pi * k * 0.13)) / k**0.7 * resonances(k * hertz, [(200, 80, 1.0), (400, 150, 0.7)], 0.7)
    decay = 2.2 + 1.1 * k**1.3 / player.brightness + hertz / 250
    wave = damped_partials(k * hertz, size, decay, np.full(len(k), np.pi / 2) * (k % 2), samples, rate)
    pick = player.noise_of(samples) * np.exp(-np.arange(samples) / (0.003 * rate))
    return (wave + 0.35 * pick * size.sum() / 3).astype(np.float32) * envelope(samples, rate, 0.001, 0.06)


def strings(hertz: float, seconds: float, player: Player) -> np.ndarray:
    """A bowed sawtooth through a body, two players a little apart, slow attack, wide vibrato, bow noise."""
    rate = player.rate
    samples = int((seconds + 0.15) * rate)
    k = harmonic_numbers(hertz, rate)
    body = resonances(k * hertz, [(290, 60, 0.8), (480, 100, 0.8), (1100, 250, 0.8), (2600, 600, 1.0)], 0.45)
    size = body * k ** (-0.9 / player.brightness)
    wave = np.zeros(samples, np.float32)
    for cents in (-3, 3):
        tuned = hertz * 2 ** (cents / 1200)
        wave += harmonics(vibrato_phase(tuned, samples, player, cents=14, delay=0.15), size)
    bow = 0.1 + 0.3 * np.exp(-np.arange(samples) / (0.03 * rate))
    wave += bow * np.sqrt((size**2).sum()) * player.noise_of(samples)
    return (wave * envelope(samples, rate, 0.03, 0.15)).astype(np.float32)


def flute(hertz: float, seconds: float, player: Player) -> np.ndarray:
    """Few harmonics, breath around them that is loudest at the start, vibrato of loudness more than of pitch."""
    rate = player.rate
    samples = int((seconds + 0.07) * rate)
    k = harmonic_numbers(hertz, rate)[:6]
    size = np.array([1.0, 0.3, 0.16, 0.05, 0.03, 0.02])[: len(k)]
    phase = vibrato_phase(hertz, samples, player, cents=8, delay=0.2)
    t = np.arange(samples) / rate
    tremble = 1 + 0.18 * player.vibrato_depth * np.minimum(1, t / 0.2) * np.sin(2 * np.pi * player.vibrato_rate * t)
    breath = player.noise_of(samples) * (0.12 + 0.3 * np.exp(-t / 0.04))
    return ((harmonics(phase, size) * tremble + breath) * envelope(samples, rate, 0.05, 0.07)).astype(np.float32)


def brass(hertz: float, seconds: float, player: Player) -> np.ndarray:
    """Harmonics that grow with the pressure: the tone brightens while it swells; scooped onset, strong formant."""
    rate = player.rate
    samples = int((seconds + 0.06) * rate)
    k = harmonic_numbers(hertz, rate)
    size = resonances(k * hertz, [(1400, 700, 2.0), (600, 300, 1.0)], 0.25) * k**-0.15
    t = np.arange(samples) / rate
    ends = np.minimum(1.0, np.maximum(0.0, (seconds + 0.06 - t) / 0.12))
    pressure = (1 - np.exp(-t / 0.045)) * ends
    shine = np.clip(0.45 + 0.4 * player.brightness * pressure, 0.0, 0.93) ** roll_off(hertz)
    phase = vibrato_phase(hertz, samples, player, cents=6, delay=0.4, scoop=60)
    return harmonics(phase, size, shine) * envelope(samples, rate, 0.03, 0.06)


def organ(hertz: float, seconds: float, player: Player) -> np.ndarray:
    """Pipes at the unison, octaves and the twelfth, all steady from first to last, with a chiff of wind."""
    rate = player.rate
    samples = int((seconds + 0.05) * rate)
    ranks = np.array([1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0])
    size = np.array([1.0, 0.9, 0.55, 0.7, 0.35, 0.4, 0.15, 0.15]) * ranks ** (0.2 * (player.brightness - 1))
    phases = np.arange(len(ranks)) * 2.4
    wave = damped_partials(ranks * hertz * (1 + 2e-4 * ranks % 3e-4), size, np.zeros(len(ranks)), phases, samples, rate)
    chiff = player.noise_of(samples) * np.exp(-np.arange(samples) / (0.012 * rate)) * 0.25
    return (wave + chiff).astype(np.float32) * envelope(samples, rate, 0.012, 0.05)


def bell(hertz: float, seconds: float, player: Player) -> np.ndarray:
    """A tuned metal bar or tube: partials off the harmonic series, the higher the shorter, ringing past the note."""
    rate = player.rate
    samples = int((seconds + 0.9) * rate)
    ratios = np.array([1.0, 2.0, 2.76, 4.07, 5.4, 8.93, 11.3, 13.3, 1.002])
    size = np.array([1.0, 0.3, 0.6, 0.3, 0.5, 0.4, 0.2, 0.1, 0.5]) * np.maximum(ratios, 1) ** (
        0.4 * (player.brightness - 1)
    )
    decay = np.array([1.6, 2.2, 3.5, 4.5, 5.0, 8.0, 12.0, 16.0, 1.4])
    wave = damped_partials(ratios * hertz, size, decay, np.arange(9) * 1.3, samples, rate)
    return wave * envelope(samples, rate, 0.001, 0.6)


def synth(hertz: float, seconds: float, player: Player) -> np.ndarray:
    """Two detuned square waves (odd harmonics) through a filter that closes after each onset."""
    rate = player.rate
    samples = int((seconds + 0.03) * rate)
    k = harmonic_numbers(hertz, rate)
    size = (k % 2) / k**0.75
    t = np.arange(samples) / rate
    shine = np.clip(0.80 + 0.18 * np.exp(-t / 0.10) * player.brightness, 0.0, 0.99) ** roll_off(hertz)
    steady = 2 * np.pi * hertz * t
    wave = harmonics(steady * 2 ** (7 / 1200), size, shine) + harmonics(steady * 2 ** (-7 / 1200) + 1.0, size, shine)
    return wave * envelope(samples, rate, 0.004, 0.03)


PLAYED_BY: dict[str, Callable[[float, float, Player], np.ndarray]] = {
    it.__name__: it for it in (piano, guitar, strings, flute, brass, organ, bell, synth)
}
# Hz: between which frequencies an instrument's noise lies, where it is not white
BREATH = {'flute': (700, 5000), 'strings': (500, 6000)}


def drum_kit(player: Player, tonic: int) -> dict[str, np.ndarray]:
    """Kick, snare and hi-hat of one clip; skins are tuned to the tonic, so that they do not blur the key."""
    rate, random = player.rate, player.random
    t = np.arange(int(0.3 * rate)) / rate
    noise = random.standard_normal((3, len(t)), dtype=np.float32)
    lowest = 440 * 2 ** ((26 + (tonic - 26) % 12 - 69) / 12 + player.detune)  # 37 to 69 Hz
    drop = random.uniform(90, 140)
    # the pitch falls from lowest + drop to lowest
    kick = np.sin(2 * np.pi * (lowest * t + drop * 0.025 * (1 - np.exp(-t / 0.025)))) * np.exp(-t / 0.09)
    kick += 0.15 * noise[0] * np.exp(-t / 0.003)
    snap = shaped_noise(noise[1], rate, 900, 7000) * np.exp(-t / random.uniform(0.05, 0.08))
    body = np.sin(2 * np.pi * 4 * lowest * t) * np.exp(-t / 0.04)
    hiss = shaped_noise(noise[2], rate, 0.3 * min(rate, 32000), 16000) * np.exp(-t / 0.025)
    fade = envelope(len(t), rate, 0.001, 0.05)
    return {
        'kick': (kick * fade).astype(np.float32),
        'snare': ((0.45 * snap + 0.4 * body) * fade).astype(np.float32),
        'hat': (0.45 * hiss * fade).astype(np.float32),
    }


def render_notes(
    notes: list[Note],
    drums: list[Note],
    *,
    instrument: str,
    tonic: int,
    bpm: float,
    samples: int,
    rate: int,
    random: np.random.Generator,
) -> np.ndarray:
    """The wave of a piece, `(samples,)` float32 of root mean square `LOUDNESS`, peaks at most `CEILING`.

    Args:
        notes, drums: what to play, with onsets and lengths in beats.
        instrument: one of `PLAYED_BY`; ValueError for one that only a sound font has.
        tonic: pitch class that the drums are tuned to.
        bpm: beats per minute.
        samples, rate: length and sample rate in Hz of the wave.
        random: draws the player, the drum kit and where the first beat lies (10 to 60 ms after the start).
    """
    if instrument not in PLAYED_BY:
        raise ValueError(
            f'the {instrument} is not synthesised, only {", ".join(PLAYED_BY)} are; give SyntheticMusic a sound_font'
        )
    player = Player.draw(rate, 4 * rate, random)
    if instrument in BREATH:
        player.noise = shaped_noise(player.noise, rate, *BREATH[instrument])
    play = PLAYED_BY[instrument]
    beat = 60 / bpm
    first = random.uniform(0.01, 0.06)
    wave = np.zeros(samples, np.float32)
    sounds: dict[tuple, np.ndarray] = {}
    for note in notes:
        kind = (note.pitch, note.length)
        if kind not in sounds:
            hertz = 440 * 2 ** ((note.pitch - 69) / 12 + player.detune)
            sound = play(hertz, note.length * beat * 0.9, player)
            heard = sound[: int(0.25 * rate)]
            sounds[kind] = sound / np.sqrt(np.mean(heard * heard) + 1e-12)
        add(wave, sounds[kind], first + note.start * beat, note.loudness * random.uniform(0.92, 1.0), rate)
    wave /= np.sqrt(np.mean(wave * wave) + 1e-12)
    if drums:
        kit = drum_kit(player, tonic)
        level = 3.2 * random.uniform(0.8, 1.2)
        for note in drums:
            add(wave, kit[note.pitch], first + note.start * beat, note.loudness * level, rate)
    return finished(wave, rate, LOUDNESS)


def finished(wave: np.ndarray, rate: int, loudness: float) -> np.ndarray:
    """A clip with soft ends, of root mean square `loudness`, or less where peaks would pass `CEILING`."""
    wave = wave * envelope(len(wave), rate, 0.002, 0.02)
    wave -= wave.mean()
    gain = min(loudness / np.sqrt(np.mean(wave * wave)), CEILING / np.abs(wave).max())
    return wave * np.float32(gain)


def add(wave: np.ndarray, sound: np.ndarray, start: float, loudness: float, rate: int) -> None:
    """Mix `sound` into `wave` from `start` seconds on; what lies past the end is lost."""
    at = round(start * rate)
    piece = sound[: max(0, len(wave) - at)]
    wave[at : at + len(piece)] += np.float32(loudness) * piece
