"""The audio tower: an Audio Spectrogram Transformer (arXiv 2104.01778) with a dynamic 2-d position bias."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import pack, rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from musiclm_pytorch.checks import (
    check_audio,
    check_finite,
    check_lengths,
    check_positive,
    check_probability,
    is_traced,
    records_config,
    typechecked,
    values_can_be_checked,
)
from musiclm_pytorch.kernels.attention import GridBias
from musiclm_pytorch.mulan.layers import Encoding, Float32LayerNorm, LayerNorm, Transformer, masked_mean
from musiclm_pytorch.mulan.spectrogram import LogMel, SpecAugment, Spectrogram, frame_mask
from musiclm_pytorch.mulan.summary import ClipSummary

# numbers of a spectrogram that are computed together, 2 MiB as complex ones
BINS_AT_A_TIME = 2**18


class AudioSpectrogramTransformer(nn.Module):
    """Embed waves `(batch, samples)` as `(batch, dim)`.

    Args:
        dim: width of the tower, a multiple of 4, at least 8.
        depth, heads, dim_head, ff_mult: size of the transformer.
        patch_size: bins and frames of a patch; one number for both, or a pair.
        attn_dropout, ff_dropout: dropout probabilities.
        accept_spec: take spectrograms instead of waves, `(batch, frames, bins)`, or `(batch, bins, frames)` with
            `accept_spec_time_first = False`.
        spec_n_fft, spec_power, spec_win_length, spec_hop_length, spec_pad, spec_center, spec_pad_mode: the power
            spectrogram, in samples, as in `torchaudio.transforms.Spectrogram`. `spec_win_length = None` is
            `spec_n_fft`, `spec_hop_length = None` half of the window.
        spec_aug_stretch_factor: in training, stretch in time by a random rate between this and its inverse; 1 is off.
        spec_aug_freq_mask, spec_aug_time_mask: in training, blank up to that many bins and frames; 0 is off.
        patch_dropout_prob: in training, leave out that fraction of the patches (arXiv 2212.00794).
        support_variable_length: let the calls take `audio_lengths`.
        max_audio_length: longest wave in samples; a longer one is cut, with one warning. Without `accept_spec` only.
        audio_sample_rate: sample rate in Hz that the waves have; needed for `spec_n_mels`, for resampling and for
            windows in seconds.
        spec_n_mels: number of mel bands. None keeps the linear power spectrogram of musiclm-pytorch 0.2.8.
        spec_f_min, spec_f_max: range of the mel bands in Hz; None is half the sample rate.
        spec_mean, spec_std: fixed normalisation of the log-mel spectrogram, `(x - mean) / (2 * std)`; the defaults
            are those of AudioSet (AST's recipe).
        clip_summary: add features of the harmony and the rhythm of the whole clip to the embedding (see `ClipSummary`);
            needs `spec_n_mels`.

    Attributes:
        bands: rows of the spectrogram that patches are cut from, None with `accept_spec`.

    Raises:
        ValueError: sizes that do not fit together. TypeError: arguments of a wrong type.
    """

    @records_config
    @typechecked
    def __init__(
        self,
        dim: int,
        depth: int,
        patch_size: int | tuple[int, int] | list[int] = 16,
        dim_head: int = 64,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_mult: float = 4,
        ff_dropout: float = 0.0,
        accept_spec: bool = False,
        accept_spec_time_first: bool = True,
        spec_n_fft: int = 128,
        spec_power: float = 2,
        spec_win_length: int | None = 24,
        spec_hop_length: int | None = None,
        spec_pad: int = 0,
        spec_center: bool = True,
        spec_pad_mode: str = 'reflect',
        spec_aug_stretch_factor: float = 0.8,
        spec_aug_freq_mask: int = 80,
        spec_aug_time_mask: int = 80,
        patch_dropout_prob: float = 0.25,
        support_variable_length: bool = False,
        max_audio_length: int | None = None,
        audio_sample_rate: int | None = None,
        spec_n_mels: int | None = None,
        spec_f_min: float = 0.0,
        spec_f_max: float | None = None,
        spec_mean: float = -4.2677393,
        spec_std: float = 4.5689974,
        clip_summary: bool = False,
    ):
        super().__init__()
        patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(patch_size) != 2 or min(patch_size) < 1:
            raise ValueError(f'patch_size must be one or two positive integers, got {patch_size}')
        if dim % 4 != 0 or dim < 8:
            raise ValueError(
                f'dim must be a multiple of 4 and at least 8 for the 2-d sinusoidal positions, got {dim}; '
                f'try {max(8, -(-dim // 4) * 4)}'
            )
        check_positive(max_audio_length=max_audio_length, audio_sample_rate=audio_sample_rate)
        check_probability(patch_dropout_prob=patch_dropout_prob)
        if max_audio_length is not None and accept_spec:
            raise ValueError('max_audio_length counts samples of a wave and cannot go with accept_spec=True')

        self.dim = dim
        self.depth = depth
        self.patch_size = patch_size
        self.patch_dropout_prob = patch_dropout_prob
        self.accept_spec = accept_spec
        self.accept_spec_time_first = accept_spec_time_first
        self.support_variable_length = support_variable_length
        self.max_audio_length = max_audio_length
        self.sample_rate = audio_sample_rate
        self._warned_of_cut = False

        # front end

        self.spec = Spectrogram(
            n_fft=spec_n_fft,
            win_length=spec_win_length,
            hop_length=spec_hop_length,
            power=spec_power,
            pad=spec_pad,
            center=spec_center,
            pad_mode=spec_pad_mode,
        )
        self.log_mel = None
        if spec_n_mels is not None:
            if accept_spec:
                raise ValueError('spec_n_mels needs waves; with accept_spec=True pass log-mel spectrograms instead')
            if audio_sample_rate is None:
                raise ValueError('spec_n_mels needs audio_sample_rate: mel bands are placed in Hz')
            if spec_power != 2:
                raise ValueError(f'spec_n_mels needs a power spectrogram, spec_power=2, got {spec_power}')
            self.log_mel = LogMel(
                spec_n_mels,
                bins=self.spec.bins,
                sample_rate=audio_sample_rate,
                f_min=spec_f_min,
                f_max=spec_f_max,
                mean=spec_mean,
                std=spec_std,
            )
        self.summary = None
        if clip_summary:
            if spec_n_mels is None:
                raise ValueError('clip_summary=True adds to a log-mel front end; give spec_n_mels as well')
            self.summary = ClipSummary(
                dim, bins=self.spec.bins, sample_rate=audio_sample_rate, hop_length=self.spec.hop_length
            )
        bands = spec_n_mels or self.spec.bins
        self.bands = None if accept_spec else bands
        if not accept_spec and bands < patch_size[0]:
            raise ValueError(
                f'the spectrogram has {bands} bins, fewer than a patch is high ({patch_size[0]}); '
                'raise spec_n_fft or spec_n_mels, or lower patch_size'
            )
        if max_audio_length is not None and max_audio_length < self.min_samples:
            raise ValueError(
                f'max_audio_length {max_audio_length} is shorter than one patch, {self.min_samples} samples'
            )

        self.aug = SpecAugment(
            stretch_factor=spec_aug_stretch_factor,
            freq_mask=spec_aug_freq_mask,
            time_mask=spec_aug_time_mask,
            power=1 if accept_spec else spec_power,
            min_frames=patch_size[1],
        )

        # patches

        dim_patch = patch_size[0] * patch_size[1]
        self.to_patch_tokens = nn.Sequential(
            Rearrange('b (y p1) (x p2) -> b y x (p1 p2)', p1=patch_size[0], p2=patch_size[1]),
            Float32LayerNorm(dim_patch),
            nn.Linear(dim_patch, dim),
            nn.LayerNorm(dim),
        )

        # transformer, and the bias of its attention as a function of the offset between two patches

        self.transformer = Transformer(
            dim=dim,
            depth=depth,
            dim_head=dim_head,
            heads=heads,
            attn_dropout=attn_dropout,
            ff_mult=ff_mult,
            ff_dropout=ff_dropout,
        )
        self.norm = LayerNorm(dim)

        dim_hidden = dim // 4
        self.dynamic_pos_bias_mlp = nn.Sequential(
            nn.Linear(2, dim_hidden),
            nn.SiLU(),
            nn.Linear(dim_hidden, dim_hidden),
            nn.SiLU(),
            nn.Linear(dim_hidden, heads),
        )

    @property
    def min_samples(self) -> int:
        """The shortest wave that it takes: one patch."""
        return self.spec.min_samples(self.patch_size[1])

    @property
    def device(self) -> torch.device:
        return self.norm.learned_gamma.device

    def forward(
        self,
        x: Tensor,
        force_no_patch_dropout: bool = False,
        return_all_layers: bool = False,
        audio_lengths: Tensor | Sequence[int] | None = None,
        return_encoding: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | Encoding:
        """Embed a batch.

        Args:
            x: `(b, samples)` float waves, or spectrograms with `accept_spec`.
            force_no_patch_dropout: keep all patches in training.
            return_all_layers: also return the hidden states of all layers but the last.
            audio_lengths: `(b,)` true lengths in samples (with `accept_spec`, in frames). The embedding is that of
                each item cut to its length, whatever the rest holds.
            return_encoding: return everything there is, as an `Encoding`.

        Returns:
            `(b, dim)`, and with `return_all_layers` also `(depth - 1, b, n, dim)`.

        Raises:
            TypeError: not a floating-point tensor. ValueError: a wrong shape, NaN, too short for one patch, lengths
            of 0 or beyond the tensor.
        """
        x, lengths = self.check_input(x, audio_lengths)
        spec, frames, measured = self.front_end(x, lengths)

        # crop to whole patches

        patch_bins, patch_frames = self.patch_size
        height, width = spec.shape[-2] // patch_bins, spec.shape[-1] // patch_frames
        tokens = self.to_patch_tokens(spec[..., : height * patch_bins, : width * patch_frames])

        # positions, absolute and relative

        tokens = tokens + sincos_2d(height, width, self.dim, device=tokens.device).to(tokens.dtype)
        tokens = rearrange(tokens, 'b y x d -> b (y x) d')
        table, codes, centre = self.position_table(height, width)

        # choose the patches that take part

        dropout = self.patch_dropout_prob if self.training and not force_no_patch_dropout else 0.0
        columns = None if frames is None else frames // patch_frames
        if dropout > 0.0 or columns is not None:
            kept, lengths = choose_patches(height, width, columns, len(tokens), dropout, device=tokens.device)
            tokens = tokens.gather(1, repeat(kept, 'b n -> b n d', d=self.dim))
            codes = codes[kept]
        else:
            codes, lengths = codes[None], None
        bias = GridBias(table, codes, centre, lengths)

        # attention, what else

        layers = self.transformer(tokens, bias=bias)
        mask = bias.key_mask()
        embeds = self.norm(masked_mean(layers[-1], mask))
        if measured is not None:
            embeds = embeds + self.summary(measured)
        return Encoding(embeds, layers, mask).asked(return_all_layers, return_encoding)

    def check_input(self, x: Tensor, audio_lengths) -> tuple[Tensor, Tensor | None]:
        """Check and cut a batch; lengths become a tensor on the device of the batch."""
        if self.accept_spec:
            shape = '(batch, frames, bins)' if self.accept_spec_time_first else '(batch, bins, frames)'
            x = check_audio(x, ndim=3, shape=shape, name='spectrograms', device=self.device)
            x = rearrange(x, 'b t f -> b f t') if self.accept_spec_time_first else x
            if x.shape[1] < self.patch_size[0]:
                raise ValueError(f'spectrograms have {x.shape[1]} bins, fewer than a patch ({self.patch_size[0]})')
            unit, shortest = 'frames', self.patch_size[1]
        else:
            x = check_audio(x, ndim=2, shape='(batch, samples)', device=self.device)
            unit, shortest = 'samples', self.min_samples

        if x.shape[-1] < shortest:
            hint = ''
            if x.ndim == 2 and len(x) > x.shape[-1]:
                hint = f'; the shape {tuple(x.shape)} looks like (samples, channels): pass wavs.mean(1)[None]'
            raise ValueError(
                f'the audio has {x.shape[-1]} {unit}, but one patch needs at least {shortest}; pad it with zeros or '
                f'choose a smaller patch_size or hop{hint}'
            )
        lengths = None
        if audio_lengths is not None:
            if not self.support_variable_length:
                raise ValueError(
                    'audio_lengths needs an AudioSpectrogramTransformer built with support_variable_length=True'
                )
            lengths = check_lengths(audio_lengths, batch=x.shape[0], limit=x.shape[-1], unit=unit, device=x.device)
            if values_can_be_checked() and not (lengths >= shortest).all():
                raise ValueError(
                    f'audio_lengths holds {int(lengths.min())} {unit}, but one patch needs at least {shortest}; leave '
                    'such items out or pad them with zeros'
                )
        if self.max_audio_length is not None and x.shape[-1] > self.max_audio_length:
            self.warn_of_cut(x.shape[-1])
            x = x[..., : self.max_audio_length]
            lengths = None if lengths is None else lengths.clamp(max=self.max_audio_length)
        return x, lengths

    def warn_of_cut(self, samples: int) -> None:
        if self._warned_of_cut or not values_can_be_checked():
            return
        self._warned_of_cut = True
        warnings.warn(
            f'audio of {samples} samples is cut to max_audio_length, {self.max_audio_length} (said once); '
            'MuLaN.embed_audio embeds long audio whole, by windows',
            stacklevel=6,  # past check_input, forward and the two frames of a module's call
        )

    def to_spectrogram(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Waves to augmented spectrograms `(b, bins, frames)` and the frames of each item (None: all)."""
        return self.front_end(x, lengths)[:2]

    def front_end(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `to_spectrogram` gives, and what the summary is made of, `(b, k)` (None without `clip_summary`)."""
        if lengths is not None:
            real = frame_mask(lengths, x.shape[-1])
            x = x.masked_fill(~(real if self.accept_spec else real[:, 0]), 0.0)
        if self.accept_spec:
            check_finite(x, 'spectrograms[{}] holds NaN or infinity; clean the data first')
            spec, frames, measured = x, lengths, None
        else:
            check_finite(x, 'wavs[{}] holds NaN or infinite samples; clean the data first')
            spec, frames, measured = self.wave_features(x, lengths)
            overflow = 'wavs[{}] is so loud that its spectrogram overflows; samples should lie in [-1, 1]'
            check_finite(spec, overflow)
            if measured is not None:
                check_finite(measured, overflow)
        if self.training:
            spec = self.aug.mask(spec, frames)
        return spec, frames, measured

    def wave_features(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Waves to what patches are cut of, but for masks, the frames of each, and what the summary is made of."""
        stretches = self.training and self.aug[0].max_log_rate > 0
        if self.log_mel is not None and not stretches and not is_traced():
            # a few at a time: spectra, many times the size of what comes of them, stay in the cache
            size = max(1, BINS_AT_A_TIME // (self.spec.bins * int(self.spec.num_frames(x.shape[-1]))))
            parts = [
                self.features(*self.spec(x[i : i + size], None if lengths is None else lengths[i : i + size]))
                for i in range(0, len(x), size)
            ]
            return tuple(None if part[0] is None else torch.cat(part) for part in zip(*parts))

        spec, frames = self.spec(x, lengths)
        if stretches:
            spec, frames = self.aug.stretch(spec, frames)
        return self.features(spec, frames)

    def features(self, power: Tensor, frames: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of a power spectrogram: what patches are cut from, its frames, and what the summary is made of."""
        if self.log_mel is None:
            return power, frames, None
        mel = self.log_mel(power)
        return mel, frames, None if self.summary is None else self.summary.measure(power, mel, frames)

    def position_table(self, height: int, width: int) -> tuple[Tensor, Tensor, int]:
        """The bias for every offset of a grid of patches, run once over the unique offsets.

        Returns:
            table `(heads, (2 * height - 1) * (2 * width - 1))`, codes `(height * width,)`, column of offset (0, 0).
        """
        device = self.device
        dy = torch.arange(1 - height, height, device=device)
        dx = torch.arange(1 - width, width, device=device)
        offsets = rearrange(torch.stack(torch.meshgrid(dy, dx, indexing='ij'), dim=-1), 'y x two -> (y x) two')
        # in float32 under autocast and in a model that was cast: half precision cannot even hold the offsets
        with torch.autocast(device.type, enabled=False):
            table = offsets.float()
            for layer in self.dynamic_pos_bias_mlp:
                is_linear = isinstance(layer, nn.Linear)
                table = F.linear(table, layer.weight.float(), layer.bias.float()) if is_linear else layer(table)

        stride = 2 * width - 1
        y, x = torch.arange(height, device=device), torch.arange(width, device=device)
        codes = rearrange(rearrange(y, 'y -> y 1') * stride + x, 'y x -> (y x)')
        return (
            rearrange(table, 'offsets h -> h offsets').contiguous(),
            codes,
            (height - 1) * stride + width - 1,
        )


# ---- the grid of patches: where each one lies, and which of them take part ----


def sincos_2d(height: int, width: int, dim: int, *, device: torch.device, temperature: float = 10000) -> Tensor:
    """`(height, width, dim)` sinusoidal positions of a grid (Better plain ViT baselines, arXiv 2205.01580)."""
    omega = torch.arange(dim // 4, device=device).float() / (dim // 4 - 1)
    omega = 1.0 / temperature**omega
    y, x = (rearrange(torch.arange(size, device=device), 'p -> p 1') * omega for size in (height, width))
    y, x = repeat(y, 'y d -> y x d', x=width), repeat(x, 'x d -> y x d', y=height)
    return pack((x.sin(), x.cos(), y.sin(), y.cos()), 'y x *')[0]


def choose_patches(
    height: int, width: int, columns: Tensor | None, batch: int, dropout: float, *, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which patches of each item take part: real ones, minus a random fraction.

    Args:
        columns: `(b,)` the columns of patches that each item fills, or None for all.
        dropout: fraction of an item's own patches to leave out; at least one stays.

    Returns:
        kept `(b, n)` int64, indices into the flattened grid, the real ones first and in order, and lengths `(b,)`,
        how many are real, or None when all are.
    """
    total = height * width
    score = torch.zeros(batch, total, dtype=torch.float32, device=device)
    if dropout > 0.0:
        # drawn column by column, so that padding at the end does not change what the first columns get
        score = rearrange(torch.rand(batch, width, height, dtype=torch.float32, device=device), 'b x y -> b (y x)')
    counts = torch.full((batch,), total, device=device)
    if columns is not None:
        x = torch.arange(total, device=device) % width
        score = score.masked_fill(x >= rearrange(columns, 'b -> b 1'), torch.inf)
        counts = columns * height

    # in float64, so that an item has as many with a length as without, and as many as Python's floats say
    counts = (counts.double() * (1 - dropout)).long().clamp(min=1)
    if columns is None:
        most, same = max(1, int(total * (1 - dropout))), True
    elif not values_can_be_checked():
        most, same = total, False
    else:
        most = int(counts.max())
        same = bool((counts == most).all())

    # the lowest scores stay; in order of position, so that looking up their biases walks through memory
    kept = score.argsort(dim=-1)[:, :most]
    spare = torch.arange(kept.shape[-1], device=device) >= rearrange(counts, 'b -> b 1')
    kept = kept.masked_fill(spare, total).sort(dim=-1).values
    return kept.clamp(max=total - 1), None if same else counts
