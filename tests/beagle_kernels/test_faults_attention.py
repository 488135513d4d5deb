"""Hostile numbers, strides and sizes: of the attention ops and the loss on every backend, then of every public op."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fault_cases
import pytest
import torch
from op_calls import SIZES, Call, calls
from torch import Tensor

import beagle_kernels as bk
from beagle_kernels import backends

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
@pytest.mark.parametrize("first", range(0, 100, 20))
@pytest.mark.parametrize("op", fault_cases.CHECKS)
def test_on_a_gpu(op, first):
    """In parts, so that processes side by side share the compiling: tree_attention has a kernel for each kind of it."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert fault_cases.CHECKS[op]("cuda", 20, "triton", first) == 20


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
