"""A tree that changes with the text: each round's shape is the one expected to give the most tokens a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from beagle_sd import smollm2
from beagle_sd.bundled import bundled_folder, measured_acceptance
from beagle_sd.calibration import PLAIN, Costs, calibrated_costs
from beagle_sd.draft import BeagleDraft
from beagle_sd.generate import TreeShape


class AdaptiveTree:
    """Chooses among the shapes of `measured` (tokens a round on held-out text), by measured costs; plain decoding
    where none is expected to be `margin` times as fast, since costs are known to a few percent only.

    A shape is expected to give 1 + s (measured - 1) tokens. s says how drafts fare in this text: accepted ones over
    those expected, both forgotten with `memory` rounds. In plain decoding nothing is learnt, so every `probe`-th round
    there tries the shape that comes nearest to paying. What one answer taught the next starts with; one object serves
    one generate call at a time. Costs are those of batch 1.
    """

    def __init__(self, costs: Costs, measured: Mapping[TreeShape, float], *, memory: int = 32, probe: int = 48,
                 margin: float = 1.03):  # fmt: skip
        if not measured:
            raise ValueError("no shape is measured; allowed: one or more, as in a draft's acceptance.json")
        if memory < 1 or probe < 2 or margin < 1.0:
            raise ValueError(f"memory is {memory}, probe {probe}, margin {margin}; allowed: from 1 round, from 2 "
                             "rounds, from 1.0")
        self.costs, self.measured, self.memory, self.probe, self.margin = costs, dict(measured), memory, probe, margin
        self.plain_rounds = 0
        # as if `memory` rounds of the middle shape had gone as measured
        typical = sorted(measured.values())[len(measured) // 2] - 1.0
        self.accepted = self.expected = memory * max(typical, 0.1)

    def again(self) -> AdaptiveTree:
        """One that has learnt nothing yet, for another text."""
        return AdaptiveTree(self.costs, self.measured, memory=self.memory, probe=self.probe, margin=self.margin)

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

    @property
    def pays(self) -> bool:
        """Whether the next round drafts because it is expected to pay."""
        return self.best[1] > self.margin

    def choose(self) -> TreeShape:
        """The next round's shape."""
        shape, gain = self.best
        if gain > self.margin:
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


def adaptive_tree(
    target: PreTrainedModel,
    draft: BeagleDraft,
    *,
    measured: Mapping[TreeShape, float] | None = None,
    calibrate: bool = False,
) -> AdaptiveTree:
    """The tree for `generate(..., adaptive=...)` on this machine: costs from the cache, or measured on first use (some
    seconds) and kept there; `calibrate` measures them anew.

    measured: tokens a round by shape; None takes the acceptance.json beside the draft's weights or, without one, the
    bundled draft's as a first guess, which the text soon corrects.
    """
    if measured is None:
        rows = measured_acceptance(Path(draft.name_or_path)) if draft.name_or_path else []
        rows = rows or measured_acceptance(bundled_folder(smollm2.NAME))
        measured = {TreeShape(row["depth"], row["branch"], row["num_nodes"]): row["tokens_per_round"]
                    for row in rows if row["temperature"] == 0.0}  # fmt: skip
    return AdaptiveTree(calibrated_costs(target, draft, measured, anew=calibrate), measured)
