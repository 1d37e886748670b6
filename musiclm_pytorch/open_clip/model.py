"""The OpenCLIP view of MuLaN: open_clip's names and shapes around MuLaN's own towers, latents and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from musiclm_pytorch.checks import check_not_negative, typechecked, values_can_be_checked
from musiclm_pytorch.mulan.audio_transformer import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.layers import LayerNorm
from musiclm_pytorch.mulan.model import MuLaN
from musiclm_pytorch.mulan.recipes import create_optimized_audiospectrogram_transformer
from musiclm_pytorch.mulan.text_transformer import VOCAB_SIZE, TextTransformer

Texts = Tensor | Sequence[str]
START, END = 49406, 49407  # tokens of CLIP


@dataclass(frozen=True)
class AudioBatch:
    """Waves with their lengths and rate, where open_clip's loop expects one tensor of images.

    Attributes:
        waves: `(b, samples)` float.
        lengths: `(b,)` int64 true lengths in samples; None when all waves are as long as the tensor.
        sample_rate: in Hz; None is the rate of the model.
    """

    waves: Tensor
    lengths: Tensor | None = None
    sample_rate: int | None = None

    def to(self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> AudioBatch:
        """As `Tensor.to`; the dtype is that of the waves."""
        lengths = self.lengths
        return replace(
            self,
            waves=self.waves.to(device=device, dtype=dtype, non_blocking=non_blocking),
            lengths=None if lengths is None else lengths.to(device=device, non_blocking=non_blocking),
        )

    @property
    def shape(self) -> torch.Size:
        return self.waves.shape

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.waves.size() if dim is None else self.waves.size(dim)

    def __len__(self) -> int:
        return len(self.waves)


class MuLaNOpenCLIP(nn.Module):
    """A MuLaN under the names by which open_clip's losses, zero-shot code and training loop know a model.

        model = MuLaNOpenCLIP(mulan)
        logits_per_audio, logits_per_text = model.get_similarity(wavs, texts)
        model.mulan.save_pretrained('mulan')  # at any time, the MuLaN that was trained

    Nothing is added: the embeddings are MuLaN's latents, and `logit_scale` and `logit_bias` are MuLaN's own parameters
    of its loss, the logarithm of the temperature and, with the sigmoid loss, the bias, `(1, 1, 1)` each (None without
    one). Whoever trains them here trains them there. The state dict has them under their names here, and all else
    of MuLaN under `mulan.`.

    open_clip's losses know nothing of MuLaN's further losses, between hidden layers and of words: a MuLaN built with
    these trains by open_clip without them.

    Args:
        mulan: shared, not copied.
        framed_texts: what the text tower was trained with. False: token ids alone, as MuLaN's own tokenizer, x-clip's,
            gives them; so is every MuLaN of this library. True: between a start and an end token, as open_clip's
            tokenizer gives them; only this view hands such a MuLaN its texts rightly. Either way all calls take ids
            of both forms, row by row, and strings: the tower gets, and learns from, the form that it knows.
        output_dict: whether calls return a dict, as open_clip's training and evaluation expect, or a tuple.

    Raises:
        ValueError: framed texts for a vocabulary other than CLIP's.
    """

    @typechecked
    def __init__(self, mulan: MuLaN, framed_texts: bool = False, output_dict: bool = True):
        super().__init__()
        self.speaks_clip = mulan.text.num_tokens == VOCAB_SIZE
        if framed_texts and not self.speaks_clip:
            raise ValueError(
                f'framed_texts=True needs the vocabulary of CLIP with its start and end tokens, {VOCAB_SIZE} ids, but '
                f'this text tower has num_tokens={mulan.text.num_tokens}'
            )
        if framed_texts and mulan.text.max_seq_len < 3:
            raise ValueError(f'framed texts need a max_seq_len of at least 3, got {mulan.text.max_seq_len}')
        self.framed_texts = framed_texts
        self.output_dict = output_dict
        # before MuLaN, so that optimizers, which go by the names, leave them out of the weight decay
        self.logit_scale = mulan.contrast.temperatures
        self.register_parameter('logit_bias', getattr(mulan.contrast, 'bias', None))
        self.mulan = mulan
        # one name each in the state dict: safetensors refuses two for one tensor
        self.register_state_dict_post_hook(_drop_second_names)
        self.register_load_state_dict_pre_hook(_add_second_names)

    # MuLaN's parts under open_clip's names

    @property
    def audio(self) -> AudioSpectrogramTransformer:
        return self.mulan.audio

    @property
    def visual(self) -> AudioSpectrogramTransformer:
        """The audio tower, for code that knows no other name."""
        return self.mulan.audio

    @property
    def text(self) -> TextTransformer:
        return self.mulan.text

    @property
    def embed_dim(self) -> int:
        """Width of the embeddings."""
        return self.mulan.dim_latent

    @property
    def context_length(self) -> int:
        """Longest text in tokens, with start and end token only if the tower reads them."""
        return self.mulan.text.max_seq_len

    @property
    def vocab_size(self) -> int:
        return self.mulan.text.num_tokens

    def extra_repr(self) -> str:
        return f'framed_texts={self.framed_texts}, output_dict={self.output_dict}'

    # embedding

    def encode_audio(
        self,
        audio: Tensor | AudioBatch,
        audio_lengths: Tensor | Sequence[int] | None = None,
        normalize: bool = True,
        sample_rate: int | None = None,
    ) -> Tensor:
        """Embed waves.

        Args:
            audio: `(b, samples)` float waves, or an `AudioBatch`, which holds lengths and rate, too.
            audio_lengths: `(b,)` true lengths in samples.
            normalize: scale to length 1, which gives `MuLaN.get_audio_latents`. open_clip's own models do not unless
                asked; here the latents are what MuLaN calls its embedding.
            sample_rate: rate of the waves in Hz, if it is not MuLaN's own: they are resampled.

        Returns:
            `(b, embed_dim)` float32.
        """
        if isinstance(audio, AudioBatch):
            if audio_lengths is not None or sample_rate is not None:
                raise ValueError(
                    'an AudioBatch holds its lengths and its rate; leave out audio_lengths and sample_rate'
                )
            audio, audio_lengths, sample_rate = audio.waves, audio.lengths, audio.sample_rate
        if normalize:
            return self.mulan.get_audio_latents(audio, audio_lengths=audio_lengths, sample_rate=sample_rate)
        audio, audio_lengths = self.mulan.to_own_rate(audio, audio_lengths, sample_rate)
        return self.mulan.audio_to_latents(self.mulan.audio(audio, audio_lengths=audio_lengths)).float()

    def encode_image(self, image: Tensor | AudioBatch, normalize: bool = True) -> Tensor:
        """`encode_audio`, for code that knows no other name."""
        return self.encode_audio(image, normalize=normalize)

    def encode_text(self, text: Texts, normalize: bool = True) -> Tensor:
        """Embed texts.

        Args:
            text: `(b, n)` token ids by MuLaN's tokenizer or open_clip's, or a list of `b` strings.
            normalize: scale to length 1, which gives `MuLaN.get_text_latents`.

        Returns:
            `(b, embed_dim)` float32.
        """
        ids = self.tokenize(text)
        if normalize:
            return self.mulan.get_text_latents(ids)
        return self.mulan.text_to_latents(self.mulan.text(ids)).float()

    def tokenize(self, text: Texts | str) -> Tensor:
        """Strings, or token ids of either tokenizer, to ids `(b, n)` as the text tower was trained with.

        It may stand for a tokenizer wherever open_clip takes one.
        """
        if not isinstance(text, Tensor):
            text = self.mulan.text.tokenize([text] if isinstance(text, str) else text)
        are_ids = not (text.is_floating_point() or text.is_complex() or text.dtype == torch.bool)
        if not self.speaks_clip or not are_ids or text.ndim != 2 or text.shape[1] == 0:
            return text  # which MuLaN takes as it is, or says what is wrong with it
        text = bare(text, self.text.pad_id)
        if not self.framed_texts:
            return text
        if text.shape[1] + 2 > self.context_length:
            self.text.warn_of_cut(text.shape[1] + 2)
        return framed(text, self.text.pad_id, self.context_length)

    # similarity

    def get_similarity(
        self,
        audio: Tensor | AudioBatch,
        text: Texts,
        audio_lengths: Tensor | Sequence[int] | None = None,
        sample_rate: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of each of `b` waves with each of `c` texts; arguments as in `encode_audio` and `encode_text`.

        Returns:
            `logits_per_audio (b, c)` and its transpose, `logits_per_text (c, b)`, float32: the cosines times the
            temperature, with the sigmoid loss plus the bias.
        """
        audio_features = self.encode_audio(audio, audio_lengths, sample_rate=sample_rate)
        text_features = self.encode_text(text)
        scale, bias = self.scale_and_bias()
        # logits go up to 100, where half precision has steps of a sixteenth and more
        with torch.autocast(audio_features.device.type, enabled=False):
            logits = einsum(audio_features, text_features, 'i d, j d -> i j') * scale
            logits = logits if bias is None else logits + bias
        return logits, rearrange(logits, 'i j -> j i')

    def get_logits(self, audio: Tensor | AudioBatch, text: Texts) -> tuple[Tensor, Tensor]:
        """`get_similarity` by the name that open_clip's models have for it."""
        return self.get_similarity(audio, text)

    def scale_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """What cosines are multiplied by, at most 100, and what is added, if anything: float32 scalars."""
        scale = self.mulan.contrast.temperature().reshape(())
        return scale, None if self.logit_bias is None else self.logit_bias.float().reshape(())

    def forward(
        self,
        image: Tensor | AudioBatch | None = None,
        text: Texts | None = None,
        audio_lengths: Tensor | Sequence[int] | None = None,
        *,
        audio: Tensor | AudioBatch | None = None,
    ) -> dict[str, Tensor | None] | tuple[Tensor | None, ...]:
        """What open_clip's losses take: `loss(**model(wavs, texts))`.

        Args:
            image: waves, under the name that open_clip has for them; or
            audio: waves.
            text: texts. Waves or texts alone leave None in the place of the others' features.
            audio_lengths: `(b,)` true lengths in samples.

        Returns:
            a dict of `image_features (b, embed_dim)`, `audio_features` for waves given as `audio`, `text_features`
            `(b, embed_dim)`, `logit_scale` and, with the sigmoid loss, `logit_bias`, both of them scalars, not
            logarithms; without `output_dict`, a tuple in this order.
        """
        if image is not None and audio is not None:
            raise ValueError('image and audio are two names of the same input; pass one of them')
        if image is None and audio is None and text is None:
            raise ValueError('pass waves, texts or both')
        name = 'image_features' if audio is None else 'audio_features'
        audio = image if audio is None else audio
        audio_features = None if audio is None else self.encode_audio(audio, audio_lengths)
        text_features = None if text is None else self.encode_text(text)
        scale, bias = self.scale_and_bias()
        outputs = {name: audio_features, 'text_features': text_features, 'logit_scale': scale}
        if bias is not None:
            outputs['logit_bias'] = bias
        return outputs if self.output_dict else tuple(outputs.values())

    # training

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Train nothing of the audio tower but its last groups, as LiT does with its image tower (arXiv 2111.07991).

        It lasts, in the MuLaN too, until a call that unlocks more.

        Args:
            unlocked_groups: how many stay trainable, counted from the end: the projection to the latents, the last
                layer with the final norm, each layer before it, the patch embedding with the position bias and the
                summary of the clip.
            freeze_bn_stats: open_clip's; there is no batch norm here.
        """
        tower = self.mulan.audio
        *layers, last = tower.transformer.layers
        summary = [] if tower.summary is None else [tower.summary]
        beginning = [tower.to_patch_tokens, tower.dynamic_pos_bias_mlp, *summary]
        groups = [beginning, *([it] for it in layers), [last, tower.norm], [self.mulan.audio_to_latents]]
        _lock([tower, self.mulan.audio_to_latents], groups, unlocked_groups)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """The same for the text tower, whose first group are the embeddings.

        Args:
            unlocked_layers: how many groups stay trainable, counted from the end.
            freeze_layer_norm: lock the norms, too; False leaves those of all layers trainable.
        """
        tower = self.mulan.text
        *layers, last = tower.transformer.layers
        beginning = [tower.token_emb, tower.pos_emb, tower.cls_token]
        groups = [beginning, *([it] for it in layers), [last, tower.norm], [self.mulan.text_to_latents]]
        _lock([tower, self.mulan.text_to_latents], groups, unlocked_layers)
        if not freeze_layer_norm:
            for module in tower.modules():
                if isinstance(module, LayerNorm):
                    module.requires_grad_(True)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute what is inside the layers in the backward pass instead of keeping it: less memory, more time."""
        for tower in (self.mulan.audio, self.mulan.text):
            tower.transformer.checkpoint_activations = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimizers shall not decay, beside those of one dimension."""
        names = {'logit_scale', 'logit_bias', 'mulan.text.pos_emb.weight', 'mulan.text.token_emb.weight'}
        return names & {name for name, _ in self.named_parameters()}


@typechecked
def create_mulan_open_clip_model(
    dim: int,
    depth: int,
    heads: int = 8,
    dim_head: int = 64,
    embed_dim: int = 128,
    use_case: str = 'music',
    audio_sample_rate: int = 16000,
    decoupled_contrastive_learning: bool = False,
    sigmoid_contrastive_loss: bool = False,
    *,
    audio: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    framed_texts: bool = False,
    output_dict: bool = True,
    **keywords: Any,
) -> MuLaNOpenCLIP:
    """A new MuLaN, seen as open_clip sees a model. Its audio tower takes clips of different lengths.

    Args:
        dim, depth, heads, dim_head: size of both towers.
        embed_dim: width of the embeddings.
        use_case: 'music', 'tonal', 'speech' or 'general', see `get_optimal_spectrogram_params`.
        audio_sample_rate: of the waves in Hz.
        decoupled_contrastive_learning: of MuLaN's own loss. The default is that of open_clip's `ClipLoss`, so that
            the two agree.
        sigmoid_contrastive_loss: for open_clip's `SigLipLoss`: the model has a bias, too.
        audio, text: further keywords of the audio and the text tower, over those above.
        framed_texts, output_dict: as in `MuLaNOpenCLIP`.
        keywords: of `MuLaN`.

    Raises:
        ValueError: an unknown use case, sizes that do not fit together.
    """
    size = dict(dim=dim, depth=depth, heads=heads, dim_head=dim_head)
    front_end = dict(use_case=use_case, audio_sample_rate=audio_sample_rate, support_variable_length=True)
    mulan = MuLaN(
        audio_transformer=create_optimized_audiospectrogram_transformer(**{**size, **front_end, **(audio or {})}),
        text_transformer=TextTransformer(**{**size, **(text or {})}),
        dim_latent=embed_dim,
        decoupled_contrastive_learning=decoupled_contrastive_learning,
        sigmoid_contrastive_loss=sigmoid_contrastive_loss,
        **keywords,
    )
    return MuLaNOpenCLIP(mulan, framed_texts=framed_texts, output_dict=output_dict)


_NAMES = {'logit_scale': 'mulan.contrast.temperatures', 'logit_bias': 'mulan.contrast.bias'}


def _drop_second_names(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in _NAMES.values():
        state.pop(prefix + name, None)


def _add_second_names(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for name, second in _NAMES.items():
        if prefix + name in state:
            state.setdefault(prefix + second, state[prefix + name])


def _lock(modules: list[nn.Module], groups: list[list[nn.Module | nn.Parameter]], unlocked: int) -> None:
    """Take the gradients from all of `modules` but the last groups."""
    check_not_negative(unlocked=unlocked)
    for module in modules:
        module.requires_grad_(False)
    for group in groups[max(0, len(groups) - unlocked) :]:
        for part in group:
            part.requires_grad_(True)


# ---- token ids with and without the start and end tokens that open_clip's tokenizer puts around them ----

# Both tokenizers have CLIP's byte-pair encoding and give the same ids. x-clip's, which MuLaN reads, gives these alone
# (bare); open_clip's puts a start token in front and an end token behind (framed).


def bare(ids: Tensor, pad_id: int) -> Tensor:
    """Ids `(b, n)` without start and end tokens, `(b, m)`; rows that begin with no start token are as before.

    What follows an end token is padding, with whatever it was padded. Columns that are padding in all rows are cut.
    """
    ids = ids.long()
    places = torch.arange(ids.shape[1], device=ids.device)
    is_framed = ids[:, :1] == START
    # the last end token closes the text; without one, as after a careless cut, all of the row is text
    ends = torch.where(ids == END, places, -1).amax(dim=1, keepdim=True)
    ends = torch.where(ends < 0, ids.shape[1], ends)
    shifted = F.pad(ids[:, 1:], (0, 1), value=pad_id).masked_fill(places >= ends - 1, pad_id)
    ids = torch.where(is_framed, shifted, ids)
    if not values_can_be_checked():
        return ids
    return ids[:, : max(1, int(_lengths(ids, pad_id).max()))]


def framed(ids: Tensor, pad_id: int, longest: int) -> Tensor:
    """Bare ids `(b, n)` between start and end tokens, `(b, m)` with `m` of at most `longest`: longer texts are cut."""
    ids = ids[:, : longest - 2]
    lengths = _lengths(ids, pad_id)
    out = F.pad(ids, (1, 1), value=pad_id)
    out[:, 0] = START
    return out.scatter(1, lengths[:, None] + 1, END)


def _lengths(ids: Tensor, pad_id: int) -> Tensor:
    """`(b,)`: ids of each row up to its last that is no padding."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return torch.where(ids != pad_id, places, 0).amax(dim=1)
