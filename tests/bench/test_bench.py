"""The benchmarks' own machinery: no number without a right result, peers that do what they say, replayed rounds that
accept what was replayed."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import beagle_kernels
from beagle_kernels import DraftTree, Sampling, choose_tokens
from bench.__main__ import MODULES
from bench.gpu import check as gpu_check
from bench.loops import bench_round, replayed_acceptance
from bench.ops import bench_block_attention, bench_distill_loss, bench_tree_attention
from bench.ops.bench_verify_tree import of_logits, trees
from bench.peers import eagle2_tree, sglang, table
from bench.registry import Case, drive, measured, same_as_truth


def a_case(wrong_by: int) -> Case:
    """choose_tokens on a few rows, its tokens off by `wrong_by`."""
    args = torch.randn(3, 100), torch.arange(3), Sampling.of(3)

    def op(*args, backend="auto"):
        tokens, status = choose_tokens(*args, backend=backend)
        return tokens + wrong_by * (backend != "reference"), status

    def check():
        same_as_truth(op, *args)

    return Case("planted", {"beagle": lambda: op(*args)}, check, rounds=3, work={"byte": 1.0})


def test_a_wrong_result_gets_no_number():
    case = a_case(wrong_by=1)
    with pytest.raises(AssertionError, match="op is wrong"):
        next(case.rows())
    rows = list(measured(case))
    assert len(rows) == 1 and "op is wrong" in rows[0]["error"] and not {"p50", "byte/s"} & rows[0].keys()


def test_rows_and_shares():
    (row,) = measured(a_case(wrong_by=0))
    assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["byte/s"] == 1 / row["p50"]
    assert row["clock"] == "host" and "clock of ours" not in row
    assert row["group"] == "planted" and row["data"] == "normal random" and row["torch"] == torch.__version__
    shares = gpu_check.with_shares(row, {"byte/s": 2 * row["byte/s"], "flop/s": 1.0})
    assert shares["share of copy"] == 0.5 and "share of matmul" not in shares


@pytest.mark.parametrize("sampling", [(0.0, 1.0), (1.0, 1.0), (1.0, 0.9)], ids=str)
def test_a_batch_of_trees(sampling):
    """The shapes that a GPU gets, small: all peers run, ours equals the truth."""
    temperature, top_p = sampling
    case = of_logits(torch.randn(3, 9, 200), trees(3, 9), Sampling.of(3, 0, temperature, 0, top_p))
    case.rounds = 1
    rows = list(case.rows())
    assert len(rows) == len(case.peers) >= 2 and rows[0]["byte"] == 4 * 3 * 9 * 200


class NoBenchmark:
    """Stands in for pytest-benchmark's fixture where nothing may be timed."""

    def __call__(self, run):
        pytest.fail("a wrong result was timed")


def one_wrong_bit(q, k, v, lengths, mask):
    """tree_attention, the last node of the first row seeing a node that is not its ancestor, or not seeing one."""
    mask = mask.clone()
    mask[0, -1, 0] ^= 2
    return beagle_kernels.tree_attention(q, k, v, lengths, mask)


def one_dropped_slot(q, k, v, lengths, mask):
    """tree_attention without the last key of the prefix."""
    last = int(lengths[0]) - 1
    keys, values = (torch.cat([x[:, :, :last], x[:, :, last + 1 :]], 2) for x in (k, v))
    return beagle_kernels.tree_attention(q, keys, values, lengths - 1, mask)


def one_dropped_key(q, k, v, window, offset, reach):
    """block_attention, one row without the last of its keys."""
    out, lse = beagle_kernels.block_attention(q, k, v, window, offset, reach=reach)
    first, end = bench_block_attention.visible_keys(len(q), window, offset, None, reach)
    row = len(q) - 1
    out = out.clone()
    out[row] = bench_block_attention.dense_rows(q, k, v, (first, end - 1), row, row + 1)[0]
    return out, lse


def wrong_gradient(q, k, v, window, offset, reach):
    """block_attention with the right output and a gradient to k that is off by 1%."""
    out, lse = beagle_kernels.block_attention(q, k * 1.01 - (k * 0.01).detach(), v, window, offset, reach=reach)
    return out, lse


PLANTED = [
    (bench_tree_attention, "tree_attention", one_wrong_bit),
    (bench_tree_attention, "tree_attention", one_dropped_slot),
    (bench_block_attention, "block_attention", one_dropped_key),
    (bench_block_attention, "block_attention", wrong_gradient),
]


@pytest.mark.parametrize("module, op, wrong", PLANTED, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_an_attention_with_one_error_gets_no_number(monkeypatch, module, op, wrong, size):
    """Neither from `python -m bench` nor from pytest-benchmark, at the size of the tests and at that of the tables."""
    case = next(case for case in module.cases(size=size) if wrong is not wrong_gradient or "backward" in case.name)
    monkeypatch.setattr(module, op, wrong)
    (row,) = measured(case)
    assert "is wrong" in row["error"] and "p50" not in row
    with pytest.raises(AssertionError, match="is wrong"):
        drive(NoBenchmark(), case, "beagle")


def test_a_loss_with_one_error_gets_no_number(monkeypatch):
    def without_a_token(student, teacher, weight, row_weight):
        return beagle_kernels.distill_loss(student, teacher, weight[1:], row_weight)

    monkeypatch.setattr(bench_distill_loss, "distill_loss", without_a_token)
    (case,) = bench_distill_loss.cases(size="tiny")
    (row,) = measured(case)
    assert "is wrong" in row["error"] and "p50" not in row
    with pytest.raises(AssertionError):
        drive(NoBenchmark(), case, "beagle")


def test_the_loss_says_what_memory_it_takes():
    (case,) = bench_distill_loss.cases(size="tiny")
    rows = {row["peer"]: row for row in measured(case)}
    assert 0 < rows["beagle"]["peak_bytes"] and 0 < rows["eager"]["peak_bytes"]
    assert rows["torch.compile"]["skipped"] == "compiled on a GPU only" and set(rows) == set(case.peers)


def off_by_one(op):
    def wrong(*args, **options):
        first, *rest = found = op(*args, **options)
        rest = [rest[0] + 1, *rest[1:]] if options.get("backend") != "reference" else rest
        return type(found)(first, *rest) if hasattr(found, "_fields") else (first, *rest)

    return wrong


def added(op):
    def wrong(*args, **options):
        found = op(*args, **options)
        return (found[0] + 0.1 * (options.get("backend") != "reference"), *found[1:])

    return wrong


@pytest.mark.parametrize(
    "name, op, wrong",
    [
        ("choose_tokens", "choose_tokens", off_by_one),
        ("verify_tree", "verify_tree", off_by_one),
        ("verify_chain", "verify_chain", off_by_one),
        ("build_tree", "accept_tree", off_by_one),
        ("lookup", "lookup", off_by_one),
        ("join_branch", "join_branch", off_by_one),
        ("compact_cache", "compact_cache_", lambda op: lambda *args: None),
        ("extend_attention", "extend_attention", added),
    ],
)
def test_every_wrong_op_is_refused(monkeypatch, name, op, wrong):
    module = importlib.import_module(MODULES[name])
    monkeypatch.setattr(module, op, wrong(getattr(beagle_kernels, op)))
    rows = [row for case in module.cases(size="tiny") for row in measured(case)]
    assert rows and all("is wrong" in row["error"] or "off by" in row["error"] for row in rows)


def test_a_wrong_peer_loses_its_own_number_only(monkeypatch):
    case = next(bench_tree_attention.cases(size="tiny"))
    case.rounds, right = 2, case.peers["sdpa folded"]
    case.peers["sdpa folded"] = lambda *args: right(*args) + 1.0
    rows = {row["peer"]: row for row in measured(case)}
    assert "sdpa folded is wrong" in rows["sdpa folded"]["refused"] and "p50" not in rows["sdpa folded"]
    assert "p50" in rows["beagle"] and "p50" in rows["sdpa mask"]


def test_an_absent_peer_says_why():
    rows = {
        row["peer"]: row
        for case in importlib.import_module("bench.ops.bench_verify_chain").cases(size="tiny")
        for row in measured(case)
    }
    assert "p50" in rows["FlashInfer"] or rows["FlashInfer"]["skipped"] == "flashinfer is not installed"
    assert all(why is None or len(why) > 10 for why in table("cpu").values())


def test_inputs_go_round():
    seen = []
    case = Case("turns", {"beagle": seen.append}, lambda: None, rounds=4, inputs=[(1,), (2,)])
    assert [row["peer"] for row in case.rows()] == ["beagle"]
    assert seen == [1, 2, 1, 2, 1, 2]


def test_eagle2_rejection_keeps_the_law():
    """The token after the root is distributed as the target says, whatever was drafted."""
    torch.manual_seed(0)
    tree = eagle2_tree.from_parents(torch.tensor([0, 1, 3, 2]), [-1, 0, 0, 1])
    law = torch.tensor([0.1, 0.4, 0.2, 0.3])
    counts = torch.zeros(4)
    for _ in range(1500):
        accepted, token = eagle2_tree.sampled(tree, law.expand(4, 4))
        # which child was accepted is seen only where it is the deepest: the one with a child of its own, or not
        counts[token if accepted == 0 else 1 if accepted == 2 else -1] += 1
    assert abs(counts[0] / 1500 - 0.1) < 0.03 and abs(counts[2] / 1500 - 0.2) < 0.04


def test_sglang_links():
    parents = torch.tensor([[-1, 0, 0, 1, 1]], dtype=torch.int32)
    tree = DraftTree(torch.zeros(1, 5, dtype=torch.int64), parents, parents, parents, parents, 2)
    index, child, sibling = sglang.links(tree)
    assert child.tolist() == [[1, 3, -1, -1, -1]] and sibling.tolist() == [[-1, 2, -1, 4, -1]]
    assert index.tolist() == [[0, 1, 2, 3, 4]]


def test_replayed_acceptance():
    """Its mean is Table 1's, a round accepts what it says, and afterwards the loop verifies as before."""
    lengths = replayed_acceptance.accepted_lengths(3, 6)
    assert lengths.shape == (replayed_acceptance.REPLAYED, 3) and abs(lengths.double().mean().item() + 1 - 4.1) < 0.05
    case = next(bench_round.cases(size="tiny"))
    case.rounds = 1
    rows = {row["peer"]: row for row in measured(case)}
    assert rows["beagle"]["acceptance"] == "replayed" and rows["beagle plain"]["acceptance"] == "none"
    assert 2.0 < rows["beagle"]["tokens_per_round"] <= 4.0 and 0 < rows["beagle"]["share_beside_target"] < 1
    beside = [rows["beagle"][f"share_beside_{part}"] for part in ("target", "layers")]
    assert beside[0] < beside[1] < 1 and rows["beagle"]["target_head_ms"] > 0  # the head is the target's own
    assert rows["beagle"]["token/s"] > 0 and rows["beagle"]["draft_bytes"] < rows["beagle"]["target_bytes"] * 2
    tree = trees(2, 9)
    with replayed_acceptance.replayed(torch.tensor([[1, 2], [0, 8]])):
        users = [
            module
            for name, module in sys.modules.items()
            if name.startswith("beagle_sd") and hasattr(module, "verify_tree")
        ]
        args = torch.randn(2, 9, 300), tree, torch.zeros(2, dtype=torch.int64), Sampling.of(2)
        first, second = users[0].verify_tree(*args), users[0].verify_tree(*args)
    assert first.num_accepted.tolist() == [1, 2]
    deepest = tree.depth.max(1).values.tolist()
    assert second.num_accepted.tolist() == [0, min(8, deepest[1])]
    for row, verdict in ((0, first), (1, first), (1, second)):
        path = [node for node in verdict.path[row].tolist() if node >= 0]
        assert path[0] == 0 and len(path) == int(verdict.num_accepted[row]) + 1
        assert [int(tree.parents[row, node]) for node in path[1:]] == path[:-1]
    assert users[0].verify_tree is beagle_kernels.verify_tree
