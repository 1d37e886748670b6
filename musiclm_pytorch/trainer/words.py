"""New words for a trained MuLaN, by what they mean in words that it knows; what it hears stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.checks import check_positive, typechecked
from musiclm_pytorch.data.attributes import ATTRIBUTES, SAMPLED, SAMPLED_ATTRIBUTES, MusicLabels
from musiclm_pytorch.data.captions import check_shares, draw_mentions, write_caption
from musiclm_pytorch.data.everyday import EIGHT, draw_prompt, plain_captions
from musiclm_pytorch.mulan.model import MuLaN, evaluating
from musiclm_pytorch.mulan.text_transformer import TextTransformer, clip_tokenizer

# a text, and what says the same in words that the model knows, once or in several ways
Pair = tuple[str, Sequence[str]]
WAYS = 4  # in which what a prompt means is said in known words
UNKNOWN_WORDS = 0.25  # of texts that get some in training, so that they change little later


@typechecked
def teach_words(
    mulan: MuLaN,
    pairs: Sequence[Pair],
    keep: Sequence[str],
    *,
    steps: int = 3000,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 42,
    report: Callable[[int, float], None] | None = None,
) -> MuLaN:
    """Train the text tower until new texts lie where its latents of known texts that mean the same lie.

    It is a distillation without sounds: the audio tower stays as it is, and what the text tower says of texts such as
    those in `keep` changes little, so that a quantizer and stages which were trained on its latents stay good.

    Args:
        mulan: trained; it is left as it is.
        pairs: a text each, and one or more texts that mean the same to the model, whose mean latent is wanted. All
            words of the new texts count as known afterwards.
        keep: texts that shall mean what they do, such as the captions that it was trained on: half of each batch. What
            is neither here nor among the known texts of `pairs` may change.
        steps, batch_size, lr: of AdamW, with warm-up and a cosine schedule.
        seed: of all that is drawn.
        report: told the step and the mean cosine of new texts with what they mean, every 100 steps.

    Returns:
        a copy that knows the new words, in eval mode.

    Raises ValueError for numbers that are not positive, no pairs or nothing to keep; TypeError for a text tower that is
    no TextTransformer that reads strings.
    """
    check_positive(steps=steps, batch_size=batch_size, lr=lr)
    if not (pairs and keep and all(same for _, same in pairs)):
        raise ValueError(
            'pass pairs of a text and texts that mean the same, and texts to keep; some of these are empty'
        )
    if not isinstance(mulan.text, TextTransformer) or not mulan.text.reads_words:
        raise TypeError('words are taught to a TextTransformer that reads strings, of the vocabulary of CLIP')
    taught = deepcopy(mulan)
    random = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if mulan.text.rows is not None:
            taught.text = with_tokens_of(mulan.text, [text for text, _ in pairs])
        unknown = ids_without_row(taught.text)
        taught.train().requires_grad_(False)
        learners = nn.ModuleList([taught.text, taught.text_to_latents]).requires_grad_(True)
        optimizer = torch.optim.AdamW(learners.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        warm = max(1, steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        )
        near: list[float] = []
        for step in range(1, steps + 1):
            some = dict(pairs[i] for i in random.integers(len(pairs), size=batch_size - batch_size // 2))
            kept = [keep[i] for i in random.integers(len(keep), size=batch_size // 2)]
            ids = [with_unknown(it, unknown, random) for it in map(clip_tokenizer().encode, [*some, *kept])]
            ids = [it[: mulan.text.max_seq_len] for it in ids]
            ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=mulan.text.pad_id)
            targets = targets_of(mulan, [*some.values(), *([it] for it in kept)])
            cosine = (taught.get_text_latents(ids.to(mulan.device)) * targets).sum(dim=-1)
            (1 - cosine).mean().backward()
            nn.utils.clip_grad_norm_(learners.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            near.append(cosine[: len(some)].mean().item())
            if report and step % 100 == 0:
                report(step, sum(near[-100:]) / 100)
    for name, parameter in taught.named_parameters():
        parameter.requires_grad_(mulan.get_parameter(name).requires_grad)
    if mulan.text.trained_tokens is not None and not mulan.text.trained_tokens.any():
        taught.text.trained_tokens = None  # of what it knew before there is no record
    return taught.eval()


def targets_of(mulan: MuLaN, groups: Sequence[Sequence[str]]) -> Tensor:
    """The mean latent of each group of texts, `(n, d)` of length 1."""
    with torch.no_grad(), evaluating(mulan):
        latents = mulan.get_text_latents(raw_texts=list(chain.from_iterable(groups)))
    means = [it.mean(dim=0) for it in latents.split([len(group) for group in groups])]
    return F.normalize(torch.stack(means), dim=-1)


def with_tokens_of(text: TextTransformer, texts: Sequence[str]) -> TextTransformer:
    """A copy that has embeddings also for the tokens of these texts."""
    known = list(text.config['known_tokens'])
    new = sorted(set(chain.from_iterable(clip_tokenizer().encode(it) for it in texts)) - {*known})
    copy = TextTransformer(**{**text.config, 'known_tokens': [*known, *new]}).to(text.device)
    weights, own = text.state_dict(), copy.token_emb.weight.detach()
    rows = weights['token_emb.weight']
    weights['token_emb.weight'] = torch.cat([rows[:-1], own[len(known) : -1], rows[-1:]])
    copy.load_state_dict(weights)
    copy.trained_tokens = None if text.trained_tokens is None else text.trained_tokens.clone()
    return copy


def ids_without_row(text: TextTransformer) -> np.ndarray:
    """The token ids that share an embedding, as nothing is known of them: none of a tower with the whole vocabulary."""
    if text.rows is None:
        return np.array([], int)
    ids = (text.rows == len(text.config['known_tokens'])).nonzero().flatten().cpu().numpy()
    return ids[ids != text.pad_id]


def with_unknown(ids: Sequence[int], unknown: np.ndarray, random: np.random.Generator) -> Tensor:
    """Ids of a text, now and then with some unknown ones in between, where there are any."""
    ids = list(ids)
    if len(unknown) and random.random() < UNKNOWN_WORDS:
        for it in random.choice(unknown, random.integers(1, 4)):
            ids.insert(int(random.integers(len(ids) + 1)), int(it))
    return torch.tensor(ids, dtype=torch.long)


@typechecked
def teach_everyday_words(mulan: MuLaN, *, sampled: bool = False, prompts: int = 50_000, **how: Any) -> MuLaN:
    """`teach_words` of prompts in ordinary words (`data/everyday.py`), to a MuLaN that learned `SyntheticMusic`.

    Args:
        mulan: trained; it is left as it is.
        sampled: whether a sound font played it, by its instruments.
        prompts: how many are drawn.
        how: further keywords of `teach_words`.

    Returns and raises as `teach_words`.
    """
    attributes, instruments = (SAMPLED_ATTRIBUTES, SAMPLED) if sampled else (ATTRIBUTES, EIGHT)
    check_positive(prompts=prompts)
    random, shares = np.random.default_rng(how.get('seed', 42)), check_shares({})
    pairs, keep = [], []
    for _ in range(prompts):
        text, meaning = draw_prompt(random, instruments)
        pairs.append((text, plain_captions(random, meaning, WAYS, attributes)))
        labels = MusicLabels.draw(random, attributes)
        keep.append(write_caption(labels, draw_mentions(random, shares), 'train', random))
    return teach_words(mulan, pairs, keep, **how)
