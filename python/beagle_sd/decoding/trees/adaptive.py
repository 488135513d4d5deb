"""A tree that changes with the text: each round's shape is the one expected to give the most tokens a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from beagle_sd.decoding.trees.lookup import Copied
from beagle_sd.decoding.trees.tree import PLAIN, TreeShape
from beagle_sd.models.head import UnsupportedTarget
from beagle_sd.models.target import Target

_CLIP = 2.0
"""A round that took longer or shorter by more than this says something of the machine's other work, not of its cost."""
_PACE_ROUNDS, _TRIAL_ROUNDS = 16, 4
"""Rounds in which a pace follows, of what runs now, and of what is only tried now and then."""


@dataclass(frozen=True)
class Costs:
    """Milliseconds at batch 1: draft[shape], drafting its levels; verify[n], all the rest of a round with n nodes.

    scatter: how many times as long a shape's rounds took in its slowest pass as in its fastest, of the worst shape.
    """

    verify: dict[int, float]
    draft: dict[TreeShape, float]
    scatter: float = 1.0

    def round_ms(self, shape: TreeShape) -> float:
        """A round with this shape: as measured, else between or beyond the measured node counts and levels."""
        verify = _line(self.verify, shape.num_nodes)
        if shape.num_nodes == 1:
            return verify
        if (known := self.draft.get(shape)) is not None:
            return verify + known
        # a level after the first computes `branch` nodes
        levels = {1 + (other.depth - 1) * other.branch: cost for other, cost in self.draft.items()}
        return verify + _line({0: 0.0, **levels}, 1 + (shape.depth - 1) * shape.branch)

    def speedup(self, shape: TreeShape, tokens_per_round: float) -> float:
        """Over plain decoding: tokens a round / (cost of a round / cost of a plain one)."""
        return tokens_per_round * self.round_ms(PLAIN) / self.round_ms(shape)


def _line(known: dict[int, float], at: int) -> float:
    """Linear between the nearest known points, flat before the first, along the last two after the last."""
    if at in known:
        return known[at]
    points = sorted(known)
    if at < points[0] or len(points) == 1:
        return known[points[0]]
    right = next((i for i, point in enumerate(points) if point > at), len(points) - 1)
    low, high = points[right - 1], points[right]
    return known[low] + (known[high] - known[low]) * (at - low) / (high - low)


class AdaptiveTree:
    """Chooses among the shapes of `measured` (tokens a round on held-out text), by calibrated costs; plain decoding
    where none is expected to pay.

    A shape is expected to give 1 + s (measured - 1) tokens. s says how drafts fare in this text: accepted ones over
    those expected, both forgotten with `memory` rounds. Costs follow the clock: rounds with drafts and plain ones each
    have a pace, how long they take over what calibration says, so that costs which do not fit (a longer text, a batch,
    a busy machine) are mended while decoding. Every `probe`-th round is of the other kind: in plain decoding the shape
    that comes nearest to paying, else a plain one. A branch copied from the text is expected to bring what matches of
    its length brought of late (`copied`), where that is more. What one answer taught the next starts with; one object
    serves one generate call at a time.
    """

    def __init__(
        self,
        costs: Costs,
        measured: Mapping[TreeShape, float],
        *,
        memory: int = 32,
        probe: int = 48,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if not measured:
            raise ValueError("no shape is measured; allowed: one or more, as in a draft's acceptance.json")
        if memory < 1 or probe < 2:
            raise ValueError(f"memory is {memory} and probe {probe}; allowed: from 1 and from 2 rounds")
        self.costs, self.measured = costs, dict(measured)
        self.memory, self.probe, self.clock = memory, probe, clock
        self.drafting: bool | None = None  # what rounds do now, trials aside
        self.since = 0  # rounds since that last changed
        self.began: float | None = None
        self.pace = {True: 1.0, False: 1.0}  # of rounds with drafts, of plain ones
        # as if `memory` rounds of the middle shape had gone as measured
        typical = sorted(measured.values())[len(measured) // 2] - 1.0
        self.accepted = self.expected = memory * max(typical, 0.1)
        self.copied = Copied()
        self.matched: Sequence[int] = ()  # of the texts in progress, as the round began

    def again(self) -> AdaptiveTree:
        """One that has learnt nothing yet, for another text."""
        return AdaptiveTree(self.costs, self.measured, memory=self.memory, probe=self.probe, clock=self.clock)

    @property
    def shapes(self) -> list[TreeShape]:
        """All that a round may have."""
        return [PLAIN, *(shape for shape in self.measured if shape != PLAIN)]

    @property
    def largest(self) -> TreeShape:
        """What buffers must hold."""
        return TreeShape(
            *(max(getattr(shape, name) for shape in self.measured) for name in vars(next(iter(self.measured))))
        )

    @property
    def best(self) -> tuple[TreeShape, float]:
        """The shape expected to decode this text fastest, and its speedup over plain decoding."""
        ratio, pace = self.accepted / self.expected, self.pace[False] / self.pace[True]
        gains = {
            shape: pace * self.costs.speedup(shape, 1.0 + max(ratio * self._drafted(shape), self._copies(shape)))
            for shape in self.measured
        }
        shape = max(gains, key=lambda shape: gains[shape])
        return shape, gains[shape]

    def _drafted(self, shape: TreeShape) -> float:
        """The tokens a row that the draft is expected to bring: those of the same tree without a copied branch, if that
        was measured too."""
        return self.measured.get(replace(shape, lookup=0), self.measured[shape]) - 1.0

    def _copies(self, shape: TreeShape) -> float:
        """The tokens a row that the branch copied from its text is expected to bring."""
        levels = min(shape.lookup, shape.levels)
        return sum(self.copied.expected(length, levels) for length in self.matched) / max(len(self.matched), 1)

    @property
    def pays(self) -> bool:
        """Whether rounds with drafts are expected to pay, so that the next is one, unless it tries a plain one."""
        return self.best[1] > 1.0

    def choose(self, matched: Sequence[int] = ()) -> TreeShape:
        """The next round's shape, for texts of whose ends so many tokens stood earlier in them; the round lasts from
        here to `learn`."""
        self.matched = matched
        shape, gain = self.best
        if (gain > 1.0) != self.drafting:
            self.drafting, self.since = gain > 1.0, 0
        self.since += 1
        trial = self.since % self.probe == 0
        self.began = self.clock()
        return shape if self.drafting != trial else PLAIN

    def learn(self, shape: TreeShape, accepted: float) -> None:
        """The round with `shape` accepted so many drafted tokens a row."""
        drafted = shape.num_nodes > 1
        if self.began is not None:
            took = 1e3 * (self.clock() - self.began) / (self.costs.round_ms(shape) * self.pace[drafted])
            rounds = _PACE_ROUNDS if drafted == self.drafting else _TRIAL_ROUNDS
            self.pace[drafted] *= min(_CLIP, max(1.0 / _CLIP, took)) ** (1.0 / rounds)
            self.began = None
        if drafted:
            keep = 1.0 - 1.0 / self.memory
            self.accepted = keep * self.accepted + accepted
            self.expected = keep * self.expected + max(self._drafted(shape), self._copies(shape))

    def learn_lookup(self, matches: Sequence[tuple[int, int, int]], levels: int) -> None:
        """Of each text in the round: how long the match was, how many tokens of the branch of `levels` came, of how
        many that came in all."""
        for matched, agreed, count in matches:
            self.copied.learn(matched, agreed, count, levels)


def checked_tree(tree: TreeShape | AdaptiveTree | None, target: Target) -> TreeShape | AdaptiveTree:
    """The tree to decode with, the device's default for None. TypeError for what is none, UnsupportedTarget for one
    that branches where the target takes chains alone."""
    chains = target.chains_only
    if tree is None:
        return TreeShape.default(target.device, chain=chains is not None)
    if not isinstance(tree, TreeShape | AdaptiveTree):
        raise TypeError(f"tree is {tree!r}; allowed: a TreeShape, an AdaptiveTree or None, the device's default")
    shapes = tree.shapes if isinstance(tree, AdaptiveTree) else [tree]
    if chains and (wide := [shape for shape in shapes if shape.branch > 1]):
        raise UnsupportedTarget(
            f"{chains}, and the tree {wide[0]} branches; use a chain: "
            f"TreeShape({wide[0].depth}, 1, {wide[0].depth + 1}); allowed: branch 1"
        )
    return tree
