#!/usr/bin/env bash
# transformers 5.23.0: does a MimiModel that has encoded or decoded once compute with the weights that are loaded into it?
#
# Expected: load_state_dict replaces what a module computes with. A trainer that validates its codec, then goes on from a
# checkpoint, and then encodes, gets the codes of the checkpoint, as with EncodecModel and DacModel.
# Seen: the codebooks are no parameters; their vectors are sums divided by counts, computed at the first call and kept in
# a plain attribute, which neither load_state_dict nor a change of the buffers clears. The model reports "all keys
# matched", its state dict holds the new numbers, and it encodes and decodes by the old codebooks, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.11.0' 'numpy==2.4.6' 'transformers==5.23.0'
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

print('torch', torch.__version__, 'transformers', transformers.__version__)
SMALL = {
    EncodecModel: EncodecConfig(num_filters=4, hidden_size=8, codebook_size=16, codebook_dim=8, num_lstm_layers=1),
    DacModel: DacConfig(encoder_hidden_size=8, decoder_hidden_size=32, codebook_size=16, n_codebooks=2),
    MimiModel: MimiConfig(
        num_filters=4, hidden_size=16, vector_quantization_hidden_dimension=8, codebook_size=16, codebook_dim=8,
        num_quantizers=2, num_semantic_quantizers=1, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, intermediate_size=16, upsample_groups=1,
    ),
}


def fresh(kind, seed):
    torch.manual_seed(seed)
    model = kind(SMALL[kind]).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(('embed', 'embed_sum')):  # which begin as zeros
            buffer.normal_()
    return model


def differs(kind):
    """Whether a model that has decoded gives other waves than one that has not, after the same weights were loaded."""
    codes = torch.randint(16, (1, 2, 6), generator=torch.Generator().manual_seed(0))
    given = dict(audio_codes=codes[None], audio_scales=[None]) if kind is EncodecModel else dict(audio_codes=codes)
    other, used, unused = (fresh(kind, seed) for seed in (1, 2, 3))

    def decode(model):
        return model.decode(**given).audio_values

    with torch.no_grad():
        decode(used)
        for model in (used, unused):
            print(f'  {kind.__name__}:', model.load_state_dict(other.state_dict()))
        same = all(torch.equal(a, b) for a, b in zip(used.state_dict().values(), unused.state_dict().values()))
        assert same, 'the weights are not the same'
        return not torch.equal(decode(used), decode(unused))


found = {kind.__name__: differs(kind) for kind in SMALL}
print('other waves by a model that was used before:', found)
assert found == dict(EncodecModel=False, DacModel=False, MimiModel=True), 'this has changed'
PYTHON
