"""Semantic tokens: what AudioLM's first stage speaks in. What all our tokenizers share."""

from __future__ import annotations

import logging
from abc import ABCMeta, abstractmethod
from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader

from musiclm_pytorch.atomic import written_together
from musiclm_pytorch.audiolm.convert import passes_as
from musiclm_pytorch.audiolm.kmeans import KMeansCodebook
from musiclm_pytorch.checks import check_audio, check_finite, check_positive, check_sample_rate, typechecked
from musiclm_pytorch.data.audio import resample, windows
from musiclm_pytorch.data.collate import read_item
from musiclm_pytorch.data.rates import agreed_rate
from musiclm_pytorch.mulan import checkpoint
from musiclm_pytorch.mulan.display import size_of
from musiclm_pytorch.pretrained.hub import HubModel, find_folder

logger = logging.getLogger(__name__)

KINDS = {
    'MuLaNSemanticTokenizer': 'musiclm_pytorch.audiolm.semantic_mulan',
    'TransformersSemanticTokenizer': 'musiclm_pytorch.audiolm.semantic_transformers',
}


@passes_as('HubertWithKmeans')
class SemanticTokenizer(HubModel, nn.Module, metaclass=ABCMeta):
    """Waves to semantic tokens: frames of features of a frozen encoder, each replaced by its nearest k-means centre.

    The classes of audiolm-pytorch take it as `wav2vec`:

        tokenizer = MuLaNSemanticTokenizer(mulan)
        tokenizer.fit(dataset)
        ids = tokenizer(wavs)  # (b, tokenizer.num_tokens(samples)) int64
        SemanticTransformerWrapper(transformer=transformer, wav2vec=tokenizer)

    A wave of `n` samples at `target_sample_hz` gives `num_tokens(n)` tokens, one every `downsample_factor` samples.
    Longer waves than `window_seconds` are encoded window by window, each by itself, so that time and memory grow
    linearly; the last window ends with the wave, and gives the tokens that are still missing.

    The encoder is a copy, frozen and always in eval mode, and computes in its own precision even under autocast: a
    token keeps its meaning whatever is trained around it. Token ids depend on the wave alone.

    Attributes:
        target_sample_hz: rate in Hz that the encoder works at.
        seq_len_multiple_of: waves are cut to a multiple of so many samples, or None.
        kmeans: the centres.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        target_sample_hz: int,
        downsample_factor: int,
        receptive_field: int,
        seq_len_multiple_of: int | None,
        window_seconds: float | None,
    ):
        nn.Module.__init__(self)  # not that of `HubertWithKmeans`, which loads a checkpoint and unpickles a k-means
        check_sample_rate(target_sample_hz)
        check_positive(seq_len_multiple_of=seq_len_multiple_of, window_seconds=window_seconds)
        self.target_sample_hz = target_sample_hz
        self.seq_len_multiple_of = seq_len_multiple_of
        self._downsample_factor = downsample_factor
        self._receptive_field = receptive_field
        self._window = None  # in tokens
        if window_seconds is not None:
            self._window = max(1, int(window_seconds * target_sample_hz / downsample_factor + 1e-6))
        self.kmeans = KMeansCodebook(dim, codebook_size)

    # what audiolm-pytorch asks for

    @property
    def codebook_size(self) -> int:
        """Number of different tokens: `num_semantic_tokens` of the transformers."""
        return self.kmeans.codebook_size

    @property
    def downsample_factor(self) -> int:
        """Samples from one token to the next, at `target_sample_hz`."""
        return self._downsample_factor

    @property
    def groups(self) -> int:
        return 1

    @torch.no_grad()
    def forward(self, wav_input: Tensor, flatten: bool = True, input_sample_hz: int | None = None) -> Tensor:
        """The tokens of a batch of waves.

        Args:
            wav_input: `(b, samples)` float waves in [-1, 1].
            flatten: part of audiolm-pytorch's protocol; there is one token a frame, so either way is the same.
            input_sample_hz: rate of the waves in Hz, if it is not `target_sample_hz`: they are resampled.

        Returns:
            `(b, num_tokens(samples))` int64 in [0, codebook_size).

        Raises:
            TypeError: no floating-point tensor. ValueError: never fitted, a wrong shape, NaN, too short for a token.
        """
        if not self.is_fitted:
            raise ValueError(
                'this tokenizer has no centres yet: call tokenizer.fit(dataset) with music like that it is for, or '
                'load a fitted one with from_pretrained'
            )
        return torch.cat([self.kmeans(features) for features in self._features(wav_input, input_sample_hz)], dim=1)

    # the protocol `Tokenizer`

    @property
    def sample_rate(self) -> int:
        """`target_sample_hz`."""
        return self.target_sample_hz

    @property
    def frame_rate(self) -> Fraction:
        """Tokens a second."""
        return Fraction(self.target_sample_hz, self.downsample_factor)

    def encode(self, waves: Tensor) -> Tensor:
        """`forward`."""
        return self(waves)

    # beyond

    @property
    def is_fitted(self) -> bool:
        return self.kmeans.is_fitted

    @property
    def tokens_per_second(self) -> float:
        """Hz."""
        return self.target_sample_hz / self.downsample_factor

    @property
    def device(self) -> torch.device:
        return self.kmeans.centers.device

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}({"fitted" if self.is_fitted else "not fitted"}, {self.codebook_size} tokens, '
            f'{self.tokens_per_second:g} a second at {self.target_sample_hz} Hz,\n'
            f'  {type(self.encoder).__name__}: {size_of(self.encoder)})'
        )

    def num_tokens(self, samples: int) -> int:
        """Tokens of a wave of that many samples at `target_sample_hz`: one a `downsample_factor`, as long as the
        receptive field of the encoder lies within the wave. 0 if it is too short for any."""
        if self.seq_len_multiple_of is not None:
            samples -= samples % self.seq_len_multiple_of
        return max(0, (samples - self._receptive_field) // self.downsample_factor + 1)

    def min_samples(self, tokens: int = 1) -> int:
        """The shortest wave, in samples at `target_sample_hz`, that gives that many tokens."""
        multiple = self.seq_len_multiple_of or 1
        return -(-self._span(tokens) // multiple) * multiple

    def features(self, wavs: Tensor, input_sample_hz: int | None = None) -> Tensor:
        """What the tokens stand for: `(b, num_tokens(samples), dim)` float32, arguments as in `forward`."""
        with torch.no_grad():
            return torch.cat(list(self._features(wavs, input_sample_hz)), dim=1)

    def train(self, mode: bool = True) -> SemanticTokenizer:
        """Stays in eval mode, also where a wrapper that trains sets the mode of all that it holds."""
        return super().train(False)

    @torch.no_grad()
    @typechecked
    def fit(
        self,
        data: Any,
        *,
        sample_rate: int | None = None,
        batch_size: int = 8,
        max_items: int | None = None,
        max_frames: int = 100_000,
        seed: int = 0,
    ) -> float:
        """Learn the centres by k-means from the frames of many waves.

        The waves are read once and memory is bounded by `max_frames`, whatever their number.

        Args:
            data: a data set or a list of waves `(samples,)` or `(channels, samples)`, or of pairs of wave and text as
                `MuLaNTrainer` takes; or a tensor `(b, samples)`. Items that are None or too short for a token are
                left out.
            sample_rate: rate of the waves in Hz; by default the data set's own `sample_rate`, if it has one, else
                `target_sample_hz`.
            batch_size: waves encoded at a time, if they are as long as each other.
            max_items: waves used; all by default.
            max_frames: frames that the k-means sees, drawn at random from all.
            seed: of the draw and of the k-means.

        Returns:
            the share of the variance of the normalised features that is lost, in [0, 1].

        Raises:
            ValueError: fewer different frames than centres. TypeError: an item that is no wave.
        """
        check_positive(batch_size=batch_size, max_items=max_items)
        rate = agreed_rate(data, sample_rate, default=self.target_sample_hz)
        blocks = (
            rearrange(features, 'b t d -> (b t) d')
            for wavs in self._batches(data, rate, batch_size, max_items)
            for features in self._features(wavs.to(self.device), rate)
        )
        return self.kmeans.fit(blocks, max_frames=max_frames, seed=seed)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write encoder and centres for `from_pretrained`; JSON and safetensors, nothing is pickled."""
        if not self.is_fitted:
            raise ValueError('this tokenizer has no centres yet; call fit before saving it')
        with written_together(folder) as aside:
            encoder = self._save_encoder(aside)
            config = dict(model=type(self).__name__, tokenizer=self._saved_keywords(), encoder=encoder)
            checkpoint.write_folder(aside, config, self._saved_weights())

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
    ) -> SemanticTokenizer:
        """Rebuild a tokenizer of any kind from its folder.

        The other arguments (`dtype` of the encoder) and errors are as in `MuLaN.from_pretrained`.
        """
        place = checkpoint.placing(device, dtype)
        folder = find_folder(folder, revision, subfolder)
        parts = ('model', 'tokenizer', 'encoder')
        config, weights = checkpoint.read_folder(folder, 'SemanticTokenizer', parts=parts, verify=verify)
        name = config['model']
        if name not in [*KINDS]:
            raise ValueError(f'{folder} holds a {name}, not one of {", ".join(KINDS)}')
        kind = getattr(import_module(KINDS[name]), name)
        if not issubclass(kind, cls):
            raise ValueError(f'{folder} holds a {name}, not a {cls.__name__}; load it with {name}.from_pretrained')
        tokenizer = kind._rebuild(config, verify)
        expected = tokenizer.state_dict()
        unsaved = {key: it for key, it in expected.items() if key not in tokenizer._saved_weights()}
        checkpoint.load_strictly(tokenizer, {**unsaved, **weights}, source=folder)
        return place(tokenizer)

    # what a subclass gives

    @abstractmethod
    def _encode(self, wavs: Tensor) -> Tensor:
        """`(b, samples)` float32 waves at `target_sample_hz` to `(b, num_tokens(samples), dim)` features."""

    @abstractmethod
    def _save_encoder(self, folder: Path) -> dict[str, Any]:
        """What `_rebuild` needs of the encoder, for the JSON; larger things go into files of their own."""

    @abstractmethod
    def _saved_keywords(self) -> dict[str, Any]:
        """Keywords of the constructor, beside the encoder."""

    def _saved_weights(self) -> dict[str, Tensor]:
        """What goes into `model.safetensors`."""
        return self.state_dict()

    @classmethod
    @abstractmethod
    def _rebuild(cls, config: checkpoint.SavedConfig, verify: bool) -> SemanticTokenizer:
        """A tokenizer like the one that was saved; `from_pretrained` loads its weights afterwards. With `verify`,
        further files must be what was written."""

    # waves to features

    def _span(self, tokens: int) -> int:
        return (tokens - 1) * self.downsample_factor + self._receptive_field

    def _features(self, wavs: Tensor, input_sample_hz: int | None) -> Iterator[Tensor]:
        """Window by window, each time step once: `(b, t, dim)` float32."""
        wavs = check_audio(wavs, ndim=2, shape='(batch, samples)', device=self.device)
        check_finite(wavs, 'wavs[{}] holds NaN or infinite samples; clean the data first')
        with torch.autocast(wavs.device.type, enabled=False):
            wavs = wavs.float()
            if input_sample_hz is not None and wavs.shape[-1] > 0:
                check_sample_rate(input_sample_hz)
                wavs = resample(wavs, input_sample_hz, self.target_sample_hz)
            total = self.num_tokens(wavs.shape[-1])
            if total == 0:
                raise ValueError(
                    f'the wave has {wavs.shape[-1]} samples at {self.target_sample_hz} Hz, but one semantic token '
                    f'needs {self.min_samples()}; pad it with zeros or leave it out'
                )
            if self.seq_len_multiple_of is not None:
                wavs = wavs[:, : wavs.shape[1] // self.seq_len_multiple_of * self.seq_len_multiple_of]
            done = 0
            for start, stop in windows(total, self._window or total, self._window or total):
                begin = start * self.downsample_factor
                # samples after the last frame belong to the last window: norms over the whole wave see them
                end = wavs.shape[1] if stop == total else begin + self._span(stop - start)
                features = self._encode(wavs[:, begin:end])
                if features.shape[1] != stop - start:
                    raise ValueError(
                        f'the encoder gave {features.shape[1]} frames in place of {stop - start}; it does not keep '
                        f'to one frame every {self.downsample_factor} samples'
                    )
                yield features[:, done - start :].float()
                done = stop

    def _batches(self, data: Any, rate: int, batch_size: int, max_items: int | None) -> Iterator[Tensor]:
        """Waves `(b, samples)`, those of a batch that are as long as each other together."""
        items = 0
        for batch in DataLoader(data, batch_size=batch_size, collate_fn=list):
            found = [read_item(item, f'item {items + index}') for index, item in enumerate(batch)]
            waves = [it[0] for it in found if it is not None]
            items += len(batch)
            if max_items is not None and items > max_items:
                waves = waves[: max_items - items]
            usable = [it for it in waves if self.num_tokens(-(-len(it) * self.target_sample_hz // rate)) > 0]
            if len(usable) < len(waves):
                logger.warning('left out %d waves that are too short for a token', len(waves) - len(usable))
            for _, alike in groupby(sorted(usable, key=len), key=len):
                yield torch.stack(list(alike))
            if max_items is not None and items >= max_items:
                return
