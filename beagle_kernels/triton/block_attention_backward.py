"""The gradients of `block_attention` in Triton: one kernel for dQ, one for dK and dV, both of which recompute scores.

So there are no atomics, and the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backends import implementation
from ..extension import contiguous
from .block_attention import launch, shape_constants
from .tiles import (
    LOG2E,
    PRECISION,
    block_and_head,
    load_block,
    load_rows,
    rows_contiguous,
    store_rows,
)
from .windows import key_range, limits, row_range, tile_loop_bounds


@triton.jit
def dq_tiles(
    b_dq,
    b_q,
    b_g,
    b_lse,
    b_delta,
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
):
    """Both products are issued before the exponentials, so that the tensor cores work during these."""
    o_n = tl.arange(0, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        o_key = start + o_n
        b_k = load_block(p_k, start, column, s_kt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        b_v = load_block(p_v, start, column, s_vt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)  # [BM, BN]
        b_p = tl.exp2(b_s * scale - b_lse[:, None])
        if MASKED:
            m_s = (o_key[None, :] >= b_first[:, None]) & (o_key[None, :] < b_limit[:, None])
            b_p = tl.where(m_s, b_p, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["T", "num_seqs", "window", "reach", "s_ht", "s_hh", "together"])
def block_attention_dq(
    p_q,
    p_g,
    p_k,
    p_v,
    p_offset,
    p_cu,
    p_out,
    p_lse,
    p_h,
    p_dq,
    p_rows,
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
    s_gt,
    s_gh,
    s_ht,
    s_hh,
    together,
    HQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """dQ, and on the way lse in base 2 and delta = g . out - h, [2, HQ, T], which the kernel of dK and dV reads."""
    blocks = tl.cdiv(T, BLOCK_M)
    i_m, i_h = block_and_head(tl.program_id(0), blocks, HQ, together)
    o_row = (blocks - 1 - i_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_row < T
    b_first, b_limit = key_range(tl.minimum(o_row, T - 1), p_cu, p_offset, T, num_seqs, window, reach, STEPS)
    bounds = tile_loop_bounds(b_first, b_limit, BLOCK_N)

    b_q = load_rows(p_q + i_h.to(tl.int64) * s_qh, o_row, s_qt, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_g = load_rows(p_g + i_h.to(tl.int64) * s_gh, o_row, s_gt, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_out = load_rows(p_out + i_h * D, o_row, HQ * D, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_delta = tl.sum(b_g.to(tl.float32) * b_out.to(tl.float32), 1)
    if HAS_H:
        b_delta -= tl.load(p_h + o_row.to(tl.int64) * s_ht + i_h.to(tl.int64) * s_hh, mask=m_row, other=0.0)
    b_lse = tl.load(p_lse + o_row.to(tl.int64) * HQ + i_h, mask=m_row, other=0.0) * LOG2E
    p_rows += i_h.to(tl.int64) * T
    tl.store(p_rows + o_row, b_lse, mask=m_row)
    tl.store(p_rows + tl.cast(T, tl.int64) * HQ + o_row, b_delta, mask=m_row)
    column = i_h // GROUP * D
    if not TMA:
        p_k += (i_h // GROUP).to(tl.int64) * s_kh
        p_v += (i_h // GROUP).to(tl.int64) * s_vh
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(0 if STEPS > 0 or reach is not None else 1, 3):
        b_dq = dq_tiles(
            b_dq,
            b_q,
            b_g,
            b_lse,
            b_delta,
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
        )
    store_rows(p_dq + i_h * D, o_row, HQ * D, o_d, T, b_dq * scale, D)


@triton.jit
def dkv_tiles(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_g,
    p_lse,
    p_delta,
    column,
    s_qt,
    s_gt,
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
):
    """The order of products is dq_tiles'."""
    o_n = tl.arange(0, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        o_row = start + o_n
        b_q = load_block(p_q, start, column, s_qt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        b_g = load_block(p_g, start, column, s_gt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BM, BN]
        b_dp = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)  # [BM, BN]
        # Pointers that differ by constants alone take no registers of their own.
        m_row = o_row < T if MASKED else None
        other = 0.0 if MASKED else None
        b_p = tl.exp2(b_s * scale - tl.load(p_lse + start + o_n, mask=m_row, other=other)[None, :])
        if MASKED:
            m_s = (o_row[None, :] >= b_first[:, None]) & (o_row[None, :] < b_limit[:, None])
            b_p = tl.where(m_s, b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
        b_ds = b_p * (b_dp - tl.load(p_delta + start + o_n, mask=m_row, other=other)[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "num_seqs", "window", "reach", "together"])
def block_attention_dkv(
    p_k,
    p_v,
    p_q,
    p_g,
    p_offset,
    p_cu,
    p_rows,
    p_dk,
    p_dv,
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
    s_gt,
    s_gh,
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
    """One block of keys of one key head, against the rows of every query head that reads it: no atomics."""
    i_m, i_h = block_and_head(tl.program_id(0), tl.cdiv(T, BLOCK_M), HQ // GROUP, together)
    o_key = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    b_first, b_limit = row_range(tl.minimum(o_key, T - 1), p_cu, p_offset, T, num_seqs, window, reach, STEPS)
    bounds = tile_loop_bounds(b_first, b_limit, BLOCK_N)

    b_k = load_rows(p_k + i_h.to(tl.int64) * s_kh, o_key, s_kt, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_v = load_rows(p_v + i_h.to(tl.int64) * s_vh, o_key, s_vt, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_g in range(GROUP):
        head = (i_h * GROUP + i_g).to(tl.int64)
        column = (i_h * GROUP + i_g) * D
        p_qh = p_q if TMA else p_q + head * s_qh
        p_gh = p_g if TMA else p_g + head * s_gh
        p_lse = p_rows + head * T
        p_delta = p_lse + tl.cast(T, tl.int64) * HQ
        for part in tl.static_range(3):
            b_dk, b_dv = dkv_tiles(
                b_dk,
                b_dv,
                b_k,
                b_v,
                p_qh,
                p_gh,
                p_lse,
                p_delta,
                column,
                s_qt,
                s_gt,
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
            )
    heads = HQ // GROUP * D
    store_rows(p_dk + i_h * D, o_key, heads, o_d, T, b_dk * scale, D)
    store_rows(p_dv + i_h * D, o_key, heads, o_d, T, b_dv, D)


@implementation("block_attention_backward", "triton")
def block_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
    reach: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad_out = rows_contiguous(q, k, v, grad_out)
    out, lse, num_seqs = out.contiguous(), lse.contiguous(), offset.numel()
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    if q.numel() == 0 or num_seqs == 0:
        return tuple(grad.zero_() for grad in grads)
    of_rows, constants = lse.new_empty(2, *lse.T.shape), shape_constants(q, k, cu_seqlens)
    offset, cu_seqlens = offset.contiguous(), contiguous(cu_seqlens)
    sizes = q.shape[0], num_seqs, *limits(window, reach), scale
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad_out.stride()[:2]
    lse_strides = (0, 0) if grad_lse is None else grad_lse.stride()
    args = offset, cu_seqlens, out, lse, grad_lse, grads[0], of_rows, *sizes, *strides, *lse_strides
    more = constants | {"HAS_H": grad_lse is not None}
    launch(block_attention_dq, "block_dq", (q, grad_out), (k, v), args, more)
    args = offset, cu_seqlens, of_rows, grads[1], grads[2], *sizes, *strides
    launch(block_attention_dkv, "block_dkv", (k, v), (q, grad_out), args, constants)
    return tuple(grads)
