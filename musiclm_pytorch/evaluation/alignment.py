"""How well audio fits its text: cosines, retrieval and the margin over chance, in any joint space of audio and text."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.evaluation.figures import Figure, mean_figure, undefined

RECALLS = (1, 5, 10)
# latents in half precision are this far from length 1
LENGTH_TOLERANCE = 1e-2
# equal assignments of texts to clips add the same cosines up in another order
ROUNDING = 1e-9


@typechecked
def alignment_figures(
    audio_latents: Tensor,
    text_latents: Tensor,
    texts: Sequence[str] | None = None,
    *,
    name: str = 'mulan_cycle_consistency',
    seed: int = 0,
    permutations: int = 10_000,
) -> dict[str, Figure | list[float]]:
    """How near clips are to their own texts, and how much nearer than to others'.

    The mean cosine between the latents of texts and of the audio made from them is what MusicLM calls MuLan cycle
    consistency (arXiv 2301.11325), if the latents are MuLaN's: "mean cosine" and "cycle consistency" are
    one number here. With the latents of CLAP it is the CLAP score: pass `name='clap_score'`.

    Clips with one and the same text are no negatives of each other: neither their texts nor their audio count as
    others in ranks and margin. Without `texts` every text counts as different.

    Args:
        audio_latents, text_latents: `(n, d)` of length 1; row i belongs to row i. From several processes: gathered.
        texts: the `n` texts, to tell which are the same.
        name: of the mean cosine.
        seed: of the bootstrap and the permutations.
        permutations: of the texts among the clips. If there are no more than so many, all are taken, and the p-value
            is exact.

    Returns:
        `cosines`, a list with one a pair, and figures:

        - `name`: the mean cosine of the pairs, with its bootstrap interval.
        - `audio_to_text_recall_at_1`, `…_5`, `…_10` and `audio_to_text_median_rank`: of the own text among all texts,
          ties counting against it as in `trainer.retrieval`; and `text_to_audio_…`. The intervals are over queries,
          among the same candidates. A recall that no pair could miss is undefined.
        - `margin`: the cosine with the own text less the mean over all other texts, with `p_value` in the details: of
          mean cosines as high by a random assignment of the texts, (b + 1) / (m + 1) (Phipson and Smyth, 2010), and
          `smallest_p`, below which it cannot come with so few clips or permutations.

    Raises:
        ValueError: shapes that do not match, no pair, NaN, or latents that are not of length 1.
    """
    check_positive(permutations=permutations)
    cosines = pair_cosines(audio_latents, text_latents)
    n = len(cosines)
    if texts is not None and len(texts) != n:
        raise ValueError(f'got {len(texts)} texts for {n} pairs of latents; pass one text a pair')
    first: dict[str | int, int] = {}
    groups = torch.tensor([first.setdefault(text, i) for i, text in enumerate(range(n) if texts is None else texts)])
    # one text, one latent: embedded in different batches they differ in the last bits
    cosines = cosines[:, groups]
    is_other = groups[:, None] != groups

    own = cosines.diagonal()
    figures: dict[str, Figure | list[float]] = {'cosines': own.tolist()}
    figures[name] = mean_figure(own.numpy(), seed=seed)
    for direction, scores in (('audio_to_text', cosines), ('text_to_audio', cosines.T)):
        for kind, figure in retrieval_figures(scores, is_other, seed=seed).items():
            figures[f'{direction}_{kind}'] = figure
    figures['margin'] = margin_figure(cosines, is_other, groups, seed=seed, permutations=permutations)
    return figures


def pair_cosines(audio_latents: Tensor, text_latents: Tensor) -> Tensor:
    """Cosines of all clips with all texts, `(n, n)` float64 on the CPU."""
    if audio_latents.ndim != 2 or audio_latents.shape != text_latents.shape:
        raise ValueError(
            'audio and text latents must come in pairs of one shape (n, d), got '
            f'{tuple(audio_latents.shape)} and {tuple(text_latents.shape)}'
        )
    if len(audio_latents) == 0:
        raise ValueError('there are no pairs to compare; pass at least one clip and its text')
    sides = []
    for side, latents in dict(audio_latents=audio_latents, text_latents=text_latents).items():
        latents = latents.detach().cpu().double()
        lengths = latents.norm(dim=-1)
        wrong = ~((lengths - 1).abs() <= LENGTH_TOLERANCE)  # NaN too
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f'{side}[{row}] has length {float(lengths[row]):g}, not 1; pass '
                f'torch.nn.functional.normalize({side}, dim=-1), and no NaN'
            )
        sides.append(F.normalize(latents, dim=-1))
    return sides[0] @ sides[1].T


def retrieval_figures(scores: Tensor, is_other: Tensor, *, seed: int) -> dict[str, Figure]:
    """Recalls and median rank of the own column of each row of `(n, n)` scores, among the columns `is_other` marks."""
    others = is_other.sum(dim=1)
    ranks = 1 + ((scores >= scores.diagonal()[:, None]) & is_other).sum(dim=1)
    candidates = 1 + int(others.min())
    figures = {}
    for k in RECALLS:
        if candidates > k:
            hits = (ranks <= k).double().numpy()
            figures[f'recall_at_{k}'] = mean_figure(hits, seed=seed)
        else:
            reason = f'the first {k} of {candidates} candidates are all: it takes more than {k} different texts'
            figures[f'recall_at_{k}'] = undefined(reason)
    if candidates > 1:
        # the lower of the two in the middle, as in trainer.retrieval
        figures['median_rank'] = Figure(float(ranks.median()), count=len(ranks))
    else:
        figures['median_rank'] = undefined('there is no other text to rank against')
    return figures


def margin_figure(cosines: Tensor, is_other: Tensor, groups: Tensor, *, seed: int, permutations: int) -> Figure:
    """How much nearer clips are to their own texts than to the mean of the others, and whether by chance."""
    others = is_other.sum(dim=1)
    if not others.any():
        return undefined('all clips have the same text, so there is no other to compare with')
    margins = cosines.diagonal() - (cosines * is_other).sum(dim=1) / others
    own, matrix, places = float(cosines.diagonal().mean()), cosines.numpy(), np.arange(len(cosines))
    tried = as_high = 0
    for order in assignments(len(cosines), seed, permutations):
        tried += 1
        as_high += matrix[places, order].mean() >= own - ROUNDING
    # assignments that only exchange clips of the same text give the same mean
    alike = math.prod(math.factorial(count) for count in Counter(groups.tolist()).values())
    smallest = max(1 / (tried + 1), alike / math.factorial(len(cosines)))
    return mean_figure(
        margins.numpy(),
        seed=seed,
        p_value=(as_high + 1) / (tried + 1),
        smallest_p=smallest,
        permutations=tried,
    )


def assignments(n: int, seed: int, permutations: int) -> Iterator[np.ndarray]:
    """Orders of `n` places other than their own: all of them, if they are no more than `permutations`, else drawn.

    Drawn ones may be the own order, as any other; it then counts as found by chance.
    """
    if math.factorial(n) - 1 <= permutations:
        yield from map(np.array, itertools.islice(itertools.permutations(range(n)), 1, None))
        return
    random = np.random.default_rng(seed)
    for _ in range(permutations):
        yield random.permutation(n)
