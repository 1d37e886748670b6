"""One call that measures generated music: quality, fit to the text, structure."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_pytorch.checks import check_device, check_positive, check_sample_rate, typechecked
from musiclm_pytorch.evaluation.alignment import alignment_figures
from musiclm_pytorch.evaluation.embedders import CLAPEmbedder, Embedder, MuLaNEmbedder
from musiclm_pytorch.evaluation.figures import Figure, to_json, undefined
from musiclm_pytorch.evaluation.frechet import frechet_audio_distance, frechet_infinity
from musiclm_pytorch.evaluation.inputs import check_texts, list_clips
from musiclm_pytorch.evaluation.kernel import kernel_audio_distance
from musiclm_pytorch.evaluation.measuring import Measured, TaggerEmbedder, measure
from musiclm_pytorch.evaluation.quality import summarise_quality
from musiclm_pytorch.evaluation.structure import summarise_structure
from musiclm_pytorch.evaluation.structure_scores import compare_structure
from musiclm_pytorch.evaluation.tagging import Tagger, ZeroShotTagger, kl_figures
from musiclm_pytorch.mulan.checkpoint import CONFIG_FILE, read_json_object, saved_kind
from musiclm_pytorch.mulan.display import indented
from musiclm_pytorch.mulan.layers import l2norm
from musiclm_pytorch.mulan.model import JointEmbedding, evaluating
from musiclm_pytorch.mulan.pretrained import load_joint, own_mulan
from musiclm_pytorch.mulan.vocabulary import unknown_words_line
from musiclm_pytorch.pretrained import find_pretrained
from musiclm_pytorch.quantizer import MULAN_FOLDER, NOT_SAVED
from musiclm_pytorch.version import __version__

logger = logging.getLogger(__name__)

GROUPS = ('audio_quality', 'text_audio_alignment', 'music_structure')
USUAL_RATE = 16000  # Hz, where neither the caller nor the model tells
WINDOW, HOP = 10.0, 1.0  # seconds: MuLaN's windows and their stride (MusicLM, arXiv 2301.11325, section 4.1)
TEXTS_AT_ONCE = 64


class MusicLMEvaluator:
    """Measures generated music, with the uncertainty of every mean.

        evaluator = MusicLMEvaluator(mulan=mulan)
        results = evaluator.comprehensive_evaluation(texts, generated_audio, reference_audio)
        results['text_audio_alignment']['mulan_cycle_consistency']  # {'value': 0.41, 'low': 0.38, 'high': 0.44, …}

    Results are nested dictionaries that JSON takes. A figure is a dictionary with `value`, which is None where the
    figure is not defined, and then `reason`; where there are any, with the bounds `low` and `high` of its 95 %
    bootstrap interval over clips, the `count` of clips, the `unit`, and what it is to be read by (see
    `evaluation.figures`).

    Under torch.distributed every rank makes the same calls with the same arguments; the clips are dealt out, and every
    rank has the results of one process.

    Args:
        mulan: trained. Embeds audio and text, for distances, alignment and tags.
        device: where to compute, such as 'cuda'; the model is moved there. By default where it is.
        embedders: further ones for the distances, such as `VGGishEmbedder`; a `CLAPEmbedder` gives the CLAP score, too.
        tagger: for the divergence of tags from the reference; by default MuLaN itself, zero-shot.
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
        batch_size: int = 16,
        seed: int = 0,
        name: str = 'MuLaN',
        progress: bool = False,
    ):
        mulan = own_mulan(mulan)
        check_positive(batch_size=batch_size)
        if seed < 0:
            raise ValueError(f'seed must be 0 or more, got {seed}')
        if device is not None:
            mulan.to(check_device(device))
        names = ['mulan', 'tags', *(it.name for it in embedders)]
        if len(set(names)) < len(names):
            raise ValueError(f'embedders need names of their own, got {", ".join(names)}')
        self.mulan, self.embedders, self.tagger = mulan, list(embedders), tagger
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
        return self.evaluate(generated_audio, reference_audio, groups=['music_structure'], **keywords)[
            'music_structure'
        ]

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
        groups: Collection[str] = GROUPS,
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
            a dictionary of figures for each group; `clips` and, with references, `reference_clips`: a row for each clip
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
        generated = list_clips(generated_audio, audio_lengths)
        reference = None
        if reference_audio is not None:
            reference = list_clips(
                reference_audio, reference_lengths, name='reference_audio', lengths='reference_lengths'
            )
        if paired and len(reference or ()) != len(generated):
            raise ValueError(
                f'got {len(generated)} generated and {len(reference or ())} reference clips, which are no pairs; leave '
                'out paired'
            )
        if texts is not None:
            texts = check_texts(texts, len(generated))
        elif 'text_audio_alignment' in groups:
            raise ValueError('the fit to the text needs texts, one a clip; pass them, or other groups')
        rate = self.rate_of(sample_rate)

        mulan = MuLaNEmbedder(self.mulan, **self.windows(rate), batch_size=self.batch_size, sample_rate=rate)
        own = self.measure(generated, rate, groups, mulan, 'generated', has_reference=reference is not None)
        other = None
        if reference is not None and set(groups) - {'text_audio_alignment'}:
            kept = [group for group in groups if group != 'text_audio_alignment']
            other = self.measure(reference, rate, kept, mulan, 'reference', has_reference=True)

        results: dict[str, Any] = dict(about=self.about(rate, generated, reference))
        if 'audio_quality' in groups:
            results['audio_quality'] = self.quality(own, other, paired)
        if 'text_audio_alignment' in groups:
            results['text_audio_alignment'] = self.alignment(own, texts)
        if 'music_structure' in groups:
            results['music_structure'] = structure_group(own, other, self.seed)
        cosines = results.get('text_audio_alignment', {}).pop('cosines', {})
        results['clips'] = rows(generated, own, texts, cosines)
        if other is not None:
            results['reference_clips'] = rows(reference, other, None, {})
        return to_json(results)

    def measure(
        self,
        clips: list[Tensor | Path],
        rate: int,
        groups: Collection[str],
        mulan: MuLaNEmbedder,
        label: str,
        *,
        has_reference: bool,
    ) -> Measured:
        """All that the groups need of some clips."""
        embedders: list[Embedder] = []
        distances = 'audio_quality' in groups and has_reference
        if distances or 'text_audio_alignment' in groups:
            embedders.append(mulan)
            embedders += [it for it in self.embedders if distances or isinstance(it, CLAPEmbedder)]
        if distances and self.tagger is not None:
            embedders.append(TaggerEmbedder(self.tagger))
        return measure(
            clips,
            rate,
            quality='audio_quality' in groups,
            structure='music_structure' in groups,
            embedders=embedders,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=self.progress,
            label=label,
        )

    def quality(self, own: Measured, other: Measured | None, paired: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        measures = dict(
            frechet_audio_distance=lambda name: frechet_audio_distance(
                other.statistics[name].total(), own.statistics[name].total(), embedding=name
            ),
            frechet_infinity=lambda name: frechet_infinity(
                other.statistics[name].total(), own.statistics[name], embedding=name
            ),
            kernel_audio_distance=lambda name: kernel_audio_distance(
                other.samples[name], own.samples[name], embedding=name
            ),
        )
        names = ['mulan', *(it.name for it in self.embedders)]
        for measure_name, distance in measures.items():
            found[measure_name] = {
                name: undefined('it needs reference audio') if other is None else distance(name) for name in names
            }
        found['tags'] = self.tags(own, other, paired)
        signal = summarise_quality([own.quality[index] for index in sorted(own.quality)], seed=self.seed)
        found['signal'] = {name: it for name, it in signal.items() if name != 'clips'}
        return found

    def tags(self, own: Measured, other: Measured | None, paired: bool) -> dict[str, Figure]:
        """Divergences between the tags of generated and reference clips."""
        if other is None:
            return dict(kl=undefined('it needs reference audio'))
        name = 'mulan' if self.tagger is None else 'tags'
        places, other_places = own.means[name], other.means[name]
        if paired:  # where both have one
            places = other_places = places.keys() & other_places.keys()
        (_, own_rows), (_, other_rows) = own.rows(name, places), other.rows(name, other_places)
        if not len(own_rows) or not len(other_rows):
            return dict(kl=undefined('no clip is long enough for the tagger'))
        if self.tagger is None:
            tagger = ZeroShotTagger(self.mulan)
            own_rows, other_rows = tagger.probabilities_of(own_rows), tagger.probabilities_of(other_rows)
        else:  # of length 1 as all means, but what adds up to 1 is a distribution
            own_rows, other_rows = (it / it.sum(dim=1, keepdim=True) for it in (own_rows, other_rows))
        return kl_figures(own_rows, other_rows, paired=paired, seed=self.seed)

    def alignment(self, own: Measured, texts: list[str]) -> dict[str, Any]:
        kept, audio = own.rows('mulan', own.means['mulan'])
        if kept:
            told = [texts[index] for index in kept]
            found: dict[str, Any] = alignment_figures(audio, self.embed_texts(told), told, seed=self.seed)
            found['cosines'] = dict(zip(kept, found['cosines']))
        else:
            found = nothing_aligned(own.missing['mulan'][0], 'mulan_cycle_consistency')
        for embedder in self.embedders:
            if isinstance(embedder, CLAPEmbedder):
                kept, audio = own.rows(embedder.name, own.means[embedder.name])
                told = [texts[index] for index in kept]
                if kept:
                    clap = alignment_figures(audio, embedder.embed_texts(told), told, name='score', seed=self.seed)
                else:
                    clap = nothing_aligned(own.missing[embedder.name][0], 'score')
                found |= {f'clap_{name}': it for name, it in clap.items() if name != 'cosines'}
        return found

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """MuLaN's latents of texts, `(n, dim_latent)`; a text gives the same wherever it stands. Words that MuLaN does
        not know are told in the log: what it says of these texts means little."""
        different = list(dict.fromkeys(texts))
        unknown = [words for text in different if (words := self.mulan.text.unknown_words(text))]
        if unknown:
            line = unknown_words_line(list(dict.fromkeys(chain.from_iterable(unknown))), None)
            logger.warning('%s, in %d of %d different texts', line, len(unknown), len(different))
        batches = [different[i : i + TEXTS_AT_ONCE] for i in range(0, len(different), TEXTS_AT_ONCE)]
        with evaluating(self.mulan):
            latents = torch.cat([self.mulan.get_text_latents(raw_texts=batch).cpu() for batch in batches])
        places = {text: place for place, text in enumerate(different)}
        return latents[[places[text] for text in texts]]

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
        longest = self.mulan.audio.max_audio_length
        own_rate = self.mulan.sample_rate or rate
        window = WINDOW if longest is None else min(WINDOW, longest / own_rate)
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


def nothing_aligned(reason: str, name: str) -> dict[str, Figure]:
    """The figures of `alignment_figures` where no clip can be embedded."""
    one = l2norm(torch.ones(1, 2))
    names = [it for it in alignment_figures(one, one, name=name) if it != 'cosines']
    return dict.fromkeys(names, undefined(f'no clip can be embedded, such as the first: {reason}'))


def structure_group(own: Measured, other: Measured | None, seed: int) -> dict[str, Any]:
    sides = dict(generated=own) | ({} if other is None else dict(reference=other))
    results = {side: [it.structure[index] for index in sorted(it.structure)] for side, it in sides.items()}
    found: dict[str, Any] = {side: summarise_structure(it, seed=seed) for side, it in results.items()}
    if other is not None:
        found['distance'] = compare_structure(results['generated'], results['reference'])
    return found


def rows(
    clips: Sequence[Tensor | Path], found: Measured, texts: list[str] | None, cosines: dict[int, float]
) -> list[dict[str, Any]]:
    """The values of each clip: numbers, the key as a word, None where a value is not defined."""
    table = []
    for index, clip in enumerate(clips):
        row: dict[str, Any] = dict(name=clip.name if isinstance(clip, Path) else f'clip {index}')
        if texts is not None:
            row['text'] = texts[index]
        if cosines:
            row['cosine'] = cosines.get(index)
        row |= {name: it.value for name, it in found.quality.get(index, {}).items()}
        if index in found.structure:
            structure = found.structure[index]
            row |= {name: it.value for name, it in structure.figures().items()} | dict(key=structure.key)
        table.append(row)
    return table


def fingerprint_of(clips: Sequence[Tensor | Path]) -> str:
    """Tells sets of clips apart: by the names and sizes of files, the samples of waves."""
    digest = hashlib.sha256()
    for clip in clips:
        known = f'{clip.name} {clip.stat().st_size}'.encode() if isinstance(clip, Path) else clip.numpy().tobytes()
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
