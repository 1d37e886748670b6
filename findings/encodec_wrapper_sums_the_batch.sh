#!/usr/bin/env bash
# audiolm-pytorch 2.4.0, encodec 0.1.1: does EncodecWrapper decode a batch of codes into a batch of waves?
#
# Expected: `(2, frames, 8)` codes become `(2, 1, samples)`, each as if it had been decoded alone; SoundStream's method of
# the same name does that, and AudioLM hands either the codes of a whole batch.
# Seen: `(1, 1, samples + 1)`. The batch is taken for the frames of one long recording, and added up with windows that
# are one sample apart: whoever generates several samples at once with EnCodec gets one, in which all sound together.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.11.0' 'torchaudio==2.11.0' 'numpy==2.4.6' 'encodec==0.1.1' \
    'vector-quantize-pytorch==1.32.0' 'einops==0.8.2'
# alone, for of what it requires, fairseq cannot be built by recent Pythons, and the codec needs none of it
"$folder/venv/bin/pip" install --quiet --no-deps 'audiolm-pytorch==2.4.0'
"$folder/venv/bin/python" - <<'PYTHON'
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from encodec import EncodecModel

spec = spec_from_file_location('wrapper', Path(find_spec('audiolm_pytorch').origin).with_name('encodec.py'))
wrapper = module_from_spec(spec)
spec.loader.exec_module(wrapper)

print('audiolm-pytorch', version('audiolm-pytorch'), 'encodec', version('encodec'), 'torch', torch.__version__)
torch.manual_seed(0)
# weights by chance: none are downloaded, and shapes do not depend on them
EncodecModel.encodec_model_24khz = staticmethod(partial(EncodecModel.encodec_model_24khz, pretrained=False))
codec = wrapper.EncodecWrapper().eval()
codes = torch.randint(1024, (2, 10, 8))
with torch.no_grad():
    alone = [codec.decode_from_codebook_indices(it[None]) for it in codes]
    both = codec.decode_from_codebook_indices(codes)
print('alone:', [tuple(it.shape) for it in alone], 'as a batch:', tuple(both.shape))
samples = alone[0].shape[-1]
assert both.shape == (1, 1, samples + 1), 'this has changed'

# what it is: both waves under a triangular window, the second one sample later, divided by the sum of the windows
window = 0.5 - (torch.linspace(0, 1, samples + 2)[1:-1] - 0.5).abs()
added, weights = torch.zeros(2, samples + 1)
for start, wave in enumerate(alone):
    added[start : start + samples] += window * wave[0, 0]
    weights[start : start + samples] += window
torch.testing.assert_close(both[0, 0], added / weights)
print('the batch has become one wave, the sum of both')
PYTHON
