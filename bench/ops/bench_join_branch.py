"""join_branch against its vectorised PyTorch form (the reference) and a walk in Python on the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from beagle_kernels import join_branch
from bench.ops.bench_build_tree import candidates
from bench.registry import Case, drive, label, moved, parameters

SHAPES = {
    # size -> (batch, depth, branch): the candidates of trees of 16 and 60 nodes
    "tiny": [(2, 3, 2)],
    "small": [(batch, *tree) for batch in (1, 8) for tree in ((4, 4), (6, 10))],
    "full": [(batch, *tree) for batch in (1, 8) for tree in ((4, 4), (6, 10))],
    "scaling": [],
}
STEPS, MET = 10, 3
"""Tokens of a chain, and how many of them the candidates have."""


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    for batch, depth, branch in SHAPES[size]:
        _, tokens, scores, parents = candidates(batch, depth, branch)
        chain, at = torch.randint(49152, (batch, STEPS)), -1
        for step in range(MET):
            at = int((parents[0] == at).nonzero()[0])
            chain[:, step] = tokens[:, at]
        bounds = -torch.rand(batch, STEPS).cumsum(1)
        yield of_candidates(moved((tokens, scores, parents, chain, bounds), device))


def on_host(tokens: Tensor, scores: Tensor, parents: Tensor, chain: Tensor, bounds: Tensor) -> tuple[Tensor, ...]:
    """Row by row over lists, as drafting loops in Python do it."""
    rows = []
    for given in zip(*(x.tolist() for x in (tokens, scores, parents, chain, bounds))):
        names, values, above, branch, limits = given
        at, count, steps = -1, len(names), len(branch)
        names, values, above = names + [0] * steps, values + [-torch.inf] * steps, above + [-1] * steps
        for i, (token, bound) in enumerate(zip(branch, limits)):
            here = next((j for j in range(at + 1, count) if above[j] == at and names[j] == token), None)
            if here is None:
                here = count + i
                names[here], above[here] = token, at
            values[here], at = max(values[here], bound), here
        rows.append((names, values, above))
    return tuple(torch.tensor(part).to(like) for part, like in zip(zip(*rows), (tokens, scores, parents)))


def of_candidates(inputs: tuple) -> Case:
    batch, count = inputs[0].shape
    peers = {
        "beagle": lambda: join_branch(*inputs),
        "PyTorch": lambda: join_branch(*inputs, backend="reference"),
        "Python on the host": lambda: on_host(*inputs),
    }

    def equal(name: str, what: str) -> None:
        for have, want in zip(peers[name](), join_branch(*inputs, backend="reference")):
            assert torch.equal(have, want), what

    return Case(
        f"join_branch {batch} x {count} candidates, {STEPS} tokens",
        peers,
        lambda: equal("beagle", "join_branch is wrong"),
        rounds=50,
        device=inputs[0].device.type,
        check_peer=lambda name: equal(name, f"{name} joins otherwise"),
        series="join_branch",
        at={"batch": batch, "candidates": count},
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases(size="tiny"))), ids=label)
def test_join_branch(benchmark, case, peer):
    drive(benchmark, case, peer)
