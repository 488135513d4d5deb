"""The compiled host executor against the reference: tokens and trees exactly, on random and on odd input."""

from __future__ import annotations

import pytest
import torch
from chain_cases import decode, filtered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_cases import chi_square_ok, filtered_softmax, mixed_sampling
from test_compact_cache_ import case as compaction_case
from tree_cases import random_candidates, random_tree

import beagle_kernels as bk
from beagle_kernels import Sampling, backends
from beagle_kernels.lossless import index_of, joint_law

if (REASON := backends.why_not("choose_tokens", "cpu", torch.device("cpu"))) is not None:
    pytest.skip(REASON, allow_module_level=True)

property_test = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
vocabs = st.one_of(st.integers(1, 300), st.sampled_from([4095, 16384, 49152]))


def odd_logits(shape, dtype, seed: int) -> torch.Tensor:
    """Normal, coarse (ties), peaky, and rows with -inf, NaN and inf, in every layout a view can have."""
    pick = torch.Generator().manual_seed(seed)
    rows, vocab = shape
    kind = seed % 4
    logits = torch.randn(rows + 1, vocab + 3, generator=pick) * (1, 1, 8, 20)[kind]
    if kind == 1:
        logits = logits.round()
    for value in (float("-inf"), float("nan"), float("inf")):
        row = int(torch.randint(3 * rows + 3, (1,), generator=pick))
        if row < rows:
            chance = torch.rand(1, generator=pick)
            logits[row, torch.rand(vocab + 3, generator=pick) <= chance] = value
    logits = logits.to(dtype)
    layout = seed // 4 % 3
    if layout == 0:
        return logits[:rows, :vocab]
    return logits[1:, 3:].contiguous().t().contiguous().t() if layout == 1 else logits[:rows, :vocab].contiguous()


def same(have, want):
    for a, b in zip(have, want):
        assert torch.equal(a, b), (a, b)


@property_test
@given(seeds, st.integers(1, 9), vocabs, dtypes)
def test_choose_tokens(seed, rows, vocab, dtype):
    logits, sampling = odd_logits((rows, vocab), dtype, seed), mixed_sampling(rows, seed)
    positions = torch.arange(rows) + seed
    rounds = positions if seed % 3 == 0 else None
    args = {"stream": seed % 4, "rounds": rounds}
    same(
        bk.choose_tokens(logits, positions, sampling, **args, backend="cpu"),
        bk.choose_tokens(logits, positions, sampling, **args, backend="reference"),
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 49153, 128256, 200_000])
def test_choose_tokens_on_long_rows_split_over_threads(vocab, temperature):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            logits, sampling = torch.randn(2, vocab), Sampling.of(2, 1, temperature)
            args = (logits, torch.arange(2), sampling)
            same(bk.choose_tokens(*args, backend="cpu"), bk.choose_tokens(*args, backend="reference"))
    finally:
        torch.set_num_threads(before)


def test_choose_tokens_at_extreme_scales():
    """Where pruning has to be careful: huge offsets, tiny and large temperatures, one far winner."""
    base = torch.randn(6, 5000)
    for offset, scale in [(1e4, 1.0), (-1e6, 1.0), (0.0, 1e-6), (0.0, 1e4), (3e4, 100.0)]:
        for temperature in (1e-3, 0.3, 20.0, 1e4):
            sampling = Sampling.of(6, 3, temperature)
            args = (base * scale + offset, torch.arange(6), sampling)
            same(bk.choose_tokens(*args, backend="cpu"), bk.choose_tokens(*args, backend="reference"))


@pytest.mark.parametrize("knobs", [(1.0, 0, 1.0, 0.0), (0.7, 12, 0.8, 0.05)])
def test_choose_tokens_distribution(knobs):
    n, vocab = 40_000, 31
    z = torch.randn(vocab) * 1.5
    sampling = Sampling.of(n, torch.full((n,), 13), *knobs)
    tokens, _ = bk.choose_tokens(z.expand(n, -1), torch.arange(n), sampling, backend="cpu")
    assert chi_square_ok(torch.bincount(tokens, minlength=vocab), filtered_softmax(z, *knobs))


@property_test
@given(seeds, st.integers(1, 6), vocabs, dtypes)
def test_top_candidates(seed, rows, vocab, dtype):
    logits, sampling = odd_logits((rows, vocab), dtype, seed), mixed_sampling(rows, seed)
    k = 1 + seed % min(vocab, 40)
    ids = torch.arange(vocab) * 3 + 1 if seed % 2 else None
    args = (logits, k, torch.arange(rows), sampling)
    tokens, scores = bk.top_candidates(*args, token_ids=ids, backend="cpu")
    want, want_scores = bk.top_candidates(*args, token_ids=ids, backend="reference")
    assert torch.equal(tokens, want)
    torch.testing.assert_close(scores, want_scores, rtol=1e-5, atol=2e-5)


@property_test
@given(seeds, st.integers(1, 20), st.integers(0, 400), st.sampled_from([1, 2, 16, 60, 64, 65, 129, 1024]))
def test_build_tree(seed, batch, count, num_nodes):
    max_depth = 1 + seed % 9
    root, tokens, scores, parents = random_candidates(min(batch, 3), count, max_depth, seed=seed)
    if seed % 5 == 0 and count > 3:
        parents[0, seed % count] = seed % count
    args = (root, tokens, scores, parents, num_nodes, max_depth - (seed % 7 == 0))
    same(bk.build_tree(*args, backend="cpu")[:5], bk.build_tree(*args, backend="reference")[:5])


@property_test
@given(seeds, st.integers(1, 40), st.sampled_from([1, 2, 8, 60, 64, 65, 200]), st.integers(0, 12))
def test_accept_tree(seed, batch, nodes, max_depth):
    tree = random_tree(batch, nodes, max_depth if nodes > 1 else 0, vocab=2, seed=seed)
    chosen = torch.randint(2, (batch, nodes), generator=torch.Generator().manual_seed(seed))
    if seed % 4 == 0:
        field = (tree.parents, tree.depth, tree.mask[..., 0])[seed // 4 % 3]
        field[0, seed % nodes] += 1
    if seed % 11 == 0:
        tree.size[0] = (0, nodes + 1, -3)[seed % 3]
    same(bk.accept_tree(tree, chosen, backend="cpu"), bk.accept_tree(tree, chosen, backend="reference"))


def test_1024_nodes():
    candidates = random_candidates(2, 1500, 30, seed=8)
    have, want = (bk.build_tree(*candidates, 1024, 30, backend=b) for b in ("cpu", "reference"))
    same(have[:5], want[:5])
    chosen = torch.randint(5, (2, 1024))
    same(bk.accept_tree(have, chosen, backend="cpu"), bk.accept_tree(want, chosen, backend="reference"))


@property_test
@given(seeds, st.integers(1, 4), st.integers(1, 30), st.integers(1, 90), dtypes)
def test_verify_tree(seed, batch, nodes, vocab, dtype):
    tree = random_tree(batch, nodes, seed % 5 if nodes > 1 else 0, min(vocab, 2), seed=seed)
    logits = odd_logits((batch * nodes, vocab), dtype, seed).reshape(batch, nodes, vocab)
    if seed % 2:
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    args = (logits, tree, torch.arange(batch) * 5, mixed_sampling(batch, seed))
    same(bk.verify_tree(*args, backend="cpu"), bk.verify_tree(*args, backend="reference"))


@property_test
@given(seeds, st.integers(1, 5), st.integers(0, 6), vocabs, dtypes, st.sampled_from(["token", "block"]))
def test_verify_chain(seed, batch, steps, vocab, dtype, rule):
    pick = torch.Generator().manual_seed(seed)
    target = odd_logits((batch * (steps + 1), vocab), dtype, seed).reshape(batch, steps + 1, vocab)
    ids = torch.randperm(vocab, generator=pick)[: max(1, vocab // 2)].sort().values if seed % 2 else None
    width = vocab if ids is None else len(ids)
    draft = (torch.randn(batch, steps, width, generator=pick) * 2).to(dtype if seed % 3 else torch.float32)
    columns = torch.randint(width, (batch, steps), generator=pick)
    tokens = columns if ids is None else ids[columns]
    args = (target, draft, tokens, torch.arange(batch) + seed % 1000, mixed_sampling(batch, seed), rule)
    same(
        bk.verify_chain(*args, token_ids=ids, backend="cpu"), bk.verify_chain(*args, token_ids=ids, backend="reference")
    )


@pytest.mark.parametrize("rule", ["token", "block"])
def test_verify_chain_joint_law(rule):
    rows, vocab, length = 60_000, 3, 5
    target, draft = torch.randn(vocab, vocab), torch.randn(vocab, vocab)

    def verify(*args):
        return bk.verify_chain(*args, backend="cpu")

    text, _ = decode(target, draft, 1, length, 3, Sampling.of(rows, torch.arange(rows) * 31, 1.0), rule, verify)
    counts = torch.bincount(index_of(text, vocab), minlength=vocab**length)
    assert chi_square_ok(counts, joint_law(filtered(target, 1.0), 1, length))


@property_test
@given(seeds, st.integers(1, 4), st.integers(1, 20), st.integers(1, 70))
def test_compact_cache_(seed, batch, length, width):
    path, count, lengths = compaction_case(batch, 128, length, seed=seed)
    if seed % 3 == 0:
        lengths[0] = 128 - length
    whole = torch.randint(-99, 99, (2, 2, batch, 2, 128, width + 2), dtype=torch.int8)
    have, want = whole.clone(), whole.clone()
    bk.compact_cache_(have[..., 1:-1], path, count, lengths, backend="cpu")
    bk.compact_cache_(want[..., 1:-1], path, count, lengths, backend="reference")
    assert torch.equal(have, want)
    page = (1, 8, 32)[seed % 3]
    table = torch.randperm(batch * 128 // page).view(batch, -1).int()
    pages = torch.randn(2, 2, batch * 128 // page, 2, page, width)
    have, want = pages.clone(), pages.clone()
    bk.compact_cache_(have, path, count, lengths, block_table=table, backend="cpu")
    bk.compact_cache_(want, path, count, lengths, block_table=table, backend="reference")
    assert torch.equal(have, want)


def test_row_offsets_beyond_32_bits():
    from beagle_kernels import _C

    assert _C.row_offset(7, 63, 64 * 200_000, 200_000) == 7 * 64 * 200_000 + 63 * 200_000
    assert _C.row_offset(300, 60, 64 * 128_256, 128_256) == (300 * 64 + 60) * 128_256 > 2**31
    assert _C.row_offset(0, 5, 0, 2**40) == 5 * 2**40
    assert _C.row_offset(2, 1, -(2**33), 1) == 1 - 2**34


def test_row_strides_beyond_32_bits():
    """One row, claimed to lie 2^33 elements after the other: read at row 0 only, so no memory is needed."""
    logits = torch.randn(1, 1000).as_strided((1, 1000), (2**33, 1))
    token, _ = bk.choose_tokens(logits, torch.zeros(1).long(), Sampling.of(1), backend="cpu")
    assert token.item() == logits.argmax().item()


def test_backends_say_why_not():
    logits, sampling = torch.randn(2, 9), Sampling.of(2)
    with pytest.raises(backends.BackendError, match="choose_tokens.*'cuda' cannot serve tensors on 'cpu': "):
        bk.choose_tokens(logits, torch.arange(2), sampling, backend="cuda")
    assert backends.resolve("choose_tokens", "auto", torch.device("cpu")) == "cpu"


def test_opcheck():
    sampling = mixed_sampling(4)
    tree = random_tree(4, 9, 3, seed=1)
    ops = torch.ops.beagle
    check = torch.library.opcheck
    check(ops.choose_tokens, (torch.randn(4, 40), torch.arange(4), *sampling, 0, None, "cpu"))
    check(ops.perturb_logits, (torch.randn(4, 40), torch.arange(4), *sampling, "cpu"))
    check(ops.top_candidates, (torch.randn(4, 40), 3, torch.arange(4), *sampling, None, "cpu"))
    check(ops.build_tree, (*random_candidates(3, 20, 4), 12, 4, "cpu"))
    check(ops.accept_tree, (*tree, torch.randint(3, (4, 9)), "cpu"))
    check(ops.verify_tree, (torch.randn(4, 9, 12), *tree, torch.arange(4), *sampling, "cpu"))
    chain = (torch.randn(4, 4, 9), torch.randn(4, 3, 9), torch.randint(9, (4, 3)), torch.arange(4))
    check(ops.verify_chain, (*chain, *sampling, "block", None, "cpu"))
    path, count, lengths = compaction_case(3, 64, 5)
    check(ops.compact_cache_, (torch.randn(2, 2, 3, 2, 64, 4), path, count, lengths, None, "cpu"))
