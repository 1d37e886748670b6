"""How well audio fits its text: cosines, retrieval and the margin over chance, in any joint space of audio and text."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.evaluation.embedders import CLAPEmbedder, MuLaNEmbedder
from musiclm_pytorch.evaluation.metric import (
    EvaluationClip,
    Metric,
    MetricValue,
    embedding_rows,
    mean_value,
    undefined,
)

RECALLS = (1, 5, 10)
# latents in half precision are this far from length 1
LENGTH_TOLERANCE = 1e-2
# equal assignments of texts to clips add the same cosines up in another order
ROUNDING = 1e-9
# equal cosines may differ by their place in a matrix product
TIE = 1e-12
PAIRS_AT_ONCE = 2_000_000  # cosines held at a time: bounds the memory for many clips


class TextAudioAlignment(Metric):
    """`alignment_figures` of clips and the texts that they were made from, by what an embedder makes of both.

    Args:
        embedder: of audio and text.
        name: of the mean cosine.
        prefix: of all names.
        seed: of the bootstrap and the permutations.
    """

    group = 'text_audio_alignment'
    uses_reference = False

    @typechecked
    def __init__(
        self,
        embedder: MuLaNEmbedder | CLAPEmbedder,
        name: str = 'mulan_cycle_consistency',
        prefix: str = '',
        seed: int = 0,
    ):
        self.embedder, self.embedders, self.name, self.prefix, self.seed = embedder, (embedder,), name, prefix, seed
        self._embedded: dict[str, Tensor] = {}  # by text, which costs as much as audio
        super().__init__()

    def initial_state(self) -> dict[str, Any]:
        return dict(latents={}, texts={}, missing={})

    def update(self, clip: EvaluationClip) -> None:
        if clip.is_reference:
            return
        if clip.text is None:
            raise ValueError('text–audio alignment needs texts, one a clip; pass them, or leave this metric out')
        if self.embedder.name in clip.frames:
            self.state['latents'][clip.index] = clip.embedding(self.embedder.name)
            self.state['texts'][clip.index] = clip.text
        else:
            self.state['missing'][clip.index] = clip.missing[self.embedder.name]

    def compute(self) -> dict[str, MetricValue]:
        pairs = self._pairs()
        if pairs:
            found = alignment_figures(*pairs, name=self.name, seed=self.seed)
        else:
            one = F.normalize(torch.ones(1, 2), dim=-1)
            _, reason = min(self.state['missing'].items(), default=(0, 'there is none'))
            reason = f'no clip can be embedded, such as the first: {reason}'
            found = dict.fromkeys(alignment_figures(one, one, name=self.name), undefined(reason))
        return {self.prefix + name: it for name, it in found.items() if name != 'cosines'}

    def clip_values(self, is_reference: bool) -> dict[int, dict[str, Any]]:
        clips = sorted(self.state['latents'])
        if is_reference or not clips:
            return {}
        audio, text, _ = check_pairs(*self._pairs())
        cosines = dict(zip(clips, (audio * text).sum(dim=1).tolist()))
        return {index: {f'{self.prefix}cosine': cosines.get(index)} for index in (*clips, *self.state['missing'])}

    def _pairs(self) -> tuple[Tensor, Tensor, list[str]] | None:
        """Latents of audio and of text, and the texts, of the clips that have them."""
        clips, audio = embedding_rows(self.state['latents'])
        texts = [self.state['texts'][index] for index in clips]
        if new := [text for text in dict.fromkeys(texts) if text not in self._embedded]:
            self._embedded |= zip(new, self.embedder.embed_texts(new))
        return (audio, torch.stack([self._embedded[text] for text in texts]), texts) if clips else None


@typechecked
def alignment_figures(
    audio_latents: Tensor,
    text_latents: Tensor,
    texts: Sequence[str] | None = None,
    *,
    name: str = 'mulan_cycle_consistency',
    seed: int = 0,
    permutations: int = 10_000,
) -> dict[str, MetricValue | list[float]]:
    """How near clips are to their own texts, and how much nearer than to others'.

    The mean cosine between the latents of texts and of the audio made from them is what MusicLM calls MuLan cycle
    consistency (arXiv 2301.11325), if the latents are MuLaN's: "mean cosine" and "cycle consistency" are
    one number here. With the latents of CLAP it is the CLAP score: pass `name='clap_score'`.

    Clips with one and the same text are no negatives of each other: neither their texts nor their audio count as
    others in ranks and margin. Without `texts` every text counts as different. Memory of O(n · d).

    Args:
        audio_latents, text_latents: `(n, d)` of length 1; row i belongs to row i. From several processes: gathered.
        texts: the `n` texts, to tell which are the same.
        name: of the mean cosine.
        seed: of the bootstrap and the permutations.
        permutations: of the texts among the clips. If there are no more than so many, all are taken, and the p-value
            is exact.

    Returns:
        `cosines`, a list with one a pair, and numbers:

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
    audio, text, groups = check_pairs(audio_latents, text_latents, texts)
    n = len(audio)
    own = (audio * text).sum(dim=1)
    found: dict[str, MetricValue | list[float]] = {'cosines': own.tolist()}
    found[name] = mean_value(own.numpy(), seed=seed)
    audio_ranks, sums = compare_with_others(audio, text, groups)
    text_ranks, _ = compare_with_others(text, audio, groups)
    others = n - groups.bincount(minlength=n)[groups]  # of each clip
    for direction, ranks in (('audio_to_text', audio_ranks), ('text_to_audio', text_ranks)):
        for kind, value in retrieval_values(ranks, 1 + int(others.min()), seed=seed).items():
            found[f'{direction}_{kind}'] = value
    if others.any():
        margins = own - sums / others
        found['margin'] = mean_value(
            margins.numpy(), seed=seed, **permutation_test(audio, text, groups, seed=seed, permutations=permutations)
        )
    else:
        found['margin'] = undefined('all clips have the same text, so there is no other to compare with')
    return found


def check_pairs(
    audio_latents: Tensor, text_latents: Tensor, texts: Sequence[str] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Both as `(n, d)` float64 of length 1 on the CPU, and `(n,)`, the first pair that has the text of each."""
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
    n = len(audio_latents)
    if texts is not None and len(texts) != n:
        raise ValueError(f'got {len(texts)} texts for {n} pairs of latents; pass one text a pair')
    first: dict[str | int, int] = {}
    groups = torch.tensor([first.setdefault(text, i) for i, text in enumerate(range(n) if texts is None else texts)])
    # one text, one latent: embedded in different batches they differ in the last bits
    return sides[0], sides[1][groups], groups


def compare_with_others(queries: Tensor, candidates: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of each query with the candidates of other groups, `(n, d)` each, a block of rows at a time.

    Returns:
        the rank `(n,)` of its own candidate among those of other groups, from 1, ties counting against it; and the sum
        `(n,)` of its cosines with the others.
    """
    size = max(1, PAIRS_AT_ONCE // len(queries))
    own = (queries * candidates).sum(dim=1, keepdim=True)
    ranks, sums = torch.empty(len(own), dtype=torch.long), torch.empty(len(own), dtype=own.dtype)
    for rows in torch.arange(len(queries)).split(size):
        cosines = queries[rows] @ candidates.T
        is_other = groups[rows, None] != groups
        ranks[rows] = 1 + ((cosines >= own[rows] - TIE) & is_other).sum(dim=1)
        sums[rows] = cosines.mul_(is_other).sum(dim=1)
    return ranks, sums


def retrieval_values(ranks: Tensor, candidates: int, *, seed: int) -> dict[str, MetricValue]:
    """Recalls and median of ranks `(n,)` among at least so many candidates."""
    found = {}
    for k in RECALLS:
        if candidates > k:
            hits = (ranks <= k).double().numpy()
            found[f'recall_at_{k}'] = mean_value(hits, seed=seed)
        else:
            reason = f'the first {k} of {candidates} candidates are all: it takes more than {k} different texts'
            found[f'recall_at_{k}'] = undefined(reason)
    if candidates > 1:
        # the lower of the two in the middle, as in trainer.retrieval
        found['median_rank'] = MetricValue(float(ranks.median()), count=len(ranks))
    else:
        found['median_rank'] = undefined('there is no other text to rank against')
    return found


def permutation_test(
    audio: Tensor, text: Tensor, groups: Tensor, *, seed: int, permutations: int
) -> dict[str, float | int]:
    """Whether clips are nearer to their own texts by chance: `p_value`, `smallest_p` and the `permutations` tried."""
    n = len(audio)
    flat, rows = audio.numpy().ravel(), text.numpy()
    own = flat @ rows.ravel() / n
    shuffled = np.empty_like(rows)
    tried = as_high = 0
    for order in assignments(n, seed, permutations):
        tried += 1
        # the sum of n cosines is one long product: no matrix of all pairs
        np.take(rows, order, axis=0, out=shuffled)
        as_high += flat @ shuffled.ravel() / n >= own - ROUNDING
    # assignments that only exchange clips of the same text give the same mean
    alike = math.prod(math.factorial(count) for count in Counter(groups.tolist()).values())
    smallest = max(1 / (tried + 1), alike / math.factorial(n))
    return dict(p_value=float((as_high + 1) / (tried + 1)), smallest_p=smallest, permutations=tried)


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
