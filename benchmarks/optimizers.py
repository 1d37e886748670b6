"""What a stage learns in a few hundred steps by each optimizer, from the same weights, on the same batches.

    python benchmarks/optimizers.py                                     # SyntheticMusic, by tones
    python benchmarks/optimizers.py --sound-font FluidR3_GM.sf2 --model small

The stages are as large as those of the model, and begin anew; its tokenizer, codec and quantizer make the tokens. Each
optimizer runs at each of its learning rates, down a cosine. The loss is of held-out clips, in nats a token, where that
of codes drawn at random is the logarithm of their number. That all runs see the same is checked by the loss of their
first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from results import add_out, write_results

from musiclm_pytorch import CoarseTrainer, MusicLM, SemanticTrainer, SyntheticMusic, compute_tokens
from musiclm_pytorch.trainer import TrainingConfig

TRAINERS = dict(semantic=SemanticTrainer, coarse=CoarseTrainer)
RATES = dict(adamw=(1e-3, 2e-3, 4e-3), lion=(3e-4,), muon=(2e-3, 5e-3, 1e-2))


def learn(args: argparse.Namespace, stage: str, optimizer: str, lr: float, tokens: Path) -> dict:
    """One run: its loss on held-out clips, that of its first step, and the median seconds of a step."""
    musiclm = MusicLM.from_pretrained(args.model)
    torch.manual_seed(0)
    old = musiclm.stages[stage]
    fresh = type(old)(**old.config).scale_initial_weights()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            num_train_steps=args.steps,
            batch_size=args.batch_size,
            lr=lr,
            betas=(0.9, 0.98),
            optimizer=optimizer,
            lr_scheduler_type='cosine',
            warmup_steps=args.steps // 8,
            min_lr_ratio=0.02,
            max_grad_norm=1.0,
            mixed_precision='auto',
            valid_frac=0.04,
            validate_every=args.steps,
            log_every=1,
            results_folder=folder,
            progress=False,
        )
        trainer = TRAINERS[stage](
            fresh,
            tokens,
            quantizer=musiclm.mulan_embed_quantizer,
            seconds=min(args.seconds, 2.56) if stage == 'coarse' else args.seconds,
            text_share=0.7,
            mask_prob=0.1,
            prefix_loss_weight=0.0,
            config=config,
        )
        trainer.train()
        lines = [json.loads(line) for line in (Path(folder) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    trained = [line for line in lines if line['part'] == 'train']
    return dict(
        stage=stage,
        optimizer=optimizer,
        lr=lr,
        loss=next(line['loss'] for line in reversed(lines) if line['part'] == 'valid'),
        first=trained[0]['loss'],
        step_seconds=statistics.median(line['seconds'] for line in trained),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='small', help='whose tokens and sizes are used')
    parser.add_argument('--sound-font', nargs='+', help='what plays the clips of a model of sampled instruments')
    parser.add_argument('--stages', nargs='+', choices=tuple(TRAINERS), default=list(TRAINERS))
    parser.add_argument('--optimizers', nargs='+', choices=tuple(RATES), default=list(RATES))
    parser.add_argument('--clips', type=int, default=3000)
    parser.add_argument('--seconds', type=float, default=5.0)
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--batch-size', type=int, default=20)
    add_out(parser, 'optimizers')
    args = parser.parse_args()
    torch.set_num_threads(1)
    musiclm = MusicLM.from_pretrained(args.model)
    music = SyntheticMusic(args.clips, seconds=args.seconds, sample_rate=24000, sound_font=args.sound_font)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokens = compute_tokens(
            music,
            Path(folder) / 'tokens',
            tokenizer=musiclm.tokenizer,
            codec=musiclm.codec,
            quantizer=musiclm.mulan_embed_quantizer,
            batch_size=32,
        )
        for stage in args.stages:
            for optimizer in args.optimizers:
                for lr in RATES[optimizer]:
                    row = learn(args, stage, optimizer, lr, tokens)
                    rows.append(row)
                    print(
                        f'{stage:10}{optimizer:8}lr {lr:<8g}{row["loss"]:.3f} nats, {row["step_seconds"]:.3f} s a step',
                        flush=True,
                    )
            firsts = [row['first'] for row in rows if row['stage'] == stage]
            if max(firsts) - min(firsts) > 1e-3 * firsts[0]:
                raise SystemExit(f'the runs of the {stage} stage did not begin alike: {firsts}')
    write_results(args.out, dict(rows=rows))


if __name__ == '__main__':
    main()
