"""build_tree: against a plain loop, its invariants, and rows that break the rules."""

from __future__ import annotations

import pytest
import torch
from tree_cases import loop_build, random_candidates

from beagle_kernels import build_tree
from beagle_kernels.reference.build_tree import pack, unpack

SHAPES = [
    (1, 0, 1, 1),
    (2, 5, 1, 1),
    (3, 30, 10, 4),
    (4, 70, 64, 6),
    (3, 100, 65, 9),
    (2, 150, 200, 5),
    (2, 300, 129, 40),
]


@pytest.mark.parametrize("batch, count, num_nodes, max_depth", SHAPES)
def test_equals_a_plain_loop(batch, count, num_nodes, max_depth):
    root, tokens, scores, parents = random_candidates(batch, count, max_depth, seed=count)
    tree = build_tree(root, tokens, scores, parents, num_nodes, max_depth)
    for row in range(batch):
        want = loop_build(int(root[row]), tokens[row].tolist(), scores[row].tolist(), parents[row].tolist(), num_nodes)
        size = int(tree.size[row])
        assert size == len(want[0])
        assert tree.tokens[row, :size].tolist() == want[0]
        assert tree.parents[row, :size].tolist() == want[1]
        assert tree.depth[row, :size].tolist() == want[2]
        bits = unpack(tree.mask[row], num_nodes)
        assert [set(bits[i].nonzero()[:, 0].tolist()) for i in range(size)] == want[3]
        assert tree.tokens[row, size:].eq(0).all() and tree.parents[row, size:].eq(-1).all()
        assert tree.depth[row, size:].eq(0).all()
        assert torch.equal(bits[size:], torch.eye(num_nodes, dtype=torch.bool)[size:])


def test_1024_nodes_in_a_chain():
    count = 1023
    scores = -torch.arange(count, dtype=torch.float32)[None]
    parents = torch.arange(-1, count - 1, dtype=torch.int32)[None]
    tree = build_tree(torch.tensor([7]), torch.arange(count)[None], scores, parents, 1024, count)
    assert tree.size.item() == 1024 and tree.mask.shape == (1, 1024, 16)
    assert torch.equal(unpack(tree.mask[0], 1024), torch.ones(1024, 1024).tril().bool())
    assert torch.equal(tree.depth[0], torch.arange(1024, dtype=torch.int32))


def test_pack_round_trip():
    mask = torch.rand(3, 5, 130) < 0.5
    assert pack(mask).shape == (3, 5, 3) and torch.equal(unpack(pack(mask), 130), mask)


@pytest.mark.parametrize("breach", ["self", "later", "below -1", "score", "negative token", "negative root", "deep"])
def test_a_row_that_breaks_a_rule_becomes_size_zero(breach):
    root, tokens, scores, parents = random_candidates(2, 20, 3, seed=5)
    scores = torch.where(scores.isinf(), scores.new_tensor(-9.0) * 4, scores)
    max_depth = 3
    if breach in ("self", "later", "below -1"):
        parents[1, 4] = {"self": 4, "later": 9, "below -1": -2}[breach]
    elif breach == "score":
        child = int((parents[1] >= 0).nonzero()[0])
        scores[1, child] = scores[1, parents[1, child]] + 1
    elif breach == "negative token":
        tokens[1, 3] = -1
    elif breach == "negative root":
        root[1] = -1
    else:
        parents[0], max_depth = -1, 1
    tree = build_tree(root, tokens, scores, parents, 16, max_depth)
    assert tree.size.tolist() == [16, 0]
    assert tree.parents[1].eq(-1).all() and tree.depth[1].eq(0).all() and tree.tokens[1].eq(0).all()
    assert torch.equal(unpack(tree.mask[1], 16), torch.eye(16, dtype=torch.bool))


def test_nan_scores_are_never_kept():
    scores = torch.tensor([[float("nan"), -1.0, -2.0]])
    tree = build_tree(torch.tensor([3]), torch.tensor([[4, 5, 6]]), scores, torch.full((1, 3), -1).int(), 4, 1)
    assert tree.size.item() == 3 and tree.tokens.tolist() == [[3, 5, 6, 0]]


def test_bad_input():
    root, tokens, scores, parents = random_candidates(2, 6, 2)
    for arguments, error in [
        ((root.int(), tokens, scores, parents, 4, 2), TypeError),
        ((root, tokens[:1], scores, parents, 4, 2), ValueError),
        ((root, tokens, scores.double(), parents, 4, 2), TypeError),
        ((root, tokens, scores, parents.long(), 4, 2), TypeError),
        ((root, tokens, scores, parents, 0, 2), ValueError),
        ((root, tokens, scores, parents, 1025, 2), ValueError),
        ((root, tokens, scores, parents, 4, -1), ValueError),
    ]:
        with pytest.raises(error, match="build_tree: .*allowed"):
            build_tree(*arguments)


def test_opcheck_and_compile():
    candidates = random_candidates(3, 20, 4)
    torch.library.opcheck(torch.ops.beagle.build_tree, (*candidates, 12, 4, "reference"))
    compiled = torch.compile(build_tree, fullgraph=True, backend="aot_eager")
    for have, want in zip(compiled(*candidates, 12, 4)[:5], build_tree(*candidates, 12, 4)[:5]):
        assert torch.equal(have, want)
