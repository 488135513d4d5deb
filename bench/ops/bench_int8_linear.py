"""int8_linear against PyTorch's dynamically quantised layer, its int8 weights alone, and layers in fp32 and bf16.

The peers' weights have one scale a row, ours one for each 64 elements: the results are near each other, not equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beagle_kernels import int8_linear, skinny_linear
from bench.registry import Case, drive, label, parameters

GROUP = 64
SHAPES: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {
    # size -> (outputs, inputs, rows): SmolLM2's projections and head, an 8B's projection
    "tiny": [(64, 64, (3,))],
    "small": [(*shape, (1, 8, 16)) for shape in ((1536, 576), (576, 1536), (49152, 576), (4096, 4096))],
    "scaling": [(1536, 576, (1, 2, 4, 8, 16, 32, 64))],
}
CACHED = 2**27
"""Bytes of integers that go round, so that none is found in a cache."""


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    if device == "cuda":  # the reference serves there: nothing of ours to measure
        return
    for outputs, inputs, most in SHAPES[size]:
        count = 1 if size == "tiny" else CACHED // (outputs * inputs) + 1
        weights = [torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8) for _ in range(count)]
        scales = [torch.rand(outputs, inputs // GROUP) / 127 for _ in range(count)]
        for rows in most:
            yield of_weights(weights, scales, torch.randn(rows, inputs))


def of_weights(weights: list[Tensor], scales: list[Tensor], x: Tensor) -> Case:
    """One x against all weights in turn; a call is all of them, so `work` counts all their bytes."""
    outputs, inputs = weights[0].shape
    wide = [weight.view(outputs, -1, GROUP) * scale[..., None] for weight, scale in zip(weights, scales, strict=True)]
    wide = [weight.flatten(1) for weight in wide[: max(1, CACHED // (4 * outputs * inputs))]]
    bf16 = [weight.bfloat16() for weight in wide]

    def each(function: Callable[..., object], *of: list) -> Callable[[], None]:
        """The function of as many weights as there are of int8, fewer of them in turn where they are larger."""

        def run() -> None:
            for number in range(len(weights)):
                function(*(some[number % len(some)] for some in of))

        return run

    def check() -> None:
        for weight, scale, exact in list(zip(weights, scales, wide))[:2]:
            have = int8_linear(x, weight, scale)
            assert torch.equal(have, int8_linear(x, weight, scale, backend="reference")), "int8_linear is wrong"
            assert (have - x @ exact.T).norm() < 0.02 * (x @ exact.T).norm(), "int8_linear is far from what it is for"

    narrow = x.bfloat16()
    peers = {
        "beagle": each(lambda weight, scale: int8_linear(x, weight, scale), weights, scales),
        "quantized.linear_dynamic": dynamic(weights, x, each),
        "_weight_int8pack_mm bf16": each(
            lambda weight, scale: torch._weight_int8pack_mm(narrow, weight, scale), weights, row_scales(scales)
        ),
        "F.linear fp32": each(lambda weight: F.linear(x, weight), wide),
        "F.linear bf16": each(lambda weight: F.linear(narrow, weight), bf16),
        "skinny_linear fp32": each(lambda weight: skinny_linear(x, weight), wide),
        "skinny_linear bf16": each(lambda weight: skinny_linear(narrow, weight), bf16),
        "reading the weight": each(lambda weight: weight.view(torch.int32).amax(), weights),
    }
    return Case(
        f"int8_linear {len(x)} x {inputs} to {outputs} float32, groups of {GROUP}, {len(weights)} weights",
        peers,
        check,
        bounds=("reading the weight",),
        rounds=9,
        series="int8_linear",
        at={"rows": len(x)},
        work={
            "byte": float(sum(weight.nbytes + scale.nbytes for weight, scale in zip(weights, scales, strict=True))),
            "flop": 2.0 * len(x) * outputs * inputs * len(weights),
        },
    )


def row_scales(scales: list[Tensor]) -> list[Tensor]:
    """One scale a row, in bf16."""
    return [scale.mean(1).bfloat16() for scale in scales]


def dynamic(weights: list[Tensor], x: Tensor, each: Callable) -> Callable[[], None] | str:
    """PyTorch's layer, x quantised as it comes by one scale for all its rows; the reason where this build has none."""
    try:
        packed = [
            torch.ops.quantized.linear_prepack(
                torch.quantize_per_channel(
                    weight.float() / 127, torch.full((len(weight),), 1 / 127), torch.zeros(len(weight)), 0, torch.qint8
                ),
                None,
            )
            for weight in weights
        ]
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return each(lambda weight: torch.ops.quantized.linear_dynamic(x, weight), packed)


@pytest.mark.parametrize("case, peer", parameters(list(cases(size="tiny"))), ids=label)
def test_int8_linear(benchmark, case, peer):
    drive(benchmark, case, peer)
