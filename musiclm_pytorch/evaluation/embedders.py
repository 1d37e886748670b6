"""Clips to embeddings, which distances between sets of clips are computed on: MuLaN, CLAP, EnCodec, VGGish.

No embedder downloads anything: weights come from a model in memory or from local files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from musiclm_pytorch.checks import check_audio, check_positive, described, typechecked
from musiclm_pytorch.data.audio import batches_by_length
from musiclm_pytorch.extras import needing
from musiclm_pytorch.mulan.checkpoint import load_file
from musiclm_pytorch.mulan.model import evaluating
from musiclm_pytorch.mulan.pretrained import PretrainedMuLaN, cut, own_mulan
from musiclm_pytorch.mulan.text_transformer import unknown_words_line
from musiclm_pytorch.pretrained.hub import find_folder

logger = logging.getLogger(__name__)

TEXTS_AT_ONCE = 64
# VGGish: Hz; samples of a window (25 ms), between two (10 ms) and of the transform; mel bands and their range in Hz;
# what keeps the logarithm of silence finite; frames of a patch (0.96 s)
VGGISH_RATE, VGGISH_WINDOW, VGGISH_HOP, VGGISH_FFT = 16000, 400, 160, 512
VGGISH_BANDS, VGGISH_LOWEST, VGGISH_HIGHEST, VGGISH_OFFSET, VGGISH_PATCH = 64, 125.0, 7500.0, 0.01, 96


@runtime_checkable
class Embedder(Protocol):
    """What embeds clips.

    Attributes:
        name: which embedding it is, for reports.
        sample_rate: of the waves that it takes, in Hz.
        dim: width of a frame.
        min_samples: length of the shortest wave that it takes.
    """

    name: str
    sample_rate: int
    dim: int
    min_samples: int

    def embed(self, waves: list[Tensor]) -> list[Tensor]:
        """Waves `(samples,)` of any lengths to frames `(n, dim)`, float32 on the CPU, one tensor a wave.

        What a wave gives does not depend on those beside it, up to rounding. Raises ValueError for a wave that is too
        short.
        """
        ...


class MuLaNEmbedder:
    """The latents of MuLaN, of length 1: one a clip, or one a window.

    Args:
        mulan: whose audio tower takes waves.
        window_seconds: length of a window; by default a clip is embedded whole. The last window ends with the clip,
            and a shorter clip is one window.
        hop_seconds: distance between windows; by default their length.
        batch_size: clips or windows embedded at a time. Those of different lengths share a batch only if the audio
            tower has `support_variable_length`.
        sample_rate: of the waves in Hz, for a MuLaN that does not know its own.

    Raises:
        ValueError: a MuLaN without a sample rate or on spectrograms, a window that is too short or too long for it.
    """

    name = 'mulan'

    @typechecked
    def __init__(
        self,
        mulan: nn.Module,
        window_seconds: float | None = None,
        hop_seconds: float | None = None,
        batch_size: int = 32,
        sample_rate: int | None = None,
    ):
        check_positive(window_seconds=window_seconds, hop_seconds=hop_seconds, batch_size=batch_size)
        mulan = own_mulan(mulan)
        if mulan.audio.accept_spec or (mulan.sample_rate or sample_rate) is None:
            raise ValueError(
                'waves cannot be embedded by a MuLaN that takes spectrograms or does not know its sample rate; build '
                'the audio tower with audio_sample_rate and without accept_spec, or pass sample_rate'
            )
        if hop_seconds is not None and window_seconds is None:
            raise ValueError(f'hop_seconds={hop_seconds} is the distance between windows; pass window_seconds too')
        self.mulan, self.batch_size = mulan, batch_size
        self.sample_rate, self.dim = mulan.sample_rate or sample_rate, mulan.dim_latent
        self.min_samples = mulan.audio.min_samples
        self.max_samples = mulan.audio.max_audio_length
        self.window = None if window_seconds is None else round(window_seconds * self.sample_rate)
        self.hop = self.window if hop_seconds is None else max(1, round(hop_seconds * self.sample_rate))
        if self.window is not None and not self.min_samples <= self.window <= (self.max_samples or self.window):
            raise ValueError(
                f'this MuLaN takes {self.min_samples} to {self.max_samples or "any number of"} samples, but '
                f'window_seconds={window_seconds} is {self.window} at {self.sample_rate} Hz'
            )

    @typechecked
    @torch.no_grad()
    def embed(self, waves: list[Tensor]) -> list[Tensor]:
        """See `Embedder.embed`. Raises ValueError for a wave beyond the tower's `max_audio_length`, too."""
        check_waves(self, waves)
        if self.window is None:
            pieces, counts = waves, [1] * len(waves)
            if waves and self.max_samples is not None and (longest := max(map(len, waves))) > self.max_samples:
                raise ValueError(
                    f'a wave has {longest} samples, but max_audio_length is {self.max_samples}; pass window_seconds='
                    f'{self.max_samples / self.sample_rate:g} or less'
                )
        else:
            pieces, counts = cut(waves, self.window, self.hop)

        latents = torch.empty(len(pieces), self.dim, dtype=torch.float32)
        with evaluating(self.mulan):
            for rows in batches_by_length(pieces, self.batch_size, mixed=self.mulan.audio.support_variable_length):
                latents[rows] = embed_together(self.mulan, [pieces[row] for row in rows])
        return list(latents.split(counts))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """MuLaN's latents of texts, `(n, dim)` float32 on the CPU; a text gives the same wherever it stands.

        Words that MuLaN does not know are told in the log: what it says of these texts means little.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f'texts must be one or more strings in a list, got {described(texts)}')
        different = list(dict.fromkeys(texts))
        unknown = [words for text in different if (words := self.mulan.text.unknown_words(text))]
        if unknown:
            line = unknown_words_line(list(dict.fromkeys(chain.from_iterable(unknown))), None)
            logger.warning('%s, in %d of %d different texts', line, len(unknown), len(different))
        latents = latents_of_texts(self.mulan, different, TEXTS_AT_ONCE)
        places = {text: place for place, text in enumerate(different)}
        return latents[[places[text] for text in texts]]


class CLAPEmbedder(MuLaNEmbedder):
    """The audio and text embeddings of CLAP (arXiv 2211.06687), of length 1, by transformers' `ClapModel`.

    A clip gives one frame a window of the length that the model was made for, 10 s; the last window ends with the
    clip, and a shorter clip is repeated as the model's feature extractor does. So nothing is cropped at random, which
    that extractor would do with longer clips.

    Args:
        model: a folder with the files of model and processor, the name of a model in the local cache of Hugging Face,
            or a `ClapModel`.
        processor: a `ClapProcessor`; needed with a `ClapModel`.
        batch_size: windows embedded at a time.
        device: where to compute; by default where the model is.

    Raises:
        ImportError: transformers is missing. FileNotFoundError: no such model on this machine. ValueError: one that is
        damaged or of another kind.
    """

    name = 'clap'

    @typechecked
    def __init__(
        self,
        model: Any,
        processor: Any = None,
        batch_size: int = 8,
        device: str | torch.device | None = None,
    ):
        with needing('CLAPEmbedder needs the package transformers', 'eval'):
            from transformers import ClapModel
        if isinstance(model, (str, Path)):
            try:
                mulan = PretrainedMuLaN(find_folder(model, local_only=True), processor)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f'no CLAP model with its processor at {model!s} ({error}); fetch one first, such as with '
                    '"hf download laion/larger_clap_music --local-dir FOLDER", and pass the folder'
                ) from error
        elif isinstance(model, ClapModel):
            mulan = PretrainedMuLaN(model, processor)
        else:
            raise TypeError(f'model must be a path or a transformers.ClapModel, got {type(model).__name__}')
        window = mulan.audio.max_audio_length / mulan.sample_rate
        super().__init__(mulan.to(device or mulan.device), window, batch_size=batch_size)


class EnCodecEmbedder:
    """What EnCodec's encoder gives before quantization (arXiv 2210.13438): 75 frames a second of width 128.

    Args:
        model: the weights of the 24 kHz model, a local `encodec_24khz-d7cc33bc.th`; or an `encodec.EncodecModel` that
            is mono and takes clips whole, unlike the 48 kHz model.
        batch_size: clips embedded at a time; only clips of the same length share a batch.
        device: where to compute; by default where the model is.

    Raises:
        ImportError: encodec is missing. FileNotFoundError: no such file. ValueError: weights or a model that do not
            fit.
    """

    name = 'encodec'

    @typechecked
    def __init__(self, model: Any, batch_size: int = 8, device: str | torch.device | None = None):
        check_positive(batch_size=batch_size)
        with needing('EnCodecEmbedder needs the package encodec', 'eval'):
            from encodec import EncodecModel
        if isinstance(model, (str, Path)):
            path, model = model, EncodecModel.encodec_model_24khz(pretrained=False)
            url = 'https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th'
            load_file(model, path, f'weights of the 24 kHz EnCodec, fetched from {url},')
        if not isinstance(model, EncodecModel):
            raise TypeError(f'model must be a path or an encodec.EncodecModel, got {type(model).__name__}')
        if model.channels != 1 or model.normalize or model.segment is not None:
            raise ValueError(
                f'the EnCodec model {model.name!r} takes {model.channels} channels in segments of {model.segment} s; '
                'use the 24 kHz model, which takes mono clips whole'
            )
        self.model, self.batch_size = model if device is None else model.to(device), batch_size
        self.sample_rate, self.dim = model.sample_rate, model.encoder.dimension
        self.min_samples = model.encoder.hop_length

    @typechecked
    @torch.no_grad()
    def embed(self, waves: list[Tensor]) -> list[Tensor]:
        """See `Embedder.embed`."""
        check_waves(self, waves)
        device = next(self.model.parameters()).device
        found: dict[int, Tensor] = {}
        with evaluating(self.model):
            for rows in batches_by_length(waves, self.batch_size, mixed=False):
                batch = torch.stack([waves[row] for row in rows]).to(device)
                frames = self.model.encoder(rearrange(batch, 'b n -> b 1 n'))
                found |= zip(rows, rearrange(frames, 'b d t -> b t d').float().cpu())
        return [found[row] for row in range(len(waves))]


class VGGishEmbedder:
    """VGGish's embeddings of 0.96 s each, of width 128, before their last activation; what is left over is dropped.

    `path` is a local copy of torchvggish's weights, `vggish-10086976.pth`; `batch_size` patches are embedded at a time.
    Raises FileNotFoundError for no such file, ValueError for weights that do not fit.
    """

    name, sample_rate, dim = 'vggish', VGGISH_RATE, 128
    min_samples = VGGISH_WINDOW + (VGGISH_PATCH - 1) * VGGISH_HOP

    @typechecked
    def __init__(self, path: str | Path, batch_size: int = 32, device: str | torch.device = 'cpu'):
        check_positive(batch_size=batch_size)
        with torch.device('meta'):  # to draw no numbers
            model = VGGish()
        url = 'https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth'
        load_file(model.to_empty(device='cpu'), path, f'weights of VGGish, fetched from {url},')
        self.model, self.batch_size, self.device = model.eval().to(device), batch_size, device

    @typechecked
    @torch.no_grad()
    def embed(self, waves: list[Tensor]) -> list[Tensor]:
        """See `Embedder.embed`."""
        check_waves(self, waves)
        if not waves:
            return []
        patches = [vggish_patches(wave.to(self.device)) for wave in waves]
        found = [self.model(batch).cpu() for batch in torch.cat(patches).split(self.batch_size)]
        return list(torch.cat(found).split([len(own) for own in patches]))


class VGGish(nn.Module):
    """The network of the first Fréchet audio distance (arXiv 1609.09430), under the weight names of torchvggish, whose
    package downloads weights when it is built and needs resampy.

    Patches `(n, 96, 64)` to embeddings `(n, 128)`, before their last activation and without the PCA of YouTube-8M, as
    the toolkits that report FAD by VGGish take them; torchvggish itself goes on to a ReLU.
    """

    def __init__(self):
        super().__init__()
        layers, width = [], 1
        for block in ((64,), (128,), (256, 256), (512, 512)):
            for channels in block:
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
                width = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 6 * 4, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 128)
        )

    def forward(self, patches: Tensor) -> Tensor:
        features = self.features(rearrange(patches, 'n t f -> n 1 t f'))
        # TensorFlow's order, which the weights were trained in
        return self.embeddings(rearrange(features, 'n c t f -> n (t f c)'))


def vggish_patches(wave: Tensor) -> Tensor:
    """VGGish's patches `(n, 96, 64)` of a wave `(samples,)` at 16 kHz: log of mel bands of magnitudes, every 10 ms.

    Patches of 0.96 s follow each other without overlap, frames are not padded, and what is left over is dropped.
    """
    window = torch.hann_window(VGGISH_WINDOW, periodic=True, device=wave.device)
    magnitudes = torch.fft.rfft(wave.float().unfold(-1, VGGISH_WINDOW, VGGISH_HOP) * window, n=VGGISH_FFT).abs()
    mel = torch.log(magnitudes @ vggish_mel_filters().to(magnitudes) + VGGISH_OFFSET)
    return rearrange(mel[: len(mel) // VGGISH_PATCH * VGGISH_PATCH], '(n t) f -> n t f', t=VGGISH_PATCH)


def vggish_mel_filters() -> Tensor:
    """`(257, 64)` float64: triangles whose sides are straight over mel, not over Hz as usual elsewhere."""

    def to_mel(frequencies: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(frequencies / 700.0)

    bins = to_mel(torch.linspace(0, VGGISH_RATE / 2, VGGISH_FFT // 2 + 1, dtype=torch.float64))[:, None]
    low, high = to_mel(torch.tensor([VGGISH_LOWEST, VGGISH_HIGHEST], dtype=torch.float64)).tolist()
    edges = torch.linspace(low, high, VGGISH_BANDS + 2, dtype=torch.float64)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)


def embed_together(mulan: nn.Module, waves: Sequence[Tensor]) -> Tensor:
    """The latents `(n, dim_latent)` float32 on the CPU of waves `(samples,)` in one batch."""
    lengths = [len(wave) for wave in waves]
    # without lengths, nothing needs masking
    given = dict(audio_lengths=lengths) if min(lengths) < max(lengths) else {}
    batch = pad_sequence(waves, batch_first=True).to(mulan.device)
    return mulan.get_audio_latents(batch, **given).float().cpu()


@torch.no_grad()
def latents_of_texts(mulan: nn.Module, texts: list[str], batch_size: int) -> Tensor:
    """`(n, dim_latent)` on the CPU; the model computes in eval mode."""
    batches = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
    with evaluating(mulan):
        return torch.cat([mulan.get_text_latents(raw_texts=batch).cpu() for batch in batches])


def check_waves(embedder: Embedder, waves: list[Tensor]) -> None:
    """Raise TypeError or ValueError unless waves are floats `(samples,)` and long enough for an embedder."""
    for index, wave in enumerate(waves):
        check_audio(wave, ndim=1, shape='(samples,)', name=f'waves[{index}]')
        if len(wave) < embedder.min_samples:
            raise ValueError(f'waves[{index}]: {too_short(embedder, len(wave))}')


def too_short(embedder: Embedder, samples: int) -> str:
    """How a wave falls short of what an embedder takes."""
    return f'{embedder.name} needs at least {embedder.min_samples} samples at {embedder.sample_rate} Hz, got {samples}'
