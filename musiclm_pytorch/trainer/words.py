"""New words for a trained MuLaN, by what they mean in words that it knows; what it hears stays as it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.data.attributes import ATTRIBUTES, SAMPLED_ATTRIBUTES
from musiclm_pytorch.data.everyday import draw_prompt, plain_captions
from musiclm_pytorch.mulan.model import MuLaN, evaluating
from musiclm_pytorch.mulan.text_transformer import TextTransformer, clip_tokenizer

# a text, and what says the same in words that the model knows, once or in several ways
Pair = tuple[str, Sequence[str]]
WAYS = 4  # in which a meaning is said in known words
UNKNOWN_WORDS = 0.25  # of texts that get some, of which nothing is known, so that they change little
OFTEN, SAMPLED = 5, 20_000  # times that a token comes up in so many texts, if it is to be learned


@typechecked
def teach_words(
    mulan: MuLaN,
    draw: Callable[[np.random.Generator], Pair],
    *,
    steps: int = 4000,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 42,
    report: Callable[[int, float], None] | None = None,
) -> MuLaN:
    """Train the text tower until what is new to it lies where its latents of the known words lie.

    The audio tower does not change, nor what the text tower says of known words, which half of each batch holds: what
    was trained on its latents (quantizer, stages) stays good. A distillation without sounds, some minutes on one core.

    Args:
        mulan: trained; it is left as it is.
        draw: gives a pair with random numbers: a text, and texts that mean the same to the model.
        steps, batch_size, lr: of Adam with a cosine schedule; half of a batch are pairs, half known texts.
        seed: of what is drawn.
        report: told the step and the mean cosine of new texts with what they mean, each 100 steps.

    Returns:
        a copy that knows the new words, in eval mode.

    Raises ValueError for numbers that are not positive, TypeError for a text tower that reads no words.
    """
    check_positive(steps=steps, batch_size=batch_size, lr=lr)
    if not isinstance(mulan.text, TextTransformer) or not mulan.text.reads_words:
        raise TypeError('words are taught to a text tower of strings, a TextTransformer with all of the tokens')
    random = np.random.default_rng(seed)
    taught = deepcopy(mulan)
    if mulan.text.rows is not None:
        taught.text = with_tokens_of(mulan.text, [draw(random)[0] for _ in range(SAMPLED)])
    taught.train().requires_grad_(False)
    learners = nn.ModuleList([taught.text, taught.text_to_latents]).requires_grad_(True)
    optimizer = torch.optim.AdamW(learners.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    near: list[float] = []
    for step in range(1, steps + 1):
        pairs = [draw(random) for _ in range(batch_size // 2)]
        texts, targets = targets_of(mulan, pairs)
        ids = [with_unknown_words(it, taught.text.rows, random) for it in map(clip_tokenizer().encode, texts)]
        ids = nn.utils.rnn.pad_sequence([it[: mulan.text.max_seq_len] for it in ids], batch_first=True)
        cosine = (taught.get_text_latents(ids.to(mulan.device)) * targets).sum(dim=-1)
        (1 - cosine).mean().backward()
        nn.utils.clip_grad_norm_(learners.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        near.append(cosine[: len(pairs)].mean().item())
        if report and step % 100 == 0:
            report(step, sum(near[-100:]) / 100)
    return taught.requires_grad_(True).eval()


def targets_of(mulan: MuLaN, pairs: Sequence[Pair]) -> tuple[list[str], Tensor]:
    """Twice as many texts as pairs, new ones and then a known one of each, and where they are to lie, `(2b, d)`."""
    known = list(chain.from_iterable(same for _, same in pairs))
    with torch.no_grad(), evaluating(mulan):
        latents = mulan.get_text_latents(raw_texts=known)
    groups = latents.split([len(same) for _, same in pairs])
    means = F.normalize(torch.stack([it.mean(dim=0) for it in groups]), dim=-1)
    texts = [text for text, _ in pairs] + [same[0] for _, same in pairs]
    return texts, torch.cat([means, torch.stack([it[0] for it in groups])])


def with_tokens_of(text: TextTransformer, texts: Sequence[str]) -> TextTransformer:
    """A copy that has embeddings also for the tokens of these texts, as far as they come up often enough."""
    counts = Counter(chain.from_iterable(clip_tokenizer().encode(it) for it in texts))
    known = list(text.config['known_tokens'])
    new = sorted(it for it, count in counts.items() if count >= OFTEN and it not in known)
    copy = TextTransformer(**{**text.config, 'known_tokens': [*known, *new]}).to(text.device)
    weights, own = text.state_dict(), copy.token_emb.weight.detach()
    rows = weights['token_emb.weight']
    weights['token_emb.weight'] = torch.cat([rows[:-1], own[len(known) : -1], rows[-1:]])
    copy.load_state_dict(weights)
    copy.trained_tokens = None if text.trained_tokens is None else text.trained_tokens.clone()
    return copy


def with_unknown_words(ids: Sequence[int], rows: Tensor | None, random: np.random.Generator) -> Tensor:
    """Ids of a text, now and then with some that the tower has no embeddings of, where there are any."""
    ids = list(ids)
    if rows is not None and random.random() < UNKNOWN_WORDS:
        unknown = int(rows.argmax())
        for _ in range(random.integers(1, 4)):
            ids.insert(int(random.integers(len(ids) + 1)), unknown)
    return torch.tensor(ids, dtype=torch.long)


def teach_everyday_words(mulan: MuLaN, *, sampled: bool = False, **how: Any) -> MuLaN:
    """`teach_words` of the prompts in ordinary words of `data/everyday.py`, to a MuLaN that learned `SyntheticMusic`.

    Args:
        mulan: trained; it is left as it is.
        sampled: whether a sound font played it, by its instruments.
        how: further keywords of `teach_words`.

    Returns and raises as `teach_words`.
    """
    attributes = SAMPLED_ATTRIBUTES if sampled else ATTRIBUTES

    def draw(random: np.random.Generator) -> Pair:
        text, meaning = draw_prompt(random, attributes['instrument'])
        return text, plain_captions(random, meaning, WAYS, attributes)

    return teach_words(mulan, draw, **how)
