"""extend_attention against the same merge in plain PyTorch, forward and backward together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from beagle_kernels import extend_attention
from bench.registry import Case, assert_near, drive, label, parameters

SHAPES = {
    # size -> (rows, extra keys, query heads, key heads, head size, dtype)
    "tiny": [(20, 3, 4, 2, 16, torch.float32)],
    "small": [(410, 1, 9, 3, 64, torch.float32), (410, 4, 9, 3, 64, torch.float32)],
    "full": [(2048, m, 32, 8, 128, torch.bfloat16) for m in (1, 4)] + [(16384, 4, 32, 8, 128, torch.bfloat16)],
    "scaling": [],
}
BACKENDS = {"beagle": "auto", "PyTorch": "reference"}


def cases(device: str = "cpu", size: str = "small") -> Iterator[Case]:
    for rows, m, hq, hkv, d, dtype in SHAPES[size]:
        shapes = (rows, hq, d), (rows, hq), (rows, hq, d), (rows, m, hkv, d), (rows, m, hkv, d)
        kinds = dtype, torch.float32, dtype, dtype, dtype
        inputs = [
            tuple(torch.randn(s, device=device, dtype=t, requires_grad=True) for s, t in zip(shapes, kinds))
            for _ in range(3)
        ]
        yield of_inputs(inputs)


def of_inputs(inputs: list[tuple]) -> Case:
    out, _, _, k, _ = inputs[0]
    (rows, hq, d), m, hkv, dtype = out.shape, k.shape[1], k.shape[2], out.dtype
    up = torch.randn(out.shape, device=out.device, dtype=dtype)

    def both_ways(backend: str) -> Callable:
        def run(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
            merged, _ = extend_attention(*leaves, backend=backend)
            return merged, *torch.autograd.grad(merged, leaves, up.to(merged.dtype))

        return run

    def check() -> None:
        truth = both_ways("reference")(*(x.detach().double().requires_grad_() for x in inputs[0]))
        names = ("extend_attention", *(f"its gradient to {x}" for x in ("out", "lse", "q", "k", "v")))
        for name, have, want in zip(names, both_ways("auto")(*inputs[0]), truth):
            most = (2e-2 if dtype != torch.float32 else 1e-5) * max(1.0, want.abs().max().item())
            assert_near(name, have, want, most)

    moved = sum(x.numel() * x.element_size() for x in inputs[0])
    return Case(
        f"extend_attention {rows} x {hq}/{hkv} x {d}, {m} keys, {str(dtype)[6:]}",
        {name: both_ways(backend) for name, backend in BACKENDS.items()},
        check,
        rounds=30,
        inputs=inputs,
        device=out.device.type,
        work={"byte": 3.0 * moved},
        series="extend_attention",
        at={"rows": rows, "keys": m},
    )


@pytest.mark.parametrize("case, peer", parameters(list(cases())), ids=label)
def test_extend_attention(benchmark, case, peer):
    drive(benchmark, case, peer)
