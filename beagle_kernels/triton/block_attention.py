"""`block_attention` in Triton: a causal flash kernel whose key limit moves by windows.

Each program finds its rows' sequence by bisection in cu_seqlens and their key limit in closed form, so there is no
mask and no block list. Tiles that every row sees whole run without mask code. Scores are held in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends import implementation
from ..extension import contiguous
from .configs import architecture, choose
from .tiles import (
    LN2,
    LOG2E,
    PRECISION,
    block_and_head,
    block_d,
    heads_together,
    load_block,
    load_rows,
    positive_scale,
    readable_by_tma,
    rows_contiguous,
    softmax_step,
    store_rows,
)
from .windows import bisection_steps, key_range, limits, tile_loop_bounds


@triton.jit
def forward_tiles(
    b_acc,
    b_max,
    b_sum,
    b_q,
    p_k,
    p_v,
    column,
    s_kt,
    s_vt,
    lo,
    hi,
    b_first,
    b_limit,
    o_d,
    T,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """AHEAD: a tile's scores are multiplied before the softmax of the tile before it, the last one's once too often."""
    o_n = tl.arange(0, BLOCK_N)
    if AHEAD:
        b_k = load_block(p_k, lo, column, s_kt, o_d, T, D, BLOCK_D, BLOCK_N, True, TMA)  # [BN, BD]
        b_next = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
    for start in range(lo, hi, BLOCK_N):
        first = tl.minimum(start + BLOCK_N, hi - BLOCK_N) if AHEAD else start
        b_k = load_block(p_k, first, column, s_kt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        b_product = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if AHEAD:
            b_s = b_next
            b_next = b_product
        else:
            b_s = b_product
        o_key = start + o_n
        m_s = (o_key[None, :] >= b_first[:, None]) & (o_key[None, :] < b_limit[:, None]) if MASKED else None
        b_p, b_decay, b_max = softmax_step(b_s, b_max, m_s, scale, MASKED)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_v = load_block(p_v, start, column, s_vt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=["T", "num_seqs", "window", "reach", "together"])
def block_attention_forward(
    p_q,
    p_k,
    p_v,
    p_offset,
    p_cu,
    p_out,
    p_lse,
    T,
    num_seqs,
    window,
    reach,
    scale,
    s_qt,
    s_qh,
    s_kt,
    s_kh,
    s_vt,
    s_vh,
    together,
    HQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
):
    # Late rows have the most keys: they start first.
    blocks = tl.cdiv(T, BLOCK_M)
    i_m, i_h = block_and_head(tl.program_id(0), blocks, HQ, together)
    o_row = (blocks - 1 - i_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    b_first, b_limit = key_range(tl.minimum(o_row, T - 1), p_cu, p_offset, T, num_seqs, window, reach, STEPS)
    bounds = tile_loop_bounds(b_first, b_limit, BLOCK_N)

    column = i_h // GROUP * D
    if not TMA:
        p_k += (i_h // GROUP).to(tl.int64) * s_kh
        p_v += (i_h // GROUP).to(tl.int64) * s_vh
    b_q = load_rows(p_q + i_h.to(tl.int64) * s_qh, o_row, s_qt, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(0 if STEPS > 0 or reach is not None else 1, 3):
        b_acc, b_max, b_sum = forward_tiles(
            b_acc,
            b_max,
            b_sum,
            b_q,
            p_k,
            p_v,
            column,
            s_kt,
            s_vt,
            bounds[part],
            bounds[part + 1],
            b_first,
            b_limit,
            o_d,
            T,
            scale * LOG2E,
            D,
            BLOCK_D,
            BLOCK_N,
            part != 1,
            TMA,
            AHEAD and part == 1,
        )
    m_sees = b_limit > b_first
    b_safe = tl.where(m_sees, b_sum, 1.0)
    store_rows(p_out + i_h * D, o_row, HQ * D, o_d, T, b_acc / b_safe[:, None], D)
    b_lse = tl.where(m_sees, (b_max + tl.log2(b_safe)) * LN2, float("-inf"))
    tl.store(p_lse + o_row.to(tl.int64) * HQ + i_h, b_lse, mask=o_row < T)


def shape_constants(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> dict:
    """Constants of the kernels that follow from the shapes."""
    heads, width = q.shape[1:]
    return dict(HQ=heads, GROUP=heads // k.shape[1], D=width, BLOCK_D=block_d(width), STEPS=bisection_steps(cu_seqlens))


def launch(
    kernel, name: str, held: tuple[Tensor, ...], streamed: tuple[Tensor, ...], args: tuple, constants: dict
) -> None:
    """The kernel takes the tensors it holds a block of, then those it streams blocks of; its grid is held's heads."""
    (rows, heads, _), device, dtype = held[0].shape, held[0].device, held[0].dtype
    tma = all(map(readable_by_tma, streamed))
    config = choose(name, architecture(device), constants["BLOCK_D"], dtype, tma)
    blocks, key_heads = triton.cdiv(rows, config.block_m), min(heads, streamed[0].shape[1])
    together = heads_together(blocks, heads, key_heads, streamed)
    if config.tma:
        block = [config.block_n, constants["BLOCK_D"]]
        streamed = tuple(
            TensorDescriptor(x, [rows, x.shape[1] * x.shape[2]], [x.stride(0), 1], block) for x in streamed
        )
    tiles = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, TMA=config.tma, AHEAD=config.ahead)
    with torch.cuda.device_of(held[0]):
        kernel[(blocks * heads,)](
            *held,
            *streamed,
            *args,
            together,
            **constants,
            **tiles,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )


@implementation("block_attention", "triton")
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
    reach: int | None = None,
) -> tuple[Tensor, Tensor]:
    q, scale = positive_scale(q, scale)
    q, k, v = rows_contiguous(q, k, v)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    num_seqs = offset.numel()
    if q.numel() == 0 or num_seqs == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    sizes = q.shape[0], num_seqs, *limits(window, reach), scale
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
    args = offset.contiguous(), contiguous(cu_seqlens), out, lse, *sizes, *strides
    launch(block_attention_forward, "block_forward", (q,), (k, v), args, shape_constants(q, k, cu_seqlens))
    return out, lse
