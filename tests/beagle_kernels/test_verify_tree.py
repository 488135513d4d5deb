"""verify_tree: choose and accept together, and the coupling that makes it lossless."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import mixed_sampling
from tree_cases import random_tree

from beagle_kernels import STATUS_NAN, STATUS_NO_FINITE, Sampling, accept_tree, choose_tokens, verify_tree


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


def test_status_joins_the_nodes_in_use_and_padding_is_not_read():
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
