"""A branch copied from the text: what followed the text's own end when it stood there before."""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor

from beagle_kernels import lookup

LONGEST = 16
"""Tokens of a match that are looked at: longer ones count as this long."""
USUAL = (0.0, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.82, 0.85, 0.88, *(0.9 for _ in range(10, LONGEST)), 0.95)
"""How often the token that followed a match of so many tokens comes again, before a text has shown its own."""
_WEIGHT, _MEMORY = 8.0, 400.0
"""What USUAL counts for, in tokens seen at a length, and after how many of them what was seen is forgotten."""


class Lookup:
    """The branch of each row for the next round, at most `levels` tokens; 0: none is looked for.

    tokens [B, levels] int64, -1 where none; matched [B] int32, tokens of the text's end that stood before them;
    gains [LONGEST + 1] f32: by length of the match, the log of how often the next token is the one that followed.
    """

    def __init__(self, batch: int, levels: int, device: torch.device):
        self.levels = levels
        self.tokens = torch.full((batch, levels), -1, dtype=torch.int64, device=device)
        self.matched = torch.zeros(batch, dtype=torch.int32, device=device)
        self.gains = torch.tensor([math.log(max(usual, 1e-9)) for usual in USUAL], dtype=torch.float32, device=device)

    def tensors(self) -> dict[str, Tensor]:
        return {"branch": self.tokens, "matched": self.matched, "gains": self.gains}

    def rows(self) -> list[Tensor]:
        """Those that have a row a text."""
        return [self.tokens, self.matched]

    def part(self, rows: slice) -> Lookup:
        one = copy(self)
        one.tokens, one.matched = self.tokens[rows], self.matched[rows]
        return one

    def find(self, text: Tensor, lengths: Tensor) -> None:
        """Look for the end of each text [B, *], of `lengths` [B] tokens."""
        if self.levels:
            tokens, matched = lookup(text, lengths.to(torch.int32), self.levels, longest=LONGEST)
            self.tokens.copy_(tokens)
            self.matched.copy_(matched)

    def branch(self, levels: int) -> tuple[Tensor, Tensor]:
        """Its first `levels` tokens [B, levels] and their cumulative log-probabilities."""
        step = torch.arange(levels, device=self.tokens.device)
        gains = self.gains[(self.matched[:, None] + step).clamp(max=LONGEST)]
        return self.tokens[:, :levels], gains.cumsum(1)

    def agreed(self, run: Tensor) -> Tensor:
        """[B] int64: how many of its tokens are the first of run [B, n]."""
        count = min(self.levels, run.shape[1])
        return (self.tokens[:, :count] == run[:, :count]).long().cumprod(1).sum(1)


class Copied:
    """How often a match of each length went on as before in the texts of late."""

    def __init__(self):
        self.came = [_WEIGHT * usual for usual in USUAL]
        self.seen = [_WEIGHT] * len(USUAL)

    def learn(self, matched: int, agreed: int, count: int, levels: int) -> None:
        """After a match of `matched` tokens the text went on for `count`, of which the first `agreed` were as the
        branch of `levels` had them."""
        for place in range(min(agreed + 1, count, levels) if matched else 0):
            length = min(matched + place, LONGEST)
            keep = 1.0 - 1.0 / _MEMORY
            self.came[length] = keep * self.came[length] + (place < agreed)
            self.seen[length] = keep * self.seen[length] + 1.0

    def chance(self, matched: int) -> float:
        """That the next token is the one that followed."""
        length = min(matched, LONGEST)
        return self.came[length] / self.seen[length] if matched else 0.0

    def expected(self, matched: int, levels: int) -> float:
        """Tokens of a branch of so many levels that come."""
        total, chance = 0.0, 1.0
        for place in range(levels if matched else 0):
            chance *= self.chance(matched + place)
            total += chance
        return total

    def gains(self) -> list[float]:
        """For Lookup.gains."""
        return [math.log(max(self.chance(length), 1e-9)) for length in range(LONGEST + 1)]
