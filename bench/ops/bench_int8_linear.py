"""int8_linear against PyTorch's dynamically quantised layer, its int8 weights alone, and layers in fp32 and bf16.

The peers' weights have one scale a row, ours one for each 64 elements: the results are near each other, not equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

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

    narrow, packed = x.bfloat16(), prepacked(weights)
    others: dict[str, tuple[Callable, list, Tensor]] = {
        # what each makes of one weight, its weights in turn, and what the first of them stands for
        "quantized.linear_dynamic": (partial(torch.ops.quantized.linear_dynamic, x), [packed], weights[0] / 127),
        "_weight_int8pack_mm bf16": (
            partial(torch._weight_int8pack_mm, narrow),
            [weights, row_scales(scales)],
            weights[0] * scales[0].mean(1, keepdim=True),
        ),
        "F.linear fp32": (partial(F.linear, x), [wide], wide[0]),
        "F.linear bf16": (partial(F.linear, narrow), [bf16], wide[0]),
        "skinny_linear fp32": (partial(skinny_linear, x), [wide], wide[0]),
        "skinny_linear bf16": (partial(skinny_linear, narrow), [bf16], wide[0]),
    }

    def check_peer(name: str) -> None:
        if name in others:
            function, given, exact = others[name]
            have, want = function(*(some[0] for some in given)).float(), x @ exact.T
            assert (have - want).norm() < 0.03 * want.norm(), f"{name} is wrong: off by {(have - want).norm():.3g}"

    peers: dict[str, Callable | str] = {"beagle": each(partial(int8_linear, x), weights, scales)}
    for name, (function, given, _) in others.items():
        missing = next((some for some in given if isinstance(some, str)), None)
        peers[name] = missing or each(function, *given)
    peers["reading the weight"] = each(lambda weight: weight.view(torch.int32).amax(), weights)
    return Case(
        f"int8_linear {len(x)} x {inputs} to {outputs} float32, groups of {GROUP}, {len(weights)} weights",
        peers,
        check,
        check_peer=check_peer,
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


def prepacked(weights: list[Tensor]) -> list | str:
    """Weights for PyTorch's layer, which quantises x as it comes by one scale for all its rows; the reason where this
    build has none."""
    try:
        return [
            torch.ops.quantized.linear_prepack(
                torch.quantize_per_channel(
                    weight.float() / 127,
                    torch.full((len(weight),), 1 / 127),
                    torch.zeros(
                        len(weight), dtype=torch.int64
                    ),  # of floats it takes another scheme, and computes nothing
                    0,
                    torch.qint8,
                ),
                None,
            )
            for weight in weights
        ]
    except RuntimeError as error:
        return str(error).splitlines()[0]


@pytest.mark.parametrize("case, peer", parameters(list(cases(size="tiny"))), ids=label)
def test_int8_linear(benchmark, case, peer):
    drive(benchmark, case, peer)
