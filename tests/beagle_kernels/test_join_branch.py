"""join_branch: against a plain loop, what build_tree makes of the result, odd scores and chains."""

from __future__ import annotations

import random

import pytest
import torch
from tree_cases import random_candidates

from beagle_kernels import build_tree, join_branch

BACKENDS = ("cpu", "reference")
INF = float("inf")
SHAPES = [(2, 0, 0, 3), (2, 0, 5, 3), (3, 7, 0, 3), (20, 12, 6, 2), (6, 60, 9, 2), (3, 510, 16, 3), (2, 300, 70, 1)]


def random_branch(batch: int, steps: int, vocab: int, seed: int):
    """Chains of few tokens, some with placeholders or odd scores in them, not made to descend."""
    rng = random.Random(seed)
    tokens = [[rng.randrange(vocab) if rng.random() < 0.97 else -1 for _ in range(steps)] for _ in range(batch)]
    odd = rng.choice(([-0.25], [-0.25, 0.5, INF], [float("nan")], [-INF]))
    scores = [
        [rng.choice(odd) if rng.random() < 0.1 else -rng.randrange(12) / 4 for _ in range(steps)] for _ in range(batch)
    ]
    return (
        torch.tensor(tokens, dtype=torch.int64).view(batch, steps),
        torch.tensor(scores, dtype=torch.float32).view(batch, steps),
    )


def loop_join(tokens, scores, parents, branch_tokens, branch_scores):
    """One row by the words of the contract, in lists."""
    count, steps = len(tokens), len(branch_tokens)
    tokens, scores, parents = tokens + [0] * steps, scores + [-INF] * steps, parents + [-1] * steps
    at, bound = -1, 0.0
    for i in range(steps):
        score = -INF if branch_scores[i] != branch_scores[i] else branch_scores[i]
        bound = min(bound, score)
        if branch_tokens[i] < 0 or bound == -INF:
            break
        children = [j for j in range(count) if parents[j] == at and tokens[j] == branch_tokens[i] and scores[j] > -INF]
        if children:
            at = children[0]
            scores[at] = max(scores[at], bound)
        else:
            tokens[count + i], parents[count + i] = branch_tokens[i], at
            scores[count + i] = bound if at == -1 else min(bound, scores[at])
            at = count + i
    return tokens, scores, parents


def case(batch: int, count: int, steps: int, vocab: int, seed: int):
    _, tokens, scores, parents = random_candidates(batch, count, 5, vocab, seed=seed)
    return tokens, scores, parents, *random_branch(batch, steps, vocab, seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, count, steps, vocab", SHAPES)
def test_equals_a_plain_loop(batch, count, steps, vocab, backend):
    met = appended = 0
    for seed in range(6):
        given = case(batch, count, steps, vocab, seed)
        joined = join_branch(*given, backend=backend)
        assert [x.dtype for x in joined] == [torch.int64, torch.float32, torch.int32]
        assert all(x.shape == (batch, count + steps) for x in joined)
        for row in range(batch):
            want = loop_join(*(x[row].tolist() for x in given))
            assert tuple(x[row].tolist() for x in joined) == want, (seed, row)
        met += int((joined[1][:, :count] > given[1]).sum())
        appended += int((joined[1][:, count:] > -INF).sum())
    assert (met > 0 or not count or not steps) and (appended > 0 or not steps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, count, steps, vocab", SHAPES)
def test_the_result_keeps_the_rules_of_build_tree(batch, count, steps, vocab, backend):
    """A tree of size 0 is what build_tree gives where a rule is broken."""
    for seed in range(20):
        given = case(batch, count, steps, vocab, seed)
        root = torch.zeros(batch, dtype=torch.int64)
        for nodes in (2, 16, count + steps + 1):
            nodes = min(nodes, 1024)
            assert build_tree(root, *given[:3], nodes, 1023).size.all()
            tree = build_tree(root, *join_branch(*given, backend=backend), nodes, max_depth=max(5, steps))
            assert tree.size.all(), (seed, nodes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chain_is_met_raised_and_goes_on(backend):
    tokens, scores = torch.tensor([[3, 4, 3, 5, 5]]), torch.tensor([[-1.0, -2.0, -0.5, -3.0, -1.5]])
    parents = torch.tensor([[-1, -1, -1, 0, 0]], dtype=torch.int32)
    branch, bounds = torch.tensor([[3, 5, 7, 8]]), torch.tensor([[-0.25, -0.5, -0.25, -4.0]])
    have = join_branch(tokens, scores, parents, branch, bounds, backend=backend)
    assert have[0].tolist() == [[3, 4, 3, 5, 5, 0, 0, 7, 8]]
    assert have[1].tolist() == [[-0.25, -2.0, -0.5, -0.5, -1.5, -INF, -INF, -0.5, -4.0]]
    assert have[2].tolist() == [[-1, -1, -1, 0, 0, -1, -1, 3, 7]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("end", [(-1, -0.5), (7, -INF), (7, float("nan"))])
def test_where_a_chain_ends(end, backend):
    token, score = end
    nothing = torch.zeros(1, 0)
    branch, scores = torch.tensor([[4, token, 5]]), torch.tensor([[0.5, score, -1.0]])
    have = join_branch(nothing.long(), nothing, nothing.int(), branch, scores, backend=backend)
    assert have[0].tolist() == [[4, 0, 0]] and have[1].tolist() == [[0.0, -INF, -INF]]
    assert have[2].tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_that_build_tree_never_keeps_are_not_met(backend):
    tokens, scores = torch.tensor([[3, 3, 3]]), torch.tensor([[-INF, float("nan"), -9.0]])
    parents = torch.full((1, 3), -1, dtype=torch.int32)
    have = join_branch(tokens, scores, parents, torch.tensor([[3]]), torch.tensor([[-1.0]]), backend=backend)
    assert have[1].nan_to_num(nan=7.0, neginf=-INF).tolist() == [[-INF, 7.0, -1.0, -INF]]


def test_malformed_candidates_are_the_same_of_both():
    """Parents that do not precede, of any value: nothing is met twice, and build_tree refuses the row as before."""
    for seed in range(40):
        pick = torch.Generator().manual_seed(seed)
        given = case(4, 20, 6, 2, seed)
        hit, wild = torch.rand(4, 20, generator=pick) < 0.4, torch.randint(-3, 28, (4, 20), generator=pick).int()
        given = (*given[:2], torch.where(hit, wild, given[2]), *given[3:])
        one, two = (join_branch(*given, backend=name) for name in BACKENDS)
        assert all(torch.equal(x, y) for x, y in zip(one, two))
        root, of_given = torch.zeros(4, dtype=torch.int64), given[:3]
        before, after = (build_tree(root, *candidates, 8, 40).size for candidates in (of_given, one))
        assert not after[before == 0].any()


def test_bad_input():
    given = case(2, 6, 3, 2, seed=1)
    tokens, scores, parents, branch, bounds = given
    for arguments, error in [
        ((tokens.int(), *given[1:]), TypeError),
        ((tokens[0], *given[1:]), ValueError),
        ((tokens, scores.double(), *given[2:]), TypeError),
        ((tokens, scores[:, :5], *given[2:]), ValueError),
        ((tokens, scores, parents.long(), *given[3:]), TypeError),
        ((*given[:3], branch[:1], bounds), ValueError),
        ((*given[:3], branch.int(), bounds), TypeError),
        ((*given[:4], bounds[:, :2]), ValueError),
        ((*given[:4], bounds.half()), TypeError),
        ((*given[:4], bounds.to("meta")), ValueError),
    ]:
        with pytest.raises(error, match="join_branch: .*allowed"):
            join_branch(*arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    given = case(3, 20, 4, 2, seed=1)
    torch.library.opcheck(torch.ops.beagle.join_branch, (*given, backend))
    compiled = torch.compile(join_branch, fullgraph=True, backend="aot_eager")
    for have, want in zip(compiled(*given, backend=backend), join_branch(*given, backend=backend)):
        assert torch.equal(have.nan_to_num(), want.nan_to_num())
