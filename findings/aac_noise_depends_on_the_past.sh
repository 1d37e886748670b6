#!/usr/bin/env bash
# AAC through PyAV 18.1.0 (FFmpeg's libavcodec 62.28): is a piece, decoded from somewhat before it, that of the whole file?
#
# Expected: AAC overlaps two frames, so a few packets of run-up give the samples of the whole file.
# Seen: for noise at 64 kbit/s pieces stay 0.7 of full scale apart, with 4 packets of run-up and with 50 alike; for a
# tone the same run-up gives 1e-5. FFmpeg's encoder writes noisy bands as their loudness alone (perceptual noise
# substitution), and its decoder fills them from a generator that runs on from packet to packet: the samples depend on
# every packet before. At 128 kbit/s, where this noise is coded, pieces are exact.
# So a seek in an .m4a gives other samples each time, and two readers of one file never agree: decode from the start where
# samples have to be repeatable.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'av==18.1.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PYTHON'
import io

import av
import numpy as np

RATE = 48000
print('PyAV', av.__version__, 'libavcodec', '.'.join(map(str, av.library_versions['libavcodec'])))


def encode(samples, bit_rate):
    file = io.BytesIO()
    with av.open(file, 'w', format='adts') as out:
        stream = out.add_stream('aac', rate=RATE)
        stream.bit_rate, stream.layout = bit_rate, 'mono'
        for start in range(0, len(samples), 1024):
            part = samples[start : start + 1024].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(part[None], format='fltp', layout='mono')
            frame.rate, frame.pts = RATE, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def decode(content, first, last=None):
    with av.open(io.BytesIO(content)) as container:
        packets = [bytes(it) for it in container.demux(audio=0) if it.size]
        context = container.streams.audio[0].codec_context
        return [[frame.to_ndarray()[0] for frame in context.decode(av.Packet(it))] for it in packets[first:last]]


def worst(samples, bit_rate, before):
    content = encode(samples, bit_rate)
    whole = decode(content, 0)
    errors = []
    for place in range(60, len(whole) - 6, 17):
        piece = decode(content, place - before, place + 3)[before:]
        errors.append(np.abs(np.concatenate(sum(piece, [])) - np.concatenate(sum(whole[place : place + 3], []))).max())
    return float(max(errors))


time = np.arange(RATE * 6) / RATE
noise = (0.3 * np.random.default_rng(0).standard_normal(len(time))).clip(-1, 1)
tone = 0.4 * np.sin(2 * np.pi * 220 * time)
found = {}
for name, samples, bit_rate in (('noise', noise, 64000), ('noise', noise, 128000), ('tone', tone, 64000)):
    for before in (4, 50):
        found[name, bit_rate, before] = worst(samples, bit_rate, before)
        error = found[name, bit_rate, before]
        print(f'{name} at {bit_rate // 1000} kbit/s, {before} packets before: {error:.6f} of full scale apart')
assert found['noise', 64000, 4] > 0.1, 'noise is repeatable now'
assert found['noise', 64000, 50] > 0.1, 'noise is repeatable now, after a longer run-up'
assert found['noise', 128000, 4] < 1e-6, 'coded noise is not exact any more'
assert found['tone', 64000, 4] < 1e-3, 'a tone is not nearly exact any more'
PYTHON
