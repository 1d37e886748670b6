"""MuLaN: one embedding space for music and its descriptions (arXiv 2208.12415)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from musiclm_pytorch.checks import (
    as_tensor,
    check_audio,
    check_lengths,
    check_positive,
    check_sample_rate,
    records_config,
    typechecked,
)
from musiclm_pytorch.data.audio import AudioFile, resample, windows
from musiclm_pytorch.mulan import checkpoint
from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.contrastive import (
    MultiLayerContrastiveLoss,
    SigmoidContrastiveLearning,
    SoftmaxContrastiveLearning,
    WordPrediction,
)
from musiclm_pytorch.mulan.display import size_of
from musiclm_pytorch.mulan.layers import Encoding, l2norm
from musiclm_pytorch.mulan.text_transformer import TextTransformer
from musiclm_pytorch.mulan.transfer import load_matching
from musiclm_pytorch.pretrained.hub import HubModel, find_folder


class PairLatents(NamedTuple):
    """What the loss of a batch of pairs is computed from; a batch may be embedded in parts and joined.

    Attributes:
        audio, text: `(b, dim_latent)` float32, of length 1.
        audio_layers, text_layers: `(l, b, dim_latent)`, the same for hidden states, with the hierarchical loss only.
        tokens: `(b, max_seq_len)` int64, the texts, padded; in training with word prediction only.
    """

    audio: Tensor
    text: Tensor
    audio_layers: Tensor | None = None
    text_layers: Tensor | None = None
    tokens: Tensor | None = None


class JointEmbedding(HubModel, nn.Module):
    """What every joint embedding of audio and text does; a subclass gives `get_audio_latents` and `get_text_latents`,
    as of `MuLaN`, and the attributes below.

    Attributes:
        dim_latent: width of the joint space.
        audio, text: the towers.
        device: where it computes.
    """

    @property
    def sample_rate(self) -> int | None:
        """Sample rate in Hz of the waves this model expects, None when it was not told."""
        return self.audio.sample_rate

    def window(self, seconds: float, sample_rate: int | None = None) -> float:
        """How many seconds of audio to embed at once: so many, or as many as the audio tower takes. `sample_rate` is
        that of the waves, where the model does not know its own."""
        longest, rate = self.audio.max_audio_length, self.sample_rate or sample_rate
        return seconds if longest is None or rate is None else min(seconds, longest / rate)

    def pair_latents(
        self,
        wavs: Tensor,
        texts: Tensor | None = None,
        raw_texts: Sequence[str] | None = None,
        audio_lengths: Tensor | Sequence[int] | None = None,
        sample_rate: int | None = None,
    ) -> PairLatents:
        """Both latents of a batch of pairs; arguments as of `MuLaN.pair_latents`."""
        if texts is not None:
            raise ValueError(f'a {type(self).__name__} reads strings, not token ids; give a data set with raw texts')
        audio = self.get_audio_latents(wavs, audio_lengths=audio_lengths, sample_rate=sample_rate)
        return PairLatents(audio, self.get_text_latents(raw_texts=raw_texts))

    @torch.no_grad()
    def embed_audio(
        self,
        audio: Tensor | str | Path | AudioFile,
        window: float = 10.0,
        hop: float = 1.0,
        sample_rate: int | None = None,
        batch_size: int = 4,
    ) -> Tensor:
        """Embed long audio in bounded memory: the mean over windows, as MusicLM does (arXiv 2301.11325).

        The last window ends with the audio; audio shorter than a window is embedded whole. A file is read window by
        window. The model computes in eval mode and is left in the mode it was in.

        Args:
            audio: `(samples,)` or `(b, samples)` waves, as tensor or numpy array, or a sound file (mixed down to mono):
                its path, or one that is open already, which is not closed.
            window, hop: length of a window and distance between two, in seconds.
            sample_rate: rate of a tensor in Hz, by default the model's own; a file tells its own.
            batch_size: windows embedded at a time.

        Returns:
            `(dim_latent,)`, or `(b, dim_latent)` for a batch, float32, of length 1.

        Raises:
            FileNotFoundError, ValueError: no such file, or not audio; a model that does not know its sample rate.
        """
        check_positive(window=window, hop=hop, batch_size=batch_size)
        if self.sample_rate is None:
            raise ValueError(
                'windows in seconds need the sample rate of the model; build the audio tower with audio_sample_rate'
            )
        longest = self.audio.max_audio_length
        if longest is not None and round(window * self.sample_rate) > longest:
            raise ValueError(
                f'a window of {window} s is longer than max_audio_length, {longest} samples at {self.sample_rate} Hz; '
                f'pass window={longest / self.sample_rate:g} or less'
            )
        audio = as_tensor(audio)
        if not isinstance(audio, (Tensor, str, Path, AudioFile)):
            raise TypeError(
                f'audio must be a tensor, an array, the path of a file or an AudioFile, got {type(audio).__name__}'
            )
        if isinstance(audio, Tensor):
            if audio.ndim == 2:
                check_audio(audio, ndim=2, shape='(samples,) or (batch, samples)', name='audio')
                return torch.stack([self.embed_audio(wave, window, hop, sample_rate, batch_size) for wave in audio])
            check_audio(audio, ndim=1, shape='(samples,) or (batch, samples)', name='audio')
            rate = self.sample_rate if sample_rate is None else sample_rate
            check_sample_rate(rate)
            return self._embed_windows(lambda i, j: audio[i:j], len(audio), rate, window, hop, batch_size)
        if sample_rate is not None:
            raise ValueError(f'a file tells its own sample rate; leave out sample_rate={sample_rate}')
        opened = contextlib.nullcontext(audio) if isinstance(audio, AudioFile) else AudioFile(audio)
        with opened as file:
            return self._embed_windows(file.read, len(file), file.sample_rate, window, hop, batch_size)

    def _embed_windows(self, read, total: int, rate: int, window: float, hop: float, batch_size: int) -> Tensor:
        spans = windows(total, max(1, round(window * rate)), max(1, round(hop * rate)))
        mean, count = torch.zeros(self.dim_latent, dtype=torch.float32, device=self.device), 0
        with evaluating(self):
            while batch := list(islice(spans, batch_size)):
                # neighbouring windows overlap: read what they share once
                offset = batch[0][0]
                piece = read(offset, batch[-1][1]).to(self.device)
                wavs = torch.stack([piece[start - offset : stop - offset] for start, stop in batch])
                mean += self.get_audio_latents(wavs, sample_rate=rate).sum(dim=0)
                count += len(batch)
        return l2norm(mean / count)

    def to_own_rate(self, wavs: Tensor, audio_lengths, sample_rate: int | None) -> tuple[Tensor, Tensor | None]:
        """Resample a batch to the model's rate; lengths follow. An array becomes a tensor."""
        wavs = as_tensor(wavs, self.device)
        if sample_rate is None:
            return wavs, audio_lengths
        check_sample_rate(sample_rate)
        if sample_rate == self.sample_rate:
            return wavs, audio_lengths
        if self.sample_rate is None:
            raise ValueError(
                f'cannot resample from {sample_rate} Hz: this MuLaN does not know its own sample rate; build the '
                'audio tower with audio_sample_rate'
            )
        check_audio(wavs, ndim=2, shape='(batch, samples)')
        if wavs.shape[-1] == 0:
            raise ValueError(f'wavs of shape {tuple(wavs.shape)} have no samples')
        if audio_lengths is not None:
            audio_lengths = check_lengths(
                audio_lengths, batch=len(wavs), limit=wavs.shape[-1], unit='samples', device=wavs.device
            )
            # the filter would carry what the padding holds into the end of the wave
            padding = torch.arange(wavs.shape[-1], device=wavs.device) >= audio_lengths[:, None]
            wavs = wavs.masked_fill(padding, 0.0)
            audio_lengths = -(-audio_lengths * self.sample_rate // sample_rate)
        return resample(wavs, sample_rate, self.sample_rate), audio_lengths


class MuLaN(JointEmbedding):
    """Two towers, trained so that a clip and its description land close to each other.

    Args:
        audio_transformer: the audio tower.
        text_transformer: the text tower.
        dim_latent: width of the joint space.
        decoupled_contrastive_learning: leave the positive pair out of the softmax's denominator (arXiv 2110.06848).
        hierarchical_contrastive_loss: also contrast hidden states of several layers (arXiv 2208.13628).
        hierarchical_contrastive_loss_layers: how many; by default one fewer than the shallower tower has.
        sigmoid_contrastive_loss: the loss of SigLIP (arXiv 2303.15343) instead of a softmax.
        word_prediction_weight: of a second loss in training, by which the audio tower learns to tell the words of a
            clip's text (see `WordPrediction`); 0 leaves it out. A small model learns in half the pairs with it.
    """

    @records_config
    @typechecked
    def __init__(
        self,
        audio_transformer: AudioSpectrogramTransformer,
        text_transformer: TextTransformer,
        dim_latent: int = 128,
        decoupled_contrastive_learning: bool = True,
        hierarchical_contrastive_loss: bool = False,
        hierarchical_contrastive_loss_layers: int | None = None,
        sigmoid_contrastive_loss: bool = False,
        word_prediction_weight: float = 0.0,
    ):
        super().__init__()
        check_positive(dim_latent=dim_latent)
        if word_prediction_weight < 0:
            raise ValueError(f'word_prediction_weight must be 0 or more, got {word_prediction_weight}')
        self.dim_latent = dim_latent
        self.audio = audio_transformer
        self.text = text_transformer

        self.text_to_latents = nn.Linear(self.text.dim, dim_latent)
        self.audio_to_latents = nn.Linear(self.audio.dim, dim_latent)

        if sigmoid_contrastive_loss:
            self.contrast = SigmoidContrastiveLearning()
        else:
            self.contrast = SoftmaxContrastiveLearning(decoupled_contrastive_learning=decoupled_contrastive_learning)

        self.multi_layer_contrastive_learning = None
        if hierarchical_contrastive_loss:
            depths = self.audio.depth, self.text.depth
            layers = hierarchical_contrastive_loss_layers
            layers = max(1, min(depths) - 1) if layers is None else layers
            if not 1 <= layers <= min(depths):
                raise ValueError(
                    f'hierarchical_contrastive_loss_layers must lie between 1 and the depth of the shallower tower, '
                    f'{min(depths)}, got {layers}'
                )
            # the buffers are part of upstream's state dict; the lists spare a look at them at every step
            self.register_buffer('text_layers_indices', interspersed_indices(layers, self.text.depth))
            self.register_buffer('audio_layers_indices', interspersed_indices(layers, self.audio.depth))
            self.text_layers = self.text_layers_indices.tolist()
            self.audio_layers = self.audio_layers_indices.tolist()
            self.multi_layer_contrastive_learning = MultiLayerContrastiveLoss(
                audio_dim=self.audio.dim,
                text_dim=self.text.dim,
                dim_latent=dim_latent,
                layers=layers,
                decoupled_contrastive_learning=decoupled_contrastive_learning,
                sigmoid_contrastive_loss=sigmoid_contrastive_loss,
            )

        self.word_prediction_weight = word_prediction_weight
        self.words = None
        if word_prediction_weight > 0:
            self.words = WordPrediction(dim_latent, self.text.num_tokens, self.text.pad_id)

    @property
    def device(self) -> torch.device:
        return self.audio_to_latents.weight.device

    def __repr__(self) -> str:
        """In short; `print(mulan.audio)` and `print(mulan.text)` show the layers."""
        towers = ', '.join(f'{name} {it.dim} × {it.depth}' for name, it in (('audio', self.audio), ('text', self.text)))
        rate = 'an unknown rate' if self.sample_rate is None else f'{self.sample_rate} Hz'
        known = self.text.known_ids()
        words = f'{self.text.num_tokens} tokens' + ('' if known is None else f', {int(known.sum())} of them known')
        return (
            f'{type(self).__name__}({size_of(self)},\n'
            f'  width × depth: {towers}; latents of {self.dim_latent},\n'
            f'  hears {rate}, reads {words}, at most {self.text.max_seq_len} a text)'
        )

    # embedding

    def get_audio_latents(
        self,
        wavs: Tensor,
        return_all_layers: bool = False,
        audio_lengths: Tensor | Sequence[int] | None = None,
        sample_rate: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed waves.

        Args:
            wavs: `(b, samples)` float waves.
            return_all_layers: also return the hidden states of all layers but the last, `(depth - 1, b, n, dim)`.
            audio_lengths: `(b,)` true lengths in samples of `wavs`.
            sample_rate: rate of `wavs` in Hz, if it is not the model's own: they are resampled.

        Returns:
            `(b, dim_latent)` float32, of length 1.
        """
        latents, encoding = self._encode_audio(wavs, audio_lengths, sample_rate)
        return (latents, encoding.all_but_last()) if return_all_layers else latents

    def get_text_latents(
        self,
        texts: Tensor | None = None,
        raw_texts: Sequence[str] | None = None,
        return_all_layers: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed texts, given as token ids `(b, n)` or as a list of strings.

        Returns:
            `(b, dim_latent)` float32, of length 1, and with `return_all_layers` also `(depth - 1, b, 1 + n, dim)`.
        """
        latents, encoding, _ = self._encode_text(texts, raw_texts)
        return (latents, encoding.all_but_last()) if return_all_layers else latents

    def _encode_audio(self, wavs: Tensor, audio_lengths: Any, sample_rate: int | None) -> tuple[Tensor, Encoding]:
        wavs, audio_lengths = self.to_own_rate(wavs, audio_lengths, sample_rate)
        encoding = self.audio(wavs, audio_lengths=audio_lengths, return_encoding=True)
        return l2norm(self.audio_to_latents(encoding.embeds).float()), encoding

    def _encode_text(self, texts: Tensor | None, raw_texts: Sequence[str] | None) -> tuple[Tensor, Encoding, Tensor]:
        """Latents, what the tower knows, and the token ids."""
        if texts is None and raw_texts is not None:
            texts, raw_texts = self.text.tokenize(raw_texts), None
        encoding = self.text(texts, raw_texts=raw_texts, return_encoding=True)
        latents = l2norm(self.text_to_latents(encoding.embeds).float())
        self.text.note_trained(texts, latents)
        return latents, encoding, texts

    # training

    def forward(
        self,
        wavs: Tensor,
        texts: Tensor | None = None,
        raw_texts: Sequence[str] | None = None,
        return_latents: bool = False,
        return_similarities: bool = False,
        return_pairwise_similarities: bool = False,
        audio_lengths: Tensor | Sequence[int] | None = None,
        sample_rate: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Contrastive loss of a batch of pairs, or the similarities within it.

        Args:
            wavs: `(b, samples)` float waves.
            texts: `(b, n)` integer token ids; or
            raw_texts: `b` strings.
            return_latents: return the latents of both towers, two of `(b, dim_latent)`.
            return_similarities: return the cosine of each pair, `(b,)`.
            return_pairwise_similarities: return the cosine of every wave with every text, `(b, b')`.
            audio_lengths: `(b,)` true lengths in samples.
            sample_rate: rate of `wavs` in Hz, if it is not the model's own.

        Returns:
            the loss, a float32 scalar, unless something else is asked for. Under torch.distributed it is the loss of
            the joined batch of all ranks, and every rank has to ask for it, or those that do wait for ever; latents and
            similarities are a rank's own.

        Raises:
            ValueError: different numbers of waves and texts, or fewer than 2 pairs for a softmax loss.
        """
        latents = self.pair_latents(wavs, texts, raw_texts, audio_lengths, sample_rate)
        return self.compare(latents, return_latents, return_similarities, return_pairwise_similarities)

    def compare(
        self,
        latents: PairLatents,
        return_latents: bool = False,
        return_similarities: bool = False,
        return_pairwise_similarities: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What `forward` returns of the latents of a batch."""
        if return_latents:
            return latents.audio, latents.text
        if return_pairwise_similarities:
            return einsum(latents.audio, latents.text, 'i d, j d -> i j')
        if len(latents.audio) != len(latents.text):
            raise ValueError(f'got {len(latents.audio)} waves but {len(latents.text)} texts; they must come in pairs')
        if return_similarities:
            return einsum(latents.audio, latents.text, 'i d, i d -> i')
        return self.loss(latents)

    def pair_latents(
        self,
        wavs: Tensor,
        texts: Tensor | None = None,
        raw_texts: Sequence[str] | None = None,
        audio_lengths: Tensor | Sequence[int] | None = None,
        sample_rate: int | None = None,
    ) -> PairLatents:
        """Both towers' latents of a batch, as the loss needs them; arguments as in `forward`."""
        audio_latents, audio = self._encode_audio(wavs, audio_lengths, sample_rate)
        text_latents, text, texts = self._encode_text(texts, raw_texts)
        tokens = self.padded(texts) if self.words is not None and self.training else None
        if self.multi_layer_contrastive_learning is None:
            return PairLatents(audio_latents, text_latents, tokens=tokens)
        layers = self.multi_layer_contrastive_learning.latents(
            audio_layers=torch.stack([audio.layers[i] for i in self.audio_layers]),
            text_layers=torch.stack([text.layers[i] for i in self.text_layers]),
            audio_mask=audio.mask,
        )
        return PairLatents(audio_latents, text_latents, *layers, tokens=tokens)

    def loss(self, latents: PairLatents) -> Tensor:
        """The contrastive loss of a batch of pairs, and those of layers and words, a float32 scalar."""
        loss = self.contrast(latents.audio, latents.text)
        if self.multi_layer_contrastive_learning is not None:
            loss = loss + self.multi_layer_contrastive_learning.contrast(latents.audio_layers, latents.text_layers)
        if latents.tokens is not None:
            loss = loss + self.word_prediction_weight * self.words(latents.audio, latents.tokens)
        return loss

    def padded(self, texts: Tensor) -> Tensor:
        """Token ids as long as the tower reads, so that batches can be joined."""
        texts = texts[:, : self.text.max_seq_len].long()
        return F.pad(texts, (0, self.text.max_seq_len - texts.shape[1]), value=self.text.pad_id)

    # saving

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, with the token ids that it was trained on, and `model.safetensors`, from which
        `from_pretrained` rebuilds the model."""
        checkpoint.save(self, folder)

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
    ) -> MuLaN:
        """Rebuild a model from the folder that `save_pretrained` wrote; in eval mode.

        Args:
            folder: with `config.json` and `model.safetensors`; or `user/name` on the Hugging Face Hub.
            revision: branch, tag or commit there.
            subfolder: where the model lies within.
            device: where the model goes.
            dtype: of the weights, float32 by default.
            verify: refuse files whose content is not what was written, by the checksum in them.

        Raises:
            FileNotFoundError: a missing file. ValueError: a damaged one, one of another model, a key of a newer
            version, a device that is not there. TypeError: a `dtype` that is not floating-point.
        """
        folder = find_folder(folder, revision, subfolder)
        return checkpoint.load(cls, folder, device=device, dtype=dtype, verify=verify)

    def load_matching(self, folder: str | Path) -> list[str]:
        """Begin with the weights of another MuLaN, of another vocabulary or other sizes, as far as they fit.

        Weights are taken over by name where shapes agree; token embeddings by token, where both towers have as many
        `num_tokens`, whichever of these are their `known_tokens`, and with them the record of which were trained;
        positions from the first on. A warning names what stays as it was, and tells the share of the weights that
        does not.

            mulan = MuLaN(audio_transformer, TextTransformer(dim = 512, depth = 6, known_tokens = more_tokens))
            mulan.load_matching('results/mulan/best')

        Args:
            folder: written by `save_pretrained`.

        Returns:
            what was not taken over, a text each.

        Raises:
            FileNotFoundError, ValueError: as `from_pretrained`.
        """
        return load_matching(self, folder)

    load_upstream = checkpoint.LoadUpstream()


def interspersed_indices(layers: int, total_layers: int) -> Tensor:
    """`(layers,)` indices spread evenly over a tower of `total_layers`, the first one included."""
    return (torch.arange(layers) * (total_layers / layers)).floor().long()


_evaluated: WeakKeyDictionary[nn.Module, list] = WeakKeyDictionary()  # how often, and the mode before
_evaluated_lock = threading.Lock()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a while: until the last of all threads that do so is done."""
    children = list(module.modules())
    with _evaluated_lock:
        for child in children:
            _evaluated.setdefault(child, [0, child.training])[0] += 1
        if any(child.training for child in children):
            module.eval()
    try:
        yield
    finally:
        with _evaluated_lock:
            for child in children:
                entry = _evaluated[child]
                entry[0] -= 1
                if entry[0] == 0:
                    child.training = entry[1]
                    del _evaluated[child]
