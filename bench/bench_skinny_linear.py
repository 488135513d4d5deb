"""skinny_linear against PyTorch's linear layer and oneDNN's with a repacked weight, at SmolLM2's and an 8B's shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beagle_kernels import skinny_linear
from bench.registry import Case, drive, label, parameters

SHAPES = [(576, 576), (1536, 576), (576, 1536), (49152, 576), (4096, 4096)]
"""(outputs, inputs); the last is an 8B-shaped projection."""
ROWS = (1, 4, 8, 16, 32)
CACHED = 2**27
"""Bytes of weights that go round, so that none is found in a cache."""


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    if device == "cuda":  # the reference serves there: nothing of ours to measure
        return
    tiny = size == "tiny"
    for dtype in (torch.float32, torch.bfloat16):
        for outputs, inputs in [(64, 48)] if tiny else SHAPES:
            wanted = CACHED // (outputs * inputs * dtype.itemsize)
            weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(1 if tiny else min(max(wanted, 1), 64))]
            for rows in (3,) if tiny else ROWS:
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
    (outputs, inputs), size = weights[0].shape, sum(weight.nbytes for weight in weights)
    name = f"skinny_linear {len(x)} x {inputs} -> {outputs} {str(x.dtype)[6:]}, {len(weights)} weights"
    return Case(name, peers, check, bounds=("reading the weight",), rounds=9,
                work={"byte": float(size), "flop": 2.0 * len(x) * outputs * inputs * len(weights)})  # fmt: skip


@pytest.mark.parametrize("case, peer", parameters(list(itertools.islice(cases(size="tiny"), 1))), ids=label)
def test_skinny_linear(benchmark, case, peer):
    drive(benchmark, case, peer)
