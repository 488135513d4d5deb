"""skinny_linear against PyTorch's linear layer and oneDNN's with a repacked weight, at SmolLM2's and an 8B's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beagle_kernels import skinny_linear
from bench.registry import Case, drive, label, parameters

SHAPES: dict[str, list[tuple[int, int, torch.dtype, tuple[int, ...]]]] = {
    # size -> (outputs, inputs, dtype, rows): SmolLM2's projections and head, an 8B's projection
    "tiny": [(64, 48, torch.float32, (3,))],
    "small": [
        *((outputs, inputs, torch.float32, (1, 8, 16)) for outputs, inputs in ((1536, 576), (576, 1536), (49152, 576))),
        *((4096, 4096, dtype, (1, 8, 16)) for dtype in (torch.float32, torch.bfloat16)),
    ],
    "scaling": [(1536, 576, torch.float32, (1, 2, 4, 8, 16, 32, 64))],
}
CACHED = 2**27
"""Bytes of weights that go round, so that none is found in a cache."""


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    if device == "cuda":  # the reference serves there: nothing of ours to measure
        return
    for outputs, inputs, dtype, most in SHAPES[size]:
        count = 1 if size == "tiny" else CACHED // (outputs * inputs * dtype.itemsize) + 1
        weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(count)]
        for rows in most:
            yield of_weights(weights, torch.randn(rows, inputs).to(dtype))


def of_weights(weights: list[Tensor], x: Tensor) -> Case:
    """One x against all weights in turn; a call is all of them, so `work` counts all their bytes."""

    def each(function: Callable[[Tensor], object], of: list[Tensor]) -> Callable[[], None]:
        def run() -> None:
            for weight in of:
                function(weight)

        return run

    def check() -> None:
        for weight in weights[:2]:
            want = x.double() @ weight.double().T
            ours, eager = ((y.double() - want).norm() for y in (skinny_linear(x, weight), F.linear(x, weight)))
            assert ours <= 2 * max(eager, torch.finfo(x.dtype).eps / 4 * want.norm()), "skinny_linear is wrong"

    peers = {
        "beagle": each(lambda weight: skinny_linear(x, weight), weights),
        "F.linear": each(lambda weight: F.linear(x, weight), weights),
    }
    if torch.backends.mkldnn.is_available():
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, len(x)) for weight in weights]
        peers["oneDNN, repacked"] = each(
            lambda weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""), packed
        )
    peers["reading the weight"] = each(lambda weight: weight.view(torch.int32).amax(), weights)
    outputs, inputs = weights[0].shape
    dtype = str(x.dtype)[6:]
    return Case(
        f"skinny_linear {len(x)} x {inputs} to {outputs} {dtype}, {len(weights)} weights",
        peers,
        check,
        bounds=("reading the weight",),
        rounds=9,
        series="skinny_linear",
        at={"rows": len(x), "dtype": dtype},
        work={
            "byte": float(sum(weight.nbytes for weight in weights)),
            "flop": 2.0 * len(x) * outputs * inputs * len(weights),
        },
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases(size="tiny"))), ids=label)
def test_skinny_linear(benchmark, case, peer):
    drive(benchmark, case, peer)
