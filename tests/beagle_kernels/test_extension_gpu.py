"""The CUDA executor against the host executor of the same core: equal bit for bit, and safe under graph capture."""

from __future__ import annotations

import pytest
import torch
from adjust_cases import case as adjustment_case
from sampling_cases import mixed_sampling
from test_compact_cache_ import case as compaction_case
from test_extension import odd_logits
from test_join_branch import random_branch
from test_lookup import random_texts
from tree_cases import random_candidates, random_tree

import beagle_kernels as bk
from beagle_kernels import DraftTree, backends

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if (REASON := backends.why_not("choose_tokens", "cuda", torch.device("cuda"))) is not None:
    pytest.skip(REASON, allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABS = [1, 7, 64, 1000, 8193, 49152, 128256, 200_000]


def to_gpu(value):
    """Tensors and tuples of them on the GPU, the rest as it is."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        moved = map(to_gpu, value)
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def both(op, *args, **options):
    """The op's tensors on the host and on the GPU, both on the host."""
    on_gpu = op(*map(to_gpu, args), **{name: to_gpu(value) for name, value in options.items()}, backend="cuda")
    on_host = op(*args, **options, backend="cpu")
    fields = [(a, b) for a, b in zip(on_host, on_gpu) if isinstance(a, torch.Tensor)]
    return [a for a, _ in fields], [b.cpu() for _, b in fields]


def same(op, *args, **options):
    for want, have in zip(*both(op, *args, **options)):
        assert torch.equal(have, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_choose_tokens_and_candidates(vocab, dtype):
    for seed in range(12):
        logits, sampling = odd_logits((9, vocab), dtype, seed), mixed_sampling(9, seed)
        same(bk.choose_tokens, logits, torch.arange(9) + seed, sampling)
        (want, want_status), (have, have_status) = both(bk.perturb_logits, logits, torch.arange(9) + seed, sampling)
        assert torch.equal(have.isinf(), want.isinf()) and torch.equal(have_status, want_status)
        torch.testing.assert_close(have, want, rtol=1e-6, atol=2e-5)
        k = min(vocab, 1 + 5 * seed)
        (want, scores), (have, have_scores) = both(bk.top_candidates, logits, k, torch.arange(9), sampling)
        assert torch.equal(have, want)
        torch.testing.assert_close(have_scores, scores, rtol=1e-5, atol=2e-5)


def test_adjust_logits():
    for seed in range(60):
        args, options = adjustment_case(seed)
        want = bk.adjust_logits(*args, **options, backend="cpu")
        on_gpu = {name: to_gpu(value) for name, value in options.items()}
        have = bk.adjust_logits(*map(to_gpu, args), **on_gpu, backend="cuda")
        torch.testing.assert_close(have.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("nodes", [1, 16, 60, 65, 1024])
def test_trees(nodes):
    for seed in range(6):
        candidates = random_candidates(3, 40 * seed, 6, seed=seed)
        same(bk.build_tree, *candidates, nodes, 6)
        tree = random_tree(4, nodes, 5 if nodes > 1 else 0, vocab=2, seed=seed)
        same(bk.accept_tree, tree, torch.randint(2, (4, nodes)))
        logits = odd_logits((4 * nodes, 50), torch.bfloat16, seed).reshape(4, nodes, 50)
        same(bk.verify_tree, logits, tree, torch.arange(4), mixed_sampling(4, seed))


@pytest.mark.parametrize("size", [1, 60, 4096, 20000])
def test_lookups_and_chains_that_join(size):
    for seed in range(6):
        text, lengths = random_texts(4, size, seed), torch.tensor([size, size - 1, size // 2, 0]).int()
        same(bk.lookup, text, lengths, 40, longest=(1, 16, 1024)[seed % 3])
        _, *candidates = random_candidates(3, 80 * seed, 6, seed=seed)
        same(bk.join_branch, *candidates, *random_branch(3, 7 * seed, 5, seed))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_verify_chain(rule):
    for seed in range(12):
        vocab = (5, 300, 49152)[seed % 3]
        target = odd_logits((8, vocab), torch.float32, seed).reshape(2, 4, vocab)
        args = (target, torch.randn(2, 3, vocab), torch.randint(vocab, (2, 3)), torch.arange(2))
        same(bk.verify_chain, *args, mixed_sampling(2, seed), rule)


def test_the_driver_is_asked_without_a_trace():
    from beagle_kernels import _C

    assert _C.cuda.why_not(0) is None
    before = torch.cuda.current_device()
    assert "invalid device ordinal" in _C.cuda.why_not(torch.cuda.device_count())
    assert torch.cuda.current_device() == before
    same(bk.choose_tokens, torch.randn(3, 100), torch.arange(3), mixed_sampling(3))


def test_compact_cache_():
    for seed in range(6):
        path, count, lengths = compaction_case(3, 128, 12, seed=seed)
        cache = torch.randn(4, 2, 3, 2, 128, (64, 5, 7)[seed % 3]).half()
        on_gpu = cache.cuda()
        bk.compact_cache_(on_gpu, path.cuda(), count.cuda(), lengths.cuda(), backend="cuda")
        bk.compact_cache_(cache, path, count, lengths, backend="cpu")
        assert torch.equal(on_gpu.cpu(), cache)


def test_a_captured_round_replays():
    tree = to_gpu(random_tree(4, 30, 5, vocab=2, seed=1))
    logits, sampling = torch.randn(4, 30, 5000, device="cuda"), to_gpu(mixed_sampling(4))
    positions = torch.arange(4, device="cuda")
    bk.verify_tree(logits, DraftTree(*tree), positions, sampling, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bk.verify_tree(logits, DraftTree(*tree), positions, sampling, backend="cuda")
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    want = bk.verify_tree(logits, DraftTree(*tree), positions, sampling, backend="cuda")
    for a, b in zip(captured, want):
        assert torch.equal(a, b)
