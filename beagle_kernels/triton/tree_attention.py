"""`tree_attention` in Triton: few queries, a long cache, so the keys are split among programs and combined.

The nodes' query heads that share a key head are packed into the rows of one tile. How many splits do work follows from
the lengths on the device; the grid follows from shapes alone, so a captured graph serves every length. The prefix runs
without mask; the tree's slots start at a tile, so that tile w takes word w of the ancestor masks. Of several words, as
where they show a window of keys, each split takes its share. With `starts` the keys begin at the least of a row's. A
single split writes the output itself, unless there are sinks to be taken off.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import implementation
from ..extension import contiguous
from .configs import Config, architecture, choose, tune
from .tiles import LN2, LOG2E, block_d, positive_scale, rows_contiguous, softmax_step, tanh
from .tree_combine import combine
from .tree_splits import first_slot, kind_of, running_at_once, splits_in_use, splits_of, tiles


@triton.jit
def load_slots(
    p_base,
    o_slot,
    m_slot,
    p_table,
    num_pages,
    page,
    s_page,
    s_slot,
    o_d,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGED: tl.constexpr,
    MASKED: tl.constexpr,
):
    if PAGED:
        p_entry = p_table + o_slot // page
        b_page = tl.load(p_entry, mask=m_slot, other=0) if MASKED else tl.load(p_entry)
        b_page = tl.minimum(tl.maximum(b_page, 0), num_pages - 1).to(tl.int64)
        o_row = b_page * s_page + (o_slot % page).to(tl.int64) * s_slot
    else:
        o_row = o_slot.to(tl.int64) * s_slot
    p_row = p_base + o_row[:, None] + o_d[None, :]
    if MASKED:
        return tl.load(p_row, mask=m_slot[:, None] & (o_d[None, :] < D), other=0.0)
    elif D == BLOCK_D:
        return tl.load(p_row)
    else:
        return tl.load(p_row, mask=o_d[None, :] < D, other=0.0)


@triton.jit
def attend(b_acc, b_max, b_sum, b_q, b_k, b_v, m_s, scale, squash, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")  # [BM, BN]
    if SOFTCAP:
        b_s = tanh(b_s * squash)
    b_p, b_decay, b_max = softmax_step(b_s, b_max, m_s, scale, MASKED)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="tf32x3")
    return b_acc, b_max, b_sum * b_decay + tl.sum(b_p, 1)


@triton.jit
def either(a, b):
    return a | b


# What may change from one call of a loop to the next is not specialised, so nothing is compiled in its midst.
@triton.jit(do_not_specialize="N slots num_pages page splits s_mb s_mn s_mw s_tb".split())
def tree_attention_splits(
    p_q,
    p_k,
    p_v,
    p_lengths,
    p_mask,
    p_table,
    p_starts,
    p_part,
    p_part_lse,
    p_out,
    N,
    slots,
    num_pages,
    page,
    splits,
    scale,
    squash,
    s_qb,
    s_qn,
    s_qh,
    s_kb,
    s_kh,
    s_ks,
    s_vb,
    s_vh,
    s_vs,
    s_mb,
    s_mn,
    s_mw,
    s_tb,
    HQ: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    NODES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIRECT: tl.constexpr,
):
    # Tiles of the same keys follow each other, so that all but one of them find the keys in the cache.
    tiles = tl.cdiv(N * GROUP, BLOCK_M)
    i_m, i_plane, i_split = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    i_h, i_b = i_plane % (HQ // GROUP), (i_plane // (HQ // GROUP)).to(tl.int64)
    length, base = tl.minimum(tl.maximum(tl.load(p_lengths + i_b), 0), slots), 0
    if NODES:
        base = first_slot(p_starts + i_b * N, N, length, NODES)
    in_use = splits_in_use(length - base, WORDS, splits)
    if i_split >= in_use:
        return
    o_row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_node, o_head = o_row // GROUP, i_h * GROUP + o_row % GROUP
    m_row = o_node < N
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_row = p_q + i_b * s_qb + o_node.to(tl.int64) * s_qn + o_head.to(tl.int64) * s_qh
    b_q = tl.load(p_row[:, None] + o_d[None, :], mask=m_row[:, None] & (o_d[None, :] < D), other=0.0)  # [BM, BD]
    p_k += i_h.to(tl.int64) * s_kh
    p_v += i_h.to(tl.int64) * s_vh
    if PAGED:
        p_table += i_b * s_tb
    else:
        p_k += i_b * s_kb
        p_v += i_b * s_vb
    scale *= LOG2E
    if NODES:
        b_start = tl.maximum(tl.load(p_starts + i_b * N + o_node, mask=m_row, other=0), 0)  # [BM]
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)

    # The first splits have a block more: the last one has the tree besides, if its mask is one word.
    blocks = tl.cdiv(length - base, BLOCK_N)
    share, more = blocks // in_use, blocks % in_use
    lo = base + (i_split * share + tl.minimum(i_split, more)) * BLOCK_N
    hi = tl.minimum(lo + (share + (i_split < more)) * BLOCK_N, length)
    full_hi = lo + (hi - lo) // BLOCK_N * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    # Blocks up to `mid` hold slots below some node's start.
    mid = lo
    if NODES:
        mid += tl.cdiv(tl.maximum(tl.minimum(tl.max(b_start, 0), full_hi) - lo, 0), BLOCK_N) * BLOCK_N
    for start in range(mid, full_hi, BLOCK_N):
        o_slot = start + o_n
        b_k = load_slots(p_k, o_slot, None, p_table, num_pages, page, s_kb, s_ks, o_d, D, BLOCK_D, PAGED, False)
        b_v = load_slots(p_v, o_slot, None, p_table, num_pages, page, s_vb, s_vs, o_dv, DV, BLOCK_DV, PAGED, False)
        b_acc, b_max, b_sum = attend(b_acc, b_max, b_sum, b_q, b_k, b_v, None, scale, squash, False, SOFTCAP)
    if NODES:
        # The last block, where it is not whole, comes after those below `mid`; stages for so few would spill.
        for i in tl.range(0, (mid - lo) // BLOCK_N + (full_hi < hi), num_stages=1):
            start = lo + i * BLOCK_N
            o_slot = tl.where(start < mid, start, full_hi) + o_n
            m_slot = o_slot < hi
            b_k = load_slots(p_k, o_slot, m_slot, p_table, num_pages, page, s_kb, s_ks, o_d, D, BLOCK_D, PAGED, True)
            b_v = load_slots(p_v, o_slot, m_slot, p_table, num_pages, page, s_vb, s_vs, o_dv, DV, BLOCK_DV, PAGED, True)
            m_s = m_slot[None, :] & (o_slot[None, :] >= b_start[:, None])
            b_acc, b_max, b_sum = attend(b_acc, b_max, b_sum, b_q, b_k, b_v, m_s, scale, squash, True, SOFTCAP)
    elif full_hi < hi:
        o_slot = full_hi + o_n
        m_slot = o_slot < hi
        b_k = load_slots(p_k, o_slot, m_slot, p_table, num_pages, page, s_kb, s_ks, o_d, D, BLOCK_D, PAGED, True)
        b_v = load_slots(p_v, o_slot, m_slot, p_table, num_pages, page, s_vb, s_vs, o_dv, DV, BLOCK_DV, PAGED, True)
        b_acc, b_max, b_sum = attend(b_acc, b_max, b_sum, b_q, b_k, b_v, m_slot[None, :], scale, squash, True, SOFTCAP)
    BITS: tl.constexpr = min(BLOCK_N, 64)
    first, last = 0, WORDS * 64
    if WORDS > 1:
        first = i_split * (WORDS * 64 // BITS) // in_use * BITS
        last = (i_split + 1) * (WORDS * 64 // BITS) // in_use * BITS
    if WORDS > 1 or i_split == in_use - 1:
        o_bit = tl.arange(0, BITS)
        for start in range(first, last, BITS):
            p_word = p_mask + i_b * s_mb + o_node.to(tl.int64) * s_mn + start // 64 * s_mw
            b_word = tl.load(p_word, mask=m_row, other=0) >> start % 64  # [BM]
            o_slot = length + start + o_bit
            if NODES:
                b_hidden = tl.maximum(b_start - length - start, 0)
                b_word = tl.where(b_hidden < 64, b_word & (-1 << tl.minimum(b_hidden, 63).to(tl.int64)), 0)
            # A slot that no row sees may hold anything, NaN included: it is not read.
            m_slot = ((tl.reduce(b_word, 0, either) >> o_bit) & 1 != 0) & (o_slot < slots)
            m_s = ((b_word[:, None] >> o_bit[None, :]) & 1 != 0) & m_slot[None, :]
            b_k = load_slots(p_k, o_slot, m_slot, p_table, num_pages, page, s_kb, s_ks, o_d, D, BLOCK_D, PAGED, True)
            b_v = load_slots(p_v, o_slot, m_slot, p_table, num_pages, page, s_vb, s_vs, o_dv, DV, BLOCK_DV, PAGED, True)
            b_acc, b_max, b_sum = attend(b_acc, b_max, b_sum, b_q, b_k, b_v, m_s, scale, squash, True, SOFTCAP)

    b_safe = tl.where(b_sum > 0, b_sum, 1.0)
    b_acc = b_acc / b_safe[:, None]
    o_part = ((i_b * N + o_node) * HQ + o_head) * splits + i_split
    o_out = o_part[:, None] * DV + o_dv[None, :]
    m_out = m_row[:, None] & (o_dv[None, :] < DV)
    if DIRECT:
        tl.store(p_out + o_out, b_acc.to(p_out.dtype.element_ty), mask=m_out)
    else:
        tl.store(p_part + o_out, b_acc, mask=m_out)
        tl.store(p_part_lse + o_part, (b_max + tl.log2(b_safe)) * LN2, mask=m_row)


@implementation("tree_attention", "triton")
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    mask: Tensor,
    block_table: Tensor | None,
    scale: float,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    q, scale = positive_scale(q, scale)
    q, k, v = rows_contiguous(q, k, v)
    batch, nodes, heads, width = q.shape
    value_width = v.shape[3]
    out = q.new_empty(batch, nodes, heads, value_width)
    slots = k.shape[2] * (1 if block_table is None else block_table.shape[1])
    if q.numel() == 0 or slots == 0 or k.shape[0] == 0:
        return out.zero_()
    group, wide, wide_v = heads // k.shape[1], block_d(width), block_d(value_width)
    config = choose(kind_of(nodes * group), architecture(q.device), max(wide, wide_v), q.dtype)
    paged = block_table is not None
    config = tiles(config, nodes * group, max(wide, wide_v), paged)
    blocks = triton.cdiv(nodes * group, config.block_m) * k.shape[1] * batch
    at_once = running_at_once(config, wide, wide_v, paged, q)
    splits = splits_of(blocks, slots, at_once)
    # not where the cache is short: growing, it would have another kernel compiled
    direct = at_once < 2 * blocks and sinks is None
    part = q.new_empty(0 if direct else (*q.shape[:3], splits, value_width), dtype=torch.float32)
    part_lse = q.new_empty(0 if direct else (*q.shape[:3], splits), dtype=torch.float32)
    if block_table is not None and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    lengths, starts, sinks = lengths.contiguous(), contiguous(starts), contiguous(sinks)
    # a cap squashes scores to -1 .. 1 and makes softcap of 1
    scale, squash = (scale, 0.0) if softcap is None else (softcap, scale / softcap)
    sizes = nodes, slots, k.shape[0], k.shape[2], splits, scale, squash
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask.stride()
    # as many variants as there are of the words of ancestor masks
    read = 0 if starts is None else 64 * triton.next_power_of_2(triton.cdiv(nodes, 64))
    with torch.cuda.device_of(q):
        tree_attention_splits[(blocks, splits)](
            q,
            k,
            v,
            lengths,
            mask,
            block_table,
            starts,
            part,
            part_lse,
            out,
            *sizes,
            *strides,
            0 if block_table is None else block_table.stride(0),
            HQ=heads,
            NODES=read,
            D=width,
            DV=value_width,
            BLOCK_D=wide,
            BLOCK_DV=wide_v,
            GROUP=group,
            WORDS=mask.shape[2],
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            PAGED=paged,
            SOFTCAP=softcap is not None,
            DIRECT=direct,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    if not direct:
        combine(part, part_lse, lengths, starts, sinks, out, slots, mask.shape[2], read)
    return out


def tune_tree_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, mask: Tensor, block_table: Tensor | None = None
) -> Config:
    """On request: find the fastest tiles for calls like this one, and use them from here on."""
    args = q, k, v, lengths, mask, block_table, q.shape[-1] ** -0.5
    kind = kind_of(q.shape[1] * (q.shape[2] // k.shape[1]))
    head_size = max(block_d(q.shape[-1]), block_d(v.shape[-1]))
    return tune(kind, architecture(q.device), head_size, q.dtype, lambda: tree_attention(*args))
