"""PyTorch's FlexAttention with given options of its kernels: each set of them, and each shape, is a compilation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

NAME = "FlexAttention"
DEFAULT = "its default"


def _forward(m: int, n: int, warps: int, stages: int, **more: bool) -> dict:
    tiles = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages} | more
    return {f"fwd_{name}": value for name, value in tiles.items()}


def _backward(m: int, n: int, warps: int, stages: int) -> dict:
    tiles = {"BLOCK_M1": m, "BLOCK_N1": n, "BLOCK_M2": n, "BLOCK_N2": m, "num_warps": warps, "num_stages": stages}
    return {f"bwd_{name}": value for name, value in tiles.items()}


TRIED: dict[bool, dict[str, dict | None]] = {
    False: {
        DEFAULT: None,
        "128 x 128, 8 warps, 2 stages": _forward(128, 128, 8, 2),
        "128 x 128, 8 warps, 2 stages, TMA": _forward(128, 128, 8, 2, USE_TMA=True),
        "128 x 64, 4 warps, 3 stages": _forward(128, 64, 4, 3),
    },
    True: {
        DEFAULT: None,
        "64 x 64, 4 warps, 3 stages": _backward(64, 64, 4, 3),
        "32 x 64, 4 warps, 3 stages": _backward(32, 64, 4, 3),
    },
}
"""Options by name, forward (False) and backward (True). Its default on sm_90 for bf16 and heads of 128 is 128 x 64, 8
warps, 3 stages forward and 64 x 128, 8 warps, 3 stages backward; the others are of Inductor's own search, whose whole
would be 7 and 13 compilations, and its loads by TMA, which that search leaves out."""


def why_not(device: str) -> str | None:
    return None if device == "cuda" else "compared on a GPU: on a CPU its forward needs a compiler and has no backward"


def block_mask(end: Tensor, rows: int, first: Tensor | None = None) -> BlockMask:
    """Row i sees the keys below end[i], and with `first` none below first[i]."""

    def within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < end[i] if first is None else (j >= first[i]) & (j < end[i])

    return create_block_mask(within, None, None, rows, rows, device=end.device)


def attention(options: dict | None = None) -> Callable[..., Tensor]:
    """attend(q, k, v, mask), compiled on a GPU, with these options of its kernels: q [B, Hq, N, D], k and v
    [B, Hkv, S, D], mask from block_mask.

    One compilation for all sizes would need dynamic shapes, and those cost its kernels the checks at the ends that
    whole tiles do without: every size has its own.
    """
    # every shape and every set of options is a compilation of the same function; past the limit it would run unfused
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        run = compiled if q.is_cuda else flex_attention
        gqa = q.shape[1] != k.shape[1]
        return run(q, k, v, block_mask=mask, enable_gqa=gqa, kernel_options=options)  # type: ignore[arg-type]

    return attend
