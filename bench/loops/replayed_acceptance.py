"""Acceptance that is replayed from the paper's figures, for targets of random weights, whose own says nothing.

Everything is computed as it would be, verification too; only its verdict is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import beagle_kernels
from beagle_kernels import Verdict
from beagle_kernels.reference.build_tree import unpack

ACCEPTANCE = (0.92, 0.83, 0.75, 0.70, 0.69, 0.69)
"""By depth, given the parent: the paper's curve, .90 .81 .73 .68 .67 read off its figure, raised by .02 so that the 4.1
tokens a round of its Table 1 come out; the sixth depth as the fifth."""
REPLAYED = 64
"""Rounds after which the replay begins anew; over as many its mean is exact."""


def accepted_lengths(batch: int, depth: int) -> Tensor:
    """[REPLAYED, batch] int64: how many drafted tokens each round accepts, in a random order a row."""
    reached = torch.tensor(ACCEPTANCE[:depth], dtype=torch.float64).cumprod(0)
    even = (torch.arange(REPLAYED) + 0.5) / REPLAYED
    counts = (even[:, None] < reached).sum(1)
    order = torch.Generator().manual_seed(0)
    return torch.stack([counts[torch.randperm(REPLAYED, generator=order)] for _ in range(batch)], 1)


@contextmanager
def replayed(lengths: Tensor) -> Iterator[None]:
    """Inside, generate's verify_tree does its work, and accepts what `lengths` [rounds, B] says: down to that depth,
    or to the tree's own, along the first deepest path. Without a read on the host, so that a graph can capture it.
    """
    real, turn = beagle_kernels.verify_tree, torch.zeros(1, dtype=torch.int64, device=lengths.device)

    def verify(logits, tree, positions, sampling, **options) -> Verdict:
        verdict = real(logits, tree, positions, sampling, **options)
        wanted = lengths.index_select(0, turn % len(lengths))[0]
        turn.add_(1)
        batch, nodes = tree.depth.shape
        depth, node = tree.depth.long(), torch.arange(nodes, device=lengths.device)
        usable = (node < tree.size[:, None]) & (depth <= wanted[:, None])
        last = torch.where(usable, depth * nodes + nodes - 1 - node, -1).argmax(1, keepdim=True)
        above = unpack(tree.mask, nodes).gather(1, last[:, :, None].expand(-1, -1, nodes))[:, 0]
        path = depth.new_full((batch, tree.max_depth + 2), -1)
        path = path.scatter(1, torch.where(above, depth, tree.max_depth + 1), node.expand(batch, -1))
        count = depth.gather(1, last)[:, 0]
        return verdict._replace(path=path[:, :-1].int(), num_accepted=count.int())

    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("beagle_sd") and getattr(module, "verify_tree", None) is real
    ]
    if not users:
        raise RuntimeError("no module of beagle_sd uses beagle_kernels.verify_tree: nothing can be replayed")
    for module in users:
        module.verify_tree = verify  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in users:
            module.verify_tree = real  # type: ignore[attr-defined]
