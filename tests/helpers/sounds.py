"""Captioned sound files."""

import numpy as np
import soundfile

RATE = 8000


def ramp(seconds, rate=RATE, channels=1):
    """A wave whose samples tell where they are from: rising from 0 to 0.5."""
    return np.repeat(np.linspace(0, 0.5, round(seconds * rate), dtype='float32')[:, None], channels, axis=1)


def noise(seconds, rate=RATE, channels=1, seed=0):
    return (np.random.default_rng(seed).standard_normal((round(seconds * rate), channels)) * 0.1).astype('float32')


def write(path, samples, rate=RATE, caption='a sound', **keywords):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **keywords)
    if caption is not None:
        path.with_suffix('.txt').write_text(caption)
    return path


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
