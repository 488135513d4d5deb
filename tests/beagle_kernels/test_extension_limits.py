"""What the compiled executors do not take is refused, by name and with what is allowed, before they run."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import mixed_sampling
from torch._subclasses.fake_tensor import FakeTensorMode
from tree_cases import random_tree

import beagle_kernels as bk
from beagle_kernels import BackendError, Sampling, backends, checks, extension
from beagle_kernels.compiled.adjust_logits import adjust_logits
from beagle_kernels.compiled.compact_cache_ import compact_cache_
from beagle_kernels.compiled.top_candidates import top_candidates
from beagle_kernels.compiled.verify_chain import verify_chain
from beagle_kernels.compiled.verify_tree import verify_tree

if (REASON := backends.why_not("choose_tokens", "cpu", torch.device("cpu"))) is not None:
    pytest.skip(REASON, allow_module_level=True)


def direct_calls(dtype: torch.dtype) -> dict:
    """Every op that takes logits or activations, past the checks of the public functions."""
    ops, sampling, tree = torch.ops.beagle, mixed_sampling(4), random_tree(4, 9, 3, seed=1)
    z, at = torch.randn(4, 40, dtype=dtype), torch.arange(4)
    chain = (torch.randn(4, 4, 9, dtype=dtype), torch.randn(4, 3, 9, dtype=dtype), torch.randint(9, (4, 3)), at)
    return {
        "choose_tokens": lambda: ops.choose_tokens(z, at, *sampling, 0, None, "cpu"),
        "perturb_logits": lambda: ops.perturb_logits(z, at, *sampling, "cpu"),
        "top_candidates": lambda: ops.top_candidates(z, 3, at, *sampling, None, "cpu"),
        "verify_tree": lambda: ops.verify_tree(z[:, None].expand(-1, 9, -1), *tree, at, *sampling, "cpu"),
        "verify_chain": lambda: ops.verify_chain(*chain, *sampling, "block", None, "cpu"),
        "skinny_linear": lambda: ops.skinny_linear(z, z, "cpu"),
        "int8_linear": lambda: ops.int8_linear(z[:, :32], z[:, :32].to(torch.int8), z[:, :1].float(), "cpu"),
    }


@pytest.mark.parametrize("op", direct_calls(torch.float32))
def test_a_dtype_the_executors_do_not_know_is_refused_by_name(op):
    with pytest.raises(TypeError, match="given torch.float64; allowed: torch.float32, torch.float16, torch.bfloat16"):
        direct_calls(torch.float64)[op]()


@pytest.mark.parametrize("code", [-1, 3, 2**31 - 1])
def test_a_dtype_s_number_that_is_none_is_refused(code, monkeypatch):
    """By the bindings: the executors would index their tables with it."""
    monkeypatch.setitem(extension.DTYPES, torch.float32, code)
    calls = direct_calls(torch.float32)
    q = torch.randn(1, 3, 1, 8)
    calls["tree_attention"] = lambda: bk.tree_attention(
        q, q.transpose(1, 2), q.transpose(1, 2), torch.zeros(1).int(), torch.ones(1, 3, 1).long(), backend="cpu"
    )
    paths, one = torch.zeros(1, 3, 4).long(), torch.ones(1).int()
    calls["adjust_logits"] = lambda: bk.adjust_logits(q[:, :, 0], paths, paths[:, 0], one, one, bk.Adjustments.of(1))
    for op, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{op}: dtype is {code}; allowed: the values of _C.dtypes"):
            call()


@pytest.mark.parametrize("nodes, words", [(1025, 17), (64, 17)])
def test_trees_beyond_the_executors_arrays_are_refused(nodes, words):
    tree = random_tree(1, 9, 3, seed=1)
    wide = [torch.nn.functional.pad(field, (0, nodes - 9)) for field in tree[:3]]
    mask, chosen = torch.zeros(1, nodes, words).long(), torch.zeros(1, nodes).long()
    with pytest.raises(RuntimeError, match=f"accept_tree: {nodes} nodes in {words} words; allowed: up to 1024"):
        torch.ops.beagle.accept_tree(*wide, mask, tree.size, 3, chosen, "cpu")


@pytest.mark.parametrize("values, message", [((1,), "too few arguments: 1"), ((0,) * 30, "too many arguments: 30")])
def test_another_number_of_fields_is_refused(values, message):
    with pytest.raises(TypeError, match=f"{message}; allowed: the op's fields"):
        extension._C.cpu.accept_tree(1, *values)
    with pytest.raises(TypeError):
        extension._C.cpu.accept_tree("1", *values)


def test_what_python_and_the_extension_both_know():
    assert extension._C.max_nodes == checks.MAX_NODES
    assert set(extension.DTYPES) == set(checks.LOGITS)


def test_what_the_cuda_kernels_have_no_room_for_is_refused_before_they_run():
    """On tensors without data; the same numbers are the host's every day."""
    many = extension._C.max_rows + 1
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        z, at, sampling = torch.empty(3, 5000), torch.arange(3), Sampling.of(3)
        with pytest.raises(BackendError, match="top_candidates: k is 1025; allowed by backend 'cuda': up to 1024"):
            top_candidates(z, 1025, at, *sampling)
        row, some = torch.empty(1, 1, 9), torch.empty(1).int()
        text, given = torch.empty(many, 1).long(), bk.Adjustments.of(many)[2:]
        calls = {
            "adjust_logits": lambda: adjust_logits(
                row.expand(many, 1, 9), torch.empty(many, 1, 0).long(), text, some, some, None, None, *given, None, None
            ),
            "top_candidates": lambda: top_candidates(torch.empty(1, 9).expand(many, 9), 2, at, *sampling),
            "verify_tree": lambda: verify_tree(
                row.expand(many, 1, 9), torch.empty(many, 1).long(), *4 * [some], 3, at, *sampling
            ),
            "verify_chain": lambda: verify_chain(
                row.expand(many, 1, 9), row, torch.empty(many, 0).long(), at, *sampling
            ),
            "compact_cache_": lambda: compact_cache_(
                torch.empty(1, 2, 1, 1, 4, 8), torch.empty(many, 1).int(), some, some
            ),
        }
        for op, call in calls.items():
            with pytest.raises(BackendError, match=f"{op}: the number of rows is {many}; allowed by .*: up to 65535"):
                call()
    top, _ = bk.top_candidates(torch.randn(1, 5000), 1025, torch.arange(1), Sampling.of(1), backend="cpu")
    assert len(set(top[0].tolist())) == 1025
