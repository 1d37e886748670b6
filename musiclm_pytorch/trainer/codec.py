"""Training a codec: audiolm-pytorch's SoundStream against its discriminators, or our own by its spectra."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import Unpack

from musiclm_pytorch.audiolm.convert import SoundStream
from musiclm_pytorch.audiolm.saving import describe
from musiclm_pytorch.audiolm.spectral_codec import SpectralCodec
from musiclm_pytorch.checks import check_not_negative, check_positive, typechecked
from musiclm_pytorch.codecs.discriminator import SpectrogramDiscriminator
from musiclm_pytorch.codecs.distance import mel_distance
from musiclm_pytorch.codecs.neural import NeuralCodec
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.data.collate import read_item
from musiclm_pytorch.data.datasets import split_off
from musiclm_pytorch.data.rates import agreed_rate
from musiclm_pytorch.mulan.model import evaluating
from musiclm_pytorch.trainer.callbacks import Callback
from musiclm_pytorch.trainer.config import TrainingConfig, TrainingKeywords
from musiclm_pytorch.trainer.resumable_loader import default_batch_size
from musiclm_pytorch.trainer.trainer import Trainer

FITTED_AT_ONCE = 16  # crops whose spectra are computed together, where codebooks begin
PARTS = ('reconstruction', 'spectral', 'adversarial', 'feature', 'commitment')


@dataclass(eq=False)
class WaveCrops(Dataset):
    """Crops of the waves of a data set, of one length, at another rate; shorter waves end in silence.

    Args:
        dataset: items by index as `collate_pairs` takes them.
        sample_rate: of its waves, in Hz.
        to_rate: of the crops.
        samples: of a crop, at `to_rate`.
        training: draw crops at random; otherwise the middle.
        max_gain_db: dB by which a crop is made louder or softer at random, at most.
    """

    dataset: Dataset
    _: KW_ONLY
    sample_rate: int
    to_rate: int
    samples: int
    training: bool
    max_gain_db: float = 0.0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> Tensor | None:
        if (item := read_item(self.dataset[index], f'item {index}')) is None:
            return None
        wave, _ = item
        needed = -(-self.samples * self.sample_rate // self.to_rate)
        free = max(0, len(wave) - needed)
        start = random.randint(0, free) if self.training else free // 2
        crop = resample(wave[start : start + needed], self.sample_rate, self.to_rate)[: self.samples]
        if self.max_gain_db:
            crop = crop * 10 ** (random.uniform(-self.max_gain_db, self.max_gain_db) / 20)
        return F.pad(crop, (0, self.samples - len(crop)))


def collate_waves(items: list[Tensor | None]) -> Tensor | None:
    """`(b, samples)` of what could be read."""
    waves = [item for item in items if item is not None]
    return torch.stack(waves) if waves else None


class _CodecStep(nn.Module):
    """What runs under data-parallel training: the losses of a codec and of its discriminators, if any, on one batch."""

    def __init__(self, codec: SoundStream | NeuralCodec, weights: dict[str, float] | None = None):
        super().__init__()
        self.codec = codec
        self.weights = weights  # of a NeuralCodec's losses by a discriminator
        self.discriminator = None if weights is None else SpectrogramDiscriminator()

    def forward(self, waves: Tensor, grad_penalty: bool) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(self.codec, NeuralCodec):
            loss, parts = self.codec.losses(waves, self.discriminator)
            total = loss + sum(weight * parts[name] for name, weight in (self.weights or {}).items())
            return total, {name: value.detach().float() for name, value in dict(loss=loss, **parts).items()}
        discriminators = discriminators_of(self.codec)
        # each side's loss trains its own side only
        discriminators.requires_grad_(False)
        loss, parts = self.codec(waves, return_loss_breakdown=True)
        discriminators.requires_grad_(True)
        # the codebooks have moved towards this batch already
        with evaluating(self.codec.rq):
            found = self.codec(
                waves, return_discr_loss=True, return_discr_losses_separately=True, apply_grad_penalty=grad_penalty
            )
        discriminator_loss = sum(value for _, value in found)
        metrics = dict(loss=loss, **dict(zip(PARTS, parts)), discriminator_loss=discriminator_loss)
        return loss + discriminator_loss, {name: value.detach().float() for name, value in metrics.items()}


class CodecTrainer(Trainer):
    """Trains a SoundStream or a NeuralCodec.

    The losses of a SoundStream are those of its own forward pass (arXiv 2107.03312): reconstruction, adversarial and
    feature losses, and those of the discriminators. Codec and discriminators make their step at the same time, on the
    same batch, each with its own clipping. The losses of a NeuralCodec are those that it tells, and with
    `adversarial_loss_weight` those by a `SpectrogramDiscriminator`, which is trained along and not kept with the model.
    Validation tells `mel_distance` in dB between held-out waves and what the codec makes of them. That calls a blur
    better than what a discriminator makes of it, so with one the newest NeuralCodec counts as the best.

    Results, beside those of `Trainer`: the folders `best` and `last`, which `audiolm.saving.load_module` reads.

    Args:
        codec: it is trained in place.
        dataset: waves, or pairs with a wave, by index.
        sample_rate: of its waves in Hz; by default the data set's `sample_rate`. They are resampled.
        seconds: length of the crops.
        valid_dataset: held-out waves, of a rate of their own if they tell one; by default `valid_frac` of the data set.
        max_gain_db: each crop is made louder or softer by up to this much, at random.
        adversarial_loss_weight: of a NeuralCodec, such as 0.1; by default it learns without a discriminator.
        feature_loss_weight: beside it, of the distance between what the discriminator's layers find.
        discriminator_max_grad_norm: as `max_grad_norm`, of the other side.
        grad_penalty_every: steps between gradient penalties of the discriminators; None for none.
        callbacks, config, further keywords: as of `Trainer`.
    """

    DEFAULTS = Trainer.DEFAULTS | dict(lr=2e-4, max_valid_items=64)
    saves_last = True

    @typechecked
    def __init__(
        self,
        codec: SoundStream,
        dataset: Any,
        *,
        sample_rate: int | None = None,
        seconds: float = 1.0,
        valid_dataset: Any = None,
        max_gain_db: float = 0.0,
        adversarial_loss_weight: float | None = None,
        feature_loss_weight: float = 1.0,
        discriminator_max_grad_norm: float | None = None,
        grad_penalty_every: int | None = 4,
        callbacks: Sequence[Callback] = (),
        config: TrainingConfig | None = None,
        **keywords: Unpack[TrainingKeywords],
    ):
        if isinstance(codec, SpectralCodec):
            raise TypeError('a SpectralCodec is not trained step by step; call its method fit')
        check_positive(
            seconds=seconds,
            adversarial_loss_weight=adversarial_loss_weight,
            discriminator_max_grad_norm=discriminator_max_grad_norm,
            grad_penalty_every=grad_penalty_every,
        )
        check_not_negative(max_gain_db=max_gain_db, feature_loss_weight=feature_loss_weight)
        weights = None
        if adversarial_loss_weight is not None:
            if not isinstance(codec, NeuralCodec):
                raise ValueError(
                    'adversarial_loss_weight is for a NeuralCodec; a SoundStream is built with one of its own'
                )
            weights = dict(adversarial=adversarial_loss_weight, feature=feature_loss_weight, discriminator_loss=1.0)
        config = self.complete(config, keywords)
        rate = agreed_rate(dataset, sample_rate)
        multiple = codec.seq_len_multiple_of
        samples = round(seconds * codec.target_sample_hz) // multiple * multiple
        if samples == 0:
            raise ValueError(f'{seconds} s are less than one frame of the codec, {multiple / codec.target_sample_hz} s')
        if valid_dataset is None and config.valid_frac > 0:
            self.held_out_by = dict(valid_frac=config.valid_frac, random_split_seed=config.random_split_seed)
            if len(dataset) > 1:
                dataset, valid_dataset = split_off(dataset, **self.held_out_by, least=1)
        crops = dict(to_rate=codec.target_sample_hz, samples=samples)
        self.codec = codec
        if not isinstance(codec, NeuralCodec):
            keep_rare_codes(codec, frames=(config.batch_size or default_batch_size(dataset)) * samples // multiple)
        if valid_dataset is not None:
            valid_rate = agreed_rate(valid_dataset, None, default=rate)
            self.valid_dataset = WaveCrops(valid_dataset, sample_rate=valid_rate, training=False, **crops)
        self.crops = WaveCrops(dataset, sample_rate=rate, training=True, max_gain_db=max_gain_db, **crops)
        self.grad_penalty_every = grad_penalty_every
        step = _CodecStep(codec, weights)
        self.discriminator = step.discriminator
        super().__init__(
            codec if weights is None else step,
            step,
            self.crops,
            collate_fn=collate_waves,
            callbacks=callbacks,
            config=config,
        )
        # both sides are clipped here, each for itself
        self.clipping, self.max_grad_norm = (config.max_grad_norm, discriminator_max_grad_norm), None

    def train(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        if isinstance(self.codec, NeuralCodec) and not self.codec.is_fitted:
            order = torch.randperm(len(self.crops), generator=torch.Generator().manual_seed(self.seed)).tolist()
            self.codec.fit(self.batches_of(self.crops, order, FITTED_AT_ONCE), seed=self.seed)
        return super().train(*arguments, **keywords)

    def compute_gradients(self, batches: list[Tensor]) -> dict[str, float]:
        penalty = self.grad_penalty_every is not None and self.step % self.grad_penalty_every == 0
        metrics = self.accumulate(batches, lambda waves: self.step_module(waves, penalty), len)
        if isinstance(self.codec, NeuralCodec):
            sides = [it.parameters() for it in (self.codec, self.discriminator) if it is not None]
        else:
            sides = [self.codec.non_discr_parameters(), list(discriminators_of(self.codec).parameters())]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        for name, parameters, limit in zip(('grad_norm', 'discriminator_grad_norm'), sides, self.clipping):
            if limit is not None:
                metrics[name] = float(nn.utils.clip_grad_norm_(parameters, limit))
        return metrics

    def validate(self) -> dict[str, Any] | None:
        def measure(model: nn.Module, waves: Tensor) -> tuple[Tensor, int]:
            made = model(waves, return_recons_only=True).reshape(waves.shape)
            return mel_distance(waves, made, model.target_sample_hz).sum(), len(waves)

        distance = self.mean_over_held_out(measure)
        if distance is None:
            return None
        return dict(loss=distance, score=-distance if self.discriminator is None else float(self.step))

    @property
    def evaluated_model(self) -> nn.Module:
        model = super().evaluated_model
        return model.codec if isinstance(model, _CodecStep) else model

    def model_config(self) -> dict[str, Any]:
        return dict(keywords=describe(self.codec)['keywords'])


def discriminators_of(codec: SoundStream) -> nn.ModuleList:
    """Both kinds, as one module."""
    return nn.ModuleList([codec.discriminators, codec.stft_discriminator])


def keep_rare_codes(codec: SoundStream, frames: int) -> None:
    """Let no code of a codebook count as dead for want of frames in a batch.

    A code that fewer than two frames a batch come to, in the moving average, is replaced by a frame of the batch. Where
    a batch has fewer frames than twice the codes, that would be all of them, over and over.
    """
    for module in codec.rq.modules():
        if hasattr(module, 'threshold_ema_dead_code'):
            module.threshold_ema_dead_code = min(module.threshold_ema_dead_code, 0.1 * frames / codec.codebook_size)
