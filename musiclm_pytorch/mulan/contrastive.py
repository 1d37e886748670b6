"""Contrastive losses between two batches of latents, and a second task for the audio tower, to tell which words the
text of a clip has. They know nothing of models.

Each is exact across processes: with a process group, the loss is that of the joined batch, and the mean of the
gradients over ranks (what DDP computes) is the gradient of that loss. A rank computes the rows of its own samples
alone, B × (B · world) logits. Every rank has to call the loss, with as many rows as it has.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from musiclm_pytorch.checks import check_positive
from musiclm_pytorch.collectives import gather_batch, gather_sizes, mean_over_ranks, rank, world_size
from musiclm_pytorch.mulan.layers import LayerNorm, l2norm, masked_mean

# CLIP's bound (arXiv 2103.00020, section 2.5); beyond it the logits of cosines make training unstable
MAX_TEMPERATURE = 100.0
# Of the words' embeddings. Logits begin with a deviation of about a half, so that each word pulls at the latents from
# the first step on; from zeros, one that nothing tells of yet would have to be found by chance.
INIT_STD = 0.05


class _BoundedExp(torch.autograd.Function):
    """exp(min(x, ln bound)), whose gradient past the bound vanishes only if it would push x further out.

    A plain clamp has no gradient past the bound, so a parameter that once stepped over it could never return.
    """

    @staticmethod
    def forward(ctx, x, bound):
        out = x.exp().clamp(max=bound)
        ctx.save_for_backward(out)
        ctx.bound = bound
        return out

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        pushes_out = (out >= ctx.bound) & (grad < 0)
        return torch.where(pushes_out, torch.zeros_like(grad), grad * out), None


class ContrastiveLoss(nn.Module):
    """What contrastive losses share: one temperature a layer, checked inputs, all samples of all ranks.

    A loss of your own is a subclass with `loss_of_own_rows`; `mulan.contrast = …` takes it.
    """

    def __init__(self, *, layers: int = 1, init_temp: float = 10):
        super().__init__()
        check_positive(layers=layers, init_temp=init_temp)
        self.temperatures = nn.Parameter(torch.full((layers, 1, 1), math.log(init_temp)))

    @property
    def device(self) -> torch.device:
        return self.temperatures.device

    def temperature(self) -> Tensor:
        """`(l, 1, 1)`, the factor of the cosine similarities, at most 100."""
        return _BoundedExp.apply(self.temperatures.float(), MAX_TEMPERATURE)

    def forward(self, audio_latents: Tensor, text_latents: Tensor) -> Tensor:
        """Loss of a batch of pairs, summed over layers.

        Args:
            audio_latents: `(b, d)` or `(l, b, d)`, L2-normalised.
            text_latents: of the same shape; row i belongs to row i.

        Returns:
            scalar float32, the same on every rank.

        Raises:
            ValueError: shapes that do not match, or too few samples for a contrast.
        """
        if audio_latents.shape != text_latents.shape:
            raise ValueError(
                'audio and text latents must come in pairs of one shape, got '
                f'{tuple(audio_latents.shape)} and {tuple(text_latents.shape)}'
            )
        layers = len(self.temperatures)
        if audio_latents.ndim not in (2, 3) or (audio_latents.shape[0] if audio_latents.ndim == 3 else 1) != layers:
            raise ValueError(
                f'latents must have shape (batch, dim){"" if layers == 1 else f" for each of {layers} layers"}, '
                f'{"or " if layers == 1 else ""}({layers}, batch, dim), got {tuple(audio_latents.shape)}'
            )
        # exponentials of logits up to 100 need float32, whatever autocast would choose
        with torch.autocast(audio_latents.device.type, enabled=False):
            audio, text = (t.float() if t.ndim == 3 else t.float()[None] for t in (audio_latents, text_latents))
            sizes = gather_sizes(audio.shape[1], audio.device)
            loss = self.loss_of_own_rows(audio, text, sizes) / sum(sizes)
            return mean_over_ranks(loss * world_size())

    def loss_of_own_rows(self, audio: Tensor, text: Tensor, sizes: list[int]) -> Tensor:
        """The sum over the pairs of this rank, a scalar.

        Args:
            audio, text: `(l, b, d)` float32, of this rank; `gather_batch(text, sizes)` has those of all.
            sizes: pairs of each rank; `own_pairs` tells which of all are this rank's.
        """
        raise NotImplementedError


def own_pairs(sizes: list[int], device: torch.device) -> Tensor:
    """`(b,)`: the column, among all samples, that holds the partner of each own row."""
    return sum(sizes[: rank()]) + torch.arange(sizes[rank()], device=device)


class SoftmaxContrastiveLearning(ContrastiveLoss):
    """InfoNCE in both directions, optionally decoupled: without the positive pair in the denominator.

    Sources: CLIP, arXiv 2103.00020; decoupled contrastive learning, arXiv 2110.06848.

    Args:
        layers: number of independent contrasts, each with a temperature of its own.
        decoupled_contrastive_learning: leave the positive pair out of the denominator.
        init_temp: initial factor of the cosine similarities.
    """

    def __init__(self, *, layers: int = 1, decoupled_contrastive_learning: bool = False, init_temp: float = 10):
        super().__init__(layers=layers, init_temp=init_temp)
        self.decoupled_contrastive_learning = decoupled_contrastive_learning

    def loss_of_own_rows(self, audio: Tensor, text: Tensor, sizes: list[int]) -> Tensor:
        if sum(sizes) < 2:
            raise ValueError(
                'a softmax contrastive loss needs a batch of at least 2 pairs, got 1: there is nothing to contrast '
                'with; raise the batch size (drop_last=True in the DataLoader) or use sigmoid_contrastive_loss=True'
            )
        temperature = self.temperature()
        audio_to_text = einsum(audio, gather_batch(text, sizes), 'l i d, l j d -> l i j') * temperature
        if len(sizes) == 1:
            text_to_audio = rearrange(audio_to_text, 'l i j -> l j i')
        else:
            text_to_audio = einsum(text, gather_batch(audio, sizes), 'l i d, l j d -> l i j') * temperature

        pairs = own_pairs(sizes, audio.device)
        own = torch.arange(len(pairs), device=audio.device)
        positives = audio_to_text[:, own, pairs]

        if self.decoupled_contrastive_learning:
            is_pair = F.one_hot(pairs, sum(sizes)).bool()
            audio_to_text, text_to_audio = (
                logits.masked_fill(is_pair, -torch.inf) for logits in (audio_to_text, text_to_audio)
            )

        denominators = 0.5 * (audio_to_text.logsumexp(dim=-1) + text_to_audio.logsumexp(dim=-1))
        return (denominators - positives).sum()


class SigmoidContrastiveLearning(ContrastiveLoss):
    """SigLIP: every pair of the batch is a binary decision of its own (arXiv 2303.15343).

    Args:
        layers: number of independent contrasts, each with a temperature and a bias of its own.
        init_temp: initial factor of the cosine similarities.
        init_bias: initial value added to the logits; negative, because most pairs do not match.
    """

    def __init__(self, *, layers: int = 1, init_temp: float = 10, init_bias: float = -10):
        super().__init__(layers=layers, init_temp=init_temp)
        self.bias = nn.Parameter(torch.full((layers, 1, 1), float(init_bias)))

    def loss_of_own_rows(self, audio: Tensor, text: Tensor, sizes: list[int]) -> Tensor:
        logits = (
            einsum(audio, gather_batch(text, sizes), 'l i d, l j d -> l i j') * self.temperature() + self.bias.float()
        )
        is_pair = F.one_hot(own_pairs(sizes, audio.device), sum(sizes)).bool()
        return -F.logsigmoid(torch.where(is_pair, logits, -logits)).sum()


class MultiLayerContrastiveLoss(nn.Module):
    """A contrast between the hidden states of several layers of both towers (ViCHA, arXiv 2208.13628).

    Args:
        audio_dim, text_dim: widths of the towers.
        dim_latent: width of the joint space of each layer.
        layers: number of layers compared.
        decoupled_contrastive_learning, sigmoid_contrastive_loss: the loss, as in `MuLaN`.
    """

    def __init__(
        self,
        *,
        audio_dim: int,
        text_dim: int,
        dim_latent: int,
        layers: int,
        decoupled_contrastive_learning: bool = False,
        sigmoid_contrastive_loss: bool = False,
    ):
        super().__init__()
        check_positive(audio_dim=audio_dim, text_dim=text_dim, dim_latent=dim_latent, layers=layers)
        self.layers = layers

        self.audio_norm = LayerNorm(audio_dim, scale=False)
        self.audio_gamma = nn.Parameter(torch.ones(layers, 1, audio_dim))
        self.audio_latent_weight = nn.Parameter(torch.randn(layers, audio_dim, dim_latent))
        self.audio_latent_bias = nn.Parameter(torch.randn(layers, 1, dim_latent))

        self.text_norm = LayerNorm(text_dim, scale=False)
        self.text_gamma = nn.Parameter(torch.ones(layers, 1, text_dim))
        self.text_latent_weight = nn.Parameter(torch.randn(layers, text_dim, dim_latent))
        self.text_latent_bias = nn.Parameter(torch.randn(layers, 1, dim_latent))

        if sigmoid_contrastive_loss:
            self.contrast = SigmoidContrastiveLearning(layers=layers)
        else:
            self.contrast = SoftmaxContrastiveLearning(
                layers=layers, decoupled_contrastive_learning=decoupled_contrastive_learning
            )

    def forward(self, *, audio_layers: Tensor, text_layers: Tensor, audio_mask: Tensor | None = None) -> Tensor:
        """Loss over the layers given.

        Args:
            audio_layers: `(l, b, n, d)` hidden states of the audio tower, averaged over tokens.
            text_layers: `(l, b, m, e)` hidden states of the text tower, token 0 being the CLS token.
            audio_mask: `(b, n)` bool, true where an audio token is real; None when all are.

        Returns:
            scalar, summed over layers.
        """
        return self.contrast(*self.latents(audio_layers, text_layers, audio_mask))

    def latents(
        self, audio_layers: Tensor, text_layers: Tensor, audio_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What is contrasted: the latents of each layer, two of `(l, b, dim_latent)`, of length 1."""
        audio_embeds = self.audio_norm(masked_mean(audio_layers, audio_mask)) * self.audio_gamma
        audio_latents = einsum(audio_embeds, self.audio_latent_weight, 'l b d, l d e -> l b e')
        audio_latents = l2norm((audio_latents + self.audio_latent_bias).float())

        text_embeds = self.text_norm(text_layers[:, :, 0]) * self.text_gamma
        text_latents = einsum(text_embeds, self.text_latent_weight, 'l b d, l d e -> l b e')
        text_latents = l2norm((text_latents + self.text_latent_bias).float())

        return audio_latents, text_latents


class WordPrediction(nn.Module):
    """The words of a text as labels of its audio, without a text tower (arXiv 2411.03313).

    A contrast tells a clip from others by whatever is easiest to hear. Words that say something harder, such as a
    tempo, teach it little as long as the batch hardly holds two clips that differ in that alone. Here each word teaches
    by itself. The vocabulary are the tokens of the batch: whether a text has each of them is told from the audio's
    latent, by a linear classifier, beside how many texts of the batch have it.

    Args:
        dim_latent: width of the latents.
        num_tokens: size of the vocabulary.
        pad_id: token that is no word.
    """

    def __init__(self, dim_latent: int, num_tokens: int, pad_id: int = 0):
        super().__init__()
        self.num_tokens, self.pad_id = num_tokens, pad_id
        self.scale = dim_latent**0.5  # latents have length 1: their entries come to order 1
        self.token_emb = nn.Embedding(num_tokens, dim_latent)
        nn.init.normal_(self.token_emb.weight, std=INIT_STD)

    def forward(self, audio_latents: Tensor, tokens: Tensor) -> Tensor:
        """Binary cross-entropy, summed over the vocabulary and averaged over the clips of all ranks.

        Args:
            audio_latents: `(b, d)`, of length 1.
            tokens: `(b, n)` int64; row i is the text of clip i.

        Returns:
            scalar float32, the same on every rank, in nats a clip: less than what the words cost by their frequency in
            the batch alone, so about 0 for a model that knows nothing, and below 0 for one that hears something.
        """
        has = torch.zeros(len(tokens), self.num_tokens, dtype=torch.bool, device=tokens.device)
        has.scatter_(1, tokens, True)
        has[:, self.pad_id] = False
        counts = torch.cat([has.sum(dim=0), torch.tensor([len(tokens)], device=tokens.device)])
        if world_size() > 1:
            dist.all_reduce(counts)
        counts, clips = counts[:-1], int(counts[-1])
        words = counts.nonzero()[:, 0]
        targets = has[:, words].float()
        with torch.autocast(audio_latents.device.type, enabled=False):
            # a word that all texts have, or none but one, is never certain
            usual = torch.logit((counts[words] + 0.5) / (clips + 1))
            logits = usual + self.scale * audio_latents.float() @ self.token_emb(words).float().T
            loss = F.binary_cross_entropy_with_logits(logits, targets, reduction='sum')
            known = F.binary_cross_entropy_with_logits(usual.expand_as(targets), targets, reduction='sum')
            return mean_over_ranks((loss - known) / clips * world_size())
