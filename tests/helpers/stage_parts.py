"""Tiny transformers and modules whose tokens tell the time, shared by the tests of tokens and of stages."""

import random

import torch
from torch import nn

from helpers.models import tiny_mulan
from musiclm_pytorch import MuLaNEmbedQuantizer
from musiclm_pytorch.audiolm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from musiclm_pytorch.audiolm.tokens import compute_tokens
from musiclm_pytorch.trainer import CoarseTrainer, FineTrainer, SemanticTrainer

RATE = 1200
SCALE = 64.0  # seconds at which a wave that tells the time reaches 1


def clock(seconds, rate=RATE):
    """A wave whose samples tell when they are."""
    return torch.arange(round(seconds * rate)) / rate / SCALE


class ClockTokenizer(nn.Module):
    """Its ids are the frames since the wave began, read off the wave: 50 a second."""

    target_sample_hz, downsample_factor, codebook_size = RATE, 24, 512

    def __init__(self, lost=0):
        super().__init__()
        self.register_buffer('weight', torch.ones(2))
        self.lost = lost  # frames too few at the end, as with convolutions without padding
        self.seen = []

    def frames_of(self, waves):
        self.seen.append(waves.shape)
        assert waves.ndim == 2
        assert not self.training
        count = waves.shape[1] // self.downsample_factor
        firsts = waves[:, : count * self.downsample_factor : self.downsample_factor]
        return (firsts * SCALE * self.target_sample_hz / self.downsample_factor).round().long()

    def forward(self, waves, flatten=True):
        ids = self.frames_of(waves)
        return ids[:, : ids.shape[1] - self.lost]


class ClockCodec(ClockTokenizer):
    """The same 75 times a second; each of three quantizers adds its number."""

    downsample_factor, codebook_size, num_quantizers, rq_groups = 16, 1024, 3, 1

    def forward(self, waves, return_encoded=False):
        return None, self.frames_of(waves)[..., None] + torch.arange(3), None


class Clips(torch.utils.data.Dataset):
    """Clips that tell the time, of the lengths given in seconds; None stands for one that cannot be read."""

    sample_rate = RATE

    def __init__(self, lengths, fail_at=None):
        self.lengths = tuple(lengths)
        self._fail_at = fail_at

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        if index == self._fail_at:
            raise KeyboardInterrupt
        seconds = self.lengths[index]
        return None if seconds is None else dict(wave=clock(seconds), caption=f'clip {index}')


def make_quantizer(dim=16, seed=5):
    torch.manual_seed(seed)
    mulan = tiny_mulan(dict(depth=1, audio_sample_rate=RATE), dict(depth=1, num_tokens=49408))
    quantizer = MuLaNEmbedQuantizer(mulan, conditioning_dims=(dim,) * 3, rq_num_quantizers=2, codebook_size=6)
    with torch.no_grad():
        quantizer.fit(mulan.eval().get_text_latents(raw_texts=[f'clip {index}' for index in range(30)]))
    return quantizer.eval()


SIZES = dict(dim=16, depth=1, heads=2, dim_head=8)


def make_transformer(stage, tokens=20, codes=12, conditioned=False, seed=3, **keywords):
    torch.manual_seed(seed)
    random.seed(seed)  # hyper-connections draw from it where they begin
    keywords = {**SIZES, 'audio_text_condition': conditioned, **keywords}
    if stage == 'semantic':
        return SemanticTransformer(num_semantic_tokens=tokens, **keywords)
    if stage == 'coarse':
        return CoarseTransformer(codebook_size=codes, num_coarse_quantizers=2, num_semantic_tokens=tokens, **keywords)
    return FineTransformer(codebook_size=codes, num_coarse_quantizers=2, **{'num_fine_quantizers': 1, **keywords})


def draw_items(count, equal):
    """Items as `TokenCrops` gives them, with repeated semantic tokens, of one length or of several."""
    items = []
    for index in range(count):
        n, t = (9, 5) if equal else (3 + 4 * index, 1 + 2 * index)
        codes = dict(semantic=torch.randint(4, (n,)), codec=torch.randint(12, (t, 3)))
        items.append(codes | dict(conditioning=torch.randint(6, (2,))))
    return items


def gradients_of_step(trainer, batches):
    """The loss and the gradients of one step of a trainer over micro-batches of this process."""
    trainer.model.zero_grad()
    metrics = trainer.compute_gradients(batches)
    named = trainer.model.named_parameters()
    return metrics['loss'], {name: it.grad.clone() for name, it in named if it.grad is not None}


LENGTHS = (2.0, 9.6, None, 4.0, 4.0)


def compute(folder, dataset=None, **keywords):
    keywords = dict(tokenizer=ClockTokenizer(), codec=ClockCodec()) | keywords
    return compute_tokens(
        Clips(LENGTHS) if dataset is None else dataset,
        folder,
        **{**dict(shard_size=2, window_seconds=3, progress=False), **keywords},
    )


STAGES = dict(semantic=SemanticTrainer, coarse=CoarseTrainer, fine=FineTrainer)


def transformer_for(stage, conditioned=True, **keywords):
    return make_transformer(stage, tokens=512, codes=1024, conditioned=conditioned, **keywords)


def make_trainer(folder, tokens, stage='semantic', transformer=None, quantizer=None, conditioned=True, **keywords):
    defaults = dict(
        batch_size=2, lr=1e-3, seconds=0.2, results_folder=folder, accelerate_kwargs=dict(cpu=True), progress=False,
        valid_frac=0.25,
    )  # fmt: skip
    return STAGES[stage](
        transformer or transformer_for(stage, conditioned),
        tokens,
        quantizer=quantizer or (make_quantizer() if conditioned else None),
        **{**defaults, **keywords},
    )
