"""Training a melody encoder on pairs of the same melody."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Unpack

from musiclm_pytorch.audiolm.saving import describe
from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.data.rates import agreed_rate
from musiclm_pytorch.mulan.melody import MelodyEncoder, semi_hard_triplet_loss
from musiclm_pytorch.mulan.model import evaluating
from musiclm_pytorch.trainer.callbacks import Callback
from musiclm_pytorch.trainer.config import TrainingConfig, TrainingKeywords
from musiclm_pytorch.trainer.retrieval import retrieval_metrics
from musiclm_pytorch.trainer.trainer import Trainer


class _MelodyStep(nn.Module):
    """What runs under data-parallel training: the loss of a batch."""

    def __init__(self, encoder: MelodyEncoder, margin: float):
        super().__init__()
        self.encoder = encoder
        self.margin = margin

    def forward(self, waves: Tensor) -> Tensor:
        """Waves `(2, b, samples)`."""
        latents = self.encoder.embed(waves.flatten(0, 1))
        return semi_hard_triplet_loss(*latents.chunk(2), margin=self.margin)


class MelodyTrainer(Trainer):
    """Trains a `MelodyEncoder` with semi-hard triplets of each batch, as MusicLM's (arXiv 2301.11325, section 3.4).

    Validation tells `recall_at_1`: how often the nearest of the held-out others is the same melody, a mean over both
    directions. Results, beside those of `Trainer`: the folders `best` and `last`, which `audiolm.saving.load_module`
    reads.

    Args:
        encoder: it is trained in place.
        pairs: two waves `(samples,)` of a melody by index, such as `MelodyPairs`. The windows of the encoder that they
            hold, one behind the other, are pairs of their own: where there are several, both waves have to keep time.
        sample_rate: of the waves in Hz; by default the data set's `sample_rate`.
        margin: of the triplet loss.
        valid_pairs: held-out pairs; by default none are.
        callbacks, config, further keywords: as of `Trainer`. `batch_size` counts pairs; negatives come from the same
            batch, so that more of them teach more.
    """

    DEFAULTS = Trainer.DEFAULTS | dict(batch_size=64, lr=1e-3, max_valid_items=256)
    saves_last = True
    least_held_out = 2

    @typechecked
    def __init__(
        self,
        encoder: MelodyEncoder,
        pairs: Any,
        *,
        sample_rate: int | None = None,
        margin: float = 0.2,
        valid_pairs: Any = None,
        callbacks: Sequence[Callback] = (),
        config: TrainingConfig | None = None,
        **keywords: Unpack[TrainingKeywords],
    ):
        config = self.complete(config, keywords)
        check_positive(margin=margin)
        if config.batch_size < 2:
            raise ValueError(
                f'batch_size must be 2 at least, for negatives come from the batch, got {config.batch_size}'
            )
        rate = agreed_rate(pairs, sample_rate)
        samples = round(encoder.seconds * rate)
        collate = partial(collate_melodies, samples=samples, rate=rate, to_rate=encoder.sample_rate)
        self.valid_dataset = valid_pairs
        super().__init__(
            encoder,
            _MelodyStep(encoder, margin),
            pairs,
            collate_fn=collate,
            callbacks=callbacks,
            config=config,
        )

    def compute_gradients(self, batches: list[Tensor]) -> dict[str, float]:
        def compute(waves: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = self.step_module(waves)
            return loss, dict(loss=loss.detach().float())

        return self.accumulate(batches, compute, lambda waves: waves.shape[1])

    @torch.no_grad()
    def validate(self) -> dict[str, Any] | None:
        if not self.held_out:
            return None
        encoder, batches = self.evaluated_model, self.held_out_batches(range(self.held_out))
        with evaluating(encoder):
            latents = [encoder.embed(waves.flatten(0, 1)).chunk(2) for waves in batches]
        anchors, positives = (torch.cat(side) for side in zip(*latents))
        found = retrieval_metrics(anchors @ positives.T)
        recall = (found['audio_to_text_recall_at_1'] + found['text_to_audio_recall_at_1']) / 2
        return dict(recall_at_1=recall, score=recall)

    def model_config(self) -> dict[str, Any]:
        return dict(keywords=describe(self.model)['keywords'])


def collate_melodies(items: list[tuple[Tensor, Tensor]], *, samples: int, rate: int, to_rate: int) -> Tensor:
    """The windows of `samples` that the waves hold, `m` in each, at another rate, `(2, b · m, n)`."""
    waves = torch.stack([torch.stack(side) for side in zip(*items)])
    waves = F.pad(waves, (0, max(0, samples - waves.shape[-1])))
    return resample(rearrange(waves.unfold(-1, samples, samples), 's b m n -> s (b m) n'), rate, to_rate)
