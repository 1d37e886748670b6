"""Metrics over a set of clips, in one pass and over all processes; and the evaluation of generated music with them."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from musiclm_pytorch.checks import check_device, check_not_negative, check_positive, check_sample_rate, typechecked
from musiclm_pytorch.collectives import rank, world_size
from musiclm_pytorch.evaluation.alignment import TextAudioAlignment
from musiclm_pytorch.evaluation.clip_metrics import MusicStructure, SignalQuality
from musiclm_pytorch.evaluation.distances import FrechetAudioDistance, KernelAudioDistance
from musiclm_pytorch.evaluation.embedders import CLAPEmbedder, Embedder, MuLaNEmbedder
from musiclm_pytorch.evaluation.inputs import check_names, check_texts, evaluation_clips, list_clips
from musiclm_pytorch.evaluation.metric import GROUPS, Metric, as_value, to_json, undefined
from musiclm_pytorch.evaluation.tagging import TagDivergence, Tagger
from musiclm_pytorch.mulan.checkpoint import CONFIG_FILE, read_json_object, saved_kind
from musiclm_pytorch.mulan.display import indented
from musiclm_pytorch.mulan.model import JointEmbedding
from musiclm_pytorch.mulan.pretrained import load_joint, own_mulan
from musiclm_pytorch.pretrained import find_pretrained
from musiclm_pytorch.quantizer import MULAN_FOLDER, NOT_SAVED
from musiclm_pytorch.version import __version__

logger = logging.getLogger(__name__)

USUAL_RATE = 16000  # Hz, where neither the caller nor the model tells
WINDOW, HOP = 10.0, 1.0  # seconds: MuLaN's windows and their stride (MusicLM, arXiv 2301.11325, section 4.1)
RAISED_AGAIN = (FileNotFoundError, OSError, ValueError, TypeError)


class Evaluator:
    """Any metrics over one set of clips, or generated clips and a reference, in one pass over each.

        evaluator = Evaluator([SignalQuality(), FrechetAudioDistance(embedder)])
        evaluator.update(SyntheticMusic(1000))
        evaluator.update(reference_files, is_reference=True)
        evaluator.compute()['audio_quality']['frechet_audio_distance']['mulan'].value

    A clip is read once, in a background thread, and embedded once by each embedder that a metric asks for. Evaluators
    of shards, whose clips are numbered apart by `first_index`, add up by `merge`.

    Under torch.distributed every rank makes the same calls with the same arguments; the clips are sharded across ranks,
    and every rank has what one process would have.

    Args:
        metrics: each of its own names.
        reference: whether reference clips will come, too; if not, metrics that need them say so, and cost nothing.
        batch_size: clips embedded at a time.
        progress: show progress bars.

    Raises:
        ValueError: no metrics, or two embedders of one name.
    """

    @typechecked
    def __init__(
        self, metrics: Sequence[Metric], *, reference: bool = True, batch_size: int = 16, progress: bool = False
    ):
        check_positive(batch_size=batch_size)
        if not metrics:
            raise ValueError('there is nothing to measure; pass at least one metric')
        self.metrics, self.reference, self.batch_size, self.progress = list(metrics), reference, batch_size, progress
        check_names([it.name for it in self.embedders(self.metrics)])
        self.reset()

    @staticmethod
    def embedders(metrics: Sequence[Metric]) -> list[Embedder]:
        """Those that metrics ask for, each once."""
        return list({id(it): it for metric in metrics for it in metric.embedders}.values())

    def reset(self) -> None:
        """Forget all clips."""
        self.seen: dict[bool, set[int]] = {False: set(), True: set()}  # clips, by whether they are of the reference
        for metric in self.metrics:
            metric.reset()

    @typechecked
    def update(
        self,
        audio: Any,
        texts: Sequence[str] | None = None,
        *,
        sample_rate: int | None = None,
        audio_lengths: Any = None,
        is_reference: bool = False,
        first_index: int | None = None,
    ) -> None:
        """Add clips.

        Args:
            audio: waves and files as in `MusicLMEvaluator.evaluate`; or a torch data set of waves `(samples,)`, alone
                or with their texts, which is read as it goes.
            texts: what each clip was made from.
            sample_rate: of the waves, in Hz; by default that of the data set. Files tell their own.
            audio_lengths: true lengths in samples, where waves are padded.
            is_reference: whether these are of the reference.
            first_index: place of the first clip in the set, where these are a shard of it; by default they follow those
                that came before.

        Raises:
            as `MusicLMEvaluator.evaluate`; on every rank what goes wrong on one. What was there before stays.
        """
        clips, name = audio, 'reference_audio' if is_reference else 'generated_audio'
        if isinstance(audio, IterableDataset):
            raise TypeError(f'{name} must have a length and take indices, which {type(audio).__name__} does not')
        if isinstance(audio, Dataset):
            sample_rate = getattr(audio, 'sample_rate', None) if sample_rate is None else sample_rate
        else:
            clips = list_clips(audio, audio_lengths, name=name, lengths=name.replace('audio', 'lengths'))
            if sample_rate is None and all(isinstance(clip, Path) for clip in clips):
                sample_rate = USUAL_RATE  # of no use: files tell their own
        if texts is not None:
            texts = check_texts(texts, len(clips))
        if sample_rate is None:
            raise ValueError(f'nothing tells the rate of the waves of {name}; pass sample_rate in Hz')
        check_sample_rate(sample_rate)
        if is_reference and not self.reference:
            raise ValueError('reference clips come to an evaluator without reference; build it with reference=True')
        seen = self.seen[is_reference]
        first = max(seen, default=-1) + 1 if first_index is None else first_index
        check_not_negative(first_index=first)
        check_apart(seen, added := set(range(first, first + len(clips))))

        def source(place: int) -> tuple[int, Path | tuple[Tensor, int], str | None]:
            clip, text = clips[place], None
            if isinstance(clip, Mapping):
                clip, text = clip['wave'], clip.get('caption')
            elif isinstance(clip, tuple | list):
                clip, text = clip[:2]
            text = text if texts is None else texts[place]
            return first + place, clip if isinstance(clip, Path) else (clip, sample_rate), text

        # what is found goes to twins of the metrics, so that nothing of it stays where something goes wrong
        own = [copy.copy(metric) for metric in self.metrics]
        for metric in own:
            metric.reset()
        asked = [it for it in own if it.uses_reference or not is_reference]
        asked = [it for it in asked if self.reference or not it.needs_reference]
        found: list[dict[str, Any]] | Exception
        try:
            places = range(rank(), len(clips), world_size())
            stream = evaluation_clips(map(source, places), self.embedders(asked), self.batch_size)
            bar = dict(desc=name.removesuffix('_audio'), disable=not self.progress or rank() > 0, leave=False)
            with closing(stream):  # its reader ends here, whatever happens
                for clip in tqdm(stream, unit='clip', total=len(places), **bar):
                    for metric in asked:
                        metric.update(replace(clip, is_reference=is_reference))
            found = [metric.state for metric in own]
        except Exception as error:  # the other ranks, too, must know, or they would wait for what was found
            found = error
        for states in over_ranks(found):
            for metric, state in zip(self.metrics, states):
                metric.merge_state(state)
        seen |= added

    def merge(self, other: Evaluator) -> None:
        """Add what another, of the same metrics, has seen of other clips.

        Raises ValueError for other metrics, and for a clip that both have.
        """
        if list(map(type, self.metrics)) != list(map(type, other.metrics)):
            raise ValueError('evaluators with the same metrics, in the same order, can be merged')
        for side, theirs in other.seen.items():
            check_apart(self.seen[side], theirs)
        for metric, theirs in zip(self.metrics, other.metrics):
            metric.merge(theirs)
        for side in self.seen:
            self.seen[side] |= other.seen[side]

    def compute(self) -> dict[str, dict[str, Any]]:
        """The numbers of all metrics, as `MetricValue`, by group and name.

        Metrics that need a reference say so where there is none. Raises ValueError before the first clip, and for two
        metrics of one name.
        """
        if not self.seen[False]:
            raise ValueError('there are no clips to measure; update comes first')
        results: dict[str, dict[str, Any]] = {}
        for metric in self.metrics:
            found = metric.compute()
            if metric.needs_reference and not self.seen[True]:
                found = each_value(found, lambda _: undefined('it needs reference audio'))
            join(results.setdefault(metric.group, {}), each_value(found, as_value), metric.group)
        return results

    def clip_rows(
        self, names: Sequence[str], texts: Sequence[str] | None = None, *, is_reference: bool = False
    ) -> list[dict[str, Any]]:
        """A row for each clip: its name, its text, and what the metrics say of it, None where that is not defined."""
        rows = [dict(name=name) for name in names]
        for row, text in zip(rows, texts or ()):
            row['text'] = text
        for metric in self.metrics:
            for index, values in metric.clip_values(is_reference).items():
                rows[index] |= values
        return rows


def check_apart(seen: set[int], added: set[int]) -> None:
    if both := seen & added:
        raise ValueError(f'clip {min(both)} comes twice; tell shards of a set apart by first_index')


def each_value(found: Mapping[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """A function of each value in nested dictionaries."""
    nested = {name: isinstance(it, Mapping) for name, it in found.items()}
    return {name: each_value(it, function) if nested[name] else function(it) for name, it in found.items()}


def join(results: dict[str, Any], found: Mapping[str, Any], path: str) -> None:
    """Add nested dictionaries to others. Raises ValueError for a value that is there already."""
    for name, it in found.items():
        if name not in results:
            results[name] = it
        elif isinstance(it, Mapping) and isinstance(results[name], dict):
            join(results[name], it, f'{path}.{name}')
        else:
            raise ValueError(f'two metrics are named {path}.{name}; give one another name')


def over_ranks(found: list[dict[str, Any]] | Exception) -> list[list[dict[str, Any]]]:
    """What each rank found, on every rank.

    Raises the first error that a rank comes with, on every rank, naming that rank: as one of `RAISED_AGAIN` if it is
    one, else as a RuntimeError that names its type.
    """
    if world_size() == 1:
        if isinstance(found, Exception):
            raise found
        return [found]
    own = found
    if isinstance(found, Exception):  # as types that take a message alone, and that may be sent
        kind = next((kind for kind in RAISED_AGAIN if isinstance(found, kind)), RuntimeError)
        own = kind, str(found) if kind in RAISED_AGAIN else f'{type(found).__name__}: {found}'
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, own)
    for place, part in enumerate(parts):
        if isinstance(part, tuple):
            kind, message = part
            raise kind(f'rank {place}: {message}') from (found if isinstance(found, Exception) else None)
    return parts


class MusicLMEvaluator:
    """Measures generated music, with the uncertainty of every mean.

        evaluator = MusicLMEvaluator(mulan=mulan)
        results = evaluator.comprehensive_evaluation(texts, generated_audio, reference_audio)
        results['text_audio_alignment']['mulan_cycle_consistency']  # {'value': 0.41, 'low': 0.38, 'high': 0.44, …}

    Results are nested dictionaries that JSON takes. A metric is a dictionary with `value`, which is None where the
    metric is not defined, and then `reason`; where there are any, with the bounds `low` and `high` of its 95 %
    bootstrap interval over clips, the `count` of clips, the `unit`, and what it is to be read by (see
    `evaluation.metric`).

    Under torch.distributed every rank makes the same calls with the same arguments; the clips are sharded, and every
    rank has the results of one process.

    Args:
        mulan: trained. Embeds audio and text, for distances, alignment and tags.
        device: where to compute, such as 'cuda'; the model is moved there. By default where it is.
        embedders: further ones for the distances, such as `VGGishEmbedder`; a `CLAPEmbedder` gives the CLAP score, too.
        tagger: for the divergence of tags from the reference; by default MuLaN itself, zero-shot.
        metrics: of your own, beside those of each group; see `Metric`.
        batch_size: clips embedded at a time.
        seed: of all resampling.
        name: what reports call this MuLaN, such as the folder that it came from.
        progress: show progress bars.

    Raises:
        ValueError: a device that is not there, or two embedders of one name.
    """

    @typechecked
    def __init__(
        self,
        mulan: nn.Module,
        device: str | torch.device | None = None,
        *,
        embedders: Sequence[Embedder] = (),
        tagger: Tagger | None = None,
        metrics: Sequence[Metric] = (),
        batch_size: int = 16,
        seed: int = 0,
        name: str = 'MuLaN',
        progress: bool = False,
    ):
        mulan = own_mulan(mulan)
        check_positive(batch_size=batch_size)
        check_not_negative(seed=seed)
        if device is not None:
            mulan.to(check_device(device))
        check_names(['mulan', 'tags', *(it.name for it in embedders)])
        if wrong := [metric.group for metric in metrics if metric.group not in GROUPS]:
            raise ValueError(f'the group of a metric must be one of {", ".join(GROUPS)}, got {wrong[0]!r}')
        self.mulan, self.embedders, self.tagger, self.metrics = mulan, list(embedders), tagger, list(metrics)
        self.batch_size, self.seed, self.name, self.progress = batch_size, seed, name, progress

    def __repr__(self) -> str:
        others = [it.name for it in self.embedders] + ([] if self.tagger is None else [type(self.tagger).__name__])
        with_others = f', with {", ".join(others)}' if others else ''
        return f'{type(self).__name__}(seed={self.seed}{with_others},\n  {self.name}: {indented(self.mulan)})'

    def comprehensive_evaluation(
        self,
        texts: Sequence[str],
        generated_audio: Any,
        reference_audio: Any = None,
        audio_lengths: Any = None,
        **keywords: Any,
    ) -> dict[str, Any]:
        """All groups of `evaluate`, whose further keywords it takes: texts and the audio made from them."""
        return self.evaluate(generated_audio, reference_audio, texts=texts, audio_lengths=audio_lengths, **keywords)

    def audio_quality(self, generated_audio: Any, reference_audio: Any = None, **keywords: Any) -> dict[str, Any]:
        """The group of this name alone; see `evaluate`."""
        return self.evaluate(generated_audio, reference_audio, groups=['audio_quality'], **keywords)['audio_quality']

    def text_audio_alignment(self, texts: Sequence[str], generated_audio: Any, **keywords: Any) -> dict[str, Any]:
        """The group of this name alone; see `evaluate`."""
        found = self.evaluate(generated_audio, texts=texts, groups=['text_audio_alignment'], **keywords)
        return found['text_audio_alignment']

    def music_structure(self, generated_audio: Any, reference_audio: Any = None, **keywords: Any) -> dict[str, Any]:
        """The group of this name alone; see `evaluate`."""
        found = self.evaluate(generated_audio, reference_audio, groups=['music_structure'], **keywords)
        return found['music_structure']

    @typechecked
    def evaluate(
        self,
        generated_audio: Any,
        reference_audio: Any = None,
        *,
        texts: Sequence[str] | None = None,
        audio_lengths: Any = None,
        reference_lengths: Any = None,
        sample_rate: int | None = None,
        paired: bool = False,
        groups: Collection[str] = tuple(GROUPS),
    ) -> dict[str, Any]:
        """Measure generated clips.

        Args:
            generated_audio: a list of waves `(samples,)` or `(1, samples)`, or of sound files; or a batch
                `(b, samples)`. Several channels are mixed down, before the signal is measured, too.
            reference_audio: the same of real music. Distances and divergences need it.
            texts: what each generated clip was made from.
            audio_lengths, reference_lengths: true lengths in samples, where waves are padded.
            sample_rate: of the waves, in Hz; by default MuLaN's own. Files tell their own.
            paired: whether the reference clip i belongs to the generated clip i, such as to the same caption: then the
                divergence of tags is that of pairs, which papers report.
            groups: which of 'audio_quality', 'text_audio_alignment' and 'music_structure' to compute.

        Returns:
            a dictionary of metrics for each group; `clips` and, with references, `reference_clips`: a row for each clip
            with its own values; `about`: what it was computed with.

            - audio_quality: `frechet_audio_distance`, `frechet_infinity`, `kernel_audio_distance`, each by embedder;
              `tags`, the divergences of a tagger's outputs; `signal`, means over clips of what `signal_quality`
              measures.
            - text_audio_alignment: see `alignment_figures`; `clap_…` with a `CLAPEmbedder`.
            - music_structure: `generated`, means over clips of what `structure_of` measures; with references
              `reference`, and `distance` between the two.

        Raises:
            TypeError, ValueError, FileNotFoundError: clips or texts that are none, naming the first; other numbers of
            clips, texts or lengths; alignment without texts; pairs that are none.
        """
        unknown = set(groups) - set(GROUPS)
        if unknown or not groups:
            raise ValueError(f'groups must be some of {", ".join(GROUPS)}, got {sorted(unknown) or "none"}')
        generated, reference = list_clips(generated_audio, audio_lengths), None
        if reference_audio is not None:
            names = dict(name='reference_audio', lengths='reference_lengths')
            reference = list_clips(reference_audio, reference_lengths, **names)
        if paired and len(reference or ()) != len(generated):
            raise ValueError(
                f'got {len(generated)} generated and {len(reference or ())} reference clips, which are no pairs; leave '
                'out paired'
            )
        if texts is None and 'text_audio_alignment' in groups:
            raise ValueError('text–audio alignment needs texts, one a clip; pass them, or other groups')
        rate = self.rate_of(sample_rate)

        metrics = [it for it in self.metrics_of(rate, paired) if it.group in groups]
        compared = reference is not None and any(it.uses_reference for it in metrics)
        evaluator = Evaluator(metrics, reference=compared, batch_size=self.batch_size, progress=self.progress)
        evaluator.update(generated, texts, sample_rate=rate)
        if compared:
            evaluator.update(reference, sample_rate=rate, is_reference=True)

        found = evaluator.compute()
        results = dict(about=self.about(rate, generated, reference)) | {it: found[it] for it in GROUPS if it in found}
        results['clips'] = evaluator.clip_rows(names_of(generated), texts)
        if compared:
            results['reference_clips'] = evaluator.clip_rows(names_of(reference), is_reference=True)
        return to_json(results)

    def metrics_of(self, rate: int, paired: bool) -> list[Metric]:
        """All metrics, of waves at a rate in Hz."""
        seed = dict(seed=self.seed)
        mulan = MuLaNEmbedder(self.mulan, **self.windows(rate), batch_size=self.batch_size, sample_rate=rate)
        claps = [it for it in self.embedders if isinstance(it, CLAPEmbedder)]
        return [
            TextAudioAlignment(mulan, **seed),
            *(TextAudioAlignment(it, 'score', f'{it.name}_', **seed) for it in claps),
            *(FrechetAudioDistance(it, **seed) for it in (mulan, *self.embedders)),
            *(KernelAudioDistance(it, **seed) for it in (mulan, *self.embedders)),
            TagDivergence(self.tagger or mulan, paired=paired, **seed),
            SignalQuality(**seed),
            MusicStructure(**seed),
            *self.metrics,
        ]

    def embed_texts(self, texts: list[str]) -> Tensor:
        """As `MuLaNEmbedder.embed_texts`."""
        return MuLaNEmbedder(self.mulan, sample_rate=self.mulan.sample_rate or USUAL_RATE).embed_texts(texts)

    def rate_of(self, sample_rate: int | None) -> int:
        """The rate of the waves in Hz."""
        if sample_rate is not None:
            check_sample_rate(sample_rate)
            return sample_rate
        if self.mulan.sample_rate is None:
            logger.warning(
                'neither sample_rate nor the model tells the rate of the waves; %d Hz is assumed', USUAL_RATE
            )
        return self.mulan.sample_rate or USUAL_RATE

    def windows(self, rate: int) -> dict[str, float]:
        """MuLaN's windows in seconds, as long as its tower takes."""
        window = self.mulan.window(WINDOW, rate)
        return dict(window_seconds=window, hop_seconds=min(HOP, window))

    def about(self, rate: int, generated: Sequence[Any], reference: Sequence[Any] | None) -> dict[str, Any]:
        """What the results depend on besides the clips."""
        weights = sum(it.double().sum().item() for it in self.mulan.state_dict().values())
        return dict(
            musiclm_pytorch=__version__,
            clips=len(generated),
            reference_clips=len(reference or ()),
            reference=None if reference is None else fingerprint_of(reference),
            sample_rate=rate,
            seed=self.seed,
            name=self.name,
            # no proof of equality, but a sign of difference
            mulan=f'sum of weights {weights:.6g}',
            tagger='mulan, zero-shot'
            if self.tagger is None
            else f'{type(self.tagger).__name__} {self.tagger.tags[:3]}',
            embedders=['mulan', *(it.name for it in self.embedders)],
        )


def names_of(clips: Sequence[Tensor | Path]) -> list[str]:
    return [clip.name if isinstance(clip, Path) else f'clip {index}' for index, clip in enumerate(clips)]


def fingerprint_of(clips: Sequence[Tensor | Path]) -> str:
    """Tells sets of clips apart: by the names and sizes of files, the samples of waves."""
    digest = hashlib.sha256()
    for clip in clips:
        known = os.fsencode(f'{clip.name} {clip.stat().st_size}') if isinstance(clip, Path) else clip.numpy().tobytes()
        digest.update(hashlib.sha256(known).digest())
    return digest.hexdigest()[:16]


def load_mulan(
    folder: str | Path, *, device: str | torch.device = 'cpu', dtype: torch.dtype | None = None
) -> JointEmbedding:
    """The MuLaN, or what stands in its place, in a folder that it or a MusicLM was saved to, or of a model that ships
    or of the Hugging Face Hub, by its name.

    `device`, `dtype` and errors are as in `MuLaN.from_pretrained`.
    """
    folder = find_pretrained(folder)
    if saved_kind(folder) == 'MusicLM':
        told = read_json_object(folder / 'quantizer' / CONFIG_FILE).get(NOT_SAVED)
        if isinstance(told, dict):
            raise ValueError(
                f'{folder} was saved without its {told.get("kind")}, which cannot be rebuilt from a folder: pass that '
                'object itself, as in MusicLMEvaluator(mulan=...) and MuLaNIndex(...), or name another model'
            )
        folder = folder / 'quantizer' / MULAN_FOLDER
    return load_joint(folder, device=device, dtype=dtype)
