"""Hostile numbers, strides and sizes: of the attention ops and the loss on every backend, then of every public op."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import fault_cases
import pytest
import torch
from torch import Tensor

import beagle_kernels as bk
from beagle_kernels import DraftTree, Sampling, backends

HERE = Path(__file__).parent
CPU_BACKENDS = ("cpu", "reference")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("op", fault_cases.CHECKS)
def test_on_the_cpu(op, backend):
    assert fault_cases.CHECKS[op]("cpu", 40, backend) == 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "op, rounds", [("block_attention", 24), ("tree_attention", 12), ("extend_attention", 15), ("distill_loss", 24)]
)
def test_under_the_interpreter(op, rounds):
    pytest.importorskip("triton")
    path = os.pathsep.join(filter(None, [str(HERE), *sys.path]))
    result = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", str(HERE / "fault_cases.py"), op, str(rounds)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout) == rounds


@pytest.mark.gpu
@pytest.mark.parametrize("op", fault_cases.CHECKS)
def test_on_a_gpu(op):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert fault_cases.CHECKS[op]("cuda", 100, "triton") == 100


SIZES = {"R": 3, "B": 2, "N": 5, "M": 4, "V": 70, "T": 9, "H": 4, "K": 2, "D": 16, "S": 12, "L": 2, "P": 3}
Call = tuple[Callable[..., object], list[Tensor]]


def sampling_of(*fields: Tensor) -> Sampling:
    return Sampling(*fields)


def adjusted(z, paths, text, lengths, prompts, ids, allowed, *fields: Tensor, backend: str) -> Tensor:
    options = {"token_ids": ids, "allowed": allowed, "backend": backend}
    return bk.adjust_logits(z, paths, text, lengths, prompts, bk.Adjustments(*fields), **options)


def layer_of(parts: Sequence[Tensor]) -> bk.LayerWeights:
    """Seven matrices, a norm of states and one of keys."""
    return bk.LayerWeights(*map(bk.Linear, parts[:7]), norm_in=bk.Norm(parts[7], 1e-6), norm_k=bk.Norm(parts[8], 1e-6))


def calls(sizes: dict[str, int]) -> dict[str, Call]:
    """Every public op as a function of its tensors alone (and a backend), with tensors of these sizes."""
    pick = torch.Generator().manual_seed(1)
    R, B, N, M, V, T, H, K, D, S, L, P = (sizes[name] for name in "RBNMVTHKDSLP")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=pick)

    def whole(top: int, *shape: int, dtype=torch.int64) -> Tensor:
        return torch.randint(max(top, 1), shape, generator=pick, dtype=dtype)

    def knobs(rows: int) -> list[Tensor]:
        return [field[:rows] for field in Sampling.of(max(rows, 1), 5, 0.8, 20, 0.9, 0.01)]

    chain = torch.arange(N, dtype=torch.int32).expand(B, N)
    words = (N + 63) // 64
    ancestors = torch.cumsum(torch.eye(N, dtype=torch.int64), 0).sum(1) - 1
    mask = ((2 << ancestors) - 1)[None, :, None].expand(B, N, 1)[..., :words]
    tree = [whole(V, B, N), chain - 1, chain, mask, torch.full((B,), N, dtype=torch.int32)]
    cache = normal(L, 2, B, K, S, D)
    path = torch.arange(1, M + 1, dtype=torch.int32).expand(B, M) * 2
    few, one = torch.full((B,), max(M - 1, 0), dtype=torch.int32), torch.ones(B, dtype=torch.int32)
    bounds = torch.tensor([0, T // 2, T], dtype=torch.int32)
    starts = torch.tensor([1, 0], dtype=torch.int32)
    return {
        "block_attention": (
            lambda q, k, v, offset, cu, backend: bk.block_attention(q, k, v, 3, offset, cu, backend=backend),
            [normal(T, H, D), normal(T, K, D), normal(T, K, D), starts, bounds],
        ),
        "extend_attention": (
            bk.extend_attention,
            [normal(R, H, D), normal(R, H), normal(R, H, D), normal(R, M, K, D), normal(R, M, K, D)],
        ),
        "tree_attention": (
            bk.tree_attention,
            [normal(B, N, H, D), normal(B, K, S, D), normal(B, K, S, D), one * 3, whole(9, B, N, 1)],
        ),
        "tree_attention, paged": (
            lambda q, k, v, lengths, mask, table, backend: bk.tree_attention(
                q, k, v, lengths, mask, block_table=table, backend=backend
            ),
            [
                normal(B, N, H, D),
                normal(P, K, S, D),
                normal(P, K, S, D),
                one * 3,
                whole(9, B, N, 1),
                whole(P, B, 2, dtype=torch.int32),
            ],
        ),
        "tree_attention, all": (
            lambda q, k, v, lengths, mask, starts, sinks, backend: bk.tree_attention(
                q, k, v, lengths, mask, starts=starts, sinks=sinks, softcap=2.0, backend=backend
            ),
            [
                normal(B, N, H, D),
                normal(B, K, S, D),
                normal(B, K, S, D + 3),
                one * 3,
                whole(9, B, N, 1),
                whole(5, B, N, dtype=torch.int32),
                normal(H),
            ],
        ),
        "distill_loss": (bk.distill_loss, [normal(T, D), normal(T, D), normal(V, D), normal(T).abs()]),
        "choose_tokens": (
            lambda z, at, *fields, backend: bk.choose_tokens(z, at, sampling_of(*fields), backend=backend),
            [normal(R, V), whole(99, R), *knobs(R)],
        ),
        "perturb_logits": (
            lambda z, at, *fields, backend: bk.perturb_logits(z, at, sampling_of(*fields), backend=backend),
            [normal(R, V), whole(99, R), *knobs(R)],
        ),
        "adjust_logits": (
            adjusted,
            [
                *(normal(B, N, V), whole(9, B, N, P), whole(9, B, T), one * 6, one * 2),
                *(torch.arange(V) * 2, whole(2**31 - 1, B, N, (2 * V + 31) // 32, dtype=torch.int32)),
                *(normal(B, 2 * V), whole(9, B, 2 * V, dtype=torch.int32)),
                *(whole(9, K, L), normal(K), whole(B, K, dtype=torch.int32)),
                *(normal(B).exp(), normal(B), normal(B), one * 3),
            ],
        ),
        "top_candidates": (
            lambda z, at, ids, *fields, backend: bk.top_candidates(
                z, 3, at, sampling_of(*fields), token_ids=ids, backend=backend
            ),
            [normal(R, V), whole(99, R), torch.arange(V) * 2, *knobs(R)],
        ),
        "build_tree": (
            lambda *given, backend: bk.build_tree(*given, N, 4, backend=backend)[:5],
            [
                whole(V, B),
                whole(V, B, M),
                -torch.rand(B, M, generator=pick).cumsum(1),
                whole(1, B, M, dtype=torch.int32) - 1,
            ],
        ),
        "lookup": (
            lambda *given, backend: bk.lookup(*given, M, backend=backend),
            [whole(3, B, S), torch.full((B,), S, dtype=torch.int32)],
        ),
        "join_branch": (
            bk.join_branch,
            [
                whole(3, B, M),
                -torch.rand(B, M, generator=pick).cumsum(1),
                whole(1, B, M, dtype=torch.int32) - 1,
                whole(3, B, N),
                -torch.rand(B, N, generator=pick).cumsum(1),
            ],
        ),
        "accept_tree": (
            lambda *given, backend: bk.accept_tree(DraftTree(*given[:5], max_depth=6), given[5], backend=backend),
            [*tree, whole(3, B, N)],
        ),
        "verify_tree": (
            lambda z, at, *given, backend: bk.verify_tree(
                z, DraftTree(*given[:5], max_depth=6), at, sampling_of(*given[5:]), backend=backend
            ),
            [normal(B, N, V), whole(99, B), *tree, *knobs(B)],
        ),
        "verify_chain": (
            lambda p, q, drafted, at, *fields, backend: bk.verify_chain(
                p, q, drafted, at, sampling_of(*fields), backend=backend
            ),
            [normal(B, M + 1, V), normal(B, M, V), whole(V, B, M), whole(99, B), *knobs(B)],
        ),
        "compact_cache_": (
            lambda cache, *given, backend: (bk.compact_cache_(cache, *given, backend=backend), cache)[1],
            [cache, path, few, one],
        ),
        "skinny_linear": (bk.skinny_linear, [normal(R, T, D), normal(V, D)]),
        "int8_linear": (
            bk.int8_linear,
            [normal(R, T, 32 * M), whole(99, V, 32 * M, dtype=torch.int8), normal(V, M).abs()],
        ),
        "decoder_layer": (
            lambda x, cos, sin, keys, values, *given, backend: (
                bk.decoder_layer(x, layer_of(given[:9]), cos, sin, keys, values, *given[9:], backend=backend),
                keys,
                values,
            ),
            [
                *(normal(B, N, width) for width in (D + 3, D // 2, D // 2)),
                *(normal(B, K, S, D) for _ in range(2)),
                *(normal(outputs, D + 3) / 8 for outputs in (H * D, K * D, K * D)),
                normal(D + 3, H * D) / 8,
                *(normal(T, D + 3) / 8 for _ in range(2)),
                normal(D + 3, T) / 8,
                *(normal(size) for size in (D + 3, D)),
                one * 3,
                whole(9, B, N, 1),
            ],
        ),
    }


OPS = list(calls(SIZES))


def test_every_public_op_is_here():
    assert {name.split(",")[0] for name in OPS} == {name for name in bk.__all__ if name.islower()}


def tensors_of(found: object) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [part for part in found if isinstance(part, Tensor)]


def run(call: Call, backend: str, layout: Callable[[Tensor], Tensor] = torch.clone) -> list[Tensor]:
    function, tensors = call
    return tensors_of(function(*map(layout, tensors), backend=backend))


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "every other element": lambda x: torch.stack([x, torch.zeros_like(x)], -1)[..., 0],
    "dimensions in reverse": lambda x: (
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    ),
    "a part of a larger tensor": lambda x: torch.nn.functional.pad(x, [1, 2] * x.dim(), value=77)[
        tuple(slice(1, 1 + size) for size in x.shape)
    ],
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_strides_change_nothing(op, backend):
    for name, layout in LAYOUTS.items():
        call = calls(SIZES)[op]
        if op == "compact_cache_":
            if name != "a part of a larger tensor":
                with pytest.raises(ValueError, match="cache has stride .* allowed: 1"):
                    run(call, backend, layout)
                continue
        close(run(call, backend, layout), run(call, backend))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("op", [op for op in OPS if op != "compact_cache_"])
def test_expanded_inputs_are_read_and_not_written(op, backend):
    """Every input the first of its rows, repeated by a stride of 0; planes that an op writes are not taken so."""
    function, tensors = calls(SIZES)[op]
    rows = [x[:1].expand_as(x) for x in tensors]
    if op == "decoder_layer":
        with pytest.raises(ValueError, match="keys has stride"):
            function(*rows, backend=backend)
        rows[3:5] = tensors[3:5]
    if op == "block_attention":
        rows[-1] = tensors[-1]  # bounds that are all the same hold no row
    before = [x.clone() for x in rows]
    found = tensors_of(function(*rows, backend=backend))
    close(found, tensors_of(function(*(x.clone(memory_format=torch.contiguous_format) for x in rows), backend=backend)))
    written = (3, 4) if op == "decoder_layer" else ()
    assert all(torch.equal(x, y) for i, (x, y) in enumerate(zip(rows, before)) if i not in written)


@pytest.mark.parametrize("op", OPS)
def test_size_zero_of_anything(op):
    """Each size in turn: refused with what is allowed, by both backends, or the same empty result of both."""
    refused = []
    for name in SIZES:
        outcomes = []
        for backend in CPU_BACKENDS:
            try:
                outcomes.append(run(calls({**SIZES, name: 0})[op], backend))
            except ValueError as error:
                assert "allowed" in str(error), (name, error)
                outcomes.append(None)
        assert (outcomes[0] is None) == (outcomes[1] is None), name
        if outcomes[0] is None:
            refused.append(name)
        else:
            close(*outcomes)
    assert set(refused) <= set(
        {
            "build_tree": "N",
            "distill_loss": "VD",
            "accept_tree": "N",
            "verify_tree": "NV",
            "tree_attention, paged": "HKDSP",
            "decoder_layer": "HKD",
        }.get(op, "HKDV")
    )


@pytest.mark.parametrize("op", ["block_attention", "extend_attention", "distill_loss"])
@pytest.mark.parametrize("size", ["T", "R", "M"])
def test_gradients_of_size_zero(op, size):
    function, tensors = calls({**SIZES, size: 0})[op]
    for backend in CPU_BACKENDS:
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
        out = tensors_of(function(*leaves, backend=backend))[0]
        out.sum().backward()
        assert all(x.grad is None or (x.grad.shape == x.shape and x.grad.isfinite().all()) for x in leaves)


@pytest.mark.parametrize(
    "name, value",
    [
        *[("window", 0), ("window", 2**63), ("reach", 0), ("reach", 2**63)],
        *[("num_nodes", 1025), ("max_depth", -1), ("max_depth", 2**40)],
    ],
)
def test_integers_out_of_range_are_refused(name, value):
    q, starts = torch.zeros(4, 2, 8), torch.zeros(1, dtype=torch.int32)
    root, none = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 0)
    given = {"num_nodes": 4, "max_depth": 2, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}; allowed: "):
        if name in ("window", "reach"):
            bk.block_attention(q, q, q, **{"window": 2, name: value}, offset=starts)
        else:
            bk.build_tree(root, none.long(), none, none.int(), given["num_nodes"], given["max_depth"])
    with pytest.raises(TypeError, match="window is a float; allowed: an int"):
        bk.block_attention(q, q, q, 2.5, starts)
    with pytest.raises(TypeError, match="reach is a float; allowed: an int, or None for no limit"):
        bk.block_attention(q, q, q, 2, starts, reach=2.5)


def test_backends_here_are_those_of_the_cpu():
    """The extension is built where the tests run: without it half of this file would test the reference twice."""
    assert backends.resolve("choose_tokens", "auto", torch.device("cpu")) == "cpu"
