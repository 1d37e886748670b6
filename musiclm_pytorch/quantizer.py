"""MuLaN latents to conditioning: residual vector quantization, and an embedding of each code for each stage."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader

from musiclm_pytorch.atomic import written_together
from musiclm_pytorch.audiolm.convert import passes_as
from musiclm_pytorch.audiolm.fingerprints import fingerprint
from musiclm_pytorch.checks import as_tensor, check_positive, check_probability, records_config, typechecked
from musiclm_pytorch.codecs.melody import MelodyEmbedding, MelodyQuantizer
from musiclm_pytorch.data.collate import collate_for
from musiclm_pytorch.data.rates import rate_of
from musiclm_pytorch.mulan import checkpoint
from musiclm_pytorch.mulan.display import indented
from musiclm_pytorch.mulan.model import JointEmbedding, evaluating
from musiclm_pytorch.mulan.pretrained import PretrainedMuLaN, load_joint, own_mulan
from musiclm_pytorch.pretrained.hub import HubModel, find_folder

logger = logging.getLogger(__name__)

MULAN_FOLDER, MELODY_FOLDER = 'mulan', 'melody'
MELODY_NAMESPACE = 'semantic'  # of the stage that melodies condition, as in MusicLM
NOT_SAVED = 'mulan_not_saved'  # where a config tells of a joint embedding that has to be given
PROBE = 'a slow piano melody'  # the text that one without weights is known by


@passes_as('AudioConditionerBase')
class MuLaNEmbedQuantizer(HubModel, nn.Module):
    """Turns waves or texts into the conditioning of AudioLM's stages (MusicLM, arXiv 2301.11325, section 3.2).

    A latent of MuLaN becomes `rq_num_quantizers` codes by residual vector quantization; each namespace, one a stage,
    has an embedding of its own for every code of every level.

        quantizer = MuLaNEmbedQuantizer(mulan, conditioning_dims=(1024, 1024, 1024))
        quantizer.fit(dataset)
        conditioning = quantizer(wavs=wavs, namespace='coarse')  # (b, 8, 1024)

    `fit` learns the codebooks from many latents and freezes them. A quantizer that was never fitted learns them as
    musiclm-pytorch 0.2.8 does, by an exponential moving average over whatever batches pass in training mode, and
    refuses to work in eval mode. Loading a state dict counts as fitting.

    `parameters()` are the conditioning embeddings alone, which are trained with their stages; MuLaN is never trained
    here. With `add_melody`, the semantic stage is told a melody, too.

    Args:
        mulan: a trained MuLaN, a `PretrainedMuLaN`, or a module that this takes.
        conditioning_dims: width of the conditioning of each namespace, that of its transformer.
        rq_num_quantizers: levels of quantization.
        rq_ema_decay: of the moving average, where `fit` is not used.
        codebook_size: codes of each level.
        namespaces: names of the stages.
        cond_drop_prob: in training, the conditioning of that share of the items is all zeros, the null condition that
            classifier-free guidance compares with (arXiv 2207.12598).
        sample_rate: rate in Hz of the waves given, where a call does not say; by default MuLaN's own.

    Raises:
        ValueError: namespaces and widths that do not pair up, numbers out of range.
    """

    @records_config
    @typechecked
    def __init__(
        self,
        mulan: nn.Module,
        conditioning_dims: Sequence[int],
        rq_num_quantizers: int = 8,
        rq_ema_decay: float = 0.9,
        codebook_size: int = 1024,
        namespaces: Sequence[str] = ('semantic', 'coarse', 'fine'),
        cond_drop_prob: float = 0.0,
        sample_rate: int | None = None,
    ):
        super().__init__()
        check_positive(rq_num_quantizers=rq_num_quantizers, codebook_size=codebook_size, sample_rate=sample_rate)
        check_probability(cond_drop_prob=cond_drop_prob)
        if isinstance(namespaces, str) or not namespaces or len(set(namespaces)) != len(namespaces):
            raise ValueError(f'namespaces must be one or more different names, got {namespaces!r}')
        if len(conditioning_dims) != len(namespaces):
            raise ValueError(
                f'each namespace needs a width: got {len(conditioning_dims)} conditioning_dims '
                f'{tuple(conditioning_dims)} for {len(namespaces)} namespaces {tuple(namespaces)}'
            )
        for name, dim in zip(namespaces, conditioning_dims):
            check_positive(**{f'conditioning_dims of {name!r}': dim})

        mulan = own_mulan(mulan)
        self.mulan = mulan
        self.namespaces = tuple(namespaces)
        self.conditioning_dims = tuple(conditioning_dims)
        self.dim = mulan.dim_latent
        self.num_codebooks = rq_num_quantizers
        self.codebook_size = codebook_size
        self.cond_drop_prob = cond_drop_prob
        self.sample_rate = sample_rate

        self.rq = ResidualCodebooks(self.dim, rq_num_quantizers, codebook_size, decay=rq_ema_decay)
        self.melody = self.melody_embedding = None
        self.frozen = False
        self.warned = False
        self.register_load_state_dict_post_hook(_freeze_if_fitted)

        self.cond_embeddings = nn.ParameterDict()
        for name, dim in zip(namespaces, conditioning_dims):  # one by one: a dict would be sorted
            self.cond_embeddings[name] = nn.Parameter(0.02 * torch.randn(rq_num_quantizers, codebook_size, dim))
        self.set_default_namespace(self.namespaces[0])

    def parameters(self, recurse: bool = True):
        """The conditioning embeddings: what an optimizer of a stage trains beside its transformer."""
        yield from self.cond_embeddings.parameters(recurse)
        if self.melody_embedding is not None:
            yield from self.melody_embedding.parameters(recurse)

    def train(self, mode: bool = True) -> MuLaNEmbedQuantizer:
        super().train(mode)
        self.mulan.eval()
        if self.melody is not None:
            self.melody.eval()
        if self.frozen:
            self.rq.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.mulan.device

    @property
    def is_fitted(self) -> bool:
        """Whether every level has codebooks."""
        return all(bool(codebook.initted) for codebook in self._codebooks())

    def __repr__(self) -> str:
        spaces = ', '.join(f'{name} {dim}' for name, dim in zip(self.namespaces, self.conditioning_dims))
        fitted = 'fitted' if self.is_fitted else 'not fitted'
        return (
            f'{type(self).__name__}({fitted}, {self.num_codebooks} levels of {self.codebook_size} codes,\n'
            f'  conditioning: {spaces},\n'
            f'  of {indented(self.mulan)})'
        )

    @typechecked
    def add_melody(self, melody: MelodyQuantizer) -> MuLaNEmbedQuantizer:
        """Let the semantic stage be told a melody, too, by `embed_melody`. The stage has to be trained with it, from
        tokens with a stream of melodies; until then melodies change nothing.

        Returns:
            this quantizer.

        Raises ValueError without the namespace 'semantic', without codebooks, or if there is one already.
        """
        melody.check_fitted()
        self._check_namespace(MELODY_NAMESPACE)
        if self.melody is not None:
            raise ValueError(f'this quantizer has a melody already, {self.melody!r}; build another quantizer')
        dim = self.conditioning_dims[self.namespaces.index(MELODY_NAMESPACE)]
        self.melody = melody.to(self.device).eval()
        self.melody_embedding = MelodyEmbedding(melody.rq, dim).to(next(iter(self.cond_embeddings.values())))
        return self

    def embed_melody(self, codes: Tensor, tokens: int, rate: Fraction) -> Tensor:
        """What tells the semantic stage a melody, `(b, tokens, conditioning dim)`, at the time of each token; zeros
        where there is none.

        Args:
            codes: of the melody's windows, `(b, m, q)`, -1 where there is none.
            rate: tokens a second.
        """
        return self.melody_embedding(codes, tokens, self.melody.rate / rate)

    def set_default_namespace(self, namespace: str) -> None:
        """Choose the namespace of calls that do not name one. Raises ValueError for an unknown one."""
        self._default_namespace = self._check_namespace(namespace)

    # conditioning

    def forward(
        self,
        wavs: Tensor | None = None,
        texts: Tensor | None = None,
        namespace: str | None = None,
        *,
        raw_texts: Sequence[str] | None = None,
        latents: Tensor | None = None,
        audio_lengths: Tensor | Sequence[int] | None = None,
        sample_rate: int | None = None,
    ) -> Tensor:
        """The conditioning of a stage.

        Args:
            wavs: `(b, samples)` waves, or
            texts: `(b, n)` token ids, or
            raw_texts: `b` strings, or
            latents: `(b, dim_latent)` latents of MuLaN, such as `mulan.embed_audio` gives for long audio.
            namespace: name of the stage; the default namespace otherwise.
            audio_lengths, sample_rate: of `wavs`, as in `MuLaN.get_audio_latents`.

        Returns:
            `(b, rq_num_quantizers, conditioning dim)` float32, differentiable with respect to the embeddings.
        """
        indices = self.indices(
            wavs, texts, raw_texts=raw_texts, latents=latents, audio_lengths=audio_lengths, sample_rate=sample_rate
        )
        conditioning = self.embed(indices, namespace)
        if not self.training or self.cond_drop_prob == 0:
            return conditioning
        kept = torch.rand(len(conditioning), dtype=torch.float32, device=conditioning.device) >= self.cond_drop_prob
        return conditioning * rearrange(kept, 'b -> b 1 1')

    @torch.no_grad()
    def indices(
        self,
        wavs: Tensor | None = None,
        texts: Tensor | None = None,
        *,
        raw_texts: Sequence[str] | None = None,
        latents: Tensor | None = None,
        audio_lengths: Tensor | Sequence[int] | None = None,
        sample_rate: int | None = None,
    ) -> Tensor:
        """The codes, `(b, rq_num_quantizers)` int64; arguments as in `forward`."""
        given = dict(wavs=wavs, texts=texts, raw_texts=raw_texts, latents=latents)
        given = [name for name, value in given.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f'pass one of wavs, texts, raw_texts and latents, got {" and ".join(given) or "none"}')
        with evaluating(self.mulan):
            if wavs is not None:
                rate = self.sample_rate if sample_rate is None else sample_rate
                latents = self.mulan.get_audio_latents(wavs, audio_lengths=audio_lengths, sample_rate=rate)
            elif latents is None:
                latents = self.mulan.get_text_latents(texts, raw_texts=raw_texts)
        latents = as_tensor(latents, self.device)
        self._check_latents(latents)
        if not self.frozen:
            self._warn_or_refuse()
        return self.rq(latents)

    def embed(self, indices: Tensor, namespace: str | None = None) -> Tensor:
        """The conditioning of codes `(b, q)`: `(b, q, conditioning dim)`."""
        namespace = self._default_namespace if namespace is None else self._check_namespace(namespace)
        levels = torch.arange(self.num_codebooks, device=indices.device)
        return self.cond_embeddings[namespace][levels, indices]

    # codebooks

    def fit(self, data: Any, *, batch_size: int = 32, max_items: int | None = None, seed: int = 0) -> list[float]:
        """Learn the codebooks by residual k-means, level by level, and freeze them.

        Args:
            data: `(n, dim_latent)` latents, or a data set of pairs as `MuLaNTrainer` takes, of which both the audio and
                the text of each pair are embedded. Waves are resampled from the data set's `sample_rate`, or else the
                quantizer's.
            batch_size: pairs embedded at a time.
            max_items: pairs used of the data set; all by default.
            seed: of the k-means.

        Returns:
            after each level, the share of the latents' squared length that is still missing.

        Raises:
            ValueError: fewer latents than codes, or latents of another width.
        """
        from sklearn.cluster import KMeans  # takes seconds

        check_positive(batch_size=batch_size, max_items=max_items)
        data = as_tensor(data)
        latents = data if isinstance(data, Tensor) else self._embed_data(data, batch_size, max_items)
        self._check_latents(latents)
        latents = latents.detach().float().cpu().numpy()
        different = len(np.unique(latents, axis=0))
        if different < self.codebook_size:
            raise ValueError(
                f'{self.codebook_size} codes need at least as many different latents, got {different} in '
                f'{len(latents)}; give more data or a smaller codebook_size'
            )
        residual, missing = latents.copy(), []
        for codebook in self._codebooks():
            means = KMeans(self.codebook_size, n_init=1, max_iter=50, random_state=seed).fit(residual)
            counts = np.bincount(means.labels_, minlength=self.codebook_size)
            residual = residual - means.cluster_centers_[means.labels_]
            missing.append(float(np.square(residual).sum() / np.square(latents).sum()))
            embed = torch.from_numpy(means.cluster_centers_).to(codebook.embed)[None]
            cluster_size = torch.from_numpy(counts).to(codebook.cluster_size)[None]
            codebook.embed.copy_(embed)
            codebook.cluster_size.copy_(cluster_size)
            codebook.embed_avg.copy_(embed * cluster_size[..., None])
            codebook.initted.fill_(True)
        self.freeze()
        return missing

    def freeze(self) -> None:
        """Keep the codebooks as they are from here on, in training mode too."""
        self.frozen = True
        self.rq.eval()

    @torch.no_grad()
    def _embed_data(self, dataset: Any, batch_size: int, max_items: int | None) -> Tensor:
        from accelerate.utils import send_to_device  # takes seconds

        collate = partial(
            collate_for,
            max_length=None,
            pad_id=self.mulan.text.pad_id,
            with_lengths=self.mulan.audio.support_variable_length,
        )
        rate = self.sample_rate
        if self.mulan.sample_rate is not None:
            rate = rate_of(dataset) or rate
        latents: list[Tensor] = []
        items = 0
        with evaluating(self.mulan):
            for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collate):
                if batch is None:
                    continue
                pairs = self.mulan.pair_latents(**send_to_device(batch, self.device), sample_rate=rate)
                latents += [pairs.audio, pairs.text]
                items += len(pairs.audio)
                if max_items is not None and items >= max_items:
                    break
        if not latents:
            raise ValueError('the data set gave no pair that could be read; nothing to fit the codebooks to')
        return torch.cat(latents)

    def _codebooks(self) -> list[nn.Module]:
        return [layer._codebook for layer in self.rq.layers]

    def _warn_or_refuse(self) -> None:
        if not self.training and not self.is_fitted:
            raise ValueError(
                'this quantizer has no codebooks yet: call quantizer.fit(dataset) with the data set that MuLaN was '
                'trained on, or load the state of a fitted one'
            )
        if self.training and not self.warned:
            self.warned = True
            warnings.warn(
                'the codebooks of this quantizer follow whatever batches pass, so its codes change their meaning '
                'during training; call quantizer.fit(dataset) first',
                stacklevel=4,
            )

    def _check_namespace(self, namespace: str) -> str:
        if namespace not in self.namespaces:
            raise ValueError(f'no namespace {namespace!r}; this quantizer has {", ".join(map(repr, self.namespaces))}')
        return namespace

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 2 or latents.shape[1] != self.dim:
            raise ValueError(f'latents must have shape (b, {self.dim}), got {tuple(latents.shape)}')

    # saving

    def save_pretrained(self, folder: str | Path) -> None:
        """Write codebooks, embeddings and, in folders `mulan` and `melody` within, MuLaN and what `add_melody` was
        given; for `from_pretrained`.

        Of a joint embedding that nothing here could rebuild, such as MuQ-MuLan, only class and hash are written: it has
        to be given to `from_pretrained`.
        """
        if not self.is_fitted:
            raise ValueError('this quantizer has no codebooks yet; call fit before saving it')
        config: dict[str, Any] = dict(model='MuLaNEmbedQuantizer', quantizer=self.config)
        weights = {name: it for name, it in self.state_dict().items() if not name.startswith(('mulan.', 'melody.'))}
        with written_together(folder) as aside:
            within = []
            if self.melody is not None:
                self.melody.save_pretrained(aside / MELODY_FOLDER)
                within.append(MELODY_FOLDER)
            if isinstance(self.mulan, PretrainedMuLaN) and not self.mulan.is_clap:
                config[NOT_SAVED] = _identity(self.mulan)
            else:
                self.mulan.save_pretrained(aside / MULAN_FOLDER)
                within.append(MULAN_FOLDER)
            if within:
                config[checkpoint.WITHIN] = checkpoint.checksums_within(aside, within)
            checkpoint.write_folder(aside, config, weights)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        mulan: nn.Module | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        device: str | torch.device = 'cpu',
        dtype: torch.dtype | None = None,
        verify: bool = True,
    ) -> MuLaNEmbedQuantizer:
        """Rebuild a quantizer from its folder, in eval mode; `mulan` is used instead of the saved one, if given, and
        moved to `device`, but not cast.

        The other arguments and errors are as in `MuLaN.from_pretrained`.
        """
        place = checkpoint.placing(device, dtype)
        folder = find_folder(folder, revision, subfolder)
        config, weights = checkpoint.read_folder(
            folder, 'MuLaNEmbedQuantizer', parts=('quantizer',), optional=(NOT_SAVED,), verify=verify
        )
        if (told := config.content.get(NOT_SAVED)) is not None:
            with config.refused(f'{NOT_SAVED!r} must hold keywords', told):
                kind, wanted = told['kind'], torch.tensor(told.get('latent', []), dtype=torch.float32)
            if mulan is None:
                raise ValueError(f'{folder} was saved without its {kind}, which cannot be rebuilt; pass it as mulan')
            found = _identity(own_mulan(mulan))
            if found['kind'] != kind:
                raise ValueError(
                    f'{folder} was fitted with a {kind}, got a {found["kind"]}; pass the one it was fitted with'
                )
            latent = torch.tensor(found.get('latent', []), dtype=torch.float32)
            same = latent.shape == wanted.shape and torch.allclose(latent, wanted, atol=1e-3)
            if found.get('weights') != told.get('weights') or not same:
                raise ValueError(f'{folder} was fitted with another {kind}; pass the one that it was fitted with')
        given = mulan is not None
        mulan = own_mulan(mulan) if given else load_joint(Path(folder) / MULAN_FOLDER, verify=verify)
        quantizer = config.build(cls, 'quantizer', mulan)
        if MELODY_FOLDER in (config.content.get(checkpoint.WITHIN) or {}):
            melody = MelodyQuantizer.from_pretrained(Path(folder) / MELODY_FOLDER, verify=verify)
            with checkpoint.own_defaults():
                quantizer.add_melody(melody)
            weights |= {f'melody.{name}': tensor for name, tensor in melody.state_dict().items()}
        weights |= {f'mulan.{name}': tensor for name, tensor in mulan.state_dict().items()}
        trained = mulan.text.trained_tokens
        checkpoint.load_strictly(quantizer, weights, source=folder)
        mulan.text.trained_tokens = trained  # its weights are its own
        for part in quantizer.eval().children():
            (checkpoint.placing(device, None) if given and part is mulan else place)(part)
        return quantizer


def _identity(mulan: JointEmbedding) -> dict[str, Any]:
    """What tells a joint embedding that is not saved from others: its class, and a hash of its weights or, where it has
    none, what it makes of a text."""
    found: dict[str, Any] = dict(kind=type(getattr(mulan, 'model', mulan)).__name__)
    if mulan.state_dict():
        return found | dict(weights=fingerprint(mulan)['weights'])
    return found | dict(latent=mulan.get_text_latents(raw_texts=[PROBE])[0].tolist())


class ResidualCodebooks(nn.Module):
    """Residual vector quantization (arXiv 2107.03312, section III-C), with the buffers of `ResidualVQ` of
    vector-quantize-pytorch. In training mode it learns, as that does: by k-means of the first batch, and an exponential
    moving average over those that follow.
    """

    def __init__(self, dim: int, num_quantizers: int, codebook_size: int, decay: float):
        super().__init__()
        self.decay = decay
        self.layers = nn.ModuleList(_Level(dim, codebook_size) for _ in range(num_quantizers))

    def forward(self, x: Tensor) -> Tensor:
        """The codes of `(b, d)`, `(b, levels)` int64."""
        if self.training:
            return self._learner()(x)[1]
        residual, codes = x.float(), []
        for level in self.layers:
            (embed,) = level._codebook.embed.float()
            codes.append((residual @ embed.T - embed.square().sum(dim=-1) / 2).argmax(dim=-1))
            residual = residual - embed[codes[-1]]
        return torch.stack(codes, dim=-1)

    def _learner(self) -> nn.Module:
        from vector_quantize_pytorch import ResidualVQ  # takes seconds

        _, codebook_size, dim = self.layers[0]._codebook.embed.shape
        learner = ResidualVQ(
            dim=dim,
            num_quantizers=len(self.layers),
            codebook_size=codebook_size,
            decay=self.decay,
            commitment_weight=0,
            kmeans_init=True,
            threshold_ema_dead_code=2,
            quantize_dropout=False,
        )
        for theirs, ours in zip(learner.layers, self.layers):
            theirs._codebook.__dict__['_buffers'] = ours._codebook._buffers
        return learner


class _Level(nn.Module):
    def __init__(self, dim: int, codebook_size: int):
        super().__init__()
        self._codebook = nn.Module()
        self._codebook.register_buffer('initted', torch.tensor(False))
        self._codebook.register_buffer('cluster_size', torch.ones(1, codebook_size))
        self._codebook.register_buffer('embed_avg', torch.zeros(1, codebook_size, dim))
        self._codebook.register_buffer('embed', torch.zeros(1, codebook_size, dim))


def _freeze_if_fitted(quantizer: MuLaNEmbedQuantizer, _) -> None:
    if quantizer.is_fitted:
        quantizer.freeze()
