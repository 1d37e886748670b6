"""Train the model that ships with the package, `MusicLM.from_pretrained('tiny')`, on SyntheticMusic.

    python benchmarks/learning.py --sides ours --lrs 1e-3 --save build/tiny/mulan
    python examples/train_tiny.py codec tokenizer                                    # need no MuLaN
    python examples/train_tiny.py tokens
    python examples/train_tiny.py semantic coarse fine pack scores

With `--begin-with FOLDER`, a MusicLM of the same sizes, codec and tokenizer are its own, and the stages go on from its
weights: so a better MuLaN comes into a trained model. Without a MuLaN under `build/tiny`, its quantizer stays as well.
Stages that are not trained on are packed as they were.

Each phase leaves its result under `build/tiny` and is passed over when that is there; interrupted, a training goes on
from its last checkpoint. Phases that need nothing of each other may run side by side, one thread each, which is faster
than two threads one after the other. `pack` writes `musiclm_pytorch/pretrained/tiny`, and `scores` adds to it what
MuLaN gives the music for held-out prompts, below which the model warns.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from musiclm_pytorch import (
    AudioSpectrogramTransformer,
    MuLaN,
    MuLaNEmbedQuantizer,
    MusicLM,
    PromptWarning,
    SyntheticMusic,
    get_optimal_spectrogram_params,
)
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.audiolm.semantic import SemanticTokenizer
from musiclm_pytorch.audiolm.semantic_mulan import MuLaNSemanticTokenizer
from musiclm_pytorch.audiolm.spectral_codec import SpectralCodec
from musiclm_pytorch.audiolm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from musiclm_pytorch.audiolm.tokens import compute_tokens
from musiclm_pytorch.trainer.stages import CoarseTrainer, FineTrainer, SemanticTrainer, load_stage

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_RATE, SECONDS, SEED = 16000, 5.0, 1
MULAN_RATE = 8000  # of the tokenizer, too
# captions that tell more than usual, as of `benchmarks/learning.py --rich-captions`
MENTIONS = dict(tempo=0.85, mode=0.85, register=0.85, texture=0.75, drums=0.85, bpm=0.25, key=0.5)
CODES, SEMANTIC_CODES = 512, 512
COARSE, FINE = 2, 6  # levels of the codec
LEVELS, CONDITIONS = 8, 128  # of the quantizer

STAGE = dict(heads=4, dim_head=48, num_residual_streams=1, audio_text_condition=True, cond_as_self_attn_prefix=True)
STAGES = dict(
    semantic=dict(dim=192, depth=4, num_semantic_tokens=SEMANTIC_CODES, **STAGE),
    coarse=dict(
        dim=192,
        depth=4,
        num_semantic_tokens=SEMANTIC_CODES,
        codebook_size=CODES,
        num_coarse_quantizers=COARSE,
        **STAGE,
    ),
    fine=dict(dim=160, depth=2, codebook_size=CODES, num_coarse_quantizers=COARSE, num_fine_quantizers=FINE, **STAGE),
)
KINDS = dict(semantic=SemanticTransformer, coarse=CoarseTransformer, fine=FineTransformer)
TRAINERS = dict(semantic=SemanticTrainer, coarse=CoarseTrainer, fine=FineTrainer)
WINDOWS = dict(semantic=5.0, coarse=0.32, fine=0.96)  # seconds
SAMPLING = dict(temperature=(0.8, 0.6, 0.4), cond_scale=(1.5, 1.0, 1.0))
KNOWS = (
    'piano, guitar, strings, flute, brass, organ, bells and synthesizer; slow, medium and fast; major and minor; low, '
    'middle and high; melodies, chords and arpeggios; with and without drums; moods such as happy, peaceful, sad'
)
BATCH = dict(semantic=32, coarse=192, fine=32)
STEPS = dict(semantic=6000, coarse=4000, fine=3000)

TRAINING = dict(
    optimizer='adamw',
    betas=(0.9, 0.98),
    weight_decay=0.05,
    max_grad_norm=1.0,
    lr_scheduler_type='cosine',
    min_lr_ratio=0.02,
    warmup_steps=100,
    mixed_precision='auto',  # bf16 on processors that have it: three times the speed
    seed=SEED,
)


class Clips(torch.utils.data.Dataset):
    """Items of SyntheticMusic, rendered once to a file."""

    sample_rate = SAMPLE_RATE

    def __init__(self, work: Path):
        self.path = work / 'clips.npy'
        self.waves = np.load(self.path, mmap_mode='r')
        self.texts = json.loads((work / 'clips.json').read_text())

    def __len__(self) -> int:
        return len(self.waves)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return torch.from_numpy(self.waves[index].astype(np.float32) / 32767), self.texts[index]


def open_clips(args: argparse.Namespace) -> Clips:
    work = args.work
    if not (work / 'clips.json').exists():
        work.mkdir(parents=True, exist_ok=True)
        shape = args.clips, round(SAMPLE_RATE * SECONDS)
        np.lib.format.open_memmap(work / 'clips.npy', 'w+', np.int16, shape).flush()
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            texts = pool.map(render, [(work, args.clips, start) for start in range(0, args.clips, 1000)])
            (work / 'clips.json').write_text(json.dumps([text for part in texts for text in part]))
    clips = Clips(work)
    if len(clips) != args.clips:
        raise ValueError(
            f'{work} holds {len(clips)} clips, not {args.clips}; pass --clips {len(clips)}, or another --work'
        )
    return clips


def render(task: tuple[Path, int, int]) -> list[str]:
    """Write a thousand waves to their places; returns their captions."""
    work, total, start = task
    torch.set_num_threads(1)
    music = SyntheticMusic(total, seed=SEED, seconds=SECONDS, sample_rate=SAMPLE_RATE, mentions=MENTIONS)
    waves = np.lib.format.open_memmap(work / 'clips.npy', 'r+')
    texts = []
    for index in range(start, min(start + 1000, total)):
        wave, text = music[index]
        waves[index] = (wave.numpy() * 32767).astype(np.int16)
        texts.append(text)
    return texts


# ---- phases ----


def fit_codec(args: argparse.Namespace) -> None:
    if args.begin_with is not None:
        save_module(load_module(args.begin_with / 'codec'), args.work / 'codec')
        return
    codec = SpectralCodec(SAMPLE_RATE, codebook_size=CODES, num_quantizers=COARSE + FINE)
    missing = codec.fit(open_clips(args), max_items=4000, max_vectors=60_000, seed=SEED)
    print('left over after each level:', ' '.join(f'{share:.1%}' for share in missing), flush=True)
    save_module(codec, args.work / 'codec')


def fit_tokenizer(args: argparse.Namespace) -> None:
    """Centres of spectra."""
    if args.begin_with is not None:
        SemanticTokenizer.from_pretrained(args.begin_with / 'tokenizer').save_pretrained(args.work / 'tokenizer')
        return
    front_end = get_optimal_spectrogram_params(MULAN_RATE, 'tonal') | dict(clip_summary=False)
    tower = AudioSpectrogramTransformer(dim=16, depth=1, heads=1, dim_head=16, **front_end)
    tokenizer = MuLaNSemanticTokenizer(tower, codebook_size=SEMANTIC_CODES)
    lost = tokenizer.fit(open_clips(args), batch_size=32, max_items=6000, seed=SEED)
    print(f'variance lost by the tokenizer: {lost:.1%}', flush=True)
    tokenizer.save_pretrained(args.work / 'tokenizer')


def compute(args: argparse.Namespace) -> None:
    """The quantizer, and the tokens of all clips."""
    clips = open_clips(args)
    if not (args.work / 'quantizer').exists():
        make_quantizer(args, clips).save_pretrained(args.work / 'quantizer')
    quantizer = MuLaNEmbedQuantizer.from_pretrained(args.work / 'quantizer')
    modules = dict(
        tokenizer=SemanticTokenizer.from_pretrained(args.work / 'tokenizer'),
        codec=load_module(args.work / 'codec'),
        quantizer=quantizer,
    )
    for name, module in modules.items():
        start = time.perf_counter()
        compute_tokens(clips, args.work / 'tokens', batch_size=32, **{name: module})
        print(f'tokens by the {name} in {time.perf_counter() - start:.0f} s', flush=True)


def make_quantizer(args: argparse.Namespace, clips: Clips) -> MuLaNEmbedQuantizer:
    if args.begin_with is not None and not (args.work / 'mulan').exists():
        return MuLaNEmbedQuantizer.from_pretrained(args.begin_with / 'quantizer')
    mulan = small_vocabulary(MuLaN.from_pretrained(args.work / 'mulan'), clips.texts)
    torch.manual_seed(SEED)
    quantizer = MuLaNEmbedQuantizer(
        mulan,
        conditioning_dims=[STAGES[name]['dim'] for name in KINDS],
        rq_num_quantizers=LEVELS,
        codebook_size=CONDITIONS,
    )
    missing = quantizer.fit(clips, batch_size=64, max_items=12_000, seed=SEED)
    print('left over after each level:', ' '.join(f'{share:.1%}' for share in missing), flush=True)
    return quantizer


def small_vocabulary(mulan: MuLaN, texts: list[str]) -> MuLaN:
    """The same MuLaN without the embeddings of words that it never read, and without what predicts words."""
    ids = torch.cat([mulan.text.tokenize(texts[start : start + 1000]).unique() for start in range(0, len(texts), 1000)])
    config = mulan.config | dict(word_prediction_weight=0.0)
    small = MuLaN(mulan.audio, mulan.text.with_known_tokens(ids.unique().tolist()), **config)
    weights = mulan.state_dict() | {f'text.{name}': it for name, it in small.text.state_dict().items()}
    small.load_state_dict({name: it for name, it in weights.items() if not name.startswith('words.')})
    return small.eval()


def train_stage(name: str, args: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    if args.begin_with is None:
        transformer = KINDS[name](**STAGES[name]).scale_initial_weights()
    else:
        transformer = load_module(args.begin_with / name)
    trainer = TRAINERS[name](
        transformer,
        args.work / 'tokens',
        quantizer=MuLaNEmbedQuantizer.from_pretrained(args.work / 'quantizer'),
        batch_size=BATCH[name],
        seconds=WINDOWS[name],
        text_share=0.5,
        cond_drop_prob=0.1,
        mask_prob=0.1,
        prefix_loss_weight=0.0,
        valid_frac=0.01,
        lr=args.lr or 2e-3,
        **TRAINING,
        **schedule(args, args.work / name, STEPS[name]),
    )
    trainer.train()


def schedule(args: argparse.Namespace, folder: Path, steps: int) -> dict:
    steps = args.steps or steps
    return dict(
        results_folder=folder,
        resume=True,
        num_train_steps=steps,
        checkpoint_every=250,
        max_checkpoints=1,
        validate_every=250,
        log_every=25,
        progress=False,
    )


def pack(args: argparse.Namespace) -> None:
    """All parts in one folder, in half precision."""
    quantizer = MuLaNEmbedQuantizer.from_pretrained(args.work / 'quantizer')
    stages = {}
    for name, kind in KINDS.items():
        if args.begin_with is not None and not (args.work / name).exists():
            stages[name] = load_module(args.begin_with / name)
            continue
        stages[name] = kind(**STAGES[name])
        load_stage(args.work / name / 'best', stages[name], quantizer)
    musiclm = MusicLM(
        mulan_embed_quantizer=quantizer,
        windows=tuple(WINDOWS.values()),
        sampling=SAMPLING,
        knows=KNOWS,
        tokenizer=SemanticTokenizer.from_pretrained(args.work / 'tokenizer'),
        codec=load_module(args.work / 'codec'),
        **stages,
    )
    musiclm.save_pretrained(args.output, dtype=torch.float16)
    files = sorted(args.output.rglob('*.safetensors'))
    print(f'{sum(path.stat().st_size for path in files) / 1e6:.1f} MB in {args.output}')


def measure_scores(args: argparse.Namespace) -> None:
    """The score that 95 % of held-out prompts reach with one sample, and how well it tells nonsense from them."""
    musiclm = MusicLM.from_pretrained(args.output)
    warnings.simplefilter('ignore', PromptWarning)
    music = SyntheticMusic(1, seconds=SECONDS, sample_rate=SAMPLE_RATE, split='valid')
    held_out = [music.caption(music.draw_labels(20_000 + seed), 20_000 + seed) for seed in range(args.prompts)]
    random = np.random.default_rng(SEED)
    letters = np.array(list('abcdefghijklmnopqrstuvwxyz'))

    def nonsense() -> str:
        return ' '.join(''.join(random.choice(letters, length)) for length in random.integers(3, 10, size=3))

    scores = {}
    for name, prompts in dict(valid=held_out, nonsense=[nonsense() for _ in held_out]).items():
        parts = [
            musiclm(prompts[start : start + 25], 4, seconds=SECONDS, seed=4 * start, return_scores=True).scores
            for start in range(0, len(prompts), 25)
        ]
        scores[name] = torch.cat(parts)
    musiclm.usual_score = round(scores['valid'][:, 0].quantile(0.05).item(), 3)
    for name, found in scores.items():
        for samples in (1, 2, 4):
            best = found[:, :samples].amax(dim=1)
            below = (best < musiclm.usual_score).float().mean()
            print(f'{name}, best of {samples}: mean {best.mean():.3f}, {below:.1%} below {musiclm.usual_score}')
    config = args.output / 'config.json'
    settings = json.loads(config.read_text()) | dict(knows=KNOWS, usual_score=musiclm.usual_score)
    config.write_text(json.dumps(settings, indent=2) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('phases', nargs='+', choices=['codec', 'tokenizer', 'tokens', *KINDS, 'pack', 'scores'])
    parser.add_argument('--work', type=Path, default=ROOT / 'build' / 'tiny')
    parser.add_argument('--output', type=Path, default=ROOT / 'musiclm_pytorch' / 'pretrained' / 'tiny')
    parser.add_argument('--clips', type=int, default=24_000, help='to train on (default 24,000)')
    parser.add_argument('--begin-with', type=Path, metavar='FOLDER', help='a MusicLM to go on from')
    parser.add_argument('--steps', type=int, help='steps of a training, instead of those of the shipped model')
    parser.add_argument('--prompts', type=int, default=200, help='held-out prompts of `scores` (default 200)')
    parser.add_argument('--lr', type=float, help='learning rate, instead of that of the shipped model')
    args = parser.parse_args()
    for phase in args.phases:
        start = time.perf_counter()
        if phase in KINDS:
            train_stage(phase, args)
        else:
            dict(codec=fit_codec, tokenizer=fit_tokenizer, tokens=compute, pack=pack, scores=measure_scores)[phase](
                args
            )
        print(f'{phase}: {time.perf_counter() - start:.0f} s', flush=True)


if __name__ == '__main__':
    main()
