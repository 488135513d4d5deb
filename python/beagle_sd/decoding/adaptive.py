"""A tree that changes with the text: each round's shape is the one expected to give the most tokens a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import PreTrainedModel

from beagle_sd.decoding.calibration import PLAIN, Costs, calibrated_costs
from beagle_sd.decoding.drafting import TreeShape
from beagle_sd.models import smollm2
from beagle_sd.models.draft import BeagleDraft
from beagle_sd.models.loading import bundled_folder, measured_acceptance

_CLIP = 2.0
"""A round that took longer or shorter by more than this says something of the machine's other work, not of its cost."""
_PACE_ROUNDS, _TRIAL_ROUNDS = 16, 4
"""Rounds in which a pace follows, of what runs now, and of what is only tried now and then."""


class AdaptiveTree:
    """Chooses among the shapes of `measured` (tokens a round on held-out text), by calibrated costs; plain decoding
    where none is expected to pay.

    A shape is expected to give 1 + s (measured - 1) tokens. s says how drafts fare in this text: accepted ones over
    those expected, both forgotten with `memory` rounds. Costs follow the clock: rounds with drafts and plain ones each
    have a pace, how long they take over what calibration says, so that costs which do not fit (a longer text, a batch,
    a busy machine) are mended while decoding. Every `probe`-th round is of the other kind: in plain decoding the shape
    that comes nearest to paying, else a plain one. What one answer taught the next starts with; one object serves one
    generate call at a time.
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
            *(max(getattr(shape, name) for shape in self.measured) for name in ("depth", "branch", "num_nodes"))
        )

    @property
    def best(self) -> tuple[TreeShape, float]:
        """The shape expected to decode this text fastest, and its speedup over plain decoding."""
        ratio, pace = self.accepted / self.expected, self.pace[False] / self.pace[True]
        gains = {
            shape: pace * self.costs.speedup(shape, 1.0 + ratio * (tokens - 1.0))
            for shape, tokens in self.measured.items()
        }
        shape = max(gains, key=lambda shape: gains[shape])
        return shape, gains[shape]

    @property
    def pays(self) -> bool:
        """Whether rounds with drafts are expected to pay, so that the next is one, unless it tries a plain one."""
        return self.best[1] > 1.0

    def choose(self) -> TreeShape:
        """The next round's shape; the round lasts from here to `learn`."""
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
        measured = {
            TreeShape(row["depth"], row["branch"], row["num_nodes"]): row["tokens_per_round"]
            for row in rows
            if row["temperature"] == 0.0
        }
    return AdaptiveTree(calibrated_costs(target, draft, measured, anew=calibrate), measured)
