"""Melodies to codes, and these to what conditions a stage (MusicLM, arXiv 2301.11325, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.atomic import written_together
from musiclm_pytorch.audiolm.saving import load_module, save_module
from musiclm_pytorch.audiolm.stages import PAD
from musiclm_pytorch.checks import check_positive, records_config, typechecked
from musiclm_pytorch.codecs.residual import ResidualQuantizer
from musiclm_pytorch.mulan import checkpoint
from musiclm_pytorch.mulan.melody import MelodyEncoder
from musiclm_pytorch.mulan.model import evaluating
from musiclm_pytorch.pretrained.hub import HubModel, find_folder

ENCODER_FOLDER = 'encoder'


class MelodyQuantizer(HubModel, nn.Module):
    """Codes of the melody of each window of a wave, by residual vector quantization of a `MelodyEncoder`'s embeddings.

        melody = MelodyQuantizer(encoder)
        melody.fit(pairs)  # such as MelodyPairs
        codes = melody(waves, sample_rate=24000)  # (b, windows, num_quantizers)
        quantizer.add_melody(melody)  # a MuLaNEmbedQuantizer

    Args:
        encoder: a trained one.
        num_quantizers, codebook_size: levels of quantization, and codes of each. MusicLM has 24 of 512.
    """

    @records_config
    @typechecked
    def __init__(self, encoder: MelodyEncoder, num_quantizers: int = 4, codebook_size: int = 256):
        super().__init__()
        check_positive(num_quantizers=num_quantizers, codebook_size=codebook_size)
        self.encoder = encoder
        self.num_quantizers, self.codebook_size = num_quantizers, codebook_size
        self.rq = ResidualQuantizer(encoder.dim_latent, codebook_size, num_quantizers)

    @property
    def rate(self) -> Fraction:
        """Windows that begin in a second."""
        return 1 / Fraction(str(self.encoder.hop))

    @property
    def is_fitted(self) -> bool:
        """Whether every level has codebooks."""
        return bool(self.rq.initted)

    def __repr__(self) -> str:
        fitted = 'fitted' if self.is_fitted else 'not fitted'
        return (
            f'{type(self).__name__}({fitted}, {self.num_quantizers} levels of {self.codebook_size} codes for '
            f'{self.encoder.seconds:g} s every {self.encoder.hop:g} s)'
        )

    @torch.no_grad()
    def forward(self, wavs: Tensor, sample_rate: int | None = None) -> Tensor:
        """The codes `(b, windows, q)` int64 of waves `(b, samples)`; arguments and errors as of the encoder.

        Raises ValueError without codebooks.
        """
        self.check_fitted()
        with evaluating(self):
            return self.rq(self.encoder(wavs, sample_rate=sample_rate).to(self.rq.codebooks))[1]

    def check_fitted(self) -> None:
        if not self.is_fitted:
            raise ValueError('this MelodyQuantizer has no codebooks yet: call melody.fit with waves of melodies')

    @torch.no_grad()
    def fit(self, data: Any, *, max_items: int = 4096, seed: int = 0) -> list[float]:
        """Learn the codebooks by residual k-means, level by level.

        Args:
            data: `(n, dim_latent)` embeddings; or waves `(samples,)`, or tuples of them, by index, such as
                `MelodyPairs`, at the encoder's rate or the data set's `sample_rate`.
            max_items: items used of the latter.
            seed: of the k-means.

        Returns:
            the share of the embeddings' squared length that each level leaves.

        Raises ValueError for fewer embeddings than codes.
        """
        check_positive(max_items=max_items)
        latents = data if isinstance(data, Tensor) else torch.cat([*self._embedded(data, max_items)])
        return self.rq.fit(latents, seed=seed)

    def _embedded(self, data: Any, max_items: int) -> Iterable[Tensor]:
        rate = getattr(data, 'sample_rate', None)
        with evaluating(self):
            for index in range(min(max_items, len(data))):
                item = data[index]
                for wave in item if isinstance(item, tuple) else (item,):
                    yield self.encoder(wave[None], sample_rate=rate)[0]

    # saving

    def save_pretrained(self, folder: str | Path) -> None:
        """Write encoder and codebooks, for `from_pretrained`. Raises ValueError without codebooks."""
        self.check_fitted()
        weights = {name: it for name, it in self.state_dict().items() if not name.startswith('encoder.')}
        with written_together(folder) as aside:
            save_module(self.encoder, aside / ENCODER_FOLDER)
            within = checkpoint.checksums_within(aside, [ENCODER_FOLDER])
            config = dict(model=type(self).__name__, melody=self.config, within=within)
            checkpoint.write_folder(aside, config, weights)

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
    ) -> MelodyQuantizer:
        """Rebuild one from its folder, in eval mode. Arguments and errors are as in `MuLaN.from_pretrained`."""
        place = checkpoint.placing(device, dtype)
        folder = find_folder(folder, revision, subfolder)
        config, weights = checkpoint.read_folder(folder, cls.__name__, parts=('melody',), verify=verify)
        encoder = load_module(folder / ENCODER_FOLDER, verify=verify)
        if not isinstance(encoder, MelodyEncoder):
            raise ValueError(f'{folder / ENCODER_FOLDER} holds a {type(encoder).__name__}, no MelodyEncoder')
        melody = config.build(cls, 'melody', encoder)
        weights |= {f'encoder.{name}': tensor for name, tensor in encoder.state_dict().items()}
        checkpoint.load_strictly(melody, weights, source=folder)
        return place(melody.eval())


class MelodyEmbedding(nn.Module):
    """Codes of melodies to what is added, in time, to the tokens of a stage, by a network of what they are codes of:
    near melodies are told alike, which few clips teach.

    It begins with zeros, which change nothing: a stage that was trained without melodies goes on from where it is.

    Args:
        rq: the codebooks, which stay as they are.
        dim: width of the conditioning.
    """

    def __init__(self, rq: ResidualQuantizer, dim: int):
        super().__init__()
        self._rq = (rq,)  # in a tuple, as no part of this module: the quantizer has it
        self.net = nn.Sequential(nn.Linear(rq.codebooks.shape[-1], dim), nn.GELU(), nn.Linear(dim, dim, bias=False))
        nn.init.zeros_(self.net[-1].weight)

    @property
    def is_new(self) -> bool:
        """Whether melodies change nothing yet."""
        return not self.net[-1].weight.any()

    def forward(self, codes: Tensor, tokens: int, per_token: Fraction) -> Tensor:
        """`(b, m, q)` codes of windows, `PAD` where there is no melody, to `(b, tokens, d)`, zeros there and after the
        last one.

        Args:
            tokens: how many tokens are told of the window that begins last before each.
            per_token: windows that begin in the time of a token.
        """
        codes = F.pad(codes, (0, 0, 0, 1), value=PAD)
        codebooks = self._rq[0].codebooks.to(self.net[0].weight)
        latents = codebooks[torch.arange(codes.shape[-1], device=codes.device), codes.clamp(min=0)].sum(dim=-2)
        told = self.net(latents) * (codes != PAD).all(dim=-1, keepdim=True)
        place = torch.arange(tokens, device=codes.device) * per_token.numerator // per_token.denominator
        return told[:, place.clamp(max=codes.shape[1] - 1)]
