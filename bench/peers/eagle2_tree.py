"""EAGLE-2's tree on the host (arXiv 2406.16858, section 4): the best candidates reranked into a tree, and its posterior
evaluation, as drafting loops in Python do both. Written from the paper's algorithm, in plain PyTorch, a row at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NAME = "EAGLE-2 tree and posterior in Python"


def why_not(device: str) -> str | None:
    return None


class HostTree(NamedTuple):
    """One row's tree: tokens [N]; visible [N, N] bool, a node's ancestors and itself; depth [N]; paths [leaves, depth]
    of node indices from the root to each leaf, padded with -1."""

    tokens: Tensor
    visible: Tensor
    depth: Tensor
    paths: Tensor


def build(root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, num_nodes: int) -> HostTree:
    """The best num_nodes - 1 of one row's candidates [M], which stand in level order, below root []."""
    kept = scores.topk(min(num_nodes - 1, len(scores))).indices.sort().values
    index = {candidate: node for node, candidate in enumerate(kept.tolist(), 1)} | {-1: 0}
    above = [-1] + [index[parent] for parent in parents[kept].tolist()]
    return from_parents(torch.cat([root[None], tokens[kept]]), above)


def from_parents(tokens: Tensor, above: list[int]) -> HostTree:
    """The tree of tokens [N] whose node i hangs below node above[i], the root below -1."""
    visible, depth = torch.eye(len(above), dtype=torch.bool), torch.zeros(len(above), dtype=torch.int64)
    for node, parent in enumerate(above):
        if parent >= 0:
            visible[node] |= visible[parent]
            depth[node] = depth[parent] + 1
    leaves = sorted(set(range(len(above))) - set(above))
    paths = torch.full((len(leaves), int(depth.max()) + 1), -1)
    for row, node in enumerate(leaves):
        while node >= 0:
            paths[row, depth[node]] = node
            node = above[node]
    device = tokens.device
    return HostTree(tokens, visible.to(device), depth.to(device), paths.to(device))


def greedy(tree: HostTree, chosen: Tensor) -> tuple[int, int]:
    """(accepted drafted tokens, the target's own next one), given its choice at each node [N]."""
    nodes = tree.paths.clamp(min=0)
    right = (tree.tokens[nodes][:, 1:] == chosen[nodes][:, :-1]) & (tree.paths[:, 1:] >= 0)
    lengths = right.long().cumprod(1).sum(1)
    best = lengths.argmax()
    accepted = int(lengths[best])
    return accepted, int(chosen[tree.paths[best, accepted]])


def sampled(tree: HostTree, probability: Tensor) -> tuple[int, int]:
    """As greedy, by rejection from the target's distribution at each node [N, V]: a refused child's share is gone."""
    node, accepted = 0, 0
    while True:
        law = probability[node].clone()
        children = [
            int(tree.paths[row, accepted + 1])
            for row in range(len(tree.paths))
            if accepted + 1 < tree.paths.shape[1] and tree.paths[row, accepted] == node
        ]
        for child in dict.fromkeys(children):
            token = int(tree.tokens[child])
            if child >= 0 and torch.rand(()).item() * float(law.sum()) < float(law[token]):
                node, accepted = child, accepted + 1
                break
            law[token] = law[token] if child < 0 else 0.0
        else:
            return accepted, int(torch.multinomial(law, 1))
