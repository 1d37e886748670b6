"""A neural codec small enough to learn on a CPU: ConvNeXt blocks around a residual quantizer, magnitudes out of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from musiclm_pytorch.audiolm.spectral_codec import SpectrogramCodec, griffin_lim, integrate_phases
from musiclm_pytorch.checks import check_not_negative, records_config, typechecked
from musiclm_pytorch.codecs.discriminator import SpectrogramDiscriminator
from musiclm_pytorch.codecs.residual import ResidualQuantizer, commitment_loss
from musiclm_pytorch.mulan.spectrogram import mel_filters

FLOOR = 1e-4  # amplitude, -80 dB of full scale, below which levels grow linearly rather than by their logarithm
MELS = (32, 64, 128)  # bands of the spectra that the loss compares
LOUDEST = 2.0  # amplitude; a full-scale sine has 1, the loudest part of a square wave 1.27
SCALE = 3.0  # brings the levels of ordinary music to about 0 and 1


class ConvNeXtBlock(nn.Module):
    """`(b, t, d)` to the same: a depthwise convolution over time, and a feed-forward layer (arXiv 2201.03545).

    A frame sees `lookahead` frames ahead and the rest of the kernel back.
    """

    def __init__(self, dim: int, *, kernel: int, lookahead: int, expansion: int, scale: float):
        super().__init__()
        self.padding = (kernel - 1 - lookahead, lookahead)
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, expansion * dim), nn.GELU(), nn.Linear(expansion * dim, dim))
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.conv(F.pad(rearrange(x, 'b t d -> b d t'), self.padding))
        return x + self.scale * self.feed_forward(self.norm(rearrange(mixed, 'b d t -> b t d')))


class NeuralCodec(SpectrogramCodec):
    """Waves to residual codes and back, learned: better than a `SpectralCodec` at the same bit rate, and quick.

    The encoder sees a spectrogram, its bins up to `resolved_hz` and bands above. A code frame stands for `frames` of
    its frames; residual vector quantization (arXiv 2107.03312, section III-C) makes `num_quantizers` codes of it. The
    decoder, ConvNeXt blocks as in Vocos (arXiv 2306.00814), predicts the magnitude of every bin. Phases are not
    learned: those of each spectral peak go on by its frequency (Beauregard, Harish and Wyse, 2015), and a few
    steps of Griffin and Lim's method make neighbouring frames agree. So waves sound alike, but no sample equals the
    original's.

        codec = NeuralCodec(sample_rate=24000)
        CodecTrainer(codec, dataset, batch_size=16).train()
        codes = codec.encode(waves)  # (b, samples // 960, 12) int64, 3 kbit/s
        waves = codec.decode(codes)  # (b, samples)

    Decoding looks ahead by `lookahead` code frames a block and by as much as phases need, so that `decode_stream` can
    give out what no later code changes.

    Args:
        sample_rate: Hz.
        codebook_size, num_quantizers: codes of a level, and levels.
        dim: width of the encoder and of the decoder.
        encoder_depth, decoder_depth: their ConvNeXt blocks.
        codebook_dim: width of the vectors that are quantized.
        kernel, lookahead: code frames that a block sees, and how many of them lie ahead.
        window, hop: of the spectrogram, in seconds.
        frames: of the spectrogram a code frame.
        resolved_hz: up to where each bin of the spectrogram is an input by itself.
        bands: number of bands above.
        iterations: of Griffin and Lim's method.
        quantizer_dropout: share of the training steps that use the first levels only, a random number of them.
        loudest: root mean square of a decoded frame, at most; one beyond it is made softer. A stage may draw codes that
            no wave has, whose levels add up to far too much; what the training's clips reach keeps music from bursts.

    Raises:
        ValueError: numbers out of range.
    """

    unlike = 'losses(waves) does'
    how_to_fit = 'train it with CodecTrainer, or load a trained one'
    # what the codes of a wave do not depend on
    BESIDE_CODES = (
        'decoder',
        'decoder_line',
        'iterations',
        'quantizer_dropout',
        'loudest',
        'codes_frozen',
        'past',
        'future',
    )

    @records_config
    @typechecked
    def __init__(
        self,
        sample_rate: int = 24000,
        codebook_size: int = 1024,
        num_quantizers: int = 12,
        dim: int = 256,
        encoder_depth: int = 2,
        decoder_depth: int = 4,
        codebook_dim: int = 128,
        kernel: int = 7,
        lookahead: int = 1,
        window: float = 0.064,
        hop: float = 0.020,
        frames: int = 2,
        resolved_hz: float = 4000.0,
        bands: int = 64,
        iterations: int = 4,
        quantizer_dropout: float = 0.1,
        loudest: float = 1.0,
    ):
        nn.Module.__init__(self)  # the parent's own would build networks
        self.set_sizes(
            sample_rate=sample_rate,
            codebook_size=codebook_size,
            num_quantizers=num_quantizers,
            window=window,
            hop=hop,
            frames=frames,
            resolved_hz=resolved_hz,
            dim=dim,
            encoder_depth=encoder_depth,
            decoder_depth=decoder_depth,
            codebook_dim=codebook_dim,
            kernel=kernel,
            bands=bands,
        )
        if not 0 <= lookahead < kernel:
            raise ValueError(f'lookahead must lie between 0 and {kernel - 1}, less than kernel, got {lookahead}')
        check_not_negative(iterations=iterations)
        if not 0 <= quantizer_dropout <= 1:
            raise ValueError(f'quantizer_dropout must lie in [0, 1], got {quantizer_dropout}')
        if not 0 < loudest <= 1:
            raise ValueError(f'loudest must lie in (0, 1], the root mean square of a wave within ±1, got {loudest}')
        self.iterations, self.quantizer_dropout, self.loudest = iterations, quantizer_dropout, loudest
        self.codes_frozen = False
        bins = self.n_fft // 2 + 1
        filters = band_means(self.n_fft, sample_rate, resolved_hz, bands)
        self.register_buffer('analysis', filters, persistent=False)
        self.register_buffer('fft_window', torch.hann_window(self.n_fft, dtype=torch.float32), persistent=False)
        hertz = (torch.arange(bins) * sample_rate).float() / self.n_fft
        weights = 1 / (700 + hertz)  # bins a mel, so that the loss counts mels
        self.register_buffer('bin_weights', weights / weights.mean(), persistent=False)
        band_weights = (filters > 0).float() @ self.bin_weights
        self.register_buffer('band_weights', (band_weights / band_weights.mean()).sqrt(), persistent=False)
        for mels in MELS:
            bank = mel_filters(mels, bins=bins, sample_rate=sample_rate, f_min=0.0, f_max=sample_rate / 2)
            # low bands narrower than a bin are empty
            self.register_buffer(f'mel_{mels}', bank[:, bank.sum(dim=0) > 0].T.contiguous(), persistent=False)

        def blocks(depth: int) -> nn.Sequential:
            each = dict(kernel=kernel, lookahead=lookahead, expansion=3, scale=1 / depth)
            return nn.Sequential(*(ConvNeXtBlock(dim, **each) for _ in range(depth)), nn.LayerNorm(dim))

        inputs = frames * len(filters)
        self.codebook_dim = min(codebook_dim, inputs)
        self.register_buffer('input_mean', torch.zeros(inputs, dtype=torch.float32))
        # beside the straight lines that `fit` finds, the blocks begin at 0
        self.encoder_line = nn.Linear(inputs, self.codebook_dim)
        self.decoder_line = nn.Linear(self.codebook_dim, frames * bins)
        self.encoder = nn.Sequential(
            nn.Linear(inputs, dim), blocks(encoder_depth), zeroed(nn.Linear(dim, self.codebook_dim))
        )
        self.quantizer = ResidualQuantizer(self.codebook_dim, codebook_size, num_quantizers)
        self.decoder = nn.Sequential(
            nn.Linear(self.codebook_dim, dim), blocks(decoder_depth), zeroed(nn.Linear(dim, frames * bins))
        )
        # code frames on either side that a decoded one depends on
        self.past, self.future = decoder_depth * (kernel - 1 - lookahead), decoder_depth * lookahead

    # waves and codes

    @torch.no_grad()
    def encode(self, waves: Tensor) -> Tensor:
        self.check_fitted()
        return self.quantizer(self._encoded(self._inputs(self._magnitudes(waves))))[1]

    def decode(self, codes: Tensor) -> Tensor:
        self.check_fitted()
        return DecodingState(self).push(codes, last=True)

    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Codes as they come, `(b, t, q)` each, to waves `(b, samples)`, which together are those of `decode`.

        What is given lags behind the codes by `lag` seconds, a last wave brings the rest.
        """
        self.check_fitted()
        state, chunk = DecodingState(self), None
        for chunk in chunks:
            waves = state.push(chunk, last=False)
            if waves.shape[-1]:
                yield waves
        if chunk is not None:
            yield state.push(chunk[:, :0], last=True)

    @property
    def edge(self) -> int:
        """Spectral frames on either side that a frame's samples depend on, by its phases."""
        return (self.iterations + 1) * -(-self.n_fft // self.hop)

    @property
    def lag(self) -> float:
        """Seconds of codes that must follow before samples are settled."""
        return (self.future * self.frames + self.edge + 1) * self.hop / self.target_sample_hz

    def vectors_of(self, codes: Tensor) -> Tensor:
        return self.quantizer.vectors_of(codes)

    def with_first_levels(self, num_quantizers: int) -> NeuralCodec:
        """A copy that has the first levels of codes alone: fewer bits a second, the same codes in these levels.

        Raises ValueError for more levels than there are, or none.
        """
        if not 0 < num_quantizers <= self.num_quantizers:
            raise ValueError(f'num_quantizers must lie between 1 and {self.num_quantizers}, got {num_quantizers}')
        fewer = NeuralCodec(**{**self.config, 'num_quantizers': num_quantizers})
        levels = ('quantizer.codebooks', 'quantizer.counts')
        weights = {name: it[:num_quantizers] if name in levels else it for name, it in self.state_dict().items()}
        fewer.to(self.device, self.encoder_line.weight.dtype).load_state_dict(weights)
        return fewer.train(self.training)

    # training

    def freeze_codes(self) -> NeuralCodec:
        """Have training change the decoder alone: the codes of a wave stay, and so do tokens and stages made of them.

        Raises ValueError for a codec without codebooks.
        """
        self.check_fitted()
        self.codes_frozen = True
        for module in (self.encoder_line, self.encoder):
            module.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> NeuralCodec:
        super().train(mode)
        if self.codes_frozen:
            self.quantizer.eval()  # in training, codebooks follow what comes to them
        return self

    @torch.no_grad()
    def fit(self, waves: Iterable[Tensor], *, max_frames: int = 60_000, seed: int = 0) -> list[float]:
        """Where training begins: the best straight lines to vectors and back, and codebooks by k-means between them.

        Args:
            waves: `(b, samples)` each, read until they have `max_frames` code frames.
            seed: of the k-means.

        Returns the share of the vectors' energy that each level leaves. Raises ValueError for fewer code frames than
        codes.
        """
        inputs, targets, count = [], [], 0
        for batch in waves:
            magnitudes = self._magnitudes(batch.to(self.device))
            inputs.append(self._inputs(magnitudes).flatten(0, 1).cpu())
            levels = rearrange(compress(magnitudes), 'b d (t f) -> (b t) (f d)', f=self.frames)
            targets.append((levels / SCALE).half().cpu())
            count += len(inputs[-1])
            if count >= max_frames:
                break
        inputs = torch.cat(inputs) if inputs else torch.zeros(0, len(self.input_mean), dtype=torch.float32)
        mean = inputs.mean(dim=0)
        inputs -= mean
        # the directions in which the inputs differ most, and as far that on average they differ by 1
        variances, directions = torch.linalg.eigh(inputs.T @ inputs / max(1, len(inputs)))
        variances, directions = variances[-self.codebook_dim :].clamp(min=1e-8), directions[:, -self.codebook_dim :]
        lines = directions.T / variances.mean().sqrt()
        vectors = inputs @ lines.T
        left = self.quantizer.fit(vectors, seed=seed)
        quantized = torch.cat([self.quantizer.cpu().eval()(part[None])[0][0] for part in vectors.split(4096)])
        self.quantizer.to(self.device).train(self.training)
        given = F.pad(quantized, (0, 1), value=1.0)
        squares = given.T @ given + 1e-3 * torch.eye(given.shape[1], dtype=given.dtype)
        products = sum(a.T @ b.float() for a, b in zip(given.split(4096), torch.cat(targets).split(4096)))
        back = torch.linalg.solve(squares, products).T
        self.input_mean += mean.to(self.device)
        self.encoder_line.weight.copy_(lines)
        self.encoder_line.bias.zero_()
        self.decoder_line.weight.copy_(back[:, :-1])
        self.decoder_line.bias.copy_(back[:, -1])
        # the blocks see small directions as well as large ones
        self.decoder[0].weight /= (variances / variances.mean()).sqrt().to(self.device)
        return left

    def losses(
        self, waves: Tensor, discriminator: SpectrogramDiscriminator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of waves `(b, samples)`, and its parts: levels by bin, levels by mel band, and commitment. With a
        discriminator also the parts `adversarial`, `feature` and `discriminator_loss`, which are not in the sum.

        All compare spectra before phases are made, so that no gradient goes through these.
        """
        with torch.autocast(waves.device.type, enabled=False):
            magnitudes = self._magnitudes(waves)
            inputs = self._inputs(magnitudes)
        vectors = self._encoded(inputs)
        levels = None
        if self.training and torch.rand(()) < self.quantizer_dropout:
            levels = int(torch.randint(1, self.num_quantizers + 1, ()))
        with torch.autocast(waves.device.type, enabled=False):
            quantized, _ = self.quantizer(vectors.float(), levels)
            commitment = commitment_loss(vectors.float(), quantized)
        found = self.amplitudes(quantized)
        with torch.autocast(waves.device.type, enabled=False):
            bins = (compress(magnitudes) - compress(found)).abs()
            bins = einsum(bins, self.bin_weights, 'b f t, f -> b f t').mean()
            pairs = [(self._mel_levels(magnitudes, mels), self._mel_levels(found, mels)) for mels in MELS]
            mel = sum((real - made).abs().mean() for real, made in pairs) / len(pairs)
        parts = dict(bins=bins, mel=mel, commitment=commitment)
        if discriminator is not None:
            parts |= discriminator.losses(*pairs[-1])._asdict()
        return bins + mel + 0.1 * commitment, parts

    def _mel_levels(self, magnitudes: Tensor, mels: int) -> Tensor:
        """Natural logarithms of the amplitudes in mel bands, `(b, m, t)`."""
        powers = einsum(getattr(self, f'mel_{mels}'), magnitudes.square(), 'm f, b f t -> b m t')
        return 0.5 * (powers + FLOOR**2).log()

    def _magnitudes(self, waves: Tensor) -> Tensor:
        """`(b, samples)` to amplitudes `(b, bins, t * frames)`, of whole code frames."""
        return self.spectra(waves) * (2 / self.fft_window.sum())

    def _inputs(self, magnitudes: Tensor) -> Tensor:
        bands = einsum(self.analysis, magnitudes.square(), 'd f, b f t -> b d t').sqrt()
        levels = compress(bands) / SCALE * self.band_weights[:, None]
        return rearrange(levels, 'b d (t f) -> b t (f d)', f=self.frames) - self.input_mean

    def _encoded(self, inputs: Tensor) -> Tensor:
        return self.encoder_line(inputs) + self.encoder(inputs)

    def amplitudes(self, vectors: Tensor) -> Tensor:
        """Quantized vectors `(b, t, d)` to amplitudes `(b, bins, t * frames)`."""
        levels = self.decoder_line(vectors) + self.decoder(vectors)
        levels = rearrange(levels.float(), 'b t (f d) -> b d (t f)', f=self.frames)
        levels = F.softplus(SCALE * levels, beta=4.0)
        if self.training:
            return FLOOR * torch.expm1(levels)
        # a stage may draw codes that no wave has; no bin of a wave within ±1 is louder, nor are all together
        amplitudes = FLOOR * torch.expm1(levels.clamp(max=math.log1p(LOUDEST / FLOOR)))
        # by Hann's window the squares of a sine's bins add up to 1.5 times its own, and its power is half of that
        power = amplitudes.square().sum(dim=1, keepdim=True) / 3
        return amplitudes * (self.loudest / power.sqrt().clamp(min=self.loudest))


def zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def compress(magnitudes: Tensor) -> Tensor:
    """Amplitudes to levels: their logarithm, from `FLOOR` on."""
    return torch.log1p(magnitudes / FLOOR)


def band_means(n_fft: int, sample_rate: int, resolved_hz: float, bands: int) -> Tensor:
    """`(d, bins)`: means over bands, a bin each up to `resolved_hz` and of one ratio above."""
    bins = torch.arange(n_fft // 2 + 1)
    resolved = int(resolved_hz * n_fft / sample_rate)
    edges = torch.logspace(0, 1, bands + 1, base=(len(bins)) / (resolved + 1), dtype=torch.float32) * (resolved + 1)
    edges = torch.cat((torch.arange(resolved + 1), edges.round())).unique()
    filters = ((bins >= edges[:-1, None]) & (bins < edges[1:, None])).float()
    return filters / filters.sum(dim=1, keepdim=True)


class DecodingState:
    """What a `NeuralCodec` remembers between pieces of codes: those that later levels, phases and samples depend on."""

    def __init__(self, codec: NeuralCodec):
        self.codec = codec
        self.codes: Tensor | None = None  # (b, t, q)
        self.levels: Tensor | None = None  # amplitudes (b, bins, frames), with as many phases
        self.phases: Tensor | None = None
        self.turns: Tensor | None = None
        self.ready = 0  # code frames in `codes` whose levels are known
        self.given = 0  # spectral frames in `levels` whose samples were given out

    @torch.no_grad()
    def push(self, codes: Tensor, last: bool) -> Tensor:
        """The next codes `(b, t, q)`, none at the very end, to the samples that are settled now, `(b, samples)`."""
        codec = self.codec
        self.codes = _joined(self.codes, codes, dim=1)
        known = self.codes.shape[1] - (0 if last else codec.future)
        if known > self.ready or (last and self.codes.shape[1] > 0):
            new = codec.amplitudes(codec.vectors_of(self.codes))
            new = new[..., self.ready * codec.frames : known * codec.frames]
            if last:  # the frame at whose middle the wave ends
                end = new if new.shape[-1] else self.levels
                new = torch.cat((new, end[..., -1:]), dim=-1)
            phases, self.turns = integrate_phases(new, codec.hop, self.turns)
            self.levels, self.phases = _joined(self.levels, new, dim=2), _joined(self.phases, phases, dim=2)
            dropped = max(0, known - codec.past)
            self.codes, self.ready = self.codes[:, dropped:], known - dropped
        count = 0 if self.levels is None else self.levels.shape[-1]
        until = count - 1 - (0 if last else codec.edge)
        if until <= self.given:
            return codec.fft_window.new_zeros(len(codes), 0)
        waves, _ = griffin_lim(self.levels, self.phases, codec.iterations, codec.hop, codec.fft_window)
        waves = waves[:, self.given * codec.hop : until * codec.hop]
        dropped = max(0, until - codec.edge)
        self.levels, self.phases = self.levels[..., dropped:], self.phases[..., dropped:]
        self.given = until - dropped
        return waves


def _joined(before: Tensor | None, new: Tensor, dim: int) -> Tensor:
    return new if before is None else torch.cat((before, new), dim=dim)
