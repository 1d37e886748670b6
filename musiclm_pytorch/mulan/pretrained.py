"""Joint embeddings of music and text that others have trained, in the place of a MuLaN."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musiclm_pytorch.atomic import write_checked_json
from musiclm_pytorch.checks import check_audio, check_lengths, check_sample_rate, described, typechecked
from musiclm_pytorch.data.audio import windows
from musiclm_pytorch.mulan.checkpoint import CONFIG_FILE, placing, read_config, saved_kind
from musiclm_pytorch.mulan.layers import l2norm
from musiclm_pytorch.mulan.model import JointEmbedding, MuLaN, evaluating
from musiclm_pytorch.mulan.text_transformer import VOCAB_SIZE
from musiclm_pytorch.pretrained.hub import (
    find_encoder,
    find_folder,
    load_processor,
    load_transformers,
    read_settings,
    save_encoder,
)
from musiclm_pytorch.version import __version__

BATCH = 16  # windows heard at a time
TEMPERATURE = 1 / 0.07  # factor of cosines of a model that tells none: where CLIP begins (arXiv 2103.00020)


@dataclass
class AudioSide:
    """What is asked of an audio tower."""

    sample_rate: int
    max_audio_length: int | None
    min_samples: int = 1
    support_variable_length: bool = True
    accept_spec: bool = False


@dataclass
class TextSide:
    """What is asked of a text tower: that of another model does not tell which words it knows."""

    pad_id: int = 0
    num_tokens: int = VOCAB_SIZE
    reads_words: bool = True
    trained_tokens: Tensor | None = None

    def unknown_words(self, text: str) -> list[str]:
        return []


class PretrainedMuLaN(JointEmbedding):
    """A joint embedding that others have trained, for the quantizer, ranking, evaluation, indices and tags.

        mulan = PretrainedMuLaN('laion/larger_clap_music')
        quantizer = MuLaNEmbedQuantizer(mulan, conditioning_dims=(1024, 1024, 1024))

    A wave longer than the model was made for, 10 s for CLAP, gets the mean over windows; the last one ends with it. An
    item's latent is its own, whatever it is batched with, and nothing is random.

    Args:
        model: folder of a CLAP of `transformers`, its name on the Hugging Face Hub, or a `ClapModel`; or any object
            with `get_audio_latents(waves)`, `get_text_latents(raw_texts=texts)` and `sample_rate` in Hz, or those of
            the package `muq`: `extract_audio_latents`, `extract_text_latents` and `sr`. Such an object is given the
            waves `(1, samples)` one by one.
        processor: `ClapProcessor`, needed with a `ClapModel`.

    Raises:
        FileNotFoundError: no such model. ValueError: one of another kind. TypeError: an object that lacks something.
    """

    @typechecked
    def __init__(self, model: Any, processor: Any = None):
        nn.Module.__init__(self)
        if isinstance(model, (str, Path)):
            settings = read_settings(model)
            if settings.get('model') == PretrainedMuLaN.__name__:
                raise ValueError(
                    f'{model} was written by PretrainedMuLaN.save_pretrained; PretrainedMuLaN.from_pretrained reads it'
                )
            if (kind := settings.get('model_type')) != 'clap':
                raise ValueError(f'{model} is a {kind!r}; joint embeddings that are read are those of model_type clap')
            processor = load_processor(model, 'ClapProcessor') if processor is None else processor
            model = load_transformers(model, 'ClapModel')
        self.is_clap = getattr(getattr(model, 'config', None), 'model_type', None) == 'clap'
        self.processor, longest = processor, None
        if self.is_clap:
            if processor is None:
                raise ValueError('a ClapModel in memory needs its processor: PretrainedMuLaN(model, processor)')
            rate, longest = processor.feature_extractor.sampling_rate, processor.feature_extractor.nb_max_samples
        else:
            names = ('get_audio_latents', 'get_text_latents', 'sample_rate')
            theirs = ('extract_audio_latents', 'extract_text_latents', 'sr')
            if missing := [name for name, muq in zip(names, theirs) if not hasattr(model, name) | hasattr(model, muq)]:
                raise TypeError(f'a {type(model).__name__} is no joint embedding: it has no {" and no ".join(missing)}')
            rate = model.sample_rate if hasattr(model, 'sample_rate') else model.sr
        check_sample_rate(rate)
        self.model = model
        self.audio, self.text = AudioSide(rate, longest), TextSide()
        self.contrast = SimpleNamespace(temperature=self._temperature)
        self.dim_latent = (
            model.config.projection_dim if self.is_clap else self.get_text_latents(raw_texts=['music']).shape[1]
        )

    @property
    def device(self) -> torch.device:
        return next((it.device for it in self.parameters()), torch.device('cpu'))

    def train(self, mode: bool = True) -> PretrainedMuLaN:
        """Leaves the mode of the model as it is: that is its owner's, and it computes in eval mode all the same."""
        self.training = mode
        return self

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}({type(self.model).__name__}, latents of {self.dim_latent}, {self.sample_rate} Hz)'
        )

    @torch.no_grad()
    def get_audio_latents(
        self, wavs: Tensor, audio_lengths: Tensor | Sequence[int] | None = None, sample_rate: int | None = None
    ) -> Tensor:
        """As of `MuLaN`: `(b, samples)` to `(b, dim_latent)` float32, of length 1."""
        wavs, audio_lengths = self.to_own_rate(wavs, audio_lengths, sample_rate)
        wavs = check_audio(wavs, ndim=2, shape='(batch, samples)')
        if audio_lengths is None:
            audio_lengths = [wavs.shape[1]] * len(wavs)
        lengths = check_lengths(
            audio_lengths, batch=len(wavs), limit=wavs.shape[1], unit='samples', device=wavs.device
        ).tolist()
        longest = self.audio.max_audio_length or max(lengths)
        pieces, counts = cut([wave[:length] for wave, length in zip(wavs.float(), lengths)], longest, longest)
        found = torch.cat([self._embed(pieces[row : row + BATCH]) for row in range(0, len(pieces), BATCH)])
        return l2norm(torch.stack([it.mean(dim=0) for it in found.split(counts)]))

    @torch.no_grad()
    def get_text_latents(self, texts: None = None, raw_texts: Sequence[str] | None = None) -> Tensor:
        """`b` strings to `(b, dim_latent)` float32, of length 1; CLAP cuts a text where its text tower ends."""
        if texts is not None or isinstance(raw_texts, str) or not raw_texts:
            raise ValueError(
                f'texts must be one or more strings in a list, got {described(raw_texts if texts is None else texts)}'
            )
        with self._evaluated():
            return l2norm(self._read(list(raw_texts)).float())

    def _read(self, texts: list[str]) -> Tensor:
        if self.is_clap:
            settings = self.model.config.text_config
            # RoBERTa counts positions from behind its padding
            longest = settings.max_position_embeddings - settings.pad_token_id - 1
            keywords = dict(padding=True, truncation=True, max_length=longest, return_tensors='pt')
            tokens = self.processor.tokenizer(texts, **keywords).to(self.device)
            return pooled(self.model.get_text_features(tokens['input_ids'], tokens['attention_mask']))
        if hasattr(self.model, 'get_text_latents'):
            return self.model.get_text_latents(raw_texts=texts)
        return self.model.extract_text_latents(texts)

    def _embed(self, pieces: list[Tensor]) -> Tensor:
        """Latents of waves `(samples,)`, none longer than the model was made for, `(n, dim_latent)` of length 1."""
        with self._evaluated():
            return l2norm(self._hear(pieces).float())

    def _hear(self, pieces: list[Tensor]) -> Tensor:
        if not self.is_clap:
            embed = getattr(self.model, 'get_audio_latents', None) or self.model.extract_audio_latents
            return torch.cat([embed(it[None].to(self.device)) for it in pieces])
        features = self.processor.feature_extractor
        # where nothing is longer than a window, models with fusion declare a random item so; that would change what
        # it gives, and the random numbers of everyone else
        state = np.random.get_state()  # noqa: NPY002
        inputs = features([it.cpu().numpy() for it in pieces], sampling_rate=self.sample_rate, return_tensors='pt')
        np.random.set_state(state)  # noqa: NPY002
        spectrograms = inputs['input_features'].to(self.device, self.model.dtype)
        longer = torch.zeros(len(pieces), 1, dtype=torch.bool, device=self.device)
        return pooled(self.model.get_audio_features(input_features=spectrograms, is_longer=longer))

    def _evaluated(self) -> AbstractContextManager[None]:
        return evaluating(self.model) if isinstance(self.model, nn.Module) else nullcontext()

    def _temperature(self) -> Tensor:
        return self.model.logit_scale_a.exp() if self.is_clap else torch.tensor(TEMPERATURE, dtype=torch.float32)

    # saving

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a CLAP, for `from_pretrained`. Raises TypeError for another model, which nothing here could rebuild."""
        if not self.is_clap:
            raise TypeError(
                f'a {type(self.model).__name__} cannot be rebuilt from a folder; pass it again when loading'
            )
        told = save_encoder(Path(folder), self.model, self.processor)
        config = dict(model=type(self).__name__, version=__version__, encoder=told)
        write_checked_json(Path(folder) / CONFIG_FILE, config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        device: str | torch.device = 'cpu',
        dtype: torch.dtype | None = None,
        verify: bool = True,
    ) -> PretrainedMuLaN:
        """Rebuild what `save_pretrained` wrote; arguments and errors as of `MuLaN.from_pretrained`."""
        place = placing(device, dtype)
        folder = find_folder(folder, revision, subfolder)
        config = read_config(folder, cls.__name__, ('encoder',), verify=verify)
        return place(cls(find_encoder(config, verify)))


def cut(waves: Sequence[Tensor], window: int, hop: int) -> tuple[list[Tensor], list[int]]:
    """The windows of all waves `(samples,)`, one after another, and how many each has."""
    spans = [list(windows(len(wave), window, hop)) for wave in waves]
    pieces = [wave[start:stop] for wave, own in zip(waves, spans) for start, stop in own]
    return pieces, [len(own) for own in spans]


def own_mulan(mulan: Any) -> JointEmbedding:
    """A MuLaN as it is, anything else that `PretrainedMuLaN` takes through that."""
    return mulan if isinstance(mulan, JointEmbedding) else PretrainedMuLaN(mulan)


def load_joint(
    folder: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    device: str | torch.device = 'cpu',
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> JointEmbedding:
    """The MuLaN, or what stands in its place, in a folder; or a CLAP of `transformers`; by its folder or name.

    Further arguments and errors are as in `MuLaN.from_pretrained`.
    """
    place = placing(device, dtype)
    folder = find_folder(folder, revision, subfolder)
    kind = saved_kind(folder)
    if kind is None and (folder / CONFIG_FILE).is_file() and 'model_type' in read_settings(folder):
        return place(PretrainedMuLaN(folder))
    cls = PretrainedMuLaN if kind == PretrainedMuLaN.__name__ else MuLaN
    return place(cls.from_pretrained(folder, verify=verify))


def pooled(output: Any) -> Tensor:
    """What CLAP gives: a tensor before transformers 5, since then within an object."""
    return output if isinstance(output, Tensor) else output.pooler_output
