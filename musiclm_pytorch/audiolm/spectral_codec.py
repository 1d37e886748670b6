"""A codec that learns in a minute on a CPU: residual k-means over spectra, phases by the method of Griffin and Lim; and
what it shares with other codecs of spectrograms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from musiclm_pytorch.audiolm.codec import FrameCodec
from musiclm_pytorch.audiolm.kmeans import nearest
from musiclm_pytorch.checks import check_positive, check_sample_rate, records_config, typechecked
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.data.collate import read_item
from musiclm_pytorch.data.rates import agreed_rate

LOUDNESS = 0.5  # power of a magnitude: near that of loudness (Stevens' 0.6), so that errors count as they are heard
BATCH = 4096  # vectors looked at in one step of the k-means
MOMENTUM = 0.99  # of fast Griffin-Lim (Perraudin et al., 2013)
MOST_FILTERS = 2**22  # numbers, 32 MB while they are made; those of 48 kHz are a quarter of that


class SpectrogramCodec(FrameCodec):
    """Base of our codecs, which are fitted or trained here; a subclass has buffers whose names end in `initted`."""

    how_to_fit: ClassVar[str]

    def set_sizes(
        self,
        *,
        sample_rate: int,
        codebook_size: int,
        num_quantizers: int,
        window: float,
        hop: float,
        frames: int,
        resolved_hz: float,
        bands: int,
        **others: int,
    ) -> None:
        """What codecs of spectrograms have in common, of a constructor's keywords; `others` must be positive, too.

        Raises ValueError for numbers out of range.
        """
        check_sample_rate(sample_rate)
        sizes = dict(codebook_size=codebook_size, num_quantizers=num_quantizers)
        check_positive(**sizes, window=window, hop=hop, frames=frames, resolved_hz=resolved_hz, bands=bands, **others)
        self.n_fft, self.hop = 2 * round(window * sample_rate / 2), round(hop * sample_rate)
        if not 1 <= self.hop <= self.n_fft // 2:
            raise ValueError(f'hop must lie between a sample and half of the window, got {hop} s of {window} s')
        if resolved_hz >= sample_rate / 2:
            raise ValueError(f'resolved_hz must lie below half of the sample rate, got {resolved_hz}')
        filters = (self.n_fft // 2 + 1) * (int(resolved_hz * self.n_fft / sample_rate) + bands)
        if filters > MOST_FILTERS:
            raise ValueError(
                f'window={window}, resolved_hz={resolved_hz} and bands={bands} at {sample_rate} Hz are filters of '
                f'{filters} numbers, of which {MOST_FILTERS} are the most; choose smaller ones'
            )
        self.target_sample_hz, self.frames = sample_rate, frames
        self.strides = (self.hop * frames,)
        self.codebook_size, self.num_quantizers, self.rq_groups = codebook_size, num_quantizers, 1

    @property
    def is_fitted(self) -> bool:
        return all(bool(it) for name, it in self.named_buffers() if name.endswith('initted'))

    def check_fitted(self) -> None:
        if not self.is_fitted:
            raise ValueError(f'this codec has no codebooks yet; {self.how_to_fit}')

    def spectra(self, waves: Tensor) -> Tensor:
        """Magnitudes `(b, bins, t * frames)` of waves `(b, samples)`, of whole code frames."""
        count = self.count_frames(waves)
        waves = F.pad(waves.float(), (self.n_fft // 2, self.n_fft // 2))
        spectrum = torch.stft(waves, self.n_fft, self.hop, window=self.fft_window, center=False, return_complex=True)
        return spectrum[..., : count * self.frames].abs()

    def told(self) -> str:
        return f'{"fitted" if self.is_fitted else "not fitted"}, {super().told()}'


class SpectralCodec(SpectrogramCodec):
    """Waves to residual codes and back, in place of a SoundStream where there is no GPU to train one.

    A code vector stands for `frames` neighbouring frames of a magnitude spectrogram, bin by bin up to `resolved_hz` and
    in ever wider bands above, of which `components` principal components are kept. `fit` learns its codebooks level by
    level, each of what the levels before leave (residual vector quantization, arXiv 2107.03312, section III-C, with
    that linear encoder). Waves come back from the magnitudes with phases that fit them; they sound alike, but no sample
    equals the original's.

        codec = SpectralCodec(sample_rate=16000)
        codec.fit(dataset)
        codes = codec.encode(wavs)  # (b, samples // 640, 8) int64
        wavs = codec.decode(codes)  # (b, samples)

    Args:
        sample_rate: Hz.
        codebook_size, num_quantizers: codes of a level, and levels.
        window, hop: of the spectrogram, in seconds. 96 ms tell the overtones of low notes apart.
        frames: of the spectrogram a code.
        resolved_hz: up to where each bin of the spectrogram counts by itself.
        bands: number of bands above.
        components: of the vectors, at most.
        iterations: of Griffin and Lim's method, for each block.

    Raises:
        ValueError: numbers out of range.
    """

    unlike = 'it is not trained by a loss, call fit(dataset)'
    how_to_fit = 'call fit(dataset) or load a fitted one'

    @records_config
    @typechecked
    def __init__(
        self,
        sample_rate: int = 16000,
        codebook_size: int = 512,
        num_quantizers: int = 8,
        window: float = 0.096,
        hop: float = 0.020,
        frames: int = 2,
        resolved_hz: float = 4000.0,
        bands: int = 48,
        components: int = 256,
        iterations: int = 16,
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
            bands=bands,
            components=components,
            iterations=iterations,
        )
        self.iterations = iterations
        # codes decoded at once, and those of them that are decoded once more: two windows
        overlap = -(-self.n_fft // self.hop)
        self.block, self.ahead = -(-5 * overlap // frames), -(-2 * overlap // frames)
        analysis, synthesis = band_filters(self.n_fft, sample_rate, resolved_hz, bands)
        dim = frames * analysis.shape[0]
        self.codebook_dim = min(components, dim)
        self.register_buffer('analysis', analysis, persistent=False)
        self.register_buffer('synthesis', synthesis, persistent=False)
        self.register_buffer('fft_window', torch.hann_window(self.n_fft, dtype=torch.float32), persistent=False)
        self.register_buffer('mean', torch.zeros(dim, dtype=torch.float32))
        self.register_buffer('basis', torch.zeros(dim, self.codebook_dim, dtype=torch.float32))
        self.register_buffer(
            'codebooks', torch.zeros(num_quantizers, codebook_size, self.codebook_dim, dtype=torch.float32)
        )
        self.register_buffer('initted', torch.tensor(False))

    @torch.no_grad()
    def encode(self, waves: Tensor) -> Tensor:
        self.check_fitted()
        residual, codes = (self._vectors(waves) - self.mean) @ self.basis, []
        for codebook in self.codebooks:
            codes.append(nearest(residual, codebook))
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        waves = list(self.decode_stream([codes]))
        return torch.cat(waves, dim=1) if waves else self.mean.new_zeros(codes.shape[:2])

    @torch.no_grad()
    def decode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Codes as they come, `(b, t, q)` each, to waves `(b, samples)`, which together are those of `decode`.

        Blocks of codes are decoded when they are whole, whatever the chunks, and the last frames of a block once more
        with the next one: what is given lags behind the codes by `lag` seconds at most, a last wave brings the rest.
        """
        self.check_fitted()
        phases = BlockPhases(self.iterations, self.hop, self.fft_window, self.ahead * self.frames)
        codes, needed = None, self.ahead + self.block
        for chunk in chunks:
            codes = chunk if codes is None else torch.cat((codes, chunk), dim=1)
            while codes.shape[1] >= needed:
                yield phases.push(self._amplitudes(codes[:, :needed]))
                codes, needed = codes[:, needed:], self.block
        if codes is not None and (codes.shape[1] or needed == self.block):
            yield phases.push(self._amplitudes(codes), last=True)

    @property
    def lag(self) -> float:
        """Seconds of codes that must follow before samples are settled."""
        return (self.ahead + self.block) / float(self.frame_rate) + self.n_fft / 2 / self.target_sample_hz

    def _amplitudes(self, codes: Tensor) -> Tensor:
        """Codes `(b, t, q)` to amplitudes `(b, bins, t * frames)`."""
        levels = rearrange(self.mean + self.vectors_of(codes) @ self.basis.T, 'b t (f d) -> b d (t f)', f=self.frames)
        loudness = einsum(self.synthesis, levels.clamp(min=0), 'f d, b d t -> b f t')
        return loudness ** (1 / LOUDNESS) * (2 / self.fft_window.sum())

    # codebooks

    def fit(
        self, data: Any, *, sample_rate: int | None = None, max_items: int | None = None, max_vectors: int = 100_000,
        seed: int = 0,
    ) -> list[float]:  # fmt: skip
        """Learn the codebooks by k-means, level by level.

        Args:
            data: a data set by index of waves, or of pairs as `MuLaNTrainer` takes; or a tensor `(b, samples)`.
            sample_rate: of its waves in Hz; by default the data set's `sample_rate`, else the codec's.
            max_items: waves used, drawn at random; all by default.
            max_vectors: vectors that the k-means sees, as many of each wave.
            seed: of the draws and of the k-means.

        Returns:
            after each level, the share of the variance that is still missing.

        Raises:
            ValueError: fewer vectors than codes.
        """
        from sklearn.cluster import MiniBatchKMeans  # takes seconds

        check_positive(max_items=max_items, max_vectors=max_vectors)
        rate = agreed_rate(data, sample_rate, default=self.target_sample_hz)
        random = np.random.default_rng(seed)
        chosen = random.permutation(len(data))[:max_items]
        each = max(1, -(-max_vectors // len(chosen)))
        drawn = []
        for index in chosen.tolist():
            if (item := read_item(data[index], f'item {index}')) is None:
                continue
            wave = resample(item[0], rate, self.target_sample_hz)
            vectors = self._vectors(wave[None].float().to(self.device))[0]
            places = random.permutation(len(vectors))[:each]
            drawn.append(vectors[torch.from_numpy(places)].cpu())
        vectors = torch.cat(drawn) if drawn else torch.zeros(0, len(self.mean), dtype=torch.float32)
        least = max(self.codebook_size, self.codebook_dim)
        if len(vectors) < least:
            raise ValueError(
                f'{self.codebook_size} codes of {self.codebook_dim} components need at least {least} vectors of '
                f'{self.frames} frames, got {len(vectors)}; give more audio, or a smaller codebook_size and components'
            )
        self.mean.copy_(vectors.mean(dim=0))
        vectors -= self.mean.cpu()
        variance, missing = float(vectors.double().square().sum()), []
        # the directions in which the vectors differ most
        self.basis.copy_(torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -self.codebook_dim :])
        residual = (vectors @ self.basis.cpu()).numpy()
        beyond = variance - float(np.square(residual, dtype=np.float64).sum())
        for level in range(self.num_quantizers):
            means = MiniBatchKMeans(
                self.codebook_size, batch_size=BATCH, n_init=1, max_no_improvement=20, random_state=seed
            ).fit(residual)
            residual -= means.cluster_centers_[means.labels_]
            self.codebooks[level] = torch.from_numpy(means.cluster_centers_)
            missing.append((beyond + float(np.square(residual, dtype=np.float64).sum())) / variance)
        self.initted.fill_(True)
        return missing

    def _vectors(self, waves: Tensor) -> Tensor:
        """`(b, samples)` to `(b, samples // downsample_factor, d)`."""
        levels = einsum(self.analysis, self.spectra(waves).square(), 'd f, b f t -> b d t') ** (LOUDNESS / 2)
        return rearrange(levels, 'b d (t f) -> b t (f d)', f=self.frames)

    def vectors_of(self, codes: Tensor) -> Tensor:
        """The sum of the codes' centres, in principal components."""
        return sum(codebook[own] for codebook, own in zip(self.codebooks, codes.unbind(dim=-1)))


def band_filters(n_fft: int, sample_rate: int, resolved_hz: float, bands: int) -> tuple[Tensor, Tensor]:
    """`(d, bins)` means over bands, and `(bins, d)` straight lines between the bands' middles, which lead back.

    Every bin up to `resolved_hz` is a band of its own; above, the middles of the bands grow by one ratio up to half of
    the sample rate.
    """
    bins = np.arange(n_fft // 2 + 1)
    resolved = int(resolved_hz * n_fft / sample_rate)
    above = np.geomspace(resolved, bins[-1], bands + 1)[1:]
    # a band is a bin wide at least
    middles = np.concatenate([np.arange(resolved + 1), above[np.maximum.accumulate(above) >= resolved + 1]])
    middles = middles[np.concatenate([[True], np.diff(middles) >= 1])]
    synthesis = np.stack([np.interp(bins, middles, row) for row in np.eye(len(middles))], axis=1)
    analysis = synthesis.T / synthesis.sum(axis=0)[:, None]
    return torch.from_numpy(analysis).float(), torch.from_numpy(synthesis).float()


# ---- phases for magnitudes: of spectral peaks by their frequencies, then as neighbouring frames agree ----


def integrate_phases(magnitudes: Tensor, hop: int, turns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Phases that go on from frame to frame as fast as the nearest spectral peak does (single pass spectrogram
    inversion, Beauregard, Harish and Wyse, 2015).

    magnitudes: `(b, f, t)`. hop: in samples. turns: what the call before gave, to go on from.

    Returns complex phases of length 1, `(b, f, t)`, and the turns at the last frame, `(b, f)` float64.
    """
    count = magnitudes.shape[1]
    n_fft = 2 * (count - 1)
    height = magnitudes.clamp(min=1e-8).log()
    around = F.pad(height, (0, 0, 1, 1), mode='replicate')
    below, above = around[:, :-2], around[:, 2:]
    is_peak = (height > below) & (height >= above)
    # the top of a parabola through three bins
    curve = below - 2 * height + above
    offset = torch.where(curve < -1e-6, (below - above) / (2 * curve), 0.0).clamp(-0.5, 0.5)
    bins = torch.arange(count, device=magnitudes.device)[None, :, None]
    last = torch.where(is_peak, bins, -count).cummax(dim=1).values
    following = torch.where(is_peak, bins, 2 * count).flip(1).cummin(dim=1).values.flip(1)
    nearest = torch.where(bins - last <= following - bins, last, following).clamp(0, count - 1)
    cycles = (nearest + offset.gather(1, nearest)) / n_fft  # a sample
    found = (cycles.double() * hop).cumsum(dim=-1)
    if turns is not None:
        found = found + turns[..., None]
    found = found % 1.0
    # the lobe of a window around a peak alternates in sign
    phases = 2 * math.pi * found.gather(1, nearest).float() + math.pi * (bins - nearest).float()
    return torch.polar(torch.ones_like(phases), phases), found[..., -1]


def griffin_lim(
    magnitudes: Tensor, phases: Tensor, iterations: int, hop: int, window: Tensor, *, fixed: int = 0
) -> tuple[Tensor, Tensor]:
    """Amplitudes `(b, f, t)` and phases to begin with to waves `(b, (t - 1) * hop)` and their phases, by the fast
    method of Griffin and Lim. Each iteration lets a frame depend on those that its window overlaps.

    fixed: frames at the beginning whose phases stay.
    """
    shape = dict(n_fft=len(window), hop_length=hop, window=window)
    length = (magnitudes.shape[-1] - 1) * hop
    magnitudes = magnitudes * (window.sum() / 2)
    kept = phases[..., :fixed]
    last = 0.0
    for _ in range(iterations):
        waves = torch.istft(magnitudes * phases, length=length, **shape)
        rebuilt = torch.stft(waves, pad_mode='constant', return_complex=True, **shape)
        phases = rebuilt - MOMENTUM / (1 + MOMENTUM) * last
        phases = torch.cat((kept, (phases / (phases.abs() + 1e-16))[..., fixed:]), dim=-1)
        last = rebuilt
    return torch.istft(magnitudes * phases, length=length, **shape), phases


class BlockPhases:
    """Amplitudes as they come to waves, block by block: the method of Griffin and Lim with look-ahead (Zhu, Beauregard
    and Wyse, 2007), which begins with phases that go on from those of the block before.

    The last `ahead` frames of what has come are phased with it, and again with what follows. The phases of frames
    before them stay, so that no sample that was given out changes.
    """

    def __init__(self, iterations: int, hop: int, window: Tensor, ahead: int):
        self.iterations, self.hop, self.window, self.ahead = iterations, hop, window, ahead
        self.overlap = -(-len(window) // hop)  # frames before one that its window reaches
        self.magnitudes: Tensor | None = None  # (b, f, t): those that stay and are overlapped, and those ahead
        self.phases: Tensor | None = None
        self.fixed = 0

    def push(self, magnitudes: Tensor, last: bool = False) -> Tensor:
        """The next frames `(b, f, t)`, more than `ahead` at first, to the samples that are settled now, `(b, n)`."""
        turns = None
        if self.phases is not None:
            turns = self.phases[..., -1].angle().double() / (2 * math.pi)
        if last:  # the frame at whose middle the wave ends
            known = magnitudes if magnitudes.shape[-1] else self.magnitudes
            magnitudes = torch.cat((magnitudes, known[..., -1:]), dim=-1)
        phases, _ = integrate_phases(magnitudes, self.hop, turns)
        if self.phases is not None:
            magnitudes = torch.cat((self.magnitudes, magnitudes), dim=-1)
            phases = torch.cat((self.phases, phases), dim=-1)
        waves, phases = griffin_lim(magnitudes, phases, self.iterations, self.hop, self.window, fixed=self.fixed)
        reach = len(self.window) // 2
        settled = magnitudes.shape[-1] - self.ahead
        start = max(0, self.fixed * self.hop - reach)
        waves = waves[:, start:] if last else waves[:, start : settled * self.hop - reach]
        dropped = max(0, settled - self.overlap)
        self.magnitudes, self.phases = magnitudes[..., dropped:], phases[..., dropped:]
        self.fixed = settled - dropped
        return waves
