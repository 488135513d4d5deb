"""extend_attention against the same merge in plain PyTorch, forward and backward together.

`pytest bench/bench_extend_attention.py --benchmark-group-by=group`
"""

from __future__ import annotations

import pytest
import torch

from beagle_kernels import extend_attention
from bench.timing import device_for, timed

SHAPES = {
    # size -> (rows, extra keys, query heads, key heads, head size, dtype)
    "small": [(410, 1, 9, 3, 64, torch.float32), (410, 4, 9, 3, 64, torch.float32)],
    "full": [(2048, m, 32, 8, 128, torch.bfloat16) for m in (1, 4)] + [(16384, 4, 32, 8, 128, torch.bfloat16)],
}
PEERS = {"beagle": "auto", "reference": "reference"}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("size, shape", [(size, shape) for size in SHAPES for shape in SHAPES[size]], ids=str)
def test_extend_attention(benchmark, size, shape, name):
    device, (rows, m, hq, hkv, d, dtype) = device_for(size), shape

    def leaves():
        shapes = (rows, hq, d), (rows, hq), (rows, hq, d), (rows, m, hkv, d), (rows, m, hkv, d)
        kinds = dtype, torch.float32, dtype, dtype, dtype
        return tuple(
            torch.randn(s, device=device, dtype=t, requires_grad=True) for s, t in zip(shapes, kinds, strict=True)
        )

    up = torch.randn(rows, hq, d, device=device, dtype=dtype)

    def run(*tensors):
        out, _ = extend_attention(*tensors, backend=PEERS[name])
        return out, torch.autograd.grad(out, tensors, up)

    inputs = [leaves() for _ in range(3)]
    want = extend_attention(*(x.double() for x in inputs[0]), backend="reference")[0]
    torch.testing.assert_close(run(*inputs[0])[0].double(), want, atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=0)
    size_of = sum(x.numel() * x.element_size() for x in inputs[0])
    benchmark.group = f"extend_attention {rows} x {hq}/{hkv} x {d}, {m} keys, {dtype}"
    timed(benchmark, run, inputs, work={"byte": 3.0 * size_of}, peer=name)
