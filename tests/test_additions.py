"""What CONTRIBUTING says of additions is true: one of each, made here, without a change of the package."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import einsum
from helpers.models import tiny_mulan
from torch import nn

from musiclm_pytorch import MuLaN, MuLaNEmbedQuantizer, MusicLM
from musiclm_pytorch.audiolm import saving
from musiclm_pytorch.audiolm.generate import generate_semantic
from musiclm_pytorch.audiolm.generation_args import Sampling
from musiclm_pytorch.audiolm.protocols import Codec, Tokenizer
from musiclm_pytorch.audiolm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from musiclm_pytorch.checks import records_config
from musiclm_pytorch.collectives import gather_batch
from musiclm_pytorch.kernels import plain_kernels
from musiclm_pytorch.mulan import layers
from musiclm_pytorch.mulan.contrastive import ContrastiveLoss, own_pairs
from musiclm_pytorch.mulan.model import JointEmbedding
from musiclm_pytorch.mulan.pretrained import AudioSide, TextSide

PACKAGE = Path(saving.__file__).parents[1]
RATE, HOP, LEVELS, CODES = 400, 8, 2, 4  # Hz, samples a frame


# ---- a loss ----


class HardestNegative(ContrastiveLoss):
    """The hinge loss of the hardest negative of each text (VSE++, arXiv 1707.05612)."""

    def loss_of_own_rows(self, audio, text, sizes):
        similarities = einsum(audio, gather_batch(text, sizes), 'l i d, l j d -> l i j')
        pairs = own_pairs(sizes, audio.device)
        positives = similarities[:, torch.arange(len(pairs)), pairs]
        hardest = similarities.masked_fill(F.one_hot(pairs, sum(sizes)).bool(), -torch.inf).amax(dim=-1)
        return (0.2 + hardest - positives).clamp(min=0).sum()


def test_a_loss(tmp_path):
    torch.manual_seed(0)
    mulan = tiny_mulan().eval()  # without augmentation
    mulan.contrast = HardestNegative()
    wavs, texts = torch.randn(4, 1024), torch.randint(1, 100, (4, 6))
    cosines = (mulan.get_audio_latents(wavs) @ mulan.get_text_latents(texts).T).tolist()
    hinges = [0.2 + max(row[:i] + row[i + 1 :]) - row[i] for i, row in enumerate(cosines)]
    assert mulan(wavs, texts).item() == pytest.approx(sum(max(0, it) for it in hinges) / 4, abs=1e-5)
    optimizer, losses = torch.optim.Adam(mulan.parameters(), lr=3e-3), []
    for _ in range(12):
        losses.append(mulan(wavs, texts))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    # the towers can be read without the loss that trained them
    mulan.save_pretrained(tmp_path)
    assert torch.equal(MuLaN.from_pretrained(tmp_path).get_text_latents(texts), mulan.get_text_latents(texts))


# ---- a codec, a tokenizer, a joint embedding ----


class Steps(nn.Module):
    """A codec: the mean of each frame, of 16 steps, as two digits of 4."""

    frame_rate, num_quantizers, codebook_size = Fraction(RATE, HOP), LEVELS, CODES

    @records_config
    def __init__(self, sample_rate: int = RATE):
        super().__init__()
        self.sample_rate = sample_rate
        self.register_buffer('steps', torch.linspace(-1, 1, CODES**LEVELS))

    def encode(self, waves):
        means = waves.unflatten(1, (-1, HOP)).mean(dim=-1)
        nearest = (means[..., None] - self.steps).abs().argmin(dim=-1)
        return torch.stack((nearest // CODES, nearest % CODES), dim=-1)

    def decode(self, codes):
        return self.steps[codes[..., 0] * CODES + codes[..., 1]].repeat_interleave(HOP, dim=1)


class Loudness(nn.Module):
    """A semantic tokenizer: how loud a fifth of a second is."""

    sample_rate, frame_rate, codebook_size = RATE, Fraction(5), 6

    def encode(self, waves):
        return (waves.unflatten(1, (-1, RATE // 5)).abs().amax(dim=-1) * 6).long().clamp(max=5)


class Letters(JointEmbedding):
    """A joint embedding, trained by nobody: of text its letters, of audio its spectrum."""

    dim_latent, device = 26, torch.device('cpu')

    def __init__(self):
        super().__init__()
        self.audio, self.text = AudioSide(sample_rate=RATE, max_audio_length=None), TextSide()

    def get_audio_latents(self, wavs, audio_lengths=None, sample_rate=None):
        return F.normalize(torch.fft.rfft(wavs, 50, dim=-1).abs(), dim=-1)

    def get_text_latents(self, texts=None, raw_texts=None):
        counts = [[text.count(chr(ord('a') + i)) + 0.01 for i in range(26)] for text in raw_texts]
        return F.normalize(torch.tensor(counts), dim=-1)


def test_a_codec_a_tokenizer_and_a_joint_embedding(monkeypatch, tmp_path):
    torch.manual_seed(0)
    codec, tokenizer = Steps(), Loudness()
    assert isinstance(codec, Codec)
    assert isinstance(tokenizer, Tokenizer)
    shared = dict(dim=16, depth=1, heads=2, dim_head=8, audio_text_condition=True)
    coarse = dict(num_coarse_quantizers=1, codebook_size=CODES)
    quantizer = MuLaNEmbedQuantizer(Letters(), (16, 16, 16), rq_num_quantizers=2, codebook_size=4)
    quantizer.fit(Letters().get_text_latents(raw_texts=['slow piano', 'fast flute', 'drums', 'low organ', 'a harp']))
    musiclm = MusicLM(
        mulan_embed_quantizer=quantizer,
        semantic=SemanticTransformer(num_semantic_tokens=6, **shared),
        coarse=CoarseTransformer(num_semantic_tokens=6, **coarse, **shared),
        fine=FineTransformer(num_fine_quantizers=1, **coarse, **shared),
        codec=codec,
        tokenizer=tokenizer,
    ).eval()
    music = musiclm('a slow piano', num_samples=2, seconds=0.4, seed=1)
    assert music.shape == (1, round(0.4 * RATE))
    assert torch.isin(torch.as_tensor(music), codec.steps).all()
    # to be saved, the codec is a line of KINDS
    with pytest.raises(TypeError, match='a Steps cannot be saved'):
        saving.save_module(codec, tmp_path / 'codec')
    monkeypatch.setitem(saving.KINDS, 'Steps', __name__)
    saving.save_module(codec, tmp_path / 'codec')
    waves = torch.rand(1, 80) * 2 - 1
    assert torch.equal(saving.load_module(tmp_path / 'codec').encode(waves), codec.encode(waves))


# ---- a conditioner ----


def test_a_conditioner():
    """A stage that is told a number, by a module of its own, and trained and heard by what the package has."""
    torch.manual_seed(0)
    stage = SemanticTransformer(
        num_semantic_tokens=4, dim=16, depth=1, heads=2, dim_head=8, has_condition=True, cond_dim=8, cond_drop_prob=0.0
    )
    conditioner = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Unflatten(1, (1, 8)))  # (b, 1) to (b, 1, 8)
    optimizer = torch.optim.Adam([*stage.parameters(), *conditioner.parameters()], lr=0.02)
    numbers, tokens = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0, 0, 0], [3, 3, 3]])
    for _ in range(40):
        loss = stage.loss(tokens, conditioning=conditioner(numbers))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert conditioner[0].weight.grad.abs().sum() > 0
    given = dict(text_embeds=conditioner(numbers).detach(), sampling=Sampling(temperature=0))
    assert torch.equal(generate_semantic(stage.eval(), max_length=3, min_length=3, **given).tokens, tokens)


# ---- a kernel ----


def test_a_kernel(monkeypatch):
    """One in place of the towers' linear layers: put in at one place, it computes all of them."""
    mulan = tiny_mulan().eval()
    wavs, texts = torch.randn(2, 1024), torch.randint(1, 100, (2, 6))

    class Product(torch.autograd.Function):
        called = 0

        @staticmethod
        def forward(ctx, x, weight):
            Product.called += 1
            ctx.save_for_backward(x, weight)
            return einsum(x, weight, '... i, o i -> ... o')

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return einsum(grad, weight, '... o, o i -> ... i'), einsum(
                grad.flatten(0, -2), x.flatten(0, -2), 'n o, n i -> o i'
            )

    def gradients():
        mulan.zero_grad()
        loss = mulan(wavs, texts)
        loss.backward()
        return [loss.detach(), *(it.grad for it in mulan.parameters() if it.grad is not None)]

    with plain_kernels():
        plain = gradients()
    monkeypatch.setattr(layers, 'linear', Product.apply)
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert Product.called > 2 * mulan.audio.depth


def test_each_kernel_is_called_at_one_place():
    callers = {}
    for path in PACKAGE.rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        if path.parent.name == 'kernels' or 'musiclm_pytorch.kernels' not in text:
            continue
        for module, names in re.findall(r'from musiclm_pytorch\.kernels(\.\w+)? import (.+)', text):
            for name in re.findall(r'\b[a-z]\w+', names.partition(' as ')[0]):
                if module != '.processor' and name not in ('fast_kernels_allowed', 'plain_kernels'):
                    callers.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    assert {'attend', 'linear', 'mix', 'block_causal_attention', 'step_kernel'} <= callers.keys()
    assert {name: paths for name, paths in callers.items() if len(paths) > 1} == {}
