"""Philox4x32-10 (Salmon et al., SC11) and the Gumbel noise drawn from it, in int64 torch arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

STREAM_TARGET, STREAM_DRAFT, STREAM_ACCEPT, STREAM_RESIDUAL = range(4)
"""Third counter word: coupled sampling; and verify_chain's drafted tokens, coins, and residual and bonus tokens."""

GROUP = 64
"""Ids of a group, which draws its largest noise first."""
GROUPS = 4
"""Added to the stream where groups draw."""

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LARGEST = 1 - 2**-24


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The four output words, int64 in [0, 2^32), of four counter words and two key words that broadcast together.

    An int64 product wraps modulo 2^64, so its high and low halves are those of the unsigned product.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) ^ c1 ^ k0) & WORD,
            product1 & WORD,
            ((product0 >> 32) ^ c3 ^ k1) & WORD,
            product0 & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def words(seed: Tensor, group: Tensor, position: Tensor, stream: int, rounds: Tensor) -> tuple[Tensor, ...]:
    """Philox words of counter (group, position, stream, round) under the seed's low and high half as key."""
    counter = (group, position & WORD, torch.full_like(position, stream), rounds & WORD)
    return philox(counter, (seed & WORD, (seed >> 32) & WORD))


def exponential(x: Tensor) -> Tensor:
    """Exp(1) f32 of uniform words: e(x) = -log1p(-v), v = min((x + 0.5) 2^-32, 1 - 2^-24)."""
    v = ((x.double() + 0.5) * 2**-32).float().clamp_(max=LARGEST)
    return v.neg_().log1p_().neg_()


def gumbel(
    seed: Tensor,
    position: Tensor,
    vocab: int,
    stream: int = STREAM_TARGET,
    rounds: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Tensor:
    """Independent Gumbel noise f32 [R, V], drawn by groups of 64 ids, the largest of a group first.

    seed, position and rounds are int64 [R]; token_ids int64 [V] gives the columns' ids, None means 0..V-1. Group
    u = token // 64 takes words 2 (u % 2), 2 (u % 2) + 1 = x, y of counter (u // 2, position, stream + 4, round). The
    least of 64 Exp(1) variables is w = e(x) / 64, and its member y >> 26 has it: g = -log(w). Each other one exceeds it
    by Exp(1) again: g = -log(w + e(x')), x' the word token % 4 of counter (token // 4, position, stream, round).
    """
    rounds = torch.zeros_like(position) if rounds is None else rounds
    ids = torch.arange(vocab, device=seed.device) if token_ids is None else token_ids

    def drawn(counter: Tensor, stream: int) -> Tensor:
        return torch.stack(words(seed[:, None], counter, position[:, None], stream, rounds[:, None]), -1)

    group, group_of = torch.unique(ids // GROUP, return_inverse=True)
    four = drawn(group // 2, stream + GROUPS)
    x, y = torch.where((group % 2 == 0)[:, None], four[..., :2], four[..., 2:]).unbind(-1)
    holder, least = group * GROUP + (y >> 26), exponential(x) / GROUP
    quad, quad_of = torch.unique(ids // 4, return_inverse=True)
    beyond = exponential(drawn(quad, stream).flatten(1)[:, quad_of * 4 + ids % 4])
    least = least[:, group_of]
    return torch.where(ids == holder[:, group_of], least, least + beyond).log_().neg_()


def uniform(seed: Tensor, position: Tensor, stream: int, rounds: Tensor) -> Tensor:
    """Coins in (0, 1), f64 of the broadcast shape: word 0 of token 0, u = (x + 0.5) 2^-32."""
    return (words(seed, torch.zeros_like(position), position, stream, rounds)[0].double() + 0.5) * 2**-32
