"""What a call of generate did: counts by round and depth, seconds by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from beagle_sd.decoding.trees.tree import TreeShape


@dataclass
class Report:
    """What happened. A row's first token comes from the prefill and is not counted in rounds.

    rounds: forwards of the target after the prefill, but for one that a graph had begun before the last row's end was
    known; new_tokens: all emitted tokens; tokens_per_round: emitted tokens a round and row, drafts and the target's
    own; acceptance_by_depth[d]: how often a drafted token at depth d + 1 was accepted, given that its parent was;
    seconds: by phase. row_rounds and reached are the counts behind: rounds summed over the rows in progress, and how
    many of them accepted d or more drafted tokens. layers: on a CPU, how many of the target's decoder layers ran as one
    op each, and why the others did not. prefilled: tokens of prompts that were run, which an engine that held the
    others' keys need not. on_host: whether settings asked the host in each round (logits processors, a guide), for
    which a GPU waits.

    Phases: prefill, draft, target, verify, keep, each timed to its end on the device. Rounds replayed as a graph have
    no parts that the host could time: there the phases are prefill, capture (once a tree shape) and rounds; for the
    shares within a round use graph=False.
    """

    rounds: int = 0
    new_tokens: int = 0
    tokens_per_round: float = 0.0
    acceptance_by_depth: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    row_rounds: int = 0
    reached: list[int] = field(default_factory=list)
    layers: str | None = None
    prefilled: int = 0
    on_host: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over all phases' seconds."""
        return self.new_tokens / max(sum(self.seconds.values()), 1e-9)


class Tally:
    """The counts of a call in progress, for trees of at most `deepest` drafted levels."""

    def __init__(self, deepest: int):
        self.rounds = self.row_rounds = self.round_tokens = 0
        self.reached = [0] * (deepest + 1)
        self.tried = [0] * len(self.reached)  # of those that reached a depth, the rounds that drafted a further one

    def add(self, shape: TreeShape, accepted: list[int], new_tokens: int) -> None:
        """A round with `shape`: the drafted tokens each row in progress accepted, and the tokens emitted in all."""
        self.rounds += 1
        self.row_rounds += len(accepted)
        self.round_tokens += new_tokens
        for count in accepted:
            for depth in range(count + 1):
                self.reached[depth] += 1
                self.tried[depth] += depth < shape.levels

    def report(self, new_tokens: int, seconds: dict[str, float], layers: str | None) -> Report:
        pairs = zip(self.tried, self.reached[1:], strict=False)
        return Report(
            rounds=self.rounds,
            new_tokens=new_tokens,
            tokens_per_round=self.round_tokens / max(self.row_rounds, 1),
            acceptance_by_depth=[further / before for before, further in pairs if before],
            seconds=seconds,
            row_rounds=self.row_rounds,
            reached=list(self.reached),
            layers=layers,
        )


class Clock:
    """Seconds by phase; on a GPU a phase ends when the device has done its work."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = self._now()
        yield
        self.seconds[name] += self._now() - began

    @contextmanager
    def rest(self, name: str | None) -> Iterator[None]:
        """What the host spends here beside the phases within; not counted without a name."""
        began, before = time.perf_counter(), sum(self.seconds.values())
        yield
        if name is not None:
            self.seconds[name] += time.perf_counter() - began - (sum(self.seconds.values()) - before)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
