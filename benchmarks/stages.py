"""Steps a second of the three stages' trainers on cached tokens, beside audiolm-pytorch's own on the same waves.

    python benchmarks/stages.py                      # dim 512, depth 6, crops of 30, 10 and 3 s
    python benchmarks/stages.py --dim 256 --depth 4 --stages fine

Both sides train the same transformer, with conditioning, on the same clips of SyntheticMusic, each as long as a crop.
audiolm-pytorch's trainers compute semantic tokens, codec tokens and conditioning at each step; here that is done once,
and its time is told. The tokenizer has the size of HuBERT base up to layer 9, with 500 clusters; codec and quantizer
are SoundStream and `MuLaNEmbedQuantizer`. Their weights are random, which costs as much as others would.

First both sides compute the loss of one batch, which must be equal. Then they are timed in turns, each in a process of
its own, since audiolm-pytorch allows one trainer a process. Its first step, which validates and saves, is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import soundfile
import torch
from profiled import watch_steps
from results import add_out, write_results
from torch import nn

RATE = 16000
STAGES = ('semantic', 'coarse', 'fine')
SIDES = ('upstream', 'ours', 'ours-bf16')  # ours-bf16: with mixed_precision='bf16', where there are instructions for it
CLIPS = 21  # audiolm-pytorch holds one in twenty out
CLUSTERS, CODES, COARSE, FINE = 500, 1024, 3, 5


# ---- parts: the same in every process ----


def make_tokenizer(seed: int = 0) -> nn.Module:
    from transformers import HubertConfig, HubertModel

    from musiclm_pytorch.audiolm.convert import HubertWithKmeans

    class Features(nn.Module):
        """HuBERT base as audiolm-pytorch calls it; nothing beyond the layer that is used is computed."""

        def __init__(self):
            super().__init__()
            self.hubert = HubertModel(HubertConfig(num_hidden_layers=9))

        def forward(self, waves, **_):
            return dict(x=self.hubert(waves).last_hidden_state)

    class RandomHubert(HubertWithKmeans):
        def __init__(self):
            nn.Module.__init__(self)
            self.target_sample_hz, self.seq_len_multiple_of, self.output_layer = RATE, 320, 9
            self.model = Features().eval()
            self.kmeans = SimpleNamespace(n_clusters=CLUSTERS)
            with torch.inference_mode():
                frames = self.model(torch.randn(1, 12 * RATE) * 0.1)['x'][0]
            self.register_buffer('cluster_centers', frames[:CLUSTERS].clone())

    torch.manual_seed(seed)
    return RandomHubert().eval()


def make_parts(folder: Path, dim: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Tokenizer, codec and quantizer; the first call writes their weights, the others read them."""
    from safetensors.torch import load_file, save_file

    from musiclm_pytorch import (
        MuLaN,
        MuLaNEmbedQuantizer,
        TextTransformer,
        create_optimized_audiospectrogram_transformer,
    )
    from musiclm_pytorch.audiolm.convert import SoundStream

    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    codec = SoundStream(codebook_size=CODES, rq_num_quantizers=COARSE + FINE, target_sample_hz=RATE)
    audio = create_optimized_audiospectrogram_transformer(
        dim=256, depth=4, use_case='music', audio_sample_rate=RATE, support_variable_length=True
    )
    mulan = MuLaN(audio, TextTransformer(dim=256, depth=2), dim_latent=128)
    quantizer = MuLaNEmbedQuantizer(mulan, conditioning_dims=(dim,) * 3, codebook_size=256)
    path = folder / f'parts-{dim}'
    if not path.is_dir():
        path.mkdir()
        codec.train()
        with torch.no_grad():
            # the first batch that reaches a codebook gives it, and the later ones are dropped now and then
            while not all(it.all() for name, it in codec.named_buffers() if name.endswith('initted')):
                codec(torch.randn(4, 6 * RATE) * 0.1, return_encoded=True)
        quantizer.fit(nn.functional.normalize(torch.randn(4096, 128), dim=-1))
        for name, module in (('tokenizer', tokenizer), ('codec', codec), ('quantizer', quantizer)):
            # clones, for views of one storage cannot be written
            save_file({key: it.clone() for key, it in module.state_dict().items()}, path / f'{name}.safetensors')
    for name, module in (('tokenizer', tokenizer), ('codec', codec), ('quantizer', quantizer)):
        module.load_state_dict(load_file(path / f'{name}.safetensors'))
    return tokenizer.eval(), codec.eval(), quantizer.eval()


def make_transformer(stage: str, dim: int, depth: int) -> nn.Module:
    from musiclm_pytorch.audiolm.convert import CoarseTransformer, FineTransformer, SemanticTransformer

    torch.manual_seed(2)
    random.seed(2)
    common = dict(dim=dim, depth=depth, audio_text_condition=True)
    if stage == 'semantic':
        return SemanticTransformer(num_semantic_tokens=CLUSTERS, **common)
    common |= dict(codebook_size=CODES, num_coarse_quantizers=COARSE)
    if stage == 'coarse':
        return CoarseTransformer(num_semantic_tokens=CLUSTERS, **common)
    return FineTransformer(num_fine_quantizers=FINE, **common)


class Folder(torch.utils.data.Dataset):
    """The clips, in the order of their names."""

    sample_rate = RATE

    def __init__(self, folder: Path):
        self._files = sorted(folder.glob('*.wav'))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(soundfile.read(self._files[index], dtype='float32')[0])


# ---- children ----


def prepare(args: argparse.Namespace) -> dict:
    """Write the clips of a stage and compute their tokens."""
    from musiclm_pytorch import SyntheticMusic, compute_tokens

    waves = args.folder / f'{args.stage}-waves'
    waves.mkdir()
    music = SyntheticMusic(CLIPS, seconds=args.seconds, sample_rate=RATE)
    for index in range(CLIPS):
        soundfile.write(waves / f'{index:03d}.wav', music[index][0].numpy(), RATE, subtype='FLOAT')
    tokenizer, codec, quantizer = make_parts(args.folder, args.dim)
    start = time.perf_counter()
    compute_tokens(
        Folder(waves),
        args.folder / f'{args.stage}-tokens',
        tokenizer=None if args.stage == 'fine' else tokenizer,
        codec=None if args.stage == 'semantic' else codec,
        quantizer=quantizer,
        texts=False,
        batch_size=args.batch_size,
        mulan_seconds=args.seconds,
        mulan_hop=args.seconds,
        progress=False,
    )
    return dict(cache_seconds=time.perf_counter() - start, clips=CLIPS)


def check(args: argparse.Namespace) -> dict:
    """The loss of one batch by audiolm-pytorch's wrapper of the waves, and by ours of the tokens.

    The batch is one that the cache was computed in: in another one, rounding may choose another code now and then.
    """
    from musiclm_pytorch import TokenCrops
    from musiclm_pytorch.audiolm import convert
    from musiclm_pytorch.audiolm.crops import collate_tokens
    from musiclm_pytorch.trainer.stages import Stage

    tokenizer, codec, quantizer = make_parts(args.folder, args.dim)
    transformer = make_transformer(args.stage, args.dim, args.depth)
    kinds = dict(
        semantic=(convert.SemanticTransformerWrapper, dict(wav2vec=tokenizer)),
        coarse=(convert.CoarseTransformerWrapper, dict(wav2vec=tokenizer, codec=codec)),
        fine=(convert.FineTransformerWrapper, dict(codec=codec)),
    )
    kind, parts = kinds[args.stage]
    wrapper = kind(transformer=transformer, audio_conditioner=quantizer, mask_prob=0.0, **parts)
    # end tokens are among its labels in training mode only; what computes tokens stays in eval mode
    wrapper.training = True
    waves = torch.stack([Folder(args.folder / f'{args.stage}-waves')[index] for index in range(args.batch_size)])
    with torch.no_grad():
        theirs = wrapper(raw_wave=waves, return_loss=True, cond_drop_prob=0.0)
        stage = Stage(
            transformer,
            quantizer.cond_embeddings[args.stage],
            cond_drop_prob=0.0,
            mask_prob=0.0,
            prefix_loss_weight=1.0,
        )
        crops = TokenCrops(args.folder / f'{args.stage}-tokens', args.stage, seconds=args.seconds, training=False)
        batch = collate_tokens([crops[index] for index in range(args.batch_size)], unique_consecutive=True)
        ours = stage.eval()(**batch)
    if abs(theirs.item() - ours.item()) > 1e-4 * theirs.item():
        raise RuntimeError(f'the losses differ: {theirs.item()} upstream, {ours.item()} here')
    return dict(upstream=theirs.item(), ours=ours.item(), **{key: list(it.shape) for key, it in batch.items()})


def train(args: argparse.Namespace) -> dict:
    """Seconds of each step after the first."""
    transformer = make_transformer(args.stage, args.dim, args.depth)
    tokenizer, codec, quantizer = make_parts(args.folder, args.dim)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as results:
        if args.side == 'upstream':
            trainer = upstream_trainer(args, transformer, tokenizer, codec, quantizer, results)
            trainer.train_step()
            for _ in range(args.steps):
                start = time.perf_counter()
                trainer.train_step()
                times.append(time.perf_counter() - start)
        else:
            from musiclm_pytorch import trainer as trainers

            kind = getattr(trainers, f'{args.stage.capitalize()}Trainer')
            trainer = kind(
                transformer,
                args.folder / f'{args.stage}-tokens',
                quantizer=quantizer,
                seconds=args.seconds,
                batch_size=args.batch_size,
                unique_consecutive=True,
                mixed_precision='bf16' if args.side == 'ours-bf16' else 'no',
                results_folder=results,
                progress=False,
            )
            profiled = watch_steps(first=1, count=args.steps) if args.profile else None

            def log_fn(metrics: dict[str, float]) -> None:
                times.append(metrics['seconds'])
                if profiled is not None:
                    profiled(trainer.step)

            trainer.train(num_train_steps=args.steps + 1, with_validation=False, log_fn=log_fn)
            times = times[1:]
    return dict(step_seconds=times)


def upstream_trainer(args, transformer, tokenizer, codec, quantizer, results: str):
    from musiclm_pytorch.audiolm import convert

    kinds = dict(
        semantic=(convert.SemanticTransformerTrainer, dict(wav2vec=tokenizer)),
        coarse=(convert.CoarseTransformerTrainer, dict(wav2vec=tokenizer, codec=codec)),
        fine=(convert.FineTransformerTrainer, dict(codec=codec)),
    )
    kind, parts = kinds[args.stage]
    keywords = {}
    if args.stage == 'coarse':
        # of the two waves that it reads of a folder, its conditioner and its tokenizer take the first
        keywords = dict(ds_fields=('raw_wave', 'raw_wave_for_codec'))
    trainer = kind(
        transformer=transformer,
        audio_conditioner=quantizer,
        folder=str(args.folder / f'{args.stage}-waves'),
        data_max_length=round(args.seconds * RATE),
        batch_size=args.batch_size,
        num_train_steps=args.steps + 1,
        results_folder=results,
        force_clear_prev_results=False,
        **parts,
        **keywords,
    )
    trainer.print = lambda _: None
    return trainer


# ---- parent ----


def run(args: argparse.Namespace, what: str, folder: Path, stage: str, side: str = 'ours') -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), '--child', what, '--folder', str(folder)]
    command += ['--stage', stage, '--side', side, '--seconds', str(args.crop or SECONDS[stage])]
    for name in ('dim', 'depth', 'batch_size', 'steps'):
        command += [f'--{name.replace("_", "-")}', str(getattr(args, name))]
    command += ['--profile'] if args.profile else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f'{what} of {stage}, {side}, ended with exit code {done.returncode}')
    return json.loads(done.stdout.splitlines()[-1])


SECONDS = dict(semantic=30.0, coarse=10.0, fine=3.0)


def main(args: argparse.Namespace) -> None:
    from musiclm_pytorch.kernels.processor import computes_in_bf16

    rows = []
    sides = SIDES if computes_in_bf16() else SIDES[:2]
    with tempfile.TemporaryDirectory() as name:
        for stage in args.stages:
            folder = Path(name)
            prepared = run(args, 'prepare', folder, stage)
            losses = run(args, 'check', folder, stage)
            print(f'{stage}: loss {losses["upstream"]:.6f} upstream, {losses["ours"]:.6f} here; {losses}', flush=True)
            times: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(args.rounds):
                for side in sides:
                    times[side] += run(args, 'train', folder, stage, side)['step_seconds']
            medians = {side: statistics.median(them) for side, them in times.items()}
            row = dict(
                stage=stage,
                seconds=args.crop or SECONDS[stage],
                step_seconds=medians,
                ratios={side: medians['upstream'] / medians[side] for side in sides[1:]},
                cache_seconds_a_clip=prepared['cache_seconds'] / prepared['clips'],
                loss=losses,
                times=times,
            )
            rows.append(row)
            print(json.dumps(row['step_seconds']), json.dumps(row['ratios']), flush=True)

    print(f'\ndim {args.dim}, depth {args.depth}, batch {args.batch_size}, {torch.get_num_threads()} threads\n')
    names = ['stage', 'crop', 'audiolm-pytorch 2.4.0: s a step', 'here', 'ratio']
    names += ['here, bf16', 'ratio'] * ('ours-bf16' in sides) + ['caching: s a clip, once']
    print('| ' + ' | '.join(names) + ' |\n|' + '---|' * len(names))
    for row in rows:
        cells = [f'{row["step_seconds"]["upstream"]:.2f}']
        for side, ratio in row['ratios'].items():
            cells += [f'{row["step_seconds"][side]:.2f}', f'{ratio:.1f}']
        cells.append(f'{row["cache_seconds_a_clip"]:.2f}')
        print(f'| {row["stage"]} | {row["seconds"]:g} s | ' + ' | '.join(cells) + ' |')
    setting = dict(dim=args.dim, depth=args.depth, batch_size=args.batch_size)
    write_results(args.out, dict(setting=setting, rows=rows))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--stages', nargs='+', choices=STAGES, default=STAGES)
    parser.add_argument('--dim', type=int, default=512)
    parser.add_argument('--depth', type=int, default=6)
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--crop', type=float, help='seconds of the crops (default: 30, 10 and 3)')
    parser.add_argument('--steps', type=int, default=3, help='steps timed a round (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=2, help='rounds a side (default: %(default)s)')
    add_out(parser, 'stages')
    parser.add_argument('--profile', action='store_true', help='tell what the operators of a step of ours cost')
    for hidden in ('child', 'stage', 'side'):
        parser.add_argument(f'--{hidden}', help=argparse.SUPPRESS)
    parser.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--seconds', type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(dict(prepare=prepare, check=check, train=train)[arguments.child](arguments)))
    else:
        main(arguments)
