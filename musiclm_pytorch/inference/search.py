"""Search among clips by words or by sound: an index of MuLaN's latents, on disk as safetensors and JSON."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from musiclm_pytorch.atomic import checked_json, checksum_of, read_checked_json, read_tensors, write_tensors, write_text
from musiclm_pytorch.audiolm.fingerprints import fingerprint
from musiclm_pytorch.checks import check_finite, check_positive, typechecked
from musiclm_pytorch.evaluation.tagging import MUSIC_TAGS, TEMPLATES, ZeroShotTagger
from musiclm_pytorch.extras import how_to_install
from musiclm_pytorch.mulan.checkpoint import CONFIG_FILE, WEIGHTS
from musiclm_pytorch.mulan.layers import l2norm
from musiclm_pytorch.mulan.model import JointEmbedding, evaluating
from musiclm_pytorch.mulan.pretrained import own_mulan
from musiclm_pytorch.mulan.text_transformer import unknown_words_line

logger = logging.getLogger(__name__)

INDEX_FILE = 'index.json'
VERSION = 1  # of the files
# What is looked at besides the k nearest: float32 products of unit vectors err by less than TOLERANCE, so whoever lies
# that near to the k-th is weighed again in float64. Thus both backends give the same, ties by place included.
TOLERANCE, SPARE = 1e-5, 16
MOST_NUMBERS = 2**24  # scores or products held at a time


class Match(NamedTuple):
    """One result of a search.

    Attributes:
        name: of the clip, as it was added
        score: cosine with the query
    """

    name: str
    score: float


class MuLaNIndex:
    """Named clips by MuLaN's latents, to search by words or by sound; exact, not approximate.

        index = MuLaNIndex(mulan)
        index.add(['a.wav', 'b.wav'], latents)  # (2, dim_latent)
        index.search_text('slow piano', k=1)  # [Match('b.wav', 0.42)]

    Args:
        mulan: whose latents they are; needed to search by text or audio, and for tags.
        dim: width of the latents, without a MuLaN.
        backend: 'faiss', 'torch', or 'auto', which is faiss where it is installed. Both give the same results.
        about: plain facts to keep with the index, such as where its clips lie.

    Raises:
        ValueError: neither `mulan` nor `dim`, or two that differ. ImportError: faiss asked for by name and missing.
    """

    @typechecked
    def __init__(
        self,
        mulan: nn.Module | None = None,
        *,
        dim: int | None = None,
        backend: Literal['auto', 'faiss', 'torch'] = 'auto',
        about: dict[str, Any] | None = None,
    ):
        check_positive(dim=dim)
        mulan = None if mulan is None else own_mulan(mulan)
        if mulan is None and dim is None:
            raise ValueError('an index needs a MuLaN, or else dim, the width of its latents')
        if mulan is not None and dim not in (None, mulan.dim_latent):
            raise ValueError(f'the index is {dim} wide, but the latents of this MuLaN {mulan.dim_latent}')
        has_faiss = importlib.util.find_spec('faiss') is not None
        if backend == 'faiss' and not has_faiss:
            raise ImportError(f'backend="faiss" needs the package faiss-cpu: {how_to_install("search")}')
        self.mulan = mulan
        self.dim = dim if mulan is None else mulan.dim_latent
        self.backend = ('faiss' if has_faiss else 'torch') if backend == 'auto' else backend
        self.about = dict(about or {})
        self.names: list[str] = []
        # with which weights the latents were made; that of an index made without a model is not known
        self.fingerprint = None if mulan is None else fingerprint(mulan)['weights']
        self._blocks: list[Tensor] = []

    def __repr__(self) -> str:
        model = 'without a MuLaN' if self.mulan is None else 'with its MuLaN'
        return f'{type(self).__name__}({len(self)} clips, latents of {self.dim}, {self.backend}, {model})'

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.names)

    @property
    def vectors(self) -> Tensor:
        """`(n, dim)` float32, of length 1, in the order of `names`."""
        if len(self._blocks) != 1:
            self._blocks = [torch.cat(self._blocks) if self._blocks else torch.empty(0, self.dim, dtype=torch.float32)]
        return self._blocks[0]

    @typechecked
    def add(self, names: Sequence[str | Path], latents: Tensor) -> None:
        """Add clips; all of them, or none after an error.

        Args:
            names: one a clip, each once in an index.
            latents: `(n, dim)` floats, of any length but 0: only their direction counts.

        Raises:
            ValueError: another shape, NaN, infinity, zeros, a name that is there already.
        """
        if isinstance(names, str):
            raise TypeError(f'names must be a list of strings, got the string {names!r:.80}')
        added = [str(name) for name in names]
        if latents.ndim != 2 or tuple(latents.shape) != (len(added), self.dim):
            raise ValueError(f'latents must have shape ({len(added)}, {self.dim}), got {tuple(latents.shape)}')
        known = set(self.names)
        for name in added:
            if name in known:
                raise ValueError(f'{name!r} is in the index already; give each clip a name of its own')
            known.add(name)
        if added:
            self._blocks.append(unit_vectors(latents, 'latents'))
            self.names += added

    @typechecked
    def remove(self, names: Sequence[str | Path]) -> None:
        """Take clips out, such as those whose files are gone. Raises ValueError for a name that is not in the index."""
        removed = set(map(str, names))
        if unknown := removed - set(self.names):
            raise ValueError(f'no clip {min(unknown)!r} in the index')
        kept = [row for row, name in enumerate(self.names) if name not in removed]
        self._blocks = [self.vectors[kept]]
        self.names = [self.names[row] for row in kept]

    # searching

    @typechecked
    def nearest(self, queries: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """The clips nearest to each of several latents, the nearest first; equal ones in the order of `names`.

        Args:
            queries: `(q, dim)` floats.
            k: how many; no more than there are.

        Returns:
            cosines `(q, k)` float32 and places in `names` `(q, k)` int64.

        Raises:
            ValueError: an empty index, another shape, NaN, infinity, zeros.
        """
        check_positive(k=k)
        if len(self) == 0:
            raise ValueError('the index is empty; add clips before searching')
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f'queries must have shape (q, {self.dim}), got {tuple(queries.shape)}')
        queries = unit_vectors(queries, 'queries')
        k = min(k, len(self))
        chunk = max(1, MOST_NUMBERS // max(len(self), (k + SPARE) * self.dim))
        found = [self._nearest(part, k) for part in queries.split(chunk)]
        if not found:
            return torch.empty(0, k, dtype=torch.float32), torch.empty(0, k, dtype=torch.long)
        scores, rows = zip(*found)
        return torch.cat(scores), torch.cat(rows)

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rough = self._search(queries)
        fetched = min(k + SPARE, len(self))
        scores, rows = rough(fetched)
        while fetched < len(self) and (scores[:, -1] >= scores[:, k - 1] - TOLERANCE).any():
            fetched = min(2 * fetched, len(self))
            scores, rows = rough(fetched)
        rows = rows.sort(dim=1).values
        # a sum over the last axis, which for each pair is computed the same whatever stands beside it
        exact = (self.vectors[rows].double() * queries[:, None].double()).sum(dim=-1).float()
        scores, order = exact.sort(dim=1, descending=True, stable=True)
        return scores[:, :k], rows.gather(1, order[:, :k])

    def _search(self, queries: Tensor):
        """A function of how many to fetch: approximate cosines, the greatest first, and their rows."""
        vectors = self.vectors
        if self.backend == 'torch':
            products = (vectors @ queries[0])[None] if len(queries) == 1 else queries @ vectors.T
            return lambda count: products.topk(count, dim=1)

        import faiss

        def search(count: int) -> tuple[Tensor, Tensor]:
            # brute force over the very tensor, of which an index of faiss would keep a copy
            found = faiss.knn(queries.numpy(), vectors.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
            scores, rows = map(torch.from_numpy, found)
            return scores, rows

        return search

    @typechecked
    def search_text(self, text: str, k: int = 10) -> list[Match]:
        """The `k` clips that fit a text best. Words that MuLaN does not know are told in the log.

        Raises ValueError for an empty text or index, or one without a MuLaN.
        """
        mulan = self._model('search_text')
        if not text.strip():
            raise ValueError('the text is empty; say what the music is like')
        if unknown := mulan.text.unknown_words(text):
            logger.warning('%s', unknown_words_line(unknown, None))
        with torch.no_grad(), evaluating(mulan):
            latents = mulan.get_text_latents(raw_texts=[text])
        return self._matches(latents, k)

    @typechecked
    def search_audio(
        self,
        audio: Tensor | np.ndarray | str | Path,
        k: int = 10,
        *,
        sample_rate: int | None = None,
        window: float = 10.0,
        hop: float | None = None,
    ) -> list[Match]:
        """The `k` clips that sound most like a wave `(samples,)` or a sound file.

        `window` and `hop`, by default as long, are those of `BatchInferenceEngine.embed_audio_files`, in seconds.
        Raises ValueError and FileNotFoundError as `MuLaN.embed_audio`, for an empty index, or one without a MuLaN.
        """
        mulan = self._model('search_audio')
        if isinstance(audio, (Tensor, np.ndarray)) and audio.ndim != 1:
            raise ValueError(f'audio must be one wave (samples,), got shape {tuple(audio.shape)}')
        latents = mulan.embed_audio(audio, window, window if hop is None else hop, sample_rate)
        return self._matches(latents[None], k)

    def _matches(self, latents: Tensor, k: int) -> list[Match]:
        scores, rows = self.nearest(latents, k)
        return [Match(self.names[row], score) for score, row in zip(scores[0].tolist(), rows[0].tolist())]

    @typechecked
    def tags(
        self,
        tags: Sequence[str] = MUSIC_TAGS,
        k: int = 3,
        *,
        names: Sequence[str] | None = None,
        templates: Sequence[str] = TEMPLATES,
    ) -> list[list[Match]]:
        """The `k` words nearest to each clip, or to those of `names`, with their cosines; see `ZeroShotTagger`."""
        check_positive(k=k)
        if len(self) == 0:
            raise ValueError('the index is empty; add clips before tagging them')
        vectors = self.vectors
        if names is not None:
            places = {name: row for row, name in enumerate(self.names)}
            for name in names:
                if name not in places:
                    raise ValueError(f'no clip {name!r} in the index')
            vectors = vectors[[places[name] for name in names]]
        tagger = ZeroShotTagger(self._model('tags'), tags, templates)
        found = tagger.scores_of(vectors).topk(min(k, len(tags)), dim=1)
        return [
            [Match(tags[place], score) for score, place in zip(*row)]
            for row in zip(found.values.tolist(), found.indices.tolist())
        ]

    def _model(self, user: str) -> JointEmbedding:
        if self.mulan is None:
            raise ValueError(f'{user} needs the MuLaN whose latents these are: MuLaNIndex.load(folder, mulan)')
        return self.mulan

    # saving

    @typechecked
    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the index into a folder: `index.json`, and the vectors beside it in a file named by their content.

        The vectors come first, then `index.json`, which names them, each written aside and renamed. So whenever it is
        interrupted, the folder holds the index from before or the new one.

        Raises:
            FileExistsError: the folder has an index, and `overwrite` is not set; or is the folder of something else.
            ValueError: an empty index.
        """
        folder = Path(folder)
        if len(self) == 0:
            raise ValueError('the index is empty; add clips before saving it')
        check_free(folder, overwrite)
        vectors = self.vectors.contiguous()
        digest = hashlib.sha256(vectors.numpy().tobytes()).hexdigest()[:16]
        content = dict(
            version=VERSION,
            dim=self.dim,
            vectors=f'vectors-{digest}.safetensors',
            weights=[checksum_of(dict(vectors=vectors))],
            fingerprint=self.fingerprint,
            about=self.about,
            names=self.names,
        )
        text = checked_json(content, indent=1)
        before = list(folder.glob('vectors-*.safetensors'))
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / content['vectors']
        try:
            write_tensors(new, dict(vectors=vectors))
            write_text(folder / INDEX_FILE, text)
        except BaseException:
            if new not in before:
                new.unlink(missing_ok=True)
            if is_new:
                folder.rmdir()
            raise
        for path in before:
            if path.name != content['vectors']:
                path.unlink(missing_ok=True)

    @classmethod
    @typechecked
    def load(
        cls,
        folder: str | Path,
        mulan: nn.Module | None = None,
        *,
        backend: Literal['auto', 'faiss', 'torch'] = 'auto',
        verify: bool = True,
    ) -> MuLaNIndex:
        """An index that `save` wrote. Nothing in the files is run.

        `verify` refuses files whose content is not what was written, by the checksum in them.

        Raises:
            FileNotFoundError: no index there. ValueError: damaged files, or the latents of another MuLaN.
        """
        content = read_index(folder, verify)
        index = cls(mulan, dim=content['dim'], backend=backend, about=content['about'])
        if mulan is not None and content['fingerprint'] not in (None, index.fingerprint):
            raise ValueError(f'the index in {folder} was made with another MuLaN; load the one it was made with')
        index.fingerprint = content['fingerprint']
        path = Path(folder) / content['vectors']
        if not path.is_file():
            raise FileNotFoundError(f'no {path.name} in {folder}, which its {INDEX_FILE} names')
        try:
            vectors = read_tensors(path, verify, checksums=content.get(WEIGHTS))['vectors']
        except KeyError as error:
            raise ValueError(f'{path} is damaged: it holds no {error}') from error
        try:
            index.add(content['names'], vectors)
        except (TypeError, ValueError) as error:
            raise ValueError(f'{path} and {INDEX_FILE} beside it do not fit: {error}') from error
        index._blocks = [vectors.float()]  # bit for bit, so that results are those from before
        return index


def unit_vectors(latents: Tensor, name: str) -> Tensor:
    """`(n, dim)` as float32 on the CPU, of length 1. Raises TypeError, ValueError for what has no direction."""
    if not latents.is_floating_point():
        raise TypeError(f'{name} must be a floating-point tensor, got {latents.dtype}')
    latents = latents.detach().float().cpu()
    if len(latents):
        check_finite(latents, f'{name}[{{}}] holds NaN or infinity')
        zero = (latents == 0).all(dim=1)
        if zero.any():
            raise ValueError(f'{name}[{int(zero.nonzero()[0])}] is all zeros, which has no direction')
        # squares of very large and very small numbers are lost in float32
        latents = latents / latents.abs().amax(dim=1, keepdim=True)
    return l2norm(latents).contiguous()


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless an index may be written into a folder."""
    if (folder / INDEX_FILE).exists():
        if not overwrite:
            told = 'give another folder, or overwrite=True (--overwrite)'
            raise FileExistsError(f'{folder} holds an index already; {told}')
    elif folder.exists() and not folder.is_dir():
        raise FileExistsError(f'{folder} is a file; give a folder for the index')
    elif (folder / CONFIG_FILE).exists():
        raise FileExistsError(f'{folder} is the folder of a model; give one of its own for the index')


def read_index(folder: str | Path, verify: bool = True) -> dict[str, Any]:
    """What `index.json` in a folder holds. Raises FileNotFoundError, ValueError for a damaged one."""
    path = Path(folder) / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(f'no {INDEX_FILE} in {folder}; expected a folder written by MuLaNIndex.save')
    kinds = dict(version=int, dim=int, vectors=str, fingerprint=(str, type(None)), about=dict, names=list)
    content = read_checked_json(path, verify)
    try:
        wrong = [name for name, kind in kinds.items() if not isinstance(content[name], kind)]
    except (KeyError, TypeError) as error:
        raise ValueError(f'{path} is not the {INDEX_FILE} of an index: {error!r}') from error
    wrong += [WEIGHTS] * (not isinstance(content.get(WEIGHTS, []), list))
    if wrong or content['dim'] < 1 or not all(isinstance(name, str) for name in content['names']):
        raise ValueError(f'{path} is not the {INDEX_FILE} of an index: {(wrong or ["names or dim"])[0]} is wrong')
    if content['version'] > VERSION:
        raise ValueError(f'{path} is of version {content["version"]}; this library reads {VERSION}; update it')
    if Path(content['vectors']).name != content['vectors']:
        raise ValueError(f'{path} names {content["vectors"]!r}, which does not lie beside it')
    return content
