#!/usr/bin/env bash
# PyAV 18.1.0 (libavformat), soundfile 0.14.0 (libsndfile 1.2.2): FLAC that was cut without decoding.
#
# Expected: FLAC cut by copying its frames, as `ffmpeg -ss 3 -i in.flac -c copy out.flac` does, is a shorter FLAC to every
# reader: each frame stands by itself.
# Seen: FFmpeg copies the head of the file too, in which the length of the uncut file and the checksum of its samples stand.
# FFmpeg itself counts frames and decodes what is there; libsndfile believes the head: it tells 5 s where there are 2, and
# neither reads the file as a whole nor finds a sample in it ("Internal psf_fseek() failed"), although all that it holds is
# sound. A library of music that was trimmed without loss is so unreadable, or damaged, to half of the readers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet 'av==18.1.0' 'soundfile==0.14.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import av
import numpy as np
import soundfile

RATE, SECONDS, CUT = 16000, 5, 3


def told(call):
    try:
        return call()
    except soundfile.LibsndfileError as error:
        return str(error)


print('PyAV', av.__version__, 'soundfile', soundfile.__version__, soundfile.__libsndfile_version__)
whole, cut = io.BytesIO(), io.BytesIO()
soundfile.write(whole, 0.1 * np.random.default_rng(0).standard_normal(RATE * SECONDS), RATE, format='FLAC')
with av.open(io.BytesIO(whole.getvalue())) as source, av.open(cut, 'w', format='flac') as target:
    stream = target.add_stream_from_template(source.streams.audio[0])
    for packet in source.demux(audio=0):
        if packet.size and packet.pts * packet.time_base >= CUT:
            packet.stream = stream
            target.mux(packet)
with av.open(io.BytesIO(cut.getvalue())) as file:
    decoded = sum(frame.samples for frame in file.decode(audio=0))
with soundfile.SoundFile(io.BytesIO(cut.getvalue())) as file:
    frames, read, sought = file.frames, told(lambda: len(file.read())), told(lambda: file.seek(1000))
print(f'FFmpeg decodes {decoded} samples; libsndfile tells {frames}, reads: {read}, seeks sample 1000: {sought}')
if not decoded < RATE * (SECONDS - CUT) + 4096 or frames != RATE * SECONDS or sought == 1000:
    sys.exit('FLAC that was cut without decoding is read otherwise now')
PYTHON
