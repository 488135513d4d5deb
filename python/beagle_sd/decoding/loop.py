"""The host's loop over the rounds: what it reads, whom it tells, and when it stops."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteria

from beagle_kernels import STATUS_BAD_TREE, STATUS_NO_FINITE, Sampling
from beagle_sd.decoding.adaptive import AdaptiveTree
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.report import Clock, Report, Tally
from beagle_sd.decoding.tree import TreeShape


class Decoding:
    """One call of generate on an engine: what the host knows of each row.

    counts: new tokens of each row; live: whether it goes on. Rounds run ahead of what the host has read where it does
    not choose what the next one does: not with stopping criteria, nor with a tree that adapts.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Tensor,
        lengths: Tensor,
        max_new_tokens: int,
        stopping_criteria: Sequence[StoppingCriteria] = (),
        *,
        ahead: bool | None = None,
    ):
        self.engine, self.criteria = engine, stopping_criteria
        self.prompts, self.lengths, self.max_new_tokens = prompts, lengths, max_new_tokens
        self.counts, self.live = [0] * len(prompts), [True] * len(prompts)
        self.clock, self.tally = Clock(engine.target.device), Tally(engine.shape.levels)
        host_decides = bool(stopping_criteria) or isinstance(engine.tree, AdaptiveTree)
        self.most_playing = 2 if (engine.graph if ahead is None else ahead) and not host_decides else 1

    def run(self, sampling: Sampling, ends: list[int]) -> Iterator[list[list[int]]]:
        """Yields each round's new tokens a row (none for finished rows), the prefill's first."""
        engine, clock = self.engine, self.clock
        engine.begin(self.prompts, self.lengths, sampling, self.max_new_tokens, ends, clock)
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
        runs, accepted = [], []
        for row, (drafted, emitted, goes_on, status, *tokens) in enumerate(news):
            _raise_for(row, status)
            run = tokens[: emitted - self.counts[row]] if self.live[row] else []
            if self.live[row]:
                accepted.append(drafted)
                self.live[row] = bool(goes_on)
                if self.criteria:
                    run = self._until_stopped(row, run)
                self.counts[row] += len(run)
            runs.append(run)
        if shape is not None:
            self.tally.add(shape, accepted, sum(map(len, runs)))
            if isinstance(self.engine.tree, AdaptiveTree):
                self.engine.tree.learn(shape, sum(accepted) / len(accepted))
        return runs

    def _until_stopped(self, row: int, run: list[int]) -> list[int]:
        """The run up to the first token after which a criterion ends the row."""
        prompt = self.prompts[row, : self.lengths[row]]
        text = torch.cat([prompt, self.engine.buffers.output[row, : self.counts[row] + len(run)]])[None]
        for count in range(1, len(run) + 1):
            so_far = text[:, : text.shape[1] - len(run) + count]
            if any(bool(torch.as_tensor(criterion(so_far, None)).all()) for criterion in self.criteria):
                self.live[row] = False
                self.engine.end_row(row)
                return run[:count]
        return run

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
        return self.tally.report(sum(self.counts), dict(self.clock.seconds))


def _raise_for(row: int, status: int) -> None:
    if status & STATUS_NO_FINITE:
        raise RuntimeError(f"row {row}: the target gave no finite logit; check its weights and dtype")
    if status & STATUS_BAD_TREE:
        raise RuntimeError(f"row {row}: the draft gave an invalid tree; check its weights")
