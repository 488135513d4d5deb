"""verify_tree against argmax or multinomial followed by the walk over the tree in plain Python."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from beagle_kernels import DraftTree, Sampling, build_tree, verify_tree
from bench.bench_choose_tokens import top_p
from bench.registry import SHAPES, Case, drive, label, moved, parameters, same_as_truth


def trees(batch: int, nodes: int) -> DraftTree:
    """Trees of random shape, all nodes in use."""
    parents = [[max(-1, int(torch.randint(-1, i, ())) if i else -1) for i in range(nodes - 1)] for _ in range(batch)]
    scores = -torch.arange(1, nodes, dtype=torch.float32).expand(batch, -1).contiguous()
    tokens = torch.randint(100, (batch, nodes - 1))
    root = torch.ones(batch, dtype=torch.int64)
    return build_tree(root, tokens, scores, torch.tensor(parents).int(), nodes, nodes)


def walk(tree: DraftTree, chosen: torch.Tensor) -> list[tuple[list[int], int]]:
    """Follow the choices [B, N] down from each tree's root."""
    return [walk_one(*row) for row in zip(*(x.tolist() for x in (tree.tokens, tree.parents, tree.depth, chosen)))]


def walk_one(tokens: list[int], parents: list[int], depth: list[int], choice: list[int]) -> tuple[list[int], int]:
    """Follow the choices down from the root of a single tree."""
    accepted, path = {0}, [0]
    for node in range(1, len(tokens)):
        if parents[node] in accepted and tokens[node] == choice[parents[node]]:
            accepted.add(node)
            path = max(path, [node], key=lambda p: depth[p[-1]])
    return path, choice[path[-1]]


def cases(device: str = "cpu") -> Iterator[Case]:
    shapes = [(1, nodes, vocab, t) for vocab, nodes in SHAPES for t in (torch.float32, torch.bfloat16)]
    if device == "cuda":
        shapes = [(1, 60, 128256, torch.bfloat16), (8, 64, 128256, torch.bfloat16)]
    for batch, nodes, vocab, dtype in shapes:
        tree = moved(trees(batch, nodes), device)
        logits = torch.randn(batch, nodes, vocab, device=device).to(dtype)
        yield of_logits(logits, tree, Sampling.of(batch, device=device))
        yield of_logits(logits, tree, Sampling.of(batch, 0, 1.0, device=device))
        if device == "cuda":
            # a model's rows have a few likely tokens, and most of the others need no noise
            yield of_logits(logits * 3, tree, Sampling.of(batch, 0, 1.0, device=device), "normal random, deviation 3")
            yield of_logits(logits, tree, Sampling.of(batch, 0, 1.0, 0, 0.9, device=device))


def of_logits(logits: torch.Tensor, tree: DraftTree, sampling: Sampling, data: str = "normal random") -> Case:
    (batch, nodes, vocab), device = logits.shape, logits.device.type
    positions = torch.zeros(batch, dtype=torch.int64, device=device)
    args = logits, tree, positions, sampling
    peers = {"beagle": lambda: verify_tree(*args)}
    if not sampling.temperature.any():
        mode = "greedy"
        peers |= {"argmax + walk": lambda: walk(tree, logits.argmax(-1)), "amax": lambda: logits.amax(-1)}
    elif (sampling.top_p == 1).all():
        mode = "sampled"
        draw = lambda: torch.multinomial(logits.float().softmax(-1).flatten(0, 1), 1).view(batch, nodes)  # noqa: E731
        peers |= {"softmax + multinomial + walk": lambda: walk(tree, draw())}
    else:
        mode, p = "top-p", sampling.top_p[0].item()
        peers |= {"top-p + multinomial + walk": lambda: walk(tree, top_p(logits.flatten(0, 1), p).view(batch, nodes))}
    name = f"verify_tree {mode} {batch} x {nodes} x {vocab} {str(logits.dtype)[6:]}"
    work = {"byte": float(logits.numel() * logits.element_size())}
    return Case(
        name, peers, lambda: same_as_truth(verify_tree, *args), bounds=("amax",), rounds=15 if mode == "greedy" else 5,
        device=device, work=work, data=data,
    )  # fmt: skip


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_verify_tree(benchmark, case, peer):
    drive(benchmark, case, peer)
