"""Hostile input to every op: an error or a defined result; never a crash or a stray write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import beagle_kernels as bk
from beagle_kernels import STATUS_BAD_TREE, DraftTree, Sampling, backends

INT32, INT64 = 2**31 - 1, 2**63 - 1
CPU = torch.device("cpu")
property_test = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**31)


def backends_of(op: str) -> list[str]:
    return [name for name in ("cpu", "reference") if backends.why_not(op, name, CPU, torch.float32) is None]


def one_of(pick: torch.Generator, values: list, shape: tuple, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape, generator=pick)]


def hostile_logits(pick: torch.Generator, *shape: int) -> Tensor:
    """Mostly numbers, with NaN, infinities and the extremes anywhere, and rows that are nothing else."""
    z = torch.randn(shape, generator=pick)
    odd = one_of(pick, [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0], shape, torch.float32)
    share = torch.rand(shape[:-1], generator=pick)[..., None] ** 2
    share = torch.where(share > 0.7, 1.0, share)
    return torch.where(torch.rand(shape, generator=pick) < share, odd, z)


def hostile_sampling(pick: torch.Generator, rows: int) -> Sampling:
    """Settings that `Sampling.of` would refuse, straight from a tensor."""
    nan, inf = float("nan"), float("inf")
    return Sampling(
        torch.randint(-(2**62), 2**62, (rows,), generator=pick),
        one_of(pick, [0.0, 0.7, 1.0, 1e-30, 1e30, -1.0, nan, inf], (rows,), torch.float32),
        one_of(pick, [0, 1, 5, -1, INT32, -INT32], (rows,), torch.int32),
        one_of(pick, [1.0, 0.5, 0.0, -1.0, 2.0, nan, inf], (rows,), torch.float32),
        one_of(pick, [0.0, 0.3, 1.0, 2.0, -1.0, nan, inf], (rows,), torch.float32),
    )


def hostile_tree(pick: torch.Generator, batch: int, nodes: int) -> DraftTree:
    """A sound tree in which a few fields hold anything: cycles, parents out of range, foreign masks, wild sizes."""
    from tree_cases import random_tree

    tree = random_tree(batch, nodes, 4, seed=int(torch.randint(2**31, (), generator=pick)))
    wild32, wild64 = [-INT32 - 1, -2, -1, 0, 1, nodes - 1, nodes, INT32], [-INT64 - 1, -1, 0, 1, 5, INT64]
    broken = []
    for field in tree[:5]:
        hit = torch.rand(field.shape, generator=pick) < 0.5 / max(field[0].numel(), 1)
        wild = one_of(pick, wild64 if field.dtype == torch.int64 else wild32, field.shape, field.dtype)
        broken.append(torch.where(hit, wild, field))
    return DraftTree(*broken, max_depth=4)


def check_verdict(verdict: bk.Verdict, nodes: int) -> None:
    path, count = verdict.path, verdict.num_accepted
    step = torch.arange(path.shape[1])
    assert ((count >= 0) & (count < path.shape[1])).all()
    inside = step <= count[:, None]
    assert ((path >= 0) & (path < nodes))[inside].all() and (path[~inside] == -1).all() and (path[:, 0] == 0).all()
    assert (path.diff(dim=1) > 0)[inside[:, 1:]].all()
    assert (count[(verdict.status & STATUS_BAD_TREE) > 0] == 0).all()


def all_equal(results: list) -> None:
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@property_test
@given(seeds, st.integers(1, 5), st.sampled_from([1, 2, 9, 64, 65, 130]))
def test_malformed_trees(seed, batch, nodes):
    pick = torch.Generator().manual_seed(seed)
    tree, chosen = hostile_tree(pick, batch, nodes), torch.randint(-2, 4, (batch, nodes), generator=pick)
    verdicts = [bk.accept_tree(tree, chosen, backend=name) for name in backends_of("accept_tree")]
    check_verdict(verdicts[0], nodes)
    all_equal(verdicts)


@property_test
@given(seeds, st.integers(1, 4), st.sampled_from([1, 7, 66]), st.integers(1, 20))
def test_malformed_trees_with_hostile_logits(seed, batch, nodes, vocab):
    pick = torch.Generator().manual_seed(seed)
    tree, logits = hostile_tree(pick, batch, nodes), hostile_logits(pick, batch, nodes, vocab)
    positions = torch.randint(-5, 2**40, (batch,), generator=pick)
    greedy = Sampling.of(batch)
    verdicts = [bk.verify_tree(logits, tree, positions, greedy, backend=name) for name in backends_of("verify_tree")]
    all_equal(verdicts)
    for name in backends_of("verify_tree"):
        verdict = bk.verify_tree(logits, tree, positions, hostile_sampling(pick, batch), backend=name)
        check_verdict(verdict, nodes)
        assert ((verdict.next_token >= 0) & (verdict.next_token < vocab)).all()


@property_test
@given(seeds, st.integers(1, 4), st.integers(0, 40), st.sampled_from([1, 8, 65]), st.integers(0, 6))
def test_hostile_candidates_give_a_sound_tree_or_none(seed, batch, count, nodes, max_depth):
    pick = torch.Generator().manual_seed(seed)
    nan, inf = float("nan"), float("inf")
    tokens = one_of(pick, [0, 1, 2, 3, INT64, *([-1] if seed % 3 == 0 else [])], (batch, count), torch.int64)
    scores = one_of(pick, [-1.0, -2.0, nan, -inf, *([inf, 1.0] if seed % 2 else [])], (batch, count), torch.float32)
    upper = torch.arange(count) if seed % 5 else torch.full((count,), count + 3)
    parents = (torch.rand(batch, count, generator=pick) * (upper + 1)).floor().int() - 1
    root = one_of(pick, [0, 7, INT64, -1], (batch,), torch.int64)
    trees = [
        bk.build_tree(root, tokens, scores, parents, nodes, max_depth, backend=name)
        for name in backends_of("build_tree")
    ]
    all_equal([tree[:5] for tree in trees])
    verdict = bk.accept_tree(trees[0], torch.zeros(batch, nodes, dtype=torch.int64))
    assert (((verdict.status & STATUS_BAD_TREE) > 0) == (trees[0].size == 0)).all()


@property_test
@given(seeds, st.integers(1, 4), st.integers(0, 40), st.integers(0, 9))
def test_hostile_chains_join_sound_candidates_or_leave_them_refused(seed, batch, count, steps):
    pick = torch.Generator().manual_seed(seed)
    nan, inf = float("nan"), float("inf")
    odd_tokens, odd_scores = [0, 1, INT64, -1, -INT64 - 1], [-1.0, -2.0, nan, -inf, inf, 3.0]
    tokens, branch = (one_of(pick, odd_tokens[: 3 + seed % 3], (batch, n), torch.int64) for n in (count, steps))
    scores, bounds = (one_of(pick, odd_scores, (batch, n), torch.float32) for n in (count, steps))
    wild = one_of(
        pick, [-INT32 - 1, -2, -1, 0, 1, count - 1, count, count + steps - 1, INT32], (batch, count), torch.int32
    )
    parents = torch.where(torch.rand(batch, count, generator=pick) < 0.3, wild, -1)
    joined = [
        bk.join_branch(tokens, scores, parents, branch, bounds, backend=name) for name in backends_of("join_branch")
    ]
    all_equal([[x.nan_to_num(nan=7.0) for x in each] for each in joined])
    root = torch.zeros(batch, dtype=torch.int64)
    before, after = (bk.build_tree(root, *x, 65, 100).size for x in ((tokens, scores, parents), joined[0]))
    assert torch.equal(before == 0, after == 0)


@property_test
@given(seeds, st.integers(1, 4), st.integers(0, 70), st.integers(0, 64), st.sampled_from([1, 3, 1024]))
def test_hostile_texts_are_looked_up(seed, batch, size, count, longest):
    pick = torch.Generator().manual_seed(seed)
    text = one_of(pick, [0, 0, 1, INT64, -1, -INT64 - 1][: 3 + seed % 4], (batch, size), torch.int64)
    lengths = one_of(pick, [-INT32 - 1, -1, 0, 1, size // 2, size - 1, size, size + 1, INT32], (batch,), torch.int32)
    found = [bk.lookup(text, lengths, count, longest=longest, backend=name) for name in backends_of("lookup")]
    all_equal(found)
    tokens, matched = found[0]
    assert ((matched >= 0) & (matched <= lengths.sub(1).clamp(0, longest))).all()
    assert (tokens >= -1).all() and (tokens.diff(dim=1)[tokens[:, :-1] < 0] == 0).all()
    assert (tokens[matched == 0] == -1).all()


@property_test
@given(seeds, st.integers(1, 6), st.sampled_from([1, 3, 64, 1000]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_hostile_logits_and_settings_choose_a_token(seed, rows, vocab, dtype):
    pick = torch.Generator().manual_seed(seed)
    logits = hostile_logits(pick, rows, vocab).to(dtype)
    positions = one_of(pick, [0, 5, -1, INT64, -INT64 - 1], (rows,), torch.int64)
    sampling = hostile_sampling(pick, rows)
    for name in backends_of("choose_tokens"):
        tokens, _ = bk.choose_tokens(logits, positions, sampling, backend=name)
        assert ((tokens >= 0) & (tokens < vocab)).all()
        tokens, _ = bk.top_candidates(logits, min(3, vocab), positions, sampling, backend=name)
        assert ((tokens >= 0) & (tokens < vocab)).all()
        _, scores = bk.top_candidates(logits, min(3, vocab), positions, Sampling.of(rows), backend=name)
        assert not scores.isnan().any()


@property_test
@given(seeds, st.integers(1, 4), st.integers(0, 4), st.integers(1, 30), st.sampled_from(["token", "block"]))
def test_hostile_chains(seed, batch, steps, vocab, rule):
    pick = torch.Generator().manual_seed(seed)
    target, draft = hostile_logits(pick, batch, steps + 1, vocab), hostile_logits(pick, batch, steps, vocab)
    drafted = torch.randint(-1, vocab + 1, (batch, steps), generator=pick)
    positions = one_of(pick, [0, 5, INT64 - 10], (batch,), torch.int64)
    for name in backends_of("verify_chain"):
        verdict = bk.verify_chain(target, draft, drafted, positions, hostile_sampling(pick, batch), rule, backend=name)
        check_verdict(verdict, steps + 1)
        assert ((verdict.next_token >= 0) & (verdict.next_token < vocab)).all()
        wrong = ((drafted < 0) | (drafted >= vocab)).any(1)
        assert (((verdict.status & STATUS_BAD_TREE) > 0) == wrong).all()


@property_test
@given(seeds, st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_hostile_moves_stay_inside_the_cache(seed, batch, length, paged):
    """The cache is a part of a larger buffer, of which nothing else may change."""
    pick = torch.Generator().manual_seed(seed)
    wild = [-INT32 - 1, -1, 0, 1, 2, 3, 5, 7, 8, INT32]
    path, count = (one_of(pick, wild, shape, torch.int32) for shape in ((batch, length), (batch,)))
    lengths = one_of(pick, wild, (batch,), torch.int32)
    table = one_of(pick, [-INT32, -1, 0, 1, 2, 3, 4, INT32], (batch, 3), torch.int32) if paged else None
    if table is not None:  # rows that share a page would race: defined only for a page of one row
        batch, path, count, lengths, table = 1, path[:1], count[:1], lengths[:1], table[:1]
    buffers = []
    for name in backends_of("compact_cache_"):
        buffer = torch.arange(4 * 2 * 6 * 3 * 8 * 6).view(4, 2, 6, 3, 8, 6).clone()
        before = buffer.clone()
        cache = buffer[1:3, :, 1 : 1 + (4 if paged else batch), :, 2:6, :5]
        bk.compact_cache_(cache, path, count, lengths, block_table=table, backend=name)
        buffers.append([buffer.clone()])
        cache.copy_(before[1:3, :, 1 : 1 + (4 if paged else batch), :, 2:6, :5])
        assert torch.equal(buffer, before)
    all_equal(buffers)


@property_test
@given(seeds, st.integers(1, 3), st.sampled_from([1, 5, 66]), st.sampled_from([1, 7, 40]))
def test_hostile_lengths_and_masks_of_tree_attention(seed, batch, nodes, slots):
    pick = torch.Generator().manual_seed(seed)
    q, (k, v) = torch.randn(batch, nodes, 4, 8, generator=pick), torch.randn(2, batch, 2, slots, 8, generator=pick)
    lengths = one_of(pick, [-INT32 - 1, -1, 0, 1, slots, slots + 1, INT32], (batch,), torch.int32)
    words = (nodes + 63) // 64
    mask = one_of(pick, [0, -1, 1, INT64, -INT64 - 1, 0b1011], (batch, nodes, words), torch.int64)
    outs = [bk.tree_attention(q, k, v, lengths, mask, backend=name) for name in backends_of("tree_attention")]
    assert outs[0].isfinite().all()
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-5)


@property_test
@given(seeds, st.integers(0, 40), st.integers(1, 9), st.none() | st.integers(1, 50))
def test_hostile_windows_of_block_attention(seed, rows, window, reach):
    pick = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, rows, 2, 8, generator=pick)
    wild = [-INT32 - 1, -1, 0, 1, 3, rows, rows + 1, INT32]
    count = int(torch.randint(1, 4, (), generator=pick))
    offset = one_of(pick, wild, (count,), torch.int32)
    bounds = one_of(pick, wild, (count + 1,), torch.int32)
    for name in backends_of("block_attention"):
        try:
            out, lse = bk.block_attention(q, k, v, window, offset, bounds, reach=reach, backend=name)
        except (ValueError, RuntimeError):
            continue
        assert out.shape == q.shape and not lse.isnan().any()


def test_the_guard_of_these_tests_sees_a_stray_write():
    with pytest.raises(AssertionError):
        all_equal([[torch.zeros(3)], [torch.tensor([0.0, 0.0, 1.0])]])
