"""What music is tagged as: taggers, how their outputs on two sets diverge, and how right they are about known tags."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm.auto import tqdm

from musiclm_pytorch.checks import check_audio, check_finite, check_positive, described, typechecked
from musiclm_pytorch.evaluation.embedders import Embedder, MuLaNEmbedder, latents_of_texts
from musiclm_pytorch.evaluation.inputs import evaluation_clips
from musiclm_pytorch.evaluation.metric import (
    EvaluationClip,
    Metric,
    MetricValue,
    embedding_rows,
    mean_value,
    percentile_interval,
    undefined,
)
from musiclm_pytorch.extras import needing
from musiclm_pytorch.mulan.checkpoint import load_file
from musiclm_pytorch.mulan.layers import l2norm
from musiclm_pytorch.mulan.pretrained import own_mulan

# common words for music: genres, instruments and voices, moods, tempo and sound
MUSIC_TAGS = (
    *('rock', 'pop', 'jazz', 'blues', 'classical', 'electronic', 'techno', 'house', 'hip hop', 'reggae', 'country'),
    *('folk', 'heavy metal', 'punk', 'funk', 'soul', 'disco', 'ambient', 'latin', 'orchestral', 'choir'),
    *('piano', 'acoustic guitar', 'electric guitar', 'bass', 'drums', 'violin', 'cello', 'flute', 'trumpet'),
    *('saxophone', 'organ', 'synthesizer', 'harp', 'accordion', 'male voice', 'female voice', 'instrumental'),
    *('happy', 'sad', 'calm', 'aggressive', 'romantic', 'dark', 'dreamy', 'epic'),
    *('slow', 'fast', 'loud', 'quiet'),
)
TEMPLATES = ('{}', 'music, {}', 'a piece of music: {}')
EPSILON = 1e-6  # of audiocraft's KL
# PaSST: what its published weights were trained on
PASST_RATE, PASST_SECONDS, PASST_CLASSES = 32000, 10, 527
PASST_SHORTEST = 4801  # samples: 16 frames of 10 ms, one patch
RESAMPLES = 200  # of clips, for the intervals of areas
HOP = 1.0  # seconds between MuLaN's windows, or less, so that short windows leave nothing out


@runtime_checkable
class Tagger(Protocol):
    """What tells the tags of music.

    Attributes:
        tags: their names.
        sample_rate: of the waves it takes, in Hz.
        min_samples: length of the shortest wave that it takes.
    """

    tags: Sequence[str]
    sample_rate: int
    min_samples: int

    def probabilities(self, waves: Sequence[Tensor]) -> Tensor:
        """Of each of `n` waves `(samples,)`, a distribution over the tags: `(n, tags)` float32 on the CPU."""
        ...


class ZeroShotTagger:
    """MuLaN as a tagger: how near a clip is to texts with each tag, with no training for it (arXiv 2208.12415).

    A tag stands for the mean of the latents of its prompts, as CLIP does it (arXiv 2103.00020, section 3.1.4).

    Args:
        mulan: trained. Its texts are embedded here, once. One that does not know its sample rate tags latents only.
        tags: any words.
        templates: prompts with `{}` in the place of the tag.
        window: seconds of audio that are embedded at once; the latent of longer audio is the mean over windows, one
            every second, or beside each other if they are shorter (`MuLaN.embed_audio`). No longer than the tower's
            `max_audio_length`.
        batch_size: windows and prompts embedded at a time.

    Raises:
        ValueError: no tag or one twice, a template without `{}`.
    """

    @typechecked
    def __init__(
        self,
        mulan: nn.Module,
        tags: Sequence[str] = MUSIC_TAGS,
        templates: Sequence[str] = TEMPLATES,
        *,
        window: float = 10.0,
        batch_size: int = 32,
    ):
        check_positive(window=window, batch_size=batch_size)
        check_tags(tags)
        if isinstance(templates, str) or not templates or any('{}' not in it for it in templates):
            raise ValueError(
                f'templates must be a list of texts with {{}} in the place of the tag, got {described(templates)}'
            )
        mulan = self.mulan = own_mulan(mulan)
        self.tags = tuple(tags)
        self.sample_rate = mulan.sample_rate
        self.window = mulan.window(window)
        self.hop = min(HOP, self.window)
        self.min_samples = mulan.audio.min_samples
        self.batch_size = batch_size
        prompts = [template.replace('{}', tag) for tag in tags for template in templates]
        latents = latents_of_texts(mulan, prompts, batch_size)
        latents = rearrange(latents, '(tags templates) d -> tags templates d', templates=len(templates))
        self.tag_latents = l2norm(latents.mean(dim=1))  # (tags, dim_latent)

    @typechecked
    def scores(self, waves: Sequence[Tensor]) -> Tensor:
        """Cosine of each wave `(samples,)` at `sample_rate` with each tag, `(n, tags)` float32 on the CPU."""
        check_tagger_waves(waves, shortest=self.min_samples)
        if self.sample_rate is None:
            raise ValueError(
                'this MuLaN does not know its sample rate, so no wave can be brought to it; build the audio tower '
                'with audio_sample_rate, or tag latents: scores_of'
            )
        windows = dict(window=self.window, hop=self.hop, batch_size=self.batch_size)
        return self.scores_of(torch.stack([self.mulan.embed_audio(it, **windows) for it in waves]))

    def probabilities(self, waves: Sequence[Tensor]) -> Tensor:
        """Of each wave `(samples,)` at `sample_rate`: as `probabilities_of`."""
        return self.probabilities_of_scores(self.scores(waves))

    def scores_of(self, latents: Tensor) -> Tensor:
        """The same as `scores` from MuLaN's latents of the audio, `(n, dim_latent)`."""
        if latents.ndim != 2 or latents.shape[1] != self.tag_latents.shape[1]:
            raise ValueError(f'latents must have shape (n, {self.tag_latents.shape[1]}), got {tuple(latents.shape)}')
        check_finite(latents, 'latents[{}] hold NaN or infinity')
        return l2norm(latents.detach().float().cpu()) @ self.tag_latents.T

    def probabilities_of(self, latents: Tensor) -> Tensor:
        """Softmax over the tags at MuLaN's own temperature, `(n, tags)`: of what a clip is most, not of each tag.

        The temperature is the factor of the cosines that MuLaN learned in its loss.
        """
        return self.probabilities_of_scores(self.scores_of(latents))

    def probabilities_of_scores(self, scores: Tensor) -> Tensor:
        """The same from cosines, `(n, tags)`."""
        factor = float(self.mulan.contrast.temperature().detach())
        return (scores * factor).softmax(dim=-1)


class PaSSTTagger:
    """PaSST (arXiv 2110.05069), a tagger of AudioSet's 527 classes, by which audiocraft and others compute their KL.

    The package hear21passt builds it; the weights come from a file on disk, nothing is downloaded. Audio longer than
    10 s is cut into segments of 10 s, whose outputs are averaged; audiocraft takes each segment for a clip of its own,
    which is the same for clips of up to 10 s. A last segment of 0.15 s or less is left out, as there.

    Args:
        weights: file of the state dict, such as hear21passt's `passt-s-f128-p16-s10-ap.476-swa.pt`.
        arch: what hear21passt calls its architecture.
        device: to compute on.

    Raises:
        ImportError: hear21passt is not installed. FileNotFoundError: no such file. ValueError: weights of another
        architecture.
    """

    tags = tuple(f'AudioSet class {i}' for i in range(PASST_CLASSES))  # the package holds no names
    sample_rate = PASST_RATE
    min_samples = PASST_SHORTEST

    @typechecked
    def __init__(
        self, weights: str | Path, arch: str = 'passt_s_swa_p16_128_ap476', device: str | torch.device = 'cpu'
    ):
        with needing('PaSST needs the package hear21passt', 'eval'):
            from hear21passt.models.passt import get_model
            from hear21passt.models.preprocess import AugmentMelSTFT
            from hear21passt.wrapper import PasstBasicWrapper
        with quiet():
            net = get_model(arch=arch, pretrained=False, n_classes=PASST_CLASSES)
            # as in hear21passt.base, where the weights would be downloaded
            mel = AugmentMelSTFT(
                n_mels=128, sr=PASST_RATE, win_length=800, hopsize=320, n_fft=1024, freqm=48, timem=192, htk=False,
                fmin=0.0, fmax=None, norm=1, fmin_aug_range=10, fmax_aug_range=2000,
            )  # fmt: skip
            self.model = PasstBasicWrapper(mel=mel, net=net, mode='logits').eval().to(device)
        load_file(net, weights, 'weights of PaSST')

    @typechecked
    @torch.no_grad()
    def probabilities(self, waves: Sequence[Tensor]) -> Tensor:
        """Softmax over the classes of each wave `(samples,)` at 32 kHz, `(n, 527)` float32 on the CPU."""
        check_tagger_waves(waves, shortest=self.min_samples)
        found = []
        for wave in waves:
            parts = [it for it in wave.float().split(PASST_SECONDS * PASST_RATE) if len(it) >= PASST_SHORTEST]
            with quiet():
                logits = torch.cat([self.model(part[None].to(self.model.device())) for part in parts])
            found.append(logits.softmax(dim=-1).mean(dim=0).cpu())
        return torch.stack(found)


@contextlib.contextmanager
def quiet():
    """hear21passt prints shapes, and warns of each length but 10 s and of what is deprecated in torch."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


class TaggerEmbedder:
    """A tagger as an embedder: one frame a clip, its distribution over the tags."""

    name = 'tags'

    def __init__(self, tagger: Tagger):
        if tagger.sample_rate is None:
            raise ValueError(
                'the tagger does not know the rate of the waves that it takes; give one that does, such as a '
                'ZeroShotTagger of a MuLaN that was built with audio_sample_rate'
            )
        self.tagger = tagger
        self.sample_rate, self.dim, self.min_samples = tagger.sample_rate, len(tagger.tags), tagger.min_samples

    def embed(self, waves: list[Tensor]) -> list[Tensor]:
        return list(self.tagger.probabilities(waves)[:, None]) if waves else []


# ---- divergence of tags ----


class TagDivergence(Metric):
    """`kl_figures` of the tags of generated and of reference clips.

    Args:
        tagger: whose distributions are compared; or a `MuLaNEmbedder`, whose MuLaN then tags zero-shot.
        paired: whether the reference clip i belongs to the generated clip i.
        seed: of the bootstrap.
    """

    needs_reference = True

    def __init__(self, tagger: Tagger | MuLaNEmbedder, *, paired: bool = False, seed: int = 0):
        self.paired, self.seed = paired, seed
        self.embedder: Embedder = tagger if isinstance(tagger, MuLaNEmbedder) else TaggerEmbedder(tagger)
        self.embedders = (self.embedder,)
        super().__init__()

    def initial_state(self) -> dict[str, Any]:
        return dict(generated={}, reference={})

    def update(self, clip: EvaluationClip) -> None:
        if self.embedder.name in clip.frames:
            side = 'reference' if clip.is_reference else 'generated'
            self.state[side][clip.index] = clip.embedding(self.embedder.name)

    def compute(self) -> dict[str, dict[str, MetricValue]]:
        sides = [self.state['generated'], self.state['reference']]
        both = sides[0].keys() & sides[1].keys()  # pairs are where both have one
        rows = [embedding_rows(side, both if self.paired else None)[1] for side in sides]
        if not all(map(len, rows)):
            return dict(tags=dict(kl=undefined('no clip is long enough for the tagger')))
        if isinstance(self.embedder, MuLaNEmbedder):
            tagger = ZeroShotTagger(self.embedder.mulan)
            rows = [tagger.probabilities_of(it) for it in rows]
        else:  # of length 1 as all means, but what adds up to 1 is a distribution
            rows = [it / it.sum(dim=1, keepdim=True) for it in rows]
        return dict(tags=kl_figures(*rows, paired=self.paired, seed=self.seed))


@typechecked
def kl_figures(
    generated_probs: Tensor | np.ndarray, reference_probs: Tensor | np.ndarray, *, paired: bool = True, seed: int = 0
) -> dict[str, MetricValue]:
    """Kullback-Leibler divergence, in nats, between a tagger's outputs on generated and on reference audio.

    As in audiocraft's `kld.py`: KL(p ‖ q) = Σ p · (log p − log(q + 1e-6)), which may be a little below 0.

    Args:
        generated_probs: `(n, tags)` distributions.
        reference_probs: `(m, tags)`; paired, row i is of the reference of the generated clip i, and `m` is `n`.
        paired: whether the rows belong together, such as two clips for one caption.

    Returns:
        paired: `kl_reference_generated`, KL(reference ‖ generated), the one that audiocraft reports as `kld`, and
        `kl_generated_reference`, the other way, each the mean over pairs with its bootstrap interval. Else
        `kl_of_means_reference_generated` and `kl_of_means_generated_reference`, between the mean distributions of both
        sets: another number, smaller as a rule and not to be compared with the first; it has no interval.

    Raises:
        ValueError: shapes that do not match, or rows that are no distributions.
    """
    generated = check_distributions(generated_probs, 'generated_probs')
    reference = check_distributions(reference_probs, 'reference_probs')
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f'both sets need the same tagger, got {generated.shape[1]} tags of the generated and '
            f'{reference.shape[1]} of the reference audio'
        )
    if paired and len(generated) != len(reference):
        raise ValueError(
            f'got {len(generated)} generated and {len(reference)} reference clips, which are no pairs; pass '
            'paired=False to compare the sets'
        )
    prefix = 'kl_' if paired else 'kl_of_means_'
    if not paired:
        counts = dict(generated=len(generated), reference=len(reference))
        generated, reference = (it.mean(axis=0, keepdims=True) for it in (generated, reference))
    found = {}
    for name, p, q in (
        ('reference_generated', reference, generated),
        ('generated_reference', generated, reference),
    ):
        values = divergences(p, q)
        found[prefix + name] = (
            mean_value(values, unit='nats', seed=seed)
            if paired
            else MetricValue(values[0], unit='nats', details=counts)
        )
    return found


def divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) of rows of `(n, tags)`, `(n,)`."""
    from scipy.special import xlogy

    return (xlogy(p, p) - p * np.log(q + EPSILON)).sum(axis=1)


# ---- how right a tagger is ----


class Tagging(Metric):
    """`tagging_figures` of clips whose tags are known, by a zero-shot tagger.

    Args:
        tagger: whose tags are the columns of `truth`.
        truth: `(n, tags)`, whether a clip has a tag, by the index of the clip.
        embedder: of its MuLaN, to share with other metrics; by default of the tagger's windows.
        seed: of the bootstrap.
    """

    group = 'tagging'
    uses_reference = False

    @typechecked
    def __init__(
        self,
        tagger: ZeroShotTagger,
        truth: Tensor | np.ndarray,
        *,
        embedder: MuLaNEmbedder | None = None,
        seed: int = 0,
    ):
        if truth.ndim != 2 or truth.shape[1] != len(tagger.tags):
            raise ValueError(
                f'truth must have the shape (files, tags), (…, {len(tagger.tags)}), got {tuple(truth.shape)}'
            )
        self.tagger, self.truth, self.seed = tagger, truth, seed
        windows = dict(window_seconds=tagger.window, hop_seconds=tagger.hop, batch_size=tagger.batch_size)
        self.embedders = (MuLaNEmbedder(tagger.mulan, **windows) if embedder is None else embedder,)
        super().__init__()

    def initial_state(self) -> dict[str, Any]:
        return dict(scores={})

    def update(self, clip: EvaluationClip) -> None:
        """Raises ValueError for a clip that is too short, or beyond the truth."""
        if clip.is_reference:
            return
        if reason := clip.missing.get('mulan'):
            raise ValueError(f'{clip.name}: {reason}; leave it out')
        if clip.index >= len(self.truth):
            raise ValueError(f'{clip.name} has the index {clip.index}, but there is truth of {len(self.truth)} clips')
        self.state['scores'][clip.index] = self.tagger.scores_of(clip.embedding('mulan')[None])[0]

    def compute(self) -> dict[str, MetricValue | dict[str, MetricValue]]:
        clips, scores = embedding_rows(self.state['scores'])
        return tagging_figures(scores, self.truth[clips], self.tagger.tags, seed=self.seed)


@typechecked
def tagging_figures(
    scores: Tensor | np.ndarray, truth: Tensor | np.ndarray, tags: Sequence[str], *, seed: int = 0
) -> dict[str, MetricValue | dict[str, MetricValue]]:
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
    found: dict[str, Any] = {}
    means = resampled_means(scores, truth, seed)
    for name, own in areas_of(scores, truth).items():
        by_tag = {}
        for tag, value, share in zip(tags, own, truth.mean(axis=0).tolist()):
            if np.isfinite(value):
                by_tag[tag] = MetricValue(value, count=len(scores), details=dict(share=share))
            else:
                by_tag[tag] = undefined(f'{"every" if share else "no"} clip has the tag', share=share)
        counted = dict(tags_counted=int(np.isfinite(own).sum()), tags_given=len(tags))
        if counted['tags_counted']:
            low_high = percentile_interval(means[name]) if len(means[name]) else ()
            found[name] = MetricValue(np.nanmean(own), *low_high, count=len(scores), details=counted)
        else:
            found[name] = undefined('no tag has clips with and without it', **counted)
        found[f'{name}_by_tag'] = by_tag
    return found


def areas_of(scores: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """`roc_auc` and `pr_auc` of each tag, `(tags,)`, from `(n, tags)`; NaN where all clips have it, or none."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    both = truth.any(axis=0) & ~truth.all(axis=0)
    found = {}
    for name, measure in dict(roc_auc=roc_auc_score, pr_auc=average_precision_score).items():
        found[name] = np.full(truth.shape[1], np.nan)
        if both.any():
            found[name][both] = measure(truth[:, both], scores[:, both], average=None)
    return found


def resampled_means(scores: np.ndarray, truth: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Means of the areas over tags, of `RESAMPLES` draws of clips; those of a draw that has no tag are left out."""
    random, n = np.random.default_rng(seed), len(scores)
    draws = (random.integers(n, size=n) for _ in range(RESAMPLES))
    areas = [areas_of(scores[drawn], truth[drawn]) for drawn in draws]
    kept = [it for it in areas if np.isfinite(it['roc_auc']).any()]
    return {name: np.array([np.nanmean(it[name]) for it in kept]) for name in ('roc_auc', 'pr_auc')}


@typechecked
def tagging_of_files(
    tagger: ZeroShotTagger,
    paths: Sequence[str | Path],
    truth: Tensor | np.ndarray,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, MetricValue | dict[str, MetricValue]]:
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
    metric = Tagging(tagger, truth, seed=seed)
    if len(truth) != len(paths) or not paths:
        raise ValueError(
            f'truth must have the shape (files, tags), ({len(paths)}, {len(tagger.tags)}), and there must be files, '
            f'got {tuple(truth.shape)}'
        )
    sources = ((index, path, None) for index, path in enumerate(paths))
    clips = evaluation_clips(sources, metric.embedders, batch_size)
    for clip in tqdm(clips, desc='tagging', unit='clip', total=len(paths), disable=not progress, leave=False):
        metric.update(clip)
    return metric.compute()


# ---- checks ----


def check_tags(tags: Sequence[str]) -> None:
    if isinstance(tags, str) or not tags or len(set(tags)) != len(tags):
        raise ValueError(f'tags must be one or more different names, got {described(tags)}')


def check_tagger_waves(waves: Sequence[Tensor], shortest: int) -> None:
    """Raise TypeError or ValueError unless there are waves, each `(samples,)`, finite and no shorter than that."""
    if len(waves) == 0:
        raise ValueError('there are no waves to tag; pass at least one')
    for i, wave in enumerate(waves):
        check_audio(wave, ndim=1, shape='(samples,)', name=f'waves[{i}]')
        check_finite(wave[None], f'waves[{i}] holds NaN or infinite samples')
        if len(wave) < shortest:
            raise ValueError(f'waves[{i}] has {len(wave)} samples, but a tagger needs {shortest}; leave it out')


def check_distributions(probs: Tensor | np.ndarray, name: str) -> np.ndarray:
    """As float64; raises ValueError unless rows of `(n, tags)` are at least 0 and add up to 1."""
    probs = probs.detach().cpu().double().numpy() if isinstance(probs, Tensor) else probs.astype(np.float64)
    if probs.ndim != 2 or 0 in probs.shape:
        raise ValueError(f'{name} must have shape (clips, tags), got {probs.shape}')
    wrong = ~((probs >= 0).all(axis=1) & (np.abs(probs.sum(axis=1) - 1) <= 1e-3))  # NaN too
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f'{name}[{row}] is no distribution: its smallest value is {probs[row].min():g} and its sum '
            f'{probs[row].sum():g}; pass probabilities, not scores or logits'
        )
    return probs
