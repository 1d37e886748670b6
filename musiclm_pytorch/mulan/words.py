"""A second task for MuLaN's audio tower: to tell which words the text of a clip has."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_pytorch.collectives import mean_over_ranks, world_size

# Of the words' embeddings. Logits begin with a deviation of about a half, so that each word pulls at the latents from
# the first step on; from zeros, one that nothing tells of yet would have to be found by chance.
INIT_STD = 0.05


class WordPrediction(nn.Module):
    """The words of a text as labels of its audio, without a text tower (arXiv 2411.03313).

    A contrast tells a clip from others by whatever is easiest to hear. Words that say something harder, such as a
    tempo, teach it little as long as the batch hardly holds two clips that differ in that alone. Here each word teaches
    by itself. The vocabulary are the tokens of the batch: whether a text has each of them is told from the audio's
    latent, by a linear classifier, beside how many texts of the batch have it.

    Args:
        dim_latent: width of the latents.
        num_tokens: size of the vocabulary.
        pad_id: token that is no word.
    """

    def __init__(self, dim_latent: int, num_tokens: int, pad_id: int = 0):
        super().__init__()
        self.num_tokens, self.pad_id = num_tokens, pad_id
        self.scale = dim_latent**0.5  # latents have length 1: their entries come to order 1
        self.token_emb = nn.Embedding(num_tokens, dim_latent)
        nn.init.normal_(self.token_emb.weight, std=INIT_STD)

    def forward(self, audio_latents: Tensor, tokens: Tensor) -> Tensor:
        """Binary cross-entropy, summed over the vocabulary and averaged over the clips of all ranks.

        Args:
            audio_latents: `(b, d)`, of length 1.
            tokens: `(b, n)` int64; row i is the text of clip i.

        Returns:
            scalar float32, the same on every rank, in nats a clip: less than what the words cost by their frequency in
            the batch alone, so about 0 for a model that knows nothing, and below 0 for one that hears something.
        """
        has = torch.zeros(len(tokens), self.num_tokens, dtype=torch.bool, device=tokens.device)
        has.scatter_(1, tokens, True)
        has[:, self.pad_id] = False
        counts = torch.cat([has.sum(dim=0), torch.tensor([len(tokens)], device=tokens.device)])
        if world_size() > 1:
            dist.all_reduce(counts)
        counts, clips = counts[:-1], int(counts[-1])
        words = counts.nonzero()[:, 0]
        targets = has[:, words].float()
        with torch.autocast(audio_latents.device.type, enabled=False):
            # a word that all texts have, or none but one, is never certain
            usual = torch.logit((counts[words] + 0.5) / (clips + 1))
            logits = usual + self.scale * audio_latents.float() @ self.token_emb(words).float().T
            loss = F.binary_cross_entropy_with_logits(logits, targets, reduction='sum')
            known = F.binary_cross_entropy_with_logits(usual.expand_as(targets), targets, reduction='sum')
            return mean_over_ranks((loss - known) / clips * world_size())
