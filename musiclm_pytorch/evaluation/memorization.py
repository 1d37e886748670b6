"""Does the model repeat what it was trained on? The test of MusicLM (arXiv 2301.11325, section 4 and appendix).

The semantic stage goes on, by the likeliest tokens, from the first tokens of training clips under their own
conditioning. What it says is compared with what the clip goes on with: exactly, and nearly, since different tokens may
stand for much the same sound. Near are two continuations if their tokens can be turned into each other at a small cost,
by optimal transport between their histograms; how small, continuations of clips that do not belong together tell.

    clips = training_clips(musiclm, waves, sample_rate=16000)
    memorisation(musiclm, clips.tokens, clips.indices, prompt_lengths=(0, 50, 125))[50]['approximate']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from musiclm_pytorch.audiolm.convert import unwrapped
from musiclm_pytorch.audiolm.generate import generate_semantic
from musiclm_pytorch.audiolm.generation_args import Sampling
from musiclm_pytorch.checks import (
    check_audio,
    check_not_negative,
    check_positive,
    check_probability,
    check_sample_rate,
    typechecked,
)
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.evaluation.metric import Metric, MetricValue, mean_value, undefined
from musiclm_pytorch.mulan.model import evaluating
from musiclm_pytorch.musiclm import MusicLM


class TrainingClips(NamedTuple):
    """What the semantic stage was trained on.

    tokens: `(n, t)` int64 semantic tokens of each clip, cut to those of the shortest
    indices: `(n, q)` int64, MuLaN's codes of its audio
    """

    tokens: Tensor
    indices: Tensor


@typechecked
@torch.no_grad()
def training_clips(musiclm: MusicLM, waves: Sequence[Tensor], sample_rate: int) -> TrainingClips:
    """Tokens and conditioning of waves `(samples,)` at `sample_rate` Hz.

    MuLaN's context is 10 s, and of longer clips the mean over windows is taken (MusicLM, section 3.2).

    Raises ValueError for no waves, or one too short for a token.
    """
    if len(waves) == 0:
        raise ValueError('there are no clips to test with; pass at least one wave')
    check_sample_rate(sample_rate)
    tokens, indices = [], []
    quantizer, tokenizer = musiclm.mulan_embed_quantizer, musiclm.tokenizer
    with evaluating(musiclm):
        for i, wave in enumerate(waves):
            check_audio(wave, ndim=1, shape='(samples,)', name=f'waves[{i}]')
            wave = wave.to(musiclm.device)
            (ids,) = tokenizer.encode(resample(wave[None], sample_rate, tokenizer.sample_rate))
            if len(ids) == 0:
                raise ValueError(f'waves[{i}] has {len(wave)} samples, too few for a semantic token; leave it out')
            tokens.append(torch.unique_consecutive(ids) if musiclm.unique_consecutive else ids)
            indices.append(quantizer.indices(latents=musiclm.hear(wave[None], sample_rate)))
    shortest = min(map(len, tokens))
    return TrainingClips(torch.stack([it[:shortest] for it in tokens]).cpu(), torch.cat(indices).cpu())


@typechecked
def memorisation(
    musiclm: MusicLM,
    tokens: Tensor,
    indices: Tensor,
    prompt_lengths: Sequence[int],
    *,
    new_tokens: int | None = 125,
    distances: np.ndarray | None = None,
    false_positive_rate: float = 1e-4,
    negatives: int = 10_000,
    max_batch: int = 32,
    seed: int = 0,
) -> dict[int, dict[str, MetricValue]]:
    """How often training clips are said again, the longer the prompt taken from them.

    Args:
        musiclm: the model.
        tokens, indices: of clips that it was trained on, as `training_clips` gives them.
        prompt_lengths: tokens of each clip that are given, 0 too; MusicLM took 0 to 250, up to 10 s.
        new_tokens: tokens compared after the prompt (125 in MusicLM, 5 s); None for all that remain.
        distances, false_positive_rate, negatives, seed: as in `Memorization`; `distances` by default those of the
            tokenizer's centres.
        max_batch: clips continued at a time.

    Returns:
        for each prompt length what `Memorization` gives, with `prompt_length` in the details.

    Raises:
        ValueError: clips too short for a prompt and what follows, shapes that do not match.
    """
    check_positive(new_tokens=new_tokens, max_batch=max_batch)
    check_tokens(tokens, 'tokens')
    if indices.ndim != 2 or len(indices) != len(tokens):
        raise ValueError(
            f'indices must have shape ({len(tokens)}, q), the codes of each clip, got {tuple(indices.shape)}'
        )
    total = tokens.shape[1]
    for prompt in prompt_lengths:
        if prompt < 0 or prompt + (new_tokens or 1) > total:
            raise ValueError(
                f'a prompt of {prompt} and {new_tokens or "one or more"} new tokens do not fit into clips of {total}; '
                'give longer clips, shorter prompts, or new_tokens=None for all that remain'
            )
    distances = codebook_distances(unwrapped(musiclm.tokenizer)) if distances is None else distances
    found = {}
    for prompt in prompt_lengths:
        end = total if new_tokens is None else prompt + new_tokens
        metric = Memorization(distances, false_positive_rate, negatives, seed, dict(prompt_length=prompt))
        metric.update(continuations(musiclm, tokens, indices, prompt, end, max_batch=max_batch), tokens[:, prompt:end])
        found[prompt] = metric.compute()
    return found


def continuations(
    musiclm: MusicLM, tokens: Tensor, indices: Tensor, prompt: int, end: int, *, max_batch: int = 32
) -> Tensor:
    """What the semantic stage says at the places `prompt` to `end` of `(n, t)` tokens: the likeliest, unguided."""
    stage = musiclm.stages['semantic']
    window = round(musiclm.windows[0] * musiclm.semantic_rate)
    found = []
    with evaluating(musiclm):
        for rows, codes in zip(tokens.split(max_batch), indices.split(max_batch)):
            codes = codes.to(musiclm.device)
            said = generate_semantic(
                stage,
                max_length=end,
                min_length=end,
                text_embeds=musiclm.mulan_embed_quantizer.embed(codes, 'semantic') if stage.has_condition else None,
                prime=rows[:, :prompt].to(musiclm.device),
                sampling=Sampling(temperature=0),
                window=window if end > window else None,
                overlap=window // 2,
            )
            found.append(said.tokens[:, prompt:].cpu())
    return torch.cat(found)


class Memorization(Metric):
    """How many generated sequences are those of training, exactly and nearly.

    Args:
        distances: `(c, c)` between tokens, such as `codebook_distances` gives.
        false_positive_rate: the share of negatives, generated sequences beside those of other training clips, that may
            pass for near. With fewer negatives than 1 / `false_positive_rate`, none may. MusicLM calibrated its
            threshold on such pairs too.
        negatives: compared at most, drawn from all ordered pairs of clips whose training sequences differ.
        seed: of that draw, and of the bootstrap.
        details: facts to keep with each value.

    Computes `exact`, the share of sequences that are equal; `approximate`, the share at a cost below the threshold, the
    equal ones among them, with the `threshold`, the number of `negatives` and of `false_positives` among them, and the
    median costs in the details; both with Wilson intervals, for these shares are near 0. `same_token`, the mean share
    of places with the same token, with its bootstrap interval.
    """

    group = 'memorization'

    @typechecked
    def __init__(
        self,
        distances: np.ndarray,
        false_positive_rate: float = 1e-4,
        negatives: int = 10_000,
        seed: int = 0,
        details: Mapping[str, Any] | None = None,
    ):
        check_positive(negatives=negatives)
        check_probability(false_positive_rate=false_positive_rate)
        check_not_negative(seed=seed)
        self.distances, self.false_positive_rate, self.negatives = distances, false_positive_rate, negatives
        self.seed, self.details = seed, dict(details or {})
        super().__init__()

    def initial_state(self) -> dict[str, list[Tensor]]:
        return dict(generated=[], training=[])

    @typechecked
    def update(self, generated: Tensor, training: Tensor) -> None:
        """Add `(n, t)` int64 tokens; row i belongs to row i."""
        check_tokens(generated, 'generated', like=training)
        self.state['generated'] += generated.cpu()
        self.state['training'] += training.cpu()

    def compute(self) -> dict[str, MetricValue]:
        if not self.state['generated']:
            raise ValueError('there are no sequences to compare; update comes first')
        generated, training = (torch.stack(self.state[name]) for name in ('generated', 'training'))
        same = generated == training
        return dict(
            exact=share_value(same.all(dim=1).numpy(), **self.details),
            approximate=self._approximate(generated, training),
            same_token=mean_value(same.double().mean(dim=1).numpy(), seed=self.seed, **self.details),
        )

    def _approximate(self, generated: Tensor, training: Tensor) -> MetricValue:
        costs = approximate_match_costs(generated, training, self.distances)
        own, other = negative_pairs(training, self.negatives, self.seed)
        if len(own) == 0:
            reason = 'without a second, different clip there are no negatives to set a threshold by'
            return undefined(reason, **self.details)
        strangers = approximate_match_costs(generated[own], training[other], self.distances)
        # as many as this may lie below; those as dear as the threshold do not
        threshold = float(np.sort(strangers)[int(self.false_positive_rate * len(strangers))])
        details = self.details | dict(
            threshold=threshold,
            negatives=len(strangers),
            false_positives=int((strangers < threshold).sum()),
            median_cost=float(np.median(costs)),
            median_cost_of_negatives=float(np.median(strangers)),
        )
        if threshold == 0:
            return undefined('clips that do not belong together cost nothing, as copies do', **details)
        return share_value(costs < threshold, **details)


def negative_pairs(training: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Places (i, j) of rows that differ: of all pairs, or of `count` of them at random."""
    n = len(training)
    total = n * (n - 1)
    pairs = np.random.default_rng(seed).choice(total, count, replace=False) if total > count else np.arange(total)
    own, other = np.divmod(pairs, max(1, n - 1))
    other += other >= own  # no row beside itself
    own, other = torch.from_numpy(own), torch.from_numpy(other)
    differ = (training[own] != training[other]).any(dim=1)
    return own[differ], other[differ]


@typechecked
def approximate_match_costs(first: Tensor, second: Tensor, distances: np.ndarray) -> np.ndarray:
    """The optimal-transport cost between the histograms of tokens of each row, `(n,)`, the mean distance moved a token.

    Exact: two sequences of one length are histograms of as many equal parts, and some best transport moves each part
    whole, so it is an assignment of tokens to tokens. (MusicLM approximates it by Sinkhorn's algorithm.)

    `first` and `second` are `(n, t)` int64 tokens, and `distances` `(c, c)` between tokens are at least 0.
    """
    from scipy.optimize import linear_sum_assignment

    check_tokens(first, 'first', like=second)
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1] or not (distances >= 0).all():
        raise ValueError(f'distances must have shape (tokens, tokens) and be at least 0, got shape {distances.shape}')
    highest = int(max(first.max(), second.max()))
    if highest >= len(distances):
        raise ValueError(f'token {highest} has no row in distances of shape {distances.shape}')
    costs = []
    for own, other in zip(first.cpu().numpy(), second.cpu().numpy()):
        table = distances[np.ix_(own, other)]
        costs.append(table[linear_sum_assignment(table)].mean())
    return np.array(costs)


@typechecked
def codebook_distances(tokenizer: nn.Module) -> np.ndarray:
    """Euclidean distances between the k-means centres of a semantic tokenizer, `(c, c)` float64, as in MusicLM.

    Raises TypeError for a tokenizer without centres.
    """
    from scipy.spatial.distance import cdist

    centers = getattr(tokenizer, 'cluster_centers', None)
    centers = getattr(getattr(tokenizer, 'kmeans', None), 'centers', None) if centers is None else centers
    if not isinstance(centers, Tensor):
        raise TypeError(f'a {type(tokenizer).__name__} has no k-means centres; pass distances between its tokens')
    centers = centers.detach().cpu().double().numpy()
    return cdist(centers, centers)


def share_value(hits: np.ndarray, **details: Any) -> MetricValue:
    """The share of hits with its 95 % Wilson interval. The bootstrap's would be empty where none or all hit."""
    from scipy.stats import binomtest

    low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method='wilson')
    return MetricValue(float(hits.mean()), max(0.0, low), min(1.0, high), len(hits), details=details)


def check_tokens(tokens: Tensor, name: str, like: Tensor | None = None) -> None:
    """Raise TypeError or ValueError unless it is `(n, t)` int64 of tokens from 0 on, of the shape of `like`."""
    for it, called in ((tokens, name), (like, f'what {name} is compared with')):
        if it is None:
            continue
        if it.dtype != torch.long:
            raise TypeError(f'{called} must be int64 tokens, got {it.dtype}')
        if it.ndim != 2 or it.numel() == 0:
            raise ValueError(f'{called} must have shape (clips, tokens), neither of them 0, got {tuple(it.shape)}')
        if int(it.min()) < 0:
            raise ValueError(f'{called} holds the token {int(it.min())}; cut all clips to one length without padding')
    if like is not None and tokens.shape != like.shape:
        raise ValueError(f'{name} has shape {tuple(tokens.shape)}, but is compared with {tuple(like.shape)}')
