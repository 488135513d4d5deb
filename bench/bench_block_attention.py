"""block_attention against dense attention under the same mask and against causal attention of the same size.

`pytest bench/bench_block_attention.py --benchmark-group-by=group` (`-k small` on a CPU, `-k full` on a GPU).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from beagle_kernels import block_attention
from beagle_kernels.reference.block_attention import visible_keys
from bench.timing import device_for, timed

SHAPES = {
    # size -> (rows, query heads, key heads, head size, dtype)
    "small": [(512, 9, 3, 64, torch.float32), (2048, 9, 3, 64, torch.float32)],
    "full": [(2**n, 32, 8, 128, torch.bfloat16) for n in range(11, 16)],
}
WINDOW, OFFSET = 5, 2
FLEX_OPTIONS = {
    "flex": None,
    "flex tuned": {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 3, "num_warps": 8},
}


def beagle(q, k, v, offset):
    return block_attention(q, k, v, WINDOW, offset)[0]


def heads_first(*tensors):
    return [x.transpose(0, 1)[None] for x in tensors]


def peers(rows: int, offset: torch.Tensor, device: torch.device) -> dict:
    """Each takes q, k, v, offset and gives [T, Hq, D]; masks are made here, outside the time."""
    first, end = visible_keys(rows, WINDOW, offset, None)
    mask = torch.arange(rows, device=device) < end[:, None]

    def sdpa(q, k, v, _):
        if device.type == "cuda":
            # no fused kernel takes both a mask and shared key heads, and the unfused one makes [Hq, T, T] scores
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(*heads_first(q, k, v), attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    def causal(q, k, v, _):
        return F.scaled_dot_product_attention(*heads_first(q, k, v), is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    found = {"sdpa mask": sdpa, "sdpa causal": causal}
    if device.type == "cuda":
        blocks = create_block_mask(lambda b, h, i, j: j < end[i], None, None, rows, rows, device=device)
        compiled = torch.compile(flex_attention)
        for name, options in FLEX_OPTIONS.items():
            found[name] = lambda q, k, v, _, options=options: compiled(
                *heads_first(q, k, v), block_mask=blocks, enable_gqa=True, kernel_options=options
            )[0].transpose(0, 1)
    return found


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["beagle", "sdpa mask", "sdpa causal", *FLEX_OPTIONS])
@pytest.mark.parametrize("size, shape", [(size, shape) for size in SHAPES for shape in SHAPES[size]], ids=str)
def test_block_attention(benchmark, size, shape, name, direction):
    device, (rows, hq, hkv, d, dtype) = device_for(size), shape
    if name in FLEX_OPTIONS and device.type != "cuda":
        pytest.skip("FlexAttention is compared on a GPU")
    offset = torch.tensor([OFFSET], dtype=torch.int32, device=device)
    inputs = [
        tuple(torch.randn(rows, heads, d, device=device, dtype=dtype, requires_grad=True) for heads in (hq, hkv, hkv))
        for _ in range(3)
    ]
    found = peers(rows, offset, device)
    run = beagle if name == "beagle" else found[name]
    if name != "sdpa causal":
        got, want = (f(*inputs[0], offset)[OFFSET + WINDOW :] for f in (run, found["sdpa mask"]))
        torch.testing.assert_close(got, want, atol=2e-2 if dtype != torch.float32 else 1e-4, rtol=0)
    pairs = visible_keys(rows, WINDOW, offset, None)[1].sum().item() if name != "sdpa causal" else rows**2 / 2
    flop, bound = 4.0 * d * hq * pairs, name == "sdpa causal"
    benchmark.group = f"block_attention {direction} {rows} x {hq}/{hkv} x {d} {dtype}"
    if direction == "forward":
        with torch.no_grad():
            timed(benchmark, run, [(*x, offset) for x in inputs], work={"flop": flop}, peer=name, bound=bound)
        return
    up = torch.randn(rows, hq, d, device=device, dtype=dtype)
    outs = [(run(*x, offset), x) for x in inputs]
    timed(
        benchmark, lambda out, leaves: torch.autograd.grad(out, leaves, up, retain_graph=True), outs,
        work={"flop": 2.5 * flop}, peer=name, bound=bound,
    )  # fmt: skip
