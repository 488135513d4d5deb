"""Which rows see which keys, in closed form: sequences by bisection in cu_seqlens, windows by arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MOST_WINDOW = 1 << 29
"""A longer window or reach sees what this one sees; it keeps the kernels' sums in 32 bits."""


def bisection_steps(cu_seqlens: Tensor | None) -> int:
    """Enough for these sequences, in few sizes, as each is a compilation; 0: there is only one."""
    return 0 if cu_seqlens is None else next(n for n in (4, 8, 16, 31) if cu_seqlens.numel() <= 2**n)


def limits(window: int, reach: int | None) -> tuple[int, int | None]:
    """Both as the kernels take them; without a reach they are compiled without its arithmetic."""
    return min(window, MOST_WINDOW), None if reach is None else min(reach, MOST_WINDOW)


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
def key_range(o_row, p_cu, p_offset, T, num_seqs, window, reach, STEPS: tl.constexpr):
    """The keys [first, limit) that each row sees; limit = first where it sees none. A reach of None: no limit."""
    b_first, b_end, b_begin = sequence_of(o_row, p_cu, p_offset, T, num_seqs, window, STEPS)
    b_since = o_row - b_begin
    b_limit = tl.where((b_since >= 0) & (b_end > b_first), o_row - b_since % window, b_first)
    if reach is not None:
        b_first = tl.maximum(b_first, o_row - reach)
    return b_first, tl.maximum(b_limit, b_first)


@triton.jit
def row_range(o_key, p_cu, p_offset, T, num_seqs, window, reach, STEPS: tl.constexpr):
    """The rows [first, limit) that see each key: those of the windows that start after it, up to `reach` after it."""
    b_start, b_end, b_begin = sequence_of(o_key, p_cu, p_offset, T, num_seqs, window, STEPS)
    b_first = b_begin + (tl.maximum(o_key + 1 - b_begin, 0) + window - 1) // window * window
    b_first = tl.minimum(tl.maximum(b_first, b_start), b_end)
    if reach is not None:
        b_end = tl.maximum(tl.minimum(b_end, o_key + reach + 1), b_first)
    return b_first, b_end


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
