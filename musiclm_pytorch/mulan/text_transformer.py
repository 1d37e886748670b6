"""The text tower: a BERT-like transformer over CLIP's byte-pair tokens, read off at a CLS token; and which words of a
prompt it never learned that would have mattered."""

from __future__ import annotations

import base64
import re
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import pack, repeat
from torch import Tensor, nn

from musiclm_pytorch.checks import check_positive, described, records_config, typechecked, values_can_be_checked
from musiclm_pytorch.mulan.layers import Encoding, LayerNorm, Transformer

VOCAB_SIZE = 49408  # of CLIP's byte-pair encoding
# Words with what joins them: "hi-hats", "mid-range", "rock'n'roll"; neither punctuation nor underscores.
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
LONGEST = 40  # letters of a word that are shown
OWN = ('musiclm_pytorch', 'torch', 'beartype')  # packages in whose frames no one asked for music
# What a word is joined of, but for the endings of "singer's" and "don't", which tell nothing of the music.
PART = re.compile(r"(?<![^\W_])(?!(?<=['’])(?:s|t|m|d|re|ve|ll)\b)[^\W_]+")

# Articles, pronouns, prepositions, conjunctions and auxiliary verbs, which a sentence needs and a melody does not; and
# what says that there is music, not what it is like. Degrees ("very") and negations ("without") are none of them: they
# change what the music should be like.
UNTELLING_WORDS = frozenset(
    WORD.findall(
        'a an the this that these those some any i me my we us our you your he him his she her it its they them their '
        'one and or but so as if than then when while where which who what at by for from in into of off on onto over '
        'through to up upon with within is am are was were be been being do does did has have had can could will would '
        'shall should may might must there here music piece track clip recording sound sounds sounding play plays '
        'played playing perform performs performed performing hear hears heard hearing listen listens listening make '
        'makes made making give want like please'
    )
)


class TextTransformer(nn.Module):
    """Embed token ids or strings as `(batch, dim)`.

    Args:
        dim, depth, heads, dim_head, ff_mult: size of the transformer.
        num_tokens: size of the vocabulary; the default is that of CLIP's tokenizer, which `raw_texts` needs.
        max_seq_len: longest text in tokens; a longer one is cut, with one warning.
        attn_dropout, ff_dropout: dropout probabilities.
        pad_id: the token id that counts as padding.
        init_std: standard deviation of new token embeddings; positions and the CLS token begin at a tenth of it, so
            that a text begins as what its words are. It was 1 for all three in 0.2.8; a step of Adam hardly moves that.
        known_tokens: the token ids that have an embedding of their own, for a small model of few words; all others
            share one, which begins at zero. By default every id has its own.

    Attributes:
        trained_tokens: the ids that it was trained on, `(num_tokens,)` bool on the CPU: those of all texts whose
            latents in a `MuLaN` a gradient has come back to. `save_pretrained` of MuLaN writes it beside the weights.
            None where nobody knows: after `load_state_dict`, and of folders without it. Set it to None for weights
            that you have brought in otherwise.
    """

    @records_config
    @typechecked
    def __init__(
        self,
        dim: int,
        depth: int,
        num_tokens: int = VOCAB_SIZE,
        max_seq_len: int = 256,
        dim_head: int = 64,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        ff_mult: float = 4,
        pad_id: int = 0,
        init_std: float = 0.1,
        known_tokens: Sequence[int] | None = None,
    ):
        super().__init__()
        check_positive(num_tokens=num_tokens, max_seq_len=max_seq_len, init_std=init_std)
        self.dim = dim
        self.depth = depth
        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len
        self.pad_id = pad_id
        self._warned_of_cut = False
        # neither a weight nor a buffer: upstream's modules have none of this name, and DDP would overwrite it
        self.trained_tokens: Tensor | None = torch.zeros(num_tokens, dtype=torch.bool)
        self.register_load_state_dict_post_hook(_forget_trained)

        rows = None if known_tokens is None else _rows_of(known_tokens, num_tokens)
        self.register_buffer('rows', rows, persistent=False)
        self.token_emb = nn.Embedding(num_tokens if known_tokens is None else len(known_tokens) + 1, dim)
        self.pos_emb = nn.Embedding(max_seq_len, dim)
        self.cls_token = nn.Parameter(torch.randn(dim))
        with torch.no_grad():
            self.token_emb.weight.mul_(init_std)
            self.pos_emb.weight.mul_(init_std / 10)
            self.cls_token.mul_(init_std / 10)
            if known_tokens is not None:
                self.token_emb.weight[-1] = 0

        self.transformer = Transformer(
            dim=dim,
            depth=depth,
            dim_head=dim_head,
            heads=heads,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
            ff_mult=ff_mult,
        )
        self.norm = LayerNorm(dim)

    @property
    def device(self) -> torch.device:
        return self.cls_token.device

    @property
    def reads_words(self) -> bool:
        """Whether it takes strings, not token ids alone."""
        return self.num_tokens >= VOCAB_SIZE

    def forward(
        self,
        x: Tensor | None = None,
        raw_texts: Sequence[str] | None = None,
        mask: Tensor | None = None,
        return_all_layers: bool = False,
        return_encoding: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | Encoding:
        """Embed a batch of texts, given as ids or as strings.

        Args:
            x: `(b, n)` integer token ids.
            raw_texts: list of `b` strings. An empty one is embedded as no words at all.
            mask: `(b, n)` bool, true where a token counts; by default wherever it is not `pad_id`.
            return_all_layers: also return the hidden states of all layers but the last.
            return_encoding: return everything there is, as an `Encoding`.

        Returns:
            `(b, dim)`, and with `return_all_layers` also `(depth - 1, b, 1 + n, dim)`, the CLS token first.

        Raises:
            TypeError: ids that are not integers, texts that are not strings. ValueError: both or neither of `x` and
            `raw_texts`, a wrong shape, ids outside the vocabulary.
        """
        x, mask = self.ids_and_mask(x, raw_texts, mask)

        # token embedding + positional embedding, after a CLS token as in BERT

        tokens = self.token_emb(x if self.rows is None else self.rows[x]) + self.pos_emb.weight[: x.shape[1]]
        cls_tokens = repeat(self.cls_token, 'd -> b d', b=len(x))
        tokens, _ = pack((cls_tokens, tokens), 'b * d')
        mask = F.pad(mask, (1, 0), value=True)

        layers = self.transformer(tokens, mask=mask)
        return Encoding(self.norm(layers[-1][:, 0]), layers, mask).asked(return_all_layers, return_encoding)

    def with_known_tokens(self, known_tokens: Sequence[int]) -> TextTransformer:
        """A copy that keeps the embeddings of these ids alone: of a model trained on few words, most never moved."""
        if self.rows is not None:
            raise ValueError('this tower was built with known_tokens already; choose them from the whole vocabulary')
        copy = TextTransformer(**{**self.config, 'known_tokens': known_tokens}).to(self.device)
        weights = self.state_dict()
        weights['token_emb.weight'] = F.pad(weights['token_emb.weight'][list(known_tokens)], (0, 0, 0, 1))
        copy.load_state_dict(weights)
        copy.trained_tokens = None if self.trained_tokens is None else self.trained_tokens.clone()
        return copy.train(self.training)

    def note_trained(self, ids: Tensor, latents: Tensor) -> None:
        """Add ids `(b, n)` to `trained_tokens` as soon as a gradient comes back to the latents that were made of them.

        If all that made them is frozen, an audio tower is trained towards them: in training mode they count at once.
        """
        if self.trained_tokens is None or not (torch.is_grad_enabled() and values_can_be_checked()):
            return
        ids = ids[:, : self.max_seq_len].long().cpu()
        ids = ids[ids != self.pad_id]

        def note(_: Tensor | None = None) -> None:
            if self.trained_tokens is not None:
                self.trained_tokens[ids] = True

        if latents.requires_grad:
            latents.register_hook(note)
        elif self.training:
            note()

    def known_ids(self) -> Tensor | None:
        """The token ids that it knows, `(num_tokens,)` bool: of `known_tokens`, if it was built with any, and of
        `trained_tokens`, if there are any; None where neither tells."""
        return known_ids(self.num_tokens, self.config['known_tokens'], self.trained_tokens)

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that say something of the music and have a token that is none of `known_ids`, each once,
        as the text spells them. Joined by a hyphen, known words are known: "mid-range".

        Without `known_ids` every token may have been learned, and the list is empty.
        """
        known = self.known_ids()
        if known is None or not self.reads_words:
            return []
        words: dict[str, str] = {}
        for word in WORD.findall(text):
            words.setdefault(word.lower(), word)
        return [
            word
            for lower, word in words.items()
            if lower not in UNTELLING_WORDS
            and not all(known[clip_tokenizer().encode(part)].all() for part in PART.findall(lower))
        ]

    def tokenize(self, raw_texts: Sequence[str]) -> Tensor:
        """Strings to token ids `(b, n)`, cut at `max_seq_len` and padded to the longest."""
        self.check_texts(raw_texts)
        ids = [torch.tensor(clip_tokenizer().encode(text), dtype=torch.long) for text in raw_texts]
        longest = max(len(text) for text in ids)
        if longest > self.max_seq_len:
            self.warn_of_cut(longest)
        ids = [text[: self.max_seq_len] for text in ids]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_id).to(self.device)

    def ids_and_mask(
        self, x: Tensor | None, raw_texts: Sequence[str] | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of texts given as ids or as strings."""
        if (x is None) == (raw_texts is None):
            given = 'neither' if x is None else 'both'
            raise ValueError(f'pass either token ids (texts) or strings (raw_texts), got {given}')
        return self.check_input(self.tokenize(raw_texts) if x is None else x, mask)

    def check_texts(self, raw_texts: Sequence[str]) -> None:
        if isinstance(raw_texts, str) or not all(isinstance(text, str) for text in raw_texts):
            raise TypeError(f'raw_texts must be a list of strings, got {described(raw_texts)}; put one text in a list')
        if len(raw_texts) == 0:
            raise ValueError('raw_texts is an empty list; pass at least one text')

    def check_input(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Check and cut a batch of ids; the mask is made where it is missing."""
        if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f'texts must be an integer tensor (batch, tokens), got {kind}; strings go into raw_texts')
        x = x.long()
        if x.ndim != 2 or x.shape[0] == 0:
            raise ValueError(f'texts must have shape (batch, tokens) with at least one text, got {tuple(x.shape)}')
        if values_can_be_checked() and not ((x >= 0) & (x < self.num_tokens)).all():
            bad = int(x[(x < 0) | (x >= self.num_tokens)][0])
            raise ValueError(
                f'token id {bad} is outside the vocabulary of {self.num_tokens} ids; raise num_tokens or use the '
                f'tokenizer that the model was built for (raw_texts needs num_tokens={VOCAB_SIZE})'
            )
        if mask is None:
            mask = x != self.pad_id
        elif not isinstance(mask, Tensor):
            raise TypeError(f'mask must be a bool tensor of shape {tuple(x.shape)}, got {type(mask).__name__}')
        elif mask.shape != x.shape or mask.dtype != torch.bool:
            raise ValueError(
                f'mask must be a bool tensor of shape {tuple(x.shape)}, got {mask.dtype} of {tuple(mask.shape)}'
            )
        if x.shape[1] > self.max_seq_len:
            self.warn_of_cut(x.shape[1])
            x, mask = x[:, : self.max_seq_len], mask[:, : self.max_seq_len]
        return x, mask

    def warn_of_cut(self, tokens: int) -> None:
        if self._warned_of_cut or not values_can_be_checked():
            return
        self._warned_of_cut = True
        warnings.warn(
            f'a text of {tokens} tokens is cut to the context of {self.max_seq_len} (said once); '
            'raise max_seq_len to read all of it',
            stacklevel=7,  # past check_input, ids_and_mask, forward and the two frames of a module's call
        )


def _forget_trained(tower: TextTransformer, _) -> None:
    """Weights tell nothing of what they were trained on."""
    tower.trained_tokens = None


def _rows_of(known_tokens: Sequence[int], num_tokens: int) -> Tensor:
    """The row of `token_emb` of each token id, `(num_tokens,)`; those that are not known have the last."""
    known = torch.tensor(known_tokens, dtype=torch.long)
    if len(known) == 0 or len(known.unique()) < len(known) or not ((known >= 0) & (known < num_tokens)).all():
        raise ValueError(f'known_tokens must be one or more different ids from 0 to {num_tokens - 1}')
    rows = torch.full((num_tokens,), len(known))
    rows[known] = torch.arange(len(known))
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Words


class PromptWarning(UserWarning):
    """A prompt that a model does not understand, or music that does not come near its prompt."""


def known_ids(num_tokens: int, known_tokens: Sequence[int] | None, trained_tokens: Tensor | None) -> Tensor | None:
    """The token ids that a text tower knows, `(num_tokens,)` bool; None where nothing tells.

    Args:
        num_tokens, known_tokens: of its config: ids beside `known_tokens` have no embedding of their own.
        trained_tokens: `(num_tokens,)` bool, its record of what it was trained on. An empty one tells nothing: either
            it was never trained, or in a way that leaves no record.
    """
    known = None if trained_tokens is None or not trained_tokens.any() else trained_tokens
    if known_tokens is None:
        return known
    own = torch.zeros(num_tokens, dtype=torch.bool)
    own[list(known_tokens)] = True
    return own if known is None else own & known


def packed(flags: Tensor) -> str:
    """A bool tensor as text: its bits up to the last that is set, in base64."""
    return base64.b64encode(np.packbits(flags.numpy()).tobytes().rstrip(b'\0')).decode()


def unpacked(text: str, size: int) -> Tensor:
    """The `(size,)` bool tensor that `packed` wrote. Raises ValueError for any other text."""
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{text!r:.40} is no base64') from error
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    if bits[size:].any():
        raise ValueError(f'there are {len(bits)} bits for {size} tokens')
    flags = torch.zeros(size, dtype=torch.bool)
    flags[: len(bits)] = torch.from_numpy(bits[:size].astype(bool))
    return flags


def unknown_words_line(words: list[str], knows: str | None) -> str:
    """What to tell who asked with words that the model does not know; nothing if it knows all."""
    if not words:
        return ''
    return f'the model does not know {listed(words)}{f"; it knows {knows}" if knows else ""}'


def low_score_line(best: float, usual: float | None) -> str:
    """What to tell of music whose best score lies below the usual."""
    if usual is None or best >= usual:
        return ''
    return (
        f'the music may not be what the prompt asks for: MuLaN gives it {best:.2f}, and most music for prompts that it '
        f'understands {usual:.2f} or more'
    )


def warn_of(lines: list[str]) -> None:
    """Warn of each line that says something, where this package was called from."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get('__name__', '').split('.')[0] in OWN:
        frame, level = frame.f_back, level + 1
    for line in dict.fromkeys(filter(None, lines)):
        warnings.warn(line, PromptWarning, stacklevel=level)


def listed(words: list[str], most: int = 20) -> str:
    """Words in a row, the first ones of many, and the beginning of what is no word."""
    return ', '.join(word[:LONGEST] for word in words[:most]) + (
        f' and {len(words) - most} words more' if len(words) > most else ''
    )


@cache
def clip_tokenizer() -> Any:
    """`x_clip.tokenizer.tokenizer`, with `encode` and `decode`, without importing the rest of x_clip, which takes
    torchvision. The first call reads CLIP's 49,000 merges."""
    folder = Path(util.find_spec('x_clip').origin).parent
    spec = util.spec_from_file_location('x_clip.tokenizer', folder / 'tokenizer.py')
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tokenizer
