#!/usr/bin/env bash
# Opus through PyAV 18.1.0 (FFmpeg's libavcodec 62.28): how long before a place has decoding to begin?
#
# Expected: RFC 7845, section 4.6, asks for 80 ms of pre-roll after a seek, so a piece decoded from 80 ms before it should
# be the piece of the whole file, up to rounding.
# Seen: up to 0.30 of full scale apart after 80 ms (a chirp at 16 kbit/s), 0.05 even for a steady tone; up to 0.03
# after 200 ms, 0.002 after 500 ms, 1e-5 after a second (worst of 4 signals × 3 bit rates).
# So who cuts training crops out of Opus files decodes from a second before, or trains on other samples than are heard.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'av==18.1.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PYTHON'
import io

import av
import numpy as np

RATE, PACKET = 48000, 0.02  # Hz, seconds
print('PyAV', av.__version__, 'libavcodec', '.'.join(map(str, av.library_versions['libavcodec'])))


def encode(samples, bit_rate):
    file = io.BytesIO()
    with av.open(file, 'w', format='ogg') as out:
        stream = out.add_stream('libopus', rate=RATE)
        stream.bit_rate, stream.layout = bit_rate, 'mono'
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format='fltp', layout='mono')
        frame.rate = RATE
        fifo = av.AudioFifo()
        for part in av.AudioResampler(format=stream.codec_context.format, layout='mono', rate=RATE).resample(frame):
            fifo.write(part)
        while (part := fifo.read(round(PACKET * RATE), partial=True)) is not None:
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    return file.getvalue()


def decode(content, first, last=None):
    with av.open(io.BytesIO(content)) as container:
        packets = [bytes(it) for it in container.demux(audio=0) if it.size]
        context = container.streams.audio[0].codec_context
        return [[frame.to_ndarray()[0] for frame in context.decode(av.Packet(it))] for it in packets[first:last]]


time = np.arange(RATE * 6) / RATE
noise = np.random.default_rng(0).standard_normal(len(time))
signals = dict(
    noise=0.3 * noise,
    chirp=0.4 * np.sin(2 * np.pi * (100 * time + 400 * time**2)),
    tone=0.4 * np.sin(2 * np.pi * 220 * time),
    bursts=0.5 * noise * (np.sin(4 * np.pi * time) > 0.6),
)
worst = {0.08: 0.0, 0.2: 0.0, 0.5: 0.0, 1.0: 0.0}
for name, samples in signals.items():
    for bit_rate in (16000, 32000, 64000):
        content = encode(samples.clip(-1, 1), bit_rate)
        whole = decode(content, 0)
        for seconds in worst:
            before = round(seconds / PACKET)
            for place in range(60, len(whole) - 6, 17):
                piece = decode(content, place - before, place + 3)[before:]
                error = np.abs(np.concatenate(sum(piece, [])) - np.concatenate(sum(whole[place : place + 3], []))).max()
                worst[seconds] = max(worst[seconds], float(error))
for seconds, error in worst.items():
    print(f'decoded from {seconds:.2f} s before: at most {error:.6f} of full scale from the whole')
assert worst[0.08] > 0.05, 'a pre-roll of 80 ms is enough now'
assert worst[1.0] < 1e-4, 'a second is not enough any more'
PYTHON
