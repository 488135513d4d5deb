"""What the attention kernels do with tiles: load, store, multiply, weigh; and which program takes which tile."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# float32 factors are split into two TF32 numbers and multiplied in three products, to about 2^-21 of each; "ieee" keeps
# the product in plain registers, where tiles of use spill. Half precision is not concerned.
PRECISION = tl.constexpr("tf32x3")

L2_SHARE = 0.5
"""How much of the L2 may be taken by what is streamed at one time."""
PROGRAMS = 4
"""A group of heads has at least this many programs a processor, so that its long ones end beside short ones."""
ON_HOST = SimpleNamespace(
    major=9, L2_cache_size=50 << 20, multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10
)
"""What CPU tensors, under the interpreter or where kernels are only compiled, take for a GPU's properties."""


@triton.jit
def load_rows(p_base, o_row, stride, o_d, T, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    p_row = p_base + o_row[:, None].to(tl.int64) * stride + o_d[None, :]
    if MASKED:
        return tl.load(p_row, mask=(o_row[:, None] < T) & (o_d[None, :] < D), other=0.0)
    elif D == BLOCK_D:
        return tl.load(p_row)
    else:
        return tl.load(p_row, mask=o_d[None, :] < D, other=0.0)


@triton.jit
def load_block(
    p_base,
    start,
    column,
    stride,
    o_d,
    T,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """The block of rows at `start`; with TMA `p_base` describes [T, heads x D] and the head begins at `column`."""
    if TMA:
        return p_base.load([start, column])
    else:
        return load_rows(p_base, start + tl.arange(0, BLOCK_N), stride, o_d, T, D, BLOCK_D, MASKED)


@triton.jit
def store_rows(p_base, o_row, stride, o_d, T, b_value, D: tl.constexpr):
    p_row = p_base + o_row[:, None].to(tl.int64) * stride + o_d[None, :]
    tl.store(p_row, b_value.to(p_base.dtype.element_ty), mask=(o_row[:, None] < T) & (o_d[None, :] < D))


@triton.jit
def softmax_step(b_s, b_max, m_s, scale, MASKED: tl.constexpr):
    """Of scores before `scale`, at least 0: their weights, what becomes of the older ones, and the new largest."""
    if MASKED:
        b_s = tl.where(m_s, b_s * scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_pivot[:, None])
    else:
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_pivot = b_new
        b_p = tl.exp2(b_s * scale - b_pivot[:, None])
    return b_p, tl.exp2(b_max - b_pivot), b_new


@triton.jit
def tanh(b_x):
    """To fp32's last bit or two: below 0.55 a polynomial, since 1 - 2 e / (1 + e) would cancel."""
    b_size, b_square = tl.abs(b_x), b_x * b_x
    b_e = tl.exp2(b_size * (-2 * LOG2E))
    b_far = 1 - 2 * b_e / (1 + b_e)
    b_p = -6.38112e-3 * b_square + 2.115393e-2
    b_p = b_p * b_square - 5.387445e-2
    b_p = b_p * b_square + 1.3332827e-1
    b_p = b_p * b_square - 3.3333326e-1
    # NaN stays: it is not above 0.55
    return tl.where(b_size > 0.55, tl.where(b_x < 0, -b_far, b_far), b_x + b_x * (b_square * b_p))


@triton.jit
def block_and_head(i, blocks, heads, together):
    """What the i-th program takes: group of heads after group of heads, in a group block after block, in a block head
    after head."""
    i_group = i // (blocks * together)
    i_inside = i - i_group * blocks * together
    among = min(together, heads - i_group * together)
    return i_inside // among, i_group * together + i_inside % among


def heads_together(blocks: int, heads: int, key_heads: int, streamed: tuple[Tensor, ...]) -> int:
    """Heads in a group: what its programs stream, [rows, n, D] each, stays in the L2, but there are PROGRAMS of them.
    The query heads of a key head stay together."""
    device, size = streamed[0].device, sum(x.numel() * x.element_size() for x in streamed)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else ON_HOST
    most = max(1, int(L2_SHARE * gpu.L2_cache_size * key_heads) // size)
    least = triton.cdiv(PROGRAMS * gpu.multi_processor_count * key_heads, blocks * heads)
    groups = max(1, min(triton.cdiv(key_heads, most), key_heads // max(1, least)))
    return triton.cdiv(key_heads, groups) * (heads // key_heads)


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels take the largest score before they scale it, so the queries bear a negative sign."""
    return (q, scale) if scale >= 0 else (-q, -scale)


def rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    """The kernels want a last dimension of stride 1; any other strides will do."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def block_d(head_size: int) -> int:
    """The head size padded to what a matrix instruction takes."""
    if head_size > 256:
        raise ValueError(f"head size is {head_size}; the triton backend allows at most 256")
    return max(16, triton.next_power_of_2(head_size))


def readable_by_tma(x: Tensor) -> bool:
    """Whether [T, H, D] is rows of H D numbers, each at a multiple of 16 bytes, of heads that need no padding."""
    heads, width = x.shape[1:]
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.stride(1) == width == block_d(width) and x.stride(0) >= heads * width
