"""What codecs share: the names by which audiolm-pytorch calls one; for ours the sizes of a spectrogram, and phases."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from musiclm_pytorch.audiolm.convert import passes_as
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.checks import as_tensor, check_audio, check_positive, check_sample_rate
from musiclm_pytorch.data.audio import resample
from musiclm_pytorch.pretrained.hub import HubModel, find_folder

MOMENTUM = 0.99  # of fast Griffin-Lim (Perraudin et al., 2013)
MOST_FILTERS = 2**22  # numbers, 32 MB while they are made; those of 48 kHz are a quarter of that

C = TypeVar('C', bound='FrameCodec')


@passes_as('SoundStream')
class FrameCodec(HubModel, nn.Module):
    """Base of codecs; a subclass gives `encode`, `decode` and `vectors_of`, and the attributes below.

    It is a `Codec`, and is called like a `SoundStream` of audiolm-pytorch too, whose classes take it. It stays float32
    when the model around it is cast: codes are decided by small differences.

    Attributes:
        target_sample_hz: Hz, also `sample_rate`.
        strides: samples a code frame, in a tuple; also `downsample_factor`.
        codebook_size, num_quantizers: codes of a level, and levels; `rq_groups` is 1.
    """

    unlike: ClassVar[str]  # what to do where audiolm-pytorch would ask for a loss

    def encode(self, waves: Tensor) -> Tensor:
        """`(b, samples)` float32 at `sample_rate` to codes `(b, samples // downsample_factor, q)` int64."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `(b, t, q)` to waves `(b, samples)`; of fewer than all levels, what the first ones tell."""
        raise NotImplementedError

    def vectors_of(self, codes: Tensor) -> Tensor:
        """The sum of the codes' vectors, `(b, t, d)`."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    @property
    def device(self) -> torch.device:
        return next(itertools.chain(self.buffers(), self.parameters())).device

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.target_sample_hz

    @property
    def frame_rate(self) -> Fraction:
        """Code frames a second."""
        return Fraction(self.target_sample_hz, self.downsample_factor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights, for `from_pretrained`; JSON and safetensors, nothing is pickled."""
        save_module(self, folder)

    @classmethod
    def from_pretrained(
        cls: type[C],
        folder: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        device: str | torch.device = 'cpu',
        verify: bool = True,
    ) -> C:
        """Rebuild a codec of this class from its folder, in eval mode and float32.

        Arguments and errors are as in `MuLaN.from_pretrained`.
        """
        codec = load_module(find_folder(folder, revision, subfolder), device=device, verify=verify)
        if not isinstance(codec, cls):
            name = type(codec).__name__
            raise ValueError(f'{folder} holds a {name}, not a {cls.__name__}')
        return codec

    # what audiolm-pytorch calls

    @property
    def downsample_factor(self) -> int:
        """Samples a code frame."""
        return self.strides[0]

    @property
    def seq_len_multiple_of(self) -> int:
        return self.strides[0]

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.told()})'

    def told(self) -> str:
        """What `repr` says."""
        return (
            f'{self.num_quantizers} levels of {self.codebook_size} codes, {float(self.frame_rate):g} frames a second '
            f'at {self.target_sample_hz} Hz'
        )

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        return_encoded: bool = False,
        return_codes_only: bool = False,
        return_recons_only: bool = False,
        input_sample_hz: int | None = None,
        **_: Any,
    ) -> Any:
        """`(b, samples)` waves to vectors `(b, t, d)`, codes `(b, t, q)` and a loss of 0, or to one of these.

        With `return_recons_only`, what is left of the waves, `(b, 1, samples)`. Samples beyond whole codes are cut off.
        """
        if not (return_encoded or return_codes_only or return_recons_only):
            raise ValueError(f'a {type(self).__name__} gives no loss here; {self.unlike}')
        x = as_tensor(x, self.device)
        if isinstance(x, Tensor):
            x = rearrange(x, '... n -> (...) n')
        x = check_audio(x, ndim=2, shape='(batch, samples)').float()
        if input_sample_hz is not None:
            x = resample(x, input_sample_hz, self.target_sample_hz)
        codes = self.encode(x)
        if return_codes_only:
            return codes
        if return_recons_only:
            return self.decode_from_codebook_indices(codes)
        return self.vectors_of(codes), codes, torch.zeros((), device=x.device)

    def decode_from_codebook_indices(self, quantized_indices: Tensor) -> Tensor:
        """`decode`, with a channel: `(b, 1, samples)`."""
        return rearrange(self.decode(quantized_indices), 'b n -> b 1 n')

    def count_frames(self, waves: Tensor) -> int:
        """Whole code frames of waves `(b, samples)`. Raises ValueError if there are none."""
        count = waves.shape[-1] // self.downsample_factor
        if count == 0:
            raise ValueError(f'a wave of {waves.shape[-1]} samples is shorter than a code, {self.downsample_factor}')
        return count


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
    phases = 2 * math.pi * found.gather(1, nearest).float() + math.pi * (bins - nearest)
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
    last = torch.zeros((), device=magnitudes.device)
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
