"""A draft that knows the text: mostly right at first choice, so that rounds accept much, each row another number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from beagle_sd.decoding.drafting import Candidates


def knowing(texts: list[Tensor], vocab: int, wrong: float = 0.25) -> Callable[..., Candidates]:
    """What stands in for `beagle_sd.decoding.rounds.propose` and drafts along `texts`, one a row, int64 [T] each
    without padding; a share `wrong` of the positions has another token.

    Of a level's `branch` candidates the last is the right one, where branch > 1, so that nodes move in the cache.
    """
    gen = torch.Generator().manual_seed(0)
    longest = max(map(len, texts)) + 64
    known = torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        known[row, : len(text)] = text
    spoiled = torch.rand(known.shape, generator=gen) < wrong
    spoilt = torch.where(spoiled, (known + 1) % vocab, known)
    known, spoilt = known.to(texts[0].device), spoilt.to(texts[0].device)  # nothing is copied inside a captured round

    def propose(draft, cache, lengths, root, sampling, depth, branch, shaped=None) -> Candidates:
        batch, level = len(root), torch.arange(depth, device=root.device)
        # rows that ended change places with those that go on: a text is known by its last token there
        here = known[:, lengths.long()] == root  # [texts, B]
        here = here.int() + torch.eye(*here.shape, dtype=torch.int32, device=root.device) * here
        texts = spoilt[here.argmax(0)]
        right = texts.gather(1, lengths.long()[:, None] + 1 + level)  # [B, depth]
        other = torch.arange(branch - 1, 0, -1, device=root.device)
        others = (right[:, :, None] + 1 + other) % vocab
        tokens = torch.cat([others, right[:, :, None]], 2).flatten(1)
        scores = -0.1 * (1 + level)[:, None].expand(depth, branch).flatten()
        parents = (level * branch - 1)[:, None].expand(depth, branch).flatten()
        return Candidates(tokens, scores.expand(batch, -1).contiguous(), parents.int().expand(batch, -1).contiguous())

    return propose
