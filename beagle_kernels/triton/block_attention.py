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

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_bound(p_cu, b_seq, T):
    return tl.minimum(tl.maximum(tl.load(p_cu + b_seq), 0), T)


@triton.jit
def load_offset(p_offset, b_seq, T, window):
    """Brought near the sequence, where it means the same, so that no sum overflows."""
    b_offset = tl.load(p_offset + b_seq)
    return tl.where(b_offset < 0, b_offset % window, tl.minimum(b_offset, T))


@triton.jit
def sequence_of(o_row, p_cu, p_offset, T, num_seqs, window, STEPS: tl.constexpr):
    """First row, end and first window of each row's sequence; end = first for a row outside all. STEPS 0: only one."""
    b_zero = o_row * 0
    if STEPS > 0:
        b_low = b_zero
        b_high = b_low + num_seqs
        for _ in tl.static_range(STEPS):
            b_mid = tl.minimum((b_low + b_high) // 2, num_seqs - 1)
            m_right = (b_low < b_high) & (load_bound(p_cu, b_mid + 1, T) <= o_row)
            b_high = tl.where(m_right, b_high, tl.minimum(b_mid, b_high))
            b_low = tl.where(m_right, b_mid + 1, b_low)
        b_seq = tl.minimum(b_low, num_seqs - 1)
        b_first = load_bound(p_cu, b_seq, T)
        m_inside = (b_low < num_seqs) & (b_first <= o_row)
        b_end = tl.where(m_inside, load_bound(p_cu, b_seq + 1, T), b_first)
        return b_first, b_end, b_first + load_offset(p_offset, b_seq, T, window)
    else:
        return b_zero, b_zero + T, load_offset(p_offset, b_zero, T, window)


@triton.jit
def key_range(o_row, p_cu, p_offset, T, num_seqs, window, STEPS: tl.constexpr):
    """The keys [first, limit) that each row sees; limit = first where it sees none."""
    b_first, b_end, b_begin = sequence_of(o_row, p_cu, p_offset, T, num_seqs, window, STEPS)
    b_since = o_row - b_begin
    b_limit = tl.where((b_since >= 0) & (b_end > b_first), o_row - b_since % window, b_first)
    return b_first, tl.maximum(b_limit, b_first)


@triton.jit
def row_range(o_key, p_cu, p_offset, T, num_seqs, window, STEPS: tl.constexpr):
    """The rows [first, limit) that see each key: those of the windows that start after it."""
    b_start, b_end, b_begin = sequence_of(o_key, p_cu, p_offset, T, num_seqs, window, STEPS)
    b_first = b_begin + (tl.maximum(o_key + 1 - b_begin, 0) + window - 1) // window * window
    return tl.minimum(tl.maximum(b_first, b_start), b_end), b_end


@triton.jit
def tile_loop_bounds(b_first, b_limit, BLOCK_N: tl.constexpr):
    """Tiles start at lo; those in [full_lo, full_hi) lie in every range [first, limit), those past hi in none."""
    m_sees = b_limit > b_first
    lo = tl.min(tl.where(m_sees, b_first, 2147483647))
    hi = tl.max(tl.where(m_sees, b_limit, 0))
    lo = tl.minimum(lo, hi)
    full_lo = lo + tl.cdiv(tl.max(b_first) - lo, BLOCK_N) * BLOCK_N
    full_hi = tl.minimum(lo + tl.maximum(tl.min(b_limit) - lo, 0) // BLOCK_N * BLOCK_N, hi)
    full_lo = tl.maximum(tl.minimum(full_lo, hi), lo)
    return lo, full_lo, tl.maximum(full_hi, full_lo), hi


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
    p_base, start, column, stride, o_d, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
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
def forward_tiles(
    b_acc, b_max, b_sum, b_q, p_k, p_v, column, s_kt, s_vt, lo, hi, b_first, b_limit, o_d, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):
    o_n = tl.arange(0, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        o_key = start + o_n
        b_k = load_block(p_k, start, column, s_kt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        m_s = (o_key[None, :] >= b_first[:, None]) & (o_key[None, :] < b_limit[:, None]) if MASKED else None
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
        b_p, b_decay, b_max = softmax_step(b_s, b_max, m_s, scale, MASKED)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_v = load_block(p_v, start, column, s_vt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="ieee")
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=["T", "num_seqs", "window"])
def forward_kernel(
    p_q, p_k, p_v, p_offset, p_cu, p_out, p_lse, T, num_seqs, window, scale,
    s_qt, s_qh, s_kt, s_kh, s_vt, s_vh,
    HQ: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, TMA: tl.constexpr,
):
    # Late rows have the most keys: they start first.
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1)
    o_row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_inside = tl.minimum(o_row, T - 1)
    b_first, b_limit = key_range(o_inside, p_cu, p_offset, T, num_seqs, window, STEPS)
    lo, full_lo, full_hi, hi = tile_loop_bounds(b_first, b_limit, BLOCK_N)

    column = i_h // GROUP * D
    if not TMA:
        p_k += (i_h // GROUP).to(tl.int64) * s_kh
        p_v += (i_h // GROUP).to(tl.int64) * s_vh
    b_q = load_rows(p_q + i_h.to(tl.int64) * s_qh, o_row, s_qt, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    scale *= LOG2E
    if STEPS > 0:
        b_acc, b_max, b_sum = forward_tiles(
            b_acc, b_max, b_sum, b_q, p_k, p_v, column, s_kt, s_vt, lo, full_lo, b_first, b_limit, o_d, T, scale,
            D, BLOCK_D, BLOCK_N, True, TMA,
        )
    b_acc, b_max, b_sum = forward_tiles(
        b_acc, b_max, b_sum, b_q, p_k, p_v, column, s_kt, s_vt, full_lo, full_hi, b_first, b_limit, o_d, T, scale,
        D, BLOCK_D, BLOCK_N, False, TMA,
    )
    b_acc, b_max, b_sum = forward_tiles(
        b_acc, b_max, b_sum, b_q, p_k, p_v, column, s_kt, s_vt, full_hi, hi, b_first, b_limit, o_d, T, scale,
        D, BLOCK_D, BLOCK_N, True, TMA,
    )
    m_sees = b_limit > b_first
    b_safe = tl.where(m_sees, b_sum, 1.0)
    store_rows(p_out + i_h * D, o_row, HQ * D, o_d, T, b_acc / b_safe[:, None], D)
    b_lse = tl.where(m_sees, (b_max + tl.log2(b_safe)) * LN2, float("-inf"))
    tl.store(p_lse + o_row.to(tl.int64) * HQ + i_h, b_lse, mask=o_row < T)


@triton.jit
def dq_tiles(
    b_dq, b_q, b_g, b_lse, b_delta, p_k, p_v, column, s_kt, s_vt, lo, hi, b_first, b_limit, o_d, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):
    o_n = tl.arange(0, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        o_key = start + o_n
        b_k = load_block(p_k, start, column, s_kt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        b_v = load_block(p_v, start, column, s_vt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale - b_lse[:, None])  # [BM, BN]
        if MASKED:
            m_s = (o_key[None, :] >= b_first[:, None]) & (o_key[None, :] < b_limit[:, None])
            b_p = tl.where(m_s, b_p, 0.0)
        b_ds = b_p * (tl.dot(b_g, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit(do_not_specialize=["T", "num_seqs", "window", "s_ht", "s_hh"])
def dq_kernel(
    p_q, p_g, p_k, p_v, p_offset, p_cu, p_out, p_lse, p_h, p_dq, p_delta, T, num_seqs, window, scale,
    s_qt, s_qh, s_kt, s_kh, s_vt, s_vh, s_gt, s_gh, s_ht, s_hh,
    HQ: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, TMA: tl.constexpr, HAS_H: tl.constexpr,
):
    """dQ, and on the way delta = g . out - h, which the kernel of dK and dV reads."""
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1)
    o_row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_row < T
    o_flat = o_row.to(tl.int64) * HQ + i_h
    b_first, b_limit = key_range(tl.minimum(o_row, T - 1), p_cu, p_offset, T, num_seqs, window, STEPS)
    lo, full_lo, full_hi, hi = tile_loop_bounds(b_first, b_limit, BLOCK_N)

    b_q = load_rows(p_q + i_h.to(tl.int64) * s_qh, o_row, s_qt, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_g = load_rows(p_g + i_h.to(tl.int64) * s_gh, o_row, s_gt, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_out = load_rows(p_out + i_h * D, o_row, HQ * D, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_delta = tl.sum(b_g.to(tl.float32) * b_out.to(tl.float32), 1)
    if HAS_H:
        b_delta -= tl.load(p_h + o_row.to(tl.int64) * s_ht + i_h.to(tl.int64) * s_hh, mask=m_row, other=0.0)
    tl.store(p_delta + o_flat, b_delta, mask=m_row)
    b_lse = tl.load(p_lse + o_flat, mask=m_row, other=0.0) * LOG2E
    column = i_h // GROUP * D
    if not TMA:
        p_k += (i_h // GROUP).to(tl.int64) * s_kh
        p_v += (i_h // GROUP).to(tl.int64) * s_vh
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if STEPS > 0:
        b_dq = dq_tiles(
            b_dq, b_q, b_g, b_lse, b_delta, p_k, p_v, column, s_kt, s_vt, lo, full_lo, b_first, b_limit, o_d, T,
            scale * LOG2E, D, BLOCK_D, BLOCK_N, True, TMA,
        )
    b_dq = dq_tiles(
        b_dq, b_q, b_g, b_lse, b_delta, p_k, p_v, column, s_kt, s_vt, full_lo, full_hi, b_first, b_limit, o_d, T,
        scale * LOG2E, D, BLOCK_D, BLOCK_N, False, TMA,
    )
    b_dq = dq_tiles(
        b_dq, b_q, b_g, b_lse, b_delta, p_k, p_v, column, s_kt, s_vt, full_hi, hi, b_first, b_limit, o_d, T,
        scale * LOG2E, D, BLOCK_D, BLOCK_N, True, TMA,
    )
    store_rows(p_dq + i_h * D, o_row, HQ * D, o_d, T, b_dq * scale, D)


@triton.jit
def dkv_tiles(
    b_dk, b_dv, b_k, b_v, p_q, p_g, p_lse, p_delta, column, s_qt, s_gt, lo, hi, b_first, b_limit, o_d, T, scale,
    HQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    o_n = tl.arange(0, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        o_row = start + o_n
        b_q = load_block(p_q, start, column, s_qt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        b_g = load_block(p_g, start, column, s_gt, o_d, T, D, BLOCK_D, BLOCK_N, MASKED, TMA)  # [BN, BD]
        o_flat = (tl.minimum(o_row, T - 1) if MASKED else o_row).to(tl.int64) * HQ
        b_lse = tl.load(p_lse + o_flat) * LOG2E
        b_delta = tl.load(p_delta + o_flat)
        b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale - b_lse[None, :])  # [BM, BN]
        if MASKED:
            m_s = (o_row[None, :] >= b_first[:, None]) & (o_row[None, :] < b_limit[:, None])
            b_p = tl.where(m_s, b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision="ieee")
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_g), input_precision="ieee") - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "num_seqs", "window"])
def dkv_kernel(
    p_k, p_v, p_q, p_g, p_offset, p_cu, p_lse, p_delta, p_dk, p_dv, T, num_seqs, window, scale,
    s_qt, s_qh, s_kt, s_kh, s_vt, s_vh, s_gt, s_gh,
    HQ: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, TMA: tl.constexpr,
):
    """One block of keys of one key head, against the rows of every query head that reads it: no atomics."""
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    o_key = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    b_first, b_limit = row_range(tl.minimum(o_key, T - 1), p_cu, p_offset, T, num_seqs, window, STEPS)
    lo, full_lo, full_hi, hi = tile_loop_bounds(b_first, b_limit, BLOCK_N)

    b_k = load_rows(p_k + i_h.to(tl.int64) * s_kh, o_key, s_kt, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_v = load_rows(p_v + i_h.to(tl.int64) * s_vh, o_key, s_vt, o_d, T, D, BLOCK_D, True)  # [BM, BD]
    b_dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_g in range(GROUP):
        head = (i_h * GROUP + i_g).to(tl.int64)
        column = (i_h * GROUP + i_g) * D
        p_qh = p_q if TMA else p_q + head * s_qh
        p_gh = p_g if TMA else p_g + head * s_gh
        b_dk, b_dv = dkv_tiles(
            b_dk, b_dv, b_k, b_v, p_qh, p_gh, p_lse + head, p_delta + head, column, s_qt, s_gt,
            lo, full_lo, b_first, b_limit, o_d, T, scale * LOG2E, HQ, D, BLOCK_D, BLOCK_N, True, TMA,
        )
        b_dk, b_dv = dkv_tiles(
            b_dk, b_dv, b_k, b_v, p_qh, p_gh, p_lse + head, p_delta + head, column, s_qt, s_gt,
            full_lo, full_hi, b_first, b_limit, o_d, T, scale * LOG2E, HQ, D, BLOCK_D, BLOCK_N, False, TMA,
        )
        b_dk, b_dv = dkv_tiles(
            b_dk, b_dv, b_k, b_v, p_qh, p_gh, p_lse + head, p_delta + head, column, s_qt, s_gt,
            full_hi, hi, b_first, b_limit, o_d, T, scale * LOG2E, HQ, D, BLOCK_D, BLOCK_N, True, TMA,
        )
    heads = HQ // GROUP * D
    store_rows(p_dk + i_h * D, o_key, heads, o_d, T, b_dk * scale, D)
    store_rows(p_dv + i_h * D, o_key, heads, o_d, T, b_dv, D)


MOST_WINDOW = 1 << 29
"""A longer window sees what this one sees; it keeps the kernels' sums in 32 bits."""


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


def _shape(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> dict:
    """Constants of the kernels that follow from the shapes; bisection steps in few sizes, as each is a compilation."""
    heads, width = q.shape[1:]
    steps = 0 if cu_seqlens is None else next(n for n in (4, 8, 16, 31) if cu_seqlens.numel() <= 2**n)
    return dict(HQ=heads, GROUP=heads // k.shape[1], D=width, BLOCK_D=block_d(width), STEPS=steps)


def _readable_by_tma(x: Tensor) -> bool:
    """Whether [T, H, D] is rows of H D numbers, each at a multiple of 16 bytes, of heads that need no padding."""
    heads, width = x.shape[1:]
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.stride(1) == width == block_d(width) and x.stride(0) >= heads * width


def _launch(
    kernel, name: str, heads: int, held: tuple[Tensor, ...], streamed: tuple[Tensor, ...], args: tuple, constants: dict
) -> None:
    """The kernel takes the tensors it holds a block of, then those it streams blocks of."""
    rows, device, dtype = held[0].shape[0], held[0].device, held[0].dtype
    tma = all(map(_readable_by_tma, streamed))
    config = choose(name, architecture(device), constants["BLOCK_D"], dtype, tma)
    if config.tma:
        block = [config.block_n, constants["BLOCK_D"]]
        streamed = tuple(
            TensorDescriptor(x, [rows, x.shape[1] * x.shape[2]], [x.stride(0), 1], block) for x in streamed
        )
    grid = (triton.cdiv(rows, config.block_m), heads)
    tiles = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, TMA=config.tma)
    with torch.cuda.device_of(held[0]):
        kernel[grid](
            *held, *streamed, *args, **constants, **tiles, num_warps=config.warps, num_stages=config.stages,
            enable_fp_fusion=True,
        )  # fmt: skip


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
    _launch(forward_kernel, "block_forward", q.shape[1], (q,), (k, v), args, _shape(q, k, cu_seqlens))
    return out, lse


@implementation("block_attention_backward", "triton")
def block_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    offset: Tensor, cu_seqlens: Tensor | None, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad_out = rows_contiguous(q, k, v, grad_out)
    out, lse, num_seqs = out.contiguous(), lse.contiguous(), offset.numel()
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    if q.numel() == 0 or num_seqs == 0:
        return tuple(grad.zero_() for grad in grads)
    delta, constants = torch.empty_like(lse), _shape(q, k, cu_seqlens)
    offset, cu_seqlens = offset.contiguous(), contiguous(cu_seqlens)
    sizes = q.shape[0], num_seqs, min(window, MOST_WINDOW), scale
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad_out.stride()[:2]
    lse_strides = (0, 0) if grad_lse is None else grad_lse.stride()
    args = offset, cu_seqlens, out, lse, grad_lse, grads[0], delta, *sizes, *strides, *lse_strides
    more = constants | {"HAS_H": grad_lse is not None}
    _launch(dq_kernel, "block_dq", q.shape[1], (q, grad_out), (k, v), args, more)
    args = offset, cu_seqlens, lse, delta, grads[1], grads[2], *sizes, *strides
    _launch(dkv_kernel, "block_dkv", k.shape[1], (k, v), (q, grad_out), args, constants)
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
