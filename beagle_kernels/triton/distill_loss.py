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
from .tiles import LN2, LOG2E

BUDGET = 512 << 20
"""Bytes of logits that exist at one time."""
BLOCK = 4096
"""Logits a program takes at a time."""
NOTHING = tl.constexpr(-1e30)
"""The logit of what is not there."""


@triton.jit
def load_logits(p_z, p_t, o_v, V, stride):
    """fp32, and past V so low that they weigh nothing, yet finite: a lane may hold nothing else."""
    m_held, m_v = o_v < stride, o_v < V
    b_z = tl.load(p_z + o_v, mask=m_held, other=0.0).to(tl.float32)
    b_t = tl.load(p_t + o_v, mask=m_held, other=0.0).to(tl.float32)
    return tl.where(m_v, b_z, NOTHING), tl.where(m_v, b_t, NOTHING)


@triton.jit
def distill_loss_softmax(p_z, p_t, p_weight, p_loss, V, stride, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr):
    """Cross-entropy of one row: lse z - softmax(t) . z. Rows are `stride` apart, a multiple of 16: up to there all is
    read and written, in whole vectors, though what is past V counts for nothing. Each lane, a vector wide, has its own
    maxima and sums, so that threads meet only at the end of the row. Exponents are in base 2."""
    LANE: tl.constexpr = 128 // p_z.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK_V // LANE
    i_row = tl.program_id(0)
    o_v = tl.arange(0, LANES)[:, None] * LANE + tl.arange(0, LANE)[None, :]  # [lanes, LANE]
    p_z += i_row.to(tl.int64) * stride
    p_t += i_row.to(tl.int64) * stride
    b_z_max = tl.full([LANES], NOTHING, tl.float32)
    b_t_max = tl.full([LANES], NOTHING, tl.float32)
    b_z_sum = tl.zeros([LANES], tl.float32)
    b_t_sum = tl.zeros([LANES], tl.float32)
    b_cross = tl.zeros([LANES], tl.float32)
    for start in range(0, V, BLOCK_V):
        b_z, b_t = load_logits(p_z, p_t, start + o_v, V, stride)
        b_z_new = tl.maximum(b_z_max, tl.max(b_z, 1) * LOG2E)
        b_t_new = tl.maximum(b_t_max, tl.max(b_t, 1) * LOG2E)
        b_p = tl.exp2(b_t * LOG2E - b_t_new[:, None])
        b_decay = tl.exp2(b_t_max - b_t_new)
        b_z_sum = b_z_sum * tl.exp2(b_z_max - b_z_new) + tl.sum(tl.exp2(b_z * LOG2E - b_z_new[:, None]), 1)
        b_t_sum = b_t_sum * b_decay + tl.sum(b_p, 1)
        b_cross = b_cross * b_decay + tl.sum(b_p * b_z, 1)
        b_z_max, b_t_max = b_z_new, b_t_new
    z_max, t_max = tl.max(b_z_max, 0), tl.max(b_t_max, 0)
    b_decay = tl.exp2(b_t_max - t_max)
    z_sum = tl.sum(b_z_sum * tl.exp2(b_z_max - z_max), 0)
    t_sum = tl.sum(b_t_sum * b_decay, 0)
    tl.store(p_loss + i_row, (z_max + tl.log2(z_sum)) * LN2 - tl.sum(b_cross * b_decay, 0) / t_sum)
    if GRADIENT:
        weight = tl.load(p_weight + i_row)
        z_scale, t_scale = weight / z_sum, weight / t_sum
        for start in range(0, V, BLOCK_V):
            b_z, b_t = load_logits(p_z, p_t, start + o_v, V, stride)
            b_dz = z_scale * tl.exp2(b_z * LOG2E - z_max) - t_scale * tl.exp2(b_t * LOG2E - t_max)
            tl.store(p_z + start + o_v, b_dz.to(p_z.dtype.element_ty), mask=start + o_v < stride)


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
