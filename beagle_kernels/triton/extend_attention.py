"""`extend_attention` in Triton: one program takes a few rows and the query heads that share a key head.

A row has few extra keys and none in common with another, so there is no matrix in it: products are sums along the head
size, and what the heads of a group add to their key's gradient is summed inside the program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import implementation
from .tiles import block_d, rows_contiguous

TILE = 2048
"""Elements of one [rows, group, head size] tile."""


@triton.jit
def load_tile(p_base, o_flat, m_head, o_d, D: tl.constexpr):
    return tl.load(p_base + o_flat[:, :, None] + o_d[None, None, :], mask=m_head[:, :, None] & (o_d < D), other=0.0)


@triton.jit
def load_key(p_base, o_row, j, s_row, s_j, o_d, R, D: tl.constexpr):
    p_key = p_base + o_row[:, None].to(tl.int64) * s_row + tl.cast(j, tl.int64) * s_j + o_d[None, :]
    return tl.load(p_key, mask=(o_row[:, None] < R) & (o_d[None, :] < D), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["R", "m"])
def extend_attention_merge(
    p_out,
    p_lse,
    p_q,
    p_k,
    p_v,
    p_merged,
    p_merged_lse,
    R,
    m,
    scale,
    s_kr,
    s_km,
    s_kh,
    s_vr,
    s_vm,
    s_vh,
    HQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_r, i_h = tl.program_id(0), tl.program_id(1)
    o_row = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    m_head = (o_row[:, None] < R) & (o_g[None, :] < GROUP)
    o_head = o_row[:, None].to(tl.int64) * HQ + i_h * GROUP + o_g[None, :]  # [BR, BG]
    b_q = load_tile(p_q, o_head * D, m_head, o_d, D).to(tl.float32)  # [BR, BG, BD]
    b_max = tl.load(p_lse + o_head, mask=m_head, other=float("-inf"))
    m_old = b_max > float("-inf")
    b_sum = tl.where(m_old, 1.0, 0.0)
    b_acc = load_tile(p_out, o_head * D, m_head & m_old, o_d, D).to(tl.float32)
    p_k += i_h.to(tl.int64) * s_kh
    p_v += i_h.to(tl.int64) * s_vh
    for j in range(m):
        b_k = load_key(p_k, o_row, j, s_kr, s_km, o_d, R, D)  # [BR, BD]
        b_v = load_key(p_v, o_row, j, s_vr, s_vm, o_d, R, D)  # [BR, BD]
        b_s = tl.sum(b_q * b_k[:, None, :], 2) * scale
        b_new = tl.maximum(b_max, b_s)
        b_decay, b_p = tl.exp(b_max - b_new), tl.exp(b_s - b_new)
        b_acc = b_acc * b_decay[:, :, None] + b_p[:, :, None] * b_v[:, None, :]
        b_sum = b_sum * b_decay + b_p
        b_max = b_new
    b_safe = tl.where(b_sum > 0, b_sum, 1.0)
    b_acc = (b_acc / b_safe[:, :, None]).to(p_merged.dtype.element_ty)
    p_tile = p_merged + o_head[:, :, None] * D + o_d[None, None, :]
    tl.store(p_tile, b_acc, mask=m_head[:, :, None] & (o_d < D))
    tl.store(p_merged_lse + o_head, b_max + tl.log(b_safe), mask=m_head)


@triton.jit(do_not_specialize=["R", "m"])
def extend_attention_gradients(
    p_out,
    p_lse,
    p_q,
    p_k,
    p_v,
    p_g,
    p_h,
    p_dout,
    p_dlse,
    p_dq,
    p_dk,
    p_dv,
    R,
    m,
    scale,
    s_kr,
    s_km,
    s_kh,
    s_vr,
    s_vm,
    s_vh,
    HQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_H: tl.constexpr,
):
    """Once through the keys for the merged lse and the mean of g . v, once more for the gradients."""
    i_r, i_h = tl.program_id(0), tl.program_id(1)
    o_row = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    m_head = (o_row[:, None] < R) & (o_g[None, :] < GROUP)
    o_head = o_row[:, None].to(tl.int64) * HQ + i_h * GROUP + o_g[None, :]  # [BR, BG]
    p_k += i_h.to(tl.int64) * s_kh
    p_v += i_h.to(tl.int64) * s_vh
    b_q = load_tile(p_q, o_head * D, m_head, o_d, D).to(tl.float32)  # [BR, BG, BD]
    b_g = load_tile(p_g, o_head * D, m_head, o_d, D).to(tl.float32)  # [BR, BG, BD]
    b_lse = tl.load(p_lse + o_head, mask=m_head, other=float("-inf"))
    m_old = b_lse > float("-inf")
    b_along = tl.sum(b_g * load_tile(p_out, o_head * D, m_head & m_old, o_d, D).to(tl.float32), 2)
    b_max, b_sum, b_mean = b_lse, tl.where(m_old, 1.0, 0.0), b_along
    for j in range(m):
        b_k = load_key(p_k, o_row, j, s_kr, s_km, o_d, R, D)  # [BR, BD]
        b_v = load_key(p_v, o_row, j, s_vr, s_vm, o_d, R, D)  # [BR, BD]
        b_s = tl.sum(b_q * b_k[:, None, :], 2) * scale
        b_new = tl.maximum(b_max, b_s)
        b_decay, b_p = tl.exp(b_max - b_new), tl.exp(b_s - b_new)
        b_mean = b_mean * b_decay + b_p * tl.sum(b_g * b_v[:, None, :], 2)
        b_sum = b_sum * b_decay + b_p
        b_max = b_new
    b_safe = tl.where(b_sum > 0, b_sum, 1.0)
    b_pivot = tl.where(b_sum > 0, b_max, 0.0)
    b_shift = b_mean / b_safe
    if HAS_H:
        b_shift -= tl.load(p_h + o_head, mask=m_head, other=0.0)

    b_p = tl.where(m_old, tl.exp(b_lse - b_pivot), 0.0) / b_safe
    p_tile = o_head[:, :, None] * D + o_d[None, None, :]
    m_tile = m_head[:, :, None] & (o_d < D)
    tl.store(p_dout + p_tile, (b_p[:, :, None] * b_g).to(p_dout.dtype.element_ty), mask=m_tile)
    tl.store(p_dlse + o_head, b_p * (b_along - b_shift), mask=m_head)
    b_dq = tl.zeros_like(b_q)
    for j in range(m):
        b_k = load_key(p_k, o_row, j, s_kr, s_km, o_d, R, D)  # [BR, BD]
        b_v = load_key(p_v, o_row, j, s_vr, s_vm, o_d, R, D)  # [BR, BD]
        b_p = tl.exp(tl.sum(b_q * b_k[:, None, :], 2) * scale - b_pivot) / b_safe
        b_p = tl.where(m_head, b_p, 0.0)
        b_ds = b_p * (tl.sum(b_g * b_v[:, None, :], 2) - b_shift) * scale
        b_dq += b_ds[:, :, None] * b_k[:, None, :]
        p_key = ((o_row[:, None].to(tl.int64) * m + j) * (HQ // GROUP) + i_h) * D + o_d[None, :]
        m_key = (o_row[:, None] < R) & (o_d[None, :] < D)
        tl.store(p_dk + p_key, tl.sum(b_ds[:, :, None] * b_q, 1).to(p_dk.dtype.element_ty), mask=m_key)
        tl.store(p_dv + p_key, tl.sum(b_p[:, :, None] * b_g, 1).to(p_dv.dtype.element_ty), mask=m_key)
    tl.store(p_dq + p_tile, b_dq.to(p_dq.dtype.element_ty), mask=m_tile)


def _launch(kernel, q: Tensor, k: Tensor, v: Tensor, args: tuple, **more) -> None:
    rows, heads, width = q.shape
    group, wide = heads // k.shape[2], block_d(width)
    block_g = triton.next_power_of_2(group)
    constants = dict(HQ=heads, GROUP=group, D=width, BLOCK_G=block_g, BLOCK_D=wide, enable_fp_fusion=True)
    block_r = max(1, TILE // (block_g * wide))
    grid = (triton.cdiv(rows, block_r), k.shape[2])
    with torch.cuda.device_of(q):
        kernel[grid](*args, *k.stride()[:3], *v.stride()[:3], **constants, **more, BLOCK_R=block_r, num_warps=4)


@implementation("extend_attention", "triton")
def extend_attention(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if k.shape[1] == 0:
        return torch.where(lse[..., None] > float("-inf"), out, 0.0).contiguous(), lse.clone().contiguous()
    out, lse, q = out.contiguous(), lse.contiguous(), q.contiguous()
    k, v = rows_contiguous(k, v)
    merged, merged_lse = torch.empty_like(out), torch.empty_like(lse)
    if q.numel():
        _launch(extend_attention_merge, q, k, v, (out, lse, q, k, v, merged, merged_lse, q.shape[0], k.shape[1], scale))
    return merged, merged_lse


@implementation("extend_attention_backward", "triton")
def extend_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_out, out, lse, q = grad_out.contiguous(), out.contiguous(), lse.contiguous(), q.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    k, v = rows_contiguous(k, v)
    grads = [x.new_empty(x.shape) for x in (out, lse, q, k, v)]
    if q.numel():
        args = out, lse, q, k, v, grad_out, grad_lse, *grads, q.shape[0], k.shape[1], scale
        _launch(extend_attention_gradients, q, k, v, args, HAS_H=grad_lse is not None)
    return tuple(grads)
