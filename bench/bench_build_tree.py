"""build_tree and accept_tree against their vectorised PyTorch form (the reference)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from beagle_kernels import accept_tree, build_tree
from bench.registry import Case, drive, label, moved, parameters


def candidates(batch: int, depth: int, branch: int) -> tuple[torch.Tensor, ...]:
    """A draft's own candidates: branch below the root, then branch x branch a level."""
    tokens, scores, parents, first = [], [], [], -1
    level_scores = torch.zeros(batch, 1)
    for level in range(depth):
        parent = torch.zeros(branch, dtype=torch.int64) - 1 if level == 0 else (
            torch.arange(branch).repeat_interleave(branch) + first
        )  # fmt: skip
        above = level_scores[:, :1].expand(-1, branch) if level == 0 else level_scores.repeat_interleave(branch, 1)
        score = above - torch.rand(batch, len(parent)) * 3
        first = sum(map(len, parents))
        parents.append(parent)
        scores.append(score)
        tokens.append(torch.randint(49152, score.shape))
        level_scores = score[:, :branch]
    flat = torch.cat(parents)[None].expand(batch, -1).int().contiguous()
    return torch.randint(49152, (batch,)), torch.cat(tokens, 1), torch.cat(scores, 1), flat


def cases(device: str = "cpu") -> Iterator[Case]:
    for batch in (1, 8):
        for nodes in (16, 60):
            inputs = (*moved(candidates(batch, 6, 10), device), nodes, 6)
            chosen = torch.randint(49152, (batch, nodes)).to(device)
            yield of_inputs(inputs, chosen, f"{batch} x {inputs[1].shape[1]} candidates, {nodes} nodes")


def of_inputs(inputs: tuple, chosen: torch.Tensor, shape: str) -> Case:
    def both(backend: str):
        tree = build_tree(*inputs, backend=backend)
        return *tree[:5], *accept_tree(tree, chosen, backend=backend)

    def check() -> None:
        for have, want in zip(both("auto"), both("reference")):
            assert torch.equal(have, want)

    peers = {"beagle": lambda: both("auto"), "PyTorch": lambda: both("reference")}
    return Case(f"build_tree + accept_tree {shape}", peers, check, rounds=50, device=chosen.device.type)


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_build_tree(benchmark, case, peer):
    drive(benchmark, case, peer)
