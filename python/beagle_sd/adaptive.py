"""A tree that changes with the text: each round's shape is the one expected to give the most tokens a second."""

from __future__ import annotations

from collections.abc import Mapping

from beagle_sd.calibration import Costs
from beagle_sd.drafting import TreeShape

PLAIN = TreeShape(1, 1, 1)


class AdaptiveTree:
    """Chooses among the shapes of `measured` (tokens a round on held-out text), by measured costs; plain decoding
    where none pays.

    A shape is expected to give 1 + s (measured - 1) tokens. s says how drafts fare in this text: accepted ones over
    those expected, both forgotten with `memory` rounds. In plain decoding nothing is learnt, so every `probe`-th round
    there tries the shape that comes nearest to paying. One object serves one generate call at a time.
    """

    def __init__(self, costs: Costs, measured: Mapping[TreeShape, float], *, memory: int = 24, probe: int = 32):
        if not measured:
            raise ValueError("no shape is measured; allowed: one or more, as in a draft's acceptance.json")
        if memory < 1 or probe < 2:
            raise ValueError(f"memory is {memory} and probe {probe}; allowed: from 1 and from 2 rounds")
        self.costs, self.measured, self.memory, self.probe = costs, dict(measured), memory, probe
        self.plain_rounds = 0
        # as if `memory` rounds of the middle shape had gone as measured
        typical = sorted(measured.values())[len(measured) // 2] - 1.0
        self.accepted = self.expected = memory * max(typical, 0.1)

    @property
    def largest(self) -> TreeShape:
        """What buffers must hold."""
        return TreeShape(*(max(getattr(shape, name) for shape in self.measured)
                           for name in ("depth", "branch", "num_nodes")))

    @property
    def best(self) -> tuple[TreeShape, float]:
        """The shape expected to decode this text fastest, and its speedup over plain decoding."""
        ratio = self.accepted / self.expected
        gains = {shape: self.costs.speedup(shape, 1.0 + ratio * (tokens - 1.0))
                 for shape, tokens in self.measured.items()}
        shape = max(gains, key=lambda shape: gains[shape])
        return shape, gains[shape]

    def choose(self) -> TreeShape:
        """The next round's shape."""
        shape, gain = self.best
        if gain > 1.0:
            self.plain_rounds = 0
            return shape
        self.plain_rounds += 1
        return PLAIN if self.plain_rounds % self.probe else shape

    def learn(self, shape: TreeShape, accepted: float) -> None:
        """A round with `shape` accepted so many drafted tokens a row."""
        if shape.num_nodes == 1:
            return
        keep = 1.0 - 1.0 / self.memory
        self.accepted = keep * self.accepted + accepted
        self.expected = keep * self.expected + self.measured[shape] - 1.0
