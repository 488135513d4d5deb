"""build_tree and accept_tree against their vectorised PyTorch form (the reference) and EAGLE-2's Python on the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from beagle_kernels import accept_tree, build_tree
from beagle_kernels.reference.build_tree import unpack
from bench.peers import eagle2_tree
from bench.registry import Case, drive, label, moved, parameters


def candidates(batch: int, depth: int, branch: int) -> tuple[torch.Tensor, ...]:
    """A draft's own candidates: branch below the root, then branch x branch a level."""
    tokens: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    parents: list[torch.Tensor] = []
    first = -1
    level_scores = torch.zeros(batch, 1)
    for level in range(depth):
        parent = (
            torch.zeros(branch, dtype=torch.int64) - 1
            if level == 0
            else (torch.arange(branch).repeat_interleave(branch) + first)
        )
        above = level_scores[:, :1].expand(-1, branch) if level == 0 else level_scores.repeat_interleave(branch, 1)
        score = above - torch.rand(batch, len(parent)) * 3
        first = sum(len(level) for level in parents)
        parents.append(parent)
        scores.append(score)
        tokens.append(torch.randint(49152, score.shape))
        level_scores = score[:, :branch]
    flat = torch.cat(parents)[None].expand(batch, -1).int().contiguous()
    return torch.randint(49152, (batch,)), torch.cat(tokens, 1), torch.cat(scores, 1), flat


SHAPES = {
    # size -> (batch, nodes)
    "tiny": [(2, 8)],
    "small": [(batch, nodes) for batch in (1, 8) for nodes in (16, 60)],
    "full": [(1, 60), (8, 60), (8, 256)],
    "scaling": [(1, nodes) for nodes in (4, 8, 16, 32, 64, 128)],
}
DEPTH, BRANCH = 6, 10


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    for batch, nodes in SHAPES[size]:
        inputs = (*moved(candidates(batch, DEPTH, BRANCH), device), nodes, DEPTH)
        yield of_inputs(inputs, torch.randint(49152, (batch, nodes)).to(device))


def of_inputs(inputs: tuple, chosen: torch.Tensor) -> Case:
    batch, nodes = chosen.shape

    def both(backend: str):
        tree = build_tree(*inputs, backend=backend)
        return *tree[:5], *accept_tree(tree, chosen, backend=backend)

    def on_host():
        root, tokens, scores, parents, *_ = inputs
        trees = [eagle2_tree.build(*row) for row in zip(root, tokens, scores, parents, [nodes] * batch)]
        return trees, [eagle2_tree.greedy(*row) for row in zip(trees, chosen)]

    def check() -> None:
        for have, want in zip(both("auto"), both("reference")):
            assert torch.equal(have, want), "build_tree or accept_tree is wrong"

    def check_peer(name: str) -> None:
        if name != "EAGLE-2 on the host":
            return
        tokens, _, depth, mask, _, _, count, *_ = both("auto")
        trees, verdicts = on_host()
        for row, tree in enumerate(trees):
            assert torch.equal(tree.tokens, tokens[row]) and torch.equal(tree.depth, depth[row].long())
            assert torch.equal(tree.visible, unpack(mask[row], nodes))
            assert verdicts[row][0] == int(count[row]), "the host accepts another path"

    peers = {"beagle": lambda: both("auto"), "PyTorch": lambda: both("reference"), "EAGLE-2 on the host": on_host}
    name = f"build_tree + accept_tree {batch} x {inputs[1].shape[1]} candidates, {nodes} nodes"
    return Case(
        name,
        peers,
        check,
        rounds=50,
        device=chosen.device.type,
        check_peer=check_peer,
        series="build_tree + accept_tree",
        at={"batch": batch, "nodes": nodes},
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_build_tree(benchmark, case, peer):
    drive(benchmark, case, peer)
