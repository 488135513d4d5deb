"""accept_tree: against a walk, on duplicated siblings, and on malformed trees."""

from __future__ import annotations

import pytest
import torch
from tree_cases import loop_accept, random_tree

from beagle_kernels import STATUS_BAD_TREE, accept_tree

SHAPES = [(5, 1, 0, 3), (40, 6, 3, 2), (30, 64, 8, 2), (10, 65, 20, 1), (20, 130, 6, 3), (2, 1024, 50, 1)]


@pytest.mark.parametrize("batch, nodes, max_depth, vocab", SHAPES)
def test_equals_a_walk(batch, nodes, max_depth, vocab):
    tree = random_tree(batch, nodes, max_depth, vocab, seed=nodes)
    chosen = torch.randint(vocab, (batch, nodes))
    verdict = accept_tree(tree, chosen)
    for row in range(batch):
        path, last = loop_accept(tree, chosen.tolist(), row)
        assert verdict.num_accepted[row] == len(path) - 1
        assert verdict.path[row].tolist() == path + [-1] * (max_depth + 1 - len(path))
        assert verdict.next_token[row] == last
    assert not verdict.status.any()
    assert max_depth == 0 or verdict.num_accepted.max() > 1


def test_duplicated_siblings_take_the_deeper_one_then_the_lower():
    tree = random_tree(1, 5, 2, seed=1)._replace(
        tokens=torch.tensor([[9, 4, 4, 4, 7]]),
        parents=torch.tensor([[-1, 0, 0, 0, 2]], dtype=torch.int32),
        depth=torch.tensor([[0, 1, 1, 1, 2]], dtype=torch.int32),
        mask=torch.tensor([[[1], [3], [5], [9], [21]]]),
        size=torch.tensor([5], dtype=torch.int32),
    )
    verdict = accept_tree(tree, torch.tensor([[4, 0, 7, 0, 1]]))
    assert verdict.path.tolist() == [[0, 2, 4]] and verdict.next_token.item() == 1
    verdict = accept_tree(tree, torch.tensor([[4, 5, 6, 0, 1]]))
    assert verdict.path.tolist() == [[0, 1, -1]] and verdict.next_token.item() == 5


def test_padding_is_never_accepted():
    tree = random_tree(8, 20, 4, vocab=1, seed=3)
    verdict = accept_tree(tree, torch.zeros(8, 20, dtype=torch.int64))
    assert (verdict.path < tree.size[:, None]).all()


@pytest.mark.parametrize(
    "breach", ["size 0", "size large", "parent later", "parent negative", "root parent", "depth", "max depth", "mask"]
)
def test_a_malformed_tree_accepts_nothing(breach):
    tree = random_tree(2, 70, 5, vocab=1, seed=2)
    size = int(tree.size[1])
    assert size > 3 and tree.depth[1].max() > 1
    changes = {
        "size 0": lambda: tree.size.__setitem__(1, 0),
        "size large": lambda: tree.size.__setitem__(1, 71),
        "parent later": lambda: tree.parents[1].__setitem__(2, 3),
        "parent negative": lambda: tree.parents[1].__setitem__(2, -1),
        "root parent": lambda: tree.parents[1].__setitem__(0, 0),
        "depth": lambda: tree.depth[1].__setitem__(3, 4 + int(tree.depth[1, 3])),
    }
    if breach == "mask":
        tree.mask[1, 3, 1] = 1
    elif breach == "max depth":
        tree = tree._replace(max_depth=int(tree.depth[1].max()) - 1)
    else:
        changes[breach]()
    verdict = accept_tree(tree, torch.zeros(2, 70, dtype=torch.int64))
    assert verdict.status[1] == STATUS_BAD_TREE
    assert verdict.path[1].tolist() == [0] + [-1] * tree.max_depth and verdict.num_accepted[1] == 0
    if breach != "max depth":
        assert verdict.status[0] == 0


def test_bad_input():
    tree, chosen = random_tree(2, 6, 2), torch.zeros(2, 6, dtype=torch.int64)
    for arguments, error in [
        ((tuple(tree), chosen), TypeError),
        ((tree, chosen.int()), TypeError),
        ((tree, chosen[:, :5]), ValueError),
        ((tree._replace(mask=tree.mask[..., :0]), chosen), ValueError),
        ((tree._replace(size=tree.size.long()), chosen), TypeError),
        ((tree._replace(max_depth=-1), chosen), ValueError),
    ]:
        with pytest.raises(error, match="accept_tree: .*allowed"):
            accept_tree(*arguments)


def test_opcheck_and_compile():
    tree, chosen = random_tree(3, 10, 4), torch.randint(3, (3, 10))
    torch.library.opcheck(torch.ops.beagle.accept_tree, (*tree, chosen, "reference"))
    compiled = torch.compile(accept_tree, fullgraph=True, backend="aot_eager")
    for have, want in zip(compiled(tree, chosen), accept_tree(tree, chosen)):
        assert torch.equal(have, want)
