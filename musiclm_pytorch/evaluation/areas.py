"""How right a tagger is about clips whose tags are known: areas under the ROC and the precision-recall curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.evaluation.embedders import MuLaNEmbedder
from musiclm_pytorch.evaluation.embedding import embed_clips
from musiclm_pytorch.evaluation.figures import Figure, interval, undefined
from musiclm_pytorch.evaluation.tagging import ZeroShotTagger, check_tags
from musiclm_pytorch.mulan.layers import l2norm

RESAMPLES = 200  # of clips, for the intervals of areas
ENTRIES_AT_ONCE = 1_000_000  # resampled clips held at a time


@typechecked
def tagging_figures(
    scores: Tensor | np.ndarray, truth: Tensor | np.ndarray, tags: Sequence[str], *, seed: int = 0
) -> dict[str, Figure | dict[str, Figure]]:
    """How well scores find the clips of each tag: areas under the ROC and the precision-recall curve (scikit-learn).

    Args:
        scores: `(n, tags)`, higher where a tag is likelier; of any scale.
        truth: `(n, tags)`, whether a clip has a tag.
        tags: their names.
        seed: of the bootstrap.

    Returns:
        `roc_auc` and `pr_auc` (average precision), the means over the tags that have clips with and without them, with
        the number of these in the details and a 95 % percentile bootstrap interval over clips, in which a resample
        leaves out the tags that it has no clips with, or none without; and the same of each tag as `roc_auc_by_tag` and
        `pr_auc_by_tag`, with its `share` of the clips: the PR-AUC of scores that know nothing.

    Raises:
        ValueError: shapes that do not match, scores that are not finite, truth that is neither bool nor 0 and 1.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    check_tags(tags)
    scores, truth = (it.detach().cpu().numpy() if isinstance(it, Tensor) else it for it in (scores, truth))
    if scores.ndim != 2 or scores.shape != truth.shape or scores.shape[1] != len(tags) or len(scores) == 0:
        raise ValueError(
            f'scores and truth must have the shape (clips, {len(tags)}), a column a tag, got {scores.shape} and '
            f'{truth.shape}'
        )
    if not np.isfinite(scores).all():
        raise ValueError(f'scores[{np.argwhere(~np.isfinite(scores))[0][0]}] hold NaN or infinity')
    if not np.isin(truth, (0, 1)).all():
        raise ValueError('truth must hold True and False, or 1 and 0')
    truth = truth.astype(bool)
    figures: dict[str, Figure | dict[str, Figure]] = {}
    intervals = macro_intervals(scores, truth, seed)
    for name, measure in dict(roc_auc=roc_auc_score, pr_auc=average_precision_score).items():
        by_tag = {}
        for tag, own, wanted in zip(tags, scores.T, truth.T):
            share = float(wanted.mean())
            if share in (0.0, 1.0):
                by_tag[tag] = undefined(f'{"no" if share == 0 else "every"} clip has the tag', share=share)
            else:
                value = float(measure(wanted, own))
                by_tag[tag] = Figure(value, count=len(own), details=dict(share=share))
        values = [it.value for it in by_tag.values() if it.value is not None]
        counted = dict(tags_counted=len(values), tags_given=len(tags))
        if values:
            figures[name] = Figure(float(np.mean(values)), *intervals[name], count=len(scores), details=counted)
        else:
            figures[name] = undefined('no tag has clips with and without it', **counted)
        figures[f'{name}_by_tag'] = by_tag
    return figures


@typechecked
def tagging_of_files(
    tagger: ZeroShotTagger,
    paths: Sequence[str | Path],
    truth: Tensor | np.ndarray,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Figure | dict[str, Figure]]:
    """How well MuLaN finds the tags of sound files, such as those of MagnaTagATune; a batch of them at a time.

        clips = read_magnatagatune('annotations_final.csv', 'mp3')
        tagging_of_files(ZeroShotTagger(mulan, clips.tags), clips.paths, clips.truth)['roc_auc']

    Args:
        tagger: whose tags are the columns of `truth`.
        paths: the `n` sound files.
        truth: `(n, tags)`, whether a clip has a tag.
        batch_size: files read and embedded at a time.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        what `tagging_figures` gives.

    Raises:
        ValueError: a truth of another shape, a file that does not decode or is too short, naming it; a MuLaN that does
        not know its sample rate. FileNotFoundError.
    """
    if truth.shape != (len(paths), len(tagger.tags)) or len(paths) == 0:
        raise ValueError(
            f'truth must have the shape (files, tags), ({len(paths)}, {len(tagger.tags)}), and there must be files, '
            f'got {tuple(truth.shape)}'
        )
    embedder = MuLaNEmbedder(tagger.mulan, tagger.window, tagger.hop, batch_size=tagger.batch_size)
    scores = torch.empty(truth.shape)
    embedded = embed_clips(paths, [embedder], batch_size=batch_size)
    for clip in tqdm(embedded, desc='tagging', unit='clip', total=len(paths), disable=not progress, leave=False):
        if embedder.name in clip.missing:
            raise ValueError(f'{paths[clip.index]}: {clip.missing[embedder.name]}; leave it out')
        latent = l2norm(clip.frames[embedder.name].mean(dim=0))
        scores[clip.index] = tagger.scores_of(latent[None])[0]
    return tagging_figures(scores, truth, tagger.tags, seed=seed)


def macro_intervals(scores: np.ndarray, truth: np.ndarray, seed: int) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals over clips of `roc_auc` and `pr_auc`, the means over tags, from `(n, tags)` arrays."""
    random = np.random.default_rng(seed)
    n, means = len(scores), dict(roc_auc=[], pr_auc=[])
    while (left := RESAMPLES - sum(map(len, means['roc_auc']))) > 0:
        drawn = random.integers(n, size=(min(left, max(1, ENTRIES_AT_ONCE // n)), n))
        # how often each clip was drawn, (r, n): sorting the scores once is enough
        weights = np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)
        by_tag = [weighted_areas(own, wanted, weights) for own, wanted in zip(scores.T, truth.T)]
        for name, areas in zip(means, zip(*by_tag)):
            areas = np.stack(areas, axis=1)
            counted = np.isfinite(areas)
            with np.errstate(invalid='ignore'):  # no tag is left where very few clips have one
                means[name].append(np.where(counted, areas, 0).sum(axis=1) / counted.sum(axis=1))
    found = {}
    for name, parts in means.items():
        samples = np.concatenate(parts)
        samples = samples[np.isfinite(samples)]
        found[name] = interval(samples) if len(samples) else (None, None)
    return found


def weighted_areas(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ROC-AUC and average precision `(r,)` of one tag, for each of `(r, n)` weights of clips.

    NaN where the clips with or without the tag weigh nothing. As scikit-learn's, which take one set of weights a call.
    """
    order = np.argsort(scores)[::-1]
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # clips of one score come in together
    weights, truth = weights[:, order], truth[order]
    taken = weights.cumsum(axis=1)[:, ends]
    hits = (weights * truth).cumsum(axis=1)[:, ends]
    added = np.diff(hits, axis=1, prepend=0)
    positives, negatives = hits[:, -1], (taken - hits)[:, -1]
    with np.errstate(invalid='ignore'):
        # a threshold's own negatives count half
        beaten = negatives[:, None] - (taken - hits) + np.diff(taken - hits, axis=1, prepend=0) / 2
        roc = (added * beaten).sum(axis=1) / (positives * negatives)
        precision = (added * hits / np.maximum(taken, 1e-12)).sum(axis=1) / positives
    defined = (positives > 0) & (negatives > 0)
    return np.where(defined, roc, np.nan), np.where(defined, precision, np.nan)
