"""transformers' stopping criteria, asked as its own loop asks them: token by token, of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from beagle_sd.decoding.loop import Decoding, Row


class Stopping:
    """They see `shown` [B, T], the prompts as they were given, and behind them each row's new tokens, `pad` after its
    end; and what the slowest row has reached, so that a row may have tokens more, which are cut if it is stopped before
    them."""

    def __init__(
        self, criteria: Sequence[StoppingCriteria], shown: Tensor, pad: int, decoding: Decoding, rows: Sequence[Row]
    ):
        self.criteria, self.shown, self.pad = StoppingCriteriaList(criteria), shown, pad
        self.decoding, self.rows = decoding, rows
        self.asked = 0

    def ask(self) -> None:
        """Ask of each step that all rows in progress have reached, and cut what is beyond a row's end."""
        while self.criteria and self.asked < self._reached():
            self.asked += 1
            new = [row.tokens[: self.asked] for row in self.rows]
            padded = torch.tensor([tokens + [self.pad] * (self.asked - len(tokens)) for tokens in new])
            stopped = self.criteria(torch.cat([self.shown, padded.to(self.shown)], 1), None)
            for row, stops in zip(self.rows, stopped.tolist(), strict=True):
                if stops:
                    self.decoding.end(row, min(self.asked, len(row.tokens)))

    def _reached(self) -> int:
        """The new tokens that every row has, or has ended before."""
        going = [len(row.tokens) for row in self.rows if row.live]
        return min(going, default=max(len(row.tokens) for row in self.rows))
