"""The host's loop over the rounds: what it reads, whom it tells, and when it stops."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from beagle_kernels import STATUS_BAD_TREE, STATUS_NO_FINITE, Sampling
from beagle_sd.decoding.adaptive import AdaptiveTree
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.logits import Bias
from beagle_sd.decoding.report import Clock, Report, Tally
from beagle_sd.decoding.tree import TreeShape
from beagle_sd.models.pictures import PicturePrompt


class Decoding:
    """One call of generate on an engine: what the host knows of each row.

    counts: new tokens of each row; live: whether it goes on. Rounds run ahead of what the host has read where it does
    not choose what the next one does: not with stopping criteria, nor with a tree that adapts.

    stopping_criteria see the batch as transformers' own loop shows it, token by token: `shown` [B, T], the prompts as
    they were given (None: `prompts`), and behind them each row's new tokens, `pad` after its end. They see what the
    slowest row has reached, so that a row may have tokens more, which are cut if it is stopped before them.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Tensor,
        lengths: Tensor,
        max_new_tokens: int,
        stopping_criteria: Sequence[StoppingCriteria] = (),
        *,
        shown: Tensor | None = None,
        pad: int = 0,
        ahead: bool | None = None,
        pictures: PicturePrompt | None = None,
    ):
        self.engine, self.criteria = engine, StoppingCriteriaList(stopping_criteria)
        self.shown, self.pad = prompts if shown is None else shown, pad
        self.asked = 0
        self.prompts, self.lengths, self.pictures, self.max_new_tokens = prompts, lengths, pictures, max_new_tokens
        self.counts, self.live = [0] * len(prompts), [True] * len(prompts)
        self.clock, self.tally = Clock(engine.target.device), Tally(engine.shape.levels)
        host_decides = bool(stopping_criteria) or isinstance(engine.tree, AdaptiveTree)
        self.most_playing = 2 if (engine.graph if ahead is None else ahead) and not host_decides else 1

    def run(self, sampling: Sampling, ends: list[int], bias: Bias | None = None) -> Iterator[list[list[int]]]:
        """Yields each round's new tokens a row (none for finished rows), the prefill's first."""
        engine, clock = self.engine, self.clock
        engine.begin(self.prompts, self.lengths, sampling, self.max_new_tokens, ends, clock, bias, self.pictures)
        yield self._take(engine.receive())
        playing: deque[TreeShape] = deque()
        while any(self.live):
            with clock.rest("rounds" if engine.graph else None):
                while len(playing) < self.most_playing and self._more_after(len(playing)):
                    shape = engine.tree.choose() if isinstance(engine.tree, AdaptiveTree) else engine.tree
                    engine.play(shape, clock)
                    playing.append(shape)
                news = engine.receive()
            yield self._take(news, playing.popleft())

    def _more_after(self, rounds: int) -> bool:
        """Whether a row may still go on after so many rounds, each of which gives it a token or more."""
        return any(
            live and self.max_new_tokens - count > rounds for live, count in zip(self.live, self.counts, strict=True)
        )

    def _take(self, news: list[list[int]], shape: TreeShape | None = None) -> list[list[int]]:
        """The round's new tokens a row, cut where a criterion stops it; counted unless they are the prefill's."""
        runs, accepted, before = [], [], sum(self.counts)
        for row, (drafted, emitted, goes_on, status, *tokens) in enumerate(news):
            _raise_for(row, status, self.engine.buffers.biased)
            run = tokens[: emitted - self.counts[row]] if self.live[row] else []
            if self.live[row]:
                accepted.append(drafted)
                self.live[row] = bool(goes_on)
                self.counts[row] += len(run)
            runs.append(run)
        if self.criteria:
            self._ask(runs)
        if shape is not None:
            self.tally.add(shape, accepted, sum(self.counts) - before)
            if isinstance(self.engine.tree, AdaptiveTree):
                self.engine.tree.learn(shape, sum(accepted) / len(accepted))
        return runs

    def _ask(self, runs: list[list[int]]) -> None:
        """Ask the criteria of each step that all rows in progress have reached, and cut what is beyond a row's end."""
        new = self.new_tokens(self.pad)
        while self.asked < self._reached():
            self.asked += 1
            text = torch.cat([self.shown, new[:, : self.asked].to(self.shown)], 1)
            for row, stopped in enumerate(self.criteria(text, None).tolist()):
                ahead = self.counts[row] - self.asked
                if stopped and (self.live[row] or ahead > 0):
                    new[row, self.asked :] = self.pad
                    runs[row] = runs[row][: max(len(runs[row]) - ahead, 0)]
                    self.counts[row], self.live[row] = self.asked, False
                    self.engine.end_row(row)

    def _reached(self) -> int:
        """The new tokens that every row has, or has ended before."""
        going = [count for count, live in zip(self.counts, self.live, strict=True) if live]
        return min(going, default=max(self.counts))

    def new_tokens(self, pad: int) -> Tensor:
        """[B, new] int64: every row's tokens, padded with `pad`."""
        return self._rows(self.engine.buffers.output, pad)

    def logprobs(self) -> Tensor | None:
        """[B, new] f32, padded with 0, if the engine has room for them."""
        kept = self.engine.buffers.logprobs
        return None if kept is None else self._rows(kept, 0.0)

    def _rows(self, values: Tensor, padding: float) -> Tensor:
        counts = torch.tensor(self.counts, device=values.device)
        index = torch.arange(max(self.counts), device=values.device)
        return torch.where(index < counts[:, None], values[:, : len(index)], padding)

    def report(self) -> Report:
        return self.tally.report(sum(self.counts), dict(self.clock.seconds), self.engine.target.layers)


def _raise_for(row: int, status: int, biased: bool) -> None:
    if status & STATUS_NO_FINITE:
        culprit = "the tokens that the call suppresses, or its weights" if biased else "its weights"
        raise RuntimeError(f"row {row}: the target gave no finite logit; check {culprit} and dtype")
    if status & STATUS_BAD_TREE:
        raise RuntimeError(f"row {row}: the draft gave an invalid tree; check its weights")
