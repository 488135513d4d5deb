"""verify_tree: choose and accept together, and the coupling that makes it lossless."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import mixed_sampling
from tree_cases import random_tree

from beagle_kernels import (
    STATUS_NAN,
    STATUS_NO_FINITE,
    Sampling,
    accept_tree,
    build_tree,
    choose_tokens,
    verify_tree,
)
from beagle_kernels.extension import missing_cpu

needs_extension = pytest.mark.skipif(missing_cpu(torch.device("cpu")) is not None, reason="the extension is not built")


def composed(logits, tree, positions, sampling):
    """The two ops it stands for, over all nodes."""
    batch, nodes, vocab = logits.shape
    chosen, _ = choose_tokens(
        logits.reshape(-1, vocab), (positions[:, None] + tree.depth).flatten(), sampling.repeat(nodes)
    )
    return accept_tree(tree, chosen.view(batch, nodes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, nodes, vocab", [(1, 1, 5), (6, 30, 3), (3, 66, 50)])
def test_equals_choose_then_accept(batch, nodes, vocab, dtype):
    tree = random_tree(batch, nodes, min(nodes - 1, 6), min(vocab, 3), seed=vocab)
    logits, positions = torch.randn(batch, nodes, vocab).to(dtype), torch.arange(batch) * 7
    sampling = mixed_sampling(batch)
    have, want = verify_tree(logits, tree, positions, sampling), composed(logits, tree, positions, sampling)
    for a, b in zip(have, want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_that_of_plain_sampling_whatever_the_tree(temperature):
    vocab, length, seed = 4, 60, torch.tensor([11])
    table = torch.randn(vocab, vocab)
    sampling = Sampling.of(1, seed, temperature)
    plain = [1]
    while len(plain) < length:
        plain.append(int(choose_tokens(table[plain[-1]][None], torch.tensor([len(plain)]), sampling)[0]))
    text, rounds = [1], 0
    while len(text) < length:
        tree = random_tree(1, 40, 4, vocab, seed=rounds)
        tree.tokens[0, 0] = text[-1]
        verdict = verify_tree(table[tree.tokens], tree, torch.tensor([len(text)]), sampling)
        path = verdict.path[0, 1 : 1 + int(verdict.num_accepted)].long()
        text += tree.tokens[0, path].tolist() + verdict.next_token.tolist()
        rounds += 1
    assert text[:length] == plain and rounds < length / 1.5


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_status_is_that_of_the_path(backend):
    """Of a root, a right child, a wrong one and a right grandchild: what is wrong beside the path is not told."""
    candidates = torch.tensor([[3, 5, 4]]), torch.tensor([[-1.0, -2.0, -1.5]]), torch.tensor([[-1, -1, 0]])
    tree = build_tree(torch.tensor([0]), candidates[0], candidates[1], candidates[2].int(), 4, 2)
    tokens = tree.tokens[0].tolist()
    right, wrong, deep = tokens.index(3), tokens.index(5), tokens.index(4)
    for node, want in ((0, STATUS_NAN), (right, STATUS_NAN), (deep, STATUS_NAN), (wrong, 0)):
        logits = torch.zeros(1, 4, 9)
        logits[0, 0, 3] = logits[0, right, 4] = 1.0
        logits[0, node, 8] = float("nan")
        verdict = verify_tree(logits, tree, torch.arange(1), Sampling.of(1), backend=backend)
        assert verdict.num_accepted.tolist() == [2] and verdict.status.tolist() == [want]


@needs_extension
def test_a_token_drafted_twice_is_followed_both_ways():
    candidates = torch.tensor([[3, 3, 4]]), torch.tensor([[-1.0, -1.1, -1.5]]), torch.tensor([[-1, -1, 1]])
    tree = build_tree(torch.tensor([0]), candidates[0], candidates[1], candidates[2].int(), 4, 2)
    logits = torch.zeros(1, 4, 9)
    logits[0, 0, 3] = 1.0
    logits[0, 1:, 4] = 1.0
    found, want = (
        verify_tree(logits, tree, torch.arange(1), Sampling.of(1), backend=one) for one in ("cpu", "reference")
    )
    assert found.num_accepted.tolist() == [2]
    for name in found._fields:
        assert torch.equal(getattr(found, name), getattr(want, name))


def test_status_joins_the_path_s_and_padding_is_not_read():
    tree = random_tree(3, 12, 3, seed=4)
    logits = torch.zeros(3, 12, 9)
    for row in range(3):
        logits[row, int(tree.size[row]) :] = float("nan")
    logits[0, 0, 3] = float("nan")
    logits[1, 0] = -float("inf")
    status = verify_tree(logits, tree, torch.arange(3), Sampling.of(3)).status
    assert status.tolist() == [STATUS_NAN, STATUS_NO_FINITE, 0] and (tree.size < 12).any()


def test_bad_input():
    tree, sampling, positions = random_tree(2, 6, 2), Sampling.of(2), torch.arange(2)
    logits = torch.randn(2, 6, 9)
    for arguments, error in [
        ((logits[:, :5], tree, positions, sampling), ValueError),
        ((logits.long(), tree, positions, sampling), TypeError),
        ((logits, tree, positions[:1], sampling), ValueError),
        ((logits, tree, positions, Sampling.of(12)), ValueError),
        ((logits, tree[:5], positions, sampling), TypeError),
    ]:
        with pytest.raises(error, match="verify_tree: .*allowed"):
            verify_tree(*arguments)


def test_opcheck_and_compile():
    tree, sampling = random_tree(3, 10, 4), mixed_sampling(3)
    logits, positions = torch.randn(3, 10, 12), torch.arange(3)
    torch.library.opcheck(torch.ops.beagle.verify_tree, (logits, *tree, positions, *sampling, "reference"))
    compiled = torch.compile(verify_tree, fullgraph=True, backend="aot_eager")
    for have, want in zip(compiled(logits, tree, positions, sampling), verify_tree(logits, tree, positions, sampling)):
        assert torch.equal(have, want)
