"""Tokens by a pretrained codec against the bare model of transformers, both on the same waves in batches of 8.

    python benchmarks/parts.py --clips 1000 --seconds 10

The models are tiny EnCodecs with random weights, so that what comes around the model counts most.
"""

import argparse
import tempfile
import time

import torch
from transformers import EncodecConfig, EncodecModel

from musiclm_pytorch import PretrainedCodec, compute_tokens

LEVELS, BANDWIDTH, BATCH = 8, 6.0, 8


class Waves(torch.utils.data.Dataset):
    """Noise: eight different clips, over and over."""

    sample_rate = 24000

    def __init__(self, count: int, seconds: float):
        self.count, self._waves = count, 0.1 * torch.randn(8, round(seconds * self.sample_rate))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._waves[index % 8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--clips', type=int, default=100)
    parser.add_argument('--seconds', type=float, default=10.0)
    parser.add_argument('--rounds', type=int, default=3, help='of both in turn; the best of each counts')
    options = parser.parse_args()
    torch.manual_seed(0)
    config = EncodecConfig(num_filters=4, hidden_size=16, codebook_dim=16, num_lstm_layers=1)
    model, waves = EncodecModel(config).eval(), Waves(options.clips, options.seconds)
    codec = PretrainedCodec(model, num_quantizers=LEVELS)

    @torch.no_grad()
    def bare() -> None:
        for start in range(0, len(waves), BATCH):
            batch = torch.stack([waves[index] for index in range(start, min(start + BATCH, len(waves)))])
            model.encode(batch[:, None], bandwidth=BANDWIDTH)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            compute_tokens(waves, folder, codec=codec, batch_size=BATCH, progress=False)

    times = {bare: [], ours: []}
    for _ in range(options.rounds):
        for way, found in times.items():
            start = time.perf_counter()
            way()
            found.append(time.perf_counter() - start)
    alone, whole = (min(found) for found in times.values())
    print(
        f'{options.clips} clips of {options.seconds:g} s: the model alone {alone:.2f} s, tokens on disk {whole:.2f} s'
    )
    print(f'{alone / whole:.2f} of its speed')


if __name__ == '__main__':
    main()
