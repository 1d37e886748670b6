"""What parts from elsewhere cost beside the bare model, and adapters beside all weights.

    python benchmarks/parts.py --clips 1000 --seconds 10

Tokens by a pretrained codec, written to disk, beside the bare model of transformers on the same waves in batches of 8;
a step of the coarse stage on cached tokens of EnCodec, conditioned by a frozen CLAP, beside one on tokens and by a
MuLaN of ours; and a step with adapters beside one with all weights. Both sides take turns, and the median of the
rounds' ratios is told, of processor time, so that other work on the machine counts little. That they compute the same
is checked first, where it is. The models are tiny EnCodecs, CLAPs and stages with random weights, so that what comes
around counts most.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results import add_out, write_results  # beside this file
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    EncodecConfig,
    EncodecModel,
    RobertaTokenizer,
)

from musiclm_pytorch import (
    AudioSpectrogramTransformer,
    CoarseTrainer,
    CoarseTransformer,
    MuLaN,
    MuLaNEmbedQuantizer,
    PretrainedCodec,
    PretrainedMuLaN,
    TextTransformer,
    TokenCrops,
    add_adapters,
    compute_tokens,
)
from musiclm_pytorch.audiolm.crops import collate_tokens

LEVELS, COARSE, BANDWIDTH, BATCH, CODES, SEMANTIC = 8, 3, 6.0, 8, 1024, 512


class Waves(torch.utils.data.Dataset):
    """Noise: eight different clips, over and over."""

    sample_rate = 24000

    def __init__(self, count: int, seconds: float):
        self.count, self._waves = count, 0.1 * torch.randn(8, round(seconds * self.sample_rate))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._waves[index % 8]


def in_turns(first: Callable[[], None], second: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """Median seconds of processor time of both, and the median ratio of the first to the second."""
    times = []
    for _ in range(rounds):
        row = []
        for way in (first, second):
            start = time.process_time()
            way()
            row.append(time.process_time() - start)
        times.append(row)
    return *map(statistics.median, zip(*times)), statistics.median(one / other for one, other in times)


def tokens(options: argparse.Namespace) -> dict[str, float]:
    model, waves = tiny_encodec(), Waves(max(BATCH, options.clips // options.rounds), options.seconds)
    codec = PretrainedCodec(model, num_quantizers=LEVELS)

    @torch.no_grad()
    def bare() -> list[torch.Tensor]:
        batches = [range(start, min(start + BATCH, len(waves))) for start in range(0, len(waves), BATCH)]
        stacked = (torch.stack([waves[index] for index in batch]) for batch in batches)
        return [model.encode(it[:, None], bandwidth=BANDWIDTH).audio_codes[0] for it in stacked]

    def ours(folder: str | None = None) -> None:
        with tempfile.TemporaryDirectory() as other:
            compute_tokens(waves, folder or other, codec=codec, batch_size=BATCH, progress=False)

    with tempfile.TemporaryDirectory() as folder:
        ours(folder)
        crops = TokenCrops(folder, 'fine', seconds=options.seconds, conditioning=False, training=False)
        found, expected = torch.stack([crops[index]['codec'] for index in range(BATCH)]), bare()[0].mT
        if not torch.equal(found, expected[:, : found.shape[1]]):
            raise RuntimeError('the tokens on disk are not those of the model')
    alone, whole, ratio = in_turns(bare, ours, options.rounds)
    print(f'{len(waves)} clips of {options.seconds:g} s: the model alone {alone:.2f} s, tokens on disk {whole:.2f} s')
    print(f'{ratio:.2f} of its speed')
    return dict(
        clips=len(waves), seconds=options.seconds, model_seconds=alone, on_disk_seconds=whole, speed_ratio=ratio
    )


class Noise(torch.nn.Module):
    """Random tokens: what a step costs does not depend on them."""

    sample_rate = 24000

    def __init__(self, rate: int, size: int, levels: int):
        super().__init__()
        self.frame_rate, self.codebook_size, self.num_quantizers, self.levels = rate, size, levels, levels

    def encode(self, waves: torch.Tensor) -> torch.Tensor:
        shape = len(waves), int(waves.shape[1] * self.frame_rate / self.sample_rate)
        return torch.randint(self.codebook_size, shape if self.levels == 1 else (*shape, self.levels))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def tiny_encodec() -> EncodecModel:
    return EncodecModel(EncodecConfig(num_filters=4, hidden_size=16, codebook_dim=16, num_lstm_layers=1)).eval()


def tiny_clap() -> PretrainedMuLaN:
    text = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    audio = dict(patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2], hidden_size=32, spec_size=64)
    audio |= dict(num_mel_bins=16, window_size=4)
    features = ClapFeatureExtractor(feature_size=16, sampling_rate=8000, hop_length=80, max_length_s=1,
                                    fft_window_size=256, frequency_max=4000, truncation='rand_trunc')  # fmt: skip
    letters = ['<s>', '<pad>', '</s>', '<unk>', '<mask>', *'abcdefghijklmnopqrstuvwxyz', 'Ġ']
    tokenizer = RobertaTokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=12)
    return PretrainedMuLaN(ClapModel(config), ClapProcessor(features, tokenizer))


def own_mulan() -> MuLaN:
    sizes = dict(dim=32, depth=1, heads=2, dim_head=8)
    audio = AudioSpectrogramTransformer(audio_sample_rate=Waves.sample_rate, **sizes)
    return MuLaN(audio, TextTransformer(**sizes), dim_latent=12)


def coarse_stage(**keywords: object) -> CoarseTransformer:
    torch.manual_seed(0)
    sizes = dict(codebook_size=CODES, num_coarse_quantizers=COARSE, num_semantic_tokens=SEMANTIC)
    return CoarseTransformer(dim=256, depth=4, **sizes, **keywords)


def frozen(options: argparse.Namespace) -> dict[str, float]:
    waves, steps = Waves(2 * BATCH, 2.0), []
    joints = (own_mulan(), Noise(75, CODES, LEVELS)), (tiny_clap(), PretrainedCodec(tiny_encodec(), LEVELS))
    with tempfile.TemporaryDirectory() as folder:
        for number, (joint, codec) in enumerate(joints):
            quantizer = MuLaNEmbedQuantizer(joint, conditioning_dims=(256,) * 3, rq_num_quantizers=4, codebook_size=16)
            quantizer.fit(torch.nn.functional.normalize(torch.randn(64, 12), dim=-1))
            tokens, parts = f'{folder}/tokens {number}', dict(tokenizer=Noise(50, SEMANTIC, 1), codec=codec)
            compute_tokens(waves, tokens, quantizer=quantizer, texts=False, progress=False, **parts)
            crops, stage = TokenCrops(tokens, 'coarse', seconds=1.0), coarse_stage(audio_text_condition=True)
            keywords = dict(results_folder=Path(folder, str(number)), batch_size=BATCH, valid_frac=0, progress=False)
            trainer = CoarseTrainer(stage, crops, quantizer=quantizer, **keywords)

            def step(trainer: CoarseTrainer = trainer, crops: TokenCrops = crops) -> None:
                # from what is on disk on
                batch = collate_tokens([crops[index] for index in range(BATCH)])
                trainer.optimizer.zero_grad()
                trainer.compute_gradients([batch])
                trainer.optimizer.step()

            steps.append(step)
        ours, theirs = steps
        seconds = in_turns(theirs, ours, max(8, options.rounds))
    print(f'a step of the coarse stage: tokens of EnCodec and CLAP {seconds[0]:.3f} s, of ours {seconds[1]:.3f} s')
    print(f'{seconds[2]:.2f} of its time')
    return dict(frozen_seconds=seconds[0], ours_seconds=seconds[1], time_ratio=seconds[2])


def adapters(options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        parts = dict(tokenizer=Noise(50, SEMANTIC, 1), codec=Noise(75, CODES, LEVELS))
        compute_tokens(Waves(2 * BATCH, 2.0), f'{folder}/tokens', progress=False, **parts)
        trainers = {}
        for name in ('all weights', 'adapters'):
            stage = coarse_stage()
            if name == 'adapters':
                add_adapters(stage, rank=16)
            keywords = dict(seconds=1.0, batch_size=BATCH, valid_frac=0, progress=False, mask_prob=0.0)
            trainers[name] = CoarseTrainer(stage, f'{folder}/tokens', results_folder=Path(folder, name), **keywords)
        crops = TokenCrops(f'{folder}/tokens', 'coarse', seconds=1.0, conditioning=False, training=False)
        batch = collate_tokens([crops[index] for index in range(BATCH)])
        losses = [it.compute_gradients([batch])['loss'] for it in trainers.values()]
        if losses[0] != losses[1]:
            raise RuntimeError(f'the losses differ: {losses}')

        def step(trainer: CoarseTrainer) -> None:
            trainer.optimizer.zero_grad()
            trainer.compute_gradients([batch])
            trainer.optimizer.step()

        whole, adapted = trainers.values()
        seconds = in_turns(lambda: step(adapted), lambda: step(whole), max(8, options.rounds))
        # a gradient and Adam's two moments of each weight that is trained
        held = [
            12e-6 * sum(it.numel() for it in trainer.model.parameters() if it.requires_grad)
            for trainer in (adapted, whole)
        ]
    print(f'a step of the coarse stage: adapters {seconds[0]:.3f} s, all weights {seconds[1]:.3f} s')
    print(f'{seconds[2]:.2f} of its time; {held[0]:.1f} MB of gradients and moments in place of {held[1]:.1f} MB')
    found = dict(adapters_seconds=seconds[0], all_weights_seconds=seconds[1], time_ratio=seconds[2])
    return found | dict(adapters_mb=held[0], all_weights_mb=held[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--clips', type=int, default=100)
    parser.add_argument('--seconds', type=float, default=10.0)
    parser.add_argument('--rounds', type=int, default=5, help='of both in turn, which share the clips')
    parts = ('tokens', 'frozen', 'adapters')
    parser.add_argument('--parts', nargs='+', choices=parts, default=parts)
    add_out(parser, 'parts')
    options = parser.parse_args()
    torch.manual_seed(0)
    ways = dict(tokens=tokens, frozen=frozen, adapters=adapters)
    found = {name: measure(options) for name, measure in ways.items() if name in options.parts}
    write_results(options.out, dict(rounds=options.rounds, **found))


if __name__ == '__main__':
    main()
