"""The host's loop over the rounds: what it reads, and which rows go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from beagle_kernels import STATUS_BAD_TREE, STATUS_NO_FINITE
from beagle_sd.decoding.engine import Engine
from beagle_sd.decoding.prompts import Text
from beagle_sd.decoding.report import Clock, Report, Tally
from beagle_sd.decoding.trees.adaptive import AdaptiveTree
from beagle_sd.decoding.trees.tree import TreeShape
from beagle_sd.models.pictures import PicturePrompt


@dataclass(eq=False)
class Row:
    """A text in progress, `name` in errors. tokens: its new ones; run: those that nobody took yet; slot: its row of the
    engine; matched: how much of its end stood earlier in it."""

    text: Text
    name: str = "row 0"
    tokens: list[int] = field(default_factory=list)
    run: list[int] = field(default_factory=list)
    live: bool = True
    slot: int = -1
    matched: int = 0

    def take_run(self) -> list[int]:
        run, self.run = self.run, []
        return run


class Decoding:
    """The texts in progress on an engine, each in a row of its own.

    Rounds run ahead of what the host has read where it does not choose what the next one does: not with a tree that
    adapts, rules that ask the host, nor where `host_decides`. Rows that have ended change places with those that go on,
    so that rounds run over the latter alone; but not where a graph, which has all rows, is replayed.
    """

    def __init__(self, engine: Engine, ends: list[int], *, host_decides: bool = False, ahead: bool | None = None):
        self.engine, self.ends = engine, ends
        self.slots: list[Row | None] = [None] * engine.batch
        self.clock, self.tally = Clock(engine.target.device), Tally(engine.shape.levels)
        self.ahead = engine.graph if ahead is None else ahead
        self.host_decides = host_decides or isinstance(engine.tree, AdaptiveTree)
        self.playing: deque[TreeShape] = deque()
        self.prefilled = self.new_tokens = 0
        self.asked_host = False
        engine.start()

    @property
    def live(self) -> list[Row]:
        return [row for row in self.slots if row is not None and row.live]

    @property
    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.slots) if row is None or not row.live]

    def admit(self, rows: Sequence[Row], pictures: PicturePrompt | None = None, *, echo: bool = False) -> None:
        """Prefill rows into free ones of the engine, each where most of its prompt is held, and take their first
        tokens."""
        while self.playing:
            self._take(self.playing.popleft())
        free = self.free
        if len(rows) > len(free):
            raise ValueError(
                f"{len(rows)} rows were given to an engine for {self.engine.batch}, of which {len(free)} are free; "
                "allowed: as many"
            )
        held = dict(zip(free, [[]] * len(free) if pictures is not None else self.engine.held(free)))
        for row in rows:  # pictures are in the order given
            row.slot = max(held, key=lambda slot: self.engine.common(held[slot], row.text.ids))
            del held[row.slot]
        placed = sorted(rows, key=lambda row: row.slot)
        for row in placed:
            self.slots[row.slot] = row
        where, texts = [row.slot for row in placed], [row.text for row in placed]
        self.prefilled += self.engine.begin(where, texts, self.ends, self.clock, pictures, echo=echo)
        self.asked_host |= self.engine.on_host
        self._take(None)

    def step(self) -> None:
        """Play a round, or take the news of one that was played ahead."""
        engine = self.engine
        width = self._pack() if not engine.graph and not self.playing else engine.batch
        with self.clock.rest("rounds" if engine.captures else None):
            while len(self.playing) < self._most_playing and self._more_after(len(self.playing)):
                shape = self._choose()
                engine.play(shape, self.clock, width)
                self.playing.append(shape)
            self._take(self.playing.popleft())

    @property
    def _most_playing(self) -> int:
        return 2 if self.ahead and not self.host_decides and not self.engine.on_host else 1

    def _choose(self) -> TreeShape:
        tree = self.engine.tree
        if not isinstance(tree, AdaptiveTree):
            return tree
        return tree.choose([row.matched for row in self.live])

    def _pack(self) -> int:
        """Bring the rows that go on to the front; how many they are."""
        live = len(self.live)
        behind = [slot for slot in range(live, len(self.slots)) if (row := self.slots[slot]) is not None and row.live]
        for slot in [slot for slot in self.free if slot < live]:
            other = behind.pop()
            self.engine.swap(slot, other)
            self.slots[slot], self.slots[other] = self.slots[other], self.slots[slot]
            for place in (slot, other):
                if (row := self.slots[place]) is not None:
                    row.slot = place
        return live

    def _more_after(self, rounds: int) -> bool:
        """Whether a row may still go on after so many rounds, each of which gives it a token or more."""
        return any(row.text.max_new_tokens - len(row.tokens) > rounds for row in self.live)

    def _take(self, played: TreeShape | None) -> None:
        """Give each row the news of a round, or of the prefill (None)."""
        accepted, before, live = [], self.new_tokens, self.live
        news = self.engine.receive()
        matches = []
        for row in live:
            drafted, emitted, goes_on, status, matched, agreed, *tokens = news[row.slot]
            _raise_for(row, status)
            run = tokens[: emitted - len(row.tokens)]
            if played is not None:
                accepted.append(drafted)
                matches.append((row.matched, agreed, len(run)))
            row.tokens += run
            row.run += run
            row.live, row.matched = bool(goes_on), matched
            self.new_tokens += len(run)
            self.engine.say(row.slot, run)
        if played is not None and accepted:
            self._learn(played, accepted, self.new_tokens - before, matches)

    def _learn(self, shape: TreeShape, accepted: list[int], new: int, matches: list[tuple[int, int, int]]) -> None:
        self.tally.add(shape, accepted, new)
        tree = self.engine.tree
        if isinstance(tree, AdaptiveTree):
            tree.learn(shape, sum(accepted) / len(accepted))
            if self.engine.shape.lookup:
                tree.learn_lookup(matches, self.engine.shape.lookup)
                self.engine.set_gains(tree.copied.gains())

    def end(self, row: Row, count: int) -> None:
        """Let a row have ended after its first `count` tokens."""
        ahead = len(row.tokens) - count
        if ahead or row.live:
            self.new_tokens -= ahead
            del row.tokens[count:]
            row.run = row.run[: max(len(row.run) - ahead, 0)]
            row.live = False
            self.engine.end_row(row.slot)

    def kept(self, row: Row, name: str) -> Tensor | None:
        """What the engine keeps of a row's text (buffers.Kept), by the token's place; None if it has no room for it."""
        values = getattr(self.engine.buffers.kept, name)
        return None if values is None else values[row.slot, : len(row.text.ids) + len(row.tokens)]

    def report(self) -> Report:
        made = self.tally.report(self.new_tokens, dict(self.clock.seconds), self.engine.target.layers)
        made.prefilled, made.on_host = self.prefilled, self.asked_host
        return made


def _raise_for(row: Row, status: int) -> None:
    if status & STATUS_NO_FINITE:
        suppresses = row.text.rules.suppresses
        culprit = "the tokens that the call suppresses, or its weights" if suppresses else "its weights"
        raise RuntimeError(f"{row.name}: the target gave no finite logit; check {culprit} and dtype")
    if status & STATUS_BAD_TREE:
        raise RuntimeError(f"{row.name}: the draft gave an invalid tree; check its weights")
