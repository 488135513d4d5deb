"""What the splits of `tree_attention` in Triton found, put together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import LOG2E, block_d
from .tree_splits import MOST_SPLITS, first_slot, splits_in_use

TILES = {8: 128, 64: 64, MOST_SPLITS: 32}
"""Splits that a program reads at once -> columns of the values, 4,096 numbers at most. There are few sizes, as each is
a compilation; which one serves follows from shapes alone."""


@triton.jit(do_not_specialize=["N", "slots", "words", "splits"])
def tree_attention_combine(
    p_part,
    p_part_lse,
    p_lengths,
    p_starts,
    p_sinks,
    p_out,
    N,
    slots,
    words,
    splits,
    HQ: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NODES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program a node, head and BLOCK_D columns of values, D wide: the splits' results weighted by their
    log-sum-exp, and the sink's share taken off."""
    i_row = tl.program_id(0).to(tl.int64)
    keys = tl.minimum(tl.maximum(tl.load(p_lengths + i_row // (N * HQ)), 0), slots)
    if NODES:
        keys -= first_slot(p_starts + i_row // (N * HQ) * N, N, keys, NODES)
    o_split, o_d = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_split = o_split < splits_in_use(keys, words, splits)
    b_lse = tl.load(p_part_lse + i_row * splits + o_split, mask=m_split, other=float("-inf"))  # [BS]
    p_tile = p_part + i_row * splits * D + o_split[:, None] * D + o_d[None, :]
    b_part = tl.load(p_tile, mask=m_split[:, None] & (o_d[None, :] < D), other=0.0)  # [BS, BD]
    b_max = tl.max(b_lse, 0)
    b_weight = tl.exp2((b_lse - tl.where(b_max == float("-inf"), 0.0, b_max)) * LOG2E)
    b_total = tl.sum(b_weight, 0)
    if HAS_SINKS:
        # far above all scores a sink takes everything: its share is infinite, and the rest 0
        b_sink = tl.exp2((tl.load(p_sinks + i_row % HQ) - b_max) * LOG2E)
        b_total += tl.where(b_max == float("-inf"), 0.0, b_sink)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.where(b_total == 0, 1.0, b_total)
    tl.store(p_out + i_row * D + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < D)


def combine(
    part: Tensor,
    part_lse: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    slots: int,
    words: int,
    read: int,
) -> None:
    """`part` [B, N, H, splits, D] and `part_lse` into `out`; `read` is as many of `starts` as are read, 0: none."""
    batch, nodes, heads, splits, width = part.shape
    at_once = next(size for size in TILES if size >= splits)
    columns = min(block_d(width), TILES[at_once])
    with torch.cuda.device_of(part):
        tree_attention_combine[(batch * nodes * heads, triton.cdiv(width, columns))](
            part,
            part_lse,
            lengths,
            starts,
            sinks,
            out,
            nodes,
            slots,
            words,
            splits,
            HQ=heads,
            D=width,
            BLOCK_D=columns,
            NODES=read,
            HAS_SINKS=sinks is not None,
            BLOCK_S=at_once,
            num_warps=1 if at_once == 8 else 4,
            enable_fp_fusion=True,
        )
