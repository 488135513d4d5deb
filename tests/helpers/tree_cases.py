"""Random candidates and trees, and the plain loops that define what is built and accepted."""

from __future__ import annotations

import random

import torch

from beagle_kernels import DraftTree
from beagle_kernels.reference.build_tree import pack


def random_candidates(batch: int, count: int, max_depth: int, vocab: int = 5, seed: int = 0):
    """(root, tokens, scores, parents): level order, scores in steps of 1/4 so that ties abound, some at -inf."""
    rng = random.Random(seed)
    rows = [random_row(rng, count, max_depth, vocab) for _ in range(batch)]
    tokens, scores, parents = (list(part) for part in zip(*rows))
    root = torch.tensor([rng.randrange(vocab) for _ in range(batch)])
    return (
        root,
        torch.tensor(tokens, dtype=torch.int64).view(batch, count),
        torch.tensor(scores, dtype=torch.float32).view(batch, count),
        torch.tensor(parents, dtype=torch.int32).view(batch, count),
    )


def random_row(rng: random.Random, count: int, max_depth: int, vocab: int):
    depth = sorted(rng.randint(1, max(max_depth, 1)) for _ in range(count))
    parents, scores, level = [], [], []
    for i in range(count):
        above = [j for j in range(i) if level[j] == depth[i] - 1]
        parent = rng.choice(above) if above and depth[i] > 1 else -1
        parents.append(parent)
        level.append(1 if parent < 0 else level[parent] + 1)
        best = 0.0 if parent < 0 else scores[parent]
        scores.append(best - rng.randint(0, 8) / 4 if rng.random() < 0.97 else float("-inf"))
    return [rng.randrange(vocab) for _ in range(count)], scores, parents


def loop_build(root, tokens, scores, parents, num_nodes):
    """One row's tree by a plain loop: lists of tokens, parents, depths and ancestor sets."""
    real = [i for i in range(len(tokens)) if scores[i] > float("-inf")]
    kept = sorted(sorted(real, key=lambda i: (-scores[i], i))[: num_nodes - 1])
    label = {-1: 0, **{i: n + 1 for n, i in enumerate(kept)}}
    out = ([root], [-1], [0], [{0}])
    for i in kept:
        up = label[parents[i]]
        for column, value in zip(out, (tokens[i], up, out[2][up] + 1, out[3][up] | {label[i]})):
            column.append(value)
    return out


def loop_accept(tree: DraftTree, chosen, row: int):
    """One row's verdict by walking every node up to the root."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    best = [0]
    for node in range(1, int(tree.size[row])):
        path, here = [node], node
        while here > 0 and tokens[here] == chosen[row][parents[here]]:
            here = parents[here]
            path.insert(0, here)
        if here == 0 and len(path) > len(best):
            best = path
    return best, chosen[row][best[-1]]


def random_tree(batch: int, nodes: int, max_depth: int, vocab: int = 3, seed: int = 0) -> DraftTree:
    """Any valid tree, each node's parent drawn from all before it; sizes from 1 to nodes, padding after."""
    rng = random.Random(seed)
    tokens, parents, depth, masks, sizes = [], [], [], [], []
    for _ in range(batch):
        size = rng.randint(1, nodes)
        up, level = [-1], [0]
        mask = torch.eye(nodes, dtype=torch.bool)
        for i in range(1, nodes):
            open_nodes = [j for j in range(max(0, i - 12), min(i, size)) if level[j] < max_depth]
            parent = rng.choice(open_nodes or [0]) if i < size and max_depth else -1
            up.append(parent)
            level.append(level[parent] + 1 if parent >= 0 else 0)
            if parent >= 0:
                mask[i] |= mask[parent]
        tokens.append([rng.randrange(vocab) if i < size else 0 for i in range(nodes)])
        for column, value in zip((parents, depth, masks, sizes), (up, level, mask, size if max_depth else 1)):
            column.append(value)
    return DraftTree(
        torch.tensor(tokens),
        torch.tensor(parents, dtype=torch.int32),
        torch.tensor(depth, dtype=torch.int32),
        pack(torch.stack(masks)),
        torch.tensor(sizes, dtype=torch.int32),
        max_depth,
    )
