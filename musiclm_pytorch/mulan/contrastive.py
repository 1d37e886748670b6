"""Contrastive losses between two batches of latents. They know nothing of models.

Each is exact across processes: with a process group, the loss is that of the joined batch, and the mean of the
gradients over ranks (what DDP computes) is the gradient of that loss. A rank computes the rows of its own samples
alone, B × (B · world) logits. Every rank has to call the loss, with as many rows as it has.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from musiclm_pytorch.checks import check_positive
from musiclm_pytorch.collectives import gather_batch, gather_sizes, mean_over_ranks, rank, world_size
from musiclm_pytorch.mulan.layers import LayerNorm, l2norm, masked_mean

# CLIP's bound (arXiv 2103.00020, section 2.5); beyond it the logits of cosines make training unstable
MAX_TEMPERATURE = 100.0


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
