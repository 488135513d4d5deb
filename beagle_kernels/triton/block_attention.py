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
from .configs import Config, architecture, choose, tune
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
from .windows import MOST_WINDOW, bisection_steps, key_range, row_range, tile_loop_bounds


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


@triton.jit(do_not_specialize=["T", "num_seqs", "window", "together"])
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
    b_first, b_limit = key_range(tl.minimum(o_row, T - 1), p_cu, p_offset, T, num_seqs, window, STEPS)
    bounds = tile_loop_bounds(b_first, b_limit, BLOCK_N)

    column = i_h // GROUP * D
    if not TMA:
        p_k += (i_h // GROUP).to(tl.int64) * s_kh
        p_v += (i_h // GROUP).to(tl.int64) * s_vh
    b_q = load_rows(p_q + i_h.to(tl.int64) * s_qh, o_row, s_qt, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(0 if STEPS > 0 else 1, 3):
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


@triton.jit(do_not_specialize=["T", "num_seqs", "window", "s_ht", "s_hh", "together"])
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
    b_first, b_limit = key_range(tl.minimum(o_row, T - 1), p_cu, p_offset, T, num_seqs, window, STEPS)
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
    for part in tl.static_range(0 if STEPS > 0 else 1, 3):
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
        b_p = tl.exp2(b_s * scale - tl.load(p_lse + start + o_n, mask=m_row)[None, :])
        if MASKED:
            m_s = (o_row[None, :] >= b_first[:, None]) & (o_row[None, :] < b_limit[:, None])
            b_p = tl.where(m_s, b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
        b_ds = b_p * (b_dp - tl.load(p_delta + start + o_n, mask=m_row)[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "num_seqs", "window", "together"])
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
    b_first, b_limit = row_range(tl.minimum(o_key, T - 1), p_cu, p_offset, T, num_seqs, window, STEPS)
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


def _shape(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> dict:
    """Constants of the kernels that follow from the shapes."""
    heads, width = q.shape[1:]
    return dict(HQ=heads, GROUP=heads // k.shape[1], D=width, BLOCK_D=block_d(width), STEPS=bisection_steps(cu_seqlens))


def _launch(
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
    q: Tensor, k: Tensor, v: Tensor, offset: Tensor, cu_seqlens: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    q, scale = positive_scale(q, scale)
    q, k, v = rows_contiguous(q, k, v)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    num_seqs = offset.numel()
    if q.numel() == 0 or num_seqs == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    sizes = q.shape[0], num_seqs, min(window, MOST_WINDOW), scale
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
    args = offset.contiguous(), contiguous(cu_seqlens), out, lse, *sizes, *strides
    _launch(block_attention_forward, "block_forward", (q,), (k, v), args, _shape(q, k, cu_seqlens))
    return out, lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad_out = rows_contiguous(q, k, v, grad_out)
    out, lse, num_seqs = out.contiguous(), lse.contiguous(), offset.numel()
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    if q.numel() == 0 or num_seqs == 0:
        return tuple(grad.zero_() for grad in grads)
    of_rows, constants = lse.new_empty(2, *lse.T.shape), _shape(q, k, cu_seqlens)
    offset, cu_seqlens = offset.contiguous(), contiguous(cu_seqlens)
    sizes = q.shape[0], num_seqs, min(window, MOST_WINDOW), scale
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad_out.stride()[:2]
    lse_strides = (0, 0) if grad_lse is None else grad_lse.stride()
    args = offset, cu_seqlens, out, lse, grad_lse, grads[0], of_rows, *sizes, *strides, *lse_strides
    more = constants | {"HAS_H": grad_lse is not None}
    _launch(block_attention_dq, "block_dq", (q, grad_out), (k, v), args, more)
    args = offset, cu_seqlens, of_rows, grads[1], grads[2], *sizes, *strides
    _launch(block_attention_dkv, "block_dkv", (k, v), (q, grad_out), args, constants)
    return tuple(grads)


def tune_block_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, offset: Tensor, cu_seqlens: Tensor | None = None
) -> dict[str, Config]:
    """On request: find the fastest tiles for calls like this one, forward and backward, and use them from here on."""
    args = offset, cu_seqlens, window, q.shape[-1] ** -0.5
    out, lse = block_attention(q, k, v, *args)
    key = architecture(q.device), block_d(q.shape[-1]), q.dtype
    forward, backward = lambda: block_attention(q, k, v, *args), lambda: block_attention_backward(*grads, *args)
    grads = torch.randn_like(out), None, q, k, v, out, lse
    runs = {"block_forward": forward, "block_dq": backward, "block_dkv": backward}
    return {kernel: tune(kernel, *key, run) for kernel, run in runs.items()}
