"""`distill_loss` on a GPU: the vendor's matrix products, and one Triton kernel a chunk between them.

The kernel reads student and teacher logits once for both softmaxes and the cross term, and once more to leave the logit
gradient where the student's logits were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..backends import implementation

BUDGET = 512 << 20
"""Bytes of logits that exist at one time."""
BLOCK = 4096
"""Logits a program takes at a time."""


@triton.jit
def distill_loss_softmax(p_z, p_t, p_weight, p_loss, V, stride, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr):
    """Cross-entropy of one row: lse z - softmax(t) . z. Rows are `stride` apart, a multiple of 16: up to there all is
    read and written, in whole vectors, though what is past V counts for nothing."""
    i_row = tl.program_id(0)
    o_v = tl.arange(0, BLOCK_V)
    p_z += i_row.to(tl.int64) * stride
    p_t += i_row.to(tl.int64) * stride
    z_max = tl.full([], float("-inf"), tl.float32)
    t_max = tl.full([], float("-inf"), tl.float32)
    z_sum = tl.full([], 0.0, tl.float32)
    t_sum = tl.full([], 0.0, tl.float32)
    cross = tl.full([], 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        m_v, m_held = start + o_v < V, start + o_v < stride
        b_z = tl.load(p_z + start + o_v, mask=m_held, other=0.0).to(tl.float32)  # [BV]
        b_t = tl.load(p_t + start + o_v, mask=m_held, other=0.0).to(tl.float32)  # [BV]
        b_z, b_t = tl.where(m_v, b_z, float("-inf")), tl.where(m_v, b_t, float("-inf"))
        z_new = tl.maximum(z_max, tl.max(b_z, 0))
        t_new = tl.maximum(t_max, tl.max(b_t, 0))
        b_p = tl.exp(b_t - t_new)
        decay = tl.exp(t_max - t_new)
        z_sum = z_sum * tl.exp(z_max - z_new) + tl.sum(tl.exp(b_z - z_new), 0)
        t_sum = t_sum * decay + tl.sum(b_p, 0)
        cross = cross * decay + tl.sum(b_p * tl.where(m_v, b_z, 0.0), 0)
        z_max, t_max = z_new, t_new
    tl.store(p_loss + i_row, z_max + tl.log(z_sum) - cross / t_sum)
    if GRADIENT:
        weight = tl.load(p_weight + i_row)
        z_scale, t_scale = weight / z_sum, weight / t_sum
        for start in range(0, V, BLOCK_V):
            m_v, m_held = start + o_v < V, start + o_v < stride
            b_z = tl.load(p_z + start + o_v, mask=m_held, other=0.0).to(tl.float32)  # [BV]
            b_t = tl.load(p_t + start + o_v, mask=m_held, other=0.0).to(tl.float32)  # [BV]
            b_z, b_t = tl.where(m_v, b_z, float("-inf")), tl.where(m_v, b_t, float("-inf"))
            b_dz = z_scale * tl.exp(b_z - z_max) - t_scale * tl.exp(b_t - t_max)
            tl.store(p_z + start + o_v, b_dz.to(p_z.dtype.element_ty), mask=m_held)


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """float32 products in TF32 or exact, whatever torch's setting is, and that put back after. The setting is the
    process's: what other threads multiply meanwhile has it too."""
    matmul = torch.backends.cuda.matmul
    own = matmul.fp32_precision
    try:
        general = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has set the backend's own alone, and torch refuses to say the general one
        general = "highest" if own == "tf32" else "high"
    # the general setting sets both: where they disagree torch refuses products
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(general)
        matmul.fp32_precision = own


@implementation("distill_loss", "triton")
def distill_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    regression: float,
    gradient: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """One wait for the device: the number of rows with a weight."""
    with products(tf32) if student.dtype == torch.float32 else nullcontext():
        return _by_chunks(student, teacher, weight, row_weight, regression, gradient)


def rows_at_once(stride: int, itemsize: int, rows: int) -> int:
    """As many as the budget allows, a multiple of 256 if there are that many, and no more than there are."""
    most = max(1, BUDGET // (2 * stride * itemsize))
    return max(1, min(most - most % 256 if most >= 256 else most, rows))


def _by_chunks(
    student: Tensor, teacher: Tensor, weight: Tensor, row_weight: Tensor, regression: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    vocab, width = weight.shape
    stride = triton.cdiv(vocab, 16) * 16
    used = row_weight.nonzero().squeeze(-1)
    chunk = rows_at_once(stride, student.dtype.itemsize, used.numel())
    logits = student.new_empty(2, chunk, stride)[..., :vocab]
    loss = student.new_zeros((), dtype=torch.float32)
    grad = student.new_zeros(student.shape if gradient else (0,))
    for rows in used.split(chunk):
        s, t, w = (x.index_select(0, rows) for x in (student, teacher, row_weight))
        z, target = (torch.mm(x, weight.T, out=out[: len(rows)]) for x, out in zip((s, t), logits, strict=True))
        cross_entropy = torch.empty_like(w)
        with torch.cuda.device_of(student):
            distill_loss_softmax[(len(rows),)](
                z,
                target,
                w,
                cross_entropy,
                vocab,
                stride,
                GRADIENT=gradient,
                BLOCK_V=BLOCK,
                num_warps=8,
                enable_fp_fusion=True,
            )
        s, t = s.float(), t.float()
        loss += (w * (cross_entropy + regression * F.smooth_l1_loss(s, t, reduction="none").mean(-1))).sum()
        if gradient:
            through_head = (z @ weight).float()
            grad[rows] = (through_head + w[:, None] * regression / width * (s - t).clamp_(-1, 1)).to(grad.dtype)
    return loss, grad
