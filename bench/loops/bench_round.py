"""Whole rounds: drafting, the target's forward over the tree, verification and all that is kept, beside plain decoding.

"share_beside_target" is all of a round but the target's own forward, its LM head included; "share_beside_layers" is all
but the layers alone, the head being counted with the rest. Both are of medians over rounds.

The targets have random weights, so how many drafted tokens a round accepts is not theirs: it is REPLAYED from the
paper's acceptance by depth (`replayed_acceptance.py`). A row says "replayed" wherever that is so. `python -m bench
round` times it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from beagle_sd import BeagleDraft
from beagle_sd.decoding.generate import generate
from beagle_sd.decoding.report import Report
from beagle_sd.decoding.trees.tree import TreeShape
from bench.loops.random_models import random_model, weight_bytes
from bench.loops.replayed_acceptance import accepted_lengths, replayed
from bench.loops.target_time import TargetTime
from bench.registry import Case, drive, label, parameters

SMALL_TREE, TREE = TreeShape(4, 4, 8), TreeShape.default(torch.device("cuda"))
SHAPES = {
    # size -> (model, batch, cached tokens, new tokens, tree)
    "tiny": [("tiny", 2, 40, 16, TreeShape(3, 3, 8))],
    "small": [("135M", batch, 128, 40, SMALL_TREE) for batch in (1, 4)],
    "full": [("8B", batch, 512, 132, TREE) for batch in (1, 4, 8)],
    "scaling": [("135M", 1, cached, 24, SMALL_TREE) for cached in (64, 128, 512, 1024)]
    + [("135M", batch, 128, 24, SMALL_TREE) for batch in (2, 4, 8)],
}


class Rounds:
    """The contenders of one shape: each gives the seconds of the tokens after the first, which the prefill gives."""

    def __init__(self, model: Any, draft: BeagleDraft, prompt: Tensor, new: int, tree: TreeShape):
        self.model, self.draft, self.prompt, self.new, self.tree = model, draft, prompt, new, tree
        self.device = model.device.type
        self.found: dict[str, dict] = {}
        self.timers: dict[str, TargetTime] = {}
        self.lengths = accepted_lengths(len(prompt), tree.depth).to(model.device)

    def ours(self, name: str, draft: BeagleDraft | None, tree: TreeShape) -> float:
        def decode() -> Report:
            with replayed(self.lengths):
                return generate(
                    self.model, draft, self.prompt, max_new_tokens=self.new, eos_token_id=[], tree=tree
                ).report

        timer = self.timers.get(name) or TargetTime(self.model, tree.num_nodes)
        if self.device == "cuda":
            if name not in self.timers:  # in a run of its own: it waits after each round
                with timer.watching():
                    decode()
            torch.cuda.reset_peak_memory_stats()
            report = decode()
        else:
            with timer.watching():
                report = decode()
        self.timers[name] = timer
        seconds = sum(spent for phase, spent in report.seconds.items() if phase not in ("prefill", "capture"))
        self.found[name] = {
            "tokens_per_round": report.tokens_per_round,
            "round_ms": 1e3 * seconds / report.rounds,
            "phases": report.seconds,
            "target_bytes": weight_bytes(self.model),
            "draft_bytes": weight_bytes(draft),
            **target_share(timer, seconds / report.rounds),
        }
        if self.device == "cuda":
            self.found[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
        return seconds

    def replayed(self) -> float:
        return self.ours("beagle", self.draft, self.tree)

    def plain(self) -> float:
        return self.ours("beagle plain", None, TreeShape(1, 1, 1))

    def transformers(self) -> float:
        """target.generate, less a call that stops after the first token."""
        seconds = []
        for new in (1, self.new):
            if self.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            self.model.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
            )
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        self.found["target.generate"] = {"tokens_per_round": 1.0}
        if self.device == "cuda":
            self.found["target.generate"]["peak_bytes"] = torch.cuda.max_memory_allocated()
        return seconds[1] - seconds[0]

    def check(self) -> None:
        """The replay gives what it promises, and without it the text is that of plain decoding."""
        new = 12
        self.replayed()
        promised = self.found["beagle"]["tokens_per_round"]
        expected = float(self.lengths.double().mean()) + 1
        assert abs(promised - expected) < 0.35 * expected, f"{promised:.2f} tokens a round, {expected:.2f} replayed"
        if self.model.dtype == torch.float32:
            speculative = generate(
                self.model, self.draft, self.prompt, max_new_tokens=new, eos_token_id=[], tree=self.tree
            ).sequences
            plain = self.model.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
            )
            assert torch.equal(speculative, plain), "speculative decoding gives another text than target.generate"

    def notes(self, name: str) -> dict:
        return {**self.found.get(name, {}), "acceptance": "replayed" if name == "beagle" else "none"}


def target_share(timer: TargetTime, a_round: float) -> dict:
    """Of a round of so many seconds: the target's milliseconds, and the shares of all but them."""
    try:
        found = timer.medians()
    except RuntimeError as error:  # no round, or an event that no graph recorded
        return {"target_forward": f"not measured: {error}"}
    return {
        "target_layers_ms": 1e3 * found["layers"],
        "target_head_ms": 1e3 * found["head"],
        "target_forward_ms": 1e3 * found["all"],
        "share_beside_target": 1 - found["all"] / a_round,
        "share_beside_layers": 1 - found["layers"] / a_round,
    }


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    model = draft = loaded = None
    for name, batch, cached, new, tree in SHAPES[size]:
        if name != loaded:
            model = draft = None
            (model, draft), loaded = random_model(name, device), name
        yield of_model(name, model, draft, batch, cached, new, tree, plot=size == "scaling")


def of_model(name: str, model, draft, batch: int, cached: int, new: int, tree: TreeShape, plot: bool) -> Case:
    prompt = torch.randint(model.config.vocab_size, (batch, cached), device=model.device)
    rounds = Rounds(model, draft, prompt, new, tree)
    peers: dict[str, Callable] = {"beagle": rounds.replayed, "beagle plain": rounds.plain}
    if not plot:
        peers["target.generate"] = rounds.transformers
    kind = f"{name} random {str(model.dtype)[6:]}"
    return Case(
        f"decode round, replayed: {kind}, batch {batch}, {cached} cached, {tree.num_nodes} nodes",
        peers,
        rounds.check,
        rounds=2 if plot else 3,
        device=model.device.type,
        clock="self-timed",
        notes=rounds.notes,
        data="random weights, replayed acceptance",
        work={"token": float(batch * (new - 1))},
        series="decode round",
        at={"model": kind, "batch": batch, "cached": cached, "nodes": tree.num_nodes},
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases(size="tiny"))), ids=label)
def test_round(benchmark, case, peer):
    drive(benchmark, case, peer)
